"""Parquet files. Row groups are read one after the other in small batches, never as a whole."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Container, Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import types

from ...errors import InvalidRow, ManifestError
from ..arrow import column_specs, exceeds_python_precision, id_type, storage_type
from ..columns import Columns
from ..files import Files
from ..rows import IdType
from .base import CHUNK_BYTES, CHUNK_ROWS, Batch, Chunk, Reader, missing, nulls

_READ_AHEAD = 2**18


class ParquetReader(Reader):
    """Read rows of Parquet files. Their footers have counts and types.

    Raises:
        ManifestError: A file is not Parquet or is truncated, or all files are empty.
    """

    def __init__(self, files: Files) -> None:
        self._files = files
        self._names = list(files)
        self._schemas: list[pa.Schema] = []
        """The different schemas: thousands of files may have one between them."""
        self._schema_of: list[int] = []
        """The number of each file's schema."""
        rows: list[int] = []
        for name in self._names:
            with _open(files.directory / name) as file:
                schema = file.schema_arrow.remove_metadata()
                rows.append(file.metadata.num_rows)
            if schema not in self._schemas:
                self._schemas.append(schema)
            self._schema_of.append(self._schemas.index(schema))
        self._starts = list(accumulate(rows, initial=0))
        """The number of each file's first row, and the total."""
        self.total = self._starts[-1]
        self.available = tuple(dict.fromkeys(name for schema in self._schemas for name in schema.names))
        if not self.total:
            raise ManifestError(f"{self._where()}: has no rows; expected at least one")

    def bind(self, columns: Columns) -> None:
        id_types: set[IdType] = set()
        for path, schema in self._each_schema():
            self._check_columns(path, schema, columns)
            if columns.id and (kind := id_type(schema.field(columns.id).type)):
                id_types.add(kind)
        if len(id_types) > 1:
            raise ManifestError(
                f"{self._where()}: column {columns.id!r} has strings in some files and integers in others"
            )
        self.id_type = next(iter(id_types), None)
        self._as_text = frozenset(columns.template)
        kinds = ((name, storage_type(self._schemas[0].field(name).type)) for name in columns.keep)
        self.kept = pa.schema(
            [
                (name, pa.string() if exceeds_python_precision(kind) and name in self._as_text else kind)
                for name, kind in kinds
            ]
        )

    def chunks(self, names: tuple[str, ...], rows: range, skip: Container[int]) -> Iterator[Chunk]:
        for group in self._groups(rows, skip):
            yield from group.chunks(names, self._as_text, skip)

    def schema(self) -> pa.Schema:
        """Return every column with its type, without dictionary or extension. Files may lack columns of others.

        Raises:
            ManifestError: A column has two types, or two columns have the same name.
        """
        fields: dict[str, tuple[pa.Field, Path]] = {}
        for path, schema in self._each_schema():
            for name in schema.names:
                _check_once(path, schema, name)
                field = pa.field(name, storage_type(schema.field(name).type))
                known, where = fields.setdefault(name, (field, path))
                if types.is_null(known.type):
                    fields[name] = field, path
                elif known.type != field.type and not types.is_null(field.type):
                    raise ManifestError(
                        f"{path}: column {name!r} is {field.type}, but {known.type} in {where}: it cannot be joined"
                    )
        return pa.schema([field for field, _ in fields.values()])

    def batches(self, schema: pa.Schema, rows: range, skip: Container[int]) -> Iterator[Batch]:
        for group in self._groups(rows, skip):
            yield from group.batches(schema)

    def _each_schema(self) -> Iterator[tuple[Path, pa.Schema]]:
        """Yield the different schemas, each with the first file that has it."""
        for at, schema in enumerate(self._schemas):
            yield self._files.directory / self._names[self._schema_of.index(at)], schema

    def _check_columns(self, path: Path, schema: pa.Schema, columns: Columns) -> None:
        for name in columns.names:
            _check_once(path, schema, name)
        for name, spec in column_specs(columns):
            kind = schema.field(name).type
            if not types.is_null(kind) and not spec.fits(storage_type(kind)):
                raise ManifestError(f"{path}: column {name!r} is {kind}, expected {spec.wanted}; see {spec.flag}")
        for name in columns.keep:
            kind, first = schema.field(name).type, self._schemas[0].field(name).type
            if kind != first:
                raise ManifestError(f"{path}: column {name!r} of --keep is {kind}, but {first} in {self._names[0]}")

    def _groups(self, rows: range, skip: Container[int]) -> Iterator[_RowGroup]:
        """Yield the row groups that have some of the rows that are not in `skip`."""
        for at in range(max(0, bisect_right(self._starts, rows.start) - 1), len(self._names)):
            start = self._starts[at]
            if start >= rows.stop:
                return
            path = self._files.directory / self._names[at]
            with _open(path) as file:
                if file.metadata.num_rows != self._starts[at + 1] - start:
                    raise ManifestError(f"{path}: has changed while it was read")
                for number in range(file.num_row_groups):
                    stop = start + file.metadata.row_group(number).num_rows
                    wanted = range(max(start, rows.start), min(stop, rows.stop))
                    if next(missing(wanted, skip), None) is not None:
                        yield _RowGroup(path, file, number, start, wanted)
                    start = stop

    def _where(self) -> str:
        return str(self._files.directory / self._names[0] if len(self._names) == 1 else self._files.directory)


def _open(path: Path) -> pq.ParquetFile:
    try:
        # Without a buffer pyarrow reads all of a row group's column chunk.
        return pq.ParquetFile(path, pre_buffer=False, buffer_size=_READ_AHEAD)
    except (OSError, pa.ArrowException) as error:
        if path.is_file() and not path.stat().st_size:
            raise ManifestError(f"{path}: has 0 bytes; expected Parquet") from None
        raise ManifestError(f"{path}: not a complete Parquet file (truncated?): {str(error).rstrip('.')}") from None


