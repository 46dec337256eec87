"""D3PO (arXiv:2311.13231)."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from flax_pref.diffusion.sampler import Predict
from flax_pref.diffusion.solvers import step
from flax_pref.methods.online import (
    DrawnLatents,
    ExampleCost,
    Preferences,
    Rewards,
    RolloutInputs,
    clip_ratio,
    draw_trajectories,
    guided_pair,
    mean_product,
    pair_loss,
    pred_coef,
    safe_variance,
)
from flax_pref.shapes import Key, Scalar


@dataclasses.dataclass(frozen=True, kw_only=True)
class D3PO(Preferences):
    """The better of two images labels every step of their trajectories (D3PO, arXiv:2311.13231).

        loss = mean over the pairs that count of -log sigmoid(beta (log r^w - log r^l))
        r = p_theta(x_{t-1} | x_t) / p_ref(x_{t-1} | x_t)

    The two trajectories begin in one point but part at the first step, so each has an x_t of its own. Log-densities are
    averaged over the D dimensions, and their difference is taken as

        log r = <x_{t-1} - (mu_theta + mu_ref) / 2, mu_theta - mu_ref> / (D sigma_t^2)

    Example:
        >>> method = fp.D3PO(steps=20)
        >>> method.modules
        ('d3po',)
    """

    modules: ClassVar[tuple[str, ...]] = ("d3po",)

    def loss(
        self, predict: Predict, batch: Mapping[str, Any], key: Key[jax.Array, ""] | None
    ) -> tuple[Scalar, dict[str, Scalar]]:
        """See `OnlineMethod`; the metrics are those of `online.pair_loss`.

        The batch has `latents` and `next_latents [B, 2, H, W, C]`, x_t and x_{t-1} of winner and loser, at the same
        step; `rewards [B, 2]` are those of the final images.
        """
        row = batch["row"]
        predicted, expected = guided_pair(predict, self.modules[0], batch, batch["latents"], self.guidance_scale)
        log_ratios = []
        for image in (0, 1):
            shift = pred_coef(row) * (predicted - expected)[:, image]  # mu_theta - mu_ref
            middle = step(batch["latents"][:, image], expected[:, image], row)[0] + shift / 2
            log_ratio = mean_product(batch["next_latents"][:, image] - middle, shift) / safe_variance(row)
            log_ratios.append(clip_ratio(log_ratio, self.ratio_clip))
        winner, loser = log_ratios
        return pair_loss(self.beta * (winner - loser), batch, self)

    def cost(self, *, within: bool = False) -> ExampleCost:
        """See `OnlineMethod`."""
        return ExampleCost(2 * self.guided_rows, 2 * self.guided_rows, 2 * self.guided_rows, 2 / self.steps)

    def shapes(self, latent: tuple[int, int, int]) -> dict[str, tuple[int, ...]]:
        """See `OnlineMethod`."""
        return {"latents": (2, self.steps + 1, *latent), "rewards": (2,)}

    def draw_images(self, drawing: RolloutInputs) -> tuple[dict[str, jax.Array], DrawnLatents]:
        """See `OnlineMethod`."""
        latents, _, clean = draw_trajectories(drawing, self, images=2, one_start=True)
        return {"latents": latents}, clean

    def judge_images(self, drawn: Mapping[str, jax.Array], rewards: Rewards) -> dict[str, jax.Array]:
        """See `OnlineMethod`: winners first."""
        order = jnp.argsort(-rewards, axis=1)
        latents = jnp.take_along_axis(drawn["latents"], order[:, :, None, None, None, None], axis=1)
        return {"latents": latents, "rewards": jnp.take_along_axis(rewards, order, axis=1)}

    def batch(self, experience: Mapping[str, jax.Array], index: tuple[jax.Array, ...]) -> dict[str, jax.Array]:
        """See `OnlineMethod`."""
        prompt, number = index
        rewards = experience["rewards"][prompt]
        latents, next_latents = (experience["latents"][prompt, :, i] for i in (number, number + 1))
        return {"latents": latents, "next_latents": next_latents, "rewards": rewards, "reward": rewards.mean(axis=1)}
