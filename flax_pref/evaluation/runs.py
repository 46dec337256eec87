"""Finished folders of images: those of `sample.images` with their manifest, and foreign ones with prompts."""

import collections
import contextlib
import errno
import hashlib
import io
import json
import os
import re
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from etils import epath
from PIL import Image

from flax_pref.config import UserError
from flax_pref.data.prompts import TEXTS, Prompt, natural
from flax_pref.data.sources import is_remote
from flax_pref.data.webdataset import headers
from flax_pref.images.image_files import read_metadata
from flax_pref.images.image_set import MANIFEST, MANIFEST_SCHEMA, PARTS, SETTINGS, SHEET, read_manifest
from flax_pref.programs import title

# The table of scores beside the images, and its columns: scores, answers to benchmarks and features of an image, and
# distances between images.
SCORES, PROBLEM = "scores.parquet", "problem"
SCORE, ANSWERS, FEATURES, DISTANCE = "score:", "answers:", "features:", "distance:"
PROBLEMS = ("missing", "changed", "unreadable")
IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")


class ImageRun(NamedTuple):
    """A finished folder of images.

    Attributes:
        folder: local or on an object store.
        rows: one per image, with the columns of a manifest.
        told: how prompts were found, for the user; "" where a manifest has them.
    """

    folder: epath.Path
    rows: pa.Table
    told: str = ""


class ImageFile(NamedTuple):
    """Where an image is in its folder, and what is known of it; width and height are 0 if it cannot be read."""

    file: str
    offset: int
    size: int
    sha256: str
    width: int
    height: int


def open_run(folder: str | os.PathLike, prompts: Sequence[Prompt] | None = None, *, needed: bool = True) -> ImageRun:
    """What a folder holds.

    A folder with a manifest is one of `sample.images`. In any other the images (`IMAGES`, in folders of any depth, but
    none that begin with a dot) are found by their names, or else the samples of tar files in the layout of WebDataset.
    Their prompts are those of a file, where one is given, in the first of these ways that fits all images:

    - GenEval's layout: `<number of the prompt>/samples/<seed>.png`.
    - T2I-CompBench's layout: `<category>/samples/<prompt>_<number>.png`, where numbers grow with the seed.
    - DPG-Bench's item ids: `<item id>.png`, or `<item id>-<seed>.png`; not grids of several images.
    - By the number that file names begin with, from 0: `00012.png`, or `12-3.png` for prompt 12 and seed 3.
    - HPSv2's layout: the same, with a folder for each group of prompts, and counted within it.
    - As many images as prompts: one after the other, in the order of names, where 2.png comes before 10.png.

    Images in folders named like groups are never given prompts of other groups.

    Where no prompts are given, each image has its own: in `metadata.jsonl` two folders up (GenEval), in a .txt or
    .json file (or member of the tar file) of the same name, or in the image (`read_metadata`). Ids and seeds are those
    that come with the prompts, or those of the names as above, or the first text is prompt 0 and its first image seed
    0.

    All images of a foreign folder are read once here, for their hashes and sizes.

    Args:
        folder: local or `gs://...`.
        prompts: of a foreign folder; None: they are with the images.
        needed: whether images must have prompts. If not, images of a foreign folder that has none are numbered in the
            order of names, as for a folder of photographs.

    Raises:
        UserError: the folder is not there, unfinished or without images, its manifest is damaged, or the prompt of an
            image cannot be told.
    """
    folder = epath.Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; expected a finished one of {title('sample')}, or one with images")
    if (folder / MANIFEST).exists():
        return ImageRun(folder, _read_manifest(folder))
    if (folder / PARTS).exists() or _begun(folder):
        raise UserError(
            f"{folder}: is not finished, it has no {MANIFEST}; finish it first with the command of {title('sample')} "
            "that began it"
        )
    found = _find(folder)
    if not found:
        raise UserError(f"{folder}: no images in it; expected {', '.join(IMAGES)} or tar files with such")
    with ThreadPoolExecutor(16) as pool:
        looked = list(pool.map(lambda image: _look(folder, image, prompts is None), found))
    names = [image.name for image in found]
    if prompts is None:
        shown, told = _own_prompts(folder, names, [described for _, described in looked], needed)
    else:
        shown, told = _given_prompts(folder, names, prompts)
    columns = {
        "prompt_id": [prompt.id for prompt, _ in shown],
        "prompt": [prompt.text for prompt, _ in shown],
        "group": [prompt.group for prompt, _ in shown],
        "record": [json.dumps(dict(prompt.record)) for prompt, _ in shown],
        "seed": [seed for _, seed in shown],
        **{"settings": ["{}"] * len(shown), "model_sha256": [""] * len(shown), "modules_sha256": ["{}"] * len(shown)},
        **{name: [getattr(image, name) for image, _ in looked] for name in ImageFile._fields},
    }
    return ImageRun(folder, pa.table(columns, MANIFEST_SCHEMA), told)


