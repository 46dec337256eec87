"""Rewards that live elsewhere: what they are asked, and what users are told when they do not answer."""

import base64
import contextlib
import io
import json
import socketserver
import threading
import time

import jax
import numpy as np
import pytest
from PIL import Image

from flax_pref.config import UserError
from flax_pref.rewards import remote
from flax_pref.rewards.remote import Service, remote_errors
from flax_pref.rewards.reward import Weighted, load_reward, make_reward
from tests.services import LocalService

CAPTIONS = ["a", "", "ein Fuchs über 狐 \0 und mehr" * 40]


@pytest.fixture
def images():
    return np.random.default_rng(0).random((3, 8, 6, 3), np.float32)


@jax.jit
def score(reward, images, prepared):
    return reward.score(reward.view(images), prepared)


class Place(LocalService):
    """A service: answers in turn what it is given, or what a function makes of the request."""

    def __init__(self, *answers):
        self.requests, self.left = [], list(answers)
        super().__init__(self.answer)

    def answer(self, handler, body):
        body = json.loads(body)
        self.requests.append(body)
        answer = self.left.pop(0) if len(self.left) > 1 else self.left[0]
        answer = answer if isinstance(answer, tuple) else answer(body)
        status, content = answer if isinstance(answer, tuple) else (200, answer)
        handler.send_response(status)
        handler.end_headers()
        with contextlib.suppress(OSError):  # whoever asked has gone
            handler.wfile.write(content.encode())


@pytest.fixture
def place():
    places = []

    def serve(*answers):
        places.append(Place(*answers))
        return places[-1]

    yield serve
    for each in places:
        each.close()


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
        ((200, '{"scores": ["1"]}'), 1, "answered .*; expected"),
        ((200, '{"scores": "1"}'), 1, "answered .*; expected"),
        ((200, '{"scores": {"1": 2}}'), 1, "answered .*; expected"),
        ((200, '{"scores": [true]}'), 1, "answered .*; expected"),
        ((200, '{"scores": [[1]]}'), 1, "answered .*; expected"),
        ((200, '{"scores": 1}'), 1, "answered .*; expected"),
        ((200, "[1]"), 1, "answered .*; expected"),
        ((200, f'{{"scores": [{10**400}]}}'), 1, "answered .*; expected"),
        ((200, "[" * 100_000), 1, "answered .*; expected"),
        ((200, " " * 2**20 + '{"scores": [1]}'), 1, "answered with more than 1,048,576 bytes"),
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
    with pytest.raises(ConnectionError, match=r"timed out.*, asked 3 times"):
        Service(there.url, timeout=0.05, retries=2)(images, CAPTIONS)
    wait.set()


@contextlib.contextmanager
def raw_service(answer):
    """The address of a service, and a list with an entry for each request; `answer` writes to the connection."""
    asked = []

    class Handler(socketserver.StreamRequestHandler):
        def handle(self):
            asked.append(self.rfile.readline())
            with contextlib.suppress(OSError):  # whoever asked has gone
                answer(self.wfile)

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}/score", asked
        server.shutdown()


def drip(before, byte, seconds):
    def answer(out):
        out.write(before)
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            out.write(byte)
            wait(0.02)

    return answer


wait = threading.Event().wait  # as time.sleep, which a fixture replaces
HEAD = b"HTTP/1.1 200 OK\r\n"


@pytest.mark.parametrize(
    "answer",
    [drip(HEAD + b"\r\n", b" ", 60), drip(HEAD, b"A", 60), drip(HEAD + b"Content-Length: 9999\r\n\r\n", b"1", 60)],
    ids=["body", "headers", "announced"],
)
def test_an_answer_that_comes_byte_by_byte_is_not_waited_for(answer, images, naps):
    with raw_service(answer) as (url, asked):
        begun = time.monotonic()
        with pytest.raises(ConnectionError, match=r"timed out, no whole answer in 1 s, asked 2 times"):
            Service(url, timeout=1, retries=1)(images, CAPTIONS)
        assert time.monotonic() - begun < 20
        assert len(asked) == 2


def test_of_an_endless_answer_no_more_is_read_than_an_answer_may_have(images, naps):
    endless = drip(HEAD + b"\r\n", b" " * 2**18, 30)
    with raw_service(endless) as (url, _), pytest.raises(ValueError, match=f"{url}: answered with more than 1,048,576"):
        Service(url, timeout=20)(images, CAPTIONS)


def test_an_answer_that_is_cut_on_the_way_is_asked_for_again(images, naps):
    parts = [b"Content-Length: 40\r\n\r\n{", b'\r\n{"scores": [1, 2, 3]}']
    with raw_service(lambda out: out.write(HEAD + parts.pop(0))) as (url, asked):
        np.testing.assert_array_equal(Service(url)(images, CAPTIONS), [1, 2, 3])
        assert len(asked) == 2 and naps == [1]


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_images_are_not_sent_on_to_where_a_service_redirects(place, images, naps, status):
    elsewhere = place(scores_of)
    head = f"HTTP/1.1 {status} Moved\r\nLocation: {elsewhere.url}\r\nContent-Length: 0\r\n\r\n".encode()
    with raw_service(lambda out: out.write(head)) as (url, asked):
        message = f"{url}: answered {status} Moved, a redirect to {elsewhere.url}, which is not followed, asked 1 times"
        with pytest.raises(ConnectionError, match=message):
            Service(url)(images, CAPTIONS)
        assert len(asked) == 1 and not elsewhere.requests


