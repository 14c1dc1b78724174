"""Write tar files, and directories like those that img2dataset writes, for tests."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image


def write_tar(path: Path, members: Iterable[tuple[str | tarfile.TarInfo, bytes]], **options: Any) -> Path:
    """Write an uncompressed tar with these members, in pax format unless `options` say otherwise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", **options) as tar:
        for name, data in members:
            info = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            info.size = len(data)
            info.mtime = 1.5  # type: ignore[assignment]  # a fraction needs an extended header, as img2dataset has it
            tar.addfile(info, io.BytesIO(data))
    return path


def special(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    """Return a member that is not a file."""
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def jpeg(number: int) -> bytes:
    """Return an image in a colour that depends on its number."""
    file = io.BytesIO()
    Image.new("RGB", (40, 30), (number * 53 % 256, number * 17 % 256, number % 256)).save(file, "JPEG")
    return file.getvalue()


FAILED = 5
"""The row of `img2dataset` that could not be downloaded."""


def img2dataset(directory: Path, output_format: str) -> Path:
    """Write what img2dataset writes for seven rows in two shards, in the order in which downloads ended.

    Args:
        directory: Where to write.
        output_format: "webdataset", "parquet" or "files".
    """
    directory.mkdir(parents=True)
    for shard, numbers in (("00000", [2, 0, 1, 3]), ("00001", [6, 4, FAILED])):
        rows = [_img2dataset_row(number) for number in numbers]
        schema = pa.schema([(name, pa.int32() if name == "width" else pa.string()) for name in rows[0]])
        if output_format == "parquet":
            schema = schema.append(pa.field("jpg", pa.binary()))
            for number, row in zip(numbers, rows, strict=True):
                row["jpg"] = None if number == FAILED else jpeg(number)
        pq.write_table(pa.Table.from_pylist(rows, schema), directory / f"{shard}.parquet")
        (directory / f"{shard}_stats.json").write_text(json.dumps({"count": len(rows)}))
        members = [
            member
            for number, row in zip(numbers, rows, strict=True)
            if number != FAILED and output_format != "parquet"
            for member in (
                (f"{row['key']}.jpg", jpeg(number)),
                (f"{row['key']}.json", json.dumps(row, indent=4).encode()),
                (f"{row['key']}.txt", row["caption"].encode()),
            )
        ]
        if output_format == "webdataset":
            write_tar(directory / f"{shard}.tar", members)
        elif output_format == "files":
            (directory / shard).mkdir()
            for name, data in members:
                (directory / shard / name).write_bytes(data)
    return directory


def _img2dataset_row(number: int) -> dict[str, Any]:
    failed = number == FAILED
    return {
        "license": "CC",
        "caption": f"caption {number}",
        "url": f"http://example.org/{number}.jpg",
        "key": f"00000{number}",
        "status": "failed_to_download" if failed else "success",
        "error_message": "HTTP Error 404: Not Found" if failed else None,
        "width": None if failed else 40,
    }
