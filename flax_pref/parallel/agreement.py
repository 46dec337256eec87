"""Proof that all hosts of a program do the same work: the same settings, the same code, the same inputs.

    begin_together(config, free=("hosts",))
    agree(lambda: flat({"data": Content(config.data, records.fingerprint)}))

Without it, hosts that were started with different flags would train together and end without an error: each computes
its part of a step that no single command describes.
"""

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax._src import distributed  # Orbax uses the service in the same way; JAX has no public name for it

import flax_pref
from flax_pref.config import UserError
from flax_pref.parallel.hosts import hosts_text, wait_for_others
from flax_pref.programs import program_name
from flax_pref.waits import clock

PACKAGES = (
    *("flax-pref", "jax", "jaxlib", "libtpu", "jax-cuda13-plugin", "flax", "optax", "grain"),
    *("orbax-checkpoint", "numpy", "pillow", "tokenizers"),
)
OPTIONS = (
    *("jax_default_matmul_precision", "jax_enable_x64", "jax_default_prng_impl", "jax_threefry_partitionable"),
    *("jax_numpy_dtype_promotion", "jax_debug_nans", "jax_disable_jit"),
)
"""Of JAX, which users set by the environment, and on which results depend."""

TIMEOUT = 50  # seconds until a host that says nothing is given up
PAUSE = 1.0  # seconds
LISTED = 5  # differences that a message has
LONGEST = 80  # characters of a value in a message


class Content(NamedTuple):
    """An input that may lie elsewhere on every host: its content must be the same, its path need not.

    Attributes:
        path: for messages.
        sha256: of what it holds.
    """

    path: str | Path
    sha256: str


class Fact(NamedTuple):
    """Something that must be the same on all hosts.

    Attributes:
        value: is compared.
        text: for messages; empty: the value.
    """

    value: str
    text: str = ""


def begin_together(config: Any, free: Collection[str] = ()) -> None:
    """Returns if all hosts have the same settings and the same code; to be called right after `join`.

    With one process this does nothing.

    Args:
        config: dataclass of the settings.
        free: names of settings that may differ.

    Raises:
        UserError: on every host, with what differs and the value of every host.
    """
    if jax.process_count() > 1:
        _compare(flat(config, free=free) | code())


def agree(facts: Callable[[], Mapping[str, Fact]]) -> None:
    """Returns if all hosts have the same facts; all processes call it at the same place, after `begin_together`.

    With one process this does nothing.

    Args:
        facts: called if there are several processes; facts by name, as `flat` makes them.

    Raises:
        UserError: on every host, with what differs and the value of every host.
    """
    if jax.process_count() > 1:
        own = facts()
        wait_for_others("agree")  # which notices at once if one of them has ended
        _compare(own)


_NUMBER = itertools.count()  # of comparisons, the same on all hosts


def _compare(own: Mapping[str, Fact]) -> None:
    """Raises the error of `agree`.

    Hosts exchange a hash first. They do so by the service that they have joined, not by their devices: between hosts
    with other versions or options of JAX a computation may abort or hang.
    """
    client, host, hosts = distributed.global_state.client, jax.process_index(), range(jax.process_count())
    assert client is not None, "several processes are connected"
    place = f"flax_pref/agreement/{next(_NUMBER)}"
    values = json.dumps({name: fact.value for name, fact in own.items()}, sort_keys=True)
    digest = hashlib.sha256(values.encode()).hexdigest()
    client.key_value_set(f"{place}/facts/{host}", json.dumps(own))
    client.key_value_set(f"{place}/digest/{host}", digest)

    def read(what: str, of: int) -> str:
        try:
            with clock(f"waiting for host {of}, which has not said how it was started,"):
                return client.blocking_key_value_get(f"{place}/{what}/{of}", 1000 * TIMEOUT)
        except jax.errors.JaxRuntimeError as error:
            raise UserError(
                f"host {of} does not say in {TIMEOUT} s how it was started; start the same command with the same code "
                "on every host"
            ) from error

    if all(read("digest", of) == digest for of in hosts):
        return
    differences = differing([json.loads(read("facts", of)) for of in hosts])
    client.wait_at_barrier(f"{place}/read", 1000 * TIMEOUT)
    if host == 0:
        time.sleep(PAUSE)  # where the first process ends, JAX ends the others at once: they first say why themselves
    raise UserError(
        f"the hosts differ in {described(differences)}; start the same command with the same code and inputs on every "
        "host"
    )


