"""Batches over requests: images of several requests are scored together, and every request gets its own scores."""

import collections
import math
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

from PIL import Image


class Scorer(Protocol):
    """Scores images for their prompts; more is better."""

    name: str
    packages: tuple[str, ...]
    """Distributions whose versions `/version` tells."""

    def __call__(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Sequence[float | None]:
        """One number for each RGB image; None for an image that cannot be scored."""
        ...


class QueueFullError(Exception):
    """So many images wait already that no more are taken."""


class ScorerError(Exception):
    """The scorer fails, whatever the image."""


class Request:
    """Images of one request, whose scores come in parts."""

    def __init__(self, count: int):
        self.scores: list[float | None] = [None] * count
        self.left, self.error, self.abandoned = count, "", False
        self.done = threading.Event()


class Item(NamedTuple):
    """An image that waits, and where its score belongs."""

    image: Image.Image
    prompt: str
    request: Request
    place: int


# What tells a broken scorer from a broken image.
PROBE = Image.new("RGB", (64, 64), (128, 128, 128)), "a grey square"


class Batcher:
    """One thread that scores; others put images in its queue and wait.

    A batch that fails is scored image by image. An image that fails alone has no score. If all fail, the scorer is
    asked for a grey square: where that fails too, the scorer is broken and the requests fail.
    """

    def __init__(self, scorer: Scorer, *, batch_size: int, wait: float, queue_size: int):
        """Nothing runs before `start`.

        Args:
            scorer: is called from one thread only.
            batch_size: most images that are scored together.
            wait: seconds that the first image of a batch waits for others.
            queue_size: most images that wait.
        """
        self.scorer, self.batch_size, self.wait, self.queue_size = scorer, batch_size, wait, queue_size
        self.scored, self.look_every = 0, 0.5  # seconds between looks whether somebody waits
        self._items: collections.deque[Item] = collections.deque()
        self._changed, self._closing = threading.Condition(), False
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> None:
        """Asks the scorer for one image, so that the first request need not wait for what it loads late, and begins.

        Raises:
            ScorerError: it fails.
        """
        try:
            self._scores_of([PROBE])
        except Exception as error:
            raise ScorerError(one_line(error)) from error
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Images in the queue."""
        return len(self._items)

    @property
    def alive(self) -> bool:
        """Whether it takes requests."""
        return self._thread.is_alive() and not self._closing

    def score(
        self, images: Sequence[Image.Image], prompts: Sequence[str], *, gone: Callable[[], bool] = lambda: False
    ) -> list[float | None]:
        """Scores in the order of the images.

        Args:
            images: at most `queue_size`.
            prompts: one for each.
            gone: asked now and then; true where nobody waits for the scores any more.

        Raises:
            QueueFullError: there is no room in the queue.
            ScorerError: the scorer is broken, or stops.
        """
        request = Request(len(images))
        with self._changed:
            if self._closing:
                raise ScorerError("the server stops")
            if len(self._items) + len(images) > self.queue_size:
                raise QueueFullError(f"{len(self._items)} images wait of at most {self.queue_size}")
            pairs = zip(images, prompts, strict=True)
            self._items.extend(Item(image, prompt, request, place) for place, (image, prompt) in enumerate(pairs))
            self._changed.notify_all()
        while request.left and not request.done.wait(self.look_every):
            if gone():
                request.abandoned = True
                break
        if request.error:
            raise ScorerError(request.error)
        return request.scores

    def close(self, grace: float) -> None:
        """Takes no more requests, and answers those that wait for up to `grace` seconds."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        if self._thread.is_alive():
            self._thread.join(grace)

    def _run(self) -> None:
        while batch := self._take():
            self._answer(batch)

    def _take(self) -> list[Item]:
        """The next batch; empty at the end."""
        batch: list[Item] = []
        with self._changed:
            while not batch:
                while not self._items:
                    if self._closing:
                        return []
                    self._changed.wait()
                end = time.monotonic() + self.wait
                while len(self._items) < self.batch_size and not self._closing and (left := end - time.monotonic()) > 0:
                    self._changed.wait(left)
                while self._items and len(batch) < self.batch_size:
                    item = self._items.popleft()
                    if not item.request.abandoned:
                        batch.append(item)
        return batch

    def _answer(self, batch: list[Item]) -> None:
        scores: list[float | None] = [None] * len(batch)
        reason = ""
        try:
            scores = self._scores_of([(item.image, item.prompt) for item in batch])
        except Exception as error:
            reason = one_line(error)
            print(f"{self.scorer.name}: a batch of {len(batch)} failed: {reason}", file=sys.stderr, flush=True)
            scores, failed = self._one_by_one(batch)
            if failed < len(batch) or self._works():
                reason = ""
        self.scored += len(batch)
        for item, score in zip(batch, scores, strict=True):
            request = item.request
            request.scores[item.place] = score
            request.error = request.error or reason
            request.left -= 1
            if not request.left or request.error:
                request.abandoned |= bool(request.error)
                request.done.set()

    def _one_by_one(self, batch: list[Item]) -> tuple[list[float | None], int]:
        """Scores, and how many images failed."""
        scores, failed = [], 0
        for item in batch:
            try:
                scores += self._scores_of([(item.image, item.prompt)])
            except Exception:
                scores, failed = [*scores, None], failed + 1
        return scores, failed

    def _works(self) -> bool:
        try:
            self._scores_of([PROBE])
        except Exception:
            return False
        return True

    def _scores_of(self, pairs: Sequence[tuple[Image.Image, str]]) -> list[float | None]:
        images, prompts = zip(*pairs, strict=True)
        scores = [None if score is None else float(score) for score in self.scorer(list(images), list(prompts))]
        if len(scores) != len(pairs):
            raise ValueError(f"{len(scores)} scores for {len(pairs)} images")
        return [score if score is not None and math.isfinite(score) else None for score in scores]


def one_line(error: BaseException) -> str:
    """An error in one line of at most 300 characters."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
