"""Programs are compiled quickly rather than well, and those of several tests once; shapes of signatures are checked."""

import gc
import importlib.util
import os
import shutil
import sys
import tempfile
from pathlib import Path

import pytest
from jaxtyping import install_import_hook

# What the tests compare with. Of the Pythons that are tested, only 3.11 has all of them (see pyproject.toml).
REFERENCES = ("torch", "diffusers", "peft")
MISSING = [name for name in REFERENCES if importlib.util.find_spec(name) is None]

# Where parts of the library meet: the shapes of what these modules take and return are checked at every call.
SEAMS = (
    "flax_pref.diffusion.conditioning",
    "flax_pref.diffusion.prompt_syntax",
    "flax_pref.diffusion.latents",
    "flax_pref.diffusion.sampler",
    "flax_pref.methods",
    "flax_pref.models.bank",
    "flax_pref.models.clip",
    "flax_pref.rewards.aesthetic",
    "flax_pref.rewards.appearance",
    "flax_pref.rewards.clip",
    "flax_pref.rewards.decoded",
    "flax_pref.rewards.elsewhere",
    "flax_pref.rewards.features",
    "flax_pref.rewards.image_reward",
    "flax_pref.rewards.mps",
    "flax_pref.rewards.jpeg",
    "flax_pref.rewards.judge",
    "flax_pref.rewards.remote",
    "flax_pref.rewards.reward",
)
install_import_hook(SEAMS, "shape_checks.checked")


def pytest_configure(config):
    if "PYTEST_XDIST_WORKER" in os.environ:  # workers, and processes that tests start, find these settings there
        return
    # Most of the time of these tests goes into compiling small networks. Without LLVM's optimisations and XLA's own
    # code for fusions that takes a third of it; what is compiled is up to twice as slow, which is little here.
    # In one part each: the other core has tests of its own.
    quick = "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"
    if sys.version_info < (3, 12):  # JAX 0.12 has no such flag, and ends at flags that it does not know
        quick += " --xla_cpu_use_fusion_emitters=false"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {quick}"
    folder = tempfile.mkdtemp(prefix="compiled-")
    config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))
    os.environ["JAX_COMPILATION_CACHE_DIR"] = folder
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.3"
    # Where the size is limited, JAX locks the folder: no process reads what another has half written.
    os.environ["JAX_COMPILATION_CACHE_MAX_SIZE"] = str(4 * 2**30)


class ComparingModule(pytest.Module):
    """A test file that is skipped, by name, where a library that it compares with is not installed."""

    def collect(self):
        try:
            return super().collect()
        except self.CollectError as error:
            cause = error.__cause__
            if isinstance(cause, ModuleNotFoundError) and cause.name in MISSING:
                pytest.skip(f"{self.nodeid}: {cause.name} is not installed", allow_module_level=True)
            raise


def pytest_pycollect_makemodule(module_path, parent):
    return ComparingModule.from_parent(parent, path=module_path)


def pytest_collection_finish():
    # Looking for garbage takes a twentieth of the time at Python's settings: libraries and tests, which stay, are
    # left out, and traces, of which each makes hundreds of thousands of objects, are looked through less often.
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


def pytest_report_header():
    if MISSING:
        return f"not installed: {', '.join(MISSING)}; test files that need them are skipped, and listed at the end"
    return None


def pytest_collection_modifyitems(items):
    # Tests of whole programs are the longest: begun first, they leave no worker waiting for another at the end.
    items.sort(key=lambda item: item.path.parent != Path(__file__).parent)
