"""Rewards of latents: through the autoencoder, a few images at a time."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from flax_pref.diffusion.latents import PIXELS
from flax_pref.models.network import Network, with_remat
from flax_pref.parallel.pieces import piece_specs, with_gathered
from flax_pref.rewards.reward import Reward, scores_of
from flax_pref.shapes import Latents, PerImage, Pixels, Tree


def score_latents(
    reward: Reward, vae: Network, latents: Latents, prepared: Tree, *, sharding: NamedSharding | None = None
) -> PerImage:
    """Scores of decoded latents; to be called while JAX traces.

    Args:
        reward: scores images.
        vae: the autoencoder.
        latents: scaled and clean.
        prepared: what the reward has made of the B captions.
        sharding: of the leading axis over the devices of a mesh, each of which decodes its own images and has the
            autoencoder to itself, and a piece of the reward's weights, see `parallel.pieces`; None for one device.

    Returns:
        float32 scores.
    """
    return _on_each_device(_score, PIXELS, reward, vae, latents, prepared, sharding)


def decode_and_score(
    rewards: Sequence[Reward], vae: Network, latents: Latents, prepared: Sequence[Tree], *, sharding=None
) -> tuple[Pixels, tuple[PerImage, ...]]:
    """Decoded images, for rewards that live elsewhere, and their scores by those that do not.

    Args:
        rewards: score images on the devices; there may be none.
        vae: as in `score_latents`.
        latents: as in `score_latents`.
        prepared: what each of the rewards has made of the B captions.
        sharding: as in `score_latents`.

    Returns:
        images in [0, 1], and float32 scores by each reward.
    """

    def by_each(rewards, images, prepared):
        return tuple(_scores(reward, images, told) for reward, told in zip(rewards, prepared, strict=True))

    def both(judge, vae, latents, prepared):
        images = _decoded(vae, latents)
        return images, judge(by_each, images, prepared)

    return _on_each_device(both, PIXELS, tuple(rewards), vae, latents, tuple(prepared), sharding)


def score_gradients(
    reward: Reward, vae: Network, latents: Latents, prepared: Tree, *, sharding: NamedSharding | None = None
) -> Latents:
    """Gradients of scores with respect to latents; arguments as in `score_latents`.

    A quarter as many images at a time as when they are only scored, and the activations of one block of the autoencoder
    at a time: memory is bounded, whatever the batch.
    """
    vae = with_remat(vae, "block")

    def gradients(judge, vae, latents, prepared):
        return jax.grad(lambda latents: _score(judge, vae, latents, prepared).sum())(latents)

    return _on_each_device(gradients, PIXELS // 4, reward, vae, latents, prepared, sharding)


def _score(judge: Callable, vae: Network, latents: Latents, prepared: Tree) -> PerImage:
    return judge(_scores, _decoded(vae, latents), prepared)


def _scores(reward: Reward, images: Pixels, prepared: Tree) -> PerImage:
    return scores_of(reward, reward.view(images), prepared)


def _decoded(vae: Network, latents: Latents) -> Pixels:
    images = nnx.merge(vae.graphdef, vae.params).decode(latents / vae.config.scaling_factor)
    return jnp.clip((images.astype(jnp.float32) + 1) / 2, 0, 1)


def _on_each_device(
    score: Callable, pixels: int, reward: Any, vae: Network, latents: Latents, prepared: Tree, sharding
) -> Any:
    """`score(judge, vae, latents, prepared)` of so many pixels at a time on each device.

    `judge(function, *arrays)` is `function(reward, *arrays)`.
    """
    images_at_once = pixels // (latents.shape[1] * latents.shape[2] * vae.config.downscale_factor**2)
    specs = () if sharding is None else piece_specs(reward, sharding.mesh)

    def local(pieces, params, latents, prepared):
        def judge(function, *arrays):
            return with_gathered(function, pieces, specs, *arrays)

        own = vae._replace(params=params)
        return in_turns(lambda group: score(judge, own, *group), (latents, prepared), images_at_once)

    if sharding is not None:
        everywhere, divided = PartitionSpec(), sharding.spec
        # By hand and not by the compiler: a reward may call the host, which the compiler would have one device do. What
        # kernels return does not say over which axes it varies, which the check would ask for.
        local = jax.shard_map(
            local,
            mesh=sharding.mesh,
            in_specs=(specs, everywhere, divided, divided),
            out_specs=divided,
            check_vma=False,
        )
    return local(reward, vae.params, latents, prepared)


def in_turns(function: Callable, arrays: Tree, most: int) -> Any:
    """`function` of a pytree of arrays `[B, ...]`, for as many rows at a time as divide B, up to `most`, or one."""
    count = len(jax.tree.leaves(arrays)[0])
    at_once = rows_at_once(count, most)
    groups = jax.tree.map(lambda x: x.reshape(-1, at_once, *x.shape[1:]), arrays)
    return jax.tree.map(lambda x: x.reshape(count, *x.shape[2:]), jax.lax.map(function, groups))


def rows_at_once(count: int, most: int) -> int:
    """The largest divisor of a count up to `most`, or one."""
    return max(n for n in range(1, max(1, min(count, most)) + 1) if count % n == 0)
