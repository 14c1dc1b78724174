"""The manifest's columns beside the output's, row by row: what `--with-manifest` adds to a merged file."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Container, Iterable, Iterator, Sequence
from pathlib import Path

import pyarrow as pa

from ...errors import ManifestError, ResumeError
from ...manifest.batches import Batches
from ...manifest.json_types import JSON
from ...manifest.readers.base import Batch
from ..run_file import RunFile
from .spill import row_numbers

PREFIX = "manifest_"
PIECE_BYTES = 8 * 2**20
"""Rows that leave together, about: pictures may be among their columns."""


class Join:
    """A run's manifest, to be joined with its rows.

    A column that the output has under the same name and with the same values (`id`, and those of `--keep`) is not
    repeated. Others whose name the output has (`images`) are named `manifest_…`.
    """

    def __init__(self, source: str | Path, guard: RunFile, out: object, id_columns: Container[str]) -> None:
        """id_columns: the columns that the run took its ids from.

        Raises ManifestError where the manifest cannot be read, and ResumeError where it is not the run's.
        """
        self._source = source
        self._manifest = Batches(source)
        if self._manifest.fingerprint != guard.fingerprint:
            raise ResumeError(
                f"{source}: is not the manifest of the run in {out}: its fingerprint is {self._manifest.fingerprint}, "
                f"that of the run's ({guard.manifest or 'unnamed'}) is {guard.fingerprint}. Contents and files' names, "
                f"below a folder their relative paths, must be the same"
            )
        same = {*guard.kept.names, *(["id"] if "id" in id_columns else [])}
        there = self._manifest.schema
        self._columns = [at for at, field in enumerate(there) if field.name not in same]
        names = {*guard.schema.names, *there.names}
        fields = []
        for field in map(there.field, self._columns):
            name = field.name
            if name in guard.schema.names:
                while name in names:
                    name = PREFIX + name
                names.add(name)
            fields.append(field.with_name(name))
        self.schema: pa.Schema = pa.schema([*guard.schema, *fields])
        """The output's columns, then the manifest's."""
        self.unreadable = 0
        """How many of the rows that were joined have nulls because the manifest's row could not be read."""

    @property
    def total(self) -> int | None:
        """The manifest's rows; None where they have not been counted."""
        return self._manifest.total

    @property
    def json_columns(self) -> list[str]:
        """The columns whose values have no type in common: they are JSON, in strings."""
        return [field.name for field in self.schema if field.metadata == JSON]

    def tables(self, tables: Iterable[pa.Table], rows: range, skip: Container[int]) -> Iterator[pa.Table]:
        """The tables' rows with the manifest's columns, in tables of about PIECE_BYTES at most.

        tables: rows of the output, ascending from one to the next; all of them are in `rows`, and none in `skip`.
        Raises ManifestError where the manifest can no longer be read.
        """
        batches = self._manifest.read(rows, skip)
        batch = Batch((), pa.RecordBatch.from_arrays([], []))
        for table in tables:
            numbers = row_numbers(table)
            pieces: list[pa.Table] = []
            at = size = 0
            while at < len(numbers):
                while not batch.rows or batch.rows[-1] < numbers[at]:
                    batch = self._next(batches, numbers[at])
                stop = bisect_left(numbers, batch.rows[-1] + 1, at)
                pieces.append(self._joined(table.slice(at, stop - at), batch, numbers[at:stop]))
                size += pieces[-1].nbytes
                at = stop
                if size >= PIECE_BYTES or at == len(numbers):
                    yield pa.concat_tables(pieces)
                    pieces, size = [], 0

    def _next(self, batches: Iterator[Batch], row: int) -> Batch:
        batch = next(batches, None)
        if batch is None:
            raise ManifestError(f"{self._source}: has changed: it ends before row {row}, which was answered")
        return batch

    def _joined(self, table: pa.Table, batch: Batch, numbers: Sequence[int]) -> pa.Table:
        """The table's rows, whose numbers these are, with their columns out of the batch."""
        first, count = bisect_left(batch.rows, numbers[0]), len(numbers)
        if numbers[-1] - numbers[0] == count - 1:
            taken = batch.columns.slice(first, count)
        else:
            taken = batch.columns.take(pa.array([bisect_left(batch.rows, row, first) for row in numbers]))
        if batch.bad:
            self.unreadable += len(batch.bad.intersection(numbers))
        columns = [taken.column(at) for at in self._columns]
        return pa.Table.from_arrays([*table.columns, *columns], schema=self.schema)
