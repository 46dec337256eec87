"""Proof that all hosts of a program do the same work: the same settings, the same code, the same inputs.

    agree(lambda: {**flat(config, free=("hosts",)), **code()})
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
import numpy as np
from jax.experimental import multihost_utils

import flax_pref
from flax_pref.config import UserError, program_name

PACKAGES = (
    *("flax-pref", "jax", "jaxlib", "libtpu", "jax-cuda13-plugin", "flax", "optax", "grain"),
    *("orbax-checkpoint", "numpy", "pillow", "tokenizers"),
)
OPTIONS = (
    *("jax_default_matmul_precision", "jax_enable_x64", "jax_default_prng_impl", "jax_threefry_partitionable"),
    *("jax_numpy_dtype_promotion", "jax_debug_nans", "jax_disable_jit"),
)
"""Of JAX, which users set by the environment, and on which results depend."""

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


def agree(facts: Callable[[], Mapping[str, Fact]]) -> None:
    """Returns if all hosts have the same facts; all processes call it at the same place, after `join`.

    A hash of the facts is compared first, so hosts that agree exchange 32 bytes. With one process this does nothing.

    Args:
        facts: called if there are several processes; facts by name, as `flat` and `code` make them.

    Raises:
        UserError: on every host, with what differs and the value of every host.
    """
    if jax.process_count() == 1:
        return
    devices = [sum(device.process_index == host for device in jax.devices()) for host in range(jax.process_count())]
    if len(set(devices)) > 1:  # known without asking the others, who could not answer: JAX needs equal numbers for that
        _refuse({"devices": [str(count) for count in devices]})
    own = facts()
    values = json.dumps({name: fact.value for name, fact in own.items()}, sort_keys=True)
    digest = hashlib.sha256(values.encode()).digest()
    digests = multihost_utils.process_allgather(np.frombuffer(digest, np.uint8))
    if (digests == digests[0]).all():
        return
    told = json.dumps(own).encode()
    sizes = multihost_utils.process_allgather(np.array(len(told)))
    texts = multihost_utils.process_allgather(np.frombuffer(told.ljust(sizes.max()), np.uint8))
    _refuse(differing([json.loads(text.tobytes()) for text in texts]))


def _refuse(differences: Mapping[str, Sequence[str]]) -> None:
    if jax.process_index() == 0:
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
    return ", ".join(
        f"{text if len(text) <= LONGEST else text[: LONGEST - 3] + '...'} on {_ranges(numbers)}"
        for text, numbers in hosts.items()
    )


def _ranges(numbers: Sequence[int]) -> str:
    """As `hosts 0-2, 5`."""
    runs = itertools.groupby(enumerate(numbers), lambda numbered: numbered[1] - numbered[0])
    ends = [(run[0][1], run[-1][1]) for run in (list(run) for _, run in runs)]
    shown = ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in ends)
    return f"host{'s' if len(numbers) > 1 else ''} {shown}"


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
    """What computes: the program, versions of packages, options of JAX, and a digest of every source file."""
    facts = {"program": program_name()}
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
