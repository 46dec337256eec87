"""Kernels of attention: the same numbers and gradients, whichever is chosen."""

from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from flax_pref.models import attention as kernels
from flax_pref.models.attention import attention
from flax_pref.models.layers import FEW_POSITIONS, convolve
from flax_pref.models.unet import CPU_BLOCK, FeedForward, UNet2DCondition, UNetConfig, set_attention


def heads(length, keys=None, features=40, batch=2):
    shapes = [(batch, n, 2, features) for n in (length, keys or length, keys or length)]
    return [jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate(shapes)]


def assert_blocked_as_xla(qkv, **tolerance):
    def value_and_gradients(kernel):
        return jax.jit(jax.value_and_grad(lambda *qkv: jnp.sin(attention(*qkv, kernel=kernel)).sum(), (0, 1, 2)))(*qkv)

    for ours, reference in zip(*map(jax.tree.leaves, map(value_and_gradients, ("blocked", "xla"))), strict=True):
        np.testing.assert_allclose(ours, reference, **tolerance)


# Long enough for the loop over blocks, not a multiple of a block, short, and cross-attention.
@pytest.mark.parametrize("shape", [(1024, None), (1100, None), (64, None), (1024, 77)])
def test_blocks_of_queries_give_what_all_at_once_give(shape):
    assert_blocked_as_xla(heads(*shape), rtol=1e-4, atol=2e-5)


# All scores of a query move alike, so that exponentials in float32 hold them all, or some, or none.
@pytest.mark.parametrize("moved", [0, 40, 100, -40, -100])
def test_blocks_attend_alike_wherever_scores_are(moved):
    q, k, v = heads(1024, features=8)
    q, k = q.at[..., 0].set(1), k.at[..., 0].set(moved * 8**0.5)
    assert_blocked_as_xla((q, k, v), rtol=1e-3, atol=1e-4)


def test_no_position_sees_a_later_one():
    q, k, v = heads(9)
    for kernel in ("blocked", "xla"):
        out = attention(q, k, v, is_causal=True, kernel=kernel)
        np.testing.assert_allclose(out[:, 4], attention(q[:, 4:5], k[:, :5], v[:, :5], kernel="xla")[:, 0], atol=1e-6)


