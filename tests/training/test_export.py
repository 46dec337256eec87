"""What a run writes is read by others, and predicts as the run does."""

import hashlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints.small import small_pipeline
from safetensors import safe_open
from safetensors.numpy import load_file
from tiny import LENGTH, WIDTH, tiny_checkpoint

from flax_pref.checkpoints.diffusers import load_pipeline, load_unet
from flax_pref.checkpoints.lora import tell_strength
from flax_pref.checkpoints.module_info import ModuleInfo
from flax_pref.checkpoints.modules import load_modules, merge_modules
from flax_pref.config import load_config
from flax_pref.models.bank import Bank, Member
from flax_pref.models.presets import SD15, SDXL
from flax_pref.training.export import ExportConfig, export_modules, load_exported, summary
from flax_pref.training.networks import LoRA, trained_networks

MODULES = ("pos", "neg")
KIND = LoRA(rank=2, alpha=3.0)
INFO = ModuleInfo(name="", base="v1-5", method="DiffusionDPO", steps=7)
RNG = np.random.default_rng(0)
LATENTS = RNG.standard_normal((2, 8, 8, 4), np.float32)
TIMESTEPS = np.array([30, 981], np.int32)
TEXT = RNG.standard_normal((2, LENGTH, WIDTH), np.float32)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return load_unet(tiny_checkpoint(tmp_path_factory.mktemp("tiny") / "sd15", "sd15") / "unet")


@pytest.fixture(scope="module")
def runs(base):
    """Of both kinds: the networks, and parameters as if they were trained."""

    def run(weights):
        trained, first = trained_networks(base, MODULES, weights, KIND)
        rng = np.random.default_rng(1)
        params = jax.jit(first)(base.params, jax.random.key(0))
        return trained, jax.tree.map(lambda leaf: leaf + 0.2 * rng.standard_normal(leaf.shape, np.float32), params)

    return {weights: run(weights) for weights in ("lora", "full")}


def export(folder, base, run, layout="diffusers", dtype="float32"):
    trained, params = run
    config = ExportConfig(layout=layout, dtype=dtype)
    return export_modules(folder, trained, base, base.params, params, KIND, config, lambda: small_pipeline("sd1"), INFO)


@jax.jit
def predict(bank):
    latents, text = (jnp.stack([x] * len(MODULES), axis=1) for x in (LATENTS, TEXT))
    return bank(MODULES, latents, TIMESTEPS, {"encoder_hidden_states": text})


def bank_of(guided):
    networks = {"base": guided.base, **guided.modules}
    return Bank(tuple(Member(name, network.graphdef, network.params) for name, network in networks.items()))


@pytest.fixture(scope="module")
def expected(base, runs):
    return {kind: np.asarray(predict(trained.predict(params, base.params))) for kind, (trained, params) in runs.items()}


NAMES = {"diffusers": "{}.safetensors", "kohya": "{}_kohya.safetensors", "peft": "{}_peft", "merged": "{}"}


@pytest.mark.parametrize(("weights", "layout"), [*(("lora", layout) for layout in NAMES), ("full", "merged")])
def test_modules_that_are_loaded_predict_as_in_the_run(tmp_path, base, runs, expected, weights, layout):
    paths = export(tmp_path, base, runs[weights], layout)[layout]
    assert paths == [tmp_path / NAMES[layout].format(name) for name in MODULES]
    guided = load_modules(base, dict(zip(MODULES, paths, strict=True)))
    found = np.asarray(predict(bank_of(guided)))
    assert np.abs(expected[weights][:, 0] - expected[weights][:, 1]).max() > 0.1
    np.testing.assert_allclose(found, expected[weights], rtol=1e-3, atol=2e-4)


