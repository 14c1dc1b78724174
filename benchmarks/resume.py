"""Time until a run resumes, and the cost of recording a row.

    python benchmarks/resume.py                               # 200,000 rows in 20 parts: two minutes on two cores
    python benchmarks/resume.py --rows 10000000 --parts 1000  # the figures of docs/performance.md: 4 GB of disk
    python benchmarks/resume.py --only spread jsonl

Each case is an output directory in which rows are done, some of them failed. `batchvl run` resumes it in its own
process, with the FakeEngine, until the engine is handed the first row that was not done. A case adds to the one before:

spread    one row in 10,000 is missing, and those at the end
end       only rows at the end are missing
jsonl     the same with a JSONL manifest and the index that an earlier attempt wrote
unread    the same without that index
overlap   Parquet again; two attempts did the same fifth of the rows
journal   one attempt was killed with the rows of a whole part in its journal
journals  64 more attempts were

record    no directory: rows are recorded as fast as possible, then at 2,000 rows per second
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

import msgspec
from history import History, records, write_images, write_manifest

from batchvl.config.options import OutputOptions
from batchvl.results import Counts, ResultStore, RunFile

MISSING_EVERY, JOURNALS, MISSING_AT_THE_END = 10_000, 64, 10_000
RECORDED, RATE, PACED_SECONDS = 200_000, 2_000, 15
KEPT = ("run.json", "lock", "manifest-index.json")

# The run's own calls mark the milestones; nothing else of it is changed.
CHILD = """
import json, os, sys, time

begin = float(sys.argv[1])
milestones = {}

def reached(name):
    milestones.setdefault(name, round(time.monotonic() - begin, 3))

def after(owner, method, name):
    inner = getattr(owner, method)
    def outer(*arguments, **named):
        result = inner(*arguments, **named)
        reached(name)
        return result
    setattr(owner, method, outer)

import batchvl.runner.job
from batchvl.cli import main
from batchvl.serving.client import EngineClient
from batchvl.serving.process import EngineProcess
from batchvl.manifest import Manifest
from batchvl.results.attempt import Attempt
from batchvl.results.shard import Recovered

reached("imports")
after(Manifest, "check", "manifest")
after(Attempt, "__init__", "attempt")
after(Recovered, "outcomes", "recovered")
after(EngineClient, "open", "engine")
rows = Manifest.rows

def read(*arguments):
    for batch in rows(*arguments):
        reached("row")
        yield batch

Manifest.rows = read

def infer(self, requests):
    reached("request")
    status = dict(line.split(":", 1) for line in open("/proc/self/status"))
    peak = int(status["VmHWM"].split()[0]) / 1000  # ru_maxrss would include the memory before exec
    print(json.dumps({**milestones, "cpu": time.process_time(), "peak": peak}), flush=True)
    os._exit(0)

