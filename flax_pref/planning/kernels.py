"""What Pallas kernels take, which the compiled text does not tell: from the shapes of what they read and give."""

import math

from flax_pref.planning.hlo import Array, Cost, Instruction
from flax_pref.planning.topologies import Topology

PALLAS = "tpu_custom_call"
# Products of T x S x Hd in the kernels of JAX's splash attention (arXiv:2205.14135, algorithms 1 and 4): forward the
# scores and the weighted sum of values; backward, in one kernel, the scores again, the gradients of the weights, and
# those of q, k and v.
SPLASH = {"splash_mha_fwd": 2, "splash_mha_dkv": 5}
LANES = 128
EXPONENTIALS = 8 * LANES  # of a core, in a cycle


def kernel_cost(one: Instruction, operands: list[Array], topology: Topology) -> Cost:
    """The cost of a custom call; nothing of those that only name values, and of kernels that are not known."""
    if one.target != PALLAS:
        return Cost()
    if flops := one.attribute(r'"cost_estimate":\{"flops":"?(\d+)'):
        exponentials, moved = (
            int(one.attribute(rf'"{name}":"?(\d+)') or 0) for name in ("transcendentals", "bytes_accessed")
        )
        return _cost(topology, int(flops), int(flops), exponentials, moved)
    products = next((count for name, count in SPLASH.items() if one.name.startswith(name)), None)
    if products is None:
        return Cost()
    q, k, *_ = (array for array in operands if len(array.shape) > 2 and array.dtype[0] in "bf")
    queries, keys = (
        math.ceil(x.shape[-2] / int(one.attribute(rf"block_{name}(?:_dkv)?\W+(\d+)") or x.shape[-2]))
        for name, x in (("q", q), ("kv", k))
    )
    # Forward, all blocks of keys for each of queries; backward the other way round, and with q the gradient of the
    # output. What is needed again at once, because there is one block of it, is not read again.
    if products == 2:
        read = q.bytes + 2 * k.bytes * (queries if keys > 1 else 1)
    else:
        read = 2 * k.bytes + 2 * q.bytes * (keys if queries > 1 else 1)
    return attention_cost(q, k, one.outputs, topology, products=products, read=read)


def known(one: Instruction) -> bool:
    """Whether `kernel_cost` knows this custom call."""
    return one.target != PALLAS or "cost_estimate" in one.text or one.name.startswith(tuple(SPLASH))


def attention_cost(
    q: Array, k: Array, outputs: tuple[Array, ...], topology: Topology, *, products: int, read: int
) -> Cost:
    """A kernel of flash attention: the largest of what matrix units, exponentials and main memory take.

    Args:
        q: `[..., T, Hd]`.
        k: `[..., S, Hd]`, as many numbers as v.
        outputs: of the kernel; those of its last four axes are what it gives, others stay on the chip.
        topology: whose chips run it.
        products: of T x S x Hd numbers.
        read: bytes of q, k, v and gradients, with what it reads again.
    """
    *batch, length, size = q.shape
    scores = math.prod(batch) * length * k.shape[-2]
    # A matrix unit multiplies as many numbers as it has rows, whatever the size of a head is.
    padded = topology.chip.mxu * math.ceil(size / topology.chip.mxu)
    lanes = LANES * math.ceil(size / LANES) / size  # a row of main memory is filled up, too
    moved = lanes * (read + sum(x.bytes for x in outputs))
    return _cost(topology, 2 * products * scores * size, 2 * products * scores * padded, scores, moved)


def _cost(topology: Topology, flops: float, padded_flops: float, exponentials: float, moved: float) -> Cost:
    chip = topology.chip
    seconds = max(
        padded_flops / topology.peak,
        exponentials / (EXPONENTIALS * chip.cores * chip.clock),
        moved / chip.bandwidth,
    )
    return Cost(seconds * chip.clock, flops, padded_flops, bytes=moved, touched=moved)
