"""Writes a prepared set, shard by shard: killed at any moment, it resumes with the missing shards.

Every shard is made of rows of its own, so neither the number of processes nor what a kill left behind changes a byte of
it. `.parts` holds a record of each finished shard, written after the shard itself; at the end the records become
dropped.jsonl and the descriptions of the two data sets, of which that of the pairs appears last.

All shards are made of one source. What the rows say is read at every start and compared by SHA-256 with what it was.
Images are a thousand times larger: a shard's record has the SHA-256 of each pair that it was made of, and marks of the
files (`sources.mark`: size, times, inode; ETag). At a start, local files with other marks are read again and compared;
remote ones count as changed.
"""

import collections
import contextlib
import dataclasses
import hashlib
import json
import math
import shutil
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from tqdm import tqdm

from flax_pref.checkpoints.model_flags import ModelFlags
from flax_pref.config import UserError
from flax_pref.data.buckets import LETTERS
from flax_pref.data.encode import Encoding, PairEncoder, account, check_damage, digests, image_digest, numbered
from flax_pref.data.pairs import Drop, PairReader, pairs
from flax_pref.data.prepared import (
    BUCKETS,
    CAPTIONS,
    PAIRS,
    Shapes,
    bits,
    caption_features,
    describe,
    pair_features,
    shard_name,
    write_shard,
)
from flax_pref.data.selection import Choice, Selection
from flax_pref.data.sources import Source, is_remote, mark
from flax_pref.files import difference, read_json, remedy, replacing, write_json
from flax_pref.parallel.hosts import wait_for_others

SETTINGS, DROPPED, INSPECTION, PARTS = "settings.json", "dropped.jsonl", "inspection.html", ".parts"


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncodeConfig(ModelFlags):
    """Encodes a preference set for training."""

    output: Path
    """Folder of the prepared set, on a disk that all hosts see (a bucket: mounted)."""
    source: Source
    choice: Choice = dataclasses.field(default_factory=Choice)
    encoding: Encoding = dataclasses.field(default_factory=Encoding)

    max_drop_share: float = 0.01
    """Stop if a larger share of the rows is damaged; rows that `choice` leaves out do not count."""
    shard_size: int = 1024
    """Rows of the set in a shard, which is what a kill loses at most."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """What the networks compute in; auto: bfloat16 on TPUs and GPUs, float32 on CPUs."""
    mesh: str = "data=-1"
    """How to use a host's devices: data=-1 shares out the pairs of every batch."""
    hosts: str | None = None
    """None: joins the other processes of a TPU pod, Slurm or Open MPI, where there are any; or auto, none, or
    ADDRESS:PORT,PROCESSES,NUMBER."""
    inspect: int = 0
    """Encode nothing; write inspection.html with so many random pairs and what the set is like."""

    def __post_init__(self):
        if self.shard_size < 1 or not 0 <= self.max_drop_share <= 1 or self.inspect < 0:
            raise ValueError(
                f"shard_size={self.shard_size}, max_drop_share={self.max_drop_share}, inspect={self.inspect}: expected "
                "a positive size, a share between 0 and 1, and no negative number of pairs"
            )


class _Shard(NamedTuple):
    name: str  # PAIRS or CAPTIONS
    number: int


def _part_file(folder: Path, shard: _Shard) -> Path:
    """The record of a finished shard."""
    return folder / PARTS / f"{shard.name}-{shard.number:05d}.json"


def noted_images(folder: Path, number: int) -> list[str] | None:
    """Digests of the images that a shard of pairs was made of, see `image_digest`; None: no record of it is there."""
    with contextlib.suppress(FileNotFoundError, ValueError, KeyError):
        return read_json(_part_file(folder, _Shard(PAIRS, number)), expected="the record of a shard")["images"]
    return None


