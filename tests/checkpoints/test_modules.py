"""Modules as users have them: LoRA files, folders with one, UNet folders and whole checkpoints."""

import shutil

import jax
import numpy as np
import pytest
from flax import nnx
from flax.traverse_util import flatten_dict

from flax_pref.checkpoints.lora import load_lora_network, lora_network, merge_lora_network, save_lora
from flax_pref.checkpoints.modules import OWN_BASE, find_module, fingerprint, load_modules, merge_modules
from flax_pref.checkpoints.weights import save_network
from flax_pref.diffusion.guidance import Schedule, autoguidance, cfg, cpgd, cpgd_conditional, merge_weights, pgd
from flax_pref.models.bank import adapters
from flax_pref.models.lora import combine_lora, merge_lora, select_lora, split_lora
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


def network(seed):
    graphdef, state = nnx.split(nnx.eval_shape(lambda: UNet2DCondition(CONFIG, rngs=nnx.Rngs(0))))
    rng = np.random.default_rng(seed)
    draw = lambda leaf: rng.standard_normal(leaf.shape, np.float32)  # noqa: E731
    return Network(CONFIG, graphdef, jax.tree.map(draw, nnx.to_pure_dict(state)))


def bank(base, seed):
    adapted = lora_network(base, ("pos", "neg"), rank=2, alpha=3.0, key=jax.random.key(seed))
    rng = np.random.default_rng(seed)
    params, lora = split_lora(adapted.params)
    lora = jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape, np.float32), lora)
    return params, lora


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """A base, its fine-tunes pos and neg, and LoRA files of modules pos and neg, as they lie on a disk."""
    folder = tmp_path_factory.mktemp("stored")
    for seed, name in enumerate(("base", "pos", "neg", "other")):
        save_network(network(seed), folder / name)
    _, lora = bank(network(0), 9)
    for i, name in enumerate(("pos", "neg")):
        save_lora(select_lora(lora, i), folder / f"{name}.safetensors", alpha=3.0)
        save_lora(select_lora(lora, i), folder / f"{name}-lora" / "pytorch_lora_weights.safetensors", alpha=3.0)
    save_network(network(1), folder / "whole" / "unet")
    return folder


def close(params, expected):
    params, expected = flatten_dict(params), flatten_dict(expected)
    assert params.keys() == expected.keys()
    for path, value in params.items():
        np.testing.assert_allclose(value, expected[path], rtol=1e-5, atol=1e-5, err_msg=str(path))


def delta(base, weights):
    """What the LoRA modules do to a base, by the formula of merging."""
    _, lora = bank(network(0), 9)
    joined = {**flatten_dict(base.params), **flatten_dict(lora)}
    from flax.traverse_util import unflatten_dict

    return merge_lora(unflatten_dict(joined), ("pos", "neg"), weights, alpha=3.0)


def combination(terms):
    return jax.tree.map(lambda *leaves: sum(c * leaf for (c, _), leaf in zip(terms, leaves, strict=True)), *(
        params for _, params in terms
    ))  # fmt: skip


@pytest.mark.parametrize("kind", ["pos.safetensors", "pos-lora"])
def test_lora_modules_move_onto_the_base_from_a_file_or_a_folder_with_one(stored, kind):
    guided = load_modules(network(3), {"pos": stored / kind, "neg": stored / "neg.safetensors"})
    assert guided.modules == {}
    assert adapters(guided.base.graphdef, guided.base.params) == ("pos", "neg")
    close(split_lora(guided.base.params)[0], network(3).params)


@pytest.mark.parametrize("kind", ["pos", "whole"])
def test_full_weights_come_from_a_unet_folder_or_a_checkpoint(stored, kind):
    guided = load_modules(network(0), {"pos": stored / kind})
    close(guided.modules["pos"].params, network(1).params)
    close(guided.base.params, network(0).params)


