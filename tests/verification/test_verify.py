"""`flax-pref verify`: what it says of a machine that computes right, and of one that does not."""

import json
import os
import socket
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from flax_pref.checkpoints.diffusers import save_pipeline
from flax_pref.checkpoints.single_file import save_single_file
from flax_pref.cli import command
from flax_pref.planning.topologies import CHIPS, running_on
from flax_pref.verification import checks, given
from flax_pref.verification.verify import verify
from flax_pref.verification.verify_flags import VerifyFlags
from tests.checkpoints.small import small_pipeline

QUICK = ("devices", "norms", "collectives", "noise")


def test_a_machine_that_computes_right_passes_and_the_report_says_on_what(tmp_path, capsys):
    assert command.main(["verify", "--only", *QUICK, "--out", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].startswith("all 8 checks passed in ") and lines[-1].endswith(f"wrote {tmp_path / 'verify.md'}")
    assert {line[:5].strip() for line in lines[:-1]} == {"ok", "told"}
    report = json.loads((tmp_path / "verify.json").read_text())
    assert {finding["name"] for finding in report["findings"]} >= {"versions", "devices", "noise: bits"}
    page = (tmp_path / "verify.md").read_text()
    assert "| ok | noise: bits | equal to the recorded ones |" in page


def test_a_check_that_breaks_down_is_wrong_and_the_others_run(monkeypatch, capsys, tmp_path):
    def broken(self, x):
        raise RuntimeError("out of memory\nwith details")

    monkeypatch.setattr(checks.GroupNorm, "__call__", broken)
    assert command.main(["verify", "--only", "norms", "noise", "--out", str(tmp_path)]) == 1
    told = capsys.readouterr()
    assert "WRONG  check of norms: broke down: RuntimeError: out of memory\nok     noise: bits" in told.out
    assert told.err.startswith("error: 1 of 3 checks failed: check of norms; expected none")


def test_rewards_score_pictures_as_recorded_and_as_another_machine_did(capsys, tmp_path):
    asked = ["verify", "--only", "rewards", "--rewards", "judge", "--out"]
    assert command.main([*asked, str(tmp_path / "there")]) == 0
    assert "told   reward: judge: 0.9804, 0.9848, 0.9502, 0.9854\nall 4 checks passed" in capsys.readouterr().out
    recorded = tmp_path / "there" / "verify.json"
    assert command.main([*asked, str(tmp_path / "here"), "--recorded", str(recorded)]) == 0
    assert "0.9854, off by 0.0e+00 of the recorded ones, at most 1e-03\nall 5" in capsys.readouterr().out
    recorded.write_text(recorded.read_text().replace("0.98", "0.97"))
    assert command.main([*asked, str(tmp_path / "here"), "--recorded", str(recorded)]) == 1
    assert capsys.readouterr().err.startswith("error: 1 of 5 checks failed: reward: judge; expected none")


@pytest.mark.program
@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_a_checkpoint_is_compared_with_diffusers(family, tmp_path, capsys):
    pytest.importorskip("diffusers")
    file = tmp_path / "model.safetensors"
    save_single_file(small_pipeline(family), file)
    assert command.main(["verify", "--only", "model", "--model", str(file), "--out", str(tmp_path / "out")]) == 0
    lines = capsys.readouterr().out.splitlines()
    parts = ["text encoder", *(["pooled prompt"] if family == "sdxl" else []), "UNet", "VAE"]
    assert [line.partition(": ")[0] for line in lines[:-1]] == [f"ok     {file}, {part}" for part in parts]
    assert lines[-1].startswith(f"all {len(parts)} checks passed")
    findings = json.loads((tmp_path / "out" / "verify.json").read_text())["findings"]
    assert max(finding["figures"]["error"] for finding in findings) < 1e-5


@pytest.mark.program
def test_other_weights_than_those_of_diffusers_are_wrong(monkeypatch, capsys, tmp_path):
    pytest.importorskip("diffusers")
    right = given.predictions

    def wrong(pipeline):
        found = right(pipeline)
        return found | {"prediction": found["prediction"] * 1.01}

    monkeypatch.setattr(given, "predictions", wrong)
    save_pipeline(small_pipeline("sd1"), tmp_path / "model")
    assert command.main(["verify", "--only", "model", "--model", str(tmp_path / "model"), "--out", str(tmp_path)]) == 1
    assert f"error: 1 of 3 checks failed: {tmp_path / 'model'}, UNet; expected none" in capsys.readouterr().err


def test_without_torch_nothing_is_compared_and_it_says_what_to_install(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(given.importlib.util, "find_spec", lambda name: None)
    assert command.main(["verify", "--only", "model", "--model", "demo", "--out", str(tmp_path)]) == 0
    told = capsys.readouterr().out
    assert (
        "told   demo against diffusers: torch and diffusers and transformers not installed; pip install torch" in told
    )
    assert "nothing could be checked" in told


MISTAKES = {
    "a missing model": (["--model", "/none"], "/none: no such file or folder"),
    "an unknown reward": (["--rewards", "pikscore"], "--rewards pikscore: no reward 'pikscore'; expected one of clip"),
    "a missing record": (["--recorded", "none.json"], "none.json: no such file; expected the verify.json of another"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_before_anything_is_checked(mistake, capsys):
    flags, message = MISTAKES[mistake]
    assert command.main(["verify", *flags]) == 1
    told = capsys.readouterr()
    assert told.out == "" and message in told.err and len(told.err.strip().splitlines()) == 1


DEVICES = {
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5": "v5p",
    "TPU v6 lite": "v6e",
    "TPU7x": "tpu7x",
    "cpu": None,
    "NVIDIA H100 80GB HBM3": None,
}


@pytest.mark.parametrize("kind", DEVICES)
def test_plans_are_for_the_chips_that_programs_run_on(kind):
    found = running_on([SimpleNamespace(device_kind=kind)] * 4)
    assert found is None if DEVICES[kind] is None else found.chip == CHIPS[DEVICES[kind]]


def test_a_kernel_that_computes_wrongly_is_named_and_the_status_is_1(monkeypatch, capsys, tmp_path):
    right = checks.GroupNorm.__call__
    monkeypatch.setattr(checks.GroupNorm, "__call__", lambda self, x: right(self, x) * 1.001)
    assert command.main(["verify", "--only", "norms", "noise", "--out", str(tmp_path)]) == 1
    told = capsys.readouterr()
    assert "WRONG  group norm of 320 channels at 64 x 64: error 1.0e-03" in told.out
    assert told.err.startswith("error: 2 of 4 checks failed: group norm of 320 channels at 64 x 64; group norm of 1280")
    assert len(told.err.strip().splitlines()) == 1
    assert "| WRONG | group norm" in (tmp_path / "verify.md").read_text()


def test_numbers_that_are_not_finite_are_wrong(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(checks.GroupNorm, "__call__", lambda self, x: x * np.nan)
    assert command.main(["verify", "--only", "norms", "--out", str(tmp_path)]) == 1
    assert "error inf" in capsys.readouterr().out


def test_other_noise_is_wrong(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(checks, "image_keys", lambda seeds, ids: checks.jax.random.split(checks.jax.random.key(1), 2))
    assert command.main(["verify", "--only", "noise", "--out", str(tmp_path)]) == 1
    assert "WRONG  noise: bits: other than the recorded ones" in capsys.readouterr().out


def test_no_such_check_is_one_line(capsys):
    assert command.main(["verify", "--only", "attentoin"]) == 1
    assert "--only attentoin: no such check; expected some of devices, attention" in capsys.readouterr().err


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_kernels_in_16_bits_stay_within_their_bounds(dtype, tmp_path):
    findings = verify(VerifyFlags(only=("norms",), dtype=dtype, out=tmp_path))
    assert all(finding.passed for finding in findings)
    assert max(finding.figures["error"] for finding in findings) > 1e-4, "or else they were computed in 32 bits"


@pytest.mark.program
def test_eight_devices_send_each_other_what_they_should(tmp_path):
    environment = {**os.environ, "JAX_NUM_CPU_DEVICES": "8"}
    done = subprocess.run(
        [sys.executable, "-m", "sample.verify", "--only", "devices", "collectives", "--out", tmp_path],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "ok     collective: sum in parts: right over 8 devices" in done.stdout


@pytest.mark.program
def test_two_processes_check_together_and_one_reports(tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    command = [sys.executable, "-m", "sample.verify", "--only", "devices", "collectives", "noise", "--out", tmp_path]
    started = [
        subprocess.Popen(
            [*command, "--hosts", f"{address},2,{i}"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for i in range(2)
    ]
    first, second = (process.communicate(timeout=300) for process in started)
    assert [process.returncode for process in started] == [0, 0], (first, second)
    assert "ok     versions of all hosts: equal on 2 hosts" in first[0]
    assert "ok     collective: gather: right over 2 devices" in first[0]
    assert "ok" not in second[0]


@pytest.mark.program
def test_what_is_computed_here_is_what_was_recorded(tmp_path):
    findings = verify(VerifyFlags(only=("drawing", "training"), out=tmp_path))
    assert len(findings) == 2
    assert all(finding.passed for finding in findings)
