"""Kernels in eight bits: what they are, and that networks read them."""

import sys
from importlib import resources

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_pref.checkpoints.diffusers import load_unet
from flax_pref.diffusion.guidance import cfg, tabulate
from flax_pref.diffusion.sampler import image_keys, sample
from flax_pref.diffusion.scheduler_configs import solver_from_config
from flax_pref.models.bank import Bank, Member
from flax_pref.models.quantized import Quantized, quantize

pytest.importorskip("qwix")


@pytest.mark.parametrize(
    ("to", "dtype", "error"),
    # Half a step of 1 / 127 of the largest, and of a mantissa of three bits.
    [("int8", jnp.int8, 0.5 / 127), ("fp8", jnp.float8_e4m3fn, 2.0**-4)],
)
@pytest.mark.parametrize("shape", [(32, 16), (3, 3, 8, 16)])
def test_a_kernel_is_off_by_half_a_step_of_its_output_channel(to, dtype, error, shape):
    kernel = np.random.default_rng(0).standard_normal(shape).astype(np.float32) * np.logspace(-4, 4, 16, dtype="f4")
    bias = jnp.arange(16.0)
    stored = quantize({"conv": {"kernel": jnp.asarray(kernel), "bias": bias}}, to)["conv"]
    assert stored["bias"] is bias
    assert stored["kernel"].values.dtype == dtype and stored["kernel"].shape == shape
    full = np.asarray(stored["kernel"][...].astype(jnp.float32))
    largest = np.abs(kernel).reshape(-1, 16).max(axis=0)
    assert (np.abs(full - kernel) <= 1.001 * error * largest).all()
    assert stored["kernel"][...].astype(jnp.bfloat16).dtype == jnp.bfloat16


def test_parts_of_a_kernel_cannot_be_read_by_mistake():
    kernel = Quantized(jnp.zeros((4, 2), jnp.int8), jnp.ones((1, 2)))
    with pytest.raises(TypeError, match="only the whole of a kernel"):
        kernel[0]


def test_the_loop_of_a_sampler_carries_the_small_weights():
    unet = load_unet(resources.files("flax_pref.world") / "base" / "unet")
    channels = unet.config.in_channels
    table, keys = tabulate(cfg(3.0), 4, 1), image_keys([0], [0])
    text = {"encoder_hidden_states": jnp.zeros((1, 77, unet.config.cross_attention_dim))}
    solver = solver_from_config({"_class_name": "DDIMScheduler", "clip_sample": False}, 4)

    def carried(params):
        bank = Bank((Member("base", unet.graphdef, params),))
        program = jax.jit(lambda bank: sample(bank, table, solver, keys, text, text, (8, 8, channels)))
        loops = [line for line in program.lower(bank).compile().as_text().splitlines() if " while(" in line]
        kernel = ",".join(map(str, unet.params["mid_block"]["resnets"][0]["conv1"]["kernel"].shape))
        return {dtype for line in loops for dtype in ("s8", "f32") if f"{dtype}[{kernel}]" in line}

    assert carried(quantize(unet.params, "int8")) == {"s8"}
    assert carried(unet.params) == {"f32"}


def test_without_qwix_the_user_is_told_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "qwix", None)
    with pytest.raises(ValueError, match=r"need qwix; pip install 'flax-pref\[quantize\]'"):
        quantize({"kernel": jnp.ones((2, 2))}, "int8")
