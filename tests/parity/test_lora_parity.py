import jax
import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from flax import nnx
from peft import LoraConfig
from safetensors.torch import load_file
from torch_reference import SD15_UNET, SDXL_UNET, nchw, nhwc, randomised, relative_error

from flax_pref.checkpoints.diffusers import load_unet
from flax_pref.checkpoints.lora import load_lora, load_lora_network, lora_network, merge_lora_network, save_lora
from flax_pref.checkpoints.weights import save_network
from flax_pref.models.lora import join_lora, select_lora, set_rows, split_lora

# Layers of every kind: matrices, convolutions of both sizes and both strides, inside the blocks and outside.
TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out", "conv1", "conv2"]
TARGETS += ["time_emb_proj", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "conv_in", "conv_out"]
TARGETS += ["time_embedding.linear_1", "time_embedding.linear_2"]
SDXL_TARGETS = [*TARGETS, "add_embedding.linear_1", "add_embedding.linear_2"]
MODELS = {
    "sd15": (SD15_UNET, StableDiffusionPipeline, TARGETS),
    "sdxl": (SDXL_UNET, StableDiffusionXLPipeline, SDXL_TARGETS),
}
ALPHA = 10  # of rank 4


@pytest.fixture(scope="module", params=MODELS)
def model(request, tmp_path_factory):
    config, pipeline, targets = MODELS[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    randomised(UNet2DConditionModel.from_config(config)).save_pretrained(folder)
    return folder, pipeline, targets


@pytest.fixture
def reference(model):
    return UNet2DConditionModel.from_pretrained(model[0]).eval()


def inputs(config) -> tuple[np.ndarray, np.ndarray, np.ndarray, dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    latents = rng.standard_normal((2, 8, 12, 4), dtype=np.float32)
    text = rng.standard_normal((2, 5, config.cross_attention_dim), dtype=np.float32)
    added = {}
    if config.addition_embed_type == "text_time":
        added["text_embeds"] = rng.standard_normal((2, 10), dtype=np.float32)
        added["time_ids"] = np.array([[1024, 768, 0, 16, 1024, 1024], [64, 64, 0, 0, 64, 64]], np.float32)
    return latents, np.array([3, 981], np.int32), text, added


def predict(network, *names):
    """The prediction of the batch: two images of one module, or one of two."""

    @jax.jit
    def run(params):
        unet = nnx.merge(network.graphdef, params)
        set_rows(unet, names)
        *args, added = inputs(network.config)
        return unet(*args, **added)

    return run(network.params)


def reference_predict(unet):
    latents, timesteps, text, added = inputs(unet.config)
    added = {name: torch.from_numpy(array) for name, array in added.items()}
    with torch.no_grad():
        return nhwc(
            unet(nchw(latents), torch.from_numpy(timesteps), torch.from_numpy(text), added_cond_kwargs=added).sample
        )


def test_diffusers_predicts_as_we_do_from_files_of_ours_in_both_layouts(model, reference, tmp_path):
    folder, pipeline, targets = model
    network = load_unet(folder)
    bank = lora_network(network, ("pos", "neg"), rank=4, alpha=ALPHA, targets=targets, key=jax.random.key(0))
    rng = np.random.default_rng(1)
    lora = jax.tree.map(
        lambda leaf: np.float32(0.1) * rng.standard_normal(leaf.shape, np.float32), split_lora(bank.params)[1]
    )
    bank = bank._replace(params=join_lora(network.params, lora))
    files = {name: tmp_path / f"{name}.safetensors" for name in ("pos", "neg")}
    for i, (file, layout) in enumerate(zip(files.values(), ("diffusers", "kohya"), strict=True)):
        save_lora(select_lora(lora, i), file, alpha=ALPHA, layout=layout, config=network.config)

    before, predicted = reference_predict(reference), []
    for file in files.values():
        # The way that load_lora_weights of the pipelines takes.
        weights, alphas, metadata = pipeline.lora_state_dict(
            tmp_path, weight_name=file.name, unet_config=reference.config, return_lora_metadata=True
        )
        pipeline.load_lora_into_unet(weights, alphas, reference, metadata=metadata)
        predicted.append(reference_predict(reference))
        assert relative_error(before, predicted[-1]) > 0.1  # the adapters do something
        assert len([name for name, _ in reference.named_parameters() if "lora_A" in name]) == len(weights) // 2
        reference.unload_lora()

    expected = np.stack([predicted[0][0], predicted[1][1]])
    stored = load_lora_network(network, files)
    errors = [relative_error(predict(ours, "pos", "neg"), expected) for ours in (bank, stored)]
    print(f"in memory {errors[0]:.1e}, from our files {errors[1]:.1e}")
    assert max(errors) < 1e-5

    for i, name in enumerate(files):
        save_network(merge_lora_network(network, stored, {name: 1.0}), tmp_path / name)
        merged = UNet2DConditionModel.from_pretrained(tmp_path / name).eval()
        assert relative_error(reference_predict(merged), predicted[i]) < 1e-5


def test_we_predict_as_diffusers_does_from_a_file_of_diffusers(model, reference, tmp_path):
    folder, pipeline, targets = model
    reference.add_adapter(LoraConfig(r=4, lora_alpha=ALPHA, target_modules=targets, init_lora_weights="gaussian"))
    generator = torch.Generator().manual_seed(1)
    for name, parameter in reference.named_parameters():
        if "lora_" in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    reference.save_lora_adapter(tmp_path, weight_name="dpo.safetensors")
    network = load_unet(folder)
    expected, *scale = load_lora(tmp_path / "dpo.safetensors", network)
    assert scale == [4, ALPHA]
    stored = load_lora_network(network, {"dpo": tmp_path / "dpo.safetensors"})
    error = relative_error(predict(stored, "dpo"), reference_predict(reference))
    print(f"{error:.1e}")
    assert error < 1e-5

    # The pipelines' files put the name of the network before that of the layer, and of PEFT's settings.
    settings = reference.peft_config["default"].to_dict()
    pipeline.save_lora_weights(
        tmp_path,
        load_file(tmp_path / "dpo.safetensors"),
        unet_lora_adapter_metadata=settings,
        weight_name="two.safetensors",
    )
    lora, *scale = load_lora(tmp_path / "two.safetensors", network)
    assert scale == [4, ALPHA]
    jax.tree.map(np.testing.assert_array_equal, lora, expected)
