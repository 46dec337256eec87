"""The page of `flax-pref app` as people use it: a server in its own process, and headless Chromium, both offline."""

import io
import os
import re
import signal
import socket
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
from app_modules import save_modules
from browser import playwright, running_browser
from PIL import Image

from flax_pref.checkpoints.diffusers import load_pipeline
from flax_pref.images.image_files import read_metadata

pytest.importorskip("gradio")
pytestmark = pytest.mark.program
ROOT = Path(__file__).parents[2]
SECONDS = 300  # for what compiles; an impatient test tells less
OFFLINE = "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"

# Every Python that the server starts runs this first: whoever it calls, it gets no answer and is written down.
NO_NETWORK = """
import ipaddress, os, socket

connect = socket.socket.connect

def watched(self, address):
    if self.family != socket.AF_UNIX and not ipaddress.ip_address(address[0]).is_loopback:
        with open(os.environ["CALLED"], "a") as file:
            print(address, file=file)
        raise OSError("no network")
    return connect(self, address)

def lookup(host, *arguments, find=socket.getaddrinfo, **options):
    if host not in (None, "", "127.0.0.1", "localhost", "::1", b"127.0.0.1", b"localhost"):
        with open(os.environ["CALLED"], "a") as file:
            print(host, file=file)
        raise socket.gaierror("no network")
    return find(host, *arguments, **options)

socket.socket.connect, socket.getaddrinfo = watched, lookup
"""


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Server:
    """`flax-pref app` in a process of its own."""

    def __init__(self, folder, *flags):
        save_modules(load_pipeline("demo").unet, folder)
        (folder / "site").mkdir()
        (folder / "site" / "sitecustomize.py").write_text(NO_NETWORK)
        self.port, self.log, self.called = free_port(), folder / "log", folder / "called"
        environment = {
            **os.environ,
            **{"PYTHONPATH": f"{folder / 'site'}{os.pathsep}{ROOT}", "CALLED": str(self.called)},
            **{"JAX_LOG_COMPILES": "1", "TMPDIR": str(folder), "PYTHONUNBUFFERED": "1"},
        }
        modules = (f"--module={name}={folder}/{name}.safetensors" for name in ("pos", "neg"))
        command = [sys.executable, "-m", "flax_pref.cli", "app", "--model=demo", *modules, "--steps=4", *flags]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [*command, f"--port={self.port}"], stdout=log, stderr=log, cwd=folder, env=environment
            )
        deadline = time.monotonic() + SECONDS
        while f"open http://127.0.0.1:{self.port} in a browser" not in self.log.read_text():
            assert self.process.poll() is None and time.monotonic() < deadline, self.log.read_text()[-2000:]
            time.sleep(0.2)

    def compilations(self):
        """Programs that were compiled so far."""
        return len(re.findall(r"Finished XLA compilation", self.log.read_text()))


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = Server(tmp_path_factory.mktemp("app"))
    yield server
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(60) == 0
    assert not server.called.exists(), server.called.read_text()
    assert "Traceback" not in server.log.read_text()
    assert not list(server.log.parent.glob("flax_pref-app-*")), "images of visitors are left behind"


@pytest.fixture(scope="module")
def browser():
    with running_browser(OFFLINE) as browser:
        yield browser


@pytest.fixture
def visit(browser, server):
    """Opens the page; errors in it and requests to anyone but the server fail the test."""
    complaints, contexts = [], []

    def open_page(width=1280):
        contexts.append(browser.new_context(viewport={"width": width, "height": 900}, accept_downloads=True))
        page = contexts[-1].new_page()
        page.set_default_timeout(20_000)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("console", lambda message: message.type == "error" and complaints.append(message.text))
        own = (f"http://127.0.0.1:{server.port}/", "data:", "blob:")
        page.on("request", lambda request: request.url.startswith(own) or complaints.append(request.url))
        page.goto(f"http://127.0.0.1:{server.port}")
        playwright.expect(page.locator("#draw")).to_be_enabled()
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert complaints == []


def set_field(page, label, value):
    # The label of a text may have more behind it, an explanation.
    field = page.get_by_label(f"number input for {label}", exact=True).or_(
        page.get_by_label(re.compile(rf"^\s*{re.escape(label)}\b"))
    )
    field.first.fill(str(value))
    field.blur()


def says(page, text):
    playwright.expect(page.locator("#state")).to_contain_text(text, timeout=1000 * SECONDS)


def draw(page, images=2):
    """Draws, and waits for the entry in the history, which comes last."""
    history = page.locator("#history button")
    before = history.count()
    page.click("#draw")
    playwright.expect(history).to_have_count(before + 1, timeout=1000 * SECONDS)
    says(page, f"Drew {images} image")
    playwright.expect(page.locator("#draw")).to_be_enabled()


def downloads(page):
    """Metadata and pixels of the images on the page, by their sides."""
    found = {}
    for side in ("base", "guided"):
        with page.expect_download() as download:
            page.locator(f"figure[data-side={side}] a[download]").first.click()
        content = Path(download.value.path()).read_bytes()
        found[side] = download.value.suggested_filename, read_metadata(content), Image.open(io.BytesIO(content))
    return found


