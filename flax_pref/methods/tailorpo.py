"""TailorPO: preferences between two steps from the same latents (arXiv:2502.01667)."""

import dataclasses
import math
from typing import ClassVar, Literal

import jax

from flax_pref.methods.online import RolloutInputs, StepPairs, draw_step_pairs


@dataclasses.dataclass(frozen=True, kw_only=True)
class TailorPO(StepPairs):
    """TailorPO and, with a rate, TailorPO-G (arXiv:2502.01667, equation 10); the loss is that of `StepPairs`.

    Example:
        >>> method = fp.TailorPO(rate=0.5)
        >>> method.needs_gradients  # TailorPO-G
        True
    """

    modules: ClassVar[tuple[str, ...]] = ("tailorpo",)

    follow: Literal["winner", "random", "loser"] = "winner"
    """The candidate that the trajectory continues from."""
    rate: float = 0.0
    """Of TailorPO-G: before the loss the winner moves by `-rate` times the gradient of `(r_high - r)^2`; 0: not."""
    rise: float = 0.1
    """Of TailorPO-G: r_high lies this far above the winner's reward r."""

    def __post_init__(self):
        super().__post_init__()
        self.expect("follow", self.follow in ("winner", "random", "loser"), "'winner', 'random' or 'loser'")
        self.expect("rate", 0 <= self.rate < math.inf, "a number from 0 up")
        self.expect("rise", 0 < self.rise < math.inf, "a number above 0")

    @property
    def needs_gradients(self) -> bool:
        """See `OnlineMethod`."""
        return self.rate > 0

    def draw(self, drawing: RolloutInputs) -> dict[str, jax.Array]:
        """See `OnlineMethod`."""
        # The gradient of (r_high - r)^2 is -2 rise times that of r.
        return draw_step_pairs(drawing, self, pool=2, follow=self.follow, ascent=2 * self.rise * self.rate)
