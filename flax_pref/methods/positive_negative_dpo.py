"""Diffusion-DPO and NPO as a positive and a negative module, in one run."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax

from flax_pref.config import check_positive
from flax_pref.diffusion.guidance import Rule, cpgd
from flax_pref.diffusion.sampler import Predict
from flax_pref.diffusion.schedule import NoiseSchedule
from flax_pref.methods.errors import (
    PAIR,
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
class PositiveNegativeDPO(LogisticMethod, PairMethod):
    """Diffusion-DPO of the positive module plus NPO of the negative one; each gets the gradient of its own loss.

    Timesteps, noise and the reference's prediction serve both, and both modules run in one batched prediction.

    Example:
        >>> method = fp.PositiveNegativeDPO(beta=2000.0)
        >>> method.rule(w=2.0, guidance_scale=7.5).networks()
        ('base', 'pos', 'neg')
    """

    beta: float = 5000.0
    """Strength of the pull to the reference, of both modules, with the factor 1/2."""

    modules: ClassVar[tuple[str, ...]] = ("pos", "neg")
    independent: ClassVar[bool] = True

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
        """See `PairMethod`; metrics are `loss`, those of DPO after `positive_` and those of NPO after `negative_`."""
        pos, neg = self.modules
        twice = noisy_images(batch, key, schedule, PAIR * 2)
        modules = errors(predict, (pos, pos, neg, neg), twice).reshape(2, 2, -1)
        changes = modules - reference_errors(predict, noisy_images(batch, key, schedule))
        metrics = {}
        for module, sign, (winner, loser) in zip(("positive", "negative"), (1, -1), changes, strict=True):
            logits = -self.beta / 2 * sign * (winner - loser)
            own = pair_metrics(logistic_loss(logits, self.poly_alpha), logits, winner, loser)
            metrics |= {f"{module}_{name}": value for name, value in own.items()}
        loss = metrics["positive_loss"] + metrics["negative_loss"]
        return loss, {"loss": loss, **metrics}

    def rule(self, w: float, guidance_scale: float) -> Rule:
        """cPGD."""
        return cpgd(w, guidance_scale)
