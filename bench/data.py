"""How fast pairs come from the disk into batches, where the time goes, and whether memory grows."""

import dataclasses
import importlib.util
import io
import itertools
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import jax
import numpy as np
import tensorflow_datasets as tfds
from PIL import Image
from tqdm import tqdm

from bench.common import each_round, medians, time_in_turns
from bench.writing import random_photos
from flax_pref.data.images import decode_image, encode_jpeg, fit_image
from flax_pref.data.pairs import Drop
from flax_pref.data.pipeline import InputConfig, PairBatches, host_batches
from flax_pref.data.prepared import (
    CAPTIONS,
    PAIRS,
    SPLIT,
    PreparedSet,
    Records,
    Shapes,
    bits,
    caption_features,
    describe,
    pair_features,
    shard_name,
    write_shard,
)

Part = Literal["reading", "decoding", "memory"]

SD15 = Shapes((1, 64, 64, 8), {"encoder_hidden_states": (77, 768)})
TINY = Shapes((1, 2, 2, 8), {"encoder_hidden_states": (2, 4)})
SHARDS = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Data:
    """Measures the input of training on sets made for the occasion."""

    parts: tuple[Part, ...] = ("reading", "decoding", "memory")
    """What to measure."""
    pairs: int = 2000
    """In the prepared set that is read, of the size of SD1.5's at 512 x 512 pixels."""
    captions: int = 500
    """Distinct ones in that set."""
    batch_size: int = 64
    threads: int = 2
    """Threads that read, and as many that decode."""
    workers: tuple[int, ...] = (0, 2)
    """Processes that read; each number is measured, with so many threads in each process."""
    batches: int = 60
    """Batches in a timed round of reading."""
    photos: int = 64
    """JPEG pairs in a timed round of decoding."""
    photo_size: int = 768
    """Side of the JPEGs in pixels."""
    size: int = 512
    """Side that they are resized to."""
    rounds: int = 3
    """Timed rounds of each, in turns; the median counts."""
    records: int = 1_000_000
    """Pairs that are read while memory is watched."""
    distinct_records: int = 20_000
    """Pairs in the set that they are read from, over and over."""
    sample_every: int = 20_000
    """Pairs from one look at the memory to the next."""
    folder: Path | None = None
    """Where the sets are made, and removed; None: where temporary files go."""
    json: Path | None = None
    """File for the figures."""


def bench_data(bench: Data) -> dict:
    """Figures of the parts that were asked for."""
    check(bench)
    measure = {"reading": bench_reading, "decoding": bench_decoding, "memory": bench_memory}
    figures = {"device": jax.devices()[0].device_kind, "cores": os.cpu_count()}
    for part in dict.fromkeys(bench.parts):
        with tempfile.TemporaryDirectory(dir=bench.folder) as folder:
            figures[part] = measure[part](bench, Path(folder))
    return figures


def check(bench: Data) -> None:
    """Raises a ValueError for what cannot be measured."""
    names = ("pairs", "captions", "batches", "photos", "rounds", "distinct_records", "sample_every")
    for name in names:
        if getattr(bench, name) < 1:
            raise ValueError(f"bench: {name} is {getattr(bench, name)}; expected at least 1")
    if "memory" in bench.parts and bench.records < 3 * bench.sample_every:
        raise ValueError(
            f"bench: {bench.records} records and a look at every {bench.sample_every}; expected at least three looks"
        )


