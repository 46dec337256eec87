"""Adapters that are no plain LoRA, made by LyCORIS and PEFT: weights that they are folded into act as theirs do."""

import contextlib
import io

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file
from test_lora_files import CONV, DOTTED, KOHYA, KOHYA_CONV, SDXL, TINY, TO_Q, build, module

from flax_pref.checkpoints.lora import load_lora_network, save_lora
from flax_pref.checkpoints.lycoris import fold_adapters
from flax_pref.checkpoints.modules import load_modules
from flax_pref.models.network import Network
from flax_pref.models.tree import flatten_dict

torch = pytest.importorskip("torch")
NORM = (*TO_Q[:-2], "norm1")


@pytest.fixture(scope="module")
def unet():
    network, rng = build(TINY), np.random.default_rng(0)
    drawn = jax.tree.map(lambda leaf: 0.3 * rng.standard_normal(leaf.shape).astype(np.float32), network.params)
    return network._replace(params=drawn)


def layer_of(network, path):
    """The layer in torch."""
    params = flatten_dict(network.params)
    kernel = params[*path, "kernel"] if (*path, "kernel") in params else params[*path, "scale"]
    bias = params.get((*path, "bias"))
    if kernel.ndim == 4:
        layer = torch.nn.Conv2d(kernel.shape[2], kernel.shape[3], kernel.shape[:2], padding=kernel.shape[0] // 2)
        weight = np.transpose(kernel, (3, 2, 0, 1))
    elif kernel.ndim == 2:
        layer, weight = torch.nn.Linear(*kernel.shape, bias=bias is not None), kernel.T
    else:
        layer, weight = torch.nn.LayerNorm(kernel.shape[0]), kernel
    layer.weight.data = torch.tensor(np.array(weight))
    if bias is not None:
        layer.bias.data = torch.tensor(np.array(bias))
    return layer


def lycoris_module(kind, layer, **options):
    with contextlib.redirect_stdout(io.StringIO()):
        lycoris = pytest.importorskip("lycoris.modules")
        return getattr(lycoris, kind)("layer", layer, **options)


def made_by_lycoris(kind, layer, options):
    """The stored weights of a LyCORIS module with random factors, and the layer that it has changed."""
    made = lycoris_module(kind, layer, **options)
    made.apply_to()
    generator = torch.Generator().manual_seed(0)
    for parameter in made.parameters():
        parameter.data = parameter.data + 0.1 * torch.randn(parameter.shape, generator=generator)
    tensors = made.custom_state_dict() or made.state_dict()
    stored = {name: tensor.detach().numpy().copy() for name, tensor in tensors.items()}
    return stored, layer


ALPHA = {"lora_dim": 2, "alpha": 3.0}


@pytest.mark.parametrize("path", [TO_Q, CONV])
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("LoConModule", {**ALPHA, "use_tucker": True}),
        ("LoConModule", {**ALPHA, "weight_decompose": True}),
        ("LoConModule", {**ALPHA, "weight_decompose": True, "wd_on_out": False}),
        ("LohaModule", ALPHA),
        ("LohaModule", {**ALPHA, "use_tucker": True}),
        ("LohaModule", {**ALPHA, "weight_decompose": True}),
        ("LokrModule", {"lora_dim": 1, "alpha": 0.5}),
        ("LokrModule", {"lora_dim": 1, "alpha": 0.5, "decompose_both": True, "factor": 4}),
        ("LokrModule", {"lora_dim": 1, "alpha": 0.5, "use_tucker": True}),
        ("LokrModule", {"lora_dim": 100, "alpha": 3.0, "full_matrix": True}),
        ("FullModule", {}),
        ("IA3Module", {}),
        ("IA3Module", {"train_on_input": True}),
        ("GLoRAModule", ALPHA),
    ],
)
def test_a_layer_acts_as_with_lycoris(unet, tmp_path, kind, options, path):
    if path == TO_Q:  # matrices have no core
        options = {name: value for name, value in options.items() if name != "use_tucker"}
    stored, changed = made_by_lycoris(kind, layer_of(unet, path), options)
    name = KOHYA if path == TO_Q else KOHYA_CONV
    save_file({f"{name}.{key}": array for key, array in stored.items()}, tmp_path / "module.safetensors")
    ours = layer_of(fold_adapters(tmp_path / "module.safetensors", unet), path)
    inputs = torch.randn((2, changed.in_channels, 6, 6) if path == CONV else (2, changed.in_features))
    with torch.no_grad():
        np.testing.assert_allclose(ours(inputs), changed(inputs), atol=1e-5)
    assert not np.allclose(ours.weight.detach(), layer_of(unet, path).weight.detach())


def test_norms_and_biases_are_added(unet, tmp_path):
    rng = np.random.default_rng(1)
    shift = rng.standard_normal((4, TINY.block_out_channels[0])).astype(np.float32)
    norm = KOHYA.replace("attn1_to_q", "norm1")
    stored = {f"{norm}.w_norm": shift[0], f"{norm}.b_norm": shift[1], f"{KOHYA_CONV}.diff_b": shift[2]}
    save_file(stored, tmp_path / "module.safetensors")
    before, after = (flatten_dict(n.params) for n in (unet, fold_adapters(tmp_path / "module.safetensors", unet)))
    changed = {path: after[path] - before[path] for path in after if not np.array_equal(after[path], before[path])}
    assert changed.keys() == {(*NORM, "scale"), (*NORM, "bias"), (*CONV, "bias")}
    np.testing.assert_allclose(changed[*NORM, "scale"], shift[0], atol=1e-6)
    np.testing.assert_allclose(changed[*CONV, "bias"], shift[2], atol=1e-6)


