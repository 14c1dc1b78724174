"""All faults of the open web at once: the verdict on each row, in a run, and by curl."""

from __future__ import annotations

import asyncio
import hashlib
import json
import shutil
from collections.abc import AsyncIterator, Iterable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import pytest_asyncio

from batchvl.errors import EmptyImage, PrepareError, row_errors
from tests.faults.open_web import FAULTS, MAX_IMAGE_BYTES, SECRET, Fault, OpenWeb
from tests.manifest.writing import write
from tests.runner.running import command, environment, shell
from tests.timing import scaled

OPTIONS: dict[str, Any] = {
    "--allow-private": "127.0.0.0/8",
    "--max-image-bytes": MAX_IMAGE_BYTES,
    "--arena-bytes": "1GiB",
    "--fetch-timeout": scaled(2),
    "--fetch-deadline": scaled(15),
    "--host-patience": scaled(5),
    "--fetch-retries": 2,
    "--fetch-concurrency": 512,
    "--fetch-per-host": 1,  # the rows of a fault one after another, so that they may use the same connection
    "--look-ahead": 1024,
    "--max-idle-gpu": scaled(60),
}
"""Short patience, and room for all rows at once."""
LONGEST_MESSAGE = 300

DELIVERED = {"ok", EmptyImage.code} | {error.code for error in row_errors() if issubclass(error, PrepareError)}
"""Verdicts on rows for which a body arrived, of whatever content."""
FINAL_CODES = {error.code for error in row_errors() if not error.retryable}


@pytest_asyncio.fixture
async def web(tmp_path: Path) -> AsyncIterator[OpenWeb]:
    async with OpenWeb(tmp_path) as web:
        yield web


@pytest.mark.parametrize("processes", [0, 2])
async def test_every_fault_gets_its_verdict(web: OpenWeb, tmp_path: Path, processes: int) -> None:
    rows = [(fault, url) for fault in FAULTS.values() for url in web.urls(fault)]
    manifest = write(tmp_path / "faults.jsonl", [{"image": url} for _, url in rows])
    flags = [f"{name}={value}" for name, value in OPTIONS.items()] + [f"--fetch-processes={processes}"]
    # aiohttp reads the trusted certificates when it is imported: a process of its own.
    trusting = environment(SSL_CERT_FILE=str(web.authority))
    run = await asyncio.to_thread(shell, command(manifest, "-o", str(tmp_path / "out"), *flags), env=trusting)
    assert run.returncode == 3, run.stdout + run.stderr
    results = pq.read_table(tmp_path / "out" / "results.parquet").to_pylist()
    verdicts = [(fault, verdict(fault, result)) for (fault, _), result in zip(rows, results, strict=True)]
    lines = differences(verdicts) + too_insistent(web)
    assert not lines, "\n" + "\n".join(lines)


def verdict(fault: Fault, result: dict[str, Any]) -> str:
    """Return "ok", an error code, or what is wrong with a row of the output besides."""
    if result["status"] == "ok":
        is_right = result["images"][0]["sha256"] == hashlib.sha256(fault.body).hexdigest()
        return "ok" if is_right else "another image"
    error = result["error"]
    if len(error["message"]) > LONGEST_MESSAGE:
        return f"{error['code']}, with a message of {len(error['message'])} characters"
    if SECRET.decode() in error["message"]:
        return f"{error['code']}, with a secret in its message: {error['message']}"
    return str(error["code"])


def differences(verdicts: Iterable[tuple[Fault, str]]) -> list[str]:
    """Return a line for each row whose verdict is not the one that is due."""
    return [f"{fault.name}: {found}, not {fault.expected}" for fault, found in verdicts if found != fault.expected]


def too_insistent(web: OpenWeb) -> list[str]:
    """Return a line for each URL that was requested again after an answer that is final."""
    return [
        f"{name}: {number} requests for {target[:50]}"
        for (name, target), number in web.requests.items()
        if number > 1 and FAULTS[name].expected in FINAL_CODES - {"too_many_redirects"}
    ]


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("curl"), reason="needs curl")
async def test_the_verdicts_are_those_of_curl(web: OpenWeb, tmp_path: Path) -> None:
    """A server that curl can talk to is no server to refuse, and the reverse, unless the fault's comment says why."""
    faults = [fault for fault in FAULTS.values() if fault.curl]
    slots = asyncio.Semaphore(32)
    verdicts = await asyncio.gather(*(curl(web, fault, tmp_path, slots) for fault in faults))
    lines = [
        f"{fault.name}: {found}, not {fault.expected}"
        for fault, found in zip(faults, verdicts, strict=True)
        if (found == "ok") != (fault.expected in DELIVERED)
    ]
    assert not lines, "\n" + "\n".join(lines)


async def curl(web: OpenWeb, fault: Fault, directory: Path, slots: asyncio.Semaphore) -> str:
    """Fetch the rows of a fault with one process of curl. Return "ok", or "failed" and why."""
    urls = web.urls(fault)
    files = [directory / f"{fault.name}-{number}" for number in range(len(urls))]
    outputs = [word for url, file in zip(urls, files, strict=True) for word in ("--output", str(file), url)]
    limits = ["--max-time", "4", "--max-filesize", "2000000", "--max-redirs", "5", "--proto-redir", "=http,https"]
    retries = ["--retry", "4", "--retry-delay", "1", "--retry-all-errors", "--retry-max-time", "5"]
    words = ["--silent", "--location", "--fail", "--compressed", "--globoff", "--path-as-is", "--cookie", ""]
    trust = ["--cacert", str(web.authority), "--write-out", "%{json}\n", *words, *limits, *retries]
    async with slots:
        process = await asyncio.create_subprocess_exec("curl", *trust, *outputs, stdout=asyncio.subprocess.PIPE)
        printed, _ = await process.communicate()
    reports = [json.loads(line) for line in printed.splitlines()]
    for report, file in zip(reports, files, strict=True):
        if report["exitcode"] or not 200 <= report["http_code"] < 300:
            return f"failed with status {report['http_code']}: {report['errormsg']}"
        if (file.read_bytes() if file.exists() else b"") != fault.body:
            return "failed with another body"
    return "ok"
