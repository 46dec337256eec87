"""A folder of evaluation images that survives kills: every image is drawn once, and is there whole or not at all.

Beside the images the folder holds `settings.json` (what it was begun with), and at the end `manifest.parquet` (one row
per image) and `contact_sheet.png`. Until then `.parts` holds records, each a list of images that are safe: a record is
written after the images it lists, and nothing counts without one. Every file is written whole, on object stores too;
locally it also outlives a loss of power. One program at a time writes into a folder, see `ImageSet.only_writer`; its
processes share the shards among them.
"""

import collections
import contextlib
import hashlib
import io
import itertools
import json
import os
import re
import stat
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import PurePosixPath
from typing import IO, Any, Literal, NamedTuple, Self, get_args

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from etils import epath

from flax_pref.config import UserError
from flax_pref.files import LOCK, difference, one_writer, remedy
from flax_pref.images.choices import ImageFormat, Layout
from flax_pref.images.image_files import (
    TAR_BLOCK,
    TAR_END,
    check_names,
    contact_sheet,
    encode_image,
    tar_members,
)
from flax_pref.images.layouts import Item, check_square, described, grid_of, grids, image_names

SETTINGS, MANIFEST, SHEET, PARTS = "settings.json", "manifest.parquet", "contact_sheet.png", ".parts"
ON_SHEET = 64  # images
LARGEST = 2**48  # bytes, of any file

