"""Sample records and runs."""

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from batchvl.config.options import OutputOptions
from batchvl.results import Record, ResultStore, RunFile
from batchvl.results.location import open_output
from batchvl.results.output import Storage
from batchvl.results.shard import ShardDirectory
from batchvl.types import Failure, Image

RUN_FILE = RunFile("f00d", {"model": "shapes"}, manifest="m.parquet")


def sample(row: int, **changed: Any) -> Record:
    """Return a record whose content depends on its row number only."""
    digest = hashlib.sha256(str(row).encode()).hexdigest()
    values = {
        "id": f"id-{row}",
        "response": f"answer {row} {digest}",
        "finish_reason": "stop",
        "input_tokens": row % 1000,
        "output_tokens": row % 100,
        "images": [Image(f"{row}.jpg", digest, 640, 480, 1234)],
        "seconds": row / 8,
    }
    return Record(row, "ok", **(values | changed))


def failed(row: int, code: str = "missing_file", **changed: Any) -> Record:
    """Return the record of a failed row."""
    error = Failure(code, "fetch", f"{row}.jpg: no such file")
    return Record(row, "failed", error=error, **({"id": f"id-{row}"} | changed))


def options(**values: Any) -> OutputOptions:
    return OutputOptions(**({"commit_seconds": 0.01} | values))


async def fill(
    out: Path | Storage,
    records: Iterable[Record],
    run_file: RunFile = RUN_FILE,
    *,
    complete: bool = False,
    part_rows: int = 10_000,
    metadata: dict[str, str] | None = None,
    **settings: Any,
) -> ResultStore:
    """Make an attempt that writes the records and ends."""
    results = ResultStore.open(out, run_file, options=options(part_rows=part_rows), **settings)
    try:
        results.describe({"engine": "fake"} if metadata is None else metadata)
        for record in records:
            await results.wait_for_capacity()
            results.add(record)
    finally:
        await results.close(complete)
    return results


def only_shard(out: Path) -> ShardDirectory:
    """Return the only shard's directory."""
    [shard] = open_output(out).shards()
    return shard


def names(out: Path) -> set[str]:
    """Return the names of the files in the only shard's directory."""
    return {path.name for path in only_shard(out).path.iterdir()}
