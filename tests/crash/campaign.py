"""Whole runs, killed at random moments until their work is done, with a look at everything after each kill."""

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
from .life import ENDING, Life, Memory, held_by_anybody
from .work import SCHEMA, Work

# What is killed, and when: weights of the draw. Image workers and the engine are not the run's end, so that a life has
# several such wounds.
WHAT = {"runner": 6, "all": 4, "engine": 3, "worker": 3, "host": 2, "guardian": 1}
WHEN = {"start": 2, "opening": 3, "answering": 10, "ending": 4, "grace": 3}

# Seconds from the moment's first sign to the kill, at most. "ending": from the shard's end on, that is in the merge.
_UP_TO = {"start": 0.9, "opening": 0.4, "answering": 0.7, "ending": 0.08, "grace": 0.3}
_ROWS = 600


@dataclass
class Figures:
    """What a campaign comes to."""

    runs: int = 0
    kills: Counter[str] = field(default_factory=Counter)
    """By what was killed."""
    moments: Counter[str] = field(default_factory=Counter)
    """The same by where the run was then, as its folder shows."""
    folders: int = 0
    rows: int = 0
    """Answered in all folders that came to their end."""
    checked: int = 0
    """Rows compared with what was there before a kill, summed over the kills."""
    lost: int = 0
    doubled: int = 0
    orphans: int = 0
    longest: float = 0.0
    """Seconds from a runner's death until its last process was gone, at most."""
    seconds: float = 0.0

    def __str__(self) -> str:
        kinds = ", ".join(f"{count} {name}" for name, count in self.kills.most_common())
        moments = ", ".join(f"{count} {name}" for name, count in self.moments.most_common())
        return (
            f"{self.kills.total()} kills ({kinds})\n"
            f"  while {moments}\n"
            f"{self.runs} runs in {self.folders} folders, {self.rows:,} rows answered, {self.checked:,} looked up "
            f"again after kills: {self.lost} lost, {self.doubled} doubled\n"
            f"{self.orphans} orphans: the last process was gone {self.longest * 1000:.0f} ms after the runner at most\n"
            f"{self.seconds:.0f} s"
        )


