"""What a cell says about a picture: `image_of`."""

from __future__ import annotations

import re
from typing import Any
from urllib.parse import unquote

from ..errors import InvalidRow, UnsupportedSource
from ..images.datauri import decode_data_uri
from ..request import FileImage, ImageRef, InlineImage, WebImage

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")


def images_of(cell: Any, what: str) -> list[ImageRef]:
    """The pictures of a cell that holds one or a list of them; nulls in a list are no pictures.

    Raises InvalidRow, InvalidDataUri, UnsupportedSource.
    """
    if isinstance(cell, list):
        return [image_of(one, f"{what}[{at}]") for at, one in enumerate(cell) if one is not None]
    return [] if cell is None else [image_of(cell, what)]


def image_of(cell: Any, what: str) -> ImageRef:
    """The picture that a value stands for: URL, path, data URI, bytes, or Hugging Face's `{bytes, path}`.

    `what` says where it stands, such as "images[2]". Raises InvalidRow, InvalidDataUri, UnsupportedSource.

    >>> image_of("https://example.org/cat.jpg", "image")
    WebImage(url='https://example.org/cat.jpg')
    """
    if isinstance(cell, str):
        return _from_text(cell, what)
    if isinstance(cell, bytes):
        return InlineImage(cell, f"{what} ({len(cell)} bytes)")
    if isinstance(cell, dict) and not cell.keys().isdisjoint(("bytes", "path")):
        data, path = cell.get("bytes"), cell.get("path")
        if isinstance(data, bytes):
            # The path names where the picture once was; only the bytes are read.
            return InlineImage(data, path if isinstance(path, str) and path else f"{what} ({len(data)} bytes)")
        if data is None and isinstance(path, str):
            return _from_text(path, what)
        raise InvalidRow(f"{what}: found {{bytes: {_kind(data)}, path: {_kind(path)}}}, want bytes or a path")
    raise InvalidRow(f"{what}: found {_kind(cell)}, want a URL, a path, a data URI, bytes or {{bytes, path}}")


def _from_text(text: str, what: str) -> ImageRef:
    head = text[:16].lstrip().lower()
    if head.startswith(("http://", "https://")):
        return WebImage(text.strip())
    if head.startswith("data:"):
        return InlineImage(*decode_data_uri(text))
    if not text:
        raise InvalidRow(f"{what}: found an empty string, want a URL or a path")
    if "\0" in text:
        raise InvalidRow(f"{what}: the path holds a NUL character")
    scheme = _SCHEME.match(text)
    if scheme is None:
        return FileImage(text)
    if scheme[1].lower() == "file":
        host, slash, path = text[scheme.end() :].partition("/")
        if slash and host.lower() in ("", "localhost"):
            return FileImage("/" + unquote(path))
        raise UnsupportedSource(f"{what}: a file URL of another host; want file:///path")
    raise UnsupportedSource(f"{what}: {scheme[1]}:// is not read; want http, https, file or data, or a path")


def _kind(value: Any) -> str:
    return "null" if value is None else type(value).__name__
