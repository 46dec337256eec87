"""LoRA files in and out, and what users see when one is not right."""

import dataclasses
import functools
import json
import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors.numpy import load_file, save_file

from flax_pref.checkpoints.lora import load_lora, load_lora_network, lora_network, save_lora
from flax_pref.models.lora import merge_lora, split_lora
from flax_pref.models.network import Network
from flax_pref.models.unet import UNet2DCondition, UNetConfig

# One layer of each kind that adapters can have, in the blocks of SD1.5 and SDXL with few channels.
SMALL = {"layers_per_block": 2, "cross_attention_dim": 8, "attention_head_dim": 2, "norm_num_groups": 4}
SD15 = UNetConfig(block_out_channels=(8, 8, 16, 16), **SMALL)
SDXL = UNetConfig(
    block_out_channels=(8, 8, 16),
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    transformer_layers_per_block=(1, 2, 3),
    use_linear_projection=True,
    addition_embed_type="text_time",
    addition_time_embed_dim=6,
    projection_class_embeddings_input_dim=46,
    **SMALL,
)
TINY = UNetConfig(
    block_out_channels=(8,),
    down_block_types=("CrossAttnDownBlock2D",),
    up_block_types=("CrossAttnUpBlock2D",),
    **SMALL | {"layers_per_block": 1},
)
TO_Q = ("mid_block", "attentions", 0, "transformer_blocks", 0, "attn1", "to_q")
TO_OUT = (*TO_Q[:-1], "to_out", 0)
CONV = ("mid_block", "resnets", 0, "conv1")
DOTTED, DOTTED_CONV = (".".join(map(str, path)) for path in (TO_Q, CONV))
KOHYA, KOHYA_CONV = (f"lora_unet_{name.replace('.', '_')}" for name in (DOTTED, DOTTED_CONV))


@functools.cache
def build(config):
    graphdef, state = nnx.split(nnx.eval_shape(lambda: UNet2DCondition(config, rngs=nnx.Rngs(0))))
    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), nnx.to_pure_dict(state))
    return Network(config, graphdef, params)


@pytest.fixture(scope="module")
def unet():
    return build(TINY)


def module(network, rank=3, layers=None, seed=0):
    """Random adapters of the layers with these paths, or of all."""
    rng = np.random.default_rng(seed)
    lora = {}
    for (*path, leaf), kernel in flatten_dict(network.params).items():
        if leaf == "kernel" and (layers is None or tuple(path) in layers):
            lora[*path, "lora_a"] = rng.standard_normal((1, *kernel.shape[:-1], rank), np.float32)
            lora[*path, "lora_b"] = rng.standard_normal((1, rank, kernel.shape[-1]), np.float32)
    return unflatten_dict(lora)


def same(a, b):
    a, b = flatten_dict(a), flatten_dict(b)
    assert a.keys() == b.keys()
    for path in a:
        assert np.array_equal(a[path], b[path]), path


def delta(lora, path, scale=1.0):
    a, b = (np.asarray(flatten_dict(lora)[*path, leaf][0], np.float64) for leaf in ("lora_a", "lora_b"))
    return scale * np.einsum("...r,ro->...o", a, b)


# ----------------------------------------------------------------------------------------------------------------------
# Round trips


@pytest.mark.parametrize("layout", ["diffusers", "kohya"])
@pytest.mark.parametrize("config", [SD15, SDXL], ids=["sd15", "sdxl"])
def test_every_layer_comes_back_as_it_was_saved(config, layout, tmp_path):
    network, file = build(config), tmp_path / "lora.safetensors"
    lora = module(network)
    for dtype, alpha in ((jnp.float32, 3.0), (jnp.float32, 0.7), (jnp.bfloat16, 10.0), (jnp.float16, 10)):
        save_lora(lora, file, alpha=alpha, dtype=dtype, layout=layout, config=config)
        loaded, *scale = load_lora(file, network)
        assert scale == [3, alpha]
        same(loaded, jax.tree.map(lambda leaf: leaf.astype(dtype).astype(np.float32), lora))  # noqa: B023
    written = load_file(file)
    save_lora(loaded, file, alpha=alpha, dtype=dtype, layout=layout, config=config)
    same(load_file(file), written)
    assert [path.name for path in tmp_path.iterdir()] == ["lora.safetensors"]


