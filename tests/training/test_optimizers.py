"""Learning rates and optimizers do what their fields say."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from flax_pref.checkpoints.weights import abstract_network
from flax_pref.models.presets import SD15
from flax_pref.training.optimizers import OptimizerConfig


def rates(steps, **fields):
    rate = OptimizerConfig(learning_rate=2.0, **fields).rate(steps)
    return np.array([rate(jnp.int32(number)) for number in range(steps + 1)])


def update(gradients, params, *, number=1, **fields):
    """The last of so many updates with the same gradients."""
    optimizer = OptimizerConfig(**{"learning_rate": 0.1, "clip_norm": None, **fields}).build(100)
    state = optimizer.init(params)
    for _ in range(number):
        updates, state = optimizer.update(gradients, state, params)
    return updates


@pytest.mark.parametrize(
    ("schedule", "after"),
    [
        ("constant", [2, 2, 2, 2, 2]),
        ("linear", [2, 1.5, 1, 0.5, 0]),
        ("cosine", 1 + np.cos(np.pi * np.arange(5) / 4)),
    ],
)
@pytest.mark.parametrize("warmup_steps", [0, 3])
def test_the_rate_rises_in_the_warm_up_and_then_follows_its_schedule_to_the_last_step(schedule, after, warmup_steps):
    steps = 4 + warmup_steps
    expected = [*(2 * (i + 1) / (warmup_steps + 1) for i in range(warmup_steps)), *after]
    found = rates(steps, schedule=schedule, warmup_steps=warmup_steps)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert found[0] > 0, "no step is lost"


def test_a_run_that_is_all_warm_up_has_rates():
    assert np.isfinite(rates(3, schedule="cosine", warmup_steps=5)).all()


def test_adamw_is_that_of_the_paper():
    rng = np.random.default_rng(0)
    theta, lr, b1, b2, epsilon, decay = rng.standard_normal(5), 0.01, 0.8, 0.95, 1e-6, 0.1
    optimizer = OptimizerConfig(
        learning_rate=lr, b1=b1, b2=b2, epsilon=epsilon, weight_decay=decay, clip_norm=None
    ).build(10)
    params = jnp.float32(theta)
    state = optimizer.init(params)
    m = v = 0.0
    for t in range(1, 4):
        g = rng.standard_normal(5)
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
        theta = theta - lr * (m / (1 - b1**t) / (np.sqrt(v / (1 - b2**t)) + epsilon) + decay * theta)
        updates, state = optimizer.update(jnp.float32(g), state, params)
        params = optax.apply_updates(params, updates)
    np.testing.assert_allclose(params, theta, rtol=1e-5)


def test_gradients_are_clipped_by_their_norm_over_all_parameters():
    params = {"a": jnp.ones((2, 2)), "b": jnp.ones(3)}
    large = {"a": jnp.full((2, 2), 30.0), "b": jnp.array([0.0, 0.0, 80.0])}  # norm 100
    # An epsilon as large as gradients makes Adam see how large they are.
    fields = {"epsilon": 1.0}
    scaled = update(jax.tree.map(lambda g: g * 0.02, large), params, **fields)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5), update(large, params, clip_norm=2.0, **fields), scaled
    )
    small = jax.tree.map(lambda g: g * 1e-3, large)
    jax.tree.map(
        np.testing.assert_array_equal,
        update(small, params, clip_norm=2.0, **fields),
        update(small, params, **fields),
    )


def test_first_moments_can_be_kept_in_half_the_memory():
    optimizer = OptimizerConfig(learning_rate=1.0, moment_dtype="bfloat16").build(3)
    kinds = {str(leaf.dtype): leaf.size for leaf in jax.tree.leaves(optimizer.init(jnp.zeros(1000)))}
    assert kinds["bfloat16"] == kinds["float32"] == 1000


def test_adafactor_keeps_rows_and_columns_in_place_of_matrices():
    params = abstract_network("unet", SD15.unet).params
    state = jax.eval_shape(OptimizerConfig(name="adafactor", learning_rate=1e-4).build(100).init, params)
    kept, trained = (sum(leaf.size for leaf in jax.tree.leaves(tree)) for tree in (state, params))
    assert trained == 859_520_964
    assert kept < 0.01 * trained  # adamw keeps twice as much as is trained


@pytest.mark.parametrize("shape", [(256, 128), (256, 4)])
def test_adafactor_moves_what_begins_at_zero_by_the_learning_rate(shape):
    """As LoRA's B does; with a rate relative to the parameters it would stay where it is."""
    gradients = jnp.float32(np.random.default_rng(0).standard_normal(shape))
    updates = update(gradients, jnp.zeros(shape), name="adafactor", number=3)
    assert 0.05 < np.sqrt(np.mean(np.square(updates))) < 0.15
    assert (np.sign(updates) == -np.sign(gradients)).all()


def test_adafactor_decays_weights_too():
    params = jnp.ones((4, 4))
    pulled, plain = (update(jnp.ones((4, 4)), params, name="adafactor", weight_decay=decay) for decay in (0.5, 0.0))
    np.testing.assert_allclose(pulled - plain, -0.1 * 0.5, rtol=1e-5)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"learning_rate": 0.0}, "learning_rate is 0.0; expected a positive number"),
        ({"learning_rate": float("nan")}, "learning_rate is nan"),
        ({"warmup_steps": -1}, "warmup_steps=-1"),
        ({"weight_decay": -0.1}, "weight_decay=-0.1"),
        ({"b2": 1.0}, "b2 is 1.0; expected 0 to 1, without 1"),
        ({"clip_norm": 0.0}, "clip_norm is 0.0; expected a positive number, or None"),
    ],
)
def test_numbers_out_of_range_are_named(fields, message):
    with pytest.raises(ValueError, match=message):
        OptimizerConfig(**{"learning_rate": 1.0} | fields)
