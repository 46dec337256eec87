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


# ----------------------------------------------------------------------------------------------------------------------
# Independent modules

MODULES = ("pos", "neg")
SCALES = {"pos": 1.0, "neg": 50.0}  # of the gradients: that of neg is clipped, that of pos is not
CLIPPED = OptimizerConfig(learning_rate=0.1, clip_norm=5.0, epsilon=1.0, schedule="linear", weight_decay=0.01)


def loss_of(params, name, batch, key):
    """Regression with one module; `batch[name]` is added to what it sees, and may be not finite."""
    noise = jax.random.normal(key, batch["x"].shape)
    seen = batch["x"] + 0.1 * noise + batch[name]
    return SCALES[name] * jnp.mean((seen @ params["w"] + params["b"]) ** 2)


def module(params, name):
    """The parameters of a module, however params hold several."""
    return jax.tree.map(lambda leaf: leaf[MODULES.index(name)], params) if "w" in params else params[name]


def together(params, frozen, batch, key):
    loss = sum(loss_of(module(params, name), name, batch, key) for name in MODULES)
    return loss, {"loss": loss}


def alone(name):
    def objective(params, frozen, batch, key):
        loss = loss_of(params, name, batch, key)
        return loss, {"loss": loss}

    return objective


def begin_modules(independent):
    one = {"w": jnp.array([0.3, 0.1, -0.2]), "b": jnp.zeros(())}
    if independent == "stacked":
        return jax.tree.map(lambda leaf: jnp.stack([leaf] * len(MODULES)), one)
    return {name: one for name in MODULES}


def steps_of(objective, params, batches, optimizer=CLIPPED, **kinds):
    """The last state and the metrics of each step."""
    built, history = optimizer.build(STEPS), []
    state = new_state(params, built, jax.random.key(3), averaged=True, **kinds)
    modules = MODULES if kinds else ()
    make = make_step(objective, built, optimizer.rate(STEPS), average_decay=0.9, modules=modules, **kinds)
    take = jax.jit(make)
    for batch in batches:
        state, metrics = take(state, FROZEN, batch)
        history.append({name: float(value) for name, value in metrics.items()})
    return state, history


def batches_with(bad=None):
    """Four batches; in the second and third, what the module `bad` sees is not finite."""
    values = [dict.fromkeys(MODULES, 0.0) for _ in range(4)]
    if bad:
        values[1][bad], values[2][bad] = np.inf, np.nan
    return [batch_of(i) | {name: jnp.float32(value) for name, value in own.items()} for i, own in enumerate(values)]


@pytest.mark.parametrize("optimizer", [CLIPPED, OptimizerConfig(name="adafactor", learning_rate=0.1)], ids=str)
@pytest.mark.parametrize("bad", [None, "pos", "neg"])
@pytest.mark.parametrize("independent", ["stacked", "named"])
def test_independent_modules_are_trained_as_if_each_were_alone(independent, bad, optimizer):
    kinds = {"independent": independent}
    batches = batches_with(bad)
    state, history = steps_of(together, begin_modules(independent), batches, optimizer, **kinds)
    for name in MODULES:
        own, own_history = steps_of(alone(name), module(begin_modules("named"), name), batches, optimizer)
        close(module(state.params, name), own.params)
        close(module(state.average, name), own.average)
        for at, (metrics, expected) in enumerate(zip(history, own_history, strict=True)):
            assert metrics[f"{name}_skipped"] == expected["skipped"], at
            close(metrics[f"{name}_gradient_norm"], expected["gradient_norm"])
        assert own_history[-1]["skipped"] == (2 if name == bad else 0)
    assert history[2]["skipped"] == history[2]["skipped_in_a_row"] == (2 if bad else 0)
    assert history[3]["skipped_in_a_row"] == 0
    assert np.isclose(history[0]["gradient_norm"], np.hypot(*(history[0][f"{name}_gradient_norm"] for name in MODULES)))


def test_a_large_gradient_of_one_module_does_not_hold_the_other_back():
    joint, _ = steps_of(together, begin_modules("stacked"), batches_with())
    apart, history = steps_of(together, begin_modules("stacked"), batches_with(), independent="stacked")
    assert history[0]["neg_gradient_norm"] > 5 > history[0]["pos_gradient_norm"]
    pos = [
        jnp.abs(module(state.params, "pos")["w"] - module(begin_modules("named"), "pos")["w"])
        for state in (joint, apart)
    ]
    assert (pos[1] > 2 * pos[0]).all()