def test_kohya_names_are_those_that_sd_scripts_writes(tmp_path):
    expected = {
        SD15: {
            "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q": (
                "down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
            ),
            "down_blocks.2.attentions.1.transformer_blocks.0.attn2.to_out.0": (
                "down_blocks_2_attentions_1_transformer_blocks_0_attn2_to_out_0"
            ),
            "mid_block.resnets.1.time_emb_proj": "mid_block_resnets_1_time_emb_proj",
            "up_blocks.0.upsamplers.0.conv": "up_blocks_0_upsamplers_0_conv",
            "conv_in": "conv_in",
        },
        SDXL: {
            "conv_in": "input_blocks_0_0",
            "conv_out": "out_2",
            "time_embedding.linear_2": "time_embed_2",
            "add_embedding.linear_1": "label_emb_0_0",
            "down_blocks.0.resnets.1.conv1": "input_blocks_2_0_in_layers_2",
            "down_blocks.0.downsamplers.0.conv": "input_blocks_3_0_op",
            "down_blocks.1.resnets.0.conv_shortcut": None,  # there is none, for the channels are as many
            "down_blocks.1.attentions.0.proj_in": "input_blocks_4_1_proj_in",
            "down_blocks.2.attentions.1.transformer_blocks.2.ff.net.0.proj": (
                "input_blocks_8_1_transformer_blocks_2_ff_net_0_proj"
            ),
            "mid_block.attentions.0.transformer_blocks.2.attn2.to_k": (
                "middle_block_1_transformer_blocks_2_attn2_to_k"
            ),
            "mid_block.resnets.1.conv2": "middle_block_2_out_layers_3",
            "up_blocks.0.attentions.2.transformer_blocks.0.attn1.to_out.0": (
                "output_blocks_2_1_transformer_blocks_0_attn1_to_out_0"
            ),
            "up_blocks.0.upsamplers.0.conv": "output_blocks_2_2_conv",
            "up_blocks.1.resnets.0.conv_shortcut": "output_blocks_3_0_skip_connection",
            "up_blocks.1.upsamplers.0.conv": "output_blocks_5_2_conv",
            "up_blocks.2.resnets.2.time_emb_proj": "output_blocks_8_0_emb_layers_1",
        },
    }
    for config, names in expected.items():
        file = tmp_path / "lora.safetensors"
        save_lora(module(build(config)), file, alpha=3, layout="kohya", config=config)
        stored = {name.split(".")[0] for name in load_file(file)}
        ours = {f"lora_unet_{name}" for name in names.values() if name}
        assert ours <= stored, ours - stored
        assert all(
            ("_blocks_" in name and "down_blocks" in name) == (config is SD15) for name in stored if "down" in name
        )
    tensors = load_file(file)
    assert tensors["lora_unet_input_blocks_4_1_proj_in.alpha"].shape == ()
    assert tensors["lora_unet_input_blocks_4_1_proj_in.lora_down.weight"].shape == (3, 8)
    assert tensors["lora_unet_input_blocks_3_0_op.lora_down.weight"].shape == (3, 8, 3, 3)
    assert tensors["lora_unet_input_blocks_3_0_op.lora_up.weight"].shape == (8, 3, 1, 1)


