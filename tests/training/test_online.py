"""Rollouts: what is drawn, in which order, and that a run which goes on draws the same."""

import dataclasses
import json
import math
import os
import subprocess
import sys
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import online_world
import pytest
from flax import nnx
from online_world import (
    CHANNELS,
    CONFIG,
    METHODS,
    PROMPTS,
    SCHEDULER,
    SIZE,
    Brightness,
    judged,
    network,
    rollouts,
    weights,
)

from flax_pref.diffusion.guidance import cfg, tabulate
from flax_pref.diffusion.sampler import image_keys, sample
from flax_pref.diffusion.schedule import NoiseSchedule
from flax_pref.diffusion.scheduler_configs import solver_from_config
from flax_pref.diffusion.solvers import log_prob
from flax_pref.methods import D3PO, DDPO, SPO, DiffusionNFT, TailorPO
from flax_pref.rewards.elsewhere import neutral
from flax_pref.rewards.jpeg import JpegSize
from flax_pref.rewards.remote import Remote, RemoteError, Service
from flax_pref.rewards.reward import WeightedSum
from flax_pref.training.rollouts import Prompts, RolloutConfig

SHAPE = (SIZE[0] // 2, SIZE[1] // 2, CHANNELS)
PARAMS = jax.tree.map(lambda x: np.float32(0.1) * x, weights(1))


@pytest.fixture(scope="module", autouse=True)
def short_compilation():
    """Here the compiler takes longer than the steps, however fast it makes them."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(scope="module")
def drawn():
    """Experience of the first iteration, and the sources that have drawn it, by method."""
    sources = {}

    def draw(method):
        if method not in sources:
            source = rollouts(method)
            batch = source.next(PARAMS)
            sources[method] = source, jax.device_get(source.arrays()), batch
        return sources[method]

    return draw


def from_the_start(source):
    """The source, compiled already, as if it had drawn nothing."""
    source.restore({**source.position(), "step": 0}, jax.tree.map(jnp.zeros_like, source.arrays()))
    return source


# ----------------------------------------------------------------------------------------------------------------------
# What is drawn: the loop of the paper


def solver_row(method, i):
    return jax.tree.map(lambda x: np.asarray(x)[i], solver_from_config(SCHEDULER, method.steps, name="ddim", eta=1.0))


def guided(method, x, t, hidden, params=PARAMS):
    trained = jax.tree.map(np.add, weights(), params)
    t = np.full(len(x), t)
    text, empty = network(trained, x, t, hidden), network(trained, x, t, np.zeros_like(hidden))
    return (1 - method.guidance_scale) * empty + method.guidance_scale * text


def scores(latents, captions):
    images = nnx.merge(online_world.vae().graphdef, online_world.vae().params).decode(latents / 0.18215)
    reward = Brightness()
    return reward.score(reward.view(jnp.clip((images + 1) / 2, 0, 1)), reward.prepare(captions))


def normals(key, i, shape):
    return np.asarray(jax.random.normal(jax.random.fold_in(key, i), shape))


def drawn_one_by_one(method, prompt, place, params_of=lambda number: PARAMS):
    """Experience of one trajectory, as Algorithm 1 of the paper has it, with networks called for one at a time.

    params_of: the weights by the number of trained steps before.
    """
    key = jax.random.fold_in(image_keys(0, [PROMPTS.ids[prompt]])[0], place)
    hidden, caption = PROMPTS.text["hidden"][prompt][None], PROMPTS.captions[prompt]
    abars, pool = NoiseSchedule.from_dict(SCHEDULER).alphas_cumprod, getattr(method, "pool", 2)
    follow = getattr(method, "follow", "random")
    x, found = normals(key, 0, SHAPE)[None], []

    def promise(x, i, params):  # of latents at the end of step i
        if i + 1 == method.steps:
            return x
        t = int(solver_row(method, i + 1).timesteps)
        eps = guided(method, x, t, np.repeat(hidden, len(x), axis=0), params)
        return (x - jnp.sqrt(1 - abars[t]) * eps) / jnp.sqrt(abars[t])

    def squared(x, i, constant, goal, params):
        clean = promise(x, i, params) if method.through_network else by_r(x, i) + constant
        return jnp.square(goal - scores(clean, [caption])).sum()

    for i in range(method.trained[-1] + 1):
        params = params_of(len(found))
        row = solver_row(method, i)
        mean = row.latents_coef * x + row.estimate_coefs[0] * guided(method, x, row.timesteps, hidden, params)
        count = pool if i in method.trained else 1
        candidates = mean + row.fresh_noise_coef * normals(key, i + 1, (count, *SHAPE))
        if i not in method.trained:
            x = candidates
            continue
        rewards = scores(promise(candidates, i, params), [caption] * count)
        best, worst = rewards.argmax(), rewards.argmin()
        winner, reward, raised = candidates[best], rewards[best], 0.0
        if method.needs_gradients:
            t = method.steps - i
            low, high = method.rate
            eta = low + (high - low) * (1 + np.cos(np.pi * t / method.steps)) / 2
            goal = reward + method.rise

            constant = promise(winner[None], i, params) - by_r(winner[None], i)
            moved = winner - eta * jax.grad(squared)(winner[None], i, constant, goal, params)[0]
            after = scores(promise(moved[None], i, params), [caption])[0]
            if after > reward:
                winner, reward, raised = moved, after, 1.0
        found.append((x[0], winner, candidates[worst], np.array([reward, rewards[worst]]), raised, rewards.mean()))
        choice = int(jax.random.randint(jax.random.fold_in(key, method.steps + i + 1), (), 0, pool))
        x = np.asarray({"winner": winner, "loser": candidates[worst], "random": candidates[choice]}[follow])[None]
    columns = [np.stack(column) for column in zip(*found, strict=True)]
    return dict(zip(("latents", "winner", "loser", "rewards", "raised"), columns[:-1], strict=True)), columns[-1]


def by_r(x, i):
    """The part of a promise that comes from the latents."""
    method = METHODS["tailorpo-g"]
    if i + 1 == method.steps:
        return x
    abar = NoiseSchedule.from_dict(SCHEDULER).alphas_cumprod[int(solver_row(method, i + 1).timesteps)]
    return x / np.sqrt(abar)


def check(source, method):
    from_the_start(source).next(PARAMS)
    experience = jax.device_get(source.arrays())
    for place in (0, CONFIG.prompts - 1):
        expected, rewards = drawn_one_by_one(method, source.prompt_order(0)[place], place)
        if not method.needs_gradients:
            assert "raised" not in experience
            del expected["raised"]
        for name, value in expected.items():
            np.testing.assert_allclose(experience[name][place], value, rtol=1e-3, atol=1e-4, err_msg=name)
        assert experience["reward"][place] == pytest.approx(rewards[-1], rel=1e-4)
    assert (experience["rewards"][..., 0] > experience["rewards"][..., 1]).all()
    return experience


def test_tailorpo_draws_pairs_from_one_point_and_goes_on_from_the_winner(drawn):
    check(drawn("tailorpo")[0], METHODS["tailorpo"])


def test_tailorpo_learns_from_the_steps_that_it_is_told_and_walks_through_the_others(drawn):
    method = METHODS["tailorpo-some"]
    assert method.trained == (1, 2), "t = 3 and 2 of 4"
    check(drawn("tailorpo-some")[0], method)


@pytest.mark.parametrize(
    ("given", "t"),
    [(5, (20, 16, 12, 8, 4)), (20, tuple(range(20, 0, -1))), (3, (20, 14, 7)), ((4, 20, 12), (20, 12, 4))],
)
def test_trained_steps_are_counted_as_in_the_paper(given, t):
    assert TailorPO(train_steps=given).trained == tuple(20 - each for each in t)


@pytest.mark.parametrize("follow", ["random", "loser"])
def test_tailorpo_goes_on_from_another_one_where_it_should(follow):
    method = dataclasses.replace(METHODS["tailorpo"], follow=follow)
    check(rollouts(method), method)


def test_spo_skips_steps_and_takes_the_best_and_the_worst_of_a_pool(drawn):
    check(drawn("spo")[0], METHODS["spo"])


def test_tailorpo_g_moves_winners_up_their_reward_and_goes_on_from_where_it_rose(drawn):
    raised = check(drawn("tailorpo-g")[0], METHODS["tailorpo-g"])["raised"]
    assert set(raised.ravel()) <= {0.0, 1.0} and raised.mean() > 0.5


def test_a_move_that_lowers_the_reward_is_not_kept():
    far = dataclasses.replace(METHODS["tailorpo-g"], rate=(4000.0, 4000.0))
    experience = check(rollouts(far), far)
    assert 0 < experience["raised"].mean() < 1


def test_the_gradient_may_pass_through_the_network_too(drawn):
    method = dataclasses.replace(METHODS["tailorpo-g"], through_network=True)
    through = check(rollouts(method), method)
    assert np.abs(through["winner"] - drawn("tailorpo-g")[1]["winner"]).max() > 1e-3


def test_rates_rise_on_a_cosine_towards_small_t():
    rates = TailorPO(rate=(0.1, 0.2), rise=0.5).choice.ascent.rates
    assert rates[0] == pytest.approx(0.1), "t = 20: 2 rise eta = eta"
    assert rates[10] == pytest.approx(0.15), "t = 10"
    assert rates[19] == pytest.approx(0.1 + 0.1 * (1 + np.cos(np.pi / 20)) / 2), "t = 1"
    assert (np.diff(rates) > 0).all()
    np.testing.assert_allclose(TailorPO(rate=0.1, rise=1.0).choice.ascent.rates, 0.2)


def test_d3po_draws_two_images_from_one_noise_and_puts_the_better_one_first(drawn):
    source, experience, _ = drawn("d3po")
    latents = experience["latents"]
    np.testing.assert_array_equal(latents[:, 0, 0], latents[:, 1, 0])
    assert (np.abs(latents[:, 0, 1] - latents[:, 1, 1]).max(axis=(1, 2, 3)) > 0.1).all()
    captions = [PROMPTS.captions[n] for n in source.prompt_order(0)]
    final = np.stack([scores(latents[:, image, -1], captions) for image in (0, 1)], axis=1)
    np.testing.assert_allclose(experience["rewards"], final, rtol=1e-4)
    assert (final[:, 0] > final[:, 1]).all()


def test_ddpo_knows_the_probability_of_its_steps_and_judges_images_within_a_prompt(drawn):
    _, experience, batch = drawn("ddpo")
    latents = experience["latents"]
    assert len(np.unique(latents[:, :, 0].reshape(-1, 16).round(3), axis=0)) == latents[:, :, 0].size // 16
    assert np.abs(experience["advantage"].mean(axis=1)).max() < 1e-4
    np.testing.assert_allclose(experience["advantage"].std(axis=1), 1, rtol=1e-3)
    hidden = np.asarray(batch["text"]["hidden"])
    noise_pred = np.concatenate(
        [
            guided(METHODS["ddpo"], x[None], t, told[None])
            for x, t, told in zip(batch["latents"], np.asarray(batch["row"].timesteps), hidden, strict=True)
        ]
    )
    expected = log_prob(batch["next_latents"], batch["latents"], jnp.asarray(noise_pred), batch["row"])
    np.testing.assert_allclose(batch["log_prob"], expected, rtol=1e-3, atol=1e-3)


def test_nft_judges_the_images_that_a_sampler_draws(drawn):
    source, experience, batch = drawn("nft")
    method, place = METHODS["nft"], 3
    prompt = source.prompt_order(0)[place]
    key = jax.random.fold_in(image_keys(0, [PROMPTS.ids[prompt]])[0], place)
    solver = solver_from_config(SCHEDULER, method.steps, name="dpm++")
    trained = jax.tree.map(np.add, weights(), PARAMS)
    images = sample(
        online_world.predict_of(jax.tree.map(np.subtract, trained, weights()), weights()),
        tabulate(cfg(method.guidance_scale, "nft"), method.steps, 2),
        solver,
        jnp.stack([jax.random.fold_in(key, i) for i in (0, 1)]),
        {"hidden": np.stack([PROMPTS.text["hidden"][prompt]] * 2)},
        PROMPTS.empty,
        SHAPE,
    )
    np.testing.assert_allclose(experience["clean"][place], images, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(experience["reward"][place], scores(images, [PROMPTS.captions[prompt]] * 2), rtol=1e-4)
    rewards = experience["reward"]
    expected = (rewards - rewards.mean(axis=1, keepdims=True)) / (rewards.std() + 1e-4)
    assert np.abs(np.asarray(batch["advantage"])[:, None] - expected.ravel()).min(axis=1).max() < 1e-6


# ----------------------------------------------------------------------------------------------------------------------
# Minibatches


@pytest.mark.parametrize("method", METHODS)
def test_every_example_comes_once_in_an_iteration_with_its_own_prompt_and_step(method, drawn):
    source, _, first = drawn(method)
    from_the_start(source)
    batches = [source.next(PARAMS) for _ in range(source.minibatches)]
    hidden = np.concatenate([batch["text"]["hidden"] for batch in batches])
    expected = np.repeat(PROMPTS.text["hidden"][source.prompt_order(0)], len(hidden) // CONFIG.prompts, axis=0)
    np.testing.assert_array_equal(
        np.unique(hidden, axis=0, return_counts=True)[1], np.unique(expected, axis=0, return_counts=True)[1]
    )
    steps = np.concatenate([batch["row"].timesteps for batch in batches])
    own = METHODS[method]
    solver = solver_from_config(SCHEDULER, own.steps, name=own.solver_name, eta=own.eta)
    np.testing.assert_array_equal(np.unique(steps), np.sort(np.asarray(solver.timesteps)[list(own.trained)]))
    abars = NoiseSchedule.from_dict(SCHEDULER).alphas_cumprod
    for batch in batches:
        np.testing.assert_allclose(batch["signal"], abars[np.asarray(batch["row"].timesteps, int)], rtol=1e-6)
    name = "clean" if method == "nft" else "latents"
    latents = np.concatenate([batch[name] for batch in batches])
    different = len(np.unique(latents.reshape(len(latents), -1).round(4), axis=0))
    assert different >= (len(latents) // len(own.trained) if method == "nft" else len(latents) - CONFIG.prompts)
    np.testing.assert_array_equal(first[name], batches[0][name])
    loss, metrics = own.loss(online_world.predict_of(PARAMS, weights()), batches[0], jax.random.key(0))
    assert np.isfinite(loss) and "reward" in metrics


@pytest.mark.parametrize("method", METHODS)
def test_a_run_restored_anywhere_gives_the_same_minibatches_bit_by_bit(method, drawn):
    source = from_the_start(drawn(method)[0])

    def params(step):
        return jax.tree.map(lambda x: x * np.float32(1 + step), PARAMS)

    saved, batches = [], []
    total = source.minibatches + 2
    for step in range(total):
        saved.append((json.loads(json.dumps(source.position())), jax.tree.map(np.array, source.arrays())))
        batches.append(jax.device_get(source.next(params(step))))
    for step in (0, 1, source.minibatches - 1, source.minibatches, total - 1):
        source.restore(*saved[step])
        for later in range(step, total):
            again = jax.device_get(source.next(params(later)))
            jax.tree.map(np.testing.assert_array_equal, again, batches[later])


def test_before_the_first_minibatch_there_are_arrays_of_the_same_shapes(drawn):
    for method in METHODS:
        before = rollouts(method).arrays()
        assert not any(np.any(x) for x in before.values())
        after = drawn(method)[1]
        assert {name: x.shape for name, x in before.items()} == {name: x.shape for name, x in after.items()}


def test_experience_is_drawn_with_the_weights_of_then(drawn):
    source = from_the_start(drawn("tailorpo")[0])
    source.next(PARAMS)
    before = source.arrays()
    source.next(weights(5))
    assert source.arrays() is before, "one iteration, one policy"
    from_the_start(source).next(weights(5))
    assert np.abs(source.arrays()["latents"] - before["latents"]).max() > 0.1


def test_prompts_come_in_turn_and_each_time_with_other_noise(drawn):
    source, experience, _ = drawn("tailorpo")
    line = np.concatenate([source.prompt_order(i) for i in range(3)])  # 24 places for 6 prompts
    for epoch in line.reshape(4, 6):
        assert sorted(epoch) == list(range(6))
    assert len({tuple(epoch) for epoch in line.reshape(4, 6)}) > 1
    assert not np.array_equal(rollouts("tailorpo", seed=1).prompt_order(0), source.prompt_order(0))
    starts = experience["latents"][:, 0]
    assert len(np.unique(starts.reshape(len(starts), -1), axis=0)) == CONFIG.prompts


# ----------------------------------------------------------------------------------------------------------------------
# Weights that change inside a trajectory

WITHIN = RolloutConfig(prompts=8, at_once=8, batch_size=8, update="step")


@pytest.mark.parametrize("method", ["tailorpo", "tailorpo-some", "tailorpo-g", "spo"])
def test_with_weights_that_stay_both_forms_learn_from_the_same_pairs(method, drawn):
    source, whole = rollouts(method, config=WITHIN), drawn(method)[1]
    trained = METHODS[method].trained
    assert source.minibatches == len(trained)
    for number, step in enumerate(trained):
        batch = source.next(PARAMS)
        for name in ("latents", "winner", "loser", "rewards"):
            np.testing.assert_allclose(batch[name], whole[name][:, number], rtol=1e-4, atol=1e-4, err_msg=name)
        assert (np.asarray(batch["row"].timesteps) == solver_row(METHODS[method], step).timesteps).all()
        np.testing.assert_array_equal(batch["text"]["hidden"], PROMPTS.text["hidden"][source.prompt_order(0)])
    before = whole["latents"][:, 0]
    assert np.abs(source.next(PARAMS)["latents"] - before).max() > 0.1, "the next iteration begins with new noise"


def test_each_trained_step_is_drawn_with_the_weights_that_the_one_before_has_made():
    method = METHODS["tailorpo"]
    source = rollouts(method, config=WITHIN)

    def params_of(number):
        return jax.tree.map(lambda x: x * np.float32(1 + number), PARAMS)

    batches = [source.next(params_of(number)) for number in range(len(method.trained))]
    expected, _ = drawn_one_by_one(method, source.prompt_order(0)[3], 3, params_of)
    for number, batch in enumerate(batches):
        for name in ("latents", "winner", "loser", "rewards"):
            np.testing.assert_allclose(batch[name][3], expected[name][number], rtol=1e-3, atol=1e-4, err_msg=name)


def test_a_run_restored_inside_a_trajectory_goes_on_bit_by_bit():
    source = rollouts("tailorpo-some", config=dataclasses.replace(WITHIN, at_once=4))
    saved, batches = [], []
    for _ in range(5):
        saved.append((json.loads(json.dumps(source.position())), jax.tree.map(np.array, source.arrays())))
        batches.append(jax.device_get(source.next(PARAMS)))
    for step in (4, 1, 2, 0):
        source.restore(*saved[step])
        jax.tree.map(np.testing.assert_array_equal, jax.device_get(source.next(PARAMS)), batches[step])


def test_methods_that_judge_whole_images_cannot_learn_inside_a_trajectory():
    with pytest.raises(ValueError, match=r"D3PO judges whole images and cannot learn inside .*expected 'iteration'"):
        rollouts("d3po", config=WITHIN)


# ----------------------------------------------------------------------------------------------------------------------
# Devices and batches


@pytest.mark.parametrize("method", ["tailorpo-g", "spo", "ddpo", "nft"])
def test_experience_does_not_depend_on_how_it_is_divided(method, drawn):
    source = rollouts(method, config=dataclasses.replace(CONFIG, at_once=2))
    source.next(PARAMS)
    for name, value in drawn(method)[1].items():
        np.testing.assert_allclose(source.arrays()[name], value, rtol=1e-4, atol=1e-4, err_msg=name)


ELSEWHERE = ["elsewhere:tailorpo", "elsewhere:ddpo"]


@pytest.mark.program
def test_experience_does_not_depend_on_the_number_of_devices():
    done = subprocess.run(
        [sys.executable, online_world.__file__, "tailorpo-g", "spo", "d3po", "ddpo", "nft", *ELSEWHERE],
        env={
            **os.environ,
            "JAX_NUM_CPU_DEVICES": "8",
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        },
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    print(found)
    assert max(method["difference"] for method in found.values()) < 1e-4
    assert all(method["on_each_device"] == [1] for method in found.values())


# ----------------------------------------------------------------------------------------------------------------------
# Rewards that live elsewhere

IN_PARTS = dataclasses.replace(CONFIG, at_once=2)


@pytest.mark.parametrize("method", ["tailorpo-some", "spo", "d3po", "ddpo", "nft"])
def test_a_reward_elsewhere_makes_the_same_experience(method, drawn):
    source = rollouts(method, config=IN_PARTS, reward=Remote("brightness", judged))
    assert {name: x.shape for name, x in source.arrays().items()} == {
        name: x.shape for name, x in drawn(method)[1].items()
    }
    batch = source.next(PARAMS)
    for name, value in drawn(method)[1].items():
        np.testing.assert_allclose(source.arrays()[name], value, rtol=1e-4, atol=1e-4, err_msg=name)
    for ours, theirs in zip(jax.tree.leaves(batch), jax.tree.leaves(drawn(method)[2]), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)
    again = from_the_start(source).next(PARAMS)
    jax.tree.map(np.testing.assert_array_equal, again, batch)  # bit for bit, whichever answer comes first


def test_a_reward_elsewhere_learns_inside_trajectories_too():
    config = dataclasses.replace(IN_PARTS, update="step")
    here, elsewhere = (rollouts("tailorpo-some", config=config, reward=r) for r in (None, Remote("b", judged)))
    for _ in range(3):  # the second begins with the latents that the first has left, the third another iteration
        batches = here.next(PARAMS), elsewhere.next(PARAMS)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), *batches)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), here.arrays(), elsewhere.arrays()
        )


def test_rewards_here_and_elsewhere_are_weighed_together(drawn):
    parts = Remote("one", judged), Brightness(), Remote("two", lambda images, captions: np.ones(len(images)))
    source = rollouts("ddpo", config=IN_PARTS, reward=WeightedSum(parts, (0.5, 2.0, 3.0)))
    source.next(PARAMS)
    expected = 2.5 * drawn("ddpo")[1]["reward"] + 3
    np.testing.assert_allclose(source.arrays()["reward"], expected, rtol=1e-4)


class Slow(Service):
    """A service whose first answer waits until it was asked so often."""

    def __call__(self, images, captions):
        self.asked.append(len(images))
        if len(self.asked) == self.until:
            self.enough.set()
        assert self.enough.wait(60), f"asked {len(self.asked)} times before the first answer"
        return judged(images, captions)


def slow(until):
    service = Slow("http://nowhere/")
    vars(service).update(asked=[], until=until, enough=threading.Event())
    return service


@pytest.mark.parametrize("method", ["tailorpo-some", "d3po"])
def test_devices_draw_all_other_prompts_before_they_wait_for_the_first_scores(method):
    service = slow(4)
    source = rollouts(method, config=IN_PARTS, reward=Remote("slow", service))
    source.next(PARAMS)
    steps = len(METHODS[method].trained) if method == "tailorpo-some" else 1
    assert service.asked == [4] * 4 * steps


def test_an_image_without_a_score_is_one_that_nothing_is_learned_from(drawn):
    def holes(images, captions):
        scores = judged(images, captions)
        scores[0] = np.nan
        return scores

    told = []
    source = rollouts("ddpo", config=IN_PARTS, reward=Remote("holes", holes), tell=told.append)
    source.next(PARAMS)
    assert told == ["holes: no score for 4 of 24 images; nothing is learned from these"]
    experience, whole = source.arrays(), drawn("ddpo")[1]
    np.testing.assert_allclose(experience["advantage"][::2, 0], 0, atol=1e-3)
    np.testing.assert_allclose(experience["reward"][::2, 0], whole["reward"][::2, 1:].mean(axis=1), rtol=1e-4)
    np.testing.assert_allclose(experience["reward"][1::2], whole["reward"][1::2], rtol=1e-4)
    source = rollouts("ddpo", config=IN_PARTS, reward=Remote("no", lambda x, captions: np.full(len(x), np.inf)))
    with pytest.raises(RemoteError, match="no: has no score for any of 24 images"):
        source.next(PARAMS)


def test_what_takes_the_place_of_a_score_is_a_mean():
    nan, inf = np.nan, np.inf
    given = np.float32([[1, 2, nan], [nan, inf, -inf], [5, 5, 5]])
    np.testing.assert_array_equal(neutral(given), np.float32([[1, 2, 1.5], [3.6] * 3, [5, 5, 5]]))


def test_a_reward_elsewhere_that_fails_is_told(drawn, capfd):
    def broken(images, captions):
        raise KeyError("no\nmodel")

    calls = []

    def breaks(images, captions):
        calls.append(captions)
        return broken(images, captions) if len(calls) == 3 else judged(images, captions)

    source = rollouts("d3po", config=IN_PARTS, reward=Remote("broken", breaks))
    with pytest.raises(RemoteError, match="broken: KeyError: 'no"):
        source.next(PARAMS)
    assert "Traceback" not in capfd.readouterr().err
    batch = source.next(PARAMS)  # nothing of the iteration is lost
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), batch, drawn("d3po")[2])


# ----------------------------------------------------------------------------------------------------------------------
# What an example costs


def counted(method, update="iteration"):
    """Predicted images for each example, counted while the compiled programs run: drawing, policy, constants.

    Rewards of decoded images are counted apart.
    """
    counts = {"drawing": 0, "policy": 0, "constant": 0, "rewards": 0}
    place = ["drawing"]

    def add(kind, count):
        counts[kind if place[0] == "loss" or kind == "rewards" else "drawing"] += int(count)

    def counting(params, frozen):
        predict = online_world.predict_of(params, frozen)

        def counted_predict(networks, latents, timesteps, text):
            for name in networks:
                kind = "policy" if name in method.modules else "constant"
                jax.debug.callback(add, kind, len(latents))
            return predict(networks, latents, timesteps, text)

        return counted_predict

    class Counted(Brightness):
        def score(self, view, prepared):
            jax.debug.callback(add, "rewards", len(view))
            return super().score(view, prepared)

    jax.tree_util.register_dataclass(Counted, ["colour"], [])
    config = RolloutConfig(prompts=2, at_once=2, batch_size=2, update=update)
    source = rollouts(method, config=config, reward=Counted(), predict_of=counting)
    examples = 2 * math.prod(method.examples)
    batches = [source.next(PARAMS) for _ in range(source.minibatches)]
    jax.effects_barrier()
    place[0] = "loss"
    loss = jax.jit(lambda batch, key: method.loss(counting(PARAMS, weights()), batch, key)[0])
    loss(batches[0], jax.random.key(0))
    jax.effects_barrier()
    return [counts["drawing"] / examples, counts["policy"] / 2, counts["constant"] / 2, counts["rewards"] / examples]


COSTS = {
    "TailorPO": (TailorPO(), "iteration"),
    "TailorPO, updates inside": (TailorPO(), "step"),
    "TailorPO, all steps": (TailorPO(train_steps=20), "iteration"),
    "TailorPO-G": (TailorPO(rate=(0.1, 0.2)), "iteration"),
    "SPO": (SPO(), "iteration"),
    "D3PO": (D3PO(), "iteration"),
    "DDPO": (DDPO(images_per_prompt=2, steps=20), "iteration"),
    "DiffusionNFT": (DiffusionNFT(images_per_prompt=2), "iteration"),
}


@pytest.mark.parametrize("name", COSTS)
def test_an_example_costs_what_the_page_says(name):
    method, update = COSTS[name]
    expected = method.cost(within=update == "step")
    assert counted(method, update) == pytest.approx(list(expected))
    page = (Path(__file__).parents[2] / "docs" / "training.md").read_text()
    (row,) = [line for line in page.splitlines() if line.startswith(f"| {name} | ")]
    told = [cell.strip() for cell in row.split("|")[2:-1]]
    assert told == [f"{number:.3g}" for number in expected]


def test_predictions_are_counted_to_the_last_step_and_through_the_network():
    method = TailorPO(steps=4, train_steps=(4, 1), rate=0.1, through_network=True)
    assert counted(method) == pytest.approx(list(method.cost()))


# ----------------------------------------------------------------------------------------------------------------------
# What is refused


def test_gradients_of_a_reward_that_has_none_are_refused():
    with pytest.raises(
        ValueError, match=r"TailorPO with a rate \(TailorPO-G\) follows the gradient .*'compressibility' has none"
    ):
        rollouts("tailorpo-g", reward=JpegSize("compressibility", -1.0))


@pytest.mark.parametrize(
    ("kind", "wrong", "message"),
    [
        (TailorPO, {"beta": 0.0}, "TailorPO: beta is 0.0; expected a number above 0"),
        (TailorPO, {"eta": 0.0}, "TailorPO: eta is 0.0; expected above 0, at most 1"),
        (TailorPO, {"steps": 0}, "TailorPO: steps is 0; expected 1 or more"),
        (TailorPO, {"guidance_scale": float("nan")}, "TailorPO: guidance_scale is nan"),
        (TailorPO, {"margin": -1.0}, "TailorPO: margin is -1.0; expected a number from 0 up"),
        (TailorPO, {"follow": "best"}, "TailorPO: follow is 'best'; expected 'winner', 'random' or 'loser'"),
        (TailorPO, {"train_steps": 21}, "TailorPO: train_steps is 21; expected 1 to 20, the steps"),
        (TailorPO, {"train_steps": (4, 0)}, "TailorPO: train_steps is .4, 0.; expected different numbers from 20 down"),
        (TailorPO, {"train_steps": ()}, "TailorPO: train_steps is ..; expected different numbers from 20 down to 1"),
        (TailorPO, {"through_network": True}, "TailorPO: through_network is True; expected False without a rate"),
        (TailorPO, {"rate": -1.0}, "TailorPO: rate is -1.0"),
        (TailorPO, {"rate": (0.1, float("inf"))}, "TailorPO: rate is .0.1, inf.; expected one or two numbers from 0"),
        (TailorPO, {"rise": 0.0}, "TailorPO: rise is 0.0"),
        (D3PO, {"ratio_clip": 1.0}, "D3PO: ratio_clip is 1.0; expected None, or between 0 and 1"),
        (SPO, {"pool": 1}, "SPO: pool is 1; expected 2 or more"),
        (SPO, {"skip": 20}, "SPO: steps is 20; expected 21 or more"),
        (DDPO, {"images_per_prompt": 1}, "DDPO: images_per_prompt is 1; expected 2 or more"),
        (DDPO, {"ratio_clip": 0.0}, "DDPO: ratio_clip is 0.0"),
        (DDPO, {"advantage_clip": 0.0}, "DDPO: advantage_clip is 0.0"),
        (RolloutConfig, {"epochs": 0}, "rollouts: epochs is 0; expected 1 or more"),
        (RolloutConfig, {"update": "never"}, "rollouts: update is 'never'; expected 'iteration' or 'step'"),
        (RolloutConfig, {"update": "step", "batch_size": 32}, "one step of all prompts, used once: expected 64 and 1"),
        (
            RolloutConfig,
            {"prompts": 6, "at_once": 4},
            "rollouts: at_once is 4; expected a number that divides prompts=6",
        ),
    ],
)
def test_a_setting_that_makes_no_sense_is_named(kind, wrong, message):
    with pytest.raises(ValueError, match=message):
        kind(**wrong)


def test_defaults_are_those_of_the_papers():
    assert (TailorPO().beta, TailorPO().steps, TailorPO().guidance_scale, TailorPO().eta) == (0.1, 20, 5.0, 1.0)
    assert (SPO().beta, SPO().pool, SPO().skip) == (10.0, 4, 4)
    assert (D3PO().beta, D3PO().ratio_clip, TailorPO().ratio_clip) == (0.1, None, None)
    assert (DDPO().ratio_clip, DDPO().advantage_clip) == (1e-4, 10.0)


def test_prompts_and_numbers_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="online: there are no prompts; expected one or more"):
        Prompts(captions=[], ids=[], text={"hidden": np.zeros((0, 6))}, empty={"hidden": np.zeros(6)})
    with pytest.raises(ValueError, match="online: 6 captions, but 5 ids; expected as many"):
        dataclasses.replace(PROMPTS, ids=PROMPTS.ids[:5])
    with pytest.raises(ValueError, match="batch_size is 7; expected a number that divides the 32 examples"):
        rollouts("tailorpo", config=dataclasses.replace(CONFIG, batch_size=7))


def test_the_position_of_another_run_is_refused():
    source = rollouts("tailorpo")
    other = rollouts("tailorpo", seed=1)
    with pytest.raises(ValueError, match="online: the saved position is of another order of batches: seed 0, now 1;"):
        other.restore(source.position(), source.arrays())
    with pytest.raises(ValueError, match="online: the saved position has step None; expected a number of batches"):
        source.restore({**source.position(), "step": None}, source.arrays())
