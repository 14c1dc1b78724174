"""The size to which an image processor of transformers resizes an image, from the processor's own functions."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any

import numpy

GetSetting = Callable[[str], Any]


def resized_size(processor: Any, settings: Mapping[str, Any], width: int, height: int) -> tuple[int, int] | None:
    """Return the size to which an image processor resizes an image before it cuts it into tiles.

    Args:
        processor: The image processor.
        settings: Settings that it is called with, which override its attributes.
        width: The image's width.
        height: The image's height.

    Returns:
        Width and height. None if the processor is unknown, does not resize images, or refuses one of this shape.
    """

    def get_setting(name: str) -> Any:
        return settings.get(name, getattr(processor, name))

    package, _, family = type(processor).__module__.rpartition(".")[0].rpartition(".")
    size = _SIZES.get(family) if package == "transformers.models" else None
    if size is None or not get_setting("do_resize"):
        return None
    return size(sys.modules[type(processor).__module__], get_setting, width, height)


def _tile_grid(module: Any, get_setting: GetSetting, width: int, height: int) -> tuple[int, int]:
    """Return the size for InternVL: that of the grid of tiles. Without `crop_to_patches` it uses one tile, so less."""
    tile = get_setting("size")
    columns, rows = module.get_optimal_tiled_canvas(
        (height, width), (tile["height"], tile["width"]), get_setting("min_patches"), get_setting("max_patches")
    )
    return columns * tile["width"], rows * tile["height"]


def _whole_tokens(module: Any, get_setting: GetSetting, width: int, height: int) -> tuple[int, int] | None:
    """Return the size for Qwen2-VL: multiples of a token's side, with an area within limits."""
    size, factor = get_setting("size"), get_setting("patch_size") * get_setting("merge_size")
    try:
        rows, columns = module.smart_resize(height, width, factor, size["shortest_edge"], size["longest_edge"])
    except ValueError:  # the image is too narrow, which the processor will report
        return None
    return columns, rows


def _longest_edge(module: Any, get_setting: GetSetting, width: int, height: int) -> tuple[int, int] | None:
    """Return the size for SmolVLM: limited by its longest edge. It is then resized again, to whole splits."""
    edge = get_setting("size")["longest_edge"]
    array = numpy.empty((0, height, width))  # the function uses the last two dimensions
    rows, columns = module.get_resize_output_image_size(array, resolution_max_side=edge)
    return columns, rows


_SIZES = {"got_ocr2": _tile_grid, "qwen2_vl": _whole_tokens, "idefics3": _longest_edge, "smolvlm": _longest_edge}
