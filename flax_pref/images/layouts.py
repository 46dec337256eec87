"""Layouts of image folders: the names that the programs of benchmarks look for, and the files that they read beside."""

import io
import itertools
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from flax_pref.data.prompts import Prompt
from flax_pref.images.choices import ImageFormat, Layout


class Item(NamedTuple):
    """One image to be drawn."""

    prompt: Prompt
    seed: int


def image_names(items: Sequence[Item], layout: Layout, image_format: ImageFormat) -> list[str]:
    """The file of each image, relative to the folder of an `ImageSet`; in tar files the key.

    Raises:
        ValueError: the items do not fit the layout, or two of them are the same.
    """
    if not items:
        raise ValueError("no images to draw; expected at least one prompt and one seed")
    seen = set()
    for prompt, seed in items:
        if (prompt.id, seed) in seen:
            raise ValueError(f"prompt {prompt.id} with seed {seed} is there twice; expected every image once")
        seen.add((prompt.id, seed))
        try:
            (prompt.text + prompt.group).encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"prompt {prompt.id}: its text is not valid Unicode ({error}); correct it") from error
    return _NAMES[layout](items, image_format)


def _webdataset(items: Sequence[Item], _: ImageFormat) -> list[str]:
    return [f"{prompt.id:06d}-{seed}" for prompt, seed in items]


def _flat(items: Sequence[Item], image_format: ImageFormat) -> list[str]:
    return [f"{prompt.id:05d}-{seed}.{image_format}" for prompt, seed in items]


def _geneval(items: Sequence[Item], image_format: ImageFormat) -> list[str]:
    _check_png("GenEval", image_format)
    places = _places((item.prompt.id, item.seed) for item in items)
    return [f"{prompt.id:05d}/samples/{places[prompt.id, seed]:04d}.png" for prompt, seed in items]


def _hpsv2(items: Sequence[Item], _: ImageFormat) -> list[str]:
    _check_one_seed("hpsv2", items)
    for prompt, _seed in items:
        _check_folder("hpsv2", "style", prompt)
    places = _places((item.prompt.group, item.prompt.id) for item in items)
    return [f"images/{prompt.group}/{places[prompt.group, prompt.id]:05d}.jpg" for prompt, _ in items]


def _geneval2(items: Sequence[Item], image_format: ImageFormat) -> list[str]:
    _check_one_seed("geneval2", items)
    seen: dict[str, int] = {}
    for prompt, _ in items:
        if seen.setdefault(prompt.text, prompt.id) != prompt.id:
            raise ValueError(
                f"prompts {seen[prompt.text]} and {prompt.id} are the same text, and layout 'geneval2' finds images by "
                "their prompts; remove one, or choose another layout"
            )
    return [f"images/{prompt.id:05d}.{image_format}" for prompt, _ in items]


def _dpg(items: Sequence[Item], image_format: ImageFormat) -> list[str]:
    owners: dict[str, int] = {}
    for prompt, _ in items:
        name = prompt.record.get("item_id")
        if not isinstance(name, str) or not re.fullmatch(r"[\w-]+", name):
            raise ValueError(
                f"prompt {prompt.id}: has no item_id that can be the name of a file, which layout 'dpg' needs; "
                "expected --prompts dpg_bench/prompts or dpg_bench/dpg_bench.csv, or another layout"
            )
        if owners.setdefault(name, prompt.id) != prompt.id:
            raise ValueError(f"prompts {owners[name]} and {prompt.id} have one item_id {name!r}; expected each once")
    places = _places((item.prompt.id, item.seed) for item in items)
    if max(places.values()) > 3:
        raise ValueError("layout 'dpg' has at most 4 images per prompt, in one grid; expected e.g. --seeds 0-3")
    return [f"samples/{p.record['item_id']}-{places[p.id, seed]}.{image_format}" for p, seed in items]


def _t2i_compbench(items: Sequence[Item], image_format: ImageFormat) -> list[str]:
    _check_png("T2I-CompBench", image_format)
    for prompt, _ in items:
        if re.search(r"[_/\\\x00-\x1f]|^\.", prompt.text) or len(prompt.text.encode()) > 255 - len("_000000.png"):
            raise ValueError(
                f"prompt {prompt.id}: {prompt.text!r:.60} cannot be the name of a file, which layout 't2i_compbench' "
                "needs; expected no _ or slash, and at most 244 bytes, or another layout"
            )
        if prompt.group:
            _check_folder("t2i_compbench", "category", prompt)
    places = _places((item.prompt.group, (item.prompt.id, item.seed)) for item in items)
    names = []
    for prompt, seed in items:
        folder = f"{prompt.group}/samples" if prompt.group else "samples"
        names.append(f"{folder}/{prompt.text}_{places[prompt.group, (prompt.id, seed)]:06d}.png")
    return names


