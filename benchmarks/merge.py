"""How fast `batchvl merge` is and what it holds in memory, by the number of rows and by how they lie in the parts.

    python benchmarks/merge.py                                  # 1,000,000 rows, two minutes on two cores
    python benchmarks/merge.py 1000000 10000000 --layout twice  # ten minutes, 6 GB of disk
    python benchmarks/merge.py --file results.jsonl.gz --manifest parquet

The parts are made here, 10,000 rows each, an answer of 300 characters a row. Memory is the peak of the merge's process
above what it had before the merge.

ordered     one attempt, in the manifest's order
late        the same, but every 100th row is as late as three parts, as one that was tried again after a pause
twice       two attempts did every row, their parts shifted by half
retried     in order, and a retry of every 20th row, in any order: each of its row groups reaches from end to end
scattered   one attempt, any row in any part: nobody's order
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from batchvl.config.options import ManifestOptions, PromptOptions
from batchvl.config.units import Shard
from batchvl.manifest import Manifest
from batchvl.results import Record, RunFile, parts
from batchvl.results.journal import Journal
from batchvl.results.record import to_batch
from batchvl.results.rowset import Outcomes, RowSet
from batchvl.results.shard import ShardFolder
from batchvl.storage.disk import Disk
from batchvl.types import Image

PART = 10_000
ANSWER = 300
"""Characters."""
LAYOUTS = ("ordered", "late", "twice", "retried", "scattered")

CHILD = """
import json, sys, time
from pathlib import Path
from batchvl.results import merge

def memory(name):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(name))

out, file, manifest = json.loads(sys.argv[1])
before, began = memory("VmRSS"), time.monotonic()
report = merge(Path(out), Path(file), with_manifest=manifest)
seconds = time.monotonic() - began
assert not report.missing, str(report)
print(json.dumps(dict(rows=report.rows, seconds=seconds, peak=memory("VmHWM") - before)))
"""


def manifest(folder: Path, rows: int, kind: str) -> Path:
    """A manifest of `rows` rows with an id, a prompt, a picture's path and two columns more."""
    path = folder / f"manifest.{kind}"
    if kind == "jsonl":
        with path.open("w") as file:
            for row in range(rows):
                file.write(
                    f'{{"id": {row}, "prompt": "What is in picture {row}?", "image": "{row}.jpg", '
                    f'"score": {row / 8}, "tags": ["a", "b{row}"]}}\n'
                )
        return path
    schema = pa.schema(
        [("id", pa.int64()), ("prompt", pa.string()), ("image", pa.string()), ("score", pa.float64()),
         ("tags", pa.list_(pa.string()))]
    )  # fmt: skip
    with pq.ParquetWriter(path, schema) as writer:
        for start in range(0, rows, 10 * PART):
            some = range(start, min(rows, start + 10 * PART))
            prompts, images = [f"What is in picture {row}?" for row in some], [f"{row}.jpg" for row in some]
            columns = [list(some), prompts, images, [row / 8 for row in some], [["a", f"b{row}"] for row in some]]
            writer.write_table(pa.table(columns, schema=schema))
    return path


