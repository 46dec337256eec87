"""BLIP's text encoder that looks at an image (arXiv:2201.12086, section 3.1), and ImageReward's head (2304.05977).

A vision transformer turns the image into states; BERT, whose every layer attends to these after the text itself, turns
the text into a state of its first token; five linear layers turn that into a number.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from flax_pref.models.attention import attention
from flax_pref.models.layers import Conv, Embedding, LayerNorm, Linear
from flax_pref.models.remat import recomputed

HEAD_SIZE = 64  # channels of each head of attention, in both transformers
HEAD_WIDTHS = (1024, 128, 64, 16, 1)
VISION_EPSILON = 1e-6
TEXT_EPSILON = 1e-12


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageRewardConfig:
    """Sizes; the defaults are those of ImageReward 1.0, whose weights come without a config of the vision part."""

    image_size: int = 224
    patch_size: int = 16
    vision_width: int = 1024
    vision_mlp_width: int = 4096
    vision_layers: int = 24
    vocab_size: int = 30524
    max_position_embeddings: int = 512
    text_width: int = 768
    text_mlp_width: int = 3072
    text_layers: int = 12

    def __post_init__(self):
        for name in ("vision_width", "text_width"):
            if getattr(self, name) % HEAD_SIZE:
                raise ValueError(
                    f"ImageRewardConfig: {name}={getattr(self, name)} is not a multiple of the {HEAD_SIZE} channels of "
                    "each head"
                )


def _gelu(x: jax.Array) -> jax.Array:
    return jax.nn.gelu(x, approximate=False)


# ----------------------------------------------------------------------------------------------------------------------
# The image


class PatchEmbed(nnx.Module):
    """A linear map of square patches that do not overlap."""

    def __init__(self, config: ImageRewardConfig, **kinds):
        self.proj = Conv(3, config.vision_width, config.patch_size, stride=config.patch_size, **kinds)

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[B, H, W, 3] -> [B, patches, D]`, row by row."""
        x = self.proj(x)
        return x.reshape(x.shape[0], -1, x.shape[-1])


