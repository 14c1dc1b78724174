"""Images in buckets and on the Hub, from servers on loopback that speak the stores' protocols."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from batchvl.errors import (
    ConnectionFailed,
    EmptyImage,
    FetchTimeout,
    ForbiddenAddress,
    HttpRetryable,
    HttpStatus,
    MissingFile,
    NameResolutionFailed,
    RowError,
    TooManyBytes,
)

from ..faults.clouds import Clouds
from ..faults.open_web.certificates import make_contexts
from ..faults.store import ObjectStore
from ..timing import scaled
from .objects import BUCKETS, error_of, fetch_one, fetching

KEY = "2024/we?ird #k%2fy ü.png"
LARGE = 5 * 2**20 + 7
"""Bytes of an image that is read in several chunks."""


@pytest.fixture
def clouds(monkeypatch: pytest.MonkeyPatch) -> Iterator[Clouds]:
    with Clouds() as clouds:
        for name, value in clouds.environment().items():
            monkeypatch.setenv(name, value)
        yield clouds


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[ObjectStore]:
    with ObjectStore() as store:
        for name, value in store.environment().items():
            monkeypatch.setenv(name, value)
        yield store


def put(store: ObjectStore, clouds: Clouds, key: str, data: bytes) -> None:
    store.put(key, data)
    clouds.objects[key] = data


@pytest.mark.parametrize("bucket", BUCKETS)
async def test_objects_of_every_store(store: ObjectStore, clouds: Clouds, bucket: str) -> None:
    large = bytes(range(256)) * (LARGE // 256) + b"the end"
    for key, data in ((KEY, b"odd key"), ("small", b"small"), ("large", large)):
        put(store, clouds, key, data)
    async with fetching() as (fetcher, arena):
        assert await fetch_one(fetcher, arena, f"{bucket}/{KEY}") == b"odd key"
        assert await fetch_one(fetcher, arena, f"{bucket}/large") == large
        assert await fetch_one(fetcher, arena, f"{bucket}/small") == b"small"


@pytest.mark.parametrize("bucket", BUCKETS)
async def test_objects_that_fail_for_good(store: ObjectStore, clouds: Clouds, bucket: str) -> None:
    put(store, clouds, "empty", b"")
    put(store, clouds, "large", bytes(LARGE))
    assert type(await error_of(f"{bucket}/missing")) is MissingFile
    assert type(await error_of(f"{bucket}/empty")) is EmptyImage
    assert type(await error_of(f"{bucket}/large", max_image_bytes=LARGE - 1)) is TooManyBytes
    assert type(await error_of(f"{bucket}/large", max_image_bytes=1000)) is TooManyBytes


async def test_an_object_that_is_too_large_is_not_read(store: ObjectStore) -> None:
    store.put("large", bytes(LARGE))
    assert f"{LARGE:,} bytes" in str(await error_of("s3://night/large", max_image_bytes=1000))
    assert [request.method for request in store.requests] == ["GET"]


async def test_no_bucket_is_read_unless_it_is_allowed(store: ObjectStore) -> None:
    store.put("cat", b"cat")
    for allowed in ([], ["s3://other", "gs://night"]):
        error = await error_of("s3://night/cat", allow_bucket=allowed)
        assert type(error) is ForbiddenAddress
        assert str(error).endswith("allow it with --allow-bucket s3://night")
    assert store.requests == []


@pytest.mark.parametrize(
    ("fault", "expected", "attempts"),
    [("denied", HttpStatus, 1), ("missing", MissingFile, 1), ("failed", HttpRetryable, 3)],
)
async def test_failures_of_s3(store: ObjectStore, fault: str, expected: type[RowError], attempts: int) -> None:
    store.put("cat", b"cat")
    store.fault = lambda _: fault
    error = await error_of("s3://night/cat", fetch_retries=2)
    assert type(error) is expected
    assert len(store.requests) == attempts, "obstore retries nothing itself"
    if fault == "denied":
        assert "AccessDenied (status 403); credentials: AWS_ACCESS_KEY_ID" in str(error)
        assert "not-a-secret" not in str(error)


@pytest.mark.parametrize("bucket", BUCKETS[1:])
@pytest.mark.parametrize(
    ("status", "expected"),
    [
        (400, HttpStatus),
        (401, HttpStatus),
        (403, HttpStatus),
        (404, MissingFile),
        (408, HttpRetryable),
        (500, HttpRetryable),
    ],
)
async def test_failures_of_other_stores(clouds: Clouds, bucket: str, status: int, expected: type[RowError]) -> None:
    clouds.fault = lambda _: status
    error = await error_of(f"{bucket}/cat", fetch_retries=0)
    assert type(error) is expected
    assert "body" not in str(error)
    assert ("denied access" in str(error)) == (status in (401, 403))
    assert (f"OnRequest (status {status})" in str(error)) == (status != 404)


@pytest.mark.parametrize("fault", ["busy", "failed"])
async def test_a_store_that_fails_for_a_while(store: ObjectStore, fault: str) -> None:
    failing = {"left": 2}

    def fail_first(_: object) -> str | None:
        failing["left"] -= 1
        return fault if failing["left"] >= 0 else None

    keys = [f"cat{number}" for number in range(6)]
    for key in keys:
        store.put(key, key.encode())
    store.fault = fail_first
    async with fetching() as (fetcher, arena):
        urls = [f"s3://night/{key}" for key in keys]
        data = await asyncio.gather(*(fetch_one(fetcher, arena, url) for url in urls))
    assert data == [key.encode() for key in keys]


@pytest.mark.parametrize("bucket", BUCKETS[1:])
@pytest.mark.parametrize("status", [429, 503])
async def test_a_store_that_asks_for_fewer_requests(clouds: Clouds, bucket: str, status: int) -> None:
    clouds.objects = {f"cat{number}": b"cat" for number in range(6)}
    rejections = iter([status] * 3)
    clouds.fault = lambda _: next(rejections, None)
    async with fetching(fetch_retries=0) as (fetcher, arena):
        await asyncio.gather(*(fetch_one(fetcher, arena, f"{bucket}/{key}") for key in clouds.objects))
    assert len(clouds.requests) == 9, "a request that the store rejects is no attempt"


async def test_a_key_does_not_say_how_the_store_failed(store: ObjectStore) -> None:
    store.fault = lambda _: "denied"
    said = "Server returned non-2xx status code: 404"
    for text in (said, f"{said} ü", "performing PUT ", "token request", "\u2028Debug source: InvalidCertificate"):
        assert type(await error_of(f"s3://night/{text}", fetch_retries=0)) is HttpStatus


async def test_a_store_that_is_not_there(monkeypatch: pytest.MonkeyPatch, store: ObjectStore) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    error = await error_of("s3://night/cat", host_patience=0.1, fetch_retries=1)
    assert type(error) is ConnectionFailed
    assert "Connection refused" in str(error)


async def test_a_store_that_does_not_respond(store: ObjectStore) -> None:
    store.put("cat", b"cat")
    store.fault = lambda _: "hang"
    started = time.monotonic()
    error = await error_of("s3://night/cat", fetch_timeout=0.5, fetch_retries=0, host_patience=0.1)
    assert type(error) is FetchTimeout
    assert time.monotonic() - started < scaled(2.5)


async def test_an_object_is_read_once_for_all_rows(store: ObjectStore) -> None:
    store.put("cat", b"cat")
    store.delay = 0.05
    async with fetching() as (fetcher, arena):
        urls = ["s3://night/cat", "S3://night/cat"] * 20
        data = await asyncio.gather(*(fetch_one(fetcher, arena, url) for url in urls))
    assert data == [b"cat"] * 40
    assert [request.method for request in store.requests] == ["GET"]


async def test_a_bucket_has_many_requests_in_progress(clouds: Clouds) -> None:
    """Waiting for one request after another would take 50 s, and in 16 at a time 3.5 s."""
    clouds.objects |= {f"cat{number}": b"cat" for number in range(100)}
    clouds.delay = 0.5
    async with fetching() as (fetcher, arena):
        urls = [f"gs://night/cat{number}" for number in range(100)]
        await asyncio.gather(*(fetch_one(fetcher, arena, url) for url in urls))
    assert clouds.max_open > 32


async def test_the_token_goes_to_the_hub_and_nowhere_else(clouds: Clouds, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    path = f"/datasets/me/cats/resolve/main/{KEY}"
    clouds.objects[path] = b"stored elsewhere"
    clouds.objects["/datasets/you/dogs/resolve/v2/dog.png"] = b"dog"
    clouds.large = {path}
    async with fetching(allow_bucket=["hf://datasets/me/cats"]) as (fetcher, arena):
        assert await fetch_one(fetcher, arena, f"hf://datasets/me/cats/{KEY}") == b"stored elsewhere"
        assert await fetch_one(fetcher, arena, "hf://datasets/you/dogs@v2/dog.png") == b"dog"
    sent = [
        (request.headers["host"].partition(":")[0], request.headers.get("authorization")) for request in clouds.requests
    ]
    assert sent == [("127.0.0.1", "Bearer hf_secret"), ("localhost", None), ("127.0.0.1", None)]


async def test_a_file_that_the_hub_does_not_have(clouds: Clouds) -> None:
    error = await error_of("hf://datasets/me/cats/missing.png")
    assert (type(error), str(error)) == (HttpStatus, "hf://datasets/me/cats/missing.png: HTTP status 404")


async def test_an_object_whose_end_is_missing(clouds: Clouds) -> None:
    clouds.objects["cat"] = bytes(1000)
    clouds.cut = {"cat"}
    error = await error_of("gs://night/cat", fetch_retries=1)
    assert type(error) is ConnectionFailed
    assert str(error).endswith("broke while the object was sent (after 2 attempts)"), "the bucket is not blamed"


@pytest.mark.parametrize("response", [b"SSH-2.0-OpenSSH\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\n1"])
async def test_an_endpoint_that_is_something_else(monkeypatch: pytest.MonkeyPatch, response: bytes) -> None:
    async def respond(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(response)
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(respond, "127.0.0.1", 0)
    async with server:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"127.0.0.1:{server.sockets[0].getsockname()[1]}")
        error = await error_of("gs://night/cat", fetch_retries=1)
    assert type(error) is ConnectionFailed
    assert str(error).endswith("the response is not one of such a store (after 2 attempts)")


async def test_an_object_that_stops_coming(clouds: Clouds) -> None:
    clouds.objects["cat"] = bytes(1000)
    clouds.stalled = {"cat"}
    started = time.monotonic()
    error = await error_of("gs://night/cat", fetch_timeout=6, fetch_retries=0)
    assert type(error) is FetchTimeout
    assert str(error).endswith("not complete within 6 s, or slower than 1024 bytes/s")
    assert time.monotonic() - started < 5.5, "half of --fetch-timeout without a byte is too slow"
    assert await asyncio.to_thread(clouds.abandoned.wait, scaled(5)), "the read does not go on by itself"


async def test_a_read_that_is_cancelled(clouds: Clouds) -> None:
    clouds.objects["cat"] = bytes(1000)
    clouds.stalled = {"cat"}
    async with fetching() as (fetcher, arena):
        reading = asyncio.create_task(fetch_one(fetcher, arena, "gs://night/cat"))
        while not clouds.requests:
            await asyncio.sleep(0.01)
        reading.cancel()
        assert await asyncio.to_thread(clouds.abandoned.wait, scaled(5))


async def test_an_endpoint_that_does_not_resolve(monkeypatch: pytest.MonkeyPatch, store: ObjectStore) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://minio.invalid")
    error = await error_of("s3://night/cat", host_patience=0.1, fetch_retries=0)
    assert type(error) is NameResolutionFailed


async def test_an_endpoint_whose_certificate_is_not_trusted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    _, contexts = make_contexts(tmp_path, ["127.0.0.1"])
    connected: list[object] = []
    server = await asyncio.start_server(lambda *pair: connected.append(pair), "127.0.0.1", 0, ssl=contexts["valid"])
    async with server:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"https://127.0.0.1:{server.sockets[0].getsockname()[1]}")
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "not-a-secret")
        error = await error_of("s3://night/cat")
    assert (type(error), str(error)) == (ConnectionFailed, "s3://night/cat: the store's certificate is not trusted"), (
        "it stays so, and is not tried again"
    )
    assert not connected
