"""Batches whose model fails, with a stand-in for the model."""

from __future__ import annotations

import pytest
import torch

from batchvl.engines.transformers.conversation import Conversation, TokenDecoder
from batchvl.engines.transformers.families import Tiles
from batchvl.engines.transformers.generation import Generation
from batchvl.types import Request, Sampling
from tests.tiny_models import make_tokenizer


class Parrot:
    """A model that repeats the prompt's first token.

    It raises `error` if a batch has more than `max_rows` rows, and ValueError if a prompt begins with "!" (token 0).
    """

    device = torch.device("cpu")
    generation_config = None

    def __init__(self, max_rows: int = 100, error: Exception | None = None) -> None:
        self.max_rows, self.error = max_rows, error
        self.batches: list[int] = []

    def generate(self, input_ids, attention_mask, generation_config, logits_processor, stopping_criteria):
        self.batches.append(len(input_ids))
        repeated = input_ids[torch.arange(len(input_ids)), attention_mask.argmax(-1)]
        for step in range(generation_config.max_new_tokens):
            if step and len(input_ids) > self.max_rows:
                raise self.error
            if step and (repeated == 0).any():
                raise ValueError("cannot repeat !\nsecond line")
            input_ids = torch.cat([input_ids, repeated[:, None]], dim=-1)
            if stopping_criteria(input_ids, None).all():
                break


def conversation(row: int, text: str, tokens: int = 3, turns: int = 1) -> Conversation:
    tokenizer = make_tokenizer([], {})
    ids = tokenizer.encode(text)
    arrays = {
        "input_ids": torch.tensor(ids * turns, dtype=torch.int32),
        "input_ids.turns": torch.tensor([len(ids)] * turns, dtype=torch.int32),
    }
    request = Request(row, (), ((),) * (turns - 1), Sampling(max_new_tokens=tokens))
    return Conversation(request, arrays, TokenDecoder(tokenizer, {tokenizer.eos_token_id}))


def answer(model: Parrot, *rows: Conversation):
    """Return responses in order of completion."""
    responses = []
    Generation(model, Tiles(), None, 0).answer(rows, lambda row: responses.append(row.response()))
    return responses


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError()])
def test_a_batch_that_does_not_fit_is_halved(error):
    model = Parrot(2, error)

    responses = answer(model, *(conversation(row, "ABCDE"[row]) for row in range(5)))

    assert sorted((r.row, r.texts) for r in responses) == [(row, ("ABCDE"[row] * 3,)) for row in range(5)]
    assert model.batches == [5, 3, 2, 1, 2]


def test_rows_finished_before_the_failure_are_not_repeated():
    model = Parrot(2, torch.OutOfMemoryError())

    responses = answer(model, conversation(0, "A"), conversation(1, "B", tokens=1), conversation(2, "C"))

    assert [r.row for r in responses] == [1, 0, 2]
    assert model.batches == [3, 1, 1]


def test_a_single_row_that_does_not_fit_fails():
    [response] = answer(
        Parrot(0, torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 GiB")), conversation(0, "A")
    )

    assert response.failure.code == "engine_error"
    assert "Tried to allocate 3 GiB" in response.failure.message


def test_only_the_row_that_breaks_the_model_fails():
    model = Parrot()

    responses = answer(model, *(conversation(row, "ABCDEFG!"[row]) for row in range(8)))

    assert [(r.row, r.texts) for r in responses if not r.failure] == [(row, ("ABCDEFG"[row] * 3,)) for row in range(7)]
    assert model.batches == [8, 4, 4, 2, 2, 1, 1]
    [failed] = [r for r in responses if r.failure]
    assert failed.row == 7
    assert failed.failure.message.endswith("ValueError: cannot repeat !")


def test_later_turns_survive_the_failure_of_a_neighbour():
    responses = answer(Parrot(), conversation(0, "A", turns=3), conversation(1, "!", turns=2))

    good = next(r for r in responses if r.row == 0)
    assert good.texts == ("AAA",) * 3
    assert good.input_tokens == 1 + 5 + 9
    assert good.output_tokens == 9


def test_rows_at_different_turns_are_never_in_one_batch():
    model = Parrot()

    answer(model, conversation(0, "A", turns=2), conversation(1, "B"), conversation(2, "C", turns=2))

    assert model.batches == [3, 2]
