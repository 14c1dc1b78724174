"""Images for tests, and their files."""

from __future__ import annotations

import io
import random
from typing import Any

from PIL import Image
from PIL.Image import Transpose

STORED = {
    2: Transpose.FLIP_LEFT_RIGHT,
    3: Transpose.ROTATE_180,
    4: Transpose.FLIP_TOP_BOTTOM,
    5: Transpose.TRANSPOSE,
    6: Transpose.ROTATE_90,
    7: Transpose.TRANSVERSE,
    8: Transpose.ROTATE_270,
}
"""How an upright image is stored in a file, by the EXIF orientation of the file."""


def drawing(size: tuple[int, int] = (64, 48)) -> Image.Image:
    """Return an image without symmetry and with many colors."""
    red = Image.linear_gradient("L").resize(size)
    green = red.transpose(Transpose.ROTATE_90).resize(size)
    noise = Image.frombytes("L", size, random.Random(0).randbytes(size[0] * size[1]))
    return Image.merge("RGB", (red, green, noise))


def encoded(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    """Return an image as a file."""
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()
