"""Prepared sets: pairs as moments of their latents, captions as embeddings, encoded once and read in any order.

A prepared set is a folder with two data sets of tensorflow-datasets in ArrayRecord files. In `pairs` each record is one
pair, with the number of its caption; in `captions` each is one distinct caption with its conditioning, and record 0 is
that of a dropped caption, see `Encoding.dropped_caption`. Numbers are bfloat16, which tensorflow-datasets does not
know: they are stored as the bytes of uint16.

Where pairs have several sizes, each record of `pairs` has the shape of its moments, and metadata.json has the size of
each pair: a letter for each, see `buckets.LETTERS`.
"""

import bisect
import errno
import hashlib
import itertools
import json
import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax.numpy as jnp
import numpy as np
import tensorflow_datasets as tfds
from etils import epath
from tensorflow_datasets.core import dataset_info, example_serializer, file_adapters, splits

from flax_pref.data.buckets import LETTERS, Numbers, Size
from flax_pref.files import read_json, replacing, write_json
from flax_pref.programs import command

PAIRS, CAPTIONS, SPLIT, FORMAT = "pairs", "captions", "train", "array_record"
BUCKETS = "buckets"  # in metadata.json, of sets with several sizes
ENDS, _END = "ends.json", 2**16  # the file has a digest of so many bytes at both ends of each shard
EMPTY = 0  # number of the caption that says nothing


class Shapes(NamedTuple):
    """Shapes of what a set holds.

    Attributes:
        moments: `(k, h, w, 2 Z)` of an image of `Records.image_size`: mean and logarithm of the variance of its
            latents, unscaled, of the image and, if k is 2, of its mirror image. Other sizes have other h and w.
        conditioning: of each array that the UNet is told of a caption, by name; see `diffusion.conditioning`.
    """

    moments: tuple[int, int, int, int]
    conditioning: Mapping[str, tuple[int, ...]]


class Records(Protocol):
    """Encoded pairs by number, in memory or on disk.

    Attributes:
        shapes: of the arrays.
        image_size: (height, width) in pixels that the images were cut to; of several sizes, the one to draw samples in.
        fingerprint: tells one set from another.
    """

    shapes: Shapes
    image_size: tuple[int, int]
    fingerprint: str

    def __len__(self) -> int:
        """Number of pairs, N."""
        ...

    def pair(self, index: int) -> dict[str, np.ndarray]:
        """Pair `index`, 0 .. N-1.

        Returns:
            `row` int64, its row in the set that was encoded; `caption` int64, its number; `winner` and `loser` bfloat16
            `[k, h, w, 2 Z]`; `winner_first` bool; `sizes` int32 `[k, 2, 4]`: of winner and loser (height, width) before
            and (top, left) of the crop after resizing, in pixels.
        """
        ...

    def conditioning(self, caption: int) -> dict[str, np.ndarray]:
        """What the UNet is told of a caption, bfloat16 arrays by name; of no caption for `EMPTY`."""
        ...

    def buckets(self) -> Mapping[Size, Numbers]:
        """Numbers of the pairs of each size, ascending; by default all have `image_size`.

        Batches are of one size. Sizes without a pair are not listed, and the order of sizes is that of all calls.
        """
        return {self.image_size: range(len(self))}


def bits(array: np.ndarray) -> np.ndarray:
    """A bfloat16 array as uint16."""
    return np.asarray(array, jnp.bfloat16).view(np.uint16)


def numbers(array: np.ndarray) -> np.ndarray:
    """What `bits` made uint16 of, without a copy."""
    return array.view(jnp.bfloat16)


# ----------------------------------------------------------------------------------------------------------------------
# Writing


