"""The input of training: batches of encoded pairs on the devices, in an order that is a function of a number.

The pairs of all steps stand in one endless line: epoch after epoch, each shuffled again by the seed. Step s takes the
places from s B to s B + B - 1 of it, B the batch size of all hosts together, and what chance decides about a pair is a
function of the seed and its place. So the global batches do not depend on hosts, threads, workers or restarts, and
where the input stands is one number: going on from there replays nothing.

Where pairs have several sizes, those of each size stand in a line of their own. The sizes take turns in proportion to
their pairs (`buckets.turns`), and a size that comes for the n-th time (n from 0 up) gives the places from n B to
n B + B - 1 of its line. So a batch is of one size, and what an epoch leaves over of a size begins the next batch of it:
nothing is left out, for each epoch of a line has every pair of its size once.
"""

import dataclasses
import sys
import weakref
from collections.abc import Mapping
from typing import Any

import absl.flags
import grain
import jax
import numpy as np

from flax_pref.data.buckets import Numbers, Size, turns
from flax_pref.data.prepared import EMPTY, Records
from flax_pref.diffusion.conditioning import size_ids


@dataclasses.dataclass(frozen=True, kw_only=True)
class InputConfig:
    """How pairs become batches.

    Example:
        >>> config = fp.InputConfig(batch_size=32, caption_dropout=0.2)
    """

    batch_size: int
    """Pairs in a batch, those of all hosts together."""
    caption_dropout: float = 0.0
    """Share of pairs that lose their caption, drawn at every step; `Encoding.dropped_caption` says what is left."""
    flip: bool = False
    """Mirror both images of every second pair, drawn again at every step; needs a set encoded with mirror images."""
    threads: int = 2
    """Threads that read, each a batch at a time; so many batches are ahead in the host's memory. The reader of
    ArrayRecord files holds Python's lock, so that more threads do not read faster; workers do."""
    prefetch: int = 2
    """Batches that wait on the devices."""
    workers: int = 0
    """Processes that read, each with its own threads; 0: threads of this process alone, which suffice unless they slow
    down the thread that trains, as a slow disk may."""

    def __post_init__(self):
        least = {"batch_size": 1, "threads": 1, "prefetch": 1, "workers": 0}
        for name, smallest in least.items():
            if getattr(self, name) < smallest:
                raise ValueError(f"input: {name} is {getattr(self, name)}; expected at least {smallest}")
        if not 0 <= self.caption_dropout <= 1:
            raise ValueError(f"input: caption_dropout is {self.caption_dropout}; expected a share, 0 to 1")


# ----------------------------------------------------------------------------------------------------------------------
# Order and chance


def host_batches(records: Records, config: InputConfig, *, seed: int, rows: np.ndarray) -> grain.MapDataset:
    """The part of every global batch that one host reads: `host_batches(...)[step]`, the same in every call.

    Args:
        records: to be read.
        config: of the batches.
        seed: 0 .. 2^32 - 1, of order and chance.
        rows: ascending, of the global batch, 0 .. batch_size - 1; of R rows.

    Returns:
        for each step what `PairBatches` yields, as arrays of numpy with R instead of B rows.

    Raises:
        ValueError: there are no records, or none with mirror images though `config.flip`, or the seed is out of range.
    """
    if not len(records):
        raise ValueError("input: the set has no pairs; expected at least one: encode it again")
    if config.flip and records.shapes.moments[0] != 2:
        raise ValueError("input: flip needs a set with mirror images; encode it again with them, or set flip to False")
    if not 0 <= seed < 2**32:
        raise ValueError(f"input: seed is {seed}; expected 0 to 2^32 - 1")
    order = _Order(records.buckets(), config.batch_size, seed)
    return grain.MapDataset.source(order).map_with_index(_Reader(records, config, seed, rows))


class _Order:
    """The size of each step and the numbers of its pairs, as a source of grain."""

    def __init__(self, buckets: Mapping[Size, Numbers], batch_size: int, seed: int):
        self._buckets = list(buckets.items())
        self._lines = [_line(len(pairs), batch_size, _seed_of(seed, size, buckets)) for size, pairs in self._buckets]
        self._turns, self._before = turns([len(pairs) for _, pairs in self._buckets])
        self._in_a_round = np.bincount(self._turns).tolist()

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, index: int) -> tuple[Size, list[int]]:
        rounds, at = divmod(int(index), len(self._turns))
        bucket = int(self._turns[at])
        size, pairs = self._buckets[bucket]
        places = self._lines[bucket][rounds * self._in_a_round[bucket] + int(self._before[at])]
        return size, [int(pairs[place]) for place in places]


