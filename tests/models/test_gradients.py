"""Gradients of what computes parts of itself again: those of the plain formulas, and less memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from flax_pref.models.layers import GroupNorm, LayerNorm, gated_gelu, silu
from flax_pref.models.remat import set_remat
from flax_pref.models.unet import UNet2DCondition, UNetConfig
from flax_pref.models.vae import AutoencoderKL, VAEConfig


def normalised(x, axes, layer):
    centred = x - x.mean(axis=axes, keepdims=True)
    normed = centred / jnp.sqrt(jnp.square(centred).mean(axis=axes, keepdims=True) + layer.epsilon)
    return normed.reshape(*x.shape[:-2], -1) if axes == (1, 2, 4) else normed


def plain_group_norm(layer, x):
    normed = normalised(x.reshape(*x.shape[:-1], layer.num_groups, -1), (1, 2, 4), layer)
    return normed * layer.scale[...] + layer.bias[...]


def plain_layer_norm(layer, x):
    return normalised(x, -1, layer) * layer.scale[...] + layer.bias[...]


@pytest.mark.parametrize(
    ("layer", "plain", "shape"),
    [
        (GroupNorm(12, 4, epsilon=1e-5), plain_group_norm, (2, 3, 5, 12)),
        (LayerNorm(12), plain_layer_norm, (2, 7, 12)),
    ],
    ids=["groups", "last axis"],
)
def test_gradients_of_norms_are_those_of_their_formula(layer, plain, shape):
    rng = np.random.default_rng(0)
    layer.scale[...] = jnp.asarray(rng.standard_normal(12, np.float32))
    layer.bias[...] = jnp.asarray(rng.standard_normal(12, np.float32))
    x = jnp.asarray(2 + rng.standard_normal(shape, np.float32))
    graphdef, state = nnx.split(layer)

    def value_and_gradients(f):
        return jax.jit(jax.value_and_grad(lambda s, x: jnp.sin(f(nnx.merge(graphdef, s), x)).sum(), (0, 1)))(state, x)

    ours, reference = (jax.tree.leaves(value_and_gradients(f)) for f in (lambda layer, x: layer(x), plain))
    assert len(ours) == 4
    for one, other in zip(ours, reference, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("function", "plain"),
    [(silu, jax.nn.silu), (gated_gelu, lambda value, gate: value * jax.nn.gelu(gate, approximate=False))],
    ids=["silu", "gated gelu"],
)
def test_gradients_of_activations_are_those_of_their_formula(function, plain):
    x = jax.random.normal(jax.random.key(0), (2, 4, 9))
    arguments = (x[0],) if function is silu else tuple(x)
    numbers = tuple(range(len(arguments)))
    for one, other in zip(
        *(
            jax.jit(jax.value_and_grad(lambda *a, f=f: jnp.sin(f(*a)).sum(), numbers))(*arguments)
            for f in (function, plain)
        ),
        strict=True,
    ):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), one, other)


CONFIG = UNetConfig(
    block_out_channels=(8, 16),
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    layers_per_block=1,
    cross_attention_dim=12,
    attention_head_dim=2,
    norm_num_groups=4,
)


def unet_and_inputs(rng):
    text = jnp.asarray(rng.standard_normal((2, 5, 12)), jnp.float32)
    unet = UNet2DCondition(CONFIG, rngs=nnx.Rngs(params=0))
    return unet, rng.standard_normal((2, 32, 32, 4)), lambda unet, latents: unet(latents, jnp.array([3, 500]), text)


def decoder_and_inputs(rng):
    config = VAEConfig(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
    )
    vae = AutoencoderKL(config, rngs=nnx.Rngs(params=0))
    return vae, rng.standard_normal((2, 16, 16, 4)), lambda vae, latents: vae.decode(latents)


@pytest.mark.parametrize("network", [unet_and_inputs, decoder_and_inputs])
def test_blocks_that_are_computed_again_give_the_same_gradients_from_less_memory(network):
    rng = np.random.default_rng(0)
    module, latents, call = network(rng)
    latents = jnp.asarray(latents, jnp.float32)
    params = jax.tree.map(
        lambda leaf: jnp.asarray(0.2 * rng.standard_normal(leaf.shape), jnp.float32),
        nnx.to_pure_dict(nnx.state(module)),
    )
    gradients, bytes_ = {}, {}
    for remat in ("none", "block"):
        set_remat(module, remat)
        graphdef = nnx.graphdef(module)

        def loss(params, latents, graphdef=graphdef):
            return jnp.square(call(nnx.merge(graphdef, params), latents)).sum()

        compiled = jax.jit(jax.grad(loss, (0, 1))).lower(params, latents).compile()
        gradients[remat] = jax.tree.leaves(compiled(params, latents))
        bytes_[remat] = compiled.memory_analysis().temp_size_in_bytes
    rounding = 1e-7 * max(np.abs(other).max() for other in gradients["none"])  # some gradients are nothing else
    for one, other in zip(gradients["block"], gradients["none"], strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5 * np.abs(other).max() + rounding)
    assert bytes_["block"] < 0.8 * bytes_["none"], bytes_


def test_an_unknown_choice_of_what_to_compute_again_is_refused():
    unet = nnx.eval_shape(lambda: UNet2DCondition(CONFIG, rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match="remat must be one of none, block, got 'all'"):
        set_remat(unet, "all")
