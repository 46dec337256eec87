"""A look at a preference set before it is used: one page with random pairs, and with numbers on all of it."""

import base64
import bisect
import collections
import dataclasses
import io
import os
from collections.abc import Callable, Collection, Iterable, Mapping
from importlib import resources
from pathlib import Path
from typing import NamedTuple

import jinja2
import numpy as np
from PIL import Image
from tqdm import tqdm

from flax_pref.data.pairs import Drop, Judgement, PairReader
from flax_pref.data.selection import Selection
from flax_pref.files import replacing

THUMBNAIL = 320  # pixels of the longer side
BINS = 20  # at most, of a histogram, without the one for all that is longer
SIZES = 10  # that are listed one by one
QUANTILES = {"shortest": 0.0, "5 %": 0.05, "25 %": 0.25, "median": 0.5, "75 %": 0.75, "95 %": 0.95, "longest": 1.0}

Decode = Callable[[bytes], Image.Image | Drop]


def write_inspection(
    file: str | Path,
    reader: PairReader,
    selection: Selection,
    count: int,
    *,
    seed: int = 0,
    sample: int = 1000,
    title: str,
    decode: Decode,
) -> None:
    """Writes an HTML page that shows random pairs and what the set consists of; one file that needs no network.

    Args:
        file: to be written; it appears under its name only when it is complete.
        reader: of the set.
        selection: which of its K rows are used, and what became of the others.
        count: pairs to show; fewer if there are not as many whose images can be had.
        seed: of the draw.
        sample: pairs whose images are read for the statistics: `max(count, min(sample, K))` of them, K at most.
        title: of the page.
        decode: an encoded image to its pixels in RGB, or why it gives none.

    Raises:
        ValueError: `count` is less than 1, or a file of the set is damaged or has another schema; names it.
    """
    if count < 1:
        raise ValueError(f"pairs to inspect: {count} are asked for; expected 1 or more")
    size = min(max(count, sample), len(selection.rows))
    places = np.random.default_rng(seed).choice(len(selection.rows), size, replace=False) if size else []
    drawn = {int(selection.rows[place]): rank for rank, place in enumerate(places)}
    judgements, winner_first = _judgements(reader, selection, drawn)
    seen = _look(reader, judgements, drawn, count, decode)
    dropped, unreadable = _reasons(selection.drops, reader), _reasons(seen.drops, reader)
    page = _rendered(
        title=title,
        total=selection.total,
        used=len(selection.rows),
        ties=selection.ties,
        damaged=sum(reason.count for reason in dropped if reason.damaged),
        left_out=sum(reason.count for reason in dropped if not reason.damaged),
        dropped=dropped,
        listed_first=reader.winner_listed_first,
        winner_first=winner_first,
        captions=len(selection.captions),
        repeats=_repeats(selection),
        lengths=_caption_lengths(selection.captions),
        read=size,
        unreadable=unreadable,
        images=seen.sizes.total(),
        sizes=_sizes(seen.sizes),
        asked=count,
        seed=seed,
        cards=seen.cards,
        folder=_folder([place.file for place in (*seen.cards, *dropped, *unreadable)]),
    )
    with replacing(file) as unfinished:
        # Captions may hold half a character (a lone surrogate), which UTF-8 cannot; browsers show its number as U+FFFD.
        unfinished.write_bytes(page.encode(errors="xmlcharrefreplace"))


def _rendered(**facts: object) -> str:
    """The page with these facts in it."""
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"number": "{:,}".format, "percent": _percent}
    template = (resources.files("flax_pref.data") / "inspection.html.jinja").read_text(encoding="utf-8")
    return environment.from_string(template).render(facts)


def _judgements(reader: PairReader, selection: Selection, wanted: Collection[int]) -> tuple[dict[int, Judgement], int]:
    """The judgements of the wanted rows, ascending, and in how many of all used rows the winner is the first image."""
    judgements, winner_first = {}, 0
    if not len(selection.rows):
        return judgements, winner_first
    span = range(int(selection.rows[0]), int(selection.rows[-1]) + 1)
    used = np.zeros(len(span), bool)
    used[selection.rows - span.start] = True
    for row, said in zip(span, tqdm(reader.judgements(span), "reading judgements", len(span), unit="row"), strict=True):
        if used[row - span.start] and isinstance(said, Judgement):  # as all used rows are
            winner_first += said.winner == 0
            if row in wanted:
                judgements[row] = said
    return judgements, winner_first


class _Picture(NamedTuple):
    """An image of a card; width and height are those of the whole image, `uri` holds its thumbnail."""

    id: str
    model: str | None
    width: int
    height: int
    uri: str


class _Card(NamedTuple):
    """A pair as it is shown."""

    row: int
    file: str
    row_in_file: int
    caption: str
    winner: _Picture
    loser: _Picture
    confidence: float | None
    margin: float | None


class _Seen(NamedTuple):
    """What the images of the drawn rows are: pairs to show, by row, sizes of all, and rows whose images give none."""

    cards: list[_Card]
    sizes: collections.Counter[tuple[int, int]]
    drops: dict[int, Drop]


