"""`python -m sample.export`, and the samplers that it writes."""

import json
import subprocess
import sys
from importlib import resources
from pathlib import Path

import jax
import numpy as np
import pytest
from jax import export as jax_export
from PIL import Image
from safetensors.numpy import load_file

from flax_pref.checkpoints.checkpoint import Checkpoint
from flax_pref.checkpoints.diffusers import load_pipeline
from flax_pref.checkpoints.lora import lora_network, save_lora
from flax_pref.config import UserError
from flax_pref.models.lora import select_lora, split_lora
from flax_pref.serving.sampler import FORMAT, load_sampler
from sample import export, images

ROOT = Path(__file__).parents[1]
BASE = str(resources.files("flax_pref.world") / "base")
PROMPTS = ["a small red circle in the middle, white background", "a large blue cross", "a large red cross"]
QUICK = ("--model", "demo", "--steps", "2", "--guidance-scale", "3", "--batch-size", "2")


@pytest.fixture(scope="module")
def rule(tmp_path_factory):
    """Flags of cPGD with LoRA modules of random weights."""
    folder = tmp_path_factory.mktemp("modules")
    unet = lora_network(load_pipeline(BASE).unet, ("pos", "neg"), rank=2, alpha=2, key=jax.random.key(0))
    _, lora = split_lora(unet.params)
    rng = np.random.default_rng(0)
    lora = jax.tree.map(lambda leaf: leaf + 0.05 * rng.standard_normal(leaf.shape, np.float32), lora)
    flags = ["--rule", "cpgd"]
    for i, name in enumerate(("pos", "neg")):
        save_lora(select_lora(lora, i), folder / f"{name}.safetensors", alpha=2)
        flags += ["--module", f"{name}={folder}/{name}.safetensors"]
    return flags


