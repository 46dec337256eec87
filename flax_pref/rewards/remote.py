"""Rewards that live elsewhere: a Python function, or a service behind an HTTP address, e.g. one with HPSv3.

Images go to it from the host, while devices wait; there are no gradients.
"""

import base64
import contextlib
import dataclasses
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
        captions = [row[:length].tobytes().decode() for row, length in rows]
        try:
            scores = np.asarray(self.function(np.asarray(images, np.float32), captions))
        except Exception as error:  # whatever it is, JAX passes on its text only
            raise RemoteError(f"{self.name}: {' '.join(f'{type(error).__name__}: {error}'.split())}") from error
        if scores.shape != (len(captions),) or scores.dtype.kind not in "iuf":
            raise RemoteError(
                f"{self.name}: returned {scores.dtype} {list(scores.shape)} for {len(captions)} images; expected one "
                "number for each"
            )
        with np.errstate(over="ignore"):  # infinite then, as no score can be
            return scores.astype(np.float32)


@dataclasses.dataclass(frozen=True)
class Service:
    """A `Function` that asks an HTTP service.

    The request is a POST of the JSON object `{"prompts": [text, ...], "images": [PNG in base64, ...]}`, and the answer
    `{"scores": [number, ...]}` of at most `LARGEST_ANSWER` bytes; null stands for an image that cannot be scored, and
    becomes NaN. What is lost on the way, too slow, or answered with 429 or 500 to 599, is asked again, after 1, 2, 4
    ... seconds. Redirects are refused.
    """

    url: str
    timeout: float = 60.0
    """Seconds until the whole answer must be there."""
    retries: int = 3
    """How often to ask again."""

    def __call__(self, images: np.ndarray, captions: list[str]) -> np.ndarray:
        """See `Function`.

        Raises:
            ConnectionError: there is no answer, or one that tells of an error.
            ValueError: the answer is not as described.
        """
        body = json.dumps({"prompts": captions, "images": [_png(image) for image in images]}).encode()
        answer = self._ask(body)
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

    def _ask(self, body: bytes) -> bytes:
        """The answer, of which no more than `LARGEST_ANSWER` bytes and one are read."""
        attempt, reason = 0, ""
        for attempt in range(self.retries + 1):
            if attempt:
                time.sleep(2 ** (attempt - 1))
            try:
                return self._ask_once(body)
            except urllib.error.HTTPError as error:
                error.close()
                reason = f"answered {error.code} {error.reason}"
                if 300 <= error.code < 400:
                    reason += f", a redirect to {error.headers.get('Location')}, which is not followed"
                if error.code != 429 and error.code < 500:
                    break
            except (OSError, http.client.HTTPException) as error:
                reason = str(getattr(error, "reason", error)) or type(error).__name__
        raise ConnectionError(
            f"{self.url}: {reason}, asked {attempt + 1} times; is the service running, and is this its address?"
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
                answers.put(error)

        threading.Thread(target=ask, daemon=True).start()
        try:
            answer = answers.get(timeout=self.timeout)
        except queue.Empty:
            raise TimeoutError(f"timed out, no whole answer in {self.timeout:g} s") from None
        if isinstance(answer, Exception):
            raise answer
        return answer


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
