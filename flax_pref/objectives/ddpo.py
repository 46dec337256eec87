"""DDPO: policy gradients with importance sampling (arXiv:2305.13301, equation 6 and appendix)."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from flax_pref.diffusion.solvers import log_prob
from flax_pref.objectives.tailorpo import guided


def ddpo(
    predict: Callable,
    batch: Mapping[str, Any],
    key: jax.Array,
    *,
    guidance_scale: float = 1.0,
    ratio_clip: float = 1e-4,
    advantage_clip: float = 10.0,
    policy: str = "ddpo",
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """`-min(A r, A clip(r, 1 - c, 1 + c))` per step, then the mean, where `r = p_theta(x_{t-1} | x_t) / p_old(...)`.

    p_old is the density of the policy that took the step. Densities are averaged over the dimensions of an image, as in
    the authors' code, which is why c is so small.

    Args:
      predict: see `tailorpo.tailorpo`.
      batch: `latents` and `next_latents [B, H, W, C]`, x_t and x_{t-1}; `log_prob [B]` of the step when it was taken;
        `advantage [B]`, see `advantages`; `row`, `text`, `empty` and `reward` as in `tailorpo.tailorpo`.
      key: not used, nothing is drawn.
      guidance_scale: see `tailorpo.tailorpo` (5 in the authors' code).
      ratio_clip: c.
      advantage_clip: largest size of A.
      policy: name of the network that is trained.

    Returns:
      loss, and the metrics `loss`; `clipped`, the share of steps whose ratio is beyond c; `reward`, the mean over the
      batch.
    """
    noise_pred = guided(predict, policy, batch, batch["latents"][:, None], guidance_scale)[:, 0]
    ratio = jnp.exp(log_prob(batch["next_latents"], batch["latents"], noise_pred, batch["row"]) - batch["log_prob"])
    advantage = jnp.clip(batch["advantage"], -advantage_clip, advantage_clip)
    clipped = jnp.clip(ratio, 1 - ratio_clip, 1 + ratio_clip)
    loss = -jnp.minimum(advantage * ratio, advantage * clipped).mean()
    return loss, {
        "loss": loss,
        "clipped": (jnp.abs(ratio - 1) > ratio_clip).mean(),
        "reward": batch["reward"].mean(),
    }


def advantages(rewards: jax.Array) -> jax.Array:
    """`(r - mean) / std` of each image among those of its prompt, `[P, G]`; zero where all are the same.

    The authors' code has running statistics of each prompt; here they are those of the G images that one policy drew.
    """
    spread = rewards.std(axis=1, keepdims=True)
    return (rewards - rewards.mean(axis=1, keepdims=True)) / jnp.where(spread > 0, spread, 1)
