"""The formats of a merged file: Parquet and JSON Lines, written table by table, whole or not at all."""

from __future__ import annotations

import gzip
import secrets
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq

from ..errors import OptionError
from .disk import Disk
from .parts import DICTIONARY
from .sink import Sink

GROUP_ROWS = 16_384
_SLICE = 1000


class TableFile:
    """A file that tables are appended to. It appears under its name at the end of the `with` block, or not at all."""

    def __init__(self, path: Path, schema: pa.Schema, metadata: Mapping[str, str], disk: Disk) -> None:
        self._path, self._schema, self._metadata, self._disk = path, schema, metadata, disk

    def __enter__(self) -> Self:
        self._temporary = self._path.with_name(f".{self._path.name}.{secrets.token_hex(4)}.tmp")
        self._sink = Sink(self._disk, self._temporary)
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
                self._sink.finish()
                self._disk.rename(self._temporary, self._path)
                self._disk.sync_folder(self._path.parent)
        finally:
            self._sink.abandon()
            self._disk.discard(self._temporary)

    def write(self, table: pa.Table) -> None:
        """Appends the table's rows. Raises OSError."""
        raise NotImplementedError

    def _open(self) -> None:
        raise NotImplementedError

    def _finish(self) -> None:
        raise NotImplementedError


class ParquetFile(TableFile):
    """Parquet, zstd, with the run's metadata in the footer."""

    def _open(self) -> None:
        self._writer = pq.ParquetWriter(
            self._sink, self._schema, compression="zstd", write_page_checksum=True, use_dictionary=DICTIONARY
        )

    def write(self, table: pa.Table) -> None:
        self._writer.write_table(table, row_group_size=GROUP_ROWS)

    def _finish(self) -> None:
        self._writer.add_key_value_metadata(dict(self._metadata))
        self._writer.close()


class JsonLinesFile(TableFile):
    """One JSON object a line, every column in it. Ids keep their type, bytes are base64, times are ISO 8601."""

    def _open(self) -> None:
        self._encode = msgspec.json.Encoder(enc_hook=str).encode

    def write(self, table: pa.Table) -> None:
        table = _without_nanoseconds(table)
        for start in range(0, len(table), _SLICE):
            lines: list[Any] = [self._encode(row) for row in table.slice(start, _SLICE).to_pylist()]
            self._put(b"\n".join([*lines, b""]))

    def _put(self, data: bytes) -> None:
        self._sink.write(data)

    def _finish(self) -> None:
        pass


class GzipLinesFile(JsonLinesFile):
    """The same, compressed."""

    def _open(self) -> None:
        super()._open()
        self._zip = gzip.GzipFile(filename="", mode="wb", compresslevel=6, fileobj=self._sink, mtime=0)

    def _put(self, data: bytes) -> None:
        self._zip.write(data)

    def _finish(self) -> None:
        self._zip.close()


_ENDINGS: dict[str, type[TableFile]] = {".parquet": ParquetFile, ".jsonl": JsonLinesFile, ".jsonl.gz": GzipLinesFile}


def writer_for(path: Path) -> type[TableFile]:
    """The format by the file's ending. Raises OptionError for an unknown one."""
    for ending, found in _ENDINGS.items():
        if path.name.lower().endswith(ending):
            return found
    raise OptionError(f"{path}: the file's ending tells its format, and must be one of {', '.join(_ENDINGS)}")


def _without_nanoseconds(table: pa.Table) -> pa.Table:
    # Python's own times have microseconds: Arrow would refuse to make some.
    for number, field in enumerate(table.schema):
        if getattr(field.type, "unit", "") == "ns":
            kind = pa.int64() if pa.types.is_duration(field.type) else pa.string()
            table = table.set_column(number, field.name, table[field.name].cast(kind))
    return table
