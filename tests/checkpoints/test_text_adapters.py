"""Files that adapt text encoders, alone or beside the UNet: what comes of them, and what does not fit."""

import numpy as np
import pytest
from safetensors.numpy import save_file
from training.tiny import WIDTH, tiny_checkpoint

from flax_pref.checkpoints.diffusers import load_pipeline
from flax_pref.checkpoints.lora import load_lora, load_lora_network
from flax_pref.checkpoints.modules import load_modules, merge_modules
from flax_pref.config import UserError
from flax_pref.diffusion.drawing import resolve_drawing
from flax_pref.diffusion.drawing_flags import DrawingFlags
from flax_pref.diffusion.guidance import cfg, cpgd, tabulate
from flax_pref.models.bank import adapters
from flax_pref.models.tree import flatten_dict

FC1, Q = "text_model.encoder.layers.0.mlp.fc1", "text_model.encoder.layers.1.self_attn.q_proj"
UNET = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
SIZES = {FC1: (2 * WIDTH, WIDTH), Q: (WIDTH, WIDTH), UNET: (8, 8), "text_projection": (WIDTH, WIDTH)}
RANK, ALPHA = 2, 3.0


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    return {family: tiny_checkpoint(folder / family, family) for family in ("sd15", "sdxl")}


@pytest.fixture(scope="module")
def sd15(checkpoints):
    return load_pipeline(checkpoints["sd15"])


@pytest.fixture(scope="module")
def sdxl(checkpoints):
    return load_pipeline(checkpoints["sdxl"])


def kohya(prefix, layer, seed=0):
    """Plain LoRA of a layer in the names of sd-scripts, and its delta in float64."""
    rng, (features, fan_in) = np.random.default_rng(seed), SIZES[layer]
    up, down = (rng.standard_normal(shape).astype(np.float32) for shape in ((features, RANK), (RANK, fan_in)))
    name = prefix + layer.replace(".", "_")
    stored = {f"{name}.lora_up.weight": up, f"{name}.lora_down.weight": down, f"{name}.alpha": np.float32(ALPHA)}
    return {key: np.asarray(x) for key, x in stored.items()}, ALPHA / RANK * np.float64(up) @ np.float64(down)


def changes(encoder, before):
    """What differs between two text encoders, in the axes of torch; all other arrays are the same ones."""
    after, before = flatten_dict(encoder.params), flatten_dict(before.params)
    return {
        ".".join(map(str, path[:-1])): (np.float64(after[path]) - before[path]).T
        for path in after
        if after[path] is not before[path]
    }


def close(found, expected):
    assert found.keys() == expected.keys()
    for layer, delta in expected.items():
        np.testing.assert_allclose(found[layer], delta, atol=2e-6)


def test_both_text_encoders_and_the_unet_are_adapted(sdxl, tmp_path, capsys):
    parts = {"lora_te1_": FC1, "lora_te2_": Q, "lora_unet_": UNET}
    made = {prefix: kohya(prefix, layer) for prefix, layer in parts.items()}
    projection, delta = kohya("lora_te2_", "text_projection", seed=1)
    save_file({k: x for own, _ in made.values() for k, x in own.items()} | projection, tmp_path / "pos.safetensors")
    guided = load_modules(sdxl.unet, {"pos": tmp_path / "pos.safetensors"}, text_encoders=sdxl.text_encoders)
    first, second = guided.text_encoders["pos"]
    close(changes(first, sdxl.text_encoders[0]), {FC1: made["lora_te1_"][1]})
    close(changes(second, sdxl.text_encoders[1]), {Q: made["lora_te2_"][1], "text_projection": delta})
    assert adapters(guided.base.graphdef, guided.base.params) == ("pos",) and not guided.modules
    told = capsys.readouterr().out
    assert told.count("\n") == 1 and "pos.safetensors: adapts text encoders; module 'pos' has its own copy" in told


