"""What a UNet is told beside latents and timestep: encoded prompts, and in SDXL pooled prompts and image sizes.

Conditioning is a dict of arrays under the names of the UNet's arguments: `encoder_hidden_states`, in SDXL `text_embeds`
and `time_ids` too, for networks that imitate guidance `timestep_cond`, and where prompts have several chunks of tokens
`encoder_attention_mask`.
"""

import operator
import warnings
from collections.abc import Iterator, Mapping, Sequence
from functools import partial, reduce
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from numpy.typing import ArrayLike

from flax_pref.checkpoints.diffusers import Pipeline
from flax_pref.diffusion.drawing_flags import PromptSyntax
from flax_pref.diffusion.prompt_syntax import SYNTAXES, Tokens, tokenize
from flax_pref.models.unet import UNetConfig
from flax_pref.shapes import Float, TokenIds

# By the names of the UNet's arguments: hidden states `[B, T, D]` and pooled prompts `[B, P]`.
Conditioning = dict[str, Float[jax.Array, "images ..."]]
HostConditioning = dict[str, Float[np.ndarray, "images ..."]]
QUOTED = 5  # cut prompts that a warning quotes
MASK = "encoder_attention_mask"


def chunks(count: int, size: int) -> Iterator[tuple[np.ndarray, int]]:
    """`(indices [size], n)` that cover `range(count)`; the last chunk is filled up by repeating its first index.

    All chunks have one size, so that a function compiled for one serves all; the first n results are wanted.
    """
    for start in range(0, count, size):
        wanted = np.arange(start, min(start + size, count))
        yield np.concatenate([wanted, np.full(size - len(wanted), start)]), len(wanted)


def encode_prompts(pipeline: Pipeline, prompts: Sequence[str], *, batch_size: int = 64) -> HostConditioning:
    """Encodes prompts; equal ones once.

    Args:
        pipeline: a checkpoint with one text encoder, of which the UNet sees the last states (SD1.5), or with two, of
            which it sees the last but one (SDXL, arXiv:2307.01952, section 2.1).
        prompts: N texts. What does not fit into the tokenizer's length is cut, with a warning that quotes it.
        batch_size: texts per call of an encoder.

    Returns:
        `encoder_hidden_states` float32 `[N, T, D]`, and for two encoders `text_embeds` float32 `[N, P]`, the pooled
        and projected prompts.
    """
    place = {prompt: i for i, prompt in enumerate(dict.fromkeys(prompts))}
    distinct = list(place)
    warn_of_cuts(pipeline, prompts)
    parts = [
        {
            name: np.asarray(array)[:n]
            for name, array in encode_batch(pipeline, [distinct[i] for i in chosen.tolist()]).items()
        }
        for chosen, n in chunks(len(distinct), batch_size)
    ]
    rows = [place[prompt] for prompt in prompts]
    return {name: np.concatenate([part[name] for part in parts])[rows] for name in parts[0]}


def encode_batch(
    pipeline: Pipeline,
    prompts: Sequence[str],
    *,
    second_prompts: Sequence[str] | None = None,
    syntax: PromptSyntax = "plain",
    chunks: int = 1,
    sharding: jax.sharding.Sharding | None = None,
) -> Conditioning:
    """What `encode_prompts` gives, in one call of each encoder and on the device: it does not wait for the results.

    Args:
        pipeline: the checkpoint.
        prompts: B texts.
        second_prompts: B texts for SDXL's second text encoder; None: the prompts.
        syntax: how prompts are read, see `prompt_syntax`.
        chunks: C that each prompt is filled up to, of T tokens, where the syntax is not plain; see `count_chunks`.
        sharding: of the leading axis of what the encoders read and give.

    Returns:
        as `encode_prompts`; of C > 1 chunks, hidden states are `[B, C T, D]`, pooled prompts are those of the first
        chunk, and `encoder_attention_mask` `[B, C T]` is true for the chunks of the prompt.

    Raises:
        ValueError: a prompt has more chunks, or what the syntax does not support.
    """
    texts = [prompts, prompts if second_prompts is None else second_prompts][: len(pipeline.tokenizers)]
    if syntax == "plain":
        ids = [own(own.spelled_out(text)) for text, own in zip(texts, pipeline.tokenizers, strict=True)]
        return encode_ids(pipeline, ids if sharding is None else jax.device_put(ids, sharding))
    tokens = [tokenize(text, own, syntax, chunks) for text, own in zip(texts, pipeline.tokenizers, strict=True)]
    return _encode_chunks(pipeline, tokens if sharding is None else jax.device_put(tokens, sharding), syntax)


