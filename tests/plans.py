"""Plans of what this project ships, each made by its command.

    python -m tests.plans            every config on three slices, into docs/performance.md
    python -m tests.plans --record   those that tests/test_plans.py checks, into tests/plans.json

Needs libtpu (`make plan` installs it). A plan of Stable Diffusion XL takes some minutes on two cores.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flax_pref.files import replacing, write_json
from flax_pref.parallel.memory import size_text
from flax_pref.parallel.planning import in_process

RECORDED = Path(__file__).with_name("plans.json")
PAGE = Path("docs/performance.md")
BEGIN, END = "<!-- plans: begin -->", "<!-- plans: end -->"

SD15, SDXL = "stable-diffusion-v1-5/stable-diffusion-v1-5", "stabilityai/stable-diffusion-xl-base-1.0"
# What is checked: full sizes, on the smallest slice.
CHECKED = {
    "SD1.5 DPO step": ("train.plan", "configs/sd15/dpo.py", "--mesh", "data=-1,fsdp=4", "--topology", "v5e:2x2"),
    "SD1.5 cPGD sampler": (
        *("sample.plan", "--model", SD15, "--rule", "cpgd", "--w", "4", "--steps", "2", "--solver", "ddim"),
        *("--only", "sampler", "--topology", "v5e:2x2"),
    ),
}
SLICES = ("v5e:16x16", "v6e:16x16", "v5p:4x4x4")


def shipped() -> dict[str, tuple[str, ...]]:
    """Commands without their slice, by name: every config that is not for the demo, and cPGD samplers."""
    configs = {str(file): ("train.plan", str(file)) for file in sorted(Path("configs").glob("sd*/*.py"))}
    samplers = {
        f"cPGD, {name}, {weights}": (
            *("sample.plan", "--model", model, "--rule", "cpgd", "--w", "4", "--steps", "25"),
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
    """What the table says of a plan."""
    try:
        told = planned(command)
    except ValueError as error:
        return str(error).replace("|", "/")
    if not told["fits"]:
        return f"does not fit by {size_text(told['excess_bytes'])}"
    rate, share = told["per_second_per_chip"], told["share_of_peak"]
    return f"{rate:.3g} {told['unit']}s/s, {share:.0%}, {size_text(-told['excess_bytes'])} left"


def table(slices: Sequence[str], chosen: str) -> str:
    """In Markdown: a row for each command whose name has `chosen` in it, a column for each slice."""
    rows = [["", *slices], ["---"] * (1 + len(slices))]
    for name, command in shipped().items():
        if chosen in name:
            rows.append([f"`{name}`"])
            for slice in slices:
                print(f"planning {name} on {slice}", file=sys.stderr, flush=True)
                rows[-1].append(cell([*command, "--topology", slice]))
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def main() -> None:
    """Writes the table, or the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", action="store_true")
    parser.add_argument("--only", default="", help="part of the names of what is planned, e.g. configs/sd15")
    parser.add_argument("--slices", nargs="+", default=SLICES)
    flags = parser.parse_args()
    if flags.record:
        write_json(RECORDED, {name: planned(command) for name, command in CHECKED.items()})
        return
    own = table(flags.slices, flags.only)
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    after = rest.partition(END)[2]
    with replacing(PAGE) as unfinished:
        unfinished.write_text(f"{before}{BEGIN}\n\n{own}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
