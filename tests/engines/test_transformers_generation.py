"""What becomes of a list when the model misbehaves, with a stand-in for the model."""

from __future__ import annotations

import pytest
import torch

from batchvl.engines.transformers.conversation import Conversation, TokenDecoder
from batchvl.engines.transformers.families import Tiles
from batchvl.engines.transformers.generation import Generation
from batchvl.types import Request, Sampling
from tests.tiny_models import make_tokenizer

A = 32  # the token of the letter "A": printable characters are numbered from "!" on


class Parrot:
    """Says the prompt's first token again and again; raises `error` where a batch has more than `most` rows, and
    ValueError over a prompt that begins with "!"."""

    device = torch.device("cpu")
    generation_config = None

    def __init__(self, most: int = 100, error: Exception | None = None) -> None:
        self.most, self.error = most, error
        self.batches: list[int] = []

    def generate(self, input_ids, attention_mask, generation_config, logits_processor, stopping_criteria):
        self.batches.append(len(input_ids))
        says = input_ids[torch.arange(len(input_ids)), attention_mask.argmax(-1)]
        for step in range(generation_config.max_new_tokens):
            if step and len(input_ids) > self.most:
                raise self.error
            if step and (says == 0).any():
                raise ValueError("cannot say !\nand more of it")
            input_ids = torch.cat([input_ids, says[:, None]], dim=-1)
            if stopping_criteria(input_ids, None).all():
                break


def conversation(row: int, text: str, tokens: int = 3, turns: int = 1) -> Conversation:
    tokenizer = make_tokenizer([], {})
    ids = tokenizer.encode(text)
    arrays = {
        "input_ids": torch.tensor(ids * turns, dtype=torch.int32),
        "input_ids.turns": torch.tensor([len(ids)] * turns, dtype=torch.int32),
    }
    asked = Request(row, (), ((),) * (turns - 1), Sampling(max_new_tokens=tokens))
    return Conversation(asked, arrays, TokenDecoder(tokenizer, {tokenizer.eos_token_id}))


def answer(model: Parrot, *rows: Conversation):
    """Responses in order of completion."""
    responses = []
    Generation(model, Tiles(), None, 0).answer(rows, lambda row: responses.append(row.response()))
    return responses


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError()])
def test_a_list_that_does_not_fit_is_halved(error):
    model = Parrot(2, error)

    responses = answer(model, *(conversation(row, "ABCDE"[row]) for row in range(5)))

    assert sorted((r.row, r.texts) for r in responses) == [(row, ("ABCDE"[row] * 3,)) for row in range(5)]
    assert model.batches == [5, 3, 2, 1, 2]


def test_rows_done_before_the_failure_are_not_asked_again():
    model = Parrot(2, torch.OutOfMemoryError())

    responses = answer(model, conversation(0, "A"), conversation(1, "B", tokens=1), conversation(2, "C"))

    assert [r.row for r in responses] == [1, 0, 2]
    assert model.batches == [3, 1, 1]


def test_one_row_that_does_not_fit_fails():
    [response] = answer(
        Parrot(0, torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 GiB")), conversation(0, "A")
    )

    assert response.failure.code == "engine_error"
    assert "Tried to allocate 3 GiB" in response.failure.message


def test_only_the_guilty_row_fails():
    model = Parrot()

    responses = answer(model, *(conversation(row, "ABCDEFG!"[row]) for row in range(8)))

    assert [(r.row, r.texts) for r in responses if not r.failure] == [(row, ("ABCDEFG"[row] * 3,)) for row in range(7)]
    assert model.batches == [8, 4, 4, 2, 2, 1, 1]
    [failed] = [r for r in responses if r.failure]
    assert failed.row == 7
    assert failed.failure.message.endswith("ValueError: cannot say !")


def test_later_turns_survive_a_neighbour_s_failure():
    responses = answer(Parrot(), conversation(0, "A", turns=3), conversation(1, "!", turns=2))

    good = next(r for r in responses if r.row == 0)
    assert good.texts == ("AAA",) * 3
    assert good.input_tokens == 1 + 5 + 9
    assert good.output_tokens == 9


def test_rows_of_different_turns_are_never_in_one_batch():
    model = Parrot()

    answer(model, conversation(0, "A", turns=2), conversation(1, "B"), conversation(2, "C", turns=2))

    assert model.batches == [3, 2]
