"""The server of integrations/reward_server: its protocol and limits, batches over requests, and its judges.

It runs as users run it, in a process of its own, with the scorer "mock". The judges' packages are stand-ins with the
signatures of the published ones.
"""

import argparse
import base64
import concurrent.futures
import contextlib
import http.client
import io
import json
import signal
import socket
import subprocess
import sys
import threading
import time
import types
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flax_pref.config import INTEGRATIONS
from flax_pref.rewards.remote import Service

FOLDER = INTEGRATIONS / "reward_server"
GIVEN = argparse.Namespace(model=None, device="cpu", repository=None, mock_seconds=None)


@pytest.fixture(scope="module")
def modules():
    """The folder's modules, which find each other as when `serve.py` runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(FOLDER)
        import batching
        import scorers

        yield types.SimpleNamespace(batching=batching, scorers=scorers)
    for name in ("batching", "scorers"):
        sys.modules.pop(name)


@contextlib.contextmanager
def started(*flags, cwd=None):
    command = [sys.executable, FOLDER / "serve.py", "--scorer", "mock", "--port", "0", *map(str, flags)]
    process = subprocess.Popen(command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        line = process.stdout.readline()
        assert " scores at " in line, process.communicate()
        yield process, line.split()[-1]
    finally:
        process.kill()
        process.communicate()


@pytest.fixture(scope="module")
def server():
    with started("--queue", 16, "--max-body-mib", 1, "--max-pixels", 4096, "--body-seconds", 1) as (_, url):
        yield url


def until(true, seconds=20):
    """Whether something becomes true in time."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        with contextlib.suppress(urllib.error.URLError, ValueError):
            if true():
                return True
        time.sleep(0.02)
    return False


def pictures(count, seed=0, size=(8, 6)):
    return np.random.default_rng(seed).random((count, *size, 3), np.float32)


def png(pixels):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def expected(images, prompts):
    return np.round(255 * images).mean(axis=(1, 2, 3), dtype=np.float64) / 25.5 + [
        len(prompt) / 100 for prompt in prompts
    ]


def asked(url, body=None, method=None):
    """Status and content of an answer."""
    request = urllib.request.Request(url, None if body is None else body, method=method)
    try:
        with urllib.request.urlopen(request, timeout=20) as response:
            return response.status, json.loads(response.read())
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.loads(error.read())


# ----------------------------------------------------------------------------------------------------------------------
# Protocol and limits


def test_the_client_of_training_gets_the_scores_of_its_images_in_order(server):
    images, prompts = pictures(7), ["", "ein Fuchs 狐", "a" * 900, "d", "ee", "fff", "gggg"]
    np.testing.assert_allclose(Service(server)(images, prompts), expected(images, prompts), rtol=1e-6)


def test_health_and_version_are_told(server):
    base = server.removesuffix("/score")
    status, health = asked(base + "/health")
    assert status == 200 and health["status"] == "ok" and health["waiting"] == 0
    status, version = asked(base + "/version")
    assert status == 200 and version["protocol"] == 1 and version["scorer"] == "mock"
    assert version["versions"]["pillow"] == Image.__version__


GOOD = png(np.zeros((4, 4, 3), np.uint8))


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        (b"<html>", 400, "not a request; expected"),
        (b"[" * 100_000, 400, "not a request"),
        (b"[1]", 400, "not a request"),
        (b'{"prompts": ["a"], "images": [7]}', 400, "not a request"),
        (json.dumps({"prompts": ["a", "b"], "images": [GOOD]}).encode(), 400, "2 prompts for 1 images"),
        (json.dumps({"prompts": ["a"], "images": ["%%%"]}).encode(), 400, "image 0 is no PNG in base64"),
        (json.dumps({"prompts": ["a"], "images": [GOOD[:60]]}).encode(), 400, "image 0 is no PNG in base64"),
        (
            json.dumps({"prompts": ["a"] * 2, "images": [GOOD, "R0lGODlhAQABAAAAACw="]}).encode(),
            400,
            "image 1 is no PNG",
        ),
        (json.dumps({"prompts": ["a"] * 17, "images": [GOOD] * 17}).encode(), 413, "17 images; expected at most 16"),
        (b" " * (2**20 + 1), 413, "a body of 1048577 bytes; expected at most 1048576"),
    ],
)
def test_what_is_no_request_is_refused_in_one_line(server, body, status, message):
    found, answer = asked(server, body)
    assert found == status and message in answer["error"] and "\n" not in answer["error"]


