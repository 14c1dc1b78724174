"""Whole runs, killed at random moments until their work is done, with a check of everything after each kill."""

from __future__ import annotations

import json
import random
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..runner.running import wait_until
from .ledger import Ledger
from .life import ENDING, Life, Memory, holders
from .work import SCHEMA, Work

# What to kill, and when: weights of the draw. A run survives the death of image workers and engines, so that it can
# suffer several.
TARGETS = {"runner": 6, "all": 4, "engine": 3, "worker": 3, "forkserver": 2, "watchdog": 1}
MOMENTS = {"start": 2, "opening": 3, "answering": 10, "ending": 4, "grace": 3}

# Longest delay in seconds from the first sign of the moment to the kill. "ending" begins with the end of the shard, so
# that the kill hits the merge.
_MAX_DELAY = {"start": 0.9, "opening": 0.4, "answering": 0.7, "ending": 0.08, "grace": 0.3}
_ROWS = 600


@dataclass
class Figures:
    """The totals of a campaign."""

    runs: int = 0
    kills: Counter[str] = field(default_factory=Counter)
    """Number by target."""
    moments: Counter[str] = field(default_factory=Counter)
    """Number by the run's phase at the time, judged by its output directory."""
    directories: int = 0
    rows: int = 0
    """Rows answered in all finished output directories."""
    checked: int = 0
    """Rows compared with those before a kill, summed over the kills."""
    lost: int = 0
    duplicates: int = 0
    orphans: int = 0
    longest: float = 0.0
    """Longest time in seconds from a runner's death to the end of its last process."""
    seconds: float = 0.0

    def __str__(self) -> str:
        kinds = ", ".join(f"{count} {name}" for name, count in self.kills.most_common())
        moments = ", ".join(f"{count} {name}" for name, count in self.moments.most_common())
        return (
            f"{self.kills.total()} kills ({kinds})\n"
            f"  while {moments}\n"
            f"{self.runs} runs in {self.directories} output directories, {self.rows:,} rows answered, "
            f"{self.checked:,} compared after kills: {self.lost} lost, {self.duplicates} duplicated\n"
            f"{self.orphans} orphans: the last process ended at most {self.longest * 1000:.0f} ms after the runner\n"
            f"{self.seconds:.0f} s"
        )


