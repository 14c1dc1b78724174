"""Parquet files that img2dataset wrote: with the images, or as the list of images in directories or tars next to it."""

from __future__ import annotations

import os
import re
from bisect import bisect_right
from collections.abc import Container, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from pyarrow import types

from ...errors import MissingFile
from ...storage.tar import TarError, TarHeaders
from ..columns import Columns
from ..files import Files, format_of
from .base import Chunk
from .parquet import ParquetReader

_KEY, _STATUS, _REASON = "key", "status", "error_message"
_FORMATS = ("jpg", "png", "webp")
_SUCCESS = "success"
_IMAGE = "image"
"""The name of the column that stands for files or members; in the messages of rows without an image."""
_MAX_REASON = 150
_QUERY = re.compile(r"\?\S+")
"""The query of a URL, which may be secret."""


def is_img2dataset(files: Files) -> bool:
    """Return whether Parquet files are img2dataset's, by their columns and what lies next to them."""
    names = list(files)
    try:
        schema = pq.read_schema(files.directory / names[0])
    except (OSError, ValueError):
        return False  # ParquetReader says what is wrong with it
    columns = schema.names
    if not {_KEY, _STATUS, _REASON, "url"} <= set(columns) or not {_IMAGE, "images"}.isdisjoint(columns):
        return False
    return _bytes_column(schema) is not None or all(_companion(files.directory, name) for name in names)


class Img2datasetReader(ParquetReader):
    """Read what img2dataset wrote. The image is in a column (`jpg`), or is the file or the tar's member of the key.

    A row whose download failed has no image: if it is asked about its image, it fails, and says why.
    """

    def __init__(self, files: Files) -> None:
        super().__init__(files)
        self._bytes = _bytes_column(self._schemas[0])
        self._companions = [_companion(files.directory, name) or "" for name in self._names]
        """By file, what precedes the key in the path of an image, if it is in no column."""
        where = f"in column {self._bytes!r}"
        if self._bytes is None:
            where = "in the directories or tars next to the Parquet files"
            found = (_image_suffix(files.directory, companion) for companion in self._companions)
            self._suffix = next(filter(None, found), ".jpg")
        self._image_column = self._bytes or _IMAGE
        self.default_columns = {"image_column": self._image_column, "id_column": _KEY}
        self.notes = (
            f"img2dataset's output: images {where}, ids in column {_KEY!r}; failed downloads are failed rows",
        )

    def bind(self, columns: Columns) -> None:
        is_stored = self._bytes is not None or columns.image != _IMAGE
        super().bind(columns if is_stored else replace(columns, image=None))

    def chunks(self, names: tuple[str, ...], rows: range, skip: Container[int]) -> Iterator[Chunk]:
        if self._image_column not in names:
            yield from super().chunks(names, rows, skip)
            return
        found = [name for name in names if name != self._image_column or self._bytes is not None]
        stored = tuple(dict.fromkeys((*found, _KEY, _STATUS, _REASON)))
        for chunk in super().chunks(stored, rows, skip):
            yield [
                (number, cells if not isinstance(cells, tuple) else self._cells(number, names, stored, cells))
                for number, cells in chunk
            ]

    def _cells(self, number: int, names: tuple[str, ...], stored: tuple[str, ...], cells: tuple[Any, ...]) -> Any:
        row = dict(zip(stored, cells, strict=True))
        row[self._image_column] = self._image(number, row)
        return tuple([row[name] for name in names])

    def _image(self, number: int, row: dict[str, Any]) -> Any:
        """Return the image's bytes or path, or the error why there is none."""
        if row[_STATUS] != _SUCCESS:
            reason = _QUERY.sub("?…", str(row[_REASON] or "no reason"))[:_MAX_REASON]
            return MissingFile(f"img2dataset has no image of this row: {row[_STATUS]!s:.40}: {reason}")
        if self._bytes is not None:
            if (data := row[self._bytes]) is None:
                return MissingFile(f"column {self._bytes!r} is null, though the row's status is {_SUCCESS!r}")
            return data
        return f"{self._companions[bisect_right(self._starts, number) - 1]}{row[_KEY]}{self._suffix}"


def _bytes_column(schema: Any) -> str | None:
    """Return the column of encoded images; None if there is none."""
    return next((n for n in _FORMATS if n in schema.names and types.is_binary(schema.field(n).type)), None)


def _companion(directory: Path, name: str) -> str | None:
    """Return where the images of a Parquet file's rows are: `STEM.tar#` or `STEM/`; None if there is neither."""
    stem = os.path.splitext(name)[0]
    if (directory / f"{stem}.tar").is_file():
        return f"{stem}.tar#"
    return f"{stem}/" if (directory / stem).is_dir() else None


def _image_suffix(directory: Path, companion: str) -> str | None:
    """Return the suffix of the first image in a directory or tar; None if there is none."""
    path = directory / companion.removesuffix("#")
    try:
        if path.is_dir():
            with os.scandir(path) as entries:
                return _first_suffix(entry.name for entry in entries)
        with open(path, "rb") as file:
            members = TarHeaders(file.fileno(), path.stat().st_size).members()
            return _first_suffix(member.name for member in members)
    except (OSError, TarError):
        return None


def _first_suffix(names: Iterable[str]) -> str | None:
    return next((os.path.splitext(name)[1] for name in names if format_of(name) == "images"), None)
