"""JPEGs that resemble photographs to a codec: any number of them, all with different bytes."""

from __future__ import annotations

from io import BytesIO
from random import Random

from PIL import Image, ImageChops

CANVASES = 4
QUALITY = 87
GRAINS = {2: 0.13, 5: 0.12}
"""Weight of fine detail by its size in pixels. Fine detail makes up most of a file's bytes."""


def photographs(size: tuple[int, int], count: int, seed: int = 0) -> list[bytes]:
    """Return `count` JPEGs with width and height `size` and different pixels: smooth colours with some detail."""
    rng = Random(seed)
    canvases = [_canvas(size, rng) for _ in range(min(CANVASES, count))]
    jpegs = []
    for number in range(count):
        shifted = ImageChops.offset(canvases[number % CANVASES], 37 * number, 23 * number)
        file = BytesIO()
        shifted.save(file, "JPEG", quality=QUALITY)
        jpegs.append(file.getvalue())
    return jpegs


def _canvas(size: tuple[int, int], rng: Random) -> Image.Image:
    image = _gradient((6, 4), size, rng)
    image = Image.blend(image, _gradient((24, 18), size, rng), 0.35)
    for pixels, weight in GRAINS.items():
        image = Image.blend(image, _gradient((size[0] // pixels, size[1] // pixels), size, rng), weight)
    return image


def _gradient(points: tuple[int, int], size: tuple[int, int], rng: Random) -> Image.Image:
    """Return random colours on a grid of `points`, interpolated to `size`."""
    grid = Image.frombytes("RGB", points, rng.randbytes(3 * points[0] * points[1]))
    return grid.resize(size, Image.Resampling.BICUBIC)


def split_after_header(jpeg: bytes) -> tuple[bytes, bytes]:
    """Split a file after its first segment (JFIF's), where a comment is allowed."""
    end = 4 + int.from_bytes(jpeg[4:6])
    return jpeg[:end], jpeg[end:]


def comment(number: int) -> bytes:
    """Return a JPEG COM segment (ITU-T T.81, B.2.4.5) that holds the number, of the same length for every number."""
    text = b"image %012d" % number
    return b"\xff\xfe" + (2 + len(text)).to_bytes(2) + text


def numbered(jpegs: list[bytes], number: int) -> bytes:
    """Return image `number` of an endless sequence that repeats the JPEGs' pixels, each time with another comment."""
    head, tail = split_after_header(jpegs[number % len(jpegs)])
    return head + comment(number) + tail
