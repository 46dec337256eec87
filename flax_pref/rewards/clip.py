"""CLIP score (arXiv:2104.08718), PickScore (arXiv:2305.01569) and HPS v2 (arXiv:2306.09341): how near CLIP puts an
image to its caption.
"""

import dataclasses
import html
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from flax_pref.checkpoints.clip_files import TOKENIZER_FILES, find_clip, load_clip
from flax_pref.checkpoints.hub import find_file, find_files
from flax_pref.checkpoints.tokenizer import CLIPTokenizer, load_tokenizer
from flax_pref.checkpoints.weights import Placement
from flax_pref.rewards.preprocessing import OPENAI_MEAN, OPENAI_STD, clip_view, padded_view
from flax_pref.shapes import Float, Int, PerImage, Pixels, Squares, TokenIds

TOKENIZER = "openai/clip-vit-large-patch14"  # the vocabulary of all of them
RESIZED = {"hpsv2": "unrounded", "hpsv2.1": "unrounded"}  # scores of versions that rounded are others
CURLY = str.maketrans("\u2018\u2019\u201a\u201b\u201c\u201d\u201e\u201f", "''''\"\"\"\"")


def _as_open_clip(caption: str) -> str:
    """A text as OpenCLIP's tokenizer cleans it first, without its repair of wrongly decoded texts."""
    return html.unescape(html.unescape(caption.translate(CURLY)))


class ScoreKind(NamedTuple):
    """What distinguishes the scores.

    Attributes:
        repository: of the Hub.
        file: of the repository, in the form of OpenCLIP; None: a folder of transformers.
        view: how images become squares.
        scaled: whether the cosine is multiplied by the network's own scale.
        clean: what is done to captions before they are tokenized.
    """

    repository: str
    file: str | None
    view: Callable
    scaled: bool
    clean: Callable[[str], str]


CLIP_SCORES = {
    "clip": ScoreKind("laion/CLIP-ViT-H-14-laion2B-s32B-b79K", None, clip_view, False, str),
    "pickscore": ScoreKind("yuvalkirstain/PickScore_v1", None, clip_view, True, str),
    "hpsv2": ScoreKind("xswu/HPSv2", "HPS_v2_compressed.pt", padded_view, False, _as_open_clip),
    "hpsv2.1": ScoreKind("xswu/HPSv2", "HPS_v2.1_compressed.pt", padded_view, False, _as_open_clip),
}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ClipScore:
    """The cosine of an image's and a caption's embedding, for PickScore times `exp(logit_scale)`; a `Reward`.

    Attributes:
        name: one of `CLIP_SCORES`.
        params: of the network.
        graphdef: of the network, a `CLIPModel`.
        image_size: what it sees of an image, in pixels.
        tokenize: `[B]` captions to ids `[B, T]`.
    """

    params: dict
    name: str = dataclasses.field(metadata={"static": True})
    graphdef: nnx.GraphDef = dataclasses.field(metadata={"static": True})
    image_size: int = dataclasses.field(metadata={"static": True})
    tokenize: Callable[[Sequence[str]], np.ndarray] = dataclasses.field(metadata={"static": True})

    differentiable = True

    def prepare(self, captions: Sequence[str]) -> Int[np.ndarray, "images tokens"]:
        """Token ids; a caption that is too long is cut, with its end token kept, as the authors cut it."""
        return self.tokenize([CLIP_SCORES[self.name].clean(caption) for caption in captions])

    def view(self, images: Pixels) -> Squares:
        """See `rewards.reward.Reward`; the size is `image_size`."""
        return CLIP_SCORES[self.name].view(images, self.image_size, OPENAI_MEAN, OPENAI_STD)

    def image_features(self, view: Squares) -> Float[jax.Array, "images features"]:
        """Embeddings of images, in float32 and of length 1."""
        return normalised(nnx.merge(self.graphdef, self.params).encode_images(view))

    def score(self, view: Squares, prepared: TokenIds) -> PerImage:
        """See `rewards.reward.Reward`."""
        clip = nnx.merge(self.graphdef, self.params)
        cosine = (normalised(clip.encode_images(view)) * normalised(clip.encode_texts(prepared))).sum(axis=-1)
        return jnp.exp(clip.logit_scale[...]) * cosine if CLIP_SCORES[self.name].scaled else cosine


def normalised(features: Float[jax.Array, "images features"]) -> Float[jax.Array, "images features"]:
    """Vectors of length 1, in float32 or more."""
    features = features.astype(jnp.promote_types(features.dtype, jnp.float32))
    return features / jnp.linalg.norm(features, axis=-1, keepdims=True)


def load_clip_reward(
    name: str,
    path: str | Path | None = None,
    *,
    tokenizer: str | Path | None = None,
    dtype: Any = jnp.float32,
    place: Placement | None = None,
) -> ClipScore:
    """Reads a score's network and its tokenizer.

    Args:
        name: "clip", "pickscore", "hpsv2" or "hpsv2.1".
        path: of the network, see `checkpoints.clip_files.load_clip` (an OpenCLIP file is taken to have the exact GELU,
            as all ViT-H/14 have); None: as its authors published it on the Hub.
        tokenizer: folder of the tokenizer, or the id of a Hub repository; None: that beside the network, else that of
            OpenAI's CLIP on the Hub.
        dtype: what the network computes in and keeps its weights in.
        place: says where each weight of the network goes, see `parallel.pieces`; None: the default device.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: there is no such score, a weight is not what the network needs, or a file is damaged.
    """
    if name not in CLIP_SCORES:
        raise ValueError(f"rewards: no CLIP score {name!r}; expected one of {', '.join(CLIP_SCORES)}")
    kind = CLIP_SCORES[name]
    if path is not None:
        there = find_clip(path)
    else:
        there = find_clip(kind.repository) if kind.file is None else find_file(kind.repository, kind.file)
    network = load_clip(there, dtype=dtype, place=place)
    words = clip_tokenizer_of(there, tokenizer, network.config.text_config)
    return ClipScore(network.params, name, network.graphdef, network.config.vision_config.image_size, words.__call__)


def clip_tokenizer_of(place: Path, given: str | Path | None, config: Any) -> CLIPTokenizer:
    """The tokenizer that is given, lies beside the network, or is on the Hub; for texts as long as it takes."""
    if given is None and any((place / name).is_file() for name in ("vocab.json", "tokenizer.json")):
        given = place
    try:
        folder = find_files(TOKENIZER if given is None else given, TOKENIZER_FILES)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{place}: no tokenizer beside it ({error}); pass tokenizer=FOLDER with CLIP's vocab.json and merges.txt"
        ) from error
    words = dataclasses.replace(load_tokenizer(folder), model_max_length=config.max_position_embeddings)
    if (largest := max(words.size - 1, *words.vocab.values())) >= config.vocab_size:
        raise ValueError(
            f"{folder}: the tokenizer has ids up to {largest}, the network of {place} only "
            f"{config.vocab_size} tokens; pass the tokenizer of that network"
        )
    return words
