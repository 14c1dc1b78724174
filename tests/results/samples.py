"""Records and runs to test with."""

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from batchvl.config.options import OutputOptions
from batchvl.results import Record, ResultStore, RunFile
from batchvl.results.location import open_output
from batchvl.results.shard import ShardDirectory
from batchvl.types import Failure, Image

GUARD = RunFile("f00d", {"model": "shapes"}, manifest="m.parquet")


def sample(row: int, **changed: Any) -> Record:
    """A record whose content is told by its row alone."""
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
    """A failed row's record."""
    error = Failure(code, "fetch", f"{row}.jpg: no such file")
    return Record(row, "failed", error=error, **({"id": f"id-{row}"} | changed))


def options(**values: Any) -> OutputOptions:
    return OutputOptions(**({"commit_seconds": 0.01} | values))


async def fill(
    folder: Path, records: Iterable[Record], guard: RunFile = GUARD, *, complete: bool = False, part_rows: int = 10_000,
    metadata: dict[str, str] | None = None, **given: Any,
) -> ResultStore:  # fmt: skip
    """An attempt that writes the records and ends."""
    output = ResultStore.open(folder, guard, options=options(part_rows=part_rows), **given)
    try:
        output.describe({"engine": "fake"} if metadata is None else metadata)
        for record in records:
            await output.wait_for_capacity()
            output.add(record)
    finally:
        await output.close(complete)
    return output


def only_folder(out: Path) -> ShardDirectory:
    [folder] = open_output(out).shards()
    return folder


def names(out: Path) -> set[str]:
    """The files of the only shard's folder."""
    return {path.name for path in only_folder(out).path.iterdir()}
