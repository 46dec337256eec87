"""What keeps compiled programs cheap: JAX's persistent cache, and one copy of code for all equal blocks of a network.
And what users see while they wait for the compiler.

A program that was compiled once starts without compiling it again. Entries of the cache are loaded and executed: they
are code, and whoever can write them can run anything as the user.
"""

import os
import re
import stat
import sys
import threading
import time
from pathlib import Path

import jax

from flax_pref.waits import PATIENCE, clock, say

MAX_BYTES = 8 * 2**30
"""Size of the folder, beyond which the entries that were used least recently go."""
SHARED_CODE = "xla_tpu_enable_deduplicated_calls"


def default_folder() -> Path:
    """`flax_pref/compiled` in the user's folder for caches: $XDG_CACHE_HOME, or else ~/.cache."""
    caches = Path(os.environ.get("XDG_CACHE_HOME", ""))
    # Relative paths are to be ignored, says the XDG Base Directory Specification.
    return (caches if caches.is_absolute() else Path(os.path.expanduser("~/.cache"))) / "flax_pref" / "compiled"


def use_cache() -> None:
    """Keeps what is compiled from now on in the default folder, unless the user has named one, or wants none.

    That is, with JAX's own JAX_COMPILATION_CACHE_DIR, or JAX_ENABLE_COMPILATION_CACHE=false. Where the folder cannot be
    used, or not safely, nothing is kept, and one line on stderr says why.

    Example:
        >>> fp.use_cache()
    """
    settings = jax.config.values
    if not settings["jax_enable_compilation_cache"] or settings["jax_compilation_cache_dir"] is not None:
        return
    folder = default_folder()
    try:
        _make_private(folder)
    except OSError as error:
        print(
            f"warning: {folder}: compiled programs are not kept ({error.strerror}); set JAX_COMPILATION_CACHE_DIR to "
            "another folder, or JAX_ENABLE_COMPILATION_CACHE=false",
            file=sys.stderr,
        )
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    if settings["jax_compilation_cache_max_size"] == -1:  # with a limit JAX also locks the folder while it writes
        jax.config.update("jax_compilation_cache_max_size", MAX_BYTES)


def share_code() -> None:
    """Has the compiler of TPUs call the code of equal instructions instead of repeating it for each.

    A program's code lies in a chip's main memory. Of 64 transformer blocks of SDXL in a row it takes 376 MB, and so
    15 MB, compiled in half the time (libtpu 0.0.42, v5e). Without effect on other devices. It is an option of libtpu,
    which reads LIBTPU_INIT_ARGS when JAX first asks for a device; what the user says there stays.
    """
    given = os.environ.get("LIBTPU_INIT_ARGS", "")
    if SHARED_CODE not in given:
        os.environ["LIBTPU_INIT_ARGS"] = f"{given} --{SHARED_CODE}=true".strip()


TRACING, LOWERING, COMPILING = (
    f"/jax/core/compile/{name}_duration" for name in ("jaxpr_trace", "jaxpr_to_mlir_module", "backend_compile")
)
FOUND = "/jax/compilation_cache/cache_hits"


class _Compilations:
    """Says what is compiled, where that takes long, by what JAX tells of its work.

    A function is traced and lowered in one thread, and then compiled or found in the cache, perhaps in another.
    """

    def __init__(self):
        self._own = threading.local()
        self._before: dict[str, float] = {}  # seconds until a function was lowered

    def begun(self, event: str, value: float | int, **about: str | int) -> None:
        """JAX begins a part of the work."""
        if event == COMPILING:
            own, function = self._own, str(about.get("fun_name", ""))
            own.name, own.began, own.found = _noun(function), time.monotonic(), False
            own.then = self._next_start(function)
            own.clock = clock(f"compiling {own.name}", own.then)
            own.clock.__enter__()

    def happened(self, event: str, **about: str | int) -> None:
        """The cache has the function."""
        if event == FOUND:
            self._own.found = True

    def done(self, event: str, duration_secs: float, **about: str | int) -> None:
        """JAX has done a part of the work, or failed to."""
        own = self._own
        if event == TRACING:
            own.traced = duration_secs
        elif event == LOWERING:
            self._before[str(about.get("fun_name", ""))] = getattr(own, "traced", 0.0) + duration_secs
        elif event == COMPILING and getattr(own, "clock", None) is not None:
            own.clock.__exit__(None, None, None)
            own.clock = None
            if (seconds := time.monotonic() - own.began) >= PATIENCE:
                compiled = f"compiled {own.name} in {seconds:.0f} s{own.then}"
                say(f"{own.name} came from the cache in {seconds:.0f} s" if own.found else compiled)

    def _next_start(self, function: str) -> str:
        """The next start traces and lowers again, and reads the rest from the cache, if there is one."""
        settings, before = jax.config.values, self._before.get(function)
        if before is None or not (settings["jax_enable_compilation_cache"] and settings["jax_compilation_cache_dir"]):
            return ""
        return f"; next start about {max(1, round(before))} s and reading it from the cache"


def _noun(function: str) -> str:
    """As `the training step`, of `jit(training_step)`."""
    name = re.sub(r"^\w+\((.*)\)$", r"\1", function).strip("_")
    return f"the {name.replace('_', ' ')}" if name.isidentifier() else "a function"


_watched = False


def watch_compilation() -> None:
    """Has whatever JAX compiles from now on say so on stderr, where it takes longer than a few seconds."""
    global _watched
    if not _watched:
        compilations = _Compilations()
        jax.monitoring.register_scalar_listener(compilations.begun)
        jax.monitoring.register_event_listener(compilations.happened)
        jax.monitoring.register_event_duration_secs_listener(compilations.done)
        _watched = True


def set_up() -> None:
    """`use_cache`, `share_code` and `watch_compilation`: what programs do, and a library leaves to them."""
    use_cache()
    share_code()
    watch_compilation()


def _make_private(folder: Path) -> None:
    """Makes a folder that only its user can write.

    Raises:
        OSError: it cannot be made, or is another user's, or others may write it.
    """
    if not folder.is_absolute():
        raise FileNotFoundError(0, "the user has no home folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.mkdir(mode=stat.S_IRWXU, exist_ok=True)
    found = folder.stat()
    if found.st_uid != os.getuid():
        raise PermissionError(0, "it belongs to another user, whose code would run here")
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise PermissionError(0, "others may write it, and their code would run here: empty it, then chmod go-w")


def leave_default() -> None:
    """Undoes `use_cache` where the folder is the default one.

    For programs of several hosts, of which only the first writes entries. Hosts that cannot read them compile what the
    first has not to, and XLA's tuning for GPUs, which hosts share out, may wait for it.
    """
    if jax.config.values["jax_compilation_cache_dir"] == str(default_folder()):
        jax.config.update("jax_compilation_cache_dir", None)
