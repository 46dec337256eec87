"""The autoencoder of Stable Diffusion (arXiv:2112.10752, section 3.1 and appendix G; the KL-regularised variant).

Images are `[B, H, W, 3]` in [-1, 1]; latents are `[B, H / f, W / f, Z]` with `f = config.downscale_factor`. Latents are
unscaled here: the diffusion model sees them multiplied by `config.scaling_factor`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from flax_pref.models import config as config_io
from flax_pref.models.attention import attention
from flax_pref.models.layers import Conv, Downsample2D, GroupNorm, Linear, ResnetBlock2D, Upsample2D
from flax_pref.models.remat import Remat, recomputed

EPSILON = 1e-6
MOST_BLOCKS = 8  # of a config that is not damaged

SUPPORTED = {
    "act_fn": ("silu",),
    "latents_mean": (None,),
    "latents_std": (None,),
    "shift_factor": (None,),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class VAEConfig:
    """Fields of `vae/config.json`; defaults are those that the file may leave out."""

    in_channels: int = 3
    out_channels: int = 3
    down_block_types: tuple[str, ...] = ("DownEncoderBlock2D",)
    up_block_types: tuple[str, ...] = ("UpDecoderBlock2D",)
    block_out_channels: tuple[int, ...] = (64,)
    layers_per_block: int = 1
    latent_channels: int = 4
    norm_num_groups: int = 32
    sample_size: int = 32
    scaling_factor: float = 0.18215
    force_upcast: bool = True
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    mid_block_add_attention: bool = True

    def __post_init__(self):
        for field, supported in (("down_block_types", "DownEncoderBlock2D"), ("up_block_types", "UpDecoderBlock2D")):
            kinds = getattr(self, field)
            if kinds != (supported,) * len(self.block_out_channels):
                raise ValueError(
                    f"VAEConfig: {field}={kinds!r} is not supported; supported: {supported!r} for each of the "
                    f"{len(self.block_out_channels)} block_out_channels"
                )
        sizes = ("in_channels", "out_channels", "block_out_channels", "latent_channels", "norm_num_groups")
        config_io.check_sizes(self, (*sizes, "sample_size"))
        config_io.check_sizes(self, ("layers_per_block",), config_io.MOST_LAYERS)
        if not 1 <= len(self.block_out_channels) <= MOST_BLOCKS:
            raise ValueError(
                f"VAEConfig: block_out_channels={self.block_out_channels!r:.80} is not supported; supported: 1 to "
                f"{MOST_BLOCKS} blocks"
            )
        if not self.scaling_factor > 0:
            raise ValueError(
                f"VAEConfig: scaling_factor={self.scaling_factor!r} is not supported; supported: a positive number"
            )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "VAEConfig":
        """Reads a parsed `vae/config.json`; a ValueError names the field that this autoencoder does not support."""
        return config_io.from_json(cls, values, only=SUPPORTED, strict=True)

    def to_dict(self) -> dict[str, Any]:
        """The config as the JSON object that diffusers reads."""
        return config_io.to_json(self, _class_name="AutoencoderKL", act_fn="silu")

    @property
    def downscale_factor(self) -> int:
        """Image pixels per latent pixel along one side."""
        return 2 ** (len(self.block_out_channels) - 1)

    def check_size(self, name: str, size: tuple[int, int]) -> None:
        """Raises a ValueError with this name unless images of this height and width in pixels have whole latents."""
        factor = self.downscale_factor
        if any(side < 1 or side % factor for side in size):
            raise ValueError(f"{name}={size}: height and width must be multiples of {factor}")


class VAEAttention(nnx.Module):
    """One attention head over all positions of a feature map, with a skip connection."""

    def __init__(self, channels: int, *, num_groups: int, dtype, param_dtype, rngs: nnx.Rngs):
        kinds = {"dtype": dtype, "param_dtype": param_dtype}
        self.group_norm = GroupNorm(channels, num_groups, epsilon=EPSILON, **kinds)
        self.to_q = Linear(channels, channels, **kinds, rngs=rngs)
        self.to_k = Linear(channels, channels, **kinds, rngs=rngs)
        self.to_v = Linear(channels, channels, **kinds, rngs=rngs)
        self.to_out = nnx.List([Linear(channels, channels, **kinds, rngs=rngs)])

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[B, H, W, C] -> [B, H, W, C]`."""
        batch, height, width, channels = x.shape
        tokens = self.group_norm(x).reshape(batch, height * width, 1, channels)
        out = attention(self.to_q(tokens), self.to_k(tokens), self.to_v(tokens))
        return x + self.to_out[0](out).reshape(x.shape)


