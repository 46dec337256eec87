"""Scores of finished image folders (`evaluation.runs`): the table of them, and rewards on a mesh of devices.

The table is the file `scores.parquet` beside the images: the columns of the manifest, a column `score:NAME` for each
reward, `answers:NAME` for each benchmark, `features:NAME` for the features of each network, `distance:NAME` for
distances between the images of a prompt, and `problem`. It is rewritten whole every now and then while images are being
scored, null standing for what is not scored yet, so it is also what a program that was killed resumes from.
"""

import collections
import contextlib
import dataclasses
import io
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from etils import epath
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from flax_pref.config import UserError
from flax_pref.evaluation.runs import (
    ANSWERS,
    DISTANCE,
    FEATURES,
    PROBLEM,
    SCORE,
    SCORES,
    ImageFile,
    ImageRun,
    read_image,
)
from flax_pref.files import one_writer, remedy, replacing
from flax_pref.images.image_set import MANIFEST_SCHEMA, read_table
from flax_pref.parallel.pieces import piece_specs, put_in_pieces, with_gathered
from flax_pref.programs import title
from flax_pref.rewards.features import Distance, Features
from flax_pref.rewards.remote import Answer, Remote, Service, remote_errors
from flax_pref.rewards.reward import Reward, scores_of

SAVE_EVERY = 30.0  # seconds
SAVE_SHARE = 0.05  # most of the time that goes into saving

# ----------------------------------------------------------------------------------------------------------------------
# The table of scores


@dataclasses.dataclass
class _Column:
    """Scores or lists of answers `[N]`, features `[N, D]` or distances `[P]`, which are known, and what they are of."""

    of: Mapping[str, Any]
    known: np.ndarray
    values: np.ndarray


