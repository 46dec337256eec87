"""SDPO: Diffusion-DPO with a safeguard of the winner (arXiv:2511.03317)."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from flax_pref.config import check_share
from flax_pref.diffusion.sampler import Predict, predict_rows
from flax_pref.diffusion.schedule import NoiseSchedule
from flax_pref.methods.diffusion_dpo import DiffusionDPO
from flax_pref.methods.errors import (
    denoising_error,
    logistic_loss,
    noisy_images,
    pair_metrics,
    reference_errors,
    residual,
)
from flax_pref.shapes import Key, Scalar, Tree


@dataclasses.dataclass(frozen=True, kw_only=True)
class SDPO(DiffusionDPO):
    """The loss of Diffusion-DPO; in its gradient, that of `L_l` counts `safeguard` times, for each pair.

    Example:
        >>> method = fp.SDPO(beta=2000.0, mu=0.9)
        >>> method.modules
        ('sdpo',)
    """

    mu: float
    """Share of the winner's descent that the loser's ascent must leave, 0 to 1: 0.9 for SD1.5 and 0.6 for SDXL in the
    authors' scripts."""

    modules: ClassVar[tuple[str, ...]] = ("sdpo",)

    def __post_init__(self):
        super().__post_init__()
        check_share(self, "mu")

    def loss(
        self,
        predict: Predict,
        batch: Mapping[str, Any],
        key: Key[jax.Array, ""],
        *,
        schedule: NoiseSchedule,
        empty: Tree = None,
    ) -> tuple[Scalar, dict[str, Scalar]]:
        """See `PairMethod`; the metrics are those of `DiffusionDPO` and `safeguard`, the mean over pairs."""
        policy = self.modules[0]
        noisy = noisy_images(batch, key, schedule)
        noise_pred = predict_rows(predict, (policy, policy), noisy.latents, noisy.timesteps, noisy.text)
        winner, loser = denoising_error(noise_pred, noisy.target).T - reference_errors(predict, noisy)
        weight = safeguard(noise_pred, noisy.target, self.mu)
        # The value is that of `loser`, the gradient is `weight` times as large.
        guarded = jax.lax.stop_gradient(loser) + weight * (loser - jax.lax.stop_gradient(loser))
        logits = -self.beta / 2 * (winner - guarded)
        loss = logistic_loss(logits, self.poly_alpha)
        return loss, {**pair_metrics(loss, logits, winner, loser), "safeguard": weight.mean()}


def safeguard(noise_pred: jax.Array, target: jax.Array, mu: float) -> jax.Array:
    """`clip((1 - mu) |g_w|^2 / <g_w, g_l>, 0, 1)` where `<g_w, g_l>` is positive, else 1; a constant.

    `g_w` and `g_l` are the gradients of `L_w` and `L_l` with respect to the predictions, so that a small step
    along `-g_w + weight g_l` still lowers `L_w` by a share `mu` of what `-g_w` does. The authors' code has one number
    for the pairs on a device; here each pair has its own, whatever the batch and the devices.

    Args:
      noise_pred: `[B, 2, H, W, C]`, of winner and loser.
      target: `[B, 1, H, W, C]`, or of each.
      mu: the share.

    Returns:
      `[B]`.
    """
    # Residuals instead of gradients, which are a multiple of them that cancels in the ratio.
    winner, loser = jnp.moveaxis(jax.lax.stop_gradient(residual(noise_pred, target)), 1, 0)
    own, shared = jnp.square(winner).sum(axis=(1, 2, 3)), (winner * loser).sum(axis=(1, 2, 3))
    opposed = shared <= 0
    return jnp.where(opposed, 1.0, jnp.clip((1 - mu) * own / jnp.where(opposed, 1.0, shared), 0.0, 1.0))
