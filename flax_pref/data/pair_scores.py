"""Scores of the pairs of a prepared set: a parquet file for each reward, with a row for each pair.

`scores/NAME.parquet` has the columns `row`, `winner` and `loser`. Its schema metadata says what the scores are of: the
reward's identity, and the fingerprint of the set whose pairs were scored.
"""

import io
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from flax_pref.config import UserError
from flax_pref.data.prepared import PreparedSet
from flax_pref.files import replacing, writing
from flax_pref.programs import command

SCORES = "scores"
_METADATA = b"flax_pref"


class PairScores(NamedTuple):
    """Scores of both images of each of N pairs.

    Attributes:
        of: what the scores depend on besides images and captions: the reward's name, its weights' SHA-256, and so on.
        fingerprint: of the prepared set.
        rows: int64 `[N]`, rows of the pairs in the set that was encoded, ascending.
        values: float32 `[N, 2]`, of winner and loser.
        images: digests of the images that were read, see `encode.image_digest`; empty in a finished file.
    """

    of: Mapping[str, Any]
    fingerprint: str
    rows: np.ndarray
    values: np.ndarray
    images: Sequence[str] = ()


def scores_file(folder: Path, name: str) -> Path:
    """The file of a reward's scores in a prepared set."""
    return folder / SCORES / f"{name}.parquet"


def scored_rewards(folder: Path) -> list[str]:
    """Names of the rewards that a prepared set has scores of."""
    return sorted(file.stem for file in (folder / SCORES).glob("[!.]*.parquet"))


def write_scores(file: Path, scores: PairScores) -> None:
    """Writes a file of scores, which appears when it is complete.

    Raises:
        OSError: it cannot be written.
    """
    described = {"reward": dict(scores.of), "set": scores.fingerprint, "images": list(scores.images)}
    columns = {"row": scores.rows, "winner": scores.values[:, 0], "loser": scores.values[:, 1]}
    table = pa.table(columns).replace_schema_metadata({_METADATA: json.dumps(described).encode()})
    content = io.BytesIO()
    pq.write_table(table, content, write_page_checksum=True)
    with (
        writing(file, "which scores only what is missing"),
        replacing(file) as unfinished,
        unfinished.open("wb") as out,
    ):
        out.write(content.getvalue())
        out.flush()
        os.fsync(out.fileno())


def read_scores(file: Path) -> PairScores:
    """What `write_scores` has written.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged; names it.
    """
    content = file.read_bytes()
    try:
        # In this thread only, see `images.image_set.read_table`.
        parquet = pq.ParquetFile(pa.BufferReader(content), page_checksum_verification=True)
        table = parquet.read(use_threads=False)
        described = json.loads((table.schema.metadata or {})[_METADATA])
        columns = [table[name].cast(kind).to_numpy() for name, kind in _COLUMNS.items()]
        values = np.stack(columns[1:], axis=1)
        return PairScores(described["reward"], described["set"], columns[0], values, described["images"])
    except (pa.ArrowException, OSError, LookupError, ValueError, TypeError, AttributeError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(f"{file}: damaged ({reason}); remove it, and score the set again") from error


_COLUMNS = {"row": pa.int64(), "winner": pa.float32(), "loser": pa.float32()}


def scores_of_set(records: PreparedSet, name: str) -> np.ndarray:
    """Scores of the pairs of a prepared set by a reward, float32 `[N, 2]`, of winner and loser of pair 0 .. N-1.

    Raises:
        UserError: the reward has not scored this set.
        ValueError: the file is damaged.
    """
    there = scored_rewards(records.folder)
    again = f"{command('score')} {records.folder} --rewards {name}"
    if name not in there:
        known = f"there are scores of {', '.join(there)}" if there else "no reward has scored it"
        raise UserError(f"{records.folder}: has no scores of {name!r}; {known}: score it with {again}")
    file = scores_file(records.folder, name)
    scores = read_scores(file)
    if scores.fingerprint != records.fingerprint or len(scores.rows) != len(records):
        raise UserError(f"{file}: has the scores of another prepared set; score this one with {again}")
    return scores.values