def test_networks_read_the_kohya_names_of_each_other(tmp_path):
    """Some tools name the layers of SD1.5 as the original code does, others those of SDXL as diffusers does."""
    file = tmp_path / "lora.safetensors"
    other = {"text_time": None, None: "text_time"}
    for config in (SD15, SDXL):
        network = build(config)
        lora = module(network)
        embed = config.addition_embed_type
        renamed = UNetConfig(
            **{field: getattr(config, field) for field in config.__dataclass_fields__}
            | {"addition_embed_type": other[embed]}
            | {"addition_time_embed_dim": 6, "projection_class_embeddings_input_dim": 46}
        )
        save_lora(lora, file, alpha=5, layout="kohya", config=renamed)
        stored = load_file(file)
        assert any("input_blocks" in name for name in stored) == (config is SD15)
        loaded, rank, alpha = load_lora(file, network)
        assert (rank, alpha) == (3, 5)
        same(loaded, lora)


@pytest.mark.parametrize("prefix", ["", "unet."])
def test_files_of_older_diffusers_load(unet, tmp_path, prefix):
    file, lora = tmp_path / "lora.safetensors", module(unet, layers=(TO_Q, TO_OUT))
    save_lora(lora, file, alpha=3)
    attention = ".".join(map(str, TO_Q[:-1]))
    stored = {name.removeprefix(f"unet.{attention}."): array for name, array in load_file(file).items()}
    names = {
        "to_q.lora_A.weight": ("to_q.lora.down.weight", "processor.to_q_lora.down.weight"),
        "to_q.lora_B.weight": ("to_q.lora.up.weight", "processor.to_q_lora.up.weight"),
        "to_out.0.lora_A.weight": ("to_out.0.lora.down.weight", "processor.to_out_lora.down.weight"),
        "to_out.0.lora_B.weight": ("to_out.0.lora.up.weight", "processor.to_out_lora.up.weight"),
    }
    for version in range(2):
        save_file({f"{prefix}{attention}.{names[name][version]}": array for name, array in stored.items()}, file)
        loaded, rank, alpha = load_lora(file, unet)
        assert (rank, alpha) == (3, 3)
        same(loaded, lora)
    alphas = {f"{prefix}{attention}.{layer}.alpha": np.array(6, np.int64) for layer in ("to_q", "to_out.0")}
    save_file({f"{prefix}{attention}.{name}": array for name, array in stored.items()} | alphas, file)
    loaded, *scale = load_lora(file, unet)
    assert scale == [3, 6]
    same(loaded, lora)


def test_a_matrix_and_a_1x1_convolution_are_the_same(tmp_path):
    unet, file = build(SD15), tmp_path / "lora.safetensors"
    path = ("mid_block", "attentions", 0, "proj_in")
    lora = module(unet, layers=(path, TO_Q))
    save_lora(lora, file, alpha=3)
    stored = load_file(file)
    shapes = {name: array.shape for name, array in stored.items()}
    assert {len(shape) for shape in shapes.values()} == {2, 4}
    swapped = {
        name: array[:, :, 0, 0].copy() if array.ndim == 4 else array[:, :, None, None] for name, array in stored.items()
    }
    save_file(swapped, file)
    same(load_lora(file, unet)[0], lora)


def test_ranks_and_alphas_that_differ_by_layer_become_one_without_changing_the_deltas(unet, tmp_path):
    parts = {TO_Q: (2, 3.0), TO_OUT: (5, 1.0), CONV: (4, 4.0)}
    stored = {}
    for path, (rank, alpha) in parts.items():
        save_lora(module(unet, rank, [path]), tmp_path / "part.safetensors", alpha=alpha, layout="kohya", config=TINY)
        stored |= load_file(tmp_path / "part.safetensors")
    save_file(stored, tmp_path / "lora.safetensors")
    lora, rank, alpha = load_lora(tmp_path / "lora.safetensors", unet)
    assert (rank, alpha) == (5, 5.0)
    for path, (rank, alpha) in parts.items():
        expected = delta(module(unet, rank, [path]), path, alpha / rank)
        np.testing.assert_allclose(delta(lora, path), expected, rtol=1e-5, atol=1e-6)
    # Without a scale to multiply in, nothing is rounded.
    save_file({name: array for name, array in stored.items() if "alpha" not in name}, tmp_path / "lora.safetensors")
    lora, rank, alpha = load_lora(tmp_path / "lora.safetensors", unet)
    flat = flatten_dict(lora)
    for path, (rank, _) in parts.items():
        for (*_, leaf), array in flatten_dict(module(unet, rank, [path])).items():
            padded = np.asarray(flat[*path, leaf])
            kept = padded[..., :rank] if leaf == "lora_a" else padded[:, :rank]
            assert np.array_equal(kept, array)
            assert np.count_nonzero(padded) == np.count_nonzero(array)


