"""DSPO: Direct Score Preference Optimization (ICLR 2025)."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp

from flax_pref.config import check_field, check_positive
from flax_pref.diffusion.sampler import Predict, predict_rows
from flax_pref.diffusion.schedule import NoiseSchedule
from flax_pref.methods.errors import PAIR, PairMethod, noisy_images, pair_metrics, residual
from flax_pref.models.lora import BASE
from flax_pref.shapes import Key, RowLatents, Scalar, Tree


@dataclasses.dataclass(frozen=True, kw_only=True)
class DSPO(PairMethod):
    """DSPO (openreview.net/forum?id=xyfb9HHvMe), in the two forms that its authors' code has.

        form "denoising": loss = mean over pairs of |(eps_w - eps) - beta (1 - p) (eps_w - eps_w^ref)|^2
        form "margin":    loss = mean over pairs of (1 - p)^2 (d if d >= far else 1), d = |eps_w - eps_w^ref|^2

    eps_w is the noise that the module predicts for the winner, |.|^2 a mean over a latent, and p the sigmoid of
    Diffusion-DPO's logit with the same beta. Both forms are read in the authors' code (huaishengzhu/DSPO, train.py).
    Only the reference is a constant there: gradients pass through p and through eps_w in both places. That code
    compares the mean of d over the pairs of a device with `far`; here each pair is judged by itself, whatever the
    batch and the devices.

    Derived here: the first gradient of "denoising" is 1 - beta / 2 times that of the winner's error L_w. With the
    authors' 0.001 the loss stays close to L_w; from 2 on, training begins by raising L_w. In "margin" the loss of a
    pair drops to `far` times its value where d reaches `far`.

    Example:
        >>> method = fp.DSPO(beta=0.001)
        >>> method.rule(w=1.0, guidance_scale=7.5).networks()
        ('base', 'dspo')
    """

    beta: float = 0.001
    """Of the logit, with the factor 1/2, and of the second term of "denoising". The authors' scripts have 0.001 for
    SD1.5, to be searched among 0.001, 0.01 and 0.05, and 5000 for SDXL with "margin", among 1000 to 5000."""
    form: Literal["denoising", "margin"] = "denoising"
    """The authors' loss for SD1.5 ("denoising") or for SDXL ("margin")."""
    far: float = 0.1
    """In "margin": the d from which on a winner's prediction is pulled back to the reference's."""

    modules: ClassVar[tuple[str, ...]] = ("dspo",)

    def __post_init__(self):
        check_field(self, "form", self.form in ("denoising", "margin"), "'denoising' or 'margin'")
        check_positive(self, "beta", "far")
        bounded = self.form == "margin" or self.beta < 2
        check_field(self, "beta", bounded, "less than 2 in the form 'denoising', or --method.form margin")

    def loss(
        self,
        predict: Predict,
        batch: Mapping[str, Any],
        key: Key[jax.Array, ""],
        *,
        schedule: NoiseSchedule,
        empty: Tree = None,
    ) -> tuple[Scalar, dict[str, Scalar]]:
        """See `PairMethod`; before any training the loss is L_w in "denoising" and 1/4 in "margin".

        The metrics are those of `DiffusionDPO` and `distance`, the mean of d.
        """
        noisy = noisy_images(batch, key, schedule)

        def residuals(network: str) -> RowLatents:
            noise_pred = predict_rows(predict, (network,) * len(PAIR), noisy.latents, noisy.timesteps, noisy.text)
            return residual(noise_pred, noisy.target)

        module, reference = residuals(self.modules[0]), jax.lax.stop_gradient(residuals(BASE))
        winner, loser = (mean_square(module) - mean_square(reference)).T
        logits = -self.beta / 2 * (winner - loser)
        wrong = jax.nn.sigmoid(-logits)
        difference = module[:, 0] - reference[:, 0]
        distance = mean_square(difference)
        if self.form == "denoising":
            loss = mean_square(module[:, 0] - self.beta * wrong[:, None, None, None] * difference).mean()
        else:
            loss = (jnp.square(wrong) * jnp.where(distance >= self.far, distance, 1.0)).mean()
        return loss, {**pair_metrics(loss, logits, winner, loser), "distance": distance.mean()}


def mean_square(x: jax.Array) -> jax.Array:
    """Mean over the last three axes, those of a latent."""
    return jnp.square(x).mean(axis=(-3, -2, -1))
