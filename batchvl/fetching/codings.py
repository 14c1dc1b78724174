"""Content codings of a response's body (RFC 9110, section 8.4), decoded as it arrives and within a limit.

Requests ask for no coding, since images are compressed already, but some servers compress what they have regardless.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from types import ModuleType
from typing import Any, NamedTuple, Protocol

from ..errors import ConnectionFailed, TooManyBytes, UnsupportedEncoding
from .http import TransientError

ACCEPT_ENCODING = "identity"
"""Value of the Accept-Encoding header."""
PIECE_BYTES = 64 * 1024
"""About the size of the pieces that `BodyDecoder.feed` yields."""

_MAX_CODINGS = 2
_IGNORED = {"", "identity", "none"}
_ALIASES = {"x-gzip": "gzip"}
_LIBRARIES = {"br": ("brotli",), "zstd": ("compression.zstd", "backports.zstd")}
_EXTRA_BYTES = 64 * 1024
"""How much longer than what it decodes to an encoded body may be."""
_MAX_WINDOW_LOG = 23  # 8 MB, all that a server may use (RFC 9659, section 3); Zstandard itself allows 2 GB


class BodyDecoder:
    """Decodes a body piece by piece. Use it for one response.

    A body may consist of several gzip members or Zstandard frames; what follows them and is none, is ignored, as
    browsers do.

    Args:
        content_encoding: Value of the Content-Encoding header, of several such headers joined by commas.
        limit: Bytes of the decoded body (`--max-image-bytes`). Besides what was yielded, the decoder holds less than
            `PIECE_BYTES` and the windows of the codings.

    Raises:
        UnsupportedEncoding: A coding is unknown, or its library is not installed.

    >>> import gzip
    >>> decoder = BodyDecoder("gzip", limit=100)
    >>> b"".join(decoder.feed(gzip.compress(b"image")))
    b'image'
    >>> decoder.finish()
    """

    def __init__(self, content_encoding: str, limit: int) -> None:
        self.codings = _parse(content_encoding)
        """Names of the codings, in the order in which the server applied them; empty if the body is not encoded."""
        self._limit, self._decoded = limit, 0
        self._stages = [_Stage(name, limit + _EXTRA_BYTES) for name in reversed(self.codings)]

    def feed(self, chunk: bytes | memoryview) -> Iterator[bytes | memoryview]:
        """Yield what a chunk of the body decodes to, in pieces. Exhaust it before the next chunk.

        Raises:
            TooManyBytes: The decoded body is larger than the limit, or the encoded one much larger.
            TransientError: The body cannot be decoded.
        """
        for piece in _through(self._stages, chunk):
            self._decoded += len(piece)
            if self._decoded > self._limit:
                after = " after decoding" if self.codings else ""
                raise TooManyBytes(f"has more bytes than --max-image-bytes {self._limit:,}{after}")
            if piece:
                yield piece

    def finish(self) -> None:
        """Check that the body was complete. Raises TransientError if it ended too early."""
        for stage in self._stages:
            stage.finish()


def _parse(content_encoding: str) -> tuple[str, ...]:
    names = [name.strip().lower() for name in content_encoding.split(",")]
    codings = tuple(_ALIASES.get(name, name) for name in names if name not in _IGNORED)
    for coding in codings:
        if coding not in _CODINGS:
            raise UnsupportedEncoding(f"the server encoded the image as {coding[:20]!r}, which is not supported")
    if len(codings) > _MAX_CODINGS:
        raise UnsupportedEncoding(f"the server encoded the image {len(codings)} times, more than {_MAX_CODINGS}")
    return codings


def _through(stages: Sequence[_Stage], data: bytes | memoryview) -> Iterator[bytes | memoryview]:
    if not stages:
        yield data
        return
    for piece in stages[0].feed(data):
        yield from _through(stages[1:], piece)


class _Stage:
    """One coding of a body."""

    def __init__(self, name: str, max_bytes: int) -> None:
        self._name, self._coding = name, _CODINGS[name]()
        self._bytes_left = max_bytes
        self._decompressor: _Decompressor | None = None
        self._head = b""
        """Bytes that do not yet tell how to decode them."""
        self._streams = 0
        """Complete streams so far: gzip members, Zstandard frames."""
        self._has_ended = False

    def feed(self, data: bytes | memoryview) -> Iterator[bytes]:
        self._bytes_left -= len(data)
        if self._bytes_left < 0:
            raise TooManyBytes("has more bytes than --max-image-bytes, even before decoding")
        try:
            yield from self._decode(self._head + data)
        except self._coding.error:
            raise TransientError(ConnectionFailed(f"the body is garbled: it is not valid {self._name}")) from None

    def _decode(self, data: bytes) -> Iterator[bytes]:
        self._head = b""
        while data and not self._has_ended:
            if self._decompressor is None:
                if len(data) < self._coding.head_bytes:
                    self._head = data
                    return
                if self._streams and not data.startswith(self._coding.head):
                    self._has_ended = True
                    return
                self._decompressor = self._coding.create(data)
            yield from self._decompressor.decompress(data)
            if not self._decompressor.eof:
                return
            data = self._decompressor.unused_data
            self._decompressor = None
            self._streams += 1
            self._has_ended = not self._coding.head

    def finish(self) -> None:
        if self._decompressor is not None or (self._head and not self._streams):
            raise TransientError(ConnectionFailed(f"the body ends too early: its {self._name} data are incomplete"))


class _Decompressor(Protocol):
    """Decoder of one stream."""

    @property
    def eof(self) -> bool: ...

    @property
    def unused_data(self) -> bytes:
        """What follows the stream."""
        ...

    def decompress(self, data: bytes) -> Iterator[bytes]: ...


class _Coding(NamedTuple):
    create: Callable[[bytes], _Decompressor]
    """Makes the decoder of a stream that begins with these bytes."""
    error: type[Exception]
    head_bytes: int
    """How many bytes `create` has to know."""
    head: bytes
    """What further streams begin with; empty if there can be none."""


class _Zlib:
    def __init__(self, window_bits: int) -> None:
        self._inflater = zlib.decompressobj(window_bits)

    @property
    def eof(self) -> bool:
        return self._inflater.eof

    @property
    def unused_data(self) -> bytes:
        return self._inflater.unused_data

    def decompress(self, data: bytes) -> Iterator[bytes]:
        size = PIECE_BYTES
        while size == PIECE_BYTES:  # a shorter piece: there is no more
            piece = self._inflater.decompress(data, PIECE_BYTES)
            size, data = len(piece), self._inflater.unconsumed_tail
            yield piece


class _Brotli:
    unused_data = b""  # the library refuses what follows a stream

    def __init__(self, library: ModuleType) -> None:
        self._decompressor: Any = library.Decompressor()

    @property
    def eof(self) -> bool:
        return bool(self._decompressor.is_finished())

    def decompress(self, data: bytes) -> Iterator[bytes]:
        is_more = True
        while is_more:
            piece = self._decompressor.process(data, output_buffer_limit=PIECE_BYTES)
            data = b""
            is_more = len(piece) >= PIECE_BYTES or not self._decompressor.can_accept_more_data()
            yield piece


class _Zstandard:
    def __init__(self, library: ModuleType) -> None:
        options = {library.DecompressionParameter.window_log_max: _MAX_WINDOW_LOG}
        self._decompressor: Any = library.ZstdDecompressor(options=options)

    @property
    def eof(self) -> bool:
        return bool(self._decompressor.eof)

    @property
    def unused_data(self) -> bytes:
        return bytes(self._decompressor.unused_data)

    def decompress(self, data: bytes) -> Iterator[bytes]:
        yield self._decompressor.decompress(data, PIECE_BYTES)
        while not self._decompressor.needs_input and not self._decompressor.eof:
            yield self._decompressor.decompress(b"", PIECE_BYTES)


def _gzip() -> _Coding:
    magic = b"\x1f\x8b\x08"  # RFC 1952, section 2.3.1
    return _Coding(lambda _: _Zlib(zlib.MAX_WBITS | 16), zlib.error, len(magic), magic)


def _deflate() -> _Coding:
    """Return the coding "deflate": in the format of zlib, or without any, as some servers have it."""

    def create(head: bytes) -> _Zlib:
        is_zlib = head[0] & 0x8F == 8 and int.from_bytes(head[:2], "big") % 31 == 0  # RFC 1950, section 2.2
        return _Zlib(zlib.MAX_WBITS if is_zlib else -zlib.MAX_WBITS)

    return _Coding(create, zlib.error, 2, b"")


def _brotli() -> _Coding:
    library = _import("br")
    if not hasattr(library.Decompressor, "can_accept_more_data"):  # before 1.2: its output has no limit
        raise _not_installed("br")
    return _Coding(lambda _: _Brotli(library), library.error, 1, b"")


def _zstandard() -> _Coding:
    library, magic = _import("zstd"), b"\x28\xb5\x2f\xfd"  # RFC 8878, section 3.1.1
    return _Coding(lambda _: _Zstandard(library), library.ZstdError, len(magic), magic)


def _import(coding: str) -> ModuleType:
    for name in _LIBRARIES[coding]:
        try:
            return import_module(name)
        except ImportError:
            continue
    raise _not_installed(coding)


def _not_installed(coding: str) -> UnsupportedEncoding:
    return UnsupportedEncoding(f"the server encoded the image as {coding!r}: install batchvl[codings] to decode that")


_CODINGS: dict[str, Callable[[], _Coding]] = {"gzip": _gzip, "deflate": _deflate, "br": _brotli, "zstd": _zstandard}
