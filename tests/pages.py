"""The pages that users read: their blocks of code, and their links."""

import re
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = ("README.md", *sorted(str(page.relative_to(ROOT)) for page in DOCS.rglob("*.md")))


class Block(NamedTuple):
    """A fenced block: its language, the file that its title names or "", and its text."""

    language: str
    file: str
    text: str


def blocks(page: str) -> list[Block]:
    """The blocks of a page, in their order."""
    found = re.findall(
        r'^```(\w*)(?: title="([^"]*)")?\n(.*?)^```$', (ROOT / page).read_text(), re.DOTALL | re.MULTILINE
    )
    return [Block(*groups) for groups in found]


def commands(page: str) -> list[str]:
    """The commands of a page's shell blocks, one a line."""
    shell = [block.text.replace("\\\n", " ") for block in blocks(page) if block.language == "sh"]
    return [" ".join(line.split()) for text in shell for line in text.splitlines()]


def links(page: str) -> list[tuple[str, str]]:
    """The text and the target of every link that does not leave the repository."""
    without_code = re.sub(r"^```.*?^```$", "", (ROOT / page).read_text(), flags=re.DOTALL | re.MULTILINE)
    return re.findall(r"\[([^\[\]]*)\]\((?!https?:)([^)\s]+)\)", without_code)
