"""Strict decoding, data URIs, and files: what comes out, and which error each broken input is."""

from __future__ import annotations

import base64
import hashlib
import io
import os
import random
import socket
import struct
import time
import warnings
import zlib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile

from batchvl.config.options import ImageOptions
from batchvl.errors import (
    CorruptImage,
    EmptyImage,
    ForbiddenPath,
    InvalidDataUri,
    MissingFile,
    NotAnImage,
    PrepareError,
    PrepareFailed,
    TooManyBytes,
    TooManyPixels,
    TruncatedImage,
)
from batchvl.images.decode import FORMATS, decode
from batchvl.images.files import check_beneath, open_beneath
from batchvl.manifest.image_refs import decode_data_uri

LIMITS = ImageOptions()
WHITE, BLACK, RED, GREEN, BLUE = (255, 255, 255), (0, 0, 0), (255, 0, 0), (0, 255, 0), (0, 0, 255)


def encoded(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def rgb(data: bytes, limits: ImageOptions = LIMITS) -> Image.Image:
    return decode(data, limits, "it")[0]


def pixel(data: bytes, at: tuple[int, int] = (0, 0)) -> Any:
    image = rgb(data)
    assert image.mode == "RGB"
    return image.getpixel(at)


def picture(size: tuple[int, int] = (64, 48)) -> Image.Image:
    """A picture without symmetry and with many colours."""
    red = Image.linear_gradient("L").resize(size)
    green = red.transpose(Image.Transpose.ROTATE_90).resize(size)
    return Image.merge("RGB", (red, green, Image.frombytes("L", size, random.Random(0).randbytes(size[0] * size[1]))))


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(width: int, height: int, depth: int, colour: int, rows: bytes, *chunks: bytes) -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    parts = (header, *chunks, chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def test_what_is_told_of_a_picture() -> None:
    data = encoded(picture((7, 5)))
    image, told = decode(memoryview(data), LIMITS, "https://h/?…")
    assert (told.source, told.width, told.height, told.bytes) == ("https://h/?…", 7, 5, len(data))
    assert told.sha256 == hashlib.sha256(data).hexdigest()
    assert image.tobytes() == picture((7, 5)).tobytes()
    assert type(image) is Image.Image
    assert not image.info


@pytest.mark.parametrize(
    ("format", "options"),
    [
        ("PNG", {}), ("BMP", {}), ("TIFF", {}), ("TIFF", {"compression": "tiff_lzw"}), ("WEBP", {"lossless": True}),
        ("PPM", {}), ("JPEG2000", {"irreversible": False}),
    ],
)  # fmt: skip
def test_lossless_formats_come_out_as_they_went_in(format: str, options: dict[str, Any]) -> None:
    assert rgb(encoded(picture(), format, **options)).tobytes() == picture().tobytes()


@pytest.mark.parametrize(
    ("format", "options"), [("JPEG", {"progressive": True}), ("WEBP", {}), ("AVIF", {}), ("GIF", {})]
)
def test_lossy_formats_come_out_as_pillow_has_them(format: str, options: dict[str, Any]) -> None:
    data = encoded(picture(), format, **options)
    assert rgb(data).tobytes() == Image.open(io.BytesIO(data)).convert("RGB").tobytes()


def test_mpo() -> None:
    data = encoded(picture(), "MPO", save_all=True, append_images=[Image.new("RGB", (64, 48))])
    assert Image.open(io.BytesIO(data)).format == "MPO"
    assert rgb(data).tobytes() == rgb(encoded(picture(), "JPEG")).tobytes()


TURNED = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}  # fmt: skip
"""How a camera's picture lies in the file, for each orientation."""


@pytest.mark.parametrize("orientation", [0, 1, 2, 3, 4, 5, 6, 7, 8, 9])
@pytest.mark.parametrize(("format", "options"), [("PNG", {}), ("TIFF", {}), ("WEBP", {"lossless": True})])
def test_orientation(orientation: int, format: str, options: dict[str, Any]) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    lying = picture().transpose(TURNED[orientation]) if orientation in TURNED else picture()
    image, told = decode(encoded(lying, format, exif=exif, **options), LIMITS, "it")
    assert image.tobytes() == picture().tobytes()
    assert (told.width, told.height) == (64, 48)
    assert 0x0112 not in image.getexif(), "somebody will turn it again"


def test_orientation_of_a_jpeg() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(picture().transpose(Image.Transpose.ROTATE_90), "JPEG", exif=exif, quality=100, subsampling=0)
    image, told = decode(data, LIMITS, "it")
    assert image.size == (told.width, told.height) == (64, 48)
    red = image.getchannel("R")
    assert red.getpixel((5, 2)) < 30 < 225 < red.getpixel((5, 45))
    assert 0x0112 not in image.getexif()


@pytest.mark.parametrize(
    "exif", [b"Exif\0\0MM\0*\0\0\0\x08\xff\xff" + b"\1" * 40, b"Exif\0\0", b"Exif\0\0" + b"\xff" * 30]
)
def test_broken_exif_is_ignored(exif: bytes) -> None:
    data = encoded(picture(), "JPEG", exif=exif)
    assert rgb(data).tobytes() == rgb(encoded(picture(), "JPEG")).tobytes()


@pytest.mark.parametrize(
    ("image", "seen"),
    [
        (Image.new("RGBA", (2, 2), (255, 0, 0, 0)), WHITE),
        (Image.new("RGBA", (2, 2), (255, 0, 0, 255)), RED),
        (Image.new("RGBA", (2, 2), (255, 0, 0, 127)), (255, 128, 128)),
        (Image.new("LA", (2, 2), (0, 0)), WHITE),
        (Image.new("LA", (2, 2), (0, 51)), (204, 204, 204)),
    ],
)
def test_alpha_is_laid_on_white(image: Image.Image, seen: tuple[int, int, int]) -> None:
    assert pixel(encoded(image)) == seen
    if image.mode == "RGBA":
        assert pixel(encoded(image, "WEBP", lossless=True, exact=True)) == seen
        assert pixel(encoded(image, "TIFF")) == seen


def test_transparent_colours_of_palettes() -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([*RED, *GREEN, *BLUE])
    image.putpixel((1, 0), 1)
    assert [pixel(encoded(image), (x, 0)) for x in (0, 1)] == [RED, GREEN]
    assert [pixel(encoded(image, transparency=0), (x, 0)) for x in (0, 1)] == [WHITE, GREEN]
    assert [pixel(encoded(image, "GIF", transparency=1), (x, 0)) for x in (0, 1)] == [RED, WHITE]
    half = encoded(image, transparency=bytes([255, 0x33]))
    assert [pixel(half, (x, 0)) for x in (0, 1)] == [RED, (204, 255, 204)]


@pytest.mark.parametrize(
    ("depth", "colour", "row", "transparent", "seen"),
    [
        (1, 0, b"\0\x80", b"\0\1", [WHITE, BLACK]),
        (8, 0, b"\0\x07\x09", b"\0\x07", [WHITE, (9, 9, 9)]),
        (16, 0, b"\0\x07\x07\x07\x08", b"\x07\x07", [WHITE, (7, 7, 7)]),
        (8, 2, b"\0" + bytes(RED + GREEN), b"\0\xff\0\0\0\0", [WHITE, GREEN]),
        (16, 2, b"\0" + b"\xff\xff\0\0\0\0" + b"\0\0\xff\xff\0\0", b"\xff\xff\0\0\0\0", [WHITE, GREEN]),
    ],
)
def test_transparent_colours_without_palette(
    depth: int, colour: int, row: bytes, transparent: bytes, seen: list[tuple[int, int, int]]
) -> None:
    data = png(2, 1, depth, colour, row, chunk(b"tRNS", transparent))
    assert [pixel(data, (x, 0)) for x in (0, 1)] == seen


def test_cmyk_is_not_inverted() -> None:
    red = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    assert pixel(encoded(red, "TIFF")) == RED
    assert max(abs(found - wanted) for found, wanted in zip(pixel(encoded(red, "JPEG")), RED, strict=True)) < 3


def test_ycck_is_not_inverted() -> None:
    # The components of a red YCCK picture, stored as Adobe does, then marked as YCCK.
    data = encoded(Image.new("CMYK", (16, 16), (76, 84, 255, 0)), "JPEG", quality=100, subsampling=0)
    at = data.index(b"Adobe") + 11
    assert data[at] == 0
    found = pixel(data[:at] + b"\2" + data[at + 1 :])
    assert max(abs(found - wanted) for found, wanted in zip(found, RED, strict=True)) < 6


@pytest.mark.parametrize(("deep", "seen"), [(0, 0), (128, 0), (129, 1), (257, 1), (32768, 128), (65535, 255)])
def test_16_bits_of_grey(deep: int, seen: int) -> None:
    assert pixel(png(1, 1, 16, 0, b"\0" + struct.pack(">H", deep))) == (seen,) * 3
    assert pixel(encoded(Image.new("I;16", (1, 1), deep), "TIFF")) == (seen,) * 3
    assert pixel(b"P5 1 1 65535\n" + struct.pack(">H", deep)) == (seen,) * 3


def test_big_endian_tiff_of_16_bits() -> None:
    image = Image.frombytes("I;16B", (2, 1), struct.pack(">HH", 257, 65535))
    assert [pixel(encoded(image, "TIFF"), (x, 0)) for x in (0, 1)] == [(1, 1, 1), WHITE]


@pytest.mark.parametrize(
    ("mode", "values", "seen"),
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
def test_deeper_greys(mode: str, values: tuple[float, ...], seen: tuple[int, ...]) -> None:
    image = Image.new(mode, (3, 1))
    image.putdata(values)
    assert tuple(pixel(encoded(image, "TIFF"), (x, 0))[0] for x in range(3)) == seen


def test_values_without_end() -> None:
    image = Image.new("F", (2, 1))
    image.putdata((float("inf"), 0.0))
    with pytest.raises(CorruptImage, match="finite"):
        rgb(encoded(image, "TIFF"))


def test_other_modes() -> None:
    assert pixel(encoded(Image.new("1", (3, 3), 1))) == WHITE
    assert pixel(encoded(Image.new("L", (3, 3), 7))) == (7, 7, 7)
    assert pixel(encoded(Image.new("LAB", (3, 3), (255, 128, 128)), "TIFF")) == pytest.approx(WHITE, abs=2)
    assert pixel(encoded(Image.new("YCbCr", (16, 16), (255, 128, 128)), "JPEG")) == pytest.approx(WHITE, abs=2)


@pytest.mark.parametrize("format", ["GIF", "PNG", "WEBP", "TIFF", "AVIF"])
def test_of_animations_and_pages_the_first(format: str) -> None:
    red, blue = Image.new("RGB", (16, 16), RED), Image.new("RGB", (16, 16), BLUE)
    data = encoded(red, format, save_all=True, append_images=[blue])
    assert Image.open(io.BytesIO(data)).n_frames == 2  # type: ignore[attr-defined]
    assert pixel(data, (8, 8)) == pytest.approx(RED, abs=3)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("kept", [0.95, 0.6, 0.3])
def test_truncated(format: str, kept: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)  # as lmdeploy's import leaves it
    data = encoded(picture(), format)
    with pytest.raises(TruncatedImage, match=r"^it: ends after [0-9,]+ bytes"):
        rgb(data[: int(len(data) * kept)])


@pytest.mark.parametrize("format", ["JPEG", "PNG", "GIF"])  # in others damage decodes to something: no checksums
def test_corrupt(format: str) -> None:
    data = bytearray(encoded(picture(), format))
    middle = slice(len(data) // 3, len(data) // 2)
    data[middle] = bytes(len(data[middle]))
    with pytest.raises(PrepareError) as failed:
        rgb(bytes(data))
    assert type(failed.value) in (CorruptImage, TruncatedImage)


@pytest.mark.parametrize(
    ("data", "told"),
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
        (b"\0\0\0\x18ftypheic\0\0\0\0", "a HEIC picture"),
        (b"\0\0\0\x18ftypisom\0\0\0\0", "a video"),
        (b"Not Found\n", "text that begins with 'Not Found"),
        (b"\x01\x02\xff\xfe", "bytes that begin with 01 02 ff fe"),
    ],
)
def test_not_a_picture(data: bytes, told: str) -> None:
    with pytest.raises(NotAnImage, match=f"^it: found {told}.* want a picture"):
        rgb(data)


def test_formats_that_are_not_wanted() -> None:
    for format in ("ICO", "TGA", "PCX", "PDF"):
        with pytest.raises(NotAnImage):
            rgb(encoded(picture(), format))


def test_too_many_pixels_are_told_by_the_header() -> None:
    data = png(50_000, 50_000, 8, 2, b"")
    start = time.monotonic()
    with pytest.raises(TooManyPixels, match="50000 x 50000 pixels are 2,500,000,000"):
        rgb(data)
    assert time.monotonic() - start < 0.2
    fits = encoded(picture((100, 50)))
    assert rgb(fits, ImageOptions(max_image_pixels=5000)).size == (100, 50)
    with pytest.raises(TooManyPixels):
        rgb(fits, ImageOptions(max_image_pixels=4999))


def test_only_our_limit_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    assert rgb(encoded(picture())).size == (64, 48)


def test_one_wrong_bit_in_a_png() -> None:
    data = bytearray(encoded(picture()))
    data[data.index(b"IDAT") + 1000] ^= 1
    with pytest.raises(CorruptImage, match=r"IDAT.*checksum"):
        rgb(bytes(data))


@pytest.mark.parametrize("kind", [b"zTXt", b"iCCP", b"iTXt"])
def test_bombs_in_metadata(kind: bytes) -> None:
    packed = zlib.compress(bytes(100 << 20), 1)
    head = {b"zTXt": b"k\0\0", b"iCCP": b"k\0\0", b"iTXt": b"k\0\1\0\0\0"}[kind]
    start = time.process_time()
    with pytest.raises(CorruptImage):
        rgb(png(1, 1, 8, 0, b"\0\0", chunk(kind, head + packed)))
    assert time.process_time() - start < 0.3


def test_out_of_memory_is_the_rows_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(self: object) -> None:
        raise MemoryError

    monkeypatch.setattr(ImageFile.ImageFile, "load", load)
    with pytest.raises(PrepareFailed, match="memory"):
        rgb(encoded(picture(), "BMP"))


SEEDS = [encoded(picture((24, 16)), format) for format in FORMATS]
SEEDS.append(encoded(Image.new("P", (9, 9)), "PNG", transparency=0))


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(SEEDS), st.lists(st.tuples(st.floats(0, 1), st.binary(max_size=6)), max_size=4), st.floats(0, 1))
def test_whatever_the_bytes_only_our_errors_come_out(
    data: bytes, changes: list[tuple[float, bytes]], kept: float
) -> None:
    for place, new in changes:
        at = int(place * len(data))
        data = data[:at] + new + data[at + len(new) :]
    if kept < 0.5:
        data = data[: int(2 * kept * len(data))]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            seen = rgb(data, ImageOptions(max_image_pixels=1_000_000)).mode
        except PrepareError:
            return
    assert seen == "RGB"


@pytest.mark.parametrize(
    ("uri", "data", "source"),
    [
        ("data:image/png;base64," + base64.b64encode(b"abcd").decode(), b"abcd", "data:image/png (4 bytes)"),
        ("DATA:image/PNG;charset=x;BASE64,YWJj\r\n ZGU=", b"abcde", "data:image/png (5 bytes)"),
        ("data:image/png;base64,YWJj%0AZGU%3D", b"abcde", "data:image/png (5 bytes)"),
        ("data:,a%20b+c", b"a b+c", "data: (5 bytes)"),
        ("data:text/plain,%FF,", b"\xff,", "data:text/plain (2 bytes)"),
        ("data:image/png;base64,", b"", "data:image/png (0 bytes)"),
    ],
)
def test_data_uris(uri: str, data: bytes, source: str) -> None:
    assert decode_data_uri(uri) == (data, source)


@pytest.mark.parametrize(
    "uri",
    [
        "", "data", "http://x", "data:image/png;base64", "data:image/png;base64,YWJjZA", "data:;base64,YW=Jj",
        "data:;base64,YWJj!", "data:;base64,YWJj====", "data:;base64,_-__", "data:,%", "data:,%zz", "data:;base64,é",
    ],
)  # fmt: skip
def test_data_uris_that_are_none(uri: str) -> None:
    with pytest.raises(InvalidDataUri):
        decode_data_uri(uri)


def test_a_bad_data_uri_is_not_repeated_in_the_message() -> None:
    with pytest.raises(InvalidDataUri) as failed:
        decode_data_uri("data:image/png;base64," + "A" * 100_001)
    assert len(str(failed.value)) < 200


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "in" / "sub").mkdir(parents=True)
    (tmp_path / "in" / "cat").write_bytes(b"cat")
    (tmp_path / "in" / "sub" / "dog").write_bytes(b"dog")
    (tmp_path / "in" / "empty").touch()
    (tmp_path / "in" / "inside").symlink_to("sub/dog")
    (tmp_path / "in" / "outside").symlink_to("../secret")
    (tmp_path / "in" / "up").symlink_to("..")
    (tmp_path / "in" / "loop").symlink_to("loop")
    (tmp_path / "in" / "dangling").symlink_to("nowhere")
    (tmp_path / "secret").write_bytes(b"secret")
    (tmp_path / "in-not").mkdir()
    (tmp_path / "in-not" / "x").write_bytes(b"x")
    os.mkfifo(tmp_path / "in" / "pipe")
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(tmp_path / "in" / "socket"))
    return tmp_path / "in"


