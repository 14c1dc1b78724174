"""One row to LMDeploy's inputs, in an image worker, by LMDeploy's own code for the model at hand."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy
import torch

from ...types import ContentPart, Image, Message, Request
from . import raw_images as plain
from .chat import Chat, limit_tiles, picture_settings
from .inputs import PICTURES, pack
from .precomputed import around
from .processor import Processor, now
from .scaling import resized_size

if TYPE_CHECKING:
    from PIL.Image import Image as Picture


class Preparation:
    """Runs LMDeploy's preparation up to what its engines are given: tokens, pixels and where they belong.

    A row of one turn is prepared whole. Of one that has several the pictures are, and each turn's prompt is put around
    them once the answers before it are there; where the model's processor makes both at once, the pictures stay
    pictures, and LMDeploy prepares the row itself (`pictures.py`).

    model: a checkpoint's folder. dtype: the pixels' type, "bfloat16" or "float16", None as the model's processor makes
    them. template: the fields of LMDeploy's ChatTemplateConfig, None for the model's own. draft_decode: whether
    pictures may come smaller than their files. fingerprints: whether each picture gets one, over its encoded bytes and
    all that changes its pixels; TurboMind else takes one of the pixels.
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
        kind = getattr(torch, dtype) if dtype is not None else None
        self._processor = Processor(model, trust_remote_code, kind, template)
        self._encoder = self._processor.vl_encoder
        limit_tiles(architecture, self._encoder.model, max_tiles)
        self._architecture, self._settings = architecture, picture_settings(architecture, max_tiles)
        self._chat = Chat(architecture, self._settings)
        self._seen: Sequence[Picture] | None = None
        self._made: list[dict[str, Any]] = []  # of the pictures that were seen last
        salt = [model, architecture, dtype, max_tiles, draft_decode]
        self._salt = json.dumps(salt).encode() if fingerprints else None

    def prepare(
        self, request: Request, pictures: Sequence[Picture], images: Sequence[Image] = ()
    ) -> dict[str, numpy.ndarray]:
        """The arrays of `inputs.pack`, of LMDeploy's inputs; or those of `Pictures`."""
        asked = [*request.messages, *request.followups]
        order = [part.image for message in asked for part in message.parts if part.image is not None]
        if self._encoder.makes_pictures_alone:
            if pictures is not self._seen:
                self._seen, self._made = pictures, self._make(pictures, images)
            found = [self._made[number] for number in order]
            if request.followups:
                return pack({PICTURES: found})
            return pack(now(around(self._processor, self._chat.messages(asked), found)))
        if request.followups:
            return plain.Pictures().prepare(request, pictures)
        messages = self._chat.messages(asked, pictures.__getitem__)
        inputs = now(self._processor.get_prompt_input(messages, do_preprocess=True))
        self._mark(inputs["multimodal"], [images[number] for number in order] if images else [])
        return pack(inputs)

    def resized_size(self, width: int, height: int) -> tuple[int, int] | None:
        """See `Scaling`. None for a model of neither InternVL's nor Qwen2-VL's kind."""
        return resized_size(self._architecture, self._encoder.model, self._settings, width, height)

    def _make(self, pictures: Sequence[Picture], images: Sequence[Image]) -> list[dict[str, Any]]:
        """What LMDeploy makes of each picture."""
        shown = Message("user", tuple(ContentPart(image=number) for number in range(len(pictures))))
        messages = self._chat.messages([shown], pictures.__getitem__)
        parsed = now(self._processor.async_parse_multimodal_item(messages))
        made: list[dict[str, Any]] = now(self._encoder.preprocess(parsed))[-1]["content"]
        self._mark(made, images)
        return made

    def _mark(self, made: list[dict[str, Any]], images: Sequence[Image]) -> None:
        """Gives each picture its fingerprint."""
        if self._salt is not None:
            for picture, image in zip(made, images, strict=True):
                picture["fingerprint"] = hashlib.sha256(self._salt + str(image.sha256).encode()).digest()