def read_image(folder: epath.Path, image: ImageFile) -> np.ndarray | str:
    """Pixels as the authors of rewards see them, or why there are none.

    That is what PIL's `.convert("RGB")` makes of an image of any mode: transparent parts show the colour that is stored
    there, grey of 16 bits is cut at 255, of animations it is the first image. The orientation in EXIF data is ignored.

    Returns:
        uint8 `[height, width, 3]`; or "missing", "changed" (the bytes are not those of the hash) or "unreadable".
    """
    try:
        content = _bytes(folder, (image.file, image.offset, image.size))
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return "missing"
    except MemoryError:  # a size that no image has
        return "changed"
    except OSError as error:
        if error.errno == errno.EINVAL:  # an offset that no file has
            return "changed"
        raise OSError(error.errno, error.strerror, f"{folder / image.file}") from error
    if hashlib.sha256(content).hexdigest() != image.sha256:
        return "changed"
    try:  # damaged files make Pillow raise nearly every kind of exception
        with Image.open(io.BytesIO(content)) as opened:
            opened.load()
            opened.info.pop("transparency", None)  # it is not used, and palettes with it make Pillow warn
            pixels = np.asarray(opened.convert("RGB"))
    except Exception:
        return "unreadable"
    return pixels if pixels.shape == (image.height, image.width, 3) else "unreadable"


_Place = tuple[str, int, int]  # file, first byte, and size, -1 for all of the file


def _bytes(folder: epath.Path, place: _Place) -> bytes:
    file, offset, size = place
    if not is_remote(folder) and os.path.exists(folder / file) and not os.path.isfile(folder / file):
        raise IsADirectoryError(errno.EISDIR, "no regular file", f"{folder / file}")  # a FIFO would block for ever
    with (folder / file).open("rb") as opened:
        if offset:
            opened.seek(offset)
        return opened.read(size)


def _read_manifest(folder: epath.Path) -> pa.Table:
    """The rows of a manifest, all that the set was begun with, if its settings tell."""
    file = folder / MANIFEST
    if not is_remote(file) and not os.path.isfile(file):
        raise UserError(f"{file}: is no regular file; have sample.images write it again")
    try:
        table = read_manifest(file.read_bytes())
    except ValueError as error:
        raise UserError(f"{file}: damaged ({error}): restore it, or have {title('sample')} write it again") from error
    if not len(table):
        raise UserError(f"{file}: has no rows; expected those of the images")
    begun = _begun(folder)
    described = begun["images"] if begun and isinstance(begun["images"], dict) else {}
    if described.get("count", len(table)) != len(table):
        raise UserError(
            f"{file}: has {len(table)} rows, but by {SETTINGS} there are {described['count']} images: restore it, or "
            "have sample.images write it again"
        )
    return table