def _line(count: int, batch_size: int, seed: int) -> grain.MapDataset:
    """Batches of the endless line of `count` pairs."""
    # An epoch's order is drawn from a number that grows by one per epoch; `seed` makes those of other seeds far apart.
    return grain.MapDataset.range(count).seed(seed).shuffle().repeat().batch(batch_size)


def _seed_of(seed: int, size: Size, buckets: Mapping[Size, Any]) -> int:
    """The seed of a size's line: the run's own if there is one size, else one that no other size has."""
    return seed if len(buckets) == 1 else int(np.random.SeedSequence((seed, *size)).generate_state(1)[0])


@dataclasses.dataclass(frozen=True)
class _Reader:
    """Reads some rows of a batch; see `host_batches`. It is sent to other processes."""

    records: Records
    config: InputConfig
    seed: int
    rows: np.ndarray

    def __call__(self, step: int, chosen: tuple[Size, list[int]]) -> dict[str, Any]:
        size, numbers = chosen
        chance = _chance(self.seed, step, self.config.batch_size)
        dropped = chance[:, 0] < self.config.caption_dropout
        flipped = (chance[:, 1] < 0.5) & self.config.flip
        examples = [self._example(numbers[i], size, bool(dropped[i]), int(flipped[i])) for i in self.rows]
        return jax.tree.map(lambda *leaves: np.stack(leaves), *examples)

    def _example(self, number: int, size: Size, dropped: bool, mirrored: int) -> dict[str, Any]:
        pair = self.records.pair(number)
        original, crop = np.split(pair["sizes"][mirrored], 2, axis=1)  # a mirror image has a crop of its own
        return {
            "winner": pair["winner"][mirrored],
            "loser": pair["loser"][mirrored],
            "text": self.records.conditioning(EMPTY if dropped else int(pair["caption"])),
            "time_ids": size_ids(original, crop, size),
            "row": np.array(int(pair["row"]), np.int32),
        }


def _chance(seed: int, step: int, batch_size: int) -> np.ndarray:
    """Uniform numbers `[B, 4]`, a function of the seed and the place in the line of pairs.

    Philox turns a counter into four numbers (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011); here
    the counter is the place.
    """
    return np.random.Generator(np.random.Philox(key=seed, counter=step * batch_size)).random((batch_size, 4))


# ----------------------------------------------------------------------------------------------------------------------
# Batches on the devices


