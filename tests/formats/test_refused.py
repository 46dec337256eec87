"""Files of models that are not supported are refused by their names: published key names, with weights of any shape."""

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from flax_pref.checkpoints.diffusers import load_pipeline, open_vae
from flax_pref.checkpoints.embeddings import add_embedding
from flax_pref.checkpoints.modules import load_modules
from tests.checkpoints.small import small_pipeline
from tests.formats.adapter_kinds import base

pytestmark = pytest.mark.formats

UNET = "model.diffusion_model."
CHECKPOINTS = {
    "Stable Diffusion 3": (
        [f"{UNET}joint_blocks.0.x_block.attn.qkv.weight", f"{UNET}x_embedder.proj.weight", f"{UNET}pos_embed"],
        ["joint_blocks.0.context_block.mlp.fc1.weight", "final_layer.linear.weight"],
        ["transformer_blocks.0.attn.add_k_proj.weight", "pos_embed.proj.weight", "context_embedder.weight"],
    ),
    "FLUX": (
        [f"{UNET}double_blocks.0.img_attn.qkv.weight", f"{UNET}single_blocks.0.linear1.weight"],
        ["double_blocks.0.txt_mod.lin.weight", "img_in.weight"],
        ["single_transformer_blocks.0.proj_mlp.weight", "transformer_blocks.0.attn.add_k_proj.weight"],
    ),
    "a video model": (
        ["blocks.0.self_attn.q.weight", "patch_embedding.weight", "head.modulation"],  # Wan
        ["blocks.0.attn1.to_q.weight", "condition_embedder.time_embedder.linear_1.weight", "scale_shift_table"],
        [f"{UNET}input_blocks.1.0.time_stack.in_layers.0.weight", f"{UNET}input_blocks.0.0.weight"],  # SVD
        ["down_blocks.0.motion_modules.0.temporal_transformer.proj_in.weight"],  # AnimateDiff
        [f"{UNET}patchify_proj.weight", f"{UNET}transformer_blocks.0.attn1.to_q.weight"],  # LTX-Video
        ["double_blocks.0.img_attn_qkv.weight", "txt_in.individual_token_refiner.blocks.0.norm1.weight"],  # Hunyuan
    ),
    "a ControlNet": (
        ["control_model.input_blocks.0.0.weight", "control_model.zero_convs.0.0.weight"],
        ["controlnet_cond_embedding.conv_in.weight", "down_blocks.0.resnets.0.conv1.weight"],
    ),
    "SDXL's refiner": (
        ["conditioner.embedders.0.model.transformer.resblocks.0.ln_1.weight", f"{UNET}input_blocks.0.0.weight"],
    ),
}
ADAPTERS = {
    "Stable Diffusion 3": (
        ["transformer.transformer_blocks.0.attn.add_k_proj.lora_A.weight"],
        ["lora_unet_joint_blocks_0_context_block_attn_qkv.lora_down.weight"],
    ),
    "Flux": (
        ["transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight"],
        ["lora_unet_double_blocks_0_img_attn_proj.lora_down.weight"],
        ["diffusion_model.double_blocks.0.img_attn.qkv.lora_A.weight"],
        ["lycoris_single_transformer_blocks_0_attn_to_q.lokr_w1"],
    ),
    "a video model": (
        ["diffusion_model.blocks.0.self_attn.q.lora_A.weight"],  # Wan
        ["lora_unet_blocks_0_cross_attn_k.lora_down.weight"],
        ["transformer.blocks.0.attn1.to_q.lora_A.weight"],
        [
            "down_blocks.0.motion_modules.0.temporal_transformer.transformer_blocks.0.attention_blocks.0.processor.to_q_lora.down.weight"
        ],
        ["unet.down_blocks.0.motion_modules.0.transformer_blocks.0.attn1.to_q.lora_A.weight"],  # AnimateDiff
    ),
}
CLASSES = (
    "StableDiffusion3Pipeline",
    "FluxPipeline",
    "WanPipeline",
    "StableVideoDiffusionPipeline",
    "AnimateDiffPipeline",
)
CLASSES += ("StableDiffusionXLImg2ImgPipeline", "StableDiffusionControlNetPipeline")


def stored(file, names):
    save_file({name: np.zeros((4, 1536), np.float32) for name in names}, file)
    return file


def says(read, file, what):
    with pytest.raises(ValueError, match=what) as error:
        read(file)
    assert str(error.value).startswith(str(file)) and "\n" not in str(error.value)


def cases(table):
    return [pytest.param(what, names, id=f"{what}: {names[0]}") for what, files in table.items() for names in files]


@pytest.mark.parametrize(("what", "names"), cases(CHECKPOINTS))
def test_a_checkpoint_of_another_model_is_refused_by_its_name(what, names, tmp_path):
    says(load_pipeline, stored(tmp_path / "model.safetensors", names), what)


@pytest.mark.parametrize(("what", "names"), cases(ADAPTERS))
@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_an_adapter_of_another_model_is_refused_by_its_name(what, names, family, tmp_path):
    pytest.importorskip("diffusers")
    file = stored(tmp_path / "module.safetensors", names)
    says(lambda path: load_modules(base(family), {"m": path}), file, f"is a LoRA for {what}")


@pytest.mark.parametrize("class_name", CLASSES)
def test_a_folder_of_another_model_is_refused_by_its_class(class_name, tmp_path):
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": class_name}))
    says(lambda file: load_pipeline(file.parent), tmp_path / "model_index.json", f"'{class_name}' is not supported")


def test_an_autoencoder_of_16_channels_is_refused(tmp_path):
    """As those of Stable Diffusion 3 and FLUX are."""
    shapes = {"encoder.conv_in.weight": (128, 3, 3, 3), "encoder.conv_out.weight": (32, 512, 3, 3)}
    shapes |= {"decoder.conv_in.weight": (512, 16, 3, 3), "decoder.conv_out.weight": (3, 128, 3, 3)}
    file = tmp_path / "vae.safetensors"
    save_file({name: np.zeros(shape, np.float32) for name, shape in shapes.items()}, file)
    says(lambda path: open_vae(path, "StableDiffusionPipeline"), file, "16 latent channels|Stable Diffusion 3")


def test_vectors_for_the_encoders_of_another_model_are_refused(tmp_path):
    names = ("clip_l", "clip_g", "t5xxl")
    file = stored(tmp_path / "toy.safetensors", names)
    says(lambda path: add_embedding(small_pipeline("sd1"), "<toy>", path), file, "t5xxl")