def test_modules_stay_on_their_own_base_where_it_is_given(stored):
    files = {name: stored / f"{name}.safetensors" for name in ("pos", "neg")}
    guided = load_modules(network(3), files, own_base=stored / "base")
    close(guided.base.params, network(3).params)
    own = guided.modules[OWN_BASE]
    assert adapters(own.graphdef, own.params) == ("pos", "neg")
    close(split_lora(own.params)[0], network(0).params)
    full = load_modules(network(3), {"pos": stored / "pos"}, own_base=stored / "base")
    assert set(full.modules) == {OWN_BASE, "pos"}


def test_merged_lora_modules_are_the_base_and_their_weighted_deltas(stored):
    base, files = network(3), {name: stored / f"{name}.safetensors" for name in ("pos", "neg")}
    for own_base in (None, stored / "base"):
        guided = load_modules(base, files, own_base=own_base)
        merged = merge_modules(base, guided, merge_weights(cpgd(2.0, 7.5)))
        close(merged.params, delta(base, {"pos": 2.0, "neg": -2.0}))
        assert merged.graphdef == base.graphdef
    reference = OWN_BASE
    guided = load_modules(base, {"pos": files["pos"]}, own_base=stored / "base")
    merged = merge_modules(base, guided, merge_weights(pgd(2.0, 7.5, "pos", reference=reference)))
    close(merged.params, delta(base, {"pos": 2.0}))


def test_merged_full_weights_are_the_base_and_their_weighted_difference(stored):
    base = network(0)
    guided = load_modules(base, {"pos": stored / "pos", "neg": stored / "neg"})
    merged = merge_modules(base, guided, merge_weights(cpgd(2.0, 7.5)))
    close(merged.params, combination([(1, base.params), (2, network(1).params), (-2, network(2).params)]))
    guided = load_modules(base, {"dpo": stored / "pos"})
    merged = merge_modules(base, guided, merge_weights(pgd(3.0, 7.5, "dpo")))
    close(merged.params, combination([(-2, base.params), (3, network(1).params)]))
    guided = load_modules(network(3), {"dpo": stored / "pos"}, own_base=stored / "base")
    merged = merge_modules(network(3), guided, merge_weights(pgd(3.0, 7.5, "dpo", reference=OWN_BASE)))
    close(merged.params, combination([(1, network(3).params), (3, network(1).params), (-3, base.params)]))
    mixed = load_modules(base, {"pos": stored / "pos.safetensors", "neg": stored / "neg"})
    merged = merge_modules(base, mixed, merge_weights(cpgd(2.0, 7.5)))
    adapted = delta(base, {"pos": 1.0})
    close(merged.params, combination([(1, base.params), (2, adapted), (-2, network(2).params)]))


def test_several_lora_modules_are_one_of_a_larger_rank(stored, tmp_path):
    base = network(0)
    _, lora = bank(base, 9)
    combined, alpha = combine_lora(lora, ("pos", "neg"), {"pos": 2.0, "neg": -2.0}, alpha=3.0)
    save_lora(combined, tmp_path / "both.safetensors", alpha=alpha)
    both = load_lora_network(base, {"both": tmp_path / "both.safetensors"})
    merged = merge_modules(base, load_modules(base, {"both": tmp_path / "both.safetensors"}), {"both": 1, "base": -1})
    close(merged.params, delta(base, {"pos": 2.0, "neg": -2.0}))
    assert {leaf.shape[-1] for path, leaf in flatten_dict(both.params).items() if path[-1] == "lora_a"} == {4}
    with pytest.raises(ValueError, match="expected some of pos, neg"):
        combine_lora(lora, ("pos", "neg"), {"dpo": 1.0}, alpha=3.0)


def test_the_weights_of_a_rule_are_those_of_the_paper():
    assert merge_weights(cpgd(2.0, 7.5)) == {"pos": 2.0, "neg": -2.0}
    assert merge_weights(cpgd_conditional(2.0, 7.5)) == {"pos": 2.0, "neg": -2.0}
    assert merge_weights(pgd(3.0, 7.5)) == {"dpo": 3.0, "base": -3.0}
    assert merge_weights(cpgd(2.0, 7.5, positive="base")) == {"base": 2.0, "neg": -2.0}
    assert merge_weights(autoguidance(1.5)) == {"base": 1.5, "bad": -1.5}
    with pytest.raises(ValueError, match="has nothing to merge"):
        merge_weights(cfg(7.5))
    for w in (Schedule((2.0, 1.0), "linear"), [1.0, 2.0]):
        with pytest.raises(ValueError, match="only one number for all steps and images can be merged"):
            merge_weights(cpgd(w, 7.5))


