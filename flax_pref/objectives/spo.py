"""SPO: the best and the worst of a pool of steps from the same latents (arXiv:2406.04314)."""

from collections.abc import Callable, Mapping
from typing import Any

import jax

from flax_pref.objectives.tailorpo import tailorpo


def spo(
    predict: Callable,
    batch: Mapping[str, Any],
    key: jax.Array,
    *,
    beta: float,
    guidance_scale: float = 1.0,
    margin: float = 0.0,
    ratio_clip: float | None = None,
    policy: str = "spo",
    reference: str = "base",
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """`-log sigmoid(beta (log p_theta / p_ref (x^w | x_t) - log p_theta / p_ref (x^l | x_t)))`, the mean over pairs.

    Per pair it is the loss of TailorPO, of which this is a name with a module of its own; what differs is how pairs
    come about: from a pool of candidates, and each trajectory goes on from one of them at random.

    Args:
      predict: see `tailorpo.tailorpo`.
      batch: see `tailorpo.tailorpo`.
      key: not used, nothing is drawn.
      beta: strength of the pull to the reference (10 in the authors' code).
      guidance_scale: see `tailorpo.tailorpo` (5 in the authors' code).
      margin: see `tailorpo.tailorpo`.
      ratio_clip: see `tailorpo.tailorpo` (0.1 in the authors' code).
      policy: name of the network that is trained.
      reference: name of the network that it is compared with.

    Returns:
      loss, and the metrics of `tailorpo.pair_loss`.
    """
    return tailorpo(
        predict,
        batch,
        key,
        beta=beta,
        guidance_scale=guidance_scale,
        margin=margin,
        ratio_clip=ratio_clip,
        policy=policy,
        reference=reference,
    )
