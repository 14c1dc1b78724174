"""Time and memory of `batchvl status` and `batchvl validate`.

    python benchmarks/status_cost.py                               # 200,000 rows in 20 parts: half a minute
    python benchmarks/status_cost.py --rows 10000000 --parts 1000  # the figures of docs/performance.md: 3 GB of disk

status    of an output directory in which all rows are done, in its own process
validate  of a Parquet manifest in which all ids, prompts and images (URLs) differ
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from history import GROUP_ROWS, History

from batchvl.results import RunFile
from batchvl.results.output import LocalStorage
from batchvl.storage.disk import Disk

# Not ru_maxrss, which includes the memory of the process before it became this program.
CHILD = """
import atexit, sys

@atexit.register
def report_peak():
    status = dict(line.split(":", 1) for line in open("/proc/self/status"))
    print(status["VmHWM"].split()[0], file=sys.stderr)

from batchvl.cli import main
main(sys.argv[1:])
"""


def measure(*arguments: str | Path) -> tuple[float, float]:
    """Run a command of batchvl and return its seconds and its peak memory in MB."""
    begin = time.monotonic()
    process = subprocess.run([sys.executable, "-c", CHILD, *map(str, arguments)], capture_output=True, text=True)
    if process.returncode:
        sys.exit(f"{arguments[0]}: {process.stderr}")
    return time.monotonic() - begin, int(process.stderr) / 1000


def write_manifest(directory: Path, rows: int) -> Path:
    """Write a manifest whose rows have no value in common."""
    path, names = directory / "manifest.parquet", ("id", "prompt", "image")
    texts = ("row-{}", "What is in image number {}?", "http://example.org/{}.jpg")
    with pq.ParquetWriter(path, pa.schema([(name, pa.string()) for name in names])) as writer:
        for start in range(0, rows, GROUP_ROWS):
            numbers = range(start, min(rows, start + GROUP_ROWS))
            writer.write_table(pa.table([[text.format(n) for n in numbers] for text in texts], names))
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--parts", type=int, default=20, help="number of parts for status")
    args = parser.parse_args()
    print(f"{os.cpu_count()} CPUs, Python {sys.version.split()[0]}; {args.rows:,} rows")
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        out = directory / "out"
        LocalStorage(out).create_or_verify(RunFile("f00d", {}, total=args.rows), Disk())
        History(out, args.rows // args.parts).add_parts(range(args.rows))
        for command, path in (("status", out), ("validate", write_manifest(directory, args.rows))):
            seconds, peak = measure(command, path)
            print(f"{command:9} {seconds:8.1f} s {peak:6.0f} MB", flush=True)


if __name__ == "__main__":
    main()
