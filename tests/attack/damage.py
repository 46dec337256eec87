"""Damaged inputs of every format that the programs read: what disks, downloads, editors and other programs do to files.

`DAMAGES[format]` holds what damages one whole example of the format in a folder, each with how often it is drawn, and
with whether it may leave a whole file of other content.
"""

import gzip
import io
import json
import os
import random
import shutil
import struct
import subprocess
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, PngImagePlugin
from safetensors.numpy import load_file, save_file

from tests.data.preference_sets import encoded_image, tar_of

Rng = random.Random


class Damage(NamedTuple):
    """One kind of damage.

    Attributes:
        name: what was done.
        make: does it.
        seeds: how often it is drawn.
        whole: it may leave a whole file of other content.
    """

    name: str
    make: Callable[[Path, Rng], None]
    seeds: int
    whole: bool


DAMAGES: dict[str, list[Damage]] = {}


def damages(*formats: str, seeds: int = 1, whole: bool = False):
    def register(make):
        for name in formats:
            DAMAGES.setdefault(name, []).append(Damage(make.__name__, make, seeds, whole))
        return make

    return register


def variants(*formats: str, whole: bool = False, **makes: Callable[[Path, Rng], None]) -> None:
    """Registers damages that one expression does."""
    for format_ in formats:
        DAMAGES.setdefault(format_, []).extend(Damage(name, make, 1, whole) for name, make in makes.items())


def flip(file: Path, rng: Rng, start: int = 0, end: int | None = None) -> None:
    data = bytearray(file.read_bytes())
    data[rng.randrange(start, len(data) if end is None else end)] ^= 1 << rng.randrange(8)
    file.write_bytes(data)


def replace(file: Path, *changes: tuple[bytes, bytes]) -> None:
    data = file.read_bytes()
    for old, new in changes:
        assert old in data, (file, old)
        data = data.replace(old, new, 1)
    file.write_bytes(data)


def cut(file: Path, rng: Rng, least: int = 0) -> None:
    data = file.read_bytes()
    file.write_bytes(data[: rng.randrange(least, len(data.rstrip(b"\0\n ")) - 1)])


def rewrite(file: Path, change: Callable[[bytes], bytes]) -> None:
    file.write_bytes(change(file.read_bytes()))


# ----------------------------------------------------------------------------------------------------------------------
# Any file, as a disk or a download leaves it


