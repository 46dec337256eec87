"""Checkpoints of each family with all their parts and CLIP's own tokens, small, with random weights."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from flax_pref.checkpoints.checkpoint import Pipeline
from flax_pref.checkpoints.single_file import LAYOUTS
from flax_pref.checkpoints.tokenizer import clip_tokenizer
from flax_pref.checkpoints.weights import abstract_network
from flax_pref.models.presets import SD15, SDXL


def small_pipeline(family: str) -> Pipeline:
    """A checkpoint whose sizes are as those of the family are to each other: "sd1", "sd2" or "sdxl"."""
    layout, like = LAYOUTS[family], SDXL if family == "sdxl" else SD15
    texts = [
        dataclasses.replace(
            text,
            hidden_size=64 * n,
            projection_dim=64 * n,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=n,
        )
        for n, text in enumerate(layout.text_configs, 1)
    ]
    unet = dataclasses.replace(
        like.unet,
        block_out_channels=(32, 64) if family == "sd1" else (64, 128),
        cross_attention_dim=sum(text.hidden_size for text in texts),
        attention_head_dim=8 if family == "sd1" else (1, 2),
        use_linear_projection=family != "sd1",
        **(SDXL_BLOCKS if family == "sdxl" else BLOCKS),
    )
    vae = dataclasses.replace(
        like.vae,
        block_out_channels=(32, 32),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
    )
    return Pipeline(
        unet=random_network("unet", unet),
        vae=random_network("vae", vae),
        text_encoders=tuple(random_network("text_encoder", text) for text in texts),
        tokenizers=tuple(clip_tokenizer(pad_token=token) for token in layout.pad_tokens),
        scheduler_config={**layout.scheduler_config, "prediction_type": "epsilon"},
        force_zeros_for_empty_prompt=family == "sdxl",
    )


BLOCKS = {
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}
SDXL_BLOCKS = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2),
    "projection_class_embeddings_input_dim": 128 + 6 * 256,
}


def random_network(kind, config):
    """A network with random weights, the same at each call."""
    network = abstract_network(kind, config)
    rng = np.random.default_rng(0)

    def drawn(leaf):
        return jnp.asarray(0.1 * rng.standard_normal(leaf.shape), jnp.float32)

    return network._replace(params=jax.tree.map(drawn, network.params))
