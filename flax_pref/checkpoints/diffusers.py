"""Stable Diffusion checkpoints as folders in the layout of diffusers, in and out, without torch.

A folder holds `model_index.json` and one subfolder per component: `unet/`, `vae/`, `text_encoder/`, `tokenizer/`,
`scheduler/`, and in SDXL `text_encoder_2/` and `tokenizer_2/`. How a network's folder is read is in
`checkpoints/weights.py`; where a Hub id leads is in `checkpoints/hub.py`.
"""

from functools import partial
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from flax_pref.checkpoints.checkpoint import FAMILIES, Checkpoint, Part, Pipeline
from flax_pref.checkpoints.hub import find_checkpoint, find_description
from flax_pref.checkpoints.model_flags import ModelFlags, PredictionType
from flax_pref.checkpoints.single_file import read_single_file
from flax_pref.checkpoints.tokenizer import load_tokenizer
from flax_pref.checkpoints.weights import COMPONENTS, LAYOUT, Placement, load_network, read_config, save_network
from flax_pref.files import new_folder, read_json, write_json
from flax_pref.models.network import Network
from flax_pref.models.presets import FAMILIES as FAMILY_PRESETS

# What the presets describe, so that a description needs no network; any other checkpoint's config files are read.
PUBLISHED = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": FAMILY_PRESETS["sd15"],
    "stabilityai/stable-diffusion-xl-base-1.0": FAMILY_PRESETS["sdxl"],
}


def load_pipeline(
    path_or_id: str | Path,
    dtype=jnp.float32,
    *,
    param_dtype=None,
    variant: str | None = None,
    place: Placement | None = None,
    with_unet: bool = True,
    vae: str | Path | None = None,
    text_encoders: str | Path | None = None,
    prediction_type: PredictionType | None = None,
    clip_skip: int | None = None,
) -> Pipeline:
    """Reads a Stable Diffusion 1.x, 2.x or XL checkpoint.

    Args:
        path_or_id: folder in the layout of diffusers, single file in the layout of the original code (`.safetensors` or
            `.ckpt`), id of a Hub repository, or "demo", the small checkpoint of this package (64 x 64 pixels); see
            `hub.find_checkpoint`.
        dtype: what the networks compute in. An autoencoder that needs float32's range (`force_upcast`) computes in
            float32 where float16 is asked for.
        param_dtype: what their parameters are kept in; None: as `dtype`.
        variant: of the weight files, e.g. "fp16"; None: the full ones if they are there, else the half ones.
        place: says where each parameter goes; None: the default device.
        with_unet: False leaves out the weights of the UNet, by far the most, where only the encoders are needed.
        vae: checkpoint to take the autoencoder from, or an autoencoder that is kept alone (default: the checkpoint's).
        text_encoders: checkpoint to take text encoders and tokenizers from (default: the checkpoint's).
        prediction_type: of a single file that does not say what its UNet predicts.
        clip_skip: layer of the text encoders that the UNet sees, counted from the last, which is 1 (default: 1, or 2
            for SDXL).

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: the pipeline, a config field or a weight is not what these networks need, or a file is damaged.

    Example:
        >>> pipeline = fp.load_pipeline("demo")  # or "stable-diffusion-v1-5/stable-diffusion-v1-5"
        >>> pipeline.scheduler_config["_class_name"]
        'DDIMScheduler'
    """
    checkpoint = open_checkpoint(
        path_or_id,
        variant=variant,
        vae=vae,
        text_encoders=text_encoders,
        prediction_type=prediction_type,
        clip_skip=clip_skip,
    )
    return checkpoint.load(dtype, param_dtype=param_dtype, place=place, with_unet=with_unet)


