"""From whatever a file holds to RGB, 8 bits a channel: the one form that preparations are given."""

from __future__ import annotations

import math

from PIL import Image

from ..errors import CorruptImage

_EIGHT_OF_SIXTEEN = [(value + 128) // 257 for value in range(65536)]
"""65535 / 255 = 257, so this is the nearest of 8 bits; a shift would darken."""


def to_rgb(image: Image.Image) -> Image.Image:
    """The picture in mode RGB; transparency is laid on white.

    16-bit grey ("I;16", and "I" with values of 0 to 65535) is divided by 257. "F" is taken as 0..1 or as 0..255 where
    its values keep to that. Beyond these ranges no convention says what white is: values are stretched between the
    smallest and the largest. CMYK is taken as subtractive inks without a colour profile, as LMDeploy and others do.
    """
    if image.mode.startswith("I") or image.mode == "F":
        return _grey_of_deep(image)
    if image.has_transparency_data:
        transparent = image.info.get("transparency")
        if isinstance(transparent, tuple) and max(transparent) > 255:
            # A PNG of 16 bits a channel: Pillow keeps the upper byte of its pixels, but not of this colour.
            image.info["transparency"] = tuple(value >> 8 for value in transparent)
        return _on_white(image, image.convert("RGBA"))
    return image if image.mode == "RGB" else image.convert("RGB")


def _on_white(image: Image.Image, mask: Image.Image) -> Image.Image:
    """`mask`: RGBA, whose pixels and alpha count; or L, the opacity of `image`'s pixels."""
    white = Image.new("RGB", image.size, (255, 255, 255))
    white.paste(mask if mask.mode == "RGBA" else image, (0, 0), mask)
    return white


def _grey_of_deep(image: Image.Image) -> Image.Image:
    wide = image if image.mode == "F" else image.convert("I")
    low, high = wide.getextrema()
    assert isinstance(low, int | float)
    assert isinstance(high, int | float)
    if wide.mode == "F":
        if low >= 0 and high <= 255:
            return _scaled(image, 255 if high <= 1 else 1, 0)
        return _stretched(image, low, high)
    if not (low >= 0 and high <= 65535):
        return _stretched(wide.convert("F"), low, high)
    grey = wide.point(_EIGHT_OF_SIXTEEN, "L").convert("RGB")
    transparent = image.info.get("transparency")
    if not isinstance(transparent, int):
        return grey
    opacity = [255] * 65536
    opacity[transparent & 0xFFFF] = 0
    return _on_white(grey, wide.point(opacity, "L"))


def _stretched(image: Image.Image, low: float, high: float) -> Image.Image:
    if not (math.isfinite(low) and math.isfinite(high)):
        raise CorruptImage("its pixels' values are not finite")
    scale = 255 / (high - low) if high > low else 0
    return _scaled(image, scale, -low * scale)


def _scaled(image: Image.Image, scale: float, offset: float) -> Image.Image:
    # Converting to L cuts off the fraction, hence the half.
    return image.point(lambda value: value * scale + (offset + 0.5)).convert("L").convert("RGB")