def encode_ids(pipeline: Pipeline, ids: Sequence[TokenIds]) -> Conditioning:
    """Encodes prompts as `encode_batch` does, from the token ids of each tokenizer."""
    return _joined(_encode_each(pipeline, ids))


def _encode_chunks(pipeline: Pipeline, tokens: Sequence[Tokens], syntax: PromptSyntax) -> Conditioning:
    _, chunks, length = tokens[0].ids.shape
    encoded = _encode_each(pipeline, [own.ids.reshape(-1, length) for own in tokens])
    empty = _encode_each(pipeline, [tokenizer([""]) for tokenizer in pipeline.tokenizers])
    weighed = [
        [_weigh(syntax, states, own.weights, nothing), *(x[::chunks] for x in pooled)]
        for (states, *pooled), (nothing, *_), own in zip(encoded, empty, tokens, strict=True)
    ]
    conditioning = _joined(weighed)
    if chunks > 1:
        seen = reduce(operator.or_, (own.seen for own in tokens))
        conditioning[MASK] = jnp.repeat(seen, length, axis=1)
    return conditioning


def _encode_each(pipeline: Pipeline, ids: Sequence[TokenIds]) -> list[list[jax.Array]]:
    """Hidden states of each text encoder, and pooled prompts of those that have them."""
    normalised = len(pipeline.text_encoders) == 1
    layer = pipeline.clip_skip or len(pipeline.text_encoders)
    return [
        _text_encoder(encoder.graphdef, layer, normalised, encoder.params, own)
        for encoder, own in zip(pipeline.text_encoders, ids, strict=True)
    ]


def _joined(encoded: Sequence[Sequence[jax.Array]]) -> Conditioning:
    conditioning = {"encoder_hidden_states": jnp.concatenate([states for states, *_ in encoded], axis=-1)}
    if len(encoded) == 2:
        conditioning["text_embeds"] = encoded[-1][1]
    return conditioning


def encode_blank(pipeline: Pipeline) -> dict[str, Float[np.ndarray, "..."]]:
    """Encodes the empty text "", without leading axis."""
    return {name: array[0] for name, array in encode_prompts(pipeline, [""], batch_size=1).items()}


def encode_empty(pipeline: Pipeline) -> dict[str, Float[np.ndarray, "..."]]:
    """The conditioning of the unconditional prediction, without leading axis: `encode_blank`, or zeros in SDXL."""
    blank = encode_blank(pipeline)
    if pipeline.force_zeros_for_empty_prompt:
        return {name: np.zeros_like(array) for name, array in blank.items()}
    return blank


def size_ids(original_size: ArrayLike, crop_top_left: ArrayLike, target_size: ArrayLike) -> Float[np.ndarray, "... 6"]:
    """SDXL's `time_ids`, float32 (arXiv:2307.01952, section 2.2), of `[..., 2]` each.

    Sizes are (height, width) in pixels, crops (top, left).
    """
    parts = np.broadcast_arrays(original_size, crop_top_left, target_size)
    return np.concatenate(parts, axis=-1, dtype=np.float32)


def with_sizes(
    conditioning: Mapping[str, Any],
    unet: UNetConfig,
    target_size: tuple[int, int],
    *,
    original_size: tuple[int, int] | None = None,
    crop_top_left: tuple[int, int] = (0, 0),
) -> dict[str, Any]:
    """Conditioning with the `time_ids` of an image, where the UNet asks for them (SDXL).

    Args:
        conditioning: of prompts, or of one without the leading axis.
        unet: config of the network.
        target_size: height and width of the image in pixels.
        original_size: those that it pretends to have had before it was resized; None: as `target_size`.
        crop_top_left: where it pretends to have been cropped.
    """
    if unet.addition_embed_type != "text_time":
        return dict(conditioning)
    ids = size_ids(original_size or target_size, crop_top_left, target_size)
    prompts = conditioning["encoder_hidden_states"].shape[:-2]
    return {**conditioning, "time_ids": np.tile(ids, (*prompts, 1)) if prompts else ids}


