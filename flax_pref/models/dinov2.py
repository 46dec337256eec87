"""DINOv2 (arXiv:2304.07193), perhaps with registers (2309.16588): a vision transformer that has learned without labels.

Attribute names are those of the authors' files.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from flax_pref.models import config as config_io
from flax_pref.models.attention import attention
from flax_pref.models.layers import Conv, LayerNorm, Linear, gelu
from flax_pref.models.remat import recomputed
from flax_pref.shapes import Float, Squares

EPSILON = 1e-6
HEAD_SIZE = 64  # channels of each head in the authors' networks


@dataclasses.dataclass(frozen=True, kw_only=True)
class DINOv2Config:
    """Sizes, by the names of `config.json` of transformers; defaults are those that the file may leave out.

    Attributes:
        image_size: that the positions are stored for, in pixels.
        mlp_width: of the layer within an MLP.
        registers: tokens between that of the class and those of the patches.
    """

    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    image_size: int = 224
    patch_size: int = 14
    mlp_width: int = 3072
    use_swiglu_ffn: bool = False
    registers: int = 0

    def __post_init__(self):
        config_io.check_sizes(self, ("hidden_size", "num_attention_heads", "image_size", "patch_size", "mlp_width"))
        config_io.check_sizes(self, ("num_hidden_layers",), config_io.MOST_LAYERS)
        config_io.check_sizes(self, ("registers",), least=0)
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"DINOv2Config: hidden_size={self.hidden_size} is not a multiple of "
                f"num_attention_heads={self.num_attention_heads}"
            )
        if self.image_size < self.patch_size:
            raise ValueError(f"DINOv2Config: image_size={self.image_size} is less than patch_size={self.patch_size}")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "DINOv2Config":
        """Reads a parsed `config.json`; a ValueError names the field that is not supported."""
        only = {
            "model_type": ("dinov2", "dinov2_with_registers"),
            "hidden_act": ("gelu",),
            "num_channels": (3,),
            "qkv_bias": (True,),
            "layer_norm_eps": (EPSILON,),
        }
        ratio, width = values.get("mlp_ratio", 4), values.get("hidden_size", 768)
        if type(ratio) not in (int, float) or type(width) is not int or not 0 < ratio * width < config_io.LARGEST:
            raise ValueError(f"DINOv2Config: mlp_ratio={ratio!r:.80} is not supported; supported: a positive number")
        within = int(width * ratio)
        if values.get("use_swiglu_ffn"):
            within = (int(within * 2 / 3) + 7) // 8 * 8  # two thirds, rounded up to a multiple of 8
        registers = 0
        if values.get("model_type") == "dinov2_with_registers":
            registers = values.get("num_register_tokens", 4)
        known = {**values, "mlp_width": within, "registers": registers}
        return config_io.from_json(cls, known, only=only, strict=False)


class LayerScale(nnx.Module):
    """A factor for each channel (arXiv:2103.17239)."""

    def __init__(self, features: int, *, dtype, param_dtype):
        self.gamma = nnx.Param(jnp.ones((features,), param_dtype))
        self.dtype = dtype

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[B, T, D] -> [B, T, D]`."""
        return x * self.gamma[...].astype(self.dtype)


class DINOv2Attention(nnx.Module):
    """Multi-head self-attention."""

    def __init__(self, config: DINOv2Config, **kinds):
        self.query = Linear(config.hidden_size, config.hidden_size, **kinds)
        self.key = Linear(config.hidden_size, config.hidden_size, **kinds)
        self.value = Linear(config.hidden_size, config.hidden_size, **kinds)
        self.proj = Linear(config.hidden_size, config.hidden_size, **kinds)
        self.heads = config.num_attention_heads

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[B, T, D] -> [B, T, D]`."""
        q, k, v = (layer(x).reshape(*x.shape[:2], self.heads, -1) for layer in (self.query, self.key, self.value))
        return self.proj(attention(q, k, v).reshape(x.shape))


class DINOv2MLP(nnx.Module):
    """Two linear layers with the exact GELU between them."""

    def __init__(self, config: DINOv2Config, **kinds):
        self.fc1 = Linear(config.hidden_size, config.mlp_width, **kinds)
        self.fc2 = Linear(config.mlp_width, config.hidden_size, **kinds)

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[B, T, D] -> [B, T, D]`."""
        return self.fc2(gelu(self.fc1(x)))


class SwiGLU(nnx.Module):
    """A gated MLP (arXiv:2002.05202), of the giant network; gate and value are one layer."""

    def __init__(self, config: DINOv2Config, **kinds):
        self.w12 = Linear(config.hidden_size, 2 * config.mlp_width, **kinds)
        self.w3 = Linear(config.mlp_width, config.hidden_size, **kinds)

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[B, T, D] -> [B, T, D]`."""
        gate, value = jnp.split(self.w12(x), 2, axis=-1)
        return self.w3(jax.nn.silu(gate) * value)


