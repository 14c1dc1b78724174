"""What the formats have in common: `Reader`."""

from __future__ import annotations

from collections.abc import Container, Iterator
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa

from ..errors import RowError
from .columns import Columns
from .rows import IdType

CHUNK_ROWS = 256
CHUNK_BYTES = 8 * 2**20

Cells = tuple[Any, ...]
Chunk = list[tuple[int, Cells | RowError]]
"""Numbers of rows with their cells, or with the error that stands in their place."""


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

    def count(self, folder: Path | None, fingerprint: str) -> int:
        """Finds `total`: for text from the index in `folder`, which is written if it is not there."""

    def chunks(self, names: tuple[str, ...], rows: range, skip: Container[int]) -> Iterator[Chunk]:
        """The rows that are not in `skip`, in order and lazily, as cells in the order of `names`.

        A chunk has at most CHUNK_ROWS rows and about CHUNK_BYTES.
        """
