"""What keeps compiled programs cheap: JAX's persistent cache, and one copy of code for all equal blocks of a network.

A program that was compiled once starts without compiling it again. Entries of the cache are loaded and executed: they
are code, and whoever can write them can run anything as the user.
"""

import os
import stat
import sys
from pathlib import Path

import jax

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


def set_up() -> None:
    """`use_cache` and `share_code`: what programs do, and a library leaves to them."""
    use_cache()
    share_code()


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
