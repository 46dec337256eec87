"""Pairs of candidates for one step from the same latents, which TailorPO and SPO learn from.

A candidate x' for x_{t-1} is as good as the image it promises, `x_0 = r x' + u noise_pred(x')`. That takes a prediction
for each candidate; the prediction for the one that the trajectory continues from is the next step's own. The last
candidates of a trajectory are images themselves.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flax_pref.diffusion.sampler import Predict, draw_normal
from flax_pref.diffusion.solvers import Solver, step
from flax_pref.methods.online import (
    Candidates,
    DrawnLatents,
    ExampleCost,
    Preferences,
    RolloutInputs,
    clip_ratio,
    guided,
    guided_pair,
    mean_product,
    pair_loss,
    pred_coef,
    safe_variance,
)
from flax_pref.shapes import Float, Int, Key, Latents, PerImage, Scalar

Follow = Literal["winner", "random", "loser"]


class Ascent(NamedTuple):
    """How a winner moves up the gradient of its reward before it is learned from (TailorPO-G).

    Attributes:
        rates: of each step, what the gradient is multiplied by, `[S]`.
        through_network: whether the gradient passes through the prediction that an image is promised by, not only
            through the autoencoder and the reward.
    """

    rates: np.ndarray
    through_network: bool


class CandidateChoice(NamedTuple):
    """How candidates are chosen.

    Attributes:
        pool: candidates for a trained step.
        follow: the candidate that the trajectory continues from.
        ascent: of the winner; None: it stays where it was drawn.
    """

    pool: int
    follow: Follow
    ascent: Ascent | None = None


CandidateRewards = Float[jax.Array, "images candidates"]
"""Rewards of the clean images that K candidates promise."""
State = tuple[Latents, Latents]
"""Latents that a step begins with, and the policy's prediction for them."""


