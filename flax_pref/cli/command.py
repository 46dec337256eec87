"""The command `flax-pref`: picks the program. Nothing else is imported before the program is known."""

import importlib
import os
import sys
from collections.abc import Sequence

from flax_pref import __version__
from flax_pref.programs import PROGRAMS, called

PLANS = ("plan", "plan-sample")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs `flax-pref PROGRAM ...`.

    Args:
        arguments: those of the command line, with the program first; None: of this process.

    Returns:
        the exit status: 0, 1 after an error, 2 after a wrong call, 130 after an interrupt.
    """
    name, *rest = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if name in ("--help", "-h"):
        print(_help())
        return 0
    if name == "--version":
        print(f"flax-pref {__version__}")
        return 0
    if name not in PROGRAMS:
        import difflib  # slow

        near = difflib.get_close_matches(name, PROGRAMS, n=1)
        meant = f"perhaps you meant {near[0]}" if near else f"expected one of {', '.join(PROGRAMS)}"
        print(f"error: no program {name!r}; {meant}; see flax-pref --help", file=sys.stderr)
        return 2
    from flax_pref.config import run_main

    # As with `python -m`: python:MODULE:FUNCTION is found in the current folder. Last, so that it hides no library.
    if not {"", os.getcwd()} & set(sys.path):
        sys.path.append(os.getcwd())
    program = importlib.import_module(f"flax_pref.cli.{name.replace('-', '_')}")
    with called(name):
        status = run_main(program.main, rest)
    if name in PLANS:
        leave(status)
    return status


def leave(status: int) -> None:
    """Ends a process whose compiler may still be busy, see `planning.plan.laid_out`."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _help() -> str:
    width = max(map(len, PROGRAMS))
    lines = ["usage: flax-pref PROGRAM ...", "", "Preference alignment of Stable Diffusion in JAX.", "", "programs:"]
    lines += [f"  {name:{width}}  {program.about}" for name, program in PROGRAMS.items()]
    lines += ["", "flax-pref PROGRAM --help lists the flags of a program, or the shipped configs that it takes."]
    return "\n".join(lines)
