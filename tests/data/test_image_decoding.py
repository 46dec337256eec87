import io
import random
import re
import struct
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image, ImageOps
from preference_sets import encoded_image

from flax_pref.data.images import decode_image, encode_jpeg, fit_image
from flax_pref.data.pairs import Drop

FILTERS = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}


def smooth(height, width, mode="RGB", number=0):
    image = Image.open(io.BytesIO(encoded_image(number, (height, width), "PNG")))
    return image.convert(mode)


def encoded(image, image_format, **options):
    file = io.BytesIO()
    image.save(file, image_format, **options)
    return file.getvalue()


def pixels(image):
    assert isinstance(image, Image.Image) and image.mode == "RGB", image
    return np.asarray(image).astype(int)


@pytest.mark.parametrize(("image_format", "options"), [("PNG", {}), ("WEBP", {"lossless": True}), ("JPEG", {})])
def test_formats_of_preference_sets_give_their_pixels(image_format, options):
    data = encoded(smooth(40, 56), image_format, **options)
    assert np.array_equal(pixels(decode_image(data)), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(10))
def test_images_are_upright_whatever_orientation_the_camera_wrote(image_format, orientation):
    exif = Image.Exif()
    exif[0x010F], exif[0x0112] = "a camera", orientation
    data = encoded(smooth(40, 56), image_format, exif=exif)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    image = decode_image(data)
    assert image.size == expected.size == ((40, 56) if 5 <= orientation <= 8 else (56, 40))
    assert np.array_equal(pixels(image), np.asarray(expected))


def test_exif_data_of_either_byte_order_is_read():
    little = b"II*\0" + struct.pack("<IHHHIHH", 8, 1, 0x0112, 3, 1, 6, 0)
    big = b"MM\0*" + struct.pack(">IHHHIHH", 8, 1, 0x0112, 3, 1, 6, 0)
    for tiff in (little, big):
        assert decode_image(encoded(smooth(40, 56), "JPEG", exif=b"Exif\0\0" + tiff)).size == (40, 56)


def test_cmyk_and_grey_images_become_rgb():
    cmyk = smooth(40, 56, "CMYK")
    decoded = pixels(decode_image(encoded(cmyk, "JPEG", quality=100)))
    assert np.abs(decoded - np.asarray(cmyk.convert("RGB"))).max() < 12
    for mode in ("L", "1"):
        grey = smooth(40, 56, mode)
        decoded = pixels(decode_image(encoded(grey, "PNG")))
        assert np.array_equal(decoded, np.repeat(np.asarray(grey.convert("L"))[..., None], 3, -1))
    assert pixels(decode_image(encoded(smooth(40, 56, "L"), "JPEG"))).shape == (40, 56, 3)


def test_transparent_parts_are_laid_on_white():
    colour = np.asarray(smooth(40, 56))
    alpha = np.zeros((40, 56, 1), np.uint8)
    alpha[:20], alpha[20:30] = 255, 51
    expected = np.round(colour * (alpha / 255) + 255 * (1 - alpha / 255))
    rgba = Image.fromarray(np.concatenate([colour, alpha], -1))
    for data in (encoded(rgba, "PNG"), encoded(rgba, "WEBP", lossless=True, exact=True)):
        assert np.abs(pixels(decode_image(data)) - expected).max() <= 1
    grey = np.asarray(rgba.convert("LA"))
    decoded = pixels(decode_image(encoded(Image.fromarray(grey, "LA"), "PNG")))
    assert np.array_equal(decoded[:20, :, 0], grey[:20, :, 0]) and (decoded[30:] == 255).all()


def test_palettes_with_transparent_entries_are_laid_on_white():
    image = Image.new("P", (40, 40))
    image.putpalette([10, 20, 30, 200, 100, 0, 0, 0, 255])
    image.paste(1, (0, 0, 40, 10))
    image.paste(2, (0, 10, 40, 20))
    for transparency, second in ((0, [0, 0, 255]), (bytes([0, 255, 0]), [255, 255, 255])):
        decoded = pixels(decode_image(encoded(image, "PNG", transparency=transparency)))
        assert decoded[[0, 15, 35], 0].tolist() == [[200, 100, 0], second, [255, 255, 255]]
    key = encoded(Image.new("RGB", (40, 40), (1, 2, 3)), "PNG", transparency=(1, 2, 3))
    assert (pixels(decode_image(key)) == 255).all()
    assert pixels(decode_image(encoded(image, "PNG")))[35, 0].tolist() == [10, 20, 30]


