"""All benches in one table, and what it says of two of them."""

import json

import pytest

from bench import all as every
from bench.__main__ import main
from bench.all import SMALL, SUITES, Measure, Run
from tests.test_bench import TINY


@pytest.fixture
def told(monkeypatch):
    """Figures of two benches, one with rounds and one without; tests change them."""
    values = {"quick": {"seconds": [1.0, 1.2], "torch": [2.0, 2.0]}, "lonely": {"seconds": 3.0}}
    seconds = Measure("a thing", "s", lambda told: told["seconds"], lambda told: told.get("torch"))
    alone = Measure("another", "s", lambda told: told["seconds"])
    runs = {"quick": Run("quick --size 8", (seconds,)), "lonely": Run("lonely", (alone,))}
    monkeypatch.setitem(SUITES, "small", runs)
    monkeypatch.setattr(every, "_run", lambda arguments: values[arguments[0]])
    return values


def table(tmp_path, name, *flags):
    main(["all", "--json", str(tmp_path / name), *flags])
    return json.loads((tmp_path / name).read_text())["figures"]


def test_a_table_has_ratios_to_torch_and_the_noise_of_what_is_compared(told, tmp_path, capsys):
    figures = table(tmp_path, "one.json")
    assert figures["a thing"]["ratio_to_torch"] == pytest.approx(0.55)
    assert figures["a thing"]["noise"] == pytest.approx(0.1 / 0.55)
    assert figures["another"] == {"bench": "lonely", "unit": "s", "ours": [3.0], "median": 3.0}
    assert "0.55" in capsys.readouterr().err


def test_rounds_of_every_time_count(told, tmp_path):
    figures = table(tmp_path, "one.json", "--times", "2")
    assert figures["a thing"]["ours"] == [1.0, 1.2] * 2
    assert figures["another"]["noise"] == 0.0


@pytest.mark.parametrize(("times", "slower"), [(1.15, []), (1.25, ["another"]), (0.5, [])])
def test_what_became_slower_beyond_noise_is_named(told, tmp_path, capsys, times, slower):
    table(tmp_path, "before.json")
    told["lonely"] = {"seconds": 3.0 * times}
    told["quick"] = {"seconds": [1.2, 1.3], "torch": [2.0, 2.0]}  # by less than the rounds differ by
    table(tmp_path, "after.json")
    capsys.readouterr()
    main(["compare", str(tmp_path / "before.json"), str(tmp_path / "after.json")])
    captured = capsys.readouterr()
    said = json.loads(captured.out)
    assert said["slower"] == slower
    assert said["changes"]["a thing"]["verdict"] == "same"
    assert said["changes"]["another"]["verdict"] == {1.15: "same", 1.25: "slower", 0.5: "faster"}[times]
    assert ("slower" in captured.err) == bool(slower)


def test_on_another_machine_ratios_to_torch_are_what_is_compared(told, tmp_path, capsys):
    table(tmp_path, "before.json")
    told["quick"] = {whose: [4 * value for value in values] for whose, values in told["quick"].items()}
    table(tmp_path, "after.json")
    main(["compare", str(tmp_path / "before.json"), str(tmp_path / "after.json")])
    said = capsys.readouterr().out
    assert json.loads(said[said.index('{\n  "slower"') :])["changes"]["a thing"]["verdict"] == "same"


def test_the_history_keeps_ratios_of_every_day(told, tmp_path, capsys):
    for name in ("one.json", "two.json"):
        table(tmp_path, name, "--history", str(tmp_path / "new" / "history.jsonl"))
    lines = (tmp_path / "new" / "history.jsonl").read_text().splitlines()
    assert [json.loads(line)["ratios_to_torch"] for line in lines] == [{"a thing": 0.55}] * 2
    assert capsys.readouterr().err.count("ours / torch  20") == 2


def test_what_a_bench_needs_and_is_not_there_is_said(told, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(SUITES["small"], "lonely", SUITES["small"]["lonely"]._replace(lacks=lambda: "a pod"))
    assert list(table(tmp_path, "one.json")) == ["a thing"]
    assert "lonely is left out: it needs a pod" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["all", "--only", "unets"], "--only unets: expected some of unet"),
        (["all", "--times", "0"], "--times 0"),
        (["compare", "none.json", "none.json"], "none.json: no such file; expected a table of bench all"),
    ],
)
def test_a_mistake_is_told_before_anything_is_measured(arguments, message):
    with pytest.raises((ValueError, OSError), match=message):
        main(arguments)


def test_a_file_that_is_no_table_is_refused(tmp_path):
    (tmp_path / "unet.json").write_text("{}")
    with pytest.raises(ValueError, match=r"unet\.json: has no figures"):
        main(["compare", str(tmp_path / "unet.json"), str(tmp_path / "unet.json")])


@pytest.mark.program
def test_the_suite_of_gpus_runs_from_end_to_end_on_any_device(tmp_path):
    unet = tmp_path / "config.json"
    unet.write_text(json.dumps(TINY.unet.to_dict()))
    only = ("--only", "sd15", "sd15-xla", "sd15-step")
    figures = table(tmp_path, "gpu.json", "--suite", "gpu", "--times", "1", *only, "--flags", f"unet={unet}", "size=64")
    assert len(figures) == 2 + 2 + 3
    assert min(row["median"] for row in figures.values()) > 0
    assert figures["step of cPGD, SD1.5"]["ratio_to_torch"] > 0
    assert figures["training step of Diffusion-DPO, SD1.5"]["share_of_measured_peak"] > 0


def test_every_bench_but_the_two_tables_is_in_the_table():
    from bench.__main__ import BENCHES

    assert {kind.__name__.lower() for kind in BENCHES} == {*SMALL, "all", "compare"}
