"""Fetching from many hosts, some of which are slow, dead or limited: real servers on addresses of their own."""

from __future__ import annotations

import asyncio
import gc
import logging
import random
import socket
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import pytest

from batchvl.config.options import RunOptions
from batchvl.errors import ConnectionFailed, FetchTimeout, HttpRetryable, RowError, TooLarge
from batchvl.fetching import bottleneck, dispatcher
from batchvl.fetching.download import Fetch, SetAside
from batchvl.fetching.fetcher import Fetcher
from batchvl.fetching.host import Host
from batchvl.ipc.arena import Arena
from batchvl.types import ImageRef, InlineImage, WebImage
from tests.faults.server import FaultServer
from tests.timing import scaled

BLOCK = 4096
BODY = bytes(range(256)) * 8
Answer = tuple[int, dict[str, str], bytes]
OK: Answer = (200, {}, BODY)


class Web:
    """A server with several addresses, each a host of its own.

    Args:
        answer: Called with host and path, returns status, headers and body.
        hosts: Number of addresses.
    """

    def __init__(self, answer: Callable[[str, str], Awaitable[Answer]], hosts: int = 1) -> None:
        self._answer = answer
        self.hosts = [f"127.0.{10 + number // 200}.{1 + number % 200}" for number in range(hosts)]
        self.times: dict[str, list[float]] = defaultdict(list)
        """Times of requests, by host."""
        self.paths: list[str] = []
        self.open: dict[str, int] = defaultdict(int)
        self.max_open: dict[str, int] = defaultdict(int)

    async def __aenter__(self) -> Web:
        first = await asyncio.start_server(self._serve, self.hosts[0], 0, backlog=1024)
        self.port: int = first.sockets[0].getsockname()[1]
        self._servers = [first]
        if self.hosts[1:]:
            self._servers.append(await asyncio.start_server(self._serve, self.hosts[1:], self.port, backlog=1024))
        return self

    async def __aexit__(self, *exc: object) -> None:
        for server in self._servers:
            server.close()

    def url(self, path: str, host: int = 0) -> str:
        return f"http://{self.hosts[host]}:{self.port}{path}"

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        host: str = writer.get_extra_info("sockname")[0]
        try:
            while line := await reader.readline():
                while (await reader.readline()).strip():
                    pass
                path = line.split()[1].decode()
                self.times[host].append(time.monotonic())
                self.paths.append(path)
                self.open[host] += 1
                self.max_open[host] = max(self.max_open[host], self.open[host])
                try:
                    status, headers, body = await self._answer(host, path)
                finally:
                    self.open[host] -= 1
                lines = [
                    f"HTTP/1.1 {status} .",
                    f"Content-Length: {len(body)}",
                    *(f"{n}: {v}" for n, v in headers.items()),
                ]
                writer.write("\r\n".join([*lines, "", ""]).encode() + body)
                await writer.drain()
        except (ConnectionError, asyncio.CancelledError):
            pass
        finally:
            writer.close()


async def always(host: str, path: str) -> Answer:
    return OK


@contextmanager
def dead_host(address: str = "127.0.9.1") -> Iterator[str]:
    """A host that never accepts: a listening socket whose backlog is full. Yields its address and port."""
    with socket.socket() as listener:
        listener.bind((address, 0))
        listener.listen(0)
        port = listener.getsockname()[1]
        fillers = [socket.socket() for _ in range(8)]
        for filler in fillers:
            filler.setblocking(False)
            filler.connect_ex((address, port))
        try:
            yield f"{address}:{port}"
        finally:
            for filler in fillers:
                filler.close()


def closed_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.10.1", 0))
        port: int = listener.getsockname()[1]
        return port


