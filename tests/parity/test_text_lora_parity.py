"""Files that adapt UNet and text encoders draw in JAX the images that they draw in diffusers."""

import contextlib
import io
import re

import jax
import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, EulerDiscreteScheduler, UNet2DConditionModel
from diffusers.utils.state_dict_utils import convert_state_dict_to_peft
from flax import nnx
from peft import LoraConfig, get_peft_model
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file
from torch_pipelines import SDXL_SCHEDULER, sd15, sdxl
from torch_reference import CLIP, SD15_UNET, nchw, randomised, relative_error
from transformers import CLIPTextConfig, CLIPTextModel

from flax_pref.checkpoints.diffusers import load_pipeline, load_text_encoder
from flax_pref.checkpoints.modules import load_modules
from flax_pref.checkpoints.weights import abstract_network
from flax_pref.diffusion.conditioning import encode_prompts
from flax_pref.diffusion.guidance import cfg
from flax_pref.diffusion.sampler import image_keys
from flax_pref.diffusion.text_to_image import TextToImage
from flax_pref.models.unet import UNetConfig

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


# ----------------------------------------------------------------------------------------------------------------------
# One text encoder: names and kinds of adapters


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A text encoder of transformers on the disk."""
    folder = tmp_path_factory.mktemp("encoder")
    randomised(CLIPTextModel(CLIPTextConfig(**CLIP))).save_pretrained(folder)
    return folder


@pytest.fixture
def reference(saved):
    """The encoder for one test: adapters change it."""
    return CLIPTextModel.from_pretrained(saved).eval()


def randomly(model):
    """The model with noise on its adapters."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data + 0.3 * torch.randn(parameter.shape, generator=generator)
    return model


def error_of(file, saved, expected):
    """How far our encoder with a file is from one of transformers, and that from the encoder without."""
    unet, encoder = abstract_network("unet", UNetConfig.from_dict(SD15_UNET)), load_text_encoder(saved)
    (own,) = load_modules(unet, {"m": file}, text_encoders=(encoder,)).text_encoders["m"]
    ids = np.random.default_rng(0).integers(0, CLIP["vocab_size"], (2, 16), np.int32)
    with torch.no_grad():
        want = expected(torch.from_numpy(ids).long()).last_hidden_state.numpy()
    states = [nnx.merge(net.graphdef, net.params)(ids).last_hidden_state for net in (own, encoder)]
    assert relative_error(states[1], want) > 0.05
    error = relative_error(states[0], want)
    print(f"{error:.1e}")
    return error


@pytest.mark.parametrize("name", ["to_{}_lora.{}.weight", "{}_proj.lora_linear_layer.{}.weight"])
def test_older_names_of_diffusers_encode_as_there(saved, reference, tmp_path, name):
    reference.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["q_proj", "k_proj", "v_proj", "out_proj"]))
    stored = {}
    for theirs, array in get_peft_model_state_dict(randomly(reference)).items():
        layer, projection, matrix = re.fullmatch(r"(.*\.self_attn\.)(\w+)_proj\.lora_([AB])\.weight", theirs).groups()
        own = name.format(projection, "down" if matrix == "A" else "up")
        stored[f"text_encoder.text_model.{layer}{own}"] = array
    save_file(stored, tmp_path / "module.safetensors")
    # And diffusers reads them so.
    assert len(convert_state_dict_to_peft(stored)) == len(stored)
    assert {key.split("text_model.")[1] for key in convert_state_dict_to_peft(stored)} == {
        *get_peft_model_state_dict(reference)
    }
    assert error_of(tmp_path / "module.safetensors", saved, reference) < 1e-5


KINDS = {
    "patterns": {"lora_alpha": 5, "rank_pattern": {"fc1": 3}, "alpha_pattern": {"layers.0.self_attn.q_proj": 1}},
    "rslora": {"lora_alpha": 3, "use_rslora": True, "rank_pattern": {"q_proj": 4}},
    "dora": {"lora_alpha": 3, "use_dora": True},
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_peft_folder_of_a_text_encoder_encodes_as_there(saved, reference, tmp_path, kind):
    model = randomly(get_peft_model(reference, LoraConfig(r=2, target_modules=TEXT, **KINDS[kind])))
    model.save_pretrained(tmp_path)
    assert error_of(tmp_path, saved, model) < 1e-5


@pytest.mark.parametrize(
    ("algo", "prefix"),
    [
        ("lora", "lycoris_"),
        *((algo, "lora_te_text_model_") for algo in ("lora", "loha", "lokr", "full", "ia3", "glora")),
    ],
)
def test_adapters_of_lycoris_encode_as_there(saved, reference, tmp_path, algo, prefix):
    with contextlib.redirect_stdout(io.StringIO()):
        wrapper = pytest.importorskip("lycoris.wrapper")
        wrapper.LycorisNetwork.apply_preset({"lora_prefix": "lycoris", "target_module": ["CLIPAttention", "CLIPMLP"]})
        made = wrapper.create_lycoris(reference, 1.0, linear_dim=2, linear_alpha=3.0, algo=algo)
    made.apply_to()
    generator = torch.Generator().manual_seed(0)
    for parameter in made.parameters():
        parameter.data = parameter.data + 0.2 * torch.randn(parameter.shape, generator=generator)
    stored = {name.replace("lycoris_", prefix, 1): x.detach().contiguous() for name, x in made.state_dict().items()}
    save_file(stored, tmp_path / "module.safetensors")
    assert error_of(tmp_path / "module.safetensors", saved, reference) < 1e-5
