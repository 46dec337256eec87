"""Checkpoints of a run: what training resumes from, and proof that it is what was saved.

    settings.json      what the run depends on
    300/state/         the arrays, as Orbax writes them
    300/manifest.json  appears last: where the data stands, names of the arrays, SHA-256 of every file and of itself

Orbax restores a file with a flipped bit without complaint. So a step counts only if its manifest is there and every
file is what the manifest says; a run that was killed, or whose disk lies, resumes from the newest step that is whole.
"""

import errno
import hashlib
import json
import logging
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import absl.logging
import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from flax_pref.config import UserError
from flax_pref.files import difference, remedy, writing

SETTINGS, STATE, MANIFEST = "settings.json", "state", "manifest.json"

_BLOCK = 2**22  # bytes read at a time
_READERS = 8  # files read at a time


class RunCheckpoints:
    """The checkpoints of one run; also a context manager, which ends when the last one is safe.

    All processes of a program call the same methods in the same order. They see the same folder, on a shared disk or in
    a bucket (gs://...); the first process writes the manifests and removes old steps.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        settings: Mapping[str, Any],
        *,
        keep: int = 3,
        keep_every: int | None = None,
    ):
        """Goes on with the folder, or begins it when the first step is saved.

        Args:
            folder: of the checkpoints.
            settings: what the run depends on, values that JSON can hold.
            keep: how many of the newest steps to keep, 1 or more.
            keep_every: keep the steps too that this number divides, forever; None: no others.

        Raises:
            UserError: the folder was begun with other settings, or nobody knows with which.
            ValueError: keep or keep_every is less than 1.
        """
        if keep < 1 or (keep_every is not None and keep_every < 1):
            raise ValueError(f"keep={keep}, keep_every={keep_every}: expected numbers of steps, 1 or more")
        self.folder = _absolute(folder)
        self._keep, self._keep_every = keep, keep_every
        self._check_settings(json.loads(json.dumps(dict(settings))))
        self._orbax = ocp.StandardCheckpointer()
        absl.logging.get_absl_logger().addFilter(_is_no_traceback)
        self._background = ThreadPoolExecutor(1)
        self._saving: tuple[int, Future] | None = None
        self._saved: int | None = None  # the step that this object has saved or restored last
        self._whole: int | None = None  # the step that `latest` has found
        self._damaged: set[int] = set()  # steps that `latest` has passed over

    # ------------------------------------------------------------------------------------------------------------------
    # Saving

    def save(self, step: int, state: Any, data: Mapping[str, Any]) -> None:
        """Begins to save a step; first waits for the one before.

        When this returns, the arrays are copied and may be donated. Files appear in the background. The step that was
        saved or restored last is not saved again; another one that is there is replaced, and later ones are removed
        with those that are not kept: they belong to a course that was left.

        Args:
            step: number of updates made, 0 or more.
            state: pytree of arrays, typed keys among them; none is empty.
            data: position of the data, values that JSON can hold.

        Raises:
            OSError: the step before could not be saved.
        """
        self.wait()
        if step == self._saved:
            return
        leaves = _named(state)
        noted = {"step": step, "data": dict(data), "leaves": _described(leaves)}
        noted = json.loads(json.dumps(noted))  # now, for the caller may change what it has given
        self._whole = None
        self._damaged.discard(step)
        if jax.process_index() == 0:
            if self._unwritten is not None:
                with writing(self.folder / SETTINGS):
                    self.folder.mkdir(parents=True, exist_ok=True)
                    _write_json(self.folder / SETTINGS, self._unwritten)
                self._unwritten = None
            self._remove(step)
        self._orbax.save(self._path(step) / STATE, leaves)
        self._saving = step, self._background.submit(self._finish, step, noted)

    def wait(self) -> None:
        """Returns when the last step is safe.

        Raises:
            OSError: it could not be saved.
        """
        if self._saving is None:
            return
        (step, saving), self._saving = self._saving, None
        try:
            saving.result()
        except (OSError, ValueError, jax.errors.JaxRuntimeError) as error:
            reason = " ".join(str(error).split())
            raise OSError(
                f"{self._path(step)}: this checkpoint could not be written ({reason}); {_remedy(error)} and run the "
                "same command again, which resumes from the checkpoint before"
            ) from error
        self._saved = step

    def _finish(self, step: int, noted: Mapping[str, Any]) -> None:
        """Writes the manifest when all processes have written their arrays, then removes what is not kept."""
        self._orbax.wait_until_finished()
        if jax.process_index() == 0:
            folder = self._path(step)
            files = sorted(
                str((parent / name).relative_to(folder))
                for parent, _, names in (folder / STATE).walk()
                for name in names
            )
            values = {**noted, "files": _measure(folder, files)}
            _write_json(folder / MANIFEST, {**values, "sha256": _digest(values)})
            self._forget(step)

    def _forget(self, newest: int) -> None:
        """Removes the steps that are not kept, and what kills have left behind."""
        steps = _steps(self.folder)
        whole = [n for n in steps if n <= newest and n not in self._damaged and (self._path(n) / MANIFEST).exists()]
        kept = {n for n in whole if self._keep_every is not None and n % self._keep_every == 0}
        for step in set(steps) - kept.union(whole[-self._keep :]):
            self._remove(step)

    def _remove(self, step: int) -> None:
        # The manifest goes first: a kill in between leaves what counts as no checkpoint.
        (self._path(step) / MANIFEST).unlink(missing_ok=True)
        self._path(step).rmtree(missing_ok=True)

    # ------------------------------------------------------------------------------------------------------------------
    # Restoring

    def latest(self) -> int | None:
        """The newest step that is whole, or None; all its files are read.

        For each newer step that is not whole a line is printed that says so.
        """
        self.wait()
        newest = -1
        for step in reversed(_steps(self.folder)) if jax.process_index() == 0 else ():
            damage = _damage(self._path(step))
            if damage is None:
                newest = step
                break
            print(f"{self._path(step)}: not used: {damage}; the checkpoint before is looked for")
            self._damaged.add(step)
        newest = _of_first_process(newest)
        self._whole = None if newest < 0 else newest
        return self._whole

    def restore(self, step: int, like: Any) -> tuple[Any, dict[str, Any]]:
        """What was saved of a step, bit by bit.

        Args:
            step: as a rule what `latest` has found; another one is read twice, to see whether it is whole.
            like: pytree of `jax.ShapeDtypeStruct` with the state's structure, shapes and dtypes, and the shardings
                that it shall have, whatever it was saved with; without a sharding an array comes to the first device
                of this process.

        Returns:
            the state, and the position of the data.

        Raises:
            ValueError: the step is not whole, or is not like that.
        """
        self.wait()
        if step != self._whole:
            damage = _damage(self._path(step)) if jax.process_index() == 0 else None
            if _of_first_process(damage is not None):
                raise ValueError(f"{self._path(step)}: {damage or 'damaged'}; expected a step that is whole")
        noted = _read_manifest(self._path(step))
        leaves = _named(like)
        if differences := _first_differences(noted["leaves"], _described(leaves)):
            raise ValueError(
                f"{self._path(step)}: saved with {differences}; go on with the model, modules and optimizer that the "
                "run began with"
            )
        restored = self._orbax.restore(self._path(step) / STATE, jax.tree.map(_placed, leaves))
        self._saved = step
        return jax.tree.unflatten(jax.tree.structure(like), [restored[name] for name in leaves]), noted["data"]

    # ------------------------------------------------------------------------------------------------------------------
    # The folder

    def _path(self, step: int) -> epath.Path:
        return self.folder / str(step)

    def _check_settings(self, now: dict[str, Any]) -> None:
        """Settings of a run that has saved nothing yet may change: it has only failed to begin.

        The first process checks for all: the hosts have agreed, and paths of inputs may be others on each.
        """
        self._unwritten = None
        if jax.process_index() != 0:
            return
        file = self.folder / SETTINGS
        steps = _steps(self.folder)
        begun = _read_settings(file) if file.exists() else None
        if begun is None and steps:
            raise UserError(f"{file}: missing beside checkpoints; restore it, or choose another --output")
        if begun is not None and begun != now and any((self._path(step) / MANIFEST).exists() for step in steps):
            raise UserError(
                f"{self.folder}: holds checkpoints of a run with {difference(_flat(begun), _flat(now))}: repeat "
                "these settings, or choose another --output and begin again from those weights with --init-from"
            )
        # They are written with the first step: a run that fails to begin leaves nothing behind.
        self._unwritten = now if begun != now else None

    def close(self) -> None:
        """Ends when the last step is safe.

        Raises:
            OSError: it could not be saved.
        """
        try:
            self.wait()
        finally:
            self._background.shutdown()
            self._orbax.close()
            absl.logging.get_absl_logger().removeFilter(_is_no_traceback)

    def __enter__(self) -> "RunCheckpoints":
        return self

    def __exit__(self, *exception) -> None:
        self.close()


def read_part(folder: str | os.PathLike, path: str, like: Any) -> Any:
    """Some of the arrays of another run's newest whole step, whatever its settings.

    Args:
        folder: of its checkpoints.
        path: of the part within what was saved, as `jax.tree_util.keystr` writes it: `['train'].params`.
        like: the part alone, as in `RunCheckpoints.restore`.

    Raises:
        UserError: no step is whole, or the newest has not these arrays.
    """
    folder = _absolute(folder)
    whole = -1
    if jax.process_index() == 0:
        whole = next((step for step in reversed(_steps(folder)) if _damage(folder / str(step)) is None), -1)
    whole = _of_first_process(whole)
    if whole < 0:
        raise UserError(f"{folder}: has no checkpoint that is whole; expected the folder of a run that has saved one")
    saved = _read_manifest(folder / str(whole))["leaves"]
    leaves = {f"{path}{name}": leaf for name, leaf in _named(like).items()}
    asked = _described(leaves)
    own = {name: kind for name, kind in saved.items() if name.startswith(path)}
    if own != asked:
        raise UserError(
            f"{folder / str(whole)}: saved with {_first_differences(own, asked)}; expected the modules, adapters and "
            "model that are trained now"
        )
    placed = jax.tree.map(_placed, leaves)
    options = ocp.args.PyTreeRestore(
        item=placed, restore_args=ocp.checkpoint_utils.construct_restore_args(placed), partial_restore=True
    )
    with ocp.PyTreeCheckpointer() as orbax:
        restored = orbax.restore(folder / str(whole) / STATE, args=options)
    return jax.tree.unflatten(jax.tree.structure(like), [restored[name] for name in leaves])


# ----------------------------------------------------------------------------------------------------------------------
# Arrays and files


def _absolute(folder: str | os.PathLike) -> epath.Path:
    folder = os.fspath(folder)
    return epath.Path(folder if "://" in folder else os.path.abspath(folder))


def _steps(folder: epath.Path) -> list[int]:
    """All steps with a folder, whole or not, in ascending order."""
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdecimal()) if folder.is_dir() else []


def _damage(folder: epath.Path) -> str | None:
    """Why a step is not whole; None: it is."""
    try:
        files = _read_manifest(folder)["files"]
        measured = _measure(folder, list(files))
    except (OSError, ValueError) as error:
        return str(error)
    return next((f"{name} is not what was saved" for name in files if measured[name] != files[name]), None)


def _first_differences(saved: Mapping[str, str], asked: Mapping[str, str]) -> str:
    """Where the arrays of a step are others than those asked for; empty: nowhere."""
    differ = [name for name in {**saved, **asked} if saved.get(name) != asked.get(name)]
    first = ({name: leaves[name] for name in differ[:3] if name in leaves} for leaves in (saved, asked))
    more = f" and {len(differ) - 3} more" if len(differ) > 3 else ""
    return f"{difference(*first)}{more}" if differ else ""


def _named(tree: Any) -> dict[str, Any]:
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree.leaves_with_path(tree)}


def _described(leaves: Mapping[str, Any]) -> dict[str, str]:
    return {name: f"{leaf.dtype} {list(leaf.shape)}" for name, leaf in leaves.items()}


def _placed(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    sharding = leaf.sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _of_first_process(number: int) -> int:
    if jax.process_count() == 1:
        return number
    return int(multihost_utils.broadcast_one_to_all(np.int32(number)))


def _measure(folder: epath.Path, names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Length and SHA-256 of files of a folder."""

    def measure(name: str) -> dict[str, Any]:
        size, digest = 0, hashlib.sha256()
        with (folder / name).open("rb") as stream:
            while block := stream.read(_BLOCK):
                size += len(block)
                digest.update(block)
        return {"bytes": size, "sha256": digest.hexdigest()}

    with ThreadPoolExecutor(_READERS) as readers:
        return dict(zip(names, readers.map(measure, names), strict=True))