@asynccontextmanager
async def fetching(blocks: int = 512, backoff: float = 0.01, **options: Any) -> AsyncIterator[Fetcher]:
    """A fetcher for loopback. Checks at the end that nothing is left: no room, no task."""
    before = asyncio.all_tasks()
    arena = Arena(blocks, BLOCK)
    defaults: dict[str, Any] = {"allow_private": ["127.0.0.0/8"], "max_image_bytes": 64 * 1024}
    async with Fetcher(RunOptions.of(**(defaults | options)).fetch, arena, backoff=backoff) as fetcher:
        yield fetcher
    assert arena.free_blocks == blocks, "an extent was leaked"
    arena.close()
    left = {task for task in asyncio.all_tasks() - before if "Web._serve" not in repr(task)}
    assert not {task for task in left if "batchvl" in repr(task)}


class Rows:
    """Rows that are fetched, and what came of them."""

    def __init__(self, fetcher: Fetcher) -> None:
        self._fetcher = fetcher
        self.fetches: list[Fetch] = []
        self.ended: list[Fetch] = []
        self.seconds: dict[int, float] = {}
        """Time until a row ended, by the row's position."""
        self._change = asyncio.Event()

    def submit(self, *images: ImageRef | str, release: bool = True) -> Fetch:
        """Start to fetch a row; its room is released as soon as it is there."""
        started, position = time.monotonic(), len(self.fetches)

        def end(fetch: Fetch) -> None:
            self.ended.append(fetch)
            self.seconds[position] = time.monotonic() - started
            self._change.set()
            if release and fetch.fetched is not None:
                fetch.fetched.release()

        refs = [WebImage(image) if isinstance(image, str) else image for image in images]
        fetch = self._fetcher.submit(refs, end)
        self.fetches.append(fetch)
        return fetch

    async def wait(self, condition: Callable[[], object] | None = None, seconds: float = 20) -> None:
        """Wait until a condition holds; by default that all rows have ended."""
        async with asyncio.timeout(scaled(seconds)):
            while not (condition() if condition else len(self.ended) == len(self.fetches)):
                self._change.clear()
                try:
                    async with asyncio.timeout(0.05):
                        await self._change.wait()
                except TimeoutError:
                    pass

    @property
    def succeeded(self) -> int:
        return sum(fetch.fetched is not None for fetch in self.ended)

    def errors(self) -> list[RowError]:
        return [fetch.error for fetch in self.fetches if isinstance(fetch.error, RowError)]


async def test_a_dead_host_does_not_slow_others() -> None:
    async with Web(always, hosts=50) as web, fetching(fetch_timeout=scaled(30), host_patience=scaled(60)) as fetcher:
        with dead_host() as dead:
            rows = Rows(fetcher)
            dead_rows = [rows.submit(f"http://{dead}/{number}") for number in range(500)]
            for number in range(500):
                rows.submit(web.url(f"/{number}", host=number % 50))
            await rows.wait(lambda: rows.succeeded == 500, seconds=8)
            assert not any(fetch.is_done for fetch in dead_rows), "they still wait for their host"
            for fetch in dead_rows:
                fetcher.cancel(fetch)


async def test_many_dead_hosts_do_not_slow_others() -> None:
    """The first requests to them are more than may be in progress at the start."""
    limits = {"blocks": 8192, "fetch_timeout": scaled(30), "host_patience": scaled(60)}
    async with Web(always, hosts=50) as web, fetching(**limits) as fetcher:
        with dead_host("0.0.0.0") as dead:
            port = dead.partition(":")[2]
            rows = Rows(fetcher)
            dead_rows = [rows.submit(f"http://127.0.9.{1 + number % 60}:{port}/{number}") for number in range(600)]
            for number in range(500):
                rows.submit(web.url(f"/{number}", host=number % 50))
            await rows.wait(lambda: rows.succeeded == 500, seconds=8)
            assert not any(fetch.is_done for fetch in dead_rows)
            for fetch in dead_rows:
                fetcher.cancel(fetch)


