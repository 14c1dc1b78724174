"""Fetching images from one bucket of each object store, beside one host of the web: throughput and CPU time.

    python benchmarks/objects.py
    python benchmarks/objects.py s3 http --images 20000 --latency 0.25

The server is that of benchmarks/web.py, in a process of its own. Its delays are lognormal, here with a median of 50 ms.
The fetcher is that of a run, without its manifest, decoding and journal.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from batchvl.config.options import RunOptions  # noqa: E402
from batchvl.fetching.download import Fetch  # noqa: E402
from batchvl.fetching.fetcher import Fetcher  # noqa: E402
from batchvl.ipc.arena import Arena  # noqa: E402
from batchvl.types import WebImage  # noqa: E402
from benchmarks.web_server import MEDIAN, WebServer, raise_file_limit  # noqa: E402

LATENCY = 0.05 / MEDIAN
PER_BUCKET = 128
"""Concurrent requests to a bucket by default; the web's host gets as many here."""
ARENA_BLOCKS, BLOCK_BYTES = 65_536, 4096


class Result(NamedTuple):
    seconds: float
    cpu_seconds: float
    """Of the fetcher's process, threads included."""


def prefixes(port: int) -> dict[str, str]:
    """Return the URL of a directory with images in each store, and set the environment by which they are found."""
    endpoint = f"http://127.0.0.1:{port}"
    os.environ |= {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "STORAGE_EMULATOR_HOST": endpoint,
        "AZURE_STORAGE_ACCOUNT_NAME": "account",
        "AZURE_STORAGE_ACCOUNT_KEY": "c2VjcmV0",
        "AZURE_STORAGE_ENDPOINT": f"{endpoint}/account",
    }
    return {"s3": "s3://night", "gs": "gs://night", "abfs": "abfs://night", "http": f"{endpoint}/night"}


async def measure(prefix: str, images: int) -> Result:
    """Fetch images, each of which leaves as soon as it has arrived."""
    options = RunOptions.of(
        allow_bucket=["s3://night", "gs://night", "abfs://night"],
        allow_private=["127.0.0.0/8"],
        **({"fetch_per_host": PER_BUCKET} if prefix.startswith("http:") else {}),
    )
    arena = Arena(ARENA_BLOCKS, BLOCK_BYTES)
    done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    left = images

    def finish(fetch: Fetch) -> None:
        nonlocal left
        left -= 1
        if fetch.error is None:
            fetch.result().release()
        if not done.done() and fetch.error is not None:
            done.set_exception(fetch.error)
        elif not done.done() and not left:
            done.set_result(None)

    async with Fetcher(options.fetch, arena) as fetcher:
        started, cpu_started = time.monotonic(), time.process_time()
        for number in range(images):
            fetcher.submit([WebImage(f"{prefix}/{number}.jpg")], finish)
        await done
        result = Result(time.monotonic() - started, time.process_time() - cpu_started)
    arena.close()
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stores", nargs="*", metavar="STORE", help="s3, gs, abfs, http [all]")
    parser.add_argument("--images", type=int, default=5000, help="number of images [5,000]")
    parser.add_argument("--latency", type=float, default=LATENCY, help=f"factor for delays of {MEDIAN} s [{LATENCY}]")
    parser.add_argument("--rounds", type=int, default=3, help="measure everything so many times, in turn [3]")
    args = parser.parse_args()
    raise_file_limit()
    print(f"{'store':6}{'images/s':>10}{'CPU ms per image':>18}")
    with WebServer(args.latency) as web:
        urls = prefixes(web.port)
        for store in [*(args.stores or urls)] * args.rounds:
            result = asyncio.run(measure(urls[store], args.images))
            cpu = result.cpu_seconds / args.images * 1000
            print(f"{store:6}{args.images / result.seconds:10,.0f}{cpu:18.2f}", flush=True)


if __name__ == "__main__":
    main()
