"""Preference pairs, whatever set they come from: one record for all, and an account of every row that gave none."""

import bisect
import hashlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol


class Judgement(NamedTuple):
    """What one row of a set says, without its images.

    Attributes:
        caption: what both images were drawn from.
        winner: 0 or 1: which of the row's two images is preferred.
        ids: of the two images in the order of the row; equal where two rows show the same image.
        confidence: of the judgement, 0 to 1; None where the set does not tell.
        margin: how much better the winner is, in the set's own unit; None where the set does not tell.
        models: that drew the two images; None where the set does not tell.
    """

    caption: str
    winner: int
    ids: tuple[str, str]
    confidence: float | None = None
    margin: float | None = None
    models: tuple[str, str] | None = None


class Tie(NamedTuple):
    """A row whose images were judged equal."""


class Drop(NamedTuple):
    """A row that gives no pair, and why.

    Attributes:
        reason: one of few, under which rows are counted, e.g. "caption is empty".
        detail: of this row, for who wants to look at it; "" if the reason says it all.
        damaged: the row is not what it should be; False: it never had a preference, or the config leaves it out.
    """

    reason: str
    detail: str = ""
    damaged: bool = True


class PreferencePair(NamedTuple):
    """A record as every set gives it: two images of one caption, still encoded (JPEG, PNG, WebP).

    Attributes:
        row: its number in the set.
        caption: what both images were drawn from.
        winner: the preferred image's bytes.
        loser: the other's.
        winner_id: see `Judgement.ids`.
        loser_id: likewise.
        winner_first: whether the winner was the first of the two. Sets that always list it first have this drawn by
            the row's number, so that place tells nothing.
        confidence: see `Judgement`.
        margin: see `Judgement`.
        names: what winner and loser are called where one of them is damaged.
    """

    row: int
    caption: str
    winner: bytes
    loser: bytes
    winner_id: str
    loser_id: str
    winner_first: bool
    confidence: float | None = None
    margin: float | None = None
    names: tuple[str, str] = ("winner", "loser")


class PairReader(Protocol):
    """Random access to the rows of a preference set, those that are ties or damaged included.

    What a row says and what its images are is read apart, for the first is a thousand times smaller. A damaged row
    becomes a `Drop`; a damaged file or a schema other than expected raises a ValueError that names the file.

    Attributes:
        winner_listed_first: the set lists the preferred image first in every row.
    """

    winner_listed_first: bool

    @property
    def image_names(self) -> tuple[str, str] | None:
        """The columns of the two images; None where they have none."""
        ...

    def __len__(self) -> int:
        """Number of rows."""
        ...

    def where(self, row: int) -> tuple[str, int]:
        """The file that a row is in, and its number in that file, from 0 up (lines of text: from 1 up)."""
        ...

    def judgements(self, rows: range) -> Iterator[Judgement | Tie | Drop]:
        """What each of consecutive rows says, in order."""
        ...

    def images(self, rows: Sequence[int]) -> Iterator[tuple[bytes, bytes] | Drop]:
        """The encoded images of rows, in the order of the row; `rows` ascend and none of them is a tie or damaged."""
        ...

    def image_files(self, rows: Sequence[int]) -> list[Any]:
        """The files that `images` reads, each once, as paths: `str` of one is its name."""
        ...


def pairs(reader: PairReader, rows: Sequence[int]) -> Iterator[PreferencePair | Drop]:
    """The records of rows, in order; a `Drop` where a row's images cannot be had.

    Args:
        reader: of the set.
        rows: ascending, all of them judgements.
    """
    if not len(rows):
        return
    span, wanted = range(int(rows[0]), int(rows[-1]) + 1), set(map(int, rows))
    said = (what for row, what in zip(span, reader.judgements(span), strict=True) if row in wanted)
    for row, judgement, images in zip(map(int, rows), said, reader.images(rows), strict=True):
        if isinstance(images, Drop):
            yield images
            continue
        assert isinstance(judgement, Judgement), "the rows that are asked for are judgements"
        winner, loser = judgement.winner, 1 - judgement.winner
        yield PreferencePair(
            row=row,
            caption=judgement.caption,
            winner=images[winner],
            loser=images[loser],
            winner_id=judgement.ids[winner],
            loser_id=judgement.ids[loser],
            winner_first=_drawn_place(row) if reader.winner_listed_first else winner == 0,
            confidence=judgement.confidence,
            margin=judgement.margin,
            names=_names(reader.image_names, winner),
        )


def _names(columns: tuple[str, str] | None, winner: int) -> tuple[str, str]:
    if columns is None:
        return "winner", "loser"
    return f"winner, column {columns[winner]}", f"loser, column {columns[1 - winner]}"


def _drawn_place(row: int) -> bool:
    """A coin of the row's own, the same in every run."""
    return bool(hashlib.sha256(b"place %d" % row).digest()[0] & 1)


def combinations(n: int) -> int:
    """How many pairs n ranked images make."""
    return n * (n - 1) // 2


def combination(n: int, number: int) -> tuple[int, int]:
    """Element `number` of `itertools.combinations(range(n), 2)`, without those before it."""

    def before(i: int) -> int:
        return i * (2 * n - i - 1) // 2

    i = bisect.bisect_right(range(n - 1), number, key=before) - 1
    return i, i + 1 + number - before(i)
