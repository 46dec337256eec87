"""Images of preference sets: bytes of unknown origin to RGB, and RGB to the size that a network takes."""

import io
import struct
from typing import Literal, NamedTuple

import numpy as np
from PIL import Image, JpegImagePlugin, PngImagePlugin, WebPImagePlugin

from flax_pref.data.image_bodies import what_jpeg_lacks, what_png_lacks
from flax_pref.data.pairs import Drop

SMALLEST_SIDE = 32
MOST_PIXELS = 64_000_000
MOST_BYTES = 3 * MOST_PIXELS  # of a file: what so many pixels take uncompressed

_PNG = b"\x89PNG\r\n\x1a\n"
_EXIF = b"Exif\0\0"
_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_RESAMPLING = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}


class Fitted(NamedTuple):
    """An image of the size that was asked for, and how it came to it: the micro-conditioning of SDXL.

    Attributes:
        pixels: uint8 `[H, W, 3]`.
        original_size: height and width before it was resized.
        resized_size: height and width before it was cropped.
        crop_top_left: where the crop begins, top and left, in pixels of the resized image.
    """

    pixels: np.ndarray
    original_size: tuple[int, int]
    resized_size: tuple[int, int]
    crop_top_left: tuple[int, int]


def decode_image(
    data: bytes, *, smallest_side: int = SMALLEST_SIDE, most_pixels: int = MOST_PIXELS
) -> Image.Image | Drop:
    """A JPEG, PNG or WebP as RGB, decoded to its last pixel; for any other bytes, why they are of no use.

    It is turned upright as its EXIF data tells, CMYK and grey are converted, 16 bits are scaled to 8, transparent
    parts are laid on white, and of an animation the still or first image is taken. Colour profiles are not applied.
    It can be called from many threads, and most of its time they run side by side.

    Args:
        data: the encoded image.
        smallest_side: pixels that width and height must have at least.
        most_pixels: that it may have; more are refused before they are decoded.
    """
    if not _known(data):
        return Drop("not an image", f"{len(data)} bytes that begin with {data[:8]!r}; expected JPEG, PNG or WebP")
    # Damaged files make Pillow raise nearly every kind of exception.
    try:
        if drop := _size_drop(_canvas(data), smallest_side, most_pixels):
            return drop
        image, exif = _opened(data)
        if drop := _size_drop(image.size, smallest_side, most_pixels):
            return drop
        image.load()
        if lacks := _lacks(data, image):
            return Drop("image is truncated or damaged", f"{len(data)} bytes: its data ends early, it lacks {lacks}")
        image = _rgb(image)
    except Exception as error:
        reason = " ".join(str(error).split())[:100]
        return Drop("image is truncated or damaged", f"{len(data)} bytes: {type(error).__name__}: {reason}")
    turn = _UPRIGHT.get(_orientation(exif))
    return image if turn is None else image.transpose(turn)


def fit_image(
    image: Image.Image,
    size: tuple[int, int],
    *,
    crop: Literal["center", "random"],
    resample: Literal["bilinear", "bicubic", "lanczos"],
    key: int = 0,
) -> Fitted:
    """Resizes an image until it just covers a size, with its proportions and antialiased, and crops what sticks out.

    What the network is told of it is in section 2.2 of SDXL (arXiv:2307.01952).

    Args:
        image: RGB.
        size: height and width.
        crop: from the centre, or from a place that `key` determines.
        resample: Pillow's filter. An image that covers the size as it is is only cropped.
        key: not negative; the same one always gives the same place.
    """
    height, width = size
    scale = max(height / image.height, width / image.width)
    full_height = max(height, round(image.height * scale))
    full_width = max(width, round(image.width * scale))
    top, left = _corner(full_height - height, full_width - width, crop, key)
    if (full_width, full_height) == image.size:
        fitted = image.crop((left, top, left + width, top + height))
    else:
        # The pixels of the resized image that are within the crop; those around it are never computed.
        across, down = image.width / full_width, image.height / full_height
        box = (
            left * across,
            top * down,
            min((left + width) * across, image.width),
            min((top + height) * down, image.height),
        )
        fitted = image.resize((width, height), _RESAMPLING[resample], box)
    return Fitted(np.asarray(fitted), (image.height, image.width), (full_height, full_width), (top, left))


