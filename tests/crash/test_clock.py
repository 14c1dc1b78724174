"""A wall clock that jumps by hours, during and between runs, has no effect."""

import json
import os
import random
import signal
import time
from datetime import datetime
from pathlib import Path

import pytest

from ..runner.running import environment, wait_until
from .ledger import Ledger
from .life import Life
from .work import SCHEMA, Work

ROOT = Path(__file__).parents[2]
CLOCK = Path(__file__).parent / "clock"


def start(work: Work, out: Path, log: Path) -> Life:
    jumping = os.pathsep.join([str(CLOCK), str(ROOT)])
    return Life(work.command(out), log, env=environment(PYTHONPATH=jumping))


@pytest.mark.crash
def test_a_clock_that_jumps(tmp_path: Path) -> None:
    work, out, draw = Work(tmp_path / "work", 200), tmp_path / "out", random.Random(8)
    ledger = Ledger(out, SCHEMA)
    for _ in range(3):
        before = len(ledger.rows())
        life = start(work, out, tmp_path / "log")
        wait_until(lambda before=before, life=life: len(ledger.rows()) > before or life.ended)
        assert not life.ended, life.output
        assert life.kill("runner", draw)
        assert life.wait() == -signal.SIGKILL
        life.wait_for_processes()
        assert ledger.check(tmp_path) > before
        for path in out.rglob("*"):  # files from the past and from the future
            then = time.time() + draw.uniform(-1e6, 1e6)
            os.utime(path, (then, then))
    begin = time.monotonic()
    life = start(work, out, tmp_path / "log")
    assert life.wait() == 0, life.output
    assert time.monotonic() - begin < 60, "a row takes 50 ms"
    life.wait_for_processes()
    ledger.check(tmp_path)
    work.check(out / "results.parquet")
    for path in out.glob("shard-*/attempt-*.json"):
        since = datetime.fromisoformat(json.loads(path.read_bytes())["since"])
        assert abs(since.timestamp() - time.time()) > 1800, "the run's clock was shifted"
