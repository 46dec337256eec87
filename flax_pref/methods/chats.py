"""CHATS: a positive and a negative module in one loss (arXiv:2502.12579)."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from flax_pref.config import check_positive, check_share
from flax_pref.diffusion.guidance import Rule, chats
from flax_pref.diffusion.sampler import Predict
from flax_pref.diffusion.schedule import NoiseSchedule
from flax_pref.methods.errors import (
    LogisticMethod,
    PairMethod,
    errors,
    logistic_loss,
    noisy_images,
    pair_metrics,
    reference_errors,
    text_of_images,
    without_prompts,
)
from flax_pref.shapes import Bool, Key, Scalar, Tree


@dataclasses.dataclass(frozen=True, kw_only=True)
class CHATS(LogisticMethod, PairMethod):
    """The positive module learns from winners and the negative one from losers, together.

        loss = mean over pairs of -log sigmoid(-beta ((L_w(pos) - L_w^ref) + (L_l(neg) - L_l^ref)))

    For some pairs the negative module, and the reference beside it, do not see the prompt.

    Example:
        >>> method = fp.CHATS(beta=1000.0)
        >>> method.modules
        ('pos', 'neg')
    """

    beta: float = 1000.0
    """Strength of the pull to the reference, without a factor 1/2, as in the authors' code."""
    dropout: float = 0.5
    """Share of pairs whose prompt the negative module does not see, 0 to 1. The authors' code draws once for all pairs
    of a device, here each pair draws for itself."""

    modules: ClassVar[tuple[str, ...]] = ("pos", "neg")

    def __post_init__(self):
        super().__post_init__()
        check_positive(self, "beta")
        check_share(self, "dropout")

    def loss(
        self,
        predict: Predict,
        batch: Mapping[str, Any],
        key: Key[jax.Array, ""],
        *,
        schedule: NoiseSchedule,
        empty: Tree = None,
    ) -> tuple[Scalar, dict[str, Scalar]]:
        """See `PairMethod`; `empty` is required, and the authors' code has zeros for it.

        The metrics are `loss`, `accuracy` (share of pairs that both together predict better than the reference),
        `winner` and `loser` (the positive module's error of winners and the negative one's of losers, each minus that
        of the reference).
        """
        noise_key, dropout_key = jax.random.split(key)
        noisy = noisy_images(batch, noise_key, schedule)
        dropped = jax.random.bernoulli(dropout_key, self.dropout, noisy.timesteps.shape)
        noisy = noisy._replace(text=drop_loser_prompts(batch, dropped, empty))
        winner, loser = errors(predict, self.modules, noisy) - reference_errors(predict, noisy)
        logits = -self.beta * (winner + loser)
        loss = logistic_loss(logits, self.poly_alpha)
        return loss, pair_metrics(loss, logits, winner, loser)

    def rule(self, w: float, guidance_scale: float) -> Rule:
        """CHATS; it has no w."""
        return chats(guidance_scale)


def drop_loser_prompts(batch: Mapping[str, Any], dropped: Bool[jax.Array, " images"], empty: Tree) -> Tree:
    """The text of winners and losers, `[B, 2, ...]` each, with the empty prompt for the losers of dropped pairs."""
    untold = without_prompts(batch, dropped, empty)
    winner, loser = text_of_images(batch, ("winner",)), text_of_images(untold, ("loser",))
    return jax.tree.map(lambda *rows: jnp.concatenate(rows, axis=1), winner, loser)
