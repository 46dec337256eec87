"""Diff-SNPO: one network, whose empty prompt learns the preference with labels swapped (ICLR 2026)."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from flax_pref.config import check_positive, check_share
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
    without_prompts,
)
from flax_pref.shapes import Key, PerImage, Scalar, Tree


@dataclasses.dataclass(frozen=True, kw_only=True)
class SNPO(LogisticMethod, PairMethod):
    """Diff-SNPO (openreview.net/forum?id=CU5EHe1KUt). Its formula is known second-hand; not compared with its code.

    Two public notes on the paper give the same mixture, mix, beta and errors T omega(t) |eps_theta - eps|^2, but not
    the same sign before beta: with the minus here the winner's error falls. That omega is 1 and |.|^2 a mean over a
    latent is a choice of this project, as is the factor 1/2.

    loss = mean over pairs of -log sigmoid(-beta / 2 ((L_w - L_w^ref) - bounded(L_l - L_l^ref)))

    bounded(x) = -log(mix exp(-T x) + 1 - mix) / T stays below -log(1 - mix) / T, T the number of training timesteps:
    a loser's error is not raised for ever (Bounded-DPO, arXiv:2506.12725). In a share of the pairs the prompt is
    empty, and winner and loser change places. So plain classifier-free guidance, on this one network, leads away from
    what losers have: `cfg(s, "snpo")`.

    Example:
        >>> method = fp.SNPO(beta=2000.0)
        >>> method.rule(w=1.0, guidance_scale=7.5).networks()
        ('base', 'snpo')
    """

    beta: float = 2000.0
    """Strength of the pull to the reference, with the factor 1/2; 5000 for SDXL."""
    mix: float = 0.9
    """Share of the module in the mixture with the reference that losers are compared with; 1: Diffusion-DPO's loss."""
    dropout: float = 0.5
    """Share of pairs that teach the empty prompt; a choice of this project. One note has the share of captions that
    are dropped for classifier-free guidance, without its value, the other one half."""

    modules: ClassVar[tuple[str, ...]] = ("snpo",)

    def __post_init__(self):
        super().__post_init__()
        check_positive(self, "beta")
        check_share(self, "mix", "dropout")

    def loss(
        self,
        predict: Predict,
        batch: Mapping[str, Any],
        key: Key[jax.Array, ""],
        *,
        schedule: NoiseSchedule,
        empty: Tree = None,
    ) -> tuple[Scalar, dict[str, Scalar]]:
        """See `PairMethod`; `empty` is required. The metrics are those of `DiffusionDPO`.

        Winner and loser in them are those of the labels as they are learnt, swapped where the prompt is empty.
        """
        noise_key, dropout_key = jax.random.split(key)
        swapped = jax.random.bernoulli(dropout_key, self.dropout, batch["winner"].shape[:1])
        noisy = noisy_images(without_prompts(batch, swapped, empty), noise_key, schedule)
        policy = self.modules[0]
        first, second = errors(predict, (policy, policy), noisy) - reference_errors(predict, noisy)
        winner, loser = jnp.where(swapped, second, first), jnp.where(swapped, first, second)
        logits = -self.beta / 2 * (winner - self.bounded(loser, schedule.num_train_timesteps))
        loss = logistic_loss(logits, self.poly_alpha)
        return loss, pair_metrics(loss, logits, winner, loser)

    def bounded(self, change: PerImage, timesteps: int) -> PerImage:
        """Bounds the loser's error minus that of the reference, `[B]`; timesteps: T, of training."""
        mixture = jnp.logaddexp(jnp.log(self.mix) - timesteps * change, jnp.log1p(-self.mix))
        return -mixture / timesteps
