"""CLIP's text encoder (arXiv:2103.00020, section 2.4): a causal transformer with normalisation before each sublayer."""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from flax import nnx

from flax_pref.models import config as config_io
from flax_pref.models.attention import attention
from flax_pref.models.layers import Embedding, LayerNorm, Linear
from flax_pref.shapes import TokenIds

ACTIVATIONS = {
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class CLIPTextConfig:
    """Fields of `text_encoder/config.json`; defaults are those that the file may leave out."""

    architectures: tuple[str, ...] = ("CLIPTextModel",)
    vocab_size: int = 49408
    hidden_size: int = 512
    intermediate_size: int = 2048
    projection_dim: int = 512
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    bos_token_id: int = 49406
    eos_token_id: int = 49407
    pad_token_id: int = 1

    is_causal = True  # of every text encoder, and no field

    def __post_init__(self):
        sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "max_position_embeddings")
        config_io.check_sizes(self, (*sizes, "projection_dim") if self.with_projection else sizes)
        config_io.check_sizes(self, ("num_hidden_layers",), config_io.MOST_LAYERS)
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"CLIPTextConfig: hidden_size={self.hidden_size} is not a multiple of "
                f"num_attention_heads={self.num_attention_heads}"
            )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "CLIPTextConfig":
        """Reads a parsed `text_encoder/config.json`; a ValueError names the field that is not supported."""
        only = {
            "hidden_act": tuple(ACTIVATIONS),
            "model_type": ("clip_text_model",),
            "architectures": (("CLIPTextModel",), ("CLIPTextModelWithProjection",)),
        }
        # transformers writes dozens of fields that do not concern the network, and adds some with every version.
        return config_io.from_json(cls, values, only=only, strict=False)

    def to_dict(self) -> dict[str, Any]:
        """The config as the JSON object that transformers reads."""
        return config_io.to_json(self, model_type="clip_text_model", attention_dropout=0.0, dropout=0.0)

    @property
    def with_projection(self) -> bool:
        """Whether the encoder projects its pooled state (SDXL's second text encoder does)."""
        return "CLIPTextModelWithProjection" in self.architectures


class CLIPTextOutput(NamedTuple):
    """What diffusion models use of the encoder; `D` is hidden_size and `P` projection_dim.

    Attributes:
        last_hidden_state: `[B, T, D]` after the last layer and the final normalisation (SD1.5).
        hidden_states: `[B, T, D]` before the first layer and after each, not normalised (SDXL takes the last but one).
        pooled: `[B, D]` last_hidden_state at each text's end token.
        projected: `[B, P]` pooled, projected; None for an encoder without projection.
    """

    last_hidden_state: jax.Array
    hidden_states: tuple[jax.Array, ...]
    pooled: jax.Array
    projected: jax.Array | None


class CLIPEmbeddings(nnx.Module):
    """Sum of token and position embeddings."""

    def __init__(self, config: CLIPTextConfig, **kinds):
        self.token_embedding = Embedding(config.vocab_size, config.hidden_size, **kinds)
        self.position_embedding = Embedding(config.max_position_embeddings, config.hidden_size, **kinds)

    def __call__(self, input_ids: TokenIds) -> jax.Array:
        """`[B, T] -> [B, T, D]`."""
        return self.token_embedding(input_ids) + self.position_embedding(jnp.arange(input_ids.shape[1]))


class EncoderConfig(Protocol):  # properties, for the fields of frozen dataclasses cannot be written
    """Settings of the layers that CLIP's text and image encoders share; see `CLIPTextConfig`."""

    @property
    def hidden_size(self) -> int: ...  # noqa: D102
    @property
    def intermediate_size(self) -> int: ...  # noqa: D102
    @property
    def num_hidden_layers(self) -> int: ...  # noqa: D102
    @property
    def num_attention_heads(self) -> int: ...  # noqa: D102
    @property
    def hidden_act(self) -> str: ...  # noqa: D102
    @property
    def layer_norm_eps(self) -> float: ...  # noqa: D102
    @property
    def is_causal(self) -> bool: ...  # noqa: D102


