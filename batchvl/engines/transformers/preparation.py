"""One request to tokens and pixels, in an image worker."""

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
from .processor import image_token_id, load_processor, render, special_tokens

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

COUNTS = ".turns"
"""Ends the name of the array that says, for the array named before it, how many entries each turn adds."""


class ProcessorPreparation:
    """Runs a model's own processor over a whole conversation.

    The conversation is rendered once, with a special token that the template itself never writes standing for each
    answer that the model has yet to give; the tokens are cut there. So whatever the template puts after an answer
    leads the next turn's tokens, and nothing of the template is assumed.

    model: a checkpoint's folder. dtype: the pixels' type, "float32", "float16" or "bfloat16". max_tiles: at most so
    many tiles a picture, a thumbnail not counted; may exceed the model's own setting; None: that.
    Raises ModelError where the model's processor cannot be loaded or is of no known family.
    """

    def __init__(
        self, model: str, dtype: str = "float32", max_tiles: int | None = None, trust_remote_code: bool = False
    ) -> None:
        from PIL import Image as pil

        self.processor = load_processor(model, trust_remote_code)
        self._dtype = DTYPES[dtype]
        self._image_token = image_token_id(self.processor)
        try:
            probe = render(self.processor, [Message("user", (ContentPart(image=0), ContentPart(text="?")))])
            outputs = self._process(probe, [pil.new("RGB", (64, 48))], {})
        except Exception as error:
            said = f"{type(error).__name__}: {error}"
            raise ModelError(f"{model}: the model's processor fails over a blank picture: {said}") from error
        self.family = recognise(model, outputs)
        images = self.processor.image_processor
        self._settings = {} if max_tiles is None else self.family.limit(images, max_tiles)
        self._answer = self._find_answer_token()

    def prepare(
        self, request: Request, pictures: Sequence[Picture], images: Sequence[Image] = ()
    ) -> dict[str, numpy.ndarray]:
        """The request's arrays.

        `input_ids` (tokens,) int32 of all turns, answers left out, and `input_ids.turns` (turns,) how many of them
        each turn adds; where the model wants them `mm_token_type_ids` or the like (tokens,); and with pictures the
        family's arrays, each with its `.turns`. bfloat16 arrays are viewed as uint16, their names end in ":bfloat16".

        Raises Unsupported for a conversation of several turns that the model's template cannot be cut for.
        """
        asked = [request.messages, *((message,) for message in request.followups)]
        order = [[part.image for message in turn for part in message.parts if part.image is not None] for turn in asked]
        conversation = list(request.messages)
        if request.followups and self._answer is None:
            raise Unsupported("the model's chat template leaves no place for the answers of several turns")
        for message in request.followups:
            conversation += (Message("assistant", (ContentPart(text=self._answer),)), message)
        shown = [pictures[number] for turn in order for number in turn]
        outputs = self._process(render(self.processor, conversation), shown, self._settings)
        ids = numpy.asarray(outputs["input_ids"][0], numpy.int32)
        turns = self._turns(ids, len(asked))
        kept = numpy.ones(len(ids), numpy.bool_)
        kept[[turn.stop for turn in turns[:-1]]] = False
        arrays = {
            "input_ids": ids[kept],
            "input_ids" + COUNTS: numpy.array([turn.stop - turn.start for turn in turns], numpy.int32),
        }
        arrays |= {key: numpy.asarray(outputs[key][0], numpy.int32)[kept] for key in TOKEN_KEYS if key in outputs}
        if shown:
            placeholders = [int((ids[turn] == self._image_token).sum()) for turn in turns]
            for key, array in self.family.row(outputs).items():
                arrays[key + COUNTS] = _shares(len(array), [len(turn) for turn in order], placeholders)
                array = numpy.ascontiguousarray(array)
                if array.dtype.kind != "f":
                    arrays[key] = array
                elif self._dtype is torch.bfloat16:
                    arrays[key + ":bfloat16"] = torch.from_numpy(array).bfloat16().view(torch.uint16).numpy()
                else:
                    arrays[key] = torch.from_numpy(array).to(self._dtype).numpy()
        return arrays

    def used(self, width: int, height: int) -> tuple[int, int] | None:
        """See `images.preparation.Scaling`."""
        return scaling.resized_size(self.processor.image_processor, self._settings, width, height)

    def special_tokens(self) -> tuple[str, ...]:
        return special_tokens(self.processor)

    def _process(self, text: str, pictures: Sequence[Picture], settings: dict[str, Any]) -> Any:
        tokenizer = self.processor.tokenizer
        written = tokenizer.bos_token is not None and text.startswith(tokenizer.bos_token)
        return self.processor(
            text=[text],
            images=[list(pictures)] if pictures else None,
            text_kwargs={"add_special_tokens": not written},
            images_kwargs={"return_tensors": "np", **settings},
        )

    def _turns(self, ids: numpy.ndarray, wanted: int) -> list[slice]:
        if wanted == 1:
            return [slice(0, len(ids))]
        cuts = numpy.flatnonzero(ids == self.processor.tokenizer.convert_tokens_to_ids(self._answer)).tolist()
        if len(cuts) != wanted - 1:
            raise Unsupported(
                f"{wanted} turns: the conversation shows {len(cuts)} places for answers instead of {wanted - 1}: "
                f"the model's template rewrites them, or a prompt holds the special token {self._answer!r}"
            )
        return [
            slice(start, end) for start, end in zip([0, *(cut + 1 for cut in cuts)], [*cuts, len(ids)], strict=True)
        ]

    def _find_answer_token(self) -> str | None:
        tokenizer = self.processor.tokenizer
        media = {getattr(self.processor, f"{name}_token", None) for name in ("image", "video", "audio")}
        ask = Message("user", (ContentPart(text="?"),))
        for token in dict.fromkeys((tokenizer.pad_token, *special_tokens(self.processor))):
            text = render(self.processor, [ask, Message("assistant", (ContentPart(text=token),)), ask])
            ids = [] if token in media else self._process(text, (), {})["input_ids"][0]
            if list(ids).count(tokenizer.convert_tokens_to_ids(token)) == 1:
                return str(token)
        return None


def _shares(entries: int, pictures: list[int], placeholders: list[int]) -> numpy.ndarray:
    """How many of an array's entries each turn adds, by its pictures or by the tokens that stand for them."""
    by = pictures if entries == sum(pictures) else placeholders
    shares = [entries * part // sum(by) for part in by]
    if sum(shares) != entries or any(entries * part % sum(by) for part in by):
        raise Unsupported(f"{entries} tiles cannot be told apart by turns with {placeholders} tokens for them")
    return numpy.array(shares, numpy.int32)
