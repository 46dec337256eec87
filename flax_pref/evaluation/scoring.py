"""Scores of finished image folders (`evaluation.runs`): the table of them, and rewards on a mesh of devices.

The table is the file `scores.parquet` beside the images: the columns of the manifest, a column `score:NAME` for each
reward, `answers:NAME` for each benchmark, `problem`, and perhaps `embedding`. It is rewritten whole every now and then
while images are being scored, null standing for what is not scored yet, so it is also what a program that was killed
resumes from.
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
from flax_pref.evaluation.runs import ANSWERS, EMBEDDING, PROBLEM, SCORE, SCORES, ImageFile, ImageRun, read_image
from flax_pref.files import one_writer, remedy, replacing
from flax_pref.images.image_set import MANIFEST_SCHEMA, read_table
from flax_pref.programs import title
from flax_pref.rewards.remote import Answer, Remote, Service, remote_errors
from flax_pref.rewards.reward import Reward, scores_of

SAVE_EVERY = 30.0  # seconds
SAVE_SHARE = 0.05  # most of the time that goes into saving

# ----------------------------------------------------------------------------------------------------------------------
# The table of scores


@dataclasses.dataclass
class _Column:
    """Scores `[N]`, embeddings `[N, D]` or lists of answers `[N]`; which of them are known, and what they are of."""

    of: Mapping[str, Any]
    known: np.ndarray
    values: np.ndarray


class Scores:
    """The table of scores of a run.

    A score belongs to the bytes of an image and to its prompt: an image that was drawn again is scored again.

    Attributes:
        folder: of the run.
        captions: N texts.
        images: where each of the N images is.
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

    def pending(self, column: str, of: Mapping[str, Any]) -> np.ndarray:
        """Indices of images that have no score of this, and no problem: int64 `[M]`; arguments as for `begin`."""
        known = self._columns[column].known if self.of(column) == of else np.zeros(len(self.images), bool)
        return np.flatnonzero(~known & (self.problems == ""))

    def begin(self, column: str, of: Mapping[str, Any]) -> None:
        """Makes a column, unless it is there; scores of something else under its name are gone then.

        Args:
            column: "score:NAME", "answers:NAME" or "embedding".
            of: what its values depend on besides image and prompt, e.g. the hash of the reward's weights: values that
                JSON can hold; that of "embedding" has a "name".
        """
        if self.of(column) != of:
            shape, dtype = ((0,), np.float16) if column == EMBEDDING else ((), np.float32)
            dtype = object if column.startswith(ANSWERS) else dtype
            count = len(self.images)
            self._columns[column] = _Column(dict(of), np.zeros(count, bool), np.zeros((count, *shape), dtype))

    def look_again(self) -> None:
        """Reads the images that had a problem, or never a size: some may be there again."""
        again = [i for i, image in enumerate(self.images) if self.problems[i] or not image.width]
        with ThreadPoolExecutor(16) as pool:
            read = pool.map(lambda i: read_image(self.folder, self.images[i]), again)
            for i, found in zip(again, read, strict=True):
                self.problems[i] = found if isinstance(found, str) else ""

    def put(self, column: str, indices: Sequence[int], values: np.ndarray) -> None:
        """Takes scores `[M]`, or embeddings `[M, D]`, of M images."""
        there = self._columns[column]
        if there.values.shape[1:] != values.shape[1:]:
            there.values = np.zeros((len(self.images), *values.shape[1:]), there.values.dtype)
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
        """The scores that are known, NaN and infinite ones too, float32 `[M]`."""
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
        described: dict[str, Any] = {"rewards": {}, "embedding": None}
        for name, column in self._columns.items():
            if name.startswith(ANSWERS):
                described.setdefault("answers", {})[name.removeprefix(ANSWERS)] = column.of
                table = table.append_column(name, pa.array(self.answers(name), pa.list_(pa.float64())))
            elif name != EMBEDDING:
                described["rewards"][name.removeprefix(SCORE)] = column.of
                table = table.append_column(name, pa.array(column.values, mask=~column.known))
        table = table.append_column(PROBLEM, pa.array(self.problems, pa.string()))
        embedding = self._columns.get(EMBEDDING)
        if embedding is not None and embedding.known.any():
            described |= {"embedding": embedding.of["name"], "embedding_of": embedding.of}
            flat = pa.array(np.where(embedding.known[:, None], embedding.values, 0).ravel())
            vectors = pa.FixedSizeListArray.from_arrays(
                flat, embedding.values.shape[1], mask=pa.array(~embedding.known)
            )
            table = table.append_column(EMBEDDING, vectors)
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
            columns = {SCORE + name: of for name, of in described["rewards"].items()}
            for name, of in described.get("answers", {}).items():
                values = table[ANSWERS + name].to_pylist()
                known = np.array([at >= 0 and values[at] is not None for at in where])
                taken = np.empty(len(where), object)
                for i in np.flatnonzero(known):
                    taken[i] = [float(value) for value in values[where[i]]]
                self._columns[ANSWERS + name] = _Column(of, known, taken)
            if described["embedding"] is not None:
                columns[EMBEDDING] = described["embedding_of"]
            for name, of in columns.items():
                column = table[name] if name == EMBEDDING else table[name].cast(pa.float32())
                column = column.combine_chunks()
                valid = column.is_valid().to_numpy(zero_copy_only=False)
                known = same & valid[where]
                flat = (column.drop_null().flatten() if name == EMBEDDING else column.drop_null()).to_numpy()
                values = flat.reshape(valid.sum(), -1) if name == EMBEDDING else flat
                places = np.cumsum(valid) - 1  # of rows among those that are valid
                taken = np.zeros((len(where), *values.shape[1:]), values.dtype)
                taken[known] = values[places[where[known]]]
                self._columns[name] = _Column(of, known, taken)
        except (pa.ArrowException, OSError, LookupError, ValueError, TypeError, AttributeError) as error:
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise UserError(
                f"{self.file}: damaged, or not written by {title('score')} ({reason}): remove it to score all images "
                "again"
            ) from error


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
    """A reward on the devices of a mesh, each of which has its weights and scores its part of a batch.

    A service needs no devices: it is asked from the host, for several batches at the same time.

    Attributes:
        batch_size: images of a batch, of all devices.
        ahead: batches that may be begun before the scores of the first are taken.
        fixed: whether batches always have the same images, also those that need no score: a network's last bit may
            depend on the others.
    """

    def __init__(self, reward: Reward, mesh: Mesh, *, batch_size: int, embedding: bool = False):
        """Puts the weights on the devices.

        Args:
            reward: scores images.
            mesh: all of its axes divide the batch. Of several CPU devices a reward that is not differentiable uses one.
            batch_size: images that a device scores at the same time.
            embedding: give the reward's image embeddings and not its scores.

        Raises:
            ValueError: embeddings are asked of a reward that has none.
        """
        if embedding and not hasattr(reward, "image_features"):
            raise ValueError(f"{reward.name}: has no image embeddings; expected a CLIP, e.g. clip or pickscore")
        if not reward.differentiable and mesh.size > 1 and mesh.devices.flat[0].platform == "cpu":
            # Such rewards call the host; from as many CPU devices as there are threads, JAX would wait for itself.
            mesh = Mesh(mesh.devices.flatten()[:1], ("data",))
        whole, divided = PartitionSpec(), PartitionSpec(mesh.axis_names)
        self.batch_size, self.ahead, self.fixed = batch_size * mesh.size, 1, True
        self._service: Remote | None = None
        if isinstance(reward, Remote) and isinstance(reward.function, Service):
            self._service, service, self.fixed = reward, reward.function, False
            self.ahead = 1 + -(-service.connections * service.request_images // self.batch_size)
        self._divided = NamedSharding(mesh, divided)
        self._reward = jax.device_put(reward, NamedSharding(mesh, whole))

        def view(reward, pixels):
            return reward.view(pixels.astype(jnp.float32) / 255)

        def score(reward, view, prepared):
            # On TPUs and GPUs what is called float32 would be multiplied in fewer bits.
            with jax.default_matmul_precision("highest"):
                return (
                    reward.image_features(view).astype(jnp.float16) if embedding else scores_of(reward, view, prepared)
                )

        def on_each_device(function, arguments):
            # By hand and not by the compiler: a reward may call the host, which the compiler would have one device do.
            specs = (whole, *[divided] * arguments)
            return jax.jit(jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=divided, check_vma=False))

        self._view_one = jax.jit(view)
        self._view, self._score = on_each_device(view, 1), on_each_device(score, 2)

    def check_captions(self, captions: Iterable[str]) -> None:
        """Raises a ValueError that names the first caption which the reward does not take."""
        for caption in dict.fromkeys(captions):
            try:
                self._reward.prepare([caption])
            except ValueError as error:
                raise ValueError(f"prompt {caption[:80]!r}: {error}") from error

    def seen_as(self, size: tuple[int, int]) -> tuple[jax.ShapeDtypeStruct, ...]:
        """What the network sees of an image of this height and width; images that it sees alike can share a batch."""
        pixels = jax.ShapeDtypeStruct((1, *size, 3), jnp.uint8)
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
        """Begins to score up to `batch_size` images; `numpy.asarray` of what it returns waits.

        Returns:
            float32 `[batch_size]`, or of a service `[images]`; or embeddings, float16 `[batch_size, D]`.

        Args:
            images: uint8 `[H, W, 3]` each; the first stands for those that a full batch lacks.
            captions: one for each image.
            same_size: whether all images have the same size.
        """
        if (service := self._service) is not None:  # it sees images as they are, so all have the same size
            return Answer(lambda: service.ask(np.stack(images).astype(np.float32) / 255, list(captions)))
        lacking = self.batch_size - len(images)
        images, captions = [*images, *[images[0]] * lacking], [*captions, *[captions[0]] * lacking]
        prepared = self._reward.prepare(captions)
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
    """Scores the pending images of a run, and saves the table at times and at the end, however that comes.

    Images are read and decoded in threads while devices compute.

    Args:
        scorer: of the column.
        scores: to be completed.
        column: as for `scores.begin`.
        of: as for `scores.begin`.
        stop: asked after every batch.
        done: called with the number of images of a batch, those with problems too.

    Raises:
        UserError: the reward does not take a prompt, or has failed; names run, reward and reason in one line.
    """
    pending = set(scores.pending(column, of).tolist())
    try:
        scorer.check_captions(scores.captions[i] for i in sorted(pending))
    except ValueError as error:
        raise UserError(f"{scores.folder}: {column.removeprefix(SCORE)}: {error}") from error
    scores.begin(column, of)
    try:
        with (
            reward_errors(scores.folder, column.removeprefix(SCORE)),
            remote_errors(),
            ThreadPoolExecutor(min(32, os.cpu_count() or 1)) as pool,
        ):
            batches = scorer.batches([(image.height, image.width) for image in scores.images])
            batches = [batch for batch in batches if not pending.isdisjoint(batch.indices)]

            def read(index):
                return pool.submit(read_image, scores.folder, scores.images[index]) if index in pending else None

            computing: collections.deque[_Computing] = collections.deque()
            try:
                for batch, images in _ahead(batches, lambda batch: [read(i) for i in batch.indices], 2):
                    computing.append(_score_batch(scorer, scores, batch, images))
                    if len(computing) > scorer.ahead:
                        _keep(scores, column, computing.popleft(), done)
                    if stop():
                        break
            finally:  # after an error too: what was begun is kept
                _keep_all(scores, column, computing, done)
    finally:
        scores.save()


class _Computing(NamedTuple):
    """A batch on the devices: which images, at which places of the batch, and the scores to come."""

    indices: list[int]
    places: list[int]
    values: jax.Array | Answer | None
    read: int


def _score_batch(scorer: Scorer, scores: Scores, batch: Batch, reads: Sequence[Future | None]) -> _Computing:
    """Begins to score a batch; where it is fixed, another image stands for each that is not to be scored."""
    images: dict[int, np.ndarray] = {}
    for place, (index, future) in enumerate(zip(batch.indices, reads, strict=True)):
        found = None if future is None else future.result()
        if isinstance(found, str):
            scores.problems[index] = found
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
    captions = [scores.captions[batch.indices[place]] for place in places]
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
