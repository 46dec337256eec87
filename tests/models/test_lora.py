import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.traverse_util import flatten_dict
from jax.sharding import AxisType

from flax_pref.checkpoints.lora import lora_network
from flax_pref.models import layers
from flax_pref.models import lora as lora_layers
from flax_pref.models import platform as platforms
from flax_pref.models import unet as unet_layers
from flax_pref.models.layers import Linear
from flax_pref.models.lora import add_lora, join_lora, merge_lora, select_lora, set_rows, split_lora, stack_lora
from flax_pref.models.network import Network
from flax_pref.models.unet import UNet2DCondition, UNetConfig

CONFIG = UNetConfig(
    block_out_channels=(8, 16),
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    layers_per_block=1,
    cross_attention_dim=12,
    attention_head_dim=2,
    norm_num_groups=4,
)
# A linear layer of every kind, and convolutions with stride 1, stride 2 and kernel size 1.
TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "time_emb_proj", "linear_1")
TARGETS += ("conv1", "conv_shortcut", "downsamplers.0.conv", "proj_in")
MODULES, ALPHA = ("pos", "neg"), 6.0


def build_bank() -> UNet2DCondition:
    unet = UNet2DCondition(CONFIG, rngs=nnx.Rngs(params=0))
    add_lora(unet, MODULES, rank=3, alpha=ALPHA, targets=TARGETS, rngs=nnx.Rngs(params=1))
    return unet


@functools.cache
def networks() -> tuple[Network, Network]:
    """A base network, and the same with a bank; no parameter is zero."""
    rng = np.random.default_rng(0)
    state = nnx.state(nnx.eval_shape(build_bank))
    noise = jax.tree.map(
        lambda leaf: np.float32(0.2) * rng.standard_normal(leaf.shape, np.float32), nnx.to_pure_dict(state)
    )
    graphdefs = (
        nnx.graphdef(nnx.eval_shape(build))
        for build in (lambda: UNet2DCondition(CONFIG, rngs=nnx.Rngs(params=0)), build_bank)
    )
    return tuple(map(Network, (CONFIG, CONFIG), graphdefs, (split_lora(noise)[0], noise)))


def inputs(batch: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    rng = np.random.default_rng(3)
    shapes = (batch, 6, 4, 4), (batch, 5, 12)
    latents, text = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes)
    return latents, jnp.arange(batch) * 37, text


@functools.partial(jax.jit, static_argnames=("graphdef", "rows"))
def predict(graphdef, params, rows, *args):
    unet = nnx.merge(graphdef, params)
    set_rows(unet, rows)
    return unet(*args)


@pytest.mark.parametrize("images", [1, 2])
@pytest.mark.parametrize(
    "rows",
    [
        ("base", "base", "pos", "pos", "neg", "neg"),
        # Groups of different sizes, a module that comes up twice, and base rows in between.
        ("neg", "pos", "pos", "base", "neg", "neg"),
    ],
    ids=["equal", "mixed"],
)
def test_each_row_is_predicted_by_the_network_that_it_names(rows, images):
    base, bank = networks()
    args = inputs(6 * images)
    noise_pred = predict(bank.graphdef, bank.params, rows, *args)
    errors = {}
    for r, network in enumerate(rows):
        weights = {} if network == "base" else {network: 1.0}
        merged = merge_lora(bank.params, MODULES, weights, alpha=ALPHA)
        expected = predict(base.graphdef, merged, ("base",), *args)[r::6]
        error = jnp.abs(noise_pred[r::6] - expected).max() / jnp.abs(expected).max()
        errors[f"{network} in row {r}"] = float(error)
    print({name: f"{error:.1e}" for name, error in errors.items()})
    assert max(errors.values()) < 1e-5