def write_prepared(folder: Path, shapes: Shapes, pairs: int, captions: int, size: tuple[int, int]) -> PreparedSet:
    """A prepared set of random numbers that compress like moments and embeddings."""
    rng = np.random.default_rng(0)
    variance = np.repeat([0.0, -18.0], shapes.moments[-1] // 2), np.repeat([1.0, 0.3], shapes.moments[-1] // 2)

    def moments():
        return bits(variance[0] + variance[1] * rng.standard_normal(shapes.moments, dtype=np.float32))

    def pair(i):
        return {
            **{"row": i, "caption": 1 + i % captions, "winner": moments(), "loser": moments()},
            **{"winner_first": i % 2 == 0, "sizes": np.zeros((shapes.moments[0], 2, 4), np.int32)},
            **{"winner_id": f"{i}-0", "loser_id": f"{i}-1", "confidence": np.nan, "margin": np.nan},
        }

    def caption(i):
        arrays = {name: bits(rng.standard_normal(s, dtype=np.float32)) for name, s in shapes.conditioning.items()}
        return {"caption": f"caption {i}", **arrays}

    kinds = (
        (PAIRS, pair_features(shapes), pairs, pair),
        (CAPTIONS, caption_features(shapes), 1 + captions, caption),
    )
    metadata = {"settings": {"size": size}, "counts": {"pairs": pairs}}
    for name, features, count, record in kinds:
        shards = np.array_split(np.arange(count), SHARDS)
        for i, numbers in enumerate(shards):
            write_shard(folder / name / shard_name(name, i, SHARDS), features, map(record, numbers.tolist()))
        describe(folder / name, features, list(map(len, shards)), metadata)
    return PreparedSet(folder)


# ----------------------------------------------------------------------------------------------------------------------
# Reading


def bench_reading(bench: Data, folder: Path) -> dict:
    """Pairs a second from a prepared set into batches on the device, and the parts of one thread's time."""
    records = write_prepared(folder, SD15, bench.pairs, bench.captions, (512, 512))
    figures = {
        **{"pairs": bench.pairs, "captions": bench.captions, "batch_size": bench.batch_size, "threads": bench.threads},
        "bytes_per_pair": sum(file.stat().st_size for file in folder.glob(f"{PAIRS}/*record*")) // bench.pairs,
        "pairs_per_second": {},
        "each_round": {},
        "microseconds_per_pair": reading_parts(bench, folder, records),
    }
    for workers in bench.workers:
        config = InputConfig(batch_size=bench.batch_size, threads=bench.threads, workers=workers)
        with PairBatches(records, config, seed=0) as batches:
            take(batches, 2 + bench.threads + 4 * workers)  # so that nothing that is counted was read before

            def some(batches=batches):
                take(batches, bench.batches)

            times, pairs = time_in_turns({f"{workers} workers": some}, bench.rounds), bench.batches * bench.batch_size
        figures["pairs_per_second"] |= {name: round(pairs / value, 1) for name, value in medians(times).items()}
        figures["each_round"] |= each_round(times, pairs)
    return figures


def take(batches: Iterator, count: int) -> None:
    """Takes batches and lets them go."""
    for batch in itertools.islice(batches, count):
        jax.block_until_ready(batch)


class Still(Records):
    """Records of which all are the same and in memory: what is left of the time is not spent in reading."""

    def __init__(self, records: Records):
        self.shapes, self.image_size, self.fingerprint = records.shapes, records.image_size, records.fingerprint
        self._count, self._pair, self._text = len(records), records.pair(0), records.conditioning(0)

    def __len__(self) -> int:
        """Number of pairs."""
        return self._count

    def pair(self, index: int) -> dict[str, np.ndarray]:
        """See `Records`."""
        return self._pair

    def conditioning(self, caption: int) -> dict[str, np.ndarray]:
        """See `Records`."""
        return self._text


def reading_parts(bench: Data, folder: Path, records: PreparedSet) -> dict[str, float]:
    """Median microseconds per pair of each part, in one thread and one after the other."""
    sources = {
        name: tfds.builder_from_directory(folder / name).as_data_source(split=SPLIT)  # pyright: ignore[reportCallIssue]
        for name in (PAIRS, CAPTIONS)
    }
    rng, parts = np.random.default_rng(0), {}
    for name, source in sources.items():
        numbers = rng.integers(len(source), size=bench.batch_size).tolist()
        stored, features = source.data_source, source.dataset_info.features
        contents = [stored[i] for i in numbers]
        parts[f"{name}: read and decompress"] = lambda stored=stored, numbers=numbers: [stored[i] for i in numbers]
        parts[f"{name}: parse"] = lambda features=features, contents=contents: [
            features.deserialize_example_np(content) for content in contents
        ]
    config = InputConfig(batch_size=bench.batch_size)
    still = host_batches(Still(records), config, seed=0, rows=np.arange(bench.batch_size))
    device, steps = jax.devices()[0], itertools.count()
    batch = still[0]
    parts["order, chance and stacking"] = lambda: still[next(steps)]
    parts["transfer to the device"] = lambda: jax.block_until_ready(jax.device_put(batch, device, may_alias=False))
    seconds = medians(time_in_turns(parts, 5 * bench.rounds))
    microseconds = {name: 1e6 * value / bench.batch_size for name, value in seconds.items()}
    return {name: round(value, 1) for name, value in (microseconds | {"sum": sum(microseconds.values())}).items()}


# ----------------------------------------------------------------------------------------------------------------------
# Decoding


def bench_decoding(bench: Data, folder: Path) -> dict:
    """JPEG pairs a second and core, decoded, resized and cropped into batches: ours and torch's DataLoader in turns."""
    photos = random_photos(2 * min(bench.photos, 16), bench.photo_size) / np.float32(255)
    jpegs = [encode_jpeg(photo[: -bench.photo_size // 8]) for photo in photos]  # not square, so that they are cropped
    pairs = [(jpegs[2 * i % len(jpegs)], jpegs[(2 * i + 1) % len(jpegs)]) for i in range(bench.photos)]
    batch_size = min(16, bench.photos)
    figures = {
        **{"pairs": bench.photos, "photo_size": bench.photo_size, "size": bench.size, "cores": bench.threads},
        "bytes_per_jpeg": statistics.mean(map(len, jpegs)),
    }
    with ThreadPoolExecutor(bench.threads) as pool:
        candidates = {"ours": lambda: decode_in_threads(pool, pairs, bench.size, batch_size)}
        reference = torch_decoding(pairs, bench.size, batch_size, bench.threads)
        if reference is not None:
            candidates["torch"] = reference
        times = time_in_turns(candidates, bench.rounds)
    rates = {name: bench.photos / value / bench.threads for name, value in medians(times).items()}
    figures["each_round"] = each_round(times, bench.photos / bench.threads)
    figures |= {f"{name}_pairs_per_second_and_core": round(rate, 2) for name, rate in rates.items()}
    if reference is not None:
        figures["ratio_to_torch"] = round(rates["ours"] / rates["torch"], 3)
    return figures


def decode_in_threads(pool: ThreadPoolExecutor, pairs: list[tuple[bytes, bytes]], size: int, batch_size: int) -> None:
    """Batches uint8 `[B, 2, size, size, 3]` as preparation makes them, each let go."""

    def decoded(pair):
        images = [image for image in map(decode_image, pair) if not isinstance(image, Drop)]
        fitted = [fit_image(image, (size, size), crop="center", resample="bicubic") for image in images]
        return np.stack([image.pixels for image in fitted])

    for start in range(0, len(pairs), batch_size):
        np.stack(list(pool.map(decoded, pairs[start : start + batch_size])))


@dataclasses.dataclass
class TorchPairs:
    """The same with PIL alone, as a data set of torch; it is sent to the processes of its DataLoader."""

    pairs: list[tuple[bytes, bytes]]
    size: int

    def __len__(self) -> int:
        """Number of pairs."""
        return len(self.pairs)

    def __getitem__(self, index: int) -> np.ndarray:
        """Pair `index` as uint8 `[2, size, size, 3]`."""
        return np.stack([self._fitted(data) for data in self.pairs[index]])

    def _fitted(self, data: bytes) -> np.ndarray:
        image = Image.open(io.BytesIO(data)).convert("RGB")
        scale = self.size / min(image.size)
        image = image.resize([round(scale * side) for side in image.size], Image.Resampling.BICUBIC)
        left, top = ((side - self.size) // 2 for side in image.size)
        return np.asarray(image.crop((left, top, left + self.size, top + self.size)))


def torch_decoding(
    pairs: list[tuple[bytes, bytes]], size: int, batch_size: int, workers: int
) -> Callable[[], None] | None:
    """An epoch of torch's DataLoader, whose processes live on; None where torch is not installed."""
    if importlib.util.find_spec("torch") is None:
        print("torch is not installed: timing ours alone", file=sys.stderr)
        return None
    from torch.utils.data import DataLoader

    loader = DataLoader(
        TorchPairs(pairs, size),  # pyright: ignore[reportArgumentType] (no subclass: torch may not be there)
        batch_size=batch_size,
        num_workers=workers,
        persistent_workers=True,
        multiprocessing_context="spawn",  # a process with the threads of JAX should not be forked
    )

    def epoch():
        for _ in loader:
            pass

    return epoch


# ----------------------------------------------------------------------------------------------------------------------
# Memory


def bench_memory(bench: Data, folder: Path) -> dict:
    """Growth of this process's memory while it reads a set over and over, by a line through what was seen."""
    records = write_prepared(folder, TINY, bench.distinct_records, bench.captions, (16, 16))
    config = InputConfig(batch_size=min(500, bench.sample_every), threads=bench.threads, caption_dropout=0.1)
    seen, started = [], time.perf_counter()
    with (
        PairBatches(records, config, seed=0) as batches,
        tqdm(total=bench.records, desc="reading", unit="pair") as progress,
    ):
        for count in range(config.batch_size, bench.records + 1, config.batch_size):
            next(batches)
            progress.update(config.batch_size)
            if count % bench.sample_every < config.batch_size:
                seen.append((count, resident_bytes()))
    seconds = time.perf_counter() - started
    settled = [look for look in seen if look[0] > bench.records / 10]
    counts, sizes = np.array(settled, float).T
    slope, _ = np.polyfit(counts, sizes, 1)
    return {
        **{"records": bench.records, "distinct_records": bench.distinct_records, "looks": len(settled)},
        "pairs_per_second": round(bench.records / seconds, 1),
        "bytes_per_record": round(slope, 3),
        "growth_mb": round((sizes[-1] - sizes[0]) / 1e6, 3),
        "resident_mb": [round(size / 1e6, 1) for _, size in seen],
    }


def resident_bytes() -> int:
    """Memory of this process that is in use, as Linux tells it."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
