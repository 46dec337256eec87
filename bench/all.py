"""Every bench at a small size, in one table with ratios to torch; and what became slower from one table to another.

Each bench is a process of its own, as a user would start it. How much its rounds differ is the noise of this machine,
without which a table of another day says nothing.
"""

import collections
import dataclasses
import datetime
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import tyro

from flax_pref.files import read_json
from flax_pref.parallel.memory import aligned


class Measure(NamedTuple):
    """A figure of a bench, of which less is better.

    Attributes:
        name: in the table.
        unit: of both.
        ours: from what the bench tells, for each of its rounds or once.
        torch: the same of torch in the same rounds, or None where torch was not there; None: there is no such figure.
        share: of the device's measured peak that ours reaches; None: not told.
    """

    name: str
    unit: str
    ours: Callable[[Mapping[str, Any]], float | list[float]]
    torch: Callable[[Mapping[str, Any]], float | list[float] | None] | None = None
    share: Callable[[Mapping[str, Any]], float] | None = None

    def read(self, told: Mapping[str, Any]) -> dict[str, list[float]]:
        """The figure of each round, and those of torch and the share where there are any."""
        read = {"ours": self.ours, "torch": self.torch, "share_of_measured_peak": self.share}
        values = {whose: of(told) for whose, of in read.items() if of is not None}
        there = {whose: value for whose, value in values.items() if value is not None and value != []}
        return {whose: value if isinstance(value, list) else [value] for whose, value in there.items()}


class Run(NamedTuple):
    """A bench, with flags that give it a size.

    Attributes:
        arguments: of `python -m bench`.
        measures: that it gives.
        lacks: says what it needs and this machine does not have; "" where nothing is missing.
    """

    arguments: str
    measures: tuple[Measure, ...]
    lacks: Callable[[], str] = str


def _no_tpu_compiler() -> str:
    return "" if importlib.util.find_spec("libtpu") else "libtpu, the compiler of TPUs (pip install 'flax-pref[tpu]')"


def _no_demo() -> str:
    return "" if Path("runs/demo/pos.safetensors").exists() else "runs/demo, which `make demo` makes"


def _thousandths(values: list[float]) -> list[float]:
    return [1e3 * value for value in values]


def _guidance(of: str) -> tuple[Measure, ...]:
    """Measures of `bench guidance` with the rules cfg and cpgd."""
    return (
        Measure(
            *(f"step of CFG, {of}", "s"),
            lambda told: told["each_round"]["cfg"],
            share=lambda told: told["rules"]["cfg"]["share_of_measured_peak"],
        ),
        Measure(
            *(f"step of cPGD, {of}", "s"),
            lambda told: told["each_round"]["cpgd"],
            lambda told: told["each_round"].get("torch"),
            lambda told: told["rules"]["cpgd"]["share_of_measured_peak"],
        ),
    )


def _step(of: str) -> tuple[Measure, ...]:
    """Measures of `bench step` with Diffusion-DPO."""
    return (
        Measure(
            *(f"training step of Diffusion-DPO, {of}", "s"),
            lambda told: told["each_round"]["dpo"],
            lambda told: told["each_round"].get("torch"),
            lambda told: told["steps"]["dpo"]["share_of_measured_peak"],
        ),
        Measure(
            *(f"peak of memory of that step, {of}", "GB"),
            lambda told: told["steps"]["dpo"]["peak_memory_gb"],
            lambda told: told["steps"].get("torch", {}).get("peak_memory_gb"),
        ),
    )


def _both(of: str) -> Measure:
    """Measure of `bench step` beside those of Diffusion-DPO."""
    return Measure(
        *(f"training step of both modules, {of}", "s"),
        lambda told: told["each_round"]["positive_negative"],
        share=lambda told: told["steps"]["positive_negative"]["share_of_measured_peak"],
    )