def differing(hosts: Sequence[Mapping[str, Sequence[str]]]) -> dict[str, list[str]]:
    """Facts that are not the same on all hosts: texts of every host by name, "none" where a host has no such fact."""
    absent = Fact("", "none")
    names = dict.fromkeys(name for facts in hosts for name in facts)
    found = {name: [Fact(*facts.get(name, absent)) for facts in hosts] for name in names}
    return {
        name: [fact.text or fact.value for fact in facts]
        for name, facts in found.items()
        if len({fact.value for fact in facts}) > 1
    }


def described(differences: Mapping[str, Sequence[str]]) -> str:
    """As `seed: 0 on hosts 0-2, 1 on host 3; steps: 10 on host 0, 20 on hosts 1-3`."""
    shown = [f"{name}: {_by_host(texts)}" for name, texts in itertools.islice(differences.items(), LISTED)]
    return "; ".join(shown + ([f"and {len(differences) - LISTED} more"] if len(differences) > LISTED else []))


def _by_host(texts: Sequence[str]) -> str:
    hosts: dict[str, list[int]] = {}
    for host, text in enumerate(texts):
        hosts.setdefault(text, []).append(host)
    return ", ".join(f"{_shortened(text)} on {hosts_text(numbers)}" for text, numbers in hosts.items())


def _shortened(text: str) -> str:
    """Without its middle where it is long: of a path with its hash, the end tells two apart."""
    return text if len(text) <= LONGEST else f"{text[: LONGEST // 4]}...{text[3 + LONGEST // 4 - LONGEST :]}"


def flat(value: Any, name: str = "", free: Collection[str] = ()) -> dict[str, Fact]:
    """Settings as facts, named as flags are: `optimizer.b2`. A dataclass within another counts with its type.

    Args:
        value: a dataclass, a mapping, a `Content`, or anything that prints the same where it is the same.
        name: of the value.
        free: names of what may differ.
    """
    if name in free:
        return {}
    if isinstance(value, Content):
        return {name: Fact(value.sha256, f"{value.path} (SHA-256 {value.sha256[:12]})")}
    if dataclasses.is_dataclass(value):
        facts = {name: Fact(type(value).__name__)} if name else {}
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    elif isinstance(value, Mapping):
        facts, fields = {}, value
    else:
        return {name: Fact(str(value))}
    for field, inside in fields.items():
        facts |= flat(inside, f"{name}.{field}" if name else field, free)
    return facts


@functools.cache
def code() -> dict[str, Fact]:
    """What computes: program, number of devices, versions of packages, options of JAX, digest of every source file."""
    facts = {"program": program_name(), "devices": str(jax.local_device_count())}
    for package in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            facts[f"version of {package}"] = metadata.version(package)
    facts |= {option: str(getattr(jax.config, option)) for option in OPTIONS}
    spec = getattr(sys.modules.get("__main__"), "__spec__", None)
    folders = [Path(flax_pref.__file__).parent]
    if spec is not None and spec.parent in ("train", "sample"):
        folders.append(Path(spec.origin).parent)
    for folder in folders:
        for file in sorted(folder.rglob("*.py")):
            digest = hashlib.sha256(file.read_bytes()).hexdigest()
            facts[file.relative_to(folder.parent).as_posix()] = f"SHA-256 {digest[:16]}"
    return {name: Fact(value) for name, value in facts.items()}
