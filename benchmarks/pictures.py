"""JPEGs that look like photographs to a codec, any number of them, and no two with the same bytes."""

from __future__ import annotations

from io import BytesIO
from random import Random

from PIL import Image, ImageChops

CANVASES = 4
QUALITY = 87
GRAINS = {2: 0.13, 5: 0.12}
"""Fine detail by its size in pixels: how much of a picture it is. It is what makes most of a file's bytes."""


def photographs(size: tuple[int, int], count: int, seed: int = 0) -> list[bytes]:
    """`count` JPEGs of width and height `size`, no two with the same pixels: smooth colours with some detail."""
    rng = Random(seed)
    canvases = [_canvas(size, rng) for _ in range(min(CANVASES, count))]
    made = []
    for number in range(count):
        moved = ImageChops.offset(canvases[number % CANVASES], 37 * number, 23 * number)
        file = BytesIO()
        moved.save(file, "JPEG", quality=QUALITY)
        made.append(file.getvalue())
    return made


def _canvas(size: tuple[int, int], rng: Random) -> Image.Image:
    picture = _field((6, 4), size, rng)
    picture = Image.blend(picture, _field((24, 18), size, rng), 0.35)
    for pixels, share in GRAINS.items():
        picture = Image.blend(picture, _field((size[0] // pixels, size[1] // pixels), size, rng), share)
    return picture


def _field(cells: tuple[int, int], size: tuple[int, int], rng: Random) -> Image.Image:
    """Random colours at so many points, and smooth between them."""
    points = Image.frombytes("RGB", cells, rng.randbytes(3 * cells[0] * cells[1]))
    return points.resize(size, Image.Resampling.BICUBIC)


def cut(jpeg: bytes) -> tuple[bytes, bytes]:
    """The file in two, between which a comment may stand: behind its first segment, JFIF's."""
    at = 4 + int.from_bytes(jpeg[4:6])
    return jpeg[:at], jpeg[at:]


def comment(number: int) -> bytes:
    """A JPEG's COM segment (ITU-T T.81, B.2.4.5) with the number: as long for each, and none of a picture's pixels."""
    text = b"picture %012d" % number
    return b"\xff\xfe" + (2 + len(text)).to_bytes(2) + text


def numbered(jpegs: list[bytes], number: int) -> bytes:
    """Picture `number` of as many as anybody wants: the JPEGs in turn, each time with another comment."""
    head, tail = cut(jpegs[number % len(jpegs)])
    return head + comment(number) + tail
