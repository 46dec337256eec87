"""What programs that plan have in common: a process for each plan, and tables that compare several."""

import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from flax_pref.config import UserError
from flax_pref.files import read_json, write_json
from flax_pref.parallel.memory import aligned, size_text
from flax_pref.planning.plan import ESTIMATE, Job, figures, plan, rendered
from flax_pref.planning.plan_flags import PlanFlags
from flax_pref.planning.topologies import Topology, topology
from flax_pref.programs import command as command_of


def show(
    flags: PlanFlags,
    program: str,
    arguments: Sequence[str],
    jobs_of: Callable[[Topology], tuple[Mesh, Sequence[Job]]],
) -> None:
    """Prints the plan of each of a program's jobs, and writes the figures.

    Raises:
        UserError, ValueError: the slice or the jobs cannot be.
    """
    there = topology(flags.topology)
    mesh, jobs = jobs_of(there)
    chosen = [job for job in jobs if job.name.startswith(flags.only)]
    if not chosen:
        raise UserError(
            f"--only {flags.only}: no program is called so; there are {', '.join(job.name for job in jobs)}"
        )
    if len(chosen) == 1:
        one = plan(chosen[0], there, mesh, flags.effort)
        print(rendered(one), end="\n\n", flush=True)
        plans = [figures(one)]
    else:  # each in a process of its own, as the compiler may still be busy with one when its plan is there
        plans = []
        for job in chosen:
            told, error = in_process(program, [*arguments, "--only", job.name], output=None)
            if told is None:
                raise UserError(error)
            plans += told["plans"]
    if flags.json is not None:
        write_json(flags.json, {"plans": plans, "summary": summary(plans)})


def summary(plans: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What decides between meshes, of the `figures` of programs; those of the last one's unit run one after another."""
    first, worst = plans[-1], max(plans, key=lambda one: one["excess_bytes"])
    plans = [one for one in plans if one["unit"] == first["unit"]]
    told = {name: first[name] for name in ("topology", "mesh", "effort", "unit", "work")}
    told |= {name: worst[name] for name in ("fits", "excess_bytes")}
    if any("seconds" not in one for one in plans):
        return told
    computing, flops = (sum(one[name] for one in plans) for name in ("seconds", "flops"))
    seconds = computing + sum(one["link_seconds"] for one in plans)
    return told | {
        "seconds": seconds,
        "copies": sum(one["copies"] for one in plans),
        "per_second_per_chip": first["work"] / first["chips"] / seconds,
        "share_of_peak": flops / computing / first["peak"],
    }


def compare(program: str, arguments: Sequence[str], candidates: Iterable[Sequence[str]]) -> str:
    """A table of a program's plans with other flags, the fastest that fit first.

    Args:
        program: "plan" or "plan-sample".
        arguments: of all.
        candidates: flags of each.
    """
    rows = []
    for flags in candidates:
        print(f"planning {' '.join(flags)}", file=sys.stderr, flush=True)
        told, error = in_process(program, [*(a for a in arguments if a != "--compare"), *flags])
        rows.append((flags, told and told["summary"], error))
    return compared(rows)


def in_process(
    program: str, arguments: Sequence[str], output: int | None = subprocess.DEVNULL
) -> tuple[dict[str, Any] | None, str]:
    """What a plan made in a process of its own writes, or None and the one line that says why there is nothing.

    Args:
        program: "plan" or "plan-sample".
        arguments: for it.
        output: where its stdout goes, as `subprocess` takes it.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "plan.json"
        command = [sys.executable, "-m", "flax_pref.cli", program, *arguments, "--json", str(file)]
        done = subprocess.run(command, stdout=output, stderr=subprocess.PIPE, text=True)
        if done.returncode < 0:
            killed = "was killed; the compiler may have needed more memory than there is"
            return None, f"{command_of(program)} {killed} (signal {-done.returncode})"
        if done.returncode or not file.exists():
            last = (done.stderr.strip().splitlines() or [f"ended with status {done.returncode}"])[-1]
            return None, last.removeprefix("error: ")
        return read_json(file, expected="a plan"), ""


def compared(rows: Sequence[tuple[Sequence[str], dict[str, Any] | None, str]]) -> str:
    """The table; see `compare`."""
    planned = [(flags, told) for flags, told, _ in rows if told is not None]
    fast = sorted((one for one in planned if one[1]["fits"]), key=lambda one: -one[1].get("per_second_per_chip", 0))
    large = sorted((one for one in planned if not one[1]["fits"]), key=lambda one: one[1]["excess_bytes"])
    unit = planned[0][1]["unit"] if planned else "pair"
    cells: list[Sequence[str]] = [("", f"{unit}s/s per chip", "seconds", "share of peak", "left of a chip's memory")]
    for flags, told in fast:
        kinds = (("per_second_per_chip", ".4g"), ("seconds", ".4g"), ("share_of_peak", ".1%"))
        figures = [f"{told[n]:{kind}}" for n, kind in kinds]
        cells.append([" ".join(flags), *figures, size_text(-told["excess_bytes"])])
    for flags, told in large:
        cells.append([" ".join(flags), "", "", "", f"does not fit by {size_text(told['excess_bytes'])}"])
    errors = [f"{' '.join(flags)}: {error}" for flags, told, error in rows if told is None]
    estimate = f"not measured: {ESTIMATE[planned[0][1]['effort']]}" if planned else ""
    return "\n".join([aligned(cells), *errors, estimate])
