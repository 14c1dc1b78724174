"""The head of HTTP/1.1 messages: requests as bytes, and status lines and header fields out of bytes (RFC 9112).

Of what a server may do wrong, harmless things are forgiven, as curl does. What parsers understand in different ways is
an error, or ends the connection after the response.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from multidict import CIMultiDict, CIMultiDictProxy

from ..urls import PORTS, Target
from .errors import ProtocolError

MAX_LENGTH = 2**62
"""Bytes of a body or of a chunk. A Content-Length beyond is taken for this one."""

_STATUS_LINE = re.compile(r"HTTP/(1\.0|1\.1|2|2\.0) ([1-9][0-9][0-9])(?![0-9])", re.ASCII | re.IGNORECASE)
_FOLD = re.compile(r"\n[ \t]+")
_TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")  # RFC 9110, section 5.6.2
_BREAK = re.compile(r"[\r\n\0]")
_NO_BODY = {101, 204, 304}
_TRANSFER_CODINGS = {"gzip", "x-gzip", "deflate"}
"""Besides chunked: those that a `BodyDecoder` knows."""


class Head(NamedTuple):
    """Status line and header of a response, and what they say about its body and its connection."""

    status: int
    headers: CIMultiDictProxy[str]
    """Values are UTF-8; other bytes are surrogate escapes."""
    codings: str
    """How the body is encoded, in this order: a list as in Content-Encoding. Few use Transfer-Encoding for it."""
    content_length: int | None
    """Bytes of the body; None for one in chunks, or until the end of the connection."""
    is_chunked: bool
    is_persistent: bool
    """Whether the connection can be used for another request afterwards."""

    @property
    def is_interim(self) -> bool:
        """Whether another response follows. Not so for 101, after which no HTTP follows."""
        return self.status < 200 and self.status != 101


def encode_request(target: Target, headers: Iterable[tuple[str, str]], *, to_proxy: bool = False) -> bytes:
    """Return a GET request.

    Args:
        target: Where it goes; its request target is sent as it is.
        headers: Names and values besides Host. Surrogate escapes become the bytes that they stand for.
        to_proxy: Whether the request target names scheme and host (RFC 9112, section 3.2.2).

    Raises:
        ValueError: A header has a line break or a NUL.
    """
    host = authority(target)
    form = f"{target.scheme}://{host}{target.target}" if to_proxy else target.target
    lines = [f"GET {form} HTTP/1.1\r\nHost: {host}\r\n"]
    for name, value in headers:
        if _BREAK.search(value) or not _TOKEN.fullmatch(name):
            raise ValueError("a line break in a header")
        lines.append(f"{name}: {value}\r\n")
    lines.append("\r\n")
    return "".join(lines).encode("utf-8", "surrogateescape")


def authority(target: Target, *, with_port: bool = False) -> str:
    """Return host and port as in a Host header, where a default port is left out unless `with_port`."""
    host = f"[{target.host.partition('%')[0]}]" if ":" in target.host else target.host
    if target.port == PORTS[target.scheme] and not with_port:
        return host
    return f"{host}:{target.port}"


def parse_head(data: bytes) -> Head:
    """Parse a status line and header fields, with the blank line at their end.

    Line ends may be bare, and lines folded. Fields without a valid name are left out; after these, as after all else
    that other parsers may understand in another way, the connection is not persistent.

    Raises:
        ProtocolError: They are not valid.
    """
    if b"\0" in data:
        raise ProtocolError("a NUL in the header")
    text = data.decode("utf-8", "surrogateescape").replace("\r\n", "\n")
    if "\r" in text:
        raise ProtocolError("a line of the header ends with a lone CR")
    status_line, *lines = _FOLD.sub(" ", text).rstrip("\n").split("\n")
    match = _STATUS_LINE.match(status_line)
    if match is None:
        raise ProtocolError("the status line is not valid")
    fields, is_regular = [], True
    for line in lines:
        name, colon, value = line.partition(":")
        if not colon:
            raise ProtocolError("a header field without a colon")
        if _TOKEN.fullmatch(name):
            fields.append((name, value.strip(" \t")))
        else:
            is_regular = False
    headers = CIMultiDictProxy(CIMultiDict(fields))
    return _frame(match[1], int(match[2]), headers, is_regular)


def _frame(version: str, status: int, headers: CIMultiDictProxy[str], is_regular: bool) -> Head:
    """Return where the body ends (RFC 9112, section 6.3) and whether the connection persists (section 9.3)."""
    length = _content_length(headers.getall("Content-Length", ()))
    codings = _split(headers.getall("Transfer-Encoding", ()))
    is_chunked = "chunked" in codings
    transformations = [coding for coding in codings if coding not in ("chunked", "identity", "")]
    if not _TRANSFER_CODINGS.issuperset(transformations):
        raise ProtocolError("a transfer coding that is not known")
    options = _split(headers.getall("Connection", ()))
    is_persistent = "close" not in options and (version == "1.1" or (version == "1.0" and "keep-alive" in options))
    if codings and (codings != ["chunked"] or length is not None or version != "1.1"):
        is_regular = False
    if status in _NO_BODY:
        is_chunked, length = False, 0
    elif is_chunked:
        length = None
    is_persistent = is_persistent and is_regular and status != 101 and (is_chunked or length is not None)
    all_codings = ", ".join([*headers.getall("Content-Encoding", ()), *transformations])
    return Head(status, headers, all_codings, length, is_chunked, is_persistent)


def _split(values: Sequence[str]) -> list[str]:
    return [part.strip(" \t") for value in values for part in value.lower().split(",")]


def _content_length(values: Sequence[str]) -> int | None:
    """Return the one length that all values agree on, if there are any. Raises ProtocolError."""
    if not values:
        return None
    lengths = {part.lstrip("0") if part.isascii() and part.isdigit() else None for part in _split(values)}
    digits = lengths.pop()
    if lengths or digits is None:
        raise ProtocolError("the Content-Length is not a number" if digits is None else "the Content-Lengths differ")
    return int(digits or "0") if len(digits) < len(str(MAX_LENGTH)) else MAX_LENGTH
