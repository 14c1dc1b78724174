"""Conversion of any decoded image to RGB with 8 bits per channel, the one form that preparations receive."""

from __future__ import annotations

import math
from typing import cast

from PIL import Image

from ..errors import CorruptImage

_TO_8_BITS = [(value + 128) // 257 for value in range(65536)]
"""The nearest 8-bit value of each 16-bit value, as 65535 / 255 = 257. A shift would darken."""


def to_rgb(image: Image.Image) -> Image.Image:
    """Return the image in mode RGB, on white where it is transparent.

    16-bit gray ("I;16", and "I" with values of 0 to 65535) is divided by 257. "F" is read as 0..1 or 0..255 if its
    values are in that range. Beyond these ranges no convention defines white: values are stretched between the smallest
    and the largest. CMYK is read as subtractive inks without a color profile, as LMDeploy and others do.
    """
    if image.mode.startswith("I") or image.mode == "F":
        return _deep_to_rgb(image)
    if image.has_transparency_data:
        transparent = image.info.get("transparency")
        if isinstance(transparent, tuple) and max(transparent) > 255:
            # A PNG with 16 bits per channel: Pillow keeps the upper byte of its pixels, but not of this color.
            image.info["transparency"] = tuple(value >> 8 for value in transparent)
        return _on_white(image, image.convert("RGBA"))
    return image if image.mode == "RGB" else image.convert("RGB")


def _on_white(image: Image.Image, mask: Image.Image) -> Image.Image:
    """Return the image on white. The mask is the opacity of its pixels (L), or has the pixels too (RGBA)."""
    white = Image.new("RGB", image.size, (255, 255, 255))
    white.paste(mask if mask.mode == "RGBA" else image, (0, 0), mask)
    return white


def _deep_to_rgb(image: Image.Image) -> Image.Image:
    """Convert gray with more than 8 bits."""
    wide = image if image.mode == "F" else image.convert("I")
    low, high = cast(tuple[float, float], wide.getextrema())  # one channel
    if wide.mode == "F":
        if low >= 0 and high <= 255:
            return _scaled(image, 255 if high <= 1 else 1, 0)
        return _stretched(image, low, high)
    if not (low >= 0 and high <= 65535):
        return _stretched(wide.convert("F"), low, high)
    gray = wide.point(_TO_8_BITS, "L").convert("RGB")
    transparent = image.info.get("transparency")
    if not isinstance(transparent, int):
        return gray
    opacity = [255] * 65536
    opacity[transparent & 0xFFFF] = 0
    return _on_white(gray, wide.point(opacity, "L"))


def _stretched(image: Image.Image, low: float, high: float) -> Image.Image:
    if not (math.isfinite(low) and math.isfinite(high)):
        raise CorruptImage("its pixels have values that are not finite")
    scale = 255 / (high - low) if high > low else 0
    return _scaled(image, scale, -low * scale)


def _scaled(image: Image.Image, scale: float, offset: float) -> Image.Image:
    # Converting to L truncates, hence the half.
    return image.point(lambda value: value * scale + (offset + 0.5)).convert("L").convert("RGB")