class CLIPAttention(nnx.Module):
    """Multi-head self-attention, causal where `config.is_causal`."""

    def __init__(self, config: EncoderConfig, **kinds):
        self.q_proj = Linear(config.hidden_size, config.hidden_size, **kinds)
        self.k_proj = Linear(config.hidden_size, config.hidden_size, **kinds)
        self.v_proj = Linear(config.hidden_size, config.hidden_size, **kinds)
        self.out_proj = Linear(config.hidden_size, config.hidden_size, **kinds)
        self.num_heads = config.num_attention_heads
        self.is_causal = config.is_causal

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[B, T, D] -> [B, T, D]`."""
        q, k, v = (
            layer(x).reshape(*x.shape[:2], self.num_heads, -1) for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        return self.out_proj(attention(q, k, v, is_causal=self.is_causal).reshape(x.shape))


class MLP(nnx.Module):
    """Two linear layers with an activation between them."""

    def __init__(self, config: EncoderConfig, **kinds):
        self.fc1 = Linear(config.hidden_size, config.intermediate_size, **kinds)
        self.fc2 = Linear(config.intermediate_size, config.hidden_size, **kinds)
        self.hidden_act = config.hidden_act

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[B, T, D] -> [B, T, D]`."""
        return self.fc2(ACTIVATIONS[self.hidden_act](self.fc1(x)))


class EncoderLayer(nnx.Module):
    """Attention and MLP, each behind a normalisation and around a skip connection."""

    def __init__(self, config: EncoderConfig, *, dtype, param_dtype, rngs: nnx.Rngs):
        kinds = {"dtype": dtype, "param_dtype": param_dtype}
        self.layer_norm1 = LayerNorm(config.hidden_size, epsilon=config.layer_norm_eps, **kinds)
        self.self_attn = CLIPAttention(config, **kinds, rngs=rngs)
        self.layer_norm2 = LayerNorm(config.hidden_size, epsilon=config.layer_norm_eps, **kinds)
        self.mlp = MLP(config, **kinds, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[B, T, D] -> [B, T, D]`."""
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class CLIPEncoder(nnx.Module):
    """The stack of layers."""

    def __init__(self, config: EncoderConfig, **kinds):
        self.layers = nnx.List([EncoderLayer(config, **kinds) for _ in range(config.num_hidden_layers)])

    def __call__(self, x: jax.Array) -> tuple[jax.Array, ...]:
        """`[B, T, D]` to the states before the first layer and after each, `[B, T, D]` each."""
        states = [x]
        for layer in self.layers:
            states.append(layer(states[-1]))
        return tuple(states)


class TextTransformer(nnx.Module):
    """Embeddings, layers and the final normalisation."""

    def __init__(self, config: CLIPTextConfig, *, dtype, param_dtype, rngs: nnx.Rngs):
        kinds = {"dtype": dtype, "param_dtype": param_dtype}
        self.embeddings = CLIPEmbeddings(config, **kinds, rngs=rngs)
        self.encoder = CLIPEncoder(config, **kinds, rngs=rngs)
        self.final_layer_norm = LayerNorm(config.hidden_size, epsilon=config.layer_norm_eps, **kinds)

    def __call__(self, input_ids: TokenIds) -> tuple[tuple[jax.Array, ...], jax.Array]:
        """`[B, T]` to the states of the layers, see `CLIPEncoder`, and the normalised last one, `[B, T, D]` each."""
        states = self.encoder(self.embeddings(input_ids))
        return states, self.final_layer_norm(states[-1])


class CLIPTextModel(nnx.Module):
    """The text encoder, with or without projection as `config.architectures` says."""

    def __init__(self, config: CLIPTextConfig, *, dtype=jnp.float32, param_dtype=jnp.float32, rngs: nnx.Rngs):
        kinds = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.config = config
        self.text_model = TextTransformer(config, **kinds)
        self.text_projection = (
            Linear(config.hidden_size, config.projection_dim, use_bias=False, **kinds)
            if config.with_projection
            else None
        )

    def __call__(self, input_ids: TokenIds) -> CLIPTextOutput:
        """Encodes texts.

        Args:
            input_ids: `[B, T]`, with `T <= config.max_position_embeddings`; each text contains its end token.
        """
        states, last = self.text_model(input_ids)
        pooled = last[jnp.arange(input_ids.shape[0]), end_positions(input_ids, self.config.eos_token_id)]
        projected = None if self.text_projection is None else self.text_projection(pooled)
        return CLIPTextOutput(last, states, pooled, projected)


def end_positions(input_ids: TokenIds, eos_token_id: int) -> jax.Array:
    """Position `[B]` of the first end token in each text `[B, T]`."""
    # The published configs say eos_token_id=2 although the token is 49407, the largest id of the vocabulary.
    if eos_token_id == 2:
        return jnp.argmax(input_ids, axis=-1)
    return jnp.argmax(input_ids == eos_token_id, axis=-1)