def guidance_embedding(guidance_scale: float, size: int) -> Float[np.ndarray, " size"]:
    """What networks that imitate guidance are told of its scale s: sines and cosines of 1000 (s - 1), float32.

    The w-embedding of latent consistency models (arXiv:2310.04378, section 4.2), in the precision they were trained
    with: the angles are so large that it counts.

    Args:
        guidance_scale: s.
        size: `time_cond_proj_dim` of the network.
    """
    half = size // 2
    step = np.log(np.float32(10000.0)) / np.float32(max(half - 1, 1))
    angles = np.float32(guidance_scale - 1) * np.float32(1000.0) * np.exp(np.arange(half, dtype=np.float32) * -step)
    return np.concatenate([np.sin(angles), np.cos(angles), np.zeros(size % 2)]).astype(np.float32)


def with_guidance(conditioning: Mapping[str, Any], unet: UNetConfig, guidance_scale: float) -> dict[str, Any]:
    """Conditioning with the `timestep_cond` of a guidance scale, where the UNet asks for it (LCM).

    Args:
        conditioning: of prompts, or of one without the leading axis.
        unet: config of the network.
        guidance_scale: that the network imitates.
    """
    if unet.time_cond_proj_dim is None:
        return dict(conditioning)
    embedding = guidance_embedding(guidance_scale, unet.time_cond_proj_dim)
    prompts = conditioning["encoder_hidden_states"].shape[:-2]
    return {**conditioning, "timestep_cond": np.tile(embedding, (*prompts, 1)) if prompts else embedding}


def in_chunks(conditioning: Mapping[str, Any], chunks: int) -> dict[str, Any]:
    """Conditioning of one chunk of tokens, without leading axis, filled up to the length of several; see
    `encode_batch`.
    """
    if chunks == 1:
        return dict(conditioning)
    states = conditioning["encoder_hidden_states"]
    seen = np.arange(chunks * len(states)) < len(states)
    return {**conditioning, "encoder_hidden_states": np.tile(states, (chunks, 1)), MASK: seen}


def warn_of_cuts(pipeline: Pipeline, prompts: Sequence[str], advice: str = "") -> None:
    """Warns of what of the prompts does not fit into the tokenizer's length; `advice` says what can be done."""
    prompts = list(dict.fromkeys(prompts))
    tokenizer = pipeline.tokenizers[0]
    whole = tokenizer.spelled_out(prompts)
    cuts = {prompt: cut for prompt, cut in zip(prompts, tokenizer.cut(whole), strict=True) if cut}
    if not cuts:
        return
    quoted = "; ".join(f"{cut.strip()!r} of {prompt!r}" for prompt, cut in list(cuts.items())[:QUOTED])
    more = f"; and the ends of {len(cuts) - QUOTED} other prompts" if len(cuts) > QUOTED else ""
    warnings.warn(
        f"the text encoder reads {tokenizer.model_max_length - 2} tokens, so this is cut and has no effect: "
        f"{quoted}{more}{advice and f'; {advice}'}",
        stacklevel=3,
    )


@partial(jax.jit, static_argnums=(0, 1, 2))
def _text_encoder(
    graphdef: nnx.GraphDef, layer: int, normalised: bool, params: dict, ids: jax.Array
) -> list[jax.Array]:
    """States after a layer, counted from the last, which is 1, and the pooled prompt where there is one."""
    encoder = nnx.merge(graphdef, params)
    output = encoder(ids)
    states = output.hidden_states[-layer]
    if normalised:
        states = output.last_hidden_state if layer == 1 else encoder.text_model.final_layer_norm(states)
    kept = [states] if output.projected is None else [states, output.projected]
    return [x.astype(jnp.float32) for x in kept]


@partial(jax.jit, static_argnums=0)
def _weigh(syntax: PromptSyntax, states: jax.Array, weights: jax.Array, empty: jax.Array) -> jax.Array:
    """Weighted states `[B, C T, D]` of chunks `[B C, T, D]`, with weights `[B, C, T]`; those of the empty text have a
    leading axis of one.
    """
    images, chunks, length = weights.shape
    weighed = SYNTAXES[syntax].weigh(states, weights.reshape(-1, length), empty[0])
    return weighed.reshape(images, chunks * length, -1)
