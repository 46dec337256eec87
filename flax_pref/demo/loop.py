"""The loop that the base of the demo world is trained with; preference modules are trained by `training.trainer`."""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

from flax_pref.training.step import TrainState, make_step, new_state


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
      FloatingPointError: a loss or gradient was not finite; names the first such step.
      ValueError: there were fewer batches than steps.
    """

    def on_its_own(params, frozen, batch, key):
        return objective(params, batch, key)

    step = jax.jit(make_step(on_its_own, optimizer, average_decay=average_decay), donate_argnums=0)
    # Donation destroys what it is given; the caller keeps its own copy.
    params, key = jax.tree.map(jnp.array, params), jax.random.key(seed)
    state = new_state(params, optimizer, key, averaged=True)
    # Where the first step leaves it: otherwise JAX would compile the second step again.
    state = jax.device_put(state, jax.local_devices()[0])
    history = []
    with tqdm(total=steps, desc=label, unit="step") as progress:
        for index, batch in zip(range(steps), batches, strict=False):
            state, metrics = step(state, {}, batch)
            history.append(metrics)
            if index % 20 == 0 or index == steps - 1:
                shown = {name: float(value) for name, value in metrics.items()}
                if shown["skipped"]:
                    first = next(i for i, past in enumerate(history) if past["skipped"])
                    loss, norm = (float(history[first][name]) for name in ("loss", "gradient_norm"))
                    raise FloatingPointError(
                        f"{label}: the loss is {loss} at step {first}, the norm of its gradient {norm}; lower the "
                        "learning rate"
                    )
                progress.set_postfix({name: f"{value:.4g}" for name, value in shown.items()}, refresh=False)
            progress.update()
    if len(history) < steps:
        raise ValueError(f"{label}: the data ended after {len(history)} of {steps} steps")
    history = jax.device_get(history)
    return state, {name: np.array([row[name] for row in history]) for name in history[0]}