def _begun(folder: epath.Path) -> dict[str, Any] | None:
    """What `settings.json` says, if it is that of an image set."""
    try:
        begun = json.loads((folder / SETTINGS).read_bytes())
    except (FileNotFoundError, ValueError, RecursionError):
        return None
    return begun if isinstance(begun, dict) and set(begun) == {"settings", "images"} else None


# ----------------------------------------------------------------------------------------------------------------------
# Foreign folders


class _Found(NamedTuple):
    """An image.

    Attributes:
        name: path in the folder, or in a tar file.
        place: of its bytes.
        beside: places of what describes it, by suffix.
    """

    name: str
    place: _Place
    beside: dict[str, _Place]


def _find(folder: epath.Path) -> list[_Found]:
    """The images of a folder, or of its tar files if there are no others, in the order of their names."""
    files = sorted(_files(folder), key=natural)
    there, paths = set(files), [PurePosixPath(file) for file in files]
    geneval = {path.parent for path in paths if path.name == "metadata.jsonl"}
    found = []
    for path in paths:
        # GenEval's own program leaves a grid of the images beside their folder.
        if path.suffix.lower() in IMAGES and path.name != SHEET and path.parent not in geneval:
            beside = {kind: str(path.with_suffix(f".{kind}")) for kind in ("txt", "json")}
            beside = {kind: (file, 0, -1) for kind, file in beside.items() if file in there}
            if path.parent.name == "samples" and path.parent.parent in geneval:
                beside["jsonl"] = (str(path.parent.parent / "metadata.jsonl"), 0, -1)
            found.append(_Found(str(path), (str(path), 0, -1), beside))
    return found or [image for file in files if file.lower().endswith(".tar") for image in _find_in_tar(folder, file)]


def _files(folder: epath.Path, inside: str = "") -> Iterator[str]:
    for path in (folder / inside).iterdir():
        if not path.name.startswith("."):
            name = f"{inside}/{path.name}".removeprefix("/")
            if path.is_dir():
                yield from _files(folder, name)
            else:
                yield name


def _find_in_tar(folder: epath.Path, file: str) -> list[_Found]:
    """The samples of a tar file: members that share a name up to its first dot."""
    samples = collections.defaultdict(dict)
    try:
        with (folder / file).open("rb") as opened:
            for member in headers(opened):
                if member.isfile():
                    path = PurePosixPath(member.name)
                    key, _, suffix = path.name.partition(".")
                    samples[str(path.parent / key)][suffix.lower()] = (file, member.offset_data, member.size)
    except (tarfile.TarError, EOFError) as error:
        raise UserError(
            f"{folder / file}: damaged, compressed or no tar file ({error}); unpack it, or download it again"
        ) from error
    return [
        _Found(f"{key}.{suffix}", place, parts)
        for key, parts in samples.items()
        for suffix, place in parts.items()
        if f".{suffix}" in IMAGES
    ]


def _look(folder: epath.Path, found: _Found, describe: bool) -> tuple[ImageFile, dict[str, Any]]:
    """An image, and what is known of it: perhaps "prompt", "prompt_id", "seed", "group" and "record"."""
    content = _bytes(folder, found.place)
    file, offset, _ = found.place
    width = height = 0
    with contextlib.suppress(Exception), Image.open(io.BytesIO(content)) as opened:
        width, height = opened.size
    image = ImageFile(file, offset, len(content), hashlib.sha256(content).hexdigest(), width, height)
    return image, _describe(folder, found, content) if describe else {}