SMALL = {
    "unet": Run(
        "unet --size 256 --batch-sizes 1 --rounds 3",
        (
            Measure(
                *("forward pass of SD1.5, 256 px", "s"),
                lambda told: told["batches"][0]["each_round"]["seconds"],
                lambda told: told["batches"][0]["each_round"].get("torch_seconds"),
            ),
        ),
    ),
    "guidance": Run("guidance --size 256 --rounds 2", _guidance("256 px")),
    "step": Run("step --size 256 --rounds 3 --no-both", _step("256 px")),
    "online": Run(
        "online --size 128 --rounds 2 --no-parts",
        (Measure("loss of DiffusionNFT, 128 px", "s", lambda told: told["each_round"]["step"]),),
    ),
    "data": Run(
        "data --parts reading decoding --workers 0 --pairs 1000 --batches 30",
        (
            Measure(
                *("pair from a prepared set", "ms"),
                lambda told: _thousandths(told["reading"]["each_round"]["0 workers"]),
            ),
            Measure(
                *("JPEG pair decoded, on one core", "ms"),
                lambda told: _thousandths(told["decoding"]["each_round"]["ours"]),
                lambda told: _thousandths(told["decoding"]["each_round"].get("torch", [])),
            ),
        ),
    ),
    "rewards": Run(
        "rewards --parts pickscore --batch-size 1 --rounds 2",
        (
            Measure(
                *("PickScore of an image", "s"),
                lambda told: told["pickscore"]["each_round"]["seconds"],
                lambda told: told["pickscore"]["each_round"].get("torch_seconds"),
            ),
        ),
    ),
    "writing": Run(
        "writing --images 16 --formats png",
        (Measure("PNG of 512 px written", "ms", lambda told: 1e3 / told["formats"]["png"]["most_images_per_second"]),),
    ),
    "load": Run(
        "load --family sd15 --dtype float16",
        (
            Measure("loading the UNet of SD1.5", "s", lambda told: told["seconds"]),
            Measure("peak of memory of loading it", "GB", lambda told: told["peak_gb"]),
        ),
    ),
    "compile": Run(
        "compile --model demo",
        (
            Measure("start of training, empty cache", "s", lambda told: told["empty_cache"]["seconds"]["all"]),
            Measure("start of training, filled cache", "s", lambda told: told["filled_cache"]["seconds"]["all"]),
        ),
    ),
    "forward": Run(
        "forward --effort quick",
        (
            Measure(
                *("forward pass on a v5e, by the quick model", "million cycles"),
                lambda told: (
                    told["million_cycles_outside_kernels_by_the_quick_model"] + told["million_cycles_of_kernels"]
                ),
            ),
        ),
        _no_tpu_compiler,
    ),
    "tradeoff": Run(
        "tradeoff --prompts 32 --validation-prompts 16",
        (Measure("image of the demo by CFG", "s", lambda told: told["seconds_per_image_cfg"]),),
        _no_demo,
    ),
}
# Sampling and training beside torch.compile, and attention by XLA beside cuDNN's.
GPU = {
    "sd15": Run("guidance --batch-size 8 --rounds 3", _guidance("SD1.5")),
    "sd15-xla": Run("guidance --batch-size 8 --rounds 3 --attention xla --no-reference", _guidance("SD1.5, XLA")),
    "sdxl": Run("guidance --family sdxl --batch-size 4 --rounds 3", _guidance("SDXL")),
    "sdxl-xla": Run(
        "guidance --family sdxl --batch-size 4 --rounds 3 --attention xla --no-reference", _guidance("SDXL, XLA")
    ),
    "sd15-step": Run("step --batch-size 8 --rounds 5", (*_step("SD1.5"), _both("SD1.5"))),
    "sdxl-step": Run("step --family sdxl --batch-size 2 --remat block --rounds 5", (*_step("SDXL"), _both("SDXL"))),
}
SUITES = {"small": SMALL, "gpu": GPU}


