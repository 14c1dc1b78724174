"""Settings and stop texts in LMDeploy's form."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from ...errors import Unsupported
from ...prompts.template import breakable, either
from ...types import Sampling

MAX_TEMPERATURE = 2.0
"""LMDeploy takes no higher temperature."""


def settings(sampling: Sampling, stop_ids: Iterable[int], words: TokenizerInfo) -> dict[str, Any]:
    """The fields of LMDeploy's GenerationConfig. Raises Unsupported.

    Without do_sample LMDeploy takes greedy for greedy and forgets the repetition penalty: an answer with one is drawn
    from the single best token. Texts that stop an answer are none of its business (it takes only those that are one
    token, and then every token that holds them): `Stops` sees to them, but for special tokens.

    stop_ids: the chat template's own, which a row's must not replace.
    """
    if sampling.temperature > MAX_TEMPERATURE:
        raise Unsupported(f"temperature {sampling.temperature:g}: LMDeploy takes {MAX_TEMPERATURE:g} at most")
    fields: dict[str, Any] = {"max_new_tokens": sampling.max_new_tokens, "random_seed": sampling.seed}
    if ids := sorted({*stop_ids, *(words.special[text] for text in sampling.stop if text in words.special)}):
        fields["stop_token_ids"] = ids
    if sampling.temperature > 0:
        top_k = (
            sampling.top_k if sampling.top_k < words.size else 0
        )  # more than there are ends LMDeploy's PyTorch engine
        drawn = {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": top_k}
        return {**fields, **drawn, "do_sample": True, "repetition_penalty": sampling.repetition_penalty}
    if sampling.repetition_penalty != 1:
        penalty = sampling.repetition_penalty
        return {**fields, "do_sample": True, "top_k": 1, "temperature": 1.0, "repetition_penalty": penalty}
    return {**fields, "do_sample": False}


class Stops:
    """Watches an answer grow for the texts that end it.

    >>> stops = Stops(("###",))
    >>> stops.cut("one ##"), stops.cut("one ## two ###")
    (None, 'one ## two ')
    """

    def __init__(self, texts: Iterable[str]) -> None:
        self._texts = tuple(texts)
        self._longest = max(map(len, self._texts), default=0)
        self._seen = 0

    def __bool__(self) -> bool:
        return bool(self._texts)

    def cut(self, text: str) -> str | None:
        """The whole answer so far, before its first stop text; None where there is none in it."""
        start = max(0, self._seen - self._longest)
        self._seen = len(text)
        found = [at for stop in self._texts if (at := text.find(stop, start)) >= 0]
        return text[: min(found)] if found else None


MARKS = ("<img>", "</img>", "<IMG_CONTEXT>", "<image>")
"""What stands for a picture in a prompt, where tokenizers do not call it special."""


class TokenizerInfo:
    """Control tokens, by their text, and how many tokens there are."""

    def __init__(self, tokenizer: Any, size: int) -> None:
        added = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
        known = tokenizer.get_vocab()
        found = dict.fromkeys([*added, *tokenizer.all_special_tokens, *(mark for mark in MARKS if mark in known)])
        self.special: dict[str, int] = {token: int(tokenizer.convert_tokens_to_ids(token)) for token in found}
        """The strings that the tokenizer reads as control tokens wherever they stand in a text, and their numbers."""
        self.size = size
        self._special = re.compile(either(breakable(found)) or r"(?!)")

    def escaped(self, text: str) -> str:
        """An answer as a part of the next prompt: what spells a control token in it becomes none."""
        return self._special.sub(lambda found: f"{found[0][0]} {found[0][1:]}", text)
