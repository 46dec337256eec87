"""Image files that tell how they were made, and the members and pages that an image set is built from."""

import io
import json
import os
import re
import tarfile
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath
from PIL import Image, ImageDraw, ImageOps, UnidentifiedImageError
from PIL.PngImagePlugin import PngImageFile, PngInfo

from flax_pref.images.choices import ImageFormat
from flax_pref.images.grid import FRAME, GAP, INK, MARGIN, PAPER, TILE, font_of, wrapped

TAR_BLOCK = 512  # bytes; headers and contents of a tar file begin at multiples of it
TAR_END = bytes(2 * TAR_BLOCK)

_DESCRIPTION = 0x010E  # the EXIF tag ImageDescription
_JSON = "x-json"  # private language tag of the PNG texts that are JSON, not plain text


def encode_image(pixels: np.ndarray, metadata: Mapping[str, Any], image_format: ImageFormat) -> bytes:
    """An image file without loss; the same pixels and metadata give the same bytes.

    A PNG has one iTXt text per entry of `metadata`, named like it: strings as they are, other values as JSON. A WebP
    has all of `metadata` as one JSON object in the EXIF tag ImageDescription.

    Args:
        pixels: uint8 `[H, W, 3]`.
        metadata: values that JSON can hold; names as `check_names` wants them.
        image_format: of the file.
    """
    file, image = io.BytesIO(), Image.fromarray(pixels)
    if image_format == "png":
        texts = PngInfo()
        for name, value in metadata.items():
            if isinstance(value, str):
                texts.add_itxt(name, value)
            else:
                texts.add_itxt(name, json.dumps(value), lang=_JSON)
        image.save(file, "PNG", pnginfo=texts)
    else:
        exif = Image.Exif()
        exif[_DESCRIPTION] = json.dumps(metadata)
        image.save(file, "WEBP", lossless=True, exif=exif)
    return file.getvalue()


def check_names(names: Sequence[str]) -> None:
    """Checks what will be the names of PNG texts.

    Raises:
        ValueError: one is not 1 to 79 printable ASCII characters, or begins or ends with a space.
    """
    for name in names:
        if not isinstance(name, str) or not re.fullmatch(r"(?=[ -~]{1,79}\Z)(?! ).*(?<! )", name):
            raise ValueError(f"settings: the name {name!r} is not 1 to 79 printable ASCII characters; rename it")


def read_metadata(file: bytes | str | os.PathLike) -> dict[str, Any]:
    """What an image of `encode_image` tells about itself.

    Args:
        file: its bytes, or where it is.

    Returns:
        The metadata, with the types they were written with; of other PNG files the texts; else nothing.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not an image.
    """
    where = "the bytes" if isinstance(file, bytes) else file
    content = file if isinstance(file, bytes) else epath.Path(file).read_bytes()
    try:
        with Image.open(io.BytesIO(content)) as image:
            if isinstance(image, PngImageFile):
                return {name: _value(text) for name, text in image.text.items()}
            description = image.getexif().get(_DESCRIPTION)
            return {} if description is None else json.loads(description)
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise ValueError(f"{where}: not a readable image ({error}); expected a PNG or WebP file") from error


def _value(text: str) -> Any:
    return json.loads(text) if getattr(text, "lang", "") == _JSON else str(text)


def tar_members(key: str, metadata: Mapping[str, Any], image: bytes, image_format: ImageFormat) -> tuple[bytes, bytes]:
    """One sample of a WebDataset shard: `.txt` (the prompt), `.json` (all metadata) and, last, the image.

    Returns:
        The bytes of its members before the content of the image, and those from there on; a multiple of `TAR_BLOCK`
        each. The same arguments give the same bytes.
    """
    described = json.dumps(metadata, ensure_ascii=False).encode()
    texts = _member(f"{key}.txt", metadata["prompt"].encode()) + _member(f"{key}.json", described)
    member = _member(f"{key}.{image_format}", image)
    return texts + member[:TAR_BLOCK], member[TAR_BLOCK:]


def _member(name: str, content: bytes) -> bytes:
    info = tarfile.TarInfo(name)  # time 0, owner 0
    info.size = len(content)
    return info.tobuf(tarfile.USTAR_FORMAT) + content + bytes(-len(content) % TAR_BLOCK)


def contact_sheet(images: Sequence[bytes], captions: Sequence[str]) -> bytes:
    """Draws images in a grid of up to eight columns, each with the first lines of its caption under it.

    Args:
        images: N image files. Small images are enlarged pixel by pixel, large ones reduced.
        captions: N texts.

    Returns:
        A PNG file; the same arguments give the same bytes.
    """
    lines, leading, font = 3, 15, font_of(11)
    columns, height = min(8, len(images)), TILE + 8 + lines * leading
    rows = -(-len(images) // columns)
    size = (2 * MARGIN + columns * (TILE + GAP) - GAP, 2 * MARGIN + rows * (height + GAP) - GAP)
    canvas = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(canvas)
    for position, (image, caption) in enumerate(zip(images, captions, strict=True)):
        left, top = MARGIN + position % columns * (TILE + GAP), MARGIN + position // columns * (height + GAP)
        tile = _tile(image)
        canvas.paste(tile, (left + (TILE - tile.width) // 2, top + (TILE - tile.height) // 2))
        draw.rectangle((left - 1, top - 1, left + TILE, top + TILE), outline=FRAME)
        for line, text in enumerate(_shortened(caption, lines, TILE)):
            draw.text((left, top + TILE + 8 + line * leading), text, fill=INK, font=font)
    file = io.BytesIO()
    canvas.save(file, "PNG")
    return file.getvalue()


def _tile(image: bytes) -> Image.Image:
    """An image that fits into a tile, with the proportions it has."""
    with Image.open(io.BytesIO(image)) as opened:
        enlarged = max(opened.size) <= TILE
        return ImageOps.contain(
            opened.convert("RGB"), (TILE, TILE), Image.Resampling.NEAREST if enlarged else Image.Resampling.LANCZOS
        )


def _shortened(text: str, lines: int, width: int) -> list[str]:
    """The first lines of a text; an ellipsis stands for what does not fit."""
    font = font_of(11)
    kept = wrapped(text[:200], font, width).split("\n")
    if len(kept) > lines:
        kept = [*kept[: lines - 1], f"{kept[lines - 1]} …"]
    for number, line in enumerate(kept):
        while font.getlength(line) > width:
            line = line.rstrip("…").rstrip()[:-1] + "…"
        kept[number] = line
    return kept
