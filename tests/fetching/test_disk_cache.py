"""Fetchers that keep images in a directory: which images, for whom, and what a bad disk does to a run."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import random
import re
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import pytest_asyncio

from batchvl.config.options import RunOptions
from batchvl.errors import ConnectionFailed, ForbiddenAddress, HttpStatus, OptedOut, OptionError
from batchvl.fetching import disk_cache
from batchvl.fetching.download import Fetch
from batchvl.fetching.fetcher import Fetcher
from batchvl.ipc.arena import Arena
from batchvl.types import WebImage
from tests.crash.mounts import fill, tmpfs
from tests.faults.server import FaultServer
from tests.fetching.objects import fetch_one
from tests.fetching.test_dispatcher import Answer, Rows, Web
from tests.manifest.writing import write
from tests.runner.running import shell
from tests.timing import scaled

BLOCK = 4096


def gif(content: str, size: int = 3000) -> bytes:
    """Bytes that begin and end like an image."""
    return b"GIF89a" + (content.encode() * size)[:size] + b";"


CAT = gif("cat")


@pytest_asyncio.fixture
async def server() -> AsyncIterator[FaultServer]:
    async with FaultServer() as server:
        server.images["cat"] = CAT
        yield server


class Run(NamedTuple):
    """A fetcher and its arena."""

    fetcher: Fetcher
    arena: Arena

    async def fetch(self, url: str) -> bytes:
        async with asyncio.timeout(scaled(20)):
            return await fetch_one(self.fetcher, self.arena, url)


@asynccontextmanager
async def keeping(path: Path | str, blocks: int = 512, **options: Any) -> AsyncIterator[Run]:
    """A fetcher for loopback that keeps images in a directory."""
    defaults = {"allow_private": ["127.0.0.0/8"], "max_image_bytes": 64 * 1024, "cache": str(path)}
    arena = Arena(blocks, BLOCK)
    async with Fetcher(RunOptions.of(**(defaults | options)).fetch, arena, backoff=0.01) as fetcher:
        yield Run(fetcher, arena)
    assert arena.free_blocks == blocks, "an extent was leaked"
    arena.close()


async def fetch_new(path: Path, url: str, **options: Any) -> bytes:
    """Fetch an image in a run of its own."""
    async with keeping(path, **options) as run:
        return await run.fetch(url)


async def test_a_later_run_asks_no_server(
    server: FaultServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    url = server.url("/image/cat")
    assert await fetch_new(tmp_path, url) == CAT
    caplog.set_level(logging.INFO, "batchvl")
    assert await fetch_new(tmp_path, url, cache_bytes="1GiB", cache_age="12h") == CAT
    assert server.requests["/image/cat"] == 1
    assert caplog.messages == [
        f"images are kept in {tmp_path}: up to 1GiB, and used for 12h",
        f"{tmp_path}: 1 image came from it, 0 stored",
    ]


async def test_the_age_of_0_refreshes_what_is_kept(server: FaultServer, tmp_path: Path) -> None:
    url = server.url("/image/cat")
    await fetch_new(tmp_path, url)
    server.images["cat"] = gif("another cat")
    assert await fetch_new(tmp_path, url) == CAT
    assert await fetch_new(tmp_path, url, cache_age=0) == gif("another cat")
    assert await fetch_new(tmp_path, url) == gif("another cat")


async def test_where_redirects_lead_is_kept_for_the_url_of_the_row(server: FaultServer, tmp_path: Path) -> None:
    url = server.url("/redirect?hops=3&to=/image/cat")
    assert await fetch_new(tmp_path, url) == await fetch_new(tmp_path, url) == CAT
    assert server.requests["/image/cat"] == 1


async def test_an_image_that_took_several_attempts_is_kept(tmp_path: Path) -> None:
    async def answer(host: str, path: str) -> Answer:
        return (503 if len(web.paths) == 1 else 500 if len(web.paths) == 2 else 200), {}, CAT

    async with Web(answer) as web:
        assert await fetch_new(tmp_path, web.url("/1")) == await fetch_new(tmp_path, web.url("/1")) == CAT
        assert len(web.paths) == 3


async def test_kept_images_wait_for_no_host_and_no_rate(tmp_path: Path) -> None:
    async def answer(host: str, path: str) -> Answer:
        return 200, {}, gif(path)

    async with Web(answer) as web:
        urls = [web.url(f"/{number}") for number in range(50)]
        async with keeping(tmp_path) as run:
            for url in urls:
                await run.fetch(url)
    # The server is gone: its breaker opens. At this rate it would get one request in 100 s.
    for options in ({"fetch_retries": 0, "host_patience": 0}, {"host_rate": 0.01}):
        async with keeping(tmp_path, **options) as run:
            rows = Rows(run.fetcher)
            if "fetch_retries" in options:
                for number in range(3):
                    with pytest.raises(ConnectionFailed):
                        await run.fetch(web.url(f"/not kept {number}"))
            for url in urls:
                rows.submit(url)
            await rows.wait(seconds=10)
            assert rows.succeeded == 50


async def test_kept_images_come_before_slow_hosts(tmp_path: Path) -> None:
    slow = asyncio.Event()

    async def answer(host: str, path: str) -> Answer:
        if path.startswith("/slow"):
            await slow.wait()
        return 200, {}, gif(path)

    async with Web(answer, hosts=40) as web:
        async with keeping(tmp_path) as run:
            for number in range(50):
                await run.fetch(web.url(f"/{number}"))
        async with keeping(tmp_path, blocks=8192, fetch_concurrency=8) as run:
            rows = Rows(run.fetcher)
            for number in range(200):
                rows.submit(web.url(f"/slow/{number}", host=number % 40))
            await rows.wait(lambda: sum(web.open.values()) == 8)
            for number in range(50):
                rows.submit(web.url(f"/{number}"))
            await rows.wait(lambda: rows.succeeded == 50)
            slow.set()
            await rows.wait()
            assert rows.succeeded == 250


@pytest.mark.parametrize(
    ("headers", "is_kept"),
    [
        ({}, True),
        ({"Cache-Control": "no-cache, max-age=0"}, True),
        ({"Cache-Control": "private, No-Store"}, False),
        ({"X-Robots-Tag": "noindex"}, True),
        ({"X-Robots-Tag": "noindex, noai"}, False),
        ({"X-Robots-Tag": "batchvl: noimageai"}, False),
    ],
)
async def test_what_the_server_says_about_keeping(tmp_path: Path, headers: dict[str, str], is_kept: bool) -> None:
    async def answer(host: str, path: str) -> Answer:
        return 200, headers, CAT

    async with Web(answer) as web:
        for _ in range(2):
            assert await fetch_new(tmp_path, web.url("/cat"), ignore_opt_out=True) == CAT
        assert len(web.paths) == (1 if is_kept else 2)


async def test_a_run_that_ignores_an_opt_out_leaves_nothing_to_one_that_does_not(tmp_path: Path) -> None:
    async def answer(host: str, path: str) -> Answer:
        return 200, {"X-Robots-Tag": "noai"}, CAT

    async with Web(answer) as web:
        assert await fetch_new(tmp_path, web.url("/cat"), ignore_opt_out=True) == CAT
        with pytest.raises(OptedOut):
            await fetch_new(tmp_path, web.url("/cat"))


@pytest.mark.parametrize("body", [b"<!DOCTYPE html><title>Too many requests</title>", CAT[:-1]], ids=["page", "cut"])
async def test_what_is_no_whole_image_is_not_kept(server: FaultServer, tmp_path: Path, body: bytes) -> None:
    server.images["cat"] = body
    assert await fetch_new(tmp_path, server.url("/image/cat")) == body
    server.images["cat"] = CAT
    assert await fetch_new(tmp_path, server.url("/image/cat")) == CAT


async def test_an_image_of_a_private_network_is_only_for_runs_that_may_read_it(
    server: FaultServer, tmp_path: Path
) -> None:
    url = server.url("/image/cat", "localhost")
    assert await fetch_new(tmp_path, url) == CAT
    with pytest.raises(ForbiddenAddress):
        await fetch_new(tmp_path, url, allow_private=[])
    assert await fetch_new(tmp_path, url, allow_private=[], allow_host=["localhost"]) == CAT
    assert server.requests["/image/cat"] == 2
    assert await fetch_new(tmp_path, url) == CAT
    assert server.requests["/image/cat"] == 2


async def test_an_image_fetched_with_headers_is_only_for_runs_that_send_them(
    server: FaultServer, tmp_path: Path
) -> None:
    url, tokens = server.url("/image/cat"), []
    for token in ("a", "b"):
        tokens.append(tmp_path / f"{token}.toml")
        tokens[-1].write_text(f'["{url.rpartition("/image")[0]}"]\nAuthorization = "Bearer {token}"\n')
    for run, count in ((tokens[0], 1), (tokens[0], 1), (tokens[1], 2), (None, 3)):
        assert await fetch_new(tmp_path / "kept", url, host_headers=run and str(run)) == CAT
        assert server.requests["/image/cat"] == count


async def test_headers_from_a_pipe_are_headers_too(server: FaultServer, tmp_path: Path) -> None:
    """A pipe can be read once: what a run knows of its headers is what it has sent."""
    url = server.url("/image/cat")
    reader, writer = os.pipe()
    os.write(writer, f'["{url.rpartition("/image")[0]}"]\nAuthorization = "Bearer a"\n'.encode())
    os.close(writer)
    assert await fetch_new(tmp_path, url, host_headers=f"/dev/fd/{reader}") == CAT
    os.close(reader)
    assert await fetch_new(tmp_path, url) == CAT
    assert server.requests["/image/cat"] == 2


async def test_another_password_is_another_image(server: FaultServer, tmp_path: Path) -> None:
    url = server.url("/image/cat")
    for user in ("me:one@", "me:two@", ""):
        assert await fetch_new(tmp_path, url.replace("://", f"://{user}")) == CAT
    assert server.requests["/image/cat"] == 3


async def test_a_damaged_image_is_fetched_again(
    server: FaultServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    url = server.url("/image/cat")
    await fetch_new(tmp_path, url)
    file = tmp_path / "images" / (name := sha256(CAT).hexdigest())[:2] / name
    file.write_bytes(CAT[:100] + b"?" + CAT[101:])
    caplog.set_level(logging.INFO, "batchvl")
    assert await fetch_new(tmp_path, url) == CAT
    assert server.requests["/image/cat"] == 2
    assert f"{tmp_path}: 0 images came from it, 1 stored, 1 found damaged and removed" in caplog.messages
    assert file.read_bytes() == CAT


async def test_kept_images_wait_for_room(tmp_path: Path) -> None:
    async def answer(host: str, path: str) -> Answer:
        return 200, {}, gif(path, int(path[1:]) % 7 * BLOCK)

    async with Web(answer) as web:
        urls = [web.url(f"/{number}") for number in range(60)]
        async with keeping(tmp_path) as run:
            for url in urls[:40]:
                await run.fetch(url)
        async with keeping(tmp_path, blocks=16) as run:
            rows = Rows(run.fetcher)
            for number in range(59):
                rows.submit(urls[number], urls[number + 1])
            await rows.wait()
            assert rows.succeeded == 59
        assert len(web.paths) == 60


def damage(path: Path, numbers: random.Random) -> None:
    for file in path.glob("images/??/*"):
        if numbers.random() < 0.1:
            file.write_bytes(b"damaged")


def record_of(path: Path) -> Path:
    [record] = path.glob("urls/??/*")
    return record


@pytest.mark.parametrize("seed", range(3))
async def test_anything_at_once(tmp_path: Path, caplog: pytest.LogCaptureFixture, seed: int) -> None:
    """Rows whose images are kept, new, damaged or missing, in a small arena: each row gets its own images."""
    numbers = random.Random(seed)

    def body(path: str) -> bytes:
        return gif(path, random.Random(path).choice([100, 3000, BLOCK, 3 * BLOCK, 5 * BLOCK]))

    async def answer(host: str, path: str) -> Answer:
        await asyncio.sleep(numbers.expovariate(500))
        if path.endswith("7"):
            return 404, {}, b""
        return (500 if numbers.random() < 0.03 else 200), {}, body(path)

    caplog.set_level(logging.INFO, "batchvl")
    async with Web(answer, hosts=12) as web:
        for number in range(20):
            if number >= 3 and "found damaged" in caplog.text:
                break  # often at once, but what is damaged may be removed to make room before it is found
            async with keeping(tmp_path, blocks=24, cache_bytes=200 * BLOCK) as run:
                succeeded = cancelled = 0
                fetches: list[Fetch] = []
                for _ in range(150):
                    paths = [f"/{numbers.randrange(200)}" for _ in range(numbers.choice([1, 1, 2, 3]))]
                    images = [WebImage(web.url(path, host=int(path[1:]) % 12)) for path in paths]
                    fetches.append(run.fetcher.submit(images, lambda fetch: None))
                    if numbers.random() < 0.05:
                        fetch = fetches.pop(numbers.randrange(len(fetches)))
                        if fetch.is_done:
                            fetches.append(fetch)
                        else:
                            run.fetcher.cancel(fetch)
                            cancelled += 1
                async with asyncio.timeout(scaled(30)):
                    while fetches:
                        await asyncio.sleep(0.005)
                        for fetch in [fetch for fetch in fetches if fetch.is_done]:
                            fetches.remove(fetch)
                            if fetch.fetched is None:
                                assert isinstance(fetch.error, HttpStatus)
                                continue
                            succeeded += 1
                            for image, extent in zip(fetch.images, fetch.fetched.extents, strict=True):
                                assert isinstance(image, WebImage)
                                assert extent is not None
                                assert run.arena.at(extent) == body("/" + image.url.rpartition("/")[2])
                            fetch.fetched.release()
                assert succeeded + cancelled > 90
            damage(tmp_path, numbers)
    log = "\n".join(caplog.messages)
    assert sum(map(int, re.findall("([0-9]+) images came from it", log))) > 100
    assert "removed to keep its size" in log
    assert "found damaged" in log


@pytest.mark.parametrize("name", ["images", "urls"])
async def test_a_directory_that_cannot_be_written_costs_no_row(
    server: FaultServer, tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    (tmp_path / name).write_bytes(b"a file where a directory should be")
    caplog.set_level(logging.WARNING, "batchvl")
    async with keeping(tmp_path) as run:
        for number in range(5):
            assert await run.fetch(server.url(f"/image/cat?{number}")) == CAT
    trouble = {what: f"--cache: {tmp_path} cannot be {what}: Not a directory" for what in ("read", "written")}
    expected = [trouble["written"]] if name == "images" else [trouble["read"], trouble["written"]]
    assert caplog.messages == [f"{line}. The run goes on without it" for line in expected]


async def test_a_disk_that_does_not_answer_costs_no_row(
    server: FaultServer, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk_cache, "PATIENCE_SECONDS", 0.5)
    url = server.url("/image/cat")
    await fetch_new(tmp_path, url)
    record = record_of(tmp_path)
    record.unlink()
    os.mkfifo(record)  # whoever opens it waits until somebody writes
    caplog.set_level(logging.WARNING, "batchvl")
    try:
        async with keeping(tmp_path) as run:
            assert await run.fetch(url) == CAT
            started = time.monotonic()
            for number in range(20):
                assert await run.fetch(server.url(f"/image/cat?{number}")) == CAT
            assert time.monotonic() - started < scaled(5), "the disk is not waited for again"
    finally:
        if record.is_fifo():
            os.close(os.open(record, os.O_RDWR))
    assert caplog.messages == [
        f"--cache: {tmp_path} cannot be read: no answer within 0.5 s. The run goes on without it"
    ]


async def test_a_directory_that_cannot_be_used_is_an_error(tmp_path: Path) -> None:
    (file := tmp_path / "file").write_bytes(b"")
    for path in (str(file), f"{file}/cache", "s3://me/cache"):
        reason = f"found '{path}'" if "://" in path else f"{path} cannot be used: (Not a directory|File exists)"
        with pytest.raises(OptionError, match=f"--cache: .*{reason}"):
            async with keeping(path):
                pass


def rows_of(server: FaultServer, count: int) -> list[dict[str, str]]:
    for number in range(count):
        server.images[str(number)] = gif(f"{number}.", 20_000)
    return [{"image": server.url(f"/image/{number}")} for number in range(count)]


def fetch_command(manifest: Path, out: Path, cache: Path, *flags: str) -> list[str]:
    options = ["--no-decode", "--allow-private", "127.0.0.0/8", "--cache", str(cache)]
    return [sys.executable, "-m", "batchvl", "fetch", str(manifest), "-o", str(out), *options, *flags]


def summary_of(out: Path) -> dict[str, Any]:
    summary: dict[str, Any] = json.loads((out / "_fetch" / "summary.json").read_bytes())
    return summary


async def test_two_runs_at_once_and_a_third(server: FaultServer, tmp_path: Path) -> None:
    manifest = write(tmp_path / "m.jsonl", rows_of(server, 200))
    cache, outs = tmp_path / "cache", [tmp_path / name for name in "abc"]
    runs = [asyncio.to_thread(shell, fetch_command(manifest, out, cache)) for out in outs[:2]]
    for run in await asyncio.gather(*runs):
        assert run.returncode == 0, run.stderr
    server.requests.clear()
    run = await asyncio.to_thread(shell, fetch_command(manifest, outs[2], cache))
    assert run.returncode == 0, run.stderr
    assert not server.requests
    assert [summary_of(out)["ok"] for out in outs] == [200] * 3
    assert summary_of(outs[0])["bytes"] == summary_of(outs[2])["bytes"]
    names = [file.name for file in cache.glob("images/??/*")]
    assert sorted(names) == sorted(sha256(body).hexdigest() for name, body in server.images.items() if name != "cat")


async def test_a_full_disk_costs_no_row(server: FaultServer, tmp_path: Path) -> None:
    manifest = write(tmp_path / "m.jsonl", rows_of(server, 60))
    with tmpfs(tmp_path / "small", "256k") as mounts:
        commands = [
            [*mounts.enter, *fetch_command(manifest, tmp_path / out, tmp_path / "small" / "cache")] for out in "ab"
        ]
        run = await asyncio.to_thread(shell, commands[0])
        assert run.returncode == 0, run.stderr
        assert run.stderr.count("cannot be written: No space left on device") == 1
        fill(mounts.from_outside(tmp_path / "small"))
        server.requests.clear()
        run = await asyncio.to_thread(shell, commands[1])
        assert run.returncode == 0, run.stderr
        assert 0 < sum(server.requests.values()) < 60, "what was kept is read"