class PairBatches:
    """Endless iterator over global batches on the devices; also a context manager, which stops threads and workers.

    A batch is a dict of arrays: `winner` and `loser` bfloat16 `[B, h, w, 2 Z]`, moments of the latents of one size, see
    `draw_latents`; `text`, a dict of bfloat16 arrays `[B, ...]`, what the UNet is told of the caption; `time_ids`
    float32 `[B, 2, 6]`, what SDXL's UNet is told of the sizes of winner and loser; `row` int32 `[B]`, the pair's row in
    the set that was encoded.

    Example:
        >>> records = fp.PreparedSet("runs/prepared")
        >>> with fp.PairBatches(records, fp.InputConfig(batch_size=2), seed=0) as batches:
        ...     batch = next(batches)
        >>> batch["winner"].shape
        (2, 8, 8, 8)
    """

    def __init__(
        self, records: Records, config: InputConfig, *, seed: int, sharding: jax.sharding.Sharding | None = None
    ):
        """Begins at step 0; nothing is read before the first batch is asked for.

        Args:
            records: to be read; with workers they are pickled.
            config: of the batches.
            seed: 0 .. 2^32 - 1, of order and chance.
            sharding: of the leading axis of every array; this process reads the rows that its devices hold. None: all
                of the batch is on this process's first device.

        Raises:
            ValueError: see `host_batches`, or the batch cannot be divided so.
        """
        sharding = sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        rows = _rows_of_process(sharding, config.batch_size)
        self._config = config
        self._batches = host_batches(records, config, seed=seed, rows=rows)
        self._to_devices = _ToDevices(sharding, config.batch_size, rows)
        self._order = {
            **{"batch_size": config.batch_size, "seed": seed},
            **{"records": len(records), "fingerprint": records.fingerprint},
        }
        self._step = 0
        self._ahead: list[grain.DatasetIterator] = []  # one that reads, or none
        # A program that ends without `close` must stop the threads too: one cut off within JAX aborts the process.
        weakref.finalize(self, _stop, self._ahead)

    def __iter__(self) -> "PairBatches":
        return self

    def __next__(self) -> dict[str, Any]:
        """The next batch, as a rule one that is on the devices already.

        After an error, for instance of the disk, the next call tries the same batch again.
        """
        if not self._ahead:
            self._ahead.append(iter(self._read_ahead()))
        try:
            batch = next(self._ahead[0])
        except BaseException:
            self.close()
            raise
        self._step += 1
        return batch

    def state(self) -> dict[str, Any]:
        """Where the next batch lies, as JSON can hold it: after those handed out, however many are read already."""
        return {"step": self._step, **self._order}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes to where `state` was asked for, be it by another number of processes; nothing is read again.

        Dropout, flips, threads and workers may be others than they were.

        Raises:
            ValueError: the state is of another order of pairs, or is none.
        """
        step = saved_step("input", state, self._order)
        self.close()
        self._step = step

    def close(self) -> None:
        """Stops threads and workers; a further batch would start them again."""
        _stop(self._ahead)

    def __enter__(self) -> "PairBatches":
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def _read_ahead(self) -> grain.IterDataset:
        config = self._config
        options = grain.ReadOptions(num_threads=config.threads, prefetch_buffer_size=config.threads)
        batches = self._batches[self._step :].to_iter_dataset(options)
        if config.workers:
            if not absl.flags.FLAGS.is_parsed():  # grain's workers are told of absl's flags, which nobody parses here
                absl.flags.FLAGS.mark_as_parsed()
            # Through pipes, not shared memory, of which a container may have 64 MB: filling it up kills a process.
            through_pipes = grain.experimental.DatasetOptions(min_shm_size=sys.maxsize)
            batches = grain.experimental.WithOptionsIterDataset(batches, through_pipes)
            batches = batches.mp_prefetch(grain.MultiprocessingOptions(num_workers=config.workers))
        return grain.experimental.ThreadPrefetchIterDataset(
            batches.map(self._to_devices), prefetch_buffer_size=config.prefetch
        )


def saved_step(name: str, saved: Mapping[str, Any], order: Mapping[str, Any]) -> int:
    """The number of batches handed out before a position was saved.

    Args:
        name: of the source, for errors.
        saved: the position: `step` and the values of `order`.
        order: what the order of batches depends on, as it is now.

    Raises:
        ValueError: the position is of another order, or is none.
    """
    differ = [f"{key} {saved.get(key)!r}, now {value!r}" for key, value in order.items() if saved.get(key) != value]
    if differ:
        raise ValueError(
            f"{name}: the saved position is of another order of batches: {'; '.join(differ)}; resume with the data, "
            "seed and batch size that the run began with"
        )
    step = saved.get("step")
    if not isinstance(step, int) or step < 0:
        raise ValueError(f"{name}: the saved position has step {step!r}; expected a number of batches, 0 or more")
    return step


def _stop(ahead: list[grain.DatasetIterator]) -> None:
    while ahead:
        ahead.pop().close()


@dataclasses.dataclass(frozen=True)
class _ToDevices:
    """Makes global arrays of what this process has read, without knowing its `PairBatches`: so that can be freed."""

    sharding: jax.sharding.Sharding
    batch_size: int
    rows: np.ndarray

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        return jax.block_until_ready(jax.tree.map(self._put, batch))

    def _put(self, array: np.ndarray) -> jax.Array:
        shape = (self.batch_size, *array.shape[1:])

        def held(index) -> np.ndarray:
            return array[self._held(index[0]), *index[1:]]

        return jax.make_array_from_callback(shape, self.sharding, held)

    def _held(self, wanted: slice) -> slice:
        """Where rows of the global batch, those of one device, are among the rows of this process."""
        start, stop, _ = wanted.indices(self.batch_size)
        return slice(*np.searchsorted(self.rows, (start, stop)))


def _rows_of_process(sharding: jax.sharding.Sharding, batch_size: int) -> np.ndarray:
    """Rows of the global batch that the devices of this process hold, ascending."""
    try:
        held = sharding.addressable_devices_indices_map((batch_size,)).values()
    except ValueError as error:
        raise ValueError(
            f"input: a batch of {batch_size} pairs cannot be divided over the devices ({error}); choose a multiple"
        ) from error
    return np.unique(np.concatenate([np.arange(batch_size)[index] for index in held]))