def test_the_size_of_an_image_is_checked_before_it_is_decoded(server):
    bomb = png(np.zeros((4097, 1, 3), np.uint8))
    status, answer = asked(server, json.dumps({"prompts": ["a"], "images": [bomb]}).encode())
    assert status == 413 and answer["error"] == "image 0 has 1 x 4097 pixels; expected at most 4096 in all"


def test_nothing_to_score_has_no_scores(server):
    assert asked(server, b'{"prompts": [], "images": []}') == (200, {"scores": []})


def test_other_paths_and_methods_are_refused(server):
    assert asked(server.removesuffix("score") + "other", b"{}")[0] == 404
    assert asked(server)[0] == 404  # a GET
    address = server.removeprefix("http://").partition("/")[0]
    connection = http.client.HTTPConnection(address, timeout=20)
    connection.request("POST", "/score", iter([b"{}"]))  # in chunks, of unknown length
    response = connection.getresponse()
    assert response.status == 411 and "Content-Length" in json.loads(response.read())["error"]
    connection.close()


def test_a_body_that_comes_byte_by_byte_is_not_waited_for(server):
    host, port = server.removeprefix("http://").partition("/")[0].split(":")
    with socket.create_connection((host, int(port)), timeout=20) as connection:
        connection.sendall(b"POST /score HTTP/1.1\r\nContent-Length: 1000\r\n\r\n")
        with contextlib.suppress(OSError):
            for _ in range(12):
                connection.sendall(b" ")
                time.sleep(0.12)
        assert b" 408 " in connection.recv(100)


def test_a_full_queue_answers_429_and_the_client_asks_again():
    with started("--queue", 2, "--batch-size", 2, "--mock-seconds", 0.5) as (_, url):
        images, prompts = pictures(6), list("abcdef")
        body = json.dumps({"prompts": ["a"] * 2, "images": [GOOD] * 2}).encode()
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            statuses = [status for status, _ in pool.map(lambda _: asked(url, body), range(8))]
        assert set(statuses) == {200, 429}
        # One request each: while two wait, the others are refused, and asked again after what Retry-After says.
        found = Service(url, request_images=2, connections=3, retries=6)(images, prompts)
        np.testing.assert_allclose(found, expected(images, prompts), rtol=1e-6)


def test_more_connections_than_there_may_be_are_refused():
    with started("--connections", 1) as (_, url):
        host, port = url.removeprefix("http://").partition("/")[0].split(":")
        health = url.replace("score", "health")
        # Connections are taken in their order, and the first says nothing yet.
        with socket.create_connection((host, int(port)), timeout=20):
            with pytest.raises(urllib.error.HTTPError, match="503") as refused:
                urllib.request.urlopen(health, timeout=20)
            assert refused.value.headers["Retry-After"] == "1"
            refused.value.close()
        assert until(lambda: asked(health)[0] == 200)  # its place is free again


