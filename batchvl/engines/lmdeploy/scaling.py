"""The size that LMDeploy's vision models scale a whole picture to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lmdeploy.vl.model.internvl import dynamic_preprocess

from .. import scaling
from .chat import INTERNVL, QWEN


def resized_size(
    architecture: str, model: Any, settings: Mapping[str, int], width: int, height: int
) -> tuple[int, int] | None:  # fmt: skip
    """Width and height that LMDeploy's `model` makes of a picture, before it cuts it into tiles; None if not known.

    settings: what goes along with each picture.
    """
    if architecture == "InternVLChatModel":
        return _dynamic(model, settings, width, height)
    if architecture in INTERNVL | QWEN:
        return scaling.resized_size(model.processor.image_processor, {}, width, height)
    return None


def _dynamic(model: Any, settings: Mapping[str, int], width: int, height: int) -> tuple[int, int] | None:
    """InternVL-Chat-V1-5 and later: a grid of tiles. V1-1 and V1-2 crop the picture, and are not known here."""
    if model.processor != model._preprocess_v1_5:
        return None
    blank, config = _Blank(width, height), model.config
    dynamic_preprocess(
        blank,
        min_num=config.min_dynamic_patch,
        max_num=settings.get("max_dynamic_patch", config.max_dynamic_patch),
        image_size=model.vision_config.image_size,
        use_thumbnail=config.use_thumbnail,
    )
    return blank.made


class _Blank:
    """Stands for a picture where only its size counts, and remembers the largest that was made of it."""

    def __init__(self, width: int, height: int) -> None:
        self.size, self.made = (width, height), (0, 0)

    def resize(self, size: tuple[int, int]) -> _Blank:
        self.made = (max(self.made[0], size[0]), max(self.made[1], size[1]))
        return self

    def crop(self, box: tuple[int, int, int, int]) -> _Blank:
        return self
