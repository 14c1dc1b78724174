"""The status of a run, read from its output alone: `batchvl status`."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import NamedTuple

from ..config.units import Shard
from ..errors import ResumeError
from ..manifest import index
from .location import open_output
from .lock import HEARTBEAT_SECONDS
from .output import Storage
from .poller import ShardPoller
from .record import Counts
from .run_file import RunFile
from .status import STATES, ShardStatus, State, Status

STALE_SECONDS = 6 * HEARTBEAT_SECONDS
"""Time without a heartbeat after which a runner on another host counts as lost. Network file systems report times up to
a minute late, and clocks differ by seconds."""
_MIN_RATE_SECONDS = 1.0
"""Shortest time over which a rate is meaningful."""


def status(out: str | os.PathLike[str] | Storage) -> Status:
    """Return the status of an output's run, as `batchvl status` does.

    Safe while runners are active, after a crash, at the end of the run, and on a read-only file system.

    Args:
        out: The output directory, or a URI on an object store.

    Raises:
        ResumeError: `out` is not an output, or has a later format.

    Example:

        status = batchvl.status("m-batchvl")
        print(status.rows, "of", status.expected, status.states)
    """
    return next(watch(out))


def watch(out: str | os.PathLike[str] | Storage, seconds: float = 5.0) -> Iterator[Status]:
    """Yield the status repeatedly until all shards are complete. Each time, only what is new is read.

    Args:
        out: As for `status`.
        seconds: Time between two reads.
    """
    watcher = _Watcher(open_output(out))
    while True:
        current = watcher.poll()
        yield current
        if current.complete:
            return
        time.sleep(seconds)


class _ManifestSize(NamedTuple):
    """The number of rows in a manifest."""

    rows: int | None
    estimated: bool


class _Watcher:
    """An output that is read repeatedly."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        try:
            self._run_file = storage.run_file()
        except OSError as error:
            raise ResumeError(f"{storage}: cannot be read: {error.strerror}") from error
        self._pollers: dict[int, ShardPoller] = {}
        self._index: index.Index | None = None

    def poll(self) -> Status:
        """Return the current status. Raises ResumeError if the output cannot be read any more."""
        try:
            directories = self._storage.shards(self._run_file.shards)
        except OSError as error:
            raise ResumeError(f"{self._storage}: cannot be read: {error.strerror}") from error
        known = self._pollers
        self._pollers = {
            directory.shard.index: known.get(directory.shard.index) or ShardPoller(directory)
            for directory in directories
        }
        for poller in self._pollers.values():
            poller.poll()
        size = self._manifest_size()
        now = time.time()
        shards = []
        for number in range(self._run_file.shards):
            expected = None if size.rows is None else len(Shard(number, self._run_file.shards).rows(size.rows))
            shards.append(_shard_status(number, self._pollers.get(number), expected, size.estimated, now))
        return _overall_status(self._storage, self._run_file, shards, size, now)

    def _manifest_size(self) -> _ManifestSize:
        pollers = self._pollers.values()
        known = [self._run_file.total, *(poller.total for poller in pollers)]
        total = max((rows for rows in known if rows is not None), default=None)
        if total is not None and not any(poller.uncounted for poller in pollers):
            return _ManifestSize(total, False)
        if self._run_file.shards > 1:  # the first shard of a text counts its rows for the others
            self._index = self._index or index.read(self._storage.path, self._run_file.fingerprint)
            if self._index is not None:
                return _ManifestSize(self._index.rows, False)
        estimates = (poller.holder.total for poller in pollers if poller.holder)
        return _ManifestSize(max((rows for rows in estimates if rows is not None), default=None), True)


