"""Rewards that live elsewhere: a Python function, or a service behind an HTTP address, e.g. one with HPSv3.

Images go to it from the host; there are no gradients. Inside of a jitted function the devices wait for it. Training and
`evaluation.scoring` ask it in the background, while devices compute something else.
"""

import base64
import contextlib
import dataclasses
import functools
import http.client
import importlib
import io
import json
import logging
import queue
import re
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike
from PIL import Image

from flax_pref.config import UserError
from flax_pref.shapes import PerImage, Pixels

# `(images [B, H, W, 3] float32 in [0, 1], captions) -> B scores`
Function = Callable[[np.ndarray, list[str]], ArrayLike]
PYTHON, HTTP = "python:", ("http://", "https://")
LARGEST_ANSWER = 2**20  # bytes of a service's answer
TEXT_BLOCK = 512  # bytes; captions are padded to a multiple of it, so that few lengths are compiled


class RemoteError(Exception):
    """A reward that lives elsewhere has not scored."""


@contextlib.contextmanager
def remote_errors() -> Iterator[None]:
    """What a remote reward raises while devices wait for it becomes a UserError with its message, in one line."""
    log = logging.getLogger("jax._src.callback")  # it would print the traceback first
    before, log.disabled = log.disabled, True
    try:
        yield
    except RemoteError as error:  # asked outside of jitted code
        raise UserError(str(error)) from error
    except (jax.errors.JaxRuntimeError, ValueError) as error:  # the one or the other, by the path to the callback
        if told := re.search(rf"\b{RemoteError.__name__}: (.*)", str(error)):
            raise UserError(told[1]) from error
        raise
    finally:
        log.disabled = before


