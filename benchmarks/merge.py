"""Speed and memory of `batchvl merge` by the number of rows and by their distribution over the parts.

    python benchmarks/merge.py                                  # 1,000,000 rows, two minutes on two cores
    python benchmarks/merge.py 1000000 10000000 --layout twice  # ten minutes, 6 GB of disk
    python benchmarks/merge.py --file results.jsonl.gz --manifest parquet

The parts are written here: 10,000 rows each, with an answer of 300 characters per row. Memory is the peak of
the merge's process above its size before the merge.

ordered     one attempt, in the manifest's order
late        the same, but every 100th row is three parts late, like one that was retried after a pause
twice       two attempts did every row, their parts shifted by half
retried     in order, and a retry of every 20th row, in random order: each of its row groups spans all rows
scattered   one attempt, rows in random order over all parts
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
from batchvl.results.output import LocalStorage
from batchvl.results.record import to_batch
from batchvl.results.rowset import Outcomes, RowSet
from batchvl.storage.disk import Disk
from batchvl.types import Image

PART_ROWS = 10_000
"""Rows per part."""
ANSWER_CHARACTERS = 300
"""Characters per answer."""
LAYOUTS = ("ordered", "late", "twice", "retried", "scattered")

CHILD = """
import json, sys, time
from pathlib import Path
from batchvl.results import merge

def memory(name):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(name))

out, file, manifest = json.loads(sys.argv[1])
before, begin = memory("VmRSS"), time.monotonic()
report = merge(Path(out), Path(file), with_manifest=manifest)
seconds = time.monotonic() - begin
assert not report.missing, str(report)
print(json.dumps(dict(rows=report.rows, seconds=seconds, peak=memory("VmHWM") - before)))
"""


def write_manifest(directory: Path, rows: int, suffix: str) -> Path:
    """Write a manifest with an id, a prompt, an image's path and two more columns."""
    path = directory / f"manifest.{suffix}"
    if suffix == "jsonl":
        with path.open("w") as file:
            for row in range(rows):
                file.write(
                    f'{{"id": {row}, "prompt": "What is in image {row}?", "image": "{row}.jpg", '
                    f'"score": {row / 8}, "tags": ["a", "b{row}"]}}\n'
                )
        return path
    schema = pa.schema(
        [
            ("id", pa.int64()),
            ("prompt", pa.string()),
            ("image", pa.string()),
            ("score", pa.float64()),
            ("tags", pa.list_(pa.string())),
        ]
    )
    with pq.ParquetWriter(path, schema) as writer:
        for start in range(0, rows, 10 * PART_ROWS):
            group = range(start, min(rows, start + 10 * PART_ROWS))
            prompts, images = [f"What is in image {row}?" for row in group], [f"{row}.jpg" for row in group]
            columns = [list(group), prompts, images, [row / 8 for row in group], [["a", f"b{row}"] for row in group]]
            writer.write_table(pa.table(columns, schema=schema))
    return path


