"""ImageReward's weights: the one file of its authors, `ImageReward.pt`, or a safetensors file with the same names."""

import math
import re
from pathlib import Path

import jax.numpy as jnp

from flax_pref.checkpoints.hub import find_weights
from flax_pref.checkpoints.weights import Component, Placement, Tensors, fill, open_tensors
from flax_pref.models.blip import ImageRewardConfig, ImageRewardModel
from flax_pref.models.network import Network

PUBLISHED = "zai-org/ImageReward"
FILE = "ImageReward.pt"
EXPECTED = f"expected the weights of ImageReward 1.0 ({FILE} of {PUBLISHED})"

# Names in the file into those of our modules, one after another. Dropout has numbers in the head.
NAMES = (
    (r"^blip\.(visual|text)_encoder\.", r"\1_encoder."),
    (r"^text_encoder\.encoder\.layer\.", "text_encoder.layers."),
    (r"attention\.self\.(query|key|value)\.", r"attention.\1."),
    (r"attention\.output\.dense\.", "attention.dense."),
    (r"attention\.output\.LayerNorm\.", "attention.norm."),
    (r"(layers\.\d+\.(?:intermediate|output))\.dense\.", r"\1."),
    (r"(layers\.\d+)\.output\.LayerNorm\.", r"\1.norm."),
    (r"embeddings\.LayerNorm\.", "embeddings.norm."),
    (r"^mlp\.layers\.2\.", "mlp.layers.1."),
    (r"^mlp\.layers\.4\.", "mlp.layers.2."),
    (r"^mlp\.layers\.6\.", "mlp.layers.3."),
    (r"^mlp\.layers\.7\.", "mlp.layers.4."),
)
# Whatever else BLIP has been trained with, such as its projections, and a buffer.
IGNORED = r"^blip\.(?!visual_encoder\.|text_encoder\.)|\.position_ids$"


IMAGE_REWARD = Component(
    config=ImageRewardConfig,
    module=ImageRewardModel,
    library=lambda config: ("ImageReward", "ImageReward"),
    stem=FILE.removesuffix(".pt"),
    old_names=NAMES,
    ignored=IGNORED,
    described_by="the rest of the file",
)


def find_image_reward(path_or_id: str | Path | None = None) -> Path:
    """The file of the weights.

    Args:
        path_or_id: the file, a folder that holds `ImageReward.pt`, or the id of a Hub repository that does; None: as
            its authors have published it. What exists locally is never looked for on the Hub.

    Raises:
        FileNotFoundError: it is none of these, or it can be neither reached nor found in the cache.
    """
    return find_weights(PUBLISHED if path_or_id is None else path_or_id, FILE, expected=EXPECTED)


def load_image_reward_model(file: str | Path, dtype=jnp.float32, place: Placement | None = None) -> Network:
    """Reads the weights, one by one; the sizes of the network are those of the weights.

    Args:
        file: `.pt`, or `.safetensors` with the same names.
        dtype: what the transformers compute in and keep their weights in; the head is float32.
        place: says where each weight goes; None: the default device.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: weights are missing, too many, of another shape, or not finite, or the file is damaged.
    """
    file = Path(file)
    with open_tensors(file) as tensors:
        names = list(tensors.keys())
        try:
            network = IMAGE_REWARD.abstract(_config(tensors), dtype)
        except (ArithmeticError, ValueError) as error:
            raise ValueError(f"{file}: {error}; {EXPECTED}") from error
    fill(network.params, IMAGE_REWARD, dict.fromkeys(names, file), file, place)
    return network


def _config(tensors: Tensors) -> ImageRewardConfig:
    """Sizes from the shapes of weights."""
    names = set(tensors.keys())

    def shape(name: str, dimensions: int) -> tuple[int, ...]:
        found = tensors.get_tensor(name).shape if name in names else ()
        if len(found) != dimensions:
            raise ValueError(f"no weight {name!r} with {dimensions} dimensions")
        return found

    def layers(prefix: str) -> int:
        return len({found[1] for name in names if (found := re.match(rf"{re.escape(prefix)}\.(\d+)\.", name))})

    vision, text = "blip.visual_encoder", "blip.text_encoder"
    vision_width, _, _, patch_size = shape(f"{vision}.patch_embed.proj.weight", 4)
    vocab_size, text_width = shape(f"{text}.embeddings.word_embeddings.weight", 2)
    return ImageRewardConfig(
        image_size=patch_size * math.isqrt(max(shape(f"{vision}.pos_embed", 3)[1] - 1, 0)),
        patch_size=patch_size,
        vision_width=vision_width,
        vision_mlp_width=shape(f"{vision}.blocks.0.mlp.fc1.weight", 2)[0],
        vision_layers=layers(f"{vision}.blocks"),
        vocab_size=vocab_size,
        max_position_embeddings=shape(f"{text}.embeddings.position_embeddings.weight", 2)[0],
        text_width=text_width,
        text_mlp_width=shape(f"{text}.encoder.layer.0.intermediate.dense.weight", 2)[0],
        text_layers=layers(f"{text}.encoder.layer"),
    )
