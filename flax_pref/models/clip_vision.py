"""CLIP with both towers (arXiv:2103.00020): a vision transformer (arXiv:2010.11929) beside the text encoder."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from flax_pref.models import config as config_io
from flax_pref.models.clip import ACTIVATIONS, CLIPTextConfig, EncoderLayer, TextTransformer, end_positions
from flax_pref.models.layers import Embedding, LayerNorm, Linear, lecun_normal
from flax_pref.models.remat import recomputed


@dataclasses.dataclass(frozen=True, kw_only=True)
class CLIPVisionConfig:
    """The part `vision_config` of CLIP's config.json; defaults are those that the file may leave out."""

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    image_size: int = 224
    patch_size: int = 32
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5

    is_causal = False

    def __post_init__(self):
        sizes = ("hidden_size", "intermediate_size", "num_attention_heads", "image_size", "patch_size")
        config_io.check_sizes(self, sizes)
        config_io.check_sizes(self, ("num_hidden_layers",), config_io.MOST_LAYERS)
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"CLIPVisionConfig: hidden_size={self.hidden_size} is not a multiple of "
                f"num_attention_heads={self.num_attention_heads}"
            )
        if self.image_size < self.patch_size:
            raise ValueError(
                f"CLIPVisionConfig: image_size={self.image_size} is less than patch_size={self.patch_size}"
            )

    @property
    def num_positions(self) -> int:
        """Patches of an image and the class token."""
        return (self.image_size // self.patch_size) ** 2 + 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class CLIPConfig:
    """Fields of CLIP's `config.json`; defaults are those that the file may leave out."""

    text_config: CLIPTextConfig = CLIPTextConfig()  # noqa: RUF009 (frozen)
    vision_config: CLIPVisionConfig = CLIPVisionConfig()
    projection_dim: int = 512

    def __post_init__(self):
        config_io.check_sizes(self, ("projection_dim",))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "CLIPConfig":
        """Reads a parsed `config.json`; a ValueError names the field that is not supported."""
        text, vision = (_part(values, f"{part}_config") for part in ("text", "vision"))
        # The towers of one CLIP: transformers names the classes of others that it could be loaded as.
        text.pop("architectures", None)
        only = {"hidden_act": tuple(ACTIVATIONS), "model_type": ("clip_vision_model",), "num_channels": (3,)}
        parts = {
            "text_config": CLIPTextConfig.from_dict(text),
            "vision_config": config_io.from_json(CLIPVisionConfig, vision, only=only, strict=False),
        }
        return config_io.from_json(cls, {**values, **parts}, only={"model_type": ("clip",)}, strict=False)

    def to_dict(self) -> dict[str, Any]:
        """The config as the JSON object that transformers reads."""
        return {
            "model_type": "clip",
            "architectures": ["CLIPModel"],
            "projection_dim": self.projection_dim,
            "text_config": {**self.text_config.to_dict(), "projection_dim": self.projection_dim},
            "vision_config": config_io.to_json(
                self.vision_config, model_type="clip_vision_model", projection_dim=self.projection_dim
            ),
        }


def _part(values: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The fields of one tower. Old files have them twice, and transformers takes those under `*_config_dict`."""
    part = values.get(f"{name}_dict")
    part = values.get(name) if part is None else part
    if not isinstance(part, Mapping | None):
        raise ValueError(f"CLIPConfig: {name}={part!r:.80} is not supported; supported: an object of fields")
    return {key: value for key, value in (part or {}).items() if value is not None}


class PatchEmbedding(nnx.Module):
    """A convolution whose stride is its size, without bias: a matrix product over the pixels of each patch."""

    def __init__(self, features: int, patch_size: int, *, dtype, param_dtype, rngs: nnx.Rngs):
        shape = (patch_size, patch_size, 3, features)
        self.kernel = nnx.Param(lecun_normal(rngs.params(), shape, param_dtype))
        self.dtype = dtype

    def __call__(self, images: jax.Array) -> jax.Array:
        """`[B, H, W, 3] -> [B, H/P * W/P, D]`; what does not fill a patch at the right and bottom is left out."""
        kernel = self.kernel[...].astype(self.dtype)
        size, batch = kernel.shape[0], len(images)
        rows, columns = images.shape[1] // size, images.shape[2] // size
        x = images[:, : rows * size, : columns * size].reshape(batch, rows, size, columns, size, 3)
        x = x.swapaxes(2, 3).reshape(batch, rows * columns, size * size * 3)
        return x.astype(self.dtype) @ kernel.reshape(-1, kernel.shape[-1])


class VisionEmbeddings(nnx.Module):
    """A class token and the patches of an image, each with its position's embedding."""

    def __init__(self, config: CLIPVisionConfig, *, dtype, param_dtype, rngs: nnx.Rngs):
        kinds = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.class_embedding = nnx.Param(jnp.zeros((config.hidden_size,), param_dtype))
        self.patch_embedding = PatchEmbedding(config.hidden_size, config.patch_size, **kinds)
        self.position_embedding = Embedding(config.num_positions, config.hidden_size, **kinds)

    def __call__(self, images: jax.Array) -> jax.Array:
        """`[B, S, S, 3] -> [B, T, D]`, the class token first."""
        patches = self.patch_embedding(images)
        first = jnp.broadcast_to(self.class_embedding[...].astype(patches.dtype), patches[:, :1].shape)
        return jnp.concatenate([first, patches], axis=1) + self.position_embedding(jnp.arange(patches.shape[1] + 1))


class VisionEncoder(nnx.Module):
    """The stack of layers. The backward pass keeps the input of each and computes the rest again."""

    def __init__(self, config: CLIPVisionConfig, **kinds):
        self.layers = nnx.List([EncoderLayer(config, **kinds) for _ in range(config.num_hidden_layers)])

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[B, T, D] -> [B, T, D]`."""
        for layer in self.layers:
            x = recomputed(lambda layer, x: layer(x), layer, x)
        return x


class CLIPVisionTransformer(nnx.Module):
    """Embeddings, layers, and a normalisation before and after them."""

    def __init__(self, config: CLIPVisionConfig, *, dtype, param_dtype, rngs: nnx.Rngs):
        kinds = {"dtype": dtype, "param_dtype": param_dtype}
        self.embeddings = VisionEmbeddings(config, **kinds, rngs=rngs)
        self.pre_layrnorm = LayerNorm(config.hidden_size, epsilon=config.layer_norm_eps, **kinds)  # spelled as stored
        self.encoder = VisionEncoder(config, **kinds, rngs=rngs)
        self.post_layernorm = LayerNorm(config.hidden_size, epsilon=config.layer_norm_eps, **kinds)

    def states(self, images: jax.Array) -> jax.Array:
        """`[B, S, S, 3]` to the last states of the class token and the patches, not normalised: `[B, T, D]`."""
        return self.encoder(self.pre_layrnorm(self.embeddings(images)))

    def __call__(self, images: jax.Array) -> jax.Array:
        """`[B, S, S, 3]` to the class token's last state, normalised: `[B, D]`."""
        return self.post_layernorm(self.states(images)[:, 0])


class CLIPVisionModel(nnx.Module):
    """CLIP's image encoder with its projection."""

    def __init__(self, config: CLIPConfig, *, dtype=jnp.float32, param_dtype=jnp.float32, rngs: nnx.Rngs):
        kinds = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.vision_model = CLIPVisionTransformer(config.vision_config, **kinds)
        self.visual_projection = Linear(
            config.vision_config.hidden_size, config.projection_dim, use_bias=False, **kinds
        )

    def encode_images(self, images: jax.Array) -> jax.Array:
        """Images `[B, S, S, 3]`, S = `image_size`, normalised as the network wants them, to embeddings `[B, P]`."""
        return self.visual_projection(self.vision_model(images))


class CLIPModel(CLIPVisionModel):
    """CLIP: both encoders with their projections, and the logarithm of the scale of their cosine."""

    def __init__(self, config: CLIPConfig, *, dtype=jnp.float32, param_dtype=jnp.float32, rngs: nnx.Rngs):
        kinds = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        super().__init__(config, **kinds)
        self.text_model = TextTransformer(config.text_config, **kinds)
        self.text_projection = Linear(config.text_config.hidden_size, config.projection_dim, use_bias=False, **kinds)
        self.logit_scale = nnx.Param(jnp.full((), 2.6592, jnp.float32))  # 16 bits would change scores by 1 %
        self.eos_token_id = config.text_config.eos_token_id

    def encode_texts(self, input_ids: jax.Array) -> jax.Array:
        """Token ids `[B, T]`, each text with its end token, to embeddings `[B, P]`."""
        _, last = self.text_model(input_ids)
        return self.text_projection(last[jnp.arange(len(input_ids)), end_positions(input_ids, self.eos_token_id)])
