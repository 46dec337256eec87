"""The denoising UNet of Stable Diffusion 1.x, 2.x (arXiv:2112.10752) and SDXL (arXiv:2307.01952).

Top to bottom: `conv_in`, the down blocks, the mid block, the up blocks (each joins the activations that the down path
left at its resolution), `conv_out`. Every block sees the timestep; blocks named `CrossAttn...` see the text.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from flax_pref.models import config as config_io
from flax_pref.models.attention import Kernel, attention, check_kernel
from flax_pref.models.layers import (
    Conv,
    Downsample2D,
    GroupNorm,
    LayerNorm,
    Linear,
    ResnetBlock2D,
    Upsample2D,
    gated_gelu,
    halves,
    projections,
    silu,
    timestep_embedding,
)
from flax_pref.models.lora import rows_of_an_image
from flax_pref.models.platform import in_parts, per_device, platform, unless_differentiated, weights_divided
from flax_pref.models.remat import Remat, recomputed

SUPPORTED = {
    "act_fn": ("silu",),
    "addition_embed_type": (None, "text_time"),
    "attention_type": ("default",),
    "class_embed_type": (None,),
    "conv_in_kernel": (3,),
    "conv_out_kernel": (3,),
    "cross_attention_norm": (None,),
    "downsample_padding": (1,),
    "dropout": (0.0,),
    "dual_cross_attention": (False,),
    "encoder_hid_dim": (None,),
    "encoder_hid_dim_type": (None,),
    "mid_block_scale_factor": (1,),
    "mid_block_type": ("UNetMidBlock2DCrossAttn",),
    "num_attention_heads": (None,),
    "num_class_embeds": (None,),
    "resnet_out_scale_factor": (1,),
    "resnet_skip_time_act": (False,),
    "resnet_time_scale_shift": ("default",),
    "reverse_transformer_layers_per_block": (None,),
    "time_embedding_act_fn": (None,),
    "time_embedding_type": ("positional",),
    "timestep_post_act": (None,),
    # Without effect here: softmax is always float32, and the other two belong to features refused above.
    "addition_embed_type_num_heads": tuple(range(1, 1025)),
    "class_embeddings_concat": (None, False, True),
    "upcast_attention": (None, False, True),
}
CPU_BLOCK = 512  # positions
# Bytes of activations that a transformer on a TPU takes at once: inside it are eight times as many, and 128 MB of
# vector memory. Blocks on v5e at once and in parts, in million cycles with their kernels: two of SDXL with adapters, 4
# images of 6 rows, 64 x 64 x 640 116.3 and 88.8 (and 1377 and 346 MB of main memory), 32 x 32 x 1280 45.3 and 40.3; one
# of SD1.5, 64 x 64 x 320 33.6 and 26.4; without adapters, 4 images of 2 rows, 64 x 64 x 320 9.3 and 8.4. But in parts
# of less than this, 32 x 32 x 640, 2.2 and 2.6.
AT_ONCE = 12 * 2**20
BLOCK_TYPES = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}
MOST_BLOCKS, MOST_TOTAL = 8, 1000  # of a config that is not damaged


@dataclasses.dataclass(frozen=True, kw_only=True)
class UNetConfig:
    """Fields of `unet/config.json`; defaults are those that the file may leave out.

    `attention_head_dim` is the *number* of attention heads: the name is an old mistake that published files keep.
    """

    sample_size: int | tuple[int, int] | None = None
    in_channels: int = 4
    out_channels: int = 4
    center_input_sample: bool = False
    flip_sin_to_cos: bool = True
    freq_shift: float = 0
    down_block_types: tuple[str, ...] = (*("CrossAttnDownBlock2D",) * 3, "DownBlock2D")
    up_block_types: tuple[str, ...] = ("UpBlock2D", *("CrossAttnUpBlock2D",) * 3)
    only_cross_attention: bool | tuple[bool, ...] = False
    mid_block_only_cross_attention: bool | None = None
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers_per_block: int = 2
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    cross_attention_dim: int = 1280
    transformer_layers_per_block: int | tuple[int, ...] = 1
    attention_head_dim: int | tuple[int, ...] = 8
    use_linear_projection: bool = False
    time_embedding_dim: int | None = None
    time_cond_proj_dim: int | None = None
    addition_embed_type: str | None = None
    addition_time_embed_dim: int | None = None
    projection_class_embeddings_input_dim: int | None = None

    def __post_init__(self):
        depth = len(self.block_out_channels)
        for field, supported in BLOCK_TYPES.items():
            kinds = getattr(self, field)
            if len(kinds) != depth or not set(kinds) <= set(supported):
                raise ValueError(
                    f"UNetConfig: {field}={kinds!r} is not supported; supported: {' or '.join(supported)} for each of "
                    f"the {depth} block_out_channels"
                )
        for field in ("layers_per_block", "cross_attention_dim", "norm_num_groups"):
            if not isinstance(getattr(self, field), int):
                value = getattr(self, field)
                raise ValueError(
                    f"UNetConfig: {field}={value!r} is not supported; supported: one integer for all blocks"
                )
        for field in ("attention_head_dim", "transformer_layers_per_block", "only_cross_attention"):
            value = getattr(self, field)
            if not isinstance(value, int) and (len(value) != depth or not all(isinstance(v, int) for v in value)):
                raise ValueError(
                    f"UNetConfig: {field}={value!r} is not supported; supported: one value, or one for each of the "
                    f"{depth} block_out_channels"
                )
        sizes = ("in_channels", "out_channels", "block_out_channels", "norm_num_groups", "cross_attention_dim")
        more = (
            "attention_head_dim",
            "time_embedding_dim",
            "time_cond_proj_dim",
            "addition_time_embed_dim",
            "sample_size",
        )
        config_io.check_sizes(self, (*sizes, *more, "projection_class_embeddings_input_dim"))
        config_io.check_sizes(self, ("layers_per_block",), config_io.MOST_LAYERS)
        config_io.check_sizes(self, ("transformer_layers_per_block",), config_io.MOST_LAYERS, least=0)
        # On the way down and, with one more in each block, on the way up.
        layers = (2 * self.layers_per_block + 1) * sum(1 + n for n in self.per_block("transformer_layers_per_block"))
        if not 1 <= depth <= MOST_BLOCKS or layers > MOST_TOTAL:
            raise ValueError(
                f"UNetConfig: layers_per_block={self.layers_per_block}, transformer_layers_per_block="
                f"{self.transformer_layers_per_block!r:.80} and {depth} block_out_channels is not supported; "
                f"supported: 1 to {MOST_BLOCKS} blocks with up to {MOST_TOTAL} layers in all"
            )
        for channels, heads in zip(self.block_out_channels, self.per_block("attention_head_dim"), strict=True):
            if channels % heads:
                raise ValueError(
                    f"UNetConfig: attention_head_dim={self.attention_head_dim!r} (the number of heads) does not divide "
                    f"{channels} of block_out_channels={self.block_out_channels!r}"
                )
        if self.addition_embed_type == "text_time" and not (
            self.addition_time_embed_dim and self.projection_class_embeddings_input_dim
        ):
            raise ValueError(
                "UNetConfig: addition_embed_type='text_time' needs addition_time_embed_dim and "
                "projection_class_embeddings_input_dim"
            )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "UNetConfig":
        """Reads a parsed `unet/config.json`; a ValueError names the field that is not supported."""
        return config_io.from_json(cls, values, only=SUPPORTED, strict=True)

    def to_dict(self) -> dict[str, Any]:
        """The config as the JSON object that diffusers reads."""
        return config_io.to_json(self, _class_name="UNet2DConditionModel", act_fn="silu")

    def per_block(self, field: str) -> tuple:
        """A field that is given once or per block, as one value per down block."""
        value = getattr(self, field)
        return value if isinstance(value, tuple) else (value,) * len(self.block_out_channels)

    @property
    def time_channels(self) -> int:
        """Size of the time embedding."""
        return self.time_embedding_dim or 4 * self.block_out_channels[0]


class TimestepEmbedding(nnx.Module):
    """Two linear layers over a sinusoidal embedding; float32, for it is small and everything hangs on it.

    With `cond_channels`, a projected condition is added to the embedding first.
    """

    def __init__(
        self, in_channels: int, out_channels: int, *, cond_channels: int | None = None, param_dtype, rngs: nnx.Rngs
    ):
        self.cond_proj = (
            Linear(cond_channels, in_channels, use_bias=False, param_dtype=param_dtype, rngs=rngs)
            if cond_channels is not None
            else None
        )
        self.linear_1 = Linear(in_channels, out_channels, param_dtype=param_dtype, rngs=rngs)
        self.linear_2 = Linear(out_channels, out_channels, param_dtype=param_dtype, rngs=rngs)

    def __call__(self, x: jax.Array, condition: jax.Array | None = None) -> jax.Array:
        """`[B, in]`, and `[B, cond]` or None, to `[B, out]`."""
        if condition is not None:
            assert self.cond_proj is not None, "see UNet2DCondition.embed_time"
            x = x + self.cond_proj(condition.astype(jnp.float32))
        return self.linear_2(jax.nn.silu(self.linear_1(x)))


# Keys and values `[B, S, C]` that one attention makes of an encoded prompt.
KeysAndValues = tuple[jax.Array, jax.Array]


class Context(NamedTuple):
    """An encoded prompt, as layers see it.

    Attributes:
        states: `[B, S, D]`, or what `UNet2DCondition.project_text` has made of them.
        seen: `[B, S]`, true for states that count; None: all do.
    """

    states: jax.Array | tuple[KeysAndValues, ...]
    seen: jax.Array | None


class Attention(nnx.Module):
    """Multi-head attention from `channels` to itself or to a context."""

    def __init__(self, channels: int, context_channels: int, *, num_heads: int, dtype, param_dtype, rngs: nnx.Rngs):
        kinds = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.to_q = Linear(channels, channels, use_bias=False, **kinds)
        self.to_k = Linear(context_channels, channels, use_bias=False, **kinds)
        self.to_v = Linear(context_channels, channels, use_bias=False, **kinds)
        self.to_out = nnx.List([Linear(channels, channels, **kinds)])
        self.num_heads = num_heads
        self.kernel: Kernel = "auto"
        self.number = 0  # among those that attend to the text, see `UNet2DCondition.project_text`

    def __call__(self, x: jax.Array, context: Context | None = None) -> jax.Array:
        """`[B, T, C] -> [B, T, C]`; without a context the positions of x attend to each other."""
        if context is None:
            projected, seen = projections(x, [self.to_q, self.to_k, self.to_v]), None
        else:
            states, seen = context
            known = states[self.number] if isinstance(states, tuple) else self.keys_and_values(states)
            projected = self.to_q(x), *known
        q, k, v = (y.reshape(*y.shape[:2], self.num_heads, -1) for y in projected)
        return self.to_out[0](attention(q, k, v, seen=seen, kernel=self.kernel).reshape(x.shape))

    def keys_and_values(self, states: jax.Array) -> KeysAndValues:
        """`[B, S, D] -> [B, S, C]` each."""
        keys, values = projections(states, [self.to_k, self.to_v])
        return keys, values


class GEGLU(nnx.Module):
    """A linear layer gated by the exact GELU of another (arXiv:2002.05202, equation 6)."""

    def __init__(self, in_features: int, out_features: int, **kinds):
        self.proj = Linear(in_features, 2 * out_features, **kinds)

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[..., in] -> [..., out]`."""
        value, gate = halves(x, self.proj)
        return gated_gelu(value, gate)


