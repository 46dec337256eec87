"""`flax-pref verify`: what it says of a machine that computes right, and of one that does not."""

import json
import os
import socket
import subprocess
import sys

import numpy as np
import pytest

from flax_pref.cli import command
from flax_pref.verification import checks
from flax_pref.verification.verify import verify
from flax_pref.verification.verify_flags import VerifyFlags

QUICK = ("devices", "norms", "collectives", "noise")


def test_a_machine_that_computes_right_passes_and_the_report_says_on_what(tmp_path, capsys):
    assert command.main(["verify", "--only", *QUICK, "--out", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].startswith("all 8 checks passed in ")
    assert {line[:5].strip() for line in lines[:-1]} == {"ok", "told"}
    report = json.loads((tmp_path / "verify.json").read_text())
    assert {finding["name"] for finding in report["findings"]} >= {"versions", "devices", "noise: bits"}
    page = (tmp_path / "verify.md").read_text()
    assert "| ok | noise: bits | equal to the recorded ones |" in page


def test_a_kernel_that_computes_wrongly_is_named_and_the_status_is_1(monkeypatch, capsys, tmp_path):
    right = checks.GroupNorm.__call__
    monkeypatch.setattr(checks.GroupNorm, "__call__", lambda self, x: right(self, x) * 1.001)
    assert command.main(["verify", "--only", "norms", "noise", "--out", str(tmp_path)]) == 1
    told = capsys.readouterr()
    assert "WRONG  group norm of 320 channels at 64 x 64: error 1.0e-03" in told.out
    assert told.err.startswith("error: 2 of 4 checks failed: group norm of 320 channels at 64 x 64; group norm of 1280")
    assert len(told.err.strip().splitlines()) == 1
    assert "| WRONG | group norm" in (tmp_path / "verify.md").read_text()


def test_numbers_that_are_not_finite_are_wrong(monkeypatch, capsys):
    monkeypatch.setattr(checks.GroupNorm, "__call__", lambda self, x: x * np.nan)
    assert command.main(["verify", "--only", "norms"]) == 1
    assert "error inf" in capsys.readouterr().out


def test_other_noise_is_wrong(monkeypatch, capsys):
    monkeypatch.setattr(checks, "image_keys", lambda seeds, ids: checks.jax.random.split(checks.jax.random.key(1), 2))
    assert command.main(["verify", "--only", "noise"]) == 1
    assert "WRONG  noise: bits: other than the recorded ones" in capsys.readouterr().out


def test_no_such_check_is_one_line(capsys):
    assert command.main(["verify", "--only", "attentoin"]) == 1
    assert "--only attentoin: no such check; expected some of devices, attention" in capsys.readouterr().err


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_kernels_in_16_bits_stay_within_their_bounds(dtype):
    findings = verify(VerifyFlags(only=("norms",), dtype=dtype))
    assert all(finding.passed for finding in findings)
    assert max(finding.figures["error"] for finding in findings) > 1e-4, "or else they were computed in 32 bits"


@pytest.mark.program
def test_eight_devices_send_each_other_what_they_should():
    environment = {**os.environ, "JAX_NUM_CPU_DEVICES": "8"}
    done = subprocess.run(
        [sys.executable, "-m", "sample.verify", "--only", "devices", "collectives"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "ok     collective: sum in parts: right over 8 devices" in done.stdout


@pytest.mark.program
def test_two_processes_check_together_and_one_reports():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    command = [sys.executable, "-m", "sample.verify", "--only", "collectives", "noise"]
    started = [
        subprocess.Popen(
            [*command, "--hosts", f"{address},2,{i}"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for i in range(2)
    ]
    first, second = (process.communicate(timeout=300) for process in started)
    assert [process.returncode for process in started] == [0, 0], (first, second)
    assert "ok     collective: gather: right over 2 devices" in first[0]
    assert "ok" not in second[0]


@pytest.mark.program
def test_what_is_computed_here_is_what_was_recorded():
    findings = verify(VerifyFlags(only=("drawing", "training")))
    assert len(findings) == 2
    assert all(finding.passed for finding in findings)
