"""Rewards with shapes instead of weights, for programs that are compiled and not run."""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from flax_pref.checkpoints.blip_files import IMAGE_REWARD
from flax_pref.checkpoints.mps_files import MPS
from flax_pref.checkpoints.weights import abstract_network
from flax_pref.models.blip import ImageRewardConfig
from flax_pref.models.clip_vision import CLIPConfig
from flax_pref.models.mps import MPSConfig
from flax_pref.models.presets import CLIP_VIT_H, CLIP_VIT_L
from flax_pref.rewards.aesthetic import AestheticScore
from flax_pref.rewards.clip import CLIP_SCORES, ClipScore
from flax_pref.rewards.image_reward import TOKENS, ImageReward
from flax_pref.rewards.mps import MPSScore
from flax_pref.rewards.remote import is_service
from flax_pref.rewards.reward import Reward, Weighted, WeightedSum
from flax_pref.shapes import PerImage, Pixels


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MeanColour:
    """A reward that costs nothing, in the place of those without a network of their own."""

    name = "mean colour"
    differentiable = True

    def prepare(self, captions: Sequence[str]) -> tuple[()]:
        """See `rewards.reward.Reward`."""
        return ()

    def view(self, images: Pixels) -> Pixels:
        """See `rewards.reward.Reward`."""
        return images

    def score(self, view: Pixels, prepared: tuple[()]) -> PerImage:
        """See `rewards.reward.Reward`."""
        return view.mean(axis=(1, 2, 3))


def _shape(shape: tuple[int, ...], dtype: Any) -> Any:
    return jax.ShapeDtypeStruct(shape, dtype)


def _ids(length: int, captions: Sequence[str]) -> np.ndarray:
    return np.zeros((len(captions), length), np.int32)


def clip_reward(name: str, dtype: Any, config: CLIPConfig = CLIP_VIT_H) -> Reward:
    """One of `CLIP_SCORES`, with a network of these sizes."""
    network, length = abstract_network("clip", config, dtype), config.text_config.max_position_embeddings
    return ClipScore(network.params, name, network.graphdef, config.vision_config.image_size, partial(_ids, length))


def _aesthetic(name: str, dtype: Any) -> Reward:
    network, image_size = abstract_network("clip_vision", CLIP_VIT_L, dtype), CLIP_VIT_L.vision_config.image_size
    kernel, bias = _shape((CLIP_VIT_L.projection_dim,), jnp.float32), _shape((), jnp.float32)
    return AestheticScore(network.params, kernel, bias, network.graphdef, image_size)


def _image_reward(name: str, dtype: Any) -> Reward:
    def tokenizer(captions: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        return _ids(TOKENS, captions), np.ones((len(captions), TOKENS), bool)

    network = IMAGE_REWARD.abstract(ImageRewardConfig(), dtype)
    return ImageReward(network.params, network.graphdef, network.config.image_size, cast(Any, tokenizer))


def _mps(name: str, dtype: Any) -> Reward:
    network, length = MPS.abstract(MPSConfig(clip=CLIP_VIT_H), dtype), CLIP_VIT_H.text_config.max_position_embeddings
    size = CLIP_VIT_H.vision_config.image_size
    return MPSScore(network.params, _shape((length,), jnp.int32), network.graphdef, size, partial(_ids, length))


NETWORKS: dict[str, Callable[[str, Any], Reward]] = {
    **dict.fromkeys(CLIP_SCORES, clip_reward),
    "aesthetic": _aesthetic,
    "imagereward": _image_reward,
    "mps": _mps,
}


def abstract_reward(rewards: Sequence[Weighted], *, dtype: Any = jnp.float32) -> WeightedSum:
    """The counterpart of `rewards.reward.make_reward`, with networks of their published sizes; paths are not read.

    Rewards without a network of their own, or that live elsewhere, cost nothing.
    """
    parts = tuple(
        NETWORKS[reward.name](reward.name, dtype)
        if reward.name in NETWORKS and not is_service(reward.path)
        else MeanColour()
        for reward in rewards
    )
    return WeightedSum(parts, tuple(reward.weight for reward in rewards))