@pytest.mark.parametrize("concurrency", [16, 2048], ids=["at the maximum", "below"])
async def test_waiting_for_dead_hosts_takes_no_cpu_time(monkeypatch: pytest.MonkeyPatch, concurrency: int) -> None:
    calls = 0
    dispatch = dispatcher.Dispatcher.dispatch

    def counted(self: dispatcher.Dispatcher) -> None:
        nonlocal calls
        calls += 1
        dispatch(self)

    monkeypatch.setattr(dispatcher.Dispatcher, "dispatch", counted)
    limits = {"blocks": 8192, "fetch_timeout": scaled(30), "fetch_concurrency": concurrency}
    async with fetching(**limits) as fetcher:
        with dead_host("0.0.0.0") as dead:
            port = dead.partition(":")[2]
            rows = Rows(fetcher)
            for number in range(1200):
                rows.submit(f"http://127.0.9.{1 + number % 240}:{port}/{number}")
            await asyncio.sleep(1.5)  # longer than it takes to notice that none ends
            before = calls
            await asyncio.sleep(1)
            assert calls - before < 50
            for fetch in rows.fetches:
                fetcher.cancel(fetch)


async def test_the_rows_of_a_host_that_does_not_respond_are_set_aside_when_patience_ends() -> None:
    patience = scaled(0.6)
    async with Web(always) as web, fetching(fetch_timeout=0.6, host_patience=patience) as fetcher:
        with dead_host() as dead:
            rows = Rows(fetcher)
            for number in range(300):
                rows.submit(f"http://{dead}/{number}")
            rows.submit(web.url("/cat"))
            await rows.wait()
            late = rows.submit(f"http://{dead}/late")
    assert rows.succeeded == 1
    errors = rows.errors()
    assert len(errors) == 301
    assert {error.code for error in errors} <= {ConnectionFailed.code, FetchTimeout.code}
    assert all(fetch.set_aside is SetAside.SILENT for fetch in rows.fetches if fetch.error is not None)
    assert "no answer from the host" in str(errors[0])
    assert f"{dead} has not responded for " in str(errors[0])
    assert late.is_done, "a host that is known not to respond keeps no row waiting"
    assert min(rows.seconds[number] for number in range(300)) >= patience


async def test_a_refused_connection_is_noticed_at_once_and_a_probe_notices_the_recovery() -> None:
    web = Web(always)
    port = closed_port()
    async with fetching(host_patience=scaled(30)) as fetcher:
        rows = Rows(fetcher)
        for number in range(50):
            rows.submit(f"http://127.0.10.1:{port}/{number}")
        await asyncio.sleep(1.5)  # a probe has failed too
        assert not rows.ended
        server = await asyncio.start_server(web._serve, "127.0.10.1", port)
        await rows.wait(seconds=20)
        server.close()
    assert rows.succeeded == 50
    assert len(web.paths) == 50


async def test_a_restart_of_a_server_in_the_middle_costs_seconds_and_no_row() -> None:
    """All connections break at once; the first probe a second later succeeds."""
    broken = asyncio.Event()

    async def answer(host: str, path: str) -> Answer:
        await asyncio.sleep(0.02)
        if path != "/first" and not broken.is_set():
            await asyncio.sleep(0.2)
            raise ConnectionResetError
        return OK

    async with Web(answer) as web, fetching(host_patience=scaled(20)) as fetcher:
        rows = Rows(fetcher)
        rows.submit(web.url("/first"))
        await rows.wait()
        for number in range(100):
            rows.submit(web.url(f"/{number}"))
        await asyncio.sleep(0.5)
        broken.set()
        await rows.wait(seconds=12)
    assert rows.succeeded == 101
    assert max(rows.seconds.values()) < scaled(8)


@pytest.mark.parametrize("status", [429, 503])
@pytest.mark.parametrize("retry_after", [False, True])
async def test_no_row_of_a_limited_host_is_lost(status: int, retry_after: bool) -> None:
    limit, tokens, last = 25.0, 25.0, time.monotonic()
    rejected = 0

    async def answer(host: str, path: str) -> Answer:
        nonlocal tokens, last, rejected
        now = time.monotonic()
        tokens, last = min(limit, tokens + limit * (now - last)), now
        if tokens < 1:
            rejected += 1
            return status, {"Retry-After": "1"} if retry_after else {}, b"slow down"
        tokens -= 1
        return OK

    async with Web(answer) as web, fetching(fetch_deadline=1, fetch_retries=0) as fetcher:
        rows, started = Rows(fetcher), time.monotonic()
        for number in range(200):
            rows.submit(web.url(f"/{number}"))
        await rows.wait(seconds=40)
        seconds = time.monotonic() - started
    assert rows.succeeded == 200, "rejections use up neither attempts nor time"
    assert rejected <= 60
    assert seconds <= scaled(3 * 200 / limit)


