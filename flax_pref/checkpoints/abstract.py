"""Checkpoints without their weights: shapes instead of parameters, for programs that are compiled and not run."""

from collections.abc import Sequence

from flax_pref.checkpoints.checkpoint import Pipeline
from flax_pref.checkpoints.diffusers import open_model
from flax_pref.checkpoints.model_flags import ModelFlags
from flax_pref.checkpoints.weights import abstract_network
from flax_pref.models.clip import CLIPTextConfig
from flax_pref.models.presets import Family
from flax_pref.models.unet import UNetConfig


def abstract_pipeline(model: str | ModelFlags, dtype) -> Pipeline:
    """The networks of a checkpoint with shapes instead of parameters, and no tokenizers.

    Args:
        model: as for `diffusers.load_pipeline`, or with flags for its parts; of a repository only the config files are
            downloaded, if anything.
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


def describe(model: str | ModelFlags) -> Family:
    """The sizes of a checkpoint's networks; arguments and errors as `abstract_pipeline`."""
    checkpoint = open_model(ModelFlags(model=model) if isinstance(model, str) else model, weights=False)
    unet, vae = checkpoint.config("unet"), checkpoint.config("vae")
    side = unet.sample_size if isinstance(unet.sample_size, int) else max(unet.sample_size or (64,))
    return Family(
        unet,
        vae,
        tuple(checkpoint.config(name) for name in checkpoint.text_encoders),
        resolution=side * vae.downscale_factor,
        scheduler_config=checkpoint.scheduler_config,
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
