"""Scaled dot-product attention: the one place where its kernel is chosen.

For the shapes of Stable Diffusion XLA writes the whole score matrix of a long self-attention to memory. On TPUs the
Pallas splash kernel does not; for short sequences and the 77 keys of a prompt XLA is faster. On CUDA GPUs cuDNN's fused
attention takes 16-bit inputs of most head sizes. On CPUs a loop over heads and blocks of queries, whose scores fit into
the cache, is four times as fast as the whole at 4096 positions.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple, cast, get_args

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from flax_pref.models.choices import Kernel
from flax_pref.models.platform import CACHED, device_kind, platform

BLOCK = 512  # queries, on CPUs


class Blocks(NamedTuple):
    """Positions of a block of the splash kernel.

    Attributes:
        queries: for which it goes through all keys.
        keys: on the chip together, with their values.
        at_once: of these, whose scores are computed together.
    """

    queries: int
    keys: int
    at_once: int


# The largest blocks of the splash kernel. Found without hardware, for v5e and v6e (libtpu 0.0.42): bundles of the
# kernel's final schedule (--xla_jf_dump_llo_text) times the steps of its grid, but no less than its matrix units need.
# Thousands of cycles per head at 4096 positions, of sizes up to 128:
#
#                                                             v5e   v6e
#     forward                           512, 4096, 1024        72    50
#                                       1024, 1024, 1024       81    54
#                                       512, 512, 512          94    76
#     backward, one kernel              512, 2048, 512        164    94
#     backward, q apart from k and v    512, 512, 512         249   178
#
# A step that has all keys reads them once. Twice as many queries forward, or keys backward, have no room in the 16 MiB
# that the compiler gives a kernel of v5e. Of large heads and of float32 there are fewer keys.
FORWARD = Blocks(512, 4096, 1024)
BACKWARD = Blocks(512, 2048, 512)
# On v6e, if these are all keys. The kernel gives a part of the gradient of queries for each block of keys, and to add
# up two parts takes 8.4 million cycles of both passes of a transformer of 16 x 4096 x 320: on v6e a fifth of all with
# its kernels, on v5e 4.0 of 70. Half as many queries leave room for twice as many keys; a head then takes 115 thousand
# cycles instead of 101 on v6e, and 199 instead of 182 on v5e. A v4 has no room.
ALL_BACKWARD = Blocks(256, 4096, 1024)
QUERIES = 512, 384  # of a block: what fills up a sequence least
LANES = 128  # numbers of a row of a vector register, which a head fills up
# Cycles of v5e, forward and backward, in millions: 2.2 against XLA's 6.2 for 8 x 1024 positions of 8 heads of 80, 3.6
# against 8.4 for 8 x 768 of 20 heads of 64, but 4.1 against 1.6 for 8 x 576 of 8 heads of 160 and, forward, 0.7
# against 0.07 for 8 x 256 of these, whose scores XLA keeps on the chip. Filled up from 4032 to 4096: 35 against 125 for
# 8 images, 10 heads of 64. A prompt's 77 keys, forward, 8 x 4096 queries of 8 heads of 40: at least 0.6 against 0.24.
FLASH_FROM = 768  # positions
UNSEEN = -30000.0  # a score whose weight is 0 beside any other
REORDERED = "reordered"  # how a compiled program names products that only move numbers


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    is_causal: bool = False,
    seen: jax.Array | None = None,
    kernel: Kernel = "auto",
) -> jax.Array:
    """`softmax(q k^T / sqrt(Hd)) v`; logits and softmax in float32.

    Args:
        q: `[B, T, N, Hd]` queries of N heads.
        k: `[B, S, N, Hd]` keys.
        v: `[B, S, N, Hd]` values.
        is_causal: position t sees positions 0 ... t only.
        seen: `[B, S]`, true for keys that count; None: all do. With it, attention goes through XLA.
        kernel: "xla", "cudnn" (CUDA), "flash" (TPU, Pallas), "blocked" (any device), or "auto": the fastest that the
            platform has for these shapes, which is that of the mesh in use (`jax.set_mesh`) or of JAX's default device.
            With "flash", shapes and masks that the kernel does not cover go through XLA.

    Returns:
        `[B, T, N, Hd]`.

    Raises:
        ValueError: no such kernel.
    """
    check_kernel(kernel)
    if seen is not None:
        return jax.nn.dot_product_attention(q, k, v, mask=seen[:, None, None], is_causal=is_causal)
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
    """16 bits, and a head size that is a multiple of 8, up to 128, or 256 from the Hopper generation on.

    So JAX says, which refuses others. It does not say that cuDNN has no such kernel before the Ampere generation.
    """
    capability = getattr(jax.local_devices()[0], "compute_capability", "")  # none where the mesh's devices are not here
    generation = capability.partition(".")[0]  # AMD's, which have no cuDNN, are such as "gfx942"
    largest = 0 if not generation.isdigit() or int(generation) < 8 else 128 if int(generation) < 9 else 256
    return q.dtype in (jnp.bfloat16, jnp.float16) and q.shape[-1] % 8 == 0 and q.shape[-1] <= largest


def _blocked(q: jax.Array, k: jax.Array, v: jax.Array, is_causal: bool) -> jax.Array:
    """Heads and blocks of queries one after another where there are many positions, else images, or all at once."""
    q, v = (jnp.swapaxes(x, 1, 2) for x in (q * q.shape[-1] ** -0.5, v))  # [B, N, T, Hd]
    k = jnp.moveaxis(k, 1, 3)  # [B, N, Hd, S]
    if is_causal:
        seen = jnp.tri(q.shape[2], k.shape[3], dtype=bool)
        out = jnp.concatenate([_softmax_attention(*image, mask=seen)[0] for image in _images(q, k, v)])
    else:
        out = _attend(q, k, v)
    return jnp.swapaxes(out, 1, 2).astype(v.dtype)


def _softmax_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """`[..., T, Hd], [..., Hd, S], [..., S, Hd] -> [..., T, Hd]`, and each row's log of the sum `[..., T, 1]`.

    Both are float32, or float64 if q is. q is scaled, mask `[T, S]` true where a key is seen.
    """
    kind = jnp.promote_types(q.dtype, jnp.float32)
    logits = jnp.matmul(q, k, preferred_element_type=kind)
    if mask is not None:
        logits = jnp.where(mask, logits, -jnp.inf)
    largest = logits.max(axis=-1, keepdims=True)
    weights = jnp.exp(logits - largest)
    total = weights.sum(axis=-1, keepdims=True)
    out = jnp.matmul(weights.astype(v.dtype), v, preferred_element_type=kind) / total
    return out, largest + jnp.log(total)


def _block_attention(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`_softmax_attention` of a block, which looks for the largest scores only where exponentials do not fit float32.

    To look for them is a pass over all scores, a tenth of the time of attention. It is needed where a row's largest is
    not between about -46 and 46. Weights of 16 bits are always those of scores less the largest: float16 ends at 65504.
    """
    if v.dtype not in (jnp.float32, jnp.float64):
        return _softmax_attention(q, k, v)
    weights = jnp.exp(jnp.matmul(q, k))
    total = weights.sum(axis=-1, keepdims=True)
    fits = jnp.all((total > 1e-20) & (total < 1e20))  # far from the ends: sums of weighted values must fit as well
    return jax.lax.cond(
        fits, lambda: (jnp.matmul(weights, v) / total, jnp.log(total)), lambda: _softmax_attention(q, k, v)
    )