@pytest.mark.parametrize("path", [TO_Q, CONV])
def test_dora_of_peft_acts_as_there(unet, tmp_path, path):
    peft = pytest.importorskip("peft")
    layer, name = layer_of(unet, path), path[-1]
    model = torch.nn.ModuleDict({name: layer})
    model = peft.get_peft_model(
        model, peft.LoraConfig(r=2, lora_alpha=3, target_modules=[name], use_dora=True, init_lora_weights=False)
    )
    made = model.base_model.model[name]
    made.lora_magnitude_vector["default"].weight.data *= 1.5
    found = peft.get_peft_model_state_dict(model)
    dotted = ".".join(map(str, path))
    stored = {key.replace(f".model.{name}.", f".model.{dotted}."): x.numpy().copy() for key, x in found.items()}
    save_file(stored, tmp_path / "adapter_model.safetensors")
    model.peft_config["default"].save_pretrained(tmp_path)
    ours = layer_of(load_modules(unet, {"m": tmp_path}).modules["m"], path)
    inputs = torch.randn((2, layer.in_channels, 6, 6) if path == CONV else (2, layer.in_features))
    with torch.no_grad():
        np.testing.assert_allclose(ours(inputs), made(inputs), atol=1e-5)


@pytest.mark.parametrize("config", [TINY, SDXL])
@pytest.mark.parametrize("prefix", ["lycoris_", "diffusion_model."])
def test_names_of_other_trainers_are_understood(tmp_path, config, prefix):
    network = build(config)
    name = {
        "lycoris_": f"lycoris_{DOTTED.replace('.', '_')}",
        "diffusion_model.": "diffusion_model.middle_block.1.transformer_blocks.0.attn1.to_q",
    }[prefix]
    width = config.block_out_channels[-1]
    stored = {f"{name}.lora_up.weight": np.ones((width, 1)), f"{name}.lora_down.weight": np.ones((1, width))}
    save_file({key: array.astype(np.float32) for key, array in stored.items()}, tmp_path / "module.safetensors")
    bank = load_lora_network(network, {"m": tmp_path / "module.safetensors"})
    assert {path[:-1] for path in flatten_dict(bank.params) if path[-1] == "lora_a"} == {TO_Q}


def test_modules_of_one_bank_may_adapt_different_layers(unet, tmp_path):
    for name, layers in (("a", [TO_Q]), ("b", [TO_Q, CONV])):
        save_lora(module(unet, layers=layers, seed=len(layers)), tmp_path / f"{name}.safetensors", alpha=2.0)
    both = load_lora_network(unet, {name: tmp_path / f"{name}.safetensors" for name in "ab"})
    alone = load_lora_network(unet, {"a": tmp_path / "a.safetensors"})
    both, alone = flatten_dict(both.params), flatten_dict(alone.params)
    np.testing.assert_array_equal(both[*TO_Q, "lora_a"][0], alone[*TO_Q, "lora_a"][0])
    assert not both[*CONV, "lora_b"][0].any() and both[*CONV, "lora_b"][1].any()


def test_numbers_of_eight_bits_are_read(unet, tmp_path):
    from safetensors.torch import save_file as save_torch

    width = TINY.block_out_channels[-1]
    up = torch.full((width, 1), 0.5).to(torch.float8_e4m3fn)
    down = torch.full((1, width), -2.0).to(torch.float8_e5m2)
    stored = {f"{KOHYA}.lora_up.weight": up, f"{KOHYA}.lora_down.weight": down}
    save_torch(stored, tmp_path / "module.safetensors")
    params = flatten_dict(load_lora_network(unet, {"m": tmp_path / "module.safetensors"}).params)
    assert (params[*TO_Q, "lora_b"] == 0.5).all() and (params[*TO_Q, "lora_a"] == -2).all()


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        ({f"{KOHYA}.hada_w1_a": (8, 2)}, f"no weight '{KOHYA}.hada_w1_b', expected with '{KOHYA}.hada_w1_a'"),
        ({f"{KOHYA}.diff": (3, 3)}, f"weight '{KOHYA}.diff' and those with it do not fit layer"),
        ({"lora_unet_other.diff": (8, 8)}, "weight 'lora_unet_other.diff' has no place in the UNet"),
        ({f"{KOHYA}.diff": (8, 8), f"{KOHYA}.dora_scale": (5, 1)}, "do not fit layer"),
        ({f"{KOHYA}.diff": (8, 8), f"{KOHYA}.lokr_w1": (2, 2)}, f"no weight '{KOHYA}.lokr_w2_a'"),
        ({f"{KOHYA}.oft_blocks": (2, 4, 4)}, "OFT, BOFT and T-LoRA are not supported"),
    ],
)
def test_what_does_not_fit_is_named(unet, tmp_path, stored, message):
    save_file({name: np.ones(shape, np.float32) for name, shape in stored.items()}, tmp_path / "module.safetensors")
    with pytest.raises(ValueError, match=message) as error:
        load_modules(unet, {"m": tmp_path / "module.safetensors"})
    assert "module.safetensors: " in str(error.value) and "\n" not in str(error.value)


def test_a_module_with_weights_of_its_own_is_told(unet, tmp_path, capsys):
    save_file({f"{KOHYA}.diff": np.zeros((8, 8), np.float32)}, tmp_path / "module.safetensors")
    assert isinstance(load_modules(unet, {"m": tmp_path / "module.safetensors"}).modules["m"], Network)
    assert "module 'm' has weights of its own, 0.00 GiB more" in capsys.readouterr().out
