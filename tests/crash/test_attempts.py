"""Two attempts at one shard at once: refused where the first can be seen, right where it cannot."""

import json
import signal
import subprocess
import time
from pathlib import Path

import pytest

from ..runner.running import wait_until
from .ledger import Ledger
from .life import Life
from .work import SCHEMA, Work

OTHER_HOST = ["unshare", "--uts", "sh", "-c", 'hostname batchvl-other && exec "$@"', "-"]
"""What a command line begins with to run on another host, as far as a process can tell."""


def other_host() -> list[str]:
    try:
        there = subprocess.run([*OTHER_HOST, "hostname"], capture_output=True, text=True)
    except FileNotFoundError:
        return []
    return OTHER_HOST if there.stdout == "batchvl-other\n" else []


def test_the_second_on_the_same_host_is_refused_and_does_no_harm(tmp_path: Path) -> None:
    work, out = Work(tmp_path / "work", 150), tmp_path / "out"
    first = Life(work.command(out), tmp_path / "first")
    try:
        wait_until(lambda: any(out.glob("shard-*/journal-*")) or first.ended)
        first.process.send_signal(signal.SIGSTOP)  # it is alive, however long the second takes
        second = Life(work.command(out), tmp_path / "second")
        assert second.wait() == 2, second.said
        first.process.send_signal(signal.SIGCONT)
        assert "in use by another runner" in second.said
        assert f"process {first.process.pid}" in second.said
        assert first.wait() == 0, first.said
        first.wait_for_the_last()
    finally:
        first.put_an_end()
    assert len(list(out.glob("shard-*/attempt-*.json"))) == 1
    work.check(out / "results.parquet")


@pytest.mark.crash
def test_two_that_do_not_see_each_other(tmp_path: Path) -> None:
    """Two hosts, and a file system without locks: each has its own idea of the lock's file."""
    work, out = Work(tmp_path / "work", 400, delay=0.2), tmp_path / "out"
    first = Life(work.command(out), tmp_path / "first")
    lives = [first]
    try:
        wait_until(lambda: any(out.glob("shard-*/part-0001-*")) or first.ended)
        first.process.send_signal(signal.SIGSTOP)  # until the second is at work
        [lock] = out.glob("shard-*/lock")
        lock.unlink()
        lives.append(Life([*other_host(), *work.command(out)], tmp_path / "second"))
        wait_until(lambda: any(out.glob("shard-*/part-0002-*")) or lives[1].ended)
        first.process.send_signal(signal.SIGCONT)
        ledger = Ledger(out, SCHEMA)
        while not all(life.ended for life in lives):
            ledger.expect()  # from the other's point of view as well: nothing ever goes
            time.sleep(0.05)
        for life in lives:
            assert life.wait() == 0, life.said
            life.wait_for_the_last()
    finally:
        for life in lives:
            life.put_an_end()
    attempts = [json.loads(path.read_bytes()) for path in out.glob("shard-*/attempt-*.json")]
    assert len(attempts) == 2
    assert attempts[0]["host"] != attempts[1]["host"] or not other_host()
    for attempt in ("0001", "0002"):
        assert list(out.glob(f"shard-*/part-{attempt}-*")), "both have answered rows"
    ledger.check(tmp_path)
    work.check(out / "results.parquet")
