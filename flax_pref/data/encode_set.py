"""Encodes a preference set for training: the whole of it, or the part of one of several processes."""

import contextlib
import dataclasses
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from flax_pref.checkpoints.abstract import describe
from flax_pref.checkpoints.checkpoint import Checkpoint
from flax_pref.checkpoints.diffusers import open_model
from flax_pref.checkpoints.model_flags import PLACES
from flax_pref.checkpoints.modules import fingerprint
from flax_pref.config import check_output_folder
from flax_pref.data.buckets import size_text
from flax_pref.data.columns import Columns
from flax_pref.data.encode import Encoding, PairEncoder, check_sizes
from flax_pref.data.images import decode_image
from flax_pref.data.inspection import write_inspection
from flax_pref.data.pairs import PairReader
from flax_pref.data.preparation import INSPECTION, EncodeConfig, Preparation
from flax_pref.data.prepared import BUCKETS, PreparedSet
from flax_pref.data.selection import Selection, select
from flax_pref.data.sources import Layout, Source, open_source
from flax_pref.diffusion.conditioning import warn_of_cuts
from flax_pref.diffusion.text_to_image import trained_size
from flax_pref.files import one_writer
from flax_pref.models.platform import default_dtype
from flax_pref.parallel.agreement import Content, agree, begin_together, flat
from flax_pref.parallel.hosts import join, watched
from flax_pref.parallel.mesh import make_mesh

# What may differ between hosts. Of the inputs, which may lie elsewhere, the content is compared when it is known.
FREE_OF_HOSTS = ("hosts", *PLACES, "source.path", "mesh", "encoding.batch_size")


def encode(
    pairs: str | Path,
    output: str | Path,
    *,
    model: str,
    layout: Layout = "folder",
    columns: Columns | None = None,
    size: tuple[int, int] | None = None,
    bucket_step: int | None = None,
    batch_size: int = 2,
) -> PreparedSet:
    """Encodes a preference set for training: latents of the images, embeddings of the captions.

    Prints counts. Called again with the same arguments after a kill, it resumes. `encode_set` takes all other settings.

    Args:
        pairs: file or folder of the preference set, local or gs://...; for "pick_a_pic" and "datasets" also the Hub
            id of a dataset.
        output: folder of the prepared set.
        model: checkpoint whose autoencoder and text encoders are used: folder, Hub id, or "demo".
        layout: layout of the preference set; the default is a folder with pairs.jsonl and images.
        columns: columns of the set, for layout "datasets".
        size: height and width in pixels that images are resized and cut to (default: the size that the UNet was
            trained on).
        bucket_step: encodes each pair in the size nearest to its aspect ratio, see `Encoding.bucket_step`; 64 for SDXL
            (default: all pairs in one size).
        batch_size: pairs that a device encodes at the same time.

    Returns:
        the prepared set in `output`.

    Raises:
        UserError, ValueError, OSError: the set cannot be read, or not be written.

    Example:
        >>> records = fp.encode("pairs", "runs/pairs", model="demo")
        >>> len(records), records.image_size
        (4, (64, 64))
    """
    if size is None:
        family = describe(model)
        size = trained_size(family.unet, family.vae)
    encode_set(
        EncodeConfig(
            output=Path(output),
            model=model,
            source=Source(layout=layout, path=str(pairs), columns=columns or Columns()),
            encoding=Encoding(size=size, bucket_step=bucket_step, batch_size=batch_size),
        )
    )
    return PreparedSet(output)


def encode_set(config: EncodeConfig) -> None:
    """Writes the prepared set, or the shards that it lacks; with `inspect`, only shows what it is made from.

    Prints counts. Run again with the same config after a kill, it resumes.

    Raises:
        UserError, ValueError, OSError: the set cannot be read, or not be written.
    """
    process, processes = join(config.hosts)
    with watched():
        _encode_part(config, process, processes)


def _encode_part(config: EncodeConfig, process: int, processes: int) -> None:
    """The part of one of several processes, or all of it."""
    begin_together(config, FREE_OF_HOSTS)
    reader = open_source(config.source)
    if config.inspect:
        selection = _selection(reader, config, process)
        if process == 0:
            _inspect(reader, selection, config)
        return
    check_output_folder(config.output)
    with one_writer(config.output) if process == 0 else contextlib.nullcontext():
        _encode(reader, config, process, processes)


