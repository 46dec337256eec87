"""What a UNet is told beside latents and timestep: encoded prompts, and in SDXL pooled prompts and image sizes.

Conditioning is a dict of arrays under the names of the UNet's arguments: `encoder_hidden_states`, in SDXL `text_embeds`
and `time_ids` too, and for networks that imitate guidance `timestep_cond`.
"""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from numpy.typing import ArrayLike

from flax_pref.checkpoints.diffusers import Pipeline
from flax_pref.models.unet import UNetConfig
from flax_pref.shapes import Float, TokenIds

# By the names of the UNet's arguments: hidden states `[B, T, D]` and pooled prompts `[B, P]`.
Conditioning = dict[str, Float[jax.Array, "images ..."]]
HostConditioning = dict[str, Float[np.ndarray, "images ..."]]
QUOTED = 5  # cut prompts that a warning quotes


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
    pipeline: Pipeline, prompts: Sequence[str], *, sharding: jax.sharding.Sharding | None = None
) -> Conditioning:
    """What `encode_prompts` gives, in one call of each encoder and on the device: it does not wait for the results.

    Args:
        pipeline: the checkpoint.
        prompts: B texts.
        sharding: of the leading axis of what the encoders read and give.
    """
    ids = [tokenizer(tokenizer.spelled_out(prompts)) for tokenizer in pipeline.tokenizers]
    return encode_ids(pipeline, ids if sharding is None else jax.device_put(ids, sharding))


def encode_ids(pipeline: Pipeline, ids: Sequence[TokenIds]) -> Conditioning:
    """Encodes prompts as `encode_batch` does, from the token ids of each tokenizer."""
    last = len(pipeline.text_encoders) == 1
    encoded = [
        _encode(encoder.graphdef, last, encoder.params, own)
        for encoder, own in zip(pipeline.text_encoders, ids, strict=True)
    ]
    conditioning = {"encoder_hidden_states": jnp.concatenate([states for states, *_ in encoded], axis=-1)}
    if not last:
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


def warn_of_cuts(pipeline: Pipeline, prompts: Sequence[str]) -> None:
    """Warns of what of the prompts does not fit into the tokenizer's length."""
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
        f"{quoted}{more}",
        stacklevel=3,
    )


@partial(jax.jit, static_argnums=(0, 1))
def _encode(graphdef: nnx.GraphDef, last: bool, params: dict, input_ids: jax.Array) -> list[jax.Array]:
    output = nnx.merge(graphdef, params)(input_ids)
    states = output.last_hidden_state if last else output.penultimate_hidden_state
    kept = [states] if output.projected is None else [states, output.projected]
    return [x.astype(jnp.float32) for x in kept]
