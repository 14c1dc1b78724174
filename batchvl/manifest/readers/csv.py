"""CSV: comma-separated, the first line names the columns."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator
from pathlib import Path

from ...errors import InvalidRow, ManifestError
from ..columns import Columns
from ..files import Files
from ..index import RowOffset
from .base import Cells
from .lines import MAX_LINE, OversizedLine, TextFile
from .text import TextReader


class _BadRecord(list[str]):
    """Stands for a record that the csv module refuses; it has no cells."""

    reason: str


class CsvReader(TextReader[list[str]]):
    """Rows of CSV files. An empty cell is null, and every other one is text.

    Raises ManifestError where there is no header, no row, or where most of the first rows do not fit the header.
    """

    def __init__(self, files: Files) -> None:
        super().__init__(files)
        # The module's limit of 128 KiB a cell is less than a picture as a data URI. There is none per reader.
        csv.field_size_limit(max(csv.field_size_limit(), MAX_LINE))
        self._headers = {path: self._header(path) for path in self.files}
        self.available = tuple(dict.fromkeys(name for header in self._headers.values() for name in header))
        rows = 0
        bad: list[str] = []
        for path, line, raw in self.sample():
            rows += 1
            if len(raw) != len(self._headers[path]):
                bad.append(f"{path} line {line}: {_misfit(raw, self._headers[path])}")
        if len(bad) > rows / 2:
            raise ManifestError(bad[0])

    def _header(self, path: Path) -> list[str]:
        with TextFile(path) as file:
            for header, _ in self._rows(file, RowOffset()):
                return header
        raise ManifestError(f"{path}: has no rows; want a line of column names and rows below it")

    def use(self, columns: Columns) -> None:
        super().use(columns)
        self.id_type = "string" if columns.id else None
        for path, header in self._headers.items():
            for name in columns.read:
                if header.count(name) != 1:
                    there = "is there twice" if name in header else "is missing here, but other files have it"
                    raise ManifestError(f"{path}: column {name!r} {there}; the columns are {', '.join(header)}")

    def records(self, file: TextFile, start: RowOffset) -> Iterator[tuple[list[str], RowOffset]]:
        rows = self._rows(file, start)
        if start == RowOffset():
            next(rows, None)  # the header
        return rows

    def decoder(self, path: Path, names: tuple[str, ...]) -> Callable[[list[str]], Cells]:
        header = self._headers[path]
        places = [header.index(name) for name in names]

        def cells(row: list[str]) -> Cells:
            if len(row) != len(header):
                raise InvalidRow(_misfit(row, header))
            return tuple([_checked(row[at]) if row[at] else None for at in places])

        return cells

    @staticmethod
    def _rows(file: TextFile, start: RowOffset) -> Iterator[tuple[list[str], RowOffset]]:
        offset, number = start.offset, start.line

        def lines() -> Iterator[str]:
            nonlocal offset, number
            for line, after in file.lines(start.offset):
                if isinstance(line, OversizedLine):
                    raise ManifestError(f"{file.path} line {number + 1}: is longer than {MAX_LINE:,} bytes")
                offset, number = after, number + 1
                yield line.decode(errors="surrogateescape") + "\n"

        reader = csv.reader(lines(), strict=True)
        while True:
            try:
                row = next(reader, None)
            except csv.Error as error:
                row = _BadRecord()
                row.reason = str(error)
            else:
                if row is None:
                    return
                if not row or (len(row) == 1 and row[0].isspace()):
                    continue
            yield row, RowOffset(offset, number)


def _misfit(row: list[str], header: list[str]) -> str:
    if isinstance(row, _BadRecord):
        return row.reason
    return f"found {len(row)} cells, want {len(header)}, as the header has"


def _checked(cell: str) -> str:
    if not cell.isascii():
        try:
            cell.encode()
        except UnicodeEncodeError:
            raise InvalidRow("a cell that is not UTF-8") from None
    return cell
