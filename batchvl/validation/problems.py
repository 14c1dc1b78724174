"""What is wrong with a manifest's rows, counted by kind: `Problems`."""

from __future__ import annotations

from bisect import insort
from typing import Literal

import msgspec

from ..errors import row_errors
from ..images.labels import url_label

EXAMPLES = 3
_LONGEST = 300  # characters of what was found
_LONGEST_ID = 80

DUPLICATE_ID, MISSING_ID = "duplicate_id", "missing_id"
NO_PICTURE, REPEATED_QUESTION = "no_picture", "repeated_question"

Level = Literal["error", "warning"]

MEANINGS: dict[str, tuple[Level, str]] = {
    **{error.code: ("error", " ".join((error.__doc__ or "").split())) for error in row_errors()},
    DUPLICATE_ID: (
        "error",
        "An earlier row has the same id: answers cannot be told apart by it. `batchvl run` refuses the manifest if it "
        "finds this among the first 100,000 rows; `--id-column` names another column.",
    ),
    MISSING_ID: ("warning", "The row has no id, and others have."),
    NO_PICTURE: ("warning", "The row has no picture, though the manifest has some: it is asked without one."),
    REPEATED_QUESTION: (
        "warning",
        "An earlier row asks the same of the same pictures with the same settings: the same answer is paid for twice.",
    ),
}
"""Every kind of problem: those that a row fails with in a run, by the same codes, and those that no run looks for."""


class Example(msgspec.Struct, frozen=True, order=True):
    """A row that has a problem."""

    row: int
    id: int | str | None
    found: str


class Problem(msgspec.Struct, frozen=True):
    """One kind of problem: the rows that have it, and the first of them."""

    code: str
    level: Level
    rows: int
    meaning: str
    examples: tuple[Example, ...]


class Problems:
    """Counts problems, and keeps the first EXAMPLES rows of each kind."""

    def __init__(self) -> None:
        self._rows: dict[str, int] = {}
        self._examples: dict[str, list[Example]] = {}

    def add(self, code: str, row: int, id: int | str | None, found: str) -> None:
        """A row has a problem; `found` says what was found there."""
        self._rows[code] = self._rows.get(code, 0) + 1
        examples = self._examples.setdefault(code, [])
        if len(examples) < EXAMPLES or row < examples[-1].row:
            insort(examples, Example(row, shown(id), _cut(" ".join(found.split()), _LONGEST)), key=lambda e: e.row)
            del examples[EXAMPLES:]

    def count(self, code: str, rows: int) -> None:
        """So many rows more have a problem, of which no more is known."""
        if rows:
            self._rows[code] = self._rows.get(code, 0) + rows
            self._examples.setdefault(code, [])

    def drop(self, code: str) -> None:
        """This was none after all."""
        self._rows.pop(code, None)
        self._examples.pop(code, None)

    def found(self) -> tuple[Problem, ...]:
        """All of them: errors before warnings, and the most frequent first."""
        problems = (
            Problem(code, MEANINGS[code][0], rows, MEANINGS[code][1], tuple(self._examples[code]))
            for code, rows in self._rows.items()
        )
        return tuple(sorted(problems, key=lambda problem: (problem.level, -problem.rows, problem.code)))


def shown(id: int | str | None) -> int | str | None:
    """An id for people: cut off where it is long, and a URL without what may be secret."""
    if not isinstance(id, str):
        return id
    return _cut(url_label(id) if "://" in id else id, _LONGEST_ID)


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else text[:most] + "…"
