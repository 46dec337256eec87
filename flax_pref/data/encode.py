"""Preference pairs as moments of latents and embeddings of captions: encoded once, on disk or in memory."""

import collections
import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, Literal, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tqdm import tqdm

from flax_pref.checkpoints.diffusers import Pipeline
from flax_pref.config import UserError
from flax_pref.data.buckets import MOST_SIZES, Numbers, Size, bucket_sizes, nearest_size
from flax_pref.data.images import Fitted, decode_image, fit_image
from flax_pref.data.pairs import Drop, PairReader, PreferencePair, pairs
from flax_pref.data.prepared import Records, Shapes
from flax_pref.data.selection import Selection
from flax_pref.diffusion.conditioning import chunks, encode_batch, encode_blank, encode_empty
from flax_pref.models.network import replicated
from flax_pref.models.vae import VAEConfig

T = TypeVar("T")
R = TypeVar("R")

CAPTIONS_AT_ONCE = 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class Encoding:
    """How images and captions are encoded."""

    size: tuple[int, int] = (512, 512)
    """Height and width in pixels that images are cut to, after they were resized to cover it."""
    buckets: tuple[tuple[int, int], ...] = ()
    """More sizes, for aspect-ratio buckets: both images of a pair are cut to that size whose aspect ratio is nearest to
    theirs, to `size` or one of these."""
    bucket_step: int | None = None
    """Makes these buckets by a rule: all sizes whose sides are multiples of so many pixels (SDXL: 64) and whose area is
    about that of `size`, but not larger."""
    bucket_aspect: float = 2.0
    """Most that the long side of a bucket made by the rule may be, as a multiple of the short one."""
    crop: Literal["center", "random"] = "center"
    """Where to cut what is too long on one side; at random: the same place in every run."""
    resample: Literal["bilinear", "bicubic", "lanczos"] = "bilinear"
    """Filter of the resizing, with antialiasing."""
    mirrored: bool = False
    """Encode mirror images too, for training with random flips; doubles time and space."""
    smallest_side: int = 32
    """Images that are smaller in pixels count as damaged."""
    batch_size: int = 2
    """Pairs that a device encodes at the same time."""
    dropped_caption: Literal["sampler", "encoded"] = "sampler"
    """What training sees of a dropped caption. sampler: what samplers of this checkpoint see without a prompt, which is
    zeros where model_index.json sets force_zeros_for_empty_prompt (SDXL); encoded: the encoded empty text, as in
    published SDXL trainers. They differ for SDXL only."""

    def __post_init__(self):
        if min(self.size) < 1 or self.batch_size < 1:
            raise ValueError(f"encoding: size={self.size}, batch_size={self.batch_size}; expected positive numbers")
        if any(min(bucket) < 1 for bucket in self.buckets):
            raise ValueError(f"encoding: buckets={self.buckets}; expected positive heights and widths")
        if self.bucket_step is not None:
            self._check_rule(self.bucket_step)
        if len(self.sizes) > MOST_SIZES:
            raise ValueError(
                f"encoding: {len(self.sizes)} sizes; expected at most {MOST_SIZES}: choose a larger bucket_step, or "
                "fewer buckets"
            )

    def _check_rule(self, step: int) -> None:
        if self.buckets:
            raise ValueError("encoding: buckets and bucket_step are both set; choose a list of sizes or the rule")
        if step < 1 or any(side % step for side in self.size) or not self.bucket_aspect >= 1:
            raise ValueError(
                f"encoding: bucket_step={step}, bucket_aspect={self.bucket_aspect}; expected a number of pixels that "
                f"divides both sides of size={self.size}, and an aspect of at least 1"
            )
        if len(self.sizes) == 1:
            raise ValueError(
                f"encoding: bucket_step={step} with bucket_aspect={self.bucket_aspect:g} gives no size but "
                f"size={self.size}; choose a smaller step"
            )

    @property
    def sizes(self) -> tuple[Size, ...]:
        """All sizes that images may be cut to, ascending; `size` alone where there are no buckets."""
        if self.bucket_step is not None:
            return bucket_sizes(self.size, self.bucket_step, self.bucket_aspect)
        return tuple(sorted({self.size, *self.buckets}))