class Texts(NamedTuple):
    """Captions as arrays, for functions that JAX traces take no texts.

    Attributes:
        utf8: uint8 `[B, L]`.
        lengths: int32 `[B]`, bytes of each.
    """

    utf8: np.ndarray
    lengths: np.ndarray


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Remote:
    """What a function makes of images and captions; see `Function`."""

    name: str = dataclasses.field(metadata={"static": True})
    function: Function = dataclasses.field(metadata={"static": True})

    differentiable = False

    def prepare(self, captions: Sequence[str]) -> Texts:
        """See `rewards.reward.Reward`."""
        encoded = [caption.encode() for caption in captions]
        length = -(-max(map(len, encoded), default=1) // TEXT_BLOCK) * TEXT_BLOCK
        rows = [np.frombuffer(text.ljust(length, b"\0"), np.uint8) for text in encoded]
        return Texts(np.array(rows, np.uint8).reshape(-1, length), np.array([len(text) for text in encoded], np.int32))

    def view(self, images: Pixels) -> Pixels:
        """The images as they are."""
        return images

    def score(self, view: Pixels, prepared: Texts) -> PerImage:
        """See `rewards.reward.Reward`."""
        scores = jax.ShapeDtypeStruct(view.shape[:1], jnp.float32)
        return jax.pure_callback(self._call, scores, view, prepared.utf8, prepared.lengths)

    def _call(self, images: jax.Array, utf8: jax.Array, lengths: jax.Array) -> np.ndarray:
        rows = zip(np.asarray(utf8), np.asarray(lengths), strict=True)
        return self.ask(np.asarray(images, np.float32), [row[:length].tobytes().decode() for row, length in rows])

    def ask(self, images: np.ndarray, captions: list[str]) -> np.ndarray:
        """Scores outside of jitted code, float32 `[B]`; arguments as of a `Function`.

        Raises:
            RemoteError: the function has failed, or has not given one number for each image; one line.
        """
        try:
            scores = np.asarray(self.function(images, captions))
        except Exception as error:  # whatever it is, JAX passes on its text only
            raise RemoteError(f"{self.name}: {' '.join(f'{type(error).__name__}: {error}'.split())}") from error
        if scores.shape != (len(captions),) or scores.dtype.kind not in "iuf":
            raise RemoteError(
                f"{self.name}: returned {scores.dtype} {list(scores.shape)} for {len(captions)} images; expected one "
                "number for each"
            )
        with np.errstate(over="ignore"):  # infinite then, as no score can be
            return scores.astype(np.float32)


class Answer:
    """What a function returns that runs in a thread of its own; `get` waits, and so does `numpy.asarray`.

    A thread that nobody waits for any more does not keep the program from ending.
    """

    def __init__(self, function: Callable[[], Any]):
        """Begins at once."""
        self._found: Any = None
        self._error: BaseException | None = None
        # The function is no attribute, so that what it holds is free as soon as it has returned.
        self._thread = threading.Thread(target=self._run, args=(function,), daemon=True)
        self._thread.start()

    def _run(self, function: Callable[[], Any]) -> None:
        try:
            self._found = function()
        except BaseException as error:
            self._error = error

    def get(self) -> Any:
        """Waits for the result; raises what the function has raised."""
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self._found

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """See `get`."""
        return np.asarray(self.get(), dtype)


@dataclasses.dataclass(frozen=True)
class Service:
    """A `Function` that asks an HTTP service.

    The request is a POST of the JSON object `{"prompts": [text, ...], "images": [PNG in base64, ...]}`, and the answer
    `{"scores": [number, ...]}` of at most `LARGEST_ANSWER` bytes; null stands for an image that cannot be scored, and
    becomes NaN. Many images travel in several requests at the same time. A request that is lost on the way, too slow,
    or answered with 429 or 500 to 599, is asked again, and no other: after 1, 2, 4 ... seconds, or later if the answer
    has a Retry-After. Redirects are refused.
    """

    url: str
    timeout: float = 60.0
    """Seconds until the whole answer must be there."""
    retries: int = 3
    """How often to ask again."""
    request_images: int = 8
    """Most images of a request."""
    connections: int = 8
    """Most requests at the same time, of all calls."""
    patience: float = 600.0
    """Seconds of waiting for a service that says when to ask again, before that counts as one of the retries."""

    def __call__(self, images: np.ndarray, captions: list[str]) -> np.ndarray:
        """See `Function`.

        Raises:
            ConnectionError: there is no answer, or one that tells of an error.
            ValueError: the answer is not as described.
        """
        starts = range(0, len(captions), self.request_images)
        answers: list[np.ndarray | Exception] = [np.zeros(0)] * len(starts)
        left, failed = iter(enumerate(starts)), threading.Event()  # `next` of an iterator is one step for threads

        def ask() -> None:
            for place, start in left:
                own = slice(start, start + self.request_images)
                with self._free:
                    if failed.is_set():
                        return
                    try:
                        answers[place] = self._scores(images[own], captions[own], failed)
                    except Exception as error:
                        answers[place] = error
                        failed.set()

        others = [threading.Thread(target=ask, daemon=True) for _ in range(min(self.connections, len(starts)) - 1)]
        for thread in others:
            thread.start()
        ask()
        for thread in others:
            thread.join()
        for answer in answers:
            if isinstance(answer, Exception):
                raise answer
        return np.concatenate([np.zeros(0), *cast(list[np.ndarray], answers)])

    @functools.cached_property
    def _free(self) -> threading.BoundedSemaphore:
        return threading.BoundedSemaphore(self.connections)

    def _scores(self, images: np.ndarray, captions: list[str], failed: threading.Event) -> np.ndarray:
        """Scores of one request; asks no more where another one has failed."""
        body = json.dumps({"prompts": captions, "images": [_png(image) for image in images]}).encode()
        answer = self._ask(body, failed)
        if len(answer) > LARGEST_ANSWER:
            raise ValueError(f"{self.url}: answered with more than {LARGEST_ANSWER:,} bytes; expected scores only")
        try:
            scores = json.loads(answer)["scores"]
            if not isinstance(scores, list) or not all(type(score) in (int, float, type(None)) for score in scores):
                raise TypeError("not a list of numbers")
            scores = np.array([np.nan if score is None else float(score) for score in scores], np.float64)
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
            raise ValueError(
                f'{self.url}: answered {answer[:80]!r}; expected {{"scores": [one number for each of {len(captions)} '
                "images]}"
            ) from error
        if len(scores) != len(captions):
            raise ValueError(f"{self.url}: answered with {len(scores)} scores for {len(captions)} images")
        return scores

    def _ask(self, body: bytes, failed: threading.Event) -> bytes:
        """The answer, of which no more than `LARGEST_ANSWER` bytes and one are read."""
        asked, failures, waited = 0, 0, 0.0
        while True:
            asked, wished = asked + 1, None
            try:
                return self._ask_once(body)
            except urllib.error.HTTPError as error:
                error.close()
                reason = f"answered {error.code} {error.reason}{getattr(error, 'told', '')}"
                if 300 <= error.code < 400:
                    reason += f", a redirect to {error.headers.get('Location')}, which is not followed"
                if error.code != 429 and error.code < 500:
                    break
                wished = error.headers.get("Retry-After", "")
            except (OSError, http.client.HTTPException) as error:
                reason = str(getattr(error, "reason", error)) or type(error).__name__
            told_when = wished is not None and re.fullmatch(r"[0-9]{1,9}", wished) is not None
            failures += not (told_when and waited < self.patience)
            if failures > self.retries or failed.is_set():
                break
            wait = 2.0 ** min(asked - 1, 5)
            if told_when:
                wait = max(wait, min(float(cast(str, wished)), self.timeout))
            waited += wait
            time.sleep(wait)
        raise ConnectionError(
            f"{self.url}: {reason}, asked {asked} times; is the service running, and is this its address?"
        )

    def _ask_once(self, body: bytes) -> bytes:
        """Asks in a thread, for the time-out of a socket begins again with every byte; a late answer is dropped."""
        request = urllib.request.Request(self.url, body, {"Content-Type": "application/json"})
        answers: queue.SimpleQueue[bytes | Exception] = queue.SimpleQueue()

        def ask() -> None:
            try:
                with _OPENER.open(request, timeout=self.timeout) as response:
                    content = response.read(LARGEST_ANSWER + 1)
                    if len(content) <= LARGEST_ANSWER and response.length:  # the connection was cut
                        raise http.client.IncompleteRead(content, response.length)
                    answers.put(content)
            except Exception as error:
                if isinstance(error, urllib.error.HTTPError):
                    cast(Any, error).told = _told(error)
                answers.put(error)

        threading.Thread(target=ask, daemon=True).start()
        try:
            answer = answers.get(timeout=self.timeout)
        except queue.Empty:
            raise TimeoutError(f"timed out, no whole answer in {self.timeout:g} s") from None
        if isinstance(answer, Exception):
            raise answer
        return answer


def _told(error: urllib.error.HTTPError) -> str:
    """What a service tells of an error, `{"error": text}`, in brackets and cut; nothing where it tells nothing."""
    length = error.headers.get("Content-Length", "")
    if error.headers.get_content_type() != "application/json" or not re.fullmatch(r"[0-9]{1,4}", length):
        return ""
    try:
        text = json.loads(error.read(int(length)))["error"]
        line = "".join(filter(str.isprintable, " ".join(text.split())))
    except (OSError, http.client.HTTPException, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return ""
    return f" ({line[:300]})"


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows none, so that images go to the address that the user has given and nowhere else."""

    def redirect_request(self, *_: Any, **__: Any) -> None:
        return None


_OPENER = urllib.request.build_opener(_Redirects)


def _png(image: np.ndarray) -> str:
    file = io.BytesIO()
    Image.fromarray(np.round(255 * np.clip(image, 0, 1)).astype(np.uint8)).save(file, "PNG", compress_level=1)
    return base64.b64encode(file.getvalue()).decode()


def is_service(path: str | None) -> bool:
    """Whether a reward's path is an address, or names a Python function."""
    return path is not None and path.startswith((PYTHON, *HTTP))


def load_remote(name: str, path: str, *, timeout: float = 60.0, retries: int = 3) -> Remote:
    """The reward at an address, `http://HOST:PORT/...`, or of a function, `python:MODULE:FUNCTION`.

    Args:
        name: for logs and columns.
        path: see above.
        timeout: of an address, in seconds.
        retries: of an address.

    Raises:
        ValueError: a function cannot be imported.
    """
    if path.startswith(HTTP):
        return Remote(name, Service(path, timeout, retries))
    module, _, attribute = path.removeprefix(PYTHON).partition(":")
    try:
        function: Any = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"{path}: cannot be imported ({error}); expected python:MODULE:FUNCTION, with the module in PYTHONPATH"
        ) from error
    if not callable(function):
        raise ValueError(f"{path}: is not a function; expected python:MODULE:FUNCTION")
    return Remote(name, cast(Function, function))
