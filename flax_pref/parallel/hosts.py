"""Programs that run as several processes, one for each host.

    process, processes = join(config.hosts)
    with watched():
        ...  # the work

Where one of the processes dies or hangs, no other can go on. Each of them finds that out by a connection that is cut,
or by JAX's heartbeats, which do not come for the time that `join` is given; then it says so and ends at once.
"""

import contextlib
import ctypes
import itertools
import os
import re
import signal
import sys
import threading
import traceback
import urllib.request
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

import jax
from jax._src import distributed  # Orbax uses the service in the same way; JAX has no public name for it
from jax.experimental import multihost_utils

from flax_pref.compilation import leave_default
from flax_pref.config import run_main
from flax_pref.waits import clock

TIMEOUT = 120
"""Seconds after which a process that is silent counts as gone."""


def join(text: str | None = None, timeout: int = TIMEOUT) -> tuple[int, int]:
    """Joins the other processes of this program; to be called before anything else of JAX.

    Where the others do not come in time, JAX ends the process, after one line on stderr that says so.

    Args:
        text: None: the others are joined where the environment shows that this is one of several processes: on a TPU
            pod, under Slurm or Open MPI, or with JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID; one
            line on stderr says so. Elsewhere the process is alone. "auto": the others are found by JAX, which knows
            more clusters; that there is none is an error. `10.0.0.2:1234,4,0`: address of the first process, number of
            processes and number of this one. "none": there are no others.
        timeout: seconds to wait for the others to come, and then for one that is silent.

    Returns:
        the number of this process, from 0 up, and how many there are. Under Slurm and Open MPI a process uses one GPU,
        or those of JAX_LOCAL_DEVICE_IDS.

    Raises:
        ValueError: the text is none of these, JAX does not know the cluster, or it cannot open the port.
    """
    cluster, text = _cluster() if text is None else (None, text)
    asked = f"several processes, as {cluster} says" if cluster else f"--hosts {text}"
    if text == "none":
        return 0, 1
    addresses = {} if text == "auto" else _addresses(text, asked)
    late = f"error: {asked}: the others did not come in {timeout} s; start the same program on all hosts"
    try:
        with clock(f"{asked}: waiting for the others"), _said_at_abort(late):
            jax.distributed.initialize(
                **addresses,
                initialization_timeout=timeout,
                heartbeat_timeout_seconds=timeout,
                shutdown_timeout_seconds=timeout,
            )
    except (ValueError, RuntimeError) as error:
        what = "JAX finds no cluster here" if text == "auto" else "cannot join the others"
        raise ValueError(
            f"{asked}: {what} ({error}); give the address of the first process with a free port, their number and that "
            "of this one, as in --hosts 10.0.0.2:1234,4,0, or --hosts none where there are no others"
        ) from error
    process, processes = jax.process_index(), jax.process_count()
    if processes > 1:
        leave_default()
    if cluster:
        print(f"{asked}: this is process {process} of {processes}", file=sys.stderr)
    return process, processes


def _addresses(text: str, asked: str) -> dict[str, Any]:
    match = re.fullmatch(r"(\S+:\d+),(\d+),(\d+)", text)
    if not match or not int(match[3]) < int(match[2]):
        raise ValueError(f"{asked}: expected auto, or ADDRESS:PORT,PROCESSES,NUMBER as in 10.0.0.2:1234,4,0, or none")
    return {"coordinator_address": match[1], "num_processes": int(match[2]), "process_id": int(match[3])}


def _cluster() -> tuple[str | None, str]:
    """What of the environment shows several processes, if anything, and the text with which they are joined."""
    names = os.environ
    if {"JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"} <= names.keys():
        address, processes = names["JAX_COORDINATOR_ADDRESS"], names["JAX_NUM_PROCESSES"]
        if ":" not in address:
            address += f":{names.get('JAX_COORDINATOR_PORT')}"
        text = f"{address},{processes},{names['JAX_PROCESS_ID']}"
        return (None, "none") if processes == "1" else (f"JAX_COORDINATOR_ADDRESS ... ({text})", text)
    if max(1, len(_tpu_hosts())) * int(names.get("MEGASCALE_NUM_SLICES") or 1) > 1:
        return "the TPU pod", "auto"
    # A batch script of Slurm has all but those of a step: it is one process, however many it has asked for.
    if {"SLURM_PROCID", "SLURM_STEP_NODELIST"} <= names.keys() and int(names.get("SLURM_NTASKS") or 1) > 1:
        return "Slurm", "auto"
    if int(names.get("OMPI_COMM_WORLD_SIZE") or 1) > 1:
        return "Open MPI", "auto"
    return None, "none"