def test_sigterm_answers_what_waits_and_ends_with_0():
    with started("--batch-size", 1, "--mock-seconds", 1) as (process, url):
        body = json.dumps({"prompts": ["a"] * 2, "images": [GOOD] * 2}).encode()
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            first = pool.submit(asked, url, body)
            assert until(lambda: asked(url.replace("score", "health"))[1]["waiting"] > 0)
            process.send_signal(signal.SIGTERM)
            assert first.result()[0] == 200
        _, err = process.communicate(timeout=20)
        assert process.returncode == 0 and not err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--scorer", "mouse"], "error: mouse: not known; expected hpsv3, vqascore, unifiedreward, mock or python:"),
        (["--scorer", "hpsv3"], "error: hpsv3: hpsv3 cannot be imported (No module named 'hpsv3'); install it: python"),
        (["--scorer", "python:nothing:f"], "error: python:nothing:f: cannot be imported (No module named 'nothing')"),
        (["--scorer", "python:json:loads"], "error: python:json:loads: does not score a grey square: TypeError: "),
        (["--scorer", "mock", "--host", "256.0.0.1"], "error: 256.0.0.1:"),
        (["--scorer", "unifiedreward"], "error: unifiedreward: no --repository; expected a clone: git clone https://"),
    ],
)
def test_what_keeps_it_from_starting_is_one_line(flags, message):
    done = subprocess.run([sys.executable, FOLDER / "serve.py", "--port", "0", *flags], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith(message) and done.stderr.count("\n") == 1, done.stderr


def test_it_knows_neither_this_package_nor_jax():
    code = "import sys, serve; assert not {'flax_pref', 'jax', 'torch'} & set(sys.modules), set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=FOLDER, check=True)


# ----------------------------------------------------------------------------------------------------------------------
# Batches


GREY = Image.new("RGB", (2, 2), (9, 9, 9))


class Judge:
    """Scores by the red of the first pixel; images of certain reds fail, alone or whatever comes with them."""

    name, packages = "judge", ()

    def __init__(self, bad=(), broken=lambda: False, seconds=0.0):
        self.batches, self.bad, self.broken, self.seconds = [], bad, broken, seconds

    def __call__(self, images, prompts):
        reds = [image.getpixel((0, 0))[0] for image in images]
        self.batches.append(len(reds))
        time.sleep(self.seconds)
        if self.broken() or set(reds) & set(self.bad):
            raise RuntimeError("CUDA error:\nunspecified")
        return [None if red == 200 else float("nan") if red == 201 else red for red in reds]


@pytest.fixture
def batcher(modules):
    made = []

    def make(scorer, **settings):
        made.append(modules.batching.Batcher(scorer, **{"batch_size": 8, "wait": 0.05, "queue_size": 64, **settings}))
        made[-1].start()
        return made[-1]

    yield make
    for each in made:
        each.close(5)


def reds(*values):
    return [Image.new("RGB", (2, 2), (value, 0, 0)) for value in values], ["p"] * len(values)


def together(batcher, *requests):
    with concurrent.futures.ThreadPoolExecutor(len(requests)) as pool:
        futures = [pool.submit(batcher.score, *reds(*request)) for request in requests]
        return [future.exception() or future.result() for future in futures]


def test_requests_share_batches_and_get_their_own_scores(batcher):
    judge = Judge(seconds=0.05)
    found = together(batcher(judge, wait=0.3), (1, 2, 3), (4,), (5, 6), (7, 8))
    assert found == [[1, 2, 3], [4], [5, 6], [7, 8]]
    assert judge.batches == [1, 8]  # the grey square, then all at once


def test_a_large_request_is_scored_in_several_batches(batcher):
    judge = Judge()
    assert batcher(judge).score(*reds(*range(20))) == list(range(20))
    assert judge.batches == [1, 8, 8, 4]


def test_an_image_that_fails_has_no_score_and_takes_none_with_it(batcher, capfd):
    found = together(batcher(Judge(bad=(3,)), wait=0.3), (1, 3), (4,))
    assert found == [[1, None], [4]]
    assert capfd.readouterr().err == "judge: a batch of 3 failed: RuntimeError: CUDA error: unspecified\n"
    # Also where it is the only one: the scorer is asked for a grey square, and works.
    assert batcher(Judge(bad=(3,))).score(*reds(3)) == [None]


def test_a_scorer_that_is_broken_is_told(batcher, modules):
    broken = threading.Event()
    there = batcher(Judge(broken=broken.is_set), wait=0.3)
    broken.set()
    for error in together(there, (1, 2), (4,)):
        assert isinstance(error, modules.batching.ScorerError) and str(error) == "RuntimeError: CUDA error: unspecified"
    broken.clear()
    assert there.score(*reds(1)) == [1]


def test_no_number_is_no_score(batcher):
    assert batcher(Judge()).score(*reds(200, 201, 5)) == [None, None, 5]


def test_the_queue_has_a_bound(batcher, modules):
    there = batcher(Judge(seconds=0.3), batch_size=1, queue_size=2, wait=0.01)
    found = together(there, (1, 2), (3, 4), (5, 6))
    full = [error for error in found if isinstance(error, modules.batching.QueueFullError)]
    assert full and "images wait of at most 2" in str(full[0])
    assert [scores for scores in found if scores not in full]


def test_images_that_nobody_waits_for_are_not_scored(batcher):
    judge = Judge(seconds=0.5)
    there = batcher(judge, batch_size=1, wait=0.01)
    there.look_every = 0.01
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        first = pool.submit(there.score, *reds(1))
        time.sleep(0.1)
        there.score(*reds(2, 3, 4), gone=lambda: True)
        assert first.result() == [1]
    there.close(5)
    assert judge.batches == [1, 1]


def test_a_scorer_that_gives_too_few_is_broken(modules):
    scorer = types.SimpleNamespace(name="few")
    there = modules.batching.Batcher(lambda images, prompts: [], batch_size=2, wait=0.01, queue_size=2)
    there.scorer.__dict__.update(vars(scorer))
    with pytest.raises(modules.batching.ScorerError, match="0 scores for 1 images"):
        there.start()


# ----------------------------------------------------------------------------------------------------------------------
# Judges


@pytest.fixture
def package(monkeypatch):
    """Puts a stand-in of a package in place."""

    def put(name, **contents):
        module = types.ModuleType(name)
        vars(module).update(contents)
        monkeypatch.setitem(sys.modules, name, module)

    return put


torch = pytest.importorskip("torch")


class Inferencer1:
    """As in the release 1.0.0 of hpsv3."""

    def __init__(self, config_path=None, checkpoint_path=None, device="cuda", differentiable=False):
        self.made = checkpoint_path, device

    def reward(self, image_paths, prompts):
        assert all(isinstance(image, Image.Image) for image in image_paths)
        return torch.tensor(
            [[image.getpixel((0, 0))[0] + len(text), 0.5] for image, text in zip(image_paths, prompts, strict=True)]
        )


class Inferencer2(Inferencer1):
    """As in its repository, with the arguments in the other order."""

    def reward(self, prompts, image_paths):
        return Inferencer1.reward(self, image_paths, prompts)


@pytest.mark.parametrize("inferencer", [Inferencer1, Inferencer2])
def test_hpsv3_gives_mu_of_each_image(modules, package, inferencer):
    package("hpsv3", HPSv3RewardInferencer=inferencer)
    judge = modules.scorers.load_scorer("hpsv3", GIVEN)
    assert judge._judge.made == (None, "cpu")
    assert judge(reds(5, 7)[0], ["a", "bcd"]) == [6, 10]


def test_vqascore_judges_each_image_for_its_own_prompt(modules, package):
    class Model:
        def forward(self, images, texts):
            found = []
            for path, text in zip(images, texts, strict=True):
                with Image.open(path) as image:
                    found.append(image.getpixel((0, 0))[0] / 256 + len(text))
            return torch.tensor(found)

    class VQAScore:
        def __init__(self, model, device="cuda", cache_dir="", **kwargs):
            self.model, self.made = Model(), (model, device)

    package("t2v_metrics", VQAScore=VQAScore)
    judge = modules.scorers.load_scorer("vqascore", GIVEN)
    assert judge._score.made == ("clip-flant5-xxl", "cpu")
    assert judge(reds(64, 128)[0], ["a", "bcd"]) == [1.25, 3.5]


class Tokens(dict):
    def to(self, device):
        assert device == "cpu"
        return self


class Network:
    device, answers = "cpu", {}

    @classmethod
    def from_pretrained(cls, name, *, torch_dtype, device_map):
        assert (name, torch_dtype, device_map) == ("CodeGoat24/UnifiedReward-qwen-7b", "auto", {"": "cpu"})
        return cls()

    def eval(self):
        return self

    def generate(self, input_ids, pixel_values, max_new_tokens, do_sample):
        assert max_new_tokens == 512 and not do_sample
        return torch.cat([input_ids, pixel_values], dim=1)


class Processor:
    """A token is an image's number here, and an answer begins where the padded question ends."""

    @classmethod
    def from_pretrained(cls, name):
        processor = cls()
        processor.tokenizer = types.SimpleNamespace(padding_side="right")
        return processor

    def apply_chat_template(self, chat, *, tokenize, add_generation_prompt):
        assert not tokenize and add_generation_prompt
        (message,) = chat
        assert message["role"] == "user" and [part["type"] for part in message["content"]] == ["image", "text"]
        return message["content"][1]["text"]

    def __call__(self, *, text, images, padding, return_tensors):
        assert padding and return_tensors == "pt" and self.tokenizer.padding_side == "left"
        self.asked = text
        pixels = torch.tensor([[image.getpixel((0, 0))[0]] for image in images])
        return Tokens(input_ids=torch.zeros(len(text), 3, dtype=torch.long), pixel_values=pixels)

    def batch_decode(self, tokens, *, skip_special_tokens):
        assert skip_special_tokens and tokens.shape[1] == 1
        return [Network.answers[int(row[0])] for row in tokens]


SCRIPT = """
import torch
raise RuntimeError("a script that is read is not run")
image_path = f'{torch}/x'
messages = [{"text": f'Rate it.\\nCaption: [{prompt}] of \\'one\\''}]
"""


def test_unifiedreward_asks_as_the_authors_script_does_and_reads_the_score(modules, package, tmp_path):
    script = tmp_path / modules.scorers.UnifiedReward.SCRIPT
    script.parent.mkdir(parents=True)
    script.write_text(SCRIPT)

    def process_vision_info(chats):
        return [chat[0]["content"][0]["image"] for chat in chats], None

    package("transformers", Qwen2_5_VLForConditionalGeneration=Network, AutoProcessor=Processor)
    package("qwen_vl_utils", process_vision_info=process_vision_info)
    Network.answers = {1: "fox (animal): 1\nFinal Score: 3.62", 2: "Final Score: 1\n**Final Score:** 4.5", 3: "no idea"}
    Network.answers |= {4: "Final Score: 17", 5: "Final Score: -3"}
    given = argparse.Namespace(**{**vars(GIVEN), "repository": str(tmp_path)})
    judge = modules.scorers.load_scorer("unifiedreward", given)
    assert judge(*reds(1, 2, 3, 4, 5)) == [3.62, 4.5, None, None, None]
    assert judge._processor.asked[0] == "Rate it.\nCaption: [p] of 'one'"


@pytest.mark.parametrize("script", [None, "f'{prompt}' + f'{prompt}'", "x = (", "f'{other}'"])
def test_a_script_without_the_question_is_named(modules, tmp_path, script):
    path = tmp_path / "script.py"
    if script is not None:
        path.write_text(script)
    with pytest.raises(ValueError, match=r"script\.py: (cannot be read|. questions with a place for the prompt)"):
        modules.scorers.question_of(path)


def test_every_judge_has_its_requirements(modules):
    files = {path.name for path in FOLDER.glob("requirements-*.txt")}
    assert files == {f"requirements-{name}.txt" for name in modules.scorers.SCORERS if name != "mock"}
    for name, judge in modules.scorers.SCORERS.items():
        lines = (FOLDER / f"requirements-{name}.txt").read_text() if name != "mock" else ""
        assert all(package in lines or package in ("torch", "transformers") for package in judge.packages)


def test_the_mock_is_what_it_says(modules):
    images = pictures(2)
    files = [Image.fromarray(np.round(255 * image).astype(np.uint8)) for image in images]
    np.testing.assert_allclose(
        modules.scorers.Mock(GIVEN)(files, ["a", "bcd"]), expected(images, ["a", "bcd"]), rtol=1e-9
    )


def test_a_function_of_ones_own_is_served(tmp_path):
    (tmp_path / "mine.py").write_text("def score(images, prompts):\n    return [image.width for image in images]\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(tmp_path)))
        with started("--scorer", "python:mine:score") as (_, url):
            assert Service(url)(pictures(2, size=(4, 7)), ["a", "b"]).tolist() == [7, 7]