@dataclasses.dataclass(frozen=True, kw_only=True)
class All:
    """Runs many benches, one after the other, into one table."""

    suite: Literal["small", "gpu"] = "small"
    """small: every bench, at a small size. gpu: sampling and training at full size beside torch.compile."""
    only: tuple[str, ...] = ()
    """Names of benches to run; none: all that this machine has what they need for."""
    flags: tuple[str, ...] = ()
    """More flags for each of them as NAME=VALUE, such as size=512."""
    times: int = 1
    """How often each runs; rounds of all times count."""
    history: Path | None = None
    """File to which a line with the date and all ratios to torch is added."""
    json: Path | None = None
    """File for the figures."""


def bench_all(bench: All) -> dict:
    """Figures of all benches, with ratios to torch and noise; a table of them goes to stderr.

    Raises:
        ValueError: no bench has the name, or one failed.
    """
    runs = SUITES[bench.suite]
    if unknown := [name for name in bench.only if name not in runs]:
        raise ValueError(f"bench: --only {unknown[0]}: expected some of {', '.join(runs)}")
    if bench.times < 1:
        raise ValueError(f"bench: --times {bench.times}; expected at least 1")
    chosen, started = bench.only or tuple(runs), time.perf_counter()
    skipped = {name: lacks for name in chosen if (lacks := runs[name].lacks())}
    for name, lacks in skipped.items():
        print(f"{name} is left out: it needs {lacks}", file=sys.stderr)
    figures: dict[str, dict] = {}
    seconds: dict[str, float] = collections.defaultdict(float)
    for _ in range(bench.times):
        for name in (name for name in chosen if name not in skipped):
            begun = time.perf_counter()
            told = _run([*runs[name].arguments.split(), *(f"--{flag}" for flag in bench.flags)])
            seconds[name] += time.perf_counter() - begun
            for measure in runs[name].measures:
                row = figures.setdefault(measure.name, {"bench": runs[name].arguments, "unit": measure.unit})
                for whose, values in measure.read(told).items():
                    row.setdefault(whose, []).extend(values)
    for row in figures.values():
        row |= _summary(row["ours"], row.get("torch"))
        if shares := row.get("share_of_measured_peak"):
            row["share_of_measured_peak"] = statistics.mean(shares)
    told = {
        **{"date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"), "jax": jax.__version__},
        **{"device": jax.devices()[0].device_kind, "machine": _processor()},
        **{"cores": os.cpu_count(), "seconds": round(time.perf_counter() - started, 1)},
        "seconds_of": {name: round(value, 1) for name, value in seconds.items()},
        **{"left_out": skipped, "figures": figures},
    }
    print(_table(figures), file=sys.stderr)
    if bench.history is not None:
        _remember(told, bench.history)
    return told