def _tpu_hosts() -> list[str]:
    """Hosts of the TPU slice that this one is of, as its environment has them, or else its metadata."""
    names = os.environ.get("TPU_PROCESS_ADDRESSES") or os.environ.get("TPU_WORKER_HOSTNAMES")
    if names is None and "TPU_SKIP_MDS_QUERY" not in os.environ:  # importing JAX sets it on machines without TPUs
        request = urllib.request.Request(
            f"http://{os.environ.get('GCE_METADATA_IP', 'metadata.google.internal')}"
            "/computeMetadata/v1/instance/attributes/worker-network-endpoints",
            headers={"Metadata-Flavor": "Google"},
        )
        with contextlib.suppress(OSError), urllib.request.urlopen(request, timeout=2) as answer:
            if answer.headers.get("Metadata-Flavor") == "Google":
                names = answer.read().decode()
    return names.split(",") if names else []


@contextlib.contextmanager
def watched() -> Iterator[None]:
    """Work of which no process waits forever for another that is gone; to be entered after `join`, in the main thread.

    Where another process has died, failed or hung, this one ends with status 1 and one line on stderr, a few seconds
    after the time given to `join` at the latest. An error in this one ends it too, with what `run_main` would say and
    its status, but at once: the way out through Python waits for the others, which do not know of the error. When the
    work is done the processes wait for each other, so that none is taken for dead. With one process this does nothing.
    """
    if not jax.distributed.is_initialized():
        yield
        return
    which = f"process {jax.process_index()} of {jax.process_count()}"
    with _said_at_abort(_gone(which, "see the lines above")):
        try:
            yield
            wait_for_others("the work is done")
        except SystemExit:  # the program stops in order, and so do the others
            raise
        except (ValueError, RuntimeError) as error:
            if not _tells_of_loss(error):
                _fail(error)
            _end(_gone(which, " ".join(str(error).split())))
        except BaseException as error:
            _fail(error)


def _gone(which: str, reason: str) -> str:
    return (
        f"error: {which} cannot go on: another process has gone or hangs ({reason}); start the program again on all "
        "hosts, it resumes from what it has saved"
    )


def _tells_of_loss(error: Exception) -> bool:
    """Whether JAX says with it that a process cannot be reached: such errors have no type of their own."""
    return bool(re.match("UNAVAILABLE: |[A-Z_]+: .*(Gloo|NCCL|[Cc]oordination)", str(error), re.DOTALL))


def _fail(error: BaseException) -> NoReturn:
    """Ends the process as the error does, but at once."""

    def main(_):
        raise error

    try:
        status = run_main(main)
    except BaseException:
        traceback.print_exc()
        status = 1
    _end(None, status)


_ENDING = threading.Lock()


def _end(message: str | None, status: int = 1) -> NoReturn:
    """Ends the process without the exit of Python, where JAX waits for the others."""
    _ENDING.acquire()  # for good: the first thread that comes here says why
    try:
        sys.stdout.flush()
        if message:
            print(message, file=sys.stderr)
        sys.stderr.flush()
    finally:
        os._exit(status)


@contextlib.contextmanager
def _said_at_abort(message: str) -> Iterator[None]:
    """Ends the process with this message where the C++ of JAX would end it, which is when heartbeats fail to come.

    It does so with abort(), and of that signal Python's own handlers hear when it is too late: they run between two
    instructions of the main thread, but the process is gone when the handler in C returns.
    """
    handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(lambda _: _end(message))
    set_handler = ctypes.CDLL(None).signal
    set_handler.argtypes, set_handler.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_void_p
    before = set_handler(signal.SIGABRT, ctypes.cast(handler, ctypes.c_void_p))
    try:
        yield
    finally:
        set_handler(signal.SIGABRT, before)


_WAITS = itertools.count()  # of all processes alike


def wait_for_others(name: str) -> None:
    """Returns when all processes have come here; says for which it waits, where that takes long."""
    if jax.process_count() == 1:
        return
    client, place = distributed.global_state.client, f"flax_pref/waits/{next(_WAITS)}/"
    assert client is not None, "several processes are connected"
    client.key_value_set(f"{place}{jax.process_index()}", name)

    def waiting() -> str:
        there = {int(key.removeprefix(place)) for key, _ in client.key_value_dir_get(place)}
        missing = [host for host in range(jax.process_count()) if host not in there]
        return f"{name}: waiting for {hosts_text(missing) if missing else 'the hosts'}"

    with clock(waiting):
        multihost_utils.sync_global_devices(name)


def hosts_text(numbers: Sequence[int]) -> str:
    """As `hosts 0-2, 5`."""
    runs = itertools.groupby(enumerate(numbers), lambda numbered: numbered[1] - numbered[0])
    ends = [(run[0][1], run[-1][1]) for run in (list(run) for _, run in runs)]
    shown = ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in ends)
    return f"host{'s' if len(numbers) > 1 else ''} {shown}"
