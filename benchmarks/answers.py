"""What a run's answers about pictures of shapes are worth: right, wrong, lost, or another row's."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, field
from itertools import zip_longest
from random import Random
from typing import Any

from batchvl.shapes.scenes import COLOURS, SHAPES

SORTS = {
    **dict.fromkeys("123", "number"), **dict.fromkeys(COLOURS, "colour"), **dict.fromkeys(SHAPES, "shape"),
    **dict.fromkeys(("yes", "no"), "yes or no"), **dict.fromkeys(("image 1", "image 2", "both", "neither"), "image"),
}  # fmt: skip
"""Short answers by what they answer."""
ENOUGH = 0.995

Row = dict[str, Any]
"""A line of the manifest with its `truth`: the expected texts, one a turn; None where the row must fail, with its id as
the error's code. Or a row of the output."""


@dataclass
class Check:
    """What the results of a run are worth. Lists name rows and say what is wrong with them."""

    rows: int
    """Those that can be answered."""
    right: int = 0
    proven: int = 0
    """Rows answered right with a text that no other row expects: it cannot have been meant for another."""
    wrong: list[str] = field(default_factory=list)
    swapped: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    doubled: list[str] = field(default_factory=list)
    misfailed: list[str] = field(default_factory=list)
    """Good rows that failed, bad ones that did not, or for another reason."""
    failed: Counter[str] = field(default_factory=Counter)
    """All failures, by code."""
    answers: dict[int, tuple[str, ...] | None] = field(default_factory=dict)
    """By the row's number; None where it failed."""

    def faults(self) -> list[str]:
        """Why the results are not good enough; empty where they are."""
        found = [f"only {self.right} of {self.rows} rows are right"] if self.right < ENOUGH * self.rows else []
        for name in ("swapped", "missing", "doubled", "misfailed"):
            if lines := getattr(self, name):
                found.append(f"{len(lines)} {name}")
        return found


class Owners:
    """Which rows expect a text."""

    def __init__(self, rows: list[Row]) -> None:
        self._ids: dict[str, list[str]] = defaultdict(list)
        for row in rows:
            for text in set(row["truth"] or ()):
                self._ids[text].append(row["id"])

    def only(self, text: str) -> str | None:
        """The id of the one row that expects the text; None where none or several do."""
        ids = self._ids.get(text, [])
        return ids[0] if len(ids) == 1 else None

    def unique(self, row: Row) -> bool:
        """Whether the row expects a text that no other does."""
        return any(self.only(text) for text in row["truth"] or ())

    def instead(self, row: Row, texts: tuple[str, ...]) -> str | None:
        """Whose answer the row was given, where it is another's: the one that alone expects it, or any that was asked
        for something else. A wrong answer of the right sort, as many expect it, may well be the model's mistake."""
        for text, truth in zip(texts, row["truth"], strict=False):
            if text != truth and self.only(text) not in (None, row["id"]):
                return f"{text!r} is what {self.only(text)} expects"
            if sort_of(text) not in (None, sort_of(truth)):
                return f"{text!r} is no {sort_of(truth)}, but another row's {sort_of(text)}"
        return None


def sort_of(text: str) -> str | None:
    """What the text answers: 'colour', 'number', …; None where it is no answer to any question."""
    return "caption" if text.endswith(" background") else SORTS.get(text)


def check(rows: list[Row], results: list[Row]) -> Check:
    """Holds the output's rows against the manifest's."""
    owners, found = Owners(rows), Check(sum(row["truth"] is not None for row in rows))
    seen = Counter(result["row"] for result in results)
    found.missing = [row["id"] for number, row in enumerate(rows) if not seen[number]]
    found.doubled = [f"row {number}: {times} times" for number, times in seen.items() if times > 1]
    found.doubled += [f"row {number}: is in no manifest" for number in seen if not 0 <= number < len(rows)]
    for result in {result["row"]: result for result in results if 0 <= result["row"] < len(rows)}.values():
        row, texts = rows[result["row"]], answers_of(result)
        found.answers[result["row"]] = texts
        if result["id"] != row["id"]:
            found.swapped.append(f"{row['id']}: its result has the id {result['id']}")
        if texts is None:
            found.failed[result["error"]["code"]] += 1
            if row["truth"] is not None or result["error"]["code"] != row["id"]:
                found.misfailed.append(f"{row['id']}: {result['error']['code']}: {result['error']['message']}")
        elif row["truth"] is None:
            found.misfailed.append(f"{row['id']}: should have failed, and answered {texts}")
        elif texts == tuple(row["truth"]):
            found.right += 1
            found.proven += owners.unique(row)
        else:
            wrong = [f"{b!r}, expected {a!r}" for a, b in zip_longest(row["truth"], texts) if a != b]
            found.wrong.append(f"{row['id']} ({', '.join(row['images'])}): {'; '.join(wrong)}")
            if other := owners.instead(row, texts):
                found.swapped.append(f"{row['id']}: {other}")
    return found


def answers_of(result: Row) -> tuple[str, ...] | None:
    """A text a turn; None where the row failed."""
    if result["status"] != "ok":
        return None
    return tuple(text.strip() for text in result["responses"] or [result["response"]])


def swaps_seen(rows: list[Row], rng: Random, tries: int = 1000) -> Counter[str]:
    """What the checks make of two rows' answers exchanged, over random pairs of rows of right answers: 'named' a swap,
    only 'wrong', or 'hidden', which is where both rows expect the same."""
    owners, good = Owners(rows), [row for row in rows if row["truth"] is not None]
    seen: Counter[str] = Counter()
    for first, second in (rng.sample(good, 2) for _ in range(tries)):
        if first["truth"] == second["truth"]:
            seen["hidden"] += 1
        elif any(owners.instead(a, tuple(b["truth"])) for a, b in ((first, second), (second, first))):
            seen["named"] += 1
        else:
            seen["wrong"] += 1
    return seen
