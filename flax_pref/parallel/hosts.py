"""Programs that run as several processes, one for each host."""

import re

import jax
from jax.experimental import multihost_utils


def join(text: str | None) -> tuple[int, int]:
    """Joins the other processes of this program; to be called before anything else of JAX.

    Args:
        text: None where there are no others; "auto" on clusters that JAX knows (Cloud TPU pods, Slurm and others); or
            address of the first process, number of processes and number of this one, as in `10.0.0.2:1234,4,0`.

    Returns:
        the number of this process, from 0 up, and how many there are.

    Raises:
        ValueError: the text is none of these, or JAX does not know the cluster.
    """
    if text is None:
        return 0, 1
    if text == "auto":
        try:
            jax.distributed.initialize()
        except (ValueError, RuntimeError) as error:
            raise ValueError(
                f"--hosts auto: JAX finds no cluster here ({error}); give the address of the first process, their "
                "number and that of this one, as in --hosts 10.0.0.2:1234,4,0"
            ) from error
        return jax.process_index(), jax.process_count()
    match = re.fullmatch(r"(\S+:\d+),(\d+),(\d+)", text)
    if not match or not int(match[3]) < int(match[2]):
        raise ValueError(f"--hosts {text}: expected auto, or ADDRESS:PORT,PROCESSES,NUMBER as in 10.0.0.2:1234,4,0")
    jax.distributed.initialize(match[1], num_processes=int(match[2]), process_id=int(match[3]))
    return jax.process_index(), jax.process_count()


def wait_for_others(name: str) -> None:
    """Returns when all processes have come here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)
