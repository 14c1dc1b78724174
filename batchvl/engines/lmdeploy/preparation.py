"""The preparation of rows in image workers, by LMDeploy's own code for the model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy
import PIL.Image
import torch
from lmdeploy.vl.model.internvl import dynamic_preprocess

from ...ipc.arena import ArenaView
from ...types import ContentPart, Image, Message, Request
from .. import scaling
from .chat import INTERNVL, QWEN, Chat, image_settings, limit_tiles
from .inputs import IMAGES, pack
from .precomputed import combine
from .processor import Processor, run_now


class LmdeployPreparation:
    """Runs LMDeploy's preparation up to what its engines are given: tokens, pixels and their positions.

    A row of one turn is prepared completely. Of a row with several turns only the images are, and each turn's prompt is
    combined with them once the answers before it are known. If the model's processor makes both at a time, the images
    of such a row stay images, and LMDeploy prepares the row itself (`RawImages`).

    Args:
        model: Directory of a checkpoint.
        architecture: The model's.
        trust_remote_code: Whether the model's own code may run.
        dtype: The pixels' dtype, "bfloat16" or "float16"; None leaves them as the model's processor returns them.
        template: Fields of LMDeploy's ChatTemplateConfig; None for the model's own template.
        max_tiles: Upper limit of tiles per image; None keeps the model's own.
        draft_decode: Whether images may be smaller than their files.
        fingerprints: Whether each image gets a fingerprint, of its encoded bytes and everything that changes its
            pixels; otherwise TurboMind computes one of the pixels.
    """

    def __init__(
        self,
        model: str,
        architecture: str,
        trust_remote_code: bool,
        dtype: str | None,
        template: dict[str, Any] | None,
        max_tiles: int | None,
        draft_decode: bool,
        fingerprints: bool,
    ) -> None:
        torch_dtype = getattr(torch, dtype) if dtype is not None else None
        self._processor = Processor(model, trust_remote_code, torch_dtype, template)
        self._encoder = self._processor.vl_encoder
        self.vision_model: Any = self._encoder.model
        """LMDeploy's vision model, without weights."""
        limit_tiles(architecture, self.vision_model, max_tiles)
        self._architecture, self._settings = architecture, image_settings(architecture, max_tiles)
        self._chat = Chat(architecture, self._settings)
        self._last_images: Sequence[PIL.Image.Image] | None = None
        self._last_prepared: list[dict[str, Any]] = []
        salt = [model, architecture, dtype, max_tiles, draft_decode]
        self._salt = json.dumps(salt).encode() if fingerprints else None

    def prepare(
        self, request: Request, images: Sequence[PIL.Image.Image], infos: Sequence[Image] = (), /
    ) -> dict[str, numpy.ndarray]:
        """Return LMDeploy's inputs as the arrays of `inputs.pack`, or the arrays of `RawImages`."""
        conversation = [*request.messages, *request.followups]
        order = [part.image for message in conversation for part in message.parts if part.image is not None]
        if self._encoder.separates_images:
            if images is not self._last_images:
                self._last_images, self._last_prepared = images, self._prepare_images(images, infos)
            prepared = [self._last_prepared[number] for number in order]
            if request.followups:
                return pack({IMAGES: prepared})
            return pack(run_now(combine(self._processor, self._chat.messages(conversation), prepared)))
        if request.followups:
            return RawImages().prepare(request, images)
        messages = self._chat.messages(conversation, images.__getitem__)
        inputs = run_now(self._processor.get_prompt_input(messages, do_preprocess=True))
        self._add_fingerprints(inputs["multimodal"], [infos[number] for number in order] if infos else [])
        return pack(inputs)

    def resized_size(self, width: int, height: int) -> tuple[int, int] | None:
        """Return the size that an image is resized to before it is cut into tiles (see `images.preparation.Scaling`).

        Known for InternVL's and Qwen2-VL's architectures, else None.
        """
        if self._architecture == "InternVLChatModel":
            return _internvl_chat_size(self.vision_model, self._settings, width, height)
        if self._architecture in INTERNVL | QWEN:
            return scaling.resized_size(self.vision_model.processor.image_processor, {}, width, height)
        return None

    def _prepare_images(self, images: Sequence[PIL.Image.Image], infos: Sequence[Image]) -> list[dict[str, Any]]:
        """Return what LMDeploy makes of each image."""
        message = Message("user", tuple(ContentPart(image=number) for number in range(len(images))))
        messages = self._chat.messages([message], images.__getitem__)
        parsed = run_now(self._processor.async_parse_multimodal_item(messages))
        prepared: list[dict[str, Any]] = run_now(self._encoder.preprocess(parsed))[-1]["content"]
        self._add_fingerprints(prepared, infos)
        return prepared

    def _add_fingerprints(self, prepared: list[dict[str, Any]], infos: Sequence[Image]) -> None:
        if self._salt is not None:
            for image, info in zip(prepared, infos, strict=True):
                image["fingerprint"] = hashlib.sha256(self._salt + str(info.sha256).encode()).digest()


class RawImages:
    """The preparation for models whose images LMDeploy prepares itself: decoded pixels, unchanged."""

    def prepare(
        self, request: Request, images: Sequence[PIL.Image.Image], infos: Sequence[Image] = (), /
    ) -> dict[str, numpy.ndarray]:
        """Return each image as a uint8 array of shape (height, width, 3)."""
        return {f"image{number}": numpy.asarray(image) for number, image in enumerate(images)}


def read_image(request: Request, number: int, arena: ArenaView) -> PIL.Image.Image:
    """Return a copy of an image that `RawImages` has put into the arena.

    Args:
        request: The row's request.
        number: The image's position in the row, from 0.
        arena: The arena.

    Raises:
        ValueError: The request has no extent.
    """
    if request.extent is None:
        raise ValueError(f"row {request.row} has images but no extent in the arena")
    tensor = request.tensors[number]
    height, width, channels = tensor.shape
    data = arena.at(request.extent)[tensor.offset : tensor.offset + height * width * channels]
    return PIL.Image.frombytes("RGB", (width, height), data)


def _internvl_chat_size(
    vision_model: Any, settings: Mapping[str, int], width: int, height: int
) -> tuple[int, int] | None:
    """Return the size of the grid of tiles of InternVL-Chat-V1-5 and later; None for V1-1 and V1-2, which crop."""
    if vision_model.processor != vision_model._preprocess_v1_5:
        return None
    recorder, config = _ResizeRecorder(width, height), vision_model.config
    dynamic_preprocess(
        recorder,
        min_num=config.min_dynamic_patch,
        max_num=settings.get("max_dynamic_patch", config.max_dynamic_patch),
        image_size=vision_model.vision_config.image_size,
        use_thumbnail=config.use_thumbnail,
    )
    return recorder.largest


class _ResizeRecorder:
    """Stands for an image of which only the size matters, and records the largest size that it is resized to."""

    def __init__(self, width: int, height: int) -> None:
        self.size, self.largest = (width, height), (0, 0)

    def resize(self, size: tuple[int, int]) -> _ResizeRecorder:
        self.largest = (max(self.largest[0], size[0]), max(self.largest[1], size[1]))
        return self

    def crop(self, box: tuple[int, int, int, int]) -> _ResizeRecorder:
        return self
