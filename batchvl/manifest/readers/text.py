"""Base of text formats and tars. Only reading finds where rows begin, so an index keeps offsets and counts."""

from __future__ import annotations

import sys
from abc import abstractmethod
from collections.abc import Callable, Container, Iterator
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import ClassVar, Generic, Protocol, Self, TypeVar

import pyarrow as pa

from ...errors import ManifestError, RowError
from .. import index
from ..columns import Columns
from ..files import Files
from ..index import STEP, FileIndex, Index, RowOffset
from .base import CHUNK_BYTES, CHUNK_ROWS, Cells, Chunk, Reader, missing

SAMPLE_ROWS = 1000
SAMPLE_BYTES = 4 * 2**20
"""Columns and types are inferred from the first rows, up to this many rows or bytes."""
WRITE_INDEX_ROWS = 100_000
"""The index is written when it has grown by this many rows, and by a twentieth. Fewer rows are quickly read again."""
EVERY_ROW = range(sys.maxsize)

_NO_ROW = sys.maxsize

Raw = TypeVar("Raw")


class Source(Protocol):
    """A file that is read from an offset on. A context manager."""

    compressed: bool
    """Whether it can only be read from its start on."""

    def position(self) -> int:
        """Return the number of bytes read from disk so far, before decompression."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


File = TypeVar("File", bound=Source)


class TextReader(Reader, Generic[Raw, File]):
    """Read rows of text files, or of others in which rows are found only by reading.

    A format implements how a file is opened (`open`), split into records (`records`) and decoded (`decoder`).
    """

    is_text = True
    sample_bytes: ClassVar[int] = SAMPLE_BYTES

    def __init__(self, files: Files) -> None:
        self.files = [files.directory / name for name in files]
        self.where = str(self.files[0] if len(self.files) == 1 else files.directory)
        self._sizes = [path.stat().st_size for path in self.files]
        self._index = Index()
        self._index_directory: Path | None = None
        self._written_rows = 0  # rows in the index on disk
        self._progress = (0, 0)  # rows read, and their bytes on disk, for the estimate

    @abstractmethod
    def open(self, path: Path) -> File:
        """Open a file. Raises ManifestError if it cannot be read."""

    def place(self, path: Path, after: RowOffset) -> str:
        """Return where a record ends, for error messages."""
        return f"{path} line {after.line}"

    @abstractmethod
    def records(self, file: File, start: RowOffset) -> Iterator[tuple[Raw, RowOffset]]:
        """Yield the records from an offset on, each with the offset of the next one. Blank lines are skipped."""

    @abstractmethod
    def decoder(self, path: Path, names: tuple[str, ...]) -> Callable[[Raw], Cells]:
        """Return a function that makes cells of a record, or raises a RowError if the record is bad."""

    def bind(self, columns: Columns) -> None:
        self.kept = pa.schema([(name, pa.string()) for name in columns.keep])

    def schema(self) -> pa.Schema:
        self.bind(Columns(keep=self.available))
        return self.kept

    def estimate(self) -> int | None:
        rows, size = self._progress
        if self.total is not None:
            return self.total
        return max(rows, rows * sum(self._sizes) // size) if size else None

    def sample(self) -> Iterator[tuple[Path, int, Raw]]:
        """Yield the first records, each with its file and the number of the line where it ends.

        Raises:
            ManifestError: There are no records.
        """
        rows = size = 0
        for path in self.files:
            with self.open(path) as file:
                begin = 0
                for record, after in self.records(file, RowOffset()):
                    yield path, after.line, record
                    rows, size, begin = rows + 1, size + after.offset - begin, after.offset
                    if rows == SAMPLE_ROWS or size >= self.sample_bytes:
                        break
                self._progress = rows, self._progress[1] + (file.position() if file.compressed else begin)
            self.id_row_bytes = size // max(1, rows)
            if rows >= SAMPLE_ROWS or size >= self.sample_bytes:
                return
        if not rows:
            raise ManifestError(f"{self.where}: has no rows ({sum(self._sizes)} bytes); expected at least one")

    def every_record(self) -> Iterator[Raw]:
        """Yield all records. `total` is known after the last."""
        rows = 0
        for path in self.files:
            with self.open(path) as file:
                for record, _ in self.records(file, RowOffset()):
                    rows += 1
                    yield record
        self.total = rows

    def use_index(self, directory: Path | None, fingerprint: str) -> None:
        written = index.read(directory, fingerprint) if directory is not None else None
        if written is not None and written.end().row >= self._index.end().row:
            self._index, self._written_rows = written, written.end().row
        self._index.fingerprint, self._index_directory = fingerprint, directory
        if self._index.rows is not None:
            self.total = self._index.rows

    def count(self) -> int:
        at, number, offset = self._index.end()
        if at < len(self.files):
            while at < len(self.files):
                for _ in self._read(at, number, offset):
                    pass
                at, number, offset = self._index.end()
            self._write_index()
        self.total = number
        return number

    def chunks(self, names: tuple[str, ...], rows: range, skip: Container[int]) -> Iterator[Chunk]:
        remaining = missing(rows, skip)
        wanted = next(remaining, _NO_ROW)
        chunk: Chunk = []
        size = 0
        while wanted < _NO_ROW:
            at, first, offset = self._index.seek(wanted)
            if at == len(self.files):
                self.total = first
                break
            path = self.files[at]
            decode = self.decoder(path, names)
            for number, record, begin, after in self._read(at, first, offset):
                if number < wanted:
                    continue
                try:
                    chunk.append((number, decode(record)))
                except RowError as error:
                    chunk.append((number, type(error)(f"{self.place(path, after)}: {error}")))
                size += after.offset - begin
                wanted = next(remaining, _NO_ROW)
                is_far = wanted - number > STEP
                if is_far or size >= CHUNK_BYTES or len(chunk) == CHUNK_ROWS:
                    yield chunk
                    chunk, size = [], 0
                    if wanted == _NO_ROW or (is_far and self._index.seek(wanted).row > number):
                        break
        if chunk:
            yield chunk

    def _read(self, at: int, number: int, offset: RowOffset) -> Iterator[tuple[int, Raw, int, RowOffset]]:
        """Read records of a file, from an offset in the index on, and add their offsets to the index.

        Args:
            at: The file's number.
            number: The number of the row at the offset.
            offset: Where to begin.

        Yields:
            The row's number, its record, the byte where it begins, and the offset of the next row.
        """
        files = self._index.files
        if at == len(files):
            files.append(FileIndex())
        file_index, start = files[at], sum(file.rows or 0 for file in files[:at])
        next_step = number
        with self.open(self.files[at]) as file:
            for record, after in self.records(file, offset):
                if number == next_step:
                    next_step += STEP
                    if not file.compressed and number - start == len(file_index.offsets) * STEP:
                        file_index.offsets.append(offset)
                    self._advance(number, sum(self._sizes[:at]) + file.position())
                yield number, record, offset.offset, after
                number, offset = number + 1, after
        file_index.rows = number - start
        self._index.whole = at + 1 == len(self.files)
        self._advance(number, sum(self._sizes[: at + 1]))

    def _advance(self, rows: int, size: int) -> None:
        """Note how far the manifest was read, in rows and bytes on disk."""
        if rows > self._progress[0]:
            self._progress = rows, size
        if rows - self._written_rows >= max(WRITE_INDEX_ROWS, rows // 20):
            self._write_index()
            self._written_rows = rows

    def _write_index(self) -> None:
        if self._index_directory is not None:
            with suppress(OSError):  # it can be made again
                self._index.write(self._index_directory)
