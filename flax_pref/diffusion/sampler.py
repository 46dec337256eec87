"""The sampler: a scan over the solver's steps, one batched prediction and one contraction in each.

Random numbers belong to images: every draw of an image comes from its own key, so an image does not depend on the size,
the order or the padding of its batch.
"""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flax_pref.diffusion.guidance import GuidanceStep, Table
from flax_pref.diffusion.shaping import SHAPINGS, Steady, norm_matched
from flax_pref.diffusion.solvers import Solver, log_prob, no_history, step
from flax_pref.shapes import (
    Array,
    Float,
    GivenLatents,
    GivenRowLatents,
    ImageKeys,
    Latents,
    RowLatents,
    Timesteps,
    Tree,
)

# (networks, latents, timesteps, conditioning of [B, R, ...]) -> noise_pred, where networks is a static tuple of R
# names, one for each row of an image. It may have methods beside: see `combine` and `_projected`.
Predict = Callable[[tuple[str, ...], GivenRowLatents, Timesteps, Tree], RowLatents]


def predict_rows(
    predict: Predict, networks: tuple[str, ...], latents: GivenRowLatents, timesteps: Timesteps, text: Tree
) -> RowLatents:
    """Calls a `Predict`: in this signature the shape of a prediction, which may be a user's own, is checked."""
    return predict(networks, latents, timesteps, text)


def sample(
    predict: Predict,
    table: Table,
    solver: Solver,
    keys: ImageKeys,
    text: Tree,
    empty: Tree,
    shape: tuple[int, int, int],
    *,
    blank: Tree = None,
    own_prompts: Mapping[str, tuple[Tree, Tree, Tree]] = MappingProxyType({}),
    each_step: Callable[[], None] = lambda: None,
) -> Latents:
    """Draws latents.

    A pure function: jit it over what varies. Of the arguments, predict and shape are static.

    Args:
        predict: the networks, see `Predict`. It is called once per step, with the rows that the step needs.
        table: the guidance rule for the solver's steps and for B images; see `guidance.tabulate`.
        solver: of S rows.
        keys: one per image; see `image_keys`.
        text: conditioning on the prompts. `[B, T, D]` hidden states, or any pytree of `[B, ...]` arrays that predict
            takes, such as hidden states, `text_embeds` and `time_ids` of SDXL.
        empty: the same for the rows "empty", with or without the leading axis: the encoded empty text "", zeros (SDXL),
            or negative prompts.
        shape: `(H, W, C)` of the latents of one image.
        blank: the same of the encoded empty text "", which rows "proxy" are made of (CHATS); None: it is `empty`.
        own_prompts: text, empty and blank of networks that see prompts through text encoders of their own, by the
            networks' names.
        each_step: called while JAX traces a step, e.g. to put a callback for a progress bar there.

    Returns:
        latents in float32, scaled as the network knows them.

    Raises:
        ValueError: the table or text do not fit.
    """

    def observe(*_):
        each_step()

    return _walk(observe, predict, table, solver, keys, text, empty, shape, blank=blank, own_prompts=own_prompts)[1]


def sample_trajectory(
    predict: Predict,
    table: Table,
    solver: Solver,
    keys: ImageKeys,
    text: Tree,
    empty: Tree,
    shape: tuple[int, int, int],
    *,
    blank: Tree = None,
    start: GivenLatents | None = None,
) -> tuple[Float[jax.Array, "visited images height width channels"], Float[jax.Array, "steps images"]]:
    """Draws the latents that `sample` draws, and returns all that lie on the way, with their log-probabilities.

    Online training needs these: the probability of each step, guidance included, under the networks that took it. It
    keeps S + 1 times the memory of the latents. The arguments are those of `sample`; the solver must be stochastic.

    Args:
        start: the initial noise, for trajectories that begin at one point; None: drawn from the keys.

    Returns:
        latents of S + 1 visits, from the initial noise to what `sample` returns, and log_probs of S steps, where row i
        is that of the step from latents i to i + 1; see `solvers.log_prob`. Both are float32.

    Raises:
        ValueError: the solver is not stochastic, or as for `sample`.
    """
    if not solver.stochastic:
        raise ValueError(
            "sample_trajectory: the solver draws no noise, so its steps have no probabilities; take ddim with eta > 0"
        )

    def observe(latents, noise_pred, row, next_latents):
        return next_latents, log_prob(next_latents, latents, noise_pred, row)

    start, _, (visited, log_probs) = _walk(
        observe, predict, table, solver, keys, text, empty, shape, blank=blank, start=start
    )
    return jnp.concatenate([start[None], visited]), log_probs


