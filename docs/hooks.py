"""mkdocs: a link to a file of the package, which a view of the repository follows, leads to its reference page here."""

import re

# [`cpgd`](../flax_pref/diffusion/guidance.py): a function or class has its own place in the reference.
LINK = re.compile(r"\[([^\[\]]+)\]\((?:\.\./)+(flax_pref/[\w/]+)\.py\)")
NAME = re.compile(r"`(\w*[a-z]\w*)`")


def on_page_markdown(markdown: str, **_) -> str:
    """The page with such links as cross-references of mkdocstrings; one that leads nowhere fails a strict build."""

    def reference(link: re.Match) -> str:
        module, name = link[2].replace("/", ".").removesuffix(".__init__"), NAME.fullmatch(link[1])
        return f"[{link[1]}][{module}{f'.{name[1]}' if name else ''}]"

    return LINK.sub(reference, markdown)
