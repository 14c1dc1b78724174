"""A manifest's rows with all its columns, as Arrow record batches: for joining them with answers."""

from __future__ import annotations

from collections.abc import Container, Iterator
from functools import cached_property
from pathlib import Path

import pyarrow as pa

from .files import find_files
from .fingerprint import fingerprint
from .readers import READERS
from .readers.base import Batch, Reader


class Batches:
    """Every column of a manifest, by row.

    Parquet has the files' types. JSONL has types that hold for all values of a column (see `JsonTypes`). CSV has
    strings, as has a directory of images, with the columns `id` and `image`. Tars have strings, and such types for what
    is in their JSON.

    >>> manifest = Batches("manifests/shapes.parquet")
    >>> [len(batch.rows) for batch in manifest.read(range(2, 5))]
    [3]
    """

    def __init__(self, source: str | Path) -> None:
        """Open a manifest.

        Raises:
            ManifestError: The files cannot be read, or there are none.
        """
        files = find_files(source)
        self._reader: Reader = READERS[files.format](files)
        self.fingerprint: str = fingerprint(files)

    @cached_property
    def schema(self) -> pa.Schema:
        """All columns with their types. For JSONL all rows are read.

        Raises:
            ManifestError: A column has values that no type holds.
        """
        return self._reader.schema()

    @property
    def total(self) -> int | None:
        """The number of rows; None until they have been counted."""
        return self._reader.total

    def read(self, rows: range, skip: Container[int] = ()) -> Iterator[Batch]:
        """Yield the rows in order and lazily, in batches of at most 256 rows and about 8 MiB.

        Args:
            rows: Numbers of rows.
            skip: Rows that may be left out.

        Raises:
            ManifestError: A file can no longer be read.
        """
        return self._reader.batches(self.schema, rows, skip)
