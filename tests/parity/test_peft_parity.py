"""Adapter folders of PEFT: read as PEFT reads them, and written so that it loads them."""

import json
import shutil

import jax
import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from flax.traverse_util import flatten_dict, unflatten_dict
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch_reference import SD15_UNET, SDXL_UNET

from flax_pref.checkpoints.lora import load_lora, save_lora
from flax_pref.checkpoints.modules import load_modules
from flax_pref.checkpoints.weights import abstract_network
from flax_pref.models.unet import UNetConfig

# Layers of every kind: matrices, convolutions of both sizes, inside the blocks and outside.
TARGETS = ["to_q", "to_k", "to_out.0", "ff.net.2", "proj_in", "conv1", "time_emb_proj", "downsamplers.0.conv"]
TARGETS += ["conv_in", "time_embedding.linear_1"]
KINDS = {
    "plain": {"lora_alpha": 10},
    "patterns": {
        "lora_alpha": 10,
        "rank_pattern": {"attn2.to_q": 2, "mid_block.*.to_k": 5, "to_k": 3},
        "alpha_pattern": {"^mid_block.attentions.0.proj_in": 3, "conv1": 0.5},
    },
    "rslora": {"lora_alpha": 3, "use_rslora": True, "rank_pattern": {"to_q": 2}, "alpha_pattern": {"conv_in": 7}},
}


@pytest.fixture(scope="module", params=[SD15_UNET, SDXL_UNET], ids=["sd15", "sdxl"])
def family(request):
    theirs = UNet2DConditionModel.from_config(request.param)
    return theirs, abstract_network("unet", UNetConfig.from_dict(dict(theirs.config)))


