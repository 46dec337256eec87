"""Measures every kind of file, or those whose names contain an argument, and writes the matrix into docs/formats.md."""

import sys
import tempfile
from pathlib import Path

from flax_pref.files import replacing
from tests.formats.matrix import KINDS, LARGEST, PAGE, bound, libraries, make, measure, read_table, with_table


def main() -> None:
    """Writes the page only if every kind was measured, and differs by little enough."""
    page, wanted = PAGE.read_text(encoding="utf-8"), sys.argv[1:] or [""]
    differences = {name: cells[-1] for name, cells in read_table(page).items()}
    with tempfile.TemporaryDirectory() as folder, libraries(Path(folder) / "cache"):
        for number, kind in enumerate(KINDS.values()):
            if not any(part in kind.name for part in wanted):
                continue
            places = [Path(folder) / f"{number}{name}" for name in (" made", " written")]
            for place in places:
                place.mkdir()
            difference = measure(kind, make(kind, places[0]), places[1])
            differences[kind.name] = bound(difference)
            print(f"{kind.name}: {difference:.1e}", file=sys.stderr, flush=True)
            if difference > LARGEST:
                sys.exit(f"error: {kind.name} differs by {difference:.1e}, more than {LARGEST:g}")
    with replacing(PAGE) as unfinished:
        unfinished.write_text(with_table(page, differences), encoding="utf-8")


if __name__ == "__main__":
    main()
