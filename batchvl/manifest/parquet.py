"""Parquet files: row groups are read one after the other in small batches, never as a whole."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Container, Iterator
from itertools import accumulate, repeat
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import types

from ..errors import InvalidRow, ManifestError
from .arrow import beyond_python, label_type, plain, uses
from .columns import Columns
from .files import Files
from .reader import CHUNK_BYTES, CHUNK_ROWS, Chunk
from .rows import IdType

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
            for name, use in uses(columns):
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

    def count(self, folder: Path | None, fingerprint: str) -> int:
        return self.total or 0

    def chunks(self, names: tuple[str, ...], rows: range, skip: Container[int]) -> Iterator[Chunk]:
        for at in range(max(0, bisect_right(self._starts, rows.start) - 1), len(self._names)):
            start = self._starts[at]
            if start >= rows.stop:
                return
            path = self._files.folder / self._names[at]
            with _open(path) as file:
                if file.metadata.num_rows != self._starts[at + 1] - start:
                    raise ManifestError(f"{path}: has changed while it was read")
                for group in range(file.num_row_groups):
                    stop = start + file.metadata.row_group(group).num_rows
                    wanted = range(max(start, rows.start), min(stop, rows.stop))
                    if wanted and not all(number in skip for number in wanted):
                        yield from _group(file, group, names, self._as_text, start, wanted, skip, str(path))
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


def _group(
    file: pq.ParquetFile,
    group: int,
    names: tuple[str, ...],
    as_text: Container[str],
    start: int,
    wanted: range,
    skip: Container[int],
    path: str,
) -> Iterator[Chunk]:
    """A row group's wanted rows. Where its data is corrupt the rest of its rows are errors; other groups go on."""
    number = start
    try:
        size = _batch_rows(file.metadata.row_group(group), names)
        for batch in file.iter_batches(size, row_groups=[group], columns=list(names), use_threads=False):
            here = range(number, number + batch.num_rows)
            number = here.stop
            if here.start >= wanted.stop:
                return
            if here.stop <= wanted.start or all(one in skip for one in here):
                continue
            # Cells stand as often as the rows do, even where no column is read.
            lists = [_values(batch.column(name), name in as_text, path, here.start) for name in names]
            chunk: Chunk = []
            for one, _, *cells in zip(here, repeat(None), *lists, strict=False):
                if one in wanted and one not in skip:
                    bad = next((cell for cell in cells if type(cell) is InvalidRow), None)
                    chunk.append((one, tuple(cells) if bad is None else bad))
            if chunk:
                yield chunk
    except (OSError, pa.ArrowException) as error:
        reason = f"{path}: row group {group} cannot be read: {error}"
        rest = [one for one in wanted if one >= number and one not in skip]
        for at in range(0, len(rest), CHUNK_ROWS):
            yield [(one, InvalidRow(reason)) for one in rest[at : at + CHUNK_ROWS]]


def _batch_rows(group: Any, names: tuple[str, ...]) -> int:
    """Rows of a batch that has about CHUNK_BYTES: 10,000 rows of pictures would be 10 GB."""
    read: int = 0
    for at in range(group.num_columns):
        column = group.column(at)
        if column.path_in_schema in names or column.path_in_schema.split(".")[0] in names:
            read += column.total_uncompressed_size
    fitting: int = CHUNK_BYTES * group.num_rows // max(1, read)
    return max(1, min(CHUNK_ROWS, fitting))


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
