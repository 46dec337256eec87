"""The Human Preference Datasets, HPDv2 (`ymhao/HPDv2`) and HPDv3 (`MizzenAI/HPDv3`): JSON lists and image files."""

from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from flax_pref.data import fields
from flax_pref.data.json_rows import JsonRows, check_columns, field, list_elements, named_files, read_images
from flax_pref.data.pairs import Drop, Judgement, Tie, combination, combinations

COMPARED = ("prompt", "file_path", "human_preference")  # columns of train.json of HPDv2
RANKED = ("prompt", "image_path", "rank")  # of its test.json
PREFERRED = ("prompt", "path1", "path2")  # of HPDv3, which has more

_LOOKED_FOR = 16  # images at least, when a set is opened


class HPDv2:
    """Random access to the comparisons of train.json or test.json.

    A record of train.json compares two images. One of test.json ranks several, so each two of them are a row here: the
    first with the second, the first with the third and so on. Equal ranks are a tie, and the margin is the difference
    of ranks.
    """

    winner_listed_first = False
    image_names = None

    def __init__(self, file: epath.Path):
        """Opens the set; its images are in the folder of the file, or in train/ or test/ there.

        Raises:
            ValueError: the file is not a JSON list of records with the columns of one of the two.
            FileNotFoundError: the images are not there.
        """
        places, counts, names = array("q"), array("q"), []
        for start, end, record in list_elements(file):
            if not places:
                self._ranked = isinstance(record, dict) and RANKED[-1] in record
                check_columns(record, RANKED if self._ranked else COMPARED, f"{file}, row 0", "HPDv2")
            places.extend((start, end))
            counts.append(_number_of_pairs(record) if self._ranked else 1)
            if len(names) < _LOOKED_FOR and isinstance(record, dict):
                listed = record.get(RANKED[1] if self._ranked else COMPARED[1])
                names += listed if isinstance(listed, list) else []
        self._records = JsonRows(file, places)
        self._starts = np.concatenate([[0], np.cumsum(counts)])
        # Both archives may be there, with images of the same names.
        folders = dict.fromkeys(("", file.stem, "train", "test"))
        self._folder = _folder_of_images(file, folders, names, f"tar xzf {file.stem}.tar.gz")

    def __len__(self) -> int:
        return int(self._starts[-1])

    def where(self, row: int) -> tuple[str, int]:
        """See `PairReader`; rows of one prompt of test.json are in the same place."""
        return str(self._records.file), self._record(row)

    def judgements(self, rows: range) -> Iterator[Judgement | Tie | Drop]:
        """See `PairReader`."""
        for compared in self._compared(rows):
            yield compared if isinstance(compared, Drop) else fields.accepted(compared.judgement)

    def images(self, rows: Sequence[int]) -> Iterator[tuple[bytes, bytes] | Drop]:
        """See `PairReader`."""
        for compared in self._compared(rows):
            yield compared if isinstance(compared, Drop) else read_images(self._folder, compared.names)

    def image_files(self, rows: Sequence[int]) -> list[epath.Path]:
        """See `PairReader`."""
        all_compared = self._compared(rows)
        return named_files(self._folder, (what if isinstance(what, Drop) else what.names for what in all_compared))

    def _record(self, row: int) -> int:
        return int(np.searchsorted(self._starts, row, "right")) - 1

    def _compared(self, rows: Sequence[int]) -> Iterator["_Compared | Drop"]:
        read = _two_of_ranked if self._ranked else _two
        for row, record in zip(rows, self._records.objects(map(self._record, rows)), strict=True):
            if not isinstance(record, Drop):
                record = fields.accepted(read, record, int(row - self._starts[self._record(row)]))
            yield record


