"""SPO: preferences between the best and the worst of a pool of steps from the same latents (arXiv:2406.04314)."""

import dataclasses
from typing import ClassVar

from flax_pref.methods.step_pairs import CandidateChoice, StepPairs


@dataclasses.dataclass(frozen=True, kw_only=True)
class SPO(StepPairs):
    """SPO (arXiv:2406.04314), with a reward of the estimated image where its authors trained a reward of noisy ones.

    The loss of a pair is that of `StepPairs`; the pair is the best and the worst of a pool of candidates, and each
    trajectory continues from one of the pool at random.

    Example:
        >>> method = fp.SPO(pool=4)
        >>> method.modules
        ('spo',)
    """

    modules: ClassVar[tuple[str, ...]] = ("spo",)

    beta: float = 10.0
    """See `Preferences`."""
    pool: int = 4
    """Candidates for a step; the trajectory continues from any of them."""
    skip: int = 4
    """Steps at the beginning that have one candidate, and that nothing is learned from."""

    def __post_init__(self):
        self.expect("pool", self.pool >= 2, "2 or more")
        self.expect("skip", self.skip >= 0, "0 or more")
        self.expect("steps", self.steps > self.skip, f"{self.skip + 1} or more")
        super().__post_init__()

    @property
    def trained(self) -> tuple[int, ...]:
        """See `OnlineMethod`."""
        return tuple(range(self.skip, self.steps))

    @property
    def choice(self) -> CandidateChoice:
        """See `StepPairs`."""
        return CandidateChoice(self.pool, "random")
