"""Tokens that rows draw within one batch."""

from __future__ import annotations

import pytest
import torch

from batchvl.engines.transformers.sampling import RowSampler, limited
from batchvl.types import Sampling

LOGITS = torch.tensor([1.0, 0.0, 2.0, -1.0, 0.5])


def draw(samplings, *, steps=1, prompts=None, logits=LOGITS):
    """Tokens drawn at each step, (steps, rows), always from the same logits."""
    prompts = prompts or [[0]] * len(samplings)
    width = max(map(len, prompts))
    ids = torch.tensor([[4] * (width - len(prompt)) + prompt for prompt in prompts])
    sampler = RowSampler(samplings, 0, [len(prompt) for prompt in prompts])
    found = []
    for _ in range(steps):
        found.append(sampler(ids, logits.repeat(len(samplings), 1)).argmax(-1))
        ids = torch.cat([ids, torch.zeros(len(samplings), 1, dtype=torch.long)], dim=-1)
    return torch.stack(found)


@pytest.mark.parametrize(
    ("sampling", "kept"),
    [
        ({"temperature": 1.0}, [0, 1, 2, 3, 4]),
        ({"temperature": 2.5}, [0, 1, 2, 3, 4]),
        ({"temperature": 1.0, "top_k": 2}, [0, 2]),
        ({"temperature": 1.0, "top_p": 0.6}, [0, 2]),
        ({"temperature": 1.0, "top_k": 3, "top_p": 0.85}, [0, 2]),
    ],
)
def test_draws_follow_the_softmax(sampling, kept):
    """A chi-squared test at 1 in 10,000; the seeds are fixed, so it passes always or never."""
    count = 4000
    drawn = draw([Sampling(seed=seed, **sampling) for seed in range(count)])[0]
    odds = torch.zeros(5)
    odds[kept] = (LOGITS[kept] / sampling["temperature"]).softmax(-1)

    counts = torch.bincount(drawn, minlength=5)

    assert not counts[odds == 0].any()
    expected = odds[kept] * count
    assert ((counts[kept] - expected) ** 2 / expected).sum() < {2: 15.1, 5: 23.5}[len(kept)]


def test_steps_are_independent_draws():
    drawn = draw([Sampling(temperature=1.0, seed=7)], steps=3000)[:, 0]
    odds = LOGITS.softmax(-1)
    pairs = torch.bincount(drawn[:-1] * 5 + drawn[1:], minlength=25) / 2999

    assert torch.allclose(pairs.view(5, 5), odds[:, None] * odds, atol=0.025)


def test_a_row_draws_the_same_wherever_it_stands():
    row = Sampling(temperature=1.0, seed=11)
    others = [Sampling(temperature=1.0, seed=3), Sampling(), Sampling(temperature=0.3, top_k=2, repetition_penalty=2.0)]

    alone = draw([row], steps=50)[:, 0]
    among = draw([others[0], row, *others[1:]], steps=50, prompts=[[0, 1, 2], [0], [1, 1], [3]])

    assert torch.equal(among[:, 1], alone)
    assert len(set(alone.tolist())) > 2


def test_seeds_and_turns_differ():
    def first(seed, turn):
        sampler = RowSampler([Sampling(temperature=1.0, seed=seed)], turn, [1])
        return sampler(torch.tensor([[0]]), torch.zeros(1, 1000)).argmax().item()

    assert len({first(seed, turn) for seed in range(5) for turn in range(4)}) > 17


def test_greedy_rows_are_left_alone():
    sampler = RowSampler([Sampling(), Sampling(top_k=1, top_p=0.1)], 0, [1, 1])

    assert not sampler.changes
    assert torch.equal(sampler(torch.zeros(2, 1, dtype=torch.long), LOGITS.repeat(2, 1)), LOGITS.repeat(2, 1))


def test_repetition_penalty_is_over_prompt_and_answer_but_not_padding():
    from transformers import RepetitionPenaltyLogitsProcessor

    penalised = Sampling(repetition_penalty=1.5)
    sampler = RowSampler([penalised, Sampling()], 0, [2, 4])
    ids = torch.tensor([[4, 4, 2, 3, 2], [0, 0, 0, 0, 0]])  # 4 is padding there; the last token is the answer's

    found = sampler(ids, LOGITS.repeat(2, 1))

    expected = RepetitionPenaltyLogitsProcessor(1.5)(ids[:1, 2:], LOGITS[None].clone())
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], LOGITS)


def test_top_p_of_nothing_keeps_the_best_token():
    kept = limited(LOGITS[None], [Sampling(temperature=0.01, top_p=0.0)]).isfinite()

    assert kept.tolist() == [[False, False, True, False, False]]
