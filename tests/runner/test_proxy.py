"""Commands through a proxy and with headers of hosts: what they need to know is used, and shown nowhere."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from ssl import SSLContext

import pyarrow.parquet as pq
import pytest
import pytest_asyncio

from ..faults.open_web.certificates import make_contexts
from ..faults.open_web.messages import IMAGE, answer
from ..faults.proxy import ForwardProxy
from ..faults.server import FaultServer
from ..manifest.writing import write
from .running import command, environment, shell

USER, PASSWORD, TOKEN = "me", "pr0xyp4ss", "b34r3r"
ROWS = 6


class TlsServer:
    """An https server whose images are only for those who have the token."""

    def __init__(self, context: SSLContext) -> None:
        self._context = context
        self.requests: list[bytes] = []

    async def __aenter__(self) -> TlsServer:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0, ssl=self._context)
        self.port: int = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                request = await reader.readuntil(b"\r\n\r\n")
                self.requests.append(request)
                is_known = f"\r\nAuthorization: Bearer {TOKEN}\r\n".encode() in request
                writer.write(answer() if is_known else answer(status="401 Who", body=b"no"))
        except (OSError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()


@pytest_asyncio.fixture
async def server() -> AsyncIterator[FaultServer]:
    async with FaultServer() as server:
        server.images["cat"] = IMAGE
        yield server


def fetch_command(manifest: Path, output: Path, *flags: str) -> list[str]:
    base = ["--image-workers", "1", "--allow-private", "127.0.0.0/8"]
    return [sys.executable, "-m", "batchvl", "fetch", str(manifest), "-o", str(output), *base, *flags]


async def run(words: Sequence[str], **variables: str) -> subprocess.CompletedProcess[str]:
    return await asyncio.to_thread(shell, words, env=environment(**variables))


@pytest.mark.parametrize("verb", ["fetch", "run"])
async def test_images_through_a_proxy_with_a_token(server: FaultServer, tmp_path: Path, verb: str) -> None:
    authority, contexts = make_contexts(tmp_path, ["127.0.0.1"])
    output = tmp_path / "out"
    async with TlsServer(contexts["valid"]) as secure, ForwardProxy(user=f"{USER}:{PASSWORD}") as proxy:
        urls = [f"https://127.0.0.1:{secure.port}/{number}.jpg" for number in range(ROWS)]
        urls += [server.url("/image/cat"), server.url("/status/404")]
        manifest = write(tmp_path / "manifest.jsonl", [{"image": url} for url in urls])
        headers = tmp_path / "headers.toml"
        headers.write_text(f'["127.0.0.1:{secure.port}"]\nAuthorization = "Bearer {TOKEN}"\n')
        headers.chmod(0o600)
        flags = ["--host-headers", str(headers), "--accept-failures", "1"]
        words = fetch_command(manifest, output, *flags)
        if verb == "run":
            words = command(manifest, "-o", str(output), "--allow-private", "127.0.0.0/8", *flags)
        done = await run(words, BATCHVL_PROXY=proxy.url(f"{USER}:{PASSWORD}"), SSL_CERT_FILE=str(authority))
    assert done.returncode == 0, done.stderr
    assert len(secure.requests) == ROWS
    assert {request.method for request in proxy.requests} == {"CONNECT", "GET"}
    assert "Authorization" not in server.headers["/image/cat"]
    assert proxy.checks == 1
    for secret in (PASSWORD, TOKEN, "cHIweHlwNHNz"):  # the last one is the password in base64
        assert secret not in done.stdout + done.stderr
        assert not [path for path in output.rglob("*") if path.is_file() and secret.encode() in path.read_bytes()]
        assert secret.encode() not in b"".join(secure.requests) or secret == TOKEN


@pytest.mark.parametrize("verb", ["fetch", "run", "validate"])
async def test_a_proxy_that_is_not_there(server: FaultServer, tmp_path: Path, verb: str) -> None:
    manifest = write(tmp_path / "manifest.jsonl", [{"image": server.url("/image/cat")}])
    output = tmp_path / "out"
    words = {
        "fetch": fetch_command(manifest, output),
        "run": command(manifest, "-o", str(output), "--allow-private", "127.0.0.0/8"),
        "validate": [sys.executable, "-m", "batchvl", "validate", str(manifest), "--probe", "1"],
    }[verb]
    if verb == "validate":
        words += ["--allow-private", "127.0.0.0/8"]
    done = await run([*words, "--proxy", f"http://{USER}:{PASSWORD}@127.0.0.1:9"])
    assert done.returncode == 2, done.stderr
    assert "--proxy: the proxy http://127.0.0.1:9 is not reached: cannot connect: Connection refused" in done.stderr
    assert PASSWORD not in done.stderr
    assert not output.exists()
    assert not server.requests


async def test_rows_without_urls_need_no_proxy(tmp_path: Path) -> None:
    (tmp_path / "cat.jpg").write_bytes(IMAGE)
    manifest = write(tmp_path / "manifest.jsonl", [{"image": "cat.jpg"}])
    done = await run(fetch_command(manifest, tmp_path / "out"), BATCHVL_PROXY="http://127.0.0.1:9")
    assert done.returncode == 0, done.stderr


async def test_a_fetch_that_loses_its_proxy_is_resumed(server: FaultServer, tmp_path: Path) -> None:
    rows = [{"image": server.url(f"/image/cat?wait=0.05&n={number}")} for number in range(100)]
    manifest, output = write(tmp_path / "manifest.jsonl", rows), tmp_path / "out"
    async with ForwardProxy() as proxy:
        words = fetch_command(manifest, output, "--proxy", proxy.url(), "--fetch-per-host", "2", "--host-patience", "0")
        running = asyncio.create_task(run(words))
        while len(server.requests) < 10:
            await asyncio.sleep(0.01)
        await proxy.stop()
        stopped = await running
        assert stopped.returncode == 75, stopped.stderr
        assert f"the proxy {proxy.url()} is not reached" in stopped.stderr
        assert "no image is fetched until it can be used" in stopped.stderr
        assert "run the same command again to resume" in stopped.stderr
        await proxy.start()
        done = await run(words)
    assert done.returncode == 0, done.stderr
    tables = [pq.read_table(path) for path in output.glob("*.parquet")]
    assert sorted(number for table in tables for number in table["source_row"].to_pylist()) == list(range(100))


@pytest.mark.parametrize(
    ("name", "text", "error"),
    [
        ("proxy", '"socks5://me:s3cr3t@127.0.0.1:9"', "expected http://HOST:PORT or http://USER:PASSWORD@HOST:PORT"),
        ("proxy", '["http://me:s3cr3t@127.0.0.1:9"]', "expected http://HOST:PORT"),
        ("proxy", '"http://me:s3cr3t#@127.0.0.1:9"', "expected http://HOST:PORT"),
        ("host_headers", '"headers.toml"', "headers.toml: No such file"),
    ],
)
@pytest.mark.parametrize("verb", ["fetch", "validate"])
async def test_a_setting_that_is_not_valid(tmp_path: Path, verb: str, name: str, text: str, error: str) -> None:
    """A job file's path is relative to the file."""
    manifest = write(tmp_path / "manifest.jsonl", [{"image": "https://images.example/"}])
    (tmp_path / "batchvl.toml").write_text(f"{name} = {text}\n")
    words = [sys.executable, "-m", "batchvl", "validate", str(manifest)]
    done = await run(fetch_command(manifest, tmp_path / "out") if verb == "fetch" else words)
    assert done.returncode == 2, done.stderr
    assert error in done.stderr
    assert "s3cr3t" not in done.stderr