def test_a_visitor_types_draws_compares_and_downloads(visit, server):
    page = visit()
    set_field(page, "Prompt", "a small blue cross at the top, grey background")
    draw(page)
    sizes = "[...document.querySelectorAll('#pairs img')].map((image) => [image.naturalWidth, image.width])"
    (base, guided) = page.evaluate(sizes)
    assert base == guided and base[0] == 64 and base[1] > 300, "side by side, and large"
    tops = [page.locator("#pairs figure").nth(i).bounding_box()["y"] for i in (0, 1)]
    assert tops[0] == tops[1]
    first = downloads(page)
    compiled = server.compilations()
    assert compiled

    set_field(page, "w (strength)", 2)
    draw(page)
    second = downloads(page)
    assert first["base"][2] == second["base"][2] and first["guided"][2] != second["guided"][2]
    assert [found["guided"][1]["w"] for found in (first, second)] == ["4", "2"]
    page.click("#new-seed")
    playwright.expect(page.get_by_label("Seed", exact=True)).not_to_have_value("0")
    set_field(page, "Prompt", "a large red circle in the middle, white background")
    draw(page)
    assert server.compilations() == compiled, "a new w, seed or prompt compiles nothing"

    name, told, _ = second["guided"]
    assert name == "a-small-blue-cross-at-the-top-grey-backg-seed0-cpgd-w2.png"
    assert told["prompt"] == "a small blue cross at the top, grey background" and told["seed"] == 0
    assert (told["rule"], told["steps"], told["guidance_scale"], told["model"]) == ("cpgd", 4, "7.5", "demo")
    assert set(told["modules_sha256"]) == {"pos", "neg"} and second["base"][1]["modules"] == {}

    page.locator("#history button").last.click()  # the first drawing
    playwright.expect(page.get_by_label("Prompt", exact=True)).to_have_value(told["prompt"])
    playwright.expect(page.locator("figure[data-side=guided] figcaption")).to_contain_text("cpgd, w = 4")
    assert downloads(page)["guided"][2] == first["guided"][2]
    with page.expect_download() as download:
        page.click("#archive")
    with zipfile.ZipFile(download.value.path()) as archive:
        assert [name.rpartition("-seed0-")[2] for name in archive.namelist()] == ["base.png", "cpgd-w4.png"]


def test_an_error_is_text_that_a_person_can_read(visit):
    page = visit()
    page.get_by_text("Schedules", exact=True).click()
    set_field(page, "w as a schedule", "list:1:2")
    page.click("#draw")
    error = page.locator("#state [role=alert]")
    playwright.expect(error).to_have_text("w list:1:2: 2 values, but the solver takes 4 steps; expected one for each")
    set_field(page, "w as a schedule", "")
    set_field(page, "Prompt", "<script>window.pwned = 1</script> <b>bold</b>")
    draw(page)
    assert page.inner_text("#pairs .drawn >> nth=0") == "<script>window.pwned = 1</script> <b>bold</b>"
    assert page.evaluate("window.pwned") is None
    set_field(page, "Prompt", "")
    page.click("#draw")
    playwright.expect(error).to_have_text("Prompt: empty; describe what to draw")
    playwright.expect(page.locator("#draw")).to_be_enabled()


def test_only_rules_of_the_modules_are_offered_and_each_has_its_fields(visit):
    page = visit()
    rule = page.get_by_label("Rule", exact=True)
    rule.click()
    options = page.get_by_role("option").all_inner_texts()
    assert {"cfg", "cpgd", "pgd (neg)", "multi"} <= {text.strip("✓ \n") for text in options}
    assert not any("autoguidance" in text for text in options)
    page.get_by_role("option", name="multi").click()
    playwright.expect(page.get_by_label("number input for w of neg")).to_be_visible()
    playwright.expect(page.get_by_label("number input for w (strength)")).to_be_hidden()
    rule.click()
    page.get_by_role("option", name="cfg", exact=True).click()
    playwright.expect(page.get_by_label("number input for w of neg")).to_be_hidden()
    draw(page, 1)
    assert page.locator("#pairs figure").count() == 1


def test_two_tabs_wait_for_each_other_and_stop_each_their_own(visit):
    one, other = visit(), visit(width=420)
    set_field(one, "Images, each with its own seed", 8)
    set_field(one, "Seed", 1000)
    set_field(one, "Steps", 100)  # long enough
    one.click("#draw")
    says(one, "Base image")
    other.click("#draw")
    says(other, "Waiting for 1 other drawing")
    other.click("#stop")
    says(other, "Stopped after 0 images.")
    playwright.expect(other.locator("#draw")).to_be_enabled()
    set_field(other, "Prompt", "a yellow square")
    other.click("#draw")
    says(one, "step")
    one.click("#stop")
    says(one, "Stopped after")
    says(other, "Drew 2 images.")
    assert "a yellow square" in other.inner_text("#pairs") and "a yellow square" not in one.inner_text("body")
    assert other.evaluate("document.documentElement.scrollWidth <= innerWidth")
    draw_box, image = other.locator("#draw").bounding_box(), other.locator("#pairs img").first.bounding_box()
    assert draw_box["y"] < image["y"] < other.get_by_label("Rule", exact=True).bounding_box()["y"]


def test_a_tab_that_is_closed_holds_nobody_up(visit, server):
    one, other = visit(), visit()
    set_field(one, "Images, each with its own seed", 8)
    set_field(one, "Steps", 100)
    set_field(one, "Seed", 5000)
    one.click("#draw")
    says(one, "step")
    one.close()
    set_field(other, "Seed", 77)
    other.click("#draw")
    says(other, "Drew 2 images.")
