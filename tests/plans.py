"""Plans of what this project ships, each made by its command.

    python -m tests.plans            every config on three slices, into docs/performance.md
    python -m tests.plans --missing  those that the table there does not have yet
    python -m tests.plans --record   those that tests/test_plans.py checks, into tests/plans.json

Needs libtpu (`make plan` installs it). On two cores a plan of Stable Diffusion 1.5 takes one to three minutes and up
to 11 GB, one of SDXL three to eight and up to 14 GB, with two networks in training 14 to 25 and 22 GB. Each is written
down when it is there, so that a run that was stopped loses one.
"""

import argparse
import contextlib
import datetime
import importlib.metadata
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import filelock

from flax_pref.files import replacing, write_json
from flax_pref.parallel.memory import size_text
from flax_pref.planning.command import in_process

RECORDED = Path(__file__).with_name("plans.json")
PAGE = Path("docs/performance.md")
BEGIN, END = "<!-- plans: begin -->", "<!-- plans: end -->"

SD15, SDXL = "stable-diffusion-v1-5/stable-diffusion-v1-5", "stabilityai/stable-diffusion-xl-base-1.0"
# What is checked: full sizes, on the smallest slice.
CHECKED = {
    "SD1.5 DPO step": ("plan", "configs/sd15/dpo.py", "--mesh", "data=-1,fsdp=4", "--topology", "v5e:2x2"),
    "SD1.5 cPGD sampler": (
        *("plan-sample", "--model", SD15, "--rule", "cpgd", "--w", "4", "--steps", "2", "--solver", "ddim"),
        *("--only", "sampler", "--topology", "v5e:2x2"),
    ),
}
SLICES = ("v5e:16x16", "v6e:16x16", "v5p:4x4x4")
Cells = Mapping[tuple[str, str], str]


def shipped() -> dict[str, tuple[str, ...]]:
    """Commands without their slice, by name: every config that is not for the demo, and cPGD samplers."""
    configs = {
        str(file): ("plan", str(file), *(() if "encode" in file.name else ("--only", "train step")))
        for file in sorted(Path("configs").glob("sd*/*.py"))
    }
    samplers = {
        f"cPGD, {name}, {weights}": (
            *("plan-sample", "--model", model, "--rule", "cpgd", "--w", "4", "--steps", "25"),
            *("--weights", weights, "--mesh", mesh),
        )
        for name, model in (("sd15", SD15), ("sdxl", SDXL))
        for weights, mesh in (("lora", "data=-1"), ("full", "network=4,data=-1"))
    }
    return configs | samplers


def planned(command: Sequence[str]) -> dict[str, Any]:
    """The summary of a plan.

    Raises:
        ValueError: there is none; says why.
    """
    program, *arguments = command
    told, error = in_process(program, arguments)
    if told is None:
        raise ValueError(error)
    return told["summary"]


def cell(command: Sequence[str]) -> str:
    """What the table says of a plan; errors as `planned`."""
    told = planned(command)
    batch = f"batch {told['work']}"
    if not told["fits"]:
        return f"{batch}: does not fit by {size_text(told['excess_bytes'])}"
    rate, share = told["per_second_per_chip"], told["share_of_peak"]
    return f"{batch}: {rate:.3g} {told['unit']}s/s, {share:.0%}, {size_text(-told['excess_bytes'])} left"


def read_table(page: str) -> dict[tuple[str, str], str]:
    """What the table on the page has, by name and slice."""
    lines = [line for line in _table_in(page).splitlines() if line.startswith("|")]
    header, *rows = [[part.strip("` ") for part in line.split("|")[1:-1]] for line in lines] or [[]]
    return {
        (name, slice): text
        for name, *texts in rows
        for slice, text in zip(header[1:], texts, strict=False)
        if text and set(name) != {"-"}
    }


def with_table(page: str, cells: Cells) -> str:
    """The page with these cells in its table: a row for each of `shipped`, a column for each of `SLICES`."""
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("jax", "libtpu"))
    rows = [["", *SLICES], ["---"] * (1 + len(SLICES))]
    rows += [[f"`{name}`", *(cells.get((name, slice), "") for slice in SLICES)] for name in shipped()]
    table = "".join(f"| {' | '.join(row)} |\n" for row in rows)
    before, _, rest = page.partition(BEGIN)
    told = f"{versions}; newest plan: {datetime.date.today()}."
    return f"{before}{BEGIN}\n\n{told}\n\n{table}\n{END}{rest.partition(END)[2]}"


def _table_in(page: str) -> str:
    return page.partition(BEGIN)[2].partition(END)[0]


@contextlib.contextmanager
def _page() -> Iterator[str]:
    """The page, which no other run of this program changes meanwhile."""
    lock = Path("runs") / "plans.lock"
    lock.parent.mkdir(exist_ok=True)
    with filelock.FileLock(lock):
        yield PAGE.read_text(encoding="utf-8")


def write_cell(name: str, slice: str, text: str) -> None:
    """Puts a cell into the table on the page."""
    with _page() as page, replacing(PAGE) as unfinished:
        unfinished.write_text(with_table(page, {**read_table(page), (name, slice): text}), encoding="utf-8")


def main() -> None:
    """Writes the table, or the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", action="store_true")
    parser.add_argument("--missing", action="store_true", help="plan what the table does not have")
    parser.add_argument("--only", nargs="+", default=[""], help="parts of the names of what is planned: configs/sd15")
    parser.add_argument("--slices", nargs="+", default=SLICES, choices=SLICES)
    flags = parser.parse_args()
    if flags.record:
        write_json(RECORDED, {name: planned(command) for name, command in CHECKED.items()})
        return
    failed = False
    for name, command in shipped().items():
        for slice in flags.slices if any(part in name for part in flags.only) else ():
            with _page() as page:
                there = (name, slice) in read_table(page)
            if not (flags.missing and there):
                print(f"planning {name} on {slice}", file=sys.stderr, flush=True)
                try:
                    write_cell(name, slice, cell([*command, "--topology", slice]))
                except ValueError as error:
                    failed = True
                    print(f"no plan of {name} on {slice}: {error}", file=sys.stderr, flush=True)
    if failed:
        sys.exit("error: some plans are missing, see above; --missing makes them")


if __name__ == "__main__":
    main()
