"""Preparation of a request in an image worker: tokens and pixels from the model's own processor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy
import torch

from ...errors import ModelError, Unsupported
from ...types import ContentPart, Image, Message, Request
from .. import scaling
from .device import DTYPES
from .families import TOKEN_KEYS, recognise
from .processor import image_token_id, load_processor, media_tokens, render, special_tokens

if TYPE_CHECKING:
    from PIL.Image import Image as PILImage

COUNTS = ".turns"
"""Suffix of the array that holds how many entries of the array before the suffix belong to each turn."""
BFLOAT16 = ":bfloat16"
"""Suffix of an array of bfloat16, which numpy lacks: it is viewed as uint16."""


class ProcessorPreparation:
    """Runs a model's own processor over a whole conversation.

    The conversation is rendered once, with a special token that the template itself never writes in place of each
    answer that the model has yet to give; the tokens are cut there. So whatever the template writes after an answer
    becomes the beginning of the next turn's tokens, and nothing is assumed about the template.

    Args:
        model: Directory of the checkpoint.
        dtype: Type of the pixels: "float32", "float16" or "bfloat16".
        max_tiles: Limit of tiles per image, not counting a thumbnail; may exceed the model's own setting, which is
            used if None.
        trust_remote_code: Whether the checkpoint's own Python code may run.

    Raises:
        ModelError: The model's processor cannot be loaded or belongs to no known family.
    """

    def __init__(
        self, model: str, dtype: str = "float32", max_tiles: int | None = None, trust_remote_code: bool = False
    ) -> None:
        from PIL import Image as pil

        self.processor = load_processor(model, trust_remote_code)
        self._dtype = DTYPES[dtype]
        self._image_token = image_token_id(self.processor)
        try:
            prompt = render(self.processor, [Message("user", (ContentPart(image=0), ContentPart(text="?")))])
            outputs = self._process(prompt, [pil.new("RGB", (64, 48))], {})
        except Exception as error:
            raise ModelError(
                f"{model}: the model's processor fails for a blank image: {type(error).__name__}: {error}"
            ) from error
        self.family = recognise(model, outputs)
        image_processor = self.processor.image_processor
        self._settings = {} if max_tiles is None else self.family.tile_limit(image_processor, max_tiles)
        self._answer_token = self._find_answer_token()

    def prepare(
        self, request: Request, images: Sequence[PILImage], infos: Sequence[Image] = (), /
    ) -> dict[str, numpy.ndarray]:
        """Return the request's arrays.

        `input_ids` (tokens,) int32 of all turns, without answers, and `input_ids.turns` (turns,), how many of them
        belong to each turn; if the model wants them, `mm_token_type_ids` or the like (tokens,); and with images the
        arrays of the family, each with its `.turns`. Arrays of bfloat16 are viewed as uint16 and named "…:bfloat16".

        Raises:
            Unsupported: The model's template allows no conversation of several turns to be cut at its answers.
        """
        turns = [request.messages, *((message,) for message in request.followups)]
        image_numbers = [
            [part.image for message in turn for part in message.parts if part.image is not None] for turn in turns
        ]
        shown = [images[number] for numbers in image_numbers for number in numbers]
        outputs = self._process(render(self.processor, self._with_answer_tokens(request)), shown, self._settings)
        ids = numpy.asarray(outputs["input_ids"][0], numpy.int32)
        slices = self._turn_slices(ids, len(turns))
        kept = numpy.ones(len(ids), numpy.bool_)
        kept[[turn.stop for turn in slices[:-1]]] = False
        arrays = {
            "input_ids": ids[kept],
            "input_ids" + COUNTS: numpy.array([turn.stop - turn.start for turn in slices], numpy.int32),
        }
        arrays |= {key: numpy.asarray(outputs[key][0], numpy.int32)[kept] for key in TOKEN_KEYS if key in outputs}
        if shown:
            image_counts = [len(numbers) for numbers in image_numbers]
            placeholders = [int((ids[turn] == self._image_token).sum()) for turn in slices]
            for key, array in self.family.row_arrays(outputs).items():
                arrays[key + COUNTS] = _entries_per_turn(len(array), image_counts, placeholders)
                arrays |= self._as_dtype(key, numpy.ascontiguousarray(array))
        return arrays

    def resized_size(self, width: int, height: int) -> tuple[int, int] | None:
        """See `images.preparation.Scaling`."""
        return scaling.resized_size(self.processor.image_processor, self._settings, width, height)

    def special_tokens(self) -> tuple[str, ...]:
        return special_tokens(self.processor)

    def _with_answer_tokens(self, request: Request) -> list[Message]:
        """Return all messages of the conversation, with the answer token as each answer."""
        if request.followups and self._answer_token is None:
            raise Unsupported("the model's chat template leaves no place for the answers of several turns")
        answer = Message("assistant", (ContentPart(text=self._answer_token),))
        messages = list(request.messages)
        for message in request.followups:
            messages += (answer, message)
        return messages

    def _process(self, text: str, images: Sequence[PILImage], settings: dict[str, Any]) -> Any:
        bos_token = self.processor.tokenizer.bos_token
        has_bos = bos_token is not None and text.startswith(bos_token)
        return self.processor(
            text=[text],
            images=[list(images)] if images else None,
            text_kwargs={"add_special_tokens": not has_bos},
            images_kwargs={"return_tensors": "np", **settings},
        )

    def _turn_slices(self, ids: numpy.ndarray, turns: int) -> list[slice]:
        """Return each turn's part of the tokens; the parts are separated by one answer token each."""
        if turns == 1:
            return [slice(0, len(ids))]
        answer_id = self.processor.tokenizer.convert_tokens_to_ids(self._answer_token)
        cuts = numpy.flatnonzero(ids == answer_id).tolist()
        if len(cuts) != turns - 1:
            raise Unsupported(
                f"{turns} turns: found {len(cuts)} places for answers in the rendered conversation, want {turns - 1}: "
                f"the model's template rewrites answers, or a prompt holds the special token {self._answer_token!r}"
            )
        starts = [0, *(cut + 1 for cut in cuts)]
        return [slice(start, end) for start, end in zip(starts, [*cuts, len(ids)], strict=True)]

    def _as_dtype(self, key: str, array: numpy.ndarray) -> dict[str, numpy.ndarray]:
        """Return an array under its name, with floats converted to the pixels' type."""
        if array.dtype.kind != "f":
            return {key: array}
        tensor = torch.from_numpy(array).to(self._dtype)
        if self._dtype is torch.bfloat16:
            return {key + BFLOAT16: tensor.view(torch.uint16).numpy()}
        return {key: tensor.numpy()}

    def _find_answer_token(self) -> str | None:
        """Return a special token that occurs once in a rendered conversation if it is the answer; None without one."""
        tokenizer = self.processor.tokenizer
        media = media_tokens(self.processor)
        question = Message("user", (ContentPart(text="?"),))
        for token in dict.fromkeys((tokenizer.pad_token, *special_tokens(self.processor))):
            text = render(self.processor, [question, Message("assistant", (ContentPart(text=token),)), question])
            ids = [] if token in media else self._process(text, (), {})["input_ids"][0]
            if list(ids).count(tokenizer.convert_tokens_to_ids(token)) == 1:
                return str(token)
        return None


def _entries_per_turn(entries: int, images: list[int], placeholders: list[int]) -> numpy.ndarray:
    """Return how many of an array's entries belong to each turn.

    Args:
        entries: Length of the array.
        images: Images of each turn.
        placeholders: Image tokens of each turn, the measure if there is not one entry per image.
    """
    weights = images if entries == sum(images) else placeholders
    counts = [entries * weight // sum(weights) for weight in weights]
    if sum(counts) != entries or any(entries * weight % sum(weights) for weight in weights):
        raise Unsupported(f"{entries} tiles cannot be assigned to turns with {placeholders} image tokens")
    return numpy.array(counts, numpy.int32)
