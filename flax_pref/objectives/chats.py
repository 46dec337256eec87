"""CHATS: a positive and a negative module in one loss (arXiv:2502.12579)."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from flax_pref.diffusion.schedule import NoiseSchedule
from flax_pref.objectives.denoising import errors, noisy_images, text_of_images
from flax_pref.objectives.dpo import logistic_loss, pair_metrics, reference_errors


def chats(
    predict: Callable,
    batch: Mapping[str, Any],
    key: jax.Array,
    *,
    schedule: NoiseSchedule,
    beta: float,
    empty: Any,
    dropout: float = 0.5,
    positive: str = "pos",
    negative: str = "neg",
    reference: str = "base",
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """`-log sigmoid(-beta ((L_w(pos) - L_w^ref) + (L_l(neg) - L_l^ref)))` per pair, then the mean over pairs.

    Winner and loser share timestep and noise. For some pairs the negative module, and the reference beside it, are not
    told the prompt.

    Args:
      predict: see `dpo.diffusion_dpo`.
      batch: see `dpo.diffusion_dpo`.
      key: draws timesteps, noise, and the pairs whose prompt is dropped.
      schedule: of the noise.
      beta: strength of the pull to the reference, without a factor 1/2, as in the authors' code (1000 there).
      empty: the text of the empty prompt, a pytree as in the batch but without its axis, see
        `conditioning.encode_empty`; the authors' code has zeros.
      dropout: share of the pairs; the authors' code draws once for all pairs of a device, here each draws for itself.
      positive: name of the module that learns from winners.
      negative: name of the module that learns from losers.
      reference: name of the network that they are compared with.

    Returns:
      loss, and the metrics `loss`, `accuracy` (share of pairs that both together predict better than the reference),
      `winner` and `loser` (the positive module's error of winners and the negative one's of losers, each minus that of
      the reference).

    Raises:
      ValueError: see `denoising.noisy_images`.
    """
    noise_key, dropout_key = jax.random.split(key)
    noisy = noisy_images(batch, noise_key, schedule)
    dropped = jax.random.bernoulli(dropout_key, dropout, noisy.timesteps.shape)
    noisy = noisy._replace(text=drop_loser_prompts(batch, dropped, empty))
    winner, loser = errors(predict, (positive, negative), noisy) - reference_errors(predict, reference, noisy)
    logits = -beta * (winner + loser)
    loss = logistic_loss(logits)
    return loss, pair_metrics(loss, logits, winner, loser)


def drop_loser_prompts(batch: Mapping[str, Any], dropped: jax.Array, empty: Any) -> Any:
    """The text of winners and losers, `[B, 2, ...]` each, with the empty prompt for losers of `dropped [B]` pairs."""

    def drop(x, of_empty):
        return jnp.where(dropped.reshape(-1, *(1,) * (x.ndim - 1)), jnp.asarray(of_empty, x.dtype), x)

    untold = {**batch, "text": jax.tree.map(drop, batch["text"], empty)}
    winner, loser = text_of_images(batch, ("winner",)), text_of_images(untold, ("loser",))
    return jax.tree.map(lambda *rows: jnp.concatenate(rows, axis=1), winner, loser)
