"""MPS, the multi-dimensional preference score (arXiv:2405.14705, section 4): CLIP with attention between its towers.

The tokens of the image attend to those words of the prompt that are near a condition, a list of what people look at;
the score is the cosine between what the class token has become and the prompt.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from flax_pref.models.clip import end_positions
from flax_pref.models.clip_vision import CLIPConfig, CLIPModel
from flax_pref.models.layers import LayerNorm, Linear

NEAR = 0.3  # of the nearest word's similarity to the condition; words that are further away are not seen


@dataclasses.dataclass(frozen=True, kw_only=True)
class MPSConfig:
    """Sizes.

    Attributes:
        clip: both towers.
        layers: of cross-attention, each with a layer of self-attention after it.
        heads: of attention.
        head_width: channels of each.
        mlp_width: inside the gated feed-forward layers.
    """

    clip: CLIPConfig
    layers: int = 4
    heads: int = 16
    head_width: int = 64
    mlp_width: int = 4096


def attend(q: jax.Array, k: jax.Array, v: jax.Array, seen: jax.Array | None = None) -> jax.Array:
    """Attention in which all heads share keys and values (arXiv:1911.02150); softmax in float32.

    Args:
        q: `[B, T, N, Hd]` queries of N heads.
        k: `[B, S, Hd]` keys.
        v: `[B, S, Hd]` values.
        seen: `[B, S]`, true for keys that count; None: all do.

    Returns:
        `[B, T, N * Hd]`.
    """
    scores = jnp.einsum("btnh,bsh->bnts", q * q.shape[-1] ** -0.5, k, preferred_element_type=jnp.float32)
    if seen is not None:
        scores = jnp.where(seen[:, None, None], scores, -jnp.inf)
    mixed = jnp.einsum("bnts,bsh->btnh", jax.nn.softmax(scores).astype(v.dtype), v)
    return mixed.reshape(*q.shape[:2], -1)


def gated(x: jax.Array) -> jax.Array:
    """SwiGLU (arXiv:2002.05202): the first half of the channels, times the SiLU of the second."""
    value, gate = jnp.split(x, 2, axis=-1)
    return jax.nn.silu(gate) * value


def rotated(x: jax.Array, angles: jax.Array) -> jax.Array:
    """Rotary position embedding (arXiv:2104.09864): `[B, T, ..., Hd]` with both halves turned by angles `[T, Hd/2]`."""
    angles = angles.reshape(1, len(angles), *[1] * (x.ndim - 3), -1)
    first, second = jnp.split(x, 2, axis=-1)
    cos, sin = jnp.cos(angles).astype(x.dtype), jnp.sin(angles).astype(x.dtype)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


class CrossLayer(nnx.Module):
    """Cross-attention from image tokens to text tokens beside a feed-forward layer, around a skip connection."""

    def __init__(self, config: MPSConfig, *, dtype, param_dtype, rngs: nnx.Rngs):
        width, inside = config.clip.projection_dim, config.heads * config.head_width
        kinds: dict[str, Any] = {"use_bias": False, "dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.norm = LayerNorm(width, dtype=dtype, param_dtype=param_dtype)
        self.to_q = Linear(width, inside, **kinds)
        self.to_kv = Linear(width, 2 * config.head_width, **kinds)
        self.to_out = Linear(inside, width, **kinds)
        self.ff_in = Linear(width, 2 * config.mlp_width, **kinds)
        self.ff_out = Linear(config.mlp_width, width, **kinds)
        self.heads = config.heads

    def __call__(self, x: jax.Array, texts: jax.Array, seen: jax.Array) -> jax.Array:
        """`[B, T, D] -> [B, T, D]`, from texts `[B, S, D]` of which `seen` `[B, S]` count."""
        y = self.norm(x)
        q = self.to_q(y).reshape(*y.shape[:2], self.heads, -1)
        k, v = jnp.split(self.to_kv(texts), 2, axis=-1)
        return x + self.to_out(attend(q, k, v, seen)) + self.ff_out(gated(self.ff_in(y)))


class SelfLayer(nnx.Module):
    """Self-attention of image tokens beside a feed-forward layer, from one product, around a skip connection."""

    def __init__(self, config: MPSConfig, *, dtype, param_dtype, rngs: nnx.Rngs):
        width, inside = config.clip.projection_dim, config.heads * config.head_width
        kinds: dict[str, Any] = {"use_bias": False, "dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.widths = (inside, config.head_width, config.head_width, 2 * config.mlp_width)
        self.norm = LayerNorm(width, dtype=dtype, param_dtype=param_dtype)
        self.fused = Linear(width, sum(self.widths), **kinds)
        self.attn_out = Linear(inside, width, **kinds)
        self.ff_out = Linear(config.mlp_width, width, **kinds)
        # Read from the file, as its authors round it; 1 / 10000^(2i / Hd).
        self.inv_freq = nnx.Param(jnp.zeros(config.head_width // 2, jnp.float32))
        self.heads = config.heads

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[B, T, D] -> [B, T, D]`."""
        ends = [sum(self.widths[:i]) for i in range(1, len(self.widths))]
        q, k, v, ff = jnp.split(self.fused(self.norm(x)), ends, axis=-1)
        angles = jnp.outer(jnp.arange(x.shape[1], dtype=jnp.float32), self.inv_freq[...])
        q = rotated(q.reshape(*q.shape[:2], self.heads, -1), angles)
        return x + self.attn_out(attend(q, rotated(k, angles), v)) + self.ff_out(gated(ff))


class MPSModel(CLIPModel):
    """CLIP whose image tokens attend to the words of the prompt that the condition is about."""

    def __init__(self, config: MPSConfig, *, dtype=jnp.float32, param_dtype=jnp.float32, rngs: nnx.Rngs):
        kinds = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        super().__init__(config.clip, **kinds)
        self.cross = nnx.List([CrossLayer(config, **kinds) for _ in range(config.layers)])
        self.own = nnx.List([SelfLayer(config, **kinds) for _ in range(config.layers)])

    def __call__(self, images: jax.Array, texts: jax.Array, condition: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Embeddings whose cosine is the score.

        Args:
            images: `[B, S, S, 3]`, as for `CLIPVisionModel.encode_images`.
            texts: token ids of the prompts, `[B, T]`.
            condition: token ids of the condition, `[T]`.

        Returns:
            Of images and of prompts, `[B, P]` each, of any length.
        """
        _, last = self.text_model(jnp.concatenate([texts, condition[None]]))
        words = self.text_projection(last)
        words, wanted = words[:-1], words[-1]
        similarity = jnp.einsum("btp,sp->bts", words, wanted, preferred_element_type=jnp.float32).max(axis=-1)
        seen = similarity / similarity.max(axis=-1, keepdims=True) > NEAR
        x = self.visual_projection(self.vision_model.states(images))
        for cross, own in zip(self.cross, self.own, strict=True):
            x = own(cross(x, words, seen))
        ends = end_positions(texts, self.eos_token_id)
        return x[:, 0], words[jnp.arange(len(texts)), ends]