async def test_a_limited_host_has_its_turn_as_soon_as_its_rate_allows() -> None:
    async def answer(host: str, path: str) -> Answer:
        if path == "/limited" and web.paths.count("/limited") == 1:
            return 429, {}, b"slow down"
        await asyncio.sleep(0.02)
        return OK

    async with Web(answer, hosts=301) as web, fetching(fetch_concurrency=1) as fetcher:
        rows = Rows(fetcher)
        rows.submit(web.url("/limited"))
        await rows.wait(lambda: web.paths)
        for host in range(1, 301):
            rows.submit(web.url("/other", host))
        await rows.wait(seconds=60)
    assert rows.succeeded == 301
    assert web.paths.index("/limited", 1) < 250, "it did not wait for all others"


class RacingLoop(asyncio.SelectorEventLoop):
    """Each look at the clock finds that time has passed, as it may when the machine is busy."""

    _looks = 0

    def time(self) -> float:
        self._looks += 1
        return super().time() + self._looks * 1e-3


def test_time_that_passes_while_downloads_are_started_holds_up_nothing() -> None:
    async def main() -> int:
        async with Web(always, hosts=2) as web, fetching(host_rate=2000.0, fetch_per_host=64) as fetcher:
            rows = Rows(fetcher)
            for number in range(200):
                rows.submit(web.url(f"/{number}", number % 2))
            await rows.wait()
            return rows.succeeded

    with asyncio.Runner(loop_factory=RacingLoop) as runner:
        assert runner.run(main()) == 200


async def test_hosts_that_failed_are_forgotten_when_there_are_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatcher, "_MAX_HOSTS", 8)
    port = closed_port()
    async with Web(always) as web, fetching(host_patience="0.1s", fetch_retries=0) as fetcher:
        rows = Rows(fetcher)
        for number in range(200):
            rows.submit(f"http://127.0.{30 + number // 100}.{1 + number % 100}:{port}/cat")
            if number % 20 == 0:
                await rows.wait()
        await rows.wait()
        rows.submit(web.url("/cat"))
        await rows.wait()
        assert (rows.succeeded, len(rows.errors())) == (1, 200)
        gc.collect()
        assert sum(type(item) is Host for item in gc.get_objects()) <= 2 * 20


async def test_hosts_have_their_own_limit_of_concurrency() -> None:
    async def answer(host: str, path: str) -> Answer:
        await asyncio.sleep(0.02)
        return OK

    async with Web(answer, hosts=4) as web, fetching(fetch_per_host=3) as fetcher:
        rows = Rows(fetcher)
        for number in range(120):
            rows.submit(web.url(f"/{number}", host=number % 4))
        await rows.wait()
    assert rows.succeeded == 120
    assert set(web.max_open.values()) == {3}


@pytest.mark.parametrize(("hosts", "rate"), [(1, None), (8, None), (1, 50.0)], ids=["one host", "many", "its rate"])
async def test_a_host_that_most_images_wait_for_is_named(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, hosts: int, rate: float | None
) -> None:
    monkeypatch.setattr(bottleneck, "LOOK_SECONDS", 0.05)
    caplog.set_level(logging.INFO, "batchvl")

    async def answer(host: str, path: str) -> Answer:
        await asyncio.sleep(0.001 if rate else 0.05)
        return OK

    async with Web(answer, hosts=hosts) as web, fetching(fetch_per_host=4, host_rate=rate) as fetcher:
        rows = Rows(fetcher)
        for number in range(240):
            rows.submit(web.url(f"/{number}", host=number % hosts))
        await rows.wait()
    notes = [record.message for record in caplog.records if "--fetch-per-host" in record.message]
    if hosts == 1 and rate is None:
        [note] = notes
        assert f"images wait for {web.hosts[0]}" in note
        assert "from which 4 are fetched at a time" in note
    else:
        assert not notes


