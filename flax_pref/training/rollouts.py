"""Rollouts: minibatches of what the policy itself has drawn, as a source of a run's batches.

What is drawn for a prompt is a function of the seed, the prompt's id and its place in the endless line of prompts, not
of devices or batches.
"""

import collections
import contextlib
import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from flax_pref.data.pipeline import saved_step
from flax_pref.diffusion.sampler import Predict, image_keys
from flax_pref.diffusion.schedule import NoiseSchedule
from flax_pref.diffusion.scheduler_configs import solver_from_config
from flax_pref.diffusion.solvers import clean_estimate
from flax_pref.methods.online import OnlineMethod, RolloutInputs
from flax_pref.methods.step_pairs import StepPairs
from flax_pref.models.network import Network, replicated
from flax_pref.parallel.pieces import put_in_pieces
from flax_pref.rewards.decoded import decode_and_score, score_gradients, score_latents
from flax_pref.rewards.elsewhere import HostScores, split_reward
from flax_pref.rewards.remote import Answer, RemoteError
from flax_pref.rewards.reward import Reward


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
    update: Literal["iteration", "step"] = "iteration"
    """When weights change: after all trajectories of an iteration, whose examples are then shuffled, or inside the
    trajectories, after each trained step (TailorPO's Algorithm 1; a minibatch is one step of all prompts)."""

    def __post_init__(self):
        for name in ("prompts", "at_once", "batch_size", "epochs"):
            if getattr(self, name) < 1:
                raise ValueError(f"rollouts: {name} is {getattr(self, name)}; expected 1 or more")
        if self.update not in ("iteration", "step"):
            raise ValueError(f"rollouts: update is {self.update!r}; expected 'iteration' or 'step'")
        if self.update == "step" and (self.batch_size, self.epochs) != (self.prompts, 1):
            raise ValueError(
                f"rollouts: batch_size is {self.batch_size} and epochs {self.epochs}; with update='step' a minibatch "
                f"is one step of all prompts, used once: expected {self.prompts} and 1"
            )
        if self.prompts % self.at_once:
            raise ValueError(
                f"rollouts: at_once is {self.at_once}; expected a number that divides prompts={self.prompts}"
            )


# Of the sequences of numbers that a seed gives.
_PROMPT_ORDER, _EXAMPLE_ORDER = 0, 1
STATE = "state"
"""Name, in the experience of one step, of the latents that the next begins with."""


class _Part(NamedTuple):
    """Prompts that are drawn at a time: what they are drawn with, where they are among all, and their captions."""

    common: tuple
    own: slice
    captions: list[str]


# A drawing that stops where it needs scores: it yields its prompts and images, and is sent the scores of each reward
# that lives elsewhere.
_Drawing = Generator[tuple[_Part, jax.Array], list[jax.Array], dict[str, jax.Array]]


