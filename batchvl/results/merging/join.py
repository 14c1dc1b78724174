"""The join of a manifest's columns with an output's rows: what `--with-manifest` adds to a merged file."""

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
TABLE_BYTES = 8 * 2**20
"""Approximate size of a joined table: the manifest's columns may hold images."""


class Join:
    """A run's manifest, to be joined with its rows.

    A column that the output has under the same name and with the same values (`id`, and those of `--keep`) is not
    repeated. Any other column whose name is taken in the output (`images`) is named `manifest_…`.
    """

    def __init__(self, source: str | Path, run_file: RunFile, output: object, id_columns: Container[str]) -> None:
        """Open the manifest.

        Args:
            source: The manifest.
            run_file: The run's identity.
            output: The output, for error messages.
            id_columns: The columns that the run took its ids from.

        Raises:
            ManifestError: the manifest cannot be read.
            ResumeError: it is not the run's manifest.
        """
        self._source = source
        self._manifest = Batches(source)
        if self._manifest.fingerprint != run_file.fingerprint:
            raise ResumeError(
                f"{source}: not the manifest of the run in {output}: its fingerprint is {self._manifest.fingerprint}, "
                f"but the run's manifest ({run_file.manifest or 'unnamed'}) has {run_file.fingerprint}. Contents and "
                f"file names (relative paths below a directory) must be the same"
            )
        same = {*run_file.kept.names, *(["id"] if "id" in id_columns else [])}
        manifest_schema = self._manifest.schema
        self._columns = [at for at, field in enumerate(manifest_schema) if field.name not in same]
        names = {*run_file.schema.names, *manifest_schema.names}
        fields = []
        for field in map(manifest_schema.field, self._columns):
            name = field.name
            if name in run_file.schema.names:
                while name in names:
                    name = PREFIX + name
                names.add(name)
            fields.append(field.with_name(name))
        self.schema: pa.Schema = pa.schema([*run_file.schema, *fields])
        """The output's columns, then the manifest's."""
        self.unreadable = 0
        """Number of joined rows that have nulls because the manifest's row could not be read."""

    @property
    def total(self) -> int | None:
        """Number of rows in the manifest; None if they have not been counted."""
        return self._manifest.total

    @property
    def json_columns(self) -> list[str]:
        """The columns whose values have no common type: JSON in strings."""
        return [field.name for field in self.schema if field.metadata == JSON]

    def tables(self, tables: Iterable[pa.Table], rows: range, skip: Container[int]) -> Iterator[pa.Table]:
        """Yield the tables' rows with the manifest's columns, in tables of about TABLE_BYTES at most.

        Args:
            tables: Rows of the output, ascending within and across tables.
            rows: A range that includes all these rows.
            skip: Rows in `rows` that are in none of the tables.

        Raises:
            ManifestError: the manifest cannot be read any more.
        """
        batches = self._manifest.read(rows, skip)
        batch = Batch((), pa.RecordBatch.from_arrays([], []))
        for table in tables:
            numbers = row_numbers(table)
            joined: list[pa.Table] = []
            at = size = 0
            while at < len(numbers):
                while not batch.rows or batch.rows[-1] < numbers[at]:
                    batch = self._next(batches, numbers[at])
                stop = bisect_left(numbers, batch.rows[-1] + 1, at)
                joined.append(self._join(table.slice(at, stop - at), batch, numbers[at:stop]))
                size += joined[-1].nbytes
                at = stop
                if size >= TABLE_BYTES or at == len(numbers):
                    yield pa.concat_tables(joined)
                    joined, size = [], 0

    def _next(self, batches: Iterator[Batch], row: int) -> Batch:
        batch = next(batches, None)
        if batch is None:
            raise ManifestError(f"{self._source}: has changed: it ends before row {row}, which the output contains")
        return batch

    def _join(self, table: pa.Table, batch: Batch, numbers: Sequence[int]) -> pa.Table:
        """Return the table's rows, whose numbers are given, with their columns from the batch."""
        first, count = bisect_left(batch.rows, numbers[0]), len(numbers)
        if numbers[-1] - numbers[0] == count - 1:
            manifest_rows = batch.columns.slice(first, count)
        else:
            manifest_rows = batch.columns.take(pa.array([bisect_left(batch.rows, row, first) for row in numbers]))
        if batch.unreadable:
            self.unreadable += len(batch.unreadable.intersection(numbers))
        columns = [manifest_rows.column(at) for at in self._columns]
        return pa.Table.from_arrays([*table.columns, *columns], schema=self.schema)
