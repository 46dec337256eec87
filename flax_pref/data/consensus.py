"""Label quality: the pairs of a prepared set on whose labels rewards agree."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence

import numpy as np

from flax_pref.config import UserError
from flax_pref.data.buckets import Numbers, Size
from flax_pref.data.pair_scores import scores_of_set
from flax_pref.data.prepared import PreparedSet, Records


@dataclasses.dataclass(frozen=True, kw_only=True)
class Consensus:
    """Which pairs of a prepared set to train on, by how many rewards agree with their label.

    A reward agrees with a label if it scores the winner higher than the loser. Equal scores, and scores that are not a
    number, do not agree.

    Example:
        >>> records = fp.encode("pairs", "runs/pairs", model="demo")
        >>> scores = fp.score("runs/pairs", ["compressibility", "incompressibility"])
        >>> consensus = fp.Consensus(rewards=("compressibility", "incompressibility"), least=1)
        >>> len(consensus.select(records))  # one of the two agrees with every label
        4
    """

    rewards: tuple[str, ...] = ()
    """Names of rewards that have scored the prepared set; train on pairs on whose label they agree (default: none, use
    every pair)."""
    least: int | None = None
    """Number of rewards that must agree with a pair's label (default: all of them; with weigh, one)."""
    weigh: bool = False
    """Weigh a pair by the share of rewards that agree with its label: an epoch has it once for each of them."""

    def __post_init__(self):
        if not self.rewards and (self.weigh or self.least is not None):
            given = "weigh" if self.weigh else f"least={self.least}"
            raise ValueError(f"consensus: {given} without rewards; expected names of rewards that scored the set")
        if len(set(self.rewards)) < len(self.rewards):
            twice = next(name for name in self.rewards if self.rewards.count(name) > 1)
            raise ValueError(f"consensus: the reward {twice!r} is there twice; expected each once")
        if self.least is not None and not 1 <= self.least <= len(self.rewards):
            raise ValueError(
                f"consensus: least is {self.least}; expected 1 to {len(self.rewards)}, the number of its rewards"
            )

    @property
    def needed(self) -> int:
        """How many rewards must agree."""
        return self.least or (1 if self.weigh else len(self.rewards))

    def select(self, records: Records) -> "AgreedPairs":
        """The pairs to train on; reads the scores and no pair.

        Args:
            records: a prepared set that the rewards have scored.

        Raises:
            UserError: the set is in memory, a reward has not scored it, or no pair is kept.
            ValueError: there are no rewards, or a file of scores is damaged.
        """
        if not self.rewards:
            raise ValueError("consensus: no rewards; expected names of rewards that scored the set")
        if not isinstance(records, PreparedSet):
            raise UserError("consensus: needs a prepared set in a folder, which has scores; these pairs are in memory")
        scores = {name: scores_of_set(records, name) for name in self.rewards}
        counts = np.sum([agrees(values) for values in scores.values()], axis=0)
        kept = np.flatnonzero(counts >= self.needed)
        shares = "agreement of each reward: " + ", ".join(
            f"{name} {told_agreement(values)}" for name, values in scores.items()
        )
        number = f"{self.needed} of {len(self.rewards)}"
        if not len(kept):
            raise UserError(
                f"{records.folder}: consensus keeps no pair: {number} rewards agree with the label of none of "
                f"{len(records):,}; {shares}; choose a smaller consensus.least, or other rewards"
            )
        indices = np.repeat(kept, counts[kept]) if self.weigh else kept
        told = (
            f"consensus: {number if self.needed == len(self.rewards) else f'at least {number}'} rewards agree with the "
            f"label on {percent(len(kept), len(records))} of {len(records):,} pairs ({len(kept):,} kept"
            + (f", weighed: {len(indices):,} in an epoch" if self.weigh else "")
            + f"); {shares}"
        )
        return AgreedPairs(records, indices, told)


class AgreedPairs(Records):
    """The pairs that a consensus keeps, numbered again from 0; see `Records`.

    A pair that counts more than once is there as often.

    Attributes:
        records: the whole set.
        indices: int64 `[K]`, the number in `records` of each of these pairs, ascending.
        told: what is kept, and how often each reward agrees with the labels, in a line.
    """

    def __init__(self, records: Records, indices: np.ndarray, told: str):
        self.records, self.indices, self.told = records, indices, told
        self.shapes, self.image_size = records.shapes, records.image_size
        known = [records.fingerprint, hashlib.sha256(indices.astype("<i8").tobytes()).hexdigest()]
        self.fingerprint = hashlib.sha256(json.dumps(known).encode()).hexdigest()

    def __len__(self) -> int:
        """Number of pairs in an epoch."""
        return len(self.indices)

    def pair(self, index: int) -> dict[str, np.ndarray]:
        """See `Records`."""
        return self.records.pair(int(self.indices[index]))

    def conditioning(self, caption: int) -> dict[str, np.ndarray]:
        """See `Records`."""
        return self.records.conditioning(caption)

    def buckets(self) -> Mapping[Size, Numbers]:
        """See `Records`."""
        buckets = self.records.buckets()
        if len(buckets) == 1:
            return super().buckets()
        kept = {size: np.flatnonzero(np.isin(self.indices, np.asarray(pairs))) for size, pairs in buckets.items()}
        return {size: pairs for size, pairs in kept.items() if len(pairs)}


def agrees(values: np.ndarray) -> np.ndarray:
    """Whether a reward prefers the winner: `[N, 2] -> [N]`; equal scores and NaN do not agree."""
    return values[:, 0] > values[:, 1]


def told_agreement(values: np.ndarray) -> str:
    """How often a reward agrees with the labels, as `68.2 % (3 equal)`; values `[N, 2]`."""
    equal, unknown = int(np.sum(values[:, 0] == values[:, 1])), int(np.isnan(values).any(axis=1).sum())
    parts = [f"{count:,} {what}" for count, what in ((equal, "equal"), (unknown, "not a number")) if count]
    return percent(int(agrees(values).sum()), len(values)) + (f" ({', '.join(parts)})" if parts else "")


def told_counts(scores: Sequence[np.ndarray]) -> str:
    """On how many pairs how many rewards agree with the label, as `2 of 2 on 40.1 % (401), at least 1 on ...`."""
    counts, most = np.sum([agrees(values) for values in scores], axis=0), len(scores)
    kept = {least: int(np.sum(counts >= least)) for least in range(most, 0, -1)}
    return ", ".join(
        f"{f'{most} of {most}' if least == most else f'at least {least}'} on {percent(count, len(counts))} ({count:,})"
        for least, count in kept.items()
    )


def percent(count: int, total: int) -> str:
    """A share, as `21.3 %`."""
    return f"{100 * count / total:.1f} %"