def pair_features(shapes: Shapes, *, several: bool = False) -> tfds.features.FeaturesDict:
    """Schema of `pairs`; with `several` sizes, height and width of the moments are each record's own."""
    k, height, width, channels = shapes.moments
    sides = (None, None) if several else (height, width)
    moments = _half(
        (k, *sides, channels), "Mean and log-variance of the latents, unscaled, of the image and its mirror image"
    )
    number = tfds.features.Scalar(np.float32, doc="NaN where the set does not tell")
    return tfds.features.FeaturesDict(
        {
            "row": tfds.features.Scalar(np.int64, doc="In the set that was encoded"),
            "caption": tfds.features.Scalar(np.int64, doc="Number in captions"),
            "winner": moments,
            "loser": moments,
            "winner_first": tfds.features.Scalar(np.bool_, doc="The preferred image was the first of the two"),
            "sizes": tfds.features.Tensor(
                shape=(shapes.moments[0], 2, 4),
                dtype=np.int32,
                encoding="bytes",
                doc="Of winner and loser: height and width before, top and left of the crop after resizing",
            ),
            "winner_id": tfds.features.Text(),
            "loser_id": tfds.features.Text(),
            "confidence": number,
            "margin": number,
        }
    )


def caption_features(shapes: Shapes) -> tfds.features.FeaturesDict:
    """Schema of `captions`."""
    arrays = {name: _half(shape, "Of the text encoders") for name, shape in shapes.conditioning.items()}
    return tfds.features.FeaturesDict({"caption": tfds.features.Text(), **arrays})


def _half(shape: Sequence[int | None], doc: str) -> tfds.features.Tensor:
    return tfds.features.Tensor(shape=tuple(shape), dtype=np.uint16, encoding="bytes", doc=f"{doc}; bits of bfloat16")


def shard_name(name: str, shard: int, count: int) -> str:
    """File of a shard, as tensorflow-datasets names them."""
    return f"{name}-{SPLIT}.{FORMAT}-{shard:05d}-of-{count:05d}"


def write_shard(file: Path, features: tfds.features.FeaturesDict, records: Iterable[Mapping[str, Any]]) -> int:
    """Writes records into an ArrayRecord file, which appears when it is complete; how many there were.

    Raises:
        OSError: it cannot be written.
    """
    count, serializer = 0, example_serializer.ExampleSerializer(features.get_serialized_info())  # pyright: ignore[reportArgumentType]

    def serialized():
        nonlocal count
        for record in records:
            example = serializer.get_tf_example(features.encode_example(record))
            # What is a dict in protobuf has another order in every process, unless it is asked for one.
            yield count, example.SerializeToString(deterministic=True)
            count += 1

    adapter = file_adapters.ADAPTER_FOR_FORMAT[tfds.core.FileFormat.ARRAY_RECORD]
    with replacing(file) as unfinished:
        try:
            adapter.write_examples(unfinished, serialized())
        except RuntimeError as error:  # ArrayRecord's own, with the system's error as text
            number = next((number for number in errno.errorcode if os.strerror(number) in str(error)), None)
            if number is None or str(unfinished) not in str(error):
                raise
            raise OSError(number, os.strerror(number), str(file)) from error
    return count


def describe(folder: Path, features: tfds.features.FeaturesDict, lengths: Sequence[int], metadata: Mapping) -> None:
    """Writes what tensorflow-datasets needs to read the shards of a folder; dataset_info.json appears last.

    Args:
        folder: with the files of `shard_name`.
        features: of the records.
        lengths: number of records in each shard.
        metadata: for metadata.json; what JSON can hold.
    """
    name = folder.name
    shards = [folder / shard_name(name, i, len(lengths)) for i in range(len(lengths))]
    info = tfds.core.DatasetInfo(
        builder=dataset_info.DatasetIdentity(
            name=name, version=tfds.core.Version("1.0.0"), data_dir=str(folder), module_name=""
        ),
        description=f"Preference {name}, encoded for Stable Diffusion",
        features=features,
        metadata=tfds.core.MetadataDict(metadata),
    )
    info.set_file_format(tfds.core.FileFormat.ARRAY_RECORD)
    template = tfds.core.ShardedFileTemplate(
        data_dir=epath.Path(folder), dataset_name=name, split=SPLIT, filetype_suffix=FORMAT
    )
    size = sum(shard.stat().st_size for shard in shards)
    info.set_splits(splits.SplitDict([tfds.core.SplitInfo(SPLIT, list(lengths), size, template)]))
    with tempfile.TemporaryDirectory(dir=folder, prefix=".") as written:
        info.write_to_directory(written)
        write_json(Path(written) / ENDS, {shard.name: _ends(shard) for shard in shards})
        for file in sorted(Path(written).iterdir(), key=lambda file: file.name == "dataset_info.json"):
            os.replace(file, folder / file.name)


