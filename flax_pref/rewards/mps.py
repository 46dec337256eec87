"""MPS (arXiv:2405.14705): which image people would choose, over all; CLIP that looks at what the prompt asks for."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from flax_pref.checkpoints.mps_files import find_mps, load_mps_model
from flax_pref.checkpoints.weights import Placement
from flax_pref.rewards.clip import clip_tokenizer_of, normalised
from flax_pref.rewards.preprocessing import OPENAI_MEAN, OPENAI_STD, clip_view
from flax_pref.shapes import Int, PerImage, Pixels, Squares, TokenIds

# What people look at in an image, for the score over all: the words of the authors' evaluation.
CONDITION = (
    "light, color, clarity, tone, style, ambiance, artistry, shape, face, hair, hands, limbs, structure, instance, "
    "texture, quantity, attributes, position, number, location, word, things."
)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MPSScore:
    """`exp(logit_scale)` times the cosine of prompt and image, which has looked at the prompt; see `load_mps_reward`.

    Attributes:
        params: of the network.
        condition: token ids of `CONDITION`, `[T]`.
        graphdef: of the network, a `models.mps.MPSModel`.
        image_size: what it sees of an image, in pixels.
        tokenize: `[B]` captions to ids `[B, T]`.
    """

    params: dict
    condition: Int[jax.Array, " tokens"]
    graphdef: nnx.GraphDef = dataclasses.field(metadata={"static": True})
    image_size: int = dataclasses.field(metadata={"static": True})
    tokenize: Callable[[Sequence[str]], np.ndarray] = dataclasses.field(metadata={"static": True})

    name = "mps"
    differentiable = True

    def prepare(self, captions: Sequence[str]) -> Int[np.ndarray, "images tokens"]:
        """Token ids; a caption that is too long is cut, with its end token kept."""
        return self.tokenize(captions)

    def view(self, images: Pixels) -> Squares:
        """See `rewards.reward.Reward`; the size is `image_size`."""
        return clip_view(images, self.image_size, OPENAI_MEAN, OPENAI_STD)

    def score(self, view: Squares, prepared: TokenIds) -> PerImage:
        """See `rewards.reward.Reward`."""
        network = nnx.merge(self.graphdef, self.params)
        images, texts = network(view, prepared, self.condition)
        return jnp.exp(network.logit_scale[...]) * (normalised(images) * normalised(texts)).sum(axis=-1)


def load_mps_reward(
    path: str | None = None, *, tokenizer: str | None = None, dtype: Any = jnp.float32, place: Placement | None = None
) -> MPSScore:
    """Reads the scorer.

    Args:
        path: `MPS_overall_checkpoint.pth`, safetensors made of it, or the id of a Hub repository with the latter; see
            `checkpoints.mps_files.find_mps`.
        tokenizer: folder of CLIP's tokenizer, or the id of a Hub repository; None: the one beside the weights, else
            OpenAI's on the Hub.
        dtype: what the network computes in and keeps its weights in.
        place: says where each weight of the network goes, see `parallel.pieces`; None: the default device.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is not what it should be.
    """
    file = find_mps(path)
    network = load_mps_model(file, dtype, place)
    words = clip_tokenizer_of(file.parent, tokenizer, network.config.clip.text_config)
    condition = jnp.asarray(words([CONDITION])[0])
    size = network.config.clip.vision_config.image_size
    return MPSScore(network.params, condition, network.graphdef, size, words.__call__)
