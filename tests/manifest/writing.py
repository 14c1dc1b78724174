"""Write manifests for tests, and read them with batchvl."""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Container
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from batchvl.config.options import ManifestOptions, PromptOptions
from batchvl.config.units import Shard
from batchvl.manifest import Manifest
from batchvl.manifest.manifest import ALL
from batchvl.types import Row
from tests.manifest.tars import write_tar


def write(path: Path, rows: list[dict[str, Any]], **options: Any) -> Path:
    """Write rows in the format of the file's suffix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    name = path.name.removesuffix(".gz").removesuffix(".zst")
    if name.endswith(".parquet"):
        table = pa.Table.from_pylist(rows, schema=options.pop("schema", None))
        pq.write_table(table, path, **options)
        return path
    if name.endswith(".csv"):
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
        return path
    if name.endswith(".tar"):
        return write_tar(path, [(f"{at:06}.json", json.dumps(row).encode()) for at, row in enumerate(rows)])
    return write_bytes(path, b"".join(json.dumps(row).encode() + b"\n" for row in rows))


def write_bytes(path: Path, data: bytes) -> Path:
    """Write text, compressed according to the file's suffix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".gz":
        data = gzip.compress(data)
    elif path.suffix == ".zst":
        with pa.CompressedOutputStream(str(path), "zstd") as stream:
            stream.write(data)
        return path
    path.write_bytes(data)
    return path


def opened(source: Path | str, prompt: str | None = None, **options: Any) -> Manifest:
    return Manifest.open(source, ManifestOptions(**options), PromptOptions(prompt=prompt))


def rows_of(source: Path | str, shard: Shard = ALL, skip: Container[int] = (), **options: Any) -> list[Row]:
    return [row for rows in opened(source, **options).rows(shard, skip) for row in rows]


def numbers(rows: list[Row]) -> list[int]:
    return [row.number for row in rows]
