"""TailorPO: preferences between two steps from the same latents (arXiv:2502.01667), and what online objectives share.

Online objectives learn from steps that the policy itself has taken: `x_{t-1} = mu(x_t) + sigma_t z`, the stochastic
DDIM step of `diffusion.solvers`. `training.online` makes their batches.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from flax_pref.diffusion.solvers import Solver, step


def tailorpo(
    predict: Callable,
    batch: Mapping[str, Any],
    key: jax.Array,
    *,
    beta: float,
    guidance_scale: float = 1.0,
    margin: float = 0.0,
    ratio_clip: float | None = None,
    policy: str = "tailorpo",
    reference: str = "base",
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """`-log sigmoid(Delta)` per pair, then the mean over pairs that count.

    With `x^w` and `x^l`, the two candidates for x_{t-1}:

        Delta = beta (log p_theta(x^w | x_t) / p_ref(x^w | x_t) - log p_theta(x^l | x_t) / p_ref(x^l | x_t))
              = beta / (D sigma_t^2) <x^w - x^l, mu_theta(x_t) - mu_ref(x_t)>

    Log-densities are averaged over the D dimensions. Both steps begin at x_t, so that what is quadratic cancels and one
    prediction of the policy and one of the reference make the loss of a pair.

    Args:
      predict: `(networks, latents [B, R, H, W, C], timesteps [B], text) -> noise_pred [B, R, H, W, C]`, where
        networks names the network of each of the R rows.
      batch: `latents [B, H, W, C]`, x_t; `winner` and `loser`, x_{t-1} likewise; `row`, the solver's row of each pair;
        `text` and `empty`, conditioning on the prompt and on none, pytrees of `[B, ...]` arrays; `rewards [B, 2]`, of
        winner and loser; `reward [B]`, of the image that the trajectory ended in, for the metrics.
      key: not used, nothing is drawn.
      beta: strength of the pull to the reference, for log-densities that are averaged (0.1 in the settings of D3PO).
      guidance_scale: s of classifier-free guidance; policy and reference step as their guided predictions say.
      margin: a pair counts if its winner's reward is above its loser's by more.
      ratio_clip: None; or c, to limit each ratio `p_theta / p_ref` to 1 - c ... 1 + c as the released code of D3PO and
        SPO does (0.1 there). Beyond it the gradient is zero: with c = 0.1 soon that of most pairs.
      policy: name of the network that is trained.
      reference: name of the network that it is compared with.

    Returns:
      loss, and the metrics of `pair_loss`.
    """
    row = batch["row"]
    predicted, expected = guided_pair(predict, (policy, reference), batch, batch["latents"][:, None], guidance_scale)
    shift = pred_coef(row) * (predicted - expected)[:, 0]  # mu_theta(x_t) - mu_ref(x_t)
    if ratio_clip is None:
        difference = batch["winner"] - batch["loser"]
        logits = beta * mean_product(difference, shift) / safe_variance(row)
    else:
        middle = step(batch["latents"], expected[:, 0], row)[0] + shift / 2
        winner, loser = (
            clip_ratio(mean_product(batch[image] - middle, shift) / safe_variance(row), ratio_clip)
            for image in ("winner", "loser")
        )
        logits = beta * (winner - loser)
    return pair_loss(logits, batch, margin)


# ----------------------------------------------------------------------------------------------------------------------
# What online objectives have in common


def guided(
    predict: Callable, network: str, batch: Mapping[str, Any], latents: jax.Array, guidance_scale: float
) -> jax.Array:
    """`eps(x, empty) + s (eps(x, text) - eps(x, empty))` of K latents of each row of a batch, in one prediction.

    Args:
      predict: see `tailorpo`.
      network: its name.
      batch: has `row`, `text` and `empty`; see `tailorpo`.
      latents: `[B, K, H, W, C]`.
      guidance_scale: s; with 1 nothing is predicted without the prompt.

    Returns:
      `[B, K, H, W, C]`, in no less than float32.
    """
    count, unguided = latents.shape[1], guidance_scale == 1
    prompts = [batch["text"]] * count if unguided else [batch["empty"]] * count + [batch["text"]] * count
    text = jax.tree.map(lambda *rows: jnp.stack(rows, axis=1), *prompts)
    inputs = latents if unguided else jnp.concatenate([latents, latents], axis=1)
    noise_pred = predict((network,) * len(prompts), inputs, batch["row"].timesteps, text)
    noise_pred = noise_pred.astype(jnp.promote_types(noise_pred.dtype, jnp.float32))
    if unguided:
        return noise_pred
    without, told = noise_pred[:, :count], noise_pred[:, count:]
    return without + guidance_scale * (told - without)


def guided_pair(
    predict: Callable,
    networks: tuple[str, str],
    batch: Mapping[str, Any],
    latents: jax.Array,
    guidance_scale: float,
) -> tuple[jax.Array, jax.Array]:
    """`guided` of the policy, and of the reference as a constant, a prediction of its own."""
    policy, reference = networks
    predicted = guided(predict, policy, batch, latents, guidance_scale)
    return predicted, jax.lax.stop_gradient(guided(predict, reference, batch, latents, guidance_scale))


def pred_coef(row: Solver) -> jax.Array:
    """k_t of `mu = a x_t + k_t noise_pred`, `[B, 1, 1, 1]`."""
    return (row.estimate_coefs[:, 0] * row.estimate_from_pred)[:, None, None, None]


def mean_product(a: jax.Array, b: jax.Array) -> jax.Array:
    """`<a, b> / D`, `[...]` of `[..., H, W, C]`."""
    return (a * b).mean(axis=(-3, -2, -1))


def safe_variance(row: Solver) -> jax.Array:
    """sigma_t^2 `[B]`; one where a step draws no noise, for its pairs do not count, see `pair_loss`."""
    return jnp.where(row.fresh_noise_coef > 0, jnp.square(row.fresh_noise_coef), 1)


def clip_ratio(log_ratio: jax.Array, ratio_clip: float | None) -> jax.Array:
    """The logarithm of a ratio that is limited to `1 - ratio_clip ... 1 + ratio_clip`; as it is where that is None."""
    if ratio_clip is None:
        return log_ratio
    return jnp.clip(log_ratio, jnp.log1p(-ratio_clip), jnp.log1p(ratio_clip))


def pair_loss(logits: jax.Array, batch: Mapping[str, Any], margin: float) -> tuple[jax.Array, dict[str, jax.Array]]:
    """`-log sigmoid` of each pair's logit `[B]`, then the mean over the pairs that count; zero if none does.

    A pair counts if the gap of its rewards is above the margin, and if its step has drawn noise.

    Returns:
      loss, and the metrics `loss`; `accuracy`, the share of pairs that the policy ranks right against the reference,
      among those that count (one half where it is undecided); `used`, the share of pairs that count; `gap`, the mean
      of the gaps of all pairs; `reward`, the mean over the batch.
    """
    gap = batch["rewards"][:, 0] - batch["rewards"][:, 1]
    used = (gap > margin) & (batch["row"].fresh_noise_coef > 0)

    def mean_of_used(values):
        return jnp.where(used, values, 0).sum() / jnp.maximum(used.sum(), 1)

    loss = mean_of_used(-jax.nn.log_sigmoid(logits))
    return loss, {
        "loss": loss,
        "accuracy": mean_of_used((logits > 0) + 0.5 * (logits == 0)),
        "used": used.mean(),
        "gap": gap.mean(),
        "reward": batch["reward"].mean(),
    }