EngineProcess.infer = infer
main(sys.argv[2:])
"""


def resume(source: Path, out: Path) -> dict[str, float]:
    """Resume a run, and return seconds from its start to each milestone, its CPU seconds and its peak memory (MB).

    Files that it wrote are removed, so that the next run finds the same output directory.
    """
    before = set(out.rglob("*"))
    command = [sys.executable, "-c", CHILD, str(time.monotonic()), "run", str(source), "-o", str(out)]
    process = subprocess.run([*command, "--engine", "fake", "--quiet"], capture_output=True, text=True)
    time.sleep(1)  # for its child processes to end
    for path in set(out.rglob("*")) - before:
        if path.name not in KEPT:
            path.unlink()
    if process.returncode or not process.stdout:
        sys.exit(f"{source}: the run ended without asking the engine for a row: {process.stderr}")
    milestones: dict[str, float] = json.loads(process.stdout)
    return milestones


def measure_cases(directory: Path, rows: int, part_rows: int, only: list[str], repeat: int) -> None:
    """Measure one case after the other; each adds to the output directory of the one before."""
    missing = range(MISSING_EVERY // 2, rows, MISSING_EVERY)
    total = rows + (1 + JOURNALS) * part_rows + MISSING_AT_THE_END
    sources = {suffix: write_manifest(directory, total, suffix) for suffix in ("parquet", "jsonl")}
    write_images(directory, total)
    out = directory / "out"
    history = History(out, part_rows)
    unfinished = iter(range(rows, total, part_rows))

    def add_killed(attempts: int) -> None:
        for start in (next(unfinished) for _ in range(attempts)):
            history.add_journal(range(start, start + part_rows))

    cases: dict[str, Callable[[], None]] = {
        "spread": lambda: history.add_parts(range(rows), excluded=missing),
        "end": lambda: history.add_parts(missing),
        "jsonl": lambda: None,
        "unread": lambda: None,
        "overlap": lambda: history.add_parts(range(rows * 2 // 5, rows * 3 // 5)),
        "journal": lambda: add_killed(1),
        "journals": lambda: add_killed(JOURNALS),
    }
    print(f"{rows:,} rows in parts of {part_rows:,}; seconds from the command's start, fastest of {repeat} runs")
    milestones = ("imports", "manifest", "attempt", "recovered", "engine", "row", "request")
    print(f"{'case':9}", *(f"{name:>9}" for name in milestones), "    CPU s", "  peak MB")
    for name, add in cases.items():
        add()
        if name not in only:
            continue
        source = sources["jsonl" if name in ("jsonl", "unread") else "parquet"]
        resume(source, out)  # creates run.json and fills the page cache
        runs = []
        for _ in range(repeat):
            if name == "unread":
                (out / "manifest-index.json").unlink(missing_ok=True)
            runs.append(resume(source, out))
        best = min(runs, key=lambda run: run["request"])
        print(
            f"{name:9}",
            *(f"{best[milestone]:9.2f}" for milestone in milestones),
            f"{best['cpu']:9.2f}{best['peak']:10.0f}",
        )
        (out / "run.json").unlink()


async def measure_recording(directory: Path) -> None:
    """Measure the CPU of journal and parts, of all threads, and how far they delay the event loop."""
    examples = records(10_000)
    output = _open_store(directory / "fast")
    begin, cpu = time.monotonic(), time.process_time()
    for row in range(RECORDED):
        await output.wait_for_capacity()
        output.add(msgspec.structs.replace(examples[row % len(examples)], row=row))
    await output.close()
    seconds, cpu = time.monotonic() - begin, time.process_time() - cpu
    size = sum(path.stat().st_size for path in output.directory.glob("*.parquet"))
    print(
        f"record    {RECORDED / seconds:,.0f} rows/s; {cpu / RECORDED * 1e3:.4f} ms CPU per row, of all threads", end=""
    )
    print(f"; {size / RECORDED:.0f} bytes per row")

    waiting: deque[float] = deque()
    commits: list[float] = []

    def committed(counts: Counts) -> None:
        commits.append(time.monotonic() - waiting[0])
        for _ in range(counts.rows):
            waiting.popleft()

    output = _open_store(directory / "paced", committed)
    turns = []
    cpu, begin = time.process_time(), time.monotonic()
    for row in range(RATE * PACED_SECONDS):
        due = begin + row / RATE
        while (now := time.monotonic()) < due:
            await asyncio.sleep(due - now)
            turns.append(time.monotonic() - due)
        output.add(msgspec.structs.replace(examples[row % len(examples)], row=row))
        waiting.append(now)
    cpu = time.process_time() - cpu
    await output.close()
    turns.sort()
    late = max(commits) - OutputOptions().commit_seconds
    print(
        f"          at {RATE:,} rows/s: {cpu / RATE / PACED_SECONDS * 1e3:.4f} ms CPU per row, including this loop",
        end="",
    )
    print(f"; the loop is at most {turns[len(turns) * 99 // 100] * 1e3:.1f} ms late in 99 of 100 turns", end="")
    print(f", {turns[-1] * 1e3:.1f} ms in all; commits at most {late * 1e3:.1f} ms")


def _open_store(directory: Path, on_commit: Callable[[Counts], None] | None = None) -> ResultStore:
    output = ResultStore.open(directory, RunFile("f00d", {}, total=RECORDED), on_commit=on_commit)
    output.describe({"engine": "fake"})
    return output


def main() -> None:
    cases = ("spread", "end", "jsonl", "unread", "overlap", "journal", "journals", "record")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=200_000, help="rows that are done")
    parser.add_argument("--parts", type=int, default=20, help="number of parts")
    parser.add_argument("--repeat", type=int, default=3, help="runs of each case")
    parser.add_argument("--only", nargs="+", choices=cases, default=cases, metavar="CASE")
    parser.add_argument("--directory", type=Path, help="directory for temporary files")
    args = parser.parse_args()
    print(f"{os.cpu_count()} CPUs, Python {sys.version.split()[0]}")
    with tempfile.TemporaryDirectory(dir=args.directory) as name:
        directory = Path(name)
        if set(args.only) - {"record"}:
            measure_cases(directory, args.rows, args.rows // args.parts, args.only, args.repeat)
        if "record" in args.only:
            asyncio.run(measure_recording(directory))


if __name__ == "__main__":
    main()
