"""The matrix of docs/formats.md: its kinds and columns are those of the code, its differences those measured."""

import pytest

from tests.formats.matrix import (
    BEGIN,
    END,
    KINDS,
    LARGEST,
    PAGE,
    bound,
    is_within,
    measure,
    read_table,
    row,
    with_table,
)

pytestmark = pytest.mark.formats

HOW = "if this is wanted: python -m tests.formats"


@pytest.fixture(scope="module")
def table():
    return read_table(PAGE.read_text(encoding="utf-8"))


def test_the_page_has_every_kind_and_says_how_it_is_read_and_written(table):
    assert len(KINDS) >= 40
    assert table == {name: row(kind, table[name][-1] if name in table else "") for name, kind in KINDS.items()}, HOW


@pytest.mark.parametrize("name", KINDS)
def test_a_kind_is_read_as_the_library_reads_it_and_comes_back_where_it_is_written(name, made, table, tmp_path):
    difference = measure(KINDS[name], made(name), tmp_path)
    assert is_within(difference, table[name][-1]), f"{difference:.1e}; {HOW}"


def test_what_the_table_says_to_write_a_kind_is_tested():
    assert [name for name, kind in KINDS.items() if (kind.write is None) == bool(kind.written)] == []


def test_differences_are_told_by_powers_of_ten():
    assert [bound(x) for x in (0.0, 1e-7, 3.2e-7, 4e-7, 9e-6)] == ["0", "< 1e-6", "< 1e-6", "< 1e-5", "< 1e-4"]
    assert is_within(0.0, "0") and not is_within(1e-9, "0")
    assert is_within(2e-7, "< 1e-6") and not is_within(2e-6, "< 1e-6") and not is_within(1e-10, "< 1e-6")
    assert not is_within(2e-4, "< 1e-3") and LARGEST < 1e-3


def test_a_table_is_read_as_it_was_written():
    page = with_table(f"before\n{BEGIN}\n{END}\nafter\n", dict.fromkeys(KINDS, "0"))
    assert read_table(page) == {name: row(kind, "0") for name, kind in KINDS.items()}
    assert page.startswith("before\n") and page.endswith("\nafter\n")
    assert with_table(page, dict.fromkeys(KINDS, "0")) == page