async def test_a_redirect_to_another_host_obeys_the_limits_of_that_host() -> None:
    async def answer(host: str, path: str) -> Answer:
        if host == web.hosts[-1]:
            await asyncio.sleep(0.05)
            return OK
        return 302, {"Location": web.url(path, host=-1)}, b""

    async with Web(answer, hosts=11) as web, fetching(fetch_per_host=2) as fetcher:
        rows = Rows(fetcher)
        for number in range(60):
            rows.submit(web.url(f"/{number}", host=number % 10))
        await rows.wait()
    assert rows.succeeded == 60
    assert web.max_open[web.hosts[-1]] == 2


async def test_a_redirect_to_a_host_that_does_not_respond_blames_that_host() -> None:
    port = closed_port()

    async def answer(host: str, path: str) -> Answer:
        return (302, {"Location": f"http://127.0.10.1:{port}{path}"}, b"") if path.startswith("/to") else OK

    async with Web(answer) as web, fetching(host_patience=0.2) as fetcher:
        rows = Rows(fetcher)
        for number in range(10):
            rows.submit(web.url(f"/to/{number}"))
        for number in range(10):
            rows.submit(web.url(f"/{number}"))
        await rows.wait()
    assert rows.succeeded == 10
    assert {error.code for error in rows.errors()} == {ConnectionFailed.code}
    assert all(f"redirects to http://127.0.10.1:{port}" in str(error) for error in rows.errors())


async def test_a_url_that_is_always_rejected_fails_and_does_not_slow_its_host() -> None:
    async def answer(host: str, path: str) -> Answer:
        return (503, {}, b"broken") if path.startswith("/poison") else OK

    async with Web(answer) as web, fetching() as fetcher:
        rows, started = Rows(fetcher), time.monotonic()
        for number in range(400):
            rows.submit(web.url(f"/poison/{number}" if number % 80 == 40 else f"/{number}"))
        await rows.wait(seconds=60)
        seconds = time.monotonic() - started
    assert rows.succeeded == 395
    assert {error.code for error in rows.errors()} == {HttpRetryable.code}
    assert not any(fetch.set_aside for fetch in rows.fetches)
    attempts = sum(path.startswith("/poison") for path in web.paths)
    assert attempts <= 5 * 10
    assert seconds <= scaled(30)  # 11 to 16, by how the pauses of its URLs fall


async def test_a_url_is_downloaded_once_for_rows_that_come_and_go() -> None:
    hold = asyncio.Event()

    async def answer(host: str, path: str) -> Answer:
        await hold.wait()
        return OK

    async with Web(answer) as web, fetching() as fetcher:
        rows = Rows(fetcher)
        first = rows.submit(web.url("/cat"))
        for _ in range(10):
            rows.submit(web.url("/cat"), web.url("/dog"))
        await rows.wait(lambda: len(web.paths) == 2)
        fetcher.cancel(first)
        rows.fetches.remove(first)
        hold.set()
        await rows.wait()
        rows.submit(web.url("/cat"))
        await rows.wait()
    assert rows.succeeded == 11
    assert sorted(web.paths) == ["/cat", "/dog"]


@pytest.mark.parametrize("steps", range(6))
async def test_cancelling_right_after_a_start_leaves_nothing(steps: int) -> None:
    """Whatever the attempt has done by then, and if it has not begun at all."""
    async with Web(always) as web, fetching(fetch_per_host=1) as fetcher:
        rows = Rows(fetcher)
        for number in range(20):
            fetch = rows.submit(web.url(f"/{number}"))
            for _ in range(steps):
                await asyncio.sleep(0)
            fetcher.cancel(fetch)
        rows.fetches.clear()
        rows.submit(web.url("/last"))
        await rows.wait(lambda: rows.ended, seconds=5)


