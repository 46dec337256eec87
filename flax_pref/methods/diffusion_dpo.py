"""Diffusion-DPO (arXiv:2311.12908)."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax

from flax_pref.config import check_positive
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
class DiffusionDPO(LogisticMethod, PairMethod):
    """Diffusion-DPO (arXiv:2311.12908, equation 14), PGD's module.

    loss = mean over pairs of -log sigmoid(-beta / 2 ((L_w - L_w^ref) - (L_l - L_l^ref)))

    Example:
        >>> method = fp.DiffusionDPO(beta=2000.0)
        >>> method.rule(w=2.0, guidance_scale=7.5).networks()
        ('base', 'dpo')
    """

    beta: float = 5000.0
    """Strength of the pull to the reference, in the convention of the authors' code: with the factor 1/2, of errors
    that are means over a latent. Their code has 5000, the paper 2000 for SD1.5. Larger: closer to the reference."""

    modules: ClassVar[tuple[str, ...]] = ("dpo",)

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
        """See `PairMethod`.

        The metrics are `loss`, `accuracy` (share of pairs that the module ranks right against the reference), `winner`
        and `loser` (errors minus those of the reference; a winner's error that rises is the known failure).
        """
        policy = self.modules[0]
        noisy = noisy_images(batch, key, schedule)
        winner, loser = errors(predict, (policy, policy), noisy) - reference_errors(predict, noisy)
        logits = -self.beta / 2 * (winner - loser)
        loss = logistic_loss(logits, self.poly_alpha)
        return loss, pair_metrics(loss, logits, winner, loser)