def in_place_of(pattern: str) -> dict[str, Callable[[Path, Rng], None]]:
    """Damages of the first file of this pattern that have nothing to do with its format."""

    def one(folder):
        return sorted(folder.rglob(pattern))[0] if "*" in pattern else folder / pattern

    def fifo(folder, rng):
        file = one(folder)
        file.unlink()
        os.mkfifo(file)

    def directory(folder, rng):
        file = one(folder)
        file.unlink()
        file.mkdir()

    def link(to):
        def make(folder, rng):
            file = one(folder)
            file.rename(file.with_name("moved.bin"))
            file.symlink_to(to if to is not None else file.name)

        return make

    def good_link(folder, rng):
        file = one(folder)
        file.rename(folder / "blob")
        file.symlink_to(os.path.relpath(folder / "blob", file.parent))

    def unreadable(folder, rng):
        one(folder).write_bytes(one(folder).read_bytes()[:0])

    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 1234\n"
    return {
        "empty": unreadable,
        "a FIFO": fifo,
        "a folder": directory,
        "a link to nowhere": link("nowhere"),
        "a link to itself": link(None),
        "a link to the whole file": good_link,
        "a pointer of git-lfs": lambda folder, rng: one(folder).write_bytes(pointer),
        "a page of HTML": lambda folder, rng: one(folder).write_bytes(b"<!DOCTYPE html><html>503</html>\n" * 40),
        "gzip of itself": lambda folder, rng: rewrite(one(folder), gzip.compress),
        "all zeros": lambda folder, rng: rewrite(one(folder), lambda data: bytes(len(data))),
        "a second half of zeros": lambda folder, rng: rewrite(
            one(folder), lambda data: data[: len(data) // 2].ljust(len(data), b"\0")
        ),
        "sent as text": lambda folder, rng: rewrite(
            one(folder), lambda data: data.decode("latin-1").encode() + b"\x80"
        ),
        "lines ended twice": lambda folder, rng: rewrite(one(folder), lambda data: data.replace(b"\n", b"\r\n")),
    }


# ----------------------------------------------------------------------------------------------------------------------
# Tar: 00000.tar and 00001.tar, six samples with txt, json and two images


def members_of(file: Path) -> list[tuple[tarfile.TarInfo, bytes]]:
    with tarfile.open(file) as tar:
        return [(info, tar.extractfile(info).read()) for info in tar]


def first_tar(folder: Path) -> Path:
    return folder / "00000.tar"


def change_tar(change, tar_format=tarfile.DEFAULT_FORMAT):
    def make(folder, rng):
        members = members_of(first_tar(folder))
        first_tar(folder).write_bytes(tar_of(change(members, rng), tar_format))

    return make


def with_content(suffix: str, content: Callable[[bytes], bytes], row: int = 1):
    """Other content of a member of one sample."""
    return change_tar(
        lambda members, rng: [
            (info, content(data) if info.name == f"{row:06d}.{suffix}" else data) for info, data in members
        ]
    )


def with_name(name: Callable[[str], str], suffix: str = "0.jpg", tar_format=tarfile.DEFAULT_FORMAT):
    def change(members, rng):
        for info, _ in members:
            if info.name == f"000001.{suffix}":
                info.name = name(info.name)
        return members

    return change_tar(change, tar_format)


def with_headers(headers: dict[str, str], tar_format=tarfile.PAX_FORMAT):
    """Records of pax before one member."""

    def change(members, rng):
        for info, _ in members:
            if info.name == "000001.0.jpg":
                info.pax_headers = headers
        return members

    return change_tar(change, tar_format)


def with_pax_bytes(records: bytes, kind: bytes = tarfile.XHDTYPE):
    """Bytes in the place of pax records before the second sample."""

    def change(members, rng):
        info = tarfile.TarInfo("PaxHeaders/x")
        info.type = kind
        place = next(i for i, (member, _) in enumerate(members) if member.name.startswith("000001."))
        return [*members[:place], (info, records), *members[place:]]

    return change_tar(change, tarfile.USTAR_FORMAT)


def with_link(kind: bytes, to: str, size: int = 0):
    def change(members, rng):
        changed = []
        for info, data in members:
            if info.name == "000001.0.jpg":
                link = tarfile.TarInfo(info.name)
                link.type, link.linkname = kind, to
                changed.append((link, data[:size]))
            else:
                changed.append((info, data))
        return changed

    return change_tar(change)


def with_field(start: int, value: bytes, suffix: str = "0.jpg"):
    """Other bytes in a header, with the checksum that belongs to them."""

    def make(folder, rng):
        data = bytearray(first_tar(folder).read_bytes())
        place = data.index(b"000001." + suffix.encode())
        data[place + start : place + start + len(value)] = value
        header = data[place : place + 512]
        header[148:156] = b" " * 8
        data[place + 148 : place + 156] = b"%06o\0 " % sum(header)
        first_tar(folder).write_bytes(data)

    return make


@damages("tar", seeds=12, whole=True)
def a_flipped_bit_anywhere(folder, rng):
    flip(first_tar(folder), rng)


@damages("tar", seeds=6)
def cut_anywhere(folder, rng):
    cut(first_tar(folder), rng)


@damages("tar")
def sparse_as_gnu_tar_writes_it(folder, rng, how="gnu"):
    unpacked = folder / "unpacked"
    with tarfile.open(first_tar(folder)) as tar:
        tar.extractall(unpacked, filter="data")
    name = "000001.0.jpg"
    data = (unpacked / name).read_bytes()
    with (unpacked / name).open("wb") as file:
        file.write(data)
        file.truncate(2**20)
    options = ["--format=gnu"] if how == "gnu" else ["--format=posix", f"--sparse-version={how}"]
    names = sorted(path.name for path in unpacked.iterdir())
    subprocess.run(["tar", "-S", *options, "-cf", first_tar(folder), "-C", unpacked, *names], check=True)
    shutil.rmtree(unpacked)


for version in ("0.0", "0.1", "1.0"):
    variants(
        "tar",
        **{
            f"sparse of pax {version}": lambda folder, rng, version=version: sparse_as_gnu_tar_writes_it(
                folder, rng, version
            )
        },
    )


@damages("tar")
def a_member_is_there_again_at_the_end(folder, rng):
    members = members_of(first_tar(folder))
    again = next(member for member in members if member[0].name == "000001.0.jpg")
    first_tar(folder).write_bytes(tar_of([*members, (again[0], encoded_image(99))]))


@damages("tar")
def a_sample_is_there_again_at_the_end(folder, rng):
    """As `tar --append` updates files: for tar the later ones count."""
    members = members_of(first_tar(folder))
    again = [
        (info, encoded_image(99) if info.name.endswith("0.jpg") else data)
        for info, data in members
        if info.name.startswith("000001.")
    ]
    first_tar(folder).write_bytes(tar_of(members + again))


@damages("tar")
def samples_are_interleaved(folder, rng):
    members = members_of(first_tar(folder))
    members.sort(key=lambda member: member[0].name.partition(".")[2])
    first_tar(folder).write_bytes(tar_of(members))


def rename(old: str, new: str):
    return lambda folder, rng: (folder / old).rename(folder / new)


def repack(folder, name, suffix):
    data = (folder / name).read_bytes()
    (folder / name).unlink()
    (folder / f"{name}{suffix}").write_bytes(data)


LABELS = json.dumps({"label_0": 1.0, "label_1": 0.0})

variants(
    "tar",
    **{
        "a shard that a download has not finished": rename("00001.tar", "00001.tar.part"),
        "a shard that a browser has not finished": rename("00001.tar", "00001.tar.crdownload"),
        "a compressed shard among others": lambda folder, rng: (
            (folder / "00001.tar.gz").write_bytes(gzip.compress((folder / "00001.tar").read_bytes())),
            (folder / "00001.tar").unlink(),
        ),
        "a hidden shard of rsync": lambda folder, rng: (folder / ".00002.tar.Xy12").write_bytes(b"half"),
        "capital suffixes": with_name(lambda name: name.replace("jpg", "JPG")),
        "a key in other case": with_name(lambda name: name.replace("000001", "00000I")),
        "a name with ./": with_name(lambda name: f"./{name}"),
        "a name with //": with_name(lambda name: f".//{name}"),
        "an absolute name": with_name(lambda name: f"/data/{name}"),
        "a name that leaves": with_name(lambda name: f"x/../../{name}"),
        "a name of Windows": with_name(lambda name: f"C:\\{name}"),
        "a UNC name": with_name(lambda name: f"\\\\host\\{name}"),
        "an empty name": with_name(lambda name: ""),
        "a name of dots": with_name(lambda name: "..."),
        "a name with a line break": with_name(lambda name: f"{name}\n", tar_format=tarfile.PAX_FORMAT),
        "a name with a zero": with_name(lambda name: f"0\0{name}", tar_format=tarfile.PAX_FORMAT),
        "a name of 5000 letters": with_name(lambda name: "x" * 5000 + name, tar_format=tarfile.GNU_FORMAT),
        "a name that ends in /": with_name(lambda name: f"{name}/"),
        "a hidden member": with_name(lambda name: f".{name}"),
        "resource forks of macOS": change_tar(
            lambda members, rng: [
                member for m in members for member in ((tarfile.TarInfo(f"._{m[0].name}"), b"Mac OS X"), m)
            ]
        ),
        "folders between the members": change_tar(
            lambda members, rng: [member for m in members for member in ((folder_info("d"), b""), m)]
        ),
        "a comment in pax": with_headers({"comment": "x" * 3000}),
        "a name by pax": with_headers({"path": "000001.0.jpg"}),
        "another name by pax": with_headers({"path": "../../etc/passwd"}),
        "a charset of pax": with_headers({"hdrcharset": "BINARY"}),
        "a link name by pax": with_headers({"linkpath": "000000.0.jpg"}),
        "half a size by pax": with_pax_bytes(b"11 size=10\n"),
        "a huge size by pax": with_pax_bytes(b"28 size=99999999999999999999\n"),
        "a negative size by pax": with_pax_bytes(b"12 size=-10\n"),
        "a size by pax that is no number": with_pax_bytes(b"11 size=ab\n"),
        "pax records without a length": with_pax_bytes(b"path=x\n"),
        "pax records of length 0": with_pax_bytes(b"0 path=x\n"),
        "pax records of a huge length": with_pax_bytes(b"99999999999 path=x\n"),
        "pax records that are none": with_pax_bytes(bytes(range(256))),
        "a sparse map by pax that is none": with_pax_bytes(b"22 GNU.sparse.map=1,x\n22 GNU.sparse.major=0\n"),
        "a global name by pax": with_pax_bytes(b"20 path=same.0.jpg\n\n", tarfile.XGLTYPE),
        "a global size by pax": with_pax_bytes(b"10 size=1\n", tarfile.XGLTYPE),
        "a long name without a member": with_pax_bytes(b"000001.0.jpg\0", tarfile.GNUTYPE_LONGNAME),
        "a long link name": with_pax_bytes(b"x" * 600, tarfile.GNUTYPE_LONGLINK),
        "an empty long name": with_pax_bytes(b"", tarfile.GNUTYPE_LONGNAME),
        "a symbolic link in the tar": with_link(tarfile.SYMTYPE, "000000.0.jpg"),
        "a hard link in the tar": with_link(tarfile.LNKTYPE, "000000.0.jpg"),
        "a hard link with content": with_link(tarfile.LNKTYPE, "000000.0.jpg", 700),
        "a hard link to itself": with_link(tarfile.LNKTYPE, "000001.0.jpg"),
        "a FIFO in the tar": with_link(tarfile.FIFOTYPE, ""),
        "a block device with content": with_link(tarfile.BLKTYPE, "", 600),
        "a continued volume": with_link(b"M", "", 10**6),
        "a volume label": with_link(b"V", ""),
        "a type of nobody": with_link(b"\xff", "", 10**6),
        "an old regular type": with_field(156, b"\0"),
        "a contiguous file": with_field(156, b"7"),
        "a size of base 256": with_field(124, b"\x80" + b"\xff" * 11),
        "a negative size of base 256": with_field(124, b"\xff" * 12),
        "a size of letters": with_field(124, b"zzzzzzzzzzz\0"),
        "a size of spaces": with_field(124, b" " * 12),
        "a size of zero": with_field(124, b"0" * 11 + b"\0"),
        "a size one less": with_field(124, b"%011o\0" % 300, "txt"),
        "no magic": with_field(257, bytes(8)),
        "a prefix": with_field(345, b"deep/er"),
        "a time that is none": with_field(136, b"-1 99999999\0"),
        "an empty image": with_content("0.jpg", lambda data: b""),
        "a tar for an image": with_content("0.jpg", lambda data: tar_of([("x.jpg", data)])),
        "the JSON for an image": with_content("1.jpg", lambda data: LABELS.encode()),
        "an image with a tail": with_content("0.jpg", lambda data: data + b"\0" * 700),
        "two images in one": with_content("0.jpg", lambda data: data + data),
        "half an image": with_content("0.jpg", lambda data: data[: len(data) // 2]),
        "a caption in UTF-16": with_content("txt", lambda data: data.decode().encode("utf-16")),
        "a caption in UTF-16 without a mark": with_content("txt", lambda data: data.decode().encode("utf-16-le")),
        "a caption in Latin-1": with_content("txt", lambda data: "caf\u00e9 1".encode("latin-1")),
        "a caption with a mark": with_content("txt", lambda data: b"\xef\xbb\xbf" + data),
        "a caption of Windows": with_content("txt", lambda data: data + b"\r\n"),
        "a caption with zeros": with_content("txt", lambda data: data + b"\0\0\0"),
        "a caption of zeros": with_content("txt", lambda data: bytes(len(data))),
        "a caption of a surrogate": with_content("txt", lambda data: b"caption \xed\xa0\xbd"),
        "JSON in UTF-16": with_content("json", lambda data: data.decode().encode("utf-16")),
        "JSON with a mark": with_content("json", lambda data: b"\xef\xbb\xbf" + data),
        "JSON of Windows": with_content("json", lambda data: data.replace(b", ", b",\r\n")),
        "JSON with a zero": with_content("json", lambda data: data + b"\0"),
        "JSON twice": with_content("json", lambda data: data + data),
        "JSON with contradicting labels": with_content(
            "json", lambda data: data[:-1] + b', "label_0": 1.0, "label_1": 0.0}'
        ),
        "JSON with equal labels twice": with_content("json", lambda data: data[:-1] + b"," + data[1:]),
        "JSON of a million brackets": with_content("json", lambda data: b'{"x":' + b"[" * 10**6 + b"]" * 10**6 + b"}"),
        "JSON of 9999 digits": with_content("json", lambda data: b'{"label_0": ' + b"1" * 9999 + b', "label_1": 0}'),
        "labels of 1e999": with_content("json", lambda data: b'{"label_0": 1e999, "label_1": 0}'),
        "labels as booleans": with_content("json", lambda data: b'{"label_0": true, "label_1": false}'),
        "labels in a list": with_content("json", lambda data: b'{"label_0": [1], "label_1": [0]}'),
        "labels named in capitals": with_content("json", lambda data: data.replace(b"label", b"Label")),
        **in_place_of("00000.tar"),
    },
)
variants(
    "tar",
    # The name of the tar file is part of the ids of its images.
    **{
        "a shard with its suffix in capitals": rename("00001.tar", "00001.TAR"),
        "the JSON of another sample": with_content("json", lambda data: LABELS.encode()),
    },
    whole=True,
)


def folder_info(name: str) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type = tarfile.DIRTYPE
    return info


# ----------------------------------------------------------------------------------------------------------------------
# Parquet: data/train-0000N-of-00002-*.parquet of Pick-a-Pic


def first_parquet(folder: Path) -> Path:
    return sorted((folder / "data").iterdir())[0]


def change_table(change: Callable[[pa.Table], pa.Table], **options):
    def make(folder, rng):
        file = first_parquet(folder)
        pq.write_table(change(pq.read_table(file)), file, **options)

    return make


def same(table):
    return table


def with_column(name: str, change: Callable[[pa.ChunkedArray], pa.Array], new: str | None = None):
    return change_table(lambda t: t.set_column(t.column_names.index(name), new or name, change(t[name])))


def cells(name: str, row: int, value):
    """Another value in one row."""

    def change(column):
        values = column.to_pylist()
        values[row] = value
        return pa.array(values)

    return with_column(name, change)


def invalid_text(column):
    """A text whose bytes are no UTF-8, as pyarrow passes it on."""
    values = [text.encode() for text in column.to_pylist()]
    values[1] = b"caf\xe9 \xff"
    array = pa.array(values, pa.binary())
    return pa.Array.from_buffers(pa.string(), len(array), array.buffers())


def struct_of(column):
    return pa.array([{"bytes": data, "path": None} for data in column.to_pylist()])


@damages("parquet", seeds=16)
def a_flipped_bit_in_the_pages(folder, rng):
    file = first_parquet(folder)
    footer = int.from_bytes(file.read_bytes()[-8:-4], "little") + 8
    flip(file, rng, 4, file.stat().st_size - footer)


@damages("parquet", seeds=24)
def a_flipped_bit_in_the_footer(folder, rng):
    file = first_parquet(folder)
    footer = int.from_bytes(file.read_bytes()[-8:-4], "little") + 8
    flip(file, rng, file.stat().st_size - footer)


@damages("parquet", seeds=4)
def cut_parquet(folder, rng):
    cut(first_parquet(folder), rng)


@damages("parquet")
def two_files_joined(folder, rng):
    first, second = sorted((folder / "data").iterdir())
    rewrite(first, lambda data: data + second.read_bytes())


@damages("parquet")
def the_footer_of_the_other_file(folder, rng):
    first, second = (path.read_bytes() for path in sorted((folder / "data").iterdir()))
    ends = [int.from_bytes(data[-8:-4], "little") + 8 for data in (first, second)]
    first_parquet(folder).write_bytes(first[: -ends[0]] + second[-ends[1] :])


def of_zero_rows(folder, rng):
    file = first_parquet(folder)
    shutil.copy(file, file.with_name(file.name.replace("00000-of-00002", "00002-of-00003")))
    extra = file.with_name(file.name.replace("00000-of-00002", "00002-of-00003"))
    pq.write_table(pq.read_table(extra).slice(0, 0), extra)


def rename_parquet(new):
    def make(folder, rng):
        file = sorted((folder / "data").iterdir())[1]
        file.rename(file.with_name(new(file.name)))

    return make


variants(
    "parquet",
    **{
        **{
            f"compressed with {codec}": change_table(same, compression=codec)
            for codec in ("gzip", "brotli", "zstd", "lz4")
        },
        "not compressed": change_table(same, compression="none"),
        "a row in each group": change_table(same, row_group_size=1),
        "one group": change_table(same, row_group_size=100),
        "pages of version 2": change_table(same, data_page_version="2.0"),
        "parquet 1.0": change_table(
            lambda t: t.set_column(
                t.column_names.index("created_at"), "created_at", t["created_at"].cast(pa.timestamp("us"))
            ),
            version="1.0",
        ),
        "no dictionary": change_table(same, use_dictionary=False),
        "split into streams": change_table(same, use_dictionary=False, use_byte_stream_split=["label_0", "label_1"]),
        "no statistics": change_table(same, write_statistics=False),
        "columns in another order": change_table(lambda t: t.select(t.column_names[::-1])),
        "captions large": with_column("caption", lambda c: c.cast(pa.large_string())),
        "captions a dictionary": with_column("caption", lambda c: c.combine_chunks().dictionary_encode()),
        "captions bytes": with_column("caption", lambda c: c.cast(pa.binary())),
        "captions a list": with_column("caption", lambda c: pa.array([[text] for text in c.to_pylist()])),
        "captions numbers": with_column("caption", lambda c: pa.array(range(len(c)))),
        "captions not UTF-8": with_column("caption", invalid_text),
        "a caption with a mark": cells("caption", 1, "\ufeffcaption 1"),
        "a caption of UTF-16": cells("caption", 1, "c\0a\0t\0"),
        "a caption of zeros": cells("caption", 1, "\0\0\0"),
        "images a structure": with_column("jpg_0", struct_of),
        "images large": with_column("jpg_0", lambda c: c.cast(pa.large_binary())),
        "images texts": with_column("jpg_0", lambda c: pa.array([data.hex() for data in c.to_pylist()])),
        "images a list of numbers": with_column("jpg_0", lambda c: pa.array([list(data) for data in c.to_pylist()])),
        "an image empty": cells("jpg_1", 1, b""),
        "an image in base64": cells("jpg_1", 1, b"/9j/4AAQSkZJRg=="),
        "labels texts": with_column("label_0", lambda c: pa.array([str(x) for x in c.to_pylist()])),
        "labels booleans": with_column("label_0", lambda c: pa.array([bool(x) for x in c.to_pylist()])),
        "labels integers": with_column("label_0", lambda c: c.cast(pa.int8())),
        "labels half floats": with_column("label_0", lambda c: pa.array(np.float16(c.to_pylist()))),
        "labels decimals": with_column("label_0", lambda c: c.cast(pa.decimal128(5, 2))),
        "labels in a list": with_column("label_0", lambda c: pa.array([[x] for x in c.to_pylist()])),
        "a label of infinity": cells("label_0", 1, float("inf")),
        "a label of 1 + 1e-9": cells("label_0", 0, 1 + 1e-9),
        "both labels 1": cells("label_1", 0, 1.0),
        "has_label null": with_column("has_label", lambda c: pa.nulls(len(c))),
        "has_label texts": with_column("has_label", lambda c: pa.array(["True"] * len(c))),
        "has_label 2": with_column("has_label", lambda c: pa.array([2] * len(c))),
        "has_label of time": with_column("has_label", lambda c: pa.array([0] * len(c), pa.timestamp("s"))),
        "ids null": cells("image_0_uid", 1, None),
        "ids bytes": with_column("image_0_uid", lambda c: c.cast(pa.binary())),
        "a column twice": change_table(lambda t: t.append_column("caption", pa.array(["another"] * len(t)))),
        "a label column twice": change_table(lambda t: t.append_column("label_0", pa.array([0.0] * len(t)))),
        "a column named in capitals too": change_table(
            lambda t: t.append_column("Caption", pa.array(["another"] * len(t)))
        ),
        "a column named in capitals": change_table(
            lambda t: t.rename_columns({"caption": "Caption"}) if isinstance(t, pa.Table) else t
        ),
        "columns in a structure": change_table(
            lambda t: pa.table({"row": pa.array(t.select(["caption", "label_0"]).to_pylist())})
        ),
        "a nested column more": change_table(
            lambda t: t.append_column("more", pa.array([[{"a": [1, None]}, None]] * len(t)))
        ),
        "a file of no rows among others": of_zero_rows,
        "a file with its suffix in capitals": rename_parquet(lambda name: name.replace(".parquet", ".PARQUET")),
        "a file that a download has not finished": rename_parquet(lambda name: f"{name}.incomplete"),
        "a file that is missing": lambda folder, rng: sorted((folder / "data").iterdir())[1].unlink(),
        "CSV": lambda folder, rng: first_parquet(folder).write_text("caption,jpg_0\nx,y\n"),
        "Arrow": lambda folder, rng: write_arrow(first_parquet(folder)),
        "the mark of encryption": lambda folder, rng: rewrite(first_parquet(folder), lambda d: d[:-4] + b"PARE"),
        "no mark at the begin": lambda folder, rng: rewrite(first_parquet(folder), lambda d: b"XXXX" + d[4:]),
        "a huge footer": lambda folder, rng: rewrite(
            first_parquet(folder), lambda d: d[:-8] + b"\xff\xff\xff\x7f" + d[-4:]
        ),
        "a footer of nothing": lambda folder, rng: rewrite(first_parquet(folder), lambda d: d[:-8] + bytes(4) + d[-4:]),
        "bytes behind the end": lambda folder, rng: rewrite(first_parquet(folder), lambda d: d + b"\n"),
        "bytes before the begin": lambda folder, rng: rewrite(first_parquet(folder), lambda d: b"\n" + d),
        **in_place_of("train-00000*.parquet"),
    },
)


variants(
    "parquet",
    **{
        "ids numbers": with_column(
            "image_0_uid", lambda c: pa.array([int(x.split("-")[0]) + 2**62 for x in c.to_pylist()])
        ),
    },
    whole=True,
)


def write_arrow(file: Path) -> None:
    table = pq.read_table(file)
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)


# ----------------------------------------------------------------------------------------------------------------------
# JSONL: pairs.jsonl and its images


def lines_of(folder: Path) -> list[bytes]:
    return (folder / "pairs.jsonl").read_bytes().splitlines()


def change_lines(change: Callable[[list[bytes]], bytes]):
    return lambda folder, rng: (folder / "pairs.jsonl").write_bytes(change(lines_of(folder)))


def change_line(change: Callable[[bytes], bytes], row: int = 1):
    return change_lines(
        lambda lines: b"\n".join(change(line) if i == row else line for i, line in enumerate(lines)) + b"\n"
    )


def change_record(row: int = 1, **fields):
    return change_line(lambda line: json.dumps(json.loads(line) | fields).encode(), row)


def change_image(change: Callable[[Path], None], name: str = "1-winner.jpg"):
    return lambda folder, rng: change(folder / "images" / name)


def png_with(**options) -> bytes:
    file = io.BytesIO()
    Image.open(io.BytesIO(encoded_image(2, image_format="PNG"))).save(file, "PNG", **options)
    return file.getvalue()


def png_chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def image_in(image_format: str, **options) -> Callable[[Path], None]:
    def write(path):
        file = io.BytesIO()
        Image.open(path).convert("RGB").save(file, image_format, **options)
        path.write_bytes(file.getvalue())

    return write


def bomb(path: Path) -> None:
    """A PNG with a text that is a thousand times as large as the file."""
    text = PngImagePlugin.PngInfo()
    text.add_text("x", "y" * (64 * 2**20), zip=True)
    path.write_bytes(png_with(pnginfo=text))


def replaced(path: Path, make: Callable[[Path], None]) -> None:
    path.unlink()
    make(path)


@damages("jsonl", seeds=8, whole=True)
def a_flipped_bit_in_the_lines(folder, rng):
    flip(folder / "pairs.jsonl", rng)


@damages("jsonl", seeds=8, whole=True)
def a_flipped_bit_in_an_image(folder, rng):
    flip(folder / "images" / "1-winner.jpg", rng)


@damages("jsonl", seeds=3)
def a_cut_image(folder, rng):
    cut(folder / "images" / "1-winner.jpg", rng)


variants(
    "jsonl",
    **{
        "a mark": change_lines(lambda lines: b"\xef\xbb\xbf" + b"\n".join(lines)),
        "a mark in each line": change_lines(lambda lines: b"\n".join(b"\xef\xbb\xbf" + line for line in lines)),
        "UTF-16": change_lines(lambda lines: b"\n".join(lines).decode().encode("utf-16")),
        "UTF-32": change_lines(lambda lines: b"\n".join(lines).decode().encode("utf-32")),
        "lines of Windows": change_lines(lambda lines: b"\r\n".join(lines)),
        "lines of an old Mac": change_lines(lambda lines: b"\r".join(lines)),
        "blank lines": change_lines(lambda lines: b"\n \n\t\n".join(lines) + b"\n\n"),
        "no end of the last line": change_lines(b"\n".join),
        "zeros at the end": change_lines(lambda lines: b"\n".join(lines) + b"\n" + bytes(4096)),
        "zeros in the middle": change_lines(lambda lines: b"\n".join([*lines[:2], bytes(600), *lines[2:]]) + b"\n"),
        "a list": change_lines(lambda lines: b"[" + b",\n".join(lines) + b"]"),
        "objects over several lines": change_lines(
            lambda lines: "\n".join(json.dumps(json.loads(line), indent=1) for line in lines).encode()
        ),
        "two objects in a line": change_lines(lambda lines: b"\n".join([lines[0] + lines[1], *lines[2:]])),
        "a line in Latin-1": change_line(lambda line: line.replace(b"caption 1", "caf\u00e9".encode("latin-1"))),
        "a line of Python": change_line(lambda line: line.replace(b'"', b"'")),
        "a comma at the end": change_line(lambda line: line.replace(b"}", b",}")),
        "a comment": change_line(lambda line: line + b" // the best one"),
        "a line cut": change_line(lambda line: line[:-9]),
        "keys that contradict": change_line(lambda line: line.replace(b"}", b', "winner": "images/1-loser.jpg"}')),
        "keys that swap": change_line(
            lambda line: line.replace(b"}", b', "winner": "images/1-loser.jpg", "loser": "images/1-winner.jpg"}')
        ),
        "a key twice, the same": change_line(lambda line: line.replace(b"}", b', "prompt": "caption 1"}')),
        "deep": change_line(lambda line: line.replace(b"}", b', "x": ' + b"[" * 200_000 + b"]" * 200_000 + b"}")),
        "5000 digits": change_line(lambda line: line.replace(b"}", b', "margin": ' + b"9" * 5000 + b"}")),
        "400 digits": change_line(lambda line: line.replace(b"}", b', "margin": ' + b"9" * 400 + b"}")),
        "1e999": change_line(lambda line: line.replace(b"}", b', "confidence": 1e999}')),
        "NaN": change_line(lambda line: line.replace(b"}", b', "confidence": NaN}')),
        "an escaped zero": change_record(prompt="caption\0 1"),
        "an escaped mark": change_record(prompt="\ufeffcaption 1"),
        "half a character": change_line(lambda line: line.replace(b"caption 1", b"caption \\ud83d")),
        "a prompt in a list": change_record(prompt=["caption 1"]),
        "a prompt of a number": change_record(prompt=1),
        "a winner in capitals": change_record(winner="Images/1-winner.jpg"),
        "a winner by URL": change_record(winner="file:///etc/passwd"),
        "a winner at home": change_record(winner="~/x.jpg"),
        "a winner with a zero": change_record(winner="images/1-winner.jpg\0.png"),
        "a winner of 5000 letters": change_record(winner="x" * 5000),
        "a winner of nothing": change_record(winner=" "),
        "a winner of .": change_record(winner="."),
        "a winner that is the list": change_record(winner="pairs.jsonl"),
        "the same two files by other names": change_record(winner="images/./1-loser.jpg"),
        "a tie of a word": change_record(tie="maybe"),
        "a tie of 2": change_record(tie=2),
        "a confidence of a text": change_record(confidence="0.9"),
        "a confidence of 7": change_record(confidence=7),
        "a confidence of -1": change_record(confidence=-1),
        "models of three": change_record(models=["a", "b", "c"]),
        "an image that is a link within": change_image(
            lambda path: (path.rename(path.with_name("real")), path.symlink_to("real"))
        ),
        "an image that is a link out": change_image(lambda path: replaced(path, lambda p: p.symlink_to("/etc/hosts"))),
        "an image that is a loop": change_image(lambda path: replaced(path, lambda p: p.symlink_to(p.name))),
        "an image that is a FIFO": change_image(lambda path: replaced(path, os.mkfifo)),
        "an image that is a folder": change_image(lambda path: replaced(path, Path.mkdir)),
        "an image that is a hard link": change_image(lambda path: path.with_name("hard").hardlink_to(path)),
        "an image that is a hole of 1 TB": change_image(lambda path: os.truncate(path, 2**40)),
        "an image by a name that differs in case": change_image(lambda path: path.rename(path.with_suffix(".JPG"))),
        "an image in case twice": change_image(
            lambda path: shutil.copy(path.with_name("2-winner.jpg"), path.with_suffix(".JPG"))
        ),
        "an image of HTML": change_image(lambda path: path.write_bytes(b"<html>")),
        "an image of zeros": change_image(lambda path: path.write_bytes(bytes(3000))),
        "an image with a tail of zeros": change_image(lambda path: path.write_bytes(path.read_bytes() + bytes(4096))),
        "an image after a line break": change_image(lambda path: path.write_bytes(b"\r\n" + path.read_bytes())),
        "an image of BMP": change_image(image_in("BMP")),
        "an image of TIFF": change_image(image_in("TIFF")),
        "an image of GIF": change_image(image_in("GIF")),
        "an image of AVIF": change_image(
            lambda path: path.write_bytes(b"\0\0\0\x1cftypavif\0\0\0\0avifmif1miaf" + bytes(500))
        ),
        "an image of SVG": change_image(lambda path: path.write_bytes(b'<svg xmlns="http://www.w3.org/2000/svg"/>')),
        "an image whose text is a bomb": change_image(bomb),
        "an image of a wrong checksum": change_image(
            lambda path: path.write_bytes(
                (lambda d: d[: d.index(b"IDAT") + 40] + b"\xff" + d[d.index(b"IDAT") + 41 :])(png_with())
            )
        ),
        "an image without its end": change_image(
            lambda path: (image_in("PNG")(path), path.write_bytes(path.read_bytes()[:-12]))
        ),
        "an image of two headers": change_image(
            lambda path: path.write_bytes(
                (lambda d: d[:33] + png_chunk(b"IHDR", struct.pack(">IIBBBBB", 9, 9, 8, 2, 0, 0, 0)) + d[33:])(
                    png_with()
                )
            )
        ),
        "an image of a negative size": change_image(
            lambda path: path.write_bytes(
                b"\x89PNG\r\n\x1a\n"
                + png_chunk(b"IHDR", struct.pack(">IIBBBBB", 2**32 - 1, 48, 8, 2, 0, 0, 0))
                + png_with()[33:]
            )
        ),
        **{f"pairs.jsonl is {name}": make for name, make in in_place_of("pairs.jsonl").items()},
    },
)

variants(
    "jsonl",
    # JPEG has no checksum.
    **{"an image sent as text": change_image(lambda path: path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n")))},
    whole=True,
)

# ----------------------------------------------------------------------------------------------------------------------
# JSON lists: train.json of HPDv2


def hpd_records(folder: Path) -> list[dict]:
    return json.loads((folder / "train.json").read_text())


def change_json(change: Callable[[bytes], bytes]):
    return lambda folder, rng: rewrite(folder / "train.json", change)


@damages("json", seeds=6, whole=True)
def a_flipped_bit_in_the_list(folder, rng):
    flip(folder / "train.json", rng)


@damages("json", seeds=4)
def a_cut_list(folder, rng):
    cut(folder / "train.json", rng)


variants(
    "json",
    **{
        "a mark": change_json(lambda data: b"\xef\xbb\xbf" + data),
        "UTF-16": change_json(lambda data: data.decode().encode("utf-16")),
        "lines of Windows": change_json(lambda data: data.replace(b"}, ", b"},\r\n")),
        "two lists": change_json(lambda data: data + data),
        "a list in a list": change_json(lambda data: b"[" + data + b"]"),
        "a comma at the end": change_json(lambda data: data[:-1] + b",]"),
        "lines": change_json(lambda data: data[1:-1].replace(b"}, {", b"}\n{")),
        "zeros at the end": change_json(lambda data: data + bytes(100)),
        "a prompt in Latin-1": change_json(lambda data: data.replace(b"caption 1", "caf\u00e9 1".encode("latin-1"), 1)),
        "a prompt with an escaped zero": change_json(lambda data: data.replace(b"caption 1", b"caption \\u00001", 1)),
        "a null among them": change_json(lambda data: data[:-1] + b", null]"),
        "preferences that contradict": change_json(
            lambda data: data.replace(b'"user_hash": "u"}', b'"human_preference": [0, 1]}', 1)
        ),
        "deep": change_json(lambda data: data[:-1] + b"," + b"[" * 100_000 + b"]" * 100_000 + b"]"),
        **{f"train.json is {name}": make for name, make in in_place_of("train.json").items()},
    },
)

# ----------------------------------------------------------------------------------------------------------------------
# Prompts: a folder with prompts.EXT; the first of the seven lines is a header where there is one

PROMPTS = [f"a red circle, number {i}" for i in range(6)]


def change_prompts(name: str, change: Callable[[bytes], bytes]):
    """Writes prompts.EXT in the place of prompts.txt; `change` is of its whole content."""

    def make(folder, rng):
        (folder / "prompts.txt").unlink()
        (folder / f"prompts{name}").write_bytes(change(whole_prompts(name)))

    return make


def whole_prompts(suffix: str) -> bytes:
    if suffix == ".csv":
        return "\n".join(["prompt,id", *(f'"{text}",{i}' for i, text in enumerate(PROMPTS))]).encode() + b"\n"
    if suffix == ".tsv":
        return "\n".join(["Prompt\tid", *(f"{text}\t{i}" for i, text in enumerate(PROMPTS))]).encode() + b"\n"
    if suffix == ".jsonl":
        return "".join(json.dumps({"prompt": text}) + "\n" for text in PROMPTS).encode()
    if suffix == ".json":
        return json.dumps({f"key {i}": text for i, text in enumerate(PROMPTS)}).encode()
    if suffix == ".parquet":
        file = io.BytesIO()
        pq.write_table(pa.table({"prompt": PROMPTS, "id": list(range(6))}), file, write_page_checksum=True)
        return file.getvalue()
    return "".join(f"{text}\n" for text in PROMPTS).encode()


def recoded(encoding: str):
    return lambda data: data.decode().encode(encoding)


TEXTS_OF = (".txt", ".csv", ".tsv", ".jsonl", ".json")
for kind in TEXTS_OF:
    variants(
        "prompts",
        **{
            f"{kind[1:]} as it is": change_prompts(kind, lambda data: data),
            f"{kind[1:]} with a mark": change_prompts(kind, lambda data: b"\xef\xbb\xbf" + data),
            f"{kind[1:]} in UTF-16": change_prompts(kind, recoded("utf-16")),
            f"{kind[1:]} in UTF-16 without a mark": change_prompts(kind, recoded("utf-16-le")),
            f"{kind[1:]} in UTF-32 without a mark": change_prompts(kind, recoded("utf-32-le")),
            f"{kind[1:]} in Latin-1": change_prompts(
                kind, lambda data: data.replace(b"red", "ros\u00e9".encode("latin-1"))
            ),
            f"{kind[1:]} of Windows": change_prompts(
                kind, lambda data: data.replace(b', "', b',\r\n"').replace(b"\n", b"\r\n")
            ),
            f"{kind[1:]} with zeros at the end": change_prompts(kind, lambda data: data + bytes(512)),
            f"{kind[1:]} with a zero in a prompt": change_prompts(kind, lambda data: data.replace(b"red", b"re\0d", 1)),
            f"{kind[1:]} of zeros": change_prompts(kind, lambda data: bytes(len(data))),
        },
    )
variants(
    "prompts",
    **{
        "json with a key twice": change_prompts(".json", lambda data: data.replace(b'"key 3"', b'"key 2"')),
        "jsonl with a key twice": change_prompts(
            ".jsonl", lambda data: data.replace(b"}", b', "prompt": "another"}', 1)
        ),
        "jsonl in a list": change_prompts(".jsonl", lambda data: b"[" + data.replace(b"\n", b",")[:-1] + b"]"),
        "jsonl with an escaped zero": change_prompts(".jsonl", lambda data: data.replace(b"red", b"re\\u0000d", 1)),
        "csv with a column twice": change_prompts(
            ".csv", lambda data: data.replace(b"\n", b",another\n").replace(b"id,another", b"id,prompt", 1)
        ),
        "tsv with a column twice": change_prompts(
            ".tsv", lambda data: data.replace(b"\n", b"\tanother\n").replace(b"id\tanother", b"id\tPrompt", 1)
        ),
        "csv of semicolons": change_prompts(".csv", lambda data: data.replace(b'",', b'";').replace(b"t,i", b"t;i")),
        "csv with an open quote": change_prompts(".csv", lambda data: data.replace(b'0",', b"0,", 1)),
        "csv with a row short": change_prompts(".csv", lambda data: data.replace(b'"a red circle, number 2",2', b" ")),
        "csv with a row long": change_prompts(".csv", lambda data: data.replace(b",2\n", b",2,3,4\n")),
        "csv without a header": change_prompts(".csv", lambda data: data.split(b"\n", 1)[1]),
        "csv cut in quotes": change_prompts(".csv", lambda data: data[:-8]),
        "txt of an old Mac": change_prompts(".txt", lambda data: data.replace(b"\n", b"\r")),
        "txt named PROMPTS.TXT": lambda folder, rng: (folder / "prompts.txt").rename(folder / "PROMPTS.TXT"),
        "json deep": change_prompts(".json", lambda data: b"[" * 300_000 + b"]" * 300_000),
        "json of 5000 digits": change_prompts(".json", lambda data: data[:-1] + b', "x": ' + b"9" * 5000 + b"}"),
        "parquet as it is": change_prompts(".parquet", lambda data: data),
        "parquet with a column twice": change_prompts(".parquet", lambda data: table_twice()),
        "parquet of bytes": change_prompts(".parquet", lambda data: of_bytes()),
        "parquet with a zero": change_prompts(".parquet", lambda data: of_table({"prompt": [*PROMPTS[1:], "a\0b"]})),
        "parquet with a null": change_prompts(".parquet", lambda data: of_table({"prompt": [*PROMPTS[1:], None]})),
        "parquet of lists": change_prompts(".parquet", lambda data: of_table({"prompt": [[text] for text in PROMPTS]})),
        "parquet that is CSV": change_prompts(".parquet", lambda data: whole_prompts(".csv")),
        "csv that is parquet": change_prompts(".csv", lambda data: whole_prompts(".parquet")),
    },
)


def of_table(columns: dict | pa.Table) -> bytes:
    file = io.BytesIO()
    pq.write_table(columns if isinstance(columns, pa.Table) else pa.table(columns), file)
    return file.getvalue()


def table_twice() -> bytes:
    return of_table(pa.table([pa.array(PROMPTS), pa.array(PROMPTS[::-1])], names=["prompt", "prompt"]))


def of_bytes() -> bytes:
    return of_table({"prompt": [text.encode() for text in PROMPTS]})


@damages("prompts", seeds=10)
def a_flipped_bit_in_prompts_parquet(folder, rng):
    change_prompts(".parquet", lambda data: data)(folder, rng)
    flip(folder / "prompts.parquet", rng)


# A folder of several files, as HPDv2's benchmark


def benchmark(change: Callable[[Path], None], suffix: str = ".json"):
    def make(folder, rng):
        (folder / "prompts.txt").unlink()
        for name, some in (("anime", PROMPTS[:3]), ("photo", PROMPTS[3:])):
            data = json.dumps(some).encode() if suffix == ".json" else of_table({"prompt": some})
            (folder / f"{name}{suffix}").write_bytes(data)
        change(folder)

    return make


variants(
    "prompts",
    **{
        "a benchmark": benchmark(lambda folder: None),
        "a benchmark with a suffix in capitals": benchmark(
            lambda folder: (folder / "photo.json").rename(folder / "photo.JSON")
        ),
        "a benchmark that is not downloaded": benchmark(
            lambda folder: (folder / "photo.json").rename(folder / "photo.json.incomplete")
        ),
        "a benchmark that is compressed": benchmark(
            lambda folder: (folder / "photo.json").rename(folder / "photo.json.gz")
        ),
        "a benchmark of parquet not downloaded": benchmark(
            lambda folder: (folder / "photo.parquet").rename(folder / "photo.parquet.part"), ".parquet"
        ),
    },
)

# ----------------------------------------------------------------------------------------------------------------------
# Safetensors: of a checkpoint's networks, and of a LoRA


def parts(data: bytes) -> tuple[dict, bytes]:
    end = 8 + int.from_bytes(data[:8], "little")
    return json.loads(data[8:end]), data[end:]


def joined(header: dict | bytes, data: bytes, size: int | None = None) -> bytes:
    header = header if isinstance(header, bytes) else json.dumps(header, separators=(",", ":")).encode()
    return (len(header) if size is None else size).to_bytes(8, "little") + header + data


def largest(header: dict) -> str:
    names = [name for name in header if name != "__metadata__"]
    return max(names, key=lambda name: header[name]["data_offsets"][1] - header[name]["data_offsets"][0])


def change_header(change: Callable[[dict, str], object]):
    """Changes the parsed header; `change(header, name)`, of the largest tensor."""

    def rewritten(data):
        header, body = parts(data)
        changed = change(header, largest(header))
        return joined(header if changed is None else changed, body)

    return rewritten


def change_tensor(change: Callable[[np.ndarray], np.ndarray], last: bool = False):
    def rewritten(data):
        header, _ = parts(data)
        file = Path(os.environ.get("TMPDIR", "/tmp")) / f"attack-{os.getpid()}.safetensors"
        file.write_bytes(data)
        tensors = load_file(file)
        name = sorted(tensors)[-1] if last else largest(header)
        tensors[name] = np.ascontiguousarray(change(tensors[name]))
        save_file(tensors, file, metadata=header.get("__metadata__"))
        try:
            return file.read_bytes()
        finally:
            file.unlink()

    return rewritten


def patch(header, name, **fields):
    header[name].update(fields)


def shifted(header, name, by):
    header[name]["data_offsets"] = [place + by for place in header[name]["data_offsets"]]


def twice(data: bytes) -> bytes:
    """The header names a tensor twice."""
    header, body = parts(data)
    name = largest(header)
    text = json.dumps(header, separators=(",", ":")).encode()
    again = json.dumps({name: header[name]}, separators=(",", ":")).encode()
    return joined(text[:-1] + b"," + again[1:], body)


HEADER = {
    "a header longer than the file": lambda data: joined(parts(data)[0], parts(data)[1], 2**40),
    "a header of 2^63": lambda data: joined(parts(data)[0], parts(data)[1], 2**63),
    "a header of nothing": lambda data: joined(parts(data)[0], parts(data)[1], 0),
    "a header one short": lambda data: (
        (len(data) and (int.from_bytes(data[:8], "little") - 1).to_bytes(8, "little")) + data[8:]
    ),
    "a header that takes in the data": lambda data: (
        (int.from_bytes(data[:8], "little") + 64).to_bytes(8, "little") + data[8:]
    ),
    "the length in another order": lambda data: data[:8][::-1] + data[8:],
    "a header with a mark": change_header(lambda h, n: b"\xef\xbb\xbf" + json.dumps(h).encode()),
    "a header in UTF-16": change_header(lambda h, n: json.dumps(h).encode("utf-16")),
    "a header of spaces before": change_header(lambda h, n: b"   " + json.dumps(h).encode()),
    "a header of spaces behind": change_header(lambda h, n: json.dumps(h).encode() + b" " * 1000),
    "a header with a zero behind": change_header(lambda h, n: json.dumps(h).encode() + b"\0"),
    "a header that is a list": change_header(lambda h, n: b"[]"),
    "a header that is empty": change_header(lambda h, n: b"{}"),
    "a header that is deep": change_header(lambda h, n: b'{"x":' + b"[" * 10_000 + b"]" * 10_000 + b"}"),
    "a tensor twice": twice,
    "metadata of numbers": change_header(lambda h, n: h.update(__metadata__={"a": 1})),
    "metadata null": change_header(lambda h, n: h.update(__metadata__=None)),
    "metadata of a lot": change_header(
        lambda h, n: h.update(__metadata__={**h.get("__metadata__", {}), "a": "x" * 10**6})
    ),
    "a dtype of I32": change_header(lambda h, n: patch(h, n, dtype="I32")),
    "a dtype of U8 and four times the columns": change_header(
        lambda h, n: patch(h, n, dtype="U8", shape=[*h[n]["shape"][:-1], h[n]["shape"][-1] * 4])
    ),
    "a dtype of F64": change_header(lambda h, n: patch(h, n, dtype="F64")),
    "a dtype of nobody": change_header(lambda h, n: patch(h, n, dtype="F31")),
    "a dtype in small letters": change_header(lambda h, n: patch(h, n, dtype="f32")),
    "a dtype null": change_header(lambda h, n: patch(h, n, dtype=None)),
    "a dtype of 8 bits": change_header(
        lambda h, n: patch(h, n, dtype="F8_E4M3", shape=[*h[n]["shape"][:-1], h[n]["shape"][-1] * 4])
    ),
    "a dtype of 4 bits": change_header(
        lambda h, n: patch(h, n, dtype="F4", shape=[*h[n]["shape"][:-1], h[n]["shape"][-1] * 8])
    ),
    "a dtype of complex numbers": change_header(lambda h, n: patch(h, n, dtype="C64")),
    "offsets that overlap": change_header(lambda h, n: shifted(h, n, -4)),
    "offsets with a gap": change_header(lambda h, n: shifted(h, n, 4)),
    "offsets beyond the end": change_header(lambda h, n: shifted(h, n, 10**9)),
    "offsets the other way round": change_header(lambda h, n: patch(h, n, data_offsets=h[n]["data_offsets"][::-1])),
    "offsets below zero": change_header(lambda h, n: patch(h, n, data_offsets=[-4, h[n]["data_offsets"][1]])),
    "offsets of 2^64": change_header(lambda h, n: patch(h, n, data_offsets=[2**64 - 4, 2**64])),
    "offsets of halves": change_header(lambda h, n: patch(h, n, data_offsets=[0.5, 4.5])),
    "offsets of another tensor": change_header(
        lambda h, n: patch(h, n, data_offsets=h[next(k for k in h if k not in (n, "__metadata__"))]["data_offsets"])
    ),
    "a shape of one dimension": change_header(lambda h, n: patch(h, n, shape=[int(np.prod(h[n]["shape"]))])),
    "a shape with a one": change_header(lambda h, n: patch(h, n, shape=[*h[n]["shape"], 1])),
    "a shape of nothing": change_header(lambda h, n: patch(h, n, shape=[])),
    "a shape with a zero": change_header(lambda h, n: patch(h, n, shape=[0, *h[n]["shape"]])),
    "a shape below zero": change_header(lambda h, n: patch(h, n, shape=[-1])),
    "a shape that overflows": change_header(lambda h, n: patch(h, n, shape=[2**32, 2**32])),
    "a shape of texts": change_header(lambda h, n: patch(h, n, shape=["8"])),
    "a name in capitals": change_header(lambda h, n: h.update({n.upper(): h.pop(n)})),
    "a name with a zero": change_header(lambda h, n: h.update({f"{n}\0": h.pop(n)})),
    "a name with a prefix": change_header(lambda h, n: h.update({f"module.{n}": h.pop(n)})),
    "bytes behind the data": lambda data: data + bytes(64),
    "one byte less": lambda data: data[:-1],
    "NaN in the last place": change_tensor(
        lambda x: np.concatenate([x.reshape(-1)[:-1], np.array([np.nan], x.dtype)]).reshape(x.shape)
    ),
    "infinity": change_tensor(
        lambda x: np.where(np.arange(x.size).reshape(x.shape) == 3, np.array(-np.inf, x.dtype), x)
    ),
    "numbers of float64 beyond float32": change_tensor(lambda x: np.float64(x) * 1e300),
    "integers": change_tensor(lambda x: np.int64(x * 100)),
    "booleans": change_tensor(lambda x: x > 0),
    "a pickle": lambda data: b"\x80\x02}q\x00." + bytes(100),
    "a zip": lambda data: zip_of(data),
    "a GGUF": lambda data: b"GGUF\x03\0\0\0" + bytes(64),
    "an HDF5": lambda data: b"\x89HDF\r\n\x1a\n" + bytes(64),
    "two files": lambda data: data + data,
}


def zip_of(data: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("data.pkl", data)
    return file.getvalue()


WEIGHTS = "vae/diffusion_pytorch_model.safetensors"


def change_file(name: str, change: Callable[[bytes], bytes]):
    return lambda folder, rng: rewrite(folder / name, change)


for name, change in HEADER.items():
    variants("safetensors", **{name: change_file(WEIGHTS, change)})
    # Without metadata, alpha is the rank.
    variants("lora", **{name: change_file("lora.safetensors", change)}, whole=name == "metadata null")


@damages("safetensors", seeds=10, whole=True)
def a_flipped_bit_of_a_header(folder, rng):
    file = folder / WEIGHTS
    flip(file, rng, 0, 8 + int.from_bytes(file.read_bytes()[:8], "little"))


@damages("lora", seeds=10, whole=True)
def a_flipped_bit_of_a_lora_header(folder, rng):
    file = folder / "lora.safetensors"
    flip(file, rng, 0, 8 + int.from_bytes(file.read_bytes()[:8], "little"))


@damages("safetensors", seeds=4, whole=True)
def a_flipped_bit_of_the_weights(folder, rng):
    file = folder / WEIGHTS
    flip(file, rng, 8 + int.from_bytes(file.read_bytes()[:8], "little"))


@damages("safetensors", seeds=2)
def cut_weights(folder, rng):
    cut(folder / WEIGHTS, rng)


def in_shards(change: Callable[[Path, dict], None]):
    """The UNet in two shards with an index; `change(folder, index)`."""

    def make(folder, rng):
        unet = folder / "unet"
        stem = "diffusion_pytorch_model"
        tensors = load_file(unet / f"{stem}.safetensors")
        (unet / f"{stem}.safetensors").unlink()
        names = sorted(tensors)
        half = len(names) // 2
        index = {}
        for number, some in enumerate((names[:half], names[half:]), 1):
            shard = f"{stem}-{number:05d}-of-00002.safetensors"
            save_file({name: tensors[name] for name in some}, unet / shard)
            index |= dict.fromkeys(some, shard)
        changed = change(unet, index)
        text = changed if isinstance(changed, str) else json.dumps({"metadata": {}, "weight_map": index})
        (unet / f"{stem}.safetensors.index.json").write_text(text)

    return make


def first_key(index):
    return sorted(index)[0]


SHARDS = [f"diffusion_pytorch_model-0000{i}-of-00002.safetensors" for i in (1, 2)]
variants(
    "safetensors",
    **{
        "shards": in_shards(lambda unet, index: None),
        "shards that are swapped": in_shards(
            lambda unet, index: (
                (unet / SHARDS[0]).rename(unet / "x"),
                (unet / SHARDS[1]).rename(unet / SHARDS[0]),
                (unet / "x").rename(unet / SHARDS[1]),
            )
        ),
        "a shard that is missing": in_shards(lambda unet, index: (unet / SHARDS[1]).unlink()),
        "a shard that is the other": in_shards(lambda unet, index: shutil.copy(unet / SHARDS[0], unet / SHARDS[1])),
        "a shard somewhere else": in_shards(
            lambda unet, index: (
                shutil.move(unet / SHARDS[1], unet.parent.parent / "stolen.safetensors"),
                index.update({k: "../../stolen.safetensors" for k, shard in index.items() if shard == SHARDS[1]}),
                None,
            )[2]
        ),
        "a shard by an absolute name": in_shards(
            lambda unet, index: index.update(
                {k: str((unet / shard).resolve()) for k, shard in index.items() if shard == SHARDS[1]}
            )
        ),
        "an index without a weight": in_shards(lambda unet, index: index.pop(first_key(index)) and None),
        "an index with one too many": in_shards(lambda unet, index: index.update(more=SHARDS[0])),
        "an index of numbers": in_shards(lambda unet, index: index.update({first_key(index): 3})),
        "an index of a folder": in_shards(lambda unet, index: index.update({first_key(index): "."})),
        "an index with a key twice": in_shards(
            lambda unet, index: json.dumps({"weight_map": index})[:-2] + f', "{first_key(index)}": "{SHARDS[1]}"}}}}'
        ),
        "an index that is cut": in_shards(lambda unet, index: json.dumps({"weight_map": index})[:-20]),
        "an index with a zero in a name": in_shards(
            lambda unet, index: index.update({first_key(index): f"{SHARDS[0]}\0"})
        ),
        "weights of the other network": lambda folder, rng: shutil.copy(
            folder / "text_encoder" / "model.safetensors", folder / WEIGHTS
        ),
        "weights in capitals": lambda folder, rng: (folder / WEIGHTS).rename(
            (folder / WEIGHTS).with_suffix(".SAFETENSORS")
        ),
        "weights not downloaded": lambda folder, rng: (folder / WEIGHTS).rename(
            (folder / WEIGHTS).with_suffix(".safetensors.incomplete")
        ),
    },
)
for name, make in in_place_of(f"unet/{Path(WEIGHTS).name}").items():
    # Safetensors has no checksum: weights may be zeros.
    variants("safetensors", **{name: make}, whole=name == "a second half of zeros")
variants("lora", **in_place_of("lora.safetensors"))


# ----------------------------------------------------------------------------------------------------------------------
# Tokenizer


def in_tokenizer(name: str, change: Callable[[bytes], bytes]):
    return change_file(f"tokenizer/{name}", change)


def change_object(file: str, change: Callable[[dict], object]):
    def rewritten(data):
        values = json.loads(data)
        changed = change(values)
        return json.dumps(values if changed is None else changed).encode()

    return change_file(file, rewritten)


def settings(**values):
    return change_object("tokenizer/tokenizer_config.json", lambda found: found.update(values))


def insert(file: str, text: bytes):
    """At the end of an object, as text, so that keys can be there twice."""
    return change_file(file, lambda data: data.rstrip()[:-1] + b", " + text + b"}")


variants(
    "tokenizer",
    **{
        "vocab with a mark": in_tokenizer("vocab.json", lambda data: b"\xef\xbb\xbf" + data),
        "vocab in UTF-16": in_tokenizer("vocab.json", recoded("utf-16")),
        "vocab in Latin-1": in_tokenizer("vocab.json", lambda data: data.replace(b'"z"', b'"\xe9"')),
        "vocab with zeros": in_tokenizer("vocab.json", lambda data: data + bytes(10)),
        "vocab with a token twice": insert("tokenizer/vocab.json", b'"a": 57'),
        "vocab with a token twice, the same": insert("tokenizer/vocab.json", b'"a": 0'),
        "vocab with ids of texts": change_object("tokenizer/vocab.json", lambda v: v.update(a="0")),
        "vocab with ids of halves": change_object("tokenizer/vocab.json", lambda v: v.update(a=0.5)),
        "vocab with ids of 0.0": change_object("tokenizer/vocab.json", lambda v: v.update(a=0.0)),
        "vocab with ids below zero": change_object("tokenizer/vocab.json", lambda v: v.update(a=-1)),
        "vocab with ids of 2^32": change_object("tokenizer/vocab.json", lambda v: v.update(a=2**32)),
        "vocab with ids of 2^31": change_object("tokenizer/vocab.json", lambda v: v.update(a=2**31)),
        "vocab with ids of 10^40": change_object("tokenizer/vocab.json", lambda v: v.update(a=10**40)),
        "vocab with an id of another": change_object("tokenizer/vocab.json", lambda v: v.update(a=1)),
        "vocab with an id beyond": change_object("tokenizer/vocab.json", lambda v: v.update(a=5000)),
        "vocab without a letter": change_object("tokenizer/vocab.json", lambda v: v.pop("a") and None),
        "vocab with a token more": change_object("tokenizer/vocab.json", lambda v: v.update({"\u00e9": 58})),
        "vocab with an empty token": change_object("tokenizer/vocab.json", lambda v: v.update({"": v.pop("a")})),
        "vocab of a list": change_object("tokenizer/vocab.json", lambda v: list(v)),
        "vocab in a vocab": change_object("tokenizer/vocab.json", lambda v: {"vocab": v}),
        "vocab without the start": change_object("tokenizer/vocab.json", lambda v: v.pop("<|startoftext|>") and None),
        "vocab deep": in_tokenizer(
            "vocab.json", lambda data: data[:-1] + b',"x":' + b"[" * 10**5 + b"]" * 10**5 + b"}"
        ),
        "merges with a mark": in_tokenizer("merges.txt", lambda data: b"\xef\xbb\xbf" + data),
        "merges of Windows": in_tokenizer("merges.txt", lambda data: data.replace(b"\n", b"\r\n")),
        "merges in UTF-16": in_tokenizer("merges.txt", recoded("utf-16")),
        "merges in UTF-16 without a mark": in_tokenizer("merges.txt", recoded("utf-16-le")),
        "merges with zeros": in_tokenizer("merges.txt", lambda data: data + bytes(512)),
        "merges without a header": in_tokenizer("merges.txt", lambda data: data.split(b"\n", 1)[1]),
        "merges of HTML": in_tokenizer("merges.txt", lambda data: b"<html> <b>"),
        "merges of three": in_tokenizer("merges.txt", lambda data: data + b"a b c\n"),
        "merges of one": in_tokenizer("merges.txt", lambda data: data + b"ab\n"),
        "merges of nobody": in_tokenizer("merges.txt", lambda data: data + b"q q\n"),
        "merges of letters that are not there": in_tokenizer(
            "merges.txt", lambda data: data + "\u00e9 \u00e8\n".encode()
        ),
        "a class of T5": settings(tokenizer_class="T5Tokenizer"),
        "a class of GPT-2": settings(tokenizer_class="GPT2Tokenizer"),
        "a length of a text": settings(model_max_length="8"),
        "a length of 0": settings(model_max_length=0),
        "a length of 8.5": settings(model_max_length=8.5),
        "a length of true": settings(model_max_length=True),
        "a length of 1e30": settings(model_max_length=1e30),
        "a length of 9": settings(model_max_length=9),
        "a length null": settings(model_max_length=None),
        "a start of a number": settings(bos_token=3),
        "a start that is not there": settings(bos_token="<s>"),
        "an end in a list": settings(eos_token=["<|endoftext|>"]),
        "a padding of an object": settings(pad_token={"a": 1}),
        "a padding that is empty": settings(pad_token=""),
        "settings with a key twice": insert("tokenizer/tokenizer_config.json", b'"model_max_length": 77'),
        "settings of a list": change_object("tokenizer/tokenizer_config.json", lambda v: [v]),
        "settings with a mark": in_tokenizer("tokenizer_config.json", lambda data: b"\xef\xbb\xbf" + data),
        "a map of a list": change_object("tokenizer/special_tokens_map.json", lambda v: [v]),
        "added tokens of a list": lambda folder, rng: (folder / "tokenizer/added_tokens.json").write_text("[]"),
        "added tokens twice": lambda folder, rng: (folder / "tokenizer/added_tokens.json").write_text(
            '{"<toy>": 58, "<toy>": 59}'
        ),
        "added tokens that are not in the embedding": lambda folder, rng: (
            folder / "tokenizer/added_tokens.json"
        ).write_text('{"<toy>": 58}'),
        "a tokenizer.json beside that is empty": lambda folder, rng: (folder / "tokenizer/tokenizer.json").write_text(
            "{}"
        ),
        "a tokenizer.json of another": lambda folder, rng: (folder / "tokenizer/tokenizer.json").write_text(
            json.dumps({"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}})
        ),
        "a tokenizer.json of words": lambda folder, rng: (folder / "tokenizer/tokenizer.json").write_text(
            json.dumps({"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}})
        ),
        **{f"vocab is {name}": make for name, make in in_place_of("tokenizer/vocab.json").items()},
        **{f"merges is {name}": make for name, make in in_place_of("tokenizer/merges.txt").items()},
    },
)

# ----------------------------------------------------------------------------------------------------------------------
# Configs

CONFIGS = {
    "unet": "unet/config.json",
    "vae": "vae/config.json",
    "text": "text_encoder/config.json",
    "scheduler": "scheduler/scheduler_config.json",
    "index": "model_index.json",
}
JUNK = [
    {}, [[]], "x", 10**400, -7, "\0", [None], {"a": {"b": 1}}, 1e300, [1e300], -0.5, "NaN",
]  # fmt: skip
for short, file in CONFIGS.items():
    variants(
        "config",
        **{
            f"{short} with a mark": change_file(file, lambda data: b"\xef\xbb\xbf" + data),
            f"{short} in UTF-16": change_file(file, recoded("utf-16")),
            f"{short} of Windows": change_file(file, lambda data: data.replace(b"\n", b"\r\n")),
            f"{short} with a comment": change_file(file, lambda data: b"// mine\n" + data),
            f"{short} with a comma": change_file(file, lambda data: data.rstrip()[:-1] + b",}"),
            f"{short} with zeros": change_file(file, lambda data: data + bytes(8)),
            f"{short} of a list": change_object(file, lambda values: [values]),
            f"{short} deep": change_file(
                file, lambda data: data.rstrip()[:-1] + b', "x": ' + b"[" * 10**5 + b"]" * 10**5 + b"}"
            ),
            f"{short} of 5000 digits": insert(file, b'"x": ' + b"9" * 5000),
            f"{short} of 1e999": insert(file, b'"x": [1e999]'),
            f"{short} of another": lambda folder, rng, file=file: shutil.copy(
                folder / CONFIGS["vae" if file.startswith("unet") else "unet"], folder / file
            ),
        },
    )
    variants("config", **{f"{short} is {name}": make for name, make in in_place_of(file).items()})
variants(
    "config",
    **{
        "unet with a key twice": insert(CONFIGS["unet"], b'"norm_num_groups": 2'),
        "vae with a key twice": insert(CONFIGS["vae"], b'"scaling_factor": 0.5'),
        "text with a key twice": insert(CONFIGS["text"], b'"layer_norm_eps": 0.5'),
        "scheduler with a key twice": insert(CONFIGS["scheduler"], b'"beta_end": 0.5'),
        "index with a key twice": insert(CONFIGS["index"], b'"_class_name": "StableDiffusionPipeline"'),
        "a scaling factor of a text": change_object(CONFIGS["vae"], lambda v: v.update(scaling_factor="0.18215")),
        "a scaling factor of true": change_object(CONFIGS["vae"], lambda v: v.update(scaling_factor=True)),
        "betas of texts": change_object(CONFIGS["scheduler"], lambda v: v.update(beta_end="0.012")),
        "betas swapped": change_object(CONFIGS["scheduler"], lambda v: v.update(beta_start=0.012, beta_end=0.00085)),
        "a schedule of nobody": change_object(CONFIGS["scheduler"], lambda v: v.update(beta_schedule="cosine9")),
        "a prediction of nobody": change_object(CONFIGS["scheduler"], lambda v: v.update(prediction_type="x0")),
        "a class of nobody": change_object(CONFIGS["scheduler"], lambda v: v.update(_class_name="MyScheduler")),
        "a spacing of nobody": change_object(CONFIGS["scheduler"], lambda v: v.update(timestep_spacing="odd")),
        "no steps": change_object(CONFIGS["scheduler"], lambda v: v.update(num_train_timesteps="1000")),
        "an index of SDXL": change_object(
            CONFIGS["index"], lambda v: v.update(_class_name="StableDiffusionXLPipeline")
        ),
        "an index of Flux": change_object(CONFIGS["index"], lambda v: v.update(_class_name="FluxPipeline")),
        "an activation of nobody": change_object(CONFIGS["text"], lambda v: v.update(hidden_act="swoosh")),
        "layers of nobody": change_object(CONFIGS["unet"], lambda v: v.update(down_block_types=["MyBlock2D"])),
    },
)


@damages("config", seeds=60)
def junk_in_a_field_that_counts(folder, rng):
    """Every field of these files has an effect, or is checked."""
    file = folder / CONFIGS[rng.choice(["unet", "vae", "text", "scheduler"])]
    values = json.loads(file.read_text())
    names = [name for name, value in values.items() if not name.startswith("_") and value is not None]
    values[rng.choice(names)] = rng.choice(JUNK)
    file.write_text(json.dumps(values))


# SDXL's index has a truth value
variants(
    "sdxl",
    **{
        f"force_zeros_for_empty_prompt of {value!r}": change_object(
            CONFIGS["index"], lambda v, value=value: v.update(force_zeros_for_empty_prompt=value)
        )
        for value in ("false", "False", 0, None, [], 0.5, "no")
    },
)

# ----------------------------------------------------------------------------------------------------------------------
# PEFT's adapter_config.json


def peft(**values):
    return change_object("adapter_config.json", lambda v: v.update(values))


variants(
    "peft",
    **{
        "alpha of a text": peft(lora_alpha="16"),
        "alpha of true": peft(lora_alpha=True),
        "alpha of 10^400": peft(lora_alpha=10**400),
        "alpha twice": insert("adapter_config.json", b'"lora_alpha": 64'),
        "a rank of another": peft(r=3),
        "a rank of 2.0": peft(r=2.0),
        "rslora of a text": peft(use_rslora="false"),
        "rslora of 0": peft(use_rslora=0),
        "dora of a text": peft(use_dora="no"),
        "a pattern that is none": peft(alpha_pattern={"(": 3}),
        "a pattern that never ends": peft(alpha_pattern={"(x+x+)+y": 3}),
        "patterns of a list": peft(rank_pattern=[1]),
        "an adapter of LoHa": peft(peft_type="LOHA"),
        "no adapter_config.json": lambda folder, rng: (folder / "adapter_config.json").unlink(),
        "fan_in_fan_out": peft(fan_in_fan_out=True),
        "a mark": change_file("adapter_config.json", lambda data: b"\xef\xbb\xbf" + data),
        **in_place_of("adapter_config.json"),
    },
)

# ----------------------------------------------------------------------------------------------------------------------
# Prepared sets: pairs/ and captions/


def shard_of(folder: Path, name: str, number: int = 0) -> Path:
    return sorted((folder / name).glob("*.array_record-*"))[number]


def change_info(name: str, file: str, change: Callable[[dict], object]):
    return change_object(f"{name}/{file}", change)


def swap(one: Path, other: Path) -> None:
    aside = one.with_name("aside")
    one.rename(aside)
    other.rename(one)
    aside.rename(other)


def change_lengths(lengths: list[str]):
    def change(info):
        info["splits"][0]["shardLengths"] = lengths

    return change


@damages("prepared", seeds=8)
def a_flipped_bit_in_a_shard(folder, rng):
    flip(shard_of(folder, "pairs"), rng)


@damages("prepared", seeds=4)
def a_flipped_bit_in_captions(folder, rng):
    flip(shard_of(folder, "captions"), rng)


@damages("prepared", seeds=2)
def a_cut_shard(folder, rng):
    cut(shard_of(folder, "pairs"), rng)


variants(
    "prepared",
    **{
        "shards that are swapped": lambda folder, rng: swap(shard_of(folder, "pairs"), shard_of(folder, "pairs", 1)),
        "a shard that is the other": lambda folder, rng: shutil.copy(
            shard_of(folder, "pairs", 1), shard_of(folder, "pairs")
        ),
        "a shard of the captions": lambda folder, rng: shutil.copy(
            shard_of(folder, "captions"), shard_of(folder, "pairs")
        ),
        "captions of another set": lambda folder, rng: (
            shutil.rmtree(folder / "captions"),
            shutil.copytree(folder.parent / "another" / "captions", folder / "captions"),
        ),
        "pairs of another set": lambda folder, rng: (
            shutil.rmtree(folder / "pairs"),
            shutil.copytree(folder.parent / "another" / "pairs", folder / "pairs"),
        ),
        "a shard of another set": lambda folder, rng: shutil.copy(
            shard_of(folder.parent / "another", "pairs"), shard_of(folder, "pairs")
        ),
        "captions and pairs swapped": lambda folder, rng: swap(folder / "captions", folder / "pairs"),
        "lengths of other shards": change_info("pairs", "dataset_info.json", change_lengths(["2", "4"])),
        "lengths that are fewer": change_info("pairs", "dataset_info.json", change_lengths(["4", "1"])),
        "lengths that are more": change_info("pairs", "dataset_info.json", change_lengths(["4", "9"])),
        "lengths of one shard": change_info("pairs", "dataset_info.json", change_lengths(["6"])),
        "lengths of texts": change_info("pairs", "dataset_info.json", change_lengths(["x", "y"])),
        "lengths below zero": change_info("pairs", "dataset_info.json", change_lengths(["-4", "10"])),
        "a size in metadata of a text": change_info(
            "pairs", "metadata.json", lambda v: v["settings"].update(size="16")
        ),
        "a size in metadata of three": change_info(
            "pairs", "metadata.json", lambda v: v["settings"].update(size=[16, 16, 16])
        ),
        "a size in metadata of another": change_info(
            "pairs", "metadata.json", lambda v: v["settings"].update(size=[64, 64])
        ),
        "a key in metadata twice": insert("pairs/metadata.json", b'"settings": {"size": [32, 32]}'),
        "metadata with a mark": change_file("pairs/metadata.json", lambda data: b"\xef\xbb\xbf" + data),
        "features of another kind": change_file(
            "pairs/features.json", lambda data: data.replace(b"uint16", b"float16")
        ),
        "features without one": change_info(
            "pairs", "features.json", lambda v: v["featuresDict"]["features"].pop("winner") and None
        ),
        **{f"metadata is {name}": make for name, make in in_place_of("pairs/metadata.json").items()},
        **{f"dataset_info is {name}": make for name, make in in_place_of("captions/dataset_info.json").items()},
        **{f"features is {name}": make for name, make in in_place_of("pairs/features.json").items()},
    },
)

# ----------------------------------------------------------------------------------------------------------------------
# Image sets with a manifest, which are scored


def change_manifest(change: Callable[[list[dict]], list[dict]]):
    def make(folder, rng):
        file = folder / "manifest.parquet"
        table = pq.read_table(file)
        pq.write_table(pa.Table.from_pylist(change(table.to_pylist()), table.schema), file)

    return make


def cell(row: int, **values):
    return change_manifest(lambda rows: [r | values if i == row else r for i, r in enumerate(rows)])


@damages("images", seeds=8)
def a_flipped_bit_in_the_manifest(folder, rng):
    flip(folder / "manifest.parquet", rng)


@damages("images", seeds=6)
def a_flipped_bit_in_the_shard(folder, rng):
    """Beside the images are only their texts, which the manifest has too."""
    flip(folder / "00000.tar", rng)


variants(
    "images",
    **{
        "a row twice": change_manifest(lambda rows: [*rows, rows[0]]),
        "a row less": change_manifest(lambda rows: rows[:-1]),
        "two rows with each other's bytes": change_manifest(
            lambda rows: [
                rows[0] | {name: rows[1][name] for name in ("offset", "size")},
                rows[1] | {name: rows[0][name] for name in ("offset", "size")},
                *rows[2:],
            ]
        ),
        "no rows": change_manifest(lambda rows: []),
        "a file that leaves": cell(1, file="../x.tar"),
        "a file of Windows": cell(1, file="C:\\x.tar"),
        "a file with a zero": cell(1, file="00000.tar\0"),
        "a file of 5000 letters": cell(1, file="x" * 5000),
        "a file that is a folder": lambda folder, rng: (
            cell(1, file="folder")(folder, rng),
            (folder / "folder").mkdir(),
        ),
        "a file that is a FIFO": lambda folder, rng: (cell(1, file="fifo")(folder, rng), os.mkfifo(folder / "fifo")),
        "a file that is a link out": lambda folder, rng: (
            cell(1, file="link")(folder, rng),
            (folder / "link").symlink_to("/etc/hosts"),
        ),
        "an offset beyond": cell(1, offset=2**47),
        "a size beyond": cell(1, size=2**40),
        "a width of another": cell(1, width=3),
        "a hash in capitals": change_manifest(lambda rows: [r | {"sha256": r["sha256"].upper()} for r in rows]),
        "a hash of nothing": cell(1, sha256=""),
        "settings that are none": cell(0, settings="{"),
        "a column twice": lambda folder, rng: pq.write_table(
            (lambda t: t.append_column("prompt", pa.array(["another"] * len(t))))(
                pq.read_table(folder / "manifest.parquet")
            ),
            folder / "manifest.parquet",
        ),
        **{f"manifest is {name}": make for name, make in in_place_of("manifest.parquet").items()},
        **{f"shard is {name}": make for name, make in in_place_of("00000.tar").items()},
    },
)

# ----------------------------------------------------------------------------------------------------------------------
# Files of torch: weights.pt


def change_archive(change: Callable[[dict[str, bytes]], object]):
    def make(folder, rng):
        file = folder / "weights.pt"
        with zipfile.ZipFile(file) as archive:
            members = {name: archive.read(name) for name in archive.namelist()}
        changed = change(members)
        with zipfile.ZipFile(file, "w") as archive:
            for name, data in (members if changed is None else changed).items():
                archive.writestr(name, data)

    return make


def storage(members: dict[str, bytes], number: int = 0) -> str:
    return sorted(name for name in members if "/data/" in name)[number]


@damages("torch", seeds=10)
def a_flipped_bit_in_an_archive(folder, rng):
    flip(folder / "weights.pt", rng)


@damages("torch", seeds=3)
def a_cut_archive(folder, rng):
    cut(folder / "weights.pt", rng)


variants(
    "torch",
    **{
        "a storage that is short": change_archive(lambda m: m.update({storage(m): m[storage(m)][:-4]})),
        "a storage that is missing": change_archive(lambda m: m.pop(storage(m)) and None),
        "a storage named in capitals": change_archive(
            lambda m: m.update({storage(m).replace("/data/", "/DATA/"): m.pop(storage(m))})
        ),
        "an order of bytes that is none": change_archive(
            lambda m: m.update({name: b"middle" for name in m if name.endswith("byteorder")})
        ),
        "two archives in one": change_archive(lambda m: m | {f"x/{n.split('/', 1)[1]}": d for n, d in m.items()}),
        "absolute names": change_archive(lambda m: {f"/{name}": data for name, data in m.items()}),
        "no pickle": change_archive(lambda m: {name: data for name, data in m.items() if "pkl" not in name}),
        "a pickle of text": change_archive(
            lambda m: m.update({name: b"(lp0\n." for name in m if name.endswith("data.pkl")})
        ),
        "bytes before the archive": change_file("weights.pt", lambda data: b"MZ" * 50 + data),
        "bytes behind the archive": change_file("weights.pt", lambda data: data + bytes(100)),
        **in_place_of("weights.pt"),
    },
)
