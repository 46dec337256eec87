"""The bench of a start on a small network: its figures mean what they say."""

import json

import pytest

from bench.__main__ import main
from bench.all import SMALL
from tests.training.tiny import tiny_checkpoint


@pytest.mark.program
def test_the_second_start_compiles_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    file = tmp_path / "new" / "figures.json"
    model = tiny_checkpoint(tmp_path / "sd15", "sd15")
    main(["compile", "--model", str(model), "--json", str(file)])
    told, captured = json.loads(file.read_text()), capsys.readouterr()
    assert json.loads(captured.out) == told
    first, second = told["empty_cache"], told["filled_cache"]
    assert first["programs_loaded"] == 0 and second["programs_compiled"] == 0
    assert second["programs_loaded"] == first["programs_compiled"] > 0
    for start in (first, second):
        seconds = dict(start["seconds"])
        assert min(seconds.values()) > 0 and seconds.pop("all, of processors") > 0
        assert seconds.pop("all") == pytest.approx(sum(seconds.values()), abs=0.1)
    # Half of it in such a small network is the count of its operations, which goes on meanwhile.
    assert second["seconds"]["compiling or loading"] < first["seconds"]["compiling or loading"]
    assert f"{first['seconds']['tracing']:.1f}" in captured.err
    assert [measure.read(told)["ours"] for measure in SMALL["compile"].measures] == [
        [first["seconds"]["all"]],
        [second["seconds"]["all"]],
    ]


def test_a_mistake_is_told_before_anything_is_measured():
    with pytest.raises(ValueError, match="rank=0"):
        main(["compile", "--rank", "0"])
