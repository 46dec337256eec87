"""Scores the pairs of a prepared set with rewards: once, into the set, from the images that it was encoded from.

A prepared set keeps no images, so they are read from its source, once for all rewards of a call. The program works
shard by shard of the set: `.scores` gets a file for each finished shard and reward, so a kill loses a shard at most.
When all are there, they become `scores/NAME.parquet`, see `data.pair_scores`. A file belongs to the reward's identity
and to the set: other weights under the same name are scored again.
"""

import collections
import contextlib
import dataclasses
import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from tqdm import tqdm

from flax_pref.config import UserError
from flax_pref.data.consensus import told_agreement, told_counts
from flax_pref.data.encode import digests, image_digest, in_order
from flax_pref.data.images import decode_image
from flax_pref.data.pair_scores import (
    SCORES,
    PairScores,
    read_scores,
    scored_rewards,
    scores_file,
    scores_of_set,
    write_scores,
)
from flax_pref.data.pairs import Drop, PreferencePair, pairs
from flax_pref.data.preparation import SETTINGS, noted_images
from flax_pref.data.prepared import CAPTIONS, PAIRS, PreparedSet
from flax_pref.data.selection import Choice, select
from flax_pref.data.sources import Source, open_source
from flax_pref.evaluation.scoring import Scorer, reward_errors
from flax_pref.files import difference, one_writer
from flax_pref.parallel.agreement import Content, agree, flat
from flax_pref.parallel.hosts import wait_for_others
from flax_pref.parallel.signals import PREEMPTED
from flax_pref.rewards.remote import Answer, remote_errors

PARTS = ".scores"
AHEAD = 16  # pairs that threads decode before they are scored

Rewards = Mapping[str, Mapping[str, Any]]  # by name: what the scores depend on besides images and captions


def is_prepared_set(folder: str | os.PathLike) -> bool:
    """Whether a folder holds a prepared set, perhaps one that is not finished."""
    folder = Path(folder)
    begun = (folder / SETTINGS).is_file() and any((folder / name).is_dir() for name in (PAIRS, CAPTIONS))
    return begun or (folder / PAIRS / "metadata.json").is_file()


def score_set(
    folder: str | Path,
    rewards: Rewards,
    load: Callable[[str], Scorer],
    *,
    source: str | None = None,
    process: int = 0,
    processes: int = 1,
    stop: Callable[[], bool] = lambda: False,
) -> dict[str, np.ndarray]:
    """Scores the pairs of a prepared set that are not scored yet, and prints how often rewards agree with the labels.

    Args:
        folder: of the prepared set.
        rewards: what the scores of each depend on, by name; see `run_scoring.identity`.
        load: makes the scorer of a reward; called for those that have something to score.
        source: path of the preference set that the pairs were encoded from; None: as the set's settings have it.
        process: number of this process, which scores every `processes`-th shard.
        processes: how many processes score the set.
        stop: asked between pairs; if it is true, what is not scored yet is left to the next call.

    Returns:
        scores by reward, float32 `[N, 2]`, of winner and loser of each pair; nothing if scoring was stopped.

    Raises:
        UserError, ValueError, OSError: the set, its source or a reward cannot be read, the source has changed, or the
            set cannot be written.
        SystemExit: with `PREEMPTED`, if one of several processes was stopped.
    """
    records = PreparedSet(folder)
    agree(lambda: flat({"set": Content(records.folder, records.fingerprint)}))
    with one_writer(records.folder) if process == 0 else contextlib.nullcontext():
        work = _Work(records, rewards, process, processes)
        if not work.missing:
            print(f"{records.folder}: all pairs are scored; nothing to do")
            if process == 0:
                work.remove_parts()  # if a kill has left them
        elif not _score(work, load, source, stop):
            if processes > 1:
                raise SystemExit(PREEMPTED)
            print(f"{records.folder}: stopped with {work.left():,} pairs left; the same command resumes there")
            return {}
    found = {name: scores_of_set(records, name) for name in rewards}
    if process == 0:
        print("\n".join(_summary(records, found)))
    return found


