"""Parts of the demo that users run alone."""

import pyarrow.parquet as pq

from flax_pref.cli import command


def test_pairs_only_writes_labelled_pairs_and_trains_nothing(tmp_path, capsys):
    assert command.main(["demo", "--pairs-only", "--pairs", "4", "--output", str(tmp_path / "demo")]) == 0
    assert capsys.readouterr().out.endswith(f"wrote {tmp_path / 'demo' / 'pairs.parquet'}\n")
    assert {path.name for path in (tmp_path / "demo").glob("[!.]*")} == {"config.json", "pairs.parquet"}
    table = pq.read_table(tmp_path / "demo" / "pairs.parquet")
    assert table.num_rows == 4 and {"caption", "jpg_0", "jpg_1", "label_0"} <= set(table.column_names)