def test_files_of_different_ranks_alphas_and_layouts_make_one_bank(unet, tmp_path):
    files = {name: tmp_path / f"{name}.safetensors" for name in ("pos", "neg")}
    pos, neg = module(unet, 2, [TO_Q, CONV], seed=1), module(unet, 4, [TO_Q, CONV], seed=2)
    save_lora(pos, files["pos"], alpha=3, layout="kohya", config=TINY)
    save_lora(neg, files["neg"], alpha=4)
    bank = load_lora_network(unet, files)
    expected = nnx.to_pure_dict(nnx.split(nnx.merge(bank.graphdef, bank.params))[1])
    assert jax.tree.structure(expected) == jax.tree.structure(bank.params)
    flat = flatten_dict(split_lora(bank.params)[1])
    assert flat[*CONV, "lora_a"].shape == (2, 3, 3, 8, 4)
    merged = flatten_dict(merge_lora(bank.params, ("pos", "neg"), {"pos": 1, "neg": -1}, alpha=4))
    for path in (TO_Q, CONV):
        contrast = delta(pos, path, 3 / 2) - delta(neg, path)
        np.testing.assert_allclose(merged[*path, "kernel"], contrast, rtol=1e-4, atol=1e-5)


def test_a_network_with_adapters_reads_files_too(unet, tmp_path):
    file, lora = tmp_path / "lora.safetensors", module(unet, layers=(TO_Q, CONV))
    save_lora(lora, file, alpha=3)
    bank = lora_network(unet, ("pos",), rank=3, alpha=3, targets=("to_q",), key=jax.random.key(0))
    same(load_lora(file, bank)[0], lora)
    with pytest.raises(ValueError, match="has adapters"):
        load_lora_network(bank, {"neg": file})
    with pytest.raises(ValueError, match="files is empty"):
        load_lora_network(unet, {})


# ----------------------------------------------------------------------------------------------------------------------
# What cannot be saved


@pytest.mark.parametrize("layout", ["diffusers", "kohya"])
def test_what_cannot_be_saved_leaves_the_old_file_alone(unet, tmp_path, layout):
    lora, file = module(unet), tmp_path / "lora.safetensors"
    file.write_bytes(b"old")
    options = {"alpha": 3, "layout": layout, "config": TINY}
    flat = flatten_dict(lora)
    a = flat[*TO_Q, "lora_a"]
    large, broken = (unflatten_dict(flat | {(*TO_Q, "lora_a"): a + number}) for number in (1e5, np.nan))
    ranks = unflatten_dict(flat | {(*TO_Q, "lora_a"): a[..., :1]})
    for wrong, change, message in (
        ({}, {}, "adapters of one module"),
        (unet.params, {}, "adapters of one module"),
        (jax.tree.map(lambda leaf: np.concatenate([leaf, leaf]), lora), {}, "adapters of one module"),
        (ranks, {}, "adapters of one module"),
        (unflatten_dict({path: leaf for path, leaf in flat.items() if path != (*TO_Q, "lora_b")}), {}, "of one module"),
        (large, {"dtype": jnp.float16}, rf"{DOTTED[-4:]}.*weight' is not finite in float16"),
        (broken, {}, "is not finite in float32"),
        (lora, {"alpha": 0}, "alpha=0, expected a positive number"),
        (lora, {"alpha": float("nan")}, "alpha=nan, expected a positive number"),
        (lora, {"dtype": jnp.int8}, "dtype=int8, expected float32"),
        (lora, {"layout": "comfy"}, "layout='comfy', expected 'diffusers' or 'kohya' or 'peft'"),
        (lora, {"layout": "kohya", "config": None}, "without config"),
        (unflatten_dict({("layer", *path): leaf for path, leaf in flat.items()}), {"layout": "kohya", "config": SDXL},
         "layer 'layer.* is not part of a UNet"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message) as caught:
            save_lora(wrong, file, **options | change)
        assert str(caught.value).startswith(f"{file}: ")
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("lora.safetensors", b"old")]


