"""How soon a run goes on where it stopped, and what it costs to record a row.

    python benchmarks/resume.py                               # 200,000 rows in 20 parts: two minutes on two cores
    python benchmarks/resume.py --rows 10000000 --parts 1000  # the figures of docs/performance.md: 4 GB of disk
    python benchmarks/resume.py --only spread jsonl

A case is an output folder in which so many rows are done, some of them failed. `batchvl run` goes on in it as a command
of its own, with the FakeEngine, until the engine is handed the first row that was not done:

spread    one row in 10,000 is left, and those at the end
end       only those at the end are left
jsonl     the same with a manifest in JSONL, and the index that attempts left which read it
unread    the same without that index
overlap   from Parquet again; two attempts did a fifth of the rows both
journal   and one was killed with as many rows in its journal as a part has
journals  and 64 more were

record    is no folder: rows are recorded as fast as that goes, and then at 2,000 rows a second
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
from history import History, manifest, pictures, records

from batchvl.config.options import OutputOptions
from batchvl.results import Counts, ResultStore, RunFile

LEFT_EVERY, JOURNALS, LEFT_AT_THE_END = 10_000, 64, 10_000
RECORDED, RATE, PACED_SECONDS = 200_000, 2_000, 15
STAYS = ("run.json", "lock", "manifest-index.json")

# Moments are told by what the run itself calls; nothing else of it is changed.
CHILD = """
import json, os, sys, time

begin = float(sys.argv[1])
moments = {}

def reached(name):
    moments.setdefault(name, round(time.monotonic() - begin, 3))

def after(owner, method, name):
    inner = getattr(owner, method)
    def outer(*arguments, **named):
        found = inner(*arguments, **named)
        reached(name)
        return found
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
after(Attempt, "__init__", "guard")
after(Recovered, "tally", "recovered")
after(EngineClient, "open", "engine")
rows = Manifest.rows

def read(*arguments):
    for some in rows(*arguments):
        reached("row")
        yield some

Manifest.rows = read

def infer(self, requests):
    reached("request")
    status = dict(line.split(":", 1) for line in open("/proc/self/status"))
    peak = int(status["VmHWM"].split()[0]) / 1000  # ru_maxrss has what the process was before it became this program
    print(json.dumps({**moments, "cpu": time.process_time(), "peak": peak}), flush=True)
    os._exit(0)

