"""Decoding a JPEG at half, a quarter or an eighth of its width and height, by libjpeg's scaled inverse DCT."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from PIL.JpegImagePlugin import JpegImageFile

from ..errors import PrepareFailed

Used: TypeAlias = Callable[[int, int], tuple[int, int] | None]
"""`Scaling.used`: of an upright picture's width and height, the width and height that are made of it."""
SCALES = (8, 4, 2)


def draft(image: JpegImageFile, width: int, height: int, used: Used) -> None:
    """Has `image`, of which nothing is decoded yet, decoded at the least scale that `used` allows.

    width, height: as they are once the picture stands upright. Raises PrepareFailed where `used` does not work.
    """
    try:
        scale = choose_scale(width, height, used)
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
        raise PrepareFailed(f"--draft-decode: the model's size for {width} x {height} pixels: {said}") from error
    if scale > 1:
        image.draft(None, (image.width // scale, image.height // scale))  # the mode stays: `to_rgb` is for that


def choose_scale(width: int, height: int, used: Used) -> int:
    """The largest of `SCALES` by which the picture can be divided so that no pixel is missed and the same size is made
    of it; 1 where there is none.

    libjpeg rounds up, so the aspect ratio changes a little, and with it perhaps the tiles that are chosen.
    """
    wanted = used(width, height)
    if wanted is None:
        return 1
    for scale in SCALES:
        enough = width // scale >= wanted[0] and height // scale >= wanted[1]
        if enough and used(-(-width // scale), -(-height // scale)) == wanted:
            return scale
    return 1
