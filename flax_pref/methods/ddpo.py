"""DDPO (arXiv:2305.13301)."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from flax_pref.diffusion.sampler import Predict
from flax_pref.diffusion.solvers import log_prob
from flax_pref.methods.online import (
    DrawnLatents,
    ExampleCost,
    OnlineMethod,
    Rewards,
    RolloutInputs,
    draw_trajectories,
    guided,
)
from flax_pref.shapes import Key, Scalar


@dataclasses.dataclass(frozen=True, kw_only=True)
class DDPO(OnlineMethod):
    """Policy gradients with importance sampling (DDPO, arXiv:2305.13301, equation 6 and appendix).

        loss = mean over steps of -min(A r, A clip(r, 1 - c, 1 + c)), r = p_theta(x_{t-1} | x_t) / p_old(x_{t-1} | x_t)

    p_old is the density of the policy that took the step. Densities are averaged over the dimensions of an image, as in
    the authors' code, which is why c is so small.

    Example:
        >>> method = fp.DDPO(images_per_prompt=8)
        >>> method.modules
        ('ddpo',)
    """

    modules: ClassVar[tuple[str, ...]] = ("ddpo",)
    reference: ClassVar[bool] = False

    images_per_prompt: int = 8
    """That are judged against each other."""
    ratio_clip: float = 1e-4
    """c, for log-densities that are averaged over dimensions."""
    advantage_clip: float = 10.0
    """Largest size of an advantage."""

    def __post_init__(self):
        super().__post_init__()
        self.expect("images_per_prompt", self.images_per_prompt >= 2, "2 or more: one alone is its own mean")
        self.expect("ratio_clip", 0 < self.ratio_clip < 1, "a number between 0 and 1")
        self.expect("advantage_clip", 0 < self.advantage_clip < math.inf, "a number above 0")

    def loss(
        self, predict: Predict, batch: Mapping[str, Any], key: Key[jax.Array, ""] | None
    ) -> tuple[Scalar, dict[str, Scalar]]:
        """See `OnlineMethod`.

        The batch has `latents` and `next_latents [B, H, W, C]`, x_t and x_{t-1}; `log_prob [B]` of the step when it was
        taken; `advantage [B]`, see `advantages`; `reward [B]`. The metrics are `loss`; `clipped`, the share of steps
        whose ratio is beyond c; `reward`, the mean over the batch.
        """
        latents, s = batch["latents"], self.guidance_scale
        noise_pred = guided(predict, self.modules[0], batch, latents[:, None], s)[:, 0]
        ratio = jnp.exp(log_prob(batch["next_latents"], latents, noise_pred, batch["row"]) - batch["log_prob"])
        advantage = jnp.clip(batch["advantage"], -self.advantage_clip, self.advantage_clip)
        clipped = jnp.clip(ratio, 1 - self.ratio_clip, 1 + self.ratio_clip)
        loss = -jnp.minimum(advantage * ratio, advantage * clipped).mean()
        return loss, {
            "loss": loss,
            "clipped": (jnp.abs(ratio - 1) > self.ratio_clip).mean(),
            "reward": batch["reward"].mean(),
        }

    @property
    def examples(self) -> tuple[int, ...]:
        """See `OnlineMethod`."""
        return self.images_per_prompt, self.steps

    def cost(self, *, within: bool = False) -> ExampleCost:
        """See `OnlineMethod`."""
        return ExampleCost(self.guided_rows, self.guided_rows, 0, 1 / self.steps)

    def shapes(self, latent: tuple[int, int, int]) -> dict[str, tuple[int, ...]]:
        """See `OnlineMethod`."""
        images = (self.images_per_prompt,)
        return {
            "latents": (*images, self.steps + 1, *latent),
            "log_prob": self.examples,
            "advantage": images,
            "reward": images,
        }

    def draw_images(self, drawing: RolloutInputs) -> tuple[dict[str, jax.Array], DrawnLatents]:
        """See `OnlineMethod`."""
        latents, log_probs, clean = draw_trajectories(drawing, self, images=self.images_per_prompt, one_start=False)
        return {"latents": latents, "log_prob": log_probs}, clean

    def judge_images(self, drawn: Mapping[str, jax.Array], rewards: Rewards) -> dict[str, jax.Array]:
        """See `OnlineMethod`."""
        return {**drawn, "advantage": advantages(rewards), "reward": rewards}

    def batch(self, experience: Mapping[str, jax.Array], index: tuple[jax.Array, ...]) -> dict[str, jax.Array]:
        """See `OnlineMethod`."""
        *image, number = index
        return {
            "latents": experience["latents"][index],
            "next_latents": experience["latents"][(*image, number + 1)],
            "log_prob": experience["log_prob"][index],
            "advantage": experience["advantage"][tuple(image)],
            "reward": experience["reward"][tuple(image)],
        }


def advantages(rewards: Rewards) -> Rewards:
    """`(r - mean) / std` of each image among those of its prompt; zero where all are the same.

    The authors' code has running statistics of each prompt; here they are those of the G images that one policy drew.
    """
    spread = rewards.std(axis=1, keepdims=True)
    return (rewards - rewards.mean(axis=1, keepdims=True)) / jnp.where(spread > 0, spread, 1)
