"""Names of layers in the code that Stable Diffusion was released with, by their names in our modules and in diffusers.

Single files keep the weights of whole checkpoints under these names, sd-scripts its adapters for SDXL, and OpenCLIP its
text encoders.
"""

from collections.abc import Iterable, Mapping

from flax_pref.models.unet import UNetConfig
from flax_pref.models.vae import VAEConfig

# Layers inside a block.
UNET_LAYERS = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
VAE_LAYERS = {
    "conv_shortcut": "nin_shortcut",
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
}
# Parts of OpenCLIP's names; the packed weights of an attention are told apart as `checkpoints.clip_files` does.
OPENCLIP_TEXT = (
    ("text_model.embeddings.token_embedding.weight", "token_embedding.weight"),
    ("text_model.embeddings.position_embedding.weight", "positional_embedding"),
    ("text_model.encoder.layers.", "transformer.resblocks."),
    ("text_model.final_layer_norm.", "ln_final."),
    ("text_projection.weight", "text_projection"),
    (".layer_norm1.", ".ln_1."),
    (".layer_norm2.", ".ln_2."),
    *((f".self_attn.{x}_proj.{leaf}", f".attn.in_proj_{leaf}[{x}]") for x in "qkv" for leaf in ("weight", "bias")),
    (".self_attn.out_proj.", ".attn.out_proj."),
    (".mlp.fc1.", ".mlp.c_fc."),
    (".mlp.fc2.", ".mlp.c_proj."),
)


def unet_layers(layers: Iterable[str], config: UNetConfig) -> dict[str, str]:
    """The original name of each layer of a UNet, such as `down_blocks.0.resnets.0.conv1`.

    Raises:
        ValueError: a layer is not part of such a UNet.
    """
    return _renamed(layers, _unet_blocks(config), UNET_LAYERS, "a UNet")


def vae_layers(layers: Iterable[str], config: VAEConfig) -> dict[str, str]:
    """The original name of each layer of an autoencoder; arguments and errors as `unet_layers`."""
    return _renamed(layers, _vae_blocks(config), VAE_LAYERS, "an autoencoder")


def openclip_text(name: str) -> str:
    """OpenCLIP's name of a weight of a text encoder."""
    for ours, theirs in OPENCLIP_TEXT:
        name = name.replace(ours, theirs)
    return name


def _renamed(layers: Iterable[str], blocks: Mapping[str, str], inner: Mapping[str, str], whole: str) -> dict[str, str]:
    names = {}
    for layer in layers:
        block = next((block for block in blocks if f"{layer}.".startswith(f"{block}.")), None)
        if block is None:
            raise ValueError(f"layer {layer!r} is not part of {whole} of this config: check that they belong together")
        rest = layer[len(block) + 1 :]
        names[layer] = ".".join(filter(None, (blocks[block], inner.get(rest, rest))))
    return names


def _unet_blocks(config: UNetConfig) -> dict[str, str]:
    """The original code numbers the layers of all blocks through."""
    names = {
        "conv_in": "input_blocks.0.0",
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "time_embedding.cond_proj": "time_embed.cond_proj",
        "add_embedding.linear_1": "label_emb.0.0",
        "add_embedding.linear_2": "label_emb.0.2",
        "mid_block.resnets.0": "middle_block.0",
        "mid_block.attentions.0": "middle_block.1",
        "mid_block.resnets.1": "middle_block.2",
        "conv_norm_out": "out.0",
        "conv_out": "out.2",
    }
    step = config.layers_per_block + 1  # a down block has one resnet less than an up block, and the downsampling
    for i, up_block in enumerate(config.up_block_types):
        for j in range(step):
            for index, part in enumerate(("resnets", "attentions")):
                names[f"down_blocks.{i}.{part}.{j}"] = f"input_blocks.{i * step + j + 1}.{index}"
                names[f"up_blocks.{i}.{part}.{j}"] = f"output_blocks.{i * step + j}.{index}"
        names[f"down_blocks.{i}.downsamplers.0.conv"] = f"input_blocks.{(i + 1) * step}.0.op"
        index = 2 if up_block.startswith("CrossAttn") else 1
        names[f"up_blocks.{i}.upsamplers.0"] = f"output_blocks.{(i + 1) * step - 1}.{index}"
    return names


def _vae_blocks(config: VAEConfig) -> dict[str, str]:
    """The original code numbers the blocks on the way up from the end."""
    names = {name: name for name in ("quant_conv", "post_quant_conv")}
    for half in ("encoder", "decoder"):
        names |= {f"{half}.{name}": f"{half}.{name}" for name in ("conv_in", "conv_out")}
        names |= {f"{half}.conv_norm_out": f"{half}.norm_out", f"{half}.mid_block.attentions.0": f"{half}.mid.attn_1"}
        names |= {f"{half}.mid_block.resnets.{j}": f"{half}.mid.block_{j + 1}" for j in range(2)}
    depth = len(config.block_out_channels)
    for i in range(depth):
        up = depth - 1 - i
        names |= {
            f"encoder.down_blocks.{i}.resnets.{j}": f"encoder.down.{i}.block.{j}"
            for j in range(config.layers_per_block)
        }
        names |= {
            f"decoder.up_blocks.{i}.resnets.{j}": f"decoder.up.{up}.block.{j}"
            for j in range(config.layers_per_block + 1)
        }
        names[f"encoder.down_blocks.{i}.downsamplers.0"] = f"encoder.down.{i}.downsample"
        names[f"decoder.up_blocks.{i}.upsamplers.0"] = f"decoder.up.{up}.upsample"
    return names