class StepEnds(NamedTuple):
    """Where a trained step may end, before that is judged.

    Attributes:
        latents: that the step begins with.
        candidates: for its end.
        predicted: the predictions for these.
    """

    latents: Latents
    candidates: Candidates
    predicted: Candidates


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepPairs(Preferences):
    """Pairs of candidates for a step from the same latents, `x^w` and `x^l` for x_{t-1}.

        loss = mean over the pairs that count of -log sigmoid(Delta)
        Delta = beta (log p_theta(x^w | x_t) / p_ref(x^w | x_t) - log p_theta(x^l | x_t) / p_ref(x^l | x_t))
              = beta / (D sigma_t^2) <x^w - x^l, mu_theta(x_t) - mu_ref(x_t)>

    Log-densities are averaged over the D dimensions. Both steps begin at x_t, so that what is quadratic cancels and one
    prediction of the policy and one of the reference make the loss of a pair.
    """

    @property
    def choice(self) -> CandidateChoice:
        """How the pair of a step is chosen."""
        raise NotImplementedError

    @property
    def needs_gradients(self) -> bool:
        """See `OnlineMethod`."""
        return self.choice.ascent is not None

    def loss(
        self, predict: Predict, batch: Mapping[str, Any], key: Key[jax.Array, ""] | None
    ) -> tuple[Scalar, dict[str, Scalar]]:
        """See `OnlineMethod`; the metrics are those of `pair_loss`, and `raised`, the share of moves that were kept.

        The batch has `latents [B, H, W, C]`, x_t; `winner` and `loser`, x_{t-1} likewise; `rewards [B, 2]`, of winner
        and loser; `reward [B]`, of the last candidates of the trajectory, for the metrics; where winners move,
        `raised [B]`, 1 where that raised the reward.
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
        loss, metrics = pair_loss(logits, batch, self)
        return loss, metrics | ({"raised": batch["raised"].mean()} if "raised" in batch else {})

    def cost(self, *, within: bool = False) -> ExampleCost:
        """See `OnlineMethod`."""
        trained, rows, (pool, _, ascent) = self.trained, self.guided_rows, self.choice
        # A prediction for the start, one for each candidate, and one for a winner that has moved; none for images.
        # Other weights predict again what a part of the trajectory begins with.
        starts = len(trained) if within else 1
        walks = trained[-1] + 1 - len(trained)
        pairs = len(trained) - (trained[-1] == self.steps - 1)
        moved = 0 if ascent is None else 1 + ascent.through_network
        predicted = starts + walks + pairs * (pool + moved)
        return ExampleCost(rows * predicted / len(trained), rows, rows, pool + (0 if ascent is None else 2))

    # Experience

    def shapes(self, latent: tuple[int, int, int], steps: int | None = None) -> dict[str, tuple[int, ...]]:
        """See `OnlineMethod`; of so many trained steps (default: all)."""
        steps = len(self.trained) if steps is None else steps
        images = dict.fromkeys(("latents", "winner", "loser"), (steps, *latent))
        raised = {"raised": (steps,)} if self.needs_gradients else {}
        return {**images, "rewards": (steps, 2), "reward": (), **raised}

    def batch(self, experience: Mapping[str, jax.Array], index: tuple[jax.Array, ...]) -> dict[str, jax.Array]:
        """See `OnlineMethod`."""
        own = {name: x[index] for name, x in experience.items() if name != "reward"}
        return {**own, "reward": experience["reward"][index[0]]}

    def draw(self, drawing: RolloutInputs) -> dict[str, jax.Array]:
        """See `OnlineMethod`: trajectories up to the last trained step, all with the same weights."""
        candidates, last = CandidateSteps(drawing, self), self.trained[-1]
        learned = np.isin(np.arange(last + 1), self.trained)

        def advance(state, inputs):
            number, chosen = inputs
            return jax.lax.cond(chosen, candidates.choose, candidates.walk, state, number)

        state = candidates.begin(candidates.start(), 0)
        _, pairs = jax.lax.scan(advance, state, (jnp.arange(last + 1), jnp.asarray(learned)))
        pairs = {name: jnp.moveaxis(x[np.array(self.trained)], 0, 1) for name, x in pairs.items()}
        return {**pairs, "reward": pairs["reward"][:, -1]}

    def draw_start(self, drawing: RolloutInputs) -> Latents:
        """The latents that trajectories begin with."""
        return CandidateSteps(drawing, self).start()

    def draw_step(
        self, drawing: RolloutInputs, latents: Latents, first: Int[jax.Array, ""], last: Int[jax.Array, ""]
    ) -> tuple[Latents, dict[str, jax.Array]]:
        """The part of a trajectory that ends in a trained step; with the same weights, all parts make what `draw` does.

        Args:
            drawing: for B prompts.
            latents: that step `first` begins with.
            first: number of the step after the last trained one, or 0.
            last: number of a trained step.

        Returns:
            the latents that the next step begins with, and experience of one step.
        """
        candidates = CandidateSteps(drawing, self)
        state = candidates.walk_to(candidates.begin(latents, first), first, last)
        (latents, _), pair = candidates.choose(state, last)
        return latents, {**{name: x[:, None] for name, x in pair.items()}, "reward": pair["reward"]}

    # The same in parts, where rewards come from elsewhere

    def draw_state(self, drawing: RolloutInputs, latents: Latents, first: Int[jax.Array, ""]) -> State:
        """What step `first` begins with, where that is latents from elsewhere or of other weights."""
        return CandidateSteps(drawing, self).begin(latents, first)

    def draw_ends(
        self, drawing: RolloutInputs, state: State, first: Int[jax.Array, ""], last: Int[jax.Array, ""]
    ) -> tuple[StepEnds, DrawnLatents]:
        """Candidates for the end of a trained step.

        Args:
            drawing: for B prompts.
            state: that step `first` begins with.
            first: as in `draw_step`.
            last: number of a trained step.

        Returns:
            the candidates, and the clean latents that they promise, `[B * K, H, W, C]`.
        """
        candidates = CandidateSteps(drawing, self)
        ends = candidates.ends(candidates.walk_to(state, first, last), last)
        return ends, candidates.promised(ends, last)

    def judge_ends(
        self, drawing: RolloutInputs, ends: StepEnds, rewards: CandidateRewards, number: Int[jax.Array, ""]
    ) -> tuple[State, dict[str, jax.Array]]:
        """What the next step begins with, and the experience of a trained one, without an axis of steps."""
        return CandidateSteps(drawing, self).judge(ends, rewards, number)


class CandidateSteps:
    """The steps of trajectories of B prompts, from latents and the prediction for them to those of the next step."""

    def __init__(self, drawing: RolloutInputs, method: StepPairs):
        self.drawing, self.method, self.choice = drawing, method, method.choice
        (self.network,) = method.modules
        # Of x_0 at the timestep of the step after each; the candidates of the last step are clean.
        self.r, self.u = (
            jnp.asarray([*of_pred[1:], end], jnp.float32) for of_pred, end in zip(drawing.clean, (1, 0), strict=True)
        )

    def begin(self, latents: Latents, number: Any) -> State:
        """What step `number` begins with."""
        return latents, self.predict(latents[:, None], number)[:, 0]

    def start(self) -> Latents:
        """Noise."""
        return self.drawing.solver.init_noise_sigma * draw_normal(self.drawing.keys, 0, self.drawing.shape)

    def row(self, number: Any) -> Solver:
        """Of the solver, of a step."""
        return jax.tree.map(lambda x: x[number], self.drawing.solver)

    def predict(self, latents: Candidates, number: Any) -> Candidates:
        """Guided predictions of the policy for what step `number` begins with; zeros after the last step."""
        count = len(self.drawing.keys)
        row = self.row(jnp.minimum(number, self.method.steps - 1))
        rows = jax.tree.map(lambda x: jnp.broadcast_to(x, (count, *x.shape)), row)
        batch = {"row": rows, "text": self.drawing.text, "empty": self.drawing.empty}

        def guide(latents):
            return guided(self.drawing.predict, self.network, batch, latents, self.method.guidance_scale)

        return jax.lax.cond(number < self.method.steps, guide, jnp.zeros_like, latents)

    def candidates(self, state: State, number: Any, count: int) -> tuple[Candidates, Candidates]:
        """So many latents that a step may end in, and the predictions for them."""
        row = self.row(number)
        noise = draw_normal(self.drawing.keys, number + 1, (count, *self.drawing.shape))
        drawn = step(*state, row)[0][:, None] + row.fresh_noise_coef * noise
        return drawn, self.predict(drawn, number + 1)

    def walk_to(self, state: State, first: Any, last: Any) -> State:
        """What step `last` begins with, through steps that nothing is learned from."""
        return jax.lax.fori_loop(first, last, lambda number, state: self.walk(state, number)[0], state)

    def walk(self, state: State, number: Any) -> tuple[State, dict[str, jax.Array]]:
        """A step that nothing is learned from: one candidate and no reward. Its pair is zeros."""
        candidates, predicted = self.candidates(state, number, 1)
        shapes = self.method.shapes(self.drawing.shape, 1)
        count = len(self.drawing.keys)
        pair = {name: jnp.zeros((count, *shape[1:])) for name, shape in shapes.items()}
        return (candidates[:, 0], predicted[:, 0]), pair

    def choose(self, state: State, number: Any) -> tuple[State, dict[str, jax.Array]]:
        """A step that is learned from: the best and the worst candidate, and where the trajectory continues."""
        ends = self.ends(state, number)
        return self.judge(ends, self.rewards(ends, number), number)

    def ends(self, state: State, number: Any) -> StepEnds:
        """The candidates of a step that is learned from."""
        return StepEnds(state[0], *self.candidates(state, number, self.choice.pool))

    def judge(self, ends: StepEnds, rewards: CandidateRewards, number: Any) -> tuple[State, dict[str, jax.Array]]:
        """What the rewards of candidates make of them; see `choose`."""
        pool, follow, ascent = self.choice
        latents, candidates, predicted = ends
        places = {"winner": rewards.argmax(axis=1), "loser": rewards.argmin(axis=1)}
        dice = jax.vmap(lambda key: jax.random.fold_in(key, self.method.steps + number + 1))(self.drawing.keys)
        places["random"] = jax.vmap(lambda key: jax.random.randint(key, (), 0, pool))(dice)
        found = {name: (_take(candidates, place), _take(predicted, place)) for name, place in places.items()}
        pair = {"latents": latents, "loser": found["loser"][0], "reward": rewards.mean(axis=1)}
        best = rewards.max(axis=1)
        if ascent is not None:
            found["winner"], best, pair["raised"] = self.climb(*found["winner"], best, number, ascent)
        pair |= {"winner": found["winner"][0], "rewards": jnp.stack([best, rewards.min(axis=1)], axis=1)}
        return found[follow], pair

    def promised(self, ends: StepEnds, number: Any) -> DrawnLatents:
        """Clean latents of the images that candidates for the end of a step promise, `[B * K, H, W, C]`."""
        clean = self.r[number] * ends.candidates + self.u[number] * ends.predicted
        return clean.reshape(-1, *self.drawing.shape)

    def rewards(self, ends: StepEnds, number: Any) -> CandidateRewards:
        """Of these images."""
        return self.drawing.score(self.promised(ends, number)).reshape(ends.candidates.shape[:2])

    def climb(
        self, winner: Latents, predicted: Latents, reward: PerImage, number: Any, ascent: Ascent
    ) -> tuple[State, PerImage, PerImage]:
        """Moves winners up the gradient of their reward, those whose reward rises by it.

        Returns:
            winners and their predictions, their rewards, and 1 where a winner moved, else 0.
        """

        def promised(latents):
            given = self.predict(latents[:, None], number + 1)[:, 0] if ascent.through_network else predicted
            return self.r[number] * latents + self.u[number] * given

        clean, pull_back = jax.vjp(promised, winner)
        (gradient,) = pull_back(self.drawing.ascent(clean))
        moved = winner + jnp.asarray(ascent.rates, jnp.float32)[number] * gradient
        moved_predicted = self.predict(moved[:, None], number + 1)
        moved_reward = self.rewards(StepEnds(winner, moved[:, None], moved_predicted), number)[:, 0]
        raised = moved_reward > reward

        def kept(after, before):
            return jnp.where(raised[:, None, None, None], after, before)

        state = kept(moved, winner), kept(moved_predicted[:, 0], predicted)
        return state, jnp.where(raised, moved_reward, reward), raised.astype(jnp.float32)


def _take(x: Candidates, which: Int[jax.Array, " images"]) -> Latents:
    """One of the K latents of each image."""
    return jnp.take_along_axis(x, which[:, None, None, None, None], axis=1)[:, 0]