def test_diffusers_reads_full_weights_and_predicts_the_same(tmp_path, base, runs, expected):
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    export(tmp_path, base, runs["full"])
    for i, name in enumerate(MODULES):
        unet = diffusers.UNet2DConditionModel.from_pretrained(tmp_path / name)
        with torch.no_grad():
            latents, timesteps, text = map(torch.from_numpy, (LATENTS.transpose(0, 3, 1, 2).copy(), TIMESTEPS, TEXT))
            prediction = unet(latents, timesteps, text).sample.numpy().transpose(0, 2, 3, 1)
        np.testing.assert_allclose(prediction, expected["full"][:, i], rtol=1e-3, atol=2e-4)


def test_a_run_without_a_layout_writes_files_for_diffusers_and_for_comfyui_and_says_so(tmp_path, base, runs):
    written = export(tmp_path, base, runs["lora"], layout=())
    assert {path.name for path in tmp_path.iterdir()} == {
        *("pos.safetensors", "neg.safetensors", "pos_kohya.safetensors", "neg_kohya.safetensors")
    }
    assert all(name.startswith("lora_unet_") for name in load_file(tmp_path / "pos_kohya.safetensors"))
    *_, last = summary(written).splitlines()
    assert last == (
        f"layouts in {tmp_path}: diffusers (pos.safetensors, neg.safetensors) for diffusers; kohya "
        "(pos_kohya.safetensors, neg_kohya.safetensors) for ComfyUI, A1111, sd-scripts and diffusers"
    )
    assert "UNet (pos, neg) for diffusers" in summary(export(tmp_path / "full", base, runs["full"], layout=()))


CONFIG = """
from flax_pref.models.presets import SD15, SDXL
from flax_pref.training.export import ExportConfig
config = ExportConfig()
"""


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ([], ("diffusers", "kohya")),
        (["kohya"], ("kohya",)),
        (["peft", "kohya", "peft"], ("peft", "kohya")),
    ],
)
def test_the_layout_may_be_given_more_than_once(tmp_path, flags, expected):
    (tmp_path / "config.py").write_text(CONFIG)
    arguments = [part for layout in flags for part in ("--layout", layout)]
    assert load_config([str(tmp_path / "config.py"), *arguments], ExportConfig).layouts == expected


def test_an_unknown_layout_is_refused():
    assert ExportConfig(layout="kohya").layouts == ("kohya",)
    with pytest.raises(ValueError, match=r"export\.layout is 'comfy'; expected diffusers or kohya or peft or merged"):
        ExportConfig(layout=("kohya", "comfy"))


@pytest.mark.parametrize("layout", ["kohya", "peft"])
def test_a_run_begins_with_modules_of_any_layout(tmp_path, base, runs, layout):
    trained, params = runs["lora"]
    export(tmp_path, base, runs["lora"], layout)
    loaded = load_exported(tmp_path, trained, base, KIND, params)
    jax.tree.map(np.testing.assert_array_equal, loaded, params)


@pytest.mark.parametrize("weights", ["lora", "full"])
def test_a_run_begins_with_exported_modules_bit_by_bit(tmp_path, base, runs, weights):
    trained, params = runs[weights]
    export(tmp_path, base, runs[weights])
    loaded = load_exported(tmp_path, trained, base, KIND, params)
    jax.tree.map(np.testing.assert_array_equal, loaded, params)


def test_modules_of_another_alpha_begin_as_the_same_networks(tmp_path, base, runs):
    trained, params = runs["lora"]
    export(tmp_path, base, runs["lora"])
    loaded = load_exported(tmp_path, trained, base, LoRA(rank=2, alpha=6.0), params)

    def check(path, one, other):
        # The deltas are B A alpha / rank: with twice the alpha, half the B.
        np.testing.assert_allclose(one, other / 2 if path[-1].key == "lora_b" else other, rtol=1e-6)

    jax.tree.map_with_path(check, loaded, params)


