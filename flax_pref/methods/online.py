"""Online methods: the policy draws images, a reward compares them, and a loss learns from that.

Each iteration draws the trajectories of some prompts with the current weights, the *experience*, then takes minibatches
from it, every step of every trajectory being an example. Methods differ in what is drawn and which loss takes it:

    TailorPO   two candidates for each step from the same latents, ranked by the reward of what they promise
    SPO        the best and the worst of a pool of such candidates
    D3PO       two images from one initial noise; the better one's steps are preferred
    DDPO       several images for each prompt, judged against each other: a policy gradient

They learn from steps that the policy itself has taken: `x_{t-1} = mu(x_t) + sigma_t z`, the stochastic DDIM step of
`diffusion.solvers`.
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
from flax_pref.diffusion.solvers import Solver, step
from flax_pref.models.lora import BASE
from flax_pref.shapes import Array, Float, GivenLatents, ImageKeys, Int, Key, Latents, PerImage, Scalar, Tree

Candidates = Float[jax.Array, "images candidates height width channels"]
"""K latents, or predictions from them, of each image."""
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class OnlineMethod:
    """A method that draws its own images, with a reward; its fields are its hyper-parameters."""

    modules: ClassVar[tuple[str, ...]]
    """Names of what is trained."""
    reference: ClassVar[bool] = True
    """Whether it is compared with the base."""
    skip: ClassVar[int] = 0
    """Steps at the beginning that nothing is learned from."""

    steps: int = 20
    """Of DDIM, for each image."""
    eta: float = 1.0
    """Share of new noise in a step of DDIM: above 0, at most 1; see `solvers.ddim`."""
    guidance_scale: float = 5.0
    """s of classifier-free guidance, while images are drawn and in the loss; 1 is none."""

    def __post_init__(self):
        self.expect("steps", self.steps > self.skip, f"{self.skip + 1} or more")
        self.expect("eta", 0 < self.eta <= 1, "above 0, at most 1: without noise, steps have no probabilities")
        self.expect("guidance_scale", math.isfinite(self.guidance_scale), "a finite number")

    def expect(self, field: str, holds: bool, expected: str) -> None:
        """Raises a ValueError that names a field, unless the condition holds."""
        check_field(self, field, holds, expected)

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
            batch: what `batch` gives, and `row`, the solver's row of each example; `text` and `empty`, conditioning on
                the prompt and on none, pytrees of `[B, ...]` arrays.
            key: for methods that draw; those here draw nothing.
        """
        raise NotImplementedError

    def rule(self, w: float, guidance_scale: float) -> Rule:
        """PGD, to sample with what was trained; w = 1 is the module itself."""
        return pgd(w, guidance_scale, self.modules[0])

    @property
    def examples(self) -> tuple[int, ...]:
        """Shape of the examples that a prompt gives; the last axis is that of the steps."""
        return (self.steps - self.skip,)

    def shapes(self, latent: tuple[int, int, int]) -> dict[str, tuple[int, ...]]:
        """Shapes of what `draw` returns of one prompt; all arrays are float32."""
        raise NotImplementedError

    def draw(self, drawing: RolloutInputs) -> dict[str, jax.Array]:
        """The experience of B prompts, `[B, ...]` each."""
        raise NotImplementedError

    def batch(self, experience: Mapping[str, jax.Array], index: tuple[jax.Array, ...]) -> dict[str, jax.Array]:
        """Examples as the objective takes them, without solver and conditioning.

        Args:
            experience: of N prompts.
            index: prompts, then where the examples are among theirs: `[B]` each.
        """
        raise NotImplementedError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preferences(OnlineMethod):
    """What methods with a reference and pairs have in common."""

    beta: float = 0.1
    """Strength of the pull to the reference, for log-densities that are averaged over dimensions."""
    margin: float = 0.0
    """Pairs whose rewards differ by no more than this do not count."""
    ratio_clip: float | None = None
    """Limit of the ratios to the reference (0.1 in the code of D3PO and SPO), beyond which gradients are zero."""

    def __post_init__(self):
        super().__post_init__()
        self.expect("beta", 0 < self.beta < math.inf, "a number above 0")
        self.expect("margin", 0 <= self.margin < math.inf, "a number from 0 up")
        self.expect("ratio_clip", self.ratio_clip is None or 0 < self.ratio_clip < 1, "None, or between 0 and 1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepPairs(Preferences):
    """Pairs of candidates for a step from the same latents, `x^w` and `x^l` for x_{t-1}.

        loss = mean over the pairs that count of -log sigmoid(Delta)
        Delta = beta (log p_theta(x^w | x_t) / p_ref(x^w | x_t) - log p_theta(x^l | x_t) / p_ref(x^l | x_t))
              = beta / (D sigma_t^2) <x^w - x^l, mu_theta(x_t) - mu_ref(x_t)>

    Log-densities are averaged over the D dimensions. Both steps begin at x_t, so that what is quadratic cancels and one
    prediction of the policy and one of the reference make the loss of a pair.
    """

    def loss(
        self, predict: Predict, batch: Mapping[str, Any], key: Key[jax.Array, ""] | None
    ) -> tuple[Scalar, dict[str, Scalar]]:
        """See `OnlineMethod`; the metrics are those of `pair_loss`.

        The batch has `latents [B, H, W, C]`, x_t; `winner` and `loser`, x_{t-1} likewise; `rewards [B, 2]`, of winner
        and loser; `reward [B]`, of the image that the trajectory ended in, for the metrics.
        """
        row, s = batch["row"], self.guidance_scale
        predicted, expected = guided_pair(predict, self.modules[0], batch, batch["latents"][:, None], s)
        shift = pred_coef(row) * (predicted - expected)[:, 0]  # mu_theta(x_t) - mu_ref(x_t)
        if self.ratio_clip is None:
            difference = batch["winner"] - batch["loser"]
            logits = self.beta * mean_product(difference, shift) / safe_variance(row)
        else:
            middle = step(batch["latents"], expected[:, 0], row)[0] + shift / 2
            winner, loser = (
                clip_ratio(mean_product(batch[image] - middle, shift) / safe_variance(row), self.ratio_clip)
                for image in ("winner", "loser")
            )
            logits = self.beta * (winner - loser)
        return pair_loss(logits, batch, self.margin)

    def shapes(self, latent: tuple[int, int, int]) -> dict[str, tuple[int, ...]]:
        """See `OnlineMethod`."""
        images = dict.fromkeys(("latents", "winner", "loser"), (*self.examples, *latent))
        return {**images, "rewards": (*self.examples, 2), "reward": ()}

    def batch(self, experience: Mapping[str, jax.Array], index: tuple[jax.Array, ...]) -> dict[str, jax.Array]:
        """See `OnlineMethod`."""
        steps = {name: experience[name][index] for name in ("latents", "winner", "loser", "rewards")}
        return {**steps, "reward": experience["reward"][index[0]]}


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


def pair_loss(logits: PerImage, batch: Mapping[str, Any], margin: float) -> tuple[Scalar, dict[str, Scalar]]:
    """`-log sigmoid` of each pair's logit, then the mean over the pairs that count; zero if none does.

    A pair counts if the gap of its rewards is above the margin, and if its step has drawn noise.

    Returns:
      loss, and the metrics `loss`; `accuracy`, the share of pairs that the policy ranks right against the reference,
      among those that count (one half where it is undecided); `used`, the share of pairs that count; `gap`, the mean
      of the gaps of all pairs; `reward`, the mean over the batch.
    """
    gap = batch["rewards"][:, 0] - batch["rewards"][:, 1]
    used = (gap > margin) & (batch["row"].fresh_noise_coef > 0)

    def mean_of_used(values):
        return jnp.where(used, values, 0).sum() / jnp.maximum(used.sum(), 1)

    loss = mean_of_used(-jax.nn.log_sigmoid(logits))
    return loss, {
        "loss": loss,
        "accuracy": mean_of_used((logits > 0) + 0.5 * (logits == 0)),
        "used": used.mean(),
        "gap": gap.mean(),
        "reward": batch["reward"].mean(),
    }


# ----------------------------------------------------------------------------------------------------------------------
# Drawing


def draw_step_pairs(
    drawing: RolloutInputs, method: StepPairs, *, pool: int, follow: str, ascent: float
) -> dict[str, jax.Array]:
    """Trajectories with a pool of candidates for each step, and the best and the worst of each pool.

    A candidate x' is as good as the image it promises, `x_0 = r x' + u noise_pred(x')`, which takes a prediction for
    each; that of the candidate that is gone on from is the next step's own. The last candidates are images themselves.

    Args:
        drawing: for B prompts.
        method: of pairs.
        pool: candidates for a step.
        follow: "winner", "loser" or "random", the candidate that the trajectory continues from.
        ascent: how far the winner moves along the gradient of its reward, its prediction taken as constant; the
            trajectory continues from where it was.

    Returns:
        what `StepPairs.shapes` says.
    """
    count, solver, num_steps = len(drawing.keys), drawing.solver, method.steps
    (network,) = method.modules
    r, u = (jnp.asarray([*of_pred[1:], end], jnp.float32) for of_pred, end in zip(drawing.clean, (1, 0), strict=True))
    following = jax.tree.map(lambda x: jnp.concatenate([x[1:], x[-1:]]), solver)

    def guide(latents, row):
        rows = jax.tree.map(lambda x: jnp.broadcast_to(x, (count, *x.shape)), row)
        batch = {"row": rows, "text": drawing.text, "empty": drawing.empty}
        return guided(drawing.predict, network, batch, latents, method.guidance_scale)

    def candidates_of(state, inputs, how_many):
        number, row, next_row, *_ = inputs
        latents, noise_pred = state
        mean, _ = step(latents, noise_pred, row)
        noise = draw_normal(drawing.keys, number, (how_many, *drawing.shape))
        candidates = mean[:, None] + row.fresh_noise_coef * noise
        # At the last candidates, which are images, nothing more is predicted.
        predicted = jax.lax.cond(number < num_steps, lambda x: guide(x, next_row), jnp.zeros_like, candidates)
        return candidates, predicted

    def walk(state, inputs):
        candidates, predicted = candidates_of(state, inputs, 1)
        return (candidates[:, 0], predicted[:, 0]), None

    def choose(state, inputs):
        number, _, _, r, u = inputs
        candidates, predicted = candidates_of(state, inputs, pool)
        clean = r * candidates + u * predicted
        rewards = drawing.score(clean.reshape(-1, *drawing.shape)).reshape(count, pool)
        best, worst = rewards.argmax(axis=1), rewards.argmin(axis=1)
        winner = _take(candidates, best)
        if ascent:
            winner = winner + ascent * r * drawing.ascent(_take(clean, best))
        dice = jax.vmap(lambda key: jax.random.fold_in(key, num_steps + number))(drawing.keys)
        any_one = jax.vmap(lambda key: jax.random.randint(key, (), 0, pool))(dice)
        chosen = {"winner": best, "loser": worst, "random": any_one}[follow]
        pair = {
            "latents": state[0],
            "winner": winner,
            "loser": _take(candidates, worst),
            "rewards": jnp.stack([rewards.max(axis=1), rewards.min(axis=1)], axis=1),
            "reward": rewards.mean(axis=1),
        }
        return (_take(candidates, chosen), _take(predicted, chosen)), pair

    start = solver.init_noise_sigma * draw_normal(drawing.keys, 0, drawing.shape)
    first_row = jax.tree.map(lambda x: x[0], solver)
    state = start, guide(start[:, None], first_row)[:, 0]
    inputs = jnp.arange(1, num_steps + 1), solver, following, r, u
    early, late = (
        jax.tree.map(lambda x, part=part: x[part], inputs) for part in (slice(method.skip), slice(method.skip, None))
    )
    if method.skip:
        state, _ = jax.lax.scan(walk, state, early)
    _, pairs = jax.lax.scan(choose, state, late)
    pairs = {name: jnp.moveaxis(x, 0, 1) for name, x in pairs.items()}
    return {**pairs, "reward": pairs["reward"][:, -1]}


def _take(x: Candidates, which: Int[jax.Array, " images"]) -> Latents:
    """One of the K latents of each image."""
    return jnp.take_along_axis(x, which[:, None, None, None, None], axis=1)[:, 0]


def draw_trajectories(
    drawing: RolloutInputs, method: OnlineMethod, *, images: int, one_start: bool
) -> tuple[
    Float[jax.Array, "prompts images visited height width channels"],
    Float[jax.Array, "prompts images steps"],
    Float[jax.Array, "prompts images"],
]:
    """Whole trajectories of several images for each prompt.

    Args:
        drawing: for B prompts.
        method: whose module draws.
        images: G, of each prompt.
        one_start: whether those of a prompt begin with the same noise.

    Returns:
        latents of S + 1 visits, log-densities of S steps, and rewards.
    """
    count, (network,) = len(drawing.keys), method.modules
    # Number 0 of a prompt's key is the common start.
    keys = jax.vmap(lambda key: jax.vmap(partial(jax.random.fold_in, key))(jnp.arange(1, images + 1)))(drawing.keys)
    starting = jnp.broadcast_to(drawing.keys[:, None], keys.shape) if one_start else keys
    latents, log_probs = sample_trajectory(
        drawing.predict,
        tabulate(cfg(method.guidance_scale, network), method.steps, count * images),
        drawing.solver,
        keys.reshape(-1),
        jax.tree.map(lambda x: jnp.repeat(x, images, axis=0), drawing.text),
        jax.tree.map(lambda x: jnp.repeat(x, images, axis=0), drawing.empty),
        drawing.shape,
        start=drawing.solver.init_noise_sigma * draw_normal(starting.reshape(-1), 0, drawing.shape),
    )
    rewards = drawing.score(latents[-1]).reshape(count, images)
    latents, log_probs = (jnp.moveaxis(x, 0, 1).reshape(count, images, -1, *x.shape[2:]) for x in (latents, log_probs))
    return latents, log_probs, rewards