def open_checkpoint(
    path_or_id: str | Path,
    *,
    variant: str | None = None,
    vae: str | Path | None = None,
    text_encoders: str | Path | None = None,
    prediction_type: PredictionType | None = None,
    clip_skip: int | None = None,
    weights: bool = True,
) -> Checkpoint:
    """Finds the parts of a checkpoint and reads what describes them, not their weights.

    Args:
        path_or_id, variant, vae, text_encoders, prediction_type, clip_skip: as for `load_pipeline`.
        weights: False: of a Hub repository only the files that describe the networks are downloaded.

    Raises:
        FileNotFoundError, ValueError: as `load_pipeline`.
    """
    described = not weights and path_or_id in PUBLISHED and not Path(path_or_id).exists()
    find = partial(find_checkpoint, variant=variant) if weights else find_description
    found = Path(path_or_id) if described else find(path_or_id)
    if described:
        checkpoint = _published(str(path_or_id))
    elif found.is_file():
        checkpoint = read_single_file(found, prediction_type=prediction_type)
    elif prediction_type is not None:
        raise ValueError(
            f"{found}: prediction_type={prediction_type!r} beside a folder, whose scheduler_config.json says it; "
            "expected it for a single file only"
        )
    else:
        checkpoint = read_folder(found, variant=variant)
    if vae is not None:
        checkpoint = checkpoint.with_vae(open_vae(vae, checkpoint.class_name, variant=variant))
    if text_encoders is not None:
        found = find_checkpoint(text_encoders, variant=variant)
        checkpoint = checkpoint.with_text_encoders(_open_beside(found, checkpoint.class_name, variant))
    return checkpoint if clip_skip is None else checkpoint.with_clip_skip(clip_skip)


def open_model(flags: ModelFlags, *, weights: bool = True) -> Checkpoint:
    """The checkpoint that flags ask for; see `open_checkpoint`."""
    return open_checkpoint(
        flags.model,
        variant=flags.variant,
        vae=flags.vae,
        text_encoders=flags.text_encoders,
        prediction_type=flags.prediction_type,
        clip_skip=flags.clip_skip,
        weights=weights,
    )


def open_vae(path_or_id: str | Path, class_name: str, *, variant: str | None = None) -> Part:
    """Finds the autoencoder of a checkpoint, or one that is kept alone.

    Args:
        path_or_id: as for `load_pipeline`, or a folder with the config.json of an autoencoder.
        class_name: of the checkpoint that it is for.
        variant: of the weight files.

    Raises:
        FileNotFoundError, ValueError: as `load_pipeline`.
    """
    found = find_checkpoint(path_or_id, variant=variant)
    if (found / "config.json").is_file():
        return _part("vae", found, variant)
    return _open_beside(found, class_name, variant).part("vae")


def _open_beside(found: Path, class_name: str, variant: str | None) -> Checkpoint:
    """A checkpoint whose UNet is not used, for parts of one of this class."""
    return read_single_file(found, class_name=class_name) if found.is_file() else read_folder(found, variant=variant)


def read_folder(folder: Path, *, variant: str | None = None) -> Checkpoint:
    """Reads what describes the parts of a folder in the layout of diffusers.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: the pipeline or a config field is not what these networks need, or a file is damaged.
    """
    index_file = folder / "model_index.json"
    index = read_json(index_file, expected=LAYOUT)
    class_name = index.get("_class_name")
    if class_name not in FAMILIES:
        raise ValueError(
            f"{index_file}: _class_name={class_name!r} is not supported; supported: {' or '.join(map(repr, FAMILIES))}"
        )
    # The default of the class in diffusers; published SDXL folders say true.
    zeros = index.get("force_zeros_for_empty_prompt", True)
    if not isinstance(zeros, bool):
        raise ValueError(f"{index_file}: force_zeros_for_empty_prompt={zeros!r:.80}; expected true or false")
    kinds = {"unet": "unet", "vae": "vae", **{name: "text_encoder" for name, _ in FAMILIES[class_name]}}
    scheduler_file = folder / "scheduler" / "scheduler_config.json"
    return Checkpoint(
        path=folder,
        class_name=class_name,
        networks={name: _part(kind, folder / name, variant) for name, kind in kinds.items()},
        read_tokenizers=lambda: tuple(load_tokenizer(folder / name) for _, name in FAMILIES[class_name]),
        scheduler_config=read_json(scheduler_file, expected=LAYOUT),
        described_by=scheduler_file,
        force_zeros_for_empty_prompt=class_name == "StableDiffusionXLPipeline" and zeros,
    )