# ----------------------------------------------------------------------------------------------------------------------
# Damaged files


@pytest.fixture
def damaged(unet, tmp_path):
    """Writes a file with changed tensors or metadata, and returns the message that its reading gives."""

    def read(change=lambda tensors: tensors, metadata=None, layout="diffusers", name="lora.safetensors"):
        file = tmp_path / name
        save_lora(module(unet, 3, [TO_Q, CONV]), file, alpha=3, layout=layout, config=TINY)
        save_file(change(load_file(file)), file, metadata)
        return message(file, unet)

    return read


def message(file, network):
    messages = []
    for load in (lambda: load_lora(file, network), lambda: load_lora_network(network, {"dpo": file})):
        with pytest.raises((ValueError, FileNotFoundError)) as caught:
            load()
        assert str(caught.value).startswith(f"{file}: ")
        assert len(str(caught.value).splitlines()) == 1
        messages.append(str(caught.value).removeprefix(f"{file}: "))
    assert messages[0] == messages[1]
    return messages[0]


def rename(old, new):
    return lambda tensors: {name.replace(old, new): array for name, array in tensors.items()}


def replace(name, array):
    return lambda tensors: tensors | {name: array}


def test_a_missing_file_a_folder_and_a_pickle_are_told_apart(unet, tmp_path, damaged):
    assert message(tmp_path / "lora.safetensors", unet).startswith("no such file; expected a safetensors file")
    assert message(tmp_path, unet).startswith("is a folder, expected a safetensors file")
    for suffix in (".pt", ".ckpt", ".bin", ".PTH"):
        file = tmp_path / f"lora{suffix}"
        file.write_bytes(b"\x80\x02.")
        assert message(file, unet).startswith(f"refused, for a {suffix} file is a pickle, which can run code")
    file = tmp_path / "lora.safetensors"
    for content in (b"", b"half a file", b"\x80\x02}q\x00."):
        file.write_bytes(content)
        assert message(file, unet).startswith("not a complete safetensors file (")
    assert damaged(lambda tensors: {}).startswith("holds no weights")


def test_missing_and_surplus_weights_are_named(damaged):
    a, b = (f"unet.{DOTTED}.lora_{matrix}.weight" for matrix in "AB")
    without = {name: lambda tensors, name=name: {k: v for k, v in tensors.items() if k != name} for name in (a, b)}
    assert damaged(without[a]).startswith(f"no weight {a!r}, expected with {b!r}")
    assert damaged(without[b]).startswith(f"no weight {b!r}, expected with {a!r}")
    down, up = (f"{KOHYA}.lora_{matrix}.weight" for matrix in ("down", "up"))
    gone = damaged(lambda t: {k: v for k, v in t.items() if k not in (down, up)}, layout="kohya")
    assert gone.startswith(f"no weight {down!r}, expected with '{KOHYA}.alpha'")

    assert "'unet.mid_block.lora_A.weight' has no place in the UNet; this network has no such layer" in damaged(
        replace("unet.mid_block.lora_A.weight", np.zeros((3, 8), np.float32))
    )
    assert "expected names such as unet.<layer>.lora_A.weight" in damaged(replace("bias", np.zeros(8, np.float32)))
    for name in ("lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight", "text_encoder_2.q_proj.lora_A.weight"):
        told = damaged(replace(name, np.zeros((3, 8), np.float32)))
        assert told.startswith(f"weight {name!r} has no place in the UNet; text encoder adapters are applied by ")
    for ending in ("dora_scale", "hada_w1_a"):
        told = damaged(replace(f"{KOHYA}.{ending}", np.zeros((8, 1), np.float32)))
        assert "is no plain LoRA: load it with load_modules" in told
    twice = damaged(lambda tensors: tensors | {f"{KOHYA}.lora_down.weight": tensors[a]})
    assert twice.startswith("weights ") and f"are the same of layer {DOTTED!r}" in twice


