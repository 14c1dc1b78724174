"""The report of a merge: what it wrote, and which rows are missing."""

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
    """A shard with missing rows."""

    shard: int
    """Its index, from 0."""
    begun: bool
    """Whether any attempt was made at it."""
    missing: int
    """Number of missing rows."""


@dataclass(frozen=True)
class MergeReport:
    """What a merge wrote, and which rows are missing."""

    out: str
    target: Path | str
    """The path or URI of the merged file."""
    written: bool
    """Whether the file was written. If rows are missing, it is only with `partial`."""
    counts: Counts
    """The rows that were written."""
    total: int | None
    """Number of rows in the manifest; None if no attempt knew it."""
    missing: int
    """Number of rows below `total` that are not done; 0 if `total` is None."""
    first_missing: tuple[int, ...]
    """The first ten missing rows."""
    shards: int
    """Number of shards of the run."""
    gaps: tuple[Gap, ...]
    """The shards with missing rows."""
    json_columns: tuple[str, ...] = ()
    """In a Parquet file, the manifest's columns whose values have no common type: JSON in strings."""
    unreadable: int = 0
    """Number of manifest rows that cannot be read; their columns are null."""

    @property
    def file(self) -> Path | str | None:
        """The merged file; None if it was not written. An older file is kept then."""
        return self.target if self.written else None

    @property
    def rows(self) -> int:
        """Number of rows that were written."""
        return self.counts.rows

    @property
    def complete(self) -> bool:
        """Whether the output is known to have all rows of the manifest."""
        return self.total is not None and not self.missing

    def as_json(self) -> str:
        """Return the report as a JSON object."""
        report: dict[str, Any] = {
            "output": self.out,
            "file": str(self.target) if self.written else None,
            "complete": self.complete,
            "rows": self.rows,
            "ok": self.counts.ok,
            "failed": self.counts.failures,
            "failures": self.counts.failed,
            "total": self.total,
            "missing": self.missing,
            "first_missing": list(self.first_missing),
            "shards": self.shards,
            "gaps": [gap._asdict() for gap in self.gaps],
            "json_columns": list(self.json_columns),
            "unreadable": self.unreadable,
        }
        return msgspec.json.format(msgspec.json.encode(report), indent=2).decode()

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        if self.written:
            yield f"{self.target}: {self.rows:,} rows, {self.counts.ok:,} ok, {self.counts.failures:,} failed"
        if self.json_columns:
            yield f"manifest columns with objects or mixed types, written as JSON: {', '.join(self.json_columns)}"
        if self.unreadable:
            yield f"{pluralize(self.unreadable)} of the manifest cannot be read: the manifest's columns are null there"
        if self.complete:
            return
        if self.total is None:
            yield f"{self.out}: number of rows in the manifest unknown: no attempt has read it to the end"
        else:
            more = ", …" if self.missing > len(self.first_missing) else ""
            first = ", ".join(map(str, self.first_missing)) + more
            verb = "is" if self.missing == 1 else "are"
            yield f"{self.out}: {self.missing:,} of {pluralize(self.total)} {verb} missing: {first}"
        if self.shards > 1:
            yield from self._shard_lines()
        if not self.written:
            advice = "run the same command again" if self.shards == 1 else "complete these shards"
            yield f"{self.target} was not written: {advice}, or write the available rows with --partial"

    def _shard_lines(self) -> Iterator[str]:
        for state, begun in (("not started", False), ("not complete", True)):
            if gaps := [gap for gap in self.gaps if gap.begun is begun]:
                missing = pluralize(sum(gap.missing for gap in gaps))
                several = f"shards {ranges(gap.shard for gap in gaps)} of {self.shards}"
                one = f"shard {gaps[0].shard}/{self.shards}"
                yield f"  {one if len(gaps) == 1 else several} {state}: {missing}"
