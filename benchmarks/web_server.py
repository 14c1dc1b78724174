"""A synthetic web on loopback: thousands of hosts, slow answers, and hosts and names that fail, with little CPU.

Every address of 127.0.0.0/8 is on this machine, so one socket serves as any number of hosts, each an address:

ok          `GET /N.jpg` returns image N of benchmarks/images.py after a delay that depends on N alone; so does what
            clients of object stores send for it
missing     the same hosts, but the answer is 404
limited     a host with a token bucket; beyond its rate it answers 429 at once, every other time with Retry-After
dead        addresses on a port that drops every SYN, so that connecting takes until the client gives up
refused     addresses on a port where nothing listens
unresolved  names under .invalid, which never resolve (RFC 6761, section 6.4)

With `silent_names`, the web has a name server, `NAME_SERVER`, which answers nothing.

Delays are lognormal. Requests on one connection are expected one at a time, as without pipelining.
"""

from __future__ import annotations

import asyncio
import re
import resource
import socket
import subprocess
import sys
import time
from hashlib import blake2b
from math import exp, log
from pathlib import Path
from random import Random
from statistics import NormalDist
from types import TracebackType
from typing import Literal, NamedTuple, cast

import msgspec
import uvloop

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.images import comment, photographs, split_after_header  # noqa: E402

NAME_SERVER = "127.5.0.1"

Kind = Literal["ok", "missing", "limited", "dead", "refused", "unresolved"]
SHARES: dict[Kind, float] = {"missing": 0.03, "limited": 0.05, "dead": 0.02, "refused": 0.02, "unresolved": 0.01}
"""Shares of the rows; all others are ok."""
BROKEN_HOSTS = 20
"""Number of dead hosts, and of hosts that refuse connections."""
LIMITED_HOST = "127.2.0.1"
RATE, BURST = 20.0, 5.0
"""Requests per second that the limited host answers, and how many of them may come at once."""

MEDIAN, P99 = 0.4, 8.0
"""Seconds between a request and its answer's headers."""
LONGEST = 30.0
"""Maximum of these seconds (0.04 % of the rows reach it), so that a patient client can have every image."""
_LOG_DELAY = NormalDist(log(MEDIAN), log(P99 / MEDIAN) / NormalDist().inv_cdf(0.99))

IMAGE_SIZE = (750, 562)
"""Width and height, with which a JPEG has 94 KB on average."""
PHOTOGRAPHS = 8
"""Number of JPEGs with different pixels."""
SEND_BUFFER = 256 * 1024
"""Bytes that a socket takes at once: more than a response, which a single call then sends."""


_METADATA = b'Last-Modified: Wed, 21 Oct 2015 07:28:00 GMT\r\nETag: "1"\r\n'
"""Headers without which clients of object stores accept nothing."""


class Row(NamedTuple):
    """A row of the web's manifest."""

    number: int
    """The number of its image, which is the number of the row in the whole web."""
    kind: Kind
    url: str


class Statistics(msgspec.Struct):
    """What the server has seen."""

    first: float | None = None
    """`time.monotonic()` at the first request."""
    images: int = 0
    """Images sent, apart from limited hosts'."""
    missing: int = 0
    """Answers with 404."""
    accepted: dict[str, int] = msgspec.field(default_factory=dict)
    """Requests answered with an image, by limited host."""
    rejected: dict[str, int] = msgspec.field(default_factory=dict)
    """Requests answered with 429, by limited host."""
    abandoned: int = 0
    """Requests whose connection the client closed before the answer."""
    connections: int = 0
    open: int = 0
    """Requests in progress."""
    most_open: int = 0
    cpu_seconds: float = 0.0


