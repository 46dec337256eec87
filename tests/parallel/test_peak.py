"""Shares of a peak are of the right peak, and of operations that were all counted."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from flax_pref.models.attention import attention
from flax_pref.parallel.peak import measured_bandwidth, measured_peak, peak_flops, peak_of, step_flops


@pytest.mark.parametrize(
    ("kind", "dtype", "tflops"),
    [
        ("TPU v4", "bfloat16", 275),
        ("TPU v5 lite", "bfloat16", 197),
        ("TPU v5p", "bfloat16", 459),
        ("TPU v6 lite", "bfloat16", 918),
        ("TPU7x", "bfloat16", 1153.5),
        ("NVIDIA H100 PCIe", "bfloat16", 756),
        ("NVIDIA H200", "float16", 989),
        ("NVIDIA A100-SXM4-80GB", "bfloat16", 312),
        ("NVIDIA L4", "bfloat16", 121),
        ("NVIDIA L40S", "bfloat16", None),
        ("NVIDIA H200", "float32", None),
        ("TPU v4", "float16", None),
    ],
)
def test_a_peak_is_that_of_the_very_device_or_none(kind, dtype, tflops):
    peak, what = peak_flops(kind, dtype)
    assert peak == (None if tflops is None else pytest.approx(1e12 * tflops))
    assert what


def test_a_cpu_is_measured_and_shared_by_the_devices_that_it_plays(monkeypatch):
    device = jax.devices()[0]
    whole, what = peak_of(device, "float32")
    assert what == "measured"
    assert 1e9 < whole < 1e15
    monkeypatch.setattr(jax, "local_device_count", lambda: 1000)
    assert peak_of(device, "float32")[0] < whole / 100


def test_a_larger_product_is_tried_as_long_as_products_are_short():
    assert measured_peak(0.0) > 0
    assert measured_peak(1e-3) > 0


def test_a_copy_is_counted_as_read_and_written():
    assert 1e8 < measured_bandwidth(2**20) < 1e14


def test_operations_are_counted_where_cpus_loop_over_blocks():
    q = jax.ShapeDtypeStruct((2, 2048, 4, 64), jnp.float32)
    program = jax.jit(lambda q, k, v: attention(q, k, v))
    products = 2 * 2 * q.size * q.shape[1]  # scores and their sums over values, a product and a sum each
    assert products < step_flops(program, q, q, q) < 1.1 * products
    assert program.lower(q, q, q).cost_analysis()["flops"] < 0.1 * products  # what a user would have been told


def test_operations_are_those_of_all_devices_whatever_the_shardings():
    mesh = Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("data", "fsdp"))
    over = NamedSharding(mesh, PartitionSpec("data"))

    def program(x, w):
        y = jax.lax.with_sharding_constraint(x @ w, PartitionSpec("fsdp"))
        return jax.lax.with_sharding_constraint(y, over) @ w

    x, w = jax.device_put(jnp.ones((64, 32)), over), jnp.ones((32, 32))
    jitted = jax.jit(program, in_shardings=(over, None), out_shardings=over)
    with jax.set_mesh(mesh):
        assert step_flops(jitted, x, w) == pytest.approx(2 * 2 * 64 * 32 * 32, rel=1e-3)