def _encode(reader: PairReader, config: EncodeConfig, process: int, processes: int) -> None:
    """Writes the shards of one of several processes, and in process 0 what describes them."""
    checkpoint = open_model(config)
    check_sizes(config.encoding, checkpoint.config("vae"))
    mesh = make_mesh(config.mesh, jax.local_devices())
    selection = _selection(reader, config, process)
    preparation = Preparation(
        config.output,
        reader,
        selection,
        _settings_of(config, checkpoint),
        shard_size=config.shard_size,
        max_drop_share=config.max_drop_share,
        process_index=process,
        process_count=processes,
    )
    agree(lambda: flat(_contents_of(preparation, config), free=(*PLACES, "source.path")))
    preparation.begin()
    if preparation.finished:
        print(f"{config.output}: is complete; nothing to do")
        return
    pipeline = checkpoint.load(jnp.dtype(default_dtype(config.dtype)), with_unet=False)
    if process == 0:
        warn_of_cuts(pipeline, selection.captions)
    encoder = PairEncoder(pipeline, config.encoding, None if mesh.size == 1 else mesh)
    preparation.encode(encoder)
    metadata = preparation.finish(encoder.shapes)
    if process == 0:
        counts = metadata["counts"]
        print(
            f"{config.output}: {counts['rows']} rows = {counts['pairs']} pairs + {counts['ties']} ties + "
            f"{counts['dropped']} dropped; {counts['captions']} captions"
        )
        for reason, count in metadata["dropped"].items():
            print(f"  {count} dropped: {reason}")
        if BUCKETS in metadata:
            for size, pairs in PreparedSet(config.output).buckets().items():
                print(f"  {len(pairs)} pairs of {size_text(size)} pixels (height x width)")


def _selection(reader: PairReader, config: EncodeConfig, process: int) -> Selection:
    selection = select(reader, config.choice)
    if process == 0:
        print(_summary(selection, config))
    return selection


def _summary(selection: Selection, config: EncodeConfig) -> str:
    """What became of the rows before any image was read."""
    kept, dropped = len(selection.rows), len(selection.drops)
    lines = [
        f"{config.source.path}: {selection.total} rows = {kept} pairs + {selection.ties} ties + {dropped} dropped; "
        f"{len(selection.captions)} captions"
    ]
    if config.choice.unique_roles:
        cost = selection.cost_of_unique_roles
        lines.append(f"unique roles cost {cost} of {kept + cost} pairs")
    return "\n".join(lines)


def _inspect(reader: PairReader, selection: Selection, config: EncodeConfig) -> None:
    """Writes the page with random pairs."""
    file = check_output_folder(config.output) / INSPECTION
    write_inspection(
        file,
        reader,
        selection,
        config.inspect,
        title=f"{config.source.path} ({config.source.layout}, {config.source.split})",
        decode=partial(decode_image, smallest_side=config.encoding.smallest_side),
    )
    print(f"wrote {file}")


def _contents_of(preparation: Preparation, config: EncodeConfig) -> dict[str, Any]:
    """The settings that the set is begun with, in which hashes tell what the inputs hold, wherever they lie."""
    settings = dict(preparation.settings)
    places = {"model_sha256": config.model, "source_sha256": config.source.path}
    for name, path in places.items():
        settings[name] = {part: Content(path, sha256) for part, sha256 in settings[name].items()}
    return settings


def _settings_of(config: EncodeConfig, checkpoint: Checkpoint) -> dict[str, Any]:
    """What the records depend on; with other settings the set is another one."""
    sizes = config.encoding.sizes
    encoding = {**dataclasses.asdict(config.encoding), BUCKETS: sizes}
    # Without buckets the settings are those of sets that were encoded before there were any.
    for name in ("batch_size", "bucket_step", "bucket_aspect", *((BUCKETS,) if len(sizes) == 1 else ())):
        del encoding[name]
    parts = checkpoint.contents(("vae", *checkpoint.text_encoders))
    return {
        **{"source": config.source.settings(), "choice": dataclasses.asdict(config.choice)},
        **{"model": config.model, "model_sha256": {part: fingerprint(path) for part, path in parts.items()}},
        **({} if config.clip_skip is None else {"clip_skip": config.clip_skip}),
        **{**encoding, "dtype": default_dtype(config.dtype)},
    }
