"""Whole runs with the FakeEngine, in this process or as a command, and what came out of them."""

from __future__ import annotations

import hashlib
import json
import os
import pty
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
from PIL import Image

import batchvl
from batchvl.engines.fake import SIDE
from batchvl.runner.summary import Summary

from ..manifest.writing import write
from ..timing import scaled

PATIENCE = scaled(60)
"""Seconds after which something that a test waits for will not come any more, however busy the machine."""


def questions(path: Path, rows: int, **columns: Any) -> Path:
    """A manifest of questions without pictures: 'q 0', 'q 1', …"""
    return write(path, [{"prompt": f"q {number}", **columns} for number in range(rows)])


def engine_options(behaviour: Mapping[str, Any]) -> list[str]:
    return [f"{name}={json.dumps(value)}" for name, value in behaviour.items()]


def run(manifest: Path | str | None, fake: Mapping[str, Any] | None = None, **options: Any) -> Summary:
    """batchvl.run with an engine that behaves as `fake` says; without pictures' workers unless told otherwise."""
    settings = {"quiet": True, "commit_seconds": 0.05, "image_workers": 1, **options}
    return batchvl.run(manifest, engine="fake", engine_option=engine_options(fake or {}), **settings)


def command(manifest: Path | str | None, *flags: str, fake: Mapping[str, Any] | None = None) -> list[str]:
    """The command line of `batchvl run`."""
    chosen = [word for option in engine_options(fake or {}) for word in ("--engine-option", option)]
    first = [] if manifest is None else [str(manifest)]
    base = ["--engine", "fake", "--commit-seconds", "0.05", "--image-workers", "1"]
    return [sys.executable, "-m", "batchvl", "run", *first, *base, *chosen, *flags]


def environment(**more: str) -> dict[str, str]:
    return {name: text for name, text in os.environ.items() if not name.startswith("BATCHVL_")} | more


def shell(arguments: Sequence[str], **settings: Any) -> subprocess.CompletedProcess[str]:
    """Runs a command to its end, which comes before the test's."""
    given = {"env": environment(), **settings}
    return subprocess.run(arguments, capture_output=True, text=True, timeout=PATIENCE, **given)


def on_a_terminal(
    arguments: Sequence[str], lines: int = 30, columns: int = 110, wanted: bytes = b"",
    then: Callable[[subprocess.Popen[bytes]], object] | None = None,
) -> tuple[int, str]:  # fmt: skip
    """A command's exit code and all that appeared on a terminal of that size. `then` is called once with the process,
    when `wanted` has appeared."""
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (lines, columns))
    plain = {name: text for name, text in environment().items() if name not in ("COLUMNS", "LINES")}
    with subprocess.Popen(
        arguments, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True, env=plain
    ) as process:  # fmt: skip
        os.close(theirs)
        shown = b""
        while True:
            try:
                shown += os.read(ours, 65536)
            except OSError:  # the last one who had the terminal open is gone
                break
            if then and wanted in shown:
                then(process)
                then = None
        os.close(ours)
        return process.wait(PATIENCE), shown.decode()


def answers(summary: Summary) -> list[dict[str, Any]]:
    """The merged rows."""
    assert summary.results is not None
    return pq.read_table(summary.results).to_pylist()


def responses(summary: Summary) -> list[str | None]:
    """The merged answers, after a look at whether each row is there once and in order."""
    rows = answers(summary)
    assert [row["row"] for row in rows] == list(range(len(rows)))
    return [row["response"] for row in rows]


def codes(summary: Summary) -> dict[int, str]:
    """The failed rows' error codes by row."""
    return {row["row"]: row["error"]["code"] for row in answers(summary) if row["status"] == "failed"}


def picture(path: Path, number: int, size: tuple[int, int] = (40, 30)) -> Path:
    """A picture of its own colour."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (number * 53 % 256, number * 17 % 256, number % 256)).save(path)
    return path


def seen(path: Path) -> str:
    """What the FakeEngine tells of a picture."""
    with Image.open(path) as image:
        return hashlib.sha256(image.convert("RGB").resize((SIDE, SIDE)).tobytes()).hexdigest()[:12]


def family(pid: int | None = None) -> list[psutil.Process]:
    """A process's children and theirs; none where the process is gone."""
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def alive(processes: Iterable[psutil.Process]) -> list[psutil.Process]:
    """Those that still live: one that ended is not, though nobody may have reaped it yet."""
    found = []
    for process in processes:
        try:
            if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.NoSuchProcess:
            pass
    return found


def children() -> list[psutil.Process]:
    """This process's children that live, and theirs."""
    return alive(family())


def wait_until(what: Callable[[], object]) -> None:
    """Polls for something that another process does."""
    end = time.monotonic() + PATIENCE
    while not what():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.005)


def journalled(out: Path) -> int:
    """Bytes in the journals of an output folder."""
    return sum(path.stat().st_size for path in out.glob("shard-*/journal-*"))