def _shard_status(
    number: int, poller: ShardPoller | None, expected: int | None, estimated: bool, now: float
) -> ShardStatus:
    counts = poller.counts if poller else Counts()
    shard = ShardStatus(
        shard=number,
        state="waiting",
        expected=expected,
        rows=counts.rows,
        ok=counts.ok,
        failed=counts.failures,
        failures=dict(sorted(counts.failed.items())),
    )
    done = expected is not None and not estimated and counts.rows >= expected
    if poller is None:
        shard.state = "complete" if done else "waiting"
        return shard
    if poller.last_sign is not None:
        shard.last_sign, shard.last_sign_seconds = _iso(poller.last_sign), _seconds_since(poller.last_sign, now)
    if poller.last_row is not None:
        shard.last_row_seconds = _seconds_since(poller.last_row, now)
    if poller.attempt is not None:
        shard.attempt, shard.retry = poller.attempt.attempt, poller.attempt.retry
    if (runner := poller.holder or poller.attempt) is not None:
        shard.host, shard.pid, shard.since = runner.host, runner.pid, runner.since
    shard.state = _state(poller, done, shard.last_sign_seconds)
    if shard.state == "complete":
        shard.eta_seconds = 0.0
    elif shard.state == "stopped":
        shard.message = poller.stop_message()
    elif shard.state == "running":
        _set_rate(shard, poller)
    shard.message = poller.problem or shard.message
    return shard


def _set_rate(shard: ShardStatus, poller: ShardPoller) -> None:
    """Set the rate and the time left of a running shard, if they are known."""
    if poller.attempt is None or not poller.attempt.up or not poller.last_sign:
        return
    # Up to the last write, not up to now: both times are by the file system's clock, whatever the clock here says.
    if (seconds := poller.last_sign - poller.attempt.up) >= _MIN_RATE_SECONDS:
        shard.rows_per_second = round(poller.recorded / seconds, 3)
    if shard.rows_per_second and shard.expected is not None and shard.rows < shard.expected:
        shard.eta_seconds = round((shard.expected - shard.rows) / shard.rows_per_second, 1)


def _state(poller: ShardPoller, done: bool, last_sign_seconds: float | None) -> State:
    last = poller.attempt
    done = done and (last is None or not last.retry or last.ended)  # an active retry works while all rows are done
    if poller.holder is not None:
        recent = last_sign_seconds is not None and last_sign_seconds < STALE_SECONDS
        if poller.alive or (poller.alive is None and recent):
            return "running"
        return "complete" if done else "stale"
    if done:
        return "complete"
    return "waiting" if last is None and not poller.counts.rows else "stopped"


def _overall_status(
    storage: Storage, run_file: RunFile, shards: list[ShardStatus], size: _ManifestSize, now: float
) -> Status:
    counts = Counts()
    for shard in shards:
        counts.add(Counts(shard.ok, shard.failures))
    complete = all(shard.state == "complete" for shard in shards)
    rates = [shard.rows_per_second for shard in shards if shard.rows_per_second]
    rate = sum(rates) if rates else None
    eta = 0.0 if complete else _time_left(shards, rate, None if size.rows is None else size.rows - counts.rows)
    signs = [shard for shard in shards if shard.last_sign_seconds is not None]
    latest = min(signs, key=lambda shard: shard.last_sign_seconds or 0.0, default=None)
    return Status(
        output=str(storage),
        manifest=run_file.manifest,
        time=_iso(now),
        complete=complete,
        expected=size.rows,
        estimated=size.estimated and size.rows is not None,
        rows=counts.rows,
        ok=counts.ok,
        failed=counts.failures,
        failures=dict(sorted(counts.failed.items())),
        rows_per_second=None if rate is None else round(rate, 3),
        eta_seconds=None if eta is None else round(eta, 1),
        last_sign=latest.last_sign if latest else None,
        last_sign_seconds=latest.last_sign_seconds if latest else None,
        states={state: sum(shard.state == state for shard in shards) for state in STATES},
        stale=[shard.shard for shard in shards if shard.state == "stale"],
        shards=shards,
    )


def _time_left(shards: list[ShardStatus], rate: float | None, rows_left: int | None) -> float | None:
    """Return the longer of the slowest running shard's time and that of all remaining rows at the overall rate."""
    if not rate or rows_left is None or rows_left <= 0:
        return None
    return max([rows_left / rate, *(shard.eta_seconds or 0.0 for shard in shards if shard.rows_per_second)])


def _iso(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")


def _seconds_since(then: float, now: float) -> float:
    return round(max(0.0, now - then), 1)  # clocks differ
