"""The sampler: one scan over the solver's steps, one batched prediction and one contraction in each.

Random numbers belong to images: every draw of an image comes from its own key, so an image does not depend on the size,
the order or the padding of its batch.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flax_pref.diffusion.solvers import Solver, log_prob, no_history, step

# (networks, latents [R B, H, W, C], timesteps [R B], conditioning of [R B, ...]) -> noise_pred [R B, H, W, C], where
# networks is a static tuple of R names: of each group of B rows, in order.
Predict = Callable[[tuple[str, ...], jax.Array, jax.Array, Any], jax.Array]


def sample(
    predict: Predict,
    layout: tuple[tuple[str, str], ...],
    coefficients: jax.Array,
    solver: Solver,
    keys: jax.Array,
    text: Any,
    empty: Any,
    shape: tuple[int, int, int],
) -> jax.Array:
    """Draws latents.

    A pure function: jit it over what varies. Of the arguments, predict, layout and shape are static.

    Args:
        predict: the networks, see `Predict`. It is called with all rows in one batch, once per step.
        layout: `(network, prompt)` for each of R rows, prompt being "text" or "empty"; see `guidance.layout`.
        coefficients: `[R]`, or `[S, R]` to vary over the solver's rows; see `guidance.coefficients`.
        solver: of S rows.
        keys: `[B]`, one per image; see `image_keys`.
        text: conditioning on the prompts. `[B, T, D]` hidden states, or any pytree of `[B, ...]` arrays that predict
            takes, such as hidden states, `text_embeds` and `time_ids` of SDXL.
        empty: the same of the empty prompt, with or without the leading axis.
        shape: `(H, W, C)` of the latents of one image.

    Returns:
        latents, float32 `[B, H, W, C]`, scaled as the network knows them.

    Raises:
        ValueError: coefficients or text do not fit, or the layout names another prompt.
    """
    return _walk(lambda *_: None, predict, layout, coefficients, solver, keys, text, empty, shape)[1]


def sample_trajectory(
    predict: Predict,
    layout: tuple[tuple[str, str], ...],
    coefficients: jax.Array,
    solver: Solver,
    keys: jax.Array,
    text: Any,
    empty: Any,
    shape: tuple[int, int, int],
) -> tuple[jax.Array, jax.Array]:
    """Draws the latents that `sample` draws, and returns all that lie on the way, with their log-probabilities.

    Online training needs these: the probability of each step, guidance included, under the networks that took it. It
    keeps S + 1 times the memory of the latents. The arguments are those of `sample`; the solver must be stochastic.

    Returns:
        latents, float32 `[S + 1, B, H, W, C]`, from the initial noise to what `sample` returns, and log_probs, float32
        `[S, B]`, where row i is that of the step from latents i to i + 1; see `solvers.log_prob`.

    Raises:
        ValueError: the solver is not stochastic, or as for `sample`.
    """
    if not solver.stochastic:
        raise ValueError(
            "sample_trajectory: the solver draws no noise, so its steps have no probabilities; take ddim with eta > 0"
        )

    def observe(latents, noise_pred, row, next_latents):
        return next_latents, log_prob(next_latents, latents, noise_pred, row)

    start, _, (visited, log_probs) = _walk(observe, predict, layout, coefficients, solver, keys, text, empty, shape)
    return jnp.concatenate([start[None], visited]), log_probs


def _walk(
    observe: Callable[[jax.Array, jax.Array, Solver, jax.Array], Any],
    predict: Predict,
    layout: tuple[tuple[str, str], ...],
    coefficients: jax.Array,
    solver: Solver,
    keys: jax.Array,
    text: Any,
    empty: Any,
    shape: tuple[int, int, int],
) -> tuple[jax.Array, jax.Array, Any]:
    """The scan of `sample`: the first latents, the last ones, and stacked over the steps what observe returns.

    observe is called in each step as `observe(latents, noise_pred, row, next_latents)`.
    """
    networks = tuple(network for network, _ in layout)
    num_rows, num_images, num_steps = len(layout), len(keys), len(solver.timesteps)
    conditioning = _gather(layout, text, empty, num_images)
    coefficients = jnp.asarray(coefficients, jnp.float32)
    if coefficients.shape not in ((num_rows,), (num_steps, num_rows)):
        raise ValueError(
            f"sample: coefficients of {num_rows} rows and {num_steps} steps must be [{num_rows}] or "
            f"[{num_steps}, {num_rows}], got {list(coefficients.shape)}"
        )
    coefficients = jnp.broadcast_to(coefficients, (num_steps, num_rows))

    def denoise(carry, table):
        latents, history = carry
        i, row, coefs = table
        model_input = jnp.tile(row.input_scale * latents, (num_rows, 1, 1, 1))
        timesteps = jnp.full(num_rows * num_images, row.timesteps)
        predictions = predict(networks, model_input, timesteps, conditioning)
        predictions = predictions.astype(jnp.float32).reshape(num_rows, num_images, *shape)
        # Guidance takes differences of near equals: accelerators must not round the factors, as they would by default.
        noise_pred = jnp.einsum("r,rbhwc->bhwc", coefs, predictions, precision=jax.lax.Precision.HIGHEST)
        noise = _normal(keys, i, shape) if solver.stochastic else None
        next_latents, history = step(latents, noise_pred, row, noise, history)
        return (next_latents, history), observe(latents, noise_pred, row, next_latents)

    start = solver.init_noise_sigma * _normal(keys, 0, shape)
    carry = (start, no_history(solver, start))
    (latents, _), observed = jax.lax.scan(denoise, carry, (jnp.arange(1, num_steps + 1), solver, coefficients))
    return start, latents, observed


def image_key(seed: int, prompt_id: int) -> jax.Array:
    """The key of one image.

    Raises:
        ValueError: seed or prompt_id outside 0 .. 2^32 - 1.
    """
    return image_keys(seed, [prompt_id])[0]


def image_keys(seed: int, prompt_ids: Sequence[int]) -> jax.Array:
    """The keys `[B]` of images, a function of the seed and of each image's prompt id only.

    Raises:
        ValueError: seed or a prompt id outside 0 .. 2^32 - 1.
    """
    prompt_ids = np.asarray(prompt_ids)
    for name, values in (("seed", np.asarray(seed)), ("prompt_id", prompt_ids)):
        # JAX would wrap larger numbers around, and two images would share their noise.
        outside = values[(values < 0) | (values >= 2**32)]
        if outside.size:
            raise ValueError(f"{name} must lie in 0 .. 2^32 - 1, got {outside[0]}")
    # Threefry whatever the default is: other generators draw differently under vmap, that is, by batch.
    key = jax.random.key(np.uint32(seed), impl="threefry2x32")
    return jax.vmap(jax.random.fold_in, (None, 0))(key, prompt_ids.astype(np.uint32))


def _normal(keys: jax.Array, i: jax.Array | int, shape: tuple[int, ...]) -> jax.Array:
    """Standard normal `[B, *shape]`: draw number i of each image, 0 at the start and then one per step."""
    return jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, i), shape, jnp.float32))(keys)


def _gather(layout: tuple[tuple[str, str], ...], text: Any, empty: Any, num_images: int) -> Any:
    """The conditioning of all rows: for every `[B, ...]` array of `text`, one of `[R B, ...]`."""
    for network, prompt in layout:
        if prompt not in ("text", "empty"):
            raise ValueError(f'sample: prompt of network {network!r} must be "text" or "empty", got {prompt!r}')

    def gather(text: jax.Array, empty: jax.Array) -> jax.Array:
        if text.shape[0] != num_images:
            raise ValueError(f"sample: {num_images} keys, but text has shape {list(text.shape)}")
        prompts = {"text": text, "empty": jnp.broadcast_to(empty, text.shape)}
        return jnp.concatenate([prompts[prompt] for _, prompt in layout])

    return jax.tree.map(gather, text, empty)
