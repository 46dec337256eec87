"""Processes find each other without being told how, and none waits forever for another that is gone."""

import http.server
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

import jax
import pytest

from flax_pref.parallel import hosts
from flax_pref.parallel.signals import PREEMPTED

ROOT = Path(__file__).parents[2]

# ----------------------------------------------------------------------------------------------------------------------
# Joining


@pytest.fixture
def joined(monkeypatch):
    """What JAX was asked to join with, in an environment that shows no cluster."""
    for name in list(os.environ):
        if name.startswith(("JAX_COORDINATOR", "JAX_NUM", "JAX_PROCESS_ID", "TPU_", "MEGASCALE", "SLURM", "OMPI")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    asked = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda **options: asked.append(options))
    return asked


TIMEOUTS = dict.fromkeys(("initialization_timeout", "heartbeat_timeout_seconds", "shutdown_timeout_seconds"), 120)
STEP_OF_SLURM = {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "n[1-4]", "SLURM_PROCID": "1", "SLURM_LOCALID": "0"}
OF_JAX = {"JAX_COORDINATOR_ADDRESS": "10.0.0.2", "JAX_COORDINATOR_PORT": "1234", "JAX_PROCESS_ID": "1"}


@pytest.mark.parametrize(
    ("environment", "cluster"),
    [
        ({"TPU_WORKER_HOSTNAMES": "t0,t1"}, "the TPU pod"),
        ({"TPU_PROCESS_ADDRESSES": "t0:1,t1:1"}, "the TPU pod"),
        ({"TPU_WORKER_HOSTNAMES": "t0", "MEGASCALE_NUM_SLICES": "2"}, "the TPU pod"),
        ({**STEP_OF_SLURM, "SLURM_NTASKS": "4"}, "Slurm"),
        ({"OMPI_COMM_WORLD_SIZE": "4"}, "Open MPI"),
    ],
)
def test_a_cluster_is_joined_without_a_flag(joined, monkeypatch, capsys, environment, cluster):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    hosts.join()
    assert joined == [TIMEOUTS]
    assert capsys.readouterr().err == f"several processes, as {cluster} says: this is process 0 of 1\n"


@pytest.mark.parametrize("address", [{}, {"JAX_COORDINATOR_ADDRESS": "10.0.0.2:1234"}])
def test_the_variables_of_jax_are_enough(joined, monkeypatch, address):
    for name, value in {**OF_JAX, "JAX_NUM_PROCESSES": "4", **address}.items():
        monkeypatch.setenv(name, value)
    hosts.join()
    assert joined == [{"coordinator_address": "10.0.0.2:1234", "num_processes": 4, "process_id": 1, **TIMEOUTS}]


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"TPU_WORKER_HOSTNAMES": "localhost", "MEGASCALE_NUM_SLICES": "1"},
        {**STEP_OF_SLURM, "SLURM_NTASKS": "1"},
        {"SLURM_PROCID": "0", "SLURM_NTASKS": "4"},  # a batch script, beside its steps
        {"OMPI_COMM_WORLD_SIZE": "1"},
        {**OF_JAX, "JAX_NUM_PROCESSES": "1"},
        {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "3"},  # does not tell how many
    ],
)
def test_one_process_runs_alone_and_asks_nobody(joined, monkeypatch, capsys, environment):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(urllib.request, "urlopen", None)
    assert hosts.join() == (0, 1)
    assert joined == [] and capsys.readouterr().err == ""


def test_a_user_can_say_that_there_are_no_others(joined, monkeypatch):
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "t0,t1")
    assert hosts.join("none") == (0, 1)
    assert joined == []


class Metadata(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        assert self.path.endswith("/instance/attributes/worker-network-endpoints")
        self.send_response(200)
        for name, value in self.server.headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(b"a:b:10.0.0.2,a:b:10.0.0.3")

    def log_message(self, *_):
        pass


@pytest.mark.parametrize(("headers", "count"), [({"Metadata-Flavor": "Google"}, 1), ({}, 0)])  # or: a proxy's page
def test_a_tpu_vm_learns_from_its_metadata_that_it_is_one_of_a_pod(joined, monkeypatch, headers, count):
    monkeypatch.delenv("TPU_SKIP_MDS_QUERY")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with http.server.HTTPServer(("127.0.0.1", 0), Metadata) as server:
        server.headers = headers
        monkeypatch.setenv("GCE_METADATA_IP", f"127.0.0.1:{server.server_port}")
        thread = threading.Thread(target=server.handle_request)
        thread.start()
        hosts.join()
        thread.join()
    assert joined == [TIMEOUTS] * count


def test_a_tpu_without_metadata_is_alone(joined, monkeypatch):
    monkeypatch.delenv("TPU_SKIP_MDS_QUERY")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("GCE_METADATA_IP", f"127.0.0.1:{free_port()}")
    assert hosts.join() == (0, 1)
    assert joined == []


@pytest.mark.parametrize("text", ["here", "10.0.0.2,4,0", "10.0.0.2:1234,4,4", "10.0.0.2:1234,4"])
def test_a_wrong_text_is_refused(joined, text):
    with pytest.raises(ValueError, match=f"--hosts {text}: expected auto, or ADDRESS:PORT,PROCESSES,NUMBER"):
        hosts.join(text)


def test_wrong_variables_are_told(joined, monkeypatch):
    for name, value in {**OF_JAX, "JAX_NUM_PROCESSES": "1x"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=r"as JAX_COORDINATOR_ADDRESS \.\.\. \(10.0.0.2:1234,1x,1\) says: expected"):
        hosts.join()


def test_a_cluster_that_jax_does_not_find_is_told_with_what_to_do(joined, monkeypatch):
    def fail(**_):
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", fail)
    with pytest.raises(ValueError, match=r"--hosts auto: JAX finds no cluster here .*or --hosts none"):
        hosts.join("auto")
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "4")
    with pytest.raises(ValueError, match=r"as Open MPI says: JAX finds no cluster here .* as in --hosts 10"):
        hosts.join()


