"""Single files in and out: the same as the folder, for diffusers too, and what users see when one is not right."""

import dataclasses
import pathlib
import warnings

import jax
import numpy as np
import pytest
from checkpoints.small import random_network, small_pipeline
from safetensors.numpy import load_file, save_file

from flax_pref.checkpoints.diffusers import load_pipeline, open_checkpoint, save_pipeline
from flax_pref.checkpoints.single_file import LAYOUTS, UNET, VAE, _configs, _names, read_single_file, save_single_file
from flax_pref.checkpoints.tokenizer import clip_tokenizer, load_tokenizer
from flax_pref.checkpoints.weights import abstract_network, to_stored
from flax_pref.diffusion.sampler import draw_normal, image_keys
from flax_pref.diffusion.text_to_image import TextToImage
from flax_pref.models.presets import SD15, SDXL

FAMILIES = ("sd1", "sd2", "sdxl")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Of each family: the pipeline, its file and its folder."""
    folder = tmp_path_factory.mktemp("saved")
    found = {}
    for family in FAMILIES:
        pipeline = small_pipeline(family)
        save_single_file(pipeline, folder / f"{family}.safetensors", dtype="float32")
        save_pipeline(pipeline, folder / family)
        found[family] = pipeline, folder / f"{family}.safetensors", folder / family
    return found


def parts(pipeline):
    return {"unet": pipeline.unet, "vae": pipeline.vae} | {
        f"text_encoder{i}": encoder for i, encoder in enumerate(pipeline.text_encoders)
    }


def same(ours, theirs):
    for name, network in parts(theirs).items():
        assert parts(ours)[name].config == network.config, name
        jax.tree.map(np.testing.assert_array_equal, parts(ours)[name].params, network.params)


def changed(file, folder, change, metadata=None):
    """A copy of a file whose weights are changed by a function of their dict."""
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, folder / "changed.safetensors", metadata=metadata)
    return folder / "changed.safetensors"


# ----------------------------------------------------------------------------------------------------------------------
# What is read


@pytest.mark.parametrize("family", FAMILIES)
def test_a_file_is_the_pipeline_that_was_saved(saved, family):
    pipeline, file, _ = saved[family]
    loaded = load_pipeline(file)
    same(loaded, pipeline)
    assert loaded.scheduler_config == pipeline.scheduler_config
    assert loaded.force_zeros_for_empty_prompt == pipeline.force_zeros_for_empty_prompt
    assert [t.pad_token for t in loaded.tokenizers] == [t.pad_token for t in pipeline.tokenizers]


@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword")  # diffusers' Euler
@pytest.mark.parametrize("family", FAMILIES)
def test_diffusers_reads_the_weights_of_the_folder_from_the_file_and_draws_our_images(saved, family):
    diffusers = pytest.importorskip("diffusers")
    _, file, folder = saved[family]
    kind = diffusers.StableDiffusionXLPipeline if family == "sdxl" else diffusers.StableDiffusionPipeline
    options = {} if family == "sdxl" else {"safety_checker": None}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = kind.from_single_file(file, config=str(folder), local_files_only=True, **options)
    whole = kind.from_pretrained(folder, **options)
    for part in ("unet", "vae", "text_encoder", *(["text_encoder_2"] if family == "sdxl" else [])):
        expected, found = getattr(whole, part).state_dict(), getattr(theirs, part).state_dict()
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            assert (found[name] == tensor).all(), name
    images = TextToImage(load_pipeline(file), steps=STEPS, size=(16, 16), batch_size=2)(PROMPTS, seed=1)
    references = drawn(theirs, vae_factor=2)
    assert references.std() > 0.05
    assert np.abs(images - references).max() < 2 / 255


PROMPTS, STEPS = ["a red cube", "two dogs"], 4


def drawn(pipeline, vae_factor):
    """The images that diffusers draws from our noise."""
    torch = pytest.importorskip("torch")
    pipeline.set_progress_bar_config(disable=True)
    keys = image_keys(1, range(len(PROMPTS)))
    noise = np.stack([draw_normal(keys[i : i + 1], 0, (16 // vae_factor, 16 // vae_factor, 4))[0] for i in range(2)])
    latents = torch.from_numpy(noise.transpose(0, 3, 1, 2).copy())
    options = {"height": 16, "width": 16, "num_inference_steps": STEPS, "guidance_scale": 7.5}
    return pipeline(PROMPTS, latents=latents, output_type="np", **options).images


def test_a_unet_that_is_told_a_guidance_scale_comes_back(saved, tmp_path):
    pipeline = saved["sd1"][0]
    config = dataclasses.replace(pipeline.unet.config, time_cond_proj_dim=32)
    pipeline = pipeline.replace(unet=random_network("unet", config))
    save_single_file(pipeline, tmp_path / "lcm.safetensors", dtype="float32")
    same(load_pipeline(tmp_path / "lcm.safetensors"), pipeline)


def test_a_folder_becomes_a_file(saved, tmp_path):
    pipeline, _, folder = saved["sdxl"]
    save_single_file(load_pipeline(folder), tmp_path / "from_folder.safetensors", dtype="float32")
    same(load_pipeline(tmp_path / "from_folder.safetensors"), pipeline)


@pytest.mark.parametrize(("family", "preset"), [("sd1", SD15), ("sdxl", SDXL)])
def test_the_full_key_set_is_that_of_diffusers_and_gives_the_published_sizes(family, preset):
    torch = pytest.importorskip("torch")
    utils = pytest.importorskip("diffusers.loaders.single_file_utils")

    def shapes(kind, config):
        stored = jax.eval_shape(lambda params: params, abstract_network(kind, config).params)
        return stored_shapes(stored)

    class Config(dict):
        __getattr__ = dict.get

    found = {}
    for part, prefix, config, convert in (
        ("unet", UNET, preset.unet, utils.convert_ldm_unet_checkpoint),
        ("vae", VAE, preset.vae, utils.convert_ldm_vae_checkpoint),
    ):
        expected = shapes(part, config)
        names = _names(part, abstract_network(part, config), prefix)
        file = {names[name]: torch.empty(shape, device="meta") for name, shape in expected.items()}
        converted = convert(dict(file), Config(config.to_dict()))
        squared = {name: tuple(tensor.shape) for name, tensor in converted.items()}
        assert squared == expected
        found[part] = {name.removeprefix(prefix): tuple(tensor.shape) for name, tensor in file.items()}
    for (part, prefix), config in zip(LAYOUTS[family].text_encoders.items(), preset.text_encoders, strict=True):
        expected = shapes("text_encoder", config)
        names = _names(part, abstract_network("text_encoder", config), prefix)
        found[part] = {}
        for name, shape in expected.items():
            stem, packed, _ = names[name].removeprefix(prefix).partition("[")
            found[part][stem] = (3 * shape[0], *shape[1:]) if packed else shape
    configs = _configs(family, found, "epsilon")
    assert configs["unet"] == preset.unet and configs["vae"] == preset.vae
    assert [configs[part] for part in LAYOUTS[family].text_encoders] == list(preset.text_encoders)


def stored_shapes(params):
    """Shapes of published weights, from shapes of ours."""
    zeros = jax.tree.map(lambda leaf: np.broadcast_to(np.float32(0), leaf.shape), params)
    return {name: array.shape for name, array in to_stored(zeros).items()}


@pytest.mark.parametrize(
    "surplus",
    [
        {"model_ema.diffusion_modelinput_blocks00weight": (4,), "model_ema.decay": ()},
        {"alphas_cumprod": (1000,), "betas": (1000,), "sqrt_recip_alphas_cumprod": (1000,), "global_step": ()},
        {"cond_stage_model.transformer.text_model.embeddings.position_ids": (1, 77)},
        {"first_stage_model.loss.logvar": ()},
    ],
)
def test_what_training_left_in_a_file_is_passed_over(saved, tmp_path, surplus):
    pipeline, file, _ = saved["sd1"]
    extra = {name: np.zeros(shape, np.float32) for name, shape in surplus.items()}
    same(load_pipeline(changed(file, tmp_path, lambda tensors: tensors.update(extra))), pipeline)


def test_text_encoders_without_the_prefix_of_transformers_load(saved, tmp_path):
    pipeline, file, _ = saved["sd1"]

    def change(tensors):
        for name in [name for name in tensors if ".text_model." in name]:
            tensors[name.replace(".text_model.", ".")] = tensors.pop(name)

    same(load_pipeline(changed(file, tmp_path, change)), pipeline)


def test_stable_diffusion_2_takes_the_last_layer_but_one(saved, tmp_path):
    pipeline, file, _ = saved["sd2"]

    def change(tensors):  # as in the released files
        for name in [name for name in tensors if ".resblocks.1." in name]:
            tensors[name.replace(".resblocks.1.", ".resblocks.2.")] = tensors[name]
        tensors["cond_stage_model.model.text_projection"] = np.zeros((64, 64), np.float32)
        tensors["cond_stage_model.model.logit_scale"] = np.zeros((), np.float32)

    metadata = {"modelspec.prediction_type": "epsilon"}
    same(load_pipeline(changed(file, tmp_path, change, metadata)), pipeline)


def test_a_file_of_torch_is_read_without_torch(saved, tmp_path):
    torch = pytest.importorskip("torch")
    pipeline, file, _ = saved["sd1"]
    weights = {name: torch.from_numpy(array.copy()) for name, array in load_file(file).items()}
    torch.save({"state_dict": weights, "global_step": 840000, "epoch": 1}, tmp_path / "v1-5.ckpt")
    same(load_pipeline(tmp_path / "v1-5.ckpt"), pipeline)


def test_half_precision_is_kept_or_widened(saved, tmp_path):
    pipeline = saved["sd1"][0]
    save_single_file(pipeline, tmp_path / "half.safetensors")
    assert {str(array.dtype) for array in load_file(tmp_path / "half.safetensors").values()} == {"float16"}
    loaded = load_pipeline(tmp_path / "half.safetensors")
    np.testing.assert_allclose(*(np.asarray(p.unet.params["conv_in"]["kernel"]) for p in (loaded, pipeline)), atol=1e-3)


@pytest.mark.parametrize("kind", ["float8_e4m3fn", "float8_e5m2"])
def test_files_of_8_bits_are_the_numbers_that_they_hold(kind, saved, tmp_path):
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file as load_torch
    from safetensors.torch import save_file as save_torch

    pipeline, file, _ = saved["sd1"]
    stored = {name: tensor.to(getattr(torch, kind)) for name, tensor in load_torch(file).items()}
    save_torch(stored, tmp_path / "8bit.safetensors")
    loaded = load_pipeline(tmp_path / "8bit.safetensors")
    expected = stored["model.diffusion_model.input_blocks.0.0.weight"].float().numpy().transpose(2, 3, 1, 0)
    np.testing.assert_array_equal(loaded.unet.params["conv_in"]["kernel"], expected)
    far = jax.tree.map(lambda a, b: np.abs(a - b).max() / np.abs(b).max(), loaded.unet.params, pipeline.unet.params)
    assert max(jax.tree.leaves(far)) < 0.13


def test_the_vocabulary_of_the_package_is_clips():
    folder = pathlib.Path(__file__).parents[3] / "shared" / "data" / "clip_tokenizer"
    if not folder.is_dir():
        pytest.skip("CLIP's tokenizer files are not here")
    published = load_tokenizer(folder)
    assert clip_tokenizer().vocab == published.vocab and clip_tokenizer().merges == published.merges
    texts = ["A photo of a café at 5pm!!", "naïve <|endoftext|> 日本 🙂"]
    np.testing.assert_array_equal(clip_tokenizer()(texts), published(texts))


def test_known_texts_have_clips_ids():
    ids = clip_tokenizer()(["a photo of a cat"])[0]
    assert ids[:8].tolist() == [49406, 320, 1125, 539, 320, 2368, 49407, 49407]
    assert clip_tokenizer(pad_token="!")(["a photo of a cat"])[0][6:9].tolist() == [49407, 0, 0]


# ----------------------------------------------------------------------------------------------------------------------
# Schedulers


def test_keys_say_what_the_network_predicts(saved, tmp_path):
    pipeline = saved["sdxl"][0]
    scheduler = {**pipeline.scheduler_config, "prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    save_single_file(pipeline.replace(scheduler_config=scheduler), tmp_path / "v.safetensors")
    assert {"v_pred", "ztsnr"} <= load_file(tmp_path / "v.safetensors").keys()
    found = read_single_file(tmp_path / "v.safetensors").scheduler_config
    assert found["prediction_type"] == "v_prediction" and found["rescale_betas_zero_snr"]
    assert found["timestep_spacing"] == "trailing"


def test_stable_diffusion_2_that_does_not_say_what_it_predicts_asks(saved, tmp_path):
    file = changed(saved["sd2"][1], tmp_path, lambda tensors: None)
    with pytest.raises(ValueError, match=r"changed.safetensors: does not say .* --prediction-type v_prediction"):
        read_single_file(file)
    told = read_single_file(file, prediction_type="v_prediction")
    assert told.scheduler_config["prediction_type"] == "v_prediction" and told.config("unet").sample_size == 96


def test_a_prediction_type_that_the_file_contradicts_is_refused(saved):
    with pytest.raises(ValueError, match="prediction_type='v_prediction', but the file says 'epsilon'"):
        read_single_file(saved["sd1"][1], prediction_type="v_prediction")


def test_a_prediction_type_beside_a_folder_is_refused(saved):
    with pytest.raises(ValueError, match=r"beside a folder, whose scheduler_config.json says it"):
        open_checkpoint(saved["sd1"][2], prediction_type="epsilon")


# ----------------------------------------------------------------------------------------------------------------------
# Parts from elsewhere


def only(prefix):
    def change(tensors):
        for name in list(tensors):
            if not name.startswith(prefix):
                del tensors[name]

    return change


def test_a_file_with_the_unet_alone_takes_the_rest_from_elsewhere(saved, tmp_path):
    pipeline, file, folder = saved["sdxl"]
    alone = changed(file, tmp_path, only(UNET))
    with pytest.raises(ValueError, match=r"changed.safetensors: holds no text_encoder; take it .* --text-encoders"):
        load_pipeline(alone)
    with pytest.raises(ValueError, match=r"changed.safetensors: holds no vae; take it .* --vae"):
        load_pipeline(alone, text_encoders=folder)
    same(load_pipeline(alone, vae=folder / "vae", text_encoders=file), pipeline)


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_names_without_a_prefix_are_a_network_alone(saved, tmp_path, family):
    pipeline, file, folder = saved[family]

    def strip(prefix):
        def change(tensors):
            only(prefix)(tensors)
            for name in list(tensors):
                tensors[name.removeprefix(prefix)] = tensors.pop(name)

        return change

    (tmp_path / "vae").mkdir()
    vae = changed(file, tmp_path / "vae", strip(VAE))
    unet = changed(file, tmp_path, strip(UNET))
    same(load_pipeline(unet, vae=vae, text_encoders=folder), pipeline)


def test_parts_of_a_file_of_stable_diffusion_2_need_no_prediction_type(saved, tmp_path):
    pipeline, file, folder = saved["sd2"]
    silent = changed(file, tmp_path, lambda tensors: None)  # its UNet would need one
    same(load_pipeline(folder, vae=silent, text_encoders=silent), pipeline)


def test_parts_from_elsewhere_count_with_their_tokenizers(saved):
    _, file, folder = saved["sdxl"]
    parts = {name: folder / name for name in ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")}
    assert open_checkpoint(file, text_encoders=folder).replaced() == parts
    assert open_checkpoint(file, vae=folder).replaced() == {"vae": folder / "vae"}
    assert open_checkpoint(folder, vae=file).replaced() == {"vae": file}
    assert open_checkpoint(folder).replaced() == open_checkpoint(file).replaced() == {}


def test_text_encoders_of_another_family_are_refused(saved):
    with pytest.raises(ValueError, match=r"is a StableDiffusionPipeline, but .* is a StableDiffusionXLPipeline"):
        load_pipeline(saved["sdxl"][1], text_encoders=saved["sd1"][1])


# ----------------------------------------------------------------------------------------------------------------------
# What is refused

CONV_IN = "model.diffusion_model.input_blocks.0.0.weight"
POSITIONS = "cond_stage_model.transformer.text_model.embeddings.position_embedding.weight"
TIME = "model.diffusion_model.time_embed.0.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(TIME), rf"no weight '{TIME}' \(1 weight missing\)"),
        (
            lambda t: t.pop("first_stage_model.encoder.conv_in.bias"),
            "no weight 'first_stage_model.encoder.conv_in.bias'",
        ),
        (lambda t: t.pop(CONV_IN), f"no weight '{CONV_IN}'"),
        (
            lambda t: t.update({POSITIONS: np.zeros((154, 64), np.float32)}),
            r"position_embedding.weight' of the text encoder has shape \[154, 64\], expected 77 rows",
        ),
        (lambda t: t.update({f"{UNET}extra.weight": np.zeros(1)}), f"weight '{UNET}extra.weight' .* no place"),
        (
            lambda t: t.update({"other.weight": np.zeros(1)}),
            "'other.weight' has no place in stable-diffusion-v1",
        ),
        (lambda t: t.update({TIME: np.zeros((3, 3))}), rf"weight '{TIME}' has shape \[3, 3\], expected"),
        (lambda t: t.update({"x_joint_blocks.0.weight": np.zeros(1)}), "is Stable Diffusion 3"),
        (lambda t: t.update({f"{UNET}double_blocks.0.w": np.zeros(1)}), "is FLUX or a relative"),
        (lambda t: t.update({f"{UNET}input_blocks.1.1.time_stack.0.w": np.zeros(1)}), "is a video model"),
        (lambda t: t.update({"control_model.time_embed.0.weight": np.zeros(1)}), "is a ControlNet"),
        (lambda t: t.update({"edm_mean": np.zeros(1)}), "is a model of the EDM formulation"),
        (lambda t: (t.clear(), t.update({"lora_unet_x.lora_up.weight": np.zeros(1)})), "is adapters.*--module"),
        (lambda t: (t.clear(), t.update({"down_blocks.0.w": np.zeros(1)})), "is a network of a folder"),
        (lambda t: (t.clear(), t.update({"emb_params": np.zeros((1, 4))})), "holds none of the networks"),
    ],
)
def test_a_file_of_another_kind_or_with_other_keys_is_named(saved, tmp_path, change, message):
    file = changed(saved["sd1"][1], tmp_path, change)
    with pytest.raises(ValueError, match=message) as error:
        load_pipeline(file)
    assert "changed.safetensors" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("suffix", [".ckpt", ".safetensors"])
def test_a_file_that_is_no_file_of_weights_is_named(suffix, tmp_path):
    file = tmp_path / f"v1-5{suffix}"
    file.write_bytes(b"x")
    with pytest.raises(ValueError, match=rf"v1-5{suffix}: not a"):
        load_pipeline(file)


def test_a_cut_file_is_named(saved, tmp_path):
    (tmp_path / "cut.safetensors").write_bytes(saved["sd1"][1].read_bytes()[:-1000])
    with pytest.raises(ValueError, match=r"cut.safetensors: not a complete safetensors file"):
        load_pipeline(tmp_path / "cut.safetensors")


def test_what_a_single_file_cannot_hold_is_refused_before_anything_is_written(saved, tmp_path):
    pipeline = saved["sd1"][0]
    tokenizer = dataclasses.replace(
        pipeline.tokenizers[0], vocab={"a": 0, "<|startoftext|>": 1, "<|endoftext|>": 2}, merges=[]
    )
    with pytest.raises(ValueError, match=r"single files have CLIP's 49408 tokens, but .* has 3 of its own"):
        save_single_file(pipeline.replace(tokenizers=(tokenizer,)), tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=r"expected a name that ends in .safetensors"):
        save_single_file(pipeline, tmp_path / "x.ckpt")
    assert not list(tmp_path.iterdir())