def layout(name: str, rows: int) -> Iterator[tuple[int, int, np.ndarray]]:
    """Yield the parts of a layout in order: attempt, retry and rows."""
    ordered = np.arange(rows)
    chance = np.random.default_rng(7)
    match name:
        case "ordered":
            yield from _parts(1, 0, ordered)
        case "late":
            due = np.where(ordered % 100 == 0, ordered + 3 * PART_ROWS, ordered)
            yield from _parts(1, 0, np.argsort(due, kind="stable"))
        case "twice":
            yield from _parts(1, 0, ordered)
            yield from _parts(2, 0, np.roll(ordered, PART_ROWS // 2))
        case "retried":
            yield from _parts(1, 0, ordered)
            yield from _parts(2, 1, chance.permutation(ordered[::20]))
        case "scattered":
            yield from _parts(1, 0, chance.permutation(ordered))


def _parts(attempt: int, retry: int, rows: np.ndarray) -> Iterator[tuple[int, int, np.ndarray]]:
    for start in range(0, len(rows), PART_ROWS):
        yield attempt, retry, np.sort(rows[start : start + PART_ROWS])


def records(seed: int = 7) -> list[Record]:
    """Return results like captions of one image each; their row numbers are replaced later."""
    chance = random.Random(seed)
    words = ["".join(chance.choices("etaoinshrdlu", k=chance.randint(2, 9))) for _ in range(3000)]
    results = []
    for row in range(PART_ROWS):
        text = " ".join(words[int(chance.paretovariate(0.6)) % len(words)] for _ in range(ANSWER_CHARACTERS // 6))[
            :ANSWER_CHARACTERS
        ]
        image = Image(f"{row}.jpg", f"{chance.getrandbits(256):064x}", 640, 480, 100_000 + row)
        results.append(
            Record(
                row,
                "ok",
                id=row,
                response=text,
                finish_reason="stop",
                input_tokens=1800,
                output_tokens=len(text) // 5,
                images=[image],
                seconds=chance.random(),
            )
        )
    return results


def write_output(out: Path, source: Path, rows: int, name: str) -> None:
    """Write an output directory with the parts of a layout."""
    manifest = Manifest.open(source, ManifestOptions(), PromptOptions())
    run_file = RunFile(manifest.fingerprint, {}, id_type="int64", manifest=str(source), total=rows)
    storage = LocalStorage(out)
    storage.create_or_verify(run_file, Disk())
    shard = storage.shard(Shard())
    shard.path.mkdir()
    batch = to_batch(records(), run_file.schema)
    metadata = {"engine": json.dumps({"engine": "fake", "notes": ["…"] * 10}), "fingerprint": run_file.fingerprint}
    for number, (attempt, retry, numbers) in enumerate(layout(name, rows), 1):
        row = pa.array(numbers)
        columns = dict(zip(run_file.schema.names, batch.slice(0, len(row)).columns, strict=True))
        table = pa.table(columns | {"row": row, "id": row}, schema=run_file.schema)
        outcomes = Outcomes(ok=RowSet(numbers.tolist()))
        with pq.ParquetWriter(
            shard.part((attempt, number)),
            run_file.schema,
            compression="zstd",
            write_page_checksum=True,
            use_dictionary=parts.DICTIONARY,
        ) as writer:
            writer.write_table(table, row_group_size=parts.GROUP_ROWS)
            writer.add_key_value_metadata(parts.footer(Journal(attempt, retry, b""), outcomes, metadata))


def measure(directory: Path, rows: int, name: str, file: str, joined: str | None) -> None:
    """Write an output directory, merge it in another process and print the figures.

    Args:
        directory: Directory to work in.
        rows: Number of rows.
        name: The layout.
        file: Name of the merged file.
        joined: Suffix of a manifest whose columns are joined; None to join none.
    """
    out = directory / name
    out.mkdir()
    source = write_manifest(directory, rows, joined or "parquet")
    write_output(out, source, rows, name)
    size = sum(path.stat().st_size for path in out.rglob("*.parquet"))
    arguments = [str(out), str(out / file), str(source) if joined else None]
    begin = time.monotonic()
    process = subprocess.run([sys.executable, "-c", CHILD, json.dumps(arguments)], capture_output=True, text=True)
    if process.returncode:
        sys.exit(process.stderr)
    figures = json.loads(process.stdout)
    assert figures["rows"] == rows
    print(
        f"{name:10} {rows:>12,} rows, parts of {size / 1e6:,.0f} MB: {figures['seconds']:,.1f} s, "
        f"{rows / figures['seconds']:,.0f} rows/s, {figures['peak'] / 1e6:,.0f} MB of memory "
        f"({time.monotonic() - begin:.1f} s in all)",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", type=int, default=[1_000_000])
    parser.add_argument("--layout", nargs="+", choices=LAYOUTS, default=LAYOUTS)
    parser.add_argument("--file", default="results.parquet")
    parser.add_argument(
        "--manifest", choices=("parquet", "jsonl"), help="join the columns of a manifest in this format"
    )
    parser.add_argument(
        "--directory", type=Path, help="directory to work in [default: the system's for temporary files]"
    )
    args = parser.parse_args()
    for name in args.layout:
        for rows in args.rows:
            with tempfile.TemporaryDirectory(dir=args.directory) as directory:
                measure(Path(directory), rows, name, args.file, args.manifest)


if __name__ == "__main__":
    main()
