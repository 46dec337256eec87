"""Modules for tests of the page."""

import jax
import numpy as np

from flax_pref.checkpoints.lora import lora_network, save_lora
from flax_pref.models.lora import select_lora, split_lora


def save_modules(base, folder):
    """LoRA files of two modules, pos and neg, with random weights."""
    unet = lora_network(base, ("pos", "neg"), rank=2, alpha=2, key=jax.random.key(0))
    _, lora = split_lora(unet.params)
    rng = np.random.default_rng(0)
    lora = jax.tree.map(lambda leaf: leaf + 0.05 * rng.standard_normal(leaf.shape, np.float32), lora)
    for i, name in enumerate(("pos", "neg")):
        save_lora(select_lora(lora, i), folder / f"{name}.safetensors", alpha=2)