class Campaign:
    """Kills runs in output directories below `scratch`, and resumes each until its work is done.

    The draws depend on `seed`, the exact point of a kill on the machine as well, so that a seed repeats a failure often
    but not always. The output directory of a failure is kept.
    """

    def __init__(self, scratch: Path, seed: int, *, rows: int = _ROWS) -> None:
        self.figures, self._scratch, self._draw = Figures(), scratch, random.Random(seed)
        self._works: list[tuple[Work, list[dict[str, Any]]]] = []
        for name in ("m.parquet", "m.jsonl"):
            work, out = Work(scratch / name, rows, name), scratch / f"undisturbed-{name}"
            life = self._live(work, out)
            assert life.wait() == 0, life.output
            self._works.append((work, work.check(out / "results.parquet")))

    def run(self, kills: int, report: Callable[[str], None] = lambda text: None) -> Figures:
        """Run until `kills` kills and until the last output directory is done.

        Raises:
            AssertionError: A guarantee was violated.
        """
        begin = time.monotonic()
        while self.figures.kills.total() < kills:
            out = self._scratch / f"out-{self.figures.directories:04d}"
            work, undisturbed = self._works[self.figures.directories % len(self._works)]
            self._complete_directory(out, work, undisturbed)
            shutil.rmtree(out)
            self.figures.directories += 1
            self.figures.rows += work.rows
            self.figures.seconds = time.monotonic() - begin
            report(f"{self.figures.kills.total()} of {kills} kills, {self.figures.seconds:.0f} s")
        return self.figures

    def _complete_directory(self, out: Path, work: Work, undisturbed: list[dict[str, Any]]) -> None:
        """Run and kill again and again until a run finishes."""
        ledger = Ledger(out, SCHEMA)
        resumed: set[int] = set()
        try:
            while True:
                resumed.add(len(ledger.rows()))
                code = self._run(work, out, ledger)
                if (out / "run.json").exists():
                    ledger.check(self._scratch)
                if code == 0:
                    break
        finally:
            self.figures.lost += ledger.lost
            self.figures.duplicates += ledger.duplicates
            self.figures.checked += ledger.checked
        work.check(out / "results.parquet", undisturbed)
        leftovers = [path for directory in out.glob(".merge-*") for path in directory.iterdir()]
        assert not leftovers, "killed merges left files"
        summary = json.loads((out / "summary.json").read_bytes())
        assert summary["rows"] == work.rows
        assert summary["resumed"] in resumed, "the summary is that of the last run with rows to do"

    def _run(self, work: Work, out: Path, ledger: Ledger) -> int:
        """Run until the run ends in any way, check that nothing of it is left, and return its exit code."""
        life = self._live(work, out)
        self.figures.runs += 1
        try:
            code, memory = self._run_and_kill(life, out, ledger)
            self.figures.longest = max(self.figures.longest, life.wait_for_processes())
            assert not holders(memory), "shared memory is left"
            assert "Traceback" not in life.output
        except BaseException:
            self.figures.orphans += len(life.members()) if life.ended else 0
            print(f"{out}: output of the last run:\n{life.output}")
            raise
        finally:
            life.kill_all()
        return code

    def _run_and_kill(self, life: Life, out: Path, ledger: Ledger) -> tuple[int, set[Memory]]:
        """Kill processes of a run until it ends in any way; return its exit code and the shared memory that it had."""
        killed: set[str] = set()
        memory: set[Memory] = set()
        before, signalled = attempts(out), False
        while True:
            target, moment = self._choose(TARGETS), self._choose(MOMENTS)
            if target in killed:  # two deaths during the same row would make it fail, correctly
                target = "runner"
            delay = self._draw.uniform(0, _MAX_DELAY[moment])
            in_grace = self._wait_for(moment, delay, life, out, before)
            signalled |= in_grace
            if life.ended:
                break
            ledger.expect()
            memory |= life.memory()
            phase = "in the grace period of a signal" if in_grace else _phase(out, before)
            if not life.kill(target, self._draw):
                continue
            if target in ENDING and life.wait() != -signal.SIGKILL:
                break  # the run had just ended by itself
            self.figures.kills[target] += 1
            self.figures.moments[phase] += 1
            killed.add(target)
            if target in ENDING:
                return -signal.SIGKILL, memory
        code, expected = life.wait(), {0}
        if signalled:
            expected |= {75, -signal.SIGTERM}  # the latter once all was done and the handlers were removed
        if "forkserver" in killed:
            expected.add(1)
        assert code in expected, f"exit code {code}"
        return code, memory

    def _wait_for(self, moment: str, delay: float, life: Life, out: Path, before: set[str]) -> bool:
        """Wait for the chosen moment or the end of the run; return whether a signal was sent to the run before that."""
        if moment in ("answering", "grace"):
            _until(life, lambda: _journals(out, before))
        elif moment == "opening":
            _until(life, lambda: attempts(out) - before)
        elif moment == "ending":
            _until(life, lambda: attempts(out) - before and _complete(out))
        if moment == "grace" and not life.ended:
            _sleep(life, self._draw.uniform(0, 0.3))
            if not life.ended:
                life.process.send_signal(signal.SIGTERM)
        _sleep(life, delay)
        return moment == "grace"

    def _live(self, work: Work, out: Path) -> Life:
        return Life(work.command(out), self._scratch / "log")

    def _choose(self, weights: dict[str, int]) -> Any:
        return self._draw.choices(list(weights), list(weights.values()))[0]


def attempts(out: Path) -> set[str]:
    """Return the numbers of the attempts that have started in an output directory."""
    return {path.stem.partition("-")[2] for path in out.glob("shard-*/attempt-*.json")}


def _journals(out: Path, before: set[str]) -> bool:
    return any(path.name.split("-")[1] not in before for path in out.glob("shard-*/journal-*"))


def _complete(out: Path) -> bool:
    return any(out.glob("shard-*/complete.json"))


def _phase(out: Path, before: set[str]) -> str:
    """Return the phase of the run, judged by its output directory."""
    if not attempts(out) - before:
        return "starting"
    if _complete(out):
        return "merging" if any(out.glob(".merge-*")) else "about to merge or to exit"
    return "answering" if _journals(out, before) else "opening its stages"


def _until(life: Life, condition: Callable[[], object]) -> None:
    wait_until(lambda: life.ended or condition())


def _sleep(life: Life, seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end and not life.ended:
        time.sleep(min(0.005, max(0.0, end - time.monotonic())))
