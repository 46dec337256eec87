"""Programs that several tests compile are compiled once, and kept for as long as the tests run."""

import os
import shutil
import tempfile
from pathlib import Path


def pytest_configure(config):
    if "PYTEST_XDIST_WORKER" in os.environ:  # workers, and processes that tests start, find these settings there
        return
    folder = tempfile.mkdtemp(prefix="compiled-")
    config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))
    os.environ["JAX_COMPILATION_CACHE_DIR"] = folder
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.3"
    # Where the size is limited, JAX locks the folder: no process reads what another has half written.
    os.environ["JAX_COMPILATION_CACHE_MAX_SIZE"] = str(4 * 2**30)


def pytest_collection_modifyitems(items):
    # Tests of whole programs are the longest: begun first, they leave no worker waiting for another at the end.
    items.sort(key=lambda item: item.path.parent != Path(__file__).parent)
