"""Positive and negative modules (arXiv:2602.18799)."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import jax

from flax_pref.config import check_field
from flax_pref.diffusion.guidance import Rule, cpgd
from flax_pref.diffusion.sampler import Predict
from flax_pref.diffusion.schedule import NoiseSchedule
from flax_pref.methods.errors import PAIR, PairMethod, errors, noisy_images
from flax_pref.shapes import Key, Scalar, Tree

PAIR_OF_MODULES = ("pos", "neg")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PositiveNegative(PairMethod):
    """The positive module denoises winners, the negative one losers; no reference, no coupling.

    loss = mean L_w(pos) + mean L_l(neg)

    Example:
        >>> method = fp.PositiveNegative()
        >>> method.rule(w=2.0, guidance_scale=7.5).networks()
        ('base', 'pos', 'neg')
    """

    train: Literal["both", "pos", "neg"] = "both"
    """Both modules in one batched pass, or one alone."""

    reference: ClassVar[bool] = False
    independent: ClassVar[bool] = True

    def __post_init__(self):
        check_field(self, "train", self.train in ("both", *PAIR_OF_MODULES), "'both', 'pos' or 'neg'")

    @property
    def modules(self) -> tuple[str, ...]:  # pyright: ignore[reportIncompatibleVariableOverride] (a constant elsewhere)
        """Names of the modules that it trains."""
        return PAIR_OF_MODULES if self.train == "both" else (self.train,)

    def loss(
        self,
        predict: Predict,
        batch: Mapping[str, Any],
        key: Key[jax.Array, ""],
        *,
        schedule: NoiseSchedule,
        empty: Tree = None,
    ) -> tuple[Scalar, dict[str, Scalar]]:
        """See `PairMethod`; the metrics are `loss`, `winner` and `loser`, the error of each module that is trained."""
        images = {image: name for image, name in zip(PAIR, PAIR_OF_MODULES, strict=True) if name in self.modules}
        noisy = noisy_images(batch, key, schedule, tuple(images))
        error = errors(predict, tuple(images.values()), noisy).mean(axis=1)
        loss = error.sum()
        return loss, {"loss": loss, **dict(zip(images, error, strict=True))}

    def rule(self, w: float, guidance_scale: float) -> Rule:
        """cPGD, one-sided where one module is trained alone."""
        positive, negative = (name if name in self.modules else "base" for name in PAIR_OF_MODULES)
        return cpgd(w, guidance_scale, positive, negative)