class Campaign:
    """Kills runs in folders below `scratch`, each until its work is done.

    The draws come from `seed`; where a kill falls depends on the machine as well, so that a seed repeats a failure
    often, not always. The folder of a failure stays where it is.
    """

    def __init__(self, scratch: Path, seed: int, *, rows: int = _ROWS) -> None:
        self.figures, self._scratch, self._draw = Figures(), scratch, random.Random(seed)
        self._works: list[tuple[Work, list[dict[str, Any]]]] = []
        for name in ("m.parquet", "m.jsonl"):
            work, out = Work(scratch / name, rows, name), scratch / f"undisturbed-{name}"
            life = self._live(work, out)
            assert life.wait() == 0, life.said
            self._works.append((work, work.check(out / "results.parquet")))

    def run(self, kills: int, tell: Callable[[str], None] = lambda text: None) -> Figures:
        """Goes on until there were so many kills and the folder is done. Raises AssertionError."""
        begin = time.monotonic()
        while self.figures.kills.total() < kills:
            out = self._scratch / f"out-{self.figures.folders:04d}"
            work, undisturbed = self._works[self.figures.folders % len(self._works)]
            self._folder(out, work, undisturbed)
            shutil.rmtree(out)
            self.figures.folders += 1
            self.figures.rows += work.rows
            self.figures.seconds = time.monotonic() - begin
            tell(f"{self.figures.kills.total()} of {kills} kills, {self.figures.seconds:.0f} s")
        return self.figures

    def _folder(self, out: Path, work: Work, undisturbed: list[dict[str, Any]]) -> None:
        """Runs, killed over and over, until one comes to its end."""
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
            self.figures.doubled += ledger.doubled
            self.figures.checked += ledger.checked
        work.check(out / "results.parquet", undisturbed)
        left = [path for folder in out.glob(".merge-*") for path in folder.iterdir()]
        assert not left, "merges that were killed have left their files"
        summary = json.loads((out / "summary.json").read_bytes())
        assert summary["rows"] == work.rows
        assert summary["resumed"] in resumed, "it tells of the last run that had something to do"

    def _run(self, work: Work, out: Path, ledger: Ledger) -> int:
        """A run until it has ended, however: its exit code. Nothing is left of it."""
        life = self._live(work, out)
        self.figures.runs += 1
        try:
            code, memory = self._endanger(life, out, ledger)
            self.figures.longest = max(self.figures.longest, life.wait_for_the_last())
            assert not held_by_anybody(memory), "memory is left"
            assert "Traceback" not in life.said
        except BaseException:
            self.figures.orphans += len(life.members()) if life.ended else 0
            print(f"{out}: what the last run said:\n{life.said}")
            raise
        finally:
            life.put_an_end()
        return code

    def _endanger(self, life: Life, out: Path, ledger: Ledger) -> tuple[int, set[Memory]]:
        """Kills this and that of a run until it has ended, however: its exit code, and the memory that it had."""
        hurt: set[str] = set()
        memory: set[Memory] = set()
        before, signalled = attempts(out), False
        while True:
            what, when = self._drawn(WHAT), self._drawn(WHEN)
            if what in hurt:  # two deaths over one row would fail it, as they should
                what = "runner"
            after = self._draw.uniform(0, _UP_TO[when])
            told = self._wait_for(when, after, life, out, before)
            signalled |= told
            if life.ended:
                break
            ledger.expect()
            memory |= life.memory()
            moment = _moment(out, before) if not told else "in the grace of a signal"
            if not life.kill(what, self._draw):
                continue
            if what in ENDING and life.wait() != -signal.SIGKILL:
                break  # it had ended by itself the moment before
            self.figures.kills[what] += 1
            self.figures.moments[moment] += 1
            hurt.add(what)
            if what in ENDING:
                return -signal.SIGKILL, memory
        code, expected = life.wait(), {0}
        if signalled:
            expected |= {75, -signal.SIGTERM}  # the latter once all was done, and handlers were gone
        if "host" in hurt:
            expected.add(1)
        assert code in expected, f"exit code {code}"
        return code, memory

    def _wait_for(self, when: str, after: float, life: Life, out: Path, before: set[str]) -> bool:
        """Returns at the moment drawn, or at the life's end; True where a signal has told the run to end by then."""
        if when in ("answering", "grace"):
            _until(life, lambda: _journals(out, before))
        elif when == "opening":
            _until(life, lambda: attempts(out) - before)
        elif when == "ending":
            _until(life, lambda: attempts(out) - before and _complete(out))
        if when == "grace" and not life.ended:
            _sleep(life, self._draw.uniform(0, 0.3))
            if not life.ended:
                life.process.send_signal(signal.SIGTERM)
        _sleep(life, after)
        return when == "grace"

    def _live(self, work: Work, out: Path) -> Life:
        return Life(work.command(out), self._scratch / "log")

    def _drawn(self, weights: dict[str, int]) -> Any:
        return self._draw.choices(list(weights), list(weights.values()))[0]


def attempts(out: Path) -> set[str]:
    """The attempts that have begun in an output folder, by number."""
    return {path.stem.partition("-")[2] for path in out.glob("shard-*/attempt-*.json")}


def _journals(out: Path, before: set[str]) -> bool:
    return any(path.name.split("-")[1] not in before for path in out.glob("shard-*/journal-*"))


def _complete(out: Path) -> bool:
    return any(out.glob("shard-*/complete.json"))


def _moment(out: Path, before: set[str]) -> str:
    """Where the run is, as its folder shows."""
    if not attempts(out) - before:
        return "starting"
    if _complete(out):
        return "merging" if any(out.glob(".merge-*")) else "about to merge, or to leave"
    return "answering" if _journals(out, before) else "opening its stages"


def _until(life: Life, what: Callable[[], object]) -> None:
    wait_until(lambda: life.ended or what())


def _sleep(life: Life, seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end and not life.ended:
        time.sleep(min(0.005, max(0.0, end - time.monotonic())))
