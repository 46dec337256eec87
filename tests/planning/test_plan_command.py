import importlib.util
import re
from types import SimpleNamespace

import pytest

from flax_pref.config import UserError, load_config
from flax_pref.planning import requests
from flax_pref.planning.command import compared
from flax_pref.planning.plan import excess_of
from flax_pref.planning.plan_flags import PlanFlags, own_flags
from flax_pref.planning.topologies import CHIPS, topology
from flax_pref.planning.training import divisible
from flax_pref.training.trainer import TrainConfig
from sample.plan import main as sample_plan


def test_what_the_compiler_refuses_says_how_much_a_chip_lacks():
    temporaries = (
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (8.19T) exceeds "
        "available HBM (15.75G)."
    )
    assert excess_of(temporaries) == pytest.approx(8.19 * 2**40 - 15.75 * 2**30, rel=1e-9)
    used = "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 18.25G of "
    assert excess_of(used + "15.75G hbm. Exceeded hbm capacity by 2.50G.\n\nTotal hbm usage >= 18.75G") == 2.5 * 2**30
    assert excess_of("RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem.") is None
    assert excess_of("INTERNAL: something else by 2.50G") is None


def test_flags_of_the_plan_are_told_from_those_of_the_config():
    arguments = ["config.py", "--steps", "3", "--topology", "v5e:2x2", "--effort=full", "--mesh", "data=4", "--compare"]
    flags, others = own_flags(arguments, PlanFlags)
    assert flags == PlanFlags(topology="v5e:2x2", effort="full", compare=True)
    assert others == ["config.py", "--steps", "3", "--mesh", "data=4"]


def test_a_plan_without_a_slice_is_one_line(capsys):
    with pytest.raises(SystemExit) as exit:
        own_flags(["config.py"], PlanFlags)
    assert exit.value.code == 2 and capsys.readouterr().err.count("\n") == 1


def test_help_has_the_flags_of_both(capsys):
    assert own_flags(["config.py", "--help"], PlanFlags) == (None, ["config.py", "--help"])
    assert "--topology" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["v9:2x2", "v5e", "v5e:2x", "2x2"])
def test_a_slice_of_no_known_kind_is_one_line_that_says_which_there_are(name):
    with pytest.raises(UserError, match=f"{name}: expected one of v4, v5e, v5p, v6e, tpu7x"):
        topology(name)


def test_without_libtpu_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=re.escape("pip install -e '.[tpu]'")):
        topology("v5e:2x2")


def test_clocks_are_those_at_which_matrix_units_reach_the_peak():
    for kind, units, peak in (("v4", 8, 275), ("v5e", 4, 197), ("v5p", 8, 459), ("v6e", 4, 918), ("tpu7x", 4, 1153.5)):
        chip = CHIPS[kind]
        assert 2 * units * chip.mxu**2 * chip.clock == pytest.approx(peak * 1e12, rel=0.01)


def test_a_table_has_the_fastest_first_and_what_does_not_fit_last():
    def told(rate, excess):
        return {
            **{"unit": "pair", "effort": "quick", "fits": excess <= 0, "excess_bytes": excess, "seconds": 1.0},
            **{"per_second_per_chip": rate, "share_of_peak": 0.25},
        }

    rows = [
        (["--mesh", "slow"], told(1.0, -(2**30)), ""),
        (["--mesh", "large"], told(9.0, 2**30), ""),
        (["--mesh", "fast"], told(2.0, -(2**20)), ""),
        (["--mesh", "none"], None, "error: does not make up 4 devices"),
    ]
    lines = compared(rows).splitlines()
    assert [re.search("fast|slow|large|none", line)[0] for line in lines[1:5]] == ["fast", "slow", "large", "none"]
    assert lines[1].endswith("1.00 MiB") and "does not fit by 1.00 GiB" in lines[3]
    assert "does not make up 4 devices" in lines[4] and "not measured" in lines[5]


@pytest.mark.parametrize(
    ("config", "chips", "planned"),
    [
        ("sd15/dpo", 4, (2048, 128)),
        ("sd15/dpo", 256, (2048, 8)),
        ("sd15/chats", 256, (256, 1)),
        ("sdxl/tailorpo", 64, (192, 3)),
        ("sd15/tailorpo", 64, (64, 1)),  # weights change in a trajectory: a batch is one step of all prompts
    ],
)
def test_a_plan_has_a_batch_that_the_chips_of_the_slice_can_share_and_says_which(config, chips, planned, capsys):
    config = load_config([f"configs/{config}.py"], TrainConfig)
    mesh = SimpleNamespace(size=chips, shape={"data": chips})
    found = divisible(config, mesh)
    assert (found.batch_size, found.accumulation) == planned
    assert ("cannot be divided" in capsys.readouterr().out) == (found != config)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--steps", "0"), "--steps 0: expected at least 1"),
        (("--steps", "5000"), "steps must lie in 1"),
        (("--height", "65"), "--height 65: expected multiples of 8, e.g. 64"),
        (("--rank", "0"), "--rank 0: expected at least 1"),
        (("--rule", "cpgd", "--w", "list:4:0"), "--w list:4:0: 2 values, but the solver takes 50 steps"),
        (("--model", "no/model"), "no/model: no such file"),
        (("--topology", "v9:2x2"), "--topology v9:2x2: expected one of"),
    ],
)
def test_a_mistake_is_told_before_the_compiler_is_loaded(flags, message, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(requests, "show", None)
    with pytest.raises((UserError, OSError), match=message):
        sample_plan(["--model", "demo", "--topology", "v5e:2x2", *flags])


def test_a_plan_of_weights_in_eight_bits_is_refused_for_there_is_none():
    with pytest.raises(UserError, match="--quantize int8"):
        sample_plan(["--model", "demo", "--topology", "v5e:2x2", "--quantize", "int8"])
