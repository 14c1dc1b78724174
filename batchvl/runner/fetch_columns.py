"""The columns of fetched rows: those of the manifest, with the encoded images in place of their sources."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pyarrow as pa

from ..config.options import FileFormat
from ..errors import ManifestError
from ..manifest import Manifest
from ..manifest.chat_images import placeholders
from ..manifest.json_types import JSON
from ..results.fetched_rows import SOURCE_IMAGES
from ..types import Row

SOURCE_ROW = "source_row"
"""The column with the row's number in the manifest that was fetched."""


class FetchedColumns:
    """The columns that a fetched row has besides its images, and the name of the column with these.

    Values and types are those of the manifest, except that

    - messages are JSON, since their images are in the column of images, with placeholders in their stead;
    - a JSONL column with values of several types is JSON in strings, and strings as they are, as prompts write both;
    - a prompt column with strings and lists has lists of strings.

    Args:
        manifest: The manifest, opened as a whole.
        format: Where the images are to be.

    Raises:
        ManifestError: The manifest has no images, or has a column with the name of one that is added.
    """

    def __init__(self, manifest: Manifest, format: FileFormat) -> None:
        roles, kept = manifest.roles, manifest.schema.kept
        if not (roles.images or roles.image or roles.messages):
            there = ", ".join(manifest.columns)
            raise ManifestError(f"no column of images to fetch, see --image-column; the columns are {there}")
        for name in (SOURCE_ROW, SOURCE_IMAGES) if format == "tar" else (SOURCE_ROW,):
            if name in manifest.columns:
                raise ManifestError(f"column {name!r}: fetch adds a column of this name; rename the manifest's")
        self.images = roles.images or roles.image or "images"
        """The column of images."""
        self.has_lists = bool(roles.messages or (roles.images and roles.image)) or manifest.has_image_lists
        """Whether the column of images has lists."""
        self._messages = roles.messages
        self._convert: dict[str, Callable[[Any], Any]] = {}
        fields = [pa.field(SOURCE_ROW, pa.int64())]
        for field in kept:
            kind = pa.string() if field.name == roles.messages else field.type
            if field.metadata == JSON and field.name != roles.messages:
                self._convert[field.name] = _as_text
                if field.name == roles.prompt:
                    kind, self._convert[field.name] = pa.list_(pa.string()), _as_turns
            fields.append(pa.field(field.name, kind))
        self.schema = pa.schema(fields)
        """All columns but that of the images."""

    def cells(self, row: Row) -> list[Any]:
        """Return the row's values in the order of the schema."""
        values = dict(row.kept)
        if self._messages is not None:
            values[self._messages] = None if row.messages is None else _as_text(placeholders(row.messages))
        for name, convert in self._convert.items():
            values[name] = convert(values[name])
        return [row.number, *(values[name] for name in self.schema.names[1:])]


def _as_text(value: Any) -> str | None:
    return value if value is None or isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _as_turns(value: Any) -> list[str] | None:
    return [value] if isinstance(value, str) else value