def _score(work: "_Work", load: Callable[[str], Scorer], path: str | None, stop: Callable[[], bool]) -> bool:
    """Scores what is missing; whether all of it was."""
    source = _SourceImages(work.records, path)
    if work.process == 0:
        work.remove_leftovers()
        work.tell_of_others()
    wait_for_others("leftovers are removed")
    lacking = {shard: names for shard in work.shards if (names := work.lacking(shard))}
    columns = {}
    for name in [name for name in work.missing if any(name in names for names in lacking.values())]:
        columns[name] = _Column(load(name), work.records.folder, name)
        columns[name].check_captions(source.captions)
    total = sum(work.lengths[shard] for shard in lacking)
    with tqdm(total=total, desc=f"{work.records.folder.name}: {', '.join(columns)}", unit="pair") as progress:
        for shard, names in lacking.items():
            if not _score_shard(work, shard, source, {name: columns[name] for name in names}, progress, stop):
                return False
    wait_for_others("all shards are scored")
    if work.process == 0:
        work.merge()
    wait_for_others("the scores are there")
    return True


def _score_shard(
    work: "_Work",
    shard: int,
    source: "_SourceImages",
    columns: "Mapping[str, _Column]",
    progress: tqdm,
    stop: Callable[[], bool],
) -> bool:
    """Scores a shard with some rewards; whether it was not stopped."""
    rows, images, folder = [], [], work.records.folder

    def read():
        for pair in pairs(source.reader, source.rows(shard)):
            images.append(image_digest(pair))
            yield pair

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for decoded in in_order(pool, source.decode, read(), AHEAD):
            if stop():
                return False
            if isinstance(decoded, Drop):
                continue
            for column in columns.values():
                for place, image in enumerate((decoded.winner, decoded.loser)):
                    column.add(2 * len(rows) + place, image, decoded.caption)
            rows.append(decoded.row)
            progress.update()
    if images != (noted_images(folder, shard) or images):
        raise _changed(folder, f"images of shard {shard}")
    if len(rows) != work.lengths[shard]:
        raise _changed(folder, f"images of shard {shard}: {len(rows)} of {work.lengths[shard]} pairs can be read")
    for name, column in columns.items():
        values = column.take(2 * len(rows)).reshape(-1, 2)
        scores = PairScores(work.rewards[name], work.records.fingerprint, np.array(rows, np.int64), values, images)
        write_scores(work.part(name, shard), scores)
    return True


# ----------------------------------------------------------------------------------------------------------------------
# The files