def _read_manifest(folder: epath.Path) -> dict[str, Any]:
    """The manifest of a step.

    Raises:
        ValueError: there is none, or it is not what was written.
    """
    try:
        values = json.loads((folder / MANIFEST).read_bytes())
    except FileNotFoundError:
        raise ValueError(f"it has no {MANIFEST}, as if the run was killed while it was saved") from None
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, dict) or values.pop("sha256", None) != _digest(values):
        raise ValueError(f"{MANIFEST} is not what was saved")
    if values["step"] != int(folder.name):
        raise ValueError(f"{MANIFEST} is that of step {values['step']}")
    return values


def _remedy(error: Exception) -> str:
    """What to do about an error of the system, which TensorStore passes on as text."""
    numbers = (number for number in errno.errorcode if os.strerror(number) in str(error))
    number = getattr(error, "errno", None) or next(numbers, None)
    return remedy(OSError(number, ""))


def _is_no_traceback(record: logging.LogRecord) -> bool:
    """Orbax logs an error of its threads with pages of tracebacks before it raises it; `wait` tells it in one line."""
    return record.exc_info is None or "orbax" not in record.pathname


def _read_settings(file: epath.Path) -> dict[str, Any]:
    try:
        settings = json.loads(file.read_bytes())
    except ValueError:
        settings = None
    if not isinstance(settings, dict):
        raise UserError(f"{file}: damaged, not a JSON object; restore it, or choose another --output")
    return settings


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Settings within settings by names with dots, as flags have them."""
    flat = {}
    for name, value in settings.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat


def _digest(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()


def _write_json(file: epath.Path, values: Mapping[str, Any]) -> None:
    unfinished = file.with_name(f".{file.name}")
    try:
        unfinished.write_text(json.dumps(values, indent=2) + "\n")
    except OSError:
        unfinished.unlink(missing_ok=True)
        raise
    unfinished.replace(file)
