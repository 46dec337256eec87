"""Preference pairs: noised images, denoising errors, and what all methods that learn from pairs share.

L is the denoising error, the mean over a latent of the squared error of what the network predicts: the noise
(arXiv:2006.11239, equation 14) or the velocity. An error of the velocity is that of the noise divided by abar. So such
networks are trained, and the DPO example of diffusers takes it too; the authors' code of Diffusion-DPO knows the noise
alone. In errors of the noise, timesteps without signal would not count.

The two images of a pair share timestep and noise, and so do the modules and the reference, which is the base: with
adapters the backbone without them, no second copy of the weights.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from flax_pref.config import check_field
from flax_pref.diffusion.guidance import Rule, pgd
from flax_pref.diffusion.sampler import Predict, predict_rows
from flax_pref.diffusion.schedule import NoiseSchedule
from flax_pref.models.lora import BASE
from flax_pref.shapes import (
    Array,
    Bool,
    Float,
    GivenLatents,
    Int,
    Key,
    Latents,
    PerImage,
    PerRow,
    RowLatents,
    Scalar,
    Timesteps,
    Tree,
)

PAIR = ("winner", "loser")


# ----------------------------------------------------------------------------------------------------------------------
# Methods


@dataclasses.dataclass(frozen=True, kw_only=True)
class PairMethod:
    """A method that learns from preference pairs; its fields are its hyper-parameters."""

    modules: ClassVar[tuple[str, ...]]
    """Names of the modules that it trains."""
    reference: ClassVar[bool] = True
    """Whether it compares them with the base."""
    independent: ClassVar[bool] = False
    """Whether the gradient of a module depends on no other: each is then clipped, and skips steps, by itself."""

    def loss(
        self,
        predict: Predict,
        batch: Mapping[str, Any],
        key: Key[jax.Array, ""],
        *,
        schedule: NoiseSchedule,
        empty: Tree = None,
    ) -> tuple[Scalar, dict[str, Scalar]]:
        """The loss of a batch and its metrics, scalars.

        Args:
            predict: the networks, "base" and those of `modules`.
            batch: `winner` and `loser`, scaled latents `[B, H, W, C]`; `text`, a pytree of `[B, ...]` arrays that
                predict takes; where `text_embeds` is among them, as in SDXL, also `time_ids [B, 2, 6]`, the sizes of
                winner and loser.
            key: draws timesteps and noise.
            schedule: of the noise.
            empty: conditioning on no prompt, a pytree as `text` without its first axis; for methods that drop prompts.
        """
        raise NotImplementedError

    def rule(self, w: float, guidance_scale: float) -> Rule:
        """The rule that samples with the trained modules; by default PGD, where w = 1 is the module itself."""
        return pgd(w, guidance_scale, self.modules[0])


@dataclasses.dataclass(frozen=True, kw_only=True)
class LogisticMethod:
    """What methods share whose loss is `-log p` of each pair, p the sigmoid of its logit; see `preference_losses`."""

    poly_alpha: float = 0.0
    """Weight of Poly-DPO's term 1 - p (arXiv:2604.24953); 0: the plain loss. Its authors take 8 for Pick-a-Pic v2,
    whose pairs contradict each other, less than 0 for pairs that are trivially easy, about 0 for clean ones."""

    def __post_init__(self):
        check_field(self, "poly_alpha", math.isfinite(self.poly_alpha), "a finite number")


# ----------------------------------------------------------------------------------------------------------------------
# Errors


class NoisyImages(NamedTuple):
    """R rows for each entry of a batch, each an image of it, with the same noise at the same timestep.

    Attributes:
      latents: of each row.
      timesteps: of each image.
      text: what else the networks are told, a pytree of `[B, R, ...]` arrays.
      target: what the networks are to predict: the noise, one for all rows of an image, or the velocity of each row.
    """

    latents: RowLatents
    timesteps: Timesteps
    text: Tree
    target: Float[jax.Array, "images targets height width channels"]


def noisy_images(
    batch: Mapping[str, Any], key: Key[jax.Array, ""], schedule: NoiseSchedule, images: tuple[str, ...] = PAIR
) -> NoisyImages:
    """What networks predict from; the same key gives the same noise and timesteps, whatever the images.

    Args:
      batch: what `images` name, scaled latents `[B, H, W, C]`, and `text`, see `PairMethod.loss`.
      key: draws timesteps and noise.
      schedule: of the noise.
      images: names of the image of each of the R rows.
    """
    timesteps, noise = draw_noise(schedule, batch[images[0]], key)
    latents = jnp.stack([schedule.add_noise(batch[image], noise, timesteps) for image in images], axis=1)
    # All rows have one noise, but each its own velocity.
    targets = images if schedule.prediction_type != "epsilon" else images[:1]
    target = jnp.stack([schedule.target(batch[image], noise, timesteps) for image in targets], axis=1)
    return NoisyImages(latents, timesteps, text_of_images(batch, images), target)


def without_prompts(batch: Mapping[str, Any], dropped: Bool[jax.Array, " images"], empty: Tree) -> dict[str, Any]:
    """Replaces the text of some pairs of a batch by the empty prompt; `empty` as in `PairMethod.loss`."""

    def drop(x, of_empty):
        return jnp.where(dropped.reshape(-1, *(1,) * (x.ndim - 1)), jnp.asarray(of_empty, x.dtype), x)

    return {**batch, "text": jax.tree.map(drop, batch["text"], empty)}


def text_of_images(batch: Mapping[str, Any], images: tuple[str, ...]) -> Tree:
    """The text of a batch for R rows, `[B, R, ...]` each: the same in all, but in SDXL with the size of the image."""
    text = jax.tree.map(lambda x: jnp.stack([x] * len(images), axis=1), batch["text"])
    if isinstance(text, Mapping) and "text_embeds" in text and "time_ids" not in text:
        return {**text, "time_ids": jnp.stack([batch["time_ids"][:, PAIR.index(image)] for image in images], axis=1)}
    return text


def draw_noise(
    schedule: NoiseSchedule, latents: GivenLatents, key: Key[jax.Array, ""]
) -> tuple[Int[jax.Array, " images"], Latents]:
    """`t ~ U{0 .. T-1}` and `eps ~ N(0, 1)` for each image."""
    timestep_key, noise_key = jax.random.split(key)
    timesteps = jax.random.randint(timestep_key, latents.shape[:1], 0, schedule.num_train_timesteps)
    return timesteps, jax.random.normal(noise_key, latents.shape)


def errors(predict: Predict, networks: tuple[str, ...], noisy: NoisyImages) -> PerRow:
    """L of the network of each row, rows first so that they can be unpacked; one batched prediction."""
    noise_pred = predict_rows(predict, networks, noisy.latents, noisy.timesteps, noisy.text)
    return denoising_error(noise_pred, noisy.target).T


def denoising_error(
    pred: Float[Array, "*rows height width channels"], target: Float[Array, "... height width channels"]
) -> Float[jax.Array, "*rows"]:
    """L, the mean over H, W, C of the squares of `residual`; the target is broadcast."""
    return jnp.square(residual(pred, target)).mean(axis=(-3, -2, -1))


def residual(
    pred: Float[Array, "*rows height width channels"], target: Float[Array, "... height width channels"]
) -> Float[jax.Array, "*rows height width channels"]:
    """Prediction minus target in no less than float32; the gradient of L with respect to pred is a multiple of it."""
    return jnp.asarray(pred, jnp.promote_types(pred.dtype, jnp.float32)) - target


def reference_errors(predict: Predict, noisy: NoisyImages) -> PerRow:
    """L of the reference for every image, a constant.

    It is a prediction of its own: as rows of the policy's, the reference would take part in computing gradients.
    """
    return jax.lax.stop_gradient(errors(predict, (BASE,) * noisy.latents.shape[1], noisy))


def preference_losses(logits: PerImage, poly_alpha: float = 0.0) -> PerImage:
    """`-log p + poly_alpha (1 - p)` of each pair, p the sigmoid of its logit (Poly-DPO, arXiv:2604.24953).

    The gradient of DPO's loss counts `1 + poly_alpha p` times: above 0, a pair that is ranked right counts more than
    one that is not; below 0, less, and below -1 a pair with a high p is even pushed back.
    """
    losses = -jax.nn.log_sigmoid(logits)
    return losses + poly_alpha * jax.nn.sigmoid(-logits) if poly_alpha else losses


def logistic_loss(logits: PerImage, poly_alpha: float = 0.0) -> Scalar:
    """`preference_losses`, then the mean over pairs: in this order (Jensen's inequality)."""
    return preference_losses(logits, poly_alpha).mean()


def pair_metrics(loss: Scalar, logits: PerImage, winner: PerImage, loser: PerImage) -> dict[str, Scalar]:
    """The metrics that methods that learn from pairs share, scalars.

    Args:
      loss: of the batch.
      logits: above zero where a pair is ranked as it should be; those that are zero, as before any training,
        count one half in `accuracy`.
      winner: errors, minus those of the reference where there is one.
      loser: of losers likewise.
    """
    accuracy = jnp.mean((logits > 0) + 0.5 * (logits == 0))
    return {"loss": loss, "accuracy": accuracy, "winner": winner.mean(), "loser": loser.mean()}