@pytest.mark.parametrize(
    ("path", "data"),
    [("cat", b"cat"), ("sub/../cat", b"cat"), ("inside", b"dog"), ("up/in/cat", b"cat"), ("./sub//dog", b"dog")],
)
def test_files_beneath(folder: Path, path: str, data: bytes) -> None:
    assert open_beneath(path, [folder], 3) == data
    assert open_beneath(str(folder / path), [folder], 3) == data


@pytest.mark.parametrize("path", ["../secret", "outside", "up/secret", "/etc/passwd", "../in-not/x", "..", "/dev/null"])
def test_files_outside(folder: Path, path: str) -> None:
    with pytest.raises(ForbiddenPath, match="--image-root"):
        open_beneath(path, [folder], 100)


def test_other_roots_and_roots_that_are_links(folder: Path, tmp_path: Path) -> None:
    assert open_beneath("../secret", [folder, tmp_path], 100) == b"secret"
    assert open_beneath("outside", [folder, tmp_path], 100) == b"secret"
    (tmp_path / "link").symlink_to("in")
    assert open_beneath("cat", [tmp_path / "link"], 100) == b"cat"


@pytest.mark.parametrize(
    ("path", "told"),
    [
        ("nothing", "No such file"), ("cat/x", "Not a directory"), ("loop", "Too many levels"), ("dangling", "No such"),
        ("pipe", "is a pipe"), ("socket", "is a socket"), ("sub", "is a folder"), ("", "is a folder"),
        ("a\0b", "null"), ("x" * 300, "too long"),
    ],
)  # fmt: skip
def test_files_that_are_none(folder: Path, path: str, told: str) -> None:
    with pytest.raises(MissingFile, match=told):
        open_beneath(path, [folder], 100)


def test_sizes_of_files(folder: Path) -> None:
    with pytest.raises(TooManyBytes, match="3 bytes, more than --max-image-bytes 2"):
        open_beneath("cat", [folder], 2)
    with pytest.raises(EmptyImage):
        open_beneath("empty", [folder], 2)


def test_no_descriptor_is_left_open(folder: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for path in ("cat", "empty", "pipe", "outside", "nothing"):
        try:
            open_beneath(path, [folder], 100)
        except (EmptyImage, MissingFile, ForbiddenPath):
            pass
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize(
    "path",
    ["cat", "inside", "empty", "outside", "../secret", "nothing", "dangling", "loop", "pipe", "sub", "a\0b", "sub/dog"],
)
def test_files_are_checked_without_opening_them(folder: Path, path: str) -> None:
    """With the errors that opening has."""
    (folder / "sub" / "dog").write_bytes(b"a large dog")
    told: list[object] = []
    for look in (open_beneath, check_beneath):
        try:
            look(path, [folder], 5)
        except (EmptyImage, MissingFile, ForbiddenPath, TooManyBytes) as error:
            told.append((type(error), str(error)))
        else:
            told.append(None)
    assert told[0] == told[1]
