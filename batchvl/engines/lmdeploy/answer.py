"""One answer as it grows, output by output."""

from __future__ import annotations

from typing import Any

from .failures import ended
from .sampling import Stops

_CUT_CHARACTER = "\N{REPLACEMENT CHARACTER}"


class Answer:
    """What LMDeploy has said so far. `stops` end it; `tokenizer` is LMDeploy's."""

    def __init__(self, stops: Stops, tokenizer: Any) -> None:
        self._stops, self._tokenizer = stops, tokenizer
        self._text = ""
        self._ids: list[int] = []
        self._reason: str | None = None
        self._withheld = self._stopped = False
        self.tokens = 0
        """Of the answer, without the one that ends it."""

    def add(self, out: Any) -> bool:
        """The next output, a GenOut; True at the one in which a stop text ends the answer, after which none counts."""
        if self._stopped:
            return False
        self.tokens, self._reason = out.generate_token_len, out.finish_reason or self._reason
        self._text += out.response
        if out.token_ids:
            self._ids += out.token_ids
            self._withheld = not out.response
        return self._stop()

    def end(self) -> str:
        """The whole text. Raises EngineFailed where it was not given in full."""
        if self._withheld and not self._stopped:
            # LMDeploy gives no text of an output whose last character is cut in two, and all of TurboMind's answer is
            # one output.
            whole = self._tokenizer.decode(self._ids, skip_special_tokens=True).rstrip(_CUT_CHARACTER)
            self._text = max(self._text, whole, key=len)
            self._stop()
        if not self._stopped and self._reason not in ("stop", "length"):
            raise ended(self._reason)
        return self._text

    @property
    def cut(self) -> bool:
        """Whether it ended because it may not be longer."""
        return not self._stopped and self._reason == "length"

    def _stop(self) -> bool:
        if self._stops and (text := self._stops.cut(self._text)) is not None:
            self._text, self._stopped = text, True
        return self._stopped
