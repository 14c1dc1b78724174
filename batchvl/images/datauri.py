"""`data:` URIs (RFC 2397): pictures that a manifest carries as text."""

from __future__ import annotations

import binascii
import re
from urllib.parse import unquote_to_bytes

from ..errors import InvalidDataUri

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
