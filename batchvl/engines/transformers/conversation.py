"""The state of one row while its answers are generated: the current prompt, the tokens so far, where an answer ends."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy
import torch

from ...errors import ContextLengthExceeded, InferError
from ...ipc.arena import ArenaView
from ...types import Failure, Request, Response
from .device import DTYPES
from .families import TOKEN_KEYS
from .preparation import COUNTS


def read_arrays(request: Request, arena: ArenaView) -> dict[str, torch.Tensor]:
    """Return views, by name, of the request's prepared arrays.

    Nothing is copied: the views are valid only until the row's response is sent.
    """
    if request.extent is None:
        return {}
    memory = arena.at(request.extent)
    arrays = {}
    for tensor in request.tensors:
        dtype = numpy.dtype("uint16" if tensor.dtype == "bfloat16" else tensor.dtype)
        count = int(numpy.prod(tensor.shape, dtype=numpy.int64))
        array = torch.from_numpy(numpy.frombuffer(memory, dtype, count, tensor.offset).reshape(tensor.shape))
        arrays[tensor.name] = array.view(DTYPES["bfloat16"]) if tensor.dtype == "bfloat16" else array
    return arrays


class TokenDecoder:
    """Conversion between token ids and text, and the tokenizer's special tokens.

    Args:
        tokenizer: The model's tokenizer.
        end_ids: The tokens that end an answer of this model.
    """

    def __init__(self, tokenizer: Any, end_ids: Collection[int]) -> None:
        self._tokenizer = tokenizer
        self.end_ids = frozenset(end_ids)
        self.special_tokens = {
            token.content: token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special
        }
        """Ids by text."""
        self.special_ids = frozenset(self.special_tokens.values()) | frozenset(tokenizer.all_special_ids)
        self.pad_id = int(tokenizer.pad_token_id)

    def decode(self, ids: list[int]) -> str:
        """Return the text of the tokens, without special tokens."""
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False)
        return ids


class Conversation:
    """The generation state of one request, over all of its turns.

    `turn` is the index of the answer being generated. The prompt of a later turn holds the earlier answers as the
    tokens that were generated, without special tokens. An answer cut by a stop string is encoded again from its
    remaining text.
    """

    def __init__(self, request: Request, arrays: Mapping[str, torch.Tensor], decoder: TokenDecoder) -> None:
        self.request, self.turn = request, 0
        self.texts: list[str] = []
        self.failure: Failure | None = None
        self.generating = True
        """Whether the current turn's answer is incomplete."""
        self.prompt: list[int] = []
        self.max_new_tokens = 0
        """Limit for the current turn's answer."""
        self._arrays, self._decoder = arrays, decoder
        special = decoder.special_tokens
        stops = request.sampling.stop
        self._end_ids = decoder.end_ids | {special[stop] for stop in stops if stop in special}
        self._stop_strings = [stop for stop in stops if stop and stop not in special]
        # A character takes 4 tokens at most; a few more because the window may begin in the middle of a character.
        self._window = 4 * max(map(len, self._stop_strings), default=0) + 4
        self._history: list[list[int]] = []
        self._answer: list[int] = []
        self._truncated = False
        self._input_tokens = self._output_tokens = 0

    def start_turn(self, context: int | None) -> None:
        """Build the prompt of the current turn and discard a partial answer to it.

        Args:
            context: Tokens that prompt and answer may have together; None if unlimited.

        Raises:
            ContextLengthExceeded: The prompt leaves no room for an answer.
        """
        self.prompt = self._interleave("input_ids", self._history)
        self._answer, self.generating = [], True
        self.max_new_tokens = self.request.sampling.max_new_tokens
        if context is not None:
            if len(self.prompt) >= context:
                raise ContextLengthExceeded(
                    f"prompt, images and history have {len(self.prompt)} tokens; "
                    f"the model's context holds {context}, including the answer"
                )
            self.max_new_tokens = min(self.max_new_tokens, context - len(self.prompt))

    def token_type_arrays(self) -> dict[str, list[int]]:
        """Return the arrays that run parallel to the prompt's tokens, with 0 (text) for the tokens of answers."""
        blank = [[0] * len(answer) for answer in self._history]
        return {key: self._interleave(key, blank) for key in TOKEN_KEYS if key in self._arrays}

    def image_arrays(self) -> dict[str, torch.Tensor]:
        """Return the family's arrays of the images up to the current turn; empty if there are none yet."""
        turn_counts = {key: array for key, array in self._arrays.items() if key.endswith(COUNTS)}
        lengths = {key.removesuffix(COUNTS): int(array[: self.turn + 1].sum()) for key, array in turn_counts.items()}
        return {key: self._arrays[key][:length] for key, length in lengths.items() if key != "input_ids" and length}

    def append_token(self, token: int) -> None:
        """Append a token to the current answer, and clear `generating` if it completes the answer."""
        if token in self._end_ids:
            self._finish_turn(self._decoder.decode(self._answer))
            return
        self._answer.append(token)
        if self._stop_strings and (text := self._text_before_stop()) is not None:
            self._finish_turn(text, shortened=True)
        elif len(self._answer) >= self.max_new_tokens:
            self._truncated = True
            self._finish_turn(self._decoder.decode(self._answer))

    def fail(self, error: InferError) -> None:
        self.failure, self.generating = Failure.of(error), False

    @property
    def finished(self) -> bool:
        """Whether the last answer is complete or the row has failed."""
        return self.failure is not None or len(self.texts) > len(self.request.followups)

    def response(self) -> Response:
        """Return the row's response: with a failure, the answers before it; "length" if any answer was truncated."""
        return Response(
            self.request.row,
            tuple(self.texts),
            None if self.failure else "length" if self._truncated else "stop",
            self._input_tokens,
            self._output_tokens,
            self.failure,
        )

    def _text_before_stop(self) -> str | None:
        """Return the answer's text before its first stop string, None if it has no stop string yet."""
        tail = self._decoder.decode(self._answer[-self._window :])
        if not any(stop in tail for stop in self._stop_strings):
            return None
        text = self._decoder.decode(self._answer)
        positions = [text.find(stop) for stop in self._stop_strings if stop in text]
        return text[: min(positions)] if positions else None

    def _finish_turn(self, text: str, shortened: bool = False) -> None:
        self.texts.append(text)
        self.turn += 1
        self.generating = False
        self._input_tokens += len(self.prompt)
        self._output_tokens += len(self._answer)
        answer = self._decoder.encode(text) if shortened else self._answer
        self._history.append([token for token in answer if token not in self._decoder.special_ids])

    def _interleave(self, key: str, answers: list[list[int]]) -> list[int]:
        """Return the entries of an array up to the current turn, with `answers[turn]` after each earlier turn."""
        array, start, entries = self._arrays[key], 0, []
        for turn in range(self.turn + 1):
            count = int(self._arrays["input_ids" + COUNTS][turn])
            entries += array[start : start + count].tolist()
            entries += answers[turn] if turn < self.turn else []
            start += count
        return entries
