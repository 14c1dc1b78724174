"""HTTP/1.1 responses out of bytes, without I/O (RFC 9112).

A connection is used again only where all parsers agree on the end of a response: no byte of it may become the answer
to another request.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from .errors import Disconnected, IncompleteBody, ProtocolError
from .head import MAX_LENGTH, Head, parse_head

MAX_HEAD_BYTES = 64 * 1024
"""Of status lines, header fields and trailers, those of interim responses included; also of the line before a chunk."""

_BLOCK = 1024
_VERSION = b"HTTP/"
_HEAD_END = re.compile(rb"\n\r?\n")
_CHUNK_LINE = re.compile(rb"([0-9A-Fa-f]{1,64})[ \t]*(?:;[^\r\n]*)?\r\n")


class ResponseParser:
    """Parses one response as its bytes arrive, in pieces of any size (RFC 9112).

    Interim responses are skipped. A response with status 101 is taken for the final one.
    """

    __slots__ = ("_line", "_remaining", "_spent", "_step", "body", "has_begun", "head", "is_complete", "is_reusable")

    def __init__(self) -> None:
        self.head: Head | None = None
        self.body = bytearray()
        """What has arrived of the body, until `take_body`."""
        self.has_begun = False
        self.is_complete = False
        self.is_reusable = False
        """Whether the connection can be used for another request, once the response is complete."""
        self._spent = 0
        """Bytes of heads and trailers so far."""
        self._line = bytearray()
        """The beginning of a head or of a line."""
        self._remaining = 0
        """Bytes of the body, or of the chunk."""
        # A function instead of a bound method, which would make a reference cycle for each response.
        self._step: Callable[[ResponseParser, memoryview], memoryview] = ResponseParser._read_head

    def feed(self, data: memoryview) -> None:
        """Parse the next bytes. What is beyond the response is dropped. Raises ProtocolError."""
        self.has_begun = True
        while data:
            if self.is_complete:
                self.is_reusable = False
                return
            data = self._step(self, data)

    def feed_end(self, error: OSError | None) -> None:
        """Take note of the end of the connection.

        Args:
            error: What broke it, if it did not end in an orderly manner.

        Raises:
            Disconnected: There is no response.
            IncompleteBody: The body is incomplete.
        """
        if self.head is None:
            raise Disconnected(error, has_begun=self.has_begun)
        if error is not None or self._step is not ResponseParser._read_until_end:
            raise IncompleteBody(error)
        self.is_complete = True

    def take_body(self) -> memoryview:
        """Return what has arrived of the body since the last call."""
        body, self.body = self.body, bytearray()
        return memoryview(body)

    def _read_head(self, data: memoryview) -> memoryview:
        line = self._line
        if not line and data[0] in b"\r\n":  # a blank line before the status line
            self._spend(1)
            return data[1:]
        searched = max(0, len(line) - 2)
        line += data[:_BLOCK]
        if not _VERSION.startswith(line[: len(_VERSION)].upper()):
            raise ProtocolError("the response does not begin like HTTP/1")
        match = _HEAD_END.search(line, searched)
        if match is None:
            self._spend(0, len(line))
            return data[_BLOCK:]
        rest = data[min(_BLOCK, len(data)) - (len(line) - match.end()) :]
        self._spend(match.end())
        head = parse_head(bytes(line[: match.end()]))
        line.clear()
        if not head.is_interim:
            self._begin_body(head)
        return rest

    def _begin_body(self, head: Head) -> None:
        self.head, self.is_reusable = head, head.is_persistent
        if head.is_chunked:
            self._step = ResponseParser._read_chunk_line
        elif head.content_length is None:
            self._step = ResponseParser._read_until_end
        else:
            self._remaining = head.content_length
            self.is_complete = not self._remaining
            self._step = ResponseParser._read_counted

    def _read_until_end(self, data: memoryview) -> memoryview:
        self.body += data
        return data[len(data) :]

    def _read_counted(self, data: memoryview) -> memoryview:
        data = self._read_remaining(data)
        self.is_complete = not self._remaining
        return data

    def _read_chunk_line(self, data: memoryview) -> memoryview:
        data = self._read_line(data)
        line = self._line
        if line.endswith(b"\n"):
            match = _CHUNK_LINE.fullmatch(line)
            if match is None or (size := int(match[1], 16)) > MAX_LENGTH:
                raise ProtocolError("a chunk's size is not valid")
            self._remaining = size
            self._step = ResponseParser._read_chunk if size else ResponseParser._read_trailer
            self._line = bytearray()
        return data

    def _read_chunk(self, data: memoryview) -> memoryview:
        data = self._read_remaining(data)
        if not self._remaining:
            self._step = ResponseParser._read_chunk_end
        return data

    def _read_chunk_end(self, data: memoryview) -> memoryview:
        self._line += data[:1]
        if not b"\r\n".startswith(self._line):
            raise ProtocolError("a chunk does not end where its size says")
        if len(self._line) == 2:
            self._line.clear()
            self._step = ResponseParser._read_chunk_line
        return data[1:]

    def _read_trailer(self, data: memoryview) -> memoryview:
        data = self._read_line(data)
        line = self._line
        if line.endswith(b"\n"):
            if not line.endswith(b"\r\n"):
                raise ProtocolError("a line of the trailer does not end with CRLF")
            self._spend(len(line))
            self.is_complete = len(line) == 2
            line.clear()
        return data

    def _read_remaining(self, data: memoryview) -> memoryview:
        piece = data[: self._remaining]
        self.body += piece
        self._remaining -= len(piece)
        return data[len(piece) :]

    def _read_line(self, data: memoryview) -> memoryview:
        block = bytes(data[:_BLOCK])
        end = block.find(b"\n") + 1 or len(block)
        self._line += block[:end]
        self._spend(0, len(self._line))
        return data[end:]

    def _spend(self, count: int, pending: int = 0) -> None:
        self._spent += count
        if self._spent + pending > MAX_HEAD_BYTES:
            raise ProtocolError(f"the header is larger than {MAX_HEAD_BYTES // 1024} KB")
