"""One row on its way through the engine: its turns, the tokens of the answer being given, where that ends."""

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
    """The request's prepared arrays, uncopied: to be read until the row's response is given, never after."""
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
    """What of the tokenizer the engine needs: decoding, and which tokens are control tokens or end an answer.

    ends: the model's own end tokens.
    """

    def __init__(self, tokenizer: Any, ends: Collection[int]) -> None:
        self._tokenizer = tokenizer
        self.ends = frozenset(ends)
        self.special = {
            token.content: number for number, token in tokenizer.added_tokens_decoder.items() if token.special
        }
        self.special_ids = frozenset(self.special.values()) | frozenset(tokenizer.all_special_ids)
        self.padding = int(tokenizer.pad_token_id)

    def decode(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False)
        return ids


class Conversation:
    """A request's state: `turn` is the number of the answer being given.

    An answer goes into the next turn's prompt as the very tokens that were drawn, without control tokens; where a
    stop string cut it, as the tokens of what is left.
    """

    def __init__(self, request: Request, arrays: Mapping[str, torch.Tensor], words: TokenDecoder) -> None:
        self.request, self.turn = request, 0
        self.texts: list[str] = []
        self.failure: Failure | None = None
        self.waiting = True  # for the present turn's end
        self.prompt: list[int] = []
        self.limit = 0
        self._arrays, self._words = arrays, words
        sampling = request.sampling
        self._ends = words.ends | {words.special[stop] for stop in sampling.stop if stop in words.special}
        self._stops = [stop for stop in sampling.stop if stop and stop not in words.special]
        # A character is 4 tokens at most; a few more, since a window may begin in the middle of one.
        self._window = 4 * max(map(len, self._stops), default=0) + 4
        self._history: list[list[int]] = []
        self._answer: list[int] = []
        self._cut = False
        self._input_tokens = self._output_tokens = 0

    def begin(self, context: int | None) -> None:
        """Readies the present turn, from its start if it was begun before. Raises ContextLengthExceeded."""
        self.prompt = self._joined("input_ids", self._history)
        self._answer, self.waiting = [], True
        self.limit = self.request.sampling.max_new_tokens
        if context is not None:
            if len(self.prompt) >= context:
                raise ContextLengthExceeded(
                    f"prompt, pictures and history are {len(self.prompt)} tokens; the model's context holds {context}, "
                    "the answer included"
                )
            self.limit = min(self.limit, context - len(self.prompt))

    def token_kinds(self) -> dict[str, list[int]]:
        """The prompt's arrays beside its tokens; answers are no pictures: 0."""
        blank = [[0] * len(answer) for answer in self._history]
        return {key: self._joined(key, blank) for key in TOKEN_KEYS if key in self._arrays}

    def pictures(self) -> dict[str, torch.Tensor]:
        """The family's arrays of the pictures shown so far; empty where there are none."""
        counts = {key: array for key, array in self._arrays.items() if key.endswith(COUNTS)}
        shown = {key.removesuffix(COUNTS): int(array[: self.turn + 1].sum()) for key, array in counts.items()}
        return {key: self._arrays[key][:count] for key, count in shown.items() if key != "input_ids" and count}

    def take(self, token: int) -> None:
        """The present answer's next token; `waiting` is false afterwards where it was the last."""
        if token in self._ends:
            self._finish(self._words.decode(self._answer))
            return
        self._answer.append(token)
        if self._stops and (text := self._before_stop()) is not None:
            self._finish(text, shortened=True)
        elif len(self._answer) >= self.limit:
            self._cut = True
            self._finish(self._words.decode(self._answer))

    def fail(self, error: InferError) -> None:
        self.failure, self.waiting = Failure.of(error), False

    @property
    def over(self) -> bool:
        """Whether the row's last answer is given, or it has failed."""
        return self.failure is not None or len(self.texts) > len(self.request.followups)

    def response(self) -> Response:
        """What is to be said of the row: with a failure, the answers before it. "length" if any answer was cut."""
        return Response(
            self.request.row,
            tuple(self.texts),
            None if self.failure else "length" if self._cut else "stop",
            self._input_tokens,
            self._output_tokens,
            self.failure,
        )

    def _before_stop(self) -> str | None:
        """The answer's text before the first stop string, None where there is none in it yet."""
        tail = self._words.decode(self._answer[-self._window :])
        if not any(stop in tail for stop in self._stops):
            return None
        text = self._words.decode(self._answer)
        found = [text.find(stop) for stop in self._stops if stop in text]
        return text[: min(found)] if found else None

    def _finish(self, text: str, shortened: bool = False) -> None:
        self.texts.append(text)
        self.turn += 1
        self.waiting = False
        self._input_tokens += len(self.prompt)
        self._output_tokens += len(self._answer)
        said = self._words.encode(text) if shortened else self._answer
        self._history.append([token for token in said if token not in self._words.special_ids])

    def _joined(self, key: str, answers: list[list[int]]) -> list[int]:
        array, at, joined = self._arrays[key], 0, []
        for turn in range(self.turn + 1):
            count = int(self._arrays["input_ids" + COUNTS][turn])
            joined += array[at : at + count].tolist()
            joined += answers[turn] if turn < self.turn else []
            at += count
        return joined