def test_sixteen_bits_are_scaled_not_clipped():
    grey = np.linspace(0, 65535, 40 * 40).reshape(40, 40).astype(np.uint16)
    decoded = pixels(decode_image(encoded(Image.fromarray(grey), "PNG")))
    assert np.abs(decoded - grey[..., None] / 257).max() <= 0.5


def test_of_an_animation_the_first_image_is_taken():
    frames = [smooth(40, 56, number=i) for i in range(3)]
    for image_format, options in (("PNG", {}), ("WEBP", {"lossless": True})):
        data = encoded(frames[0], image_format, save_all=True, append_images=frames[1:], **options)
        assert np.array_equal(pixels(decode_image(data)), np.asarray(frames[0]))


@pytest.mark.parametrize(
    "data", [b"", b"\xff", b"no image", b"<html>not found</html>", b"GIF89a" + bytes(100), b"RIFF" + bytes(100)]
)
def test_bytes_that_are_no_image_are_told_from_damaged_ones(data):
    drop = decode_image(data)
    assert drop.reason == "not an image" and drop.detail.startswith(f"{len(data)} bytes"), drop


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP"])
def test_truncated_images_are_never_taken_for_whole_ones(image_format):
    data = encoded(Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)), image_format)
    for share in (0.02, 0.1, 0.5, 0.9, 0.99):
        drop = decode_image(data[: max(20, int(len(data) * share))])
        assert isinstance(drop, Drop) and drop.reason == "image is truncated or damaged", (share, drop)
        assert "\n" not in drop.detail


JPEGS = {
    "plain": {},
    "444": {"subsampling": 0},
    "progressive": {"progressive": True},
    "progressive grey": {"progressive": True, "mode": "L"},
    "optimized": {"optimize": True},
    "restarts": {"restart_marker_rows": 1},
    "grey": {"mode": "L"},
    "cmyk": {"mode": "CMYK"},
}


def lacking(data):
    drop = decode_image(data)
    return (
        isinstance(drop, Drop) and drop.reason == "image is truncated or damaged" and "data ends early" in drop.detail
    )


@pytest.mark.parametrize("kind", JPEGS)
def test_a_jpeg_whose_data_ends_early_is_not_filled_with_grey(kind):
    """In good order, with its end mark; or whole, but with a header that claims more rows."""
    options = dict(JPEGS[kind])
    data = encoded(smooth(200, 312, options.pop("mode", "RGB")), "JPEG", quality=90, **options)
    whole = decode_image(data)
    assert isinstance(whole, Image.Image)
    scan = data.index(b"\xff\xda") + 20
    for share in (0.0, 0.02, 0.3, 0.6, 0.9):
        short = data[: scan + int(share * (len(data) - scan))].rstrip(b"\xff") + b"\xff\xd9"
        assert np.array(Image.open(io.BytesIO(short))).shape[:2] == (200, 312), "Pillow takes it"
        assert lacking(short), (share, decode_image(short))
        assert lacking(short + data), "another image behind its end is not its own"
    frame = re.search(rb"\xff[\xc0\xc2]..\x08", data, re.DOTALL).end()
    assert data[frame : frame + 2] == struct.pack(">H", 200)
    assert lacking(data[:frame] + struct.pack(">H", 2000) + data[frame + 2 :])


@pytest.mark.parametrize("kind", JPEGS)
@pytest.mark.parametrize("grey", [127, 128, 129])
def test_a_whole_jpeg_that_ends_in_grey_is_kept(kind, grey):
    options = dict(JPEGS[kind])
    mode = options.pop("mode", "RGB")
    image = smooth(40, 60)
    image.paste((grey,) * 3, (0, 20, 60, 40))
    thumbnail = encoded(smooth(40, 40), "JPEG")
    data = encoded(image.convert(mode), "JPEG", **options, exif=b"Exif\0\0" + thumbnail)
    for whole in (data, data + data, data[:-2] + b"left over" + data[-2:]):
        expected = Image.open(io.BytesIO(whole.replace(b"Exif", b"skip"))).convert("RGB")
        assert np.array_equal(pixels(decode_image(whole)), np.asarray(expected))


