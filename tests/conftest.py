"""Programs are compiled quickly rather than well, and those of several tests once."""

import os
import shutil
import tempfile
from pathlib import Path


def pytest_configure(config):
    if "PYTEST_XDIST_WORKER" in os.environ:  # workers, and processes that tests start, find these settings there
        return
    # Most of the time of these tests goes into compiling small networks. Without LLVM's optimisations and XLA's own
    # code for fusions that takes a third of it; what is compiled is up to twice as slow, which is little here.
    # In one part each: the other core has tests of its own.
    quick = (
        "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
        " --xla_cpu_parallel_codegen_split_count=1"
    )
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {quick}"
    folder = tempfile.mkdtemp(prefix="compiled-")
    config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))
    os.environ["JAX_COMPILATION_CACHE_DIR"] = folder
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.3"
    # Where the size is limited, JAX locks the folder: no process reads what another has half written.
    os.environ["JAX_COMPILATION_CACHE_MAX_SIZE"] = str(4 * 2**30)


def pytest_collection_modifyitems(items):
    # Tests of whole programs are the longest: begun first, they leave no worker waiting for another at the end.
    items.sort(key=lambda item: item.path.parent != Path(__file__).parent)