CROSS = (("attn2", "to_k"), ("attn2", "to_v"))
WIDTHS = {"Stable Diffusion 1.x": (SD15, 768), "Stable Diffusion 2.x": (SD15, 1024), "SDXL": (SDXL, 2048)}


def reading(config, width):
    """A network whose cross-attention reads so many numbers; built from another, which takes less time."""
    params = {
        path: np.zeros((width, leaf.shape[1]), np.float32) if path[-3:-1] in CROSS else leaf
        for path, leaf in flatten_dict(build(config).params).items()
    }
    config = dataclasses.replace(config, cross_attention_dim=width)
    return build(SD15)._replace(config=config, params=unflatten_dict(params))


@pytest.mark.parametrize("layout", ["diffusers", "kohya", "peft"])
def test_a_lora_of_another_family_says_which_one_it_is_for(layout, tmp_path):
    networks = {name: reading(*chosen) for name, chosen in WIDTHS.items()}
    for made_for, network in networks.items():
        for targets in ("attn2", "attn1"):
            layers = [path[:-1] for path in flatten_dict(network.params) if targets in path and "to_k" in path]
            if targets == "attn1" and made_for != "SDXL":
                continue  # nothing in such a file tells 1.x from 2.x
            file = tmp_path / f"{made_for[-4:]}_{targets}"
            save_lora(module(network, layers=layers), file, alpha=3, layout=layout, config=network.config)
            load_lora(file, network)
            for own, other in networks.items():
                if own != made_for:
                    told = message(file / "adapter_model.safetensors" if layout == "peft" else file, other)
                    assert told.startswith(f"is a LoRA for {made_for}, but this network is {own}; take"), told
    told = message(file / "adapter_model.safetensors" if layout == "peft" else file, build(SD15))
    assert "no such layer" in told or "is a LoRA for SDXL" in told


TRANSFORMER_NAMES = {
    "Flux": (
        "transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight",
        "lora_unet_double_blocks_0_img_attn_proj.lora_down.weight",
        "lora_unet_single_blocks_37_linear1.lora_down.weight",
        "base_model.model.single_transformer_blocks.0.proj_out.lora_A.weight",
    ),
    "Stable Diffusion 3": (
        "transformer.transformer_blocks.0.attn.add_k_proj.lora_A.weight",
        "lora_unet_joint_blocks_0_context_block_attn_qkv.lora_down.weight",
        "base_model.model.transformer_blocks.0.attn.to_q.lora_A.weight",
    ),
    "a transformer": ("transformer.layers.0.attention.to_q.lora_A.weight",),
}


@pytest.mark.parametrize("family", TRANSFORMER_NAMES)
def test_a_lora_of_a_transformer_says_which_one_it_is_for(family, tmp_path):
    for name in TRANSFORMER_NAMES[family]:
        file = tmp_path / "lora.safetensors"
        save_file({name: np.zeros((4, 1536 if "3" in family else 3072), np.float32)}, file)
        for config, own in ((SD15, "one whose"), (SDXL, "SDXL")):
            told = message(file, build(config) if config is SD15 else reading(config, 2048))
            assert told.startswith(f"is a LoRA for {family}, but this network is {own}"), told


