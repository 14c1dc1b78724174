"""Families of models, told apart by what their image processors give, and how rows' pictures become one batch.

A family is known by the keys of the processor's output and the dimensions of `pixel_values`. What an unknown family
wants done with its arrays cannot be guessed, so it is refused by name instead of answered wrongly.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy
import torch

from ...errors import ModelError

TOKEN_KEYS = ("mm_token_type_ids", "token_type_ids")
"""Arrays as long as `input_ids` that some models want beside them; 0 for what is no picture."""
TILE_PIXELS = 448 * 448
"""What a tile is counted as where the family has none of its own: InternVL's tile."""


class Family(Protocol):
    """One family. Arrays are one row's, named as the model's `forward` names them."""

    def knows(self, keys: set[str], dimensions: int) -> bool:
        """Whether a processor's picture keys, and its `pixel_values` of so many dimensions, are this family's."""
        ...

    def limit(self, images: Any, tiles: int) -> dict[str, Any]:
        """Settings of the image processor `images` for at most so many tiles a picture, a thumbnail not counted."""
        ...

    def row(self, arrays: Mapping[str, Any]) -> dict[str, numpy.ndarray]:
        """The processor's arrays with tiles, patches or pictures on the first axis."""
        ...

    def batch(self, rows: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """The rows' arrays as one batch. Every row has pictures; those without are left out."""
        ...


def _concatenated(rows: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {key: torch.cat([row[key] for row in rows]) for key in rows[0]}


class Tiles:
    """InternVL: pictures cut into tiles of one size: `pixel_values` (tiles, 3, height, width)."""

    def knows(self, keys: set[str], dimensions: int) -> bool:
        return keys == {"pixel_values"} and dimensions == 4

    def limit(self, images: Any, tiles: int) -> dict[str, Any]:
        if not hasattr(images, "max_patches"):
            raise ModelError(f"--max-tiles {tiles}: {type(images).__name__} does not cut pictures into tiles")
        return {"max_patches": tiles, "min_patches": min(tiles, images.min_patches)}

    def row(self, arrays: Mapping[str, Any]) -> dict[str, numpy.ndarray]:
        return {"pixel_values": numpy.asarray(arrays["pixel_values"])}

    def batch(self, rows: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        return _concatenated(rows)


class Patches:
    """Qwen2-VL, Qwen2.5-VL: `pixel_values` (patches, numbers of a patch), `image_grid_thw` (pictures, 3)."""

    def knows(self, keys: set[str], dimensions: int) -> bool:
        return keys == {"pixel_values", "image_grid_thw"} and dimensions == 2

    def limit(self, images: Any, tiles: int) -> dict[str, Any]:
        least, most = images.size["shortest_edge"], tiles * TILE_PIXELS  # areas, despite their names
        return {"size": {"shortest_edge": min(least, most), "longest_edge": most}}

    def row(self, arrays: Mapping[str, Any]) -> dict[str, numpy.ndarray]:
        return {key: numpy.asarray(arrays[key]) for key in ("pixel_values", "image_grid_thw")}

    def batch(self, rows: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        return _concatenated(rows)


class Splits:
    """SmolVLM, Idefics3: `pixel_values` (1, splits, 3, height, width), `pixel_attention_mask` (1, splits, height,
    width): 0 where a split is padded at its bottom and right."""

    def knows(self, keys: set[str], dimensions: int) -> bool:
        return keys == {"pixel_values", "pixel_attention_mask"} and dimensions == 5

    def limit(self, images: Any, tiles: int) -> dict[str, Any]:
        if not hasattr(images, "max_image_size"):
            raise ModelError(f"--max-tiles {tiles}: {type(images).__name__} does not cut pictures into tiles of a size")
        side = math.isqrt(tiles)  # a picture is scaled to a longest edge of so many tiles before it is cut
        if side < 2:
            return {"do_image_splitting": False}
        return {
            "size": {"longest_edge": min(side * images.max_image_size["longest_edge"], images.size["longest_edge"])}
        }

    def row(self, arrays: Mapping[str, Any]) -> dict[str, numpy.ndarray]:
        mask = numpy.asarray(arrays["pixel_attention_mask"])[0].astype(numpy.bool_)  # int64 takes 8 times the room
        return {"pixel_values": numpy.asarray(arrays["pixel_values"])[0], "pixel_attention_mask": mask}

    def batch(self, rows: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        # The models flatten (rows, splits) and place features by the order of the tokens, so all splits can stand in
        # one row: nothing is padded to the largest number of splits of any row.
        height = max(row["pixel_values"].shape[-2] for row in rows)
        width = max(row["pixel_values"].shape[-1] for row in rows)
        count = sum(len(row["pixel_values"]) for row in rows)
        first = rows[0]["pixel_values"]
        pixels = first.new_zeros((1, count, first.shape[1], height, width))
        mask = torch.zeros((1, count, height, width), dtype=torch.bool, device=first.device)
        at = 0
        for row in rows:
            number, _, rows_high, columns_wide = row["pixel_values"].shape
            pixels[0, at : at + number, :, :rows_high, :columns_wide] = row["pixel_values"]
            mask[0, at : at + number, :rows_high, :columns_wide] = row["pixel_attention_mask"]
            at += number
        return {"pixel_values": pixels, "pixel_attention_mask": mask}


FAMILIES: tuple[Family, ...] = (Tiles(), Patches(), Splits())


def recognise(model: str, outputs: Mapping[str, Any]) -> Family:
    """The family that a processor's output for one picture belongs to. Raises ModelError naming model and keys."""
    shapes = {key: getattr(value, "shape", ()) for key, value in outputs.items() if key not in _TEXT_KEYS}
    for family in FAMILIES:
        if family.knows(set(shapes), len(shapes.get("pixel_values", ()))):
            return family
    found = ", ".join(f"{key} {tuple(shape)}" for key, shape in sorted(shapes.items())) or "nothing"
    raise ModelError(
        f"{model}: its processor makes of a picture {found}, which this engine does not know how to put into a batch. "
        "It serves models like InternVL-hf, Qwen2.5-VL and SmolVLM; a server (--engine openai) may serve this one"
    )


_TEXT_KEYS = {"input_ids", "attention_mask", *TOKEN_KEYS}
