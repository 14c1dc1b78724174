"""Special tokens in text: image placeholders, and tokens of the model that rows must not use."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from enum import Enum
from typing import Literal

from ..errors import SpecialToken
from .template import Author, Segment

IMAGE_TOKEN = "<IMAGE_TOKEN>"
"""The place of an image in a prompt."""


class Slot(Enum):
    """A place for the row's next image."""

    IMAGE = "image"


Piece = str | int | Slot
"""A part of a message: text, the number of an image, or a place for one."""


def escapable_tokens(tokens: Iterable[str]) -> tuple[str, ...]:
    """Return the tokens, without repetitions, that a space behind their first character breaks: those of 2 or more."""
    return tuple(token for token in dict.fromkeys(tokens) if len(token) > 1)


def pattern_of(tokens: Iterable[str]) -> str:
    """Return a regular expression for any of the tokens, the longest first.

    >>> pattern_of(["<i>", "<i>b"])
    '<i>b|<i>'
    """
    return "|".join(map(re.escape, sorted(tokens, key=len, reverse=True)))


class TokenSplitter:
    """Split text at image tokens and escape special tokens.

    A token whose author may not write it is escaped by a space behind its first character, `< |im_end|>`, or rejected.

    Args:
        special_tokens: The model's special tokens.
        policy: "escape" such tokens, or "fail" rows that have them.
    """

    def __init__(self, special_tokens: Iterable[str], policy: Literal["escape", "fail"]) -> None:
        self.special_tokens = escapable_tokens(special_tokens)
        self._policy = policy
        self._pattern = re.compile(pattern_of({IMAGE_TOKEN, *self.special_tokens}))

    def split(self, segments: Sequence[Segment]) -> list[Piece]:
        """Return the segments' text, with a `Slot` for each image token that places an image.

        Raises:
            SpecialToken: The policy is "fail", and a value has a special token.
        """
        text = segments[0].text if len(segments) == 1 else "".join([segment.text for segment in segments])
        match = self._pattern.search(text)
        if match is None:
            return [text]
        pieces: list[Piece] = []
        written: list[str] = []  # since the last slot
        done = 0
        while match is not None:
            token = match[0]
            author = _author_of(segments, match.start(), match.end())
            written.append(text[done : match.start()])
            done = match.end()
            if token == IMAGE_TOKEN and author in (Author.OPERATOR, Author.ROW):
                pieces += ["".join(written), Slot.IMAGE]
                written = []
            elif token != IMAGE_TOKEN and author is Author.OPERATOR:
                written.append(token)
            elif self._policy == "fail":
                raise SpecialToken(f"found {token!r} in the row, and --special-tokens is fail")
            else:
                written += [token[0], " "]
                done = match.start() + 1  # another token may begin inside this one
            match = self._pattern.search(text, done)
        return [*pieces, "".join([*written, text[done:]])]


def _author_of(segments: Sequence[Segment], start: int, end: int) -> Author | None:
    """Return the author of a span of the text; None if it crosses segments, so that nobody wrote it."""
    at = 0
    for segment in segments:
        if at <= start and end <= at + len(segment.text):
            return segment.author
        at += len(segment.text)
    return None