class State(NamedTuple):
    """What one step passes to the next.

    Attributes:
        latents: `[B, H, W, C]`.
        history: of the solver.
        contrast: the last prediction of the rule's contrasts `[J, K, B, H, W, C]`, and the one before it; empty where
            none is used again.
        memory: of the shaping, `[K, B, H, W, C]`; None where it has none.
    """

    latents: jax.Array
    history: tuple[jax.Array, ...]
    contrast: tuple[jax.Array, ...]
    memory: jax.Array | None


def _walk(
    observe: Callable[[Latents, Latents, Solver, Latents], Any],
    predict: Predict,
    table: Table,
    solver: Solver,
    keys: ImageKeys,
    text: Tree,
    empty: Tree,
    shape: tuple[int, int, int],
    *,
    blank: Tree = None,
    own_prompts: Mapping[str, tuple[Tree, Tree, Tree]] = MappingProxyType({}),
    start: GivenLatents | None = None,
) -> tuple[Latents, Latents, Any]:
    """The scan of `sample`: the first latents, the last ones, and stacked over the steps what observe returns.

    observe is called in each step as `observe(latents, noise_pred, row, next_latents)`; without a start, that is drawn.
    """
    num_images, num_steps = len(keys), len(solver.timesteps)
    if (table.w.shape[0], table.w.shape[-1]) != (num_steps, num_images):
        raise ValueError(
            f"sample: a table of {table.w.shape[0]} steps and {table.w.shape[-1]} images, but the solver has "
            f"{num_steps} steps and there are {num_images} keys"
        )
    first = solver.init_noise_sigma * draw_normal(keys, 0, shape) if start is None else jnp.asarray(start)
    prompts = _prompts(table, text, empty, empty if blank is None else blank, num_images)
    others = {network: _prompts(table, *own, num_images) for network, own in own_prompts.items()}
    rows = _projected(predict, table, [others.get(network, prompts)[prompt] for network, prompt in table.rows])
    conditioning = {
        plan.rows: jax.tree.map(lambda *parts: jnp.stack(parts, axis=1), *(rows[r] for r in plan.rows))
        for plan in set(table.plans)
    }
    reuses = any(plan.contrast == "reused" for plan in table.plans)
    measures = table.empty is not None

    def denoise(plan: GuidanceStep, state: State, inputs) -> tuple[State, Any]:
        i, row, (steady, contrast, w, extrapolation, unconditional) = inputs
        chosen = np.array(plan.rows)
        networks = tuple(table.rows[r][0] for r in chosen)
        model_input = jnp.stack([row.input_scale * state.latents] * len(chosen), axis=1)
        timesteps = jnp.full(num_images, row.timesteps)
        arguments = networks, model_input, timesteps, conditioning[plan.rows]

        # Contrasts that later steps use again, or whose length counts, are sums of their own.
        apart = plan.contrast == "new" and (reuses or measures)
        if apart:
            sums = jnp.concatenate([steady[None], contrast])
        else:
            sums = (steady + (w[:, None, None] * contrast).sum(axis=0) if plan.contrast == "new" else steady)[None]
        flat = sums.reshape(-1, *sums.shape[2:])
        if unconditional is not None:
            flat = jnp.concatenate([flat, unconditional[None]])
        combined = combine(predict, flat[:, chosen], *arguments)
        predictions, *newest = combined[: sums.shape[0] * sums.shape[1]].reshape(*sums.shape[:2], *first.shape)

        held, memory = state.contrast, state.memory
        if plan.contrast != "none" and (reuses or measures):
            if reuses:
                held = (jnp.stack(newest), held[0]) if apart else held
                now = held[0] + extrapolation.reshape(-1, *(1,) * 5) * (held[0] - held[1])
            else:
                now = jnp.stack(newest)
            if measures:
                added, memory = _shaped(table, row, now, w, predictions, combined[-1], state)
            else:
                added = (w[:, None, :, None, None, None] * now).sum(axis=0)
            predictions += added
        noise_pred = (
            predictions[0] if table.rescale is None else _rescale(predictions[0], predictions[1], table.rescale)
        )
        noise = draw_normal(keys, i, shape) if solver.stochastic else None
        latents, history = step(state.latents, noise_pred, row, noise, state.history)
        return State(latents, history, held, memory), observe(state.latents, noise_pred, row, latents)

    # K sums of predictions: the guided one and, where it is rescaled, the text prediction that it is made of.
    sums = [(table.steady, table.contrast)] + ([] if table.text is None else [table.text])
    steady, contrast = (jnp.stack(parts, axis=-3) for parts in zip(*sums, strict=True))
    unknown = jnp.zeros((*contrast.shape[1:3], *first.shape), first.dtype)
    remembers = table.shaping is not None and SHAPINGS[table.shaping].remembers
    memory = jnp.zeros_like(unknown[0]) if remembers else None
    state = State(first, no_history(solver, first), (unknown,) * (2 if reuses else 0), memory)
    strengths = (steady, contrast, table.w, table.extrapolation, table.empty)
    state, observed = _scan(denoise, state, (jnp.arange(1, num_steps + 1), solver, strengths), table.plans)
    return first, state.latents, observed


