"""Strict decoding: the pixels of good images, and the error of each kind of broken input."""

from __future__ import annotations

import hashlib
import io
import struct
import time
import warnings
import zlib
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile

from batchvl.config.options import ImageOptions
from batchvl.errors import CorruptImage, NotAnImage, PrepareError, PrepareFailed, TooManyPixels, TruncatedImage
from batchvl.images.decode import FORMATS, decode
from tests.fuzzing import examples
from tests.images.drawing import STORED, drawing, encoded
from tests.timing import scaled

LIMITS = ImageOptions()
WHITE, BLACK, RED, GREEN, BLUE = (255, 255, 255), (0, 0, 0), (255, 0, 0), (0, 255, 0), (0, 0, 255)


def rgb(data: bytes, limits: ImageOptions = LIMITS) -> Image.Image:
    return decode(data, limits, "it")[0]


def pixel(data: bytes, at: tuple[int, int] = (0, 0)) -> Any:
    image = rgb(data)
    assert image.mode == "RGB"
    return image.getpixel(at)


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(width: int, height: int, depth: int, color: int, rows: bytes, *chunks: bytes) -> bytes:
    """Return a PNG with this bit depth and color type, and additional chunks before its pixels."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0))
    parts = (header, *chunks, chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def test_the_image_and_its_record() -> None:
    data = encoded(drawing((7, 5)))
    image, info = decode(memoryview(data), LIMITS, "https://h/?…")
    assert (info.source, info.width, info.height, info.bytes) == ("https://h/?…", 7, 5, len(data))
    assert info.sha256 == hashlib.sha256(data).hexdigest()
    assert image.tobytes() == drawing((7, 5)).tobytes()
    assert type(image) is Image.Image
    assert not image.info


@pytest.mark.parametrize(
    ("format", "options"),
    [
        ("PNG", {}),
        ("BMP", {}),
        ("TIFF", {}),
        ("TIFF", {"compression": "tiff_lzw"}),
        ("WEBP", {"lossless": True}),
        ("PPM", {}),
        ("JPEG2000", {"irreversible": False}),
    ],
)
def test_lossless_formats_keep_their_pixels(format: str, options: dict[str, Any]) -> None:
    assert rgb(encoded(drawing(), format, **options)).tobytes() == drawing().tobytes()


@pytest.mark.parametrize(
    ("format", "options"), [("JPEG", {"progressive": True}), ("WEBP", {}), ("AVIF", {}), ("GIF", {})]
)
def test_lossy_formats_have_the_pixels_that_pillow_decodes(format: str, options: dict[str, Any]) -> None:
    data = encoded(drawing(), format, **options)
    assert rgb(data).tobytes() == Image.open(io.BytesIO(data)).convert("RGB").tobytes()


def test_the_first_image_of_an_mpo_is_decoded() -> None:
    data = encoded(drawing(), "MPO", save_all=True, append_images=[Image.new("RGB", (64, 48))])
    assert Image.open(io.BytesIO(data)).format == "MPO"
    assert rgb(data).tobytes() == rgb(encoded(drawing(), "JPEG")).tobytes()


@pytest.mark.parametrize("orientation", [0, 1, 2, 3, 4, 5, 6, 7, 8, 9])
@pytest.mark.parametrize(("format", "options"), [("PNG", {}), ("TIFF", {}), ("WEBP", {"lossless": True})])
def test_images_are_rotated_upright(orientation: int, format: str, options: dict[str, Any]) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = drawing().transpose(STORED[orientation]) if orientation in STORED else drawing()
    image, info = decode(encoded(stored, format, exif=exif, **options), LIMITS, "it")
    assert image.tobytes() == drawing().tobytes()
    assert (info.width, info.height) == (64, 48)
    assert 0x0112 not in image.getexif(), "an engine would rotate it again"


def test_jpegs_are_rotated_upright() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(drawing().transpose(Image.Transpose.ROTATE_90), "JPEG", exif=exif, quality=100, subsampling=0)
    image, info = decode(data, LIMITS, "it")
    assert image.size == (info.width, info.height) == (64, 48)
    red = image.getchannel("R")
    assert red.getpixel((5, 2)) < 30 < 225 < red.getpixel((5, 45))
    assert 0x0112 not in image.getexif()


@pytest.mark.parametrize(
    "exif", [b"Exif\0\0MM\0*\0\0\0\x08\xff\xff" + b"\1" * 40, b"Exif\0\0", b"Exif\0\0" + b"\xff" * 30]
)
def test_broken_exif_is_ignored(exif: bytes) -> None:
    data = encoded(drawing(), "JPEG", exif=exif)
    assert rgb(data).tobytes() == rgb(encoded(drawing(), "JPEG")).tobytes()


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (Image.new("RGBA", (2, 2), (255, 0, 0, 0)), WHITE),
        (Image.new("RGBA", (2, 2), (255, 0, 0, 255)), RED),
        (Image.new("RGBA", (2, 2), (255, 0, 0, 127)), (255, 128, 128)),
        (Image.new("LA", (2, 2), (0, 0)), WHITE),
        (Image.new("LA", (2, 2), (0, 51)), (204, 204, 204)),
    ],
)
def test_transparent_pixels_are_on_white(image: Image.Image, expected: tuple[int, int, int]) -> None:
    assert pixel(encoded(image)) == expected
    if image.mode == "RGBA":
        assert pixel(encoded(image, "WEBP", lossless=True, exact=True)) == expected
        assert pixel(encoded(image, "TIFF")) == expected


def test_transparent_colors_of_palettes_are_white() -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([*RED, *GREEN, *BLUE])
    image.putpixel((1, 0), 1)
    assert [pixel(encoded(image), (x, 0)) for x in (0, 1)] == [RED, GREEN]
    assert [pixel(encoded(image, transparency=0), (x, 0)) for x in (0, 1)] == [WHITE, GREEN]
    assert [pixel(encoded(image, "GIF", transparency=1), (x, 0)) for x in (0, 1)] == [RED, WHITE]
    half = encoded(image, transparency=bytes([255, 0x33]))
    assert [pixel(half, (x, 0)) for x in (0, 1)] == [RED, (204, 255, 204)]


@pytest.mark.parametrize(
    ("depth", "color", "row", "transparent", "expected"),
    [
        (1, 0, b"\0\x80", b"\0\1", [WHITE, BLACK]),
        (8, 0, b"\0\x07\x09", b"\0\x07", [WHITE, (9, 9, 9)]),
        (16, 0, b"\0\x07\x07\x07\x08", b"\x07\x07", [WHITE, (7, 7, 7)]),
        (8, 2, b"\0" + bytes(RED + GREEN), b"\0\xff\0\0\0\0", [WHITE, GREEN]),
        (16, 2, b"\0" + b"\xff\xff\0\0\0\0" + b"\0\0\xff\xff\0\0", b"\xff\xff\0\0\0\0", [WHITE, GREEN]),
    ],
)
def test_transparent_colors_without_a_palette_are_white(
    depth: int, color: int, row: bytes, transparent: bytes, expected: list[tuple[int, int, int]]
) -> None:
    data = png(2, 1, depth, color, row, chunk(b"tRNS", transparent))
    assert [pixel(data, (x, 0)) for x in (0, 1)] == expected


def test_cmyk_is_not_inverted() -> None:
    red = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    assert pixel(encoded(red, "TIFF")) == RED
    assert pixel(encoded(red, "JPEG")) == pytest.approx(RED, abs=2)


def test_ycck_is_not_inverted() -> None:
    # The components of a red YCCK image, stored as Adobe does, then marked as YCCK.
    data = encoded(Image.new("CMYK", (16, 16), (76, 84, 255, 0)), "JPEG", quality=100, subsampling=0)
    transform = data.index(b"Adobe") + 11
    assert data[transform] == 0
    assert pixel(data[:transform] + b"\2" + data[transform + 1 :]) == pytest.approx(RED, abs=5)


@pytest.mark.parametrize(("value", "expected"), [(0, 0), (128, 0), (129, 1), (257, 1), (32768, 128), (65535, 255)])
def test_16_bit_gray_is_rounded_to_8_bits(value: int, expected: int) -> None:
    assert pixel(png(1, 1, 16, 0, b"\0" + struct.pack(">H", value))) == (expected,) * 3
    assert pixel(encoded(Image.new("I;16", (1, 1), value), "TIFF")) == (expected,) * 3
    assert pixel(b"P5 1 1 65535\n" + struct.pack(">H", value)) == (expected,) * 3


def test_16_bit_big_endian_tiff() -> None:
    image = Image.frombytes("I;16B", (2, 1), struct.pack(">HH", 257, 65535))
    assert [pixel(encoded(image, "TIFF"), (x, 0)) for x in (0, 1)] == [(1, 1, 1), WHITE]


@pytest.mark.parametrize(
    ("mode", "values", "expected"),
    [
        ("F", (0.0, 0.5, 1.0), (0, 128, 255)),
        ("F", (0.0, 7.4, 255.0), (0, 7, 255)),
        ("F", (-1.0, 0.0, 1.0), (0, 128, 255)),
        ("F", (3.0, 3.0, 3.0), (3, 3, 3)),
        ("I", (0, 257, 65535), (0, 1, 255)),
        ("I", (0, 1 << 19, 1 << 20), (0, 128, 255)),
        ("I", (-10, 0, 10), (0, 128, 255)),
    ],
)
def test_gray_of_32_bits(mode: str, values: tuple[float, ...], expected: tuple[int, ...]) -> None:
    image = Image.new(mode, (3, 1))
    image.putdata(values)
    assert tuple(pixel(encoded(image, "TIFF"), (x, 0))[0] for x in range(3)) == expected


def test_infinite_values_are_corrupt() -> None:
    image = Image.new("F", (2, 1))
    image.putdata((float("inf"), 0.0))
    with pytest.raises(CorruptImage, match="finite"):
        rgb(encoded(image, "TIFF"))


def test_other_modes_become_rgb() -> None:
    assert pixel(encoded(Image.new("1", (3, 3), 1))) == WHITE
    assert pixel(encoded(Image.new("L", (3, 3), 7))) == (7, 7, 7)
    assert pixel(encoded(Image.new("LAB", (3, 3), (255, 128, 128)), "TIFF")) == pytest.approx(WHITE, abs=2)
    assert pixel(encoded(Image.new("YCbCr", (16, 16), (255, 128, 128)), "JPEG")) == pytest.approx(WHITE, abs=2)


@pytest.mark.parametrize("format", ["GIF", "PNG", "WEBP", "TIFF", "AVIF"])
def test_the_first_frame_or_page_is_decoded(format: str) -> None:
    red, blue = Image.new("RGB", (16, 16), RED), Image.new("RGB", (16, 16), BLUE)
    data = encoded(red, format, save_all=True, append_images=[blue])
    assert Image.open(io.BytesIO(data)).n_frames == 2  # type: ignore[attr-defined]
    assert pixel(data, (8, 8)) == pytest.approx(RED, abs=3)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("kept", [0.95, 0.6, 0.3])
def test_truncated_images_are_errors(format: str, kept: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)  # as importing lmdeploy leaves it
    data = encoded(drawing(), format)
    with pytest.raises(TruncatedImage, match=r"^it: ends after [0-9,]+ bytes"):
        rgb(data[: int(len(data) * kept)])


@pytest.mark.parametrize("format", ["JPEG", "PNG", "GIF"])  # others have no checksums: damage decodes to something
def test_corrupt_images_are_errors(format: str) -> None:
    data = bytearray(encoded(drawing(), format))
    middle = slice(len(data) // 3, len(data) // 2)
    data[middle] = bytes(len(data[middle]))
    with pytest.raises(PrepareError) as failed:
        rgb(bytes(data))
    assert type(failed.value) in (CorruptImage, TruncatedImage)


@pytest.mark.parametrize(
    ("data", "description"),
    [
        (b"", "no bytes at all"),
        (bytes(100), "100 zero bytes"),
        (b"  \n<!DOCTYPE html><html>", "an HTML page"),
        (b"\xef\xbb\xbf<HTML>", "an HTML page"),
        (b'<?xml version="1.0"?>\n<svg xmlns="x"/>', "an SVG drawing"),
        (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "XML"),
        (b'{"error": "no"}', "JSON"),
        (b"%PDF-1.7", "a PDF"),
        (b"PK\x03\x04", "a ZIP"),
        (b"\x1f\x8b\x08", "gzip"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "a Git LFS pointer"),
        (b"\0\0\0\x18ftypheic\0\0\0\0", "a HEIC image"),
        (b"\0\0\0\x18ftypisom\0\0\0\0", "a video"),
        (b"Not Found\n", "text"),
        (b"\x01\x02\xff\xfe", "bytes of an unknown format"),
    ],
)
def test_the_error_describes_what_is_not_an_image(data: bytes, description: str) -> None:
    with pytest.raises(NotAnImage, match=f"^it: found {description}.* expected an image"):
        rgb(data)


def test_other_formats_of_pillow_are_not_decoded() -> None:
    for format in ("ICO", "TGA", "PCX", "PDF"):
        with pytest.raises(NotAnImage):
            rgb(encoded(drawing(), format))


def test_too_many_pixels_are_found_before_decoding() -> None:
    data = png(50_000, 50_000, 8, 2, b"")
    start = time.process_time()
    with pytest.raises(TooManyPixels, match="50000 x 50000 pixels are 2,500,000,000"):
        rgb(data)
    assert time.process_time() - start < scaled(0.2)
    fits = encoded(drawing((100, 50)))
    assert rgb(fits, ImageOptions(max_image_pixels=5000)).size == (100, 50)
    with pytest.raises(TooManyPixels):
        rgb(fits, ImageOptions(max_image_pixels=4999))


def test_the_limit_of_pillow_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    assert rgb(encoded(drawing())).size == (64, 48)


def test_one_wrong_bit_in_a_png_is_found() -> None:
    data = bytearray(encoded(drawing()))
    data[data.index(b"IDAT") + 1000] ^= 1
    with pytest.raises(CorruptImage, match=r"IDAT.*checksum"):
        rgb(bytes(data))


@pytest.mark.parametrize("kind", [b"zTXt", b"iCCP", b"iTXt"])
def test_decompression_bombs_in_metadata_are_not_unpacked(kind: bytes) -> None:
    packed = zlib.compress(bytes(100 << 20), 1)
    head = {b"zTXt": b"k\0\0", b"iCCP": b"k\0\0", b"iTXt": b"k\0\1\0\0\0"}[kind]
    start = time.process_time()
    with pytest.raises(CorruptImage):
        rgb(png(1, 1, 8, 0, b"\0\0", chunk(kind, head + packed)))
    assert time.process_time() - start < scaled(0.3)


def test_running_out_of_memory_fails_the_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(self: object) -> None:
        raise MemoryError

    monkeypatch.setattr(ImageFile.ImageFile, "load", load)
    with pytest.raises(PrepareFailed, match="memory"):
        rgb(encoded(drawing(), "BMP"))


SEEDS = [encoded(drawing((24, 16)), format) for format in FORMATS]
SEEDS.append(encoded(Image.new("P", (9, 9)), "PNG", transparency=0))


@settings(max_examples=examples(300), deadline=None)
@given(st.sampled_from(SEEDS), st.lists(st.tuples(st.floats(0, 1), st.binary(max_size=6)), max_size=4), st.floats(0, 1))
def test_any_bytes_decode_or_raise_a_row_error(data: bytes, changes: list[tuple[float, bytes]], kept: float) -> None:
    for position, new in changes:
        start = int(position * len(data))
        data = data[:start] + new + data[start + len(new) :]
    if kept < 0.5:
        data = data[: int(2 * kept * len(data))]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            mode = rgb(data, ImageOptions(max_image_pixels=1_000_000)).mode
        except PrepareError:
            return
    assert mode == "RGB"
