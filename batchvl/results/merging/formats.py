"""Writers of merged files: Parquet and JSON Lines, written table by table, whole or not at all."""

from __future__ import annotations

import gzip
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq

from ...errors import OptionError
from ...manifest.json_types import JSON
from ...storage.buffered_file import BufferedFile
from ...storage.disk import Disk
from ..parts import DICTIONARY

GROUP_ROWS, GROUP_BYTES = 16_384, 8 * 2**20
"""Approximate rows, or bytes in memory, of a row group in a merged file: readers load one at a time, and each costs
some kilobytes of footer."""
_SLICE_ROWS, _SLICE_BYTES = 1000, 2**20


class TableFile:
    """A file that tables are appended to. It appears under its name at the end of the `with` block, or not at all."""

    def __init__(self, path: Path, temporary: Path, schema: pa.Schema, metadata: Mapping[str, str], disk: Disk) -> None:
        """Create no file yet.

        Args:
            path: The finished file.
            temporary: Where it is written, on the same file system.
            schema: The tables' schema.
            metadata: For the footer of a Parquet file.
            disk: Writes the file.
        """
        self._path, self._temporary, self._schema, self._metadata, self._disk = path, temporary, schema, metadata, disk

    def __enter__(self) -> Self:
        self._file = BufferedFile(self._disk, self._temporary)
        try:
            self._open()
        except BaseException as error:
            self.__exit__(type(error), error, error.__traceback__)
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        try:
            if error is None:
                self._finish()
                self._file.publish(self._path)
        finally:
            self._file.abandon()

    def write(self, table: pa.Table) -> None:
        """Append the table's rows. Raises OSError."""
        raise NotImplementedError

    def _open(self) -> None:
        raise NotImplementedError

    def _finish(self) -> None:
        raise NotImplementedError


class ParquetFile(TableFile):
    """A Parquet file, compressed by zstd, with the run's metadata in the footer."""

    def _open(self) -> None:
        # The footer stays in memory until the end. Statistics of responses are useless and would take most of it.
        columns = [field.name for field in self._schema if field.name == "id" or pa.types.is_primitive(field.type)]
        self._writer = pq.ParquetWriter(
            self._file,
            self._schema,
            compression="zstd",
            write_page_checksum=True,
            use_dictionary=DICTIONARY,
            write_statistics=columns,
        )
        self._pending: list[pa.Table] = []
        self._rows = self._bytes = 0

    def write(self, table: pa.Table) -> None:
        self._pending.append(table)
        self._rows += len(table)
        self._bytes += table.nbytes
        if self._rows >= GROUP_ROWS or self._bytes >= GROUP_BYTES:
            self._write_group()

    def _write_group(self) -> None:
        if self._rows:
            self._writer.write_table(pa.concat_tables(self._pending), row_group_size=self._rows)
        self._pending.clear()
        self._rows = self._bytes = 0

    def _finish(self) -> None:
        self._write_group()
        self._writer.add_key_value_metadata(dict(self._metadata))
        self._writer.close()


class JsonLinesFile(TableFile):
    """A file with one JSON object per line. Ids keep their type, bytes are base64, times are ISO 8601."""

    def _open(self) -> None:
        self._encode = msgspec.json.Encoder(enc_hook=str).encode
        self._json_columns = [field.name for field in self._schema if field.metadata == JSON]

    def write(self, table: pa.Table) -> None:
        table = _without_nanoseconds(table)
        rows = max(1, min(_SLICE_ROWS, _SLICE_BYTES * len(table) // max(1, table.nbytes)))
        for start in range(0, len(table), rows):
            lines: list[Any] = [self._encode(self._embed_json(row)) for row in table.slice(start, rows).to_pylist()]
            self._write_bytes(b"\n".join([*lines, b""]))

    def _embed_json(self, row: dict[str, Any]) -> dict[str, Any]:
        for name in self._json_columns:
            if (text := row[name]) is not None:
                row[name] = msgspec.Raw(text.encode())
        return row

    def _write_bytes(self, data: bytes) -> None:
        self._file.write(data)

    def _finish(self) -> None:
        pass


class GzipLinesFile(JsonLinesFile):
    """A JSON Lines file compressed by gzip."""

    def _open(self) -> None:
        super()._open()
        self._zip = gzip.GzipFile(filename="", mode="wb", compresslevel=6, fileobj=self._file, mtime=0)

    def _write_bytes(self, data: bytes) -> None:
        self._zip.write(data)

    def _finish(self) -> None:
        self._zip.close()


class ZstdLinesFile(JsonLinesFile):
    """A JSON Lines file compressed by zstd."""

    def _open(self) -> None:
        super()._open()
        self._zip = pa.CompressedOutputStream(pa.PythonFile(self._file, "w"), "zstd")

    def _write_bytes(self, data: bytes) -> None:
        self._zip.write(data)

    def _finish(self) -> None:
        self._zip.close()


_EXTENSIONS: dict[str, type[TableFile]] = {
    ".parquet": ParquetFile,
    ".jsonl": JsonLinesFile,
    ".jsonl.gz": GzipLinesFile,
    ".jsonl.zst": ZstdLinesFile,
}


def writer_for(path: Path) -> type[TableFile]:
    """Return the writer for a file's extension. Raises OptionError for an unknown one."""
    for extension, writer in _EXTENSIONS.items():
        if path.name.lower().endswith(extension):
            return writer
    raise OptionError(f"{path}: unknown file extension; expected one of {', '.join(_EXTENSIONS)}")


def _without_nanoseconds(table: pa.Table) -> pa.Table:
    # Python's times have microseconds: Arrow refuses to convert finer ones.
    for number, field in enumerate(table.schema):
        if (kind := _coarse(field.type)) != field.type:
            table = table.set_column(number, field.with_type(kind), table[field.name].cast(kind))
    return table


def _coarse(kind: pa.DataType) -> pa.DataType:
    """Return the type with nanosecond times replaced by strings, and nanosecond durations by integers."""
    if getattr(kind, "unit", "") == "ns":
        return pa.int64() if pa.types.is_duration(kind) else pa.string()
    if pa.types.is_struct(kind):
        return pa.struct([field.with_type(_coarse(field.type)) for field in kind])
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        make = pa.list_ if pa.types.is_list(kind) else pa.large_list
        return make(kind.value_field.with_type(_coarse(kind.value_type)))
    return kind