class Rollouts:
    """Endless minibatches of the policy's own experience.

    Minibatches are what the method's objective takes: arrays `[batch_size, ...]`, whatever the devices. Iterations are
    numbered from 0; what is drawn in one is a function of its number, the seed and the weights, and the order of its
    examples of the first two.

    Where rewards live elsewhere (`rewards.remote`), devices do not wait for them while there are other prompts to draw
    with the same weights: those at once are drawn while the scores of those before are on their way.
    """

    def __init__(
        self,
        method: OnlineMethod,
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
        tell: Callable[[str], object] = lambda line: None,
    ):
        """Nothing is drawn before the first minibatch is asked for.

        Args:
            method: says what is drawn.
            predict_of: `(params, frozen) -> Predict`, which knows the method's module; it is called while JAX traces.
            frozen: weights that are not trained, any pytree of arrays on the devices.
            vae: the autoencoder; with a sharding, every device gets all of it.
            prompts: to draw.
            reward: judges what is drawn; a sharding's mesh divides its weights, see `parallel.pieces`.
            scheduler_config: of the checkpoint.
            config: how much is drawn.
            size: height and width of the images in pixels.
            seed: 0 .. 2^32 - 1.
            sharding: of the leading axis of experience and minibatches over a mesh; None: one device.
            tell: called with a line about images that have no score.

        Raises:
            ValueError: the method needs gradients that the reward has not, or something cannot be divided so.
        """
        check_gradients(method, reward.name, reward.differentiable)
        check_update(method, config)
        self._method, self._predict_of, self._frozen = method, predict_of, frozen
        self._prompts, self._config, self._seed, self._sharding = prompts, config, seed, sharding
        self._mesh, self._split, self._tell = None, split_reward(reward), tell
        placed: Any = reward if self._split is None else self._split.local
        if sharding is not None:
            assert isinstance(sharding.mesh, Mesh)  # of devices, for arrays are put there
            self._mesh = sharding.mesh
            vae = replicated(vae, sharding.mesh)
            placed = put_in_pieces(placed, sharding.mesh)
        self._vae, self._placed, self._prepare = vae, placed, (self._split or reward).prepare
        solver = solver_from_config(scheduler_config, method.steps, name=method.solver_name, eta=method.eta)
        self._solver = jax.tree.map(np.asarray, solver)  # of the host: what all processes know alike
        schedule = NoiseSchedule.from_dict(scheduler_config)
        self._clean = clean_estimate(schedule, self._solver.timesteps)
        self._signal = schedule.alphas_cumprod[np.asarray(self._solver.timesteps, int)].astype(np.float32)
        factor = vae.config.downscale_factor
        if any(side < 1 or side % factor for side in size):
            raise ValueError(f"online: size is {size}; expected height and width that are multiples of {factor}")
        self._shape = (size[0] // factor, size[1] // factor, vae.config.latent_channels)
        self._examples = config.prompts * math.prod(method.examples)
        self._within = config.update == "step"
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
        self._draw, self._draw_start = map(jax.jit, (self._drawing, self._drawing_of_noise))
        self._draw_step, self._draw_state = map(jax.jit, (self._drawing_of_a_step, self._drawing_to_a_step))
        self._draw_images, self._judge_images = map(jax.jit, (self._drawing_of_images, self._judging))
        self._draw_ends, self._judge_ends = map(jax.jit, (self._drawing_of_candidates, self._choice))
        self._stack = jax.jit(_stacked)
        self._join = jax.jit(lambda *parts: jax.tree.map(lambda *x: jnp.concatenate(x), *parts), out_shardings=sharding)
        self._take = jax.jit(partial(take_batch, method), out_shardings=sharding)
        of_prompt = method.shapes(self._shape)
        if self._within:
            assert isinstance(method, StepPairs)  # see `check_update`
            of_prompt = {**method.shapes(self._shape, 1), STATE: self._shape}
        shapes = {name: (config.prompts, *shape) for name, shape in of_prompt.items()}
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
        return minibatches(self._method, self._config)

    def next(self, params: Any) -> dict[str, Any]:
        """The next minibatch; where an iteration begins, its experience is drawn with these weights first."""
        iteration, number = divmod(self._step, self.minibatches)
        if self._within:
            self._experience = self._draw_next(params, iteration, number)
        elif number == 0:
            self._experience = self._draw_all(params, iteration)
        if self._told is None or number == 0:
            self._told = self._told_of(self.prompt_order(iteration))
        chosen, rows = self._examples_of(iteration, number)
        steps = self._solver, self._signal
        batch = self._take(self._experience, self._told, self._empty, steps, chosen, rows)
        self._step += 1
        return batch

    def _examples_of(self, iteration: int, number: int) -> tuple[list[jax.Array], jax.Array]:
        """The examples of a minibatch: where they are in the experience, and their rows of the solver."""
        size, trained = self._config.batch_size, np.array(self._method.trained)
        if self._within:
            index, rows = (np.arange(size), np.zeros(size, int)), np.full(size, trained[number])
        else:
            chosen = self.example_order(iteration)[number * size : (number + 1) * size]
            index = np.unravel_index(chosen, (self._config.prompts, *self._method.examples))
            rows = trained[index[-1]]
        *index, rows = self._put([x.astype(np.int32) for x in (*index, rows)])
        return index, rows

    @property
    def judging(self) -> dict[str, Any]:
        """Autoencoder and rewards, which stay on the devices during training."""
        return {"autoencoder": self._vae.params, "rewards": self._placed}

    def position(self) -> dict[str, Any]:
        """Where the next minibatch lies, as JSON can hold it; `arrays` belong to it."""
        return {"step": self._step, **self._order}

    def arrays(self) -> dict[str, jax.Array]:
        """The current experience, of shapes that do not change; zeros before the first."""
        return self._experience

    def restore(self, position: Mapping[str, Any], arrays: Mapping[str, jax.Array]) -> None:
        """Resumes from a position with its arrays: with the weights of then, the same minibatches follow.

        Raises:
            ValueError: the position is that of other prompts, another seed or other numbers of them, or is none.
        """
        step = saved_step("online", position, self._order)
        self._step, self._experience, self._told = step, dict(arrays), None

    # Order and chance

    def prompt_order(self, iteration: int) -> np.ndarray:
        """The prompts of an iteration, indices `[prompts]` into all, which are shuffled again for each time through."""
        total, own = len(self._prompts.captions), self._config.prompts
        places = np.arange(iteration * own, (iteration + 1) * own)
        epochs = {
            epoch: np.random.default_rng([self._seed, _PROMPT_ORDER, epoch]).permutation(total)
            for epoch in np.unique(places // total).tolist()
        }
        return np.array([epochs[place // total][place % total] for place in places.tolist()])

    def example_order(self, iteration: int) -> np.ndarray:
        """All examples of an iteration, indices, as often as they are used and shuffled again each time."""
        rng = np.random.default_rng([self._seed, _EXAMPLE_ORDER, iteration])
        return np.concatenate([rng.permutation(self._examples) for _ in range(self._config.epochs)])

    # Drawing

    def _draw_all(self, params: Any, iteration: int) -> dict[str, jax.Array]:
        """The experience of an iteration."""
        parts = self._parts(params, iteration)
        with self._on_mesh():
            if self._split is None:
                return self._join(*(self._draw(*part.common) for part in parts))
            if isinstance(self._method, StepPairs):
                drawings = (self._steps_apart(part, self._method.trained) for part in parts)
            else:
                drawings = map(self._images_apart, parts)
            return self._join(*self._interleaved(drawings))

    def _draw_next(self, params: Any, iteration: int, number: int) -> dict[str, jax.Array]:
        """The experience of one trained step, with the latents that the next begins with."""
        trained = self._method.trained
        first, last = trained[number - 1] + 1 if number else 0, trained[number]

        def latents(part: _Part) -> jax.Array:
            return self._experience[STATE][part.own] if number else self._draw_start(*part.common)

        parts = self._parts(params, iteration)
        with self._on_mesh():
            if self._split is None:
                bounds = np.int32(first), np.int32(last)
                return self._join(*(self._draw_step(*part.common, latents(part), *bounds) for part in parts))
            drawings = (self._steps_apart(part, (last,), first, latents(part)) for part in parts)
            return self._join(*self._interleaved(drawings))

    def _on_mesh(self) -> contextlib.AbstractContextManager:
        """Kernels, which the compiler does not partition, divide themselves over the mesh that is set."""
        return contextlib.nullcontext() if self._mesh is None else jax.set_mesh(self._mesh)

    def _parts(self, params: Any, iteration: int) -> Iterator[_Part]:
        """The prompts of an iteration, so many at a time."""
        numbers, at_once = self.prompt_order(iteration), self._config.at_once
        places = np.arange(iteration * len(numbers), (iteration + 1) * len(numbers)).astype(np.uint32)
        for begin in range(0, len(numbers), at_once):
            own = slice(begin, begin + at_once)
            captions = [self._prompts.captions[int(n)] for n in numbers[own]]
            of_prompts = self._put((self._keys[numbers[own]], places[own], self._prepare(captions)))
            weights = params, self._frozen, self._vae.params, self._placed
            common = (*weights, self._solver, self._told_of(numbers[own]), self._empty, of_prompts)
            yield _Part(common, own, captions)

    # Drawing with rewards that live elsewhere

    def _interleaved(self, drawings: Iterable[_Drawing]) -> list[dict[str, jax.Array]]:
        """The experience of each drawing; the devices work on others while scores for one are on their way.

        Raises:
            RemoteError: a reward has failed, or has no score for any image.
        """
        assert self._split is not None
        found: list[dict[str, jax.Array]] = []
        waiting: collections.deque[tuple[int, _Drawing, list[Answer]]] = collections.deque()
        drawn: collections.deque[Answer] = collections.deque()
        told: list[list[HostScores]] = [[] for _ in self._split.remote]

        def ask(place: int, drawing: _Drawing, needed: tuple[_Part, jax.Array]) -> None:
            part, images = needed
            assert self._split is not None
            asked = self._split.ask(images, part.captions)
            waiting.append((place, drawing, asked.scores))
            drawn.append(asked.images)
            if len(drawn) > 1:  # the images of no more than two are on the devices
                drawn.popleft().get()

        for place, drawing in enumerate(drawings):
            found.append({})
            ask(place, drawing, next(drawing))
        while waiting:
            place, drawing, answers = waiting.popleft()
            scores = [answer.get() for answer in answers]
            for of_reward, one in zip(told, scores, strict=True):
                of_reward.append(one)
            try:
                ask(place, drawing, drawing.send([self._put(one.scores) for one in scores]))
            except StopIteration as done:
                found[place] = done.value
        for reward, of_reward in zip(self._split.remote, told, strict=True):
            unscored, count = (sum(numbers) for numbers in zip(*(one[1:] for one in of_reward), strict=True))
            if unscored == count:
                raise RemoteError(f"{reward.name}: has no score for any of {count} images")
            if unscored:
                self._tell(f"{reward.name}: no score for {unscored} of {count} images; nothing is learned from these")
        return found

    def _images_apart(self, part: _Part) -> _Drawing:
        """Whole images, then their scores."""
        outputs = list(self._draw_images(*part.common))
        given = yield part, outputs.pop()  # nothing here holds the images
        return self._judge_images(*outputs, given)

    def _steps_apart(
        self, part: _Part, trained: Sequence[int], first: int = 0, latents: jax.Array | None = None
    ) -> _Drawing:
        """Trained steps, each of which needs scores; from step `first`, which latents begin with (default: noise)."""
        latents = self._draw_start(*part.common) if latents is None else latents
        state = self._draw_state(*part.common, latents, np.int32(first))
        pairs = []
        for last in trained:
            outputs = list(self._draw_ends(*part.common, state, np.int32(first), np.int32(last)))
            given = yield part, outputs.pop()
            state, pair = self._judge_ends(*part.common, *outputs, given, np.int32(last))
            pairs.append(pair)
            first = last + 1
        return {**self._stack(*pairs), **({STATE: state[0]} if self._within else {})}

    # What is jitted: the experience of some prompts, and parts of it.

    def _drawing(self, *common: Any) -> dict[str, jax.Array]:
        return self._method.draw(self._inputs(*common))

    def _drawing_of_noise(self, *common: Any) -> jax.Array:
        assert isinstance(self._method, StepPairs)
        return self._method.draw_start(self._inputs(*common))

    def _drawing_of_a_step(self, *inputs: Any) -> dict[str, jax.Array]:
        assert isinstance(self._method, StepPairs)
        *common, latents, first, last = inputs
        latents, experience = self._method.draw_step(self._inputs(*common), latents, first, last)
        return {**experience, STATE: latents}

    def _drawing_of_images(self, *common: Any) -> tuple[dict[str, jax.Array], tuple[jax.Array, ...], jax.Array]:
        drawn, clean = self._method.draw_images(self._inputs(*common))
        images, known = self._of_latents(common, decode_and_score, clean)
        return drawn, known, images

    def _judging(self, drawn: dict[str, jax.Array], known: Any, given: Any) -> dict[str, jax.Array]:
        count = len(jax.tree.leaves(drawn)[0])
        return self._method.judge_images(drawn, self._total(count, known, given))

    def _drawing_to_a_step(self, *inputs: Any) -> Any:
        assert isinstance(self._method, StepPairs)
        *common, latents, first = inputs
        return self._method.draw_state(self._inputs(*common), latents, first)

    def _drawing_of_candidates(self, *inputs: Any) -> Any:
        assert isinstance(self._method, StepPairs)
        *common, state, first, last = inputs
        ends, clean = self._method.draw_ends(self._inputs(*common), state, first, last)
        images, known = self._of_latents(common, decode_and_score, clean)
        return ends, known, images

    def _choice(self, *inputs: Any) -> Any:
        assert isinstance(self._method, StepPairs)
        *common, ends, known, given, number = inputs
        rewards = self._total(len(ends.latents), known, given)
        return self._method.judge_ends(self._inputs(*common), ends, rewards, number)

    def _total(self, count: int, known: Any, given: Any) -> jax.Array:
        """Rewards `[count, K]`."""
        assert self._split is not None
        return self._split.total(known, given).reshape(count, -1)

    def _of_latents(self, common: Sequence[Any], function: Callable, latents: jax.Array) -> Any:
        """A function of `rewards.decoded` of K latents of each prompt."""
        _, _, vae_params, reward, *_, (_, _, prepared) = common
        each = jax.tree.map(lambda x: jnp.repeat(x, len(latents) // len(x), axis=0), prepared)
        return function(reward, self._vae._replace(params=vae_params), latents, each, sharding=self._sharding)

    def _inputs(self, *common: Any) -> RolloutInputs:
        params, frozen, _, _, solver, text, empty, (key_data, places, _) = common
        keys = jax.vmap(jax.random.fold_in)(jax.random.wrap_key_data(key_data, impl="threefry2x32"), places)
        return RolloutInputs(
            predict=self._predict_of(params, frozen),
            solver=solver,
            clean=self._clean,
            keys=keys,
            text=text,
            empty=empty_for_each(empty, text),
            shape=self._shape,
            score=partial(self._of_latents, common, score_latents),
            ascent=partial(self._of_latents, common, score_gradients),
        )

    def _told_of(self, numbers: np.ndarray) -> Any:
        """Conditioning on prompts, `[B, ...]` each, on the devices."""
        return self._put(jax.tree.map(lambda x: np.asarray(x)[numbers], self._prompts.text))

    def _put(self, arrays: Any) -> Any:
        """Arrays of numpy, the same on every host, divided over the devices."""
        sharding = self._sharding
        if sharding is None:
            return jax.tree.map(jnp.asarray, arrays)
        return jax.tree.map(lambda x: jax.make_array_from_callback(x.shape, sharding, lambda index: x[index]), arrays)


def _stacked(*pairs: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Experience of trained steps, one after the other; see `StepPairs.draw`."""
    names = [name for name in pairs[0] if name != "reward"]
    steps = {name: jnp.stack([pair[name] for pair in pairs], axis=1) for name in names}
    return {**steps, "reward": pairs[-1]["reward"]}


def take_batch(
    method: OnlineMethod, experience: Any, text: Any, empty: Any, steps: Any, index: Any, rows: Any
) -> dict[str, Any]:
    """Examples of the experience, as the objective of a method takes them; to be jitted.

    Args:
        method: of the run.
        experience: of N prompts.
        text: conditioning on these, `[N, ...]` each.
        empty: conditioning on no prompt.
        steps: the method's solver, and abar at its timesteps.
        index: of each of B examples its prompt, then where it is among the prompt's: `[B]` each.
        rows: of the solver, of each example: `[B]`.
    """
    text = jax.tree.map(lambda x: x[index[0]], text)
    row, signal = jax.tree.map(lambda x: x[rows], steps)
    told = {"text": text, "empty": empty_for_each(empty, text)}
    return {**method.batch(experience, tuple(index)), "row": row, "signal": signal, **told}


def minibatches(method: OnlineMethod, config: RolloutConfig) -> int:
    """Number of minibatches, and so of training steps, in an iteration."""
    return config.prompts * math.prod(method.examples) * config.epochs // config.batch_size


def check_gradients(method: OnlineMethod, reward: str, differentiable: bool) -> None:
    """That a reward has the gradients that a method needs.

    Raises:
        ValueError: it has none.
    """
    if method.needs_gradients and not differentiable:
        raise ValueError(
            f"online: {type(method).__name__} with a rate (TailorPO-G) follows the gradient of the reward, and "
            f"{reward!r} has none; set rate to 0, or take rewards with gradients"
        )


def check_update(method: OnlineMethod, config: RolloutConfig) -> None:
    """That a method can change weights where its config says.

    Raises:
        ValueError: it cannot.
    """
    if config.update == "step" and not isinstance(method, StepPairs):
        raise ValueError(
            f"rollouts: {type(method).__name__} judges whole images and cannot learn inside a trajectory; "
            "update='step' is for TailorPO and SPO, expected 'iteration'"
        )


def empty_for_each(empty: Any, text: Any) -> Any:
    """Conditioning on no prompt, for each row of that on prompts."""
    return jax.tree.map(lambda empty, text: jnp.broadcast_to(empty, text.shape), empty, text)