def encode_jpeg(image: np.ndarray) -> bytes:
    """An image `[H, W, 3]` in [0, 1] as JPEG of quality 95 with full colour resolution."""
    buffer = io.BytesIO()
    pixels = np.round(np.clip(image, 0, 1) * 255).astype(np.uint8)
    Image.fromarray(pixels).save(buffer, "JPEG", quality=95, subsampling=0)
    return buffer.getvalue()


def _corner(spare_height: int, spare_width: int, crop: str, key: int) -> tuple[int, int]:
    if crop == "center":
        return spare_height // 2, spare_width // 2
    top, left = np.random.default_rng([key]).integers((spare_height + 1, spare_width + 1))
    return int(top), int(left)


def _known(data: bytes) -> bool:
    return data.startswith((b"\xff\xd8\xff", _PNG)) or (data[:4] == b"RIFF" and data[8:12] == b"WEBP")


def _canvas(data: bytes) -> tuple[int, int] | None:
    """Width and height of a WebP, whose decoder takes memory for all pixels as soon as it is made; else None."""
    if data[:4] != b"RIFF" or len(data) < 30:
        return None
    kind, body = data[12:16], data[20:30]
    if kind == b"VP8X":
        return int.from_bytes(body[4:7], "little") + 1, int.from_bytes(body[7:10], "little") + 1
    if kind == b"VP8L":
        bits = int.from_bytes(body[1:5], "little")
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    return None  # VP8 has one frame, of at most 2^14 pixels each way


def _size_drop(size: tuple[int, int] | None, smallest_side: int, most_pixels: int) -> Drop | None:
    if size is None:
        return None
    width, height = size
    if width * height > most_pixels:
        return Drop("image is too large", f"{width} x {height} pixels; at most {most_pixels} are decoded")
    if min(size) < smallest_side:
        return Drop("image is too small", f"{width} x {height} pixels; expected at least {smallest_side} each way")
    return None


def _opened(data: bytes) -> tuple[Image.Image, bytes]:
    """An image of which only the header is read, and its EXIF data.

    Image.open would warn, in any thread, of large images, damaged EXIF data and animations; warnings can only be
    silenced for all threads at once. So the formats are opened by name, and what is warned of is taken out before.
    """
    if data.startswith(_PNG):
        image = PngImagePlugin.PngImageFile(io.BytesIO(_still(data) if b"acTL" in data else data))
        return image, image.info.get("exif", b"")
    if data.startswith(b"RIFF"):
        image = WebPImagePlugin.WebPImageFile(io.BytesIO(data))
        return image, image.info.get("exif", b"")
    place = data.find(_EXIF)
    if place < 0:
        return JpegImagePlugin.JpegImageFile(io.BytesIO(data)), b""
    image = JpegImagePlugin.JpegImageFile(io.BytesIO(data.replace(_EXIF, b"skip\0\0")))
    return image, data[place : place + 2**16]


def _lacks(data: bytes, image: Image.Image) -> str:
    """What an image lacks that was decoded without an error."""
    if data.startswith(_PNG):
        return what_png_lacks(data, image)
    if data.startswith(b"RIFF"):  # its decoder tells
        return ""
    return what_jpeg_lacks(data, image, lambda longer: _opened(longer)[0])


def _still(data: bytes) -> bytes:
    """A PNG without the chunks of an animation."""
    kept, start = [_PNG], len(_PNG)
    while start < len(data):
        end = start + 12 + int.from_bytes(data[start : start + 4], "big")
        if data[start + 4 : start + 8] not in (b"acTL", b"fcTL", b"fdAT"):
            kept.append(data[start:end])
        start = end
    return b"".join(kept)


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and not image.has_transparency_data:
        return image
    if image.mode.startswith("I"):  # 16 bits, which Pillow would clip
        grey = np.asarray(image).astype(np.int64)
        return Image.fromarray(((grey * 255 + 32767) // 65535).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    return image.convert("RGB")


def _orientation(exif: bytes) -> int:
    """The EXIF tag, 1 to 8; 1, upright, where the data does not tell."""
    tiff = exif.removeprefix(_EXIF)
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(tiff[:4])
    if order is None:
        return 1
    try:
        (start,) = struct.unpack_from(f"{order}I", tiff, 4)
        (count,) = struct.unpack_from(f"{order}H", tiff, start)
        for entry in range(start + 2, start + 2 + 12 * count, 12):
            tag, _, _, value = struct.unpack_from(f"{order}HHIH", tiff, entry)
            if tag == _ORIENTATION:
                return value
    except struct.error:  # damaged
        pass
    return 1
