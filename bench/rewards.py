"""PickScore beside transformers in torch, and the memory of a reward's gradient through the autoencoder."""

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from bench.common import random_network, time_in_turns
from flax_pref.checkpoints.weights import abstract_network, to_stored
from flax_pref.models.network import with_remat
from flax_pref.models.presets import CLIP_VIT_H, FAMILIES
from flax_pref.models.remat import Remat
from flax_pref.rewards.clip import ClipScore
from flax_pref.rewards.decoded import score_latents


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rewards:
    """Times PickScore, and counts the memory of its gradient."""

    batch_size: int = 8
    """Images that are scored at the same time."""
    rounds: int = 3
    """Timed batches of each, in turns; the median counts."""
    reference: bool = True
    """Also time transformers' CLIP in torch, eager, where it is installed (on the CPU)."""
    family: Literal["sd15", "sdxl"] = "sd15"
    """Whose autoencoder decodes."""
    size: int = 512
    """Side of the images in pixels."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    json: Path | None = None
    """File for the figures."""


def bench_rewards(bench: Rewards) -> dict:
    """Seconds per batch, ours and theirs, and GB per image."""
    return {
        **{"device": jax.devices()[0].device_kind, "jax": jax.__version__, "dtype": bench.dtype},
        "gradient": gradient_memory(bench),
        "pickscore": scoring(bench),
    }


def scoring(bench: Rewards) -> dict:
    """ViT-H/14 with random weights, on pixels and token ids that are ready; both have the same weights."""
    network = random_network("clip", CLIP_VIT_H, bench.dtype)
    reward = pickscore(network)
    rng = np.random.default_rng(0)
    view = rng.standard_normal((bench.batch_size, 224, 224, 3), np.float32)
    ids = rng.integers(1, 49000, (bench.batch_size, 77)).astype(np.int32)
    ids[:, -1] = CLIP_VIT_H.text_config.eos_token_id
    theirs = torch_pickscore(network.params, view, ids, bench.dtype) if bench.reference else None
    score = jax.jit(lambda reward, view, ids: reward.score(view, ids))
    candidates = {"seconds": lambda: score(reward, view, ids).block_until_ready()}
    if theirs is not None:
        candidates["torch_seconds"] = theirs
    medians = time_in_turns(candidates, bench.rounds)
    figures = {"batch_size": bench.batch_size, **{name: round(value, 3) for name, value in medians.items()}}
    if theirs is not None:
        difference = np.abs(np.asarray(score(reward, view, ids)) - theirs()).max()
        figures["ratio_to_torch"] = round(medians["seconds"] / medians["torch_seconds"], 3)
        figures["largest_difference"] = float(f"{difference:.2g}")
    return figures


def pickscore(network) -> ClipScore:
    """PickScore of a network; captions come as token ids."""
    return ClipScore(network.params, "pickscore", network.graphdef, CLIP_VIT_H.vision_config.image_size, np.asarray)


def torch_pickscore(params: dict, view: np.ndarray, ids: np.ndarray, dtype: str) -> Callable[[], np.ndarray] | None:
    """The same score by transformers in torch, in eager mode; None where it is not installed."""
    try:
        import torch
        import transformers
    except ImportError:
        print("transformers or torch is not installed: timing ours alone", file=sys.stderr)
        return None
    config = transformers.CLIPConfig(**CLIP_VIT_H.to_dict())
    with torch.device("meta"):
        clip = transformers.CLIPModel(config)
    weights = {name: torch.from_numpy(np.array(array, order="C")) for name, array in to_stored(params).items()}
    clip.load_state_dict(weights, strict=False, assign=True)
    for tower in (clip.text_model, clip.vision_model):  # what is no weight was not made on the meta device
        positions = tower.embeddings.position_embedding.num_embeddings
        tower.embeddings.register_buffer("position_ids", torch.arange(positions)[None], persistent=False)
    clip = clip.to(getattr(torch, dtype)).eval()
    pixels = torch.from_numpy(view).permute(0, 3, 1, 2).contiguous().to(getattr(torch, dtype))
    tokens = torch.from_numpy(ids).long()

    def run() -> np.ndarray:
        with torch.inference_mode():
            out = clip(input_ids=tokens, pixel_values=pixels)
            return out.logits_per_image.diagonal().float().numpy()

    return run


def gradient_memory(bench: Rewards) -> dict:
    """What the program of the gradient of PickScore with respect to one latent needs besides weights."""
    vae, clip = (
        abstract_network(kind, config, jnp.dtype(bench.dtype))
        for kind, config in (("vae", FAMILIES[bench.family].vae), ("clip", CLIP_VIT_H))
    )
    side = bench.size // vae.config.downscale_factor
    latents = jax.ShapeDtypeStruct((1, side, side, vae.config.latent_channels), jnp.float32)
    ids = jax.ShapeDtypeStruct((1, 77), jnp.int32)

    def gigabytes(remat: Remat) -> float:
        network = with_remat(vae, remat)

        def score(latents, params, reward, ids):
            return score_latents(reward, network._replace(params=params), latents, ids).sum()

        compiled = jax.jit(jax.grad(score)).lower(latents, network.params, pickscore(clip), ids).compile()
        memory = compiled.memory_analysis()
        assert memory is not None  # CPUs and accelerators tell it
        return round(memory.temp_size_in_bytes / 1e9, 2)

    return {
        **{"family": bench.family, "size": bench.size},
        "temporary_gb_per_image": {remat: gigabytes(remat) for remat in ("none", "block")},
    }