@pytest.fixture(scope="module")
def exported(rule, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported") / "cpgd"
    export.main([*QUICK, *rule, "--w", "2", "--out", str(folder)])
    return folder


@pytest.fixture(scope="module")
def sampler(exported):
    return load_sampler(exported)


def drawn(folder, *flags):
    """What `sample.images` draws of the prompts with seed 7."""
    images.main([*QUICK, *flags, "--prompt", *PROMPTS, "--seed", "7", "--out", str(folder)])
    return np.stack([np.asarray(Image.open(folder / f"{i:05d}-7.png")) for i in range(len(PROMPTS))])


SERVE = """
import sys
import numpy as np
from flax_pref.serving.sampler import FORMAT, load_sampler
folder, out, *prompts = sys.argv[1:]
np.save(out, load_sampler(folder)(prompts, range(len(prompts)), seed=7))
networks = [name for name in sys.modules if name.startswith(("flax_pref.models.", "flax.nnx", "torch"))]
assert set(networks) <= {"flax_pref.models.config"}, networks
"""


@pytest.mark.program
def test_a_process_without_the_networks_draws_the_images_of_sample_images(exported, rule, tmp_path):
    command = [sys.executable, "-c", SERVE, exported, tmp_path / "images.npy", *PROMPTS]
    served = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert served.returncode == 0, served.stderr[-2000:]
    np.testing.assert_array_equal(np.load(tmp_path / "images.npy"), drawn(tmp_path / "w2", *rule, "--w", "2"))


def test_strengths_are_inputs_of_the_program(sampler, rule, tmp_path):
    other = drawn(tmp_path / "other", *rule, "--w", "1", "--guidance-scale", "2")
    np.testing.assert_array_equal(sampler(PROMPTS, range(3), seed=7, w=1, guidance_scale="2"), other)
    for_each = sampler(PROMPTS, range(3), seed=[7, 7, 8], w=[1, 2, 1], guidance_scale=2)
    np.testing.assert_array_equal(for_each[0], other[0])
    assert (for_each[1] != other[1]).any() and (for_each[2] != other[2]).any()


@pytest.mark.program
def test_a_shaped_rule_is_exported_with_its_numbers_as_inputs(rule, tmp_path):
    shaped = ("--shaping", "apg:0.5:3:-0.5", "--w", "norm:0.5")
    export.main([*QUICK, *rule, *shaped, "--out", str(tmp_path / "shaped")])
    sampler = load_sampler(tmp_path / "shaped")
    for w in ("norm:0.5", "norm:1"):
        wanted = drawn(tmp_path / w, *rule, *shaped[:3], w)
        np.testing.assert_array_equal(sampler(PROMPTS, range(3), seed=7, w=w), wanted)
    with pytest.raises(ValueError, match=r"exported for w=norm:0\.5"):
        sampler(PROMPTS, range(3), seed=7, w=2)


def test_a_negative_prompt_changes_its_own_image_and_is_that_of_sample_images(sampler, rule, tmp_path):
    plain = sampler(PROMPTS, range(3), seed=7)
    served = sampler(PROMPTS, range(3), seed=7, negative_prompts=["red", None, None])
    wanted = drawn(tmp_path / "negative", *rule, "--w", "2", "--negative-prompt", "red")
    np.testing.assert_array_equal(served[0], wanted[0])
    np.testing.assert_array_equal(served[1:], plain[1:])
    assert (served[0] != plain[0]).any()


def test_what_the_program_cannot_draw_is_refused(sampler):
    with pytest.raises(ValueError, match=r"in other steps .* exported for w=2 and guidance_scale=3"):
        sampler(PROMPTS, range(3), seed=7, w="2@0:0.5")
    with pytest.raises(ValueError, match="3 prompts, but 2 prompt_ids"):
        sampler(PROMPTS, range(2), seed=7)


def test_a_pipeline_of_diffusers_names_its_base_and_holds_its_modules(rule, tmp_path, capsys):
    files = [text.partition("=")[2] for text in rule if "=" in text]
    summed = ("--rule", "pgd", "--module", f"dpo={files[0]}:0.5", "--module", f"dpo={files[1]}:-2")
    flags = ("--model", "demo", "--steps", "2", "--format", "diffusers", "--w", "3")
    export.main([*flags, *summed, "--out", str(tmp_path / "out")])
    assert f"wrote a pipeline of diffusers to {tmp_path / 'out'}" in capsys.readouterr().out
    written = {
        path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*") if path.is_file()
    }
    code = {"pipeline.py", "guider.py", "networks/networks.py", "networks/networks.json", "model_index.json"}
    assert written == {*code, "scheduler/scheduler_config.json", "networks/module_dpo/model.safetensors"}
    networks = json.loads((tmp_path / "out" / "networks" / "networks.json").read_text())
    assert networks["base"] == str(Path(BASE).resolve())
    layer = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"

    def difference(file):
        tensors = load_file(file)
        return tensors[f"unet.{layer}.lora_B.weight"] @ tensors[f"unet.{layer}.lora_A.weight"]

    expected = 0.5 * difference(files[0]) - 2 * difference(files[1])
    found = difference(tmp_path / "out" / "networks" / "module_dpo" / "model.safetensors")
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_weights_in_eight_bits_are_exported_as_such(tmp_path):
    pytest.importorskip("qwix")
    export.main([*QUICK, "--quantize", "fp8", "--out", str(tmp_path / "fp8")])
    served = load_sampler(tmp_path / "fp8")
    assert served.weights["unet.members.0.params.conv_in.kernel.values"].dtype == "float8_e4m3fn"
    wanted = drawn(tmp_path / "images", "--quantize", "fp8")
    np.testing.assert_array_equal(served(PROMPTS, range(3), seed=7), wanted)


def test_other_platforms_get_their_own_kernels_in_bfloat16(tmp_path):
    flags = ("--platforms", "tpu", "cuda", "--height", "256", "--width", "256", "--out", str(tmp_path / "out"))
    export.main([*QUICK, *flags])
    programs = {
        platform: jax_export.deserialize(bytearray((tmp_path / "out" / f"{platform}.stablehlo").read_bytes()))
        for platform in ("tpu", "cuda")
    }
    assert programs["tpu"].platforms == ("tpu",) and programs["cuda"].platforms == ("cuda",)
    # 1,024 positions and more: the Pallas kernel of TPUs, which CUDA has not.
    assert "tpu_custom_call" in programs["tpu"].mlir_module()
    assert "custom_call" not in programs["cuda"].mlir_module()
    assert json.loads((tmp_path / "out" / "sampler.json").read_text())["dtype"] == "bfloat16"
    with pytest.raises(ValueError, match="exported for tpu, cuda, but JAX runs on cpu here"):
        load_sampler(tmp_path / "out")


@pytest.mark.parametrize("name", ["cpu.stablehlo", "weights.safetensors", "tokenizer_1/merges.txt"])
def test_a_damaged_file_is_named(name, exported):
    file = exported / name
    whole = file.read_bytes()
    file.write_bytes(whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:])
    try:
        with pytest.raises(ValueError, match=f"{name}: damaged"):
            load_sampler(exported)
    finally:
        file.write_bytes(whole)


