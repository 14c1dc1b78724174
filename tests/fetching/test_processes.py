"""Fetching by processes: what they are told, what they write where, and what happens when they die."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import tempfile
import zlib
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager, closing
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import pytest
import pytest_asyncio

from batchvl.config.options import RunOptions
from batchvl.errors import (
    ConnectionFailed,
    EngineLost,
    FetchError,
    FetchTimeout,
    HttpRetryable,
    HttpStatus,
    InvalidUrl,
    OptionError,
)
from batchvl.fetching.fetcher import Fetcher
from batchvl.fetching.http import Rejected, TransientError
from batchvl.fetching.http1.errors import ProxyError
from batchvl.fetching.image_cache import NoRoom
from batchvl.fetching.processes import process as process_module
from batchvl.fetching.processes.messages import Failed
from batchvl.fetching.processes.pool import ProcessPool
from batchvl.ipc.arena import Arena
from batchvl.types import WebImage
from tests.faults.proxy import ForwardProxy
from tests.faults.server import JUNK, FaultServer
from tests.fetching.objects import fetch_one
from tests.manifest.writing import write
from tests.runner.running import PATIENCE, command, environment, make_image
from tests.timing import scaled

BLOCK = 4096
LIMIT = 1 << 20
BLOCKS = 1024


@pytest_asyncio.fixture
async def server() -> AsyncIterator[FaultServer]:
    async with FaultServer() as server:
        server.images["cat"] = JUNK
        server.images["dog"] = JUNK[::-1]
        yield server


class Fetching(NamedTuple):
    fetcher: Fetcher
    arena: Arena
    pool: ProcessPool

    async def get(self, url: str) -> bytes:
        return await fetch_one(self.fetcher, self.arena, url)


@asynccontextmanager
async def fetching(count: int = 1, blocks: int = BLOCKS, **options: Any) -> AsyncIterator[Fetching]:
    """A fetcher with processes. Checks at the end that nothing of the arena is reserved and no process is left."""
    defaults: dict[str, Any] = {"allow_private": ["127.0.0.0/8"], "max_image_bytes": LIMIT, "fetch_timeout": scaled(10)}
    defaults["fetch_processes"] = count
    limits = RunOptions.of(**(defaults | options)).fetch
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(asyncio.timeout(PATIENCE))
        arena = stack.enter_context(closing(Arena(blocks, BLOCK)))
        log = stack.enter_context(tempfile.NamedTemporaryFile())  # noqa: SIM115 - the stack closes it
        pool = ProcessPool(limits, arena, log)
        async with Fetcher(limits, arena, pool, backoff=0.01) as fetcher:
            yield Fetching(fetcher, arena, pool)
        assert arena.free_blocks == blocks, "an extent was leaked"
    assert not any(map(psutil.pid_exists, pool.pids))


def start(arguments: list[str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(arguments, stderr=subprocess.PIPE, env=environment())


async def until(is_so: Callable[[], object]) -> None:
    """Wait until something is so."""
    while not is_so():
        await asyncio.sleep(0.005)


async def test_images_of_known_and_unknown_length_arrive(server: FaultServer) -> None:
    async with fetching(2) as web:
        urls = ["/image/cat", "/image/cat?length=no", "/image/dog", "/image/dog?length=no", "/flaky/500/2"]
        bodies = await asyncio.gather(*(web.get(server.url(url)) for url in urls))
        assert bodies == [JUNK, JUNK, JUNK[::-1], JUNK[::-1], JUNK]


async def test_the_processes_share_the_hosts() -> None:
    async with AsyncExitStack() as stack:
        servers = [await stack.enter_async_context(FaultServer()) for _ in range(8)]
        web = await stack.enter_async_context(fetching(2))
        for server in servers:
            server.images["cat"] = JUNK
            assert await web.get(server.url("/image/cat")) == JUNK
        for pid in web.pool.pids:
            connections = psutil.Process(pid).net_connections("tcp")
            ports = {connection.raddr.port for connection in connections if connection.raddr}
            number = web.pool.pids.index(pid)
            assert ports == {s.port for s in servers if zlib.crc32(f"127.0.0.1:{s.port}".encode()) % 2 == number}


async def test_redirects_lead_on(server: FaultServer) -> None:
    async with fetching(2) as web:
        assert await web.get(server.url("/redirect?to=/image/cat&hops=3")) == JUNK


async def test_there_is_no_room_until_another_image_is_released(server: FaultServer) -> None:
    server.images["large"] = bytes(range(256)) * 2500
    async with fetching(blocks=200) as web:
        first = await web.fetcher.fetch([WebImage(server.url("/image/large"))])
        second = asyncio.create_task(web.get(server.url("/image/large?length=no")))
        third = asyncio.create_task(web.get(server.url("/image/large?again=1")))
        await until(lambda: server.requests.total() >= 2)
        assert not second.done()
        first.release()
        assert await second == await third == server.images["large"]


async def test_what_cannot_be_fetched_has_the_error_it_has_without_processes(server: FaultServer) -> None:
    async with fetching(fetch_retries=1, host_patience=0) as web:
        cases: list[tuple[str, type[FetchError], str]] = [
            (server.url("/status/404"), HttpStatus, "HTTP status 404"),
            (server.url("/status/500"), HttpRetryable, "after 2 attempts"),
            (server.url("/flaky/429/1?after=3600"), HttpRetryable, "3,600 s"),
            ("http://127.0.0.1:9/x", ConnectionFailed, "refused"),
            ("http://127.0.0.1/\ud800", InvalidUrl, "not a valid URL"),
        ]
        for url, kind, text in cases:
            with pytest.raises(kind, match=text):
                await web.get(url)


@pytest.mark.parametrize(
    "error",
    [
        HttpStatus("gone"),
        TransientError(FetchTimeout("late"), blames_host=True),
        TransientError(FetchTimeout("late")),
        Rejected(HttpRetryable("busy"), 3.5),
        NoRoom(77),
        ProxyError("http://proxy:1", "is not reached"),
        OptionError("--proxy: wrong"),
    ],
)
def test_errors_stay_as_they_are(error: Exception) -> None:
    copy = Failed.of(1, error).as_error()
    assert type(copy) is type(error)
    assert str(copy) == str(error)
    for name in ("blames_host", "retry_after", "needed"):
        assert getattr(copy, name, None) == getattr(error, name, None)
    if isinstance(error, TransientError):
        assert isinstance(copy, TransientError)
        assert type(copy.error) is type(error.error)


async def test_what_processes_fetch_is_kept_on_the_disk(server: FaultServer, tmp_path: Path) -> None:
    server.images["dog"] = make_image(tmp_path / "dog.png", 1).read_bytes()
    for _ in range(2):
        async with fetching(cache=str(tmp_path / "cache")) as web:
            assert await web.get(server.url("/image/dog")) == server.images["dog"]
    assert server.requests["/image/dog"] == 1


async def test_room_is_not_reused_while_a_process_may_write_to_it(server: FaultServer) -> None:
    """The process is held up with half of an image written, so it cannot know that the image is not wanted any more."""
    async with fetching() as web:
        image = asyncio.create_task(web.get(server.url("/drip")))
        await until(lambda: web.arena.free_blocks < BLOCKS)
        [pid] = web.pool.pids
        os.kill(pid, signal.SIGSTOP)
        image.cancel()
        await asyncio.gather(image, return_exceptions=True)
        for _ in range(20):
            await asyncio.sleep(0.01)
            assert web.arena.free_blocks < BLOCKS, "its room is free, and the process has not let go of it"
        os.kill(pid, signal.SIGCONT)
        await until(lambda: web.arena.free_blocks == BLOCKS)
        assert web.pool.pids == [pid]
        assert await web.get(server.url("/image/cat")) == JUNK


async def test_a_process_that_does_not_let_go_is_killed(server: FaultServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process_module, "_CANCEL_SECONDS", 0.1)
    monkeypatch.setattr(process_module, "_CHECK_SECONDS", 0.1)
    async with fetching() as web:
        image = asyncio.create_task(web.get(server.url("/drip")))
        await until(lambda: web.arena.free_blocks < BLOCKS)
        [pid] = web.pool.pids
        os.kill(pid, signal.SIGSTOP)
        image.cancel()
        await until(lambda: web.arena.free_blocks == BLOCKS)
        assert not psutil.pid_exists(pid)
        assert await web.get(server.url("/image/cat")) == JUNK


async def test_images_of_a_process_that_dies_are_fetched_again(server: FaultServer) -> None:
    async with fetching() as web:
        images = [asyncio.create_task(web.get(server.url(f"/image/cat?wait=1&{number}"))) for number in range(3)]
        slow = asyncio.create_task(web.get(server.url("/drip")))
        await until(lambda: server.open == 4 and web.arena.free_blocks < BLOCKS)
        [pid] = web.pool.pids
        os.kill(pid, signal.SIGKILL)
        await until(lambda: web.arena.free_blocks == BLOCKS)
        assert await asyncio.gather(*images) == [JUNK] * 3
        assert all(number > 1 for number in server.requests.values())
        assert web.pool.pids != [pid]
        slow.cancel()


async def test_processes_that_die_again_and_again_end_the_run(
    server: FaultServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process_module, "MAX_DEATHS", 3)
    async with fetching(fetch_retries=100) as web:
        image = asyncio.create_task(web.get(server.url("/silent/headers")))
        killed: set[int] = set()
        while not image.done():
            [pid] = web.pool.pids
            if pid not in killed:
                killed.add(pid)
                os.kill(pid, signal.SIGKILL)
            await asyncio.sleep(0.01)
        with pytest.raises(EngineLost, match="SIGKILL"):
            await image
        assert len(killed) == 3


async def test_secrets_reach_the_process_and_are_on_no_command_line(server: FaultServer, tmp_path: Path) -> None:
    file = tmp_path / "headers.toml"
    file.write_text(f'["http://127.0.0.1:{server.port}"]\nAuthorization = "Bearer s3cret"\n')
    file.chmod(0o600)
    async with (
        ForwardProxy(user="me:pa55") as proxy,
        fetching(host_headers=str(file), proxy=proxy.url("me:pa55")) as web,
    ):
        file.unlink()  # the process need not be able to read it
        assert await web.get(server.url("/image/cat")) == JUNK
        line = " ".join(psutil.Process(web.pool.pids[0]).cmdline())
    assert server.headers["/image/cat"]["Authorization"] == "Bearer s3cret"
    assert "s3cret" not in line
    assert "pa55" not in line


async def test_a_proxy_that_cannot_be_used_ends_the_run(server: FaultServer) -> None:
    async with fetching(proxy="http://127.0.0.1:9") as web:
        with pytest.raises(OptionError, match=r"--proxy: the proxy http://127\.0\.0\.1:9 is not reached"):
            await web.get(server.url("/image/cat"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
async def test_processes_end_with_the_run(server: FaultServer, tmp_path: Path, number: signal.Signals) -> None:
    manifest = write(tmp_path / "m.jsonl", [{"image": server.url(f"/silent/headers?{row}")} for row in range(20)])
    flags = ["-o", str(tmp_path / "out"), "--allow-private", "127.0.0.0/8", "--fetch-processes", "2", "--grace", "0"]
    with start(command(manifest, *flags)) as run:
        await until(lambda: server.open)
        children = psutil.Process(run.pid).children(recursive=True)
        mains = [child for child in children if "batchvl.fetching.processes.main" in child.cmdline()]
        assert len(mains) == 2
        run.send_signal(number)
        _, text = await asyncio.to_thread(run.communicate, timeout=PATIENCE)
        assert run.returncode == (75 if number == signal.SIGTERM else -signal.SIGKILL), text
    _, alive = psutil.wait_procs(mains, timeout=PATIENCE)
    assert not alive