def _describe(folder: epath.Path, found: _Found, content: bytes) -> dict[str, Any]:
    described: dict[str, Any] = {}
    for kind in ("jsonl", "json", "txt"):
        if kind not in found.beside:
            continue
        where = f"{folder / found.beside[kind][0]} beside {found.name}"
        try:
            text = _bytes(folder, found.beside[kind]).decode()
            if kind == "txt":
                described["prompt"] = text.strip()
                continue
            record = json.loads(text.strip().splitlines()[0] if kind == "jsonl" else text)
        except (ValueError, IndexError, RecursionError) as error:
            raise UserError(
                f"{where}: not UTF-8 or not JSON ({error}); correct it, or name a file of --prompts"
            ) from error
        if isinstance(record, dict):
            text = next((record[name] for name in TEXTS if isinstance(record.get(name), str)), None)
            described |= {**record, "record": record} | ({} if text is None else {"prompt": text})
    if "prompt" not in described:
        with contextlib.suppress(Exception):  # as of Pillow with damaged files; also texts that are no JSON
            known = read_metadata(content)
            described = known if isinstance(known, dict) else {}
    return described


_Shown = tuple[list[tuple[Prompt, int]], str]  # prompt and seed of each image; how they were found


def _given_prompts(folder: epath.Path, names: Sequence[str], prompts: Sequence[Prompt]) -> _Shown:
    grouped = collections.defaultdict(list)
    for prompt in prompts:
        grouped[prompt.group].append(prompt.id)
    styles = [PurePosixPath(name).parent.name for name in names]
    styled = all(style and style in grouped for style in styles)
    ways = {
        "GenEval's layout": _geneval_numbers(names),
        "T2I-CompBench's layout": _t2i_numbers(names, prompts),
        "DPG-Bench's item ids": _dpg_numbers(names, prompts),
        "the number in the file name": _numbers(names),
        "the number in their group": _group_numbers(names, grouped) if styled else None,
        "the order of names": [(i, 0) for i in range(len(names))] if len(names) == len(prompts) else None,
    }
    for way, numbers in ways.items():
        if numbers is None or not _fits(numbers) or not all(i < len(prompts) for i, _ in numbers):
            continue
        if not styled or all(prompts[i].group == style for (i, _), style in zip(numbers, styles, strict=True)):
            return [(prompts[i], seed) for i, seed in numbers], f"prompts by {way}"
    raise UserError(
        f"{folder}: cannot tell which of {len(prompts)} prompts each of {len(names)} images shows, e.g. {names[0]}; "
        "expected names that begin with the number of the prompt, from 0, such as 00012.png, or 12-3.png for its seed "
        "3, or as many images as prompts"
    )


def _own_prompts(
    folder: epath.Path, names: Sequence[str], described: Sequence[Mapping[str, Any]], needed: bool
) -> _Shown:
    if not needed and not any(isinstance(known.get("prompt"), str) for known in described):
        return [(Prompt(i, "", "", {}), 0) for i in range(len(names))], "without prompts"
    for name, known in zip(names, described, strict=True):
        if not isinstance(known.get("prompt"), str):
            raise UserError(
                f"{folder}: no prompt for {len([d for d in described if 'prompt' not in d])} of {len(names)} images, "
                f"e.g. {name}; expected a file of them with --prompts, a text such as "
                f"{PurePosixPath(name).with_suffix('.txt').name} beside each image, or a text 'prompt' in the image"
            )
    texts = [known["prompt"] for known in described]
    ways = {
        "with the images": [(known.get("prompt_id"), known.get("seed")) for known in described],
        "in GenEval's layout": _geneval_numbers(names),
        "with the images, their ids from the file names": _numbers(names),
    }
    fitting = [(told, numbers) for told, numbers in ways.items() if numbers is not None and _fits(numbers, texts)]
    told, numbers = [*fitting, ("with the images, their ids by the order of texts", _numbered_texts(texts))][0]
    prompts = [
        Prompt(i, text, str(known.get("group") or ""), known.get("record", {"prompt": text}))
        for (i, _), text, known in zip(numbers, texts, described, strict=True)
    ]
    return [(prompt, seed) for prompt, (_, seed) in zip(prompts, numbers, strict=True)], f"prompts {told}"


