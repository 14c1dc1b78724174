"""Parquet files: row groups are read one after the other in small batches, never as a whole."""

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
from ..arrow import beyond_python, column_specs, label_type, plain
from ..columns import Columns
from ..files import Files
from ..rows import IdType
from .base import CHUNK_BYTES, CHUNK_ROWS, Batch, Chunk, missing, nulls

_READ_AHEAD = 2**18


class ParquetReader:
    """Rows of Parquet files; their footers tell counts and types.

    Raises ManifestError where a file is no Parquet, is truncated, or all are empty.
    """

    is_text = False
    row_bytes = 8

    def __init__(self, files: Files) -> None:
        self._files = files
        self._names = list(files)
        schemas: list[pa.Schema] = []
        self._schema_of: list[int] = []
        rows: list[int] = []
        for name in self._names:
            with _open(files.folder / name) as file:
                schema = file.schema_arrow.remove_metadata()
                rows.append(file.metadata.num_rows)
            # Thousands of files have one schema between them.
            if schema not in schemas:
                schemas.append(schema)
            self._schema_of.append(schemas.index(schema))
        self._schemas = schemas
        self._starts = list(accumulate(rows, initial=0))
        self.total: int | None = self._starts[-1]
        self.available: tuple[str, ...] = tuple(dict.fromkeys(name for schema in schemas for name in schema.names))
        if not self.total:
            raise ManifestError(f"{self._where()}: has no rows; want at least one")

    def use(self, columns: Columns) -> None:
        labels: set[IdType] = set()
        for at, schema in enumerate(self._schemas):
            path = self._files.folder / self._names[self._schema_of.index(at)]
            for name in columns.read:
                self._check_once(path, schema, name)
            for name, use in column_specs(columns):
                kind = schema.field(name).type
                if not types.is_null(kind) and not use.fits(plain(kind)):
                    raise ManifestError(f"{path}: column {name!r} is {kind}, want {use.wanted}; see {use.flag}")
            for name in columns.keep:
                kind, first = schema.field(name).type, self._schemas[0].field(name).type
                if kind != first:
                    raise ManifestError(f"{path}: column {name!r} of --keep is {kind}, but {first} in {self._names[0]}")
            if columns.id and (label := label_type(schema.field(columns.id).type)):
                labels.add(label)
        if len(labels) > 1:
            raise ManifestError(f"{self._where()}: column {columns.id!r} is string in some files, integer in others")
        self.id_type: IdType | None = next(iter(labels), None)
        self._as_text = frozenset(columns.template)
        kinds = ((name, plain(self._schemas[0].field(name).type)) for name in columns.keep)
        self.kept = pa.schema(
            [(name, pa.string() if beyond_python(kind) and name in self._as_text else kind) for name, kind in kinds]
        )

    @staticmethod
    def _check_once(path: Path, schema: pa.Schema, name: str) -> None:
        if len(found := schema.get_all_field_indices(name)) != 1:
            there = "is there twice" if found else "is missing here, but other files have it"
            raise ManifestError(f"{path}: column {name!r} {there}; the columns are {', '.join(schema.names)}")

    def estimate(self) -> int | None:
        return self.total

    def chunks(self, names: tuple[str, ...], rows: range, skip: Container[int]) -> Iterator[Chunk]:
        for group in self._groups(rows, skip):
            yield from group.chunks(names, self._as_text, skip)

    def types(self) -> pa.Schema:
        """Every column with its type, without dictionary or extension. Files may lack columns that others have.

        Raises ManifestError where a column is of two types, or two columns have one name.
        """
        fields: dict[str, tuple[pa.Field, Path]] = {}
        for at, schema in enumerate(self._schemas):
            path = self._files.folder / self._names[self._schema_of.index(at)]
            for name in schema.names:
                self._check_once(path, schema, name)
                field = pa.field(name, plain(schema.field(name).type))
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

    def _groups(self, rows: range, skip: Container[int]) -> Iterator[_Group]:
        """The row groups that have some of the rows that are not in `skip`."""
        for at in range(max(0, bisect_right(self._starts, rows.start) - 1), len(self._names)):
            start = self._starts[at]
            if start >= rows.stop:
                return
            path = self._files.folder / self._names[at]
            with _open(path) as file:
                if file.metadata.num_rows != self._starts[at + 1] - start:
                    raise ManifestError(f"{path}: has changed while it was read")
                for number in range(file.num_row_groups):
                    stop = start + file.metadata.row_group(number).num_rows
                    here = range(max(start, rows.start), min(stop, rows.stop))
                    if next(missing(here, skip), None) is not None:
                        yield _Group(path, file, number, start, here)
                    start = stop

    def _where(self) -> str:
        return str(self._files.folder / self._names[0] if len(self._names) == 1 else self._files.folder)


def _open(path: Path) -> pq.ParquetFile:
    try:
        # Without a buffer pyarrow reads a row group's whole column at once.
        return pq.ParquetFile(path, pre_buffer=False, buffer_size=_READ_AHEAD)
    except (OSError, pa.ArrowException) as error:
        if path.is_file() and not path.stat().st_size:
            raise ManifestError(f"{path}: has 0 bytes; want Parquet") from None
        raise ManifestError(f"{path}: is no whole Parquet file (truncated?): {str(error).rstrip('.')}") from None


