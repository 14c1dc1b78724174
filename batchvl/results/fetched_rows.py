"""Fetched rows on their way into a file."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import msgspec
import pyarrow as pa

from ..config.options import FileFormat
from ..types import Image
from .record import Record, to_array

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
"""An image: its encoded bytes, and where they come from, without secrets."""
SOURCE_IMAGES = "source_images"
"""With tars, the column that says where the images come from, without secrets."""
_ROW_BYTES = 1024
"""Bytes that a row takes besides its images."""


class FileSchema(NamedTuple):
    """The columns of the files."""

    columns: pa.Schema
    """The columns besides the images. The first has the row's number in the manifest."""
    images: str
    """The column of images, which comes behind these."""
    has_lists: bool
    """Whether it has lists of images, or at most one image per row."""
    id: str | None
    """The column of ids."""
    format: FileFormat = "parquet"
    """Where the images are: in the column of images, or in tars that it points at."""

    def image_columns(self) -> dict[str, pa.DataType]:
        """Return the columns that say what the images are, with their types."""
        kinds = {self.images: IMAGE}
        if self.format == "tar":
            kinds = {self.images: pa.string(), SOURCE_IMAGES: pa.string()}
        return {name: pa.list_(kind) if self.has_lists else kind for name, kind in kinds.items()}

    def arrow(self) -> pa.Schema:
        """Return the schema of the files."""
        return pa.schema([*self.columns, *self.image_columns().items()])


@dataclass
class RowGroup:
    """Rows on their way into a file. Their images are copied into one buffer, from which Arrow arrays are made.

    `clear` keeps the buffer: new memory would cost as much again as the copy.
    """

    rows: list[int] = field(default_factory=list)
    ids: list[int | str | None] = field(default_factory=list)
    cells: list[list[Any]] = field(default_factory=list)
    images: list[list[Image]] = field(default_factory=list)
    data: bytearray = field(default_factory=bytearray)
    """The images one after another, and unused bytes behind them."""
    ends: list[int] = field(default_factory=lambda: [0])
    """Where each image ends in `data`, behind the start of the first."""

    @property
    def size(self) -> int:
        """Bytes in memory, about."""
        return self.ends[-1] + len(self.rows) * _ROW_BYTES

    def append(
        self,
        row: int,
        id: int | str | None,
        cells: list[Any],
        images: Sequence[Image],
        data: Sequence[bytes | memoryview],
    ) -> None:
        """Add a row with what is known of its images, and their bytes, which are copied."""
        self.rows.append(row)
        self.ids.append(id)
        self.cells.append(cells)
        self.images.append(list(images))
        for item in data:
            start, end = self.ends[-1], self.ends[-1] + len(item)
            if (lacking := end - len(self.data)) > 0:
                self.data += bytes(max(lacking, len(self.data) // 2))
            memoryview(self.data)[start:end] = item  # a slice of the bytearray itself would copy the item first
            self.ends.append(end)

    def clear(self) -> None:
        """Remove all rows."""
        for column in (self.rows, self.ids, self.cells, self.images):
            column.clear()
        self.ends = [0]

    def contents(self) -> Iterator[memoryview]:
        """Yield the bytes of each image, rows one after another."""
        view = memoryview(self.data)
        for start, end in pairwise(self.ends):
            yield view[start:end]

    def table(self, schema: FileSchema, members: Sequence[str] = ()) -> pa.Table:
        """Return the rows as a table, without a copy of the images.

        Args:
            schema: The table's columns.
            members: For each image in a tar, its path. Otherwise the table has the images' bytes.
        """
        sources = pa.array([image.source for images in self.images for image in images], pa.string())
        if schema.format == "tar":
            columns = [pa.array(members, pa.string()), sources]
        else:
            ends = pa.array(self.ends, pa.int32()).buffers()[1]
            data = pa.Array.from_buffers(pa.binary(), len(sources), [None, ends, pa.py_buffer(self.data)])
            columns = [pa.StructArray.from_arrays([data, sources], fields=list(IMAGE))]
        others = [
            to_array(f, list(cells)) for f, cells in zip(schema.columns, zip(*self.cells, strict=True), strict=True)
        ]
        nested = [self._by_row(column, has_lists=schema.has_lists) for column in columns]
        return pa.Table.from_arrays([*others, *nested], schema=schema.arrow())

    def _by_row(self, column: pa.Array, *, has_lists: bool) -> pa.Array:
        """Return a column with a value for each image as one with a list, or at most one value, for each row."""
        if has_lists:
            offsets = list(accumulate(map(len, self.images), initial=0))
            return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), column)
        if len(column) == len(self.rows):
            return column
        places = iter(range(len(column)))
        return column.take(pa.array([next(places) if images else None for images in self.images], pa.int64()))

    def hash_images(self) -> None:
        """Add the hashes of images that have none yet."""
        contents = self.contents()
        for images in self.images:
            for place, image in enumerate(images):
                data = next(contents)
                if image.sha256 is None:
                    images[place] = msgspec.structs.replace(image, sha256=hashlib.sha256(data).hexdigest())

    def records(self, file: str) -> Iterator[Record]:
        """Yield the rows' records.

        Args:
            file: Name of the file that holds the images.
        """
        self.hash_images()
        for row, id, images in zip(self.rows, self.ids, self.images, strict=True):
            yield Record(row, "ok", id=id, images=images, kept={"file": file})
