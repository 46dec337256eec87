"""SPO: preferences between the best and the worst of a pool of steps from the same latents (arXiv:2406.04314)."""

import dataclasses
from typing import ClassVar

import jax

from flax_pref.methods.online import RolloutInputs, StepPairs, draw_step_pairs


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
    skip: int = 4  # pyright: ignore[reportIncompatibleVariableOverride] (a constant elsewhere)
    """Steps at the beginning that have one candidate, and that nothing is learned from."""

    def __post_init__(self):
        self.expect("pool", self.pool >= 2, "2 or more")
        self.expect("skip", self.skip >= 0, "0 or more")
        super().__post_init__()

    def draw(self, drawing: RolloutInputs) -> dict[str, jax.Array]:
        """See `OnlineMethod`."""
        return draw_step_pairs(drawing, self, pool=self.pool, follow="random", ascent=0.0)
