"""Sampling of tokens with the settings and the seed of each row, within one batch."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from transformers import LogitsProcessor

from ...types import Sampling


class RowSampler(LogitsProcessor):  # type: ignore[misc]
    """Changes logits such that their argmax is the token that each row samples.

    Adding independent Gumbel noise to logits and taking the argmax samples exactly from their softmax (the Gumbel-max
    trick: Gumbel 1954; Maddison, Tarlow and Minka, "A* Sampling", NeurIPS 2014). A row's noise at a step is a function
    of (seed, turn, step), so its answer depends neither on its neighbours in the batch nor on its position there, as
    far as the logits do not. The noise of a CPU differs from that of a GPU.

    The repetition penalty is Hugging Face's: it counts each token of prompt and answer once (Keskar et al., "CTRL",
    2019). Temperature, top-k and top-p (Holtzman et al., "The Curious Case of Neural Text Degeneration", 2020) follow
    in this order.

    Args:
        samplings: Settings of each row.
        turn: Index of the answer.
        prompt_lengths: Tokens of each row's prompt. Prompts are padded on the left to the longest.
    """

    def __init__(self, samplings: Sequence[Sampling], turn: int, prompt_lengths: Sequence[int]) -> None:
        self._samplings, self._turn = samplings, turn
        self._width = max(prompt_lengths)
        self._padding = [self._width - length for length in prompt_lengths]
        self._penalised = [i for i, sampling in enumerate(samplings) if sampling.repetition_penalty != 1]
        self._sampled = [i for i, sampling in enumerate(samplings) if sampling.temperature > 0]
        self._generator: torch.Generator | None = None

    @property
    def active(self) -> bool:
        """Whether any row is not plain greedy decoding."""
        return bool(self._penalised or self._sampled)

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """Change the logits in place and return them.

        Args:
            input_ids: Tokens so far, (rows, tokens).
            scores: float32 logits, (rows, vocabulary).
        """
        for i in self._penalised:
            seen, penalty = input_ids[i, self._padding[i] :], self._samplings[i].repetition_penalty
            logits = scores[i, seen]
            scores[i, seen] = torch.where(logits < 0, logits * penalty, logits / penalty)
        if self._sampled:
            samplings = [self._samplings[i] for i in self._sampled]
            step = input_ids.shape[1] - self._width
            noise = self._gumbel_noise(samplings, step, scores)
            scores[self._sampled] = restrict_logits(scores[self._sampled], samplings) + noise
        return scores

    def _gumbel_noise(self, samplings: Sequence[Sampling], step: int, like: torch.Tensor) -> torch.Tensor:
        if self._generator is None:
            self._generator = torch.Generator(like.device)
        noise = torch.empty((len(samplings), like.shape[1]), device=like.device)
        for row, sampling in zip(noise, samplings, strict=True):
            key = f"{sampling.seed} {self._turn} {step}".encode()
            self._generator.manual_seed(int.from_bytes(hashlib.blake2b(key, digest_size=7).digest(), "little"))
            row.exponential_(generator=self._generator)
        return noise.log_().neg_()


def restrict_logits(logits: torch.Tensor, samplings: Sequence[Sampling]) -> torch.Tensor:
    """Divide logits by the temperature and set those outside of top-k and top-p to minus infinity.

    Args:
        logits: (rows, vocabulary).
        samplings: Settings of each row, with a temperature above 0.
    """

    def column(values: Sequence[float]) -> torch.Tensor:
        return torch.tensor(values, device=logits.device)[:, None]

    logits = logits / column([sampling.temperature for sampling in samplings])
    if all(sampling.top_k == 0 and sampling.top_p >= 1 for sampling in samplings):
        return logits
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(logits.shape[1], device=logits.device)
    ordered = ordered.masked_fill(rank >= column([s.top_k or logits.shape[1] for s in samplings]), -torch.inf)
    probabilities = ordered.softmax(dim=-1)
    before = probabilities.cumsum(dim=-1) - probabilities
    # Rounding may bring the sum past 1 while top_p is 1, and the first token must stay with a top_p of 0.
    cut = (before >= column([s.top_p if s.top_p < 1 else torch.inf for s in samplings])) & (rank > 0)
    return torch.empty_like(logits).scatter_(1, order, ordered.masked_fill(cut, -torch.inf))