class DINOv2Block(nnx.Module):
    """Attention and MLP, each behind a normalisation, scaled, and around a skip connection."""

    def __init__(self, config: DINOv2Config, *, dtype, param_dtype, rngs: nnx.Rngs):
        kinds = {"dtype": dtype, "param_dtype": param_dtype}
        self.norm1 = LayerNorm(config.hidden_size, epsilon=EPSILON, **kinds)
        self.attn = DINOv2Attention(config, **kinds, rngs=rngs)
        self.ls1 = LayerScale(config.hidden_size, **kinds)
        self.norm2 = LayerNorm(config.hidden_size, epsilon=EPSILON, **kinds)
        self.mlp = (SwiGLU if config.use_swiglu_ffn else DINOv2MLP)(config, **kinds, rngs=rngs)
        self.ls2 = LayerScale(config.hidden_size, **kinds)

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[B, T, D] -> [B, T, D]`."""
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp(self.norm2(x)))


class DINOv2PatchEmbed(nnx.Module):
    """A linear map of square patches that do not overlap."""

    def __init__(self, config: DINOv2Config, **kinds):
        self.proj = Conv(3, config.hidden_size, config.patch_size, stride=config.patch_size, **kinds)

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[B, H, W, 3] -> [B, patches, D]`, row by row."""
        x = self.proj(x)
        return x.reshape(x.shape[0], -1, x.shape[-1])


class DINOv2(nnx.Module):
    """The transformer; it sees images of the size that its positions are for."""

    def __init__(self, config: DINOv2Config, *, dtype=jnp.float32, param_dtype=jnp.float32, rngs: nnx.Rngs):
        kinds = {"dtype": dtype, "param_dtype": param_dtype}
        patches = (config.image_size // config.patch_size) ** 2
        self.cls_token = nnx.Param(jnp.zeros((1, 1, config.hidden_size), param_dtype))
        self.pos_embed = nnx.Param(jnp.zeros((1, patches + 1, config.hidden_size), param_dtype))
        if config.registers:
            self.register_tokens = nnx.Param(jnp.zeros((1, config.registers, config.hidden_size), param_dtype))
        self.patch_embed = DINOv2PatchEmbed(config, **kinds, rngs=rngs)
        self.blocks = nnx.List([DINOv2Block(config, **kinds, rngs=rngs) for _ in range(config.num_hidden_layers)])
        self.norm = LayerNorm(config.hidden_size, epsilon=EPSILON, **kinds)
        self.registers = config.registers

    def __call__(self, images: Squares) -> Float[jax.Array, "images features"]:
        """Normalised images `[B, S, S, 3]` to the last state of the class token, normalised, in float32."""
        x = self.patch_embed(jnp.asarray(images))

        def repeated(tokens: jax.Array) -> jax.Array:
            return jnp.broadcast_to(tokens.astype(x.dtype), (x.shape[0], *tokens.shape[1:]))

        positions = self.pos_embed[...].astype(x.dtype)
        first, patches = repeated(self.cls_token[...]) + positions[:, :1], x + positions[:, 1:]
        between = [repeated(self.register_tokens[...])] if self.registers else []
        x = jnp.concatenate([first, *between, patches], axis=1)
        for block in self.blocks:
            x = recomputed(lambda block, x: block(x), block, x)
        return self.norm(x[:, 0]).astype(jnp.float32)
