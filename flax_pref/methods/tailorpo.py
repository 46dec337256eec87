"""TailorPO: preferences between two steps from the same latents (arXiv:2502.01667)."""

import dataclasses
import math
from typing import ClassVar

import numpy as np

from flax_pref.methods.step_pairs import Ascent, CandidateChoice, Follow, StepPairs


@dataclasses.dataclass(frozen=True, kw_only=True)
class TailorPO(StepPairs):
    """TailorPO and, with a rate, TailorPO-G (arXiv:2502.01667, Algorithm 1); the loss is that of `StepPairs`.

    Steps t are counted as in the paper: from `steps`, the first, down to 1. At each trained step two candidates are
    drawn from the same latents, and the trajectory continues from the one whose promised image has the larger reward r.
    TailorPO-G moves the winner x^w first, and keeps the move where the reward rises by it:

        x^w - eta_t grad (r_high - r(x^w))^2 = x^w + 2 rise eta_t grad r(x^w), r_high = r(x^w) + rise

    Example:
        >>> method = fp.TailorPO(rate=(0.1, 0.2))
        >>> method.needs_gradients  # TailorPO-G
        True
        >>> method.trained  # t = 20, 16, 12, 8 and 4 of 20
        (0, 4, 8, 12, 16)
    """

    modules: ClassVar[tuple[str, ...]] = ("tailorpo",)

    train_steps: int | tuple[int, ...] = 5
    """Steps that are learned from: how many, evenly spaced from the first (20 steps and 5: t = 20, 16, 12, 8, 4), or a
    list of t. The others have one candidate, no reward and no gradient."""
    follow: Follow = "winner"
    """The candidate that the trajectory continues from."""
    rate: float | tuple[float, float] = 0.0
    """eta of TailorPO-G: one number, or those of the largest and the smallest t, with a cosine in between (paper: 0.1
    0.2); 0: TailorPO."""
    rise: float = 0.5
    """Of TailorPO-G: how far r_high lies above the winner's reward."""
    through_network: bool = False
    """Of TailorPO-G: the gradient passes through the network's prediction too, not only through decoder and reward.
    The paper does not say which; this costs one forward and one backward pass more."""

    def __post_init__(self):
        super().__post_init__()
        self.expect("follow", self.follow in ("winner", "random", "loser"), "'winner', 'random' or 'loser'")
        if isinstance(self.train_steps, int):
            self.expect("train_steps", 1 <= self.train_steps <= self.steps, f"1 to {self.steps}, the steps")
        else:
            inside = all(1 <= t <= self.steps for t in self.train_steps)
            distinct = len(set(self.train_steps)) == len(self.train_steps) > 0
            self.expect("train_steps", inside and distinct, f"different numbers from {self.steps} down to 1")
        ends = self._rates
        self.expect("rate", all(0 <= rate < math.inf for rate in ends), "one or two numbers from 0 up")
        self.expect("rise", 0 < self.rise < math.inf, "a number above 0")
        self.expect("through_network", not self.through_network or max(ends) > 0, "False without a rate")

    @property
    def _rates(self) -> tuple[float, float]:
        return self.rate if isinstance(self.rate, tuple) else (self.rate, self.rate)

    @property
    def trained(self) -> tuple[int, ...]:
        """See `OnlineMethod`."""
        if isinstance(self.train_steps, int):
            return tuple(i * self.steps // self.train_steps for i in range(self.train_steps))
        return tuple(sorted(self.steps - t for t in self.train_steps))

    @property
    def choice(self) -> CandidateChoice:
        """See `StepPairs`."""
        first, last = self._rates
        if max(first, last) == 0:
            return CandidateChoice(2, self.follow)
        t = np.arange(self.steps, 0, -1)
        rates = first + (last - first) * (1 + np.cos(np.pi * t / self.steps)) / 2
        return CandidateChoice(2, self.follow, Ascent(2 * self.rise * rates, self.through_network))