def test_wrong_shapes_and_dtypes_are_named(damaged):
    a, conv = f"unet.{DOTTED}.lora_A.weight", f"unet.{DOTTED_CONV}.lora_A.weight"
    for name, shape, expected in (
        (a, (3, 9), [3, 8]),
        (a, (0, 8), [1, 8]),
        (a, (), [1, 8]),
        (conv, (3, 8), [3, 8, 3, 3]),
        (a.replace("_A", "_B"), (8, 2), [8, 3]),
    ):
        told = damaged(replace(name, np.zeros(shape, np.float32)))
        assert told.startswith(f"weight {name!r} has shape {list(shape)}, expected {expected}")
    told = damaged(replace(a, np.zeros((3, 8), np.int8)))
    assert told.startswith(f"weight {a!r} has dtype I8, expected F32 or F16 or BF16")
    told = damaged(replace(a, np.full((3, 8), np.nan, np.float32)))
    assert told.startswith(f"weight {a!r} holds NaN or infinity")


def test_wrong_alphas_are_named(damaged):
    for alpha, told in (
        (np.float32([1, 2]), "has shape [2]"),
        (np.float32(0), "and is 0"),
        (np.int64(-4), "and is -4"),
    ):
        assert told in damaged(replace(f"{KOHYA}.alpha", np.asarray(alpha)), layout="kohya")
    huge = {f"{KOHYA}.alpha": np.array(1e38, np.float32), f"{KOHYA}.lora_up.weight": np.full((8, 3), 1e3, np.float32)}
    told = damaged(lambda tensors: tensors | huge, layout="kohya")
    assert told.startswith("alpha=1e+38 makes") and "too large for float32" in told
    metadata = {"lora_adapter_metadata": json.dumps({"unet.lora_alpha": 4.0})}
    assert "both give alpha" in damaged(metadata=metadata, layout="kohya")
    for config, told in (
        ("{", "is not valid JSON"),
        ("[" * 100_000, "is not valid JSON"),
        ("[]", "is no JSON object"),
        ('{"unet.lora_alpha": "4"}', "is no positive number"),
        ('{"lora_alpha": NaN}', "is no positive number"),
        (f'{{"lora_alpha": 1{"0" * 400}}}', "is no positive number"),
        ('{"unet.use_dora": true}', "'use_dora' is set, but "),
        ('{"alpha_pattern": {"to_q": 0}}', "'alpha_pattern' in the metadata is {'to_q': 0}, expected positive numbers"),
        ('{"rank_pattern": {"(": 3}}', "'rank_pattern' in the metadata is {'(': 3}, expected integers by patterns"),
        ('{"unet.r": 4}', "has rank 3, but 'lora_adapter_metadata' in the metadata says 4"),
        ('{"unet.init_lora_weights": "pissa"}', "'init_lora_weights' in the metadata is not supported (it is 'pissa')"),
    ):
        assert told in damaged(metadata={"lora_adapter_metadata": config})


def parts(content):
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def whole(header, data):
    encoded = json.dumps(header).encode()
    return struct.pack("<Q", len(encoded)) + encoded + data


