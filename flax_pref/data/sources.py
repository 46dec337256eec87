"""Where a preference set lies, and the reader that its layout needs."""

import dataclasses
import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

from etils import epath
from fsspec.core import url_to_fs
from huggingface_hub import HfFileSystem, snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

from flax_pref.checkpoints.hub import HUB_ID
from flax_pref.data.column_set import ColumnSet
from flax_pref.data.columns import Columns
from flax_pref.data.dataset_rows import load
from flax_pref.data.hpd import HPDv2, HPDv3
from flax_pref.data.hub_files import HubFile
from flax_pref.data.pair_folder import NAME, PairFolder
from flax_pref.data.pairs import PairReader
from flax_pref.data.pick_a_pic import PickAPic
from flax_pref.data.webdataset import Tars
from flax_pref.files import files_of_kind

Layout = Literal["pick_a_pic", "hpdv2", "hpdv3", "folder", "webdataset", "datasets"]

_SPLIT = re.compile(r"((?:train|validation|test)(?:_unique)?)-")  # as train-00000-of-00645-b66ac786bf6fb553.parquet
_TOTAL = re.compile(r"-of-(\d+)")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """A preference set."""

    layout: Layout
    """How it is stored: pick_a_pic: parquet; hpdv2, hpdv3: a JSON list beside the images; folder: pairs.jsonl and the
    images that it names; webdataset: tar files; datasets: anything that the library `datasets` loads, or wrote with
    save_to_disk, with its columns named in `columns`."""
    path: str
    """File or folder, local or gs://... (datasets: local); for pick_a_pic and datasets also the id of a dataset on the
    Hub, as yuvalkirstain/pickapic_v2."""
    split: str = "train"
    """Which part of it, where its files are named by parts (pick_a_pic, hpdv2, hpdv3) or it has splits (datasets)."""
    name: str | None = None
    """Configuration of the set, where it has several (datasets)."""
    revision: str | None = None
    """Commit, branch or tag of the Hub repository (datasets; default: main)."""
    files: tuple[str, ...] = ()
    """Patterns of the files of the split, relative to path (datasets; default: those that `datasets` finds)."""
    stream: bool = False
    """Read the files of a Hub repository where they are, and download none (datasets)."""
    columns: Columns = dataclasses.field(default_factory=Columns)
    """Columns of the set (datasets)."""

    def __post_init__(self):
        if self.layout == "datasets":
            if not self.columns.named:
                raise ValueError(
                    "source: layout datasets needs the columns of the images: name columns.winner and columns.loser, "
                    "or columns.images with columns.label or columns.scores"
                )
        elif set_ := [name for name in _OF_DATASETS if getattr(self, name) != _OF_DATASETS[name]]:
            raise ValueError(f"source: {set_[0]} is a setting of layout datasets, not of {self.layout}; leave it out")

    def settings(self) -> dict[str, Any]:
        """The fields that say something about this layout, as values that JSON can hold."""
        return {
            name: value
            for name, value in dataclasses.asdict(self).items()
            if self.layout == "datasets" or name not in _OF_DATASETS
        }

    @classmethod
    def from_settings(cls, settings: dict[str, Any]) -> "Source":
        """The source that `settings`, perhaps read from JSON, tell of.

        Raises:
            TypeError: they are of something else.
        """
        columns: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in settings.get("columns", {}).items()
        }
        files = tuple(settings.get("files", ()))
        return cls(**{**settings, "files": files, "columns": Columns(**columns)})


_OF_DATASETS = {"name": None, "revision": None, "files": (), "stream": False, "columns": Columns()}


File = TypeVar("File", epath.Path, Path, HubFile)

# What file systems of fsspec say of a file that is another one after it was written again.
_MARKS = (
    "size",
    "etag",
    "ETag",
    "generation",
    "updated",
    "LastModified",
    "last_modified",
    "mtime",
    "created",
    "blob_id",
    "lfs",
)


def is_remote(file: object) -> bool:
    """Whether a file lies in a bucket or on the Hub."""
    return "://" in str(file)


def mark(file: epath.Path | Path | HubFile) -> str:
    """Tells a file from what was or will be in its place, without reading it.

    Locally these are size, times of the last change of content and of entry, and inode; elsewhere size and ETag or
    whatever else the store changes when the file is written again. "missing" if there is no such file, or it cannot be
    looked at.
    """
    try:
        if not is_remote(file):
            found = os.stat(str(file))
            return f"{found.st_size} {found.st_mtime_ns} {found.st_ctime_ns} {found.st_ino}"
    except OSError:
        return "missing"
    try:
        filesystem, path = file[:2] if isinstance(file, HubFile) else url_to_fs(os.fspath(file))
        told = filesystem.info(path)
    except FileNotFoundError:
        return "missing"
    return json.dumps({name: str(told[name]) for name in _MARKS if told.get(name) is not None})


def open_source(source: Source) -> PairReader:
    """The reader of a set.

    Raises:
        FileNotFoundError: there is no such set, or no such part of it.
        ValueError: a file is damaged or has another schema; names it.
    """
    return _OPENERS[source.layout](source)