def test_a_file_of_text_encoder_adapters_alone_leaves_the_unet_as_it_is(sd15, tmp_path):
    save_file(kohya("lora_te_", FC1)[0], tmp_path / "pos.safetensors")
    save_file(kohya("lora_unet_", UNET)[0], tmp_path / "neg.safetensors")
    files = {name: tmp_path / f"{name}.safetensors" for name in ("pos", "neg")}
    for sources in ({"pos": files["pos"]}, files):
        guided = load_modules(sd15.unet, sources, text_encoders=sd15.text_encoders)
        assert adapters(guided.base.graphdef, guided.base.params) == tuple(sources), "its rows share the batch"
        lora = {path: x for path, x in flatten_dict(guided.base.params).items() if path[-1] in ("lora_a", "lora_b")}
        assert not any(x[0].any() for path, x in lora.items() if path[-1] == "lora_b")
        assert list(guided.text_encoders) == ["pos"]


def test_strengths_and_files_of_a_module_add_up_in_text_encoders(sd15, tmp_path):
    made = {name: kohya("lora_te_", FC1, seed) for seed, name in enumerate("ab")}
    for name, (stored, _) in made.items():
        save_file(stored, tmp_path / f"{name}.safetensors")
    rng = np.random.default_rng(5)
    loha = {f"hada_w{i}_{x}": shape for i in (1, 2) for x, shape in (("a", (WIDTH, RANK)), ("b", (RANK, WIDTH)))}
    loha = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in loha.items()}
    save_file({f"lora_te_{Q.replace('.', '_')}.{name}": x for name, x in loha.items()}, tmp_path / "c.safetensors")
    save_file(kohya("lora_unet_", UNET)[0], tmp_path / "d.safetensors")
    strengths = {"a": 0.5, "b": -2.0, "c": 0.25, "d": 3.0}
    parts = [(tmp_path / f"{name}.safetensors", strength) for name, strength in strengths.items()]
    guided = load_modules(sd15.unet, {"pos": parts}, text_encoders=sd15.text_encoders)
    w1, w2 = (np.float64(loha[f"hada_w{i}_a"]) @ np.float64(loha[f"hada_w{i}_b"]) for i in (1, 2))
    expected = {FC1: 0.5 * made["a"][1] - 2.0 * made["b"][1], Q: 0.25 * w1 * w2}
    close(changes(guided.text_encoders["pos"][0], sd15.text_encoders[0]), expected)


def test_modules_on_a_base_of_their_own_adapt_the_text_encoders_of_the_checkpoint_that_draws(
    sd15, checkpoints, tmp_path
):
    stored, delta = kohya("lora_te_", FC1)
    save_file(stored | kohya("lora_unet_", UNET)[0], tmp_path / "pos.safetensors")
    guided = load_modules(
        sd15.unet,
        {"pos": tmp_path / "pos.safetensors"},
        text_encoders=sd15.text_encoders,
        own_base=checkpoints["sd15"],
    )
    close(changes(guided.text_encoders["pos"][0], sd15.text_encoders[0]), {FC1: delta})
    assert list(guided.modules) == ["own_base"]


# ----------------------------------------------------------------------------------------------------------------------
# What does not fit


def flat(layer):
    return layer.replace(".", "_")