def damage(content, rng):
    """One random change of a LoRA file, at any level from its bytes to its numbers."""
    header, data = parts(content)
    end = len(content) - len(data)
    names = [name for name in header if name != "__metadata__"]
    name, other = rng.choice(names, 2, replace=False).tolist()
    entry = header[name]
    kind = rng.integers(16)
    if kind == 0:
        return content[: rng.integers(len(content))]
    if kind in (1, 2, 3):  # a bit of the header, of its length or of the numbers
        start, stop = ((8, end), (0, 8), (end, len(content)))[kind - 1]
        changed = bytearray(content)
        changed[rng.integers(start, stop)] ^= 1 << rng.integers(8)
        return bytes(changed)
    if kind == 4:
        return rng.bytes(rng.integers(200))
    if kind == 5:
        changed = bytearray(content)
        start = rng.integers(end)
        changed[start : start + 20] = rng.bytes(20)
        return bytes(changed)
    if kind == 6:
        del header[name]
    if kind == 7:
        ends = [".lora_A.weight", ".lora_up.weight", ".alpha", ".dora_scale", "\n", "", "é", ".diff", " "]
        header[name.rsplit(".", rng.integers(4))[0] + rng.choice(ends).item()] = header.pop(name)
    if kind == 8:
        header[rng.choice(["x", "lora_te_x.alpha", f"{name}.x", "\n", f"{KOHYA}.lora_mid.weight"]).item()] = entry
    if kind == 9:
        entry["shape"] = rng.permutation(entry["shape"]).tolist()
    if kind == 10:
        entry["shape"] = [entry["shape"], [], [-1], [2**63], [0], "x", [int(np.prod(entry["shape"]))]][rng.integers(7)]
    if kind == 11:
        dtypes = {"F32": "I32", "F16": "BF16"} | dict.fromkeys(("x", 0, None), "U32")
        entry["dtype"] = (
            dtypes.get(entry["dtype"]) if rng.integers(2) else ["F64", "F8_E4M3", "BOOL", 3][rng.integers(4)]
        )
    if kind == 12:
        values = [
            "{",
            "[]",
            "null",
            "0",
            '{"lora_alpha": []}',
            '{"lora_alpha": 1e999}',
            '{"unet.lora_alpha": -1}',
            "[" * 9999,
        ]
        header["__metadata__"] = {"lora_adapter_metadata": rng.choice(values).item()}
    if kind == 13:
        header["__metadata__"] = [{}, [], 3, {"a": 1}, {"lora_adapter_metadata": None}, None][rng.integers(6)]
    if kind == 14:
        entry["data_offsets"] = header[other]["data_offsets"] if rng.integers(2) else entry["data_offsets"][::-1]
    if kind == 15:  # numbers that are none, of 8-bit floats, of a rank of their own
        size = int(np.prod(entry["shape"]))
        kinds = {"F8_E5M2": 1, "BF16": 2, "F32": 4, "F64": 8, "C64": 8}
        dtype = rng.choice(list(kinds)).item()
        offset = len(data)
        header[name] = {
            "dtype": dtype,
            "shape": entry["shape"],
            "data_offsets": [offset, offset + size * kinds[dtype]],
        }
        start, stop = entry["data_offsets"]
        for rest in header.values():
            if rest.get("data_offsets", [0])[0] >= stop:
                rest["data_offsets"] = [at - (stop - start) for at in rest["data_offsets"]]
        data = data[:start] + data[stop:] + b"\xff" * (size * kinds[dtype])
    return whole(header, data)


def test_a_damaged_file_loads_or_gives_one_line_that_names_it(unet, tmp_path):
    file, refused, kept = tmp_path / "lora.safetensors", 0, 0
    contents = []
    for layout in ("diffusers", "kohya"):
        save_lora(module(unet, 3, [TO_Q, CONV]), file, alpha=4, layout=layout, config=TINY, dtype=jnp.float16)
        contents.append(file.read_bytes())
    for seed in range(320):
        rng = np.random.default_rng(seed)
        file.write_bytes(damage(contents[seed % 2], rng))
        errors = []
        for load in (lambda: load_lora(file, unet), lambda: load_lora_network(unet, {"dpo": file})):
            try:
                load()
            except (ValueError, FileNotFoundError) as error:  # anything else fails the test
                errors.append(str(error))
        kept, refused = kept + (not errors), refused + bool(errors)
        assert len(errors) in (0, 2), (seed, errors)
        for error in errors:
            assert error.startswith(f"{file}: ") and len(error.splitlines()) == 1 and len(error) < 1000, (seed, error)
    print(f"{refused} refused, {kept} loaded")
    assert refused > 120
