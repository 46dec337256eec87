"""The table of plans in docs/performance.md: a plan that is written into it changes nothing else."""

from plans import BEGIN, END, SLICES, read_table, shipped, with_table

PAGE = f"before\n{BEGIN}\n\nNot made yet.\n\n{END}\nafter\n"


def test_cells_are_read_as_they_were_written(monkeypatch):
    monkeypatch.setattr("importlib.metadata.version", lambda name: "1.0")  # libtpu is not there
    first, second, *_ = shipped()
    cells = {
        (first, SLICES[1]): "batch 2: 3 pairs/s, 4%, 1 GiB left",
        (second, SLICES[0]): "batch 4: does not fit by 1 GiB",
    }
    assert read_table(PAGE) == {}
    page = with_table(PAGE, cells)
    assert read_table(page) == cells and with_table(page, cells) == page
    assert page.startswith("before\n") and page.endswith("\nafter\n")
    assert page.count("\n| `") == len(shipped())
