"""What a reader of a manifest format implements."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Container, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol, runtime_checkable

import msgspec
import pyarrow as pa

from ...errors import InvalidRow, RowError
from ..columns import Columns
from ..files import Files
from ..json_types import JSON
from ..rows import IdType

CHUNK_ROWS = 256
CHUNK_BYTES = 8 * 2**20

Cells = tuple[Any, ...]
Chunk = list[tuple[int, Cells | RowError]]
"""Row numbers with the rows' cells, or with the error that replaces them.

The cell of an image may also be a `FileImage`, a list of them, or the error why there is none.
"""


class Batch(NamedTuple):
    """Some rows as Arrow columns."""

    rows: Sequence[int]
    """The rows' numbers, ascending."""
    columns: pa.RecordBatch
    unreadable: frozenset[int] = frozenset()
    """Rows that could not be read, as a whole or in part: they have nulls."""


class Reader(ABC):
    """Read the rows of a manifest's files, as cells or as Arrow batches.

    The constructor reads as little as it takes to know `available`: footers, or the first rows of text. It raises
    ManifestError if the files are empty or not of the format.
    """

    is_text: ClassVar[bool] = False
    """Whether values have no types: kept values become strings, and the first rows are checked before a run."""
    has_json_lists: ClassVar[bool] = False
    """Whether a cell that begins with `[` is a JSON list, since the format has no lists."""
    has_unique_ids: ClassVar[bool] = False
    """Whether the format guarantees that no two rows have the same id."""

    notes: tuple[str, ...] = ()
    """What the user should know about how the files are read."""
    default_columns: Mapping[str, str] = {}
    """By option (`id_column`): the column that has the role if neither an option nor the usual name assigns it."""

    available: tuple[str, ...]
    """The columns of the files; for JSONL, those of the first rows."""
    total: int | None = None
    """Rows of all files; None until they are counted."""
    id_row_bytes: int = 8
    """Approximate bytes to read for the id of one row."""
    id_type: IdType | None
    """Type of the id column; None without ids. Set by `bind`."""
    kept: pa.Schema
    """The columns of `--keep` with their Arrow types. Set by `bind`."""

    @abstractmethod
    def __init__(self, files: Files) -> None: ...

    @abstractmethod
    def bind(self, columns: Columns) -> None:
        """Set the roles of the columns.

        Raises:
            ManifestError: A column has a type that its role does not allow.
        """

    @abstractmethod
    def chunks(self, names: tuple[str, ...], rows: range, skip: Container[int]) -> Iterator[Chunk]:
        """Yield the rows that are not in `skip`, in order and lazily, as cells in the order of `names`.

        A chunk has at most CHUNK_ROWS rows and about CHUNK_BYTES. It ends early if the next rows are far away.
        """

    @abstractmethod
    def schema(self) -> pa.Schema:
        """Return every column with a type that holds for all its values.

        For JSONL all rows are read, and `total` is known afterwards.

        Raises:
            ManifestError: A column has values that no type holds.
        """

    def batches(self, schema: pa.Schema, rows: range, skip: Container[int]) -> Iterator[Batch]:
        """Yield the rows as Arrow columns, in order and lazily. Rows in `skip` may be left out."""
        for chunk in self.chunks(tuple(schema.names), rows, skip):
            yield _batch_of_cells(chunk, schema)

    def estimate(self) -> int | None:
        """Return the approximate number of rows, from what was read so far."""
        return self.total

    def count(self) -> int | None:
        """Return the number of rows. All of the manifest is read if necessary."""
        return self.total

    def use_index(self, directory: Path | None, fingerprint: str) -> None:  # noqa: B027 - optional
        """Keep an index of the rows in a directory. Formats that find any row quickly need none.

        Args:
            directory: Where the index of an earlier run may be; None to keep the index in memory only.
            fingerprint: The manifest's.
        """


@runtime_checkable
class SkipSet(Protocol):
    """A set of row numbers that yields the rows it lacks without a test for each of millions."""

    def missing(self, rows: range) -> Iterator[int]:
        """Yield the rows of `rows` that are not in the set, in order."""


def missing(rows: range, skip: Container[int]) -> Iterator[int]:
    """Return the rows that are not in `skip`, in order.

    >>> list(missing(range(3, 7), {4, 5}))
    [3, 6]
    """
    return skip.missing(rows) if isinstance(skip, SkipSet) else (row for row in rows if row not in skip)


def utf8(name: str, what: str) -> str:
    """Return a name from a file system or an archive, where bytes that are not UTF-8 are surrogates.

    Args:
        name: The name.
        what: Its noun, for the error message.

    Raises:
        InvalidRow: It has such bytes.
    """
    if not name.isascii():
        try:
            name.encode()
        except UnicodeEncodeError:
            shown = name.encode(errors="surrogateescape").decode(errors="backslashreplace")
            raise InvalidRow(f"{shown:.200}: the {what} is not UTF-8") from None
    return name


def nulls(schema: pa.Schema, rows: int) -> pa.RecordBatch:
    """Return rows of nulls."""
    return pa.RecordBatch.from_arrays([pa.nulls(rows, field.type) for field in schema], schema=schema)


_encode = msgspec.json.Encoder().encode


def _batch_of_cells(chunk: Chunk, schema: pa.Schema) -> Batch:
    no_cells = (None,) * len(schema)
    rows = [cells if isinstance(cells, tuple) else no_cells for _, cells in chunk]
    columns = [
        pa.array(map(_json, values) if field.metadata == JSON else values, field.type)
        for field, values in zip(schema, zip(*rows, strict=True), strict=True)
    ]
    unreadable = frozenset(row for row, cells in chunk if not isinstance(cells, tuple))
    return Batch([row for row, _ in chunk], pa.RecordBatch.from_arrays(columns, schema=schema), unreadable)


def _json(value: Any) -> str | None:
    return None if value is None else _encode(value).decode()
