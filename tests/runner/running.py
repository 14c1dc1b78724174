"""Helpers of tests that run everything with the fake engine, in this process or as a command."""

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
from batchvl.engines.fake import THUMBNAIL_SIDE
from batchvl.runner.summary import Summary

from ..manifest.writing import write
from ..timing import scaled

PATIENCE = scaled(60)
"""Seconds after which a test stops waiting for an event, even on a busy machine."""


def questions(path: Path, rows: int, **columns: Any) -> Path:
    """Write a manifest of questions without images: 'q 0', 'q 1', …"""
    return write(path, [{"prompt": f"q {number}", **columns} for number in range(rows)])


def engine_options(behaviour: Mapping[str, Any]) -> list[str]:
    return [f"{name}={json.dumps(value)}" for name, value in behaviour.items()]


def run(manifest: Path | str | None, fake: Mapping[str, Any] | None = None, **options: Any) -> Summary:
    """Call `batchvl.run` with the fake engine, whose options are `fake`; by default quiet, with one image worker."""
    settings = {"quiet": True, "commit_seconds": 0.05, "image_workers": 1, **options}
    return batchvl.run(manifest, engine="fake", engine_option=engine_options(fake or {}), **settings)


def command(manifest: Path | str | None, *flags: str, fake: Mapping[str, Any] | None = None) -> list[str]:
    """Return the command line of `batchvl run` with the fake engine."""
    chosen = [word for option in engine_options(fake or {}) for word in ("--engine-option", option)]
    first = [] if manifest is None else [str(manifest)]
    base = ["--engine", "fake", "--commit-seconds", "0.05", "--image-workers", "1"]
    return [sys.executable, "-m", "batchvl", "run", *first, *base, *chosen, *flags]


def environment(**more: str) -> dict[str, str]:
    return {name: text for name, text in os.environ.items() if not name.startswith("BATCHVL_")} | more


def shell(arguments: Sequence[str], **settings: Any) -> subprocess.CompletedProcess[str]:
    """Run a command to its end."""
    given = {"env": environment(), **settings}
    return subprocess.run(arguments, capture_output=True, text=True, timeout=PATIENCE, **given)


def on_a_terminal(
    arguments: Sequence[str],
    lines: int = 30,
    columns: int = 110,
    wanted: bytes = b"",
    then: Callable[[subprocess.Popen[bytes]], object] | None = None,
) -> tuple[int, str]:
    """Run a command on a terminal. Return its exit code and all its output.

    `then` is called once with the process, when `wanted` has appeared.
    """
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (lines, columns))
    plain = {name: text for name, text in environment().items() if name not in ("COLUMNS", "LINES")}
    with subprocess.Popen(
        arguments, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True, env=plain
    ) as process:
        os.close(theirs)
        shown = b""
        while True:
            try:
                shown += os.read(ours, 65536)
            except OSError:  # no process has the terminal open any more
                break
            if then and wanted in shown:
                then(process)
                then = None
        os.close(ours)
        return process.wait(PATIENCE), shown.decode()


def answers(summary: Summary) -> list[dict[str, Any]]:
    """Return the merged rows."""
    assert summary.results is not None
    return pq.read_table(summary.results).to_pylist()


def responses(summary: Summary) -> list[str | None]:
    """Return the merged answers, after a check that each row is there once, in order."""
    rows = answers(summary)
    assert [row["row"] for row in rows] == list(range(len(rows)))
    return [row["response"] for row in rows]


def codes(summary: Summary) -> dict[int, str]:
    """Return the error codes of the failed rows, by row."""
    return {row["row"]: row["error"]["code"] for row in answers(summary) if row["status"] == "failed"}


def make_image(path: Path, number: int, size: tuple[int, int] = (40, 30)) -> Path:
    """Write an image in a colour that depends on its number. Return its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (number * 53 % 256, number * 17 % 256, number % 256)).save(path)
    return path


def image_digest(path: Path) -> str:
    """Return the digest that the fake engine answers for an image."""
    with Image.open(path) as image:
        return hashlib.sha256(image.convert("RGB").resize((THUMBNAIL_SIDE, THUMBNAIL_SIDE)).tobytes()).hexdigest()[:12]


def descendants(pid: int | None = None) -> list[psutil.Process]:
    """Return all descendants of a process; none if it has exited."""
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def alive(processes: Iterable[psutil.Process]) -> list[psutil.Process]:
    """Return the processes that are running. Zombies are not."""
    running = []
    for process in processes:
        try:
            if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                running.append(process)
        except psutil.NoSuchProcess:
            pass
    return running


def children() -> list[psutil.Process]:
    """Return the running descendants of this process."""
    return alive(descendants())


def wait_until(condition: Callable[[], object]) -> None:
    """Poll for something that another process does."""
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.005)


def journalled(out: Path) -> int:
    """Return the number of bytes in the journals of an output."""
    return sum(path.stat().st_size for path in out.glob("shard-*/journal-*"))
