"""References to images in a manifest's cells: URLs, paths, bytes and `data:` URIs."""

from __future__ import annotations

import binascii
import re
from typing import Any
from urllib.parse import unquote, unquote_to_bytes

from ..errors import InvalidDataUri, InvalidRow, RowError, UnsupportedSource
from ..types import URL_SCHEMES, FileImage, ImageRef, InlineImage, WebImage

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_URL = tuple(f"{scheme}://" for scheme in URL_SCHEMES)
_WHITESPACE = b" \t\n\r\f\v"
_MAX_MEDIA_TYPE = 60  # characters


def images_of(cell: Any, where: str) -> list[ImageRef]:
    """Return the images of a cell that holds one image or a list of them. Nulls in a list are skipped.

    Args:
        cell: The cell's value.
        where: The column, for error messages.

    Raises:
        InvalidRow, InvalidDataUri, UnsupportedSource: See `image_of`.
    """
    if isinstance(cell, list):
        return [image_of(item, f"{where}[{at}]") for at, item in enumerate(cell) if item is not None]
    return [] if cell is None else [image_of(cell, where)]


def image_of(value: Any, where: str) -> ImageRef:
    """Return the image that a value refers to: a URL, path, data URI, bytes, or Hugging Face's `{bytes, path}`.

    >>> image_of("https://example.org/cat.jpg", "image")
    WebImage(url='https://example.org/cat.jpg')

    Args:
        value: A value from a cell, or from a part of a message. Readers may also give a reference of their own, or
            the error why there is no image.
        where: Where the value was found, such as "images[2]", for error messages.

    Raises:
        InvalidRow: The value is of another type, or an empty string.
        InvalidDataUri: A data URI cannot be decoded.
        UnsupportedSource: The URL has a scheme that batchvl does not read.
        RowError: The value itself.
    """
    if isinstance(value, str):
        return _from_text(value, where)
    if isinstance(value, bytes):
        return InlineImage(value, f"{where} ({len(value)} bytes)")
    if isinstance(value, FileImage):
        return value
    if isinstance(value, RowError):
        raise value
    if isinstance(value, dict) and not value.keys().isdisjoint(("bytes", "path")):
        return _from_struct(value.get("bytes"), value.get("path"), where)
    raise InvalidRow(f"{where}: found {_kind(value)}, expected a URL, a path, a data URI, bytes or {{bytes, path}}")


def plain_value(cell: Any) -> Any:
    """Return the value of a cell that is not read as an image: a reader's own references as paths, its error as None.

    >>> plain_value(FileImage("a.tar#b.jpg", 512)), plain_value([FileImage("a.tar#b.jpg", 512)]), plain_value("text")
    ('a.tar#b.jpg', ['a.tar#b.jpg'], 'text')
    """
    if isinstance(cell, FileImage):
        return cell.path
    if isinstance(cell, list) and cell and isinstance(cell[0], FileImage):
        return [image.path for image in cell]
    return None if isinstance(cell, RowError) else cell


def _from_struct(data: Any, path: Any, where: str) -> ImageRef:
    if isinstance(data, bytes):
        # The path names where the image once was; only the bytes are read.
        return InlineImage(data, path if isinstance(path, str) and path else f"{where} ({len(data)} bytes)")
    if data is None and isinstance(path, str):
        return _from_text(path, where)
    raise InvalidRow(f"{where}: found {{bytes: {_kind(data)}, path: {_kind(path)}}}, expected bytes or a path")


def _from_text(text: str, where: str) -> ImageRef:
    head = text[:16].lstrip().lower()
    if head.startswith(_URL):
        return WebImage(text.strip())
    if head.startswith("data:"):
        return InlineImage(*decode_data_uri(text))
    if not text:
        raise InvalidRow(f"{where}: found an empty string, expected a URL or a path")
    if "\0" in text:
        raise InvalidRow(f"{where}: found a path with a NUL character")
    scheme = _SCHEME.match(text)
    if scheme is None:
        return FileImage(text)
    if scheme[1].lower() == "file":
        return _from_file_url(text[scheme.end() :], where)
    expected = ", ".join(URL_SCHEMES)
    raise UnsupportedSource(f"{where}: {scheme[1]}:// is not supported; expected {expected}, file, data or a path")


def _from_file_url(rest: str, where: str) -> FileImage:
    host, slash, path = rest.partition("/")
    if slash and host.lower() in ("", "localhost"):
        return FileImage("/" + unquote(path))
    raise UnsupportedSource(f"{where}: found a file URL of another host, expected file:///path")


def decode_data_uri(text: str) -> tuple[bytes, str]:
    """Return the contents of a `data:` URI (RFC 2397) and its description: media type and size.

    Whitespace between the characters of base64 is allowed, for URIs that were wrapped.

    >>> decode_data_uri("data:image/gif;base64,R0lG")
    (b'GIF', 'data:image/gif (3 bytes)')

    Raises:
        InvalidDataUri: Bad base64, missing padding, or broken percent-encoding.
    """
    scheme, colon, rest = text.strip().partition(":")
    head, comma, body = rest.partition(",")
    if scheme.lower() != "data" or not colon:
        raise InvalidDataUri(f"data URI: found {text[:16]!r}, expected it to begin with 'data:'")
    if not comma:
        raise InvalidDataUri("data URI: no comma between the media type and the data")
    media_type, *parameters = (piece.strip().lower() for piece in head.split(";"))
    data = _percent_decoded(body)
    if "base64" in parameters:
        data = _base64_decoded(data, len(body))
    return data, f"data:{media_type[:_MAX_MEDIA_TYPE]} ({len(data):,} bytes)"


def _percent_decoded(body: str) -> bytes:
    if "%" not in body:
        return body.encode()
    if broken := re.search("%(?![0-9A-Fa-f]{2})", body):
        raise InvalidDataUri(f"data URI: {body[broken.start() : broken.start() + 3]!r} is not a percent-encoding")
    return unquote_to_bytes(body)


def _base64_decoded(data: bytes, characters: int) -> bytes:
    try:
        data = data.translate(None, _WHITESPACE)
        if data.endswith(b"==="):  # strict_mode accepts this
            raise binascii.Error("Excess padding")
        return binascii.a2b_base64(data, strict_mode=True)
    except binascii.Error as error:
        raise InvalidDataUri(f"data URI: {characters:,} characters that are not base64: {error}") from None


def _kind(value: Any) -> str:
    return "null" if value is None else type(value).__name__
