"""Which rows of a preference set are used, decided before any image is read."""

import dataclasses
import hashlib
import json
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from flax_pref.config import check_least
from flax_pref.data.pairs import Drop, Judgement, PairReader, Tie


@dataclasses.dataclass(frozen=True, kw_only=True)
class Choice:
    """Which of the pairs to use."""

    min_confidence: float | None = None
    """Leave out judgements of less confidence, and of unknown."""
    models: tuple[str, ...] = ()
    """Use pairs of these models' images only; empty: of all."""
    unique_roles: bool = False
    """Let each image serve as winner or as loser only: as what it was more often. Images that won as often as they lost
    are not used."""
    limit: int | None = None
    """Use at most so many pairs, the first of the set (default: all); rows after them are not read."""

    def __post_init__(self):
        check_least(self, 1, "limit")


class Selection(NamedTuple):
    """What becomes of N rows.

    Attributes:
        rows: int64 `[K]`, those to be used, ascending.
        captions: distinct captions of these in the order of their first appearance.
        caption_of: int32 `[K]`, place of each row's caption in `captions`.
        ties: number of rows whose images were judged equal.
        drops: of all other rows, by row in ascending order.
        total: N, the rows up to the limit.
        said: SHA-256, as hexadecimal, of what the rows say that `choice` and `unique_roles` decide on: "winners", "ids"
            and "scores" (confidence and margin).
    """

    rows: np.ndarray
    captions: tuple[str, ...]
    caption_of: np.ndarray
    ties: int
    drops: dict[int, Drop]
    total: int
    said: dict[str, str]

    @property
    def cost_of_unique_roles(self) -> int:
        """How many pairs are not used because an image would serve in both roles."""
        return sum(drop in UNIQUE_ROLES for drop in self.drops.values())


def select(reader: PairReader, choice: Choice) -> Selection:
    """Reads what every row says, without images, and chooses.

    Raises:
        ValueError: a file is damaged or has another schema; names it.
    """
    total, ties, drops = len(reader), 0, {}
    said_of = {name: hashlib.sha256() for name in ("winners", "ids", "scores")}
    rows, captions, images, place = [], [], [], {}
    for row, said in enumerate(tqdm(reader.judgements(range(total)), "reading judgements", total, unit="row")):
        if len(rows) == choice.limit:
            total = row
            break
        if isinstance(said, Judgement):
            drop = _filtered(said, choice)
            if drop is None:
                said_of["winners"].update(b"%d" % said.winner)
                said_of["ids"].update(json.dumps(said.ids).encode())
                said_of["scores"].update(json.dumps((said.confidence, said.margin)).encode())
                rows.append(row)
                captions.append(place.setdefault(said.caption, len(place)))
                images.append([_number(said.ids[said.winner]), _number(said.ids[1 - said.winner])])
                continue
            said = drop
        if isinstance(said, Tie):
            ties += 1
        else:
            drops[row] = said
    rows, captions = np.array(rows, np.int64), np.array(captions, np.int32)
    if choice.unique_roles:
        why = _roles(np.array(images, np.uint64).reshape(-1, 2))
        drops |= {int(row): UNIQUE_ROLES[code - 1] for row, code in zip(rows, why, strict=True) if code}
        rows, captions = rows[why == 0], captions[why == 0]
    used, caption_of = np.unique(captions, return_inverse=True)  # ascending, which is the order of appearance
    texts = list(place)
    return Selection(
        *(rows, tuple(texts[i] for i in used), caption_of.astype(np.int32), ties, dict(sorted(drops.items())), total),
        {name: digest.hexdigest() for name, digest in said_of.items()},
    )


def _filtered(said: Judgement, choice: Choice) -> Drop | None:
    """Why the config leaves a judgement out; None if it does not."""
    if choice.min_confidence is not None:
        if said.confidence is None:
            return Drop("confidence is unknown", damaged=False)
        if said.confidence < choice.min_confidence:
            return Drop("confidence is too low", f"{said.confidence:g}", damaged=False)
    if choice.models:
        if said.models is None:
            return Drop("models are unknown", damaged=False)
        if others := [model for model in said.models if model not in choice.models]:
            return Drop("image of another model", ", ".join(others), damaged=False)
    return None


UNIQUE_ROLES = (
    Drop("an image won as often as it lost", "unique_roles", damaged=False),
    Drop("an image serves in its other role", "unique_roles", damaged=False),
)


def _roles(images: np.ndarray) -> np.ndarray:
    """0 for each pair whose images keep to one role, else the place in `UNIQUE_ROLES` plus 1.

    Args:
        images: `[K, 2]`, numbers of winner and loser.
    """
    _, numbers = np.unique(images, return_inverse=True)
    numbers = numbers.reshape(-1, 2)
    net_wins = np.bincount(numbers[:, 0], minlength=numbers.size) - np.bincount(numbers[:, 1], minlength=numbers.size)
    of_winner, of_loser = net_wins[numbers[:, 0]], net_wins[numbers[:, 1]]
    balanced = (of_winner == 0) | (of_loser == 0)
    return np.where(balanced, 1, np.where((of_winner > 0) & (of_loser < 0), 0, 2))


def _number(image_id: str) -> int:
    """64 bits instead of an id: among ten million images two are alike with a probability of 3e-6."""
    return int.from_bytes(hashlib.blake2b(image_id.encode(errors="surrogatepass"), digest_size=8).digest(), "little")
