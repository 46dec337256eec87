"""Files that adapt UNet and text encoders draw in JAX the images that they draw in diffusers."""

import jax
import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, EulerDiscreteScheduler, UNet2DConditionModel
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file
from torch_pipelines import SDXL_SCHEDULER, sd15, sdxl
from torch_reference import nchw, randomised, relative_error

from flax_pref.checkpoints.diffusers import load_pipeline
from flax_pref.checkpoints.modules import load_modules
from flax_pref.diffusion.conditioning import encode_prompts
from flax_pref.diffusion.guidance import cfg
from flax_pref.diffusion.sampler import image_keys
from flax_pref.diffusion.text_to_image import TextToImage

# diffusers' and transformers' own housekeeping, none of ours.
pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword"),
]
PROMPTS, NEGATIVES = ["a lion, red", "a dog"], ["dull", "grey"]
STEPS, SCALE, SIZE, SEED = 4, 5.0, (24, 32), 3
SMALLER = {
    sd15: {
        "block_out_channels": [8],
        "down_block_types": ["CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D"],
        "layers_per_block": 1,
    },
    sdxl: {
        "block_out_channels": [8, 16],
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
        "attention_head_dim": [1, 2],
        "transformer_layers_per_block": [1, 1],
    },
}
TEXT = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]


@pytest.fixture(scope="module", params=[sd15, sdxl], ids=["sd15", "sdxl"])
def folder(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param.__name__)
    pipeline = request.param(folder / "tokenizers")
    # Networks and steps that are compiled quickly.
    unet = UNet2DConditionModel.from_config(dict(pipeline.unet.config) | SMALLER[request.param])
    pipeline.register_modules(unet=randomised(unet), scheduler=EulerDiscreteScheduler(**SDXL_SCHEDULER))
    pipeline.save_pretrained(folder / "pipeline")
    return folder / "pipeline"


def load(folder):
    pipeline = DiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def networks(pipeline):
    """Those that adapters may be for, and their layers."""
    names = {"unet": ["to_q", "to_v", "ff.net.2"], "text_encoder": TEXT, "text_encoder_2": [*TEXT, "text_projection"]}
    return {name: (getattr(pipeline, name), layers) for name, layers in names.items() if hasattr(pipeline, name)}


def adapted(model, targets, seed, **config):
    """Random weights of an adapter in PEFT's names, and its configuration."""
    model.add_adapter(LoraConfig(**{"r": 2, "lora_alpha": 3, "target_modules": targets} | config))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    return get_peft_model_state_dict(model), model.peft_config["default"]


def kohya(part, weights):
    """The names of sd-scripts, and alpha as a tensor of each layer."""
    prefix = {"unet": "lora_unet_", "text_encoder": "lora_te_", "text_encoder_2": "lora_te2_"}[part]
    stored = {}
    for name, array in weights.items():
        layer, ending = name.split(".lora_")
        if part != "unet" and not layer.startswith("text_"):
            layer = f"text_model.{layer}"  # which transformers 5 leaves out
        layer = prefix + layer.replace(".", "_")
        stored[f"{layer}.lora_{'down' if ending.startswith('A') else 'up'}.weight"] = array
        stored[f"{layer}.alpha"] = torch.tensor(3.0)
    return stored


@pytest.fixture(scope="module", params=["diffusers", "kohya"])
def file(request, folder, tmp_path_factory):
    """A file of adapters of all networks."""
    pipeline, file = load(folder), tmp_path_factory.mktemp("lora") / "module.safetensors"
    made = {part: adapted(*own, seed) for seed, (part, own) in enumerate(networks(pipeline).items())}
    if request.param == "kohya":
        save_file({name: x for part, (own, _) in made.items() for name, x in kohya(part, own).items()}, file)
    else:
        weights = {f"{part}_lora_layers": own for part, (own, _) in made.items()}
        settings = {f"{part}_lora_adapter_metadata": config.to_dict() for part, (_, config) in made.items()}
        pipeline.save_lora_weights(file.parent, weight_name=file.name, **weights, **settings)
    return file


def theirs(pipeline):
    keys = image_keys(SEED, range(len(PROMPTS)))
    noise = np.stack([jax.random.normal(jax.random.fold_in(key, 0), (SIZE[0] // 4, SIZE[1] // 4, 4)) for key in keys])
    return pipeline(
        PROMPTS,
        negative_prompt=NEGATIVES,
        height=SIZE[0],
        width=SIZE[1],
        num_inference_steps=STEPS,
        guidance_scale=SCALE,
        latents=nchw(noise),
        output_type="np",
    ).images


def test_the_images_are_those_of_diffusers(folder, file):
    reference = load(folder)
    reference.load_lora_weights(file.parent, weight_name=file.name)
    expected = theirs(reference)
    reference.unload_lora_weights()
    pipeline = load_pipeline(folder)
    guided = load_modules(pipeline.unet, {"module": file}, text_encoders=pipeline.text_encoders)
    draw = TextToImage(
        pipeline.replace(unet=guided.base), steps=STEPS, size=SIZE, batch_size=2, text_encoders=guided.text_encoders
    )
    images = draw(PROMPTS, rule=cfg(SCALE, "module"), seed=SEED, negative_prompts=NEGATIVES)
    error = np.abs(images - expected).max()
    print(f"{error * 255:.4f} / 255")
    assert expected.std() > 0.05  # it shows something
    assert error < 0.1 / 255
    for name, plain in encode_prompts(pipeline, PROMPTS).items():
        own = encode_prompts(pipeline.replace(text_encoders=guided.text_encoders["module"]), PROMPTS)[name]
        assert relative_error(own, plain) > 0.1  # the adapters of all text encoders do something