NOTHING = object()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("rule", NOTHING, "no rule, expected dict"),
        ("layout", NOTHING, "no layout, expected str"),
        ("steps", NOTHING, "no steps, expected int"),
        ("batch_size", NOTHING, "no batch_size"),
        ("tokenizers", NOTHING, "no tokenizers"),
        ("platforms", NOTHING, "no platforms"),
        ("jax_version", NOTHING, "no jax_version"),
        ("calling_convention_version", NOTHING, "no calling_convention_version"),
        ("sha256", NOTHING, "no sha256"),
        ("format", NOTHING, "format=None, this version reads"),
        ("sha256", [], r"sha256=\[\], expected dict"),
        ("steps", "2", "steps='2', expected int"),
        ("batch_size", 0, "batch_size=0, expected at least 1"),
        ("tokenizers", [3], r"tokenizers=\[3\], expected names"),
        ("tokenizers", [], r"tokenizers=\[\], expected names"),
        ("tokenizers", ["../../x"], r"'\.\./\.\./x' is outside of the folder"),
        ("sha256", {"/etc/passwd": "0"}, "'/etc/passwd' is outside of the folder"),
        ("sha256", {"cpu.stablehlo": "0"}, "sha256 has no 'weights.safetensors'"),
        ("sha256", {"weights.safetensors": "0"}, "sha256 has no 'cpu.stablehlo'"),
        ("platforms", "cpu", "platforms='cpu', expected list"),
        ("rule", {"name": "cgf", "guidance_scale": "3"}, "rule=.* is not one"),
        ("rule", {"nome": "cfg"}, "rule=.* is not one"),
        ("rule", {"name": "cfg", "guidance_scale": "up"}, "rule=.* is not one .*no strength"),
    ],
)
def test_a_description_that_lacks_something_is_told_in_one_line(name, value, message, tmp_path):
    whole = {
        **{"format": FORMAT, "rule": {"name": "cfg", "guidance_scale": "3"}, "layout": "ab", "steps": 2},
        **{"batch_size": 2},
        **{"tokenizers": ["tokenizer_1"], "platforms": ["cpu"], "jax_version": "1", "calling_convention_version": 10},
        **{"sha256": {"cpu.stablehlo": "0", "weights.safetensors": "0"}},
    }
    description = {key: item for key, item in (whole | {name: value}).items() if item is not NOTHING}
    (tmp_path / "sampler.json").write_text(json.dumps(description))
    with pytest.raises(ValueError, match=rf"^{tmp_path}/sampler\.json: {message}") as told:
        load_sampler(tmp_path)
    assert "\n" not in str(told.value)


def test_a_jax_that_is_too_new_or_too_old_is_told_which_one_wrote_the_program(exported, monkeypatch):
    monkeypatch.setattr(jax_export, "minimum_supported_calling_convention_version", 99)
    with pytest.raises(ValueError, match=rf"exported by jax {jax.__version__} in calling convention \d+, but jax"):
        load_sampler(exported)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--attention", "flash"), "--attention flash: expected auto or xla"),
        (("--platforms", "cpu", "cpu"), "--platforms cpu cpu: expected one or several"),
        (("--rule", "cpgd"), "--rule cpgd needs --w"),
        (("--batch-size", "0"), "--batch-size 0: expected at least 1"),
        (("--out", "gs://bucket/run"), "--out gs://bucket/run: expected a local folder"),
        (("--steps", "0"), "--steps 0: expected at least 1"),
        (("--steps", "5000"), "steps must lie in 1"),
        (("--width", "65"), "--width 65: expected multiples of 8"),
        (("--guidance-scale", "list:1:2"), "list:1:2: 2 values, but the solver takes 50 steps"),
        (("--rule", "pgd", "--w", "1", "--module", "a=nowhere"), "nowhere: no such file"),
        (("--out", "docs"), "docs: exists and is not empty"),
    ],
)
def test_a_mistake_is_told_before_anything_is_loaded(flags, message, tmp_path, monkeypatch):
    monkeypatch.setattr(Checkpoint, "load", None)
    with pytest.raises((UserError, OSError), match=message):
        export.main(["--model", "demo", "--out", str(tmp_path / "out"), *flags])
    assert not (tmp_path / "out").exists()