def test_the_folder_of_a_run_with_one_module_in_two_layouts_is_read(stored, tmp_path):
    shutil.copy(stored / "pos.safetensors", tmp_path / "dpo.safetensors")
    shutil.copy(stored / "pos.safetensors", tmp_path / "dpo_kohya.safetensors")
    assert find_module(tmp_path, "module") == tmp_path / "dpo.safetensors"
    shutil.copy(stored / "pos.safetensors", tmp_path / "neg.safetensors")
    with pytest.raises(ValueError, match="2 safetensors files"):
        find_module(tmp_path, "module")


def test_the_fingerprint_of_a_peft_adapter_changes_with_its_scale(stored, tmp_path):
    file = shutil.copy(stored / "pos.safetensors", tmp_path / "adapter_model.safetensors")
    hashes = {fingerprint(file)}
    for alpha in (1, 2):
        (tmp_path / "adapter_config.json").write_text(f'{{"lora_alpha": {alpha}}}')
        hashes |= {fingerprint(file), fingerprint(tmp_path)}
    assert len(hashes) == 3


def test_a_fingerprint_changes_with_the_weights_and_not_with_the_place(stored, tmp_path):
    save_network(network(1), tmp_path / "copy")
    assert fingerprint(tmp_path / "copy") == fingerprint(stored / "pos") != fingerprint(stored / "neg")
    assert fingerprint(stored / "pos.safetensors") != fingerprint(stored / "neg.safetensors")


def test_what_is_no_module_is_refused(stored, tmp_path):
    base = network(0)
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        load_modules(base, {"pos": tmp_path / "nowhere"})
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty: 0 safetensors files and no config.json; expected a LoRA file"):
        load_modules(base, {"pos": tmp_path / "empty"})
    with pytest.raises(ValueError, match="holds adapters, expected the base that the modules were trained on"):
        load_modules(base, {"pos": stored / "pos.safetensors"}, own_base=stored / "neg.safetensors")
    wider = base._replace(config=UNetConfig(**{**vars(CONFIG), "cross_attention_dim": 16}))
    with pytest.raises(ValueError, match=r"config.json: cross_attention_dim=8, but that of the base is 16"):
        load_modules(wider, {"pos": stored / "pos"})
    with pytest.raises(ValueError, match="no network 'dpo'"):
        merge_modules(base, load_modules(base, {"pos": stored / "pos"}), {"dpo": 1.0})


def test_several_files_make_one_module_with_the_weighted_sum_of_their_deltas(tmp_path):
    base = network(0)
    _, lora = bank(base, 1)
    for i, name in enumerate("ab"):
        save_lora(select_lora(lora, i), tmp_path / f"{name}.safetensors", alpha=3.0)
    a, b = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    both = load_lora_network(base, {"pos": [(a, 0.5), (b, -2.0)], "neg": b})
    alone = load_lora_network(base, {"a": a, "b": b})
    for module, weights in (("pos", {"a": 0.5, "b": -2.0}), ("neg", {"b": 1.0})):
        ours = merge_lora_network(base, both, {module: 1.0}).params
        theirs = merge_lora_network(base, alone, weights).params
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), ours, theirs)


def test_a_file_and_a_network_make_one_module(tmp_path):
    base, other = network(0), network(1)
    save_network(other, tmp_path / "unet")
    save_lora(select_lora(bank(base, 1)[1], 0), tmp_path / "a.safetensors", alpha=3.0)
    guided = load_modules(base, {"pos": [(tmp_path / "unet", 0.5), (tmp_path / "a.safetensors", 2.0)]})
    lora = load_lora_network(base, {"a": tmp_path / "a.safetensors"})
    delta = merge_lora_network(base, lora, {"a": 2.0}).params
    expected = jax.tree.map(lambda x, y, z: x + 0.5 * (y - x) + (z - x), base.params, other.params, delta)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), guided.modules["pos"].params, expected)