class _Work:
    """What of a set is to be scored with which rewards.

    Attributes:
        records: the set.
        rewards: see `Rewards`.
        process: number of this process.
        lengths: number of pairs in each shard.
        shards: those of this process.
        missing: names of the rewards that have not scored all of the set.
    """

    def __init__(self, records: PreparedSet, rewards: Rewards, process: int, processes: int):
        self.records, self.rewards, self.process = records, rewards, process
        self.lengths = records.shard_lengths
        self.shards = range(len(self.lengths))[process::processes]
        self.missing = [name for name in rewards if not self._is_there(scores_file(records.folder, name), name)]

    def part(self, name: str, shard: int) -> Path:
        """The file of a finished shard."""
        return self.records.folder / PARTS / f"{name}-{shard:05d}.parquet"

    def lacking(self, shard: int) -> list[str]:
        """Names of the rewards that have not scored a shard."""
        return [name for name in self.missing if not self._is_there(self.part(name, shard), name)]

    def left(self) -> int:
        """Number of pairs of this process that a reward has not scored."""
        return sum(self.lengths[shard] for shard in self.shards if self.lacking(shard))

    def _is_there(self, file: Path, name: str) -> bool:
        with contextlib.suppress(FileNotFoundError, ValueError):  # a damaged file is written again
            scores = read_scores(file)
            return scores.fingerprint == self.records.fingerprint and scores.of == self.rewards[name]
        return False

    def tell_of_others(self) -> None:
        """Prints which rewards have scores of something else, which are replaced."""
        for name in self.missing:
            with contextlib.suppress(FileNotFoundError, ValueError):
                before = read_scores(scores_file(self.records.folder, name))
                was = difference(before.of, self.rewards[name]) or "of another set"
                print(f"{self.records.folder}: {name} is computed again: was {was}")

    def remove_leftovers(self) -> None:
        """Removes files that a kill has left unfinished."""
        for name in (PARTS, SCORES):
            for file in (self.records.folder / name).glob(".*"):
                file.unlink()

    def merge(self) -> None:
        """Makes one file of the parts of each reward.

        Raises:
            UserError: the images were not those that the set was encoded from.
        """
        folder, shards = self.records.folder, range(len(self.lengths))
        for name in self.missing:
            parts = [read_scores(self.part(name, shard)) for shard in shards]
            read = hashlib.sha256("".join(digest for part in parts for digest in part.images).encode()).hexdigest()
            if read != self.records.metadata.get("images_sha256", read):
                for shard in shards:
                    self.part(name, shard).unlink()
                raise _changed(folder, "images")
            rows, values = (np.concatenate(arrays) for arrays in zip(*((p.rows, p.values) for p in parts), strict=True))
            scores = PairScores(self.rewards[name], self.records.fingerprint, rows, values)
            write_scores(scores_file(folder, name), scores)
        self.remove_parts()

    def remove_parts(self) -> None:
        """Removes the files of shards of rewards that have scored all of the set."""
        folder = self.records.folder / PARTS
        for name in self.rewards:
            for part in folder.glob(f"{name}-[0-9][0-9][0-9][0-9][0-9].parquet"):
                part.unlink()
        with contextlib.suppress(OSError):  # it is not there, or holds parts of other rewards
            folder.rmdir()


# ----------------------------------------------------------------------------------------------------------------------
# The images


class _DecodedPair(NamedTuple):
    row: int
    caption: str
    winner: np.ndarray
    loser: np.ndarray


class _SourceImages:
    """The images that a prepared set was encoded from, shard by shard.

    Attributes:
        reader: of the source.
        captions: of all pairs, each once.
    """

    def __init__(self, records: PreparedSet, path: str | None):
        """Reads what the rows of the source say.

        Raises:
            UserError: the source is not there, or another one than it was.
        """
        folder, settings = records.folder, records.metadata["settings"]
        try:
            source, choice = Source.from_settings(settings["source"]), settings["choice"]
            choice = Choice(**{**choice, "models": tuple(choice["models"])})
            self._shard_size, self._smallest_side = settings["shard_size"], settings["smallest_side"]
            known = settings["source_sha256"]
        except (LookupError, TypeError) as error:
            raise UserError(
                f"{folder}: its settings do not say what it was encoded from; encode the set again to score it"
            ) from error
        source = dataclasses.replace(source, path=path or source.path)
        try:
            self.reader = open_source(source)
        except FileNotFoundError as error:
            raise UserError(
                f"{folder}: the images that it was encoded from are not there ({error}); give their path with --source"
            ) from error
        selection = select(self.reader, choice)
        if changed := [name for name, sha256 in digests(selection).items() if sha256 != known.get(name)]:
            raise _changed(folder, ", ".join(changed))
        self.captions, self._rows = selection.captions, selection.rows

    def rows(self, shard: int) -> list[int]:
        """Rows of the source that a shard was made of, those without images too."""
        ends = shard * self._shard_size, (shard + 1) * self._shard_size
        return self._rows[slice(*np.searchsorted(self._rows, ends))].tolist()

    def decode(self, pair: PreferencePair | Drop) -> _DecodedPair | Drop:
        """Both images as the encoder decodes them, uint8 `[H, W, 3]`, before it resizes them."""
        if isinstance(pair, Drop):
            return pair
        decoded = [decode_image(data, smallest_side=self._smallest_side) for data in (pair.winner, pair.loser)]
        for image in decoded:
            if isinstance(image, Drop):
                return image
        return _DecodedPair(pair.row, pair.caption, *map(np.asarray, decoded))


