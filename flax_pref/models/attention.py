"""Scaled dot-product attention: the one place where its kernel is chosen.

Measured for the shapes of Stable Diffusion: XLA writes the whole score matrix of a long self-attention to memory. On
TPUs the Pallas splash kernel does not, and for short sequences and the 77 keys of a prompt XLA is faster. On CUDA GPUs
cuDNN's fused attention takes 16-bit inputs of most head sizes. On CPUs a loop over heads and blocks of queries, whose
scores fit into the cache, is four times as fast as the whole at 4096 positions.
"""

import functools
import math
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from flax_pref.models.platform import CACHED, platform

Kernel = Literal["auto", "xla", "cudnn", "flash", "blocked"]
FLASH_FROM = 1024  # positions
BLOCK = 512  # queries


def attention(
    q: jax.Array, k: jax.Array, v: jax.Array, *, is_causal: bool = False, kernel: Kernel = "auto"
) -> jax.Array:
    """`softmax(q k^T / sqrt(Hd)) v`; logits and softmax in float32.

    Args:
        q: `[B, T, N, Hd]` queries of N heads.
        k: `[B, S, N, Hd]` keys.
        v: `[B, S, N, Hd]` values.
        is_causal: position t sees positions 0 ... t only.
        kernel: "xla", "cudnn" (CUDA), "flash" (TPU, Pallas), "blocked" (any device), or "auto": the fastest that the
            platform has for these shapes, which is that of the mesh in use (`jax.set_mesh`) or of JAX's default device.
            With "flash", shapes and masks that the kernel does not cover go through XLA.

    Returns:
        `[B, T, N, Hd]`.

    Raises:
        ValueError: no such kernel.
    """
    check_kernel(kernel)
    if kernel == "auto":
        kernel = _fastest(q)
    if kernel == "flash" and not is_causal and _flash_takes(q, k):
        return _flash(q, k, v)
    if kernel == "blocked":
        return _blocked(q, k, v, is_causal)
    implementation = "cudnn" if kernel == "cudnn" else "xla"
    return jax.nn.dot_product_attention(q, k, v, is_causal=is_causal, implementation=implementation)


def check_kernel(kernel: str) -> None:
    """Raises a ValueError if there is no such kernel."""
    if kernel not in get_args(Kernel):
        raise ValueError(f"attention: kernel must be one of {', '.join(get_args(Kernel))}, got {kernel!r}")


def _fastest(q: jax.Array) -> Kernel:
    match platform():
        case "tpu":
            return "flash"
        case "gpu" if _cudnn_takes(q):
            return "cudnn"
        case "cpu":
            return "blocked"
    return "xla"


def _cudnn_takes(q: jax.Array) -> bool:
    """16 bits, and a head size that is a multiple of 8, up to 128, or 256 from the Hopper generation on."""
    device = jax.local_devices()[0]
    largest = 256 if float(getattr(device, "compute_capability", 0)) >= 9 else 128
    return q.dtype in (jnp.bfloat16, jnp.float16) and q.shape[-1] % 8 == 0 and q.shape[-1] <= largest