def _look(
    reader: PairReader, judgements: Mapping[int, Judgement], ranks: Mapping[int, int], count: int, decode: Decode
) -> _Seen:
    """Reads the drawn pairs one after the other and keeps thumbnails of the `count` of lowest rank that are whole."""
    cards, sizes, drops = [], collections.Counter(), {}
    read = tqdm(reader.images(list(judgements)), "reading images", len(judgements), unit="pair")
    for (row, said), encoded in zip(judgements.items(), read, strict=True):
        if isinstance(encoded, Drop):
            drops[row] = encoded
            continue
        decoded = [decode(data) for data in encoded]
        images = [image for image in decoded if not isinstance(image, Drop)]
        sizes.update(image.size for image in images)
        damage = next(((i, image) for i, image in enumerate(decoded) if isinstance(image, Drop)), None)
        if damage is not None:
            place, drop = damage
            drops[row] = drop._replace(detail=": ".join(filter(None, [f"image {said.ids[place]}", drop.detail])))
        elif len(cards) < count or ranks[row] < cards[-1][0]:
            bisect.insort(cards, (ranks[row], _card(row, said, images, reader)))
            del cards[count:]
    return _Seen(sorted(card for _, card in cards), sizes, drops)


def _card(row: int, said: Judgement, images: list[Image.Image], reader: PairReader) -> _Card:
    models = said.models or (None, None)
    winner, loser = (
        _Picture(said.ids[i], models[i], *images[i].size, _thumbnail(images[i])) for i in (said.winner, 1 - said.winner)
    )
    return _Card(row, *reader.where(row), said.caption, winner, loser, said.confidence, said.margin)


def _thumbnail(image: Image.Image) -> str:
    """A data URI of the image; small images stay as they are."""
    small, file = image.copy(), io.BytesIO()
    small.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    small.save(file, "WEBP", quality=85)
    return "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode()


@dataclasses.dataclass(frozen=True)
class _Reason:
    """Rows dropped for one reason, and the first of them as an example."""

    reason: str
    damaged: bool
    count: int
    file: str
    row_in_file: int
    detail: str


def _reasons(drops: Mapping[int, Drop], reader: PairReader) -> list[_Reason]:
    """The most frequent first."""
    counts, examples = collections.Counter(), {}
    for row, drop in drops.items():
        kind = drop.reason, drop.damaged
        counts[kind] += 1
        examples.setdefault(kind, (row, drop.detail))
    return [
        _Reason(
            reason, damaged, count, *reader.where(examples[reason, damaged][0]), detail=examples[reason, damaged][1]
        )
        for (reason, damaged), count in counts.most_common()
    ]


@dataclasses.dataclass(frozen=True)
class _Bar:
    """One of several numbers that are to be compared."""

    label: str
    count: int


def _sizes(sizes: collections.Counter[tuple[int, int]]) -> list[_Bar]:
    """The most frequent sizes of images, and all others together."""
    bars = [_Bar(f"{width} \N{MULTIPLICATION SIGN} {height}", count) for (width, height), count in sizes.most_common()]
    others = sum(bar.count for bar in bars[SIZES:])
    return bars[:SIZES] + ([_Bar(f"other sizes ({len(bars) - SIZES:,})", others)] if others else [])


class _Repeats(NamedTuple):
    """How many pairs a distinct caption has."""

    mean: float
    median: int
    most: int
    bars: list[_Bar]


def _repeats(selection: Selection) -> _Repeats | None:
    """None where there are no captions."""
    if not selection.captions:
        return None
    counts = np.bincount(selection.caption_of)
    doublings = np.bincount(np.frexp(counts - 1)[1])  # places: 1, 2, 3 to 4, 5 to 8, ...
    labels = ["1", "2", *(f"{2 ** (i - 1) + 1:,} to {2**i:,}" for i in range(2, len(doublings)))]
    bars = [_Bar(label, int(count)) for label, count in zip(labels, doublings, strict=False)]
    return _Repeats(float(counts.mean()), _quantile(counts, 0.5), int(counts.max()), bars)


class _Lengths(NamedTuple):
    """Lengths of the distinct captions in one unit.

    Attributes:
        unit: "characters" or "words".
        quantiles: name -> length.
        mean: length.
        width: of a bin.
        counts: captions of 0 .. width-1, width .. 2*width-1, ...
        longer: captions beyond the last bin.
    """

    unit: str
    quantiles: dict[str, int]
    mean: float
    width: int
    counts: list[int]
    longer: int


def _caption_lengths(captions: Iterable[str]) -> list[_Lengths]:
    """In characters and in words; empty where there are no captions."""
    lengths = np.array([[len(caption), len(caption.split())] for caption in captions], np.int64).reshape(-1, 2)
    if not len(lengths):
        return []
    return [_lengths(unit, lengths[:, i]) for i, unit in enumerate(("characters", "words"))]


def _lengths(unit: str, lengths: np.ndarray) -> _Lengths:
    # A few captions of thousands of characters must not squeeze all others into one bin.
    reach = _quantile(lengths, 0.99) + 1
    width = next(step * 10**power for power in range(20) for step in (1, 2, 5) if step * 10**power * BINS >= reach)
    bins = -(-reach // width)
    *counts, longer = np.bincount(np.minimum(lengths // width, bins), minlength=bins + 1).tolist()
    quantiles = {name: _quantile(lengths, q) for name, q in QUANTILES.items()}
    return _Lengths(unit, quantiles, float(lengths.mean()), width, counts, longer)


def _quantile(values: np.ndarray, q: float) -> int:
    """One of the values, never a number between two."""
    return int(np.quantile(values, q, method="inverted_cdf"))


def _folder(files: list[str]) -> str:
    """Where all files are, with the slash after it; "" where they have no folder in common."""
    shared = os.path.commonprefix(files)
    return shared[: shared.rfind("/") + 1]


def _percent(count: int, total: int) -> str:
    """A share; little is not written like nothing, nor almost all like all."""
    share = 100 * count / total if total else 0.0
    if 0 < share < 0.1:
        return "< 0.1\N{NO-BREAK SPACE}%"
    if 99.9 < share < 100:
        return "> 99.9\N{NO-BREAK SPACE}%"
    return f"{share:.1f}\N{NO-BREAK SPACE}%"
