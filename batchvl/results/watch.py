"""Finding out how a run is getting on, from its output folder alone: `batchvl status`. It only reads."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from ..config.units import Shard
from ..errors import ResumeError
from ..manifest import index
from .location import open_output
from .lock import BEAT_SECONDS
from .poller import ShardPoller
from .record import Counts
from .remote import Remote
from .run_file import RunFile
from .shard import ShardFolder
from .status import STATES, ShardStatus, State, Status

STALE_SECONDS = 6 * BEAT_SECONDS
"""After so long without a sign of life a runner elsewhere counts as lost. Network file systems tell of times up to a
minute late, and clocks differ by seconds."""
_LEAST_SECONDS = 1.0
"""Before, a rate means nothing."""


def status(out: str | os.PathLike[str] | Remote) -> Status:
    """How the run of the output folder `out` is getting on; what `batchvl status` does.

    Right while runners are at work there, after a crash, at the end, and on a file system that cannot be written.
    Raises ResumeError where `out` is no output folder, or one of a later version.

    Example:

        found = batchvl.status("m-batchvl")
        print(found.rows, "of", found.expected, found.states)
    """
    return next(watch(out))


def watch(out: str | os.PathLike[str] | Remote, seconds: float = 5.0) -> Iterator[Status]:
    """The same again and again, with so many seconds in between, until all shards are complete.

    Each time, only what is new is read.
    """
    run = _Run(open_output(out))
    while True:
        found = run.look()
        yield found
        if found.complete:
            return
        time.sleep(seconds)


class _Run:
    """An output folder, looked at again and again."""

    def __init__(self, out: Path | Remote) -> None:
        self._out, self._here = out, out if isinstance(out, Path) else out.path
        try:
            self._guard = RunFile.read(out)
        except OSError as error:
            raise ResumeError(f"{out}: cannot be read: {error.strerror}") from error
        self._trackers: dict[int, ShardPoller] = {}
        self._index: index.Index | None = None

    def look(self) -> Status:
        """What there is now. Raises ResumeError where the folder cannot be read any more."""
        try:
            folders = ShardFolder.all(self._out, self._guard.shards)
        except OSError as error:
            raise ResumeError(f"{self._out}: cannot be read: {error.strerror}") from error
        known = self._trackers
        self._trackers = {f.shard.index: known.get(f.shard.index) or ShardPoller(f) for f in folders}
        for tracker in self._trackers.values():
            tracker.look()
        total, estimated = self._total()
        now = time.time()
        shards = []
        for number in range(self._guard.shards):
            expected = None if total is None else len(Shard(number, self._guard.shards).rows(total))
            shards.append(_of_shard(number, self._trackers.get(number), expected, estimated, now))
        return _of_all(self._out, self._guard, shards, total, estimated, now)

    def _total(self) -> tuple[int | None, bool]:
        """The manifest's rows, as far as they are known, and whether that is an estimate."""
        trackers = self._trackers.values()
        known = [self._guard.total, *(tracker.total for tracker in trackers)]
        found = max((total for total in known if total is not None), default=None)
        if found is not None and not any(tracker.uncounted for tracker in trackers):
            return found, False
        if self._guard.shards > 1:  # then the first shard of a text has counted its rows for the others
            self._index = self._index or index.read(self._here, self._guard.fingerprint)
            if self._index is not None:
                return self._index.rows, False
        guesses = (tracker.holder.total for tracker in trackers if tracker.holder)
        return max((total for total in guesses if total is not None), default=None), True


def _of_shard(
    number: int, tracker: ShardPoller | None, expected: int | None, estimated: bool, now: float
) -> ShardStatus:  # fmt: skip
    counts = tracker.counts if tracker else Counts()
    found = ShardStatus(
        shard=number, state="waiting", expected=expected, rows=counts.rows, ok=counts.ok, failed=counts.failures,
        failures=dict(sorted(counts.failed.items())),
    )  # fmt: skip
    done = expected is not None and not estimated and counts.rows >= expected
    if tracker is None:
        found.state = "complete" if done else "waiting"
        return found
    if tracker.last_sign is not None:
        found.last_sign, found.last_sign_seconds = _iso(tracker.last_sign), _since(tracker.last_sign, now)
    if tracker.last_row is not None:
        found.last_row_seconds = _since(tracker.last_row, now)
    if (last := tracker.attempt) is not None:
        found.attempt, found.retry = last.attempt, last.retry
    if (runner := tracker.holder or last) is not None:
        found.host, found.pid, found.since = runner.host, runner.pid, runner.since
    found.state = _state(tracker, done, found.last_sign_seconds)
    if found.state == "complete":
        found.eta_seconds = 0.0
    elif found.state == "stopped":
        found.message = tracker.last_words()
    elif found.state == "running" and last and last.up and tracker.last_sign:
        # Up to its last sign of life, not up to now: then it does not matter what the clock says here.
        if (seconds := tracker.last_sign - last.up) >= _LEAST_SECONDS:
            found.rows_per_second = round(tracker.recorded / seconds, 3)
        if found.rows_per_second and expected is not None and counts.rows < expected:
            found.eta_seconds = round((expected - counts.rows) / found.rows_per_second, 1)
    found.message = tracker.problem or found.message
    return found


def _state(tracker: ShardPoller, done: bool, last_sign_seconds: float | None) -> State:
    last = tracker.attempt
    done = done and (last is None or not last.retry or last.ended)  # a retry is at work where all rows are done
    if tracker.holder is not None:
        heard = last_sign_seconds is not None and last_sign_seconds < STALE_SECONDS
        if tracker.alive or (tracker.alive is None and heard):
            return "running"
        return "complete" if done else "stale"
    if done:
        return "complete"
    return "waiting" if last is None and not tracker.counts.rows else "stopped"


def _of_all(
    out: object, guard: RunFile, shards: list[ShardStatus], total: int | None, estimated: bool, now: float
) -> Status:  # fmt: skip
    counts = Counts()
    for shard in shards:
        counts.add(Counts(shard.ok, shard.failures))
    running = [shard for shard in shards if shard.rows_per_second]
    rate, eta = sum(shard.rows_per_second or 0.0 for shard in running) if running else None, None
    complete = all(shard.state == "complete" for shard in shards)
    if complete:
        eta = 0.0
    elif rate and total is not None and counts.rows < total:
        eta = max([(total - counts.rows) / rate, *(shard.eta_seconds or 0.0 for shard in running)])
    signs = [shard for shard in shards if shard.last_sign_seconds is not None]
    last = min(signs, key=lambda shard: shard.last_sign_seconds or 0.0, default=None)
    return Status(
        output=str(out), manifest=guard.manifest, time=_iso(now), complete=complete, expected=total,
        estimated=estimated and total is not None, rows=counts.rows, ok=counts.ok, failed=counts.failures,
        failures=dict(sorted(counts.failed.items())), rows_per_second=None if rate is None else round(rate, 3),
        eta_seconds=None if eta is None else round(eta, 1), last_sign=last.last_sign if last else None,
        last_sign_seconds=last.last_sign_seconds if last else None,
        states={state: sum(shard.state == state for shard in shards) for state in STATES},
        stale=[shard.shard for shard in shards if shard.state == "stale"], shards=shards,
    )  # fmt: skip


def _iso(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")


def _since(then: float, now: float) -> float:
    return round(max(0.0, now - then), 1)  # clocks differ