class Identity(nnx.Module):
    """Stands where the published network has a dropout of rate zero, so that its neighbours keep their numbers."""

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[...] -> [...]`."""
        return x


class FeedForward(nnx.Module):
    """Gated feed-forward layer with four times the channels inside."""

    def __init__(self, channels: int, **kinds):
        self.net = nnx.List(
            [GEGLU(channels, 4 * channels, **kinds), Identity(), Linear(4 * channels, channels, **kinds)]
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[B, T, C] -> [B, T, C]`."""
        batch, length, channels = x.shape
        if platform() != "cpu" or length < 2 * CPU_BLOCK or length % CPU_BLOCK:
            return self.transform(x)
        # Positions are independent: a block of them at a time stays in a CPU's cache, a quarter faster.
        blocks = x.reshape(batch, -1, CPU_BLOCK, channels).swapaxes(0, 1)
        return jax.lax.map(self.transform, blocks).swapaxes(0, 1).reshape(x.shape)

    def transform(self, x: jax.Array) -> jax.Array:
        """`[B, T, C] -> [B, T, C]`."""
        for layer in self.net:
            x = layer(x)
        return x


class BasicTransformerBlock(nnx.Module):
    """Self-attention, attention to the text and a feed-forward layer, each normalised before and added to its input."""

    def __init__(
        self,
        channels: int,
        cross_attention_dim: int,
        *,
        num_heads: int,
        only_cross_attention: bool,
        dtype,
        param_dtype,
        rngs: nnx.Rngs,
    ):
        kinds = {"dtype": dtype, "param_dtype": param_dtype}
        heads = {"num_heads": num_heads, **kinds, "rngs": rngs}
        self.norm1 = LayerNorm(channels, **kinds)
        self.attn1 = Attention(channels, cross_attention_dim if only_cross_attention else channels, **heads)
        self.norm2 = LayerNorm(channels, **kinds)
        self.attn2 = Attention(channels, cross_attention_dim, **heads)
        self.norm3 = LayerNorm(channels, **kinds)
        self.ff = FeedForward(channels, **kinds, rngs=rngs)
        self.only_cross_attention = only_cross_attention

    def attentions_to_text(self) -> tuple[Attention, ...]:
        """Those of its layers that attend to the text."""
        return (self.attn1, self.attn2) if self.only_cross_attention else (self.attn2,)

    def __call__(self, x: jax.Array, context: Context) -> jax.Array:
        """`[B, T, C] -> [B, T, C]`."""
        h = self.norm1(x)
        x = x + self.attn1(h, context if self.only_cross_attention else None)
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class Transformer2DModel(nnx.Module):
    """Transformer blocks over the positions of a feature map, between two projections and around a skip connection."""

    def __init__(
        self,
        channels: int,
        *,
        config: UNetConfig,
        num_heads: int,
        num_layers: int,
        only_cross_attention: bool,
        dtype,
        param_dtype,
        rngs: nnx.Rngs,
    ):
        kinds = {"dtype": dtype, "param_dtype": param_dtype}
        # The same arithmetic; checkpoints store the one as matrices and the other as 1x1 convolutions.
        project = Linear if config.use_linear_projection else functools.partial(Conv, kernel_size=1)
        self.norm = GroupNorm(channels, config.norm_num_groups, epsilon=1e-6, **kinds)
        self.proj_in = project(channels, channels, **kinds, rngs=rngs)
        self.transformer_blocks = nnx.List(
            [
                BasicTransformerBlock(
                    channels,
                    config.cross_attention_dim,
                    num_heads=num_heads,
                    only_cross_attention=only_cross_attention,
                    **kinds,
                    rngs=rngs,
                )
                for _ in range(num_layers)
            ]
        )
        self.proj_out = project(channels, channels, **kinds, rngs=rngs)

    def __call__(self, x: jax.Array, context: Context) -> jax.Array:
        """`[B, H, W, C] -> [B, H, W, C]`."""
        parts = self.parts(x) if platform() == "tpu" else 1
        if parts == 1:
            return self.transform(x, context)
        graphdef, params = nnx.split(self)
        if isinstance(context.states, tuple):  # the others would go through the loop in vain
            own = {layer.number for block in self.transformer_blocks for layer in block.attentions_to_text()}
            context = context._replace(states=tuple(y if i in own else None for i, y in enumerate(context.states)))

        def at_once(params, x, context):
            return nnx.merge(graphdef, params).transform(x, context)

        def in_turns(params, x, context):
            return in_parts(functools.partial(at_once, params), (x, context), parts)

        return unless_differentiated(in_turns, at_once)(params, x, context)

    def parts(self, x: jax.Array) -> int:
        """In how many equal parts a TPU transforms its images, one after another, for its vector memory to hold each.

        Rows that adapters tell apart stay together.
        """
        rows, share = rows_of_an_image(self), per_device(len(x))
        if share == 0 or share % rows or len(x) % share:  # a batch that the devices do not divide into whole images
            return 1
        # Devices that divide weights would send each other more: a step of configs/sd15/dpo.py on v5e:2x2 takes 1.02
        # times as long.
        if weights_divided():
            return 1
        images, image_bytes = share // rows, rows * x.nbytes // len(x)
        divisors = [parts for parts in range(1, images + 1) if images % parts == 0]
        return next((parts for parts in divisors if images // parts * image_bytes <= AT_ONCE), images)

    def transform(self, x: jax.Array, context: Context) -> jax.Array:
        """`[B, H, W, C] -> [B, H, W, C]`, all images at once."""
        h = self.proj_in(self.norm(x))
        tokens = h.reshape(x.shape[0], -1, x.shape[-1])
        for block in self.transformer_blocks:
            tokens = block(tokens, context)
        return x + self.proj_out(tokens.reshape(x.shape))


def resnet_and_transformer(
    resnet: ResnetBlock2D,
    transformer: Transformer2DModel | None,
    x: jax.Array,
    temb: jax.Array,
    context: Context,
    remat: Remat,
) -> jax.Array:
    """`[B, H, W, in] -> [B, H, W, out]`; with remat "block" the backward pass keeps the arguments and nothing else."""

    def pair(modules, x, temb, context):
        resnet, transformer = modules
        x = resnet(x, temb)
        return x if transformer is None else transformer(x, context)

    inputs = (resnet, transformer), x, temb, context
    return pair(*inputs) if remat == "none" else recomputed(pair, *inputs)


# `attend(channels)` builds the transformer that follows a resnet; blocks without attention to the text get None.
Attend = Callable[[int], Transformer2DModel]


class DownBlock2D(nnx.Module):
    """Resnets, each followed by a transformer if the block attends to the text; then a downsampling."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        num_layers: int,
        attend: Attend | None,
        add_downsample: bool,
        resnet: Callable[[int, int], ResnetBlock2D],
        **kinds,
    ):
        self.resnets = nnx.List(
            [resnet(in_channels if i == 0 else out_channels, out_channels) for i in range(num_layers)]
        )
        self.attentions = nnx.List([attend(out_channels) for _ in range(num_layers)] if attend else [])
        self.downsamplers = nnx.List([Downsample2D(out_channels, padding=(1, 1), **kinds)] if add_downsample else [])
        self.remat: Remat = "none"

    def __call__(self, x: jax.Array, temb: jax.Array, context: Context) -> tuple[jax.Array, list[jax.Array]]:
        """`[B, H, W, in]` to the block's output and all its intermediate activations, for the up path."""
        skips = []
        for resnet, transformer in itertools.zip_longest(self.resnets, self.attentions):
            x = resnet_and_transformer(resnet, transformer, x, temb, context, self.remat)
            skips.append(x)
        for downsample in self.downsamplers:
            x = downsample(x)
            skips.append(x)
        return x, skips


