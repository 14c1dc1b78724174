"""What batchvl itself costs: rows a second, the runner's CPU a row, and memory by the manifest's length.

    python benchmarks/overhead.py            # about two minutes on two cores
    python benchmarks/overhead.py text       # only one of: text, pictures, shared, memory

The engine is the FakeEngine, which answers at once, so all that is measured is ours.

text      rows without pictures, from Parquet: rows/s of the whole run, the runner's CPU a row
pictures  rows with one picture each (a path): the runner's CPU a row. The workers' CPU is not in it
shared    the same, ten rows about each picture
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
own = resource.getrusage(resource.RUSAGE_SELF)
# Not ru_maxrss, which has what the process was before it became this program.
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
print(json.dumps(dict(
    exit_code=summary.exit_code, rows=summary.rows, seconds=summary.seconds,
    cpu=own.ru_utime + own.ru_stime, peak=int(status["VmHWM"].split()[0]) * 1024,
)))
"""


def manifest(folder: Path, rows: int, *, pictures: int = 0, questions: int = 1) -> Path:
    """A Parquet manifest of `rows` rows; with `pictures`, each has one of so many files, and `questions` of them the
    same path to it, so that batchvl takes it for the same.
    """
    path = folder / f"{rows}-{pictures}-{questions}.parquet"
    schema = pa.schema([("id", pa.int64()), ("prompt", pa.string())])
    for i in range(pictures):
        Image.new("RGB", (64, 64), (i % 256, i // 256, 0)).save(folder / f"{i}.png")
    if pictures:
        schema = schema.append(pa.field("image", pa.string()))
        for i in range(-(-rows // pictures)):
            (folder / str(i)).unlink(missing_ok=True)
            (folder / str(i)).symlink_to(".")
    with pq.ParquetWriter(path, schema) as writer:
        for start in range(0, rows, 10_000):
            numbers = range(start, min(rows, start + 10_000))
            columns = [list(numbers), [f"what is in picture number {n}?" for n in numbers]]
            if pictures:
                places = (divmod(n // questions, pictures) for n in numbers)
                columns.append([f"{way}/{number}.png" for way, number in places])
            arrays = [pa.array(column, field.type) for column, field in zip(columns, schema, strict=True)]
            writer.write_batch(pa.record_batch(arrays, schema=schema))
    return path


def measure(path: Path, folder: Path, **options: object) -> dict[str, float]:
    """One run in a process of its own."""
    output = folder / f"out-{path.stem}-{len(list(folder.iterdir()))}"
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(path), str(output), json.dumps(options)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    result: dict[str, float] = json.loads(done.stdout)
    assert result["exit_code"] == 0, done.stderr
    return result


def text(folder: Path) -> None:
    small, large = (measure(manifest(folder, rows), folder) for rows in (1_000, 50_000))
    rows = large["rows"] - small["rows"]
    print(f"text      {large['rows'] / large['seconds']:8,.0f} rows/s, start and merge included", end="")
    print(f"; runner's CPU {(large['cpu'] - small['cpu']) / rows * 1e3:.3f} ms a row")


def pictures(folder: Path, name: str = "pictures", questions: int = 1) -> None:
    sizes = (500, 20_500)
    small, large = (measure(manifest(folder, rows, pictures=256, questions=questions), folder) for rows in sizes)
    rows = large["rows"] - small["rows"]
    print(f"{name:8}  {large['rows'] / large['seconds']:8,.0f} rows/s with {os.cpu_count()} CPUs", end="")
    print(f"; runner's CPU {(large['cpu'] - small['cpu']) / rows * 1e3:.3f} ms a row")


def shared(folder: Path) -> None:
    pictures(folder, "shared", questions=10)


def memory(folder: Path) -> None:
    peaks = [measure(manifest(folder, rows), folder)["peak"] for rows in (10_000, 1_000_000)]
    print(f"memory    {peaks[0] / 1e6:8,.0f} MB at 10 thousand rows, {peaks[1] / 1e6:,.0f} MB at 1 million", end="")
    print(f": {peaks[1] / peaks[0] - 1:+.1%}")


def main() -> None:
    parts = {"text": text, "pictures": pictures, "shared": shared, "memory": memory}
    chosen = sys.argv[1:] or list(parts)
    print(f"{os.cpu_count()} CPUs, Python {sys.version.split()[0]}")
    for name in chosen:
        with tempfile.TemporaryDirectory() as folder:
            parts[name](Path(folder))


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_NOFILE, (4096, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    main()
