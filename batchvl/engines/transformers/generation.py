"""Generation of answers: batches through the model, each row handed back as soon as it is finished."""

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

OnFinished = Callable[[Conversation], None]


class Generation:
    """A model and the way its answers are generated. For one thread only.

    Args:
        model: A model of transformers for image-text-to-text.
        family: The model's family.
        context: Tokens that prompt and answer may have together; None if unlimited.
        pad_id: The token that fills up shorter prompts on the left.
    """

    def __init__(self, model: Any, family: Family, context: int | None, pad_id: int) -> None:
        self._model, self._family, self._context, self._pad_id = model, family, context, pad_id
        self.steps = 0
        """Forward passes so far, each of which generates one token for every row of a batch."""
        # The published configuration's sampling, such as a repetition penalty of 1.05, belongs to the model's chat
        # demo: only the run's options shape the answers.
        model.generation_config = GenerationConfig(pad_token_id=pad_id)

    def answer(self, rows: Sequence[Conversation], on_finished: OnFinished, aborted: Collection[int] = ()) -> None:
        """Generate the answers of all turns of the rows, one batch per turn.

        A batch that fails, for lack of memory or otherwise, is retried in halves, so that in the end only a row that
        fails alone has failed.

        Args:
            rows: Rows at the same turn.
            on_finished: Called with each row as soon as it is finished.
            aborted: Numbers of rows to end at the next token; another thread may add to them meanwhile.

        Raises:
            EngineLost: The device no longer responds.
        """
        groups = deque([list(rows)])
        while groups:
            group = self._start_turn(groups.popleft(), on_finished, aborted)
            if not group:
                continue
            failure = self._try_generate(group, on_finished, aborted)
            if next_turn := [row for row in group if not row.generating and not row.finished]:
                groups.append(next_turn)
            incomplete = [row for row in group if row.generating]
            if not incomplete:
                continue
            if len(group) == 1:
                incomplete[0].fail(EngineError(f"the model failed on this row: {failure}"))
                on_finished(incomplete[0])
            else:
                half = (len(incomplete) + 1) // 2
                groups.extendleft([incomplete[half:], incomplete[:half]])

    def _start_turn(
        self, rows: list[Conversation], on_finished: OnFinished, aborted: Collection[int]
    ) -> list[Conversation]:
        """Start the rows' current turn and return those that did not fail."""
        for row in rows:
            try:
                if row.request.row in aborted:
                    raise RowTimeout("aborted")
                row.start_turn(self._context)
            except InferError as error:
                row.fail(error)
                on_finished(row)
        return [row for row in rows if row.generating]

    def _try_generate(self, rows: list[Conversation], on_finished: OnFinished, aborted: Collection[int]) -> str | None:
        """Generate the rows' current turn and return the reason for a failure, None without one.

        The reason is text because an exception's traceback would keep the memory that the next attempt needs.
        """
        try:
            self._generate(rows, on_finished, aborted)
            return None
        except Exception as error:
            traceback.print_exc()  # into the engine's log: the row's failure has room for one line
            lines = str(error).strip().splitlines() or [""]
            reason = f"{type(error).__name__}: {lines[0]}"
        if self._model.device.type == "cuda":
            try:
                torch.cuda.synchronize(self._model.device)
                torch.cuda.empty_cache()
            except RuntimeError as error:
                raise EngineLost(f"{self._model.device} no longer responds after {reason} ({error})") from None
        return reason

    def _generate(self, rows: list[Conversation], on_finished: OnFinished, aborted: Collection[int]) -> None:
        sampler = RowSampler([row.request.sampling for row in rows], rows[0].turn, [len(row.prompt) for row in rows])
        with torch.inference_mode():
            self._model.generate(
                **self._inputs(rows),
                generation_config=GenerationConfig(
                    max_new_tokens=max(row.max_new_tokens for row in rows), do_sample=False, pad_token_id=self._pad_id
                ),
                logits_processor=LogitsProcessorList([sampler] if sampler.active else []),
                stopping_criteria=StoppingCriteriaList([self._count_step, TokenSink(rows, on_finished, aborted)]),
            )

    def _count_step(self, input_ids: torch.LongTensor, scores: Any, **_: Any) -> torch.BoolTensor:
        self.steps += 1
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    def _inputs(self, rows: Sequence[Conversation]) -> dict[str, torch.Tensor]:
        """Return the model's inputs for the rows' current turn."""
        device = self._model.device
        width = max(len(row.prompt) for row in rows)

        def pad_left(sequences: Sequence[list[int]], filler: int) -> torch.Tensor:
            padded = [[filler] * (width - len(sequence)) + sequence for sequence in sequences]
            return torch.tensor(padded, device=device)

        token_types = [row.token_type_arrays() for row in rows]
        inputs = {
            "input_ids": pad_left([row.prompt for row in rows], self._pad_id),
            "attention_mask": pad_left([[1] * len(row.prompt) for row in rows], 0),
            **{key: pad_left([arrays[key] for arrays in token_types], 0) for key in token_types[0]},
        }
        if with_images := [arrays for row in rows if (arrays := row.image_arrays())]:
            on_device = [{key: array.to(device) for key, array in arrays.items()} for arrays in with_images]
            inputs |= self._family.batch_arrays(on_device)
        return inputs


class TokenSink(StoppingCriteria):  # type: ignore[misc]
    """A stopping criterion that appends each generated token to its row and stops the rows whose turn is complete."""

    def __init__(self, rows: Sequence[Conversation], on_finished: OnFinished, aborted: Collection[int]) -> None:
        self._rows, self._on_finished, self._aborted = rows, on_finished, aborted

    def __call__(self, input_ids: torch.LongTensor, scores: Any, **_: Any) -> torch.BoolTensor:
        for row, token in zip(self._rows, input_ids[:, -1].tolist(), strict=True):
            if not row.generating:
                continue
            if row.request.row in self._aborted:
                row.fail(RowTimeout("aborted"))
            else:
                row.append_token(token)
            if row.finished:
                self._on_finished(row)
        complete = [not row.generating for row in self._rows]
        return torch.tensor(complete, dtype=torch.bool, device=input_ids.device)
