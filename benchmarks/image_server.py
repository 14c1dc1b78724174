"""An HTTP server for any number of distinct images, in its own process and with little CPU.

`GET /N.jpg` returns image N of benchmarks/images.py: one of the JPEGs in a directory, with N in its comment.
"""

from __future__ import annotations

import asyncio
import re
import socket
import subprocess
import sys
from pathlib import Path
from types import TracebackType

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.images import comment, split_after_header  # noqa: E402

BACKLOG = 1024


class ImageServer:
    """A server on 127.0.0.1 that runs while its context is open.

    Args:
        directory: JPEGs, served in the order of their names.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def __enter__(self) -> ImageServer:
        # The socket listens before the process is up: early connections wait in its backlog.
        with socket.create_server(("127.0.0.1", 0), backlog=BACKLOG) as listener:
            self.port = listener.getsockname()[1]
            command = [sys.executable, __file__, str(self._directory), str(listener.fileno())]
            self._process = subprocess.Popen(command, stdin=subprocess.PIPE, pass_fds=[listener.fileno()])
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.communicate()  # closes its standard input, which ends it

    @property
    def pid(self) -> int:
        return self._process.pid

    def url(self, number: int) -> str:
        """Return the URL of image `number`."""
        return f"http://127.0.0.1:{self.port}/{number}.jpg"


class Connection(asyncio.Protocol):
    """One connection, with any number of requests."""

    def __init__(self, jpegs: list[tuple[bytes, bytes]]) -> None:
        self._jpegs = jpegs
        self._buffer = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        while (end := self._buffer.find(b"\r\n\r\n")) >= 0:
            request, self._buffer = self._buffer[:end], self._buffer[end + 4 :]
            self._respond(request)

    def _respond(self, request: bytes) -> None:
        match = re.match(rb"GET /(\d+)\.jpg ", request)
        if match is None:
            self._transport.write(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")
            return
        number = int(match[1])
        head, tail = self._jpegs[number % len(self._jpegs)]
        segment = comment(number)
        length = len(head) + len(segment) + len(tail)
        status = b"HTTP/1.1 200 OK\r\nContent-Type: image/jpeg\r\nContent-Length: %d\r\n\r\n" % length
        self._transport.write(status + head + segment)
        self._transport.write(tail)
        if b"\r\nconnection: close" in request.lower():
            self._transport.close()


async def serve(jpegs: list[bytes], listener: socket.socket) -> None:
    """Serve until standard input is closed, which happens when the parent process ends."""
    parts = [split_after_header(jpeg) for jpeg in jpegs]
    loop, closed = asyncio.get_running_loop(), asyncio.Event()
    server = await loop.create_server(lambda: Connection(parts), sock=listener, backlog=BACKLOG)
    loop.add_reader(sys.stdin.fileno(), closed.set)
    await closed.wait()
    server.close()


if __name__ == "__main__":
    files = sorted(Path(sys.argv[1]).glob("*.jpg"))
    asyncio.run(serve([file.read_bytes() for file in files], socket.socket(fileno=int(sys.argv[2]))))
