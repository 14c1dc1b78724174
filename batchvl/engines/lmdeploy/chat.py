"""Messages in LMDeploy's form: OpenAI's, with pictures as PIL images."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ...errors import OptionError
from ...types import Message

INTERNVL = {"InternVLChatModel", "InternVLForConditionalGeneration", "InternS1ForConditionalGeneration"}
QWEN = {"Qwen2VLForConditionalGeneration", "Qwen2_5_VLForConditionalGeneration"}
PLACE = "picture"
"""Stands for a picture where only its place counts."""
TILE_PIXELS = 448 * 448
"""What counts as a tile for models that do not cut pictures into tiles of their own."""


def picture_settings(architecture: str, max_tiles: int | None) -> dict[str, int]:
    """What goes along with each picture for at most `max_tiles` tiles of it. Raises OptionError.

    InternVL's Hugging Face form and Qwen's are limited in their processors instead: see `limit_tiles`.
    """
    if max_tiles is None or architecture in INTERNVL - {"InternVLChatModel"} | QWEN:
        return {}
    if architecture == "InternVLChatModel":
        return {"max_dynamic_patch": max_tiles}
    raise OptionError(f"--max-tiles: LMDeploy has no such setting for {architecture}; want InternVL or Qwen2-VL")


def limit_tiles(architecture: str, model: Any, max_tiles: int | None) -> None:
    """Has LMDeploy's vision model make at most so many tiles of a picture, where that is its processor's setting."""
    images: Any = getattr(getattr(model, "processor", None), "image_processor", None)
    if max_tiles is None or images is None:
        return
    if architecture in QWEN:
        most = max_tiles * TILE_PIXELS
        images.size = {"longest_edge": most, "shortest_edge": min(images.size["shortest_edge"], most)}  # areas
    elif hasattr(images, "max_patches"):
        images.max_patches, images.min_patches = max_tiles, min(images.min_patches, max_tiles)


class Chat:
    """Makes LMDeploy's messages of ours.

    LMDeploy writes `<img>…</img>` and a line feed for each picture of an InternVL. A text that goes on with a line feed
    behind a picture, as `Image-1: <IMAGE_TOKEN>\\nImage-2: …` in InternVL's documentation, has brought it already.
    """

    def __init__(self, architecture: str, settings: Mapping[str, int]) -> None:
        self._breaks_lines = architecture in INTERNVL
        self._settings = dict(settings)

    def messages(
        self, messages: Iterable[Message], picture: Callable[[int], Any] = lambda _: PLACE
    ) -> list[dict[str, Any]]:
        """`picture` gives the row's picture with a number; without it only their places are marked."""
        return [{"role": message.role, "content": self._content(message, picture)} for message in messages]

    def _content(self, message: Message, picture: Callable[[int], Any]) -> str | list[dict[str, Any]]:
        if all(part.image is None for part in message.parts):
            return "".join(part.text or "" for part in message.parts)
        content: list[dict[str, Any]] = []
        for part in message.parts:
            if part.image is not None:
                content.append({"type": "image_data", "image_data": {"data": picture(part.image), **self._settings}})
            elif text := self._text(part.text or "", after_picture=bool(content) and content[-1]["type"] != "text"):
                content.append({"type": "text", "text": text})
        return content

    def _text(self, text: str, *, after_picture: bool) -> str:
        return text.removeprefix("\n") if after_picture and self._breaks_lines else text
