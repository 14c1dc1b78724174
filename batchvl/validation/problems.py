"""Problems of a manifest's rows, counted by kind."""

from __future__ import annotations

from bisect import insort
from typing import Literal

import msgspec

from ..errors import row_errors
from ..fetching.sources import url_label

EXAMPLES = 3
_MAX_FOUND = 300  # characters
_MAX_ID = 80  # characters

DUPLICATE_ID, MISSING_ID = "duplicate_id", "missing_id"
NO_IMAGE, REPEATED_QUESTION = "no_image", "repeated_question"

Level = Literal["error", "warning"]

MEANINGS: dict[str, tuple[Level, str]] = {
    **{error.code: ("error", " ".join((error.__doc__ or "").split())) for error in row_errors()},
    DUPLICATE_ID: (
        "error",
        "The row has the same id as an earlier row, so their answers cannot be told apart. `batchvl run` rejects the "
        "manifest if this occurs in the first 100,000 rows. Use another column with `--id-column`.",
    ),
    MISSING_ID: ("warning", "The row has no id, although other rows have one."),
    NO_IMAGE: ("warning", "The row has no image, although the manifest has images. It is asked without one."),
    REPEATED_QUESTION: (
        "warning",
        "An earlier row has the same prompt, images and settings: the same answer is generated again.",
    ),
}
"""Every kind of problem: the error codes of a run, and problems that a run does not look for."""


class Example(msgspec.Struct, frozen=True, order=True):
    """A row that has a problem."""

    row: int
    id: int | str | None
    found: str


class Problem(msgspec.Struct, frozen=True):
    """One kind of problem: the number of rows that have it, and the first of them."""

    code: str
    level: Level
    rows: int
    meaning: str
    examples: tuple[Example, ...]


class Problems:
    """Count problems, and keep the first EXAMPLES rows of each kind."""

    def __init__(self) -> None:
        self._rows: dict[str, int] = {}
        self._examples: dict[str, list[Example]] = {}

    def add(self, code: str, row: int, id: int | str | None, found: str) -> None:
        """Count a row that has a problem. found: what the row has, in words."""
        self._rows[code] = self._rows.get(code, 0) + 1
        examples = self._examples.setdefault(code, [])
        if len(examples) < EXAMPLES or row < examples[-1].row:
            example = Example(row, redact_id(id), _truncate(" ".join(found.split()), _MAX_FOUND))
            insort(examples, example, key=lambda example: example.row)
            del examples[EXAMPLES:]

    def add_rows(self, code: str, rows: int) -> None:
        """Count rows of which no more than their number is known."""
        if rows:
            self._rows[code] = self._rows.get(code, 0) + rows
            self._examples.setdefault(code, [])

    def discard(self, code: str) -> None:
        """Remove a kind of problem that turned out not to be one."""
        self._rows.pop(code, None)
        self._examples.pop(code, None)

    def ranked(self) -> tuple[Problem, ...]:
        """Return all problems: errors before warnings, the most frequent first."""
        problems = (
            Problem(code, MEANINGS[code][0], rows, MEANINGS[code][1], tuple(self._examples[code]))
            for code, rows in self._rows.items()
        )
        return tuple(sorted(problems, key=lambda problem: (problem.level, -problem.rows, problem.code)))


def redact_id(id: int | str | None) -> int | str | None:
    """Return an id to show: truncated if it is long, and a URL without its secrets."""
    if not isinstance(id, str):
        return id
    return _truncate(url_label(id) if "://" in id else id, _MAX_ID)


def _truncate(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[:limit] + "…"
