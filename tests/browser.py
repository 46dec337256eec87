"""The browser that pages are tested in, headless Chromium driven by playwright; without it, tests are skipped."""

import contextlib
import shutil

import pytest

playwright = pytest.importorskip("playwright.sync_api")
NAMES = ("chromium", "chromium-browser", "google-chrome", "chromium-headless-shell")
BROWSER = next(filter(None, map(shutil.which, NAMES)), None)
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update",
         "--disable-sync"]  # fmt: skip

if BROWSER is None:
    pytest.skip(f"no browser: none of {', '.join(NAMES)} is installed", allow_module_level=True)


@contextlib.contextmanager
def running_browser(*flags):
    """A browser without any page."""
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=BROWSER, args=[*FLAGS, *flags])
        yield browser
        browser.close()
