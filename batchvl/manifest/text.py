"""What JSONL and CSV have in common: rows are found by reading, so counts and places come from an index."""

from __future__ import annotations

import sys
from abc import abstractmethod
from collections.abc import Callable, Container, Iterator
from pathlib import Path
from typing import Generic, TypeVar

import pyarrow as pa

from ..errors import ManifestError, RowError
from . import index
from .columns import Columns
from .files import Files
from .index import STEP, FileIndex, Index, Place
from .reader import CHUNK_BYTES, CHUNK_ROWS, Cells, Chunk
from .rows import IdType
from .stream import TextFile

SAMPLE_ROWS = 1000
SAMPLE_BYTES = 4 * 2**20
"""What is looked at to learn columns and types: the first rows, as far as this."""

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
        self._index: Index | None = None
        self._sizes = [path.stat().st_size for path in self.files]
        # Rows that were read and bytes of them on disk, for the estimate.
        self._seen = (0, 0)

    @abstractmethod
    def records(self, file: TextFile, start: Place) -> Iterator[tuple[Raw, Place]]:
        """The records from a place on, each with the place after it. Blank lines are none."""

    @abstractmethod
    def decoder(self, path: Path, names: tuple[str, ...]) -> Callable[[Raw], Cells]:
        """What makes a record's cells. It raises a RowError where the record is bad."""

    def use(self, columns: Columns) -> None:
        self.kept = pa.schema([(name, pa.string()) for name in columns.keep])

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
                for raw, after in self.records(file, Place()):
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

    def count(self, folder: Path | None, fingerprint: str) -> int:
        found = index.read(folder, fingerprint) if folder is not None else None
        if found is None:
            found = Index(fingerprint, [self._index_of(path) for path in self.files])
            if folder is not None:
                found.write(folder)
        self._index, self.total = found, found.rows
        return found.rows

    def _index_of(self, path: Path) -> FileIndex:
        own = FileIndex()
        with TextFile(path) as file:
            place = Place()
            for _, after in self.records(file, place):
                if own.rows % STEP == 0 and not file.compressed:
                    own.places.append(place)
                own.rows, place = own.rows + 1, after
        return own

    def chunks(self, names: tuple[str, ...], rows: range, skip: Container[int]) -> Iterator[Chunk]:
        at, number, place = self._index.seek(rows.start) if self._index else (0, 0, Place())
        whole = number == 0
        chunk: Chunk = []
        size = 0
        for path in self.files[at:]:
            decode = self.decoder(path, names)
            with TextFile(path) as file:
                for raw, after in self.records(file, place):
                    if number >= rows.stop:
                        break
                    if number >= rows.start and number not in skip:
                        try:
                            chunk.append((number, decode(raw)))
                        except RowError as error:
                            chunk.append((number, type(error)(f"{path} line {after.line}: {error}")))
                        size += after.offset - place.offset
                    number, place = number + 1, after
                    if size >= CHUNK_BYTES or len(chunk) == CHUNK_ROWS:
                        yield chunk
                        chunk, size = [], 0
                        if whole:
                            self._seen = number, sum(self._sizes[: self.files.index(path)]) + file.position()
            place = Place()
            if number >= rows.stop:
                break
        else:
            self.total = number
        if chunk:
            yield chunk


EVERY_ROW = range(sys.maxsize)