class _Group:
    """A row group of an open file, and which of the manifest's rows are wanted of it.

    Where its data is corrupt the rest of its rows cannot be read; other groups go on.
    """

    def __init__(self, path: Path, file: pq.ParquetFile, number: int, start: int, wanted: range) -> None:
        self._path, self._file, self._number, self._start, self._wanted = path, file, number, start, wanted

    def chunks(self, names: tuple[str, ...], as_text: Container[str], skip: Container[int]) -> Iterator[Chunk]:
        for here, batch in self._read(names):
            numbers = list(missing(here, skip))
            if not numbers:
                continue
            if isinstance(batch, InvalidRow):
                yield [(one, batch) for one in numbers]
                continue
            first = numbers[0]
            batch = batch.slice(first - here.start, numbers[-1] + 1 - first)
            lists = [_values(batch.column(name), name in as_text, str(self._path), first) for name in names]
            chunk: Chunk = []
            for one in numbers:
                cells = tuple([values[one - first] for values in lists])
                bad = next((cell for cell in cells if type(cell) is InvalidRow), None)
                chunk.append((one, cells if bad is None else bad))
            yield chunk

    def batches(self, schema: pa.Schema) -> Iterator[Batch]:
        there = [name for name in schema.names if name in self._file.schema_arrow.names]
        for here, batch in self._read(tuple(there)):
            if isinstance(batch, InvalidRow):
                yield Batch(here, nulls(schema, len(here)), frozenset(here))
                continue
            bad: set[int] = set()
            columns = [
                self._column(batch, field, bad) if field.name in there else pa.nulls(len(here), field.type)
                for field in schema
            ]
            yield Batch(here, pa.RecordBatch.from_arrays(columns, schema=schema), frozenset(here[at] for at in bad))

    def _column(self, batch: pa.RecordBatch, field: pa.Field, bad: set[int]) -> pa.Array:
        """The values with the field's type; those that are none (strings not in UTF-8) are null, their places bad."""
        column = _stored(batch.column(field.name))
        try:
            column.validate(full=True)
        except pa.ArrowInvalid:
            values = _values(column, False, str(self._path), 0)
            bad |= {at for at, value in enumerate(values) if type(value) is InvalidRow}
            column = pa.array([None if type(value) is InvalidRow else value for value in values], column.type)
        return column if column.type == field.type else column.cast(field.type)

    def _read(self, names: tuple[str, ...]) -> Iterator[tuple[range, pa.RecordBatch | InvalidRow]]:
        """The wanted rows, in batches of about CHUNK_BYTES."""
        number = self._start
        wanted = self._wanted
        try:
            size = _batch_rows(self._file.metadata.row_group(self._number), names)
            for batch in self._file.iter_batches(
                size, row_groups=[self._number], columns=list(names), use_threads=False
            ):  # fmt: skip
                here = range(max(number, wanted.start), min(number + batch.num_rows, wanted.stop))
                if here:
                    yield here, batch.slice(here.start - number, len(here))
                number += batch.num_rows
                if number >= wanted.stop:
                    return
        except (OSError, pa.ArrowException) as error:
            reason = InvalidRow(f"{self._path}: row group {self._number} cannot be read: {error}")
            for start in range(max(number, wanted.start), wanted.stop, CHUNK_ROWS):
                yield range(start, min(start + CHUNK_ROWS, wanted.stop)), reason


def _batch_rows(group: Any, names: tuple[str, ...]) -> int:
    """Rows of a batch that has about CHUNK_BYTES: 10,000 rows of pictures would be 10 GB."""
    read: int = 0
    for at in range(group.num_columns):
        column = group.column(at)
        if column.path_in_schema in names or column.path_in_schema.split(".")[0] in names:
            read += column.total_uncompressed_size
    fitting: int = CHUNK_BYTES * group.num_rows // max(1, read)
    return max(1, min(CHUNK_ROWS, fitting))


def _stored(column: pa.Array) -> pa.Array:
    """The column without dictionary or extension."""
    if isinstance(column, pa.ExtensionArray):
        column = column.storage
    return column.dictionary_decode() if isinstance(column, pa.DictionaryArray) else column


def _values(column: pa.Array, as_text: bool, path: str, first: int) -> list[Any]:
    if isinstance(column, pa.ExtensionArray):
        column = column.storage
    if beyond_python(plain(column.type)):
        # As an integer Arrow takes the value back without a loss.
        column = column.cast(plain(column.type)).cast(pa.string() if as_text else pa.int64())
    try:
        values: list[Any] = column.to_pylist()
    except (ValueError, ArithmeticError):
        # One cell of the batch is at fault, such as a string that is not UTF-8: it alone must fail.
        values = []
        for at, cell in enumerate(column):
            try:
                values.append(cell.as_py())
            except (ValueError, ArithmeticError) as error:
                values.append(InvalidRow(f"{path} row {first + at}: {error}"))
    return values
