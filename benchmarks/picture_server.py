"""Any number of distinct pictures over HTTP, from a process of its own and for little CPU.

`GET /N.jpg` is picture N of benchmarks/pictures.py: one of the JPEGs of a folder, with N in its comment.
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

from benchmarks.pictures import comment, cut  # noqa: E402

BACKLOG = 1024


class PictureServer:
    """A server on 127.0.0.1, as a context: `folder` holds its JPEGs, which it takes in the order of their names."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __enter__(self) -> PictureServer:
        with socket.create_server(("127.0.0.1", 0), backlog=BACKLOG) as listening:  # who connects early waits there
            self.port = listening.getsockname()[1]
            command = [sys.executable, __file__, str(self._folder), str(listening.fileno())]
            self._process = subprocess.Popen(command, stdin=subprocess.PIPE, pass_fds=[listening.fileno()])
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.communicate()  # closes its standard input, upon which it ends

    @property
    def pid(self) -> int:
        return self._process.pid

    def url(self, number: int) -> str:
        """Of picture `number`."""
        return f"http://127.0.0.1:{self.port}/{number}.jpg"


class Pictures(asyncio.Protocol):
    """One connection, over which any number of requests may come."""

    def __init__(self, jpegs: list[tuple[bytes, bytes]]) -> None:
        self._jpegs = jpegs
        self._read = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._read += data
        while (end := self._read.find(b"\r\n\r\n")) >= 0:
            asked, self._read = self._read[:end], self._read[end + 4 :]
            self._answer(asked)

    def _answer(self, asked: bytes) -> None:
        wanted = re.match(rb"GET /(\d+)\.jpg ", asked)
        if wanted is None:
            self._transport.write(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")
            return
        number = int(wanted[1])
        head, tail = self._jpegs[number % len(self._jpegs)]
        note = comment(number)
        length = len(head) + len(note) + len(tail)
        status = b"HTTP/1.1 200 OK\r\nContent-Type: image/jpeg\r\nContent-Length: %d\r\n\r\n" % length
        self._transport.write(status + head + note)
        self._transport.write(tail)
        if b"\r\nconnection: close" in asked.lower():
            self._transport.close()


async def serve(jpegs: list[bytes], listening: socket.socket) -> None:
    """Serves until standard input is closed, as it is when whoever started this process ends."""
    parts = [cut(jpeg) for jpeg in jpegs]
    loop, done = asyncio.get_running_loop(), asyncio.Event()
    server = await loop.create_server(lambda: Pictures(parts), sock=listening)
    loop.add_reader(sys.stdin.fileno(), done.set)
    await done.wait()
    server.close()


if __name__ == "__main__":
    files = sorted(Path(sys.argv[1]).glob("*.jpg"))
    asyncio.run(serve([file.read_bytes() for file in files], socket.socket(fileno=int(sys.argv[2]))))
