"""Check of a run's answers about images of shapes: right, wrong, missing, or those of another row."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, field
from itertools import zip_longest
from random import Random
from typing import Any

from batchvl.shapes.scenes import COLOURS, SHAPES

KINDS = {
    **dict.fromkeys("123", "number"),
    **dict.fromkeys(COLOURS, "colour"),
    **dict.fromkeys(SHAPES, "shape"),
    **dict.fromkeys(("yes", "no"), "yes or no"),
    **dict.fromkeys(("image 1", "image 2", "both", "neither"), "image"),
}
"""Short answers, and the kind of question that they answer."""
MIN_RIGHT = 0.995
"""Required share of right rows."""

Row = dict[str, Any]
"""A line of the manifest or a row of the output.

A line of the manifest has the expected texts, one per turn, as `truth`; None if the row must fail, with its id as the
error's code.
"""


@dataclass
class Check:
    """The findings about a run's results. Each line of a list names a row and its problem."""

    rows: int
    """Rows that can be answered."""
    right: int = 0
    proven: int = 0
    """Rows answered right with a text that no other row expects, so that the answer cannot be another row's."""
    wrong: list[str] = field(default_factory=list)
    swapped: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    doubled: list[str] = field(default_factory=list)
    misfailed: list[str] = field(default_factory=list)
    """Good rows that failed, and bad rows that did not or failed for another reason."""
    failed: Counter[str] = field(default_factory=Counter)
    """All failures, by code."""
    answers: dict[int, tuple[str, ...] | None] = field(default_factory=dict)
    """Texts by row number; None if the row failed."""

    def faults(self) -> list[str]:
        """Return the reasons why the results are not good enough; empty if they are."""
        faults = [f"only {self.right} of {self.rows} rows are right"] if self.right < MIN_RIGHT * self.rows else []
        for name in ("swapped", "missing", "doubled", "misfailed"):
            if lines := getattr(self, name):
                faults.append(f"{len(lines)} {name}")
        return faults


class Owners:
    """The rows that expect each text."""

    def __init__(self, rows: list[Row]) -> None:
        self._ids: dict[str, list[str]] = defaultdict(list)
        for row in rows:
            for text in set(row["truth"] or ()):
                self._ids[text].append(row["id"])

    def only_owner(self, text: str) -> str | None:
        """Return the id of the one row that expects the text; None if no row or several rows do."""
        ids = self._ids.get(text, [])
        return ids[0] if len(ids) == 1 else None

    def is_unique(self, row: Row) -> bool:
        """Return whether the row expects a text that no other row expects."""
        return any(self.only_owner(text) for text in row["truth"] or ())

    def find_swap(self, row: Row, texts: tuple[str, ...]) -> str | None:
        """Return a description of the row whose answer this row was given; None if it may be the model's mistake.

        An answer is another row's if that row alone expects it, or if it answers another kind of question. A wrong
        answer of the right kind that several rows expect may be the model's mistake.
        """
        for text, truth in zip(texts, row["truth"], strict=False):
            if text != truth and self.only_owner(text) not in (None, row["id"]):
                return f"{text!r} is what {self.only_owner(text)} expects"
            if kind_of(text) not in (None, kind_of(truth)):
                return f"{text!r} is not a {kind_of(truth)} but another row's {kind_of(text)}"
        return None


def kind_of(text: str) -> str | None:
    """Return the kind of question that the text answers, such as "colour"; None if it answers none."""
    return "caption" if text.endswith(" background") else KINDS.get(text)


def check(rows: list[Row], results: list[Row]) -> Check:
    """Compare the output's rows with the manifest's."""
    owners, findings = Owners(rows), Check(sum(row["truth"] is not None for row in rows))
    seen = Counter(result["row"] for result in results)
    findings.missing = [row["id"] for number, row in enumerate(rows) if not seen[number]]
    findings.doubled = [f"row {number}: {times} times" for number, times in seen.items() if times > 1]
    findings.doubled += [f"row {number}: is not in the manifest" for number in seen if not 0 <= number < len(rows)]
    for result in {result["row"]: result for result in results if 0 <= result["row"] < len(rows)}.values():
        row, texts = rows[result["row"]], answers_of(result)
        findings.answers[result["row"]] = texts
        if result["id"] != row["id"]:
            findings.swapped.append(f"{row['id']}: its result has the id {result['id']}")
        if texts is None:
            findings.failed[result["error"]["code"]] += 1
            if row["truth"] is not None or result["error"]["code"] != row["id"]:
                findings.misfailed.append(f"{row['id']}: {result['error']['code']}: {result['error']['message']}")
        elif row["truth"] is None:
            findings.misfailed.append(f"{row['id']}: should have failed but answered {texts}")
        elif texts == tuple(row["truth"]):
            findings.right += 1
            findings.proven += owners.is_unique(row)
        else:
            wrong = [f"{b!r}, expected {a!r}" for a, b in zip_longest(row["truth"], texts) if a != b]
            findings.wrong.append(f"{row['id']} ({', '.join(row['images'])}): {'; '.join(wrong)}")
            if other := owners.find_swap(row, texts):
                findings.swapped.append(f"{row['id']}: {other}")
    return findings


def answers_of(result: Row) -> tuple[str, ...] | None:
    """Return one text per turn; None if the row failed."""
    if result["status"] != "ok":
        return None
    return tuple(text.strip() for text in result["responses"] or [result["response"]])


def swaps_seen(rows: list[Row], rng: Random, tries: int = 1000) -> Counter[str]:
    """Swap the right answers of random pairs of rows and count how the check reports them.

    Returns:
        Numbers of pairs: "named" as a swap, reported only as "wrong", or "hidden" because both rows expect the same.
    """
    owners, good = Owners(rows), [row for row in rows if row["truth"] is not None]
    seen: Counter[str] = Counter()
    for first, second in (rng.sample(good, 2) for _ in range(tries)):
        if first["truth"] == second["truth"]:
            seen["hidden"] += 1
        elif any(owners.find_swap(a, tuple(b["truth"])) for a, b in ((first, second), (second, first))):
            seen["named"] += 1
        else:
            seen["wrong"] += 1
    return seen