# In blocks of 512 and of 384, filled up to them, in several blocks of keys, for each size of head, and with fewer
# queries for all keys.
@pytest.mark.parametrize(
    ("length", "size", "keys", "kind"),
    [
        (1024, 40, 512, "TPU v5 lite"),
        (768, 64, 4096, "TPU v5 lite"),
        (1000, 80, 512, "TPU v5 lite"),
        (760, 160, 384, "TPU v5 lite"),
        (1000, 40, 512, "TPU v6 lite"),
    ],
)
def test_the_tpu_kernel_and_its_gradients_are_those_of_xla(monkeypatch, length, size, keys, kind):
    monkeypatch.setattr(kernels, "device_kind", lambda: kind)
    monkeypatch.setattr(kernels, "FORWARD", kernels.FORWARD._replace(keys=keys))
    monkeypatch.setattr(kernels, "BACKWARD", kernels.BACKWARD._replace(keys=keys))
    qkv = heads(length, features=size, batch=1)

    def value_and_gradients(attend):
        return jax.jit(jax.value_and_grad(lambda *qkv: jnp.sin(attend(*qkv)).sum(), (0, 1, 2)))(*qkv)

    flash, xla = (partial(kernels._flash, interpret=True), partial(attention, kernel="xla"))
    for ours, reference in zip(*map(jax.tree.leaves, map(value_and_gradients, (flash, xla))), strict=True):
        np.testing.assert_allclose(ours, reference, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
@pytest.mark.parametrize("reorder", [kernels._heads_first, kernels._heads_last])
def test_products_that_reorder_axes_change_no_number(reorder, dtype):
    x, gradient = (jax.random.normal(jax.random.key(i), (2, 3, 5, 7)).astype(dtype) for i in range(2))
    y, back = jax.vjp(reorder, x)
    for result, source in ((reorder(x), x), (y, x), (back(jnp.swapaxes(gradient, 1, 2))[0], gradient)):
        expected = source if result.shape == source.shape else jnp.swapaxes(source, 1, 2)
        np.testing.assert_array_equal(result, expected)
    products = str(jax.make_jaxpr(lambda x: jax.vjp(reorder, x)[0])(x)).count("dot_general")
    assert products == (dtype != jnp.float32)


# Of images of 512, 768 and 1024 pixels, and of sizes such as 1152 x 896, 832 x 1216, 704 x 1408 and 640 x 1536.
@pytest.mark.parametrize("length", [1024, 4096, 2304, 9216, 16384, 1008, 4032, 988, 3952, 968, 3872, 960, 3840])
@pytest.mark.parametrize("size", [64, 160])
@pytest.mark.parametrize("kind", ["TPU v5 lite", "TPU v6 lite"])
def test_the_tpu_kernel_takes_every_size_of_images(monkeypatch, length, size, kind):
    monkeypatch.setattr(kernels, "device_kind", lambda: kind)
    q = jax.ShapeDtypeStruct((1, length, 1, size), jnp.bfloat16)
    assert kernels._flash_takes(q, q)
    gradient = jax.eval_shape(jax.grad(lambda q: kernels._flash(q, q, q).astype(jnp.float32).sum()), q)
    assert gradient.shape == q.shape
    filled, *blocks = kernels.flash_blocks(length, size, q.dtype)
    for queries, keys, at_once in blocks:  # the kernel would leave out what is over
        assert filled % queries == filled % keys == keys % at_once == 0 <= filled - length < queries


# A short sequence, a prompt and a mask.
@pytest.mark.parametrize(("shape", "is_causal"), [((64, 64), False), ((1024, 77), False), ((1024, 1024), True)])
def test_what_the_tpu_kernel_does_not_cover_goes_through_xla(shape, is_causal):
    qkv = heads(*shape, batch=1)
    flash, xla = (attention(*qkv, is_causal=is_causal, kernel=kernel) for kernel in ("flash", "xla"))
    np.testing.assert_array_equal(flash, xla)


@pytest.mark.parametrize("capability", ["7.5", "8.0", "8.9", "9.0", "10.0", "12.0", "gfx942"])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
@pytest.mark.parametrize("size", [40, 64, 80, 160, 512, 44])
def test_cudnn_is_chosen_where_jax_takes_it(monkeypatch, capability, dtype, size):
    checks = pytest.importorskip("jax._src.cudnn.fused_attention_stablehlo")
    amd = capability.startswith("gfx")
    monkeypatch.setattr(jax, "local_devices", lambda: [SimpleNamespace(compute_capability=capability)])
    monkeypatch.setattr(kernels, "platform", lambda: "gpu")

    def at_least(other):
        return tuple(map(int, capability.split("."))) >= tuple(map(int, other.split(".")))

    monkeypatch.setattr(checks, "check_compute_capability", at_least)
    q = jax.ShapeDtypeStruct((2, 4096, 8, size), dtype)
    prompt = jax.ShapeDtypeStruct((2, 77, 8, size), dtype)
    layout = checks.AttentionLayout.BTNH
    try:
        for k in (q, prompt):
            checks.check_layout(q, k, k, None, None, None, None, None, None, None, layout)
            checks.check_is_flash_attention(q, k, k, layout.value, 91100, has_bias=False, is_training=True)
        taken = not amd and at_least("8.0")  # JAX does not check that
    except (NotImplementedError, ValueError):
        taken = False
    assert kernels._fastest(q) == ("cudnn" if taken else "xla")


def test_half_precision_stays_half_precision():
    for dtype in (jnp.bfloat16, jnp.float16):
        out = attention(*(x.astype(dtype) for x in heads(64)))
        assert out.dtype == dtype
        np.testing.assert_allclose(out.astype(jnp.float32), attention(*heads(64), kernel="xla"), atol=0.03)


def test_an_unknown_kernel_is_refused_before_anything_runs():
    with pytest.raises(ValueError, match="kernel must be one of auto, xla, cudnn, flash, blocked, got 'fast'"):
        attention(*heads(8), kernel="fast")
    unet = nnx.eval_shape(lambda: UNet2DCondition(UNetConfig(block_out_channels=(32,) * 4), rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match="kernel must be one of"):
        set_attention(unet, "fast")
    set_attention(unet, "xla")
    assert {
        layer.kernel
        for _, layer in nnx.iter_modules(unet)
        if hasattr(layer, "kernel") and layer.__class__.__name__ == "Attention"
    } == {"xla"}


@pytest.mark.parametrize(("size", "kernel_size", "padding"), [(4, 3, (1, 1)), (9, 3, (0, 1)), (16, 1, (0, 0))])
def test_convolutions_of_few_positions_are_those_of_xla(size, kernel_size, padding):
    x = jax.random.normal(jax.random.key(0), (2, size, size, 5))
    kernel = jax.random.normal(jax.random.key(1), (kernel_size, kernel_size, 5, 7))
    expected = jax.lax.conv_general_dilated(
        x, kernel, (1, 1), (padding, padding), dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    assert x.size // 5 <= FEW_POSITIONS or kernel_size == 1
    np.testing.assert_allclose(convolve(x, kernel, 1, padding), expected, rtol=1e-5, atol=1e-5)


def test_a_long_feed_forward_layer_is_the_short_one_on_every_position():
    layer = FeedForward(8, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (2, 2 * CPU_BLOCK, 8))
    np.testing.assert_allclose(layer(x), layer.transform(x), atol=1e-6)