@pytest.mark.parametrize("state", ["queued", "active", "body", "retry", "paused", "open", "room", "inline", "mixed"])
async def test_cancelling_in_every_state(state: str) -> None:
    reached = asyncio.Event()

    async def answer(host: str, path: str) -> Answer:
        if state == "retry":
            reached.set()
            return 500, {}, b""
        if state == "paused":
            reached.set()
            return 429, {"Retry-After": "50"}, b""
        if state in ("queued", "active"):
            reached.set()
            await asyncio.sleep(60)
        return OK

    async with Web(answer) as web, FaultServer() as faulty, fetching(blocks=16, backoff=50) as fetcher:
        rows = Rows(fetcher)
        occupant = None
        if state in ("room", "inline", "mixed"):
            occupant = rows.submit(InlineImage(bytes(16 * BLOCK), "inline"), release=False)
            await rows.wait()
            reached.set()
        inline = InlineImage(bytes(2 * BLOCK), "inline")
        url = f"http://127.0.10.1:{closed_port()}/" if state == "open" else web.url("/")
        if state == "open":
            reached.set()
        if state == "body":
            url = faulty.url("/silent/body?")
            reached.set()
        fetches = [
            rows.submit(*{"inline": [inline], "mixed": [inline, f"{url}{n}"]}.get(state, [f"{url}{n}"]))
            for n in range(40)
        ]
        await reached.wait()
        await asyncio.sleep(0.1)
        assert not any(fetch.is_done for fetch in fetches)
        for fetch in random.Random(1).sample(fetches, len(fetches)):
            fetcher.cancel(fetch)
        await asyncio.sleep(0.05)
        assert fetcher.waiting == fetcher.waiting_bytes == 0
        if occupant is not None:
            occupant.result().release()
        free = rows.submit(InlineImage(bytes(16 * BLOCK), "inline"))
        await rows.wait(lambda: free.is_done, seconds=5)


async def test_ten_thousand_parked_rows_are_cancelled_and_set_aside_at_once() -> None:
    async def answer(host: str, path: str) -> Answer:
        return 429, {"Retry-After": "50"}, b""

    async with Web(answer, hosts=2) as web, fetching() as fetcher:
        rows = Rows(fetcher)
        for number in range(20_000):
            rows.submit(web.url(f"/{number}", host=number % 2))
        await rows.wait(lambda: len(web.times) == 2)
        await asyncio.sleep(0.2)
        started = time.monotonic()
        while fetcher.set_aside() and fetcher.waiting > 15_000:
            pass
        for fetch in rows.fetches:
            fetcher.cancel(fetch)
        assert time.monotonic() - started < scaled(2)
        assert not fetcher.waiting


async def test_rows_that_hold_images_while_a_host_pauses_make_room_for_others() -> None:
    """The arena holds three images. The first rows have one each, and wait for the other from a host that pauses."""
    rejections = 0

    async def answer(host: str, path: str) -> Answer:
        nonlocal rejections
        if host == web.hosts[1]:
            rejections += 1
            return (429, {"Retry-After": "2"}, b"") if rejections == 1 else OK
        return 200, {}, bytes(5 * BLOCK)

    async with Web(answer, hosts=2) as web, fetching(blocks=16) as fetcher:
        rows = Rows(fetcher)
        cpu = time.process_time()
        for number in range(6):
            rows.submit(web.url(f"/{number}"), web.url(f"/{number}", host=1))
        await rows.wait(seconds=15)
        assert time.process_time() - cpu < 1.5, "it waits instead of turning in circles"
        assert len(web.times[web.hosts[0]]) <= 30
    assert rows.succeeded == 6


async def test_rows_with_images_on_two_hosts_finish_in_a_tight_arena() -> None:
    randomness = random.Random(3)

    async def answer(host: str, path: str) -> Answer:
        await asyncio.sleep(randomness.uniform(0, 0.01))
        return 200, {}, bytes(randomness.choice([1, 3, 5]) * BLOCK)

    async with Web(answer, hosts=5) as web, fetching(blocks=16) as fetcher:
        rows = Rows(fetcher)
        for number in range(60):
            rows.submit(*(web.url(f"/{number}", host=host) for host in randomness.sample(range(5), 3)))
        await rows.wait(seconds=30)
    assert rows.succeeded == 60


