"""LAION's aesthetic score, version 2 (github.com/christophschuhmann/improved-aesthetic-predictor): how much people
like to look at an image, 1 to 10, whatever its caption.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from flax_pref.checkpoints.clip_files import load_clip_vision
from flax_pref.checkpoints.torch_files import read_torch_file
from flax_pref.checkpoints.weights import Placement, TorchTensors
from flax_pref.rewards.clip import normalised
from flax_pref.rewards.preprocessing import OPENAI_MEAN, OPENAI_STD, square_view
from flax_pref.shapes import Float, PerImage, Pixels, Squares

CLIP = "openai/clip-vit-large-patch14"
LAYERS = tuple(f"layers.{number}" for number in (0, 2, 4, 6, 7))  # dropouts lie between


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AestheticScore:
    """Linear layers on the embedding of CLIP ViT-L/14; a `Reward`.

    Attributes:
        params: of the image encoder.
        kernel: `[D]`, all layers in one: there is no activation between them.
        bias: of the same, a scalar.
        graphdef: of the image encoder, a `CLIPVisionModel`.
        image_size: what it sees of an image, in pixels.
    """

    params: dict
    kernel: jax.Array
    bias: jax.Array
    graphdef: nnx.GraphDef = dataclasses.field(metadata={"static": True})
    image_size: int = dataclasses.field(metadata={"static": True})

    name = "aesthetic"
    differentiable = True

    def prepare(self, captions: Sequence[str]) -> tuple[()]:
        """Nothing: captions do not matter."""
        return ()

    def view(self, images: Pixels) -> Squares:
        """See `rewards.reward.Reward`; the size is `image_size`."""
        return square_view(images, self.image_size, OPENAI_MEAN, OPENAI_STD)

    def image_features(self, view: Squares) -> Float[jax.Array, "images features"]:
        """Embeddings of images, in float32 and of length 1."""
        return normalised(nnx.merge(self.graphdef, self.params).encode_images(view))

    def score(self, view: Squares, prepared: tuple[()]) -> PerImage:
        """See `rewards.reward.Reward`."""
        features = self.image_features(view)
        return jnp.matmul(features, self.kernel, precision=jax.lax.Precision.HIGHEST) + self.bias


def load_aesthetic_reward(
    head_path: str | Path | None,
    clip_path: str | Path | None = None,
    *,
    dtype: Any = jnp.float32,
    place: Placement | None = None,
) -> AestheticScore:
    """Reads the layers and the image encoder.

    Args:
        head_path: the authors' `sac+logos+ava1-l14-linearMSE.pth`, or another with the same layers.
        clip_path: of OpenAI's CLIP ViT-L/14, see `checkpoints.clip_files.load_clip`; None: that of the Hub.
        dtype: what the image encoder computes in and keeps its weights in; the layers are float32.
        place: says where each weight of the network goes, see `parallel.pieces`; None: the default device.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a weight is missing or not what is needed, or a file is damaged.
    """
    if head_path is None:
        raise FileNotFoundError(
            "rewards: aesthetic needs the path of its layers; download sac+logos+ava1-l14-linearMSE.pth from "
            "github.com/christophschuhmann/improved-aesthetic-predictor"
        )
    kernel, bias = read_head(head_path)
    clip = CLIP if clip_path is None else clip_path
    network = load_clip_vision(clip, hidden_act="quick_gelu", dtype=dtype, place=place)
    if len(kernel) != network.config.projection_dim:
        raise ValueError(
            f"{head_path}: takes embeddings of {len(kernel)} numbers, and those of {clip} have "
            f"{network.config.projection_dim}; expected CLIP ViT-L/14"
        )
    size = network.config.vision_config.image_size
    return AestheticScore(network.params, kernel, bias, network.graphdef, size)


def read_head(path: str | Path) -> tuple[Float[jax.Array, " features"], Float[jax.Array, ""]]:
    """The layers of a head as one, kernel and bias, multiplied in float64.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged or holds other layers.
    """
    stored = TorchTensors(Path(path), read_torch_file(path))
    names = {f"{layer}.{part}" for layer in LAYERS for part in ("weight", "bias")}
    if stored.keys() != names:
        odd = min(set(stored.keys()) ^ names)
        told = f"no weight {odd!r}" if odd in names else f"weight {odd!r:.80} is too many"
        raise ValueError(f"{path}: {told}; expected weight and bias of {', '.join(LAYERS)}")
    kernel, bias = np.eye(1), np.zeros(1)
    for layer in reversed(LAYERS):
        weight, shift = (stored.get_tensor(f"{layer}.{part}").astype(np.float64) for part in ("weight", "bias"))
        outputs = kernel.shape[1]
        if weight.ndim != 2 or weight.shape[0] != outputs or shift.shape != weight.shape[:1]:
            raise ValueError(
                f"{path}: {layer} has a weight of shape {list(weight.shape)} and a bias of {list(shift.shape)}, "
                f"expected {outputs} outputs"
            )
        if not (np.isfinite(weight).all() and np.isfinite(shift).all()):
            raise ValueError(f"{path}: {layer} holds numbers that are not finite; download it again")
        bias = bias + kernel @ shift
        kernel = kernel @ weight
    return jnp.asarray(kernel[0], jnp.float32), jnp.asarray(bias[0], jnp.float32)