class Preparation:
    """One prepared set that is being written, by this process and perhaps by others.

    Attributes:
        finished: whether `begin` found the set complete, each shard as long as it was written.
    """

    def __init__(
        self,
        folder: Path,
        reader: PairReader,
        selection: Selection,
        settings: dict[str, Any],
        *,
        shard_size: int,
        max_drop_share: float,
        process_index: int = 0,
        process_count: int = 1,
    ):
        """Describes the work; `begin` looks at the folder.

        Args:
            folder: to be created or continued.
            reader: of the preference set.
            selection: of its rows.
            settings: what the records depend on, values that JSON can hold: `size` among them, and where there are
                several sizes `buckets` with all of them. A folder that was begun with others is refused.
            shard_size: rows of the set in a shard of pairs, captions in a shard of captions.
            max_drop_share: of the rows that may be damaged.
            process_index: of this process, which writes every process_count-th shard.
            process_count: how many processes write.
        """
        self.folder, self.reader, self.selection = folder, reader, selection
        described = {**settings, "shard_size": shard_size, "source_sha256": digests(selection)}
        self.settings = json.loads(json.dumps(described))
        self.counts = {
            PAIRS: math.ceil(selection.total / shard_size),
            CAPTIONS: math.ceil((1 + len(selection.captions)) / shard_size),
        }
        self._several = BUCKETS in settings
        self._shard_size, self._max_drop_share = shard_size, max_drop_share
        self._process, self._processes = process_index, process_count
        self.finished = False
        self._noted: dict[_Shard, dict[str, Any]] = {}  # of the finished shards that this process has looked at

    def begin(self) -> None:
        """Creates the folder, or continues it.

        Raises:
            UserError: it was begun with other settings or another source, or holds something else, or it cannot be
                written.
        """
        with self._told():
            self._begin()
        wait_for_others("the folder is there")

    def _begin(self) -> None:
        if self._process == 0:
            file = self.folder / SETTINGS
            if file.is_file():
                begun = read_json(file, expected="the settings of a prepared set")
                self._check_settings(begun)
            elif any(file.name not in (INSPECTION, DROPPED) for file in self.folder.glob("[!.]*")):
                raise UserError(f"{self.folder}: is not empty and holds no prepared set; choose another --output")
            else:
                with replacing(file) as unfinished:
                    write_json(unfinished, self.settings)
            self._remove_leftovers()
        self._check_source()
        self._check_damage(self._own())
        described = (self.folder / PAIRS / "dataset_info.json").is_file()
        kept = (self.folder / PARTS).is_dir()  # perhaps not where the set was copied to
        self.finished = described and not (kept and None in map(self._part, self._all()))

    def _check_settings(self, begun: dict[str, Any]) -> None:
        if different := difference(*({**all_, "source_sha256": None} for all_ in (begun, self.settings))):
            raise UserError(
                f"{self.folder}: was begun with {different}: choose another --output, or repeat the settings"
            )
        was, now = (all_.get("source_sha256", {}) for all_ in (begun, self.settings))
        if changed := [name for name in now if now[name] != was.get(name)]:
            raise UserError(
                f"{self.folder}: was begun when the source had other {', '.join(changed)}: choose another --output, or "
                "restore the source"
            )

    def _check_source(self) -> None:
        """Compares the source with what the finished shards of this process were made of."""
        for shard in self._own():
            noted = self._part(shard) if shard.name == PAIRS else None
            if noted is None:
                continue
            rows = self.selection.rows[self._used(shard)].tolist()
            files = self.reader.image_files(rows)
            marks = _marks(files)
            changed = [file for file, now, was in zip(files, marks, noted["marks"], strict=True) if now != was]
            if not changed:
                continue
            if is_remote(changed[0]):
                raise self._changed(str(changed[0]), "its size or modification mark is another one")
            read = tqdm(pairs(self.reader, rows), f"shard {shard.number}: images changed? reading", len(rows))
            for row, pair, was in zip(rows, read, noted["images"], strict=True):
                if image_digest(pair) != was:
                    file, number = self.reader.where(row)
                    raise self._changed(f"{file}, row {number}", "its images are other ones")
            self._note(shard, {**noted, "marks": marks})

    def _changed(self, what: str, how: str) -> UserError:
        return UserError(
            f"{self.folder}: the source has changed since it was begun ({what}: {how}): choose another --output, or "
            "restore the source"
        )

    def _remove_leftovers(self) -> None:
        """Removes what a kill has left behind, of files that were being written or removed."""
        patterns = (f".{SETTINGS}.*", f".{DROPPED}.*", "*/.*")
        for leftover in [path for pattern in patterns for path in self.folder.glob(pattern)]:
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()

    def pending(self) -> list[_Shard]:
        """Shards of this process that are not finished yet."""
        return [shard for shard in self._own() if self._part(shard) is None]

    def encode(self, encoder: PairEncoder) -> None:
        """Writes the shards of this process that are missing.

        Raises:
            UserError: too many rows are damaged, or the folder cannot be written.
        """
        pending = self.pending()
        count = sum(len(self.selection.rows[self._used(shard)]) for shard in pending if shard.name == PAIRS)
        with self._told(), tqdm(total=count, desc="encoding", unit="pair") as progress:
            for shard in pending:
                if shard.name == CAPTIONS:
                    self._write_captions(shard, encoder)
                else:
                    self._write_pairs(shard, encoder, progress)

    def finish(self, shapes: Shapes) -> dict[str, Any]:
        """Describes the set when all processes have come here; its metadata, in process 0.

        Args:
            shapes: of the encoder.

        Raises:
            UserError: too many rows are damaged, no pair is left, or the folder cannot be written.
        """
        wait_for_others("all shards are written")
        with self._told():
            metadata = self._describe(shapes) if self._process == 0 else {}
        wait_for_others("the set is described")
        return metadata

    # One shard

    def _write_captions(self, shard: _Shard, encoder: PairEncoder) -> None:
        span = self._span(shard)
        texts = [None, *self.selection.captions][span.start : span.stop]
        records = (
            {"caption": text or "", **{name: bits(array) for name, array in arrays.items()}}
            for text, arrays in zip(texts, encoder.captions(texts), strict=True)
        )
        count = write_shard(self._file(shard), caption_features(encoder.shapes), records)
        self._record(shard, count)

    def _write_pairs(self, shard: _Shard, encoder: PairEncoder, progress: tqdm) -> None:
        used = self._used(shard)
        rows = self.selection.rows[used].tolist()
        caption_of = dict(zip(rows, (1 + self.selection.caption_of[used]).tolist(), strict=True))
        letter_of = dict(zip(encoder.sizes, LETTERS, strict=False))
        drops, images, letters = {}, [], []
        marks = _marks(self.reader.image_files(rows))  # before the files are read

        def read():
            for row, pair in zip(rows, pairs(self.reader, rows), strict=True):
                images.append(image_digest(pair))
                yield row, pair

        def records():
            for row, result in encoder.pairs(read()):
                progress.update()
                if isinstance(result, Drop):
                    drops[row] = result
                    continue
                letters.append(letter_of[result.size])
                record = numbered(result, caption_of[row])
                known = {name: getattr(result.pair, name) for name in ("winner_id", "loser_id", "confidence", "margin")}
                moments = {name: bits(record[name]) for name in ("winner", "loser")}
                yield record | {name: math.nan if value is None else value for name, value in known.items()} | moments

        count = write_shard(self._file(shard), pair_features(encoder.shapes, several=self._several), records())
        sizes = {BUCKETS: "".join(letters)} if self._several else {}
        self._record(shard, count, drops=sorted(drops.items()), images=images, marks=marks, **sizes)
        if drops:
            self._check_damage(self._own())

    def _record(self, shard: _Shard, count: int, **of_pairs: Any) -> None:
        """Notes that a shard is finished: from now on it is not written again."""
        file = self._file(shard)
        with file.open("rb") as stream:
            sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
        self._note(shard, {"records": count, "bytes": file.stat().st_size, "sha256": sha256, **of_pairs})

    def _note(self, shard: _Shard, noted: dict[str, Any]) -> None:
        with replacing(self._part_file(shard)) as unfinished:
            write_json(unfinished, noted)

    def _part(self, shard: _Shard) -> dict[str, Any] | None:
        """What was noted of a finished shard; None: it is not finished."""
        if shard not in self._noted and self._part_file(shard).is_file():
            noted = {}
            with contextlib.suppress(ValueError):  # a damaged record is written again, with its shard
                noted = read_json(self._part_file(shard), expected="the record of a shard")
            file = self._file(shard)
            if file.is_file() and file.stat().st_size == noted.get("bytes"):
                self._noted[shard] = noted
        return self._noted.get(shard)

    def _part_file(self, shard: _Shard) -> Path:
        return _part_file(self.folder, shard)

    def _file(self, shard: _Shard) -> Path:
        return self.folder / shard.name / shard_name(shard.name, shard.number, self.counts[shard.name])

    def _span(self, shard: _Shard) -> range:
        return range(shard.number * self._shard_size, (shard.number + 1) * self._shard_size)

    def _used(self, shard: _Shard) -> slice:
        """Which of the selected rows are in a shard of pairs."""
        span = self._span(shard)
        return slice(*np.searchsorted(self.selection.rows, (span.start, span.stop)).tolist())

    # The whole

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        """Makes an error of the file system a line for the user."""
        try:
            yield
        except OSError as error:
            if error.errno is None:
                raise
            raise UserError(
                f"{error.filename or self.folder}: {error.strerror}: {remedy(error)}, then run the same command again, "
                "which writes only what is missing"
            ) from error

    def _shards(self, name: str) -> Iterator[_Shard]:
        return (_Shard(name, i) for i in range(self.counts[name]))

    def _own(self) -> list[_Shard]:
        return self._all()[self._process :: self._processes]

    def _all(self) -> list[_Shard]:
        return [*self._shards(CAPTIONS), *self._shards(PAIRS)]

    def _drops(self, shards: Iterable[_Shard]) -> dict[int, Drop]:
        """Rows dropped by the selection and in those of the shards that are finished, in ascending order."""
        parts = filter(None, (self._part(shard) for shard in shards if shard.name == PAIRS))
        found = {row: Drop(*drop) for part in parts for row, drop in part["drops"]}
        return dict(sorted((self.selection.drops | found).items()))

    def _check_damage(self, shards: Iterable[_Shard]) -> None:
        """Stops if too many rows of the finished shards are damaged."""
        drops = self._drops(shards)
        try:
            check_damage(drops, self.selection.total, self._max_drop_share)
        except UserError as error:
            self._list(drops)
            raise UserError(f"{error}; all are listed in {self.folder / DROPPED}") from error

    def _list(self, drops: dict[int, Drop]) -> None:
        with replacing(self.folder / DROPPED) as unfinished, unfinished.open("w", encoding="utf-8") as lines:
            for row, drop in drops.items():
                file, number = self.reader.where(row)
                what = {"file": file, "row": number, "reason": drop.reason, "detail": drop.detail}
                lines.write(json.dumps(what, ensure_ascii=False) + "\n")

    def _describe(self, shapes: Shapes) -> dict[str, Any]:
        """Lists what was dropped, accounts for every row, and describes both data sets."""
        parts: dict[str, list[dict[str, Any]]] = {}
        for name in self.counts:
            noted = [self._part(shard) for shard in self._shards(name)]
            parts[name] = [part for part in noted if part is not None]
            if len(parts[name]) < len(noted):
                raise UserError(f"{self.folder}: shards of {name} are missing; run the same command again")
        self._check_damage(self._shards(PAIRS))
        drops, ties, total = self._drops(self._shards(PAIRS)), self.selection.ties, self.selection.total
        lengths = {name: [part["records"] for part in noted] for name, noted in parts.items()}
        count = sum(lengths[PAIRS])
        self._list(drops)
        account(self.selection, count, drops)
        metadata = {
            "settings": self.settings,
            "counts": {
                **{"rows": total, "pairs": count, "ties": ties, "dropped": len(drops)},
                "captions": len(self.selection.captions),
            },
            "dropped": dict(collections.Counter(drop.reason for drop in drops.values()).most_common()),
            "dropped_rows": f"../{DROPPED}",
            "images_sha256": hashlib.sha256(
                "".join(image for part in parts[PAIRS] for image in part["images"]).encode()
            ).hexdigest(),
            "sha256": {
                self._file(shard).name: part["sha256"]
                for name, noted in parts.items()
                for shard, part in zip(self._shards(name), noted, strict=True)
            },
        }
        if self._several:
            metadata[BUCKETS] = {"sizes": self.settings[BUCKETS], "shards": [part[BUCKETS] for part in parts[PAIRS]]}
        describe(self.folder / CAPTIONS, caption_features(shapes), lengths[CAPTIONS], metadata)
        describe(self.folder / PAIRS, pair_features(shapes, several=self._several), lengths[PAIRS], metadata)
        return metadata


def _marks(files: Sequence[Any]) -> list[str]:
    """SHA-256 of the marks of files, the first 16 digits."""
    with ThreadPoolExecutor(16) as pool:
        return [hashlib.sha256(found.encode()).hexdigest()[:16] for found in pool.map(mark, files)]