def _published(name: str) -> Checkpoint:
    """A published checkpoint as the presets describe it."""
    family, folder = PUBLISHED[name], Path(name)
    class_name = next(key for key, folders in FAMILIES.items() if len(folders) == len(family.text_encoders))
    encoders = [part for part, _ in FAMILIES[class_name]]
    parts = [("unet", "unet", family.unet), ("vae", "vae", family.vae)]
    parts += [(part, "text_encoder", config) for part, config in zip(encoders, family.text_encoders, strict=True)]
    return Checkpoint(
        path=folder,
        class_name=class_name,
        networks={
            part: Part(config, folder / part, partial(load_network, kind, folder / part))
            for part, kind, config in parts
        },
        read_tokenizers=lambda: tuple(load_tokenizer(folder / part) for _, part in FAMILIES[class_name]),
        scheduler_config=family.scheduler_config,
        described_by=folder / "scheduler" / "scheduler_config.json",
        force_zeros_for_empty_prompt=len(encoders) == 2,
    )


def _part(kind: str, folder: Path, variant: str | None) -> Part:
    return Part(read_config(kind, folder), folder, partial(load_network, kind, folder, variant=variant))


def open_unet(folder: Path) -> Part:
    """A `unet/` folder whose weights are not read yet; errors as `read_config`."""
    return _part("unet", folder, None)


def load_unet(folder: str | Path, dtype=jnp.float32, **options) -> Network:
    """Reads a `unet/` folder; arguments and errors as in `weights.load_network`."""
    return load_network("unet", folder, dtype, **options)


def load_vae(folder: str | Path, dtype=jnp.float32, **options) -> Network:
    """Reads a `vae/` folder; arguments and errors as in `weights.load_network`."""
    return load_network("vae", folder, dtype, **options)


def load_text_encoder(folder: str | Path, dtype=jnp.float32, **options) -> Network:
    """Reads a `text_encoder/` or `text_encoder_2/` folder; arguments and errors as in `weights.load_network`."""
    return load_network("text_encoder", folder, dtype, **options)


def save_pipeline(pipeline: Pipeline, folder: str | Path, *, dtype=jnp.float32) -> None:
    """Writes a folder that `DiffusionPipeline.from_pretrained` of diffusers and `load_pipeline` read.

    The folder appears under its name only when it is complete.

    Args:
        pipeline: what to write.
        folder: must not exist, or be empty.
        dtype: of the stored weights, e.g. `jnp.float16`.

    Raises:
        FileExistsError: `folder` holds something.
        ValueError: a network holds parameters that its published form has not, e.g. LoRA matrices.

    Example:
        >>> pipeline = fp.load_pipeline("demo")
        >>> fp.save_pipeline(pipeline, "copy", dtype="float16")
        >>> fp.load_pipeline("copy").unet.config == pipeline.unet.config
        True
    """
    with new_folder(folder) as unfinished:
        write_json(unfinished / "model_index.json", write_parts(pipeline, unfinished, dtype=dtype))


def write_parts(pipeline: Pipeline, folder: Path, *, dtype=jnp.float32, weights: bool = True) -> dict[str, Any]:
    """Writes the networks, tokenizers and scheduler of `save_pipeline` into a folder; returns its model_index.json.

    Without weights, networks are only described.
    """
    folders = FAMILIES[pipeline.class_name]
    networks = {"unet": pipeline.unet, "vae": pipeline.vae}
    networks |= {name: network for (name, _), network in zip(folders, pipeline.text_encoders, strict=True)}
    index = {
        "_class_name": pipeline.class_name,
        **{name: list(_library(network)) for name, network in networks.items()},
        **{name: ["transformers", "CLIPTokenizer"] for _, name in folders},
        "scheduler": ["diffusers", pipeline.scheduler_config["_class_name"]],
    }
    if pipeline.class_name == "StableDiffusionXLPipeline":
        index["force_zeros_for_empty_prompt"] = pipeline.force_zeros_for_empty_prompt
    else:
        index |= {"safety_checker": [None, None], "feature_extractor": [None, None], "requires_safety_checker": False}
    for name, network in networks.items():
        if weights:
            save_network(network, folder / name, dtype=dtype)
        else:
            write_json(folder / name / "config.json", network.config.to_dict())
    for (_, name), tokenizer in zip(folders, pipeline.tokenizers, strict=True):
        tokenizer.save(folder / name)
    write_json(folder / "scheduler" / "scheduler_config.json", pipeline.scheduler_config)
    return index


def _library(network: Network) -> tuple[str, str]:
    component = next(component for component in COMPONENTS.values() if isinstance(network.config, component.config))
    return component.library(network.config)
