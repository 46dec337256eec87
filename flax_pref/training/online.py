"""Online training: the policy draws images, a reward compares them, and a loss learns from that.

Each iteration draws the trajectories of some prompts with the current weights, the *experience*, then takes minibatches
from it, every step of every trajectory being an example. Methods differ in what is drawn and which loss takes it:

    TailorPO   two candidates for each step from the same latents, ranked by the reward of what they promise
    SPO        the best and the worst of a pool of such candidates
    D3PO       two images from one initial noise; the better one's steps are preferred
    DDPO       several images for each prompt, judged against each other: a policy gradient

What is drawn for a prompt is a function of the seed, the prompt's id and its place in the endless line of prompts, not
of devices or batches.
"""

import contextlib
import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from flax_pref.checkpoints.weights import Network, replicated
from flax_pref.diffusion.guidance import Rule, cfg, pgd, tabulate
from flax_pref.diffusion.sampler import Predict, draw_normal, image_keys, sample_trajectory
from flax_pref.diffusion.schedule import NoiseSchedule
from flax_pref.diffusion.solvers import Solver, clean_estimate, from_config, step
from flax_pref.objectives.d3po import d3po
from flax_pref.objectives.ddpo import advantages, ddpo
from flax_pref.objectives.spo import spo
from flax_pref.objectives.tailorpo import guided, tailorpo
from flax_pref.rewards.decoded import score_gradients, score_latents
from flax_pref.rewards.reward import Reward

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


# ----------------------------------------------------------------------------------------------------------------------
# The source of minibatches


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prompts:
    """What is drawn, on the host."""

    captions: Sequence[str]
    """P texts, for the reward."""
    ids: Sequence[int]
    """One for each, 0 .. 2^32 - 1; noise is a function of it and of the seed."""
    text: Any
    """What the networks are told of the captions: a pytree of arrays `[P, ...]`; see `diffusion.conditioning`."""
    empty: Any
    """Of no caption: the same without the leading axis."""

    def __post_init__(self):
        if not len(self.captions):
            raise ValueError("online: there are no prompts; expected one or more")
        for name, leaves in (("ids", [self.ids]), ("text", jax.tree.leaves(self.text))):
            for leaf in leaves:
                if len(leaf) != len(self.captions):
                    raise ValueError(f"online: {len(self.captions)} captions, but {len(leaf)} {name}; expected as many")

    @property
    def fingerprint(self) -> str:
        """SHA-256 of captions and ids."""
        return hashlib.sha256(json.dumps([list(self.captions), [int(n) for n in self.ids]]).encode()).hexdigest()


@dataclasses.dataclass(frozen=True, kw_only=True)
class RolloutConfig:
    """How much is drawn in an iteration, and how it is divided."""

    prompts: int = 64
    """Drawn in an iteration, by all hosts together; with fewer prompts than that, some come more than once."""
    at_once: int = 16
    """Prompts drawn at a time: it divides `prompts`, and has an effect on time and memory only."""
    batch_size: int = 64
    """Examples in a minibatch: steps, of any prompt."""
    epochs: int = 1
    """How often an example is used."""

    def __post_init__(self):
        for field in dataclasses.fields(self):
            if getattr(self, field.name) < 1:
                raise ValueError(f"rollouts: {field.name} is {getattr(self, field.name)}; expected 1 or more")
        if self.prompts % self.at_once:
            raise ValueError(
                f"rollouts: at_once is {self.at_once}; expected a number that divides prompts={self.prompts}"
            )


# Of the sequences of numbers that a seed gives.
_PROMPT_ORDER, _EXAMPLE_ORDER = 0, 1


