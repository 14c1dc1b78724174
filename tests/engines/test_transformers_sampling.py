"""Sampling of tokens with settings and a seed per row."""

from __future__ import annotations

import pytest
import torch

from batchvl.engines.transformers.sampling import RowSampler, restrict_logits
from batchvl.types import Sampling

LOGITS = torch.tensor([1.0, 0.0, 2.0, -1.0, 0.5])


def sample(samplings, *, steps=1, prompts=None, logits=LOGITS):
    """Return the tokens sampled at each step, (steps, rows), from the same logits at every step."""
    prompts = prompts or [[0]] * len(samplings)
    width = max(map(len, prompts))
    ids = torch.tensor([[4] * (width - len(prompt)) + prompt for prompt in prompts])
    sampler = RowSampler(samplings, 0, [len(prompt) for prompt in prompts])
    tokens = []
    for _ in range(steps):
        tokens.append(sampler(ids, logits.repeat(len(samplings), 1)).argmax(-1))
        ids = torch.cat([ids, torch.zeros(len(samplings), 1, dtype=torch.long)], dim=-1)
    return torch.stack(tokens)


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
def test_samples_follow_the_softmax(sampling, kept):
    """A chi-squared test at a significance of 1 in 10,000. The seeds are fixed, so it passes always or never."""
    count = 4000
    sampled = sample([Sampling(seed=seed, **sampling) for seed in range(count)])[0]
    probabilities = torch.zeros(5)
    probabilities[kept] = (LOGITS[kept] / sampling["temperature"]).softmax(-1)

    counts = torch.bincount(sampled, minlength=5)

    assert not counts[probabilities == 0].any()
    expected = probabilities[kept] * count
    assert ((counts[kept] - expected) ** 2 / expected).sum() < {2: 15.1, 5: 23.5}[len(kept)]


def test_steps_are_independent():
    sampled = sample([Sampling(temperature=1.0, seed=7)], steps=3000)[:, 0]
    probabilities = LOGITS.softmax(-1)
    pairs = torch.bincount(sampled[:-1] * 5 + sampled[1:], minlength=25) / 2999

    assert torch.allclose(pairs.view(5, 5), probabilities[:, None] * probabilities, atol=0.025)


def test_a_row_s_samples_do_not_depend_on_its_place_in_the_batch():
    row = Sampling(temperature=1.0, seed=11)
    others = [Sampling(temperature=1.0, seed=3), Sampling(), Sampling(temperature=0.3, top_k=2, repetition_penalty=2.0)]

    alone = sample([row], steps=50)[:, 0]
    among = sample([others[0], row, *others[1:]], steps=50, prompts=[[0, 1, 2], [0], [1, 1], [3]])

    assert torch.equal(among[:, 1], alone)
    assert len(set(alone.tolist())) > 2


def test_samples_depend_on_seed_and_turn():
    def first(seed, turn):
        sampler = RowSampler([Sampling(temperature=1.0, seed=seed)], turn, [1])
        return sampler(torch.tensor([[0]]), torch.zeros(1, 1000)).argmax().item()

    assert len({first(seed, turn) for seed in range(5) for turn in range(4)}) > 17


def test_greedy_rows_are_unchanged():
    sampler = RowSampler([Sampling(), Sampling(top_k=1, top_p=0.1)], 0, [1, 1])

    assert not sampler.active
    assert torch.equal(sampler(torch.zeros(2, 1, dtype=torch.long), LOGITS.repeat(2, 1)), LOGITS.repeat(2, 1))


def test_the_repetition_penalty_covers_prompt_and_answer_but_not_padding():
    from transformers import RepetitionPenaltyLogitsProcessor

    penalised = Sampling(repetition_penalty=1.5)
    sampler = RowSampler([penalised, Sampling()], 0, [2, 4])
    ids = torch.tensor([[4, 4, 2, 3, 2], [0, 0, 0, 0, 0]])  # 4 is the first row's padding

    changed = sampler(ids, LOGITS.repeat(2, 1))

    expected = RepetitionPenaltyLogitsProcessor(1.5)(ids[:1, 2:], LOGITS[None].clone())
    assert torch.equal(changed[0], expected[0])
    assert torch.equal(changed[1], LOGITS)


def test_top_p_of_0_keeps_the_most_likely_token():
    kept = restrict_logits(LOGITS[None], [Sampling(temperature=0.01, top_p=0.0)]).isfinite()

    assert kept.tolist() == [[False, False, True, False, False]]
