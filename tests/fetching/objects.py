"""A fetcher of objects, and what it makes of a URL."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from batchvl.config.options import RunOptions
from batchvl.errors import RowError
from batchvl.fetching.fetcher import Fetcher
from batchvl.ipc.arena import Arena
from batchvl.types import WebImage

LIMIT = 8 * 2**20
BUCKETS = ("s3://night", "gs://night", "abfs://night")


@asynccontextmanager
async def fetching(**options: Any) -> AsyncIterator[tuple[Fetcher, Arena]]:
    """A fetcher that may read all buckets. Checks at the end that nothing of the arena is still reserved."""
    defaults = {"allow_bucket": BUCKETS, "allow_private": ["127.0.0.0/8", "::1"], "max_image_bytes": LIMIT}
    arena = Arena(16_384, 4096)
    async with Fetcher(RunOptions.of(**(defaults | options)).fetch, arena, backoff=0.01) as fetcher:
        yield fetcher, arena
    assert arena.free_blocks == 16_384, "an extent was leaked"
    arena.close()


async def fetch_one(fetcher: Fetcher, arena: Arena, url: str) -> bytes:
    fetched = await fetcher.fetch([WebImage(url)])
    assert fetched.extents[0] is not None
    data = bytes(arena.at(fetched.extents[0]))
    fetched.release()
    return data


async def error_of(url: str, **options: Any) -> RowError:
    async with fetching(**options) as (fetcher, _):
        with pytest.raises(RowError) as failed:
            await fetcher.fetch([WebImage(url)])
    assert len(str(failed.value)) <= 300
    return failed.value
