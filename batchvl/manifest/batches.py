"""A manifest's rows as Arrow columns, all that it has, for joining them with what came of them: `Batches`."""

from __future__ import annotations

from collections.abc import Container, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import msgspec
import pyarrow as pa

from .files import find
from .fingerprint import fingerprint
from .json_types import JSON
from .manifest import READERS
from .readers.base import Batch, Chunk
from .readers.parquet import ParquetReader

_encode = msgspec.json.Encoder().encode


class Batches:
    """Every column of a manifest, with types of its own, by row.

    Parquet: the file's types. JSONL: what all values of a column have in common (`jsontypes.py`). CSV, and a folder of
    pictures, which has `id` and `image`: strings.

    >>> found = Batches("manifests/shapes.parquet")
    >>> [len(batch.rows) for batch in found.read(range(2, 5))]
    [3]
    """

    def __init__(self, source: str | Path) -> None:
        """Raises ManifestError where the files cannot be read, or are none."""
        files = find(source)
        self._reader = READERS[files.format](files)
        self.fingerprint: str = fingerprint(files)

    @cached_property
    def schema(self) -> pa.Schema:
        """All columns; for JSONL all rows are read. Raises ManifestError where a column has no type for all of them."""
        return self._reader.types()

    @property
    def total(self) -> int | None:
        """Rows; None where they have not been counted."""
        return self._reader.total

    def read(self, rows: range, skip: Container[int] = ()) -> Iterator[Batch]:
        """The rows, in order and lazily, in batches of at most 256 and about 8 MiB; rows of `skip` may be left out.

        Raises ManifestError where a file can no longer be read.
        """
        if isinstance(self._reader, ParquetReader):
            yield from self._reader.batches(self.schema, rows, skip)
        else:
            for chunk in self._reader.chunks(tuple(self.schema.names), rows, skip):
                yield _of_cells(chunk, self.schema)


def _of_cells(chunk: Chunk, schema: pa.Schema) -> Batch:
    nothing = (None,) * len(schema)
    cells = [cells if isinstance(cells, tuple) else nothing for _, cells in chunk]
    columns = [
        pa.array(map(_text, values) if field.metadata == JSON else values, field.type)
        for field, values in zip(schema, zip(*cells, strict=True), strict=True)
    ]
    bad = frozenset(row for row, cells in chunk if not isinstance(cells, tuple))
    return Batch([row for row, _ in chunk], pa.RecordBatch.from_arrays(columns, schema=schema), bad)


def _text(value: Any) -> str | None:
    return None if value is None else _encode(value).decode()
