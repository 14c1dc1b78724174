"""kill -9 while records are written, again and again in one folder."""

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from batchvl.output import Output, merge
from batchvl.output.record import to_batch

from .samples import GUARD, sample

ROWS = 100_000
ROUNDS = 5

WRITER = """
import asyncio, sys
from pathlib import Path
from batchvl.output import Output
from tests.output.samples import GUARD, options, sample

async def main(out, rows):
    told = 0
    def tell(counts):
        nonlocal told
        told += counts.rows
        print(told, flush=True)
    output = Output.open(out, GUARD, options=options(commit_seconds=0.002, part_rows=700), on_commit=tell)
    output.describe({"engine": "fake"})
    for row in output.done.missing(range(rows)):
        await output.room()
        output.add(sample(row))
        if row % 50 == 0:
            await asyncio.sleep(0.002)
    await output.close()

asyncio.run(main(Path(sys.argv[1]), int(sys.argv[2])))
"""


def killed_after(out: Path, seconds: float) -> int:
    """Runs a writer for so long from its first commit on; how many rows it reported as committed."""
    with subprocess.Popen(
        [sys.executable, "-c", WRITER, out, str(ROWS)], stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2]
    ) as process:
        assert process.stdout
        first = process.stdout.readline()
        time.sleep(seconds)
        process.send_signal(signal.SIGKILL)
        lines = [first, *process.stdout]
    return int([line for line in lines if line.endswith("\n")][-1])


async def test_what_was_reported_is_there_byte_for_byte_and_once(tmp_path: Path) -> None:
    chance = random.Random(7)
    out, reported = tmp_path / "out", 0
    for attempt in range(1, ROUNDS + 1):
        reported += killed_after(out, chance.uniform(0, 0.6))
        output = Output.open(out, GUARD)
        # In order, and only what an earlier attempt had not done: so the first rows are the ones reported.
        assert output.attempt == 2 * attempt
        assert list(output.done.missing(range(reported))) == []
        assert output.counts.rows == len(output.done)
        await output.close()
        reported = len(output.done)

    report = merge(out)
    assert report.rows == reported
    table = pq.read_table(report.file)
    assert table["row"].to_pylist() == list(range(reported))
    expected = to_batch([sample(row) for row in range(reported)], GUARD.schema)
    assert table.equals(pa.Table.from_batches([expected]))
    folder = out / "shard-00000-of-00001"
    assert list(folder.glob("part-*.parquet"))
    assert list(folder.glob("journal-*.log"))
