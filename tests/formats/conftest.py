"""Files of every kind, each made once."""

import functools

import pytest

from tests.formats.matrix import KINDS, libraries


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """Gives a file of a kind by its name; the test is skipped where a library that makes it is missing."""
    folder = tmp_path_factory.mktemp("formats")

    @functools.cache
    def make(name):
        place = folder / str(list(KINDS).index(name))
        place.mkdir()
        return KINDS[name].make(place)

    def find(name):
        for library in KINDS[name].needs:
            pytest.importorskip(library)
        return make(name)

    with libraries(folder / "cache"):
        yield find