async def test_inline_images_that_fit_in_bytes_and_not_in_blocks_are_too_large() -> None:
    async with fetching(blocks=4) as fetcher:
        rows = Rows(fetcher)
        rows.submit(*(InlineImage(b"tiny", "inline") for _ in range(5)))
        await rows.wait(seconds=3)
        assert isinstance(rows.fetches[0].error, TooLarge)


async def test_a_row_with_inline_and_web_images_on_a_paused_host_holds_up_no_other_row() -> None:
    async def answer(host: str, path: str) -> Answer:
        return (429, {"Retry-After": "50"}, b"") if host == web.hosts[0] else OK

    async with Web(answer, hosts=2) as web, fetching() as fetcher:
        rows = Rows(fetcher)
        inline = InlineImage(b"inline", "inline")
        paused = [rows.submit(inline, web.url("/cat")) for _ in range(3)]
        for number in range(20):
            rows.submit(inline, web.url(f"/{number}", host=1))
        await rows.wait(lambda: rows.succeeded == 20, seconds=5)
        assert fetcher.is_hungry, "more rows may be read"
        for fetch in paused:
            fetcher.cancel(fetch)


async def test_rows_with_inline_and_web_images_are_fetched_concurrently() -> None:
    async def answer(host: str, path: str) -> Answer:
        await asyncio.sleep(0.2)
        return OK

    async with Web(answer, hosts=20) as web, fetching() as fetcher:
        rows = Rows(fetcher)
        inline = InlineImage(b"inline", "inline")
        for number in range(40):
            rows.submit(inline, web.url(f"/{number}", host=number % 20))
        await rows.wait(seconds=4)
    assert rows.succeeded == 40


async def test_inline_images_wait_for_room_without_emptying_the_arena_first() -> None:
    """While a download waits for room, and a row with an inline image too, both get on as soon as there is some."""

    async def answer(host: str, path: str) -> Answer:
        return 200, {}, bytes(4 * BLOCK)

    async with Web(answer) as web, fetching(blocks=16) as fetcher:
        rows = Rows(fetcher)
        held = [rows.submit(InlineImage(bytes(4 * BLOCK), "inline"), release=False) for _ in range(4)]
        await rows.wait()
        download = rows.submit(web.url("/cat"))
        await rows.wait(lambda: fetcher._dispatcher.is_blocked)
        inline = rows.submit(InlineImage(bytes(4 * BLOCK), "inline"))
        held[0].result().release()
        await rows.wait(lambda: download.is_done and inline.is_done, seconds=3)
        for fetch in held[1:]:
            fetch.result().release()


async def test_time_spent_on_probes_is_not_blamed_on_the_host_again() -> None:
    """A host that is down for longer than --fetch-deadline, but not longer than --host-patience."""
    async with fetching(fetch_timeout=0.9, fetch_deadline=1, host_patience=scaled(60)) as fetcher:
        rows = Rows(fetcher)
        with dead_host() as dead:
            host, _, port = dead.partition(":")
            rows.submit(f"http://{dead}/cat")
            await asyncio.sleep(8)
        web = Web(always)
        server = await asyncio.start_server(web._serve, host, int(port))
        await rows.wait(lambda: rows.ended, seconds=15)
        server.close()
    assert rows.succeeded == 1


async def test_a_probe_that_is_answered_with_an_error_closes_the_breaker() -> None:
    """Any complete response shows that the host is up again."""
    port = closed_port()

    async def answer(host: str, path: str) -> Answer:
        await asyncio.sleep(0.05)
        return (500, {}, b"") if int(path[1:]) % 2 else OK

    web = Web(answer)
    async with fetching(fetch_retries=0, host_patience=scaled(30)) as fetcher:
        rows = Rows(fetcher)
        for number in range(1, 61):
            rows.submit(f"http://127.0.10.1:{port}/{number}")
        await asyncio.sleep(0.3)
        server = await asyncio.start_server(web._serve, "127.0.10.1", port)
        await rows.wait(seconds=15)
        server.close()
    assert rows.succeeded == 30
    assert max(web.max_open.values()) >= 4


