"""CSV: comma-separated values below a line of column names."""

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
    """A record that the csv module rejects. It has no cells."""

    reason: str


class CsvReader(TextReader[list[str], TextFile]):
    """Read rows of CSV files. An empty cell is null, and every other cell is text.

    Raises:
        ManifestError: There is no header or no row, or most of the first rows do not fit the header.
    """

    has_json_lists = True

    def __init__(self, files: Files) -> None:
        super().__init__(files)
        # The module's default limit, 128 KiB a cell, is less than an image as a data URI. It has no limit per reader.
        csv.field_size_limit(max(csv.field_size_limit(), MAX_LINE))
        self._headers = {path: self._read_header(path) for path in self.files}
        self.available = tuple(dict.fromkeys(name for header in self._headers.values() for name in header))
        rows = 0
        bad: list[str] = []
        for path, line, record in self.sample():
            rows += 1
            if len(record) != len(self._headers[path]):
                bad.append(f"{path} line {line}: {_misfit(record, self._headers[path])}")
        if len(bad) > rows / 2:
            raise ManifestError(bad[0])

    def bind(self, columns: Columns) -> None:
        super().bind(columns)
        self.id_type = "string" if columns.id else None
        for path, header in self._headers.items():
            for name in columns.names:
                if header.count(name) != 1:
                    fault = "appears twice" if name in header else "is missing here, but other files have it"
                    raise ManifestError(f"{path}: column {name!r} {fault}; the columns are {', '.join(header)}")

    def open(self, path: Path) -> TextFile:
        return TextFile(path)

    def records(self, file: TextFile, start: RowOffset) -> Iterator[tuple[list[str], RowOffset]]:
        records = _parse(file, start)
        if start == RowOffset():
            next(records, None)  # the header
        return records

    def decoder(self, path: Path, names: tuple[str, ...]) -> Callable[[list[str]], Cells]:
        header = self._headers[path]
        indices = [header.index(name) for name in names]

        def cells(record: list[str]) -> Cells:
            if len(record) != len(header):
                raise InvalidRow(_misfit(record, header))
            return tuple([_check_utf8(record[at]) if record[at] else None for at in indices])

        return cells

    def _read_header(self, path: Path) -> list[str]:
        with TextFile(path) as file:
            for header, _ in _parse(file, RowOffset()):
                return header
        raise ManifestError(f"{path}: has no rows; expected a line of column names and rows below it")


def _parse(file: TextFile, start: RowOffset) -> Iterator[tuple[list[str], RowOffset]]:
    """Yield the records from an offset on, each with the offset of the next one. Blank lines are skipped."""
    offset, number = start.offset, start.line

    def lines() -> Iterator[str]:
        nonlocal offset, number
        for line, after in file.lines(start.offset):
            if isinstance(line, OversizedLine):
                raise ManifestError(f"{file.path} line {number + 1}: longer than {MAX_LINE:,} bytes")
            offset, number = after, number + 1
            yield line.decode(errors="surrogateescape") + "\n"

    reader = csv.reader(lines(), strict=True)
    while True:
        try:
            record = next(reader, None)
        except csv.Error as error:
            record = _BadRecord()
            record.reason = str(error)
        else:
            if record is None:
                return
            if not record or (len(record) == 1 and record[0].isspace()):
                continue
        yield record, RowOffset(offset, number)


def _misfit(record: list[str], header: list[str]) -> str:
    if isinstance(record, _BadRecord):
        return record.reason
    return f"found {len(record)} cells, expected {len(header)} as in the header"


def _check_utf8(cell: str) -> str:
    if not cell.isascii():
        try:
            cell.encode()
        except UnicodeEncodeError:
            raise InvalidRow("a cell is not UTF-8") from None
    return cell
