"""The size that an image processor of transformers scales a whole picture to, asked of its own functions."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any

import numpy

Setting = Callable[[str], Any]


def resized_size(images: Any, settings: Mapping[str, Any], width: int, height: int) -> tuple[int, int] | None:
    """Width and height that the image processor `images` makes of a picture, before it cuts it into tiles.

    settings: what it is called with, instead of its own. None for a processor that is not known, or where it does not
    scale pictures, or refuses one of this shape.
    """

    def setting(name: str) -> Any:
        return settings.get(name, getattr(images, name))

    package, _, family = type(images).__module__.rpartition(".")[0].rpartition(".")
    size = _SIZES.get(family) if package == "transformers.models" else None
    if size is None or not setting("do_resize"):
        return None
    return size(sys.modules[type(images).__module__], setting, width, height)


def _tiles(code: Any, setting: Setting, width: int, height: int) -> tuple[int, int]:
    """InternVL's: the grid of tiles. Not asked is `crop_to_patches`, without which one tile is made: less is used."""
    tile = setting("size")
    columns, rows = code.get_optimal_tiled_canvas(
        (height, width), (tile["height"], tile["width"]), setting("min_patches"), setting("max_patches")
    )
    return columns * tile["width"], rows * tile["height"]


def _patches(code: Any, setting: Setting, width: int, height: int) -> tuple[int, int] | None:
    """Qwen2-VL's: whole tokens, and an area within limits."""
    size, factor = setting("size"), setting("patch_size") * setting("merge_size")
    try:
        rows, columns = code.smart_resize(height, width, factor, size["shortest_edge"], size["longest_edge"])
    except ValueError:  # the picture is too narrow: the processor is going to say so itself
        return None
    return columns, rows


def _splits(code: Any, setting: Setting, width: int, height: int) -> tuple[int, int] | None:
    """SmolVLM's: the picture is scaled to a longest edge first, and what comes of it then to whole splits."""
    edge = setting("size")["longest_edge"]
    shape = numpy.empty((0, height, width))  # of which the function takes the last two
    rows, columns = code.get_resize_output_image_size(shape, resolution_max_side=edge)
    return columns, rows


_SIZES = {"got_ocr2": _tiles, "qwen2_vl": _patches, "idefics3": _splits, "smolvlm": _splits}