EngineProcess.infer = infer
main(sys.argv[2:])
"""


def resume(source: Path, out: Path) -> dict[str, float]:
    """Seconds from the command's start to each of its moments, its CPU seconds and peak memory (MB).

    What it left is removed, so that the next one finds the same.
    """
    before = set(out.rglob("*"))
    command = [sys.executable, "-c", CHILD, str(time.monotonic()), "run", str(source), "-o", str(out)]
    done = subprocess.run([*command, "--engine", "fake", "--quiet"], capture_output=True, text=True)
    time.sleep(1)  # in which the processes that it had leave
    for path in set(out.rglob("*")) - before:
        if path.name not in STAYS:
            path.unlink()
    if done.returncode or not done.stdout:
        sys.exit(f"{source}: it never asked: {done.stderr}")
    found: dict[str, float] = json.loads(done.stdout)
    return found


def folders(folder: Path, rows: int, part_rows: int, only: list[str], repeat: int) -> None:
    """Every case in turn: each finds what the one before it found, and more."""
    left = range(LEFT_EVERY // 2, rows, LEFT_EVERY)
    total = rows + (1 + JOURNALS) * part_rows + LEFT_AT_THE_END
    sources = {kind: manifest(folder, total, kind) for kind in ("parquet", "jsonl")}
    pictures(folder, total)
    out = folder / "out"
    history = History(out, part_rows)
    after = iter(range(rows, total, part_rows))

    def killed(attempts: int) -> None:
        for start in (next(after) for _ in range(attempts)):
            history.journal(range(start, start + part_rows))

    cases: dict[str, Callable[[], None]] = {
        "spread": lambda: history.parts(range(rows), but=left),
        "end": lambda: history.parts(left),
        "jsonl": lambda: None,
        "unread": lambda: None,
        "overlap": lambda: history.parts(range(rows * 2 // 5, rows * 3 // 5)),
        "journal": lambda: killed(1),
        "journals": lambda: killed(JOURNALS),
    }
    print(f"{rows:,} rows in parts of {part_rows:,}; seconds from the command's start, of {repeat} runs the fastest")
    moments = ("imports", "manifest", "guard", "recovered", "engine", "row", "request")
    print(f"{'case':9}", *(f"{name:>9}" for name in moments), "    CPU s", "  peak MB")
    for name, add in cases.items():
        add()
        if name not in only:
            continue
        source = sources["jsonl" if name in ("jsonl", "unread") else "parquet"]
        resume(source, out)  # which makes run.json, and reads the files once
        runs = []
        for _ in range(repeat):
            if name == "unread":
                (out / "manifest-index.json").unlink(missing_ok=True)
            runs.append(resume(source, out))
        best = min(runs, key=lambda run: run["request"])
        print(f"{name:9}", *(f"{best[moment]:9.2f}" for moment in moments), f"{best['cpu']:9.2f}{best['peak']:10.0f}")
        (out / "run.json").unlink()


async def record(folder: Path) -> None:
    """What journal and parts cost, of the whole process, and how late they make others."""
    some = records(10_000)
    output = _opened(folder / "fast")
    begun, cpu = time.monotonic(), time.process_time()
    for row in range(RECORDED):
        await output.room()
        output.add(msgspec.structs.replace(some[row % len(some)], row=row))
    await output.close()
    seconds, cpu = time.monotonic() - begun, time.process_time() - cpu
    size = sum(path.stat().st_size for path in output.folder.glob("*.parquet"))
    print(
        f"record    {RECORDED / seconds:,.0f} rows/s; {cpu / RECORDED * 1e3:.4f} ms CPU a row, of all threads", end=""
    )
    print(f"; {size / RECORDED:.0f} bytes a row")

    waiting: deque[float] = deque()
    commits: list[float] = []

    def committed(counts: Counts) -> None:
        commits.append(time.monotonic() - waiting[0])
        for _ in range(counts.rows):
            waiting.popleft()

    output = _opened(folder / "paced", committed)
    turns = []
    cpu, begun = time.process_time(), time.monotonic()
    for row in range(RATE * PACED_SECONDS):
        due = begun + row / RATE
        while (now := time.monotonic()) < due:
            await asyncio.sleep(due - now)
            turns.append(time.monotonic() - due)
        output.add(msgspec.structs.replace(some[row % len(some)], row=row))
        waiting.append(now)
    cpu = time.process_time() - cpu
    await output.close()
    turns.sort()
    late = max(commits) - OutputOptions().commit_seconds
    print(
        f"          at {RATE:,} rows/s: {cpu / RATE / PACED_SECONDS * 1e3:.4f} ms CPU a row, this loop's included",
        end="",
    )
    print(f"; the loop is late by {turns[len(turns) * 99 // 100] * 1e3:.1f} ms in 1 of 100 turns", end="")
    print(f", at most {turns[-1] * 1e3:.1f}; commits by at most {late * 1e3:.1f}")


def _opened(folder: Path, on_commit: Callable[[Counts], None] | None = None) -> ResultStore:
    output = ResultStore.open(folder, RunFile("f00d", {}, total=RECORDED), on_commit=on_commit)
    output.describe({"engine": "fake"})
    return output


def main() -> None:
    cases = ("spread", "end", "jsonl", "unread", "overlap", "journal", "journals", "record")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=200_000, help="that are done")
    parser.add_argument("--parts", type=int, default=20, help="that they are in")
    parser.add_argument("--repeat", type=int, default=3, help="runs of each case")
    parser.add_argument("--only", nargs="+", choices=cases, default=cases, metavar="CASE")
    parser.add_argument("--folder", type=Path, help="for temporary files")
    given = parser.parse_args()
    print(f"{os.cpu_count()} CPUs, Python {sys.version.split()[0]}")
    with tempfile.TemporaryDirectory(dir=given.folder) as name:
        folder = Path(name)
        if set(given.only) - {"record"}:
            folders(folder, given.rows, given.rows // given.parts, given.only, given.repeat)
        if "record" in given.only:
            asyncio.run(record(folder))


if __name__ == "__main__":
    main()
