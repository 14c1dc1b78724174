"""Families of models, recognised by what their image processors return, and how several rows' images form one batch.

A family is recognised by the keys of the processor's output and the rank of `pixel_values`. How the arrays of an
unknown family belong together cannot be guessed, so such a model is refused instead of answered wrongly.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy
import torch

from ...errors import ModelError

TOKEN_KEYS = ("mm_token_type_ids", "token_type_ids")
"""Arrays as long as `input_ids` that some models want as well; 0 for text."""
TEXT_KEYS = {"input_ids", "attention_mask", *TOKEN_KEYS}
"""The processor's outputs that are not about images."""
TILE_PIXELS = 448 * 448
"""Area of a tile where the family does not cut images into tiles: that of InternVL's tile."""


class Family(Protocol):
    """One family of models. Arrays are named as the model's `forward` names them."""

    def matches(self, keys: set[str], rank: int) -> bool:
        """Return whether a processor with these image keys and this rank of `pixel_values` belongs to the family."""
        ...

    def tile_limit(self, image_processor: Any, max_tiles: int) -> dict[str, Any]:
        """Return the image processor's settings for at most `max_tiles` tiles per image, not counting a thumbnail.

        Raises:
            ModelError: The image processor does not cut images into tiles.
        """
        ...

    def row_arrays(self, outputs: Mapping[str, Any]) -> dict[str, numpy.ndarray]:
        """Return the processor's arrays of one row with tiles, patches or images on the first axis."""
        ...

    def batch_arrays(self, rows: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """Return the arrays of several rows as one batch. Rows without images must be left out."""
        ...


def _concatenate(rows: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {key: torch.cat([row[key] for row in rows]) for key in rows[0]}


class Tiles:
    """InternVL: images cut into tiles of one size: `pixel_values` (tiles, 3, height, width)."""

    def matches(self, keys: set[str], rank: int) -> bool:
        return keys == {"pixel_values"} and rank == 4

    def tile_limit(self, image_processor: Any, max_tiles: int) -> dict[str, Any]:
        if not hasattr(image_processor, "max_patches"):
            raise ModelError(
                f"--max-tiles {max_tiles}: {type(image_processor).__name__} does not cut images into tiles"
            )
        return {"max_patches": max_tiles, "min_patches": min(max_tiles, image_processor.min_patches)}

    def row_arrays(self, outputs: Mapping[str, Any]) -> dict[str, numpy.ndarray]:
        return {"pixel_values": numpy.asarray(outputs["pixel_values"])}

    def batch_arrays(self, rows: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        return _concatenate(rows)


class Patches:
    """Qwen2-VL, Qwen2.5-VL: `pixel_values` (patches, values per patch), `image_grid_thw` (images, 3)."""

    def matches(self, keys: set[str], rank: int) -> bool:
        return keys == {"pixel_values", "image_grid_thw"} and rank == 2

    def tile_limit(self, image_processor: Any, max_tiles: int) -> dict[str, Any]:
        # Areas, in spite of their names.
        min_area, max_area = image_processor.size["shortest_edge"], max_tiles * TILE_PIXELS
        return {"size": {"shortest_edge": min(min_area, max_area), "longest_edge": max_area}}

    def row_arrays(self, outputs: Mapping[str, Any]) -> dict[str, numpy.ndarray]:
        return {key: numpy.asarray(outputs[key]) for key in ("pixel_values", "image_grid_thw")}

    def batch_arrays(self, rows: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        return _concatenate(rows)


class Splits:
    """SmolVLM, Idefics3: images scaled, then cut into splits.

    `pixel_values` (1, splits, 3, height, width) and `pixel_attention_mask` (1, splits, height, width), which is 0
    where a split is padded at its bottom and right.
    """

    def matches(self, keys: set[str], rank: int) -> bool:
        return keys == {"pixel_values", "pixel_attention_mask"} and rank == 5

    def tile_limit(self, image_processor: Any, max_tiles: int) -> dict[str, Any]:
        if not hasattr(image_processor, "max_image_size"):
            raise ModelError(
                f"--max-tiles {max_tiles}: {type(image_processor).__name__} does not cut images into tiles of one size"
            )
        # Before an image is cut, it is scaled to a longest edge of this many tiles.
        edge_tiles = math.isqrt(max_tiles)
        if edge_tiles < 2:
            return {"do_image_splitting": False}
        edge = edge_tiles * image_processor.max_image_size["longest_edge"]
        return {"size": {"longest_edge": min(edge, image_processor.size["longest_edge"])}}

    def row_arrays(self, outputs: Mapping[str, Any]) -> dict[str, numpy.ndarray]:
        # The processor's int64 takes 8 times the memory.
        mask = numpy.asarray(outputs["pixel_attention_mask"])[0].astype(numpy.bool_)
        return {"pixel_values": numpy.asarray(outputs["pixel_values"])[0], "pixel_attention_mask": mask}

    def batch_arrays(self, rows: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        # The models flatten (rows, splits) and place features in the order of the tokens, so all splits fit in one
        # row: nothing is padded to the largest number of splits of any row.
        height = max(row["pixel_values"].shape[-2] for row in rows)
        width = max(row["pixel_values"].shape[-1] for row in rows)
        count = sum(len(row["pixel_values"]) for row in rows)
        first = rows[0]["pixel_values"]
        pixels = first.new_zeros((1, count, first.shape[1], height, width))
        mask = torch.zeros((1, count, height, width), dtype=torch.bool, device=first.device)
        start = 0
        for row in rows:
            splits, _, row_height, row_width = row["pixel_values"].shape
            pixels[0, start : start + splits, :, :row_height, :row_width] = row["pixel_values"]
            mask[0, start : start + splits, :row_height, :row_width] = row["pixel_attention_mask"]
            start += splits
        return {"pixel_values": pixels, "pixel_attention_mask": mask}


FAMILIES: tuple[Family, ...] = (Tiles(), Patches(), Splits())


def recognise(model: str, outputs: Mapping[str, Any]) -> Family:
    """Return the family of a model from its processor's outputs for one image.

    Raises:
        ModelError: The outputs belong to no known family; the message names the model and the arrays.
    """
    shapes = {key: getattr(value, "shape", ()) for key, value in outputs.items() if key not in TEXT_KEYS}
    for family in FAMILIES:
        if family.matches(set(shapes), len(shapes.get("pixel_values", ()))):
            return family
    arrays = ", ".join(f"{key} {tuple(shape)}" for key, shape in sorted(shapes.items())) or "nothing"
    raise ModelError(
        f"{model}: its processor returns {arrays} for an image, which this engine cannot put into a batch. "
        "It serves models like InternVL-hf, Qwen2.5-VL and SmolVLM"
    )