def layout(name: str, rows: int) -> Iterator[tuple[int, int, np.ndarray]]:
    """The parts, in order: attempt, retry, and rows."""
    ordered = np.arange(rows)
    chance = np.random.default_rng(7)
    match name:
        case "ordered":
            yield from _cut(1, 0, ordered)
        case "late":
            due = np.where(ordered % 100 == 0, ordered + 3 * PART, ordered)
            yield from _cut(1, 0, np.argsort(due, kind="stable"))
        case "twice":
            yield from _cut(1, 0, ordered)
            yield from _cut(2, 0, np.roll(ordered, PART // 2))
        case "retried":
            yield from _cut(1, 0, ordered)
            yield from _cut(2, 1, chance.permutation(ordered[::20]))
        case "scattered":
            yield from _cut(1, 0, chance.permutation(ordered))


def _cut(attempt: int, retry: int, rows: np.ndarray) -> Iterator[tuple[int, int, np.ndarray]]:
    for start in range(0, len(rows), PART):
        yield attempt, retry, np.sort(rows[start : start + PART])


def records(seed: int = 7) -> list[Record]:
    """Results such as captions of a picture each; their rows are told later."""
    chance = random.Random(seed)
    words = ["".join(chance.choices("etaoinshrdlu", k=chance.randint(2, 9))) for _ in range(3000)]
    found = []
    for row in range(PART):
        text = " ".join(words[int(chance.paretovariate(0.6)) % len(words)] for _ in range(ANSWER // 6))[:ANSWER]
        image = Image(f"{row}.jpg", f"{chance.getrandbits(256):064x}", 640, 480, 100_000 + row)
        found.append(
            Record(
                row, "ok", id=row, response=text, finish_reason="stop", input_tokens=1800, output_tokens=len(text) // 5,
                images=[image], seconds=chance.random(),
            )
        )  # fmt: skip
    return found


def fill(out: Path, source: Path, rows: int, name: str) -> None:
    """An output folder with the parts of a layout."""
    found = Manifest.open(source, ManifestOptions(), PromptOptions())
    guard = RunFile(found.fingerprint, {}, id_type="int64", manifest=str(source), total=rows)
    guard.claim(out, Disk())
    shard = ShardFolder.of(out, Shard())
    shard.path.mkdir()
    batch = to_batch(records(), guard.schema)
    metadata = {"engine": json.dumps({"engine": "fake", "notes": ["…"] * 10}), "fingerprint": guard.fingerprint}
    for number, (attempt, retry, numbers) in enumerate(layout(name, rows), 1):
        row = pa.array(numbers)
        columns = dict(zip(guard.schema.names, batch.slice(0, len(row)).columns, strict=True))
        table = pa.table(columns | {"row": row, "id": row}, schema=guard.schema)
        tally = Outcomes(ok=RowSet(numbers.tolist()))
        with pq.ParquetWriter(
            shard.part((attempt, number)), guard.schema, compression="zstd", write_page_checksum=True,
            use_dictionary=parts.DICTIONARY,
        ) as writer:  # fmt: skip
            writer.write_table(table, row_group_size=parts.GROUP_ROWS)
            writer.add_key_value_metadata(parts.footer(Journal(attempt, retry, b""), tally, metadata))


def measure(folder: Path, rows: int, name: str, file: str, kind: str | None) -> None:
    """Makes the folder, merges in a process of its own and prints a line."""
    out = folder / name
    out.mkdir()
    source = manifest(folder, rows, kind or "parquet")
    fill(out, source, rows, name)
    size = sum(path.stat().st_size for path in out.rglob("*.parquet"))
    given = [str(out), str(out / file), str(source) if kind else None]
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", CHILD, json.dumps(given)], capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    found = json.loads(done.stdout)
    assert found["rows"] == rows
    print(
        f"{name:10} {rows:>12,} rows, parts of {size / 1e6:,.0f} MB: {found['seconds']:,.1f} s, "
        f"{rows / found['seconds']:,.0f} rows/s, {found['peak'] / 1e6:,.0f} MB on top "
        f"({time.monotonic() - began:.1f} s in all)",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", type=int, default=[1_000_000])
    parser.add_argument("--layout", nargs="+", choices=LAYOUTS, default=LAYOUTS)
    parser.add_argument("--file", default="results.parquet")
    parser.add_argument("--manifest", choices=("parquet", "jsonl"), help="Join its columns.")
    parser.add_argument("--folder", type=Path, help="Where to work. [default: the system's for temporary files]")
    given = parser.parse_args()
    for name in given.layout:
        for rows in given.rows:
            with tempfile.TemporaryDirectory(dir=given.folder) as folder:
                measure(Path(folder), rows, name, given.file, given.manifest)


if __name__ == "__main__":
    main()
