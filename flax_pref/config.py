"""Configs and the edge of a program: what users type, and what they see when it is wrong.

A config is a Python file with one name, `config`, an instance of a typed dataclass; it is executed. Flags change its
fields: `python -m train.base configs/demo/base.py --diffusion.steps 100`. Shipped configs have names: `demo/base` is
`configs/demo/base.py`, from any folder. Every mistake of a user ends in one line on stderr and a non-zero exit.
"""

import ast
import contextlib
import dataclasses
import difflib
import io
import json
import math
import os
import pkgutil
import re
import runpy
import sys
import traceback
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any, NoReturn, TypeVar, overload
from urllib.parse import urlsplit

import tyro

from flax_pref.programs import PROGRAMS, by_name, own_command

C = TypeVar("C")

# A wheel has these folders inside the package, a clone beside it: the shipped configs, and code for other programs.
_PACKAGE = Path(__file__).parent
CONFIGS, INTEGRATIONS = (
    _PACKAGE / name if (_PACKAGE / name).is_dir() else _PACKAGE.parent / name for name in ("configs", "integrations")
)


class UserError(Exception):
    """Something that the user can put right; its message says what is wrong, where, and what to do."""


@overload
def load_config(arguments: Sequence[str], kind: type[C], /, *, default: str | None = None) -> C: ...
@overload
def load_config(arguments: Sequence[str], *kinds: str, default: str | None = None) -> Any: ...
def load_config(arguments, *kinds, default=None):
    """Reads the config file that `arguments` begin with and applies the flags that follow it.

    Args:
        arguments: `["configs/demo/base.py", "--seed", "1"]`, or with the name of a shipped config, `demo/base`.
        kinds: dataclasses, of one of which the file's `config` must be an instance; or their names, `MODULE:CLASS`,
            which are imported only when a config is read.
        default: name of the config when there is none among the arguments; None: one is required.

    Raises:
        SystemExit: after one line on stderr, with status 2; with status 0 after `--help`, which without a config file
            shows how to call the program and which configs there are.
    """
    program = own_command()
    if not arguments or arguments[0].startswith("-"):
        config = "CONFIG" if by_name() else "CONFIG.py"
        usage = f"usage: {program} {config if default is None else f'[{config}]'} [--FIELD VALUE ...]"
        if {"--help", "-h"} & set(arguments):
            print(_overview(usage, f"{program} {config}", kinds, default))
            raise SystemExit(0)
        if default is None:
            _refuse(f"no config file; {usage}; {program} --help lists the configs")
        arguments = [default, *arguments]
    name, *flags = arguments
    config = _execute(_find(name, kinds))
    kinds = tuple(_resolved(kind) for kind in kinds)
    if not isinstance(config, kinds):
        needed = " | ".join(kind.__name__ for kind in kinds)
        _refuse(f"{name}: config is a {type(config).__name__}, but {program} needs a {needed}")
    return _parse(type(config), flags, f"{program} {name}", default=config, config=(tyro.conf.AvoidSubcommands,))


def shipped_config(name: str) -> Any:
    """The config of this name, such as demo/demo, for configs that vary another one."""
    return _execute(CONFIGS / f"{name}.py")


def shipped(path: str | os.PathLike) -> str | os.PathLike:
    """A path of a shipped file, `configs/animals.txt`, from any folder; other paths, and those that are here, as is."""
    name = os.fspath(path)
    if name.startswith("configs/") and not Path(name).exists() and (CONFIGS.parent / name).exists():
        return CONFIGS.parent / name
    return path


def _resolved(kind: type | str) -> type:
    return pkgutil.resolve_name(kind) if isinstance(kind, str) else kind


def _find(name: str, kinds: Sequence[type | str]) -> Path:
    """A config file: the path, or a shipped config by its name."""
    file, named = Path(name), CONFIGS / f"{name}.py"
    if file.is_file() or file.suffix == ".py":
        return Path(shipped(file))
    if named.is_file():
        return named
    names = [_name(file) for file in _shipped(kinds)]
    near = difflib.get_close_matches(name, names, n=1)
    there = f"perhaps you meant {near[0]}" if near else f"shipped configs: {', '.join(names) or 'none'}"
    _refuse(f"{name}: no such config file, and no config of this name; {there}")


def _name(file: Path) -> str:
    """The name of a shipped config."""
    return file.relative_to(CONFIGS).with_suffix("").as_posix()