def png(image, rows, interlaced=False):
    """A PNG of an image `[H, W, 3]` with data of its first rows only, in good order."""
    passes = [(0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)]
    lines = [
        b"\0" + line.tobytes()
        for left, top, across, down in (passes if interlaced else [(0, 0, 1, 1)])
        for line in image[top::down, left::across]
        if line.size
    ]
    header = struct.pack(">IIBBBBB", image.shape[1], image.shape[0], 8, 2, 0, 0, interlaced)
    data = chunk(b"IDAT", zlib.compress(b"".join(lines[:rows])))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + data + chunk(b"IEND", b"")


@pytest.mark.parametrize("interlaced", [False, True])
def test_a_png_whose_data_ends_early_is_not_filled_with_black(interlaced):
    image = np.asarray(smooth(41, 53)).copy()
    image[-3:] = 0
    whole = png(image, None, interlaced)
    assert np.array_equal(pixels(decode_image(whole)), image)
    for missing in (1, 2, 20):
        assert np.array(Image.open(io.BytesIO(png(image, -missing, interlaced)))).shape == image.shape, (
            "Pillow takes it"
        )
        assert lacking(png(image, -missing, interlaced))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16"])
def test_a_whole_png_that_ends_in_zeros_is_kept(mode):
    for width in (33, 40):
        data = encoded(Image.new(mode, (width, 35)), "PNG")
        assert isinstance(decode_image(data), Image.Image)


