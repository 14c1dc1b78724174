"""What a cell says about a picture: `image_of`."""

from __future__ import annotations

import binascii
import re
from typing import Any
from urllib.parse import unquote, unquote_to_bytes

from ..errors import InvalidDataUri, InvalidRow, UnsupportedSource
from ..types import FileImage, ImageRef, InlineImage, WebImage

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


_LONGEST_TYPE = 60
_SPACE = b" \t\n\r\f\v"


def decode_data_uri(text: str) -> tuple[bytes, str]:
    """The bytes of a `data:` URI, and what people are told of it: its own word on the media type, and its size.

    Strict: bad base64, missing padding and broken percent-encoding raise InvalidDataUri. Space between the characters
    of base64 is allowed, for URIs that were wrapped.

    >>> decode_data_uri("data:image/gif;base64,R0lG")
    (b'GIF', 'data:image/gif (3 bytes)')
    """
    scheme, colon, rest = text.strip().partition(":")
    head, comma, body = rest.partition(",")
    if scheme.lower() != "data" or not colon:
        raise InvalidDataUri(f"a data URI begins with 'data:'; found {text[:16]!r}")
    if not comma:
        raise InvalidDataUri("data URI: no comma between the media type and the data")
    kind, *parameters = (piece.strip().lower() for piece in head.split(";"))
    data = _percent_decoded(body)
    if "base64" in parameters:
        try:
            data = data.translate(None, _SPACE)
            if data.endswith(b"==="):  # strict_mode lets it pass
                raise binascii.Error("Excess padding")
            data = binascii.a2b_base64(data, strict_mode=True)
        except binascii.Error as error:
            raise InvalidDataUri(f"data URI: {len(body):,} characters that are not base64: {error}") from None
    return data, f"data:{kind[:_LONGEST_TYPE]} ({len(data):,} bytes)"


def _percent_decoded(body: str) -> bytes:
    if "%" not in body:
        return body.encode()
    if found := re.search("%(?![0-9A-Fa-f]{2})", body):
        raise InvalidDataUri(f"data URI: {body[found.start() : found.start() + 3]!r} is no percent-encoding")
    return unquote_to_bytes(body)