def test_a_cpu_computes_groups_of_rows_as_other_devices_add_adapters():
    layer = nnx.Dict(to_q=Linear(12, 16, rngs=nnx.Rngs(0)))
    add_lora(layer, MODULES, rank=3, alpha=ALPHA, targets=("to_q",), rngs=nnx.Rngs(1))
    set_rows(layer, ("base", "neg", "pos", "pos"))
    adapted, rng = layer.to_q, np.random.default_rng(0)
    adapted.lora_b[...] = jnp.asarray(rng.standard_normal((2, 3, 16)), jnp.float32)
    x = jnp.asarray(rng.standard_normal((8, 5, 12)), jnp.float32)
    graphdef, state = nnx.split(adapted)

    def adding(state, x):
        return nnx.merge(graphdef, state).adding(x)

    def by_group(state, x):
        return nnx.merge(graphdef, state).by_group(x)

    np.testing.assert_allclose(by_group(state, x), adding(state, x), rtol=1e-5, atol=1e-5)
    gradients = [jax.grad(lambda *args, f=f: jnp.sin(f(*args)).sum(), (0, 1))(state, x) for f in (by_group, adding)]
    for one, other in zip(*map(jax.tree.leaves, gradients), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rows", [("base", "neg", "pos", "pos"), ("neg", "neg"), ("base",)], ids="".join)
@pytest.mark.parametrize("shape", [(5, 12), (12,)], ids=["positions", "vectors"])
def test_a_tpu_computes_adapters_in_the_product_of_the_layer_and_adds_them_for_gradients(monkeypatch, rows, shape):
    layer = nnx.Dict(to_q=Linear(12, 16, rngs=nnx.Rngs(0)))
    add_lora(layer, MODULES, rank=3, alpha=ALPHA, targets=("to_q",), rngs=nnx.Rngs(1))
    set_rows(layer, rows)
    adapted, rng = layer.to_q, np.random.default_rng(0)
    adapted.lora_b[...] = jnp.asarray(rng.standard_normal((2, 3, 16)), jnp.float32)
    x = jnp.asarray(rng.standard_normal((2 * len(rows), *shape)), jnp.float32)
    graphdef, state = nnx.split(adapted)

    def call(state, x):
        return nnx.merge(graphdef, state)(x)

    def loss(state, x):
        return jnp.sin(call(state, x)).sum()

    expected, gradients = call(state, x), jax.grad(loss, (0, 1))(state, x)
    monkeypatch.setattr(lora_layers, "platform", lambda: "tpu")
    np.testing.assert_allclose(call(state, x), expected, rtol=1e-5, atol=1e-5)
    for one, other in zip(*map(jax.tree.leaves, (jax.grad(loss, (0, 1))(state, x), gradients)), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)
    adapters = len({*rows} - {"base"})
    products = str(jax.make_jaxpr(call)(state, x)).count("dot_general")
    assert products == (1 + (adapters > 0))  # of all rows, and before it one with A of all modules that they have


@pytest.mark.parametrize("rows, projected", [(("base", "base", "neg"), True), (("base",), False)], ids=["lora", "base"])
def test_transformers_on_a_tpu_take_their_images_in_turns_and_all_at_once_for_gradients(monkeypatch, rows, projected):
    _, bank = networks()
    args = inputs(4 * len(rows))
    if projected:
        unet = nnx.merge(bank.graphdef, bank.params)
        set_rows(unet, rows)
        args = (*args[:2], unet.project_text(args[2]))

    def both():  # new functions, which JAX traces again
        def noise_pred(params):
            return predict.__wrapped__(bank.graphdef, params, rows, *args)

        return jax.jit(noise_pred), jax.jit(jax.grad(lambda params: jnp.sin(noise_pred(params)).sum()))

    noise_pred, gradient = both()
    expected, with_adapters = noise_pred(bank.params), len(rows) > 1
    gradients = gradient(bank.params) if with_adapters else None
    for module in (unet_layers, layers, lora_layers):
        monkeypatch.setattr(module, "platform", lambda: "tpu")
    monkeypatch.setattr(unet_layers, "AT_ONCE", 0)
    for module in (platforms, unet_layers):  # as if there were two devices
        monkeypatch.setattr(module, "per_device", lambda count: count // 2)
    in_turns, at_once = both()
    np.testing.assert_allclose(in_turns(bank.params), expected, rtol=1e-4, atol=1e-5)
    if with_adapters:  # once is enough, for it takes long to compile
        for one, other in zip(*map(jax.tree.leaves, (at_once(bank.params), gradients)), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)
    program = str(in_turns.trace(bank.params).jaxpr)
    # Four transformers with two images of each device.
    assert program.count("scan[") == program.count("length=2") == 4


def test_images_that_devices_do_not_share_out_whole_are_not_taken_in_parts(monkeypatch):
    unet = nnx.merge(networks()[1].graphdef, networks()[1].params)
    set_rows(unet, ("base", "neg"))
    transformer, x = unet.mid_block.attentions[0], jnp.zeros((8, 2, 2, 16))
    monkeypatch.setattr(unet_layers, "AT_ONCE", 2 * x.nbytes // len(x))
    assert [transformer.parts(x[:rows]) for rows in (8, 4, 2, 7)] == [4, 2, 1, 1]
    for axes, parts in ((("data",), 2), (("fsdp",), 1), (("tensor",), 1)):
        with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((2,), axes, axis_types=(AxisType.Auto,))):
            assert transformer.parts(x) == parts


def test_base_rows_and_new_modules_predict_as_the_network_without_adapters():
    base, bank = networks()
    args, rows = inputs(6), ("base",)
    expected = predict(base.graphdef, base.params, rows, *args)
    assert np.array_equal(predict(bank.graphdef, bank.params, rows, *args), expected)
    assert not np.allclose(predict(bank.graphdef, bank.params, ("pos",), *args), expected, rtol=0.1)

    new = lora_network(base, ("dpo",), rank=4, alpha=4, key=jax.random.key(1))
    np.testing.assert_allclose(predict(new.graphdef, new.params, ("dpo",), *args), expected, rtol=1e-5, atol=1e-6)


def test_the_gradient_reaches_the_modules_of_the_batch_and_no_other():
    _, bank = networks()
    frozen, lora = split_lora(bank.params)

    @jax.jit
    @jax.grad
    def gradient(lora):
        noise_pred = predict(bank.graphdef, join_lora(frozen, lora), ("base", "neg", "neg"), *inputs(3))
        return jnp.square(noise_pred).sum()

    gradients = flatten_dict(gradient(lora))
    assert gradients.keys() == flatten_dict(lora).keys()
    for path, leaf in gradients.items():
        pos, neg = leaf
        assert not jnp.any(pos), path
        assert jnp.any(neg), path


def test_weights_of_several_modules_merge_into_their_weighted_sum():
    base, bank = networks()
    merged = flatten_dict(merge_lora(bank.params, MODULES, {"pos": 0.7, "neg": -0.4}, alpha=ALPHA))
    flat = flatten_dict(bank.params)
    assert merged.keys() == flatten_dict(base.params).keys()
    for (*path, leaf), value in merged.items():
        expected = np.asarray(flat[*path, leaf], np.float64)
        if leaf == "kernel" and (*path, "lora_a") in flat:
            a, b = (np.asarray(flat[*path, matrix], np.float64) for matrix in ("lora_a", "lora_b"))
            expected = expected + ALPHA / 3 * (0.7 * a[0] @ b[0] - 0.4 * a[1] @ b[1])
        np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-6)


def test_splitting_joining_selecting_and_stacking_lose_nothing():
    _, bank = networks()
    base, lora = split_lora(bank.params)
    joined = flatten_dict(join_lora(base, lora))
    assert all(joined[path] is leaf for path, leaf in flatten_dict(bank.params).items())
    assert len(joined) == len(flatten_dict(base)) + len(flatten_dict(lora)) == len(flatten_dict(bank.params))

    stacked = stack_lora([select_lora(lora, 0), select_lora(lora, 1)])
    assert jax.tree.all(jax.tree.map(jnp.array_equal, stacked, lora))
    with pytest.raises(ValueError, match="bank 1 differs from bank 0"):
        stack_lora([lora, jax.tree.map(lambda leaf: leaf[..., :1], lora)])


def test_adapters_can_be_added_to_a_network_of_shapes():
    graphdef, state = nnx.split(nnx.eval_shape(build_bank))
    shapes = {path: leaf.shape for path, leaf in flatten_dict(nnx.to_pure_dict(state)).items()}
    query = ("mid_block", "attentions", 0, "transformer_blocks", 0, "attn2", "to_k")
    assert shapes[*query, "lora_a"] == (2, 12, 3)
    assert shapes[*query, "lora_b"] == (2, 3, 16)
    conv = ("down_blocks", 0, "downsamplers", 0, "conv")
    assert shapes[*conv, "lora_a"] == (2, 3, 3, 8, 3)
    assert shapes[*conv, "lora_b"] == (2, 3, 8)
    hash(graphdef)


def test_a_wrong_layout_of_rows_is_refused_before_it_computes_anything():
    _, bank = networks()
    with pytest.raises(ValueError, match=r"no network 'negative' .* this one has base, pos, neg"):
        predict(bank.graphdef, bank.params, ("base", "negative"), *inputs(2))
    with pytest.raises(ValueError, match="a batch of 2 is no multiple of the 3 rows"):
        predict(bank.graphdef, bank.params, ("base", "pos", "pos"), *inputs(2))
    with pytest.raises(ValueError, match="call set_rows"):
        nnx.merge(bank.graphdef, bank.params)(*inputs(2))


def test_adapters_that_cannot_be_added_are_refused():
    base, bank = networks()

    def add(network, modules, **kinds):
        unet = nnx.merge(network.graphdef, network.params)
        add_lora(unet, modules, rank=2, alpha=2, rngs=nnx.Rngs(params=0), **kinds)

    with pytest.raises(ValueError, match=r"target 'to_x' is no linear layer or convolution; there are: .*to_out\.0"):
        add(base, ("pos",), targets=("to_q", "to_x"))
    with pytest.raises(ValueError, match="none of them 'base'"):
        add(base, ("base", "pos"))
    with pytest.raises(ValueError, match="has adapters"):
        add(bank, ("third",))
    with pytest.raises(ValueError, match="no module 'dpo'; this bank has pos, neg"):
        merge_lora(bank.params, MODULES, {"dpo": 1.0}, alpha=ALPHA)