def test_what_does_not_fit_is_named(tmp_path, base, runs):
    trained, params = runs["lora"]
    export(tmp_path, base, runs["lora"])
    rank = LoRA(rank=4)
    other, first = trained_networks(base, MODULES, "lora", rank)
    with pytest.raises(ValueError, match="modules of other layers, rank or size"):
        load_exported(tmp_path, other, base, rank, jax.eval_shape(first, base.params, jax.random.key(0)))
    (tmp_path / "neg.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"neg\.safetensors"):
        load_exported(tmp_path, trained, base, KIND, params)


def test_an_export_takes_the_place_of_the_one_before(tmp_path, base, runs):
    for weights in ("lora", "full"):
        trained, params = runs[weights]
        export(tmp_path, base, (trained, jax.tree.map(jnp.zeros_like, params)))
        export(tmp_path, base, runs[weights])
        jax.tree.map(np.testing.assert_array_equal, load_exported(tmp_path, trained, base, KIND, params), params)
    assert {path.name for path in tmp_path.iterdir()} == {"pos", "neg", "pos.safetensors", "neg.safetensors"}


def test_weights_can_be_stored_in_half_the_size(tmp_path, base, runs):
    export(tmp_path, base, runs["lora"], dtype="float16")
    kinds = {name: array.dtype for name, array in load_file(tmp_path / "pos.safetensors").items()}
    assert {kind for name, kind in kinds.items() if "alpha" not in name} == {np.dtype("float16")}


@pytest.mark.parametrize("weights", ["lora", "full"])
def test_a_single_file_is_the_checkpoint_with_the_module_in_its_weights(tmp_path, weights):
    pipeline = small_pipeline("sd1")
    trained, first = trained_networks(pipeline.unet, ("pos",), weights, KIND)
    params = jax.tree.map(lambda leaf: leaf + 0.1, jax.jit(first)(pipeline.unet.params, jax.random.key(0)))
    config = ExportConfig(layout=("single",))
    rest = (trained, pipeline.unet, pipeline.unet.params, params, KIND)
    written = export_modules(tmp_path, *rest, config, lambda: pipeline, INFO)
    assert written["single"] == [tmp_path / "pos_checkpoint.safetensors"]
    loaded = load_pipeline(tmp_path / "pos_checkpoint.safetensors")
    for ours, expected in ((loaded.vae, pipeline.vae), (loaded.text_encoders[0], pipeline.text_encoders[0])):
        jax.tree.map(np.testing.assert_array_equal, ours.params, expected.params)
    if weights == "full":
        jax.tree.map(np.testing.assert_array_equal, loaded.unet.params, params["pos"])
    else:
        export_modules(tmp_path, *rest, ExportConfig(), lambda: pipeline, INFO)
        guided = load_modules(pipeline.unet, {"pos": tmp_path / "pos.safetensors"})
        merged = merge_modules(pipeline.unet, guided, {"pos": 1.0, "base": -1.0})
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), loaded.unet.params, merged.params)


@pytest.mark.parametrize("layout", ["diffusers", "kohya"])
def test_a_file_tells_what_other_programs_look_for(tmp_path, base, runs, layout):
    (pos, _) = export(tmp_path, base, runs["lora"], layout)[layout]
    tell_strength(pos, 2.5)
    with safe_open(pos, framework="numpy") as file:
        told = file.metadata()
    content = pos.read_bytes()
    digest = hashlib.sha256(content[8 + int.from_bytes(content[:8], "little") :]).hexdigest()
    assert {"ss_network_dim": "2", "ss_network_alpha": "3", "ss_output_name": "pos"}.items() <= told.items()
    assert told["sshs_model_hash"] == digest and told["modelspec.hash_sha256"] == f"0x{digest}"
    assert told["flax_pref.method"] == "DiffusionDPO" and told["flax_pref.w"] == "2.5"
    guided = load_modules(base, {"pos": pos})
    assert guided.base.params.keys() == base.params.keys()


def test_the_family_is_told_in_the_words_of_others():
    for preset, version, architecture in (
        (SD15, "sd_v1", "stable-diffusion-v1/lora"),
        (SDXL, "sdxl_base_v1-0", "stable-diffusion-xl-v1-base/lora"),
    ):
        told = INFO.metadata(preset.unet, rank=4, alpha=2.0, weights=b"")
        assert told["ss_base_model_version"] == version and told["modelspec.architecture"] == architecture