class WebServer:
    """The web while its context is open, served by one process.

    Args:
        latency: Factor for the delays; 0 for none.
        seed: Seed of the delays.
        silent_names: Whether there is a name server. It has a privileged port.
    """

    statistics: Statistics
    """What the server has seen; set once the context is closed."""

    def __init__(self, latency: float = 1.0, seed: int = 0, *, silent_names: bool = False) -> None:
        self._latency, self._seed, self._silent_names = latency, seed, silent_names

    def __enter__(self) -> WebServer:
        self._dead = socket.create_server(("0.0.0.0", 0), backlog=0)
        self._dead_fillers = _fill_backlog(self._dead)
        self._refusing = socket.socket()
        self._refusing.bind(("0.0.0.0", 0))  # without listen: the kernel refuses, and nobody else gets the port
        self._name_server = socket.socket(type=socket.SOCK_DGRAM)
        if self._silent_names:
            self._name_server.bind((NAME_SERVER, 53))
        with socket.create_server(("0.0.0.0", 0), backlog=_backlog()) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)  # accepted sockets inherit it
            self.port = listener.getsockname()[1]
            command = [sys.executable, __file__, str(listener.fileno()), str(self._latency), str(self._seed)]
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, pass_fds=[listener.fileno()]
            )
        assert self._process.stdout is not None
        if self._process.stdout.readline() != b"ready\n":
            raise RuntimeError("the web server has not started")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        output, _ = self._process.communicate()  # closes its standard input, which ends it
        self.statistics = msgspec.json.decode(output, type=Statistics)
        for sock in (self._dead, *self._dead_fillers, self._refusing, self._name_server):
            sock.close()

    @property
    def pid(self) -> int:
        return self._process.pid

    def rows(self, count: int, hosts: int, seed: int = 0) -> list[Row]:
        """Return the rows of a manifest, kinds and hosts in random order.

        Args:
            count: Number of rows.
            hosts: Number of hosts that answer without a limit.
            seed: Seed of the order.
        """
        kinds: list[Kind] = [kind for kind, share in SHARES.items() for _ in range(round(share * count))]
        kinds += ["ok"] * (count - len(kinds))
        rng = Random(seed)
        rng.shuffle(kinds)
        return [Row(number, kind, self._url(number, kind, rng.randrange(hosts))) for number, kind in enumerate(kinds)]

    def _url(self, number: int, kind: Kind, host: int) -> str:
        # Networks of their own, so that a host has one kind, whatever its port.
        broken = host % BROKEN_HOSTS + 1
        ok = f"http://127.1.{host // 250}.{host % 250 + 1}:{self.port}"
        return {
            "ok": f"{ok}/{number}.jpg",
            "missing": f"{ok}/missing/{number}.jpg",
            "limited": f"http://{LIMITED_HOST}:{self.port}/{number}.jpg",
            "dead": f"http://127.3.0.{broken}:{self._dead.getsockname()[1]}/{number}.jpg",
            "refused": f"http://127.4.0.{broken}:{self._refusing.getsockname()[1]}/{number}.jpg",
            "unresolved": f"http://no-such-host-{number}.invalid/{number}.jpg",
        }[kind]


def _fill_backlog(listener: socket.socket) -> list[socket.socket]:
    """Connect until the kernel drops a SYN, as it does while more connections than the backlog wait to be accepted."""
    fillers: list[socket.socket] = []
    while True:
        filler = socket.socket()
        filler.settimeout(0.2)
        try:
            filler.connect(("127.0.0.1", listener.getsockname()[1]))
        except TimeoutError:
            filler.close()
            return fillers
        fillers.append(filler)


def _backlog() -> int:
    return int(Path("/proc/sys/net/core/somaxconn").read_text())


def delay(number: int, seed: int = 0) -> float:
    """Return the seconds that image `number` takes.

    >>> delays = sorted(delay(number) for number in range(10_000))
    >>> [round(delays[rank], 1) for rank in (5_000, 9_900)]
    [0.4, 8.3]
    """
    digest = blake2b(b"%d" % number, digest_size=6, salt=seed.to_bytes(8)).digest()
    uniform = (int.from_bytes(digest) + 0.5) / 256**6
    return min(LONGEST, exp(_LOG_DELAY.inv_cdf(uniform)))


class TokenBucket:
    """Tokens that arrive at `rate` per second, of which at most `burst` are kept."""

    def __init__(self, rate: float, burst: float) -> None:
        self._rate, self._burst = rate, burst
        self._tokens, self._time = burst, time.monotonic()

    def take(self) -> bool:
        """Take a token if there is one."""
        now = time.monotonic()
        self._tokens = min(self._burst, self._tokens + self._rate * (now - self._time))
        self._time = now
        if self._tokens < 1:
            return False
        self._tokens -= 1
        return True


