"""ImageReward 1.0 (arXiv:2304.05977): what people would say of an image and its prompt, by BLIP."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from flax_pref.checkpoints.bert_tokenizer import FILE as VOCABULARY
from flax_pref.checkpoints.bert_tokenizer import BertTokenizer, load_bert_tokenizer
from flax_pref.checkpoints.blip_files import find_image_reward, load_image_reward_model
from flax_pref.checkpoints.weights import Placement
from flax_pref.rewards.preprocessing import OPENAI_MEAN, OPENAI_STD, square_view
from flax_pref.shapes import Array, Bool, Int, PerImage, Pixels, Squares, TokenIds

TOKENS = 35  # of a prompt, start and end included; what is beyond is not seen
# Of the scores that the network gives, over its authors' images: ImageReward.mean and .std of their code.
MEAN = 0.16717362830052426
STD = 1.0333394966054072


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class ImageReward:
    """Standardised scores: 0 for the average image of its authors, mostly between -2 and 2; see `load_image_reward`."""

    params: dict
    graphdef: nnx.GraphDef = dataclasses.field(metadata={"static": True})
    image_size: int = dataclasses.field(metadata={"static": True})
    tokenizer: BertTokenizer = dataclasses.field(metadata={"static": True})

    name = "imagereward"
    differentiable = True

    def prepare(self, captions: Sequence[str]) -> tuple[Int[np.ndarray, "images 35"], Bool[np.ndarray, "images 35"]]:
        """Token ids, and where these are not padding."""
        return self.tokenizer(captions)

    def view(self, images: Pixels) -> Squares:
        """See `rewards.reward.Reward`; the size is `image_size`."""
        return square_view(images, self.image_size, OPENAI_MEAN, OPENAI_STD)

    def score(self, view: Squares, prepared: tuple[TokenIds, Bool[Array, "images tokens"]]) -> PerImage:
        """See `rewards.reward.Reward`."""
        scores = nnx.merge(self.graphdef, self.params)(view, *prepared)
        return (scores - MEAN) / STD


def load_image_reward(
    path: str | None = None, *, tokenizer: str | None = None, dtype=jnp.float32, place: Placement | None = None
) -> ImageReward:
    """Reads the scorer.

    Args:
        path: `ImageReward.pt`, a safetensors file with the same names, a folder that holds the former, or the id of a
            Hub repository that does; None: as published on the Hub.
        tokenizer: vocab.txt of BERT, uncased, or a folder that holds it; None: the one beside the weights, else as
            published on the Hub.
        dtype: what the transformers compute in and keep their weights in; the head is float32.
        place: says where each weight of the network goes, see `parallel.pieces`; None: the default device.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is not what it should be, or the vocabulary has more tokens than the network knows.
    """
    file = find_image_reward(path)
    beside = file.with_name(VOCABULARY)
    tokens = load_bert_tokenizer(beside if tokenizer is None and beside.is_file() else tokenizer, length=TOKENS)
    network = load_image_reward_model(file, dtype, place)
    if tokens.vocab_size > network.config.vocab_size:
        raise ValueError(
            f"{tokenizer or beside}: {tokens.vocab_size} tokens, of which BLIP adds two, but {file} knows "
            f"{network.config.vocab_size}; expected {VOCABULARY} of BERT, uncased"
        )
    return ImageReward(network.params, network.graphdef, network.config.image_size, tokens)
