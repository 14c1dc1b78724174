"""A directory of images (ImageFolder): one row per image, whose id is its relative path."""

from __future__ import annotations

from collections.abc import Container, Iterator
from itertools import islice

import pyarrow as pa

from ...errors import InvalidRow
from ..columns import Columns
from ..files import Files
from .base import CHUNK_ROWS, Chunk, Reader


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
            if name.isprintable() or _is_utf8(name):
                chunk.append((number, (name,) * len(names)))
            else:
                shown = name.encode(errors="surrogateescape").decode(errors="backslashreplace")
                chunk.append((number, InvalidRow(f"{shown}: the file's name is not UTF-8")))
            if len(chunk) == CHUNK_ROWS:
                yield chunk
                chunk = []
        if chunk:
            yield chunk


def _is_utf8(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True
