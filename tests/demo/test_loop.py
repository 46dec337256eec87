import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from flax_pref.demo.loop import fit


def quadratic(params, batch, key):
    loss = jnp.square(params["x"] - batch).mean()
    return loss, {"loss": loss, "draw": jax.random.uniform(key)}


def run(steps=50, batches=None, params=None, **options):
    batches = itertools.repeat(np.array([1.0, 3.0])) if batches is None else batches
    params = {"x": jnp.zeros(2)} if params is None else params
    return fit(quadratic, params, batches, optimizer=optax.sgd(0.5), steps=steps, seed=0, **options)


def test_fit_minimises_and_reports_every_step():
    params = {"x": jnp.zeros(2)}
    state, history = run(params=params)
    np.testing.assert_allclose(state.params["x"], [1, 3], atol=1e-5)
    assert history["loss"].shape == (50,)
    assert len(set(history["draw"].tolist())) == 50, "every step draws from its own key"
    np.testing.assert_array_equal(params["x"], [0, 0], err_msg="the caller's parameters must survive")


def test_the_moving_average_is_that_of_the_parameters():
    state, _ = run(steps=3, average_decay=0.9)
    x, average = np.zeros(2), np.zeros(2)
    for _ in range(3):
        x = x - 0.5 * (x - [1, 3])
        average = 0.9 * average + 0.1 * x
    np.testing.assert_allclose(state.average["x"], average, rtol=1e-6)


def test_the_same_seed_gives_the_same_run():
    first, second = run(steps=5)[1], run(steps=5)[1]
    np.testing.assert_array_equal(first["draw"], second["draw"])


def test_a_loss_that_is_not_finite_stops_and_names_its_step():
    batches = [np.ones(2)] * 3 + [np.full(2, np.nan)] + [np.ones(2)] * 30
    with pytest.raises(FloatingPointError, match="nan at step 3"):
        run(steps=30, batches=batches)


def test_too_few_batches_are_an_error():
    with pytest.raises(ValueError, match="after 2 of 5 steps"):
        run(steps=5, batches=[np.ones(2)] * 2)
