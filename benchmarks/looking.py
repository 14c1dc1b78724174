"""How long `batchvl status` and `batchvl validate` take, and how much memory.

    python benchmarks/looking.py                               # 200,000 rows in 20 parts: half a minute on two cores
    python benchmarks/looking.py --rows 10000000 --parts 1000  # the figures of docs/performance.md: 3 GB of disk

status    of an output folder whose rows are all done, as a command of its own
validate  of a manifest in Parquet: ids, questions and pictures (URLs) that are all different
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
from batchvl.storage.disk import Disk

# ru_maxrss would have what the process was before it became this program.
CHILD = """
import atexit, sys

@atexit.register
def tell():
    status = dict(line.split(":", 1) for line in open("/proc/self/status"))
    print(status["VmHWM"].split()[0], file=sys.stderr)

from batchvl.cli import main
main(sys.argv[1:])
"""


def measure(*arguments: str | Path) -> tuple[float, float]:
    """Seconds of a command of batchvl, and its peak memory in MB. What it says is for nobody."""
    begin = time.monotonic()
    done = subprocess.run([sys.executable, "-c", CHILD, *map(str, arguments)], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{arguments[0]}: {done.stderr}")
    return time.monotonic() - begin, int(done.stderr) / 1000


def manifest(folder: Path, rows: int) -> Path:
    """Rows of which none has anything that another one has."""
    path, names = folder / "manifest.parquet", ("id", "prompt", "image")
    texts = ("row-{}", "What is to be seen in picture number {}?", "http://example.org/{}.jpg")
    with pq.ParquetWriter(path, pa.schema([(name, pa.string()) for name in names])) as writer:
        for start in range(0, rows, GROUP_ROWS):
            numbers = range(start, min(rows, start + GROUP_ROWS))
            writer.write_table(pa.table([[text.format(n) for n in numbers] for text in texts], names))
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--parts", type=int, default=20, help="that the rows are in, for status")
    given = parser.parse_args()
    print(f"{os.cpu_count()} CPUs, Python {sys.version.split()[0]}; {given.rows:,} rows")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        out = folder / "out"
        RunFile("f00d", {}, total=given.rows).claim(out, Disk())
        History(out, given.rows // given.parts).parts(range(given.rows))
        for what, path in (("status", out), ("validate", manifest(folder, given.rows))):
            seconds, peak = measure(what, path)
            print(f"{what:9} {seconds:8.1f} s {peak:6.0f} MB", flush=True)


if __name__ == "__main__":
    main()
