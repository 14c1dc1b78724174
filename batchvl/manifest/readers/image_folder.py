"""A directory of images (ImageFolder): one row per image, whose id is its relative path."""

from __future__ import annotations

from collections.abc import Container, Iterator
from itertools import islice

import pyarrow as pa

from ...errors import InvalidRow
from ..columns import Columns
from ..files import Files
from .base import CHUNK_ROWS, Chunk, Reader, utf8


class ImageFolderReader(Reader):
    """Read the paths of images, in the columns `id` and `image`."""

    has_unique_ids = True

    def __init__(self, files: Files) -> None:
        self._files = files
        self.available = ("id", "image")
        self.total = sum(1 for _ in files)

    def bind(self, columns: Columns) -> None:
        self.id_type = "string" if columns.id else None
        self.kept = pa.schema([(name, pa.string()) for name in columns.keep])

    def schema(self) -> pa.Schema:
        return pa.schema([(name, pa.string()) for name in self.available])

    def chunks(self, names: tuple[str, ...], rows: range, skip: Container[int]) -> Iterator[Chunk]:
        chunk: Chunk = []
        for number, name in enumerate(islice(self._files, rows.start, rows.stop), rows.start):
            if number in skip:
                continue
            try:
                chunk.append((number, (utf8(name, "file's name"),) * len(names)))
            except InvalidRow as error:
                chunk.append((number, error))
            if len(chunk) == CHUNK_ROWS:
                yield chunk
                chunk = []
        if chunk:
            yield chunk
