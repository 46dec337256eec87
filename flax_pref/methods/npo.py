"""NPO: Diffusion-DPO with swapped labels (arXiv:2505.11245).

Its weight merge, `theta_neg' = theta_base + a (theta_pos - theta_base) + b (theta_neg - theta_base)`, is
`{"pos": a, "neg": b}` as weights of `models.lora.merge_lora` and `combine_lora`, and
`{"pos": a, "neg": b, "base": -a - b}` as weights of `checkpoints.modules.merge_modules`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax

from flax_pref.config import check_positive
from flax_pref.diffusion.guidance import Rule, npo
from flax_pref.diffusion.sampler import Predict
from flax_pref.diffusion.schedule import NoiseSchedule
from flax_pref.methods.errors import (
    LogisticMethod,
    PairMethod,
    errors,
    logistic_loss,
    noisy_images,
    pair_metrics,
    reference_errors,
)
from flax_pref.shapes import Key, Scalar, Tree


@dataclasses.dataclass(frozen=True, kw_only=True)
class NPO(LogisticMethod, PairMethod):
    """A negative module that prefers losers.

    loss = mean over pairs of -log sigmoid(-beta / 2 ((L_l - L_l^ref) - (L_w - L_w^ref)))

    Example:
        >>> method = fp.NPO(beta=1000.0)
        >>> method.rule(w=1.0, guidance_scale=7.5).networks()
        ('neg', 'base')
    """

    beta: float = 1000.0
    """Strength of the pull to the reference, with the factor 1/2. The authors' trainer for SDXL has this factor too
    (2000 there and here), that for SD1.5 lacks it (500 there is 1000 here)."""

    modules: ClassVar[tuple[str, ...]] = ("neg",)

    def __post_init__(self):
        super().__post_init__()
        check_positive(self, "beta")

    def loss(
        self,
        predict: Predict,
        batch: Mapping[str, Any],
        key: Key[jax.Array, ""],
        *,
        schedule: NoiseSchedule,
        empty: Tree = None,
    ) -> tuple[Scalar, dict[str, Scalar]]:
        """See `PairMethod`; the winner is the image that people prefer, here too.

        The metrics are `loss`, `accuracy` (share of pairs whose loser the module prefers, against the reference),
        `winner` and `loser` (errors minus those of the reference).
        """
        policy = self.modules[0]
        noisy = noisy_images(batch, key, schedule)
        winner, loser = errors(predict, (policy, policy), noisy) - reference_errors(predict, noisy)
        logits = -self.beta / 2 * (loser - winner)
        loss = logistic_loss(logits, self.poly_alpha)
        return loss, pair_metrics(loss, logits, winner, loser)

    def rule(self, w: float, guidance_scale: float) -> Rule:
        """NPO with the base as the positive network; it has no w."""
        return npo(guidance_scale, "base", "neg")
