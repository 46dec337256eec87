"""Checkpoints of the smallest networks, prepared sets of random numbers, and runs of them, of both families."""

import dataclasses
import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from flax_pref.checkpoints.diffusers import Pipeline, save_pipeline
from flax_pref.checkpoints.tokenizer import CLIPTokenizer
from flax_pref.checkpoints.weights import abstract_network, save_network
from flax_pref.data.buckets import LETTERS
from flax_pref.data.pipeline import InputConfig
from flax_pref.data.prepared import (
    BUCKETS,
    CAPTIONS,
    PAIRS,
    Shapes,
    bits,
    caption_features,
    describe,
    pair_features,
    shard_name,
    write_shard,
)
from flax_pref.methods import DiffusionDPO
from flax_pref.models.clip import CLIPTextConfig
from flax_pref.models.clip_vision import CLIPConfig, CLIPVisionConfig
from flax_pref.models.network import Network
from flax_pref.models.presets import FAMILIES
from flax_pref.models.unet import UNetConfig
from flax_pref.models.vae import VAEConfig
from flax_pref.training.networks import LoRA
from flax_pref.training.optimizers import OptimizerConfig
from flax_pref.training.trainer import TrainConfig

WIDTH, LENGTH, LATENT, DOWNSCALE = 8, 8, 4, 2  # of a text encoder; tokens; channels; pixels per latent
TEXTS = ("a cat", "a dog", "a red tree", "the sea", "two birds")
FIRST_ROW = 100
# Attention is in the middle block only: most of the time that such networks take is XLA's, and grows with their layers.
_UNET = {
    **{"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "block_out_channels": (8,)},
    **{"sample_size": 8, "layers_per_block": 1, "norm_num_groups": 4},
    **{"attention_head_dim": 2, "in_channels": LATENT, "out_channels": LATENT},
}
_SDXL_UNET = {
    **{"addition_embed_type": "text_time", "addition_time_embed_dim": 4, "use_linear_projection": True},
    "projection_class_embeddings_input_dim": WIDTH + 6 * 4,
}
_VAE = VAEConfig(
    block_out_channels=(4, 4),
    down_block_types=("DownEncoderBlock2D",) * 2,
    up_block_types=("UpDecoderBlock2D",) * 2,
    norm_num_groups=2,
    sample_size=16,
    latent_channels=LATENT,
)


def tiny_checkpoint(folder: Path, family: str) -> Path:
    """Writes a whole checkpoint in the layout of diffusers, with random weights; family: "sd15" or "sdxl"."""
    tokenizer = _tokenizer()
    encoders = [_text_config(tokenizer, "CLIPTextModel")]
    unet = UNetConfig(**_UNET, cross_attention_dim=WIDTH)
    if family == "sdxl":
        encoders.append(_text_config(tokenizer, "CLIPTextModelWithProjection"))
        unet = UNetConfig(**_UNET, **_SDXL_UNET, cross_attention_dim=2 * WIDTH)
    pipeline = Pipeline(
        unet=_network("unet", unet, 0),
        vae=_network("vae", _VAE, 1),
        text_encoders=tuple(_network("text_encoder", config, 2 + i) for i, config in enumerate(encoders)),
        tokenizers=(tokenizer,) * len(encoders),
        scheduler_config=FAMILIES[family].scheduler_config,
        force_zeros_for_empty_prompt=family == "sdxl",
    )
    save_pipeline(pipeline, folder)
    return folder


def tiny_scorer(folder: Path) -> Path:
    """Writes a CLIP with its tokenizer, in the layout of transformers, for "pickscore" and others."""
    tokenizer = _tokenizer()
    config = CLIPConfig(
        text_config=_text_config(tokenizer, "CLIPTextModel"),
        vision_config=CLIPVisionConfig(
            **{"hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2},
            **{"image_size": 8, "patch_size": 4},
        ),
        projection_dim=WIDTH,
    )
    save_network(_network("clip", config, 0), folder)
    tokenizer.save(folder)
    return folder


def _tokenizer() -> CLIPTokenizer:
    """Every letter is a token."""
    letters = "abcdefghijklmnopqrstuvwxyz,."
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer({token: i for i, token in enumerate(tokens)}, (), model_max_length=LENGTH)


def _text_config(tokenizer: CLIPTokenizer, architecture: str) -> CLIPTextConfig:
    return CLIPTextConfig(
        architectures=(architecture,),
        vocab_size=len(tokenizer.vocab),
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        projection_dim=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=LENGTH,
        bos_token_id=tokenizer.vocab[tokenizer.bos_token],
        eos_token_id=tokenizer.vocab[tokenizer.eos_token],
    )


def _network(kind: str, config, seed: int) -> Network:
    network, rng = abstract_network(kind, config), np.random.default_rng(seed)

    def drawn(path, leaf):
        noise = rng.standard_normal(leaf.shape, np.float32)
        if path[-1].key == "scale":  # of a normalisation
            return 1 + 0.1 * noise
        return noise / math.sqrt(math.prod(leaf.shape[:-1])) if len(leaf.shape) > 1 else 0.1 * noise

    return network._replace(params=jax.tree.map_with_path(drawn, network.params))


def tiny_set(
    folder: Path,
    family: str,
    pairs: int = 24,
    mirrored: bool = True,
    size: tuple[int, int] = (16, 16),
    buckets: tuple[tuple[int, int], ...] = (),
) -> Path:
    """Writes a prepared set for `tiny_checkpoint`: pair i has row 100 + i and caption i % 5; the rest is random.

    Of all sizes, in ascending order, it has the one with number i % S.
    """
    sizes = sorted({size, *buckets})
    height, width = (side // DOWNSCALE for side in size)
    conditioning = {"encoder_hidden_states": (LENGTH, WIDTH)}
    if family == "sdxl":
        conditioning = {"encoder_hidden_states": (LENGTH, 2 * WIDTH), "text_embeds": (WIDTH,)}
    shapes, rng = Shapes((1 + mirrored, height, width, 2 * LATENT), conditioning), np.random.default_rng(0)

    def moments(size):
        mean = rng.standard_normal((1 + mirrored, *(side // DOWNSCALE for side in size), LATENT))
        return bits(np.concatenate([mean, np.full_like(mean, -4.0)], axis=-1).astype(jnp.bfloat16))

    def pair(i):
        size = sizes[i % len(sizes)]
        return {
            **{"row": FIRST_ROW + i, "caption": 1 + i % len(TEXTS), "winner": moments(size), "loser": moments(size)},
            **{"winner_first": i % 2 == 0, "sizes": np.tile(np.int32([*size, 0, 0]), (1 + mirrored, 2, 1))},
            **{"winner_id": "", "loser_id": "", "confidence": math.nan, "margin": math.nan},
        }

    def caption(i):
        drawn = {name: rng.standard_normal(shape) * (i > 0) for name, shape in conditioning.items()}
        arrays = {name: bits(array.astype(jnp.bfloat16)) for name, array in drawn.items()}
        return {"caption": ("", *TEXTS)[i], **arrays}

    metadata = {"settings": {"size": list(size)}, "counts": {"pairs": pairs}, "family": family, "mirrored": mirrored}
    if len(sizes) > 1:
        metadata[BUCKETS] = {"sizes": sizes, "shards": ["".join(LETTERS[i % len(sizes)] for i in range(pairs))]}
    for name, features, record, count in (
        (CAPTIONS, caption_features(shapes), caption, 1 + len(TEXTS)),
        (PAIRS, pair_features(shapes, several=len(sizes) > 1), pair, pairs),
    ):
        (folder / name).mkdir(parents=True)
        write_shard(folder / name / shard_name(name, 0, 1), features, map(record, range(count)))
        describe(folder / name, features, [count], metadata)
    return folder


def tiny_world(folder: Path, *families: str) -> Path:
    """Writes `sd15/`, a checkpoint, and `sd15-pairs/`, a prepared set, likewise of other families."""
    for family in families or ("sd15",):
        tiny_checkpoint(folder / family, family)
        tiny_set(folder / f"{family}-pairs", family)
    return folder


def tiny_run(output: Path, world: Path, family: str = "sd15", **changes) -> TrainConfig:
    """A short run of Diffusion-DPO in a `tiny_world`, every step recorded, with changed fields."""
    config = TrainConfig(
        output=output,
        model=str(world / family),
        data=world / f"{family}-pairs",
        method=DiffusionDPO(beta=100.0),
        lora=LoRA(rank=2),
        input=InputConfig(batch_size=4, flip=True, caption_dropout=0.2),
        optimizer=OptimizerConfig(learning_rate=0.01),
        steps=4,
        record_every=1,
    )
    return dataclasses.replace(config, **changes)


def saved_arrays(output: Path, step: int) -> dict[str, np.ndarray]:
    """The arrays of a run's checkpoint by their paths, those of keys as numbers."""
    folder = (output / "checkpoints" / str(step)).absolute()
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])

    def shape_of(described):  # float32 [2, 3]
        dtype, shape = described.split(" ", 1)
        dtype = jax.random.key(0).dtype if dtype.startswith("key") else jnp.dtype(dtype)
        return jax.ShapeDtypeStruct(tuple(json.loads(shape)), dtype, sharding=here)

    leaves = json.loads((folder / "manifest.json").read_bytes())["leaves"]
    with ocp.StandardCheckpointer() as orbax:
        arrays = orbax.restore(folder / "state", {name: shape_of(leaf) for name, leaf in leaves.items()})
    return {
        name: np.asarray(jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x)
        for name, x in arrays.items()
    }


def recorded(output: Path) -> list[dict]:
    """The lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
