"""Published files that some tests read and this project holds no copy of."""

import os
from pathlib import Path

import pytest

FOLDER = Path(os.environ.get("FLAX_PREF_DATA", Path(__file__).parents[3] / "shared" / "data"))


def published(path: str) -> Path:
    """A file or folder under $FLAX_PREF_DATA; the calling test is skipped where it is absent."""
    if not (FOLDER / path).exists():
        pytest.skip(f"{path} is not in $FLAX_PREF_DATA")
    return FOLDER / path
