"""JSONL: one JSON object per line."""

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

_FEW_LINES = 100
"""Within the first this many lines, at most half this many may be bad; after them, at most half of all."""


class JsonlReader(TextReader[bytes, TextFile]):
    """Read rows of JSONL files. Columns, and whether ids are integers, are inferred from the first rows.

    Raises:
        ManifestError: There are no rows, the first line of a file is not a JSON object, or most of the first lines
            are not.
    """

    def __init__(self, files: Files) -> None:
        super().__init__(files)
        decode = msgspec.json.Decoder(dict[str, Any]).decode
        names: dict[str, None] = {}
        self._types: dict[str, set[type]] = {}
        """The types of the values that are not null, by column."""
        bad: list[str] = []
        checked: set[Path] = set()
        for at, (path, line, raw) in enumerate(self.sample()):
            try:
                row = _decode_line(decode, raw)
            except InvalidRow as error:
                shown = raw[:40].decode(errors="replace") + "…" * (len(raw) > 40)
                bad.append(f"{path} line {line}: {error}; found {shown!r}, expected one JSON object per line")
                row = {}
            if bad and (path not in checked or len(bad) > max(at + 1, _FEW_LINES) / 2):
                raise ManifestError(bad[0])
            checked.add(path)
            names |= dict.fromkeys(row)
            for name, value in row.items():
                if value is not None:
                    self._types.setdefault(name, set()).add(type(value))
        if len(bad) > (at + 1) / 2:
            raise ManifestError(bad[0])
        self.available = tuple(names)

    def bind(self, columns: Columns) -> None:
        super().bind(columns)
        types = set() if columns.id is None else self._types.get(columns.id, set())
        self.id_type = None if not types else "int64" if types == {int} else "string"

    def schema(self) -> pa.Schema:
        decode = msgspec.json.Decoder(dict[str, Any]).decode
        types = JsonTypes()
        for raw in self.every_record():
            with suppress(InvalidRow):
                types.add(_decode_line(decode, raw))
        return types.schema()

    def open(self, path: Path) -> TextFile:
        return TextFile(path)

    def records(self, file: TextFile, start: RowOffset) -> Iterator[tuple[bytes, RowOffset]]:
        number = start.line
        for line, after in file.lines(start.offset):
            number += 1
            if line and not line.isspace():
                yield line, RowOffset(after, number)

    def decoder(self, path: Path, names: tuple[str, ...]) -> Callable[[bytes], Cells]:
        # A struct of these columns alone: msgspec skips the values of all others.
        fields = {f"c{at}": name for at, name in enumerate(names)}
        struct = msgspec.defstruct("Line", [(field, Any, None) for field in fields], rename=fields, gc=False)
        decode = msgspec.json.Decoder(struct).decode
        cells = msgspec.structs.astuple
        return lambda line: cells(_decode_line(decode, line))


def _decode_line(decode: Callable[[bytes], Any], line: bytes) -> Any:
    try:
        return decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        if isinstance(line, OversizedLine):
            raise InvalidRow(f"longer than {MAX_LINE:,} bytes") from None
        if isinstance(error, msgspec.ValidationError) and str(error).startswith("Expected `object`"):
            raise InvalidRow(f"not a JSON object: {error}") from None
        raise InvalidRow(f"not JSON: {error}") from None
