"""Layers compute the same whatever form is the fastest on a device."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, PartitionSpec

from flax_pref.models import layers
from flax_pref.models.layers import Conv, GroupNorm, Linear, ResnetBlock2D, gelu, halves, projections
from flax_pref.models.lora import add_lora, set_rows
from flax_pref.models.platform import per_device, weights_divided

NAMES = ("to_q", "to_k", "to_v")


@pytest.fixture
def on_tpu(monkeypatch):
    """What layers do on a TPU, computed by this machine."""
    monkeypatch.setattr(layers, "platform", lambda: "tpu")


def reference_convolution(x, kernel, padding):
    return jax.lax.conv_general_dilated(
        x, kernel, (1, 1), (padding, padding), dimension_numbers=("NHWC", "HWIO", "NHWC"), precision="highest"
    )


@pytest.mark.parametrize("height, by_eigen", [(layers.FEW_ROWS, True), (layers.FEW_ROWS - 1, False)])
def test_a_cpu_convolves_by_eigen_unless_a_gradient_is_asked_for(height, by_eigen):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((2, height, 40, 5)), jnp.float32)
    kernel = jnp.asarray(rng.standard_normal((3, 3, 5, 6)), jnp.float32)

    def ours(x, kernel):
        return layers.convolve(x, kernel, 1, (1, 1))

    def xla(x, kernel):
        return reference_convolution(x, kernel, (1, 1))

    def gradients(convolve):
        return jax.grad(lambda *args: jnp.sin(convolve(*args)).sum(), (0, 1))

    np.testing.assert_allclose(ours(x, kernel), xla(x, kernel), atol=2e-5)
    for one, other in zip(gradients(ours)(x, kernel), gradients(xla)(x, kernel), strict=True):
        np.testing.assert_allclose(one, other, atol=2e-4)
    one_row_more = f"f32[2,{height + 1},40,6]"
    assert (one_row_more in str(jax.make_jaxpr(ours)(x, kernel))) == by_eigen
    assert one_row_more not in str(jax.make_jaxpr(gradients(ours))(x, kernel))


@pytest.mark.parametrize("size, padding", [(3, (1, 1)), (3, (0, 0)), (1, (0, 0))])
@pytest.mark.parametrize("xla_gradient", [0, layers.XLA_GRADIENT])
def test_few_images_are_convolved_on_a_tpu_as_xla_convolves(on_tpu, monkeypatch, size, padding, xla_gradient):
    monkeypatch.setattr(layers, "XLA_GRADIENT", xla_gradient)
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((2, 9, 7, 5)), jnp.float32)
    kernel = jnp.asarray(rng.standard_normal((size, size, 5, 6)), jnp.float32)

    def gradients(convolve):
        return jax.grad(lambda *args: jnp.sin(convolve(*args)).sum(), (0, 1))(x, kernel)

    def ours(x, kernel):
        return layers.convolve(x, kernel, 1, padding)

    def xla(x, kernel):
        return reference_convolution(x, kernel, padding)

    np.testing.assert_allclose(ours(x, kernel), xla(x, kernel), atol=2e-5)
    for one, other in zip(gradients(ours), gradients(xla), strict=True):
        np.testing.assert_allclose(one, other, atol=2e-4)


def test_sums_over_a_16_bit_convolution_are_kept_in_float32(on_tpu):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((1, 6, 6, 64)), jnp.bfloat16)
    kernel = jnp.asarray(rng.standard_normal((3, 3, 64, 8)), jnp.bfloat16)
    exact = reference_convolution(x.astype(jnp.float32), kernel.astype(jnp.float32), (1, 1))
    ours = layers.convolve(x, kernel, 1, (1, 1))
    assert ours.dtype == jnp.bfloat16
    # One rounding at the end: of three roundings on the way some would leave this.
    np.testing.assert_allclose(ours.astype(jnp.float32), exact, rtol=2**-8, atol=1e-4)


@pytest.mark.parametrize("images, channels", [(12, 8), (14, 8), (10, 8), (12, layers.MANY_CHANNELS)])
def test_a_resnet_of_a_few_images_on_a_tpu_is_that_of_each_image(on_tpu, monkeypatch, images, channels):
    resnet = ResnetBlock2D(4, channels, temb_channels=6, num_groups=2, epsilon=1e-5, rngs=nnx.Rngs(0))
    rng, batches = np.random.default_rng(0), []
    x, temb = (jnp.asarray(rng.standard_normal((images, *shape)), jnp.float32) for shape in ((3, 3, 4), (6,)))
    alone = jnp.concatenate([resnet(x[i : i + 1], temb[i : i + 1]) for i in range(images)])
    transform = ResnetBlock2D.transform
    monkeypatch.setattr(ResnetBlock2D, "transform", lambda *args: [batches.append(len(args[1])), transform(*args)][1])
    abstract = jax.sharding.AbstractMesh((2,), ("data",), axis_types=(AxisType.Auto,))
    with jax.sharding.use_abstract_mesh(abstract):
        together = jax.eval_shape(resnet, x, temb)
    assert together.shape == alone.shape
    monkeypatch.setattr(layers, "per_device", lambda count: count // 2)
    np.testing.assert_allclose(resnet(x, temb), alone, atol=1e-5)
    # Six or seven of each device are filled up to eight.
    assert set(batches) == {16 if images > 10 and channels < layers.MANY_CHANNELS else images}


@pytest.mark.parametrize("adapted", [False, True], ids=["linear", "lora"])
def test_projections_in_one_product_are_those_of_the_layers(on_tpu, adapted):
    parts = nnx.Dict({name: Linear(12, 16, use_bias=False, rngs=nnx.Rngs(i)) for i, name in enumerate(NAMES)})
    rng = np.random.default_rng(0)
    if adapted:
        add_lora(parts, ("pos", "neg"), rank=3, alpha=3.0, targets=NAMES, rngs=nnx.Rngs(9))
        set_rows(parts, ("base", "pos", "neg"))
        for name in NAMES:
            parts[name].lora_b[...] = jnp.asarray(rng.standard_normal((2, 3, 16)), jnp.float32)
    x = jnp.asarray(rng.standard_normal((6, 5, 12)), jnp.float32)
    own = [parts[name] for name in NAMES]
    for together, alone in zip(projections(x, own), (layer(x) for layer in own), strict=True):
        np.testing.assert_allclose(together, alone, atol=1e-5)
    products = str(jax.make_jaxpr(lambda x: projections(x, own))(x)).count("dot_general")
    assert products == (3 * 3 if adapted else 1)  # or each layer with its adapters


@pytest.mark.parametrize("adapted", [False, True], ids=["linear", "lora"])
def test_halves_in_two_products_are_those_of_the_layer(on_tpu, adapted):
    parts = nnx.Dict({"proj": Linear(12, 16, rngs=nnx.Rngs(0))})
    rng = np.random.default_rng(0)
    parts["proj"].bias[...] = jnp.asarray(rng.standard_normal(16), jnp.float32)
    if adapted:
        add_lora(parts, ("pos",), rank=3, alpha=3.0, targets=("proj",), rngs=nnx.Rngs(9))
        set_rows(parts, ("base", "pos"))
        parts["proj"].lora_b[...] = jnp.asarray(rng.standard_normal((1, 3, 16)), jnp.float32)
    x = jnp.asarray(rng.standard_normal((6, 5, 12)), jnp.float32)
    first, second = halves(x, parts["proj"])
    np.testing.assert_allclose(jnp.concatenate([first, second], axis=-1), parts["proj"](x), atol=1e-5)
    products = str(jax.make_jaxpr(lambda x: halves(x, parts["proj"]))(x)).count("dot_general")
    assert products == (3 if adapted else 2)  # one, and the adapter's two; or one for each half


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_the_gelu_of_16_bit_types_is_as_good_as_their_rounding(dtype):
    x = jnp.linspace(-60, 60, 100_001).astype(dtype)
    exact = np.vectorize(gelu_in_float64)(np.asarray(x, np.float64))
    error = np.abs(np.asarray(gelu(x), np.float64) - exact)
    assert np.all(error <= 2.6e-5 + float(jnp.finfo(dtype).eps) / 2 * np.abs(exact))
    slope = jax.vmap(jax.grad(lambda x: gelu(x).astype(jnp.float32)))(x).astype(jnp.float32)
    np.testing.assert_allclose(slope, jax.vmap(jax.grad(exact_gelu))(x.astype(jnp.float32)), atol=0.01)


def gelu_in_float64(x: float) -> float:
    return 0.5 * x * math.erfc(-x / math.sqrt(2))


def exact_gelu(x):
    return jax.nn.gelu(x, approximate=False)


@pytest.mark.parametrize("ratio", [0.0, 1.0, 10.0, 100.0])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_mean_far_above_the_spread_does_not_spoil_group_norm(dtype, ratio):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((2, 16, 16, 64)) + ratio, dtype)
    ours = np.asarray(GroupNorm(64, 32, epsilon=1e-5)(x), np.float64)
    groups = np.asarray(x, np.float64).reshape(2, 256, 32, 2)
    mean, std = groups.mean((1, 3), keepdims=True), groups.std((1, 3), keepdims=True)
    exact = ((groups - mean) / np.sqrt(std**2 + 1e-5)).reshape(ours.shape)
    error = np.abs(ours - exact).max()
    # Of 16-bit numbers with a mean of 100 times their spread a thousandth, where they are rounded to a fifth of it.
    assert error < 1e-6 + (1e-6 * ratio if dtype == jnp.float32 else 4e-7 * ratio**2)


def test_a_device_has_its_share_of_a_batch():
    assert per_device(6) == 6
    mesh = jax.make_mesh((1, 1, 1), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
    abstract = jax.sharding.AbstractMesh((4, 2, 2), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
    assert not weights_divided()
    with jax.sharding.use_abstract_mesh(abstract):
        assert per_device(16) == 2 and weights_divided()
    counts = []
    with jax.set_mesh(mesh):
        spec = PartitionSpec("data")
        jax.shard_map(lambda x: [counts.append(per_device(len(x))), x][1], mesh=mesh, in_specs=spec, out_specs=spec)(
            jnp.zeros(4)
        )
    assert counts == [4]


def test_1x1_convolutions_are_those_of_xla():
    conv = Conv(5, 6, 1, rngs=nnx.Rngs(0))
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 4, 4, 5)), jnp.float32)
    expected = reference_convolution(x, conv.kernel[...], (0, 0)) + conv.bias[...]
    np.testing.assert_allclose(conv(x), expected, atol=1e-5)
