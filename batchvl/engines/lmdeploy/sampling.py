"""Sampling settings and stop texts for LMDeploy, and the special tokens of a model's tokenizer."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from ...errors import Unsupported
from ...prompts.tokens import escapable_tokens, pattern_of
from ...types import Sampling

MAX_TEMPERATURE = 2.0
"""The highest temperature that LMDeploy takes."""
IMAGE_MARKS = ("<img>", "</img>", "<IMG_CONTEXT>", "<image>")
"""Tokens that stand for an image in a prompt, and that some tokenizers do not declare as special."""


def generation_config_fields(
    sampling: Sampling, template_stop_ids: Iterable[int], tokenizer_info: TokenizerInfo
) -> dict[str, Any]:
    """Return the fields of LMDeploy's GenerationConfig.

    Without `do_sample`, LMDeploy ignores the repetition penalty: a greedy answer with a penalty is sampled from the
    single best token instead. LMDeploy's own stop words must be one token, and then also match every token that
    contains them: only special tokens are passed to it, `StopTexts` handles the rest.

    Args:
        sampling: The row's settings.
        template_stop_ids: Stop tokens of the chat template, which a request's would replace.
        tokenizer_info: Of the model.

    Raises:
        Unsupported: The temperature is too high.
    """
    if sampling.temperature > MAX_TEMPERATURE:
        raise Unsupported(f"temperature {sampling.temperature:g}: LMDeploy takes {MAX_TEMPERATURE:g} at most")
    fields: dict[str, Any] = {"max_new_tokens": sampling.max_new_tokens, "random_seed": sampling.seed}
    special = tokenizer_info.special
    if stop_ids := sorted({*template_stop_ids, *(special[text] for text in sampling.stop if text in special)}):
        fields["stop_token_ids"] = stop_ids
    if sampling.temperature > 0:
        fields |= {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p}
        # More than there are tokens would end the loop of LMDeploy's PyTorch engine.
        fields["top_k"] = sampling.top_k if sampling.top_k < tokenizer_info.size else 0
        fields["repetition_penalty"] = sampling.repetition_penalty
    elif sampling.repetition_penalty != 1:
        fields |= {"do_sample": True, "top_k": 1, "temperature": 1.0}
        fields["repetition_penalty"] = sampling.repetition_penalty
    else:
        fields["do_sample"] = False
    return fields


class StopTexts:
    """Searches a growing answer for the texts that end it.

    >>> stops = StopTexts(("###",))
    >>> stops.cut("one ##"), stops.cut("one ## two ###")
    (None, 'one ## two ')
    """

    def __init__(self, texts: Iterable[str]) -> None:
        self._texts = tuple(texts)
        self._longest = max(map(len, self._texts), default=0)
        self._searched = 0

    def __bool__(self) -> bool:
        return bool(self._texts)

    def cut(self, text: str) -> str | None:
        """Return the whole answer so far up to its first stop text; None if it contains none."""
        start = max(0, self._searched - self._longest)
        self._searched = len(text)
        positions = [at for stop in self._texts if (at := text.find(stop, start)) >= 0]
        return text[: min(positions)] if positions else None


class TokenizerInfo:
    """Special tokens and vocabulary size of a model's tokenizer.

    Args:
        tokenizer: The tokenizer, of transformers.
        size: Tokens for which the model has logits.
    """

    def __init__(self, tokenizer: Any, size: int) -> None:
        added = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
        vocabulary = tokenizer.get_vocab()
        marks = [mark for mark in IMAGE_MARKS if mark in vocabulary]
        texts = dict.fromkeys([*added, *tokenizer.all_special_tokens, *marks])
        self.special: dict[str, int] = {text: int(tokenizer.convert_tokens_to_ids(text)) for text in texts}
        """The ids of the tokens that the tokenizer recognizes anywhere in a text, by their text."""
        self.size = size
        self._special = re.compile(pattern_of(escapable_tokens(texts)) or r"(?!)")

    def escape(self, text: str) -> str:
        """Return a model's answer for use in the next prompt: text that spells a special token no longer does."""
        return self._special.sub(lambda match: f"{match[0][0]} {match[0][1:]}", text)