def in_turn(layers: list[nnx.Module], x: jax.Array, remat: Remat) -> jax.Array:
    """`x` through the layers; with remat "block" the backward pass keeps what goes into each and nothing else."""
    for layer in layers:
        x = layer(x) if remat == "none" else recomputed(lambda layer, x: layer(x), layer, x)
    return x


class MidBlock(nnx.Module):
    """Resnet, resnet at the lowest resolution."""

    def __init__(self, channels: int, *, add_attention: bool, num_groups: int, dtype, param_dtype, rngs: nnx.Rngs):
        kinds = {"num_groups": num_groups, "dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.resnets = nnx.List([ResnetBlock2D(channels, channels, epsilon=EPSILON, **kinds) for _ in range(2)])
        self.attentions = nnx.List([VAEAttention(channels, **kinds)] if add_attention else [])
        self.remat: Remat = "none"

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[B, h, w, C] -> [B, h, w, C]`."""
        return in_turn([self.resnets[0], *self.attentions, self.resnets[1]], x, self.remat)


class DownEncoderBlock2D(nnx.Module):
    """Resnets, then a downsampling in all blocks but the last."""

    def __init__(self, in_channels, out_channels, *, num_layers, add_downsample, num_groups, dtype, param_dtype, rngs):
        kinds = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.resnets = nnx.List(
            [
                ResnetBlock2D(
                    in_channels if i == 0 else out_channels,
                    out_channels,
                    num_groups=num_groups,
                    epsilon=EPSILON,
                    **kinds,
                )
                for i in range(num_layers)
            ]
        )
        # One-sided padding: the encoder was trained so, and symmetric padding would shift the latents by half a pixel.
        self.downsamplers = nnx.List([Downsample2D(out_channels, padding=(0, 1), **kinds)] if add_downsample else [])
        self.remat: Remat = "none"

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[B, H, W, in] -> [B, H / 2, W / 2, out]`, or `[B, H, W, out]` in the last block."""
        return in_turn([*self.resnets, *self.downsamplers], x, self.remat)


class UpDecoderBlock2D(nnx.Module):
    """Resnets, then an upsampling in all blocks but the last."""

    def __init__(self, in_channels, out_channels, *, num_layers, add_upsample, num_groups, dtype, param_dtype, rngs):
        kinds = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.resnets = nnx.List(
            [
                ResnetBlock2D(
                    in_channels if i == 0 else out_channels,
                    out_channels,
                    num_groups=num_groups,
                    epsilon=EPSILON,
                    **kinds,
                )
                for i in range(num_layers)
            ]
        )
        self.upsamplers = nnx.List([Upsample2D(out_channels, **kinds)] if add_upsample else [])
        self.remat: Remat = "none"

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[B, H, W, in] -> [B, 2H, 2W, out]`, or `[B, H, W, out]` in the last block."""
        return in_turn([*self.resnets, *self.upsamplers], x, self.remat)


class VAEEncoder(nnx.Module):
    """Image to the moments of its latents."""

    def __init__(self, config: VAEConfig, *, dtype, param_dtype, rngs: nnx.Rngs):
        kinds = {"dtype": dtype, "param_dtype": param_dtype}
        groups = {"num_groups": config.norm_num_groups, **kinds, "rngs": rngs}
        channels = config.block_out_channels
        self.conv_in = Conv(config.in_channels, channels[0], 3, padding=(1, 1), **kinds, rngs=rngs)
        self.down_blocks = nnx.List(
            [
                DownEncoderBlock2D(
                    channels[max(i - 1, 0)],
                    channels[i],
                    num_layers=config.layers_per_block,
                    add_downsample=i < len(channels) - 1,
                    **groups,
                )
                for i in range(len(channels))
            ]
        )
        self.mid_block = MidBlock(channels[-1], add_attention=config.mid_block_add_attention, **groups)
        self.conv_norm_out = GroupNorm(channels[-1], config.norm_num_groups, epsilon=EPSILON, **kinds)
        self.conv_out = Conv(channels[-1], 2 * config.latent_channels, 3, padding=(1, 1), **kinds, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        """`[B, H, W, 3] -> [B, h, w, 2 Z]`."""
        x = self.conv_in(images)
        for block in self.down_blocks:
            x = block(x)
        x = self.mid_block(x)
        return self.conv_out(jax.nn.silu(self.conv_norm_out(x)))


class VAEDecoder(nnx.Module):
    """Latents to image."""

    def __init__(self, config: VAEConfig, *, dtype, param_dtype, rngs: nnx.Rngs):
        kinds = {"dtype": dtype, "param_dtype": param_dtype}
        groups = {"num_groups": config.norm_num_groups, **kinds, "rngs": rngs}
        channels = config.block_out_channels[::-1]
        self.conv_in = Conv(config.latent_channels, channels[0], 3, padding=(1, 1), **kinds, rngs=rngs)
        self.mid_block = MidBlock(channels[0], add_attention=config.mid_block_add_attention, **groups)
        self.up_blocks = nnx.List(
            [
                UpDecoderBlock2D(
                    channels[max(i - 1, 0)],
                    channels[i],
                    num_layers=config.layers_per_block + 1,
                    add_upsample=i < len(channels) - 1,
                    **groups,
                )
                for i in range(len(channels))
            ]
        )
        self.conv_norm_out = GroupNorm(channels[-1], config.norm_num_groups, epsilon=EPSILON, **kinds)
        self.conv_out = Conv(channels[-1], config.out_channels, 3, padding=(1, 1), **kinds, rngs=rngs)

    def __call__(self, latents: jax.Array) -> jax.Array:
        """`[B, h, w, Z] -> [B, H, W, 3]`."""
        x = self.mid_block(self.conv_in(latents))
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(jax.nn.silu(self.conv_norm_out(x)))


class AutoencoderKL(nnx.Module):
    """Encoder and decoder with the 1x1 convolutions between them and the latents."""

    def __init__(self, config: VAEConfig, *, dtype=jnp.float32, param_dtype=jnp.float32, rngs: nnx.Rngs):
        kinds = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        moments = 2 * config.latent_channels
        self.config = config
        self.encoder = VAEEncoder(config, **kinds)
        self.quant_conv = Conv(moments, moments, 1, **kinds) if config.use_quant_conv else None
        self.post_quant_conv = (
            Conv(config.latent_channels, config.latent_channels, 1, **kinds) if config.use_post_quant_conv else None
        )
        self.decoder = VAEDecoder(config, **kinds)

    def encode(self, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Moments of the posterior `q(latents | image) = N(mean, exp(logvar))`.

        Args:
            images: `[B, H, W, 3]` in [-1, 1]; height and width multiples of `config.downscale_factor`.

        Returns:
            `(mean, logvar)`, each `[B, H / f, W / f, Z]`, unscaled; logvar is limited to [-30, 20].
        """
        moments = self.encoder(images)
        if self.quant_conv is not None:
            moments = self.quant_conv(moments)
        mean, logvar = jnp.split(moments, 2, axis=-1)
        return mean, jnp.clip(logvar, -30.0, 20.0)

    def decode(self, latents: jax.Array) -> jax.Array:
        """Images of unscaled latents: `[B, h, w, Z] -> [B, H, W, 3]` in about [-1, 1], not clipped."""
        if self.post_quant_conv is not None:
            latents = self.post_quant_conv(latents)
        return self.decoder(latents)