class UNetMidBlock2DCrossAttn(nnx.Module):
    """Resnet, transformer, resnet at the lowest resolution."""

    def __init__(self, channels: int, *, attend: Attend, resnet: Callable[[int, int], ResnetBlock2D]):
        self.resnets = nnx.List([resnet(channels, channels) for _ in range(2)])
        self.attentions = nnx.List([attend(channels)])
        self.remat: Remat = "none"

    def __call__(self, x: jax.Array, temb: jax.Array, context: Context) -> jax.Array:
        """`[B, h, w, C] -> [B, h, w, C]`."""
        for resnet, transformer in itertools.zip_longest(self.resnets, self.attentions):
            x = resnet_and_transformer(resnet, transformer, x, temb, context, self.remat)
        return x


class UpBlock2D(nnx.Module):
    """Resnets that each take in one activation of the down path, otherwise like `DownBlock2D`; then an upsampling."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        skip_channels: list[int],
        *,
        attend: Attend | None,
        add_upsample: bool,
        resnet: Callable[[int, int], ResnetBlock2D],
        **kinds,
    ):
        self.resnets = nnx.List(
            [
                resnet((in_channels if i == 0 else out_channels) + skip, out_channels)
                for i, skip in enumerate(skip_channels)
            ]
        )
        self.attentions = nnx.List([attend(out_channels) for _ in skip_channels] if attend else [])
        self.upsamplers = nnx.List([Upsample2D(out_channels, **kinds)] if add_upsample else [])
        self.remat: Remat = "none"

    def __call__(self, x: jax.Array, skips: list[jax.Array], temb: jax.Array, context: Context) -> jax.Array:
        """`[B, H, W, in] -> [B, 2H, 2W, out]`; takes its activations off the end of `skips`."""
        for resnet, transformer in itertools.zip_longest(self.resnets, self.attentions):
            x = jnp.concatenate([x, skips.pop()], axis=-1)
            x = resnet_and_transformer(resnet, transformer, x, temb, context, self.remat)
        for upsample in self.upsamplers:
            x = upsample(x, size=skips[-1].shape[1:3])
        return x


class UNet2DCondition(nnx.Module):
    """Predicts the noise (or velocity, as trained) in latents from timestep and text.

    From random initialisation its prediction is zero: the last convolution starts at zero.
    """

    def __init__(self, config: UNetConfig, *, dtype=jnp.float32, param_dtype=jnp.float32, rngs: nnx.Rngs):
        kinds = {"dtype": dtype, "param_dtype": param_dtype}
        channels = config.block_out_channels
        last = len(channels) - 1
        resnet = functools.partial(
            ResnetBlock2D,
            temb_channels=config.time_channels,
            num_groups=config.norm_num_groups,
            epsilon=config.norm_eps,
            **kinds,
            rngs=rngs,
        )
        heads, depths, only_cross = (
            config.per_block(field)
            for field in ("attention_head_dim", "transformer_layers_per_block", "only_cross_attention")
        )
        mid_only_cross = config.mid_block_only_cross_attention
        if mid_only_cross is None:
            mid_only_cross = config.only_cross_attention is True

        def transformer(level: int, only_cross_attention: bool) -> Attend:
            return functools.partial(
                Transformer2DModel,
                config=config,
                num_heads=heads[level],
                num_layers=depths[level],
                only_cross_attention=only_cross_attention,
                **kinds,
                rngs=rngs,
            )

        self.config = config
        self.dtype = dtype
        self.time_embedding = TimestepEmbedding(
            channels[0],
            config.time_channels,
            cond_channels=config.time_cond_proj_dim,
            param_dtype=param_dtype,
            rngs=rngs,
        )
        self.add_embedding = (
            TimestepEmbedding(
                config.projection_class_embeddings_input_dim, config.time_channels, param_dtype=param_dtype, rngs=rngs
            )
            if config.addition_embed_type == "text_time" and config.projection_class_embeddings_input_dim is not None
            else None
        )

        self.conv_in = Conv(config.in_channels, channels[0], 3, padding=(1, 1), **kinds, rngs=rngs)
        down_blocks, skips = [], [channels[0]]
        for level, kind in enumerate(config.down_block_types):
            down_blocks.append(
                DownBlock2D(
                    channels[max(level - 1, 0)],
                    channels[level],
                    num_layers=config.layers_per_block,
                    attend=transformer(level, only_cross[level]) if kind == "CrossAttnDownBlock2D" else None,
                    add_downsample=level < last,
                    resnet=resnet,
                    **kinds,
                    rngs=rngs,
                )
            )
            skips += [channels[level]] * (config.layers_per_block + (level < last))
        self.down_blocks = nnx.List(down_blocks)

        self.mid_block = UNetMidBlock2DCrossAttn(channels[-1], attend=transformer(last, mid_only_cross), resnet=resnet)

        up_blocks = []
        for i, kind in enumerate(config.up_block_types):
            level = last - i
            up_blocks.append(
                UpBlock2D(
                    channels[min(level + 1, last)],
                    channels[level],
                    [skips.pop() for _ in range(config.layers_per_block + 1)],
                    attend=transformer(level, only_cross[level]) if kind == "CrossAttnUpBlock2D" else None,
                    add_upsample=level > 0,
                    resnet=resnet,
                    **kinds,
                    rngs=rngs,
                )
            )
        self.up_blocks = nnx.List(up_blocks)

        self.conv_norm_out = GroupNorm(channels[0], config.norm_num_groups, epsilon=config.norm_eps, **kinds)
        zeros = nnx.initializers.zeros_init()
        self.conv_out = Conv(channels[0], config.out_channels, 3, padding=(1, 1), kernel_init=zeros, **kinds, rngs=rngs)
        for number, layer in enumerate(self.attentions_to_text()):
            layer.number = number

    def __call__(
        self,
        latents: jax.Array,
        timesteps: jax.Array,
        encoder_hidden_states: jax.Array | tuple[KeysAndValues, ...],
        text_embeds: jax.Array | None = None,
        time_ids: jax.Array | None = None,
        timestep_cond: jax.Array | None = None,
        encoder_attention_mask: jax.Array | None = None,
    ) -> jax.Array:
        """Predicts the noise in noisy latents.

        Args:
            latents: `[B, H, W, C]`, scaled by the autoencoder's scaling_factor.
            timesteps: `[B]`, from 0 (clean) to the number of training timesteps - 1.
            encoder_hidden_states: `[B, T, D]` encoded prompts, or what `project_text` has made of them.
            text_embeds: `[B, P]` the pooled and projected prompts, for networks with `addition_embed_type="text_time"`
                (SDXL); None for all others.
            time_ids: `[B, 6]` original height and width, crop top and left, target height and width in pixels, for the
                same networks; None for all others.
            timestep_cond: `[B, E]` the guidance scale that the network imitates, for networks with
                `time_cond_proj_dim` (LCM); see `diffusion.conditioning.with_guidance`. None: they are told none.
            encoder_attention_mask: `[B, T]`, true for encoded tokens that count; None: all do.

        Returns:
            noise_pred `[B, H, W, C_out]`.

        Raises:
            ValueError: text_embeds, time_ids or timestep_cond are given to a network that takes none, or the first two
                are missing.
        """
        temb = self.embed_time(timesteps, text_embeds, time_ids, timestep_cond)
        context = Context(encoder_hidden_states, encoder_attention_mask)
        x = latents.astype(self.dtype)
        if self.config.center_input_sample:
            x = 2 * x - 1
        x = self.conv_in(x)
        skips = [x]
        # The names are for those who read compiled programs and profiles.
        for i, block in enumerate(self.down_blocks):
            with jax.named_scope(f"down_blocks.{i}"):
                x, activations = block(x, temb, context)
            skips += activations
        with jax.named_scope("mid_block"):
            x = self.mid_block(x, temb, context)
        for i, block in enumerate(self.up_blocks):
            with jax.named_scope(f"up_blocks.{i}"):
                x = block(x, skips, temb, context)
        return self.conv_out(silu(self.conv_norm_out(x)))

    def project_text(self, encoder_hidden_states: jax.Array) -> tuple[KeysAndValues, ...]:
        """Keys and values that attention layers make of encoded prompts `[B, T, D]`.

        They are the same in every step of a sampler, which makes them once.
        """
        return tuple(layer.keys_and_values(encoder_hidden_states) for layer in self.attentions_to_text())

    def attentions_to_text(self) -> list[Attention]:
        """The layers that attend to the text, in the order of `project_text`."""
        blocks = [block for _, block in nnx.iter_modules(self) if isinstance(block, BasicTransformerBlock)]
        return [layer for block in blocks for layer in block.attentions_to_text()]

    def embed_time(
        self,
        timesteps: jax.Array,
        text_embeds: jax.Array | None,
        time_ids: jax.Array | None,
        timestep_cond: jax.Array | None,
    ) -> jax.Array:
        """The vector `[B, time_channels]` that every resnet sees: timestep, and size and pooled prompt in SDXL."""
        if timestep_cond is not None and self.config.time_cond_proj_dim is None:
            raise ValueError(
                "UNet2DCondition: timestep_cond [B, E] must not be given to a network with time_cond_proj_dim=None"
            )
        needed = self.add_embedding is not None
        if (text_embeds is not None) != needed or (time_ids is not None) != needed:
            raise ValueError(
                f"UNet2DCondition: text_embeds [B, P] and time_ids [B, 6] must {'' if needed else 'not '}be given to a "
                f"network with addition_embed_type={self.config.addition_embed_type!r}"
            )
        sinusoids = functools.partial(
            timestep_embedding, flip_sin_to_cos=self.config.flip_sin_to_cos, freq_shift=self.config.freq_shift
        )
        temb = self.time_embedding(sinusoids(timesteps, self.config.block_out_channels[0]), timestep_cond)
        if self.add_embedding is None or text_embeds is None or time_ids is None:
            return temb
        assert self.config.addition_time_embed_dim is not None, "UNetConfig asks for it"
        size_embeds = sinusoids(time_ids.reshape(-1), self.config.addition_time_embed_dim)
        added = [text_embeds.astype(jnp.float32), size_embeds.reshape(len(time_ids), -1)]
        return temb + self.add_embedding(jnp.concatenate(added, axis=-1))


def set_attention(module: nnx.Module, kernel: Kernel) -> None:
    """Makes all attention of a UNet go through one kernel, in place; see `models.attention`.

    Raises:
        ValueError: no such kernel.
    """
    check_kernel(kernel)
    for _, layer in nnx.iter_modules(module):
        if isinstance(layer, Attention):
            layer.kernel = kernel
