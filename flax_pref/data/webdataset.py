"""WebDataset: tar files in which the members of a sample follow each other and share a name up to its first dot."""

import itertools
import re
import tarfile
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import IO, Any, NamedTuple, TypeVar, cast

import numpy as np
from etils import epath

from flax_pref.data import fields
from flax_pref.data.images import MOST_BYTES
from flax_pref.data.pairs import Drop, Judgement, Tie

T = TypeVar("T")

_BLOCK = 512  # bytes; headers of a tar file begin at multiples of it, and a block of zeros ends it
# Bytes in a record, whose rest a tar file fills with zeros: the first by default, the others where tar was given -b.
_RECORDS = (10_240, 20_480, *(_BLOCK << power for power in range(5, 12)))
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\0": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
_NAMED, _LABELLED = ("winner", "loser"), ("0", "1")
_PARTS = (*_NAMED, *_LABELLED, "txt", "json")
_IMAGE = re.compile(r"(winner|loser|0|1)\.(?:jpg|jpeg|png|webp)")
_NOWHERE = (-1, 0)


class _Member(NamedTuple):
    """What a header says.

    Attributes:
        key: of the sample.
        part: of `_PARTS`; "" for any other.
        place: of its content: first byte and size.
        fault: why its sample is not used, as `fields.Rejected` takes it; () if nothing is wrong.
    """

    key: str
    part: str
    place: tuple[int, int]
    fault: tuple[str, ...]


class _Sample(NamedTuple):
    """A sample in an open tar file.

    Attributes:
        tar: name of the tar file.
        key: of the sample.
        places: of the content of its parts: first byte and size.
        opened: the tar file.
    """

    tar: str
    key: str
    places: dict[str, tuple[int, int]]
    opened: IO[bytes]

    @property
    def images(self) -> tuple[str, str]:
        return _NAMED if _NAMED[0] in self.places else _LABELLED

    def content(self, part: str) -> bytes:
        start, size = self.places[part]
        self.opened.seek(start)
        data = self.opened.read(size)
        if len(data) < size:
            raise ValueError(f"{self.tar}: ends in sample {self.key}, but was longer before; leave it as it is")
        return data


class Tars:
    """Random access to the samples of tar files, which must not be compressed.

    A sample has two images (`KEY.winner.jpg` and `KEY.loser.jpg`; or .jpeg, .png, .webp), and its caption is in
    `KEY.txt`, or in `KEY.json` as `prompt` or `caption`. The JSON may also have `winner_id` and `loser_id` (else these
    are the name of the tar file and that of the member), `confidence` (0 to 1), `margin` and `models` (a list of two,
    the winner's first). Images can be `KEY.0.jpg` and `KEY.1.jpg` instead; then the JSON has `label_0` and `label_1`
    and may have `image_0_uid`, `image_1_uid`, `model_0` and `model_1`, all as in Pick-a-Pic. Other members are not
    read.

    Attributes:
        winner_listed_first: a sample names its winner; otherwise all of them have labels.
    """

    winner_listed_first: bool
    image_names = None

    def __init__(self, files: Sequence[epath.Path]):
        """Reads the headers of all members.

        Raises:
            ValueError: a file is compressed, damaged or no tar file, or there are no samples.
        """
        self.files = tuple(files)
        self._file_starts = []
        self._drops: dict[int, Drop] = {}
        keys, key_ends, places = bytearray(), array("q", [0]), array("q")
        for file in self.files:
            self._file_starts.append(len(key_ends) - 1)
            known = set()
            for key, members in itertools.groupby(_members(file), lambda member: member.key):
                parts = fields.accepted(_parts, members)
                if key in known:  # tar --append leaves the old one in its place
                    parts = Drop("sample is there twice", f"{key!a}: its members do not follow each other")
                known.add(key)
                if isinstance(parts, Drop):
                    self._drops[len(key_ends) - 1] = parts
                    parts = {}
                keys += key.encode(errors="surrogateescape")
                key_ends.append(len(keys))
                for part in _PARTS:
                    places.extend(parts.get(part, _NOWHERE))
        if len(key_ends) == 1:
            raise ValueError(f"{', '.join(map(str, self.files))}: no samples; expected members such as 7.winner.jpg")
        self._keys, self._key_ends = bytes(keys), key_ends
        self._places = np.array(places).reshape(-1, len(_PARTS), 2)
        self.winner_listed_first = bool((self._places[:, 0, 0] >= 0).any())

    def __len__(self) -> int:
        return len(self._places)

    def where(self, row: int) -> tuple[str, int]:
        """See `PairReader`."""
        tar = self._tar(row)
        return str(self.files[tar]), row - self._file_starts[tar]

    def judgements(self, rows: range) -> Iterator[Judgement | Tie | Drop]:
        """See `PairReader`."""
        for sample in self._samples(rows):
            yield sample if isinstance(sample, Drop) else fields.accepted(_judgement, sample)

    def images(self, rows: Sequence[int]) -> Iterator[tuple[bytes, bytes] | Drop]:
        """See `PairReader`."""
        for sample in self._samples(rows):
            if isinstance(sample, Drop):
                yield sample
            else:
                first, second = map(sample.content, sample.images)
                yield first, second

    def image_files(self, rows: Sequence[int]) -> list[epath.Path]:
        """See `PairReader`."""
        return [self.files[i] for i in dict.fromkeys(map(self._tar, rows))]

    def _tar(self, row: int) -> int:
        return int(np.searchsorted(self._file_starts, row, "right")) - 1

    def _samples(self, rows: Iterable[int]) -> Iterator[_Sample | Drop]:
        """A sample can be read until the next is asked for."""
        for tar, rows_of_tar in itertools.groupby(rows, self._tar):
            file = self.files[tar]
            with file.open("rb") as opened:
                for row in map(int, rows_of_tar):
                    if row in self._drops:
                        yield self._drops[row]
                        continue
                    start, end = self._key_ends[row : row + 2]
                    key = self._keys[start:end].decode(errors="surrogateescape")
                    places = zip(_PARTS, self._places[row].tolist(), strict=True)
                    found = {part: (first, size) for part, (first, size) in places if first >= 0}
                    yield _Sample(file.name, key, found, opened)