def _ends(shard: Path) -> str:
    """SHA-256, 16 digits, of the first and last bytes of a shard, in which those of other sets and numbers differ."""
    with shard.open("rb") as opened:
        first = opened.read(_END)
        opened.seek(-min(_END, shard.stat().st_size), os.SEEK_END)
        return hashlib.sha256(first + opened.read()).hexdigest()[:16]


# ----------------------------------------------------------------------------------------------------------------------
# Reading


class PreparedSet(Records):
    """A prepared set on disk; see `Records`. Its files are read by many threads and processes at the same time.

    Attributes:
        folder: of the set.
        metadata: settings, counts and hashes, see `preparation.Preparation`.

    Example:
        >>> records = fp.PreparedSet("runs/prepared")
        >>> len(records), records.image_size
        (24, (16, 16))
    """

    def __init__(self, folder: str | Path):
        """Opens a set that `train.encode` has finished.

        Raises:
            FileNotFoundError: there is none, or a file of it is missing.
            ValueError: a file is damaged.
        """
        self.folder = folder = Path(folder)
        expected = f"{folder} to be a prepared set, finished by {command('encode')}"
        self.metadata = read_json(folder / PAIRS / "metadata.json", expected=expected)
        if read_json(folder / CAPTIONS / "metadata.json", expected=expected) != self.metadata:
            raise ValueError(
                f"{folder / PAIRS} and {folder / CAPTIONS}: their metadata.json differ, so they are damaged or of two "
                "sets; copy the whole folder again"
            )
        self._pairs = _open(folder / PAIRS, ("row", "caption", "winner_first", "sizes", "winner", "loser"))
        self._captions = _open(folder / CAPTIONS, ("caption", "encoder_hidden_states"))
        try:
            self.image_size = tuple(self.metadata["settings"]["size"])
            counted = self.metadata["counts"]["pairs"]
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"{folder / PAIRS / 'metadata.json'}: no settings with a size, or no counts with pairs; copy it again"
            ) from error
        if len(self.image_size) != 2 or not all(type(side) is int and side > 0 for side in self.image_size):
            raise ValueError(f"{folder / PAIRS / 'metadata.json'}: size={self.image_size} is none; copy it again")
        if counted != len(self._pairs):
            raise ValueError(
                f"{folder / PAIRS}: dataset_info.json counts {len(self._pairs)} pairs, but metadata.json {counted}; "
                "copy the folder again"
            )
        self.fingerprint = hashlib.sha256(json.dumps(self.metadata, sort_keys=True).encode()).hexdigest()
        self._buckets = self._read_buckets(folder / PAIRS / "metadata.json")
        arrays = self.conditioning(EMPTY)
        self.shapes = Shapes(self._base_shape(), {name: array.shape for name, array in arrays.items()})

    def __len__(self) -> int:
        """Number of pairs."""
        return len(self._pairs)

    @property
    def shard_lengths(self) -> list[int]:
        """Number of pairs in each shard."""
        return self._pairs.lengths

    def pair(self, index: int) -> dict[str, np.ndarray]:
        """See `Records`."""
        record = self._pairs[index]
        arrays = {name: numbers(record[name]) for name in ("winner", "loser")}
        return {name: np.asarray(record[name]) for name in ("row", "caption", "winner_first", "sizes")} | arrays

    def conditioning(self, caption: int) -> dict[str, np.ndarray]:
        """See `Records`."""
        record = self._captions[caption]
        return {name: numbers(array) for name, array in record.items() if name != "caption"}

    def buckets(self) -> Mapping[Size, Numbers]:
        """See `Records`."""
        return self._buckets

    def text(self, caption: int) -> str:
        """A caption as text."""
        return self._captions[caption]["caption"].decode()

    def _read_buckets(self, file: Path) -> Mapping[Size, Numbers]:
        listed = self.metadata.get(BUCKETS)
        if listed is None:  # one size for all
            return super().buckets()
        wrong = f"{file}: its buckets are not those of the pairs beside it; copy the whole folder again"
        try:
            sizes = [(int(height), int(width)) for height, width in listed["sizes"]]
            lengths = [len(letters) for letters in listed["shards"]]
            letters = np.frombuffer("".join(listed["shards"]).encode(), np.uint8)
        except (LookupError, TypeError, ValueError) as error:
            raise ValueError(wrong) from error
        numbers = [np.flatnonzero(letters == ord(letter)) for letter, _ in zip(LETTERS, sizes, strict=False)]
        whole = lengths == self._pairs.lengths and sum(map(len, numbers)) == len(letters)
        if not whole or self.image_size not in sizes or len(set(sizes)) < len(sizes) or len(sizes) > len(numbers):
            raise ValueError(wrong)
        return {size: found for size, found in zip(sizes, numbers, strict=True) if len(found)}

    def _base_shape(self) -> tuple[int, int, int, int]:
        """Shape of the moments of an image of `image_size`, of which there may be none."""
        size, found = next(iter(self._buckets.items()))
        k, height, width, channels = self.pair(int(found[0]))["winner"].shape
        height, width = (
            latent * base // side for latent, base, side in zip((height, width), self.image_size, size, strict=True)
        )
        return k, height, width, channels