# ----------------------------------------------------------------------------------------------------------------------
# Processes that die, hang, fail and end. All cases of a test run side by side.

PROGRAM = """
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from flax_pref.config import UserError, run_main
from flax_pref.parallel.hosts import join, watched


def happen(what, process):
    if what == f"mistake of {process}":
        raise UserError("no space is left")
    if what == f"defect of {process}":
        raise KeyError("batch")
    if what == "preempted":
        raise SystemExit(75)


def main(arguments):
    hosts, timeout, what = arguments
    process, _ = join(hosts, int(timeout))
    with watched():
        over = NamedSharding(Mesh(np.array(jax.devices()), "data"), PartitionSpec("data"))
        step = jax.jit(lambda x: 0.1 * (x + x.sum()), out_shardings=over)
        x = jax.device_put(jnp.ones(jax.device_count()), over)
        for number in range(1_000_000 if what == "signal" else 20):
            x = step(x).block_until_ready()
            if number == 10:
                print("running", flush=True)
        happen(what, process)
        if what == "one is longer" and process == 0:
            time.sleep(float(timeout) + 2)
    print("ended")


sys.exit(run_main(main))
"""


class Pair:
    """Two processes that compute together; on the second, `what` happens."""

    def __init__(self, what, timeout):
        address = f"localhost:{free_port()}"
        self.processes = [start(f"{address},2,{i}", timeout, what) for i in range(2)]

    def running(self):
        for process in self.processes:
            while (line := process.stdout.readline()) != "running\n":  # Gloo prints lines too
                assert line, process.communicate()[1]
        return self

    def ended(self, number):
        """Status, what it printed, what it printed to stderr."""
        told, errors = self.processes[number].communicate(timeout=60)
        return self.processes[number].returncode, told, errors


def free_port():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def start(hosts_text, timeout, what):
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, hosts_text, str(timeout), what],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": ""},
    )


@pytest.fixture
def pairs():
    """Makes pairs, and leaves none behind."""
    made = []

    def make(*whats, timeout):
        made.extend(Pair(what, timeout) for what in whats)
        return [pair.running() for pair in made]

    yield make
    for pair in made:
        for process in pair.processes:
            process.kill()
            process.communicate()


def check_told_of_the_other(ended, number):
    status, told, errors = ended
    assert status == 1 and "ended" not in told
    assert "Traceback" not in errors
    last = errors.splitlines()[-1]
    assert last.startswith(f"error: process {number} of 2 cannot go on: another process has gone or hangs (")
    assert last.endswith("start the program again on all hosts, it resumes from what it has saved")
    return errors


@pytest.mark.program
def test_where_one_dies_or_hangs_the_other_ends_in_time_and_says_why(pairs):
    timeout = 10
    cases = [(sent, victim) for sent in (signal.SIGKILL, signal.SIGSTOP) for victim in (0, 1)]
    made = pairs(*["signal"] * len(cases), timeout=timeout)
    begun = time.monotonic()
    for pair, (sent, victim) in zip(made, cases, strict=True):
        pair.processes[victim].send_signal(sent)
    for pair, (sent, victim) in zip(made, cases, strict=True):
        errors = check_told_of_the_other(pair.ended(1 - victim), 1 - victim)
        assert sent != signal.SIGKILL or "Gloo" in errors or "Socket closed" in errors
    assert time.monotonic() - begun < timeout + 5


@pytest.mark.program
def test_where_one_fails_it_says_so_once_and_the_other_ends(pairs):
    timeout = 20
    made = pairs("mistake of 0", "mistake of 1", "defect of 1", timeout=timeout)
    begun = time.monotonic()
    for pair, number in zip(made, (0, 1, 1), strict=True):
        status, told, errors = pair.ended(number)
        assert status == 1 and "ended" not in told
        if pair is made[2]:
            assert "Traceback" in errors and errors.endswith("KeyError: 'batch'\n")
        else:
            assert "Traceback" not in errors and errors.splitlines()[-1] == "error: no space is left"
        check_told_of_the_other(pair.ended(1 - number), 1 - number)
    assert time.monotonic() - begun < timeout


@pytest.mark.program
def test_processes_that_end_in_order_are_not_told_dead(pairs):
    made = pairs("nothing", "one is longer", "preempted", timeout=5)
    for pair, (status, last) in zip(made, ((0, "ended\n"), (0, "ended\n"), (PREEMPTED, "")), strict=True):
        for number in range(2):
            ended = pair.ended(number)
            assert ended[:2] == (status, last)
            assert "error" not in ended[2] and "Terminating" not in ended[2]
            if (pair, number) == (made[1], 1):  # it says for whom it waits
                assert re.search(r"^the work is done: waiting for host 0 for \d+ s$", ended[2], re.MULTILINE)


@pytest.mark.program
def test_where_the_others_do_not_come_a_line_says_so():
    texts = [f"localhost:{free_port()},2,{number}" for number in range(2)]
    late = [start(text, 1, "nothing") for text in texts]
    for process, text in zip(late, texts, strict=True):
        errors = process.communicate(timeout=60)[1]
        assert process.returncode == 1
        expected = f"error: --hosts {text}: the others did not come in 1 s; start the same program on all hosts"
        assert errors.splitlines()[-1] == expected


def test_alone_work_is_not_watched_and_errors_pass():
    before = signal.getsignal(signal.SIGABRT)
    with pytest.raises(KeyError), hosts.watched():
        raise KeyError("batch")
    assert signal.getsignal(signal.SIGABRT) is before
