"""D3PO: the better of two images labels every step of their trajectories (arXiv:2311.13231)."""

from collections.abc import Callable, Mapping
from typing import Any

import jax

from flax_pref.diffusion.solvers import step
from flax_pref.objectives.tailorpo import (
    clip_ratio,
    guided_pair,
    mean_product,
    pair_loss,
    pred_coef,
    safe_variance,
)


def d3po(
    predict: Callable,
    batch: Mapping[str, Any],
    key: jax.Array,
    *,
    beta: float,
    guidance_scale: float = 1.0,
    margin: float = 0.0,
    ratio_clip: float | None = None,
    policy: str = "d3po",
    reference: str = "base",
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """`-log sigmoid(beta (log r^w - log r^l))` per pair, `r = p_theta(x_{t-1} | x_t) / p_ref(x_{t-1} | x_t)`.

    Then the mean over the pairs that count. The two trajectories begin in one point but part at the first step, so
    each has an x_t of its own. Log-densities are averaged over the D dimensions, and their difference is taken as

        log r = <x_{t-1} - (mu_theta + mu_ref) / 2, mu_theta - mu_ref> / (D sigma_t^2)

    Args:
      predict: see `tailorpo.tailorpo`.
      batch: as in `tailorpo.tailorpo`, but `latents` and `next_latents [B, 2, H, W, C]`, x_t and x_{t-1} of winner and
        loser, at the same step; the rewards are those of the final images.
      key: not used, nothing is drawn.
      beta: strength of the pull to the reference (0.1 in the authors' code).
      guidance_scale: see `tailorpo.tailorpo` (5 in the authors' code).
      margin: see `tailorpo.tailorpo`.
      ratio_clip: see `tailorpo.tailorpo` (0.1 in the authors' code).
      policy: name of the network that is trained.
      reference: name of the network that it is compared with.

    Returns:
      loss, and the metrics of `tailorpo.pair_loss`.
    """
    row = batch["row"]
    predicted, expected = guided_pair(predict, (policy, reference), batch, batch["latents"], guidance_scale)
    log_ratios = []
    for image in (0, 1):
        shift = pred_coef(row) * (predicted - expected)[:, image]  # mu_theta - mu_ref
        middle = step(batch["latents"][:, image], expected[:, image], row)[0] + shift / 2
        log_ratio = mean_product(batch["next_latents"][:, image] - middle, shift) / safe_variance(row)
        log_ratios.append(clip_ratio(log_ratio, ratio_clip))
    winner, loser = log_ratios
    return pair_loss(beta * (winner - loser), batch, margin)