_NAMES: Mapping[Layout, Callable[[Sequence[Item], ImageFormat], list[str]]] = {
    "webdataset": _webdataset,
    "flat": _flat,
    "geneval": _geneval,
    "geneval2": _geneval2,
    "dpg": _dpg,
    "t2i_compbench": _t2i_compbench,
    "hpsv2": _hpsv2,
}


def _check_png(whose: str, image_format: ImageFormat) -> None:
    if image_format != "png":
        raise ValueError(f"image_format={image_format!r}: {whose} reads only files named .png; expected 'png'")


def _check_one_seed(layout: Layout, items: Sequence[Item]) -> None:
    if len({item.seed for item in items}) > 1:
        raise ValueError(f"layout {layout!r} has one image per prompt; expected one seed, or another layout")


def check_square(height: int, width: int) -> None:
    """Raises a ValueError where images of this size do not fit the layout 'dpg'."""
    if height != width:
        raise ValueError(
            f"layout 'dpg' has square images, not {width}x{height}: its program cuts grids into squares; choose "
            "--width equal to --height, or another layout"
        )


def _check_folder(layout: Layout, group: str, prompt: Prompt) -> None:
    if not re.fullmatch(r"\w[\w .-]*", prompt.group):
        raise ValueError(
            f"prompt {prompt.id}: its {group} {prompt.group!r} cannot be the name of a folder, which layout {layout!r} "
            "needs; expected e.g. 'anime', or another layout"
        )


def _places(pairs: Iterable[tuple[Any, Any]]) -> dict[tuple[Any, Any], int]:
    """The place of each pair among those with the same first part, by the second."""
    grouped = itertools.groupby(sorted(pairs), lambda pair: pair[0])
    return {pair: place for _, pairs in grouped for place, pair in enumerate(pairs)}


# ----------------------------------------------------------------------------------------------------------------------
# What lies beside the images


def described(items: Sequence[Item], layout: Layout, names: Sequence[str]) -> dict[str, bytes]:
    """Files that tell a benchmark's program what the images show: contents by name."""
    if layout == "geneval":
        return {
            f"{name.split('/')[0]}/metadata.jsonl": json.dumps(dict(item.prompt.record)).encode() + b"\n"
            for name, item in zip(names, items, strict=True)
        }
    if layout == "geneval2":
        paths = {item.prompt.text: name for name, item in zip(names, items, strict=True)}
        return {"image_paths.json": json.dumps(paths, indent=1).encode() + b"\n"}
    return {}


def grids(items: Sequence[Item], layout: Layout) -> dict[str, list[int]]:
    """Names of the grids that DPG-Bench's program cuts, and the places of their images, in the order of the seeds."""
    if layout != "dpg":
        return {}
    found: dict[str, list[int]] = {}
    for place in sorted(range(len(items)), key=lambda place: items[place].seed):
        found.setdefault(f"grids/{items[place].prompt.record['item_id']}.png", []).append(place)
    return found


def grid_of(images: Sequence[bytes]) -> bytes:
    """One to four image files of one square size in a PNG file, row by row in two columns; one is alone in it.

    The same images give the same bytes.

    Raises:
        ValueError: they are not squares of one size.
    """
    pixels = []
    for image in images:
        with Image.open(io.BytesIO(image)) as opened:
            pixels.append(np.asarray(opened.convert("RGB")))
    size = pixels[0].shape[0]
    if any(one.shape != (size, size, 3) for one in pixels):
        raise ValueError(
            "layout 'dpg' cuts its grids into squares of one size; expected images as wide as high, or another layout"
        )
    side = 1 if len(pixels) == 1 else 2
    whole = np.zeros((side * size, side * size, 3), np.uint8)
    for place, one in enumerate(pixels):
        row, column = divmod(place, 2)
        whole[row * size : (row + 1) * size, column * size : (column + 1) * size] = one
    file = io.BytesIO()
    Image.fromarray(whole).save(file, "PNG")
    return file.getvalue()
