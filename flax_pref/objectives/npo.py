"""NPO: Diffusion-DPO with swapped labels (arXiv:2505.11245), alone and beside Diffusion-DPO as two modules.

Its weight merge, `theta_neg' = theta_base + a (theta_pos - theta_base) + b (theta_neg - theta_base)`, is
`{"pos": a, "neg": b}` as weights of `models.lora.merge_lora` and `combine_lora`, and
`{"pos": a, "neg": b, "base": -a - b}` as weights of `checkpoints.modules.merge_modules`.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax

from flax_pref.diffusion.schedule import NoiseSchedule
from flax_pref.objectives.denoising import PAIR, errors, noisy_images
from flax_pref.objectives.dpo import logistic_loss, pair_metrics, reference_errors


def npo(
    predict: Callable,
    batch: Mapping[str, Any],
    key: jax.Array,
    *,
    schedule: NoiseSchedule,
    beta: float,
    policy: str = "neg",
    reference: str = "base",
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """`-log sigmoid(-beta / 2 ((L_l - L_l^ref) - (L_w - L_w^ref)))` per pair, then the mean over pairs.

    Args:
      predict: see `dpo.diffusion_dpo`.
      batch: see `dpo.diffusion_dpo`; the winner is the image that people prefer, here too.
      key: draws timesteps and noise.
      schedule: of the noise.
      beta: as in `dpo.diffusion_dpo`, with the factor 1/2. Of the authors' trainers that for SDXL has this factor, so
        its 2000 is 2000 here; that for SD1.5 lacks it, so its 500 is 1000 here.
      policy: name of the network that is trained.
      reference: name of the network that it is compared with.

    Returns:
      loss, and the metrics `loss`, `accuracy` (share of pairs whose loser the policy prefers, against the reference),
      `winner` and `loser` (errors minus those of the reference).

    Raises:
      ValueError: see `denoising.noisy_images`.
    """
    noisy = noisy_images(batch, key, schedule)
    winner, loser = errors(predict, (policy, policy), noisy) - reference_errors(predict, reference, noisy)
    logits = -beta / 2 * (loser - winner)
    loss = logistic_loss(logits)
    return loss, pair_metrics(loss, logits, winner, loser)


def positive_negative_dpo(
    predict: Callable,
    batch: Mapping[str, Any],
    key: jax.Array,
    *,
    schedule: NoiseSchedule,
    beta: float,
    positive: str = "pos",
    negative: str = "neg",
    reference: str = "base",
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Diffusion-DPO of the positive module plus NPO of the negative one; each gets the gradient of its own loss.

    Timesteps, noise and the reference's prediction serve both, and both modules run in one batched prediction.

    Args:
      predict: as in `dpo.diffusion_dpo`, of four rows (positive, positive, negative, negative) and of two (reference).
      batch: see `dpo.diffusion_dpo`.
      key: draws timesteps and noise.
      schedule: of the noise.
      beta: of both, with the factor 1/2; see `dpo.diffusion_dpo` and `npo`.
      positive: name of the module that prefers winners.
      negative: name of the module that prefers losers.
      reference: name of the network that they are compared with.

    Returns:
      loss, and as metrics `loss`, those of `dpo.diffusion_dpo` after `positive_` and those of `npo` after `negative_`.

    Raises:
      ValueError: see `denoising.noisy_images`.
    """
    twice = noisy_images(batch, key, schedule, PAIR * 2)
    modules = errors(predict, (positive, positive, negative, negative), twice).reshape(2, 2, -1)
    changes = modules - reference_errors(predict, reference, noisy_images(batch, key, schedule))
    metrics = {}
    for module, sign, (winner, loser) in zip(("positive", "negative"), (1, -1), changes, strict=True):
        logits = -beta / 2 * sign * (winner - loser)
        own = pair_metrics(logistic_loss(logits), logits, winner, loser)
        metrics |= {f"{module}_{name}": value for name, value in own.items()}
    loss = metrics["positive_loss"] + metrics["negative_loss"]
    return loss, {"loss": loss, **metrics}
