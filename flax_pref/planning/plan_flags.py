"""Flags of plans. `planning.training` and `planning.sampling` follow them."""

import dataclasses
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar

from flax_pref.config import UserError, parse_flags
from flax_pref.diffusion.drawing_flags import DrawingFlags

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

F = TypeVar("F", bound="DataclassInstance")
Effort = Literal["quick", "full"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanFlags:
    """Plans for a TPU slice that is not there."""

    topology: str
    """TPU slice: v5e:16x16, v6e:16x16, v5p:4x4x4, v4:4x4x4, tpu7x:4x4x4, or another size of these kinds."""
    effort: Effort = "quick"
    """quick: compile until memory is laid out and estimate the time from a model of cycles; full: compile to the end
    and use the compiler's own estimates, which takes ten times as long."""
    only: str = ""
    """Plan only the programs whose name begins with this: sampler, decoder, ... (default: all)."""
    compare: bool = False
    """Plan with several meshes and ways to save memory, and print a table, the fastest first."""
    json: Path | None = None
    """JSON file for the figures (default: none)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingPlanFlags(PlanFlags, DrawingFlags):
    """Plans sampling for a TPU slice that is not there."""

    weights: Literal["lora", "full"] = "lora"
    """Weights of the modules that the rule names: LoRA adapters of the base, or full networks."""
    rank: int = 16
    """Rank of the adapters."""
    mesh: str = "data=-1"
    """Device mesh. data=-1 divides the images over all chips; network=4,data=-1 also puts base and modules with full
    weights on different chips (with three networks one of four is idle)."""

    def __post_init__(self):
        super().__post_init__()
        from flax_pref.planning.topologies import chips_of  # imports JAX, which --help does not need

        chips_of(self.topology)
        if self.rank < 1:
            raise UserError(f"--rank {self.rank}: expected at least 1")
        if self.module or self.module_base:
            raise UserError("--module: no weights are read; --weights lora or full says what the rule's modules are")
        if self.quantize is not None:
            raise UserError(f"--quantize {self.quantize}: plans are of weights in --dtype only; leave the flag out")


def own_flags(arguments: Sequence[str], kind: type[F]) -> tuple[F | None, list[str]]:
    """Flags of one dataclass among those of another program, which has a parser of its own.

    Args:
        arguments: of both.
        kind: dataclass; its fields are taken out.

    Returns:
        the flags, and the arguments that are left. With `--help` among them, the fields are printed and the flags None.

    Raises:
        SystemExit: after one line on stderr, with status 2.
    """
    names = {f"--{field.name}": field.type is bool for field in dataclasses.fields(kind)}
    own, others = [], []
    rest = iter(arguments)
    for argument in rest:
        name = argument.partition("=")[0]
        if name not in names:
            others.append(argument)
        else:
            own += [argument] if names[name] or "=" in argument else [argument, *itertools.islice(rest, 1)]
    helps = {"--help", "-h"} & set(others)
    try:
        return parse_flags([*own, *helps], kind), others
    except SystemExit as exit:
        if exit.code:
            raise
        return None, others  # the help of the other parser follows