class Scores:
    """The table of scores of a run.

    A score belongs to the bytes of an image and to its prompt: an image that was drawn again is scored again.

    What is scored is called a unit: an image, or for distances a pair of images of one prompt.

    Attributes:
        folder: of the run.
        captions: N texts.
        images: where each of the N images is.
        pairs: P pairs of images of one prompt, the later one first; sorted.
        problems: N times "", "missing", "changed" or "unreadable".
        file: of the table.
    """

    def __init__(self, run: ImageRun):
        """Reads what is there already.

        Raises:
            UserError: the file of scores is damaged, or of another program.
        """
        self.folder, self.file, self._rows = run.folder, run.folder / SCORES, run.rows
        self.captions: list[str] = run.rows["prompt"].to_pylist()
        self.images = [ImageFile(*row) for row in _tuples(run.rows, ImageFile._fields)]
        self.pairs = _pairs(run.rows)
        self.problems = np.full(len(self.images), "", object)
        self._columns: dict[str, _Column] = {}
        self._stored, self._saved, self._took = b"", time.monotonic(), 0.0
        with contextlib.suppress(FileNotFoundError):
            self._stored = self.file.read_bytes()
        if self._stored:
            self._recall()

    def of(self, column: str) -> Mapping[str, Any] | None:
        """What a column holds scores of, None where there is no such column; see `begin`."""
        return self._columns[column].of if column in self._columns else None

    def units(self, column: str) -> list[tuple[int, ...]]:
        """The images of each unit of a column: one, or two of one prompt."""
        return self.pairs if column.startswith(DISTANCE) else [(i,) for i in range(len(self.images))]

    def pending(self, column: str, of: Mapping[str, Any]) -> np.ndarray:
        """Indices of units that have no score of this, and no problem: int64 `[M]`; arguments as for `begin`."""
        units = self.units(column)
        known = self._columns[column].known if self.of(column) == of else np.zeros(len(units), bool)
        sound = np.array([not any(self.problems[i] for i in unit) for unit in units], bool)
        return np.flatnonzero(~known & sound)

    def begin(self, column: str, of: Mapping[str, Any]) -> None:
        """Makes a column, unless it is there; scores of something else under its name are gone then.

        Args:
            column: "score:NAME", "answers:NAME", "features:NAME" or "distance:NAME".
            of: what its values depend on besides image and prompt, e.g. the hash of the reward's weights: values that
                JSON can hold.
        """
        if self.of(column) != of:
            shape = (0,) if column.startswith(FEATURES) else ()
            count, dtype = len(self.units(column)), object if column.startswith(ANSWERS) else np.float32
            self._columns[column] = _Column(dict(of), np.zeros(count, bool), np.zeros((count, *shape), dtype))

    def look_again(self) -> None:
        """Reads the images that had a problem, or never a size: some may be there again."""
        again = [i for i, image in enumerate(self.images) if self.problems[i] or not image.width]
        with ThreadPoolExecutor(16) as pool:
            read = pool.map(lambda i: read_image(self.folder, self.images[i]), again)
            for i, found in zip(again, read, strict=True):
                self.problems[i] = found if isinstance(found, str) else ""

    def put(self, column: str, indices: Sequence[int], values: np.ndarray) -> None:
        """Takes scores or distances `[M]`, or features `[M, D]`, of M units."""
        there = self._columns[column]
        if there.values.shape[1:] != values.shape[1:]:
            there.values = np.zeros((len(there.known), *values.shape[1:]), there.values.dtype)
        there.values[indices] = values
        there.known[indices] = True

    def put_answers(self, column: str, index: int, answers: Sequence[float]) -> None:
        """Takes the answers about an image; see `evaluation.benchmarks`."""
        self._columns[column].values[index] = list(answers)
        self._columns[column].known[index] = True

    def answers(self, column: str) -> list[list[float] | None]:
        """The answers about each image; None: they are not known."""
        there = self._columns.get(column)
        if there is None:
            return [None] * len(self.images)
        return [values if known else None for values, known in zip(there.values, there.known, strict=True)]

    def scores(self, column: str) -> np.ndarray:
        """The scores or distances that are known, NaN and infinite ones too, float32 `[M]`; features `[M, D]`."""
        there = self._columns.get(column)
        return np.zeros(0, np.float32) if there is None else there.values[there.known]

    def save(self) -> None:
        """Writes the table, if it differs from the file: under its name there is the old one or the new one.

        Raises:
            UserError: it cannot be written.
        """
        begun = time.monotonic()
        file = io.BytesIO()
        pq.write_table(self._table(), file, write_page_checksum=True)
        content = file.getvalue()
        if content != self._stored:
            try:
                _write(self.file, content)
            except OSError as error:
                raise UserError(
                    f"{self.file}: {error.strerror or error}; {remedy(error)}, then run the same command again"
                ) from error
            self._stored = content
        self._saved = time.monotonic()
        self._took = self._saved - begun

    def save_at_times(self) -> None:
        """`save`, if the last time was long enough ago."""
        if time.monotonic() - self._saved > max(SAVE_EVERY, self._took / SAVE_SHARE):
            self.save()

    def _table(self) -> pa.Table:
        table = self._rows.select(MANIFEST_SCHEMA.names)
        described: dict[str, Any] = {"rewards": {}, "features": {}, "distances": {}}
        problems = pa.array(self.problems, pa.string())
        late = {}
        for name, column in self._columns.items():
            if name.startswith(ANSWERS):
                described.setdefault("answers", {})[name.removeprefix(ANSWERS)] = column.of
                table = table.append_column(name, pa.array(self.answers(name), pa.list_(pa.float64())))
            elif name.startswith(SCORE):
                described["rewards"][name.removeprefix(SCORE)] = column.of
                table = table.append_column(name, pa.array(column.values, mask=~column.known))
            elif name.startswith(FEATURES) and column.known.any():
                described["features"][name.removeprefix(FEATURES)] = column.of
                flat = pa.array(np.where(column.known[:, None], column.values, 0).ravel())
                late[name] = pa.FixedSizeListArray.from_arrays(
                    flat, column.values.shape[1], mask=pa.array(~column.known)
                )
            elif name.startswith(DISTANCE):
                described["distances"][name.removeprefix(DISTANCE)] = column.of
                counts = np.bincount([later for later, _ in self.pairs], minlength=len(self.images))
                offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
                late[name] = pa.ListArray.from_arrays(offsets, pa.array(column.values, mask=~column.known))
        table = table.append_column(PROBLEM, problems)
        for name, values in late.items():
            table = table.append_column(name, values)
        return table.replace_schema_metadata({"flax_pref": json.dumps(described)})

    def _recall(self) -> None:
        """Takes over from the file what is known of images that are the same."""
        try:
            table = read_table(self._stored)
            described = json.loads((table.schema.metadata or {})[b"flax_pref"])
            stored = {key: i for i, key in enumerate(_keys(table))}
            where = np.array([stored.get(key, -1) for key in _keys(self._rows)], np.int64)
            same = where >= 0
            problems = [problem or "" for problem in table[PROBLEM].to_pylist()]
            self.problems[same] = np.array(problems, object)[where[same]]
            for name, of in described.get("answers", {}).items():
                values = table[ANSWERS + name].to_pylist()
                known = np.array([at >= 0 and values[at] is not None for at in where])
                taken = np.empty(len(where), object)
                for i in np.flatnonzero(known):
                    taken[i] = [float(value) for value in values[where[i]]]
                self._columns[ANSWERS + name] = _Column(of, known, taken)
            for name, of in described["rewards"].items():
                self._columns[SCORE + name] = _taken(of, table[SCORE + name].cast(pa.float32()), same, where)
            for name, of in described.get("features", {}).items():
                self._columns[FEATURES + name] = _taken(of, table[FEATURES + name], same, where)
            if distances := described.get("distances", {}):
                pairs = {pair: i for i, pair in enumerate(_pairs(table))}
                stored_pairs = [(int(where[later]), int(where[earlier])) for later, earlier in self.pairs]
                places = np.array([pairs.get(pair, pairs.get(pair[::-1], -1)) for pair in stored_pairs], np.int64)
                for name, of in distances.items():
                    flat = pa.chunked_array([table[DISTANCE + name].combine_chunks().flatten()])
                    if len(flat) != len(pairs):
                        raise ValueError(f"{len(flat)} distances of {len(pairs)} pairs")
                    self._columns[DISTANCE + name] = _taken(of, flat.cast(pa.float32()), places >= 0, places)
        except (pa.ArrowException, OSError, LookupError, ValueError, TypeError, AttributeError) as error:
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise UserError(
                f"{self.file}: damaged, or not written by {title('score')} ({reason}): remove it to score all images "
                "again"
            ) from error


