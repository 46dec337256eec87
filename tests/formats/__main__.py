"""Measures every kind of file and writes the matrix into docs/formats.md."""

import sys
import tempfile
from pathlib import Path

from flax_pref.files import replacing
from tests.formats.matrix import KINDS, LARGEST, PAGE, bound, libraries, make, measure, with_table


def main() -> None:
    """Writes the page only if every kind was measured, and differs by little enough."""
    differences = {}
    with tempfile.TemporaryDirectory() as folder, libraries(Path(folder) / "cache"):
        for number, kind in enumerate(KINDS.values()):
            places = [Path(folder) / f"{number}{name}" for name in (" made", " written")]
            for place in places:
                place.mkdir()
            difference = measure(kind, make(kind, places[0]), places[1])
            differences[kind.name] = bound(difference)
            print(f"{kind.name}: {difference:.1e}", file=sys.stderr, flush=True)
            if difference > LARGEST:
                sys.exit(f"error: {kind.name} differs by {difference:.1e}, more than {LARGEST:g}")
    with replacing(PAGE) as unfinished:
        unfinished.write_text(with_table(PAGE.read_text(encoding="utf-8"), differences), encoding="utf-8")


if __name__ == "__main__":
    main()
