"""Small pipelines of diffusers, of both families, with random weights."""

import json

from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch_reference import CLIP, SD15_UNET, SDXL_UNET, VAE, randomised
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

# The scheduler files of the two families as they are published, apart from fields that their classes do not know.
SCHEDULE = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "steps_offset": 1,
}
SD15_SCHEDULER = SCHEDULE | {"set_alpha_to_one": False, "skip_prk_steps": True}
SDXL_SCHEDULER = SCHEDULE | {"timestep_spacing": "leading", "prediction_type": "epsilon"}


def byte_tokenizer(folder, pad_token="<|endoftext|>") -> CLIPTokenizer:
    """A tokenizer of lower-case letters, in which every letter is a token."""
    letters = "abcdefghijklmnopqrstuvwxyz,."
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "!</w>", "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer.from_pretrained(folder, model_max_length=16, pad_token=pad_token)


def text_config(tokenizer: CLIPTokenizer, **change) -> CLIPTextConfig:
    return CLIPTextConfig(
        **CLIP
        | {
            "vocab_size": len(tokenizer),
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
        }
        | change
    )


def sd15(folder) -> StableDiffusionPipeline:
    tokenizer = byte_tokenizer(folder / "tokenizer")
    return StableDiffusionPipeline(
        vae=randomised(AutoencoderKL.from_config(VAE)),
        text_encoder=randomised(CLIPTextModel(text_config(tokenizer))),
        tokenizer=tokenizer,
        unet=randomised(UNet2DConditionModel.from_config(SD15_UNET)),
        scheduler=PNDMScheduler(**SD15_SCHEDULER),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def sdxl(folder) -> StableDiffusionXLPipeline:
    tokenizers = byte_tokenizer(folder / "tokenizer"), byte_tokenizer(folder / "tokenizer_2", pad_token="!</w>")
    second = text_config(tokenizers[1], hidden_size=8, num_hidden_layers=2, hidden_act="gelu")
    return StableDiffusionXLPipeline(
        vae=randomised(AutoencoderKL.from_config(VAE | {"scaling_factor": 0.13025})),
        text_encoder=randomised(CLIPTextModel(text_config(tokenizers[0])), seed=1),
        text_encoder_2=randomised(CLIPTextModelWithProjection(second), seed=2),
        tokenizer=tokenizers[0],
        tokenizer_2=tokenizers[1],
        unet=randomised(UNet2DConditionModel.from_config(SDXL_UNET)),
        scheduler=EulerDiscreteScheduler(**SDXL_SCHEDULER),
        add_watermarker=False,
    )
