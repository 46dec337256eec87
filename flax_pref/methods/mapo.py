"""MaPO (arXiv:2406.06424)."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from flax_pref.config import check_positive
from flax_pref.diffusion.sampler import Predict
from flax_pref.diffusion.schedule import NoiseSchedule
from flax_pref.methods.errors import PairMethod, errors, logistic_loss, noisy_images, pair_metrics
from flax_pref.shapes import Key, Scalar, Tree


@dataclasses.dataclass(frozen=True, kw_only=True)
class MaPO(PairMethod):
    """Preference optimization with a margin and without a reference.

        loss = mean over pairs of L_w - beta log sigmoid(T (f(L_w) - f(L_l))), f(L) = h L / (exp(h L) - 1)

    T is the number of timesteps; f falls from one at no error to zero.

    Example:
        >>> method = fp.MaPO(beta=0.1)
        >>> method.reference
        False
    """

    beta: float = 0.1
    """Weight of the margin beside the winner's error, as in the authors' code."""
    snr: float = 0.5
    """h, which the authors' code calls snr_value."""

    modules: ClassVar[tuple[str, ...]] = ("mapo",)
    reference: ClassVar[bool] = False

    def __post_init__(self):
        check_positive(self, "beta", "snr")

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

        The metrics are `loss`, `accuracy` (share of pairs whose winner the module predicts better than the loser),
        `winner` and `loser`, the errors.
        """
        policy = self.modules[0]
        winner, loser = errors(predict, (policy, policy), noisy_images(batch, key, schedule))
        logits = schedule.num_train_timesteps * (likelihood(self.snr * winner) - likelihood(self.snr * loser))
        loss = winner.mean() + self.beta * logistic_loss(logits)
        return loss, pair_metrics(loss, logits, winner, loser)


def likelihood(x: jax.Array) -> jax.Array:
    """`x / (exp(x) - 1)` of positive numbers, without the overflow of the exponential and without cancellation."""
    return x * jnp.exp(-x) / -jnp.expm1(-x)