def _in_blocks(q: jax.Array, k: jax.Array) -> bool:
    length, keys = q.shape[2], k.shape[3]
    return length >= 2 * BLOCK and keys >= BLOCK and length % BLOCK == 0


def _images(*arrays: jax.Array) -> list[tuple[jax.Array, ...]]:
    """`q [B, N, T, Hd]`, `k [B, N, Hd, S]` and others of the batch, image by image if their scores exceed the cache."""
    q, k, *_ = arrays
    images = len(q) if 4 * math.prod(q.shape[:3]) * k.shape[3] > CACHED else 1
    return list(zip(*(jnp.split(x, images) for x in arrays), strict=True))


@jax.custom_vjp
def _attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """`[B, N, T, Hd], [B, N, Hd, S], [B, N, S, Hd] -> [B, N, T, Hd]`, float32 or more; the gradient computes scores
    again.
    """
    return _parts(q, k, v)[0]


def _attend_forward(q, k, v):
    out, log_total = _parts(q, k, v)
    return out, (q, k, v, out, log_total)


def _parts(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`_softmax_attention` of all queries, in parts whose scores the cache holds."""
    if not _in_blocks(q, k):
        parts = (_softmax_attention(*image) for image in _images(q, k, v))
        return jax.tree.map(lambda *parts: jnp.concatenate(parts), *parts)
    blocks = q.shape[2] // BLOCK
    queries = q.reshape(-1, BLOCK, q.shape[3])
    keys, values = (x.reshape(-1, *x.shape[2:]) for x in (k, v))
    parts = jax.lax.map(
        lambda i: _block_attention(queries[i], keys[i // blocks], values[i // blocks]), jnp.arange(len(queries))
    )
    return jax.tree.map(lambda x: x.reshape(*q.shape[:3], -1), parts)


def _attend_backward(saved, g):
    q, k, v, out, log_total = saved
    kinds = [x.dtype for x in (q, k, v)]
    q, k, v = (x.astype(g.dtype) for x in (q, k, v))
    inner = (g * out).sum(axis=-1, keepdims=True)
    # Scores are to be computed again, not kept: XLA would find them to be those of the forward pass.
    known = q, k + 0 * inner[:, :, :1], v, log_total, inner, g
    if _in_blocks(q, k):
        gradients = _block_gradients(*known)
    else:
        images = [_gradients(*image) for image in _images(*known)]
        gradients = [jnp.concatenate(parts) for parts in zip(*images, strict=True)]
    dq, dk, dv = gradients
    return tuple(x.astype(kind) for x, kind in zip((dq, dk, jnp.swapaxes(dv, -2, -1)), kinds, strict=True))


def _block_gradients(q, k, v, log_total, inner, g):
    """`_gradients`, a block of queries of one head at a time."""
    blocks = q.shape[2] // BLOCK
    rows = [x.reshape(-1, BLOCK, x.shape[3]) for x in (q, log_total, inner)]
    keys, values = (x.reshape(-1, *x.shape[2:]) for x in (k, v))

    def block(i, sums):
        g, *sums = sums
        head = i // blocks
        dq, *parts = _gradients(rows[0][i], keys[head], values[head], rows[1][i], rows[2][i], g[i])
        sums = [jax.lax.dynamic_update_index_in_dim(x, x[head] + y, head, 0) for x, y in zip(sums, parts, strict=True)]
        return [jax.lax.dynamic_update_index_in_dim(g, dq, i, 0), *sums]

    # Every block of g makes room for that of the gradient of q. Zeros that hang on g are not made before it is there.
    zeros = jnp.zeros_like(keys) + 0 * inner.reshape(len(keys), -1)[:, :1, None]
    gradients = jax.lax.fori_loop(0, len(rows[0]), block, [g.reshape(rows[0].shape), zeros, zeros])
    return [x.reshape(y.shape) for x, y in zip(gradients, (q, k, k), strict=True)]


def _gradients(q, k, v, log_total, inner, g):
    """Gradients of q, k and, with its last axes swapped, v (arXiv:2205.14135, algorithm 4).

    Products are those that transpose the small matrix and not the scores.
    """
    weights = jnp.exp(q @ k - log_total)
    dv = jnp.swapaxes(g, -2, -1) @ weights
    scores = weights * (g @ jnp.swapaxes(v, -2, -1) - inner)
    return scores @ jnp.swapaxes(k, -2, -1), jnp.swapaxes(q, -2, -1) @ scores, dv


_attend.defvjp(_attend_forward, _attend_backward)


def _flash_takes(q: jax.Array, k: jax.Array) -> bool:
    """Long self-attention. One head over all channels, as in the autoencoder, has no room on chip."""
    return k.shape[1] == q.shape[1] >= FLASH_FROM and q.shape[-1] < 256


def flash_blocks(length: int, head_size: int, dtype: jax.typing.DTypeLike) -> tuple[int, Blocks, Blocks]:
    """How the splash kernel takes self-attention apart.

    Args:
        length: positions.
        head_size: numbers of a head.
        dtype: of q, k and v.

    Returns:
        The positions with those that fill up the last block, and the blocks of the forward and the backward kernel.
    """
    queries = min(QUERIES, key=lambda size: -length % size)
    filled = length + -length % queries
    rows = -(-head_size // LANES) * jnp.dtype(dtype).itemsize // 2  # rows of 16-bit numbers that a key takes

    def blocks(most: Blocks) -> Blocks:
        keys = _largest(filled, queries, most.keys // rows)
        return Blocks(min(queries, most.queries), keys, _largest(keys, queries, most.at_once))

    whole = queries == BACKWARD.queries and blocks(BACKWARD).keys < blocks(ALL_BACKWARD).keys == filled
    return filled, blocks(FORWARD), blocks(ALL_BACKWARD if whole and "v6" in device_kind() else BACKWARD)


def _largest(whole: int, unit: int, most: int) -> int:
    """The largest multiple of the unit, up to `most`, that divides the whole; at least the unit."""
    return max(size for size in range(unit, max(unit, most) + 1, unit) if whole % size == 0)


def _fill(q: jax.Array, k: jax.Array, v: jax.Array, new: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`[B, N, T, Hd]` with new positions at the end, whose keys no query sees.

    One more feature of the heads, which have room for it in their registers, makes the scores of these keys small. The
    kernel's own masks would be applied to every score.
    """
    ends = (0, 0), (0, 0), (0, new)
    unseen = (jnp.arange(k.shape[2] + new) >= k.shape[2])[:, None] & (jnp.arange(k.shape[3] + 1) == k.shape[3])
    k = jnp.where(unseen, UNSEEN, jnp.pad(k, (*ends, (0, 1)))).astype(k.dtype)
    return jnp.pad(q, (*ends, (0, 1)), constant_values=1), k, jnp.pad(v, (*ends, (0, 0)))


def _flash(q: jax.Array, k: jax.Array, v: jax.Array, *, interpret: bool = False) -> jax.Array:
    """Splash attention of JAX, on every chip of the mesh in use (`jax.set_mesh`) for its part of the batch and heads.

    A Pallas call is not partitioned by the compiler, so where there is a mesh it is mapped over it by hand: batch over
    the axes "data" and "fsdp", heads over "tensor", where these divide them.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask

    length = q.shape[1]
    filled, forward, backward = flash_blocks(length, q.shape[-1], q.dtype)
    blocks = splash_attention_kernel.BlockSizes(*forward, *backward, use_fused_bwd_kernel=True)

    def local(q, k, v):  # [B, T, N, Hd]; the kernel does not scale the logits
        mask = splash_attention_mask.MultiHeadMask([splash_attention_mask.FullMask((filled, filled))] * q.shape[2])
        kernel = splash_attention_kernel.make_splash_mha(
            mask, block_sizes=blocks, head_shards=1, q_seq_shards=1, interpret=interpret
        )
        q, k, v = (_heads_first(x) for x in (q * q.shape[-1] ** -0.5, k, v))
        if filled > length:
            q, k, v = _fill(q, k, v, filled - length)
        out = cast(jax.Array, jax.vmap(kernel)(q, k, v))  # without the statistics, which it gives if asked
        return _heads_last(out[:, :, :length])

    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.are_all_axes_manual:  # no mesh, or each device is on its own already
        return local(q, k, v)
    batch = _dividing(mesh, ("data", "fsdp"), q.shape[0])
    heads = _dividing(mesh, ("tensor",), q.shape[2])
    spec = PartitionSpec(batch, None, heads, None)
    # JAX's kernel does not say over which axes its output varies, which the check would ask for.
    return jax.shard_map(local, mesh=mesh, in_specs=(spec,) * 3, out_specs=spec, check_vma=False)(q, k, v)


# In training, where what a block of layers keeps has no room on the chip, a TPU's matrix units reorder axes faster than
# its copies: a product with ones and zeros changes no 16-bit number. Both passes of transformer blocks with LoRA, v5e,
# by copies and by products, in million cycles outside of the kernels: 16 x 4096 x 320 49.3 and 42.7, two layers of 2 x
# 4096 x 640 16.0 and 13.9, of 2 x 1024 x 1280 9.7 and 9.2. Where nothing is kept, copies are faster: forward, 2 x 4096
# x 320 1.03 and 1.12.


@jax.custom_vjp
def _heads_first(x: jax.Array) -> jax.Array:
    """`[B, T, N, Hd] -> [B, N, T, Hd]`."""
    return jnp.swapaxes(x, 1, 2)


@jax.custom_vjp
def _heads_last(x: jax.Array) -> jax.Array:
    """`[B, N, T, Hd] -> [B, T, N, Hd]`."""
    return jnp.swapaxes(x, 1, 2)


@jax.named_scope(REORDERED)
def _to_heads_first(x: jax.Array) -> jax.Array:
    """As `_heads_first`, by a product; of wider numbers, which it would round, by a copy."""
    if x.dtype.itemsize > 2:
        return jnp.swapaxes(x, 1, 2)
    batch, length, *heads = x.shape
    return jnp.einsum("btc,cnd->bntd", x.reshape(batch, length, -1), _ones(heads, x.dtype))


@jax.named_scope(REORDERED)
def _to_heads_last(x: jax.Array) -> jax.Array:
    """As `_heads_last`; see `_to_heads_first`."""
    if x.dtype.itemsize > 2:
        return jnp.swapaxes(x, 1, 2)
    batch, count, length, size = x.shape
    y = jnp.einsum("bntd,cnd->btc", x, _ones((count, size), x.dtype))
    return y.reshape(batch, length, count, size)


def _ones(heads: Sequence[int], dtype) -> jax.Array:
    """`[N Hd, N, Hd]`, one where the first index is that of the others, else zero."""
    return jnp.eye(math.prod(heads), dtype=dtype).reshape(-1, *heads)


_heads_first.defvjp(lambda x: (_to_heads_first(x), None), lambda _, gradient: (_to_heads_last(gradient),))
_heads_last.defvjp(lambda x: (_to_heads_last(x), None), lambda _, gradient: (_to_heads_first(gradient),))


def _dividing(mesh: jax.sharding.AbstractMesh, axes: tuple[str, ...], size: int) -> tuple[str, ...]:
    """Those of the axes that the mesh has and that divide an array's axis together."""
    chosen: tuple[str, ...] = ()
    for axis in axes:
        if axis in mesh.axis_names and size % math.prod(mesh.shape[name] for name in (*chosen, axis)) == 0:
            chosen = (*chosen, axis)
    return chosen