@pytest.mark.slow
@pytest.mark.timeout(150)
@pytest.mark.parametrize("seed", range(4))
async def test_anything_at_once(seed: int) -> None:
    """Random rows, faults, sizes, cancellations and releases in a small arena: every row ends, with its own images."""
    random_numbers = random.Random(seed)

    def size(path: str) -> int:
        return random.Random(path).choice([100, 3000, BLOCK, 3 * BLOCK, 7 * BLOCK])

    def body(path: str) -> bytes:
        return (path.encode() * (size(path) // len(path) + 1))[: size(path)]

    async def answer(host: str, path: str) -> Answer:
        await asyncio.sleep(random_numbers.expovariate(100))
        fault = random_numbers.random()
        if fault < 0.03:
            return 500, {}, b""
        if fault < 0.05:
            return 429, {"Retry-After": "1"} if fault < 0.035 else {}, b""
        if fault < 0.08:
            raise ConnectionResetError
        if fault < 0.12:
            return 302, {"Location": web.url(path, host=random_numbers.randrange(12))}, b""
        if path.endswith("7"):
            return 404, {}, b""
        return 200, {}, body(path)

    async with Web(answer, hosts=12) as web, fetching(blocks=24, host_patience=3) as fetcher:
        arena, held, ended, cancelled = fetcher._arena, [], 0, 0
        change = asyncio.Event()

        def end(fetch: Fetch) -> None:
            nonlocal ended
            ended += 1
            change.set()
            if fetch.fetched is not None:
                held.append(fetch)
            else:
                assert isinstance(fetch.error, RowError)

        def release(fetch: Fetch) -> None:
            fetched = fetch.result()
            for image, extent in zip(fetch.images, fetched.extents, strict=True):
                assert extent is not None
                data = bytes(arena.at(extent))
                if isinstance(image, WebImage):
                    assert data == body("/" + image.url.rpartition("/")[2])
                else:
                    assert isinstance(image, InlineImage)
                    assert data == image.data
            fetched.release()

        waiting: dict[int, Fetch] = {}
        deadline = time.monotonic() + 15
        while time.monotonic() < deadline:
            for _ in range(random_numbers.randrange(6)):
                if fetcher.waiting > 150:
                    break
                images: list[ImageRef] = []
                for _ in range(random_numbers.choice([1, 1, 1, 2, 3])):
                    if random_numbers.random() < 0.15:
                        images.append(
                            InlineImage(random_numbers.randbytes(random_numbers.randrange(1, 3 * BLOCK)), "inline")
                        )
                    else:
                        path = f"/{random_numbers.randrange(3000)}"
                        images.append(WebImage(web.url(path, host=random_numbers.randrange(12))))
                fetch = fetcher.submit(images, end)
                waiting[fetch.number] = fetch
            waiting = {number: fetch for number, fetch in waiting.items() if not fetch.is_done}
            if waiting and random_numbers.random() < 0.2:
                fetch = waiting.pop(random_numbers.choice(list(waiting)))
                fetcher.cancel(fetch)
                cancelled += 1
            if random_numbers.random() < 0.05:
                fetcher.set_aside()
            while held and random_numbers.random() < 0.7:
                release(held.pop(random_numbers.randrange(len(held))))
            await asyncio.sleep(random_numbers.choice([0, 0, 0.001, 0.01]))
        async with asyncio.timeout(scaled(90)):
            while fetcher.waiting or held:
                while held:
                    release(held.pop())
                change.clear()
                try:
                    async with asyncio.timeout(0.1):
                        await change.wait()
                except TimeoutError:
                    pass
        assert ended + cancelled == fetcher._next_number
        assert ended > 100
        await asyncio.sleep(0.1)
        assert not fetcher._dispatcher.active
        assert fetcher._cache.private_bytes == fetcher.waiting_bytes == 0
