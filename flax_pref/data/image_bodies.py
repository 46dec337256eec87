"""Whether a JPEG or PNG that a decoder has accepted has all the pixels that its header claims.

Where the data of an image ends early but in good order, libjpeg fills the rest with grey (128) and Pillow's PNG decoder
with zeros, and neither says so.
"""

import re
import zlib
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from PIL import Image

_END_OF_SCAN = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")  # all others are data or restart markers
_FRAMES = {0xC0, 0xC1, 0xC2, 0xC3, 0xC5, 0xC6, 0xC7, 0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF}  # ITU T.81, table B.1
_PROGRESSIVE = {0xC2, 0xC6, 0xCA, 0xCE}
_SCAN, _END = 0xDA, 0xD9
# Data, also behind each restart marker: a decoder that waits for one skips all else.
_FILLER = b"".join(marker + bytes(range(1, 255)) * 2 for marker in (b"", *(b"\xff%c" % i for i in range(0xD0, 0xD8))))
_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # of the colour types of PNG
_ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))


def what_jpeg_lacks(data: bytes, image: Image.Image, decode: Callable[[bytes], Image.Image]) -> str:
    """What a JPEG lacks of its pixels; "" if it is whole.

    Bytes between the data and the end mark change nothing if the data is whole; else they are decoded to pixels. Only
    images that end in grey, or that are refined from scan to scan, are decoded again with such bytes.

    Args:
        data: the encoded image.
        image: decoded, not converted.
        decode: as `image` was.
    """
    progressive, components, scans, end = _jpeg(data)
    if progressive:
        lowest = {(component, k): 1 for component in components for k in range(64)}
        for scan in scans:
            lowest |= {
                (component, k): scan.low for component in scan.components for k in range(scan.first, scan.last + 1)
            }
        if any(lowest.values()):
            return "scans"
    elif {component for scan in scans for component in scan.components} < set(components):
        return "scans"
    corner = np.ravel(np.asarray(image.getpixel((image.width - 1, image.height - 1))))
    if progressive or all(abs(int(value) - 128) <= 2 for value in corner):
        longer = decode(data[:end] + _FILLER + data[end:])
        if not np.array_equal(np.asarray(image), np.asarray(longer)):
            return "pixels"
    return ""


class _Scan(NamedTuple):
    """A scan: of which components it has coefficients `first` to `last`, down to bit `low`."""

    components: bytes
    first: int
    last: int
    low: int


def _jpeg(data: bytes) -> tuple[bool, bytes, list[_Scan], int]:
    """Whether it is progressive, its components, its scans, and where the data of the last one ends."""
    progressive, components, scans, place, end = False, b"", [], 2, len(data)
    while (place := data.find(b"\xff", place)) >= 0 and place + 4 <= len(data):
        kind, size = data[place + 1], int.from_bytes(data[place + 2 : place + 4], "big")
        segment = data[place + 4 : place + 2 + size]
        if kind == _END:
            break
        if kind in (0x00, 0x01, 0xFF) or 0xD0 <= kind <= 0xD8:  # no segment
            place += 1 if kind == 0xFF else 2
            continue
        place += 2 + size
        if kind in _FRAMES:
            progressive, components = kind in _PROGRESSIVE, segment[6::3]
        elif kind == _SCAN:
            *ids, first, last, bits = segment[1 : 1 + 2 * segment[0] : 2] + segment[1 + 2 * segment[0] :][:3]
            scans.append(_Scan(bytes(ids), first, last, bits & 15))
            found = _END_OF_SCAN.search(data, place)
            place = end = found.start() if found else len(data)
    return progressive, components, scans, end


def what_png_lacks(data: bytes, image: Image.Image) -> str:
    """What a PNG lacks of its pixels; "" if it is whole.

    Only the data of interlaced images and of those that end in zeros is counted.

    Args:
        data: the encoded image.
        image: decoded, not converted.
    """
    width, height = (int.from_bytes(data[place : place + 4], "big") for place in (16, 20))
    depth, colour, interlaced = data[24], data[25], data[28]
    if not interlaced and np.any(image.getpixel((width - 1, height - 1))):
        return ""
    passes = _ADAM7 if interlaced else ((0, 0, 1, 1),)
    needed = 0
    for left, top, across, down in passes:
        columns, rows = -(-max(width - left, 0) // across), -(-max(height - top, 0) // down)
        needed += rows * (1 + -(-columns * depth * _CHANNELS[colour] // 8)) if columns else 0
    inflater, found, place = zlib.decompressobj(), 0, 8
    while place < len(data) and found < needed and not inflater.eof:
        size = int.from_bytes(data[place : place + 4], "big")
        if data[place + 4 : place + 8] == b"IDAT":
            piece = data[place + 8 : place + 8 + size]
            while piece and found < needed:
                found += len(inflater.decompress(piece, 2**20))
                piece = inflater.unconsumed_tail
        place += 12 + size
    return "pixels" if found < needed else ""