def test_images_too_small_for_the_network_are_refused():
    for size in ((1, 1), (31, 400), (400, 31)):
        drop = decode_image(encoded(smooth(*size), "PNG"))
        assert drop == Drop("image is too small", f"{size[1]} x {size[0]} pixels; expected at least 32 each way")
    assert decode_image(encoded(smooth(1, 1), "PNG"), smallest_side=1).size == (1, 1)
    assert decode_image(encoded(smooth(32, 32), "JPEG")).size == (32, 32)


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def bombs(width, height):
    """A PNG whose pixels are really there, if there are few enough; a JPEG and a WebP that only claim to be huge."""
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    zeros = zlib.compress(bytes(min((width // 8 + 1) * height, 20_000_000)), 9)
    yield b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zeros) + chunk(b"IEND", b"")
    jpeg = bytearray(encoded(smooth(40, 40), "JPEG"))
    frame = jpeg.index(b"\xff\xc0")
    jpeg[frame + 5 : frame + 9] = struct.pack(">HH", min(height, 65535), min(width, 65535))
    yield bytes(jpeg)
    canvas = struct.pack("<I", width - 1)[:3] + struct.pack("<I", height - 1)[:3]
    body = b"WEBPVP8X" + struct.pack("<I", 10) + bytes(4) + canvas + encoded(smooth(40, 40), "WEBP")[12:]
    yield b"RIFF" + struct.pack("<I", len(body)) + body


@pytest.mark.parametrize("size", [(9000, 9000), (12_000, 12_000), (16_000_000, 16_000_000)])
def test_decompression_bombs_are_refused_by_their_header_in_any_thread(size):
    with ThreadPoolExecutor(4) as pool, warnings.catch_warnings():
        warnings.simplefilter("error")
        for drop in pool.map(decode_image, list(bombs(*size)) * 4):
            assert drop.reason == "image is too large" and "at most 64000000" in drop.detail, drop
    assert Image.MAX_IMAGE_PIXELS == 89478485


def test_a_larger_limit_than_pillows_own_decodes_without_a_warning():
    data = next(bombs(10_000, 10_000))
    assert decode_image(data, most_pixels=100_000_000).size == (10_000, 10_000)


def test_what_pillow_would_warn_of_is_silent():
    broken_exif = b"Exif\0\0MM\0*" + struct.pack(">IHHHII", 8, 500, 0x0112, 3, 1_000_000, 99)
    apng = bytearray(encoded(smooth(40, 56), "PNG", save_all=True, append_images=[smooth(40, 56, number=1)]))
    start = apng.index(b"acTL")
    apng[start - 4 : start + 16] = chunk(b"acTL", bytes(8))
    for data in (encoded(smooth(40, 56), "JPEG", exif=broken_exif), bytes(apng)):
        with pytest.warns(UserWarning):
            image = Image.open(io.BytesIO(data))
            image.getexif()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert decode_image(data).size == (56, 40)


def test_damaged_images_are_drops_or_pixels_and_nothing_else():
    exif = Image.Exif()
    exif[0x0112] = 6
    palette = smooth(40, 56).quantize(16)
    originals = [
        encoded(smooth(40, 56), "JPEG", exif=exif),
        encoded(smooth(40, 56, "CMYK"), "JPEG"),
        encoded(smooth(40, 56), "PNG", exif=exif),
        encoded(palette, "PNG", transparency=bytes(range(16))),
        encoded(smooth(40, 56), "PNG", save_all=True, append_images=[smooth(40, 56, number=1)]),
        encoded(smooth(40, 56, "RGBA"), "WEBP", lossless=True, exif=exif),
        encoded(smooth(40, 56), "WEBP", save_all=True, append_images=[smooth(40, 56, number=1)]),
    ]
    rng, drops, images = random.Random(0), 0, 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(200):
            for original in originals:
                data = bytearray(original)
                for _ in range(rng.choice([1, 1, 4])):
                    start = rng.randrange(min(len(data), rng.choice([60, 200, len(data)])))
                    data[start : start + rng.randrange(4)] = rng.choice([b"", b"\0", b"\xff", rng.randbytes(3)])
                decoded = decode_image(bytes(data))
                if isinstance(decoded, Drop):
                    drops += 1
                    assert decoded.reason and "\n" not in decoded.detail
                else:
                    images += 1
                    assert np.asarray(decoded).shape == (decoded.height, decoded.width, 3)
    assert drops > 100 and images > 100


@pytest.mark.parametrize("resample", FILTERS)
@pytest.mark.parametrize("crop", ["center", "random"])
@pytest.mark.parametrize("size", [(64, 64), (64, 96), (96, 64), (200, 320)])
def test_fitting_is_a_resize_that_keeps_proportions_and_a_crop(resample, crop, size):
    image = smooth(113, 150)
    fitted = fit_image(image, size, crop=crop, resample=resample, key=3)
    scale = max(size[0] / 113, size[1] / 150)
    full = max(size[1], round(150 * scale)), max(size[0], round(113 * scale))
    assert size[1] == full[0] or size[0] == full[1]
    resized = np.asarray(image.resize(full, FILTERS[resample])).astype(int)
    top, left = fitted.crop_top_left
    window = resized[top : top + size[0], left : left + size[1]]
    assert fitted.pixels.shape == (*size, 3) and fitted.pixels.dtype == np.uint8
    assert np.abs(fitted.pixels - window).max() <= 3 and np.abs(fitted.pixels - window).mean() < 0.3
    assert fitted.original_size == (113, 150)
    if crop == "center":
        assert fitted.crop_top_left == ((full[1] - size[0]) // 2, (full[0] - size[1]) // 2)


def test_a_crop_that_is_all_that_is_needed_keeps_every_pixel():
    image = smooth(64, 100)
    fitted = fit_image(image, (64, 64), crop="center", resample="lanczos")
    assert fitted.crop_top_left == (0, 18)
    assert np.array_equal(fitted.pixels, np.asarray(image)[:, 18:82])
    assert np.array_equal(fit_image(image, (64, 100), crop="random", resample="bilinear").pixels, np.asarray(image))


def test_a_random_crop_is_the_same_for_its_key_and_reaches_every_place():
    image = smooth(64, 68)
    places = [fit_image(image, (64, 64), crop="random", resample="lanczos", key=key).crop_top_left for key in range(60)]
    again = [fit_image(image, (64, 64), crop="random", resample="lanczos", key=key).crop_top_left for key in range(60)]
    assert places == again
    assert {top for top, _ in places} == {0} and {left for _, left in places} == set(range(5))


def test_extreme_proportions_do_not_take_memory_for_what_is_cropped():
    image = Image.new("RGB", (400_000, 32))
    fitted = fit_image(image, (512, 512), crop="center", resample="bicubic")  # 9.8 GB if it were resized whole
    assert fitted.pixels.shape == (512, 512, 3) and fitted.crop_top_left == (0, (6_400_000 - 512) // 2)


def test_images_survive_as_jpeg():
    y, x = np.mgrid[:64, :64] / 63
    image = np.stack([x, y, 1 - x], -1)
    assert np.abs(pixels(decode_image(encode_jpeg(image))) / 255 - image).max() < 0.05