class VisionAttention(nnx.Module):
    """Multi-head self-attention."""

    def __init__(self, width: int, **kinds):
        self.qkv = Linear(width, 3 * width, **kinds)
        self.proj = Linear(width, width, **kinds)

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[B, T, D] -> [B, T, D]`."""
        q, k, v = jnp.moveaxis(self.qkv(x).reshape(*x.shape[:2], 3, -1, HEAD_SIZE), 2, 0)
        return self.proj(attention(q, k, v).reshape(x.shape))


class VisionMLP(nnx.Module):
    """Two linear layers with the exact GELU between them."""

    def __init__(self, config: ImageRewardConfig, **kinds):
        self.fc1 = Linear(config.vision_width, config.vision_mlp_width, **kinds)
        self.fc2 = Linear(config.vision_mlp_width, config.vision_width, **kinds)

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[B, T, D] -> [B, T, D]`."""
        return self.fc2(_gelu(self.fc1(x)))


class VisionBlock(nnx.Module):
    """Attention and MLP, each behind a normalisation and around a skip connection."""

    def __init__(self, config: ImageRewardConfig, *, dtype, param_dtype, rngs: nnx.Rngs):
        kinds = {"dtype": dtype, "param_dtype": param_dtype}
        self.norm1 = LayerNorm(config.vision_width, epsilon=VISION_EPSILON, **kinds)
        self.attn = VisionAttention(config.vision_width, **kinds, rngs=rngs)
        self.norm2 = LayerNorm(config.vision_width, epsilon=VISION_EPSILON, **kinds)
        self.mlp = VisionMLP(config, **kinds, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[B, T, D] -> [B, T, D]`."""
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class BLIPVisionTransformer(nnx.Module):
    """ViT (arXiv:2010.11929) that gives all its states, that of the class token first."""

    def __init__(self, config: ImageRewardConfig, *, dtype, param_dtype, rngs: nnx.Rngs):
        kinds = {"dtype": dtype, "param_dtype": param_dtype}
        patches = (config.image_size // config.patch_size) ** 2
        self.cls_token = nnx.Param(jnp.zeros((1, 1, config.vision_width), param_dtype))
        self.pos_embed = nnx.Param(jnp.zeros((1, patches + 1, config.vision_width), param_dtype))
        self.patch_embed = PatchEmbed(config, **kinds, rngs=rngs)
        self.blocks = nnx.List([VisionBlock(config, **kinds, rngs=rngs) for _ in range(config.vision_layers)])
        self.norm = LayerNorm(config.vision_width, epsilon=VISION_EPSILON, **kinds)

    def __call__(self, images: jax.Array) -> jax.Array:
        """`[B, H, W, 3] -> [B, 1 + patches, D]`; of a block the backward pass keeps the input and nothing else."""
        x = self.patch_embed(images)
        first = jnp.broadcast_to(self.cls_token[...].astype(x.dtype), (x.shape[0], 1, x.shape[2]))
        x = jnp.concatenate([first, x], axis=1) + self.pos_embed[...].astype(x.dtype)
        for block in self.blocks:
            x = recomputed(lambda block, x: block(x), block, x)
        return self.norm(x)


# ----------------------------------------------------------------------------------------------------------------------
# The text


class BLIPEmbeddings(nnx.Module):
    """Sum of token and position embeddings, normalised."""

    def __init__(self, config: ImageRewardConfig, *, dtype, param_dtype, rngs: nnx.Rngs):
        kinds = {"dtype": dtype, "param_dtype": param_dtype}
        self.word_embeddings = Embedding(config.vocab_size, config.text_width, **kinds, rngs=rngs)
        self.position_embeddings = Embedding(config.max_position_embeddings, config.text_width, **kinds, rngs=rngs)
        self.norm = LayerNorm(config.text_width, epsilon=TEXT_EPSILON, **kinds)

    def __call__(self, input_ids: jax.Array) -> jax.Array:
        """`[B, T] -> [B, T, D]`."""
        return self.norm(self.word_embeddings(input_ids) + self.position_embeddings(jnp.arange(input_ids.shape[1])))


class BLIPAttention(nnx.Module):
    """Multi-head attention of the text to itself or to the image, a skip connection, then the normalisation."""

    def __init__(self, config: ImageRewardConfig, source_width: int, *, dtype, param_dtype, rngs: nnx.Rngs):
        kinds = {"dtype": dtype, "param_dtype": param_dtype}
        self.query = Linear(config.text_width, config.text_width, **kinds, rngs=rngs)
        self.key = Linear(source_width, config.text_width, **kinds, rngs=rngs)
        self.value = Linear(source_width, config.text_width, **kinds, rngs=rngs)
        self.dense = Linear(config.text_width, config.text_width, **kinds, rngs=rngs)
        self.norm = LayerNorm(config.text_width, epsilon=TEXT_EPSILON, **kinds)

    def __call__(self, x: jax.Array, source: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """`[B, T, D], [B, S, source_width] -> [B, T, D]`; mask `[B, S]`, if given, is true where there is a token."""
        q, k, v = (
            y.reshape(*y.shape[:2], -1, HEAD_SIZE) for y in (self.query(x), self.key(source), self.value(source))
        )
        seen = attention(q, k, v) if mask is None else _masked_attention(q, k, v, mask)
        return self.norm(x + self.dense(seen.reshape(x.shape)))


def _masked_attention(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
    """`attention` over the keys where `mask [B, S]` is true, for few positions."""
    logits = jnp.einsum("btnh,bsnh->bnts", q, k, preferred_element_type=jnp.float32) * HEAD_SIZE**-0.5
    weights = jax.nn.softmax(logits, axis=-1, where=mask[:, None, None, :])
    return jnp.einsum("bnts,bsnh->btnh", weights.astype(v.dtype), v)


class TextLayer(nnx.Module):
    """BERT's layer (arXiv:1810.04805, normalised after each skip connection), with attention to the image in it."""

    def __init__(self, config: ImageRewardConfig, *, dtype, param_dtype, rngs: nnx.Rngs):
        kinds = {"dtype": dtype, "param_dtype": param_dtype}
        self.attention = BLIPAttention(config, config.text_width, **kinds, rngs=rngs)
        self.crossattention = BLIPAttention(config, config.vision_width, **kinds, rngs=rngs)
        self.intermediate = Linear(config.text_width, config.text_mlp_width, **kinds, rngs=rngs)
        self.output = Linear(config.text_mlp_width, config.text_width, **kinds, rngs=rngs)
        self.norm = LayerNorm(config.text_width, epsilon=TEXT_EPSILON, **kinds)

    def __call__(self, x: jax.Array, mask: jax.Array, image_states: jax.Array) -> jax.Array:
        """`[B, T, D], [B, T], [B, S, vision_width] -> [B, T, D]`."""
        x = self.attention(x, x, mask)
        x = self.crossattention(x, image_states)
        return self.norm(x + self.output(_gelu(self.intermediate(x))))


class TextEncoder(nnx.Module):
    """Embeddings and layers."""

    def __init__(self, config: ImageRewardConfig, **kinds):
        self.embeddings = BLIPEmbeddings(config, **kinds)
        self.layers = nnx.List([TextLayer(config, **kinds) for _ in range(config.text_layers)])

    def __call__(self, input_ids: jax.Array, mask: jax.Array, image_states: jax.Array) -> jax.Array:
        """`[B, T], [B, T], [B, S, vision_width] -> [B, T, D]`."""
        x = self.embeddings(input_ids)
        for layer in self.layers:
            x = layer(x, mask, image_states)
        return x


# ----------------------------------------------------------------------------------------------------------------------
# The number


class Head(nnx.Module):
    """Linear layers without activations: what lies between them in training, dropout, is not there."""

    def __init__(self, width: int, **kinds):
        widths = zip((width, *HEAD_WIDTHS), HEAD_WIDTHS, strict=False)
        self.layers = nnx.List([Linear(before, after, **kinds) for before, after in widths])

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[B, D] -> [B]`."""
        for layer in self.layers:
            x = layer(x)
        return x[:, 0]


class ImageRewardModel(nnx.Module):
    """Image and text to one number, not standardised. The head is float32, whatever the rest."""

    def __init__(self, config: ImageRewardConfig, *, dtype=jnp.float32, param_dtype=jnp.float32, rngs: nnx.Rngs):
        kinds = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.config = config
        self.visual_encoder = BLIPVisionTransformer(config, **kinds)
        self.text_encoder = TextEncoder(config, **kinds)
        self.mlp = Head(config.text_width, rngs=rngs)

    def __call__(self, images: jax.Array, input_ids: jax.Array, mask: jax.Array) -> jax.Array:
        """Scores pairs of image and text.

        Args:
            images: `[B, H, W, 3]`, normalised, of `config.image_size` pixels.
            input_ids: `[B, T]` token ids, `T <= config.max_position_embeddings`.
            mask: `[B, T]`, true where there is a token and not padding; each text has at least one.

        Returns:
            float32 `[B]`.
        """
        states = self.text_encoder(input_ids, mask, self.visual_encoder(images))
        return self.mlp(states[:, 0])
