"""What a merge wrote, and what was not there to write: `MergeReport`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from ...config.units import pluralize
from ..record import Counts
from ..status import ranges


class Gap(NamedTuple):
    """A shard of which rows are missing."""

    shard: int
    """Its index, from 0."""
    begun: bool
    """Whether any attempt was made at it."""
    missing: int
    """How many rows."""


@dataclass(frozen=True)
class MergeReport:
    """What a merge wrote, and what was not there to write."""

    out: str
    target: Path | str
    """Where the rows go."""
    written: bool
    """Whether they did: not where rows are missing, unless `partial` asked for what there is."""
    counts: Counts
    """What was written."""
    total: int | None
    """The manifest's rows; None where no attempt has got to know them."""
    missing: int
    """Rows below `total` that are not done; 0 where it is not known."""
    first_missing: tuple[int, ...]
    """The first ten of them."""
    shards: int
    """How many the run has."""
    gaps: tuple[Gap, ...]
    """Those of them of which rows are missing."""
    json_columns: tuple[str, ...] = ()
    """In a Parquet file, the manifest's columns whose values have no type in common: they are JSON, in strings."""
    unreadable: int = 0
    """Rows of the manifest that cannot be read: its columns are null there."""

    @property
    def file(self) -> Path | str | None:
        """The file; None where it was not written. An older one stays as it was then."""
        return self.target if self.written else None

    @property
    def rows(self) -> int:
        """How many rows were written."""
        return self.counts.rows

    @property
    def complete(self) -> bool:
        """Whether all of the manifest's rows are there, so far as these are known."""
        return self.total is not None and not self.missing

    def as_json(self) -> str:
        """The same as a JSON object."""
        whole: dict[str, Any] = {
            "output": self.out, "file": str(self.target) if self.written else None, "complete": self.complete,
            "rows": self.rows, "ok": self.counts.ok, "failed": self.counts.failures, "failures": self.counts.failed,
            "total": self.total, "missing": self.missing, "first_missing": list(self.first_missing),
            "shards": self.shards, "gaps": [gap._asdict() for gap in self.gaps],
            "json_columns": list(self.json_columns), "unreadable": self.unreadable,
        }  # fmt: skip
        return msgspec.json.format(msgspec.json.encode(whole), indent=2).decode()

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        if self.written:
            yield f"{self.target}: {self.rows:,} rows, {self.counts.ok:,} ok, {self.counts.failures:,} failed"
        if self.json_columns:
            yield f"objects and values of several types in the manifest, here JSON: {', '.join(self.json_columns)}"
        if self.unreadable:
            yield f"{pluralize(self.unreadable)} of the manifest cannot be read: its columns are null there"
        if self.complete:
            return
        if self.total is None:
            yield f"{self.out}: how many rows the manifest has is not known: no attempt has read it to its end"
        else:
            more = ", …" if self.missing > len(self.first_missing) else ""
            first = ", ".join(map(str, self.first_missing)) + more
            are = "is" if self.missing == 1 else "are"
            yield f"{self.out}: {self.missing:,} of {pluralize(self.total)} {are} missing: {first}"
        if self.shards > 1:
            for what, begun in (("not begun", False), ("begun and not finished", True)):
                if found := [gap for gap in self.gaps if gap.begun is begun]:
                    missing = pluralize(sum(gap.missing for gap in found))
                    some = f"shards {ranges(gap.shard for gap in found)} of {self.shards}"
                    one = f"shard {found[0].shard}/{self.shards}"
                    yield f"  {one if len(found) == 1 else some} {what}: {missing}"
        if not self.written:
            again = "run the same command again" if self.shards == 1 else "run these shards to their end"
            yield f"{self.target} was not written: {again}, or write what there is by --partial"