class PairEncoder:
    """Encodes pairs and captions on devices, while threads decode the images that come next.

    Attributes:
        shapes: of what it gives; moments are those of images of `encoding.size`.
        encoding: how.
        sizes: that images are cut to.
    """

    def __init__(self, pipeline: Pipeline, encoding: Encoding, mesh: Mesh | None = None):
        """Puts the encoders on the devices.

        Args:
            pipeline: whose autoencoder and text encoders are used; its UNet is not.
            encoding: how to encode.
            mesh: of devices that share every batch; None: the default device.

        Raises:
            ValueError: a size does not fit the autoencoder.
        """
        check_sizes(encoding, pipeline.vae.config)
        self.encoding, self.sizes = encoding, encoding.sizes
        self.sharding = None if mesh is None else NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        self._pipeline = dataclasses.replace(
            pipeline,
            vae=replicated(pipeline.vae, mesh),
            text_encoders=tuple(replicated(encoder, mesh) for encoder in pipeline.text_encoders),
        )
        encode_dropped = encode_empty if encoding.dropped_caption == "sampler" else encode_blank
        self._empty = {name: np.asarray(array, jnp.bfloat16) for name, array in encode_dropped(pipeline).items()}
        devices = 1 if mesh is None else mesh.size
        self._pairs, self._captions = encoding.batch_size * devices, CAPTIONS_AT_ONCE * devices
        factor = pipeline.vae.config.downscale_factor
        height, width = (side // factor for side in encoding.size)
        self.shapes = Shapes(
            (1 + encoding.mirrored, height, width, 2 * pipeline.vae.config.latent_channels),
            {name: array.shape for name, array in self._empty.items()},
        )

    def captions(self, texts: Sequence[str | None]) -> Iterator[dict[str, np.ndarray]]:
        """The conditioning of each text, bfloat16 arrays by name; None is no caption."""
        for chosen, n in chunks(len(texts), self._captions):
            batch = [texts[i] for i in chosen]
            encoded = encode_batch(self._pipeline, [text or "" for text in batch], sharding=self.sharding)
            arrays = {name: np.asarray(array.astype(jnp.bfloat16)) for name, array in encoded.items()}
            for i, text in enumerate(batch[:n]):
                yield self._empty if text is None else {name: array[i] for name, array in arrays.items()}

    def pairs(self, read: Iterable[tuple[int, PreferencePair | Drop]]) -> Iterator[tuple[int, "EncodedPair | Drop"]]:
        """Encodes pairs by their rows.

        Args:
            read: rows with their pairs.

        Yields:
            the same rows in the same order, with what became of them.
        """
        order, done = collections.deque(), {}

        def noted():
            for row, pair in read:
                order.append(row)
                yield row, pair

        for row, result in self._in_batches(noted()):
            done[row] = result
            while order and order[0] in done:
                yield order[0], done.pop(order.popleft())

    def _in_batches(self, read: Iterable[tuple[int, PreferencePair | Drop]]) -> Iterator[tuple[int, Any]]:
        """`pairs`, but as the devices finish them: those of a batch, which is of one size, one after another."""
        batches: dict[Size, list[_Decoded]] = {size: [] for size in self.sizes}
        computing = None
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for row, fitted in in_order(pool, self._fit, read, ahead=4 * self._pairs):
                if isinstance(fitted, Drop):
                    yield row, fitted
                    continue
                batch = batches[fitted.size]
                batch.append(fitted)
                if len(batch) == self._pairs:
                    # The devices compute this batch while the one before is taken from them.
                    computing, done = (batch, self._moments(batch)), computing
                    batches[fitted.size] = []
                    yield from _taken(done)
            yield from _taken(computing)
            for batch in filter(None, batches.values()):
                yield from _taken((batch, self._moments(batch)))

    def _fit(self, item: tuple[int, PreferencePair | Drop]) -> "tuple[int, _Decoded | Drop]":
        row, pair = item
        if isinstance(pair, Drop):
            return row, pair
        images = []
        for name, data in zip(pair.names, (pair.winner, pair.loser), strict=True):
            image = decode_image(data, smallest_side=self.encoding.smallest_side)
            if isinstance(image, Drop):
                return row, image._replace(detail=f"{name}: {image.detail}")
            images.append(image)
        size = nearest_size(self.sizes, [(image.height, image.width) for image in images])
        crop, resample = self.encoding.crop, self.encoding.resample
        fitted = [
            fit_image(image, size, crop=crop, resample=resample, key=2 * row + place)
            for place, image in enumerate(images)
        ]
        kept = pair._replace(winner=b"", loser=b"")  # the encoded images are not needed any more
        return row, _Decoded(kept, *fitted)

    def _moments(self, batch: "Sequence[_Decoded]") -> jax.Array:
        """Of winner and loser of each pair, `[P, 2, k, h, w, 2 Z]`, on the devices; P is always the same."""
        filled = [batch[i] for i in next(chunks(len(batch), self._pairs))[0]]
        pixels = np.stack([fitted.pixels for pair in filled for fitted in (pair.winner, pair.loser)])
        pixels = pixels.reshape(self._pairs, 2, *pixels.shape[1:])
        vae = self._pipeline.vae
        return pixel_encoder(vae.graphdef, self.encoding.mirrored, vae.params, jax.device_put(pixels, self.sharding))


class EncodedPair(NamedTuple):
    """A pair without its images.

    Attributes:
        pair: with empty bytes for images.
        winner: moments of the preferred image, bfloat16 `[k, h, w, 2 Z]`, see `prepared.Shapes`.
        loser: of the other.
        sizes: int32 `[k, 2, 4]`, see `prepared.Records`.
        size: height and width in pixels that both images were cut to.
    """

    pair: PreferencePair
    winner: np.ndarray
    loser: np.ndarray
    sizes: np.ndarray
    size: Size


class _Decoded(NamedTuple):
    pair: PreferencePair
    winner: Fitted
    loser: Fitted

    @property
    def size(self) -> Size:
        """Height and width of both images, in pixels."""
        height, width, _ = self.winner.pixels.shape
        return height, width


def _taken(computed: tuple[list[_Decoded], jax.Array] | None) -> Iterator[tuple[int, EncodedPair]]:
    """The pairs of a batch, as soon as the devices have computed it."""
    if computed is None:
        return
    batch, moments = computed[0], np.asarray(computed[1])
    for decoded, (winner, loser) in zip(batch, moments[: len(batch)], strict=True):
        pair, *images = decoded
        plain = [(*fitted.original_size, *fitted.crop_top_left) for fitted in images]
        mirrored = [(*fitted.original_size, *_mirrored_crop(fitted)) for fitted in images]
        sizes = np.array([plain, mirrored][: moments.shape[2]], np.int32)
        yield pair.row, EncodedPair(pair, winner, loser, sizes, decoded.size)


def _mirrored_crop(fitted: Fitted) -> tuple[int, int]:
    """Top and left of the same crop in the mirror image of what was resized."""
    top, left = fitted.crop_top_left
    return top, fitted.resized_size[1] - fitted.pixels.shape[1] - left


def check_sizes(encoding: Encoding, vae: VAEConfig) -> None:
    """That an autoencoder can take images of every size.

    Raises:
        ValueError: it cannot; names the size.
    """
    vae.check_size("encoding: size", encoding.size)
    for size in encoding.sizes:
        vae.check_size("encoding: bucket", size)


# At module level, so that what is compiled outlives an encoder.
@partial(jax.jit, static_argnums=(0, 1))
def pixel_encoder(graphdef: nnx.GraphDef, mirrored: bool, params: dict, pixels: jax.Array) -> jax.Array:
    """uint8 `[P, 2, H, W, 3] -> [P, 2, k, h, w, 2 Z]` bfloat16."""
    vae = nnx.merge(graphdef, params)
    images = pixels.reshape(-1, *pixels.shape[2:])
    orientations = (images, images[:, :, ::-1]) if mirrored else (images,)
    moments = [
        jnp.concatenate(vae.encode(side.astype(jnp.float32) / 127.5 - 1), axis=-1).astype(jnp.bfloat16)
        for side in orientations
    ]
    return jnp.stack(moments, axis=1).reshape(*pixels.shape[:2], len(moments), *moments[0].shape[1:])


def in_order(pool: ThreadPoolExecutor, function: Callable[[T], R], items: Iterable[T], ahead: int) -> Iterator[R]:
    """`map` in threads that are at most `ahead` items ahead of what is taken."""
    running = collections.deque()
    for item in items:
        running.append(pool.submit(function, item))
        if len(running) > ahead:
            yield running.popleft().result()
    while running:
        yield running.popleft().result()


# ----------------------------------------------------------------------------------------------------------------------
# In memory


class EncodedSet(Records):
    """Encoded pairs in memory, for sets that are small enough: `Records` without preparing any."""

    def __init__(self, encoder: PairEncoder, reader: PairReader, selection: Selection, *, max_drop_share: float = 0.01):
        """Encodes all pairs of a selection.

        Args:
            encoder: of images and captions.
            reader: of the set.
            selection: of its rows.
            max_drop_share: of the rows that may be damaged.

        Raises:
            UserError: more of them are, or no pair is left.
            ValueError: a file is damaged.
        """
        self.drops = dict(selection.drops)
        self._pairs: list[dict[str, np.ndarray]] = []
        self._buckets: dict[Size, list[int]] = {size: [] for size in encoder.sizes}
        caption_of = dict(zip(selection.rows.tolist(), selection.caption_of.tolist(), strict=True))
        images = hashlib.sha256()

        def read():
            for row, pair in zip(selection.rows.tolist(), pairs(reader, selection.rows.tolist()), strict=True):
                images.update(image_digest(pair).encode())
                yield row, pair

        encoded = encoder.pairs(read())
        for row, result in tqdm(encoded, "encoding pairs", len(selection.rows), unit="pair"):
            if isinstance(result, Drop):
                self.drops[row] = result
            else:
                self._buckets[result.size].append(len(self._pairs))
                self._pairs.append(numbered(result, caption_of[row] + 1))
        check_damage(self.drops, selection.total, max_drop_share)
        account(selection, len(self._pairs), self.drops)
        self._captions = list(encoder.captions([None, *selection.captions]))
        self.shapes, self.image_size = encoder.shapes, encoder.encoding.size
        known = {**digests(selection), "images": images.hexdigest()}
        if len(encoder.sizes) > 1:
            known["buckets"] = str(encoder.sizes)
        self.fingerprint = hashlib.sha256(json.dumps(known).encode()).hexdigest()

    def __len__(self) -> int:
        """Number of pairs."""
        return len(self._pairs)

    def pair(self, index: int) -> dict[str, np.ndarray]:
        """See `Records`."""
        return self._pairs[index]

    def conditioning(self, caption: int) -> dict[str, np.ndarray]:
        """See `Records`."""
        return self._captions[caption]

    def buckets(self) -> dict[Size, Numbers]:
        """See `Records`."""
        return {size: numbers for size, numbers in self._buckets.items() if numbers}


def numbered(encoded: EncodedPair, caption: int) -> dict[str, np.ndarray]:
    """The record of a pair, with the number of its caption; see `Records.pair`."""
    arrays = {"winner": encoded.winner, "loser": encoded.loser, "sizes": encoded.sizes}
    first = np.bool_(encoded.pair.winner_first)
    return {"row": np.int64(encoded.pair.row), "caption": np.int64(caption), "winner_first": first} | arrays


def digests(selection: Selection) -> dict[str, str]:
    """SHA-256, as hexadecimal, of which rows are used and of what they say: rows, captions, winners, ids, scores."""
    captions = hashlib.sha256(selection.caption_of.tobytes())
    for caption in selection.captions:
        captions.update(caption.encode() + b"\0")
    rows = hashlib.sha256(selection.rows.tobytes())
    return {"rows": rows.hexdigest(), "captions": captions.hexdigest(), **selection.said}


def image_digest(pair: PreferencePair | Drop) -> str:
    """SHA-256 of both images, the first 16 hexadecimal digits, or why there are none."""
    if isinstance(pair, Drop):
        return pair.reason
    winner = hashlib.sha256(pair.winner).digest()
    return hashlib.sha256(winner + pair.loser).hexdigest()[:16]


def account(selection: Selection, count: int, drops: Mapping[int, Drop]) -> None:
    """That every row became one of `count` pairs, a tie or one of the `drops`.

    Raises:
        UserError: no pair is left.
    """
    total, ties = selection.total, selection.ties
    if total != count + ties + len(drops):  # nothing is lost without a word
        raise AssertionError(f"{total} rows, but {count} pairs, {ties} ties and {len(drops)} dropped rows")
    if not count:
        reasons = f"; {told_reasons(drops)}" if drops else ""
        raise UserError(f"no pair is left of {total} rows, {ties} of them ties{reasons}")


def check_damage(drops: Mapping[int, Drop], total: int, max_drop_share: float) -> None:
    """That no more than a share of all rows is damaged.

    Raises:
        UserError: more of them are; tells the reasons.
    """
    damaged = {row: drop for row, drop in drops.items() if drop.damaged}
    if len(damaged) > max_drop_share * total:
        raise UserError(
            f"{len(damaged)} of {total} rows are damaged ({len(damaged) / total:.1%}), more than "
            f"max_drop_share={max_drop_share:g} allows: {told_reasons(damaged)}; repair the set, or allow more"
        )


def told_reasons(drops: Mapping[int, Drop]) -> str:
    """How many rows were dropped for each reason, the most frequent first, with an example of each."""
    first = {}
    for row, drop in drops.items():
        first.setdefault(drop.reason, (row, drop.detail))
    counts = collections.Counter(drop.reason for drop in drops.values()).most_common()
    return "; ".join(
        f"{count} rows: {reason} (first: row {first[reason][0]}{', ' if first[reason][1] else ''}{first[reason][1]})"
        for reason, count in counts
    )
