"""One step of training: gradients, over parts of a batch if asked for, and an update that is taken only if finite.

Modules that an objective trains independently of each other are updated one by one: each is clipped by its own norm
and skips its own steps, as if it were trained alone.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax


class TrainState(NamedTuple):
    """State of training: a step replaces it, and checkpoints hold it.

    Attributes:
        params: pytree that is trained, float32.
        optimizer: state of the optimizer; of independent modules, that of each, held as `params` are.
        average: exponential moving average of params; None where there is none.
        key: of the run; that of a step is a function of it and of the step's number.
        step: int32, steps made.
        skipped: int32, those of them that were skipped; likewise.
        skipped_in_a_row: int32, the latest ones; likewise.
    """

    params: Any
    optimizer: Any
    average: Any
    key: jax.Array
    step: jax.Array
    skipped: jax.Array
    skipped_in_a_row: jax.Array


Independent = Literal["stacked", "named"]
"""How params hold modules that are trained independently: along the first axis of every leaf, or in a dict by name."""


def for_each_module(independent: Independent | None, function: Callable[..., tuple]) -> Callable[..., tuple]:
    """`function`, from pytrees to a tuple of them, as one of pytrees that hold several modules; None: as it is."""
    if independent is None:
        return function
    if independent == "stacked":
        return jax.vmap(function)

    def by_name(*trees):
        names = trees[0].keys()
        results = [function(*(None if tree is None else tree[name] for tree in trees)) for name in names]
        columns = zip(*results, strict=True)
        return tuple(None if column[0] is None else dict(zip(names, column, strict=True)) for column in columns)

    return by_name


def new_state(
    params: Any,
    optimizer: optax.GradientTransformation,
    key: jax.Array,
    *,
    averaged: bool,
    independent: Independent | None = None,
) -> TrainState:
    """The state before the first step."""

    def begin(params):
        return optimizer.init(params), jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32)

    optimizer_state, *skipped = for_each_module(independent, begin)(params)
    average = jax.tree.map(jnp.copy, params) if averaged else None
    return TrainState(params, optimizer_state, average, key, jnp.zeros((), jnp.int32), *skipped)


def make_step(
    objective: Callable[[Any, Any, Any, jax.Array], tuple[jax.Array, dict[str, jax.Array]]],
    optimizer: optax.GradientTransformation,
    rate: optax.Schedule | None = None,
    *,
    accumulation: int = 1,
    average_decay: float | Callable[[jax.Array], jax.Array] = 0.0,
    sees_average: bool = False,
    shardings: Any = None,
    independent: Independent | None = None,
    modules: Sequence[str] = (),
) -> Callable[[TrainState, Any, Any], tuple[TrainState, dict[str, jax.Array]]]:
    """A step as a pure function `(state, frozen, batch) -> (state, metrics)`, to be jitted with state donated.

    A step whose loss or gradient is not finite changes nothing but the counters. Of independent modules, one whose own
    gradient is not finite stays as it is, and the others are trained.

    Args:
        objective: `(params, frozen, batch, key) -> (loss, metrics)`; metrics are scalars.
        optimizer: turns gradients into updates.
        rate: learning rate of an update, for the metrics; None: they do not have it.
        accumulation: number of equal parts of the batch whose gradients are computed one after another and averaged.
        average_decay: of the moving average, if the state has one: a number, or a function of the number of the step.
        sees_average: whether the objective takes the average too, as `(frozen, average)` in the place of frozen.
        shardings: of the gradients, a pytree like params; None: left to the compiler.
        independent: how params hold modules whose gradients depend on one module each; None: one update for all.
        modules: their names.

    Returns:
        the function; its metrics are those of the objective, and `gradient_norm` (before clipping), `skipped`,
        `skipped_in_a_row` and `learning_rate`. With independent modules these are the norm of all gradients and the
        largest of the others, and `NAME_gradient_norm` and `NAME_skipped` are those of each module.
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

    def training_step(state: TrainState, frozen: Any, batch: Any) -> tuple[TrainState, dict[str, jax.Array]]:
        key = jax.random.fold_in(state.key, state.step)
        given = (frozen, state.average) if sees_average else frozen
        gradients, metrics = gradients_of(state.params, given, batch, key)
        if shardings is not None:
            gradients = jax.lax.with_sharding_constraint(gradients, shardings)
        # The loss of several independent modules says nothing of one of them: its own gradient does.
        finite_loss = jnp.isfinite(metrics["loss"]) if independent is None else True

        def update(gradients, params, optimizer_state, average, skipped, in_a_row):
            norm = optax.tree.norm(gradients)
            finite = finite_loss & jnp.isfinite(norm)
            updates, new_optimizer_state = optimizer.update(gradients, optimizer_state, params)
            new_params = optax.apply_updates(params, updates)
            new_average = average
            if average is not None:
                decay = average_decay(state.step + 1) if callable(average_decay) else average_decay
                new_average = optax.incremental_update(new_params, average, 1.0 - decay)
            kept = jax.tree.map(
                lambda new, old: jnp.where(finite, new, old),
                (new_params, new_optimizer_state, new_average),
                (params, optimizer_state, average),
            )
            told = {} if rate is None else {"learning_rate": rate(state.step - skipped)}
            skipped, in_a_row = skipped + ~finite, jnp.where(finite, 0, in_a_row + 1)
            told |= {"gradient_norm": norm, "skipped": skipped, "skipped_in_a_row": in_a_row}
            return *kept, skipped, in_a_row, told

        with jax.named_scope("optimizer"):
            parts = state.params, state.optimizer, state.average, state.skipped, state.skipped_in_a_row
            made = for_each_module(independent, update)(gradients, *parts)
        params, optimizer_state, average, skipped, in_a_row, told = made
        if independent == "named":
            told = jax.tree.map(lambda *each: jnp.stack(each), *(told[module] for module in modules))
        metrics |= told if independent is None else metrics_of_modules(told, modules)
        new = TrainState(params, optimizer_state, average, state.key, state.step + 1, skipped, in_a_row)
        return new, metrics

    return training_step


def metrics_of_modules(told: Mapping[str, Any], modules: Sequence[str]) -> dict[str, jax.Array]:
    """Scalars of all modules together, and of each.

    Args:
        told: values by name, `[M]` each.
        modules: names of the M modules.
    """
    metrics = {name: each.max() for name, each in told.items()}
    metrics["gradient_norm"] = jnp.sqrt(jnp.square(told["gradient_norm"]).sum())
    for i, module in enumerate(modules):
        metrics |= {f"{module}_{name}": told[name][i] for name in ("gradient_norm", "skipped")}
    return metrics