def _run(arguments: list[str]) -> dict:
    """Runs a bench as a process of its own and returns its figures."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "figures.json"
        command = [sys.executable, "-m", "bench", *arguments, "--json", str(file)]
        print(" ".join(("bench", *arguments)), file=sys.stderr)
        if subprocess.run(command, stdout=subprocess.DEVNULL).returncode:
            raise ValueError(f"bench: {' '.join(command[1:-2])} failed, see above")
        return json.loads(file.read_text())


def _processor() -> str:
    """Name of the processor, where the system tells it."""
    told = Path("/proc/cpuinfo")
    lines = told.read_text().splitlines() if told.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _summary(ours: list[float], torch: list[float] | None) -> dict[str, float]:
    """Medians over the rounds, the ratio to torch, and the spread of what is compared with other days."""
    ratios = [a / b for a, b in zip(ours, torch, strict=True)] if torch else None
    compared = ratios or ours
    median = statistics.median(compared)
    return {
        "median": statistics.median(ours),
        **({"torch_median": statistics.median(torch), "ratio_to_torch": median} if torch else {}),
        **({"noise": (max(compared) - min(compared)) / median} if len(compared) > 1 else {}),
    }


COLUMNS = {
    "median": ".3g",
    "torch_median": ".3g",
    "ratio_to_torch": ".2f",
    "noise": ".0%",
    "share_of_measured_peak": ".0%",
}


def _table(figures: Mapping[str, Mapping[str, Any]]) -> str:
    rows = [["", "unit", "ours", "torch", "ours / torch", "noise", "of peak"]]
    for name, row in figures.items():
        texts = [f"{row[key]:{style}}" if key in row else "" for key, style in COLUMNS.items()]
        rows.append([name, row["unit"], *texts])
    return aligned(rows)


def _remember(told: Mapping[str, Any], history: Path) -> None:
    """Adds a line to the history, and prints its last ones."""
    ratios = {name: round(row["ratio_to_torch"], 3) for name, row in told["figures"].items() if "torch" in row}
    line = {"date": told["date"], "machine": told["machine"], "jax": told["jax"], "ratios_to_torch": ratios}
    history.parent.mkdir(parents=True, exist_ok=True)
    with history.open("a") as file:
        file.write(json.dumps(line) + "\n")
    lines = [json.loads(text) for text in history.read_text().splitlines()[-10:]]
    names = list(dict.fromkeys(name for line in lines for name in line["ratios_to_torch"]))
    rows = [("ours / torch", *(line["date"][:16] for line in lines))]
    rows += [(name, *(f"{line['ratios_to_torch'].get(name, float('nan')):.2f}" for line in lines)) for name in names]
    print(aligned(rows), file=sys.stderr)


# ----------------------------------------------------------------------------------------------------------------------
# Comparison

LEAST = 0.05  # a change below this is none, however quiet both tables were
ONCE = 0.1  # noise of a figure that was measured once


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compare:
    """Says what became slower from one table of `bench all` to another, beyond the noise of both."""

    before: tyro.conf.Positional[Path] = tyro.MISSING
    """File of `bench all --json`."""
    after: tyro.conf.Positional[Path] = tyro.MISSING
    """A later one."""
    json: Path | None = None
    """File for the figures."""


def bench_compare(bench: Compare) -> dict:
    """Changes of all figures that both tables have; a table of them goes to stderr.

    Ratios to torch are compared where there are any, for they depend little on the machine, else figures themselves.

    Raises:
        ValueError: a file is no table of `bench all`, or they have no figure in common.
    """
    before, after = (_figures(path) for path in (bench.before, bench.after))
    common = [name for name in before["figures"] if name in after["figures"]]
    if not common:
        raise ValueError(f"{bench.before} and {bench.after} have no figure in common")
    if before["machine"] != after["machine"]:
        print(
            f"two machines, {before['machine']} and {after['machine']}: only ratios to torch mean much", file=sys.stderr
        )
    changes = {}
    for name in common:
        pair = before["figures"][name], after["figures"][name]
        kind = "ratio_to_torch" if all("ratio_to_torch" in row for row in pair) else "median"
        change = pair[1][kind] / pair[0][kind]
        noise = max(LEAST, sum(row.get("noise", ONCE) for row in pair))
        verdict = "slower" if change > 1 + noise else "faster" if change < 1 / (1 + noise) else "same"
        changes[name] = {"compared": kind, "before": pair[0][kind], "after": pair[1][kind], "change": change}
        changes[name] |= {"noise": noise, "verdict": verdict}
    rows = [("", "compared", "before", "after", "change", "noise", "")]
    for name, row in changes.items():
        shown = "ours / torch" if row["compared"] == "ratio_to_torch" else after["figures"][name]["unit"]
        numbers = (f"{row['before']:.3g}", f"{row['after']:.3g}", f"{row['change'] - 1:+.0%}", f"{row['noise']:.0%}")
        rows.append((name, shown, *numbers, row["verdict"]))
    print(aligned(rows), file=sys.stderr)
    return {
        "slower": [name for name, row in changes.items() if row["verdict"] == "slower"],
        "only_before": [name for name in before["figures"] if name not in common],
        "only_after": [name for name in after["figures"] if name not in common],
        "changes": changes,
    }


def _figures(path: Path) -> dict:
    told = read_json(path, expected="a table of bench all --json")
    if "figures" not in told or "machine" not in told:
        raise ValueError(f"{path}: has no figures of several benches; expected a table of bench all --json")
    return told