def _open_pick_a_pic(source: Source) -> PickAPic:
    path = epath.Path(source.path).expanduser()
    if path.is_dir():
        folders = [folder for folder in (path, path / "data") if folder.is_dir()]
        files = next(filter(None, (files_of_kind(folder.glob("*"), ".parquet") for folder in folders)), [])
        if not files:
            raise FileNotFoundError(f"{path}: no *.parquet in it or in its folder data; expected those of Pick-a-Pic")
        files = _of_split(files, source.split, path)
        _tell_of_missing(files, path)
        return PickAPic(_regular(files))
    if path.exists():
        return PickAPic(_regular([path]))
    if not HUB_ID.fullmatch(source.path):
        raise FileNotFoundError(
            f"{path}: no such file or folder, and not the id of a dataset of the Hub (owner/name); expected *.parquet"
        )
    return PickAPic(_downloaded(source) or _on_hub(source))


def _of_split(files: Sequence[File], split: str, where: object) -> list[File]:
    """Those of a split; all, where names tell of none.

    Raises:
        FileNotFoundError: names tell of other splits only.
    """
    splits = [match[1] if (match := _SPLIT.match(file.name)) else None for file in files]
    if not any(splits):
        return list(files)
    chosen = [file for file, its in zip(files, splits, strict=True) if its == split]
    if not chosen:
        there = ", ".join(sorted({its for its in splits if its}))
        raise FileNotFoundError(f"{where}: no files of the split {split!r}; there are {there}: choose with split")
    return chosen


def _tell_of_missing(files: Sequence[File], where: object) -> None:
    """Says on stderr that not all files are there that their names count: a part of a set may be meant, or not."""
    totals = {int(match[1]) for file in files if (match := _TOTAL.search(file.name))}
    if totals and len(files) < max(totals):
        print(
            f"{where}: holds {len(files)} of {max(totals)} files of this split; the others are missing", file=sys.stderr
        )


def _downloaded(source: Source) -> list[Path]:
    """The files in the Hub's cache; none, if it does not hold all of the split."""
    try:
        folder = snapshot_download(source.path, repo_type="dataset", local_files_only=True)
    except (LocalEntryNotFoundError, HFValidationError):
        return []
    files = [file for file in sorted(Path(folder).rglob("*.parquet")) if _is_of(file, source.split)]
    total = _TOTAL.search(files[0].name) if files else None
    return files if total is None or len(files) == int(total[1]) else []


def _is_of(file: File, split: str) -> bool:
    match = _SPLIT.match(file.name)
    return match is None or match[1] == split


def _on_hub(source: Source) -> list[HubFile]:
    filesystem = HfFileSystem()
    try:
        paths = sorted(filesystem.glob(f"datasets/{source.path}/**/*.parquet"))
    except Exception as error:  # those of an HTTP client that the Hub's library has changed before
        raise FileNotFoundError(
            f"{source.path}: no such file or folder, and the Hub cannot be reached ({type(error).__name__}); connect "
            "to the network, or download the parquet files and give the path of their folder"
        ) from error
    if not paths:
        raise FileNotFoundError(
            f"{source.path}: no such file or folder, and on the Hub no such dataset with parquet files, or one that "
            "needs a login (hf auth login)"
        )
    return _of_split([HubFile(filesystem, path) for path in paths], source.split, source.path)


def _json_list(source: Source) -> epath.Path:
    path = epath.Path(source.path).expanduser()
    file = path / f"{source.split}.json" if path.is_dir() else path
    if not file.exists():
        there = sorted(other.name for other in file.parent.glob("*.json"))
        raise FileNotFoundError(
            f"{file}: no such file; expected the JSON list of a split, and there are {', '.join(there) or 'none'}"
        )
    return _regular([file])[0]


def _open_folder(source: Source) -> PairFolder:
    path = epath.Path(source.path).expanduser()
    folder = path.parent if path.name == NAME else path
    _regular([folder / NAME])
    return PairFolder(folder)


def _open_webdataset(source: Source) -> Tars:
    path = epath.Path(source.path).expanduser()
    # Compressed ones are named in an error of their own.
    files = [path]
    if path.is_dir():
        files = files_of_kind(path.glob("*"), ".tar") or sorted(path.glob("*.tar.*"))
    if not files or not files[0].exists():
        raise FileNotFoundError(f"{path}: no such file, or no *.tar in this folder; expected a WebDataset")
    return Tars(_regular(files))


def _open_datasets(source: Source) -> ColumnSet:
    rows, images, class_names = load(
        source.path,
        split=source.split,
        name=source.name,
        revision=source.revision,
        files=source.files,
        stream=source.stream,
        columns=source.columns,
    )
    return ColumnSet(rows, source.columns, images, class_names)


def _regular(files: list[File]) -> list[File]:
    """The files, none of which is a FIFO, device or folder.

    Raises:
        ValueError: one is.
    """
    for file in files:
        if not is_remote(file) and os.path.exists(str(file)) and not os.path.isfile(str(file)):
            raise ValueError(
                f"{file}: is no regular file but a folder, FIFO or device; remove it, or copy the file here"
            )
    return files


_OPENERS: dict[str, Callable[[Source], PairReader]] = {
    "pick_a_pic": _open_pick_a_pic,
    "hpdv2": lambda source: HPDv2(_json_list(source)),
    "hpdv3": lambda source: HPDv3(_json_list(source)),
    "folder": _open_folder,
    "webdataset": _open_webdataset,
    "datasets": _open_datasets,
}