class _DataSet:
    """The records of one of the two data sets."""

    def __init__(self, builder: tfds.core.DatasetBuilder):
        split = builder.info.splits[SPLIT]
        self.lengths = list(split.shard_lengths)
        self._files, self._ends = list(map(str, split.filepaths)), list(itertools.accumulate(self.lengths))
        self._records = builder.as_data_source(SPLIT)  # pyright: ignore[reportCallIssue] (its decorator)

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Record 0 .. N-1.

        Raises:
            ValueError: the file is damaged; names it.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        try:
            return self._records[index]
        except OSError:  # names the file
            raise
        except Exception as error:  # ArrayRecord's, and of what decodes the records
            file = self._files[bisect.bisect_right(self._ends, index)]
            reason = " ".join(str(error).split())
            raise ValueError(f"{file}: damaged ({reason}); copy it again, or encode the set again") from error


def _open(folder: Path, needed: Sequence[str]) -> _DataSet:
    """One of the two data sets; every file is there and as it was written, by its size and its ends."""
    for name in ("dataset_info.json", "features.json"):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder / name}: no such file; copy the whole folder again")
    try:
        builder = tfds.builder_from_directory(folder)
        split = builder.info.splits[SPLIT]
    except OSError:
        raise
    except Exception as error:  # of what parses dataset_info.json and features.json
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"{folder}: dataset_info.json or features.json is damaged ({reason}); copy them again"
        ) from error
    features = builder.info.features
    there = features.keys() if isinstance(features, tfds.features.FeaturesDict) else ()
    if missing := [name for name in needed if name not in there]:
        raise ValueError(f"{folder / 'features.json'}: has no {missing[0]!r}; copy the folder again")
    for file in split.filepaths:
        if not file.exists():
            raise FileNotFoundError(f"{file}: no such file, but the prepared set has it; copy the whole folder again")
    size = sum(file.stat().length for file in split.filepaths)
    if size != split.num_bytes:
        written = int(split.num_bytes)
        raise ValueError(f"{folder}: its shards have {size} bytes, but {written} were written; copy the folder again")
    if (folder / ENDS).exists():  # sets of older versions have none
        ends = read_json(folder / ENDS, expected="digests of the shards beside it")
        for file in map(Path, split.filepaths):
            if ends.get(file.name) != _ends(file):
                raise ValueError(
                    f"{file}: damaged (its ends are not those of this shard, perhaps of one of another number or set); "
                    "copy it again, or encode the set again"
                )
    return _DataSet(builder)
