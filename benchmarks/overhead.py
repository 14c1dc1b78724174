"""The cost of batchvl itself: rows per second, the runner's CPU per row, and its memory by the manifest's length.

    python benchmarks/overhead.py            # about two minutes on two cores
    python benchmarks/overhead.py text       # only one of: text, images, shared, memory

The engine is the FakeEngine, which answers immediately, so all that is measured is batchvl.

text      rows without images, from Parquet: rows/s of the whole run, the runner's CPU per row
images    rows with one image each (a path): the runner's CPU per row, without that of the image workers
shared    the same with ten rows about each image
memory    peak resident memory of the runner at 10 thousand and at 1 million rows
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

CHILD = """
import json, resource, sys
import batchvl
summary = batchvl.run(sys.argv[1], output=sys.argv[2], engine="fake", quiet=True, **json.loads(sys.argv[3]))
usage = resource.getrusage(resource.RUSAGE_SELF)
# Not ru_maxrss, which includes the memory of the process before it became this program.
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
print(json.dumps(dict(
    exit_code=summary.exit_code, rows=summary.rows, seconds=summary.seconds,
    cpu=usage.ru_utime + usage.ru_stime, peak=int(status["VmHWM"].split()[0]) * 1024,
)))
"""


def write_manifest(directory: Path, rows: int, *, images: int = 0, questions: int = 1) -> Path:
    """Write a Parquet manifest.

    Args:
        directory: Directory for the manifest and its images.
        rows: Number of rows.
        images: Number of image files, of which each row names one; 0 for rows without images.
        questions: Number of consecutive rows that name an image by the same path, so that batchvl reads it once.
    """
    path = directory / f"{rows}-{images}-{questions}.parquet"
    schema = pa.schema([("id", pa.int64()), ("prompt", pa.string())])
    for i in range(images):
        Image.new("RGB", (64, 64), (i % 256, i // 256, 0)).save(directory / f"{i}.png")
    if images:
        schema = schema.append(pa.field("image", pa.string()))
        for i in range(-(-rows // images)):
            (directory / str(i)).unlink(missing_ok=True)
            (directory / str(i)).symlink_to(".")
    with pq.ParquetWriter(path, schema) as writer:
        for start in range(0, rows, 10_000):
            numbers = range(start, min(rows, start + 10_000))
            columns = [list(numbers), [f"what is in image number {n}?" for n in numbers]]
            if images:
                links = (divmod(n // questions, images) for n in numbers)
                columns.append([f"{link}/{number}.png" for link, number in links])
            arrays = [pa.array(column, field.type) for column, field in zip(columns, schema, strict=True)]
            writer.write_batch(pa.record_batch(arrays, schema=schema))
    return path


def measure(manifest: Path, directory: Path, **options: object) -> dict[str, float]:
    """Run batchvl in its own process and return what the process reports."""
    output = directory / f"out-{manifest.stem}-{len(list(directory.iterdir()))}"
    command = [sys.executable, "-c", CHILD, str(manifest), str(output), json.dumps(options)]
    process = subprocess.run(command, capture_output=True, text=True)
    if process.returncode:
        sys.exit(process.stderr)
    result: dict[str, float] = json.loads(process.stdout)
    if result["exit_code"]:
        sys.exit(process.stderr)
    return result


def text(directory: Path) -> None:
    small, large = (measure(write_manifest(directory, rows), directory) for rows in (1_000, 50_000))
    rows = large["rows"] - small["rows"]
    print(f"text      {large['rows'] / large['seconds']:8,.0f} rows/s, including start and merge", end="")
    print(f"; runner's CPU {(large['cpu'] - small['cpu']) / rows * 1e3:.3f} ms per row")


def images(directory: Path, name: str = "images", questions: int = 1) -> None:
    manifests = (write_manifest(directory, rows, images=256, questions=questions) for rows in (500, 20_500))
    small, large = (measure(manifest, directory) for manifest in manifests)
    rows = large["rows"] - small["rows"]
    print(f"{name:8}  {large['rows'] / large['seconds']:8,.0f} rows/s with {os.cpu_count()} CPUs", end="")
    print(f"; runner's CPU {(large['cpu'] - small['cpu']) / rows * 1e3:.3f} ms per row")


def shared(directory: Path) -> None:
    images(directory, "shared", questions=10)


def memory(directory: Path) -> None:
    peaks = [measure(write_manifest(directory, rows), directory)["peak"] for rows in (10_000, 1_000_000)]
    print(f"memory    {peaks[0] / 1e6:8,.0f} MB at 10 thousand rows, {peaks[1] / 1e6:,.0f} MB at 1 million", end="")
    print(f": {peaks[1] / peaks[0] - 1:+.1%}")


CASES = {"text": text, "images": images, "shared": shared, "memory": memory}


def main() -> None:
    names = sys.argv[1:] or list(CASES)
    if unknown := set(names) - set(CASES):
        sys.exit(f"unknown case {', '.join(unknown)}: want {', '.join(CASES)}")
    print(f"{os.cpu_count()} CPUs, Python {sys.version.split()[0]}")
    for name in names:
        with tempfile.TemporaryDirectory() as directory:
            CASES[name](Path(directory))


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_NOFILE, (4096, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    main()
