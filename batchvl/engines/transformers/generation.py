"""A list of requests to answers: batches through the model, rows leaving as each is done."""

from __future__ import annotations

import traceback
from collections import deque
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from ...errors import EngineError, EngineLost, InferError, RowTimeout
from .conversation import Conversation
from .families import Family
from .sampling import RowSampler


class Generation:
    """The model, and how it is asked. For one thread only.

    context: tokens that prompt and answer may have together. padding: the token that shorter prompts are filled up
    with on the left.
    """

    def __init__(self, model: Any, family: Family, context: int | None, padding: int) -> None:
        self._model, self._family, self._context, self._padding = model, family, context, padding
        self.steps = 0
        """How often the model has given every row of a batch a token."""
        # The published configuration's sampling, such as a repetition penalty of 1.05, belongs to the model's chat
        # demo: what a run asks for is all that shapes its answers.
        model.generation_config = GenerationConfig(pad_token_id=padding)

    def answer(
        self, rows: Sequence[Conversation], done: Callable[[Conversation], None], aborted: Collection[int] = ()
    ) -> None:
        """Asks all turns of all rows as one batch a turn, and hands each row to `done` once it is over.

        A batch that fails, of memory or otherwise, is asked again in halves, so that in the end only a row that fails
        alone has failed. `aborted` holds the numbers of rows to end at the next token; others may add to it meanwhile.
        Raises EngineLost where the device does not answer any more.
        """
        groups = deque([list(rows)])
        while groups:
            group = self._begun(groups.popleft(), done, aborted)
            if not group:
                continue
            error = self._try(group, done, aborted)
            going_on = [row for row in group if not row.waiting and not row.over]
            if going_on:
                groups.append(going_on)
            left = [row for row in group if row.waiting]
            if not left:
                continue
            if len(group) == 1:
                left[0].fail(EngineError(f"the model failed over this row: {error}"))
                done(left[0])
            else:
                half = (len(left) + 1) // 2
                groups.extendleft([left[half:], left[:half]])

    def _begun(
        self, rows: list[Conversation], done: Callable[[Conversation], None], aborted: Collection[int]
    ) -> list[Conversation]:
        for row in rows:
            try:
                if row.request.row in aborted:
                    raise RowTimeout("aborted")
                row.begin(self._context)
            except InferError as error:
                row.fail(error)
                done(row)
        return [row for row in rows if row.waiting]

    def _try(
        self, rows: list[Conversation], done: Callable[[Conversation], None], aborted: Collection[int]
    ) -> str | None:
        """Asks the rows' present turns. What went wrong is returned as text: an exception would hold on, by its
        traceback, to the memory that the next attempt needs."""
        try:
            self._generate(rows, done, aborted)
            return None
        except Exception as error:
            traceback.print_exc()  # into the engine's log: the row's failure has room for one line
            lines = str(error).strip().splitlines() or [""]
            said = f"{type(error).__name__}: {lines[0]}"
        if self._model.device.type == "cuda":
            try:
                torch.cuda.synchronize(self._model.device)
                torch.cuda.empty_cache()
            except RuntimeError as error:
                raise EngineLost(f"{self._model.device} does not answer any more after {said} ({error})") from None
        return said

    def _generate(
        self, rows: list[Conversation], done: Callable[[Conversation], None], aborted: Collection[int]
    ) -> None:
        sampler = RowSampler([row.request.sampling for row in rows], rows[0].turn, [len(row.prompt) for row in rows])
        with torch.inference_mode():
            self._model.generate(
                **self._inputs(rows),
                generation_config=GenerationConfig(
                    max_new_tokens=max(row.limit for row in rows), do_sample=False, pad_token_id=self._padding
                ),
                logits_processor=LogitsProcessorList([sampler] if sampler.changes else []),
                stopping_criteria=StoppingCriteriaList([self._step, RowsEnd(rows, done, aborted)]),
            )

    def _step(self, input_ids: torch.LongTensor, scores: Any, **_: Any) -> torch.BoolTensor:
        self.steps += 1
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    def _inputs(self, rows: Sequence[Conversation]) -> dict[str, torch.Tensor]:
        device = self._model.device
        width = max(len(row.prompt) for row in rows)

        def padded(lists: Sequence[list[int]], filling: int) -> torch.Tensor:
            return torch.tensor([[filling] * (width - len(ids)) + ids for ids in lists], device=device)

        kinds = [row.token_kinds() for row in rows]
        inputs = {
            "input_ids": padded([row.prompt for row in rows], self._padding),
            "attention_mask": padded([[1] * len(row.prompt) for row in rows], 0),
            **{key: padded([kind[key] for kind in kinds], 0) for key in kinds[0]},
        }
        shown = [pictures for row in rows if (pictures := row.pictures())]
        if shown:
            inputs |= self._family.batch([{key: a.to(device) for key, a in pictures.items()} for pictures in shown])
        return inputs


class RowsEnd(StoppingCriteria):  # type: ignore[misc]
    """Gives each row its tokens and says which rows are done, telling `done` of those that are over at that moment."""

    def __init__(
        self, rows: Sequence[Conversation], done: Callable[[Conversation], None], aborted: Collection[int]
    ) -> None:
        self._rows, self._done, self._aborted = rows, done, aborted

    def __call__(self, input_ids: torch.LongTensor, scores: Any, **_: Any) -> torch.BoolTensor:
        for row, token in zip(self._rows, input_ids[:, -1].tolist(), strict=True):
            if not row.waiting:
                continue
            if row.request.row in self._aborted:
                row.fail(RowTimeout("aborted"))
            else:
                row.take(token)
            if row.over:
                self._done(row)
        ended = [not row.waiting for row in self._rows]
        return torch.tensor(ended, dtype=torch.bool, device=input_ids.device)