def _pairs(rows: pa.Table) -> list[tuple[int, ...]]:
    """The pairs of rows of one prompt, the later row first, sorted."""
    before: dict[tuple, list[int]] = collections.defaultdict(list)
    pairs = []
    for row, prompt in enumerate(_tuples(rows, ("prompt_id", "prompt"))):
        pairs += [(row, earlier) for earlier in before[prompt]]
        before[prompt].append(row)
    return pairs


def _taken(of: Mapping[str, Any], column: pa.ChunkedArray, same: np.ndarray, where: np.ndarray) -> _Column:
    """A stored column for the units here, of which those that are the `same` as stored ones are there, at `where`."""
    values = column.combine_chunks()
    valid = values.is_valid().to_numpy(zero_copy_only=False)
    there = values.drop_null()
    if pa.types.is_fixed_size_list(column.type):
        flat = there.flatten().cast(pa.float32()).to_numpy().reshape(valid.sum(), column.type.list_size)
    else:
        flat = there.to_numpy()
    known = same & valid[where] if len(valid) else np.zeros(len(where), bool)
    places = np.cumsum(valid) - 1  # of units among those that are valid
    taken = np.zeros((len(where), *flat.shape[1:]), np.float32)
    taken[known] = flat[places[where[known]]]
    return _Column(of, known, taken)


@contextlib.contextmanager
def locked(folder: epath.Path) -> Iterator[None]:
    """Keeps other programs from scoring a local folder at the same time, of whose scores one's would be lost.

    Raises:
        UserError: another program writes into it.
    """
    with one_writer(folder):
        if not _is_remote(folder):
            for left in Path(folder).glob(f".{SCORES}.*"):  # by programs that were killed
                left.unlink(missing_ok=True)
        yield


# ----------------------------------------------------------------------------------------------------------------------
# Scoring


class Batch(NamedTuple):
    """Images that are scored together, and whether all have the same size."""

    indices: list[int]
    same_size: bool


