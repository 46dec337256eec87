"""Online methods: the policy draws images, a reward compares them, and a loss learns from that.

Each iteration draws the trajectories of some prompts with the current weights, the *experience*, then takes minibatches
from it, every step of every trajectory being an example. Methods differ in what is drawn and which loss takes it:

    TailorPO   two candidates for each step from the same latents, ranked by the reward of what they promise
    SPO        the best and the worst of a pool of such candidates
    D3PO       two images from one initial noise; the better one's steps are preferred
    DDPO       several images for each prompt, judged against each other: a policy gradient

    NFT        several images for each prompt, judged against each other, and noised again for the loss

All but NFT learn from steps that the policy itself has taken: `x_{t-1} = mu(x_t) + sigma_t z`, the stochastic DDIM step
of `diffusion.solvers`.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flax_pref.config import check_field
from flax_pref.diffusion.guidance import Rule, cfg, pgd, tabulate
from flax_pref.diffusion.sampler import Predict, draw_normal, predict_rows, sample_trajectory
from flax_pref.diffusion.solvers import Solver
from flax_pref.methods.errors import LogisticMethod, preference_losses
from flax_pref.models.lora import BASE
from flax_pref.shapes import Array, Float, GivenLatents, ImageKeys, Key, Latents, PerImage, Scalar, Tree

Candidates = Float[jax.Array, "images candidates height width channels"]
"""K latents, or predictions from them, of each image."""
DrawnLatents = Float[jax.Array, "drawn height width channels"]
"""Clean latents of images that were drawn, K of each prompt."""
Rewards = Float[jax.Array, "prompts images"]
"""Rewards of K images of each prompt."""
GivenCandidates = Float[Array, "images candidates height width channels"]
"""`Candidates` on a device or on the host."""

# ----------------------------------------------------------------------------------------------------------------------
# Methods


class RolloutInputs(NamedTuple):
    """What trajectories of B prompts are drawn with, while JAX traces.

    Attributes:
        predict: the networks.
        solver: of S rows.
        clean: r and u, `[S]` each; see `solvers.clean_estimate`.
        keys: one for each prompt.
        text: conditioning on the prompts, `[B, ...]` each.
        empty: of no prompt, likewise.
        shape: `(H, W, C)` of latents.
        score: `(clean latents [B * K, H, W, C]) -> [B * K]`, K of each prompt.
        ascent: the gradients of that.
    """

    predict: Predict
    solver: Solver
    clean: tuple[np.ndarray, np.ndarray]
    keys: ImageKeys
    text: Tree
    empty: Tree
    shape: tuple[int, int, int]
    score: Callable[[Latents], PerImage]
    ascent: Callable[[Latents], Latents]


class ExampleCost(NamedTuple):
    """What an example takes: images that the UNet predicts, and images that are decoded and scored.

    Attributes:
        drawing: predicted while images are drawn.
        policy: predicted in the loss with gradients.
        constant: predicted in the loss without, by the reference or the old policy.
        rewards: scored.
    """

    drawing: float
    policy: float
    constant: float
    rewards: float

    @property
    def predictions(self) -> float:
        """In all."""
        return self.drawing + self.policy + self.constant


@dataclasses.dataclass(frozen=True, kw_only=True)
class OnlineMethod:
    """A method that draws its own images, with a reward; its fields are its hyper-parameters."""

    modules: ClassVar[tuple[str, ...]]
    """Names of what is trained."""
    reference: ClassVar[bool] = True
    """Whether it is compared with the base."""
    old: ClassVar[str | None] = None
    """Name of a slowly updated copy of the policy that draws and that the loss sees; None: the policy itself draws."""

    steps: int = 20
    """Of DDIM, for each image."""
    eta: float = 1.0
    """Share of new noise in a step of DDIM: above 0, at most 1; see `timestep_solvers.ddim`."""
    guidance_scale: float = 5.0
    """s of classifier-free guidance, while images are drawn and in the loss; 1 is none."""

    def __post_init__(self):
        self.expect("steps", self.steps >= 1, "1 or more")
        self.expect("eta", 0 < self.eta <= 1, "above 0, at most 1: without noise, steps have no probabilities")
        self.expect("guidance_scale", math.isfinite(self.guidance_scale), "a finite number")

    def expect(self, field: str, holds: bool, expected: str) -> None:
        """Raises a ValueError that names a field, unless the condition holds."""
        check_field(self, field, holds, expected)

    @property
    def solver_name(self) -> str:
        """What draws; see `scheduler_configs.solver_from_config`."""
        return "ddim"

    def kept(self, number: jax.Array) -> jax.Array:
        """Share of the old policy that stays when it is updated, after the step of this number, from 1."""
        raise NotImplementedError

    @property
    def needs_gradients(self) -> bool:
        """Whether the reward must be differentiable."""
        return False

    def loss(
        self, predict: Predict, batch: Mapping[str, Any], key: Key[jax.Array, ""] | None
    ) -> tuple[Scalar, dict[str, Scalar]]:
        """The loss of a batch and its metrics, scalars.

        Args:
            predict: the networks, "base" and that of `modules`.
            batch: what `batch` gives, and `row`, the solver's row of each example; `signal [B]`, abar at its timestep;
                `text` and `empty`, conditioning on the prompt and on none, pytrees of `[B, ...]` arrays.
            key: for methods that draw noise.
        """
        raise NotImplementedError

    def rule(self, w: float, guidance_scale: float) -> Rule:
        """PGD, to sample with what was trained; w = 1 is the module itself."""
        return pgd(w, guidance_scale, self.modules[0])

    @property
    def trained(self) -> tuple[int, ...]:
        """Numbers of the steps that it learns from, from 0 and in order."""
        return tuple(range(self.steps))

    @property
    def examples(self) -> tuple[int, ...]:
        """Shape of the examples that a prompt gives; the last axis is that of the trained steps."""
        return (len(self.trained),)

    @property
    def guided_rows(self) -> int:
        """Predictions that make a guided one."""
        return 1 if self.guidance_scale == 1 else 2

    def cost(self, *, within: bool = False) -> ExampleCost:
        """What an example takes; within: weights change inside trajectories."""
        raise NotImplementedError

    def shapes(self, latent: tuple[int, int, int]) -> dict[str, tuple[int, ...]]:
        """Shapes of what `draw` returns of one prompt; all arrays are float32."""
        raise NotImplementedError

    def draw(self, drawing: RolloutInputs) -> dict[str, jax.Array]:
        """The experience of B prompts, `[B, ...]` each; of methods that judge whole images."""
        drawn, clean = self.draw_images(drawing)
        return self.judge_images(drawn, drawing.score(clean).reshape(len(drawing.keys), -1))

    def draw_images(self, drawing: RolloutInputs) -> tuple[dict[str, jax.Array], DrawnLatents]:
        """Images before they are judged.

        Returns:
            what `judge_images` needs of them, `[B, ...]` each, and their clean latents `[B * K, H, W, C]`, K of each
            prompt.
        """
        raise NotImplementedError

    def judge_images(self, drawn: Mapping[str, jax.Array], rewards: Rewards) -> dict[str, jax.Array]:
        """The experience that images and their rewards make."""
        raise NotImplementedError

    def batch(self, experience: Mapping[str, jax.Array], index: tuple[jax.Array, ...]) -> dict[str, jax.Array]:
        """Examples as the objective takes them, without solver and conditioning.

        Args:
            experience: of N prompts.
            index: prompts, then where the examples are among theirs: `[B]` each.
        """
        raise NotImplementedError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preferences(LogisticMethod, OnlineMethod):
    """What methods with a reference and pairs have in common."""

    beta: float = 0.1
    """Strength of the pull to the reference, for log-densities that are averaged over dimensions."""
    margin: float = 0.0
    """Pairs whose rewards differ by no more than this do not count."""
    ratio_clip: float | None = None
    """Limit of the ratios to the reference (0.1 in the code of D3PO and SPO), beyond which gradients are zero."""

    def __post_init__(self):
        LogisticMethod.__post_init__(self)
        OnlineMethod.__post_init__(self)
        self.expect("beta", 0 < self.beta < math.inf, "a number above 0")
        self.expect("margin", 0 <= self.margin < math.inf, "a number from 0 up")
        self.expect("ratio_clip", self.ratio_clip is None or 0 < self.ratio_clip < 1, "None, or between 0 and 1")


# ----------------------------------------------------------------------------------------------------------------------
# Losses


def guided(
    predict: Predict, network: str, batch: Mapping[str, Any], latents: GivenCandidates, guidance_scale: float
) -> Candidates:
    """`eps(x, empty) + s (eps(x, text) - eps(x, empty))` of K latents of each row of a batch, in one prediction.

    Args:
      predict: the networks.
      network: its name.
      batch: has `row`, `text` and `empty`; see `OnlineMethod.loss`.
      latents: K of each image.
      guidance_scale: s; with 1 nothing is predicted without the prompt.

    Returns:
      in no less than float32.
    """
    count, unguided = latents.shape[1], guidance_scale == 1
    prompts = [batch["text"]] * count if unguided else [batch["empty"]] * count + [batch["text"]] * count
    text = jax.tree.map(lambda *rows: jnp.stack(rows, axis=1), *prompts)
    inputs = latents if unguided else jnp.concatenate([latents, latents], axis=1)
    noise_pred = predict_rows(predict, (network,) * len(prompts), inputs, batch["row"].timesteps, text)
    noise_pred = noise_pred.astype(jnp.promote_types(noise_pred.dtype, jnp.float32))
    if unguided:
        return noise_pred
    without, told = noise_pred[:, :count], noise_pred[:, count:]
    return without + guidance_scale * (told - without)


def guided_pair(
    predict: Predict, policy: str, batch: Mapping[str, Any], latents: GivenCandidates, guidance_scale: float
) -> tuple[Candidates, Candidates]:
    """`guided` of the policy, and of the base as a constant, a prediction of its own."""
    predicted = guided(predict, policy, batch, latents, guidance_scale)
    return predicted, jax.lax.stop_gradient(guided(predict, BASE, batch, latents, guidance_scale))


def pred_coef(row: Solver) -> Float[jax.Array, "images 1 1 1"]:
    """k_t of `mu = a x_t + k_t noise_pred`."""
    return (row.estimate_coefs[:, 0] * row.estimate_from_pred)[:, None, None, None]


def mean_product(a: GivenLatents, b: GivenLatents) -> PerImage:
    """`<a, b> / D`."""
    return (a * b).mean(axis=(-3, -2, -1))


def safe_variance(row: Solver) -> PerImage:
    """sigma_t^2; one where a step draws no noise, for its pairs do not count, see `pair_loss`."""
    return jnp.where(row.fresh_noise_coef > 0, jnp.square(row.fresh_noise_coef), 1)


def clip_ratio(log_ratio: PerImage, ratio_clip: float | None) -> PerImage:
    """The logarithm of a ratio that is limited to `1 - ratio_clip ... 1 + ratio_clip`; as it is where that is None."""
    if ratio_clip is None:
        return log_ratio
    return jnp.clip(log_ratio, jnp.log1p(-ratio_clip), jnp.log1p(ratio_clip))


def pair_loss(logits: PerImage, batch: Mapping[str, Any], method: "Preferences") -> tuple[Scalar, dict[str, Scalar]]:
    """`-log sigmoid` of each pair's logit, then the mean over the pairs that count; zero if none does.

    A pair counts if the gap of its rewards is above the method's margin, and if its step has drawn noise.

    Returns:
      loss, and the metrics `loss`; `accuracy`, the share of pairs that the policy ranks right against the reference,
      among those that count (one half where it is undecided); `used`, the share of pairs that count; `gap`, the mean
      of the gaps of all pairs; `reward`, the mean over the batch.
    """
    gap = batch["rewards"][:, 0] - batch["rewards"][:, 1]
    used = (gap > method.margin) & (batch["row"].fresh_noise_coef > 0)

    def mean_of_used(values):
        return jnp.where(used, values, 0).sum() / jnp.maximum(used.sum(), 1)

    loss = mean_of_used(preference_losses(logits, method.poly_alpha))
    return loss, {
        "loss": loss,
        "accuracy": mean_of_used((logits > 0) + 0.5 * (logits == 0)),
        "used": used.mean(),
        "gap": gap.mean(),
        "reward": batch["reward"].mean(),
    }


# ----------------------------------------------------------------------------------------------------------------------
# Drawing


def policy_rule(method: OnlineMethod) -> Rule:
    """What the policy draws with: classifier-free guidance; where s = 1, its prediction for the prompt alone."""
    (network,) = method.modules
    return cfg(method.guidance_scale, network)


def draw_trajectories(
    drawing: RolloutInputs, method: OnlineMethod, *, images: int, one_start: bool
) -> tuple[
    Float[jax.Array, "prompts images visited height width channels"],
    Float[jax.Array, "prompts images steps"],
    DrawnLatents,
]:
    """Whole trajectories of several images for each prompt.

    Args:
        drawing: for B prompts.
        method: whose module draws.
        images: G, of each prompt.
        one_start: whether those of a prompt begin with the same noise.

    Returns:
        latents of S + 1 visits, log-densities of S steps, and the latents of the last visit, `[B * G, H, W, C]`.
    """
    count = len(drawing.keys)
    # Number 0 of a prompt's key is the common start.
    keys = jax.vmap(lambda key: jax.vmap(partial(jax.random.fold_in, key))(jnp.arange(1, images + 1)))(drawing.keys)
    starting = jnp.broadcast_to(drawing.keys[:, None], keys.shape) if one_start else keys
    latents, log_probs = sample_trajectory(
        drawing.predict,
        tabulate(policy_rule(method), method.steps, count * images),
        drawing.solver,
        keys.reshape(-1),
        jax.tree.map(lambda x: jnp.repeat(x, images, axis=0), drawing.text),
        jax.tree.map(lambda x: jnp.repeat(x, images, axis=0), drawing.empty),
        drawing.shape,
        start=drawing.solver.init_noise_sigma * draw_normal(starting.reshape(-1), 0, drawing.shape),
    )
    clean = latents[-1]
    latents, log_probs = (jnp.moveaxis(x, 0, 1).reshape(count, images, -1, *x.shape[2:]) for x in (latents, log_probs))
    return latents, log_probs, clean
