"""The networks of Stable Diffusion 1.5 and SDXL, and CLIP ViT-H/14, by size: for programs that need no checkpoint.

The fields are those of the config files that the checkpoints are published with; a checkpoint's own files always decide
what is loaded from it.
"""

from typing import Any, NamedTuple

from flax_pref.models.clip import CLIPTextConfig
from flax_pref.models.clip_vision import CLIPConfig, CLIPVisionConfig
from flax_pref.models.unet import UNetConfig
from flax_pref.models.vae import VAEConfig


class Family(NamedTuple):
    """The networks of a checkpoint.

    Attributes:
        unet: predicts the noise.
        vae: between images and latents.
        text_encoders: one, or two.
        resolution: side of its images in pixels.
        scheduler_config: of the scheduler that it ships with.
    """

    unet: UNetConfig
    vae: VAEConfig
    text_encoders: tuple[CLIPTextConfig, ...]
    resolution: int
    scheduler_config: dict[str, Any]


_SCHEDULE = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "steps_offset": 1,
    "clip_sample": False,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
}
_VAE = VAEConfig(
    block_out_channels=(128, 256, 512, 512),
    down_block_types=("DownEncoderBlock2D",) * 4,
    up_block_types=("UpDecoderBlock2D",) * 4,
    layers_per_block=2,
    sample_size=512,
)
# CLIP ViT-L/14's text encoder.
_CLIP_L = CLIPTextConfig(
    hidden_size=768,
    intermediate_size=3072,
    projection_dim=768,
    num_attention_heads=12,
    bos_token_id=0,
    eos_token_id=2,
)
# OpenCLIP ViT-bigG/14's, with projection.
_CLIP_BIG_G = CLIPTextConfig(
    architectures=("CLIPTextModelWithProjection",),
    hidden_size=1280,
    intermediate_size=5120,
    projection_dim=1280,
    num_hidden_layers=32,
    num_attention_heads=20,
    hidden_act="gelu",
    bos_token_id=0,
    eos_token_id=2,
)

SD15 = Family(
    unet=UNetConfig(sample_size=64, cross_attention_dim=768),
    vae=_VAE,
    text_encoders=(_CLIP_L,),
    resolution=512,
    scheduler_config={"_class_name": "PNDMScheduler", **_SCHEDULE},
)
SDXL = Family(
    unet=UNetConfig(
        sample_size=128,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(320, 640, 1280),
        cross_attention_dim=2048,
        transformer_layers_per_block=(1, 2, 10),
        attention_head_dim=(5, 10, 20),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    ),
    vae=VAEConfig(**{**vars(_VAE), "sample_size": 1024, "scaling_factor": 0.13025}),
    text_encoders=(_CLIP_L, _CLIP_BIG_G),
    resolution=1024,
    scheduler_config={"_class_name": "EulerDiscreteScheduler", **_SCHEDULE, "timestep_spacing": "leading"},
)
FAMILIES = {"sd15": SD15, "sdxl": SDXL}
# Of CLIP score, PickScore, HPSv2 and MPS.
CLIP_VIT_H = CLIPConfig(
    text_config=CLIPTextConfig(
        hidden_size=1024,
        intermediate_size=4096,
        projection_dim=1024,
        num_hidden_layers=24,
        num_attention_heads=16,
        hidden_act="gelu",
    ),
    vision_config=CLIPVisionConfig(
        hidden_size=1280,
        intermediate_size=5120,
        num_hidden_layers=32,
        num_attention_heads=16,
        patch_size=14,
        hidden_act="gelu",
    ),
    projection_dim=1024,
)
# OpenAI's, of the aesthetic score.
CLIP_VIT_L = CLIPConfig(
    text_config=CLIPTextConfig(hidden_size=768, intermediate_size=3072, projection_dim=768, num_attention_heads=12),
    vision_config=CLIPVisionConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, patch_size=14
    ),
    projection_dim=768,
)
