"""Programs are compiled once, and what was compiled lies where only its user can write."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from flax_pref.compilation import default_folder, leave_default, share_code, use_cache

ROOT = Path(__file__).parents[1]
PROGRAM = """
import sys
import jax, jax.numpy as jnp
from flax_pref.config import run_main

def main(_):
    hits = []
    jax.monitoring.register_event_listener(lambda event, **_: hits.append(event) if "cache_hits" in event else None)

    @jax.jit
    def silent(x):
        return jnp.sin(x) @ x

    @jax.jit
    def telling(x):
        jax.debug.callback(lambda: print("called back"))
        return jnp.cos(x) @ x

    silent(jnp.ones((64, 64))), telling(jnp.ones((64, 64)))
    jax.effects_barrier()
    print(f"{len(hits)} hits")

sys.exit(run_main(main))
"""


def run(caches, **environment):
    names = {name: value for name, value in os.environ.items() if not name.startswith("JAX_COMPILATION_CACHE")}
    names |= {"XDG_CACHE_HOME": str(caches), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", **environment}
    done = subprocess.run([sys.executable, "-c", PROGRAM], cwd=ROOT, env=names, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "called back" in done.stdout
    return done


def entries(folder):
    return sorted(path.name for path in folder.glob("*-cache"))


def test_the_second_start_of_a_program_compiles_at_most_what_calls_back(tmp_path):
    folder = tmp_path / "flax_pref" / "compiled"
    assert run(tmp_path).stdout.endswith("0 hits\n")
    kept = entries(folder)
    assert any("silent" in name for name in kept)
    # Later releases keep what calls back too, and it calls back when it is read.
    assert jax.__version_info__ >= (0, 11) or not any("telling" in name for name in kept)
    assert folder.stat().st_mode & 0o777 == 0o700
    second = run(tmp_path)
    assert second.stdout.endswith(f"{len(kept)} hits\n") and second.stderr == ""
    assert entries(folder) == kept


def test_what_the_user_has_set_wins(tmp_path):
    run(tmp_path / "caches", JAX_COMPILATION_CACHE_DIR=str(tmp_path / "own"))
    assert entries(tmp_path / "own")
    run(tmp_path / "caches", JAX_ENABLE_COMPILATION_CACHE="false")
    assert not (tmp_path / "caches").exists()


@pytest.fixture
def unset(tmp_path, monkeypatch):
    """The default folder, in a process that has no other."""
    names = ("jax_compilation_cache_dir", "jax_compilation_cache_max_size")
    before = {name: getattr(jax.config, name) for name in names}
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    jax.config.update("jax_compilation_cache_dir", None)
    jax.config.update("jax_compilation_cache_max_size", -1)
    yield default_folder()
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.mark.parametrize(
    "danger", ["others may write it", "it belongs to another user", "File exists", "the user has no home folder"]
)
def test_a_folder_that_cannot_be_the_user_s_alone_is_not_used(danger, unset, monkeypatch, capsys):
    unset.parent.mkdir()
    unset.mkdir()
    match danger:
        case "others may write it":
            unset.chmod(0o770)
        case "it belongs to another user":
            monkeypatch.setattr(os, "getuid", lambda: unset.stat().st_uid + 1)
        case "File exists":
            unset.rmdir()
            unset.parent.rmdir()
            unset.parent.write_text("")
        case "the user has no home folder":
            monkeypatch.delenv("XDG_CACHE_HOME")
            monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    use_cache()
    assert jax.config.jax_compilation_cache_dir is None
    told = capsys.readouterr().err
    assert told.startswith("warning: ") and danger in told and told.count("\n") == 1


def test_the_folder_has_a_limit_that_the_user_can_set(unset):
    use_cache()
    assert jax.config.jax_compilation_cache_dir == str(unset)
    assert 2**30 < jax.config.jax_compilation_cache_max_size < 2**35
    jax.config.update("jax_compilation_cache_dir", None)
    jax.config.update("jax_compilation_cache_max_size", 5)
    use_cache()
    assert jax.config.jax_compilation_cache_max_size == 5


def test_several_hosts_share_only_a_folder_that_the_user_has_named(unset, tmp_path):
    use_cache()
    leave_default()
    assert jax.config.jax_compilation_cache_dir is None
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "shared"))
    leave_default()
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "shared")


def test_tpus_share_code_unless_the_user_says_something_else(monkeypatch):
    monkeypatch.delenv("LIBTPU_INIT_ARGS", raising=False)
    share_code()
    share_code()
    assert os.environ["LIBTPU_INIT_ARGS"] == "--xla_tpu_enable_deduplicated_calls=true"
    monkeypatch.setenv("LIBTPU_INIT_ARGS", "--xla_tpu_scoped_vmem_limit_kib=65536")
    share_code()
    assert os.environ["LIBTPU_INIT_ARGS"].split() == [
        "--xla_tpu_scoped_vmem_limit_kib=65536",
        "--xla_tpu_enable_deduplicated_calls=true",
    ]
    monkeypatch.setenv("LIBTPU_INIT_ARGS", "--xla_tpu_enable_deduplicated_calls=false")
    share_code()
    assert os.environ["LIBTPU_INIT_ARGS"] == "--xla_tpu_enable_deduplicated_calls=false"
