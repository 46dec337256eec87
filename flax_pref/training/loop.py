"""The training loop."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm


class TrainState(NamedTuple):
    """What a step replaces.

    Attributes:
      params: pytree that is trained.
      optimizer: state of the optimizer.
      average: exponential moving average of params.
    """

    params: Any
    optimizer: Any
    average: Any


def fit(
    objective: Callable,
    params: Any,
    batches: Iterable[Any],
    *,
    optimizer: optax.GradientTransformation,
    steps: int,
    seed: int,
    average_decay: float = 0.0,
    label: str = "training",
) -> tuple[TrainState, dict[str, np.ndarray]]:
    """Minimises an objective.

    Args:
      objective: `(params, batch, key) -> (loss, metrics)`; metrics is a dict of scalars.
      params: pytree of arrays, left as it is.
      batches: at least `steps` batches, pytrees of equal shapes; a prefix of them is consumed.
      optimizer: turns gradients into updates.
      steps: number of updates.
      seed: of the keys that the objective gets, one per step.
      average_decay: of the moving average; 0 makes it the last parameters.
      label: of the progress bar.

    Returns:
      the last state, and each metric of every step `[steps]`.

    Raises:
      FloatingPointError: the loss was not finite; names the first such step.
      ValueError: there were fewer batches than steps.
    """

    def step(state: TrainState, batch, key):
        (_, metrics), gradients = jax.value_and_grad(objective, has_aux=True)(state.params, batch, key)
        updates, optimizer_state = optimizer.update(gradients, state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)
        average = optax.incremental_update(params, state.average, 1.0 - average_decay)
        return TrainState(params, optimizer_state, average), metrics

    step = jax.jit(step, donate_argnums=0)
    # Donation destroys what it is given; the caller keeps its own copy.
    state = TrainState(jax.tree.map(jnp.array, params), optimizer.init(params), jax.tree.map(jnp.array, params))
    key = jax.random.key(seed)
    history = []
    with tqdm(total=steps, desc=label, unit="step") as progress:
        for index, batch in zip(range(steps), batches, strict=False):
            state, metrics = step(state, batch, jax.random.fold_in(key, index))
            history.append(metrics)
            if index % 20 == 0 or index == steps - 1:
                shown = {name: float(value) for name, value in metrics.items()}
                if not np.isfinite(shown["loss"]):
                    first = next(i for i, past in enumerate(history) if not np.isfinite(past["loss"]))
                    raise FloatingPointError(
                        f"{label}: the loss is {float(history[first]['loss'])} at step {first}; lower the learning rate"
                    )
                progress.set_postfix({name: f"{value:.4g}" for name, value in shown.items()}, refresh=False)
            progress.update()
    if len(history) < steps:
        raise ValueError(f"{label}: the data ended after {len(history)} of {steps} steps")
    history = jax.device_get(history)
    return state, {name: np.array([row[name] for row in history]) for name in history[0]}
