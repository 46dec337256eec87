"""What a program takes on a TPU slice, as its compiler tells on a machine without one: memory, work, traffic, time."""

import collections
import dataclasses
import re
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from flax_pref.parallel.memory import aligned, budget, size_text, taken_bytes
from flax_pref.planning.hlo import Cost, Executed, Module
from flax_pref.planning.kernels import kernel_cost, known
from flax_pref.planning.plan_flags import Effort
from flax_pref.planning.topologies import Topology

LAUNCH = 1000  # cycles that every instruction takes, in the model of `modelled`
# Bytes of machine code, in the model of `code_bytes`: the least of a distinct instruction, those for each FLOP, or byte
# that it touches, and the most.
CODE = {"convolution": (20e3, 4e-4, 1.4e6), "product": (20e3, 8e-5, 0.8e6), "other": (10e3, 0.02, 0.07e6)}
CALL_CODE = 2000  # of each instruction, be it distinct or not
# Of a UNet, as `jax.named_scope` and the paths of parameters tell them.
ORDER = ("conv_in", "time_embedding", "add_embedding", "down_blocks", "mid_block", "up_blocks", "conv_out", "optimizer")
PARTS = re.compile(rf"\b((?:down_blocks|up_blocks)\W+\d+|{'|'.join(ORDER)})\b")
SIZES = {"B": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


class Job(NamedTuple):
    """A program, and what it is called with.

    Attributes:
        name: what it does.
        program: jitted.
        arguments: shapes with their shardings.
        held: what lies on the devices while it runs, by name; see `memory.budget`.
        work: what a call makes on all devices together.
        unit: of that, such as pair.
        part: of the network, what has no name of its own in it.
    """

    name: str
    program: Any
    arguments: tuple
    held: Mapping[str, Any]
    work: int
    unit: str
    part: str = "other"


@dataclasses.dataclass(frozen=True)
class Plan:
    """What one call of a program takes on every chip.

    Attributes:
        job: the program.
        topology: of the slice.
        mesh: of its devices.
        effort: of the compiler.
        lowering: seconds that it took here to trace the program and to hand it to the compiler, as every start does.
        memory: of the program, or None where the compiler refuses it.
        excess: bytes that a chip has too few; negative: that are left.
        cost: of all that runs; None where the compiler refuses the program.
        parts: cycles of parts of the network, forward and backward.
        sent: how many collectives of each kind there are, and the bytes of their whole arrays.
        bounds: share of the time that products, main memory, and all else decide about.
        copies: large arrays that change their layout, on the way through the program.
        uncounted: names of kernels and loops of which the text does not tell enough.
    """

    job: Job
    topology: Topology
    mesh: Mesh
    effort: Effort
    lowering: float
    memory: "Memory | None"
    excess: int
    cost: Cost | None = None
    parts: Mapping[str, tuple[float, float]] = dataclasses.field(default_factory=dict)
    sent: Mapping[str, tuple[int, float]] = dataclasses.field(default_factory=dict)
    bounds: Mapping[str, float] = dataclasses.field(default_factory=dict)
    copies: int = 0
    uncounted: Sequence[str] = ()

    @property
    def fits(self) -> bool:
        """Whether a chip has the memory."""
        return self.excess <= 0

    @property
    def _cost(self) -> Cost:
        if self.cost is None:
            raise ValueError(f"{self.job.name}: the compiler refuses the program, so nothing is known of its time")
        return self.cost

    @property
    def seconds(self) -> float:
        """Of a call, what chips send each other not included."""
        return self._cost.cycles / self.topology.chip.clock

    @property
    def link_seconds(self) -> float:
        """What chips send each other takes at least, if nothing else is computed meanwhile."""
        # A reduction sends what it reduces and then its result.
        sent = sum(size * (2 if kind == "all-reduce" else 1) for kind, (_, size) in self.sent.items())
        return sent / self.topology.chip.links

    @property
    def rate(self) -> float:
        """Pairs, or images, of a chip in a second."""
        return self.job.work / self.mesh.size / (self.seconds + self.link_seconds)

    @property
    def share_of_peak(self) -> float:
        """Of what the maker says that a chip can do."""
        return self._cost.flops / self.seconds / self.topology.peak


def plan(job: Job, topology: Topology, mesh: Mesh, effort: Effort) -> Plan:
    """Compiles a program for a slice and reads what the compiler says of it.

    Args:
        job: the program.
        topology: of the slice.
        mesh: of all its devices.
        effort: "full" as the slice itself would compile, with the compiler's estimates; "quick" only until memory is
            laid out, a tenth of the time: cycles are `modelled`.
    """
    started = time.perf_counter()
    with jax.set_mesh(mesh):
        lowered = job.program.lower(*job.arguments)
        lowering = time.perf_counter() - started
        try:
            text, memory = laid_out(lowered, job.arguments) if effort == "quick" else compiled(lowered)
        except jax.errors.JaxRuntimeError as error:
            if (excess := excess_of(str(error))) is None:
                raise
            return Plan(job, topology, mesh, effort, lowering, memory=None, excess=excess)
    module = Module(text, topology.chip.mxu)
    executed = run_by(module, topology)
    if effort == "quick":
        executed = [one._replace(cost=modelled(one, topology)) for one in executed]
        memory = memory._replace(generated_code_size_in_bytes=code_bytes(executed))
    uncounted = {one.instruction.name for one in executed if not known(one.instruction)} | module.unknown_loops
    return Plan(
        *(job, topology, mesh, effort, lowering, memory),
        excess=sum(taken_bytes(job.held, memory).values()) - topology.chip.hbm,
        cost=Cost(*map(sum, zip(*(one.cost for one in executed), strict=True))),
        parts=parts_of(executed, job.part),
        sent=sent_by(executed),
        bounds=bounds_of(executed, topology),
        copies=large_copies(executed),
        uncounted=sorted(uncounted),
    )


def planned_seconds(text: str, topology: Topology) -> float:
    """Seconds of a call of a program on one chip, by the text of what was compiled for it, with its estimates."""
    return sum(one.cost.cycles for one in run_by(Module(text, topology.chip.mxu), topology)) / topology.chip.clock


def run_by(module: Module, topology: Topology) -> list[Executed]:
    """Everything that a program runs, with the costs of its kernels on these chips."""
    return list(module.executed(lambda one, operands: kernel_cost(one, operands, topology)))


class Memory(NamedTuple):
    """As `memory_analysis()` tells it."""

    argument_size_in_bytes: int
    temp_size_in_bytes: int
    output_size_in_bytes: int = 0
    alias_size_in_bytes: int = 0
    generated_code_size_in_bytes: int = 0


def compiled(lowered: Any) -> tuple[str, Memory]:
    """A program that is compiled to its end: its text, with the compiler's estimates, and its memory."""
    program = lowered.compile()
    memory = program.memory_analysis()
    return program.as_text(), Memory(*(getattr(memory, name) for name in Memory._fields))


def laid_out(lowered: Any, arguments: Any) -> tuple[str, Memory]:
    """A program up to where the compiler has laid out its memory, which is where nine tenths of its time begin.

    The compiler then writes what it has and continues in its thread, which only the end of the process stops.

    Args:
        lowered: the program.
        arguments: those it was lowered for, with their shardings.
    """
    failed: list[BaseException] = []

    def compile_on(folder: str) -> None:
        try:
            lowered.compile(compiler_options={"xla_dump_to": folder})
        except BaseException as error:
            failed.append(error)

    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        thread = threading.Thread(target=compile_on, args=(folder,), daemon=True)
        thread.start()
        # What follows in this stage, lists of every value, takes minutes of large programs.
        while not (written := _settled(Path(folder), "*.after_optimizations-buffer-assignment.txt")):
            if not thread.is_alive():
                raise failed[0] if failed else RuntimeError("the compiler has written down no layout of memory")
            time.sleep(0.2)
        (program,) = Path(folder).glob("*.after_optimizations.txt")
        total, text = main_memory(written), program.read_text()
    given = sum(taken_bytes({"arguments": arguments}, None).values())
    return text, Memory(given, max(0, total - given))


def main_memory(assignment: str) -> int:
    """Bytes of main memory that XLA's text of a buffer assignment allocates; other memories have colours."""
    sizes = re.findall(r"^allocation \d+: size (\d+)(?!.*\bcolor [1-9])", assignment, re.M)
    return sum(map(int, sizes))


def _settled(folder: Path, pattern: str) -> str:
    """The text of a file that nobody has written to for a while; empty where there is none yet."""
    for file in folder.glob(pattern):
        if time.time() - file.stat().st_mtime > 1.0:
            return file.read_text()
    return ""


def modelled(one: Executed, topology: Topology) -> Cost:
    """The cost of an instruction with cycles from its shapes, instead of the compiler's estimate.

    With these numbers the sums are within 2 % of the compiler's for the forward pass of Stable Diffusion 1.5 with both
    kinds of attention, on v5e; docs/planning.md has others.
    """
    cost, chip = one.cost, topology.chip
    if one.instruction.opcode == "custom-call":
        return cost
    vectors = cost.touched / chip.vector
    cycles = max(
        cost.padded_flops / topology.peak * chip.clock,
        cost.bytes / chip.bandwidth * chip.clock,
        vectors / 2 if cost.flops else vectors,
    )
    if one.instruction.opcode.endswith("-start") or one.sends:
        cycles = 0.0  # it runs beside what follows; what chips send each other is told apart
    return cost._replace(cycles=cycles + LAUNCH * one.runs)


def code_bytes(executed: Sequence[Executed]) -> int:
    """About what the machine code of a program takes, where equal instructions share it (`compilation.share_code`).

    docs/planning.md has what compilers made of it.
    """
    distinct = {one.code: one for one in executed}.values()
    return round(sum(map(_own_code, distinct)) + CALL_CODE * len(executed))


def _own_code(one: Executed) -> float:
    work, kind = one.cost.touched, "other"
    if one.cost.flops:  # on TPUs XLA writes down products as convolutions, too
        work, kind = one.cost.flops, "convolution" if "conv_general" in one.instruction.op_name else "product"
    least, each, most = CODE[kind]
    return min(most, least + each * work / one.runs)


def large_copies(executed: Sequence[Executed]) -> int:
    """How many copies and transposes of arrays of 1 MiB and more run: nothing else happens in them."""
    return sum(
        one.runs
        for one in executed
        if one.instruction.opcode in ("copy", "transpose") and one.instruction.outputs[0].bytes >= 2**20
    )


def excess_of(message: str) -> int | None:
    """Bytes that a chip has too few, of the compiler's error; None: it is about something else."""
    if "RESOURCE_EXHAUSTED" not in message:
        return None
    size = r"([\d.]+)([BKMGT])\b"
    if told := re.search(rf"[Ee]xceeded hbm capacity by {size}", message):
        return int(float(told[1]) * SIZES[told[2]])
    if told := re.search(rf"\({size}\) exceeds available HBM \({size}\)", message):
        return int(float(told[1]) * SIZES[told[2]] - float(told[3]) * SIZES[told[4]])
    return None


def parts_of(executed: Sequence[Executed], unnamed: str) -> dict[str, tuple[float, float]]:
    """Cycles of parts of the network, forward and backward, in the network's order."""
    parts: dict[str, list[float]] = {}
    for one in executed:
        op_name = one.instruction.op_name
        found = PARTS.search(op_name)
        part = re.sub(r"\W+", ".", found[1]) if found else unnamed
        parts.setdefault(part, [0.0, 0.0])["transpose(" in op_name] += one.cost.cycles
    named = sorted(
        (part for part in parts if part != unnamed), key=lambda part: (ORDER.index(part.split(".")[0]), part)
    )
    present = [(part, *parts[part]) for part in (*named, unnamed) if part in parts]
    return {part: (forward, backward) for part, forward, backward in present if forward + backward}


def sent_by(executed: Sequence[Executed]) -> dict[str, tuple[int, float]]:
    """How many collectives of each kind run, and the bytes of their whole arrays."""
    sent: dict[str, tuple[int, float]] = {}
    for one in executed:
        if one.sends:
            count, size = sent.get(one.sends, (0, 0.0))
            sent[one.sends] = (count + one.runs, size + one.cost.sent)
    return sent


def bounds_of(executed: Sequence[Executed], topology: Topology) -> dict[str, float]:
    """Shares of the cycles of instructions that products, or main memory, take most of; the rest is all else."""
    cycles: dict[str, float] = collections.defaultdict(float)
    for one in executed:
        products = one.cost.flops / topology.peak * topology.chip.clock
        memory = one.cost.bytes / topology.chip.bandwidth * topology.chip.clock
        most = "matrix products" if products >= memory else "main memory"
        cycles[most if 2 * max(products, memory) >= one.cost.cycles else "vector units and copies"] += one.cost.cycles
    total = sum(cycles.values())
    return {name: count / total for name, count in sorted(cycles.items(), key=lambda item: -item[1]) if total}


# ----------------------------------------------------------------------------------------------------------------------
# For people, and for programs


ESTIMATE = {
    "full": "cycles are the compiler's estimate",
    "quick": "cycles and program are a model of the compiler's figures; --effort full has its own, ten times as long",
}


def rendered(one: Plan) -> str:
    """What a user is shown of a program."""
    job, chip = one.job, one.topology.chip
    lines = [
        f"{job.name}: {job.work} {job.unit}s a call, compiled for {one.topology.name}",
        budget(one.mesh, job.held, one.memory, chip.hbm).partition("\nwarning")[0],
        verdict(one),
        f"start: traced and lowered in {one.lowering:.2g} s on this machine, which no compilation cache saves",
    ]
    if one.cost is None:
        return "\n".join(lines)
    sent = ", ".join(f"{count} x {kind} {size / 1e9:.3g} GB" for kind, (count, size) in one.sent.items()) or "nothing"
    lines += [
        f"work: {one.cost.flops / 1e12:.4g} TFLOP and {one.cost.bytes / 1e9:.4g} GB moved on every chip",
        f"sent by every chip: {sent}",
        table_of_parts(one.parts, chip.clock),
        f"time: {one.seconds:.4g} s, {one.cost.cycles / 1e6:.4g} M cycles at {chip.clock / 1e9:g} GHz, and "
        f"{one.link_seconds:.3g} s for what chips send each other, if nothing hides it",
        f"      not measured: {ESTIMATE[one.effort]}",
        f"speed: {one.rate:.4g} {job.unit}s/s per chip, {one.share_of_peak:.1%} of the peak of "
        f"{one.topology.peak / 1e12:.4g} TFLOP/s",
        "bound by: " + ", ".join(f"{name} {share:.0%}" for name, share in one.bounds.items()) + " of the time",
    ]
    if one.uncounted:
        lines.append(f"not counted, or loops counted once: {', '.join(one.uncounted)}")
    return "\n".join(lines)


def verdict(one: Plan) -> str:
    """Whether a program fits."""
    if one.fits:
        return f"fits: {size_text(-one.excess)} of each chip are left"
    return f"does not fit by {size_text(one.excess)}"


def table_of_parts(parts: Mapping[str, tuple[float, float]], clock: float) -> str:
    """Cycles and time of parts of the network."""
    total = sum(map(sum, parts.values()))
    rows: list[Sequence[str]] = [("part", "forward", "backward", "time", "share")]
    for part, cycles in parts.items():
        both = sum(cycles)
        seconds = f"{both / clock * 1e3:.4g} ms"
        rows.append((part, *(f"{x / 1e6:.2f} M" if x else "" for x in cycles), seconds, f"{both / total:.1%}"))
    return aligned(rows)


def figures(one: Plan) -> dict[str, Any]:
    """What a plan says, as JSON can hold it: bytes, FLOP and seconds of each chip."""
    told = {
        **{"program": one.job.name, "topology": one.topology.name, "mesh": dict(one.mesh.shape), "effort": one.effort},
        **{"jax": jax.__version__, "fits": one.fits, "excess_bytes": one.excess},
        **{"work": one.job.work, "unit": one.job.unit, "chips": one.mesh.size, "peak": one.topology.peak},
        **{"lowering_seconds": one.lowering, "memory": taken_bytes(one.job.held, one.memory)},
    }
    if one.cost is None:
        return told
    return told | {
        **{"flops": one.cost.flops, "bytes_moved": one.cost.bytes, "cycles": one.cost.cycles},
        **{"seconds": one.seconds, "link_seconds": one.link_seconds, "sent": one.sent, "parts": one.parts},
        "per_second_per_chip": one.rate,
        **{"share_of_peak": one.share_of_peak, "bounds": one.bounds, "copies": one.copies, "uncounted": one.uncounted},
    }