def test_a_score_that_is_too_large_for_float32_is_infinite(place, images):
    there = place((200, '{"scores": [1e300]}'))
    reward = load_reward("hpsv3", there.url)
    assert np.isinf(score(reward, images[:1], reward.prepare(["a"]))).all()


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


# ----------------------------------------------------------------------------------------------------------------------
# Several requests at a time


def numbered(count):
    """Images whose mean tells which they are."""
    return np.broadcast_to(np.arange(count, dtype=np.float32)[:, None, None, None] / 255, (count, 4, 3, 3)), [
        str(i) for i in range(count)
    ]


class Busy:
    """Counts the requests that a service has at a time; a function answers each."""

    def __init__(self, seconds=0.0, answer=lambda body, asked: None):
        self.now, self.most, self.lock, self.seconds, self.answer = 0, 0, threading.Lock(), seconds, answer
        self.asked = {}

    def __call__(self, body):
        with self.lock:
            self.now += 1
            self.most = max(self.most, self.now)
            first = body["prompts"][0]
            self.asked[first] = self.asked.get(first, 0) + 1
        wait(self.seconds)
        with self.lock:
            self.now -= 1
        return self.answer(body, self.asked[first]) or scores_of(body)


def test_many_images_travel_in_bounded_requests_at_a_time_and_keep_their_order(place):
    images, prompts = numbered(37)
    busy = Busy(0.1)
    there = place(busy)
    scores = Service(there.url, request_images=4, connections=3)(images, prompts)
    np.testing.assert_array_equal(scores, np.arange(37))
    assert busy.most == 3 and sorted(len(body["images"]) for body in there.requests) == [1] + [4] * 9


def test_the_bound_of_connections_is_that_of_all_calls(place):
    images, prompts = numbered(8)
    busy = Busy(0.1)
    service = Service(place(busy).url, request_images=2, connections=2)
    found = [None, None]

    def call(place):
        found[place] = service(images, prompts)

    threads = [threading.Thread(target=call, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    np.testing.assert_array_equal(found, [np.arange(8)] * 2)
    assert busy.most == 2


def test_only_the_request_that_failed_is_asked_again(place, naps):
    images, prompts = numbered(12)
    busy = Busy(answer=lambda body, asked: (503, "busy") if body["prompts"][0] == "4" and asked < 3 else None)
    there = place(busy)
    scores = Service(there.url, request_images=4)(images, prompts)
    np.testing.assert_array_equal(scores, np.arange(12))
    assert busy.asked == {"0": 1, "4": 3, "8": 1} and naps == [1, 2]


def test_one_request_that_fails_for_good_stops_the_others(place, naps):
    images, prompts = numbered(40)
    busy = Busy(answer=lambda body, asked: '{"scores": [1]}' if body["prompts"][0] == "4" else None)
    with pytest.raises(ValueError, match="answered with 1 scores for 4 images"):
        Service(place(busy).url, request_images=4, connections=1)(images, prompts)
    assert list(busy.asked) == ["0", "4"]


def retry_later(value, count):
    """A service that says so many times when to ask again, then answers."""
    head = f"HTTP/1.1 429 Too Many Requests\r\nRetry-After: {value}\r\nContent-Length: 0\r\n\r\n".encode()
    answers = [head] * count + [HEAD + b'\r\n{"scores": [1, 2, 3]}']
    return lambda out: out.write(answers.pop(0))


@pytest.mark.parametrize(
    ("value", "expected"), [("7", [7, 7, 7]), ("3", [3, 3, 4]), ("999999", [60, 60, 60]), ("soon", [1, 2, 4])]
)
def test_a_service_that_says_when_to_ask_again_is_asked_then(images, naps, value, expected):
    with raw_service(retry_later(value, 3)) as (url, asked):
        np.testing.assert_array_equal(Service(url)(images, CAPTIONS), [1, 2, 3])
        assert naps == expected and len(asked) == 4


def test_a_busy_service_is_waited_for_longer_than_one_that_is_broken(images, naps):
    with raw_service(retry_later("5", 15)) as (url, asked):
        np.testing.assert_array_equal(Service(url)(images, CAPTIONS), [1, 2, 3])
        assert len(asked) == 16
    with raw_service(retry_later("5", 999)) as (url, _), pytest.raises(ConnectionError, match="answered 429 Too Many"):
        naps.clear()
        Service(url, patience=20)(images, CAPTIONS)
    assert sum(naps) < 120


def test_what_a_service_tells_of_an_error_is_passed_on(images, naps):
    text = b'{"error": "hpsv3: CUDA\\nout of \\u001b[31mmemory"}'
    head = b"HTTP/1.1 400 Bad Request\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(text)
    with raw_service(lambda out: out.write(head + text)) as (url, _), pytest.raises(ConnectionError) as told:
        Service(url)(images, CAPTIONS)
    assert "answered 400 Bad Request (hpsv3: CUDA out of [31mmemory), asked 1 times" in str(told.value)


def test_nothing_is_asked_of_no_image(place):
    assert Service("http://127.0.0.1:1/score")(np.zeros((0, 4, 4, 3), np.float32), []).shape == (0,)