def _check_once(path: Path, schema: pa.Schema, name: str) -> None:
    if len(indices := schema.get_all_field_indices(name)) != 1:
        fault = "appears twice" if indices else "is missing here, but other files have it"
        raise ManifestError(f"{path}: column {name!r} {fault}; the columns are {', '.join(schema.names)}")


class _RowGroup:
    """A row group of an open file, with the rows to read from it.

    If its data is corrupt, its remaining rows fail; those of other groups do not.

    Args:
        path: The file's path.
        file: The open file.
        group: The row group's number in the file.
        start: The number of the group's first row in the manifest.
        wanted: The rows to read, by their numbers in the manifest.
    """

    def __init__(self, path: Path, file: pq.ParquetFile, group: int, start: int, wanted: range) -> None:
        self._path, self._file, self._group, self._start, self._wanted = path, file, group, start, wanted

    def chunks(self, names: tuple[str, ...], as_text: Container[str], skip: Container[int]) -> Iterator[Chunk]:
        """Yield the rows that are not in `skip` as cells. as_text: columns whose values become strings."""
        for rows, batch in self._read(names):
            numbers = list(missing(rows, skip))
            if not numbers:
                continue
            if isinstance(batch, InvalidRow):
                yield [(number, batch) for number in numbers]
                continue
            first = numbers[0]
            batch = batch.slice(first - rows.start, numbers[-1] + 1 - first)
            columns = [_values(batch.column(name), name in as_text, str(self._path), first) for name in names]
            chunk: Chunk = []
            for number in numbers:
                cells = tuple([values[number - first] for values in columns])
                bad = next((cell for cell in cells if type(cell) is InvalidRow), None)
                chunk.append((number, cells if bad is None else bad))
            yield chunk

    def batches(self, schema: pa.Schema) -> Iterator[Batch]:
        """Yield the rows as Arrow columns. Columns that the file lacks are null."""
        available = [name for name in schema.names if name in self._file.schema_arrow.names]
        for rows, batch in self._read(tuple(available)):
            if isinstance(batch, InvalidRow):
                yield Batch(rows, nulls(schema, len(rows)), frozenset(rows))
                continue
            bad: set[int] = set()
            columns = [
                self._column(batch, field, bad) if field.name in available else pa.nulls(len(rows), field.type)
                for field in schema
            ]
            yield Batch(rows, pa.RecordBatch.from_arrays(columns, schema=schema), frozenset(rows[at] for at in bad))

    def _column(self, batch: pa.RecordBatch, field: pa.Field, bad: set[int]) -> pa.Array:
        """Return the values with the field's type. Invalid ones (strings not in UTF-8) are null, their index in bad."""
        column = _storage(batch.column(field.name))
        if isinstance(column, pa.DictionaryArray):
            column = column.dictionary_decode()
        try:
            column.validate(full=True)
        except pa.ArrowInvalid:
            values = _values(column, False, str(self._path), 0)
            bad |= {at for at, value in enumerate(values) if type(value) is InvalidRow}
            column = pa.array([None if type(value) is InvalidRow else value for value in values], column.type)
        return column if column.type == field.type else column.cast(field.type)

    def _read(self, names: tuple[str, ...]) -> Iterator[tuple[range, pa.RecordBatch | InvalidRow]]:
        """Yield the wanted rows in batches of about CHUNK_BYTES, or an error in place of those that are corrupt."""
        number = self._start
        wanted = self._wanted
        try:
            size = _batch_rows(self._file.metadata.row_group(self._group), names)
            batches = self._file.iter_batches(size, row_groups=[self._group], columns=list(names), use_threads=False)
            for batch in batches:
                rows = range(max(number, wanted.start), min(number + batch.num_rows, wanted.stop))
                if rows:
                    yield rows, batch.slice(rows.start - number, len(rows))
                number += batch.num_rows
                if number >= wanted.stop:
                    return
        except (OSError, pa.ArrowException) as error:
            reason = InvalidRow(f"{self._path}: row group {self._group} cannot be read: {error}")
            for start in range(max(number, wanted.start), wanted.stop, CHUNK_ROWS):
                yield range(start, min(start + CHUNK_ROWS, wanted.stop)), reason


def _batch_rows(group: Any, names: tuple[str, ...]) -> int:
    """Return the rows of a batch of about CHUNK_BYTES: a batch of 10,000 images would be 10 GB."""
    size: int = 0
    for at in range(group.num_columns):
        column = group.column(at)
        if column.path_in_schema in names or column.path_in_schema.split(".")[0] in names:
            size += column.total_uncompressed_size
    fitting: int = CHUNK_BYTES * group.num_rows // max(1, size)
    return max(1, min(CHUNK_ROWS, fitting))


def _storage(column: pa.Array) -> pa.Array:
    return column.storage if isinstance(column, pa.ExtensionArray) else column


def _values(column: pa.Array, as_text: bool, path: str, first: int) -> list[Any]:
    """Return a column as Python values. A value that cannot be converted becomes an InvalidRow."""
    column = _storage(column)
    kind = storage_type(column.type)
    if exceeds_python_precision(kind):
        # From an integer, Arrow restores the value without a loss.
        column = column.cast(kind).cast(pa.string() if as_text else pa.int64())
    try:
        values: list[Any] = column.to_pylist()
    except (ValueError, ArithmeticError):
        # One cell of the batch is at fault, such as a string that is not UTF-8: only its row must fail.
        values = []
        for at, cell in enumerate(column):
            try:
                values.append(cell.as_py())
            except (ValueError, ArithmeticError) as error:
                values.append(InvalidRow(f"{path} row {first + at}: {error}"))
    return values