def _shaped(
    table: Table,
    row: Solver,
    contrasts: jax.Array,
    w: jax.Array,
    predictions: jax.Array,
    empty: Latents,
    state: State,
) -> tuple[jax.Array, jax.Array | None]:
    """What a rule with norm-matched strengths or a shaping adds to its K predictions, and the next memory.

    Args:
        table: the rule.
        row: of the solver.
        contrasts: `[J, K, B, H, W, C]`.
        w: `[J, B]`.
        predictions: of the steady part, `[K, B, H, W, C]`: guided and for the text.
        empty: of the steady part, for the empty prompt.
        state: before the step.
    """
    text = predictions[1]
    clean = row.clean_from_latents * state.latents + row.clean_from_pred * text
    added, memories = [], []
    for k, guided in enumerate(predictions):
        steady = Steady(empty, text, guided, clean, row.clean_from_pred)
        total = jnp.zeros_like(guided)
        for contrast, strength, norm in zip(contrasts[:, k], w, table.norms, strict=True):
            total += strength[:, None, None, None] * (norm_matched(contrast, steady) if norm else contrast)
        if table.shaping is not None:
            memory = None if state.memory is None else state.memory[k]
            total, memory = SHAPINGS[table.shaping].apply(total, steady, memory, jnp.asarray(table.shaping_numbers))
            memories.append(memory)
        added.append(total)
    return jnp.stack(added), None if state.memory is None else jnp.stack(memories)


def _scan(body: Callable, state: Any, inputs: Any, plans: Sequence[GuidanceStep]) -> tuple[Any, Any]:
    """`lax.scan` of `body(plan, state, inputs)` where each step has a plan, static: a scan for each run of plans."""

    def run(state, part, cycle, repeats):
        if len(cycle) == 1:
            return jax.lax.scan(lambda state, row: body(cycle[0], state, row), state, part)
        part = jax.tree.map(lambda x: x.reshape(repeats, len(cycle), *x.shape[1:]), part)
        state, outputs = jax.lax.scan(lambda state, rows: _scan(body, state, rows, cycle), state, part)
        return state, jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), outputs)

    stop, outputs = 0, []
    for cycle, repeats in segments(plans):
        start, stop = stop, stop + len(cycle) * repeats
        part = jax.tree.map(lambda x, run=slice(start, stop): x[run], inputs)
        state, output = run(state, part, cycle, repeats)
        outputs.append(output)
    return state, jax.tree.map(lambda *parts: jnp.concatenate(parts), *outputs)