def _blocked(q: jax.Array, k: jax.Array, v: jax.Array, is_causal: bool) -> jax.Array:
    """Heads and blocks of queries one after another where there are many positions, else images, or all at once."""
    batch, length, heads, features = q.shape
    q, v = (jnp.swapaxes(x, 1, 2) for x in (q * features**-0.5, v))  # [B, N, T, Hd]
    k = jnp.moveaxis(k, 1, 3)  # [B, N, Hd, S]
    if is_causal or length < 2 * BLOCK or k.shape[3] < BLOCK or length % BLOCK:
        mask = jnp.tri(length, k.shape[3], dtype=bool) if is_causal else None
        scores = 4 * batch * heads * length * k.shape[3]
        images = batch if scores > CACHED else 1
        parts = [
            _softmax_attention(*part, mask) for part in zip(*(jnp.split(x, images) for x in (q, k, v)), strict=True)
        ]
        out = jnp.concatenate(parts)
    else:
        blocks = length // BLOCK
        # One row of the loop is one block of one head; the backward pass computes its scores again.
        queries = q.reshape(-1, BLOCK, features)
        keys, values = (x.reshape(-1, *x.shape[2:]) for x in (k, v))
        block = jax.checkpoint(lambda i: _softmax_attention(queries[i], keys[i // blocks], values[i // blocks]))
        out = jax.lax.map(block, jnp.arange(len(queries))).reshape(batch, heads, length, features)
    return jnp.swapaxes(out, 1, 2).astype(v.dtype)


def _softmax_attention(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """`[..., T, Hd], [..., Hd, S], [..., S, Hd] -> [..., T, Hd]` float32; q is scaled, mask `[T, S]` true if seen."""
    logits = jnp.matmul(q, k, preferred_element_type=jnp.float32)
    if mask is not None:
        logits = jnp.where(mask, logits, -jnp.inf)
    weights = jnp.exp(logits - logits.max(axis=-1, keepdims=True))
    total = weights.sum(axis=-1, keepdims=True)
    return jnp.matmul(weights.astype(v.dtype), v, preferred_element_type=jnp.float32) / total


def _flash_takes(q: jax.Array, k: jax.Array) -> bool:
    """Long self-attention in whole blocks. One head over all channels, as in the autoencoder, has no room on chip."""
    length = q.shape[1]
    return k.shape[1] == length and length >= FLASH_FROM and length % BLOCK == 0 and q.shape[-1] <= 256


def _flash(q: jax.Array, k: jax.Array, v: jax.Array, *, interpret: bool = False) -> jax.Array:
    """Splash attention of JAX, on every chip of the mesh in use (`jax.set_mesh`) for its part of the batch and heads.

    A Pallas call is not partitioned by the compiler, so where there is a mesh it is mapped over it by hand: batch over
    the axes "data" and "fsdp", heads over "tensor", as far as these divide them.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask

    @functools.partial(jax.vmap, in_axes=(0, 0, 0))
    def per_example(q, k, v):  # [N, T, Hd]; the kernel does not scale the logits
        heads, length, _ = q.shape
        mask = splash_attention_mask.MultiHeadMask([splash_attention_mask.FullMask((length, length))] * heads)
        blocks = splash_attention_kernel.BlockSizes(
            block_q=BLOCK,
            block_kv=BLOCK,
            block_kv_compute=BLOCK,
            block_q_dkv=BLOCK,
            block_kv_dkv=BLOCK,
            block_kv_dkv_compute=BLOCK,
            block_q_dq=BLOCK,
            block_kv_dq=BLOCK,
        )
        kernel = splash_attention_kernel.make_splash_mha(
            mask, block_sizes=blocks, head_shards=1, q_seq_shards=1, interpret=interpret
        )
        return kernel(q, k, v)

    def local(q, k, v):  # [B, T, N, Hd]
        q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q * q.shape[-1] ** -0.5, k, v))
        return jnp.swapaxes(per_example(q, k, v), 1, 2)

    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.are_all_axes_manual:  # no mesh, or each device is on its own already
        return local(q, k, v)
    batch = _dividing(mesh, ("data", "fsdp"), q.shape[0])
    heads = _dividing(mesh, ("tensor",), q.shape[2])
    spec = PartitionSpec(batch, None, heads, None)
    # JAX's kernel does not say over which axes its output varies, which the check would ask for.
    return jax.shard_map(local, mesh=mesh, in_specs=(spec,) * 3, out_specs=spec, check_vma=False)(q, k, v)


def _dividing(mesh: jax.sharding.AbstractMesh, axes: tuple[str, ...], size: int) -> tuple[str, ...]:
    """Those of the axes that the mesh has and that divide an array's axis together."""
    chosen: tuple[str, ...] = ()
    for axis in axes:
        if axis in mesh.axis_names and size % math.prod(mesh.shape[name] for name in (*chosen, axis)) == 0:
            chosen = (*chosen, axis)
    return chosen
