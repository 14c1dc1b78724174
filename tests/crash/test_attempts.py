"""Two concurrent attempts at one shard: the second is refused if it can see the first; if not, results stay right."""

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
"""Beginning of a command line that runs under another host name."""


def other_host() -> list[str]:
    try:
        process = subprocess.run([*OTHER_HOST, "hostname"], capture_output=True, text=True)
    except FileNotFoundError:
        return []
    return OTHER_HOST if process.stdout == "batchvl-other\n" else []


def test_a_second_run_on_the_same_host_is_refused_and_harmless(tmp_path: Path) -> None:
    work, out = Work(tmp_path / "work", 150), tmp_path / "out"
    first = Life(work.command(out), tmp_path / "first")
    try:
        wait_until(lambda: any(out.glob("shard-*/journal-*")) or first.ended)
        first.process.send_signal(signal.SIGSTOP)  # so that it is still running when the second starts
        second = Life(work.command(out), tmp_path / "second")
        assert second.wait() == 2, second.output
        first.process.send_signal(signal.SIGCONT)
        assert "in use by another runner" in second.output
        assert f"process {first.process.pid}" in second.output
        assert first.wait() == 0, first.output
        first.wait_for_processes()
    finally:
        first.kill_all()
    assert len(list(out.glob("shard-*/attempt-*.json"))) == 1
    work.check(out / "results.parquet")


@pytest.mark.crash
def test_two_runs_that_do_not_see_each_other(tmp_path: Path) -> None:
    """Two hosts and a file system without working locks: each has a lock file of its own."""
    work, out = Work(tmp_path / "work", 400, delay=0.2), tmp_path / "out"
    first = Life(work.command(out), tmp_path / "first")
    lives = [first]
    try:
        wait_until(lambda: any(out.glob("shard-*/part-0001-*")) or first.ended)
        first.process.send_signal(signal.SIGSTOP)  # until the second has written a part
        [lock] = out.glob("shard-*/lock")
        lock.unlink()
        lives.append(Life([*other_host(), *work.command(out)], tmp_path / "second"))
        wait_until(lambda: any(out.glob("shard-*/part-0002-*")) or lives[1].ended)
        first.process.send_signal(signal.SIGCONT)
        ledger = Ledger(out, SCHEMA)
        while not all(life.ended for life in lives):
            ledger.expect()  # nothing ever disappears, whichever run wrote it
            time.sleep(0.05)
        for life in lives:
            assert life.wait() == 0, life.output
            life.wait_for_processes()
    finally:
        for life in lives:
            life.kill_all()
    attempts = [json.loads(path.read_bytes()) for path in out.glob("shard-*/attempt-*.json")]
    assert len(attempts) == 2
    assert attempts[0]["host"] != attempts[1]["host"] or not other_host()
    for attempt in ("0001", "0002"):
        assert list(out.glob(f"shard-*/part-{attempt}-*")), "both attempts have answered rows"
    ledger.check(tmp_path)
    work.check(out / "results.parquet")
