"""What devices send each other in a compiled program."""

import math
import re

# `%x = f32[8,4]{1,0} all-reduce(...)`. Asynchronous ones are two instructions, of which `-done` has the result alone.
INSTRUCTION = re.compile(
    r"= (\(.*?\)|\S+) "
    r"(all-reduce|all-gather|reduce-scatter|all-to-all|ragged-all-to-all|collective-permute|collective-broadcast)"
    r"(?:-done)?\("
)
ARRAY = re.compile(r"([a-z]+)(\d*)\w*\[([\d,]*)\]")


def collectives(compiled_text: str) -> dict[str, tuple[int, int]]:
    """What one device takes part in whenever the program runs; an instruction in a loop counts once.

    Args:
        compiled_text: `jax.jit(f).lower(...).compile().as_text()`.

    Returns:
        for every kind, such as "all-reduce", how many there are, and the bytes of their results on one device.
    """
    found: dict[str, tuple[int, int]] = {}
    for result, kind in INSTRUCTION.findall(compiled_text):
        count, size = found.get(kind, (0, 0))
        found[kind] = (count + 1, size + sum(_bytes(*array) for array in ARRAY.findall(result)))
    return dict(sorted(found.items()))


def _bytes(kind: str, bits: str, dims: str) -> int:
    """Of an array as the text has it, `f32[8,4]` or `pred[]`."""
    bits = 8 if kind == "pred" else int(bits)
    return math.ceil(math.prod(int(size) for size in dims.split(",") if size) * bits / 8)