def segments(plans: Sequence[Any]) -> list[tuple[tuple[Any, ...], int]]:
    """`(cycle, repeats)` that make up plans: AAAABCCBCC is A four times, then BCC twice."""
    found, start = [], 0
    while start < len(plans):
        rest = plans[start:]
        best = (rest[:1], 1)
        for length in range(1, len(rest) // 2 + 1):
            repeats = 1
            while rest[repeats * length : (repeats + 1) * length] == rest[:length]:
                repeats += 1
            if repeats > 1 and length * repeats > len(best[0]) * best[1]:
                best = (rest[:length], repeats)
        found.append((tuple(best[0]), best[1]))
        start += len(best[0]) * best[1]
    return found


def combine(
    predict: Predict,
    weights: Float[Array, "sums rows images"],
    networks: tuple[str, ...],
    latents: GivenRowLatents,
    timesteps: Timesteps,
    text: Tree,
) -> Float[jax.Array, "sums images height width channels"]:
    """Weighted sums of predictions in float32; other arguments than the weights: see `Predict`.

    A predict whose networks are on different devices has a method `combine` that does the same: they send the sums.
    """
    if (sums := getattr(predict, "combine", None)) is not None:
        return sums(weights, networks, latents, timesteps, text)
    predictions = predict_rows(predict, networks, latents, timesteps, text).astype(jnp.float32)
    # Sums of products, no matrix product: accelerators would round the factors of that, and guidance takes differences
    # of near equals.
    return (weights[..., None, None, None] * jnp.moveaxis(predictions, 1, 0)).sum(axis=1)


def _projected(predict: Predict, table: Table, rows: list[Tree]) -> list[Tree]:
    """Conditioning of a table's rows `[B, ...]` with what no step changes made of it already.

    A predict that makes something of the text alone has a method `project_text(networks, text)`, whose result it takes
    where it takes text. XLA for CPUs finds this out by itself; that for TPUs leaves all that is larger than the text
    where it was, in the loop.
    """
    if (project := getattr(predict, "project_text", None)) is None:
        return rows
    used = sorted({r for plan in table.plans for r in plan.rows})
    networks = tuple(table.rows[r][0] for r in used)
    text = project(networks, jax.tree.map(lambda *parts: jnp.stack(parts, axis=1), *(rows[r] for r in used)))
    found = {r: jax.tree.map(lambda x, i=i: x[:, i], text) for i, r in enumerate(used)}
    return [found.get(r, row) for r, row in enumerate(rows)]


def _rescale(noise_pred: Latents, text_pred: Latents, share: Float[Array, " images"]) -> Latents:
    """Guidance rescale (arXiv:2305.08891, equations 15 and 16)."""
    deviation, wanted = (x.std(axis=(1, 2, 3)) for x in (noise_pred, text_pred))
    return noise_pred * (share * (wanted / deviation) + 1 - share)[:, None, None, None]


def image_keys(seeds: int | Sequence[int] | np.ndarray, prompt_ids: Sequence[int] | np.ndarray) -> ImageKeys:
    """The keys of images, a function of each image's seed and prompt id only.

    Args:
        seeds: one for all images, or one for each.
        prompt_ids: one for each.

    Raises:
        ValueError: a seed or a prompt id outside 0 .. 2^32 - 1.
    """
    all_seeds, all_ids = np.broadcast_arrays(seeds, prompt_ids)
    for name, values in (("seed", all_seeds), ("prompt_id", all_ids)):
        # JAX would wrap larger numbers around, and two images would share their noise.
        outside = values[(values < 0) | (values >= 2**32)]
        if outside.size:
            raise ValueError(f"{name} must lie in 0 .. 2^32 - 1, got {outside[0]}")

    def key(seed, prompt_id):
        # Threefry whatever the default is: other generators draw differently under vmap, that is, by batch.
        return jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), prompt_id)

    return jax.vmap(key)(all_seeds.astype(np.uint32), all_ids.astype(np.uint32))


def draw_normal(keys: ImageKeys, i: jax.Array | int, shape: tuple[int, ...]) -> Float[jax.Array, "images ..."]:
    """Standard normal numbers for each image: its draw number i, 0 at the start and then one per step."""
    return jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, i), shape, jnp.float32))(keys)


def _prompts(table: Table, text: Tree, empty: Tree, blank: Tree, num_images: int) -> dict[str, Tree]:
    """The conditioning that each kind of prompt stands for, `[B, ...]` each."""
    for shape in (x.shape for x in jax.tree.leaves(text)):
        if shape[0] != num_images:
            raise ValueError(f"sample: {num_images} keys, but text has shape {list(shape)}")
    empty = jax.tree.map(lambda text, empty: jnp.broadcast_to(empty, text.shape), text, empty)
    prompts = {"text": text, "empty": empty}
    if any(prompt == "proxy" for _, prompt in table.rows):
        a = table.proxy
        # Of prompts of several chunks, a mask says which of them count.
        prompts["proxy"] = jax.tree.map(
            lambda text, blank: text if text.dtype == bool else (1 + a) * blank - a * text, text, blank
        )
    return prompts
