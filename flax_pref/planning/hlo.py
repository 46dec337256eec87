"""A reader of compiled programs: what XLA's text says of every instruction, summed over all that runs.

XLA's own `cost_analysis()` counts the body of a loop once and kernels not at all. Here a loop counts as often as it
runs, of the branches of a conditional the slowest counts, and what a kernel does is told by who knows it.
"""

import itertools
import math
import re
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from typing import NamedTuple

from flax_pref.models.attention import REORDERED

ARRAY = re.compile(r"\b(pred|token|[a-z]+\d+)\w*\[([\d,]*)\](\{[^}]*\})?")
COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\{$")
INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.-]+) = (.*)$", re.DOTALL)
COMMENT = re.compile(r"/\*.*?\*/")
COLLECTIVES = (
    *("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "ragged-all-to-all"),
    *("collective-permute", "collective-broadcast"),
)
# These take no time: they name values, or wait for what another instruction has begun.
FREE = {
    *("parameter", "constant", "bitcast", "tuple", "get-tuple-element", "after-all", "partition-id", "replica-id"),
    *("opt-barrier", "copy-done", "slice-done", "async-done", "async-update"),
    *(f"{kind}-start" for kind in COLLECTIVES),
}
SLICES = {"dynamic-slice", "slice", "gather"}  # they read a part of their first operand


class Array(NamedTuple):
    """What an instruction gives: `bf16[8,320]`.

    Attributes:
        dtype: as XLA writes it.
        shape: of the array.
        on_chip: it lies in the chip's vector memory, not in its main memory.
    """

    dtype: str
    shape: tuple[int, ...]
    on_chip: bool = False

    @property
    def bytes(self) -> int:
        """Without padding."""
        bits = {"pred": 8, "token": 0}.get(self.dtype) or int(re.sub(r"\D", "", self.dtype) or 0)
        return math.ceil(math.prod(self.shape) * bits / 8)


class Instruction(NamedTuple):
    """A line of a computation.

    Attributes:
        name: in the text.
        opcode: such as fusion.
        outputs: an array, or those of a tuple.
        operands: their names.
        text: what comes after the operands: attributes, what it was made from, and the compiler's estimates.
    """

    name: str
    opcode: str
    outputs: tuple[Array, ...]
    operands: tuple[str, ...]
    text: str

    def attribute(self, pattern: str) -> str | None:
        """The first group of a pattern in the text."""
        found = re.search(pattern, self.text)
        return found and found[1]

    @property
    def cycles(self) -> int:
        """The compiler's estimate; 0 where it has none."""
        return int(self.attribute(r'"estimated_cycles":"(\d+)"') or 0)

    @property
    def op_name(self) -> str:
        """What it was made from, such as `jit(step)/down_blocks.0/resnets.1/conv_general_dilated`."""
        return self.attribute(r'op_name="([^"]*)"') or ""

    @property
    def target(self) -> str:
        """Of a custom call."""
        return self.attribute(r'custom_call_target="([^"]*)"') or ""


Computation = Mapping[str, Instruction]


class Cost(NamedTuple):
    """What an instruction takes on one device.

    Attributes:
        cycles: as the compiler estimates them.
        flops: floating-point operations of products and convolutions, except those that only reorder numbers.
        padded_flops: those that matrix units of a fixed size are busy with.
        bytes: read from the device's main memory and written to it.
        touched: bytes read and written, in any memory.
        sent: bytes of the whole arrays of a collective: of what an all-gather gives, of what a reduce-scatter takes.
    """

    cycles: float = 0.0
    flops: float = 0.0
    padded_flops: float = 0.0
    bytes: float = 0.0
    touched: float = 0.0
    sent: float = 0.0


class Executed(NamedTuple):
    """An instruction of a program, how often it runs, and what all its runs take together.

    Attributes:
        instruction: or several that are fused.
        runs: in one call of the program.
        cost: of all runs.
        code: equal for instructions that differ in names only, which need the same machine code.
        sends: the kind of collective that it is, or that is fused into it.
    """

    instruction: Instruction
    runs: int
    cost: Cost
    code: int
    sends: str | None = None


Kernel = Callable[[Instruction, list[Array]], Cost]  # the cost of a custom call, from its operands


class Module:
    """A compiled program.

    Attributes:
        computations: by name, their instructions by name.
        entry: name of the first.
        unknown_loops: names of loops whose length the text does not tell, which count once; filled by `executed`.
    """

    def __init__(self, text: str, mxu: int = 128):
        """Reads a program.

        Args:
            text: what `jax.jit(f).lower(...).compile().as_text()` gives.
            mxu: side of a matrix unit, which layers of other sizes are filled up to.
        """
        self._mxu = mxu
        self.computations: dict[str, dict[str, Instruction]] = {}
        self.entry, self.unknown_loops = "", set()
        current: dict[str, Instruction] = {}
        for line in _whole_lines(text):
            if header := COMPUTATION.match(line):
                current = self.computations.setdefault(header[2], {})
                self.entry = header[2] if header[1] else self.entry
            elif found := INSTRUCTION.match(line):
                current[found[2]] = _instruction(found[2], found[3])

    def executed(self, kernel: Kernel = lambda instruction, operands: Cost()) -> Iterator[Executed]:
        """Everything that runs; instructions that a fusion has become one of are one."""
        yield from self._executed(self.entry, 1, kernel)

    def _executed(self, name: str, runs: int, kernel: Kernel) -> Iterator[Executed]:
        around = self.computations[name]
        for one in around.values():
            match one.opcode:
                case "while":
                    yield from self._executed(_called(one, "body"), runs * self.trip_count(one), kernel)
                case "call":
                    yield from self._executed(_called(one, "to_apply"), runs, kernel)
                case "conditional":
                    branches = [list(self._executed(branch, runs, kernel)) for branch in _branches(one)]
                    yield from max(branches, key=_slowness)
                case opcode if opcode not in FREE:
                    cost, sends = self._cost(one, around, kernel)
                    yield Executed(one, runs, Cost(*(runs * value for value in cost)), self._code(one, around), sends)

    def trip_count(self, loop: Instruction) -> int:
        """How often the body of a while loop runs.

        Either the text tells it, or the condition compares a counter from 0 with a constant, which is what JAX makes of
        `scan`, `map` and `fori_loop` whose length is known.
        """
        if told := loop.attribute(r'"known_trip_count":\{"n":"(\d+)"\}'):
            return int(told)
        condition = self.computations[_called(loop, "condition")]
        inner = [one for whole in condition.values() for one, _ in self._inside(whole, condition)]
        # Of a fused comparison the constant may lie outside.
        constants = {found for one in (*condition.values(), *inner) if (found := _constant(one))}
        compares = [one for one in inner if one.opcode == "compare" and "direction=LT" in one.text]
        if len(compares) == 1 and len(constants) == 1:
            return constants.pop()
        self.unknown_loops.add(loop.name)
        return 1

    def _cost(self, one: Instruction, around: Computation, kernel: Kernel) -> tuple[Cost, str | None]:
        if one.opcode == "custom-call":
            return kernel(one, [array for name in one.operands for array in around[name].outputs]), None
        inner = list(self._inside(one, around))
        work = [pair for pair in inner if REORDERED not in pair[0].op_name]
        flops = sum(product_flops(*pair) for pair in work)
        padded = sum(product_flops(*pair, self._mxu) for pair in inner)
        arrays = self._touched(one, around)
        main, touched = sum(x.bytes for x in arrays if not x.on_chip), sum(x.bytes for x in arrays)
        kind, sent = self._sent(inner)
        return Cost(one.cycles, flops, padded, main, touched, sent), kind

    def _sent(self, inner: list[tuple[Instruction, Computation]]) -> tuple[str | None, int]:
        """The kind of collective that an instruction is, or ends, and the bytes of its whole arrays.

        What runs beside other work stands in every fusion from the one that begins it to the one that waits for it.
        """
        ended = any(each.target == "AsyncCollectiveDone" for each, _ in inner)
        senders = [(each, scope) for each, scope in inner if collective(each) and (ended or not asynchronous(each))]
        if not senders:
            return None, 0
        kind, names = collective(senders[0][0]), {each.name for each, _ in senders}
        # A reduction of which every chip cuts out its part is how XLA writes down that no chip gets the others'.
        if any(each.opcode == "dynamic-slice" and each.operands[0] in names for each, _ in inner):
            kind = "reduce-scatter"
        whole = []
        for each, scope in senders:
            scatters = each.opcode == "reduce-scatter"
            whole += [x for name in each.operands for x in scope[name].outputs] if scatters else each.outputs
        return kind, sum(array.bytes for array in whole)

    def _code(self, one: Instruction, around: Computation) -> int:
        operands = tuple(around[name].outputs for name in one.operands if name in around)
        fused = self.computations.get(_called_if_any(one, "calls") or "", {})
        return hash((one.opcode, one.outputs, operands, *(self._code(each, fused) for each in fused.values())))

    def _inside(self, one: Instruction, around: Computation) -> Iterator[tuple[Instruction, Computation]]:
        """The instruction, or those that it fuses, each with the computation that it is in."""
        fused = _called_if_any(one, "calls")
        if fused is None:
            yield one, around
        else:
            scope = self.computations[fused]
            yield from itertools.chain.from_iterable(self._inside(each, scope) for each in scope.values())

    def _touched(self, one: Instruction, around: Computation) -> list[Array]:
        """What it reads and writes; of arrays that it takes or changes a part of, that part."""
        if one.opcode in ("copy-start", "slice-start"):  # (destination, source, context)
            destination, source, *_ = one.outputs
            return [destination, destination._replace(on_chip=source.on_chip)]
        fused = self.computations.get(_called_if_any(one, "calls") or "", {})
        last = list(fused.values())[-1] if fused else one
        if last.target == "AsyncCollectiveStart":
            return []
        written = one.outputs
        if last.opcode == "tuple" and len(last.operands) == len(written):
            # What is handed on, as to the next fusion that a collective runs beside, is not touched.
            makers = [fused[name] for name in last.operands]
            written = [x for x, maker in zip(written, makers, strict=True) if not _handed_on(maker)]
        if last.opcode == "dynamic-update-slice":
            (update,) = (fused or around)[last.operands[1]].outputs
            written = [update._replace(on_chip=one.outputs[0].on_chip)]
        read = (self._read(one, place, around, fused) for place in range(len(one.operands)))
        return [*written, *itertools.chain.from_iterable(read)]

    def _read(self, one: Instruction, place: int, around: Computation, fused: Computation) -> list[Array]:
        """What it reads of an operand."""
        name, uses = one.operands[place], [one]
        whole = list(around[name].outputs)
        if fused:
            name = next(each.name for each in fused.values() if each.opcode == "parameter" and each.text == str(place))
            uses = [each for each in fused.values() if name in each.operands]
            if all(use.opcode == "tuple" or asynchronous(use) for use in uses):
                return []
        if uses and all(use.opcode in SLICES and use.operands[0] == name for use in uses):
            return [part._replace(on_chip=whole[0].on_chip) for use in uses for part in use.outputs]
        if uses and all(use.opcode == "dynamic-update-slice" and use.operands[0] == name for use in uses):
            return []
        return whole


def collective(one: Instruction) -> str | None:
    """The kind of a collective. Of an asynchronous one, the instruction that waits for it has the result."""
    kind = one.opcode.removesuffix("-done")
    return kind if kind in COLLECTIVES else None


def asynchronous(one: Instruction) -> bool:
    """Whether it is a collective that runs beside other work, which it is fused with."""
    return collective(one) is not None and "async_collective_fusion_config" in one.text


def _handed_on(one: Instruction) -> bool:
    return one.opcode == "parameter" or asynchronous(one)


def product_flops(one: Instruction, around: Computation, tile: int = 1) -> int:
    """Floating-point operations of a matrix product or convolution, two for each multiplication; 0 of all else.

    Args:
        one: the instruction.
        around: what it is in.
        tile: what features of a convolution's kernel are filled up to a multiple of.
    """
    if one.opcode == "dot":
        (lhs,) = around[one.operands[0]].outputs
        contracted = (one.attribute(r"lhs_contracting_dims=\{([\d,]*)\}") or "").split(",")
        return 2 * math.prod(one.outputs[0].shape) * math.prod(lhs.shape[int(d)] for d in contracted if d)
    if one.opcode != "convolution":
        return 0
    labels = re.fullmatch(r"(\w+)_(\w+)->(\w+)", one.attribute(r"dim_labels=([^,\s]+)") or "")
    if labels is None:
        raise ValueError("a convolution without dim_labels")
    arrays = (*(around[operand].outputs[0] for operand in one.operands), one.outputs[0])
    lhs, rhs, out = (
        dict(zip(own, array.shape, strict=True)) for own, array in zip(labels.groups(), arrays, strict=True)
    )
    window = dict(re.findall(r"(\w+)=([\w-]+)", one.attribute(r"window=\{([^}]*)\}") or ""))
    positions = 1
    for place, axis in enumerate(sorted(label for label in out if label.isdigit())):
        stride, low, lhs_dilate, rhs_dilate = (
            int(window[key].split("x")[place].partition("_")[0]) if key in window else default
            for key, default in (("stride", 1), ("pad", 0), ("lhs_dilate", 1), ("rhs_dilate", 1))
        )
        positions *= _valid(lhs[axis], rhs[axis], out[axis], stride, low, lhs_dilate, rhs_dilate)
    batch = lhs["b"] // int(one.attribute(r"batch_group_count=(\d+)") or 1)
    window_size = math.prod(rhs[axis] for axis in rhs if axis.isdigit())
    summed = rhs["i"] * window_size  # i: of one group of features
    filled = _filled(summed, tile) / summed * _filled(rhs["o"], tile) / rhs["o"]
    return round(2 * positions * batch * rhs["i"] * rhs["o"] * filled)


def _filled(size: int, tile: int) -> int:
    return tile * math.ceil(size / tile)


@cache
def _valid(size: int, kernel: int, out: int, stride: int, low: int, lhs_dilate: int, rhs_dilate: int) -> int:
    """Pairs of places in the output and in the kernel that meet a number of the input and neither padding nor a gap."""
    places = (o * stride + k * rhs_dilate - low for o in range(out) for k in range(kernel))
    return sum(place % lhs_dilate == 0 and 0 <= place < size * lhs_dilate for place in places)


def _slowness(branch: list[Executed]) -> tuple[float, float]:
    return sum(done.cost.cycles for done in branch), sum(done.cost.flops + done.cost.touched for done in branch)


def _called(one: Instruction, role: str) -> str:
    """The computation that an instruction calls as its body, condition, ...; a ValueError if it calls none so."""
    name = _called_if_any(one, role)
    if name is None:
        raise ValueError(f"{one.opcode}: calls no {role}")
    return name


def _called_if_any(one: Instruction, role: str) -> str | None:
    return one.attribute(rf"\b{role}=%?([\w.-]+)")


def _branches(one: Instruction) -> list[str]:
    several = one.attribute(r"branch_computations=\{([^}]*)\}")
    if several is None:
        return [_called(one, "true_computation"), _called(one, "false_computation")]
    return [name.strip().removeprefix("%") for name in several.split(",")]


def _constant(one: Instruction) -> int | None:
    return int(one.operands[0]) if one.opcode == "constant" and re.fullmatch(r"-?\d+", one.operands[0]) else None


# ----------------------------------------------------------------------------------------------------------------------
# Text


def _whole_lines(text: str) -> Iterator[str]:
    """Lines, with those that go on with what quotes broke off joined to the one before."""
    whole = ""
    for line in text.splitlines():
        if line in ("", "}") or COMPUTATION.match(line) or INSTRUCTION.match(line):
            yield whole
            whole = line
        else:
            whole += "\n" + line
    yield whole


def _instruction(name: str, text: str) -> Instruction:
    text = COMMENT.sub("", text)
    if text.startswith("("):
        outputs, rest = _closed(text)
    else:
        outputs, _, rest = text.partition(" ")
    opcode, _, rest = rest.strip().partition("(")
    operands, rest = _closed("(" + rest)
    if opcode == "parameter":
        return Instruction(name, opcode, _arrays(outputs), (), operands)
    return Instruction(name, opcode, _arrays(outputs), tuple(_split(operands)), rest)


def _closed(text: str) -> tuple[str, str]:
    """What the parenthesis that a text begins with encloses, and what follows."""
    depth = 0
    for found in re.finditer(r"[()]", text):
        depth += 1 if found[0] == "(" else -1
        if depth == 0:
            return text[1 : found.start()], text[found.end() :]
    raise ValueError(f"a line of a compiled program ends within a parenthesis: {text[:80]!r}")


def _split(operands: str) -> list[str]:
    """Names of operands, `%a, %b` or, in older texts, `f32[2]{0} %a`."""
    return [part.split()[-1].removeprefix("%") for part in re.split(r",\s+", operands) if part.strip()]


def _arrays(text: str) -> tuple[Array, ...]:
    return tuple(
        Array(dtype, tuple(int(size) for size in dims.split(",") if size), "S(" in layout)
        for dtype, dims, layout in ARRAY.findall(text)
    )
