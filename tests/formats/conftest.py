"""Files of every kind, each made once."""

import functools

import pytest

from tests.formats.matrix import KINDS, libraries, make


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """Gives a file of a kind by its name; the test is skipped where a library that makes it is missing."""
    folder = tmp_path_factory.mktemp("formats")

    @functools.cache
    def make_once(name):
        place = folder / str(list(KINDS).index(name))
        place.mkdir()
        return make(KINDS[name], place)

    def find(name):
        for library in KINDS[name].needs:
            pytest.importorskip(library)
        return make_once(name)

    with libraries(folder / "cache"):
        yield find