@pytest.mark.parametrize(
    ("family", "stored", "message"),
    [
        (
            "sd15",
            {f"lora_te2_{flat(Q)}.diff": (WIDTH, WIDTH)},
            "adapts a second text encoder, but this checkpoint has one",
        ),
        ("sd15", {"lora_te_text_model_encoder_layers_7_mlp_fc1.diff": (8, 8)}, "has no place in the text encoder"),
        ("sdxl", {"text_encoder_2.other.lora_A.weight": (2, 8)}, "has no place in the second text encoder"),
        ("sd15", {"lora_te3_encoder_block_0.lora_up.weight": (8, 2)}, "has no place in the UNet"),
        (
            "sdxl",
            {f"lora_te2_{flat(Q)}.lora_up.weight": (12, 2), f"lora_te2_{flat(Q)}.lora_down.weight": (2, 12)},
            rf"do not fit layer '{Q}' \(shape \[12, 12\], expected \[{WIDTH}, {WIDTH}\]\)",
        ),
        (  # as many numbers, in another shape
            "sd15",
            {
                f"lora_te_{flat(FC1)}.lora_up.weight": (WIDTH, 2),
                f"lora_te_{flat(FC1)}.lora_down.weight": (2, 2 * WIDTH),
            },
            rf"do not fit layer '{FC1}' \(shape",
        ),
        ("sd15", {f"lora_te_{flat(Q)}.diff": ()}, rf"do not fit layer '{Q}' \(shape \[\]"),
        ("sd15", {f"lora_te_{flat(Q)}.lokr_w2_b": ()}, rf"do not fit layer '{Q}'"),
        (
            "sd15",
            {f"text_encoder.{Q}.lora_A.weight": (2, WIDTH)},
            "no weight 'text_encoder.*lora_B.weight', expected with 'text_encoder",
        ),
        (
            "sd15",
            {f"{prefix}{flat(Q)}.diff": (WIDTH, WIDTH) for prefix in ("lora_te_", "lora_te1_")},
            "weights 'lora_te1?_.* and 'lora_te1?_.* are the same of layer",
        ),
    ],
)
def test_a_weight_that_does_not_fit_is_named(sd15, sdxl, tmp_path, family, stored, message):
    pipeline, file = {"sd15": sd15, "sdxl": sdxl}[family], tmp_path / "pos.safetensors"
    save_file({name: np.ones(shape, np.float32) for name, shape in stored.items()}, file)
    with pytest.raises(ValueError, match=message) as error:
        load_modules(pipeline.unet, {"pos": file}, text_encoders=pipeline.text_encoders)
    assert str(error.value).startswith(f"{file}: ") and "\n" not in str(error.value)
    assert any(name in str(error.value) for name in stored)


def test_text_encoder_adapters_are_never_left_out_silently(sd15, tmp_path):
    file = tmp_path / "pos.safetensors"
    save_file(kohya("lora_te_", FC1)[0] | kohya("lora_unet_", UNET)[0], file)
    with pytest.raises(ValueError, match="adapts a text encoder, but load_modules was given none"):
        load_modules(sd15.unet, {"pos": file})
    for read in (lambda: load_lora(file, sd15.unet), lambda: load_lora_network(sd15.unet, {"pos": file})):
        with pytest.raises(
            ValueError, match=r"'lora_te_.* text encoder adapters are applied by --module and load_modules"
        ):
            read()
    guided = load_modules(sd15.unet, {"pos": file}, text_encoders=sd15.text_encoders)
    with pytest.raises(ValueError, match="module 'pos' adapts text encoders, whose guidance no weights of a UNet"):
        merge_modules(sd15.unet, guided, {"pos": 1.0})
    assert merge_modules(sd15.unet, guided, {"pos": 0.0}) is not None


def test_the_flags_apply_them_and_do_not_merge_them(checkpoints, tmp_path):
    for seed, name in enumerate(("pos", "neg")):
        save_file(kohya("lora_te_", FC1, seed)[0] | kohya("lora_unet_", UNET)[0], tmp_path / f"{name}.safetensors")
    flags = {
        **{"model": str(checkpoints["sd15"]), "rule": "cpgd", "w": "2", "steps": 2},
        "module": tuple(f"{name}={tmp_path}/{name}.safetensors:0.5" for name in ("pos", "neg")),
    }
    draw = resolve_drawing(DrawingFlags(**flags)).load(dtype="float32", batch_size=1)
    assert list(draw.text_encoders) == ["pos", "neg"]
    table = tabulate(cpgd(2.0, 7.5), 2, 1)
    assert list(draw.own_prompts(table, ["a cat"], None)) == ["pos", "neg"]
    assert draw.own_prompts(tabulate(cfg(7.5), 2, 1), ["a cat"], None) == {}, "nobody asks for theirs"
    merging = resolve_drawing(DrawingFlags(merge=True, **flags))
    with pytest.raises(UserError, match=r"--merge: module 'pos' \(pos.safetensors:0.5\) adapts text encoders"):
        merging.load(dtype="float32", batch_size=1)
