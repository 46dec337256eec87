"""A plain folder of pairs: `pairs.jsonl`, with a prompt and the paths of two images in each line."""

from array import array
from collections.abc import Iterator, Sequence
from typing import Any

from etils import epath

from flax_pref.data import fields
from flax_pref.data.json_rows import JsonRows, check_columns, field, json_lines, named_files, read_images
from flax_pref.data.pairs import Drop, Judgement, Tie

NAME = "pairs.jsonl"


class PairFolder:
    """Random access to the pairs of a folder.

    A line is an object with `prompt` (or `caption`), `winner` and `loser`: texts, the latter two paths within the
    folder. It may have `winner_id` and `loser_id` (else these are the paths), `confidence` (0 to 1), `margin`,
    `models` (a list of two, the winner's first) and `tie`; where that is true, neither image is preferred.
    """

    winner_listed_first = True
    image_names = None

    def __init__(self, folder: epath.Path):
        """Opens `pairs.jsonl`.

        Raises:
            FileNotFoundError: there is none.
            ValueError: it is empty, or the first object in it lacks a field.
        """
        file = folder / NAME
        if not file.exists():
            raise FileNotFoundError(f"{file}: no such file; expected lines of JSON with prompt, winner and loser")
        places, self._lines = array("q"), array("q")
        for start, end, number in json_lines(file):
            places.extend((start, end))
            self._lines.append(number)
        self._folder, self._rows = folder, JsonRows(file, places)
        self._check_first_object()

    def __len__(self) -> int:
        return len(self._rows)

    def where(self, row: int) -> tuple[str, int]:
        """See `PairReader`."""
        return str(self._rows.file), self._lines[row]

    def judgements(self, rows: range) -> Iterator[Judgement | Tie | Drop]:
        """See `PairReader`."""
        for record in self._rows.objects(rows):
            yield record if isinstance(record, Drop) else fields.accepted(_judgement, record)

    def images(self, rows: Sequence[int]) -> Iterator[tuple[bytes, bytes] | Drop]:
        """See `PairReader`."""
        return (names if isinstance(names, Drop) else read_images(self._folder, names) for names in self._names(rows))

    def image_files(self, rows: Sequence[int]) -> list[epath.Path]:
        """See `PairReader`."""
        return named_files(self._folder, self._names(rows))

    def _names(self, rows: Sequence[int]) -> Iterator[tuple[str, str] | Drop]:
        for record in self._rows.objects(rows):
            yield record if isinstance(record, Drop) else fields.accepted(_paths, record)

    def _check_first_object(self) -> None:
        for row, record in enumerate(self._rows.objects(range(len(self)))):
            if not isinstance(record, Drop):
                caption = "caption" if "caption" in record else "prompt"
                where = f"{self._rows.file}, line {self._lines[row]}"
                check_columns(record, (caption, "winner", "loser"), where, "a folder of pairs")
                return


def _judgement(record: dict[str, Any]) -> Judgement | Tie:
    if fields.truth(record.get("tie"), "tie"):
        return Tie()
    paths = _paths(record)
    return Judgement(
        caption=fields.caption(record.get("prompt", record.get("caption"))),
        winner=0,
        ids=(
            fields.identifier(record.get("winner_id", paths[0]), "winner_id"),
            fields.identifier(record.get("loser_id", paths[1]), "loser_id"),
        ),
        confidence=fields.confidence(record.get("confidence")),
        margin=fields.number(record.get("margin"), "margin"),
        models=fields.models_of_list(record.get("models")),
    )


def _paths(record: dict[str, Any]) -> tuple[str, str]:
    return fields.two_paths(field(record, "winner"), field(record, "loser"), ("winner", "loser"))