class Scorer:
    """A network on the devices of a mesh, each of which scores its part of a batch.

    The axes "fsdp" and "tensor" also divide the weights, see `parallel.pieces`; scores are the same to the last bit.

    A `Reward` gives scores, `Features` vectors, and a `Distance` a number for each pair of images.

    A service needs no devices: it is asked from the host, for several batches at the same time.

    Attributes:
        batch_size: images of a batch, of all devices.
        ahead: batches that may be begun before the scores of the first are taken.
        fixed: whether batches always have the same images, also those that need no score: a network's last bit may
            depend on the others.
    """

    def __init__(self, reward: Reward | Features | Distance, mesh: Mesh, *, batch_size: int, column: str = SCORE):
        """Puts the weights on the devices.

        Args:
            reward: scores images.
            mesh: all of its axes divide the batch. Of several CPU devices a reward that is not differentiable uses one.
            batch_size: images, or pairs of them, that a device scores at the same time.
            column: that it computes; its beginning says what is asked of `reward`, see `Scores.begin`.

        Raises:
            ValueError: features are asked of a reward that has none.
        """
        if column.startswith(FEATURES) and not hasattr(reward, "image_features"):
            raise ValueError(f"{reward.name}: has no image features; expected a CLIP, e.g. clip or pickscore")
        self._kind = next(kind for kind in (SCORE, FEATURES, DISTANCE) if column.startswith(kind))
        if not getattr(reward, "differentiable", True) and mesh.size > 1 and mesh.devices.flat[0].platform == "cpu":
            # Such rewards call the host; from as many CPU devices as there are threads, JAX would wait for itself.
            mesh = Mesh(mesh.devices.flatten()[:1], ("data",))
        divided = PartitionSpec(mesh.axis_names)
        self.batch_size, self.ahead, self.fixed = batch_size * mesh.size, 1, True
        self._service: Remote | None = None
        if isinstance(reward, Remote) and isinstance(reward.function, Service):
            self._service, service, self.fixed = reward, reward.function, False
            self.ahead = 1 + -(-service.connections * service.request_images // self.batch_size)
        self._divided = NamedSharding(mesh, divided)
        self._reward, specs = put_in_pieces(reward, mesh), piece_specs(reward, mesh)

        def images_as_seen(reward, pixels):
            return reward.view(pixels.astype(jnp.float32) / 255)

        def scorer(reward, view, prepared):
            # On TPUs and GPUs what is called float32 would be multiplied in fewer bits.
            with jax.default_matmul_precision("highest"):
                if self._kind == FEATURES:
                    return reward.image_features(view).astype(jnp.float32)
                if self._kind == DISTANCE:
                    return reward.distance(view).astype(jnp.float32)
                return scores_of(reward, view, prepared)

        def on_each_device(function, arguments):
            def local(pieces, *arrays):
                return with_gathered(function, pieces, specs, *arrays)

            local.__name__ = function.__name__  # for those who wait for it to be compiled
            # By hand and not by the compiler: a reward may call the host, which the compiler would have one device do.
            in_specs = (specs, *[divided] * arguments)
            return jax.jit(jax.shard_map(local, mesh=mesh, in_specs=in_specs, out_specs=divided, check_vma=False))

        self._view_one = jax.jit(images_as_seen)
        self._view, self._score = on_each_device(images_as_seen, 1), on_each_device(scorer, 2)

    def check_captions(self, captions: Iterable[str]) -> None:
        """Raises a ValueError that names the first caption which the reward does not take."""
        for caption in dict.fromkeys(captions) if self._kind == SCORE else ():
            try:
                self._reward.prepare([caption])
            except ValueError as error:
                raise ValueError(f"prompt {caption[:80]!r}: {error}") from error

    def seen_as(self, size: tuple[int, int]) -> tuple[jax.ShapeDtypeStruct, ...]:
        """What the network sees of an image of this height and width; images that it sees alike can share a batch."""
        images = (2,) if self._kind == DISTANCE else ()
        pixels = jax.ShapeDtypeStruct((1, *images, *size, 3), jnp.uint8)
        return tuple(jax.tree.leaves(jax.eval_shape(self._view_one, self._reward, pixels)))

    def batches(self, sizes: Sequence[tuple[int, int]]) -> list[Batch]:
        """All images in batches, which depend on nothing but sizes: so does the last bit of a score.

        Images of different sizes can share a batch if the network sees them in one size; those of the same size are put
        side by side.

        Args:
            sizes: height and width of N images; those without any are left out.
        """
        seen = {size: self.seen_as(size) for size in dict.fromkeys(sizes) if all(size)}
        groups = collections.defaultdict(list)
        for index in sorted(range(len(sizes)), key=sizes.__getitem__):
            if sizes[index] in seen:
                groups[seen[sizes[index]]].append(index)
        batches = [
            group[start : start + self.batch_size]
            for group in groups.values()
            for start in range(0, len(group), self.batch_size)
        ]
        return [Batch(indices, len({sizes[i] for i in indices}) == 1) for indices in batches]

    def __call__(self, images: Sequence[np.ndarray], captions: Sequence[str], *, same_size: bool) -> jax.Array | Answer:
        """Begins to score up to `batch_size` units; `numpy.asarray` of what it returns waits.

        Returns:
            float32 `[batch_size]`, or of a service `[images]`; or features, `[batch_size, D]`.

        Args:
            images: uint8 `[H, W, 3]` each, pairs `[2, H, W, 3]`; the first stands for those that a full batch lacks.
            captions: one for each image.
            same_size: whether all images have the same size.
        """
        if (service := self._service) is not None:  # it sees images as they are, so all have the same size
            return Answer(lambda: service.ask(np.stack(images).astype(np.float32) / 255, list(captions)))
        lacking = self.batch_size - len(images)
        images, captions = [*images, *[images[0]] * lacking], [*captions, *[captions[0]] * lacking]
        prepared = self._reward.prepare(captions) if self._kind == SCORE else ()
        if same_size:
            view = self._view(self._reward, jax.device_put(np.stack(images), self._divided))
        else:
            views = [self._view_one(self._reward, image[None]) for image in images]
            view = jax.tree.map(lambda *parts: jnp.concatenate(parts), *views)
        return self._score(self._reward, view, prepared)


def score_images(
    scorer: Scorer,
    scores: Scores,
    column: str,
    of: Mapping[str, Any],
    *,
    stop: Callable[[], bool] = lambda: False,
    done: Callable[[int], object] = lambda count: None,
) -> None:
    """Scores the pending units of a run, and saves the table at times and at the end, however that comes.

    Images are read and decoded in threads while devices compute.

    Args:
        scorer: of the column.
        scores: to be completed.
        column: as for `scores.begin`.
        of: as for `scores.begin`.
        stop: asked after every batch.
        done: called with the number of units of a batch, those with problems too.

    Raises:
        UserError: the reward does not take a prompt, two images to compare have different sizes, or the reward has
            failed; names run, reward and reason in one line.
    """
    pending, units, name = set(scores.pending(column, of).tolist()), scores.units(column), column.partition(":")[2]
    try:
        scorer.check_captions(scores.captions[units[i][0]] for i in sorted(pending))
        sizes = [_size_of(scores, unit, i in pending) for i, unit in enumerate(units)]
    except ValueError as error:
        raise UserError(f"{scores.folder}: {name}: {error}") from error
    scores.begin(column, of)
    try:
        with (
            reward_errors(scores.folder, name),
            remote_errors(),
            ThreadPoolExecutor(min(32, os.cpu_count() or 1)) as pool,
        ):
            batches = scorer.batches(sizes)
            batches = [batch for batch in batches if not pending.isdisjoint(batch.indices)]

            def read(index):
                return pool.submit(_read_unit, scores, units[index]) if index in pending else None

            computing: collections.deque[_Computing] = collections.deque()
            try:
                for batch, images in _ahead(batches, lambda batch: [read(i) for i in batch.indices], 2):
                    computing.append(_score_batch(scorer, scores, units, batch, images))
                    if len(computing) > scorer.ahead:
                        _keep(scores, column, computing.popleft(), done)
                    if stop():
                        break
            finally:  # after an error too: what was begun is kept
                _keep_all(scores, column, computing, done)
    finally:
        scores.save()


def _size_of(scores: Scores, unit: tuple[int, ...], wanted: bool) -> tuple[int, int]:
    """Height and width of the images of a unit; 0 and 0 where they differ and nothing is wanted of it."""
    sizes = {(scores.images[i].height, scores.images[i].width) for i in unit}
    if len(sizes) == 1:
        return sizes.pop()
    if wanted:
        told = " and ".join(
            f"{scores.images[i].file} has {scores.images[i].width} x {scores.images[i].height}" for i in unit
        )
        raise ValueError(
            f"{told} pixels; expected images of one size for each prompt: leave it out, or draw them again"
        )
    return 0, 0


class _Lacking(NamedTuple):
    """An image that cannot be read, and why."""

    image: int
    problem: str


def _read_unit(scores: Scores, unit: tuple[int, ...]) -> np.ndarray | _Lacking:
    """An image `[H, W, 3]`, or two `[2, H, W, 3]`."""
    images = []
    for i in unit:
        found = read_image(scores.folder, scores.images[i])
        if isinstance(found, str):
            return _Lacking(i, found)
        images.append(found)
    return images[0] if len(images) == 1 else np.stack(images)


class _Computing(NamedTuple):
    """A batch on the devices: which units, at which places of the batch, and the scores to come."""

    indices: list[int]
    places: list[int]
    values: jax.Array | Answer | None
    read: int


def _score_batch(
    scorer: Scorer, scores: Scores, units: Sequence[tuple[int, ...]], batch: Batch, reads: Sequence[Future | None]
) -> _Computing:
    """Begins to score a batch; where it is fixed, another unit stands for each that is not to be scored."""
    images: dict[int, np.ndarray] = {}
    for place, future in enumerate(reads):
        found = None if future is None else future.result()
        if isinstance(found, _Lacking):
            scores.problems[found.image] = found.problem
        elif found is not None:
            images[place] = found
    count = sum(future is not None for future in reads)
    if not images:
        return _Computing([], [], None, count)
    if not scorer.fixed:
        captions = [scores.captions[batch.indices[place]] for place in images]
        values = scorer(list(images.values()), captions, same_size=batch.same_size)
        return _Computing([batch.indices[place] for place in images], list(range(len(images))), values, count)
    first = next(iter(images))
    places = [place if place in images else first for place in range(len(batch.indices))]
    captions = [scores.captions[units[batch.indices[place]][0]] for place in places]
    values = scorer([images[place] for place in places], captions, same_size=batch.same_size)
    return _Computing([batch.indices[place] for place in images], list(images), values, count)


def _keep(scores: Scores, column: str, computing: _Computing, done: Callable[[int], object]) -> None:
    """Waits for a batch."""
    if computing.values is not None:
        scores.put(column, computing.indices, np.asarray(computing.values)[computing.places])
    done(computing.read)
    scores.save_at_times()


def _keep_all(scores: Scores, column: str, computing: Iterable[_Computing], done: Callable[[int], object]) -> None:
    """Waits for batches, and raises the first error at the end: the scores of the others are kept."""
    errors = []
    for batch in computing:
        try:
            _keep(scores, column, batch, done)
        except Exception as error:
            errors.append(error)
    if errors:
        raise errors[0]


def _ahead(items: Iterable, begin: Callable, most: int) -> Iterator[tuple[Any, Any]]:
    """Each item with what `begin` makes of it, which is called for so many more before."""
    begun = collections.deque()
    for item in items:
        begun.append((item, begin(item)))
        if len(begun) > most:
            yield begun.popleft()
    yield from begun


@contextlib.contextmanager
def reward_errors(folder: os.PathLike, name: str) -> Iterator[None]:
    """Makes whatever a reward raises while it scores a folder a line for the user."""
    try:
        yield
    except Exception as error:
        # What JAX tells of an error in a callback ends with that error; other messages begin with what matters.
        lines = str(error).strip().splitlines() or [""]
        reason = lines[-1 if "Traceback" in str(error) else 0].strip().removeprefix(f"{name}: ")
        kind = "" if isinstance(error, (UserError, ValueError)) else f"{type(error).__name__}: "
        advice = "take a smaller --batch-size" if "RESOURCE_EXHAUSTED" in reason else "the same command resumes there"
        raise UserError(f"{folder}: {name}: {kind}{reason}; what is scored is kept, {advice}") from error


# ----------------------------------------------------------------------------------------------------------------------
# Files


def _is_remote(folder: epath.Path) -> bool:
    return "://" in os.fspath(folder)


def _write(file: epath.Path, content: bytes) -> None:
    if _is_remote(file):  # an object appears when it is whole
        file.write_bytes(content)
        return
    with replacing(os.fspath(file)) as unfinished, unfinished.open("wb") as out:
        out.write(content)
        out.flush()
        os.fsync(out.fileno())


def _tuples(table: pa.Table, names: Sequence[str]) -> Iterator[tuple]:
    return zip(*(table[name].to_pylist() for name in names), strict=True)


def _keys(table: pa.Table) -> list[tuple]:
    """What a score belongs to, besides the reward; seed and prompt's id tell equal images apart."""
    return list(_tuples(table, ("prompt_id", "seed", "prompt", "sha256")))
