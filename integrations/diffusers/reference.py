"""Predictions of diffusers for a checkpoint, in float32 on the CPU, for others to be compared with.

    python reference.py CHECKPOINT CONFIGS GIVEN OUT

CHECKPOINT is a folder or a single file. CONFIGS is a folder that describes its networks, which single files do not.
GIVEN, a safetensors file, has `latents` `[1, C, H, W]`, `timestep`, and the prompt in its metadata. OUT gets, where the
checkpoint has them, `encoder_hidden_states` and `text_embeds` of the prompt, the UNet's `prediction`, and `image`, what
the autoencoder decodes the latents to, `[1, 3, H, W]` in [0, 1].
"""

import json
import sys
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from safetensors import safe_open
from safetensors.torch import save_file

GUIDANCE = 7.5  # that UNets which imitate guidance are told


def main(checkpoint, configs, given, out):
    """Reads, predicts and writes."""
    pipeline = load(Path(checkpoint), Path(configs))
    with safe_open(given, "pt") as file:
        latents, timestep, prompt = file.get_tensor("latents"), file.get_tensor("timestep"), file.metadata()["prompt"]
    with torch.no_grad():
        save_file(
            {name: value.contiguous() for name, value in predict(pipeline, latents, timestep, prompt).items()}, out
        )


def load(checkpoint, configs):
    """The pipeline of the class that CONFIGS names."""
    xl = json.loads((configs / "model_index.json").read_text())["_class_name"] == "StableDiffusionXLPipeline"
    kind = StableDiffusionXLPipeline if xl else StableDiffusionPipeline
    unused = {"add_watermarker": False} if xl else {"safety_checker": None, "requires_safety_checker": False}
    if checkpoint.is_dir():
        return kind.from_pretrained(checkpoint, torch_dtype=torch.float32, **unused)
    options = {"config": str(configs), "local_files_only": True, "torch_dtype": torch.float32}
    return kind.from_single_file(str(checkpoint), **options, **unused)


def predict(pipeline, latents, timestep, prompt):
    """Everything by the names of OUT."""
    options = {"device": "cpu", "num_images_per_prompt": 1, "do_classifier_free_guidance": False}
    hidden, _, *pooled = pipeline.encode_prompt(prompt, **options)
    found, told = {"encoder_hidden_states": hidden}, {}
    if pooled:
        height, width = (side * pipeline.vae_scale_factor for side in latents.shape[2:])
        found["text_embeds"] = pooled[0]
        told["added_cond_kwargs"] = {
            "text_embeds": pooled[0],
            "time_ids": torch.tensor([[height, width, 0, 0, height, width]], dtype=torch.float32),
        }
    if imitated := pipeline.unet.config.time_cond_proj_dim:
        scale = torch.tensor([GUIDANCE - 1])
        told["timestep_cond"] = pipeline.get_guidance_scale_embedding(scale, embedding_dim=imitated)
    found["prediction"] = pipeline.unet(latents, timestep, encoder_hidden_states=hidden, **told).sample
    decoded = pipeline.vae.decode(latents / pipeline.vae.config.scaling_factor).sample
    return found | {"image": (decoded / 2 + 0.5).clamp(0, 1)}


if __name__ == "__main__":
    main(*sys.argv[1:])