def _changed(folder: Path, what: str) -> UserError:
    return UserError(
        f"{folder}: the source has changed since the set was encoded (other {what}): restore it, give its path with "
        "--source, or encode the set again"
    )


# ----------------------------------------------------------------------------------------------------------------------
# The scores


class _Column:
    """Scores images by a reward as they come, in batches of images that its network sees in one size.

    Which images share a batch depends on nothing but the shard: so does the last bit of a score.
    """

    def __init__(self, scorer: Scorer, folder: Path, name: str):
        self._scorer, self._folder, self._name = scorer, folder, name
        self._seen: dict[tuple[int, int], tuple] = {}
        self._waiting: dict[tuple, list[tuple[int, np.ndarray, str]]] = collections.defaultdict(list)
        self._computing: collections.deque[tuple[list[int], jax.Array | Answer]] = collections.deque()
        self._scores: dict[int, float] = {}

    def check_captions(self, captions: Sequence[str]) -> None:
        """That the reward takes all captions."""
        try:
            self._scorer.check_captions(captions)
        except ValueError as error:
            raise UserError(f"{self._folder}: {self._name}: {error}") from error

    def add(self, place: int, image: np.ndarray, caption: str) -> None:
        """Takes an image, uint8 `[H, W, 3]`, under a number of its own."""
        size = image.shape[:2]
        if size not in self._seen:
            with self._errors():
                self._seen[size] = self._scorer.seen_as(size)
        waiting = self._waiting[self._seen[size]]
        waiting.append((place, image, caption))
        if len(waiting) == self._scorer.batch_size:
            self._begin(self._seen[size])

    def take(self, count: int) -> np.ndarray:
        """The scores of images 0 to count - 1, float32 `[count]`, which are forgotten then."""
        for seen in list(self._waiting):
            self._begin(seen)
        while self._computing:
            self._keep()
        scores, self._scores = self._scores, {}
        return np.array([scores[place] for place in range(count)], np.float32)

    def _begin(self, seen: tuple) -> None:
        """Begins a batch, while those before it are computed, and takes the first of them if there are many."""
        places, images, captions = map(list, zip(*self._waiting.pop(seen), strict=True))
        with self._errors():
            same_size = len({image.shape for image in images}) == 1
            values = self._scorer(images, captions, same_size=same_size)
        self._computing.append((places, values))
        if len(self._computing) > self._scorer.ahead:
            self._keep()

    def _keep(self) -> None:
        places, values = self._computing.popleft()
        with self._errors():
            self._scores |= dict(zip(places, np.asarray(values).tolist(), strict=False))

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        with reward_errors(self._folder, self._name), remote_errors():
            yield


def _summary(records: PreparedSet, found: Mapping[str, np.ndarray]) -> list[str]:
    """How often each reward agrees with the labels, and how many pairs so many rewards agree on."""
    folder, every = records.folder, dict(found)
    for name in scored_rewards(folder):
        with contextlib.suppress(UserError, ValueError):  # of another set, or damaged
            every.setdefault(name, scores_of_set(records, name))
    lines = [f"{folder}: {len(records):,} pairs, scores in {folder / SCORES}"]
    lines += [f"  {name} agrees with the label on {told_agreement(values)}" for name, values in found.items()]
    if len(every) > 1:
        names = sorted(every)
        lines.append(f"  of {', '.join(names)} agree with the label: {told_counts([every[name] for name in names])}")
    return lines
