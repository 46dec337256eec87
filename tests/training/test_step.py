"""One step of training against what it should do, written out."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from flax_pref.training.optimizers import OptimizerConfig
from flax_pref.training.step import make_step, new_state

CONFIG = OptimizerConfig(learning_rate=0.1, schedule="linear", warmup_steps=2, weight_decay=0.01)
STEPS = 10
OPTIMIZER = CONFIG.build(STEPS)
FROZEN = jnp.array([0.5, -1.0, 2.0])
COUNTERS = ("step", "skipped", "skipped_in_a_row")


def objective(params, frozen, batch, key):
    """Regression with noise of a key; a row of infinities makes it infinite."""
    noise = jax.random.normal(key, batch["x"].shape)
    errors = (batch["x"] + 0.1 * noise) @ params["w"] + params["b"] - batch["x"] @ frozen
    return jnp.mean(errors**2), {"loss": jnp.mean(errors**2), "largest": jnp.abs(errors).max()}


def begin(averaged=False):
    params = {"w": jnp.array([0.3, 0.1, -0.2]), "b": jnp.zeros(())}
    return new_state(params, OPTIMIZER, jax.random.key(3), averaged=averaged)


def batch_of(seed, rows=6):
    return {"x": jnp.asarray(np.random.default_rng(seed).standard_normal((rows, 3), np.float32))}


def step(state, batch, **options):
    return jax.jit(make_step(objective, OPTIMIZER, CONFIG.rate(STEPS), **options))(state, FROZEN, batch)


def gradient(params, batch, key):
    return jax.grad(objective, has_aux=True)(params, FROZEN, batch, key)[0]


def close(one, other):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-7), one, other)


def same(one, other):
    def data(x):
        return jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x

    jax.tree.map(lambda x, y: np.testing.assert_array_equal(data(x), data(y)), one, other)


def test_two_steps_are_two_updates_with_noise_of_their_own():
    state = begin()
    params, optimizer, norms = state.params, state.optimizer, []
    for number in range(2):
        gradients = gradient(params, batch_of(0), jax.random.fold_in(jax.random.key(3), number))
        updates, optimizer = OPTIMIZER.update(gradients, optimizer, params)
        params = optax.apply_updates(params, updates)
        norms.append(optax.tree.norm(gradients))
        state, metrics = step(state, batch_of(0))
        close(metrics["gradient_norm"], norms[-1])
        close(metrics["learning_rate"], 0.1 * (number + 1) / 3)
    close((state.params, state.optimizer), (params, optimizer))
    assert abs(norms[0] - norms[1]) > 1e-3
    assert [int(getattr(state, name)) for name in COUNTERS] == [2, 0, 0]


@pytest.mark.parametrize("parts", [2, 3])
def test_accumulation_is_the_mean_of_the_gradients_of_parts(parts):
    state, batch = begin(), batch_of(0)
    key = jax.random.fold_in(jax.random.key(3), 0)
    # Part i has the rows i, i + A, i + 2 A, ..., and noise of its own.
    own = [({"x": batch["x"][i::parts]}, jax.random.fold_in(key, i)) for i in range(parts)]
    gradients = [gradient(state.params, *part) for part in own]
    mean = jax.tree.map(lambda *leaves: sum(leaves) / parts, *gradients)
    updates, _ = OPTIMIZER.update(mean, state.optimizer, state.params)
    after, metrics = step(state, batch, accumulation=parts)
    close(after.params, optax.apply_updates(state.params, updates))
    close(metrics["gradient_norm"], optax.tree.norm(mean))
    losses = [objective(state.params, FROZEN, *part)[0] for part in own]
    close(metrics["loss"], sum(losses) / parts)


def test_given_the_same_noise_accumulation_is_one_pass():
    def noiseless(params, frozen, batch, key):
        errors = batch["x"] @ params["w"] + params["b"] - batch["x"] @ frozen
        return jnp.mean(errors**2), {"loss": jnp.mean(errors**2)}

    ends = []
    for parts in (1, 2, 3):
        state = begin()
        take = jax.jit(make_step(noiseless, OPTIMIZER, CONFIG.rate(STEPS), accumulation=parts))
        for number in range(3):
            state, metrics = take(state, FROZEN, batch_of(number))
        ends.append((state.params, state.optimizer, metrics))
    close(ends[0], ends[1])
    close(ends[0], ends[2])


def test_the_average_follows_what_is_trained():
    state = begin(averaged=True)
    expected = state.params
    for number in range(3):
        state, _ = step(state, batch_of(number), average_decay=0.9)
        expected = jax.tree.map(lambda old, new: 0.9 * old + 0.1 * new, expected, state.params)
    close(state.average, expected)
    assert begin().average is None


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("bad", [np.inf, np.nan])
def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(bad, parts):
    broken = {"x": batch_of(0)["x"].at[4, 1].set(bad)}
    options = {"average_decay": 0.9, "accumulation": parts}
    good, _ = step(begin(averaged=True), batch_of(0), **options)
    state = good
    for count in (1, 2):
        state, metrics = step(state, broken, **options)
        assert not np.isfinite(metrics["loss"])
        assert [int(getattr(state, name)) for name in COUNTERS] == [1 + count, count, count]
        assert (metrics["skipped"], metrics["skipped_in_a_row"]) == (count, count)
    unchanged = state._replace(**{name: getattr(good, name) for name in COUNTERS})
    same(unchanged, good)
    state, metrics = step(state, batch_of(1), **options)
    assert [int(getattr(state, name)) for name in COUNTERS] == [4, 2, 0]
    assert not np.array_equal(state.params["w"], good.params["w"])
    # The schedule waits for steps that are skipped: this is the second update.
    close(metrics["learning_rate"], 0.1 * 2 / 3)


def test_a_gradient_that_is_not_finite_is_enough_though_the_loss_is():
    def rooted(params, frozen, batch, key):
        loss = jnp.sqrt(jnp.abs(params["b"]))  # its derivative at zero is infinite
        return loss, {"loss": loss}

    state = begin()
    after, metrics = jax.jit(make_step(rooted, OPTIMIZER, CONFIG.rate(STEPS)))(state, FROZEN, batch_of(0))
    assert np.isfinite(metrics["loss"]) and not np.isfinite(metrics["gradient_norm"])
    assert int(after.skipped) == 1
    same((after.params, after.optimizer), (state.params, state.optimizer))
