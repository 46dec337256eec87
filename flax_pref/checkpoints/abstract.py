"""Checkpoints without their weights: shapes instead of parameters, for programs that are compiled and not run."""

from collections.abc import Sequence
from pathlib import Path

from flax_pref.checkpoints.diffusers import FAMILIES as CLASSES
from flax_pref.checkpoints.diffusers import Pipeline, not_a_folder
from flax_pref.checkpoints.hub import DEMO, find_checkpoint, find_files
from flax_pref.checkpoints.weights import LAYOUT, abstract_network, read_config
from flax_pref.files import read_json
from flax_pref.models.clip import CLIPTextConfig
from flax_pref.models.presets import FAMILIES, Family
from flax_pref.models.unet import UNetConfig

# What the presets describe, so that no network is needed; any other checkpoint's config files are read.
PUBLISHED = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": FAMILIES["sd15"],
    "stabilityai/stable-diffusion-xl-base-1.0": FAMILIES["sdxl"],
}


def abstract_pipeline(model: str, dtype) -> Pipeline:
    """The networks of a checkpoint with shapes instead of parameters, and no tokenizers.

    Args:
        model: as in `hub.find_checkpoint`; of a repository only the config files are downloaded, if anything.
        dtype: what the networks compute in and are kept in.

    Raises:
        FileNotFoundError: there is no such checkpoint, or the Hub cannot be reached.
        ValueError: a config file is not what these networks need.
    """
    family = describe(model)
    return Pipeline(
        unet=abstract_network("unet", family.unet, dtype),
        vae=abstract_network("vae", family.vae, dtype),
        text_encoders=tuple(abstract_network("text_encoder", config, dtype) for config in family.text_encoders),
        tokenizers=(),
        scheduler_config=family.scheduler_config,
        force_zeros_for_empty_prompt=len(family.text_encoders) == 2,
    )


def describe(model: str) -> Family:
    """The sizes of a checkpoint's networks; arguments and errors as `abstract_pipeline`."""
    if model in PUBLISHED and not Path(model).exists():
        return PUBLISHED[model]
    folder = find_checkpoint(DEMO) if model == DEMO else find_files(model, ["model_index.json", "*/*.json"])
    if folder.is_file():
        raise ValueError(f"{folder}: {not_a_folder(folder)}")
    class_name = read_json(folder / "model_index.json", expected=LAYOUT).get("_class_name")
    if class_name not in CLASSES:
        raise ValueError(
            f"{folder / 'model_index.json'}: _class_name={class_name!r} is not supported; supported: "
            f"{' or '.join(map(repr, CLASSES))}"
        )
    unet, vae = read_config("unet", folder / "unet"), read_config("vae", folder / "vae")
    side = unet.sample_size if isinstance(unet.sample_size, int) else max(unet.sample_size or (64,))
    return Family(
        unet,
        vae,
        tuple(read_config("text_encoder", folder / part) for part, _ in CLASSES[class_name]),
        resolution=side * vae.downscale_factor,
        scheduler_config=read_json(folder / "scheduler" / "scheduler_config.json", expected=LAYOUT),
    )


def conditioning_shapes(
    unet: UNetConfig, text_encoders: Sequence[CLIPTextConfig], *, sizes: bool
) -> dict[str, tuple[int, ...]]:
    """Shapes of the conditioning on one prompt; with or without sizes (SDXL) and guidance scale (LCM)."""
    shapes: dict[str, tuple[int, ...]] = {
        "encoder_hidden_states": (text_encoders[0].max_position_embeddings, unet.cross_attention_dim)
    }
    if len(text_encoders) == 2:
        shapes["text_embeds"] = (text_encoders[1].projection_dim,)
        if sizes:
            shapes["time_ids"] = (6,)
    if sizes and unet.time_cond_proj_dim is not None:
        shapes["timestep_cond"] = (unet.time_cond_proj_dim,)
    return shapes
