"""All kinds of files, and the matrix of them in docs/formats.md.

    python -m tests.formats    measures every kind and writes the matrix into the page (`make formats`)

A difference stands on the page as a power of ten that it is below, so that machines that round otherwise agree.
"""

import contextlib
import functools
import importlib
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import pytest

from flax_pref.checkpoints import single_file, weights
from flax_pref.models.network import Network
from tests.data.stored_datasets import offline
from tests.formats.adapter_kinds import ADAPTERS
from tests.formats.checkpoint_kinds import CHECKPOINTS, SCHEDULERS, TOKENIZERS
from tests.formats.embedding_kinds import EMBEDDINGS
from tests.formats.kinds import Kind, Made, worst_difference
from tests.formats.preference_set_kinds import PREFERENCE_SETS
from tests.formats.reward_kinds import REWARDS
from tests.formats.text_adapter_kinds import TEXT_ADAPTERS

GROUPS = {
    "Checkpoints": CHECKPOINTS + TOKENIZERS + SCHEDULERS,
    "Textual inversions": EMBEDDINGS,
    "Adapters": ADAPTERS + TEXT_ADAPTERS,
    "Rewards": REWARDS,
    "Preference sets": PREFERENCE_SETS,
}
KINDS = {kind.name: kind for kinds in GROUPS.values() for kind in kinds}

PAGE = Path(__file__).parents[2] / "docs" / "formats.md"
BEGIN, END = "<!-- matrix: begin -->", "<!-- matrix: end -->"
HEADER = ("kind of file", "read", "written", "reference", "worst difference")
RULE = ("---",) * len(HEADER)
LARGEST = 1e-4  # that any kind may differ by
ROUNDING = 3  # times what is measured here, a machine may measure elsewhere


@contextlib.contextmanager
def libraries(folder: Path) -> Iterator[None]:
    """The libraries offline, with caches in this folder, and silent.

    torch has one thread: more wait for each other longer than networks this small take. What is the same for many
    files is made once: networks with shapes for weights, and CLIP's tokenizer.
    """
    abstract = functools.lru_cache(weights.Component.abstract)

    def copied(*arguments: Any, **options: Any) -> Network:
        network = abstract(*arguments, **options)
        return network._replace(params=jax.tree.map(lambda leaf: leaf, network.params))

    with pytest.MonkeyPatch.context() as patch, contextlib.ExitStack() as stack:
        offline(folder, patch)
        patch.setattr(weights.Component, "abstract", copied)
        patch.setattr(single_file, "clip_tokenizer", functools.cache(single_file.clip_tokenizer))
        for name in ("diffusers", "transformers"):
            with contextlib.suppress(ModuleNotFoundError):
                logging = importlib.import_module(f"{name}.utils.logging")
                logging.disable_progress_bar()
                logging.set_verbosity_error()
        with contextlib.suppress(ModuleNotFoundError):
            torch = importlib.import_module("torch")
            stack.callback(torch.set_num_threads, torch.get_num_threads())
            torch.set_num_threads(1)
        yield


def make(kind: Kind, folder: Path) -> Made:
    """A file of a kind in an empty folder, the same at each call: libraries draw the first weights of adapters."""
    with contextlib.suppress(ModuleNotFoundError):
        importlib.import_module("torch").manual_seed(0)
    return kind.make(folder)


def measure(kind: Kind, made: Made, folder: Path) -> float:
    """The worst difference of a kind, also of what is written where the kind is, and read again.

    Args:
        kind: the row.
        made: a file of it.
        folder: empty.
    """
    read = kind.load(made.path)
    ours = kind.numbers(read)
    worst = worst_difference(ours, made.expected())
    if kind.write is not None:
        worst = max(worst, worst_difference(kind.numbers(kind.load(kind.write(read, folder))), ours))
    return worst


def bound(difference: float) -> str:
    """As the table has it: "0", or the next power of ten that other machines are below too."""
    if difference == 0:
        return "0"
    return f"< 1e{math.ceil(math.log10(ROUNDING * difference)):d}"


def is_within(difference: float, told: str) -> bool:
    """Whether a difference is what the table says: below it, and not as small as a thousandth of it."""
    if told == "0":
        return difference == 0
    limit = float(told.removeprefix("< "))
    return 1e-3 * limit <= difference < limit <= LARGEST


def row(kind: Kind, difference: str) -> tuple[str, ...]:
    """Cells of a kind."""
    return kind.name, kind.read, kind.written, kind.reference, difference


def read_table(page: str) -> dict[str, tuple[str, ...]]:
    """Rows of the matrix on the page by the names of kinds."""
    lines = [line for line in page.partition(BEGIN)[2].partition(END)[0].splitlines() if line.startswith("| ")]
    rows = [tuple(cell.strip() for cell in line.split("|")[1:-1]) for line in lines]
    return {cells[0]: cells for cells in rows if cells not in (HEADER, RULE)}


def with_table(page: str, differences: Mapping[str, str]) -> str:
    """The page with the matrix of all kinds.

    Args:
        page: that has the markers.
        differences: of the kinds by their names.
    """
    text = ""
    for group, kinds in GROUPS.items():
        rows = [HEADER, RULE, *(row(kind, differences[kind.name]) for kind in kinds)]
        text += f"\n### {group}: {len(kinds)} kinds\n\n" + "".join(f"| {' | '.join(cells)} |\n" for cells in rows)
    before, _, rest = page.partition(BEGIN)
    return f"{before}{BEGIN}\n{text}\n{END}{rest.partition(END)[2]}"
