"""Rewards that live elsewhere: what they are asked, and what users are told when they do not answer."""

import base64
import http.server
import io
import json
import threading

import jax
import numpy as np
import pytest
from PIL import Image

from flax_pref.config import UserError
from flax_pref.rewards import remote
from flax_pref.rewards.remote import Service, remote_errors
from flax_pref.rewards.reward import Weighted, load_reward, make_reward

CAPTIONS = ["a", "", "ein Fuchs über 狐 \0 und mehr" * 40]


@pytest.fixture
def images():
    return np.random.default_rng(0).random((3, 8, 6, 3), np.float32)


@jax.jit
def score(reward, images, prepared):
    return reward.score(reward.view(images), prepared)


class Place:
    """A service: answers in turn what it is given, or what a function makes of the request."""

    def __init__(self, *answers):
        self.requests, left = [], list(answers)

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(handler):
                body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
                self.requests.append(body)
                answer = left.pop(0) if len(left) > 1 else left[0]
                status, content = answer if isinstance(answer, tuple) else (200, answer(body))
                handler.send_response(status)
                handler.end_headers()
                handler.wfile.write(content.encode())

            def log_message(handler, *_):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/score"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()


@pytest.fixture
def place():
    places = []

    def serve(*answers):
        places.append(Place(*answers))
        return places[-1]

    yield serve
    for each in places:
        each.server.shutdown()
        each.server.server_close()


@pytest.fixture
def naps(monkeypatch):
    taken = []
    monkeypatch.setattr(remote.time, "sleep", taken.append)
    return taken


def scores_of(body):
    """The mean of each image, with null for the empty caption."""
    files = [Image.open(io.BytesIO(base64.b64decode(image))) for image in body["images"]]
    means = [float(np.asarray(file).mean()) for file in files]
    return json.dumps({"scores": [mean if text else None for mean, text in zip(means, body["prompts"], strict=True)]})


def test_a_service_is_given_captions_and_images_and_its_scores_are_taken(place, images):
    there = place(scores_of)
    reward = load_reward("hpsv3", there.url)
    assert reward.name == "hpsv3" and not reward.differentiable
    scores = score(reward, images, reward.prepare(CAPTIONS))
    assert there.requests[0]["prompts"] == CAPTIONS
    means = np.round(255 * images).mean(axis=(1, 2, 3))
    np.testing.assert_allclose(scores, [means[0], np.nan, means[2]], rtol=1e-5)


def test_it_is_asked_again_while_that_may_help(place, images, naps):
    there = place((503, "busy"), (429, "slower"), scores_of)
    reward = load_reward("hpsv3", there.url)
    assert np.isfinite(score(reward, images[:1], reward.prepare(["a"]))).all()
    assert len(there.requests) == 3 and naps == [1, 2]


@pytest.mark.parametrize(
    ("answer", "requests", "message"),
    [
        ((500, "down"), 4, "answered 500 Internal Server Error, asked 4 times; is the service running"),
        ((404, "nothing"), 1, "answered 404 Not Found, asked 1 times"),
        ((200, "<html>"), 1, r"answered b'<html>'; expected {\"scores\": \[one number for each of 1 images\]}"),
        ((200, '{"scores": ["high"]}'), 1, "answered .*; expected"),
        ((200, '{"scores": [1, 2]}'), 1, "answered with 2 scores for 1 images"),
    ],
)
def test_an_answer_that_is_none_becomes_one_line_that_names_the_service(
    place, images, naps, capfd, answer, requests, message
):
    there = place(answer)
    reward = make_reward([Weighted("hpsv3", path=there.url)])
    with pytest.raises(UserError, match=f"hpsv3: .*{there.url}: {message}") as told, remote_errors():
        score(reward, images[:1], reward.prepare(["a"])).block_until_ready()
    assert "\n" not in str(told.value) and "Traceback" not in capfd.readouterr().err
    assert len(there.requests) == requests


def test_a_service_that_does_not_answer_in_time_is_not_waited_for(place, images, naps):
    wait = threading.Event()
    there = place(lambda body: str(wait.wait(20)))
    with pytest.raises(ConnectionError, match=r"timed out, asked 3 times"):
        Service(there.url, timeout=0.05, retries=2)(images, CAPTIONS)
    wait.set()


def brightness(images, captions):
    return images.mean(axis=(1, 2, 3)) + [len(caption) for caption in captions]


def broken(images, captions):
    raise KeyError("no such\nmodel")


def too_few(images, captions):
    return [1.0]


def test_a_python_function_is_a_reward_that_can_be_weighed(images):
    reward = make_reward([Weighted("mine", 2.0, path=f"python:{__name__}:brightness")])
    expected = 2 * brightness(images, CAPTIONS)
    np.testing.assert_allclose(score(reward, images, reward.prepare(CAPTIONS)), expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("function", "message"),
    [("broken", "mine: KeyError: 'no such.*model'"), ("too_few", r"mine: returned float64 \[1\] for 3 images")],
)
def test_a_function_that_fails_is_told_in_one_line(images, function, message):
    reward = load_reward("mine", f"python:{__name__}:{function}")
    with pytest.raises(UserError, match=message), remote_errors():
        score(reward, images, reward.prepare(CAPTIONS)).block_until_ready()


@pytest.mark.parametrize("path", ["python:no_such_module:f", f"python:{__name__}:nothing", "python:json", "python:"])
def test_a_function_that_is_not_there_is_named(path):
    with pytest.raises(ValueError, match=f"^{path}: cannot be imported .* expected python:MODULE:FUNCTION"):
        load_reward("mine", path)