class Rollouts:
    """Endless minibatches of the policy's own experience.

    Minibatches are what the method's objective takes: arrays `[batch_size, ...]`, whatever the devices. Iterations are
    numbered from 0; what is drawn in one is a function of its number, the seed and the weights, and the order of its
    examples of the first two.
    """

    def __init__(
        self,
        method: Online,
        predict_of: Callable[[Any, Any], Predict],
        frozen: Any,
        vae: Network,
        prompts: Prompts,
        reward: Reward,
        scheduler_config: Mapping[str, Any],
        config: RolloutConfig,
        *,
        size: tuple[int, int],
        seed: int,
        sharding: NamedSharding | None = None,
    ):
        """Nothing is drawn before the first minibatch is asked for.

        Args:
            method: says what is drawn.
            predict_of: `(params, frozen) -> Predict`, which knows the method's module; it is called while JAX traces.
            frozen: weights that are not trained, any pytree of arrays on the devices.
            vae: the autoencoder; with a sharding, every device gets all of it, and of the reward's weights.
            prompts: to draw.
            reward: judges what is drawn.
            scheduler_config: of the checkpoint.
            config: how much is drawn.
            size: height and width of the images in pixels.
            seed: 0 .. 2^32 - 1.
            sharding: of the leading axis of experience and minibatches over a mesh; None: one device.

        Raises:
            ValueError: the method needs gradients that the reward has not, or something cannot be divided so.
        """
        if method.needs_gradients and not reward.differentiable:
            raise ValueError(
                f"online: {type(method).__name__} with rate={method.rate:g} (TailorPO-G) follows the gradient of the "
                f"reward, and {reward.name!r} has none; set rate to 0, or take rewards with gradients"
            )
        self._method, self._predict_of, self._frozen = method, predict_of, frozen
        self._prompts, self._config, self._seed, self._sharding = prompts, config, seed, sharding
        if sharding is not None:
            vae = replicated(vae, sharding.mesh)
            reward = jax.device_put(reward, NamedSharding(sharding.mesh, PartitionSpec()))
        self._vae, self._reward = vae, reward
        solver = from_config(scheduler_config, method.steps, name="ddim", eta=method.eta)
        self._solver = jax.tree.map(np.asarray, solver)  # of the host: what all processes know alike
        self._clean = clean_estimate(NoiseSchedule.from_dict(scheduler_config), self._solver.timesteps)
        factor = vae.config.downscale_factor
        if any(side < 1 or side % factor for side in size):
            raise ValueError(f"online: size is {size}; expected height and width that are multiples of {factor}")
        self._shape = (size[0] // factor, size[1] // factor, vae.config.latent_channels)
        self._examples = config.prompts * math.prod(method.examples)
        if self._examples % config.batch_size:
            raise ValueError(
                f"rollouts: batch_size is {config.batch_size}; expected a number that divides the {self._examples} "
                f"examples of an iteration, {math.prod(method.examples)} of each of {config.prompts} prompts"
            )
        for name in ("at_once", "batch_size"):
            self._check_divisible(name)
        self._keys = np.asarray(jax.random.key_data(image_keys(seed, prompts.ids)))
        self._order = {
            **{"seed": seed, "captions": len(prompts.captions), "fingerprint": prompts.fingerprint},
            **{"prompts": config.prompts, "batch_size": config.batch_size, "epochs": config.epochs},
        }
        self._draw = jax.jit(self._draw_some)
        self._join = jax.jit(lambda *parts: jax.tree.map(lambda *x: jnp.concatenate(x), *parts), out_shardings=sharding)
        self._take = jax.jit(self._take_batch, out_shardings=sharding)
        shapes = {name: (config.prompts, *shape) for name, shape in method.shapes(self._shape).items()}
        zeros = jax.jit(lambda: {name: jnp.zeros(shape) for name, shape in shapes.items()}, out_shardings=sharding)
        self._empty = jax.tree.map(np.asarray, prompts.empty)
        self._step = 0
        self._experience, self._told = zeros(), None

    def _check_divisible(self, name: str) -> None:
        count = getattr(self._config, name)
        try:
            if self._sharding is not None:
                self._sharding.shard_shape((count,))
        except ValueError as error:
            raise ValueError(
                f"rollouts: {name} is {count} and cannot be divided over the devices ({error}); choose a multiple"
            ) from error

    @property
    def minibatches(self) -> int:
        """Of an iteration."""
        return self._examples * self._config.epochs // self._config.batch_size

    def next(self, params: Any) -> dict[str, Any]:
        """The next minibatch; where an iteration begins, its experience is drawn with these weights first."""
        iteration, number = divmod(self._step, self.minibatches)
        if number == 0:
            self._experience = self._draw_all(params, iteration)
        if self._told is None or number == 0:
            self._told = self._told_of(self.prompt_order(iteration))
        size = self._config.batch_size
        chosen = self.example_order(iteration)[number * size : (number + 1) * size]
        index = np.unravel_index(chosen, (self._config.prompts, *self._method.examples))
        index = self._put([x.astype(np.int32) for x in index])
        batch = self._take(self._experience, self._told, self._empty, self._solver, index)
        self._step += 1
        return batch

    def position(self) -> dict[str, Any]:
        """Where the next minibatch lies, as JSON can hold it; `arrays` belong to it."""
        return {"step": self._step, **self._order}

    def arrays(self) -> dict[str, jax.Array]:
        """The current experience, of shapes that do not change; zeros before the first."""
        return self._experience

    def restore(self, position: Mapping[str, Any], arrays: Mapping[str, jax.Array]) -> None:
        """Goes on from a position with its arrays: with the weights of then, the same minibatches follow.

        Raises:
            ValueError: the position is that of other prompts, another seed or other numbers of them, or is none.
        """
        differ = [
            f"{name} {position.get(name)!r}, now {value!r}"
            for name, value in self._order.items()
            if position.get(name) != value
        ]
        if differ:
            raise ValueError(
                f"online: the saved position is that of another run: {'; '.join(differ)}; go on with the prompts, seed "
                "and numbers that the run began with"
            )
        if not isinstance(position.get("step"), int) or position["step"] < 0:
            raise ValueError(
                f"online: the saved position has step {position.get('step')!r}; expected a number of minibatches, 0 or "
                "more"
            )
        self._step, self._experience, self._told = position["step"], dict(arrays), None

    # Order and chance

    def prompt_order(self, iteration: int) -> np.ndarray:
        """The prompts of an iteration, indices `[prompts]` into all, which are shuffled anew for each time through."""
        total, own = len(self._prompts.captions), self._config.prompts
        places = np.arange(iteration * own, (iteration + 1) * own)
        epochs = {
            epoch: np.random.default_rng([self._seed, _PROMPT_ORDER, epoch]).permutation(total)
            for epoch in np.unique(places // total).tolist()
        }
        return np.array([epochs[place // total][place % total] for place in places.tolist()])

    def example_order(self, iteration: int) -> np.ndarray:
        """All examples of an iteration, indices, as often as they are used and shuffled anew each time."""
        rng = np.random.default_rng([self._seed, _EXAMPLE_ORDER, iteration])
        return np.concatenate([rng.permutation(self._examples) for _ in range(self._config.epochs)])

    # Drawing

    def _draw_all(self, params: Any, iteration: int) -> dict[str, jax.Array]:
        numbers, at_once = self.prompt_order(iteration), self._config.at_once
        places = np.arange(iteration * len(numbers), (iteration + 1) * len(numbers)).astype(np.uint32)
        parts = []
        for begin in range(0, len(numbers), at_once):
            own = slice(begin, begin + at_once)
            prepared = self._reward.prepare([self._prompts.captions[n] for n in numbers[own]])
            of_prompts = self._put((self._keys[numbers[own]], places[own], prepared))
            # Kernels, which the compiler does not partition, divide themselves over the mesh that is set.
            with contextlib.nullcontext() if self._sharding is None else jax.set_mesh(self._sharding.mesh):
                weights = params, self._frozen, self._vae.params, self._reward
                parts.append(self._draw(*weights, self._solver, self._told_of(numbers[own]), self._empty, of_prompts))
        return self._join(*parts)

    def _draw_some(self, params, frozen, vae_params, reward, solver, text, empty, of_prompts) -> dict[str, jax.Array]:
        """The experience of some prompts; to be jitted."""
        key_data, places, prepared = of_prompts
        keys = jax.vmap(jax.random.fold_in)(jax.random.wrap_key_data(key_data, impl="threefry2x32"), places)
        vae = self._vae._replace(params=vae_params)

        def judge(of_latents: Callable, latents: jax.Array) -> jax.Array:
            each = jax.tree.map(lambda x: jnp.repeat(x, len(latents) // len(x), axis=0), prepared)
            return of_latents(reward, vae, latents, each, sharding=self._sharding)

        drawing = Drawing(
            predict=self._predict_of(params, frozen),
            solver=solver,
            clean=self._clean,
            keys=keys,
            text=text,
            empty=_for_each(empty, text),
            shape=self._shape,
            score=partial(judge, score_latents),
            ascent=partial(judge, score_gradients),
        )
        return self._method.draw(drawing)

    def _take_batch(self, experience, text, empty, solver, index) -> dict[str, Any]:
        """Examples of the experience; to be jitted."""
        prompts, *_, number = index
        text = jax.tree.map(lambda x: x[prompts], text)
        row = jax.tree.map(lambda x: x[number + self._method.skip], solver)
        examples = self._method.batch(experience, tuple(index))
        return {**examples, "row": row, "text": text, "empty": _for_each(empty, text)}

    def _told_of(self, numbers: np.ndarray) -> Any:
        """Conditioning on prompts, `[B, ...]` each, on the devices."""
        return self._put(jax.tree.map(lambda x: np.asarray(x)[numbers], self._prompts.text))

    def _put(self, arrays: Any) -> Any:
        """Arrays of numpy, the same on every host, divided over the devices."""
        if self._sharding is None:
            return jax.tree.map(jnp.asarray, arrays)
        return jax.tree.map(
            lambda x: jax.make_array_from_callback(x.shape, self._sharding, lambda index: x[index]), arrays
        )


def _for_each(empty: Any, text: Any) -> Any:
    """Conditioning on no prompt, for each row of that on prompts."""
    return jax.tree.map(lambda empty, text: jnp.broadcast_to(empty, text.shape), empty, text)