def _overview(usage: str, call: str, kinds: Sequence[type | str], default: str | None) -> str:
    """How to call a program, and the configs of this project that it reads."""
    about = {program.config: program.about for program in PROGRAMS.values()}
    lines = [usage]
    if len(kinds) == 1:
        (kind,) = kinds
        lines += ["", about[kind] if isinstance(kind, str) else (kind.__doc__ or "").strip().partition("\n")[0]]
    titles, here = _shipped(kinds), Path.cwd()
    if by_name():
        shown = {_name(file): title for file, title in titles.items()}
    else:
        shown = {
            str(file.relative_to(here) if file.is_relative_to(here) else file): title for file, title in titles.items()
        }
    width = max(map(len, shown), default=0)
    lines += [
        "",
        "configs:" if shown else f"There are no configs of this program in {CONFIGS}; see those of its repository.",
    ]
    lines += [f"  {file:{width}}  {title}" for file, title in shown.items()]
    lines += [] if default is None else ["", f"Without a config: {default}."]
    lines += ["", f"{call} --help lists every field, what it does and its value in that config."]
    return "\n".join(lines)


def _shipped(kinds: Sequence[type | str]) -> dict[Path, str]:
    """The shipped configs of these kinds, with the first lines of their docstrings."""
    titles = {file: _title(file, kinds) for file in sorted(CONFIGS.glob("*/*.py"))}
    return {file: title for file, title in titles.items() if title is not None}


def _title(file: Path, kinds: Sequence[type | str]) -> str | None:
    """The first line of a config's docstring; None: it is of another kind.

    The docstring names the program that reads the config. Only without it, or where a kind is a class that may be any,
    the config is executed, which takes seconds: it imports what it configures.
    """
    with contextlib.suppress(SystemExit, SyntaxError), contextlib.redirect_stderr(io.StringIO()):
        doc = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
        named = re.search(r"python -m ([\w.]+)", doc)
        known = {program.module: program.config for program in PROGRAMS.values()}
        if named and named[1] in known and all(isinstance(kind, str) for kind in kinds):
            fits = known[named[1]] in kinds
        else:
            fits = isinstance(_execute(file), tuple(_resolved(kind) for kind in kinds))
        if fits:
            return doc.partition("\n")[0]
    return None


def parse_flags(arguments: Sequence[str], kind: Any) -> Any:
    """Reads the flags of a program that takes no config file.

    Args:
        arguments: `["--seed", "1"]`.
        kind: dataclass of the flags, or a union of such with a name each, see `tyro.extras`.

    Raises:
        SystemExit: after one line on stderr, with status 2; with status 0 after `--help`.
    """
    return _parse(kind, arguments, own_command())


def _parse(kind: Any, flags: Sequence[str], program: str, **options) -> Any:
    messages = io.StringIO()
    try:
        with contextlib.redirect_stderr(messages):
            config = tyro.cli(kind, args=flags, prog=program, **options)
    except SystemExit as exit:
        if exit.code:
            _refuse(f"{_condense(messages.getvalue())}; see {program} --help")
        raise
    for name, value in _numbers(config):
        if not math.isfinite(value):
            _refuse(f"--{name.replace('_', '-')} {value}: expected a finite number; see {program} --help")
    return config


def _numbers(value: Any, name: str = "") -> Iterator[tuple[str, float]]:
    """All numbers with a fraction in a config, with the names of their flags."""
    if isinstance(value, float):
        yield name, value
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from _numbers(getattr(value, field.name), f"{name}.{field.name}" if name else field.name)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _numbers(item, name)


def _refuse(message: str) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def _execute(file: Path) -> Any:
    """The `config` of a config file."""
    if not file.is_file():
        beside = sorted(path.name for path in file.parent.glob("*.py")) if file.parent.is_dir() else []
        there = f"{file.parent} has {', '.join(beside)}" if beside else f"there are no config files in {file.parent}"
        _refuse(f"{file}: no such config file; {there}")
    try:
        names = runpy.run_path(str(file))
    except Exception as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(file)]
        lines += [error.lineno] if isinstance(error, SyntaxError) else []
        _refuse(f"{file}:{lines[-1] if lines else 1}: {type(error).__name__}: {_one_line(error)}")
    if "config" not in names:
        _refuse(f"{file}: defines no name `config`; expected config = ...Config(...)")
    return names["config"]


def _condense(message: str) -> str:
    """What a message in a box says, and the suggestion that follows it, on one line.

    tyro draws the box with the title first, and rules of dashes (or, where the terminal has them, lines) between parts.
    """
    title, *parts = re.split(r"[─-]{8,}", re.sub("[╭╮╰╯│]", " ", message))
    parts = [re.sub(r"^Error parsing \w+: ", "", " ".join(part.split())) for part in parts]
    suggestion = re.search(r"Perhaps you meant:? *(--\S+)", " ".join(parts[1:]))
    said = re.sub(r"Expected one of \((.+)\)", _choices, parts[0] if parts else title).rstrip(".")
    return said + (f"; perhaps you meant {suggestion[1]}" if suggestion else "")


