"""One step of training: gradients, over parts of a batch if asked for, and an update that is taken only if finite."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax


class TrainState(NamedTuple):
    """What a step replaces, and what a run goes on from.

    Attributes:
        params: pytree that is trained, float32.
        optimizer: state of the optimizer.
        average: exponential moving average of params; None where there is none.
        key: of the run; that of a step is a function of it and of the step's number.
        step: int32, steps made.
        skipped: int32, those of them that were skipped.
        skipped_in_a_row: int32, the latest ones.
    """

    params: Any
    optimizer: Any
    average: Any
    key: jax.Array
    step: jax.Array
    skipped: jax.Array
    skipped_in_a_row: jax.Array


def new_state(params: Any, optimizer: optax.GradientTransformation, key: jax.Array, *, averaged: bool) -> TrainState:
    """The state before the first step."""
    counters = (jnp.zeros((), jnp.int32) for _ in range(3))  # arrays of their own, for they are donated
    average = jax.tree.map(jnp.copy, params) if averaged else None
    return TrainState(params, optimizer.init(params), average, key, *counters)


def make_step(
    objective: Callable[[Any, Any, Any, jax.Array], tuple[jax.Array, dict[str, jax.Array]]],
    optimizer: optax.GradientTransformation,
    rate: optax.Schedule | None = None,
    *,
    accumulation: int = 1,
    average_decay: float = 0.0,
    shardings: Any = None,
) -> Callable[[TrainState, Any, Any], tuple[TrainState, dict[str, jax.Array]]]:
    """A step as a pure function `(state, frozen, batch) -> (state, metrics)`, to be jitted with state donated.

    A step whose loss or gradient is not finite changes nothing but the counters.

    Args:
        objective: `(params, frozen, batch, key) -> (loss, metrics)`; metrics are scalars.
        optimizer: turns gradients into updates.
        rate: learning rate of an update, for the metrics; None: they do not have it.
        accumulation: number of equal parts of the batch whose gradients are computed one after another and averaged.
        average_decay: of the moving average, if the state has one.
        shardings: of the gradients, a pytree like params; None: left to the compiler.

    Returns:
        the function; its metrics are those of the objective, and `gradient_norm` (before clipping), `skipped`,
        `skipped_in_a_row` and `learning_rate`.
    """
    gradient = jax.value_and_grad(objective, has_aux=True)

    def gradients_of(params, frozen, batch, key):
        if accumulation == 1:
            (_, metrics), gradients = gradient(params, frozen, batch, key)
            return gradients, metrics

        def part(total, inputs):
            i, own = inputs
            (_, metrics), gradients = gradient(params, frozen, own, jax.random.fold_in(key, i))
            return jax.tree.map(jnp.add, total, gradients), metrics

        # Part i has the rows i, i + A, i + 2 A, ...: so every device finds its share of each part among its own rows.
        parts = jax.tree.map(lambda x: x.reshape(-1, accumulation, *x.shape[1:]).swapaxes(0, 1), batch)
        zeros = jax.tree.map(jnp.zeros_like, params)
        gradients, metrics = jax.lax.scan(part, zeros, (jnp.arange(accumulation), parts))
        gradients = jax.tree.map(lambda total: total / accumulation, gradients)
        return gradients, jax.tree.map(lambda values: values.mean(axis=0), metrics)

    def step(state: TrainState, frozen: Any, batch: Any) -> tuple[TrainState, dict[str, jax.Array]]:
        key = jax.random.fold_in(state.key, state.step)
        gradients, metrics = gradients_of(state.params, frozen, batch, key)
        if shardings is not None:
            gradients = jax.lax.with_sharding_constraint(gradients, shardings)
        with jax.named_scope("optimizer"):
            norm = optax.tree.norm(gradients)
            updates, optimizer_state = optimizer.update(gradients, state.optimizer, state.params)
            params = optax.apply_updates(state.params, updates)
            average = state.average
            if average is not None:
                average = optax.incremental_update(params, average, 1.0 - average_decay)
        finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(norm)
        params, optimizer_state, average = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old),
            (params, optimizer_state, average),
            (state.params, state.optimizer, state.average),
        )
        skipped = state.skipped + ~finite
        in_a_row = jnp.where(finite, 0, state.skipped_in_a_row + 1)
        metrics |= {"gradient_norm": norm, "skipped": skipped, "skipped_in_a_row": in_a_row}
        if rate is not None:
            metrics["learning_rate"] = rate(state.step - state.skipped)
        return TrainState(params, optimizer_state, average, state.key, state.step + 1, skipped, in_a_row), metrics

    return step