def _fits(numbers: Sequence[tuple[Any, Any]], texts: Sequence[str] | None = None) -> bool:
    """Whether these are ids and seeds of different images, and the same id has the same text."""
    if not all(type(part) is int and 0 <= part < 2**63 for pair in numbers for part in pair):
        return False
    if len(set(numbers)) < len(numbers):
        return False
    ids = {i for i, _ in numbers}
    return texts is None or len({(i, text) for (i, _), text in zip(numbers, texts, strict=True)}) == len(ids)


def _numbers(names: Sequence[str]) -> list[tuple[int, int]] | None:
    """Prompt and seed of names such as 12-3.png or 00012.png."""
    matches = [re.match(r"(\d+)(?:[-_](\d+)$|(?=\D|$))", PurePosixPath(name).stem) for name in names]
    return None if None in matches else [(int(match[1]), int(match[2] or 0)) for match in matches if match]


def _geneval_numbers(names: Sequence[str]) -> list[tuple[int, int]] | None:
    matches = [re.search(r"(?:^|/)(\d+)/samples/(\d+)\.\w+$", name) for name in names]
    return None if None in matches else [(int(match[1]), int(match[2])) for match in matches if match]


def _t2i_numbers(names: Sequence[str], prompts: Sequence[Prompt]) -> list[tuple[int, int]] | None:
    """Prompt and seed of names such as color/samples/a red cup_000003.png; seeds are counted within the prompt."""
    ids = {("", prompt.text): prompt.id for prompt in prompts}
    ids |= {(prompt.group, prompt.text): prompt.id for prompt in prompts}
    found = []
    for name in names:
        match = re.search(r"(?:^|/)([^/_]+)_(\d+)\.\w+$", name)
        text, group = match[1] if match else "", PurePosixPath(name).parent.parent.name
        prompt_id = ids.get((group, text), ids.get(("", text)))
        if match is None or prompt_id is None:
            return None
        found.append((prompt_id, int(match[2])))
    places = {number: place for place, number in enumerate(sorted(set(found)))}
    first = {prompt_id: place for (prompt_id, _), place in reversed(places.items())}
    return [(number[0], places[number] - first[number[0]]) for number in found]


def _dpg_numbers(names: Sequence[str], prompts: Sequence[Prompt]) -> list[tuple[int, int]] | None:
    """Prompt and seed of names such as partiprompts97.png or partiprompts97-3.png."""
    ids = {prompt.record.get("item_id"): prompt.id for prompt in prompts}
    if None in ids:
        return None
    found = []
    for name in names:
        stem = PurePosixPath(name).stem
        item, _, seed = (stem, "", "0") if stem in ids else stem.rpartition("-")
        if item not in ids or not re.fullmatch(r"\d+", seed):
            return None
        found.append((ids[item], int(seed)))
    return found


def _group_numbers(names: Sequence[str], grouped: Mapping[str, Sequence[int]]) -> list[tuple[int, int]] | None:
    """Prompt and seed of names such as anime/00012.png, in which a number counts within the group of prompts."""
    groups, numbers = [grouped[PurePosixPath(name).parent.name] for name in names], _numbers(names)
    if numbers is None or any(i >= len(group) for group, (i, _) in zip(groups, numbers, strict=True)):
        return None
    return [(group[i], seed) for group, (i, seed) in zip(groups, numbers, strict=True)]


def _numbered_texts(texts: Sequence[str]) -> list[tuple[int, int]]:
    """Texts by their first places, and images of a text by theirs."""
    ids: dict[str, int] = {}
    seeds: collections.Counter[str] = collections.Counter()
    numbers = []
    for text in texts:
        numbers.append((ids.setdefault(text, len(ids)), seeds[text]))
        seeds[text] += 1
    return numbers


def several(given: str | Path | Sequence[str | Path]) -> tuple[str, ...]:
    """One or several texts or paths, as texts."""
    return (str(given),) if isinstance(given, str | Path) else tuple(map(str, given))
