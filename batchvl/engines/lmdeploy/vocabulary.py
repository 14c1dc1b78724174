"""What of a model's tokenizer batchvl needs beside LMDeploy's own use of it."""

from __future__ import annotations

import re
from typing import Any

from ...prompt import breakable, either

MARKS = ("<img>", "</img>", "<IMG_CONTEXT>", "<image>")
"""What stands for a picture in a prompt, where tokenizers do not call it special."""


class Vocabulary:
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