def _judgement(sample: _Sample) -> Judgement | Tie:
    described = fields.json_object(sample.content("json")) if "json" in sample.places else {}
    if sample.images == _NAMED:
        winner, ids, models = 0, ("winner_id", "loser_id"), fields.models_of_list(described.get("models"))
    else:
        winner = fields.preferred((described.get("label_0"), described.get("label_1")))
        ids = ("image_0_uid", "image_1_uid")
        models = fields.two_models(described.get("model_0"), described.get("model_1"))
    if isinstance(winner, Tie):
        return winner
    first, second = (
        fields.identifier(described.get(name, f"{sample.tar}/{sample.key}.{part}"), name)
        for name, part in zip(ids, sample.images, strict=True)
    )
    return Judgement(
        caption=fields.caption(_text(sample.content("txt")) if "txt" in sample.places else _prompt(described)),
        winner=winner,
        ids=(first, second),
        confidence=fields.confidence(described.get("confidence")),
        margin=fields.number(described.get("margin"), "margin"),
        models=models,
    )


def _text(data: bytes) -> str:
    try:
        return data.decode().removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError as error:
        raise fields.Rejected("caption is no text", f"not UTF-8: {error.reason} at its byte {error.start}") from error


def _prompt(described: dict) -> object:
    return described.get("prompt", described.get("caption"))


def _members(file: epath.Path) -> Iterator[_Member]:
    """What the headers of a tar file say.

    Raises:
        ValueError: it is compressed, damaged or no tar file.
    """
    with file.open("rb") as opened:
        head = opened.read(8)
        for magic, name in _COMPRESSED.items():
            if head.startswith(magic):
                raise ValueError(f"{file}: compressed with {name}, but samples are read in any order; decompress it")
        opened.seek(0)
        try:
            for info in headers(opened):
                if not info.isdir() and not info.name.rpartition("/")[2].startswith("."):
                    yield _member(info)
        except (tarfile.TarError, OSError) as error:
            reason = ascii(" ".join(str(error).split()))[1:-1]
            raise ValueError(f"{file}: truncated, damaged or no tar file ({reason}); download it again") from error


