"""Prompt templates: text with column names in braces."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from enum import Enum
from itertools import islice
from typing import Any, NamedTuple

from ..errors import ManifestError, MissingPrompt
from ..types import Row

_FIELD = re.compile(r"\{([^{}]*)\}")
_MAX_NAMES = 40


class Author(Enum):
    """Where a piece of a prompt comes from, which decides what tokens mean in it."""

    OPERATOR = "operator"
    """`--prompt`: `<IMAGE_TOKEN>` places an image, and the model's special tokens keep their meaning."""
    ROW = "row"
    """The row's own prompt: `<IMAGE_TOKEN>` places an image."""
    VALUE = "value"
    """A column's value in a template: no token has a meaning."""


class Segment(NamedTuple):
    """A piece of a prompt."""

    text: str
    author: Author


def template_columns(prompt: str, available: Iterable[str]) -> tuple[str, ...]:
    """Return the columns that a template names.

    Braces around anything that is not a column are text, such as JSON. But a single identifier in braces, `{caption}`,
    must be a column, unless its braces are doubled.

    >>> template_columns('{caption} as {"json": {}}', ["caption", "url"])
    ('caption',)

    Raises:
        ManifestError: A template names a column that does not exist. The message lists those that do.
    """
    columns = list(available)
    named: dict[str, None] = {}
    for match in _FIELD.finditer(prompt):
        name = match[1]
        if name in columns:
            named[name] = None
        elif name.isidentifier() and not _is_doubled(prompt, match):
            raise ManifestError(f"--prompt: no column {name!r} for {match[0]}; the columns are {quote_names(columns)}")
    return tuple(named)


def _is_doubled(prompt: str, match: re.Match[str]) -> bool:
    return prompt[: match.start()].endswith("{") and prompt.startswith("}", match.end())


def quote_names(names: Sequence[str]) -> str:
    """Return names as text for an error message, cut off after the first 40.

    >>> quote_names(["id", "prompt"])
    "'id', 'prompt'"
    """
    more = ", …" if len(names) > _MAX_NAMES else ""
    return ", ".join(map(repr, islice(names, _MAX_NAMES))) + more or "none"


class Template:
    """A prompt in which each `{column}` stands for a row's value, and `{prompt}` for the row's own prompt.

    >>> template = Template("Say {word}!")
    >>> [segment.text for segment in template.fill(Row(0, columns={"word": "hi"}))]
    ['Say ', 'hi', '!']
    """

    def __init__(self, text: str) -> None:
        # Text and names alternate: text, name, text, …
        self._pieces = _FIELD.split(text)

    def uses_prompt_of(self, row: Row) -> bool:
        """Return whether `{prompt}` stands for the row's own prompt, and not for a column of that name."""
        return "prompt" in self._pieces[1::2] and "prompt" not in row.columns

    def fill(self, row: Row, prompt: str | None = None) -> list[Segment]:
        """Return the template's segments for a row. Braces in values are text.

        Args:
            row: The row, with a value for each column that the template names.
            prompt: The text for `{prompt}`, if that stands for the row's own prompt.

        Raises:
            MissingPrompt: The value of a column is null.
        """
        segments = []
        for at, piece in enumerate(self._pieces):
            if at % 2 == 0:
                segments.append(Segment(piece, Author.OPERATOR))
            elif piece in row.columns:
                value = row.columns[piece]
                if value is None:
                    raise MissingPrompt(f"column {piece!r}, which the prompt names, is null")
                segments.append(Segment(_to_text(value), Author.VALUE))
            elif piece == "prompt" and prompt is not None:
                segments.append(Segment(prompt, Author.ROW))
            else:
                segments.append(Segment("{" + piece + "}", Author.OPERATOR))
        return segments


def _to_text(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, bool | int | float | list | dict):
        return json.dumps(value, ensure_ascii=False, default=str)
    return str(value)
