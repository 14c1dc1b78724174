"""One row to LMDeploy's inputs, in an image worker, by LMDeploy's own code for the model at hand."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy
import torch

from ...request import Image, Request
from . import pictures as plain
from .chat import Chat, limit_tiles, picture_settings
from .inputs import PICTURES, pack
from .processor import Processor, now

if TYPE_CHECKING:
    from PIL.Image import Image as Picture


class Preparation:
    """Runs LMDeploy's preparation up to what its engines are given: tokens, pixels and where they belong.

    A row of one turn is prepared whole. Of one that has several the pictures are, and each turn's prompt is put around
    them once the answers before it are there; where the model's processor makes both at once, the pictures stay
    pictures, and LMDeploy prepares the row itself (`pictures.py`).

    model: a checkpoint's folder. dtype: the pixels' type, "bfloat16" or "float16", None as the model's processor makes
    them. template: the fields of LMDeploy's ChatTemplateConfig, None for the model's own. fingerprints: whether each
    picture gets one, over its encoded bytes and all that changes its pixels; TurboMind else takes one of the pixels.
    """

    def __init__(
        self,
        model: str,
        architecture: str,
        trust_remote_code: bool,
        dtype: str | None,
        template: dict[str, Any] | None,
        max_tiles: int | None,
        fingerprints: bool,
    ) -> None:
        kind = getattr(torch, dtype) if dtype is not None else None
        self._processor = Processor(model, trust_remote_code, kind, template)
        self._encoder = self._processor.vl_encoder
        limit_tiles(architecture, self._encoder.model, max_tiles)
        self._chat = Chat(architecture, picture_settings(architecture, max_tiles))
        self._salt = json.dumps([model, architecture, dtype, max_tiles]).encode() if fingerprints else None

    def prepare(
        self, request: Request, pictures: Sequence[Picture], images: Sequence[Image] = ()
    ) -> dict[str, numpy.ndarray]:
        """The arrays of `inputs.pack`, of LMDeploy's inputs; or those of `Pictures`."""
        asked = [*request.messages, *request.followups]
        order = [part.image for message in asked for part in message.parts if part.image is not None]
        if request.followups and not self._encoder.makes_pictures_alone:
            return plain.Pictures().prepare(request, pictures)
        messages = self._chat.messages(asked, pictures.__getitem__)
        if request.followups:
            parsed = now(self._processor.async_parse_multimodal_item(messages))
            found = now(self._encoder.preprocess(parsed))[-1]["content"]
            inputs = {PICTURES: found}
        else:
            inputs = now(self._processor.get_prompt_input(messages, do_preprocess=True))
            found = inputs["multimodal"]
        if self._salt is not None:
            for item, number in zip(found, order, strict=True):
                item["fingerprint"] = self._fingerprint(images[number])
        return pack(inputs)

    def _fingerprint(self, image: Image) -> bytes:
        assert self._salt is not None
        return hashlib.sha256(self._salt + str(image.sha256).encode()).digest()
