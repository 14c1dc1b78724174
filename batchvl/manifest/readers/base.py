"""What the formats have in common: `Reader`."""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import pyarrow as pa

from ...errors import RowError
from ..columns import Columns
from ..rows import IdType

CHUNK_ROWS = 256
CHUNK_BYTES = 8 * 2**20

Cells = tuple[Any, ...]
Chunk = list[tuple[int, Cells | RowError]]
"""Numbers of rows with their cells, or with the error that stands in their place."""


@runtime_checkable
class SkipSet(Protocol):
    """A set of row numbers that need not be asked for each of millions."""

    def missing(self, rows: range) -> Iterator[int]:
        """The rows of `rows` that are not in the set, in order."""


def missing(rows: range, skip: Container[int]) -> Iterator[int]:
    """The rows that are not in `skip`, in order.

    >>> list(missing(range(3, 7), {4, 5}))
    [3, 6]
    """
    return skip.missing(rows) if isinstance(skip, SkipSet) else (row for row in rows if row not in skip)


class Batch(NamedTuple):
    """Some rows as Arrow columns."""

    rows: Sequence[int]
    """Their numbers, ascending."""
    columns: pa.RecordBatch
    bad: frozenset[int] = frozenset()
    """Those of them that could not be read, as a whole or in part: they have nulls."""


def nulls(schema: pa.Schema, rows: int) -> pa.RecordBatch:
    """Rows without any value."""
    return pa.RecordBatch.from_arrays([pa.nulls(rows, field.type) for field in schema], schema=schema)


class Reader(Protocol):
    """The rows of a manifest's files as cells."""

    available: tuple[str, ...]
    """The columns that are there; in JSONL, those of the first rows."""
    total: int | None
    """Rows of all files; None while it is not known."""
    is_text: bool
    """Values come without types: rows have to be looked at, and kept values become strings."""

    row_bytes: int
    """About how many bytes are read to learn one row's id."""
    id_type: IdType | None
    """What the id column holds; None without ids. Set by `use`."""
    kept: pa.Schema
    """The columns of `--keep` with their Arrow types. Set by `use`."""

    def use(self, columns: Columns) -> None:
        """Says what the columns are for. Raises ManifestError for one of a wrong type."""

    def estimate(self) -> int | None:
        """About how many rows there are, by what was read so far."""

    def chunks(self, names: tuple[str, ...], rows: range, skip: Container[int]) -> Iterator[Chunk]:
        """The rows that are not in `skip`, in order and lazily, as cells in the order of `names`.

        A chunk has at most CHUNK_ROWS rows and about CHUNK_BYTES, and few where those after it are far away.
        """

    def types(self) -> pa.Schema:
        """Every column with a type for all its values; of JSONL, all rows are read for it, and `total` is known then.

        Raises ManifestError where a column has none.
        """
