"""DMPO: Divergence Minimization Preference Optimization (arXiv:2507.07510)."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from flax_pref.config import check_field, check_positive
from flax_pref.diffusion.sampler import Predict
from flax_pref.diffusion.schedule import NoiseSchedule
from flax_pref.methods.errors import PairMethod, errors, noisy_images, pair_metrics, reference_errors
from flax_pref.shapes import Key, PerImage, Scalar, Tree


@dataclasses.dataclass(frozen=True, kw_only=True)
class DMPO(PairMethod):
    """The reverse KL divergence, of the module's preference from the labels (arXiv:2507.07510).

        loss = mean over pairs of p log(p / q) + (1 - p) log((1 - p) / (1 - q)), q = 1 - alpha

    p is the sigmoid of Diffusion-DPO's logit, q what the labels say of a winner. The abstract of the paper names the
    direction of the divergence. The formula is read in code of others (AIDC-AI/Diffusion-SDPO, train.py), which has
    DMPO as a method beside its own; the authors' code and the paper's equations have not been compared.

    Derived here: the gradient with respect to the logit u is `p (1 - p) (u - log(q / (1 - q)))`. So the loss is least
    at the finite logit log(q / (1 - q)), 4.6 for alpha 0.01, and a pair with p close to 0 hardly counts.

    Example:
        >>> method = fp.DMPO(beta=2000.0, alpha=0.01)
        >>> method.rule(w=1.0, guidance_scale=7.5).networks()
        ('base', 'dmpo')
    """

    beta: float = 2000.0
    """Strength of the pull to the reference, with the factor 1/2; 2000 for SD1.5 and 6000 for SDXL in that code."""
    alpha: float = 0.01
    """Share of labels that are taken to be wrong, above 0 and below 1/2; 0.01 in that code."""

    modules: ClassVar[tuple[str, ...]] = ("dmpo",)

    def __post_init__(self):
        check_positive(self, "beta")
        check_field(self, "alpha", 0 < self.alpha < 0.5, "above 0 and below 0.5")

    def loss(
        self,
        predict: Predict,
        batch: Mapping[str, Any],
        key: Key[jax.Array, ""],
        *,
        schedule: NoiseSchedule,
        empty: Tree = None,
    ) -> tuple[Scalar, dict[str, Scalar]]:
        """See `PairMethod`; before any training the loss is `-log(4 alpha (1 - alpha)) / 2`, 1.61 for alpha 0.01.

        The metrics are those of `DiffusionDPO`.
        """
        policy = self.modules[0]
        noisy = noisy_images(batch, key, schedule)
        winner, loser = errors(predict, (policy, policy), noisy) - reference_errors(predict, noisy)
        logits = -self.beta / 2 * (winner - loser)
        loss = self.divergence(logits).mean()
        return loss, pair_metrics(loss, logits, winner, loser)

    def divergence(self, logits: PerImage) -> PerImage:
        """KL of each pair, finite and without cancellation for any finite logit."""
        right = jax.nn.sigmoid(logits) * (jax.nn.log_sigmoid(logits) - jnp.log1p(-self.alpha))
        wrong = jax.nn.sigmoid(-logits) * (jax.nn.log_sigmoid(-logits) - jnp.log(self.alpha))
        return right + wrong
