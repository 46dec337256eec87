"""The base model of the demo world, from nothing.

    python -m train.base configs/demo/base.py

Trains a byte-pair tokenizer, an autoencoder (64 x 64 pixels to 8 x 8 x 8 latents), and a UNet with its text encoder,
and writes the diffusers folder runs/base/pipeline/. The folder that ships in flax_pref/world/base/ was made by
these settings from another draw of the initial weights, its layout phase in two runs of 600 and 1600 steps, the first
with a learning rate of 5e-4: a new run gives another network of the same kind.
"""

from pathlib import Path

from flax_pref.demo.pretraining import BaseConfig, Phase
from flax_pref.models.clip import CLIPTextConfig
from flax_pref.models.unet import UNetConfig
from flax_pref.models.vae import VAEConfig

config = BaseConfig(
    output=Path("runs/base"),
    tokenizer_length=24,
    vae=VAEConfig(
        block_out_channels=(8, 16, 48, 64),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=8,
        norm_num_groups=4,
        sample_size=64,
        force_upcast=False,
    ),
    unet=UNetConfig(
        sample_size=8,
        in_channels=8,
        out_channels=8,
        block_out_channels=(64, 128),
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=128,
        attention_head_dim=4,  # the number of heads, as in Stable Diffusion's own files
        norm_num_groups=16,
        use_linear_projection=True,
    ),
    text_encoder=CLIPTextConfig(
        hidden_size=128,
        intermediate_size=512,
        projection_dim=128,
        num_hidden_layers=2,
        num_attention_heads=4,
    ),
    autoencoder=Phase(steps=5000, batch_size=8, learning_rate=2e-3, average_decay=0.995),
    decoder=Phase(steps=5000, batch_size=8, learning_rate=1e-3, average_decay=0.995),
    diffusion=Phase(steps=5500, batch_size=64, learning_rate=1e-3, warmup_steps=200, average_decay=0.999),
    layout=Phase(steps=2200, batch_size=64, learning_rate=8e-4, average_decay=0.998, largest_weight=20.0),
)
