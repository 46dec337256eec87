"""Lines that say what a program waits for."""

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
from training.tiny import tiny_checkpoint

from flax_pref import waits
from flax_pref.checkpoints import weights

ROOT = Path(__file__).parents[1]


@pytest.fixture
def hasty(monkeypatch):
    monkeypatch.setattr(waits, "PATIENCE", 0.1)


def test_a_short_wait_is_not_told(capsys):
    with waits.clock("waiting for nothing"):
        pass
    assert capsys.readouterr().err == ""


def test_a_log_has_a_line_whenever_the_wait_has_doubled(hasty, capsys):
    files = [3]
    with waits.clock(lambda: f"waiting for {files[0]} files", "; then all is well"):
        while (told := capsys.readouterr().err) == "":
            time.sleep(0.01)
        files[0] = 2
        while (more := capsys.readouterr().err) == "":
            time.sleep(0.01)
    assert re.fullmatch(r"waiting for 3 files for \d+ s; then all is well\n", told)
    assert re.fullmatch(r"waiting for 2 files for \d+ s; then all is well\n", more)


def test_on_a_terminal_one_line_runs_and_goes(hasty, monkeypatch):
    reader, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    with os.fdopen(terminal, "w") as screen:
        monkeypatch.setattr(sys, "stderr", screen)
        shown = ""
        with waits.clock("waiting for a friend"):
            while len(re.findall(r"waiting for a friend for \d+ s", shown)) < 2:
                shown += os.read(reader, 10_000).decode()
        monkeypatch.undo()
        shown += os.read(reader, 10_000).decode()
    os.close(reader)
    assert "\n" not in shown and re.search(r"waiting for a friend for [1-9] s", shown)
    assert re.search(r" +\r$", shown)


def test_loading_tells_bytes(hasty, tmp_path, monkeypatch, capsys):
    model, read = tiny_checkpoint(tmp_path / "model", "sd15"), weights._read_tensors

    def slowly(*arguments):
        for found in read(*arguments):
            time.sleep(0.01)
            yield found

    monkeypatch.setattr(weights, "_read_tensors", slowly)
    weights.load_network("unet", Path(model) / "unet")
    lines = capsys.readouterr().err.splitlines()
    assert lines and all(re.fullmatch(r"loading unet: 0\.00 of 0\.00 GB for \d s", line) for line in lines)


PROGRAM = """
import sys
from concurrent.futures import ThreadPoolExecutor
import jax, jax.numpy as jnp
from flax_pref import compilation, waits
waits.PATIENCE = compilation.PATIENCE = float(sys.argv[1])

def telling_function(x):
    for number in range(200):
        x = jnp.sin(x) @ x + number
    return x

compilation.set_up()
lowered = jax.jit(telling_function).lower(jnp.ones((4, 4)))
with ThreadPoolExecutor(1) as pool:  # as the trainer does
    pool.submit(lowered.compile).result()
"""


def test_compilation_tells_what_for_how_long_and_whether_the_cache_had_it(tmp_path):
    def lines(patience):
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, str(patience)],
            env={
                **os.environ,
                "JAX_COMPILATION_CACHE_DIR": str(tmp_path),
                "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
                "PYTHONPATH": str(ROOT),
            },
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        return [line for line in done.stderr.splitlines() if "telling function" in line]

    *running, last = lines(0.05)
    then = r"; next start about \d+ s and reading it from the cache"
    assert running and all(re.fullmatch(rf"compiling the telling function for \d+ s{then}", line) for line in running)
    assert re.fullmatch(rf"compiled the telling function in \d+ s{then}", last)
    assert re.fullmatch(r"the telling function came from the cache in \d+ s", lines(1e-9)[-1])
    assert lines(60) == []