class HPDv3:
    """Random access to the pairs of HPDv3, whose first image is always the preferred one.

    The margin is what of the votes of `choice_dist` is left when those for the loser are taken off, -1 to 1.
    """

    winner_listed_first = True
    image_names = None

    def __init__(self, file: epath.Path):
        """Opens the set; its images are in the folder of the file.

        Raises:
            ValueError: the file is not a JSON list of records with the columns of HPDv3.
            FileNotFoundError: the images are not there.
        """
        places, names = array("q"), []
        for start, end, record in list_elements(file):
            if not places:
                check_columns(record, PREFERRED, f"{file}, row 0", "HPDv3")
            places.extend((start, end))
            if len(names) < _LOOKED_FOR and isinstance(record, dict):
                names += [record.get("path1"), record.get("path2")]
        self._records = JsonRows(file, places)
        self._folder = _folder_of_images(file, ("", "images"), names, "cat images.tar.gz.* | tar xz")

    def __len__(self) -> int:
        return len(self._records)

    def where(self, row: int) -> tuple[str, int]:
        """See `PairReader`."""
        return str(self._records.file), row

    def judgements(self, rows: range) -> Iterator[Judgement | Tie | Drop]:
        """See `PairReader`."""
        for record in self._records.objects(rows):
            yield record if isinstance(record, Drop) else fields.accepted(_first_preferred, record)

    def images(self, rows: Sequence[int]) -> Iterator[tuple[bytes, bytes] | Drop]:
        """See `PairReader`."""
        return (names if isinstance(names, Drop) else read_images(self._folder, names) for names in self._names(rows))

    def image_files(self, rows: Sequence[int]) -> list[epath.Path]:
        """See `PairReader`."""
        return named_files(self._folder, self._names(rows))

    def _names(self, rows: Sequence[int]) -> Iterator[tuple[str, str] | Drop]:
        for record in self._records.objects(rows):
            yield record if isinstance(record, Drop) else fields.accepted(_paths, record)


class _Compared(NamedTuple):
    """Two images of a record of HPDv2."""

    prompt: Any
    names: tuple[str, str]
    winner: int | Tie
    margin: float | None

    def judgement(self) -> Judgement | Tie:
        if isinstance(self.winner, Tie):
            return self.winner
        return Judgement(fields.caption(self.prompt), self.winner, self.names, margin=self.margin)


def _two(record: dict[str, Any], _: int) -> _Compared:
    prompt, paths, labels = (field(record, name) for name in COMPARED)
    if not isinstance(paths, list) or len(paths) != 2:
        raise fields.Rejected("paths are not two", fields.quote(paths))
    names = fields.two_paths(paths[0], paths[1], ("file_path[0]", "file_path[1]"))
    return _Compared(prompt, names, fields.preferred(labels, ties=(0, 0.5, 1)), None)


def _two_of_ranked(record: dict[str, Any], number: int) -> _Compared:
    prompt, paths, ranks = (field(record, name) for name in RANKED)
    if not _are_ranked(record):
        raise fields.Rejected("ranks mean nothing", f"{fields.quote(ranks)} of {fields.quote(paths)}")
    i, j = combination(len(ranks), number)
    names = fields.two_paths(paths[i], paths[j], (f"image_path[{i}]", f"image_path[{j}]"))
    if None in (ranks[i], ranks[j]):
        raise fields.Rejected("ranks mean nothing", fields.quote(ranks))
    first, second = (fields.finite(ranks[place], "rank") for place in (i, j))
    margin = abs(first - second)
    return _Compared(prompt, names, Tie() if not margin else int(ranks[j] < ranks[i]), margin)


def _are_ranked(record: Any) -> bool:
    paths, ranks = (record.get(name) if isinstance(record, dict) else None for name in RANKED[1:])
    return isinstance(paths, list) and isinstance(ranks, list) and len(paths) == len(ranks) >= 2


def _number_of_pairs(record: Any) -> int:
    """Rows that a record of test.json is; one where it is damaged, to be dropped."""
    count = len(record["rank"]) if _are_ranked(record) else 2
    return combinations(count)


def _first_preferred(record: dict[str, Any]) -> Judgement:
    return Judgement(
        caption=fields.caption(field(record, "prompt")),
        winner=0,
        ids=_paths(record),
        confidence=fields.confidence(record.get("confidence")),
        margin=_margin(record.get("choice_dist")),
        models=fields.two_models(record.get("model1"), record.get("model2")),
    )


def _paths(record: dict[str, Any]) -> tuple[str, str]:
    return fields.two_paths(field(record, "path1"), field(record, "path2"), ("path1", "path2"))


def _margin(votes: Any) -> float | None:
    if not isinstance(votes, list) or len(votes) != 2 or None in votes:
        return None
    first, second = (fields.finite(vote, "choice_dist") for vote in votes)
    return (first - second) / (first + second) if first + second > 0 else None


def _folder_of_images(file: epath.Path, folders: Iterable[str], names: Sequence[Any], command: str) -> epath.Path:
    """Where images are found by the names that the first records give them.

    Raises:
        FileNotFoundError: in none of the folders.
    """
    names = [name for name in names if not isinstance(fields.accepted(fields.relative_path, name, ""), Drop)]
    looked_in = [file.parent / folder for folder in folders]
    for folder in looked_in:
        if any((folder / name).exists() for name in names):
            return folder
    raise FileNotFoundError(
        f"{file}: its first images, as {names[0] if names else 'named there'}, are not in "
        f"{' or '.join(map(str, looked_in))}; extract the archive that was published with it there: {command}"
    )