MANIFEST_SCHEMA = pa.schema(
    [
        ("prompt_id", pa.int64()),
        ("prompt", pa.string()),
        ("group", pa.string()),
        ("record", pa.string()),
        ("seed", pa.int64()),
        ("settings", pa.string()),
        ("model_sha256", pa.string()),
        ("modules_sha256", pa.string()),
        ("file", pa.string()),
        ("offset", pa.int64()),
        ("size", pa.int64()),
        ("sha256", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
    ]
)


def read_table(content: bytes) -> pa.Table:
    """The table in the bytes of a parquet file, whose checksums are verified.

    In this thread only: pyarrow's threads may release the bytes after it has returned, and where the interpreter ends
    meanwhile, the process aborts.

    Raises:
        pa.ArrowException, OSError: it is damaged.
    """
    return pq.ParquetFile(pa.BufferReader(content), page_checksum_verification=True).read(use_threads=False)


def read_manifest(content: bytes) -> pa.Table:
    """The table in the bytes of a manifest, with the columns and types of `MANIFEST_SCHEMA`.

    Raises:
        ValueError: it is damaged; see also `check_rows`.
    """
    try:
        table = read_table(content)
        if "record" not in table.column_names:  # of versions that did not have it
            table = table.append_column("record", pa.array(["{}"] * len(table)))
        table = table.select(MANIFEST_SCHEMA.names).cast(MANIFEST_SCHEMA)
        table.validate(full=True)
    except (pa.ArrowException, OSError, KeyError) as error:
        raise ValueError(str(error).splitlines()[0]) from error
    check_rows(table)
    return table


def check_rows(table: pa.Table) -> None:
    """Checks that every row of a manifest, or of a table of scores, says which image it is of and where that is.

    Args:
        table: with the columns of `MANIFEST_SCHEMA`.

    Raises:
        ValueError: a row lacks something, has a negative number, or its file is outside of the folder; names the row.
    """
    for name in ("prompt_id", "prompt", "seed", *_Row._fields[1:]):
        if table[name].null_count:
            raise ValueError(f"row {table[name].is_null().to_pylist().index(True)} has no {name}")
    for name in ("offset", "size", "width", "height"):
        values = table[name].to_numpy()
        wrong = (values < 0) | (values >= LARGEST)
        if wrong.any():
            row = int(wrong.argmax())
            raise ValueError(f"row {row} has {name}={values[row]}; expected 0 or more, and less than {LARGEST}")
    files = table["file"].to_pylist()
    for file in dict.fromkeys(files):
        if not _is_inside(file):
            raise ValueError(f"row {files.index(file)} has file={file!r:.100}; expected a name in this folder")


def _is_inside(file: str) -> bool:
    """Whether a name, relative to a folder, is that of a file in it; "" is not."""
    path = PurePosixPath(file)
    short = all(len(part.encode(errors="replace")) <= 255 for part in path.parts)  # as file systems have it
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts and "\0" not in file and short


class _Row(NamedTuple):
    """An image that is safe: the item that it is of, and where in the folder its bytes are."""

    place: int
    file: str
    offset: int
    size: int
    sha256: str
    width: int
    height: int


class ImageSet:
    """The images of one evaluation, in one folder.

    Layouts, with the names of the files in the folder:
        webdataset: tar shards `00000.tar` ... of `shard_size` images, with members `<prompt id>-<seed>.txt` (the
            prompt), `.json` (the metadata) and `.png` or `.webp`.
        flat: `<prompt id>-<seed>.png` or `.webp`.
        geneval: `<prompt id>/metadata.jsonl` (the prompt's record) and `<prompt id>/samples/0000.png` ..., in the order
            of the seeds, as GenEval's `evaluate_images.py` reads them; PNG only.
        geneval2: `images/00000.png` ... by prompt id, and `image_paths.json`, which gives the file of each prompt as
            GenEval 2's `evaluation.py` reads it, relative to the folder; one seed only.
        dpg: `samples/<item id>-0.png` ... in the order of the seeds, at most four, and `grids/<item id>.png`, all of
            them in two columns, as DPG-Bench's `compute_dpg_bench.py` reads the folder `grids`; square images only.
        t2i_compbench: `<category>/samples/<prompt>_000000.png` ..., numbered within the category (the prompt's group)
            by prompt and seed, as the programs of T2I-CompBench++ read `<category>`; PNG only.
        hpsv2: `images/<style>/00000.jpg` ..., counted within the style (the prompt's group), as `hpsv2.evaluate` reads
            the folder `images`; one seed only. That reader takes everything in its folder for a style, hence the folder
            of their own, and it insists on the name, not on JPEG: the files are PNG or WebP, which PIL recognises.

    Attributes:
        folder: local or on an object store (`gs://...`).
        total: number of images that this process draws.
        damaged: indices of the images that `begin` has found changed; they are pending again.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        items: Sequence[Item],
        settings: Mapping[str, Any],
        *,
        layout: Layout = "webdataset",
        image_format: ImageFormat = "png",
        shard_size: int = 1000,
        process_index: int = 0,
        process_count: int = 1,
        verify: bool = False,
    ):
        """Describes the set; `begin` looks at the folder.

        Args:
            folder: to be created or continued.
            items: all images, of all processes, in the order of the manifest.
            settings: what the pixels depend on besides prompt and seed: values that JSON can hold. They are written
                into every image, and a folder that was begun with others is refused as soon as it has images. Of
                these `model_sha256` and `modules_sha256`, hashes by name, have columns of their own in the manifest.
            layout: of the files, see above.
            image_format: of the images; both are lossless.
            shard_size: images per shard; in the other layouts, per block that one process draws.
            process_index: of this process.
            process_count: process p draws the shards p, p + process_count, ...
            verify: whether `begin` reads what is there and compares it with what was written, byte by byte; else it
                compares the sizes of files only.

        Raises:
            ValueError: an argument is not as described, or the items do not fit the layout.
        """
        for name, value, choices in (("layout", layout, Layout), ("image_format", image_format, ImageFormat)):
            if value not in get_args(choices):
                raise ValueError(f"{name}={value!r}: expected one of {', '.join(get_args(choices))}")
        if shard_size < 1 or not 0 <= process_index < process_count:
            raise ValueError(
                f"shard_size={shard_size}, process {process_index} of {process_count}: expected a positive size, and a "
                "process between 0 and their number"
            )
        self.folder = epath.Path(folder)
        self._items, self._shard_size = items, shard_size
        self._layout: Layout = layout
        self._format: ImageFormat = image_format
        self.process, self.processes = process_index, process_count
        self._remote = "://" in os.fspath(self.folder)
        self._names = image_names(items, layout, image_format)
        self._settings = _json_settings(settings)
        self._rows: dict[int, _Row] = {}  # what is safe of this process's images
        self._begun = False  # whether _rows tells
        self._verify = verify
        self.damaged: list[int] = []
        self._pool = ThreadPoolExecutor(16 if self._remote else min(8, os.cpu_count() or 1))
        self.total = sum(len(self._indices(shard)) for shard in self._own)

    @property
    def done(self) -> int:
        """Number of images of this process that are safe."""
        return len(self._rows)

    @property
    def own(self) -> np.ndarray:
        """Indices into the items that this process draws, in order: int64 `[total]`."""
        return np.array([index for shard in self._own for index in self._indices(shard)], np.int64)

    @property
    def pending(self) -> np.ndarray:
        """Those of `own` that are not safe yet: int64 `[total - done]`."""
        return np.array([index for index in self.own.tolist() if index not in self._rows], np.int64)

    @contextlib.contextmanager
    def only_writer(self) -> Iterator[None]:
        """Keeps other programs from writing into a local folder, which it creates; process 0 does so for all.

        To be entered before `begin`, and by process 0 before any other process begins. The lock ends with the program,
        however that ends.

        Raises:
            UserError: another program writes into the folder, or the folder is not one that `begin` can continue.
        """
        with self._told():
            self._begun_with()  # a folder of something else gets no file of the lock
            if not self._remote and not self.process:
                self.folder.mkdir(parents=True, exist_ok=True)
        with contextlib.nullcontext() if self.process else one_writer(self.folder):
            yield

    def begin(self) -> None:
        """Creates the folder, or continues it: finds what is safe, and removes what a kill has left behind.

        Images whose file is missing, no file, or of another length than its record tells are pending again; with
        `verify` also those whose bytes are not those that were written. All processes may call this at the same time.

        Raises:
            UserError: the folder was begun with other settings or items, holds something else, or cannot be written.
        """
        with self._told():
            self._check_settings()
            self._recover(self._verify)

    def write(self, indices: Sequence[int] | np.ndarray, images: np.ndarray) -> None:
        """Writes a batch; when this returns the images are safe.

        Args:
            indices: N of `pending`, in any order.
            images: uint8 `[N, H, W, 3]`.

        Raises:
            UserError: a file cannot be written; the folder is as good as before, and can be continued.
            ValueError: the arguments are not as described.
        """
        if not self._begun:
            raise ValueError("nothing is known about the folder; call begin before write")
        indices = [int(index) for index in indices]
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3 or len(images) != len(indices):
            raise ValueError(
                f"images {images.dtype} {list(images.shape)} for {len(indices)} indices; expected uint8 [N, H, W, 3]"
            )
        if not images.shape[1] * images.shape[2]:
            raise ValueError(f"images {list(images.shape)}: without pixels; expected uint8 [N, H, W, 3]")
        for place, index in enumerate(indices):
            own = 0 <= index < len(self._items) and index // self._shard_size % self.processes == self.process
            if not own or index in self._rows or index in indices[:place]:
                raise ValueError(f"index {index} is not pending in process {self.process}; expected some of pending")
        height, width = images.shape[1:3]
        if self._layout == "dpg":
            check_square(height, width)
        with self._told():
            encode = self._pool.map(
                lambda index, pixels: encode_image(pixels, self._metadata(index), self._format), indices, images
            )
            encoded = dict(sorted(zip(indices, encode, strict=True)))
            for shard, group in itertools.groupby(encoded, lambda index: index // self._shard_size):
                batch = {index: encoded[index] for index in group}
                self._write_part(shard, batch, width, height)

    def finish(self) -> None:
        """Writes manifest and contact sheet, and removes the records; repeated, it changes nothing.

        Only process 0 does; call it after a barrier behind the last `write` of all processes. The manifest is the last
        file to appear: where it is, everything is.

        Raises:
            UserError: images are missing, with the first of them named, or a file cannot be written.
        """
        if self.process:
            return
        if self.processes > 1:
            single = ImageSet(
                *(self.folder, self._items, self._settings),
                **{"layout": self._layout, "image_format": self._format, "shard_size": self._shard_size},
                verify=self._verify,
            )
            with self._told():
                single._check_settings()
            single.finish()
            return
        with self._told():
            self._recover()
            missing = [self._items[index] for index in self.pending]
            if missing:
                first = ", ".join(f"prompt {prompt.id} with seed {seed}" for prompt, seed in missing[:3])
                raise UserError(
                    f"{self.folder}: {len(missing)} of {self.total} images are missing, the first: {first}; run the "
                    "same command again, which draws only these"
                )
            self._write_rest([self._rows[index] for index in range(self.total)])
            with contextlib.suppress(FileNotFoundError):
                (self.folder / PARTS).rmtree()

    # Who draws what.

    @property
    def _own(self) -> range:
        return range(self.process, -(-len(self._items) // self._shard_size), self.processes)

    def _indices(self, shard: int) -> range:
        return range(shard * self._shard_size, min((shard + 1) * self._shard_size, len(self._items)))

    # The settings.

    def _check_settings(self) -> None:
        begun = self._begun_with()
        if begun is None:
            self._put(SETTINGS, [json.dumps(self._now(), indent=2).encode() + b"\n"])
        else:
            self._settings = begun["settings"]  # in the order in which they are in the images that are there

    def _begun_with(self) -> dict[str, dict[str, Any]] | None:
        """What a folder that can be continued was begun with; None: nothing that would be lost."""
        others = [name for name in self._list("") if not name.startswith((PARTS, LOCK, f".{LOCK}"))]
        begun, now = self._read_settings() if SETTINGS in others else None, self._now()
        if begun is None and others and (begun := self._read_settings()) is None:
            raise UserError(
                f"{self.folder}: holds {', '.join(sorted(others)[:3])}{', ...' if len(others) > 3 else ''}, but no "
                f"{SETTINGS} of an image set; choose an empty or a new folder with --out"
            )
        if begun is None or (begun != now and set(others) == {SETTINGS} and not self._list(PARTS)):
            return None
        if begun != now:
            changed = "; ".join(filter(None, (difference(begun[part], now[part]) for part in now)))
            raise UserError(f"{self.folder}: was begun with {changed}: choose another --out, or repeat the settings")
        return begun

    def _now(self) -> dict[str, dict[str, Any]]:
        return {"settings": self._settings, "images": self._description()}

    def _description(self) -> dict[str, Any]:
        described = hashlib.sha256()
        for prompt, seed in self._items:
            described.update(json.dumps([int(prompt.id), prompt.text, prompt.group, int(seed)]).encode())
        return {
            **{"layout": self._layout, "image_format": self._format, "shard_size": self._shard_size},
            **{"count": len(self._items), "seeds": _ranges({item.seed for item in self._items})},
            "items": described.hexdigest(),
        }

    def _read_settings(self) -> dict[str, dict[str, Any]] | None:
        """What the folder was begun with; None: no such file, or one of some other program."""
        try:
            begun = json.loads(self._read(SETTINGS))
        except (FileNotFoundError, ValueError, RecursionError):
            return None
        return begun if isinstance(begun, dict) and set(begun) == {"settings", "images"} else None

    def _metadata(self, index: int) -> dict[str, Any]:
        prompt, seed = self._items[index]
        described = {"prompt": prompt.text, "prompt_id": int(prompt.id), "group": prompt.group, "seed": int(seed)}
        return {**described, **self._settings}

    # What is safe. Names in .parts begin with the number of a shard, so that every process knows what is its own:
    # 00003.json lists the whole shard 3, 00003-000003012.json the batch whose first image is 3012.

    def _recover(self, verify: bool = False) -> None:
        """Finds what is safe, completes the shards where a kill came between, and removes what is left over."""
        backend = getattr(self.folder, "_backend", None)
        if (fs := getattr(backend, "fs", None)) is not None:  # fsspec remembers listings, others have written since
            fs(self.folder).invalidate_cache()
        leftovers = collections.defaultdict(set)
        for name in self._list(PARTS):
            shard = re.match(r"\d+", name)
            if shard and int(shard[0]) in self._own:
                leftovers[int(shard[0])].add(name)
        # In this order a whole shard comes before its parts, what it lists is newer; the manifest is the oldest.
        files = sorted((name for names in leftovers.values() for name in names if name.endswith(".json")), reverse=True)
        records = dict(zip(files, self._pool.map(self._read_record, files), strict=True))
        manifest = [row for row in self._read_manifest() if row.place // self._shard_size in self._own]
        sizes = self._sizes({row.file for rows in (*records.values(), manifest) for row in rows})
        self._rows = {}
        for rows in (*records.values(), manifest):
            for row in _sound(rows, sizes):
                self._rows.setdefault(row.place, row)
        changed = self._find_changed() if verify else set()
        self._begun = True
        for shard in sorted({*leftovers, *changed}):
            names = leftovers[shard]
            if all(index in self._rows for index in self._indices(shard)):
                if shard in changed or (names and names != {f"{shard:05d}.json"}):
                    self._complete(shard, rewrite=shard in changed)
            else:
                self._tidy(shard, names, {name: rows for name, rows in records.items() if name in names})

    def _find_changed(self) -> set[int]:
        """Forgets images that are not as they were written; the shards whose tar files are not, outside of images."""
        rows = sorted(self._rows.values())
        found = list(zip(rows, self._pool.map(self._compare, rows), strict=True))
        self.damaged = [row.place for row, state in found if state == "image"]
        for index in self.damaged:
            del self._rows[index]
        return {row.place // self._shard_size for row, state in found if state == "sample"}

    def _compare(self, row: _Row) -> Literal["image", "sample", ""]:
        """What of an image is not as it was written: its bytes, or what is around them in the tar file of a shard."""
        with (self.folder / row.file).open("rb") as file:
            file.seek(row.offset)
            image = file.read(row.size)
            if hashlib.sha256(image).hexdigest() != row.sha256:
                return "image"
            if not row.file.endswith(".tar") or row.file.startswith(PARTS):
                return ""
            before, content = tar_members(self._names[row.place], self._metadata(row.place), image, self._format)
            if row.place == self._indices(row.place // self._shard_size)[-1]:
                content += TAR_END
            file.seek(max(0, row.offset - len(before)))
            return "" if file.read(len(before) + len(content)) == before + content else "sample"

    def _tidy(self, shard: int, names: set[str], records: Mapping[str, list[_Row]]) -> None:
        """Makes the records of an unfinished shard list exactly what is safe."""
        kept = set()
        for name, rows in records.items():
            safe = [row for row in rows if self._rows.get(row.place) == row]
            if safe and safe != rows:
                name = self._put_record(self._part(shard, safe[0].place), safe)
            if safe:
                kept |= {name, *(row.file.removeprefix(f"{PARTS}/") for row in safe)}
        for name in names - kept:
            (self.folder / PARTS / name).unlink(missing_ok=True)

    def _read_record(self, name: str) -> list[_Row]:
        try:
            rows = [_Row(*values) for values in json.loads(self._read(f"{PARTS}/{name}"))]
        except (ValueError, TypeError, RecursionError):  # damaged: it lists nothing
            return []
        return rows if all(map(self._is_own, rows)) else []

    def _is_own(self, row: _Row) -> bool:
        """Whether a row of a record can be one of this process's images."""
        numbers = (row.place, row.offset, row.size, row.width, row.height)
        return (
            all(type(number) is int and 0 <= number < LARGEST for number in numbers)
            and row.place < len(self._items)
            and row.place // self._shard_size in self._own
            and type(row.file) is type(row.sha256) is str
            and _is_inside(row.file)
        )

    def _read_manifest(self) -> list[_Row]:
        file, names = f"{self.folder / MANIFEST}", _Row._fields[1:]
        try:
            content = self._read(MANIFEST)
        except FileNotFoundError:
            return []
        try:
            table = read_manifest(content)
        except ValueError as error:
            raise UserError(f"{file}: damaged ({error}): restore it, or remove it to draw its images again") from error
        rows = list(zip(*(table[name].to_pylist() for name in names), strict=True))
        if len(rows) != len(self._items):
            raise UserError(
                f"{file}: {len(rows)} rows for {len(self._items)} images: restore it, or remove it to draw them again"
            )
        return [_Row(index, *row) for index, row in enumerate(rows)]

    def _sizes(self, files: Iterable[str]) -> dict[str, int | None]:
        """Length in bytes of each file, None where there is none, or something else."""

        def size(file: str) -> int | None:
            path = self.folder / file
            try:  # epath's own stat of a local file fails where the owner has no name
                if self._remote:
                    return path.stat().length
                status = os.stat(path)
            except (FileNotFoundError, NotADirectoryError):
                return None
            return status.st_size if stat.S_ISREG(status.st_mode) else None

        files = list(files)
        return dict(zip(files, self._pool.map(size, files), strict=True))

    # Writing. Every file is written whole, and what lists it after it.

    def _write_part(self, shard: int, batch: Mapping[int, bytes], width: int, height: int) -> None:
        part = self._part(shard, next(iter(batch)))
        hashes = {index: hashlib.sha256(image).hexdigest() for index, image in batch.items()}
        if self._layout == "webdataset":
            file = f"{PARTS}/{part}.tar"
            offsets = self._put_tar(file, batch, iter(batch.values()))
            where = {index: (file, offset) for index, offset in offsets.items()}
        else:
            writes = [self._pool.submit(self._put, self._names[index], [image]) for index, image in batch.items()]
            wait(writes)  # after an error too: what this leaves alone, a later call may touch
            for write in writes:
                write.result()
            where = {index: (self._names[index], 0) for index in batch}
        rows = [_Row(index, *where[index], len(batch[index]), hashes[index], width, height) for index in batch]
        self._put_record(part, rows)
        self._rows.update((row.place, row) for row in rows)
        if all(index in self._rows for index in self._indices(shard)):
            self._complete(shard)

    def _complete(self, shard: int, *, rewrite: bool = False) -> None:
        """Puts a shard together, all of whose images are safe, and removes its parts; may be repeated.

        Args:
            shard: of this process.
            rewrite: write its tar file even where that holds all images.
        """
        rows = [self._rows[index] for index in self._indices(shard)]
        file = f"{shard:05d}.tar"
        if self._layout == "webdataset" and (rewrite or any(row.file != file for row in rows)):
            offsets = self._put_tar(file, self._indices(shard), map(self._read_image, rows))
            rows = [row._replace(file=file, offset=offsets[row.place]) for row in rows]
        whole = self._put_record(f"{shard:05d}", rows)
        self._rows.update((row.place, row) for row in rows)
        for name in self._list(PARTS):
            if re.match(rf"0*{shard}\D", name) and name != whole:
                (self.folder / PARTS / name).unlink(missing_ok=True)

    def _write_rest(self, rows: Sequence[_Row]) -> None:
        texts = described(self._items, self._layout, self._names)
        for file, size in self._sizes(texts).items():
            if self._verify or size != len(texts[file]):
                self._put_changed(file, texts[file])
        manifest = self._manifest(rows)
        sizes = self._sizes([MANIFEST, SHEET])
        self._write_grids(
            rows, every=self._verify or sizes[MANIFEST] != len(manifest) or self._read(MANIFEST) != manifest
        )
        if self._verify or sizes[SHEET] is None or sizes[MANIFEST] != len(manifest) or self._read(MANIFEST) != manifest:
            images = list(self._pool.map(self._read_image, rows[:ON_SHEET]))
            captions = [f"{item.prompt.id}-{item.seed}: {item.prompt.text}" for item in self._items[:ON_SHEET]]
            self._put_changed(SHEET, contact_sheet(images, captions))
            self._put_changed(MANIFEST, manifest)

    def _write_grids(self, rows: Sequence[_Row], *, every: bool) -> None:
        """Writes the grids that are missing, or every one whose bytes have changed."""
        wanted = grids(self._items, self._layout)
        names = [name for name, size in self._sizes(wanted).items() if every or size is None]

        def content(name: str) -> bytes:
            return grid_of([self._read_image(rows[place]) for place in wanted[name]])

        for start in range(0, len(names), 16):  # so that few are in memory
            some = names[start : start + 16]
            try:
                contents = list(self._pool.map(content, some))
            except ValueError as error:
                raise UserError(f"{self.folder}: {error}") from error
            for name, one in zip(some, contents, strict=True):
                self._put_changed(name, one)

    def _manifest(self, rows: Sequence[_Row]) -> bytes:
        prompts = [item.prompt for item in self._items]
        columns = {
            "prompt_id": [int(prompt.id) for prompt in prompts],
            "prompt": [prompt.text for prompt in prompts],
            "group": [prompt.group for prompt in prompts],
            "record": [json.dumps(dict(prompt.record)) for prompt in prompts],
            "seed": [int(item.seed) for item in self._items],
            "settings": [json.dumps(self._settings)] * len(rows),
            "model_sha256": [self._settings.get("model_sha256")] * len(rows),
            "modules_sha256": [json.dumps(self._settings.get("modules_sha256", {}))] * len(rows),
            **{name: [getattr(row, name) for row in rows] for name in _Row._fields[1:]},
        }
        file = io.BytesIO()
        pq.write_table(pa.table(columns, MANIFEST_SCHEMA), file, write_page_checksum=True)
        return file.getvalue()

    def _put_tar(self, file: str, indices: Iterable[int], images: Iterator[bytes]) -> dict[int, int]:
        """Writes a tar file and returns at which byte the content of each image begins."""
        offsets = {}

        def chunks() -> Iterator[bytes]:
            position = 0
            for index, image in zip(indices, images, strict=True):
                before, content = tar_members(self._names[index], self._metadata(index), image, self._format)
                offsets[index] = position + len(before)
                position += len(before) + len(content)
                yield before
                yield content
            yield TAR_END

        self._put(file, chunks())
        return offsets

    def _put_record(self, stem: str, rows: Sequence[_Row]) -> str:
        self._put(f"{PARTS}/{stem}.json", [json.dumps(rows).encode()])
        return f"{stem}.json"

    def _put_changed(self, file: str, content: bytes) -> None:
        """Writes a file, unless it holds this."""
        if self._sizes([file])[file] != len(content) or self._read(file) != content:
            self._put(file, [content])

    def _put(self, file: str, chunks: Iterable[bytes]) -> None:
        """Writes a file: under its name there is what was there before, or all of the new content."""
        path = self.folder / file
        with self._told(path):
            if self._remote:
                with path.open("wb") as out:
                    _write(out, chunks)
                return
            unfinished = self.folder / PARTS / f"{self.process:05d}.{uuid.uuid4().hex}"
            for folder in (unfinished.parent, path.parent):
                folder.mkdir(parents=True, exist_ok=True)
            try:
                with unfinished.open("wb") as out:
                    _write(out, chunks)
                    out.flush()
                    os.fsync(out.fileno())
                if path.is_dir():
                    _set_aside(path)
                unfinished.replace(path)
            finally:
                unfinished.unlink(missing_ok=True)

    # Reading.

    def _part(self, shard: int, first: int) -> str:
        return f"{shard:05d}-{first:09d}"

    def _list(self, folder: str) -> list[str]:
        try:
            return [path.name for path in (self.folder / folder).iterdir()]
        except FileNotFoundError:
            return []

    def _read(self, file: str) -> bytes:
        return (self.folder / file).read_bytes()

    def _read_image(self, row: _Row) -> bytes:
        with (self.folder / row.file).open("rb") as file:
            file.seek(row.offset)
            image = file.read(row.size)
        if hashlib.sha256(image).hexdigest() != row.sha256:
            raise UserError(
                f"{self.folder / row.file}: its bytes are not those that were written (image {row.place}): run the "
                "same command again with --verify, which draws it again"
            )
        return image

    @contextlib.contextmanager
    def _told(self, path: os.PathLike | None = None) -> Iterator[None]:
        """Makes an error of the file system a line for the user, about `path` or the file that the error names."""
        try:
            yield
        except OSError as error:
            safe = f"; {self.done} of {self.total} images are safe" if self._begun else ""
            raise UserError(
                f"{path or error.filename or self.folder}: {error.strerror or error}{safe}: {remedy(error)}, then run "
                "the same command again, which draws only what is missing"
            ) from error


class Writer:
    """Writes batches in the background, in order, while the next ones are being drawn.

        with Writer(image_set) as writer:
            for indices in batches:
                writer.put(indices, draw(indices))

    Leaving the block waits for all batches that `put` has accepted, after an exception too.
    """

    def __init__(self, image_set: ImageSet, *, written: Callable[[int], None] = lambda count: None, ahead: int = 2):
        """Starts with nothing to do.

        Args:
            image_set: has begun.
            written: called from the background with the number of images of a batch that is safe, e.g. the `update` of
                a progress bar.
            ahead: batches that may wait or be written while `put` returns.
        """
        self._set, self._written, self._ahead = image_set, written, ahead
        self._thread = ThreadPoolExecutor(1)
        self._accepted: collections.deque[Future] = collections.deque()

    def put(self, indices: Sequence[int] | np.ndarray, images: Any) -> None:
        """Accepts a batch, as soon as there is room for it.

        Args:
            indices: as for `ImageSet.write`.
            images: as for `ImageSet.write`, or what `np.asarray` makes such an array of: a device array that is still
                being computed is waited for in the background.

        Raises:
            UserError, ValueError: an earlier batch could not be written; this one is not accepted.
        """
        while self._accepted and (len(self._accepted) >= self._ahead or self._accepted[0].done()):
            self._accepted.popleft().result()
        self._accepted.append(self._thread.submit(self._write, indices, images))

    def _write(self, indices: Sequence[int] | np.ndarray, images: Any) -> None:
        self._set.write(indices, np.asarray(images))
        self._written(len(indices))

    def close(self) -> None:
        """Waits until all accepted batches are written.

        Raises:
            UserError, ValueError: one of them could not be.
        """
        self._thread.shutdown()
        while self._accepted:
            self._accepted.popleft().result()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        if kind is None:
            self.close()
        else:
            self._thread.shutdown()  # the error that is on its way is the one to tell


def _json_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as JSON gives them back.

    Raises:
        ValueError: JSON cannot hold them, or their names collide with those of the other metadata.
    """
    check_names(list(settings))
    taken = {"prompt", "prompt_id", "group", "seed"} & set(settings)
    if taken:
        raise ValueError(f"settings: the names {', '.join(sorted(taken))} are taken; every image has its own")
    for name, value in settings.items():
        try:
            json.dumps(value, allow_nan=False, ensure_ascii=False).encode()
        except (TypeError, ValueError) as error:
            raise ValueError(f"settings: {name}={value!r} cannot be written as JSON ({error})") from error
    return json.loads(json.dumps(dict(settings)))


def _ranges(seeds: set[int]) -> str:
    first, last = min(seeds), max(seeds)
    contiguous = len(seeds) == last - first + 1 > 1
    return f"{first}-{last}" if contiguous else ",".join(map(str, sorted(seeds)))


def _set_aside(folder: epath.Path) -> None:
    """Moves a folder out of the place of a file; one that holds something keeps it, as NAME.folder."""
    try:
        os.rmdir(folder)
    except OSError:
        folder.rename(folder.with_name(f"{folder.name}.folder"))


def _write(file: IO[bytes], chunks: Iterable[bytes]) -> None:
    for chunk in chunks:  # not every object store's file has writelines
        file.write(chunk)


def _sound(rows: Sequence[_Row], sizes: Mapping[str, int | None]) -> list[_Row]:
    """Those of a record's rows whose file is as long as they tell."""
    ends: dict[str, int] = {}
    for row in rows:
        end = row.offset + row.size
        if row.file.endswith(".tar"):  # an image is the last member of its sample, and the end mark follows the last
            end += -end % TAR_BLOCK + len(TAR_END)
        ends[row.file] = max(ends.get(row.file, 0), end)
    return [row for row in rows if sizes[row.file] == ends[row.file]]
