"""DiffusionNFT: rewards of whole images, learned in the forward process (arXiv:2509.16117)."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp

from flax_pref.diffusion.guidance import tabulate
from flax_pref.diffusion.sampler import Predict, predict_rows, sample
from flax_pref.methods.online import DrawnLatents, ExampleCost, OnlineMethod, Rewards, RolloutInputs, policy_rule
from flax_pref.models.lora import BASE
from flax_pref.shapes import GivenLatents, Key, Latents, PerImage, Scalar


@dataclasses.dataclass(frozen=True, kw_only=True)
class DiffusionNFT(OnlineMethod):
    """DiffusionNFT (arXiv:2509.16117): no log-probabilities, and any solver.

    A slowly updated copy of the policy, the *old* one, draws G images of a prompt. Their advantages A within the prompt
    become `r = clip(A / (2 A_max) + 1/2, 0, 1)`. Each image is noised again, and the new policy's prediction v is seen
    as one part of a better policy and, mirrored at the old one, of a worse policy:

        plus = b v + (1 - b) v_old,   minus = (1 + b) v_old - b v
        loss = A_max / b (r E(plus) + (1 - r) E(minus)) + kl |v - v_ref|^2

    E is the squared error of the clean image that a prediction stands for, divided by its own mean absolute error, a
    constant. Networks may predict noise or v. After each iteration the old policy becomes
    `d old + (1 - d) new`, `d = min(ramp n, limit)` after n steps of training.

    The new policy is predicted in a pass of its own: old policy and reference, in one pass, have no gradients.

    Example:
        >>> method = fp.DiffusionNFT(images_per_prompt=8)
        >>> method.modules
        ('nft',)
    """

    modules: ClassVar[tuple[str, ...]] = ("nft",)
    old: ClassVar[str | None] = "old"

    steps: int = 10
    """Sampling steps for each image."""
    eta: float = 0.0
    """Share of new noise in a step of DDIM, 0 to 1."""
    guidance_scale: float = 1.0
    """s of classifier-free guidance while images are drawn; the loss has none. The authors draw without: 1."""
    solver: Literal["ddim", "dpm++"] = "dpm++"
    """What draws: DDIM or DPM-Solver++ 2M."""
    images_per_prompt: int = 24
    """G, judged against each other."""
    trained_share: float = 0.99
    """Share of the solver's timesteps, from the first, at which each image is learned from."""
    beta: float = 1.0
    """b, how far the better and the worse policy lie from the old one, in units of new - old. Larger: slower, steadier;
    the authors take 1, and 0.1 for one reward."""
    kl: float = 1e-4
    """Weight of the squared distance to the reference's prediction."""
    advantage_clip: float = 5.0
    """A_max."""
    ramp: float = 1e-3
    """Growth, in each step of training, of the share of the old policy that is kept."""
    limit: float = 0.5
    """Largest share of the old policy that is kept after an iteration."""

    def __post_init__(self):
        self.expect("steps", self.steps >= 1, "1 or more")
        self.expect("eta", 0 <= self.eta <= 1, "0 to 1")
        self.expect("guidance_scale", math.isfinite(self.guidance_scale), "a finite number")
        self.expect("solver", self.solver in ("ddim", "dpm++"), "'ddim' or 'dpm++'")
        self.expect("eta", self.eta == 0 or self.solver == "ddim", "0: DPM-Solver++ draws no noise")
        self.expect("images_per_prompt", self.images_per_prompt >= 2, "2 or more: one alone is its own mean")
        self.expect("trained_share", 0 < self.trained_share <= 1 and len(self.trained) > 0, f"1 / {self.steps} to 1")
        for name in ("beta", "advantage_clip"):
            self.expect(name, 0 < getattr(self, name) < math.inf, "a number above 0")
        for name in ("kl", "ramp"):
            self.expect(name, 0 <= getattr(self, name) < math.inf, "a number from 0 up")
        self.expect("limit", 0 <= self.limit < 1, "0 to 1, without 1: the old policy would stay")

    @property
    def solver_name(self) -> str:
        """See `OnlineMethod`."""
        return self.solver

    @property
    def trained(self) -> tuple[int, ...]:
        """See `OnlineMethod`."""
        return tuple(range(int(self.steps * self.trained_share)))

    def kept(self, number: jax.Array) -> jax.Array:
        """See `OnlineMethod`."""
        return jnp.minimum(self.ramp * number, self.limit)

    def loss(
        self, predict: Predict, batch: Mapping[str, Any], key: Key[jax.Array, ""] | None
    ) -> tuple[Scalar, dict[str, Scalar]]:
        """See `OnlineMethod`.

        The batch has `clean [B, H, W, C]`, scaled latents of images; `advantage [B]`, of each in its prompt; `reward
        [B]`. The metrics are `loss`; `distance` and `old_distance`, the mean squared differences of the new policy to
        the reference and to the old one; `reward`, the mean over the batch.
        """
        assert key is not None
        row, clean = batch["row"], batch["clean"]
        noise = jax.random.normal(key, clean.shape, clean.dtype)
        signal = batch["signal"][:, None, None, None]
        noisy = jnp.sqrt(signal) * clean + jnp.sqrt(1 - signal) * noise

        def predicted(*networks: str) -> list[Latents]:
            text = jax.tree.map(lambda x: jnp.stack([x] * len(networks), axis=1), batch["text"])
            rows = predict_rows(predict, networks, jnp.stack([noisy] * len(networks), axis=1), row.timesteps, text)
            return list(jnp.moveaxis(rows.astype(jnp.promote_types(rows.dtype, jnp.float32)), 1, 0))

        assert self.old is not None
        (new,) = predicted(*self.modules)
        old, reference = jax.lax.stop_gradient(predicted(self.old, BASE))
        of_latents, of_pred = (x[:, None, None, None] for x in (row.clean_from_latents, row.clean_from_pred))

        def error(prediction: Latents) -> PerImage:
            return relative_error(of_latents * noisy + of_pred * prediction, clean)

        b = self.beta
        share = jnp.clip(batch["advantage"] / (2 * self.advantage_clip) + 0.5, 0, 1)
        better, worse = error(b * new + (1 - b) * old), error((1 + b) * old - b * new)
        distance = jnp.square(new - reference).mean()
        policy = self.advantage_clip / b * (share * better + (1 - share) * worse).mean()
        loss = policy + self.kl * distance
        return loss, {
            "loss": loss,
            "distance": distance,
            "old_distance": jnp.square(new - old).mean(),
            "reward": batch["reward"].mean(),
        }

    @property
    def examples(self) -> tuple[int, ...]:
        """See `OnlineMethod`."""
        return self.images_per_prompt, len(self.trained)

    def cost(self, *, within: bool = False) -> ExampleCost:
        """See `OnlineMethod`."""
        return ExampleCost(self.guided_rows * self.steps / len(self.trained), 1, 2, 1 / len(self.trained))

    def shapes(self, latent: tuple[int, int, int]) -> dict[str, tuple[int, ...]]:
        """See `OnlineMethod`."""
        return {"clean": (self.images_per_prompt, *latent), "reward": (self.images_per_prompt,)}

    def draw_images(self, drawing: RolloutInputs) -> tuple[dict[str, jax.Array], DrawnLatents]:
        """See `OnlineMethod`."""
        count, images = len(drawing.keys), self.images_per_prompt
        keys = jax.vmap(lambda key: jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(images)))(drawing.keys)
        text, empty = (
            jax.tree.map(lambda x: jnp.repeat(x, images, axis=0), told) for told in (drawing.text, drawing.empty)
        )
        table = tabulate(policy_rule(self), self.steps, count * images)
        clean = sample(drawing.predict, table, drawing.solver, keys.reshape(-1), text, empty, drawing.shape)
        return {"clean": clean.reshape(count, images, *drawing.shape)}, clean

    def judge_images(self, drawn: Mapping[str, jax.Array], rewards: Rewards) -> dict[str, jax.Array]:
        """See `OnlineMethod`."""
        return {**drawn, "reward": rewards}

    def batch(self, experience: Mapping[str, jax.Array], index: tuple[jax.Array, ...]) -> dict[str, jax.Array]:
        """See `OnlineMethod`; advantages are divided by the deviation of all rewards of the iteration."""
        rewards, image = experience["reward"], tuple(index[:-1])
        advantages = (rewards - rewards.mean(axis=1, keepdims=True)) / (rewards.std() + 1e-4)
        return {"clean": experience["clean"][image], "advantage": advantages[image], "reward": rewards[image]}


def relative_error(found: Latents, clean: GivenLatents) -> PerImage:
    """Mean squared error over a latent, divided by its mean absolute error (at least 1e-5), which is a constant."""
    absolute = jnp.abs(jax.lax.stop_gradient(found) - clean).mean(axis=(1, 2, 3))
    return jnp.square(found - clean).mean(axis=(1, 2, 3)) / jnp.maximum(absolute, 1e-5)
