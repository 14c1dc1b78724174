"""What JSONL and CSV have in common: rows are found by reading, so counts and places come from an index."""

from __future__ import annotations

import sys
from abc import abstractmethod
from collections.abc import Callable, Container, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Generic, TypeVar

import pyarrow as pa

from ...errors import ManifestError, RowError
from .. import index
from ..columns import Columns
from ..files import Files
from ..index import STEP, FileIndex, Index, RowOffset
from ..rows import IdType
from .base import CHUNK_BYTES, CHUNK_ROWS, Cells, Chunk, missing
from .lines import TextFile

SAMPLE_ROWS = 1000
SAMPLE_BYTES = 4 * 2**20
"""What is looked at to learn columns and types: the first rows, as far as this."""
WRITTEN_ROWS = 100_000
"""The index is written whenever it has grown by so many rows, and by a twentieth. Up to so many are soon read again."""

Raw = TypeVar("Raw")


class TextReader(Generic[Raw]):
    """Rows of text files. A format tells how records are split and decoded."""

    is_text = True
    available: tuple[str, ...]
    id_type: IdType | None
    kept: pa.Schema
    row_bytes: int

    def __init__(self, files: Files) -> None:
        self.files = [files.folder / name for name in files]
        self.where = str(self.files[0] if len(self.files) == 1 else files.folder)
        self.total: int | None = None
        self._index = Index()
        self._folder: Path | None = None
        self._written = 0  # the row up to which the index is in the folder
        self._sizes = [path.stat().st_size for path in self.files]
        # Rows that were read and bytes of them on disk, for the estimate.
        self._seen = (0, 0)

    @abstractmethod
    def records(self, file: TextFile, start: RowOffset) -> Iterator[tuple[Raw, RowOffset]]:
        """The records from a place on, each with the place after it. Blank lines are none."""

    @abstractmethod
    def decoder(self, path: Path, names: tuple[str, ...]) -> Callable[[Raw], Cells]:
        """What makes a record's cells. It raises a RowError where the record is bad."""

    def use(self, columns: Columns) -> None:
        self.kept = pa.schema([(name, pa.string()) for name in columns.keep])

    def types(self) -> pa.Schema:
        self.use(Columns(keep=self.available))
        return self.kept

    def estimate(self) -> int | None:
        rows, size = self._seen
        if self.total is not None:
            return self.total
        return max(rows, rows * sum(self._sizes) // size) if size else None

    def sample(self) -> Iterator[tuple[Path, int, Raw]]:
        """The first records, with their files and the numbers of the lines where they end.

        Raises ManifestError where there is not one.
        """
        rows = size = 0
        for path in self.files:
            with TextFile(path) as file:
                begin = 0
                for raw, after in self.records(file, RowOffset()):
                    yield path, after.line, raw
                    rows, size, begin = rows + 1, size + after.offset - begin, after.offset
                    if rows == SAMPLE_ROWS or size >= SAMPLE_BYTES:
                        break
                self._seen = rows, self._seen[1] + (file.position() if file.compressed else begin)
            self.row_bytes = size // max(1, rows)
            if rows >= SAMPLE_ROWS or size >= SAMPLE_BYTES:
                return
        if not rows:
            size = sum(self._sizes)
            raise ManifestError(f"{self.where}: has no rows ({size} bytes); want at least one")

    def index_in(self, folder: Path | None, fingerprint: str) -> None:
        """Has the index kept in a folder, and uses what is in there already. fingerprint: the manifest's."""
        found = index.read(folder, fingerprint) if folder is not None else None
        if found is not None and found.seek(_END)[1] >= self._index.seek(_END)[1]:
            self._index, self._written = found, found.seek(_END)[1]
        self._index.fingerprint, self._folder = fingerprint, folder
        if self._index.rows is not None:
            self.total = self._index.rows

    def count(self) -> int:
        """Finds `total`: what the index does not tell of is read."""
        at, number, place = self._index.seek(_END)
        if at < len(self.files):
            while at < len(self.files):
                for _ in self._read(at, number, place):
                    pass
                at, number, place = self._index.seek(_END)
            self._write()
        self.total = number
        return number

    def chunks(self, names: tuple[str, ...], rows: range, skip: Container[int]) -> Iterator[Chunk]:
        wanted = missing(rows, skip)
        want = next(wanted, _END)
        chunk: Chunk = []
        size = 0
        while want < _END:
            at, first, place = self._index.seek(want)
            if at == len(self.files):
                self.total = first
                break
            path = self.files[at]
            decode = self.decoder(path, names)
            for number, raw, begin, after in self._read(at, first, place):
                if number < want:
                    continue
                try:
                    chunk.append((number, decode(raw)))
                except RowError as error:
                    chunk.append((number, type(error)(f"{path} line {after.line}: {error}")))
                size += after.offset - begin
                want = next(wanted, _END)
                far = want - number > STEP
                if far or size >= CHUNK_BYTES or len(chunk) == CHUNK_ROWS:
                    yield chunk
                    chunk, size = [], 0
                    if want == _END or (far and self._index.seek(want)[1] > number):
                        break
        if chunk:
            yield chunk

    def _read(self, at: int, number: int, place: RowOffset) -> Iterator[tuple[int, Raw, int, RowOffset]]:
        """The records of a file, by its number, from a place that the index has: number, record, where it begins and
        ends. What is passed goes into the index.
        """
        files = self._index.files
        if at == len(files):
            files.append(FileIndex())
        own, start = files[at], sum(file.rows or 0 for file in files[:at])
        step = number
        with TextFile(self.files[at]) as file:
            for raw, after in self.records(file, place):
                if number == step:
                    step += STEP
                    if not file.compressed and number - start == len(own.places) * STEP:
                        own.places.append(place)
                    self._passed(number, sum(self._sizes[:at]) + file.position())
                yield number, raw, place.offset, after
                number, place = number + 1, after
        own.rows = number - start
        self._index.whole = at + 1 == len(self.files)
        self._passed(number, sum(self._sizes[: at + 1]))

    def _passed(self, number: int, size: int) -> None:
        """The reader is at a row, with so many bytes before it."""
        if number > self._seen[0]:
            self._seen = number, size
        if number - self._written >= max(WRITTEN_ROWS, number // 20):
            self._write()
            self._written = number

    def _write(self) -> None:
        if self._folder is not None:
            with suppress(OSError):  # it can be made anew
                self._index.write(self._folder)


_END = sys.maxsize
EVERY_ROW = range(_END)
