"""Online training: the policy draws images, a reward compares them, and a loss learns from that.

Each iteration draws the trajectories of some prompts with the current weights, the *experience*, then takes minibatches
from it, every step of every trajectory being an example. Methods differ in what is drawn and which loss takes it:

    TailorPO   two candidates for each step from the same latents, ranked by the reward of what they promise
    SPO        the best and the worst of a pool of such candidates
    D3PO       two images from one initial noise; the better one's steps are preferred
    DDPO       several images for each prompt, judged against each other: a policy gradient
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flax_pref.diffusion.guidance import Rule, cfg, pgd, tabulate
from flax_pref.diffusion.sampler import Predict, draw_normal, sample_trajectory
from flax_pref.diffusion.solvers import Solver, step
from flax_pref.objectives.d3po import d3po
from flax_pref.objectives.ddpo import advantages, ddpo
from flax_pref.objectives.spo import spo
from flax_pref.objectives.tailorpo import guided, tailorpo

# ----------------------------------------------------------------------------------------------------------------------
# Methods


class Drawing(NamedTuple):
    """What trajectories of B prompts are drawn with, while JAX traces.

    Attributes:
        predict: the networks.
        solver: of S rows.
        clean: r and u, `[S]` each; see `solvers.clean_estimate`.
        keys: `[B]`.
        text: conditioning on the prompts, `[B, ...]` each.
        empty: of no prompt, likewise.
        shape: `(H, W, C)` of latents.
        score: `(clean latents [B * K, H, W, C]) -> [B * K]`, K of each prompt.
        ascent: the gradients of that.
    """

    predict: Predict
    solver: Solver
    clean: tuple[np.ndarray, np.ndarray]
    keys: jax.Array
    text: Any
    empty: Any
    shape: tuple[int, int, int]
    score: Callable[[jax.Array], jax.Array]
    ascent: Callable[[jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Online:
    """What all methods have in common."""

    modules: ClassVar[tuple[str, ...]]
    """Names of what is trained."""
    reference: ClassVar[bool] = True
    """Whether it is compared with the base."""
    skip: ClassVar[int] = 0
    """Steps at the beginning that nothing is learned from."""

    steps: int = 20
    """Of DDIM, for each image."""
    eta: float = 1.0
    """Of DDIM, the share of noise that steps draw anew: above 0, at most 1; see `solvers.ddim`."""
    guidance_scale: float = 5.0
    """s of classifier-free guidance, while images are drawn and in the loss; 1 is none."""

    def __post_init__(self):
        self.expect("steps", self.steps > self.skip, f"{self.skip + 1} or more")
        self.expect("eta", 0 < self.eta <= 1, "above 0, at most 1: without noise, steps have no probabilities")
        self.expect("guidance_scale", math.isfinite(self.guidance_scale), "a finite number")

    def expect(self, field: str, holds: bool, expected: str) -> None:
        """Raises a ValueError that names a field, unless the condition holds."""
        if not holds:
            raise ValueError(f"{type(self).__name__}: {field} is {getattr(self, field)!r}; expected {expected}")

    @property
    def needs_gradients(self) -> bool:
        """Whether the reward must be differentiable."""
        return False

    @property
    def objective(self) -> Callable:
        """`(predict, batch, key) -> (loss, metrics)`."""
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

    def draw(self, drawing: Drawing) -> dict[str, jax.Array]:
        """The experience of B prompts, `[B, ...]` each."""
        raise NotImplementedError

    def batch(self, experience: Mapping[str, jax.Array], index: tuple[jax.Array, ...]) -> dict[str, jax.Array]:
        """Examples as the objective takes them, but for solver and conditioning.

        Args:
            experience: of N prompts.
            index: prompts, then where the examples are among theirs: `[B]` each.
        """
        raise NotImplementedError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preferences(Online):
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

    def options(self) -> dict[str, Any]:
        """Arguments of the loss."""
        return {name: getattr(self, name) for name in ("beta", "guidance_scale", "margin", "ratio_clip")}


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepPairs(Preferences):
    """Pairs of candidates for a step from the same latents."""

    def shapes(self, latent: tuple[int, int, int]) -> dict[str, tuple[int, ...]]:
        """See `Online`."""
        images = dict.fromkeys(("latents", "winner", "loser"), (*self.examples, *latent))
        return {**images, "rewards": (*self.examples, 2), "reward": ()}

    def batch(self, experience: Mapping[str, jax.Array], index: tuple[jax.Array, ...]) -> dict[str, jax.Array]:
        """See `Online`."""
        steps = {name: experience[name][index] for name in ("latents", "winner", "loser", "rewards")}
        return {**steps, "reward": experience["reward"][index[0]]}


@dataclasses.dataclass(frozen=True, kw_only=True)
class TailorPO(StepPairs):
    """TailorPO and, with a rate, TailorPO-G (arXiv:2502.01667); see `objectives.tailorpo`."""

    modules: ClassVar[tuple[str, ...]] = ("tailorpo",)

    follow: Literal["winner", "random", "loser"] = "winner"
    """The candidate that the trajectory goes on from."""
    rate: float = 0.0
    """Of TailorPO-G: before the loss the winner moves by `-rate` times the gradient of `(r_high - r)^2`; 0: not."""
    rise: float = 0.1
    """Of TailorPO-G: r_high lies this far above the winner's reward r."""

    def __post_init__(self):
        super().__post_init__()
        self.expect("follow", self.follow in ("winner", "random", "loser"), "'winner', 'random' or 'loser'")
        self.expect("rate", 0 <= self.rate < math.inf, "a number from 0 up")
        self.expect("rise", 0 < self.rise < math.inf, "a number above 0")

    @property
    def needs_gradients(self) -> bool:
        """See `Online`."""
        return self.rate > 0

    @property
    def objective(self) -> Callable:
        """See `Online`."""
        return partial(tailorpo, **self.options())

    def draw(self, drawing: Drawing) -> dict[str, jax.Array]:
        """See `Online`."""
        # The gradient of (r_high - r)^2 is -2 rise times that of r.
        return draw_step_pairs(drawing, self, pool=2, follow=self.follow, ascent=2 * self.rise * self.rate)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SPO(StepPairs):
    """SPO (arXiv:2406.04314), with a reward of the estimated image where its authors trained a reward of noisy ones."""

    modules: ClassVar[tuple[str, ...]] = ("spo",)

    beta: float = 10.0
    """See `Preferences`."""
    pool: int = 4
    """Candidates for a step; the trajectory goes on from any of them."""
    skip: int = 4
    """Steps at the beginning that have one candidate, and that nothing is learned from."""

    def __post_init__(self):
        self.expect("pool", self.pool >= 2, "2 or more")
        self.expect("skip", self.skip >= 0, "0 or more")
        super().__post_init__()

    @property
    def objective(self) -> Callable:
        """See `Online`."""
        return partial(spo, **self.options())

    def draw(self, drawing: Drawing) -> dict[str, jax.Array]:
        """See `Online`."""
        return draw_step_pairs(drawing, self, pool=self.pool, follow="random", ascent=0.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class D3PO(Preferences):
    """D3PO (arXiv:2311.13231); see `objectives.d3po`."""

    modules: ClassVar[tuple[str, ...]] = ("d3po",)

    @property
    def objective(self) -> Callable:
        """See `Online`."""
        return partial(d3po, **self.options())

    def shapes(self, latent: tuple[int, int, int]) -> dict[str, tuple[int, ...]]:
        """See `Online`."""
        return {"latents": (2, self.steps + 1, *latent), "rewards": (2,)}

    def draw(self, drawing: Drawing) -> dict[str, jax.Array]:
        """See `Online`: winners first."""
        latents, _, rewards = draw_trajectories(drawing, self, images=2, one_start=True)
        order = jnp.argsort(-rewards, axis=1)
        latents = jnp.take_along_axis(latents, order[:, :, None, None, None, None], axis=1)
        return {"latents": latents, "rewards": jnp.take_along_axis(rewards, order, axis=1)}

    def batch(self, experience: Mapping[str, jax.Array], index: tuple[jax.Array, ...]) -> dict[str, jax.Array]:
        """See `Online`."""
        prompt, number = index
        rewards = experience["rewards"][prompt]
        latents, next_latents = (experience["latents"][prompt, :, i] for i in (number, number + 1))
        return {"latents": latents, "next_latents": next_latents, "rewards": rewards, "reward": rewards.mean(axis=1)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class DDPO(Online):
    """DDPO (arXiv:2305.13301) with importance sampling; see `objectives.ddpo`."""

    modules: ClassVar[tuple[str, ...]] = ("ddpo",)
    reference: ClassVar[bool] = False

    images_per_prompt: int = 8
    """That are judged against each other."""
    ratio_clip: float = 1e-4
    """Of probabilities under the new and the old policy, for log-densities that are averaged over dimensions."""
    advantage_clip: float = 10.0
    """Largest size of an advantage."""

    def __post_init__(self):
        super().__post_init__()
        self.expect("images_per_prompt", self.images_per_prompt >= 2, "2 or more: one alone is its own mean")
        self.expect("ratio_clip", 0 < self.ratio_clip < 1, "a number between 0 and 1")
        self.expect("advantage_clip", 0 < self.advantage_clip < math.inf, "a number above 0")

    @property
    def objective(self) -> Callable:
        """See `Online`."""
        return partial(
            ddpo,
            guidance_scale=self.guidance_scale,
            ratio_clip=self.ratio_clip,
            advantage_clip=self.advantage_clip,
        )

    @property
    def examples(self) -> tuple[int, ...]:
        """See `Online`."""
        return self.images_per_prompt, self.steps

    def shapes(self, latent: tuple[int, int, int]) -> dict[str, tuple[int, ...]]:
        """See `Online`."""
        images = (self.images_per_prompt,)
        return {
            "latents": (*images, self.steps + 1, *latent),
            "log_prob": self.examples,
            "advantage": images,
            "reward": images,
        }

    def draw(self, drawing: Drawing) -> dict[str, jax.Array]:
        """See `Online`."""
        latents, log_probs, rewards = draw_trajectories(drawing, self, images=self.images_per_prompt, one_start=False)
        return {"latents": latents, "log_prob": log_probs, "advantage": advantages(rewards), "reward": rewards}

    def batch(self, experience: Mapping[str, jax.Array], index: tuple[jax.Array, ...]) -> dict[str, jax.Array]:
        """See `Online`."""
        *image, number = index
        return {
            "latents": experience["latents"][index],
            "next_latents": experience["latents"][(*image, number + 1)],
            "log_prob": experience["log_prob"][index],
            "advantage": experience["advantage"][tuple(image)],
            "reward": experience["reward"][tuple(image)],
        }


OnlineMethod = TailorPO | SPO | D3PO | DDPO


# ----------------------------------------------------------------------------------------------------------------------
# Drawing


def draw_step_pairs(
    drawing: Drawing, method: StepPairs, *, pool: int, follow: str, ascent: float
) -> dict[str, jax.Array]:
    """Trajectories with a pool of candidates for each step, and the best and the worst of each pool.

    A candidate x' is as good as the image it promises, `x_0 = r x' + u noise_pred(x')`, which takes a prediction for
    each; that of the candidate that is gone on from is the next step's own. The last candidates are images themselves.

    Args:
        drawing: for B prompts.
        method: of pairs.
        pool: candidates for a step.
        follow: "winner", "loser" or "random", the candidate that the trajectory goes on from.
        ascent: how far the winner moves along the gradient of its reward, its prediction taken as constant; the
            trajectory goes on from where it was.

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


def _take(x: jax.Array, which: jax.Array) -> jax.Array:
    """`[B, H, W, C]` of `[B, K, H, W, C]` and `[B]`."""
    return jnp.take_along_axis(x, which[:, None, None, None, None], axis=1)[:, 0]


def draw_trajectories(
    drawing: Drawing, method: Online, *, images: int, one_start: bool
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Whole trajectories of several images for each prompt.

    Args:
        drawing: for B prompts.
        method: whose module draws.
        images: G, of each prompt.
        one_start: whether those of a prompt begin with the same noise.

    Returns:
        latents `[B, G, S + 1, H, W, C]`, log-densities of the steps `[B, G, S]` and rewards `[B, G]`.
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
