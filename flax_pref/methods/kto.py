"""Diffusion-KTO (arXiv:2404.04465)."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from flax_pref.config import check_positive
from flax_pref.diffusion.sampler import Predict
from flax_pref.diffusion.schedule import NoiseSchedule
from flax_pref.methods.errors import PairMethod, errors, noisy_images, pair_metrics, reference_errors
from flax_pref.shapes import Key, Scalar, Tree


@dataclasses.dataclass(frozen=True, kw_only=True)
class KTO(PairMethod):
    """Images that are desirable or not, each judged against the mean of the batch.

        loss = mean over images of 1 - sigmoid(+-beta (g - Q)), g = -(L - L^ref), plus for winners

    Q is the mean of g over all images of the batch, but not below zero, and a constant. A batch that is divided over
    devices has one Q; steps that accumulate gradients have one for each part.

    Pairs are two images that need not be compared, and it does not matter which loser goes with which winner. The
    authors' code draws timestep and noise for each image; here those of a pair share them, as in the other methods.

    Example:
        >>> method = fp.KTO(beta=1000.0)
        >>> method.rule(w=1.0, guidance_scale=7.5).networks()
        ('base', 'kto')
    """

    beta: float = 1000.0
    """Factor of g, without a factor 1/2, as in the authors' code."""

    modules: ClassVar[tuple[str, ...]] = ("kto",)

    def __post_init__(self):
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
        """See `PairMethod`; the loss is one half before any training.

        The metrics are those of `DiffusionDPO`, and `baseline`, Q.
        """
        policy = self.modules[0]
        noisy = noisy_images(batch, key, schedule)
        changes = errors(predict, (policy, policy), noisy) - reference_errors(predict, noisy)
        baseline = jax.lax.stop_gradient(jnp.maximum(-changes.mean(), 0))
        winner, loser = changes
        desirable = jax.nn.sigmoid(-self.beta * (-winner - baseline))
        undesirable = jax.nn.sigmoid(self.beta * (-loser - baseline))
        loss = (desirable.mean() + undesirable.mean()) / 2
        return loss, {**pair_metrics(loss, loser - winner, winner, loser), "baseline": baseline}
