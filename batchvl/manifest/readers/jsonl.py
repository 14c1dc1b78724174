"""JSONL: an object a line."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec
import pyarrow as pa

from ...errors import InvalidRow, ManifestError
from ..columns import Columns
from ..files import Files
from ..index import RowOffset
from ..json_types import JsonTypes
from .base import Cells
from .lines import MAX_LINE, OversizedLine, TextFile
from .text import TextReader

_FIRST = 100
"""Lines of which half must be JSON objects."""


class JsonlReader(TextReader[bytes]):
    """Rows of JSONL files. Columns, and whether ids are integers, are learnt from the first rows.

    Raises ManifestError where a file begins with what is no JSON object, where most of the first lines are none, or
    where there is no row at all.
    """

    def __init__(self, files: Files) -> None:
        super().__init__(files)
        decode = msgspec.json.Decoder(dict[str, Any]).decode
        names: dict[str, None] = {}
        self._ids: dict[str, set[type]] = {}
        bad: list[str] = []
        begun: set[Path] = set()
        for at, (path, line, raw) in enumerate(self.sample()):
            try:
                row = _decoded(decode, raw)
            except InvalidRow as error:
                shown = raw[:40].decode(errors="replace") + "…" * (len(raw) > 40)
                bad.append(f"{path} line {line}: {error}; found {shown!r}, want one JSON object a line")
                row = {}
            if bad and (path not in begun or len(bad) > max(at + 1, _FIRST) / 2):
                raise ManifestError(bad[0])
            begun.add(path)
            names |= dict.fromkeys(row)
            for name, value in row.items():
                if value is not None:
                    self._ids.setdefault(name, set()).add(type(value))
        if len(bad) > (at + 1) / 2:
            raise ManifestError(bad[0])
        self.available = tuple(names)

    def use(self, columns: Columns) -> None:
        super().use(columns)
        kinds = self._ids.get(columns.id or "", set())
        self.id_type = None if not kinds else "int64" if kinds == {int} else "string"

    def types(self) -> pa.Schema:
        decode = msgspec.json.Decoder(dict[str, Any]).decode
        found = JsonTypes()
        rows = 0
        for path in self.files:
            with TextFile(path) as file:
                for raw, _ in self.records(file, RowOffset()):
                    rows += 1
                    with suppress(InvalidRow):
                        found.add(_decoded(decode, raw))
        self.total = rows
        return found.schema()

    def records(self, file: TextFile, start: RowOffset) -> Iterator[tuple[bytes, RowOffset]]:
        number = start.line
        for line, after in file.lines(start.offset):
            number += 1
            if line and not line.isspace():
                yield line, RowOffset(after, number)

    def decoder(self, path: Path, names: tuple[str, ...]) -> Callable[[bytes], Cells]:
        # A struct of these columns alone: what else a line holds is passed over unread.
        fields = {f"c{at}": name for at, name in enumerate(names)}
        kind = msgspec.defstruct("Line", [(field, Any, None) for field in fields], rename=fields, gc=False)
        decode = msgspec.json.Decoder(kind).decode
        cells = msgspec.structs.astuple
        return lambda line: cells(_decoded(decode, line))


def _decoded(decode: Callable[[bytes], Any], line: bytes) -> Any:
    try:
        return decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        if isinstance(line, OversizedLine):
            raise InvalidRow(f"longer than {MAX_LINE:,} bytes") from None
        if isinstance(error, msgspec.ValidationError) and str(error).startswith("Expected `object`"):
            raise InvalidRow(f"no JSON object: {error}") from None
        raise InvalidRow(f"not JSON: {error}") from None