def _choices(message: re.Match) -> str:
    """The choices of a flag, which tyro lists in another order each time; none is chosen by leaving the flag out."""
    names = set(re.findall("'([^']*)'", message[1])) - {"None"}
    return f"Expected one of {', '.join(sorted(names))}"


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


def run_main(main: Callable[[list[str]], None], arguments: list[str] | None = None) -> int:
    """Runs a program; `sys.exit(run_main(main))`.

    Mistakes of the user (UserError, ValueError, files that are missing or cannot be written) and losses that are not
    finite become one line on stderr and status 1, an interrupt status 130. A wrong call has status 2, see
    `load_config`. Anything else is a defect of this project and keeps its traceback. How JAX compiles: see
    `compilation`; programs that import JAX when they know their flags call `compilation.set_up` then.

    Args:
        main: the program.
        arguments: for it; None: those of the process.

    Returns:
        the exit status.
    """
    if "jax" in sys.modules:  # not all programs compute
        from flax_pref.compilation import set_up

        set_up()
    try:
        main(sys.argv[1:] if arguments is None else arguments)
    except (UserError, ValueError, OSError, FloatingPointError) as error:
        print(f"error: {_one_line(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


def check_field(config: Any, field: str, holds: bool, expected: str) -> None:
    """Raises a ValueError that names a field, its value and what was expected, unless the condition holds."""
    if not holds:
        raise ValueError(f"{type(config).__name__}: {field} is {getattr(config, field)!r}; expected {expected}")


def check_positive(config: Any, *fields: str) -> None:
    """Raises a ValueError that names the first of these fields whose number is not above zero and finite."""
    for field in fields:
        check_field(config, field, 0 < getattr(config, field) < math.inf, "a positive number")


def check_share(config: Any, *fields: str) -> None:
    """Raises a ValueError that names the first of these fields whose number is not between zero and one."""
    for field in fields:
        check_field(config, field, 0 <= getattr(config, field) <= 1, "0 to 1")


def check_least(config: Any, least: float = 1, /, *fields: str) -> None:
    """Raises a ValueError that names the first of these fields whose number is smaller; None is no number."""
    for field in fields:
        value = getattr(config, field)
        if value is not None and not value >= least:
            raise ValueError(f"{type(config).__name__}: {field} is {value}; expected at least {least}")


def check_seed(seed: int, name: str = "seed") -> None:
    """Raises a ValueError unless it is one that generators of random numbers take."""
    if not 0 <= seed < 2**32:
        raise ValueError(f"{name} is {seed}; expected 0 to 2^32 - 1")


def check_file_systems(*paths: str | None) -> None:
    """Checks that the packages are installed that buckets need.

    Raises:
        UserError: one is not; names the path and the package.
    """
    from etils import epath  # slow to import, and --help has no use for it

    for path in filter(None, paths):
        try:
            epath.Path(path).exists()
        except ImportError as error:
            raise UserError(f"{path}: {error}") from error


def check_output_folder(folder: Path) -> Path:
    """Creates a folder and proves that files can be written into it.

    Raises:
        UserError: they cannot, or the folder is in a bucket; names the folder and the reason.
    """
    if match := re.match(r"([a-z][a-z0-9]*):/+", str(folder)):  # of two slashes Path has left one
        raise UserError(
            f"{match[1]}://{str(folder)[match.end() :]}: this program writes to folders only; mount the bucket (those "
            "of Google with gcsfuse) and give the folder in there with --output"
        )
    probe = folder / f".{uuid.uuid4().hex}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise UserError(
            f"{folder}: cannot write into this folder ({error.strerror}); choose another with --output"
        ) from error
    return folder


def dump_config(fields: Mapping[str, Any], file: Path) -> None:
    """Writes the fields of a config as JSON, the record of what a run did."""
    file.write_text(json.dumps(fields, indent=2, default=str) + "\n", encoding="utf-8")


def public(value: Any) -> Any:
    """A setting as others may read it: without the folders of this machine, and without what URLs say to whom."""
    if isinstance(value, dict):
        return {name: public(item) for name, item in value.items()}
    if isinstance(value, list):
        return [public(item) for item in value]
    if not isinstance(value, str):
        return value
    if re.match(r"https?://", value):
        parts = urlsplit(value)
        return f"{parts.scheme}://{parts.hostname}{'' if parts.port is None else f':{parts.port}'}{parts.path}"
    return PurePath(value).name if value.startswith(("/", "~", "./", "../")) else value