@pytest.fixture
def reference(family):
    """A network of diffusers of its own for each test: PEFT changes it."""
    return UNet2DConditionModel.from_config(family[0].config)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A network and a plain adapter of PEFT for it."""
    theirs, folder = UNet2DConditionModel.from_config(SD15_UNET), tmp_path_factory.mktemp("peft") / "plain"
    written(theirs, folder, lora_alpha=10)
    return abstract_network("unet", UNetConfig.from_dict(SD15_UNET)), folder


def written(reference, folder, **kind):
    """An adapter of PEFT with random weights, and the folder that it is saved in."""
    model = get_peft_model(reference, LoraConfig(r=4, target_modules=TARGETS, **kind))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(folder)
    return model


def their_deltas(model):
    """What PEFT adds to each weight, in the axes of torch."""
    return {
        name.removeprefix("base_model.model."): layer.get_delta_weight("default").detach().numpy()
        for name, layer in model.named_modules()
        if isinstance(layer, LoraLayer)
    }


def our_deltas(lora, rank, alpha):
    flat = {path: np.asarray(leaf[0], np.float64) for path, leaf in flatten_dict(lora).items()}
    deltas = {}
    for *path, leaf in flat:
        if leaf == "lora_a":
            delta = alpha / rank * np.einsum("...ir,ro->...io", flat[*path, "lora_a"], flat[*path, "lora_b"])
            deltas[".".join(map(str, path))] = delta.transpose((1, 0) if delta.ndim == 2 else (3, 2, 0, 1))
    return deltas


def same(ours, theirs):
    assert ours.keys() == theirs.keys()
    for layer, delta in theirs.items():
        np.testing.assert_allclose(ours[layer], delta, rtol=1e-4, atol=1e-4, err_msg=layer)


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_of_peft_is_read_with_the_scales_of_peft(kind, family, reference, tmp_path):
    network = family[1]
    expected = their_deltas(written(reference, tmp_path, **KINDS[kind]))
    same(our_deltas(*load_lora(tmp_path, network)), expected)
    same(our_deltas(*load_lora(tmp_path / "adapter_model.safetensors", network)), expected)
    # Some tools take the prefix of PEFT off; the scale is that of the config all the same.
    file = tmp_path / "adapter_model.safetensors"
    bare = {name.removeprefix("base_model.model."): array for name, array in load_file(file).items()}
    save_file(bare, file, {"format": "pt"})
    same(our_deltas(*load_lora(tmp_path, network)), expected)


def test_peft_loads_the_folder_that_we_write(family, reference, tmp_path):
    network, rng = family[1], np.random.default_rng(0)
    lora = {}
    for (*path, leaf), kernel in flatten_dict(network.params).items():
        if leaf == "kernel" and any(f".{'.'.join(map(str, path))}".endswith(f".{target}") for target in TARGETS):
            lora[*path, "lora_a"] = rng.standard_normal((1, *kernel.shape[:-1], 3), np.float32)
            lora[*path, "lora_b"] = rng.standard_normal((1, 3, kernel.shape[-1]), np.float32)
    lora = unflatten_dict(lora)
    save_lora(lora, tmp_path / "pos", alpha=7.5, layout="peft")
    same(our_deltas(lora, 3, 7.5), their_deltas(PeftModel.from_pretrained(reference, tmp_path / "pos")))
    loaded, *scale = load_lora(tmp_path / "pos", network)
    assert scale == [3, 7.5]
    jax.tree.map(np.testing.assert_array_equal, loaded, lora)
    save_lora(lora, tmp_path / "pos", alpha=5, layout="peft")
    assert load_lora(tmp_path / "pos", network)[1:] == (3, 5)
    (tmp_path / "pos" / "mine.txt").write_text("precious")
    with pytest.raises(FileExistsError, match="exists and is no adapter of PEFT"):
        save_lora(lora, tmp_path / "pos", alpha=7.5, layout="peft")
    assert (tmp_path / "pos" / "mine.txt").read_text() == "precious"


def test_a_folder_of_peft_is_a_module_of_the_programs(plain):
    network, folder = plain
    bank = load_modules(network, {"dpo": folder}).base
    assert any(path[-1] == "lora_a" for path in flatten_dict(bank.params))


CHANGES = {
    "use_dora": (True, "'use_dora' is set, but"),
    "lora_bias": (True, "'lora_bias' is not supported"),
    "bias": ("all", "'bias' is not supported"),
    "modules_to_save": (["conv_in"], "'modules_to_save' is not supported"),
    "init_lora_weights": ("pissa", r"'init_lora_weights' is not supported \(it is 'pissa'\)"),
    "peft_type": ("LOHA", "peft_type='LOHA' is not supported; expected 'LORA'"),
    "r": (8, r"has rank 4, but adapter_config\.json says 8"),
    "rank_pattern": ({"to_q": 3}, r"to_q\.lora_A\.weight' has rank 4, but adapter_config\.json says 3"),
    "alpha_pattern": ([], "'alpha_pattern' is \\[\\], expected positive numbers"),
    "lora_alpha": (None, "'lora_alpha' is no positive number"),
    "use_rslora": ("yes", "'use_rslora' is no boolean"),
}


@pytest.mark.parametrize("field", CHANGES)
def test_what_is_no_plain_lora_or_does_not_belong_to_the_weights_is_refused(field, plain, tmp_path):
    network, source = plain
    folder = shutil.copytree(source, tmp_path / "adapter")
    config = json.loads((folder / "adapter_config.json").read_text())
    value, message = CHANGES[field]
    (folder / "adapter_config.json").write_text(json.dumps(config | {field: value}))
    with pytest.raises(ValueError, match=message) as caught:
        load_lora(folder, network)
    assert str(caught.value).startswith(f"{folder / 'adapter_config.json'}: ")


def test_weights_of_peft_without_their_config_are_not_scaled_by_a_guess(plain, tmp_path):
    network, source = plain
    folder = shutil.copytree(source, tmp_path / "adapter")
    (folder / "adapter_config.json").unlink()
    with pytest.raises(ValueError, match=r"weights of PEFT without adapter_config\.json, which has the alpha"):
        load_lora(folder / "adapter_model.safetensors", network)
    (folder / "adapter_model.safetensors").rename(folder / "pos.safetensors")
    with pytest.raises(ValueError, match=r"weights of PEFT without adapter_config\.json"):
        load_lora(folder / "pos.safetensors", network)
    (folder / "adapter_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"adapter_config\.json: not valid JSON"):
        load_lora(folder / "pos.safetensors", network)