def headers(opened: IO[bytes]) -> Iterator[tarfile.TarInfo]:
    """Reads the headers of a tar file to its end mark, and checks that nothing except padding follows the mark.

    `tarfile` stops at the first block of zeros, as tar does. A block that a disk or a download has zeroed, the seam of
    two joined tar files and the part of a file that a download has reserved and not yet filled look the same.

    Args:
        opened: the file at its beginning; can seek.

    Raises:
        tarfile.TarError: it is damaged; names the byte.
    """
    last = None
    with _header(0, lambda: tarfile.TarFile(fileobj=opened)) as tar:
        while (info := _header(tar.offset, tar.next)) is not None:
            cast(Any, tar).members.clear()  # it would keep those of a million members
            if named := tar.pax_headers.keys() & {"path", "linkpath", "size"}:
                raise tarfile.ReadError(
                    f"a global header gives all members the same {min(named)}, before {info.offset}"
                )
            if info.size < 0:
                raise tarfile.ReadError(f"{info.name!r} has a negative size, by its header at byte {info.offset}")
            last = info
            yield info
        end = tar.offset
    opened.seek(end)
    rest = opened.read(max(_RECORDS) + 2 * _BLOCK)
    # tarfile takes a damaged header for the end, too.
    if rest[:_BLOCK] != bytes(_BLOCK):
        raise tarfile.ReadError(f"no header and no end at byte {end}")
    if rest.count(0) < len(rest):
        follows = end + len(rest) - len(rest.lstrip(b"\0"))
        raise tarfile.ReadError(
            f"an end mark at byte {end}, but at byte {follows} more follows: a block of zeros by damage, or tar files "
            "that were joined"
        )
    size = opened.seek(0, 2)
    if not _is_padding(size - end, size, last is not None and _ends_in_zero(opened, last)):
        raise tarfile.ReadError(
            f"an end mark at byte {end} and {size - end} bytes of zeros, more than a tar file ends with: a download "
            "that was not finished; if it was written with an unusual tar --blocking-factor, write it without"
        )


def _header(place: int, read: Callable[[], T]) -> T:
    """What `read` returns; names the place of the header on all that goes wrong with it."""
    try:
        return read()
    except (tarfile.TarError, OSError, ValueError, OverflowError, RecursionError, MemoryError) as error:
        raise tarfile.ReadError(f"{error}, header at byte {place}") from error


def _is_padding(zeros: int, size: int, after_zero: bool) -> bool:
    """Whether a tar file of `size` bytes may end in so many zeros: two blocks, and what fills up the last record."""
    if zeros < _RECORDS[0] + 2 * _BLOCK:
        return True
    return not after_zero and any(size % record == 0 and zeros < record + 2 * _BLOCK for record in _RECORDS)


def _ends_in_zero(opened: IO[bytes], info: tarfile.TarInfo) -> bool:
    """Whether the content of a member ends in a zero, which images and texts do not."""
    if not info.size:
        return False
    opened.seek(info.offset_data + info.size - 1)
    return opened.read(1) == b"\0"


def _member(info: tarfile.TarInfo) -> _Member:
    steps = re.split(r"[/\\]", info.name)
    # An entry that is not where it should be belongs to the sample that it would be of otherwise.
    *folders, name = [step for step in steps if step not in ("", ".", "..")] or [""]
    stem, _, suffix = name.partition(".")
    image = _IMAGE.fullmatch(suffix.lower())
    part = image[1] if image else suffix.lower() if suffix.lower() in ("txt", "json") else ""
    fault = ()
    if not steps[0] or steps[0].endswith(":") or ".." in steps:
        fault = ("path of an entry leaves the archive", ascii(info.name))
    elif not info.isreg() or info.issparse():
        fault = ("entry is no plain file", ascii(info.name))
    elif part and info.size > MOST_BYTES:
        fault = ("entry is too large", f"{info.name!a}: {info.size} bytes; at most {MOST_BYTES}")
    return _Member("/".join([*folders, stem]), part, (info.offset_data, info.size), fault)


def _parts(members: Iterable[_Member]) -> dict[str, tuple[int, int]]:
    """Where the parts of a sample are."""
    members = list(members)
    parts = {}
    for member in members:
        if member.fault:
            raise fields.Rejected(*member.fault)
        if member.part in parts:
            raise fields.Rejected("a part is there twice", f"{member.key}: {member.part}")
        if member.part:
            parts[member.part] = member.place
    there = f"{members[0].key}: {', '.join(parts) or 'nothing'}"
    kinds = [kind for kind in (_NAMED, _LABELLED) if any(role in parts for role in kind)]
    if len(kinds) == 2:
        raise fields.Rejected("a part is there twice", f"{there}; expected winner and loser, or 0 and 1")
    if not kinds or not all(role in parts for role in kinds[0]):
        raise fields.Rejected("a part is missing", f"{there}; expected winner and loser, or 0 and 1")
    if "json" not in parts and (kinds[0] == _LABELLED or "txt" not in parts):
        raise fields.Rejected("a part is missing", f"{there}; expected json, or txt for winner and loser")
    return parts