class Web:
    """What all connections share: the images, the delays, the limit and the statistics."""

    def __init__(self, jpegs: list[bytes], latency: float, seed: int) -> None:
        self.statistics = Statistics()
        self._latency, self._seed = latency, seed
        self._bucket = TokenBucket(RATE, BURST)
        self._parts: list[tuple[bytes, bytes]] = []
        for jpeg in jpegs:
            head, tail = split_after_header(jpeg)
            length = len(jpeg) + len(comment(0))
            headers = b"Content-Type: image/jpeg\r\nContent-Length: %d\r\n%b\r\n" % (length, _METADATA)
            self._parts.append((b"HTTP/1.1 200 OK\r\n" + headers + head, tail))

    def delay(self, number: int) -> float:
        return self._latency and self._latency * delay(number, self._seed)

    def image(self, number: int) -> bytes:
        """Return the response with image `number`."""
        head, tail = self._parts[number % len(self._parts)]
        return b"".join((head, comment(number), tail))

    def rejection(self, host: str) -> bytes | None:
        """Count a request to a limited host; return the response if it comes too early."""
        accepted, rejected = self.statistics.accepted, self.statistics.rejected
        if self._bucket.take():
            accepted[host] = accepted.get(host, 0) + 1
            return None
        rejected[host] = rejected.get(host, 0) + 1
        retry_after = b"Retry-After: 1\r\n" if rejected[host] % 2 else b""
        return b"HTTP/1.1 429 Too Many Requests\r\n%bContent-Length: 0\r\n\r\n" % retry_after


class Connection(asyncio.Protocol):
    """One connection, with any number of requests."""

    def __init__(self, web: Web) -> None:
        self._web, self._statistics = web, web.statistics
        self._loop = asyncio.get_running_loop()
        self._buffer = b""
        self._answer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is not derived from it
        self._host: str = transport.get_extra_info("sockname")[0]
        self._statistics.connections += 1

    def connection_lost(self, exc: Exception | None) -> None:
        if self._answer is not None:
            self._answer.cancel()
            self._statistics.open -= 1
            self._statistics.abandoned += 1

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        if self._answer is None and (end := self._buffer.find(b"\r\n\r\n")) >= 0:
            request, self._buffer = self._buffer[:end], self._buffer[end + 4 :]
            self._handle(request)

    def _handle(self, request: bytes) -> None:
        statistics = self._statistics
        if statistics.first is None:
            statistics.first = time.monotonic()
        match = re.match(rb"GET /(?:account/)?(?:night/)?(missing/)?(\d+)(?:\.|%2E)jpg[ ?]", request)
        if match is None:
            self._transport.write(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n")
            return
        missing, number = bool(match[1]), int(match[2])
        if self._host == LIMITED_HOST and (rejection := self._web.rejection(self._host)) is not None:
            self._transport.write(rejection)
            return
        statistics.open += 1
        statistics.most_open = max(statistics.most_open, statistics.open)
        close = b"\r\nconnection: close" in request.lower()
        # A timer for each answer, not a task: it costs a tenth.
        self._answer = self._loop.call_later(self._web.delay(number), self._respond, number, missing, close)

    def _respond(self, number: int, missing: bool, close: bool) -> None:
        self._answer = None
        self._statistics.open -= 1
        if missing:
            self._statistics.missing += 1
            self._transport.write(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")
        else:
            self._statistics.images += self._host != LIMITED_HOST
            self._transport.write(self._web.image(number))
        if close:
            self._transport.close()


async def serve(listener: socket.socket, latency: float, seed: int) -> Statistics:
    """Serve until standard input is closed, which happens when the parent process ends."""
    web = Web(photographs(IMAGE_SIZE, PHOTOGRAPHS), latency, seed)
    loop, closed = asyncio.get_running_loop(), asyncio.Event()
    # The backlog once more: asyncio calls listen with its own, of 100.
    server = await loop.create_server(lambda: Connection(web), sock=listener, backlog=_backlog())
    loop.add_reader(sys.stdin.fileno(), closed.set)
    cpu_seconds = time.process_time()
    print("ready", flush=True)
    await closed.wait()
    server.close()
    web.statistics.cpu_seconds = time.process_time() - cpu_seconds
    return web.statistics


def raise_file_limit() -> None:
    """Raise the limit of open files as far as it goes: every connection is a file."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


if __name__ == "__main__":
    raise_file_limit()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:  # half of the CPU per request
        statistics = runner.run(serve(socket.socket(fileno=int(sys.argv[1])), float(sys.argv[2]), int(sys.argv[3])))
    sys.stdout.buffer.write(msgspec.json.encode(statistics))
