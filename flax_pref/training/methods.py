"""The methods that train on preference pairs, with their hyper-parameters: what a config names.

A method says which modules it trains, whether it compares them with the base, what it minimises, and how one samples
with what it has trained. The formulas are in `flax_pref.objectives`.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar, Literal

from flax_pref.diffusion import guidance
from flax_pref.diffusion.guidance import Rule
from flax_pref.diffusion.schedule import NoiseSchedule
from flax_pref.objectives.chats import chats
from flax_pref.objectives.denoising import positive_negative
from flax_pref.objectives.dpo import diffusion_dpo
from flax_pref.objectives.kto import diffusion_kto
from flax_pref.objectives.mapo import mapo
from flax_pref.objectives.npo import npo, positive_negative_dpo
from flax_pref.objectives.sdpo import diffusion_sdpo

PAIR_OF_MODULES = ("pos", "neg")


def check_positive(method: Any, *fields: str) -> None:
    """Raises a ValueError if one of a method's numbers is not above zero."""
    for field in fields:
        value = getattr(method, field)
        if not value > 0:
            raise ValueError(f"{type(method).__name__}: {field} is {value}; expected a positive number")


def check_share(method: Any, *fields: str) -> None:
    """Raises a ValueError if one of a method's numbers is not between zero and one."""
    for field in fields:
        value = getattr(method, field)
        if not 0 <= value <= 1:
            raise ValueError(f"{type(method).__name__}: {field} is {value}; expected 0 to 1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PositiveNegative:
    """Positive and negative modules (arXiv:2602.18799): winners through pos and losers through neg, no reference."""

    train: Literal["both", "pos", "neg"] = "both"
    """Both in one batched pass, or one alone."""

    reference: ClassVar[bool] = False
    independent: ClassVar[bool] = True
    """Whether the gradient of a module depends on no other: each is then clipped, and skips steps, by itself."""

    @property
    def modules(self) -> tuple[str, ...]:
        """What is trained."""
        return PAIR_OF_MODULES if self.train == "both" else (self.train,)

    def objective(self, schedule: NoiseSchedule, empty: Any) -> Callable:
        """See `objectives.denoising.positive_negative`."""
        positive, negative = (name if name in self.modules else None for name in PAIR_OF_MODULES)
        return partial(positive_negative, schedule=schedule, positive=positive, negative=negative)

    def rule(self, w: float, guidance_scale: float) -> Rule:
        """cPGD, one-sided where a module is trained alone."""
        positive, negative = (name if name in self.modules else "base" for name in PAIR_OF_MODULES)
        return guidance.cpgd(w, guidance_scale, positive, negative)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DiffusionDPO:
    """Diffusion-DPO (arXiv:2311.12908), PGD's module."""

    beta: float = 5000.0
    """Strength of the pull to the reference. The convention is that of the authors' code: the loss is
    -log sigmoid(-beta / 2 (...)) of errors that are means over a latent. Larger: closer to the reference."""

    modules: ClassVar[tuple[str, ...]] = ("dpo",)
    reference: ClassVar[bool] = True

    def __post_init__(self):
        check_positive(self, "beta")

    def objective(self, schedule: NoiseSchedule, empty: Any) -> Callable:
        """See `objectives.dpo.diffusion_dpo`."""
        return partial(diffusion_dpo, schedule=schedule, beta=self.beta, policy=self.modules[0])

    def rule(self, w: float, guidance_scale: float) -> Rule:
        """PGD; w = 1 is the module itself."""
        return guidance.pgd(w, guidance_scale, self.modules[0])


@dataclasses.dataclass(frozen=True, kw_only=True)
class SDPO(DiffusionDPO):
    """Diffusion-DPO with a safeguard of the winner (arXiv:2511.03317)."""

    mu: float
    """0 to 1, the share of the winner's descent that the loser's ascent must leave."""

    modules: ClassVar[tuple[str, ...]] = ("sdpo",)

    def __post_init__(self):
        super().__post_init__()
        check_share(self, "mu")

    def objective(self, schedule: NoiseSchedule, empty: Any) -> Callable:
        """See `objectives.sdpo.diffusion_sdpo`."""
        return partial(diffusion_sdpo, schedule=schedule, beta=self.beta, mu=self.mu, policy=self.modules[0])


@dataclasses.dataclass(frozen=True, kw_only=True)
class NPO:
    """NPO (arXiv:2505.11245): Diffusion-DPO with swapped labels, a negative module."""

    beta: float = 1000.0
    """As that of DiffusionDPO, with the factor 1/2. The authors' trainer for SDXL has it too (2000 there and here),
    that for SD1.5 lacks it (500 there is 1000 here)."""

    modules: ClassVar[tuple[str, ...]] = ("neg",)
    reference: ClassVar[bool] = True

    def __post_init__(self):
        check_positive(self, "beta")

    def objective(self, schedule: NoiseSchedule, empty: Any) -> Callable:
        """See `objectives.npo.npo`."""
        return partial(npo, schedule=schedule, beta=self.beta)

    def rule(self, w: float, guidance_scale: float) -> Rule:
        """NPO with the base as the positive network; it has no w."""
        return guidance.npo(guidance_scale, "base", "neg")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PositiveNegativeDPO:
    """Diffusion-DPO as the positive module and with swapped labels (NPO) as the negative one, in one run."""

    beta: float = 5000.0
    """Of both modules; as that of DiffusionDPO, with the factor 1/2."""

    modules: ClassVar[tuple[str, ...]] = PAIR_OF_MODULES
    reference: ClassVar[bool] = True
    independent: ClassVar[bool] = True

    def __post_init__(self):
        check_positive(self, "beta")

    def objective(self, schedule: NoiseSchedule, empty: Any) -> Callable:
        """See `objectives.npo.positive_negative_dpo`."""
        return partial(positive_negative_dpo, schedule=schedule, beta=self.beta)

    def rule(self, w: float, guidance_scale: float) -> Rule:
        """cPGD."""
        return guidance.cpgd(w, guidance_scale)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CHATS:
    """CHATS (arXiv:2502.12579): a positive and a negative module in one loss."""

    beta: float = 1000.0
    """Strength of the pull to the reference, without a factor 1/2, as in the authors' code."""
    dropout: float = 0.5
    """Share of pairs whose prompt the negative module is not told."""

    modules: ClassVar[tuple[str, ...]] = PAIR_OF_MODULES
    reference: ClassVar[bool] = True
    independent: ClassVar[bool] = False

    def __post_init__(self):
        check_positive(self, "beta")
        check_share(self, "dropout")

    def objective(self, schedule: NoiseSchedule, empty: Any) -> Callable:
        """See `objectives.chats.chats`."""
        return partial(chats, schedule=schedule, beta=self.beta, dropout=self.dropout, empty=empty)

    def rule(self, w: float, guidance_scale: float) -> Rule:
        """CHATS; it has no w."""
        return guidance.chats(guidance_scale)


@dataclasses.dataclass(frozen=True, kw_only=True)
class KTO:
    """Diffusion-KTO (arXiv:2404.04465)."""

    beta: float = 1000.0
    """Of the change of an image's error, without a factor 1/2, as in the authors' code."""

    modules: ClassVar[tuple[str, ...]] = ("kto",)
    reference: ClassVar[bool] = True

    def __post_init__(self):
        check_positive(self, "beta")

    def objective(self, schedule: NoiseSchedule, empty: Any) -> Callable:
        """See `objectives.kto.diffusion_kto`."""
        return partial(diffusion_kto, schedule=schedule, beta=self.beta)

    def rule(self, w: float, guidance_scale: float) -> Rule:
        """PGD; w = 1 is the module itself."""
        return guidance.pgd(w, guidance_scale, "kto")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MaPO:
    """MaPO (arXiv:2406.06424), without a reference."""

    beta: float = 0.1
    """Weight of the margin beside the winner's error, as in the authors' code."""
    snr: float = 0.5
    """h of the likelihood, snr_value in the authors' code."""

    modules: ClassVar[tuple[str, ...]] = ("mapo",)
    reference: ClassVar[bool] = False

    def __post_init__(self):
        check_positive(self, "beta", "snr")

    def objective(self, schedule: NoiseSchedule, empty: Any) -> Callable:
        """See `objectives.mapo.mapo`."""
        return partial(mapo, schedule=schedule, beta=self.beta, snr=self.snr)

    def rule(self, w: float, guidance_scale: float) -> Rule:
        """PGD; w = 1 is the module itself."""
        return guidance.pgd(w, guidance_scale, "mapo")


OfflineMethod = PositiveNegative | DiffusionDPO | SDPO | NPO | PositiveNegativeDPO | CHATS | KTO | MaPO
