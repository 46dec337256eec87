"""What merges modules makes the weights of NPO, `theta_base + a (theta_pos - theta_base) + b (theta_neg - theta_base)`.

Both from LoRA of one base and from networks with weights of their own.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.traverse_util import flatten_dict

from flax_pref.checkpoints.lora import lora_network
from flax_pref.checkpoints.modules import Guided, merge_modules
from flax_pref.models.lora import combine_lora, join_lora, merge_lora, split_lora
from flax_pref.models.network import Network
from flax_pref.models.unet import UNet2DCondition, UNetConfig

CONFIG = UNetConfig(
    block_out_channels=(8,),
    down_block_types=("CrossAttnDownBlock2D",),
    up_block_types=("CrossAttnUpBlock2D",),
    layers_per_block=1,
    cross_attention_dim=8,
    attention_head_dim=2,
    norm_num_groups=4,
)
MODULES, ALPHA = ("pos", "neg"), 3.0
A, B = 0.4, 1.0


def drawn(tree, seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape, np.float32)), tree)


@pytest.fixture(scope="module")
def networks():
    """The base, the same with adapters pos and neg, and pos and neg with weights of their own."""
    graphdef, state = nnx.split(nnx.eval_shape(lambda: UNet2DCondition(CONFIG, rngs=nnx.Rngs(0))))
    shapes = nnx.to_pure_dict(state)
    base, pos, neg = (Network(CONFIG, graphdef, drawn(shapes, seed)) for seed in range(3))
    bank = lora_network(base, MODULES, rank=2, alpha=ALPHA, key=jax.random.key(0))
    backbone, lora = split_lora(bank.params)
    return base, bank._replace(params=join_lora(backbone, drawn(lora, 3))), {"pos": pos, "neg": neg}


def npo_merge(base, pos, neg):
    """The paper's formula for whole networks."""
    return jax.tree.map(lambda theta, p, n: theta + A * (p - theta) + B * (n - theta), base, pos, neg)


def close(params, expected):
    params, expected = flatten_dict(params), flatten_dict(expected)
    assert params.keys() == expected.keys()
    for path, value in params.items():
        np.testing.assert_allclose(value, expected[path], rtol=1e-5, atol=1e-5, err_msg=str(path))


def test_networks_with_weights_of_their_own_are_merged_into_the_negative_of_npo(networks):
    base, _, modules = networks
    merged = merge_modules(base, Guided(base, modules), {"pos": A, "neg": B, "base": -A - B})
    close(merged.params, npo_merge(base.params, modules["pos"].params, modules["neg"].params))


def test_adapters_are_merged_into_the_negative_of_npo(networks):
    base, bank, _ = networks
    pos, neg = (merge_lora(bank.params, MODULES, {name: 1.0}, alpha=ALPHA) for name in MODULES)
    expected = npo_merge(base.params, pos, neg)
    close(merge_lora(bank.params, MODULES, {"pos": A, "neg": B}, alpha=ALPHA), expected)
    close(merge_modules(base, Guided(bank, {}), {"pos": A, "neg": B, "base": -A - B}).params, expected)

    combined, alpha = combine_lora(split_lora(bank.params)[1], MODULES, {"pos": A, "neg": B}, alpha=ALPHA)
    file = join_lora(base.params, combined)
    close(merge_lora(file, ("neg",), {"neg": 1.0}, alpha=alpha), expected)
