"""The status of a run, all shards together and each, as data and as text. `watch.py` determines it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Literal, get_args

import msgspec
from tqdm import tqdm

State = Literal["complete", "running", "stale", "stopped", "waiting"]
"""complete: all rows are done; running: a runner is active; stale: its runner was killed or lost (the process is gone
from this host, or has shown no activity on another host for three minutes); stopped: its runner ended in order before
all rows were done; waiting: no runner has started."""
STATES: tuple[State, ...] = get_args(State)

QUIET_SECONDS = 300.0
"""Time without a new row after which a running shard is reported as quiet."""


class ShardStatus(msgspec.Struct, kw_only=True):
    """The status of a shard. Durations are in seconds, times are UTC in ISO 8601."""

    shard: int
    """Its index, from 0."""
    state: State
    expected: int | None
    """Number of its rows; None if the manifest's size is unknown."""
    rows: int
    """Number of rows that are done, that is on disk, by all attempts."""
    ok: int
    failed: int
    failures: dict[str, int]
    """Failed rows by error code."""
    rows_per_second: float | None = None
    """Rate of a running attempt since its engine was up."""
    eta_seconds: float | None = None
    """Time left at this rate; 0 if the shard is complete, None if unknown."""
    attempt: int | None = None
    """Number of the last attempt; None if there was none."""
    retry: int = 0
    """1-based number of the retry (`batchvl retry`) that the last attempt belongs to; 0 in a run."""
    host: str | None = None
    pid: int | None = None
    since: str | None = None
    """When the last attempt started."""
    last_sign: str | None = None
    """When the last attempt last wrote anything. A runner does so at least every 30 seconds."""
    last_sign_seconds: float | None = None
    """Time since then."""
    last_row_seconds: float | None = None
    """Time since the last attempt last recorded a row."""
    message: str = ""
    """What cannot be read, or why the last attempt stopped."""

    def describe_attempt(self) -> str:
        """Return the last attempt in words: its number, its runner unless all rows are done, and any problem."""
        words = []
        if self.attempt is not None:
            number = f"{self.attempt}{f' (retry {self.retry})' if self.retry else ''}"
            runner = f" on {self.host}, process {self.pid}, since {self.since}" if self.state in _UNFINISHED else ""
            words.append(number + runner)
        if self.state == "running" and self.last_row_seconds is not None and self.last_row_seconds >= QUIET_SECONDS:
            words.append(f"no new row for {_format_duration(self.last_row_seconds)}")
        if self.message:
            words.append(self.message)
        return "; ".join(words)


class Status(msgspec.Struct, kw_only=True):
    """The status of an output's run, all shards together; returned by `batchvl.status`."""

    output: str
    manifest: str
    time: str
    """When the status was determined."""
    complete: bool
    """Whether all shards are complete."""
    expected: int | None
    """Number of rows in the manifest; None if it has not been counted."""
    estimated: bool
    """Whether `expected` is an estimate, because the end of a text has not been read."""
    rows: int
    """Number of rows that are done, of all shards. The following fields have the same meaning as for a shard."""
    ok: int
    failed: int
    failures: dict[str, int]
    rows_per_second: float | None
    """Rate of all running shards together."""
    eta_seconds: float | None
    """Time left for the slowest running shard, or for all remaining rows at the overall rate if that is longer, as if
    other shards started as soon as the running ones are done."""
    last_sign: str | None
    last_sign_seconds: float | None
    states: dict[State, int]
    """Number of shards in each state."""
    stale: list[int]
    """Indices of the stale shards."""
    shards: list[ShardStatus]
    """The status of each shard, in order."""

    def __str__(self) -> str:
        return self.text()

    def as_json(self, indent: int = 2) -> str:
        """Return the status as a JSON object, on one line if `indent` is 0."""
        data = msgspec.json.encode(self)
        return (msgspec.json.format(data, indent=indent) if indent else data).decode()

    def text(self, *, all: bool = False, height: int | None = None, width: int | None = None) -> str:
        """Return the status as human-readable text: a summary, then one line per shard.

        Of more than 32 shards, only those that are active or need attention are listed, most urgent and slowest first.

        Args:
            all: List every shard.
            height: Maximum number of lines.
            width: Maximum length of a line.
        """
        lines = self._summary()
        if len(self.shards) == 1:
            return "\n".join(line[:width] for line in lines)
        listed = [
            shard for shard in self.shards if all or len(self.shards) <= _MAX_LISTED or shard.state in _UNFINISHED
        ]
        capacity = len(listed) if all else _MAX_LISTED
        if height is not None:
            capacity = min(capacity, max(0, height - len(lines) - 3))
        listed = sorted(sorted(listed, key=_urgency)[:capacity], key=lambda shard: shard.shard)
        if listed:
            lines += ["", *_table([_cells(shard) for shard in listed])]
        if omitted := len(self.shards) - len(listed):
            lines.append(f"… and {omitted:,} more{'' if all else ' (use --all to list every shard)'}")
        return "\n".join(line[:width] for line in lines)

    def _summary(self) -> list[str]:
        about = "about " if self.estimated else ""
        expected = f" of {about}{self.expected:,}" if self.expected is not None else ""
        percent = f" ({_format_percent(self.rows, self.expected)})" if self.expected else ""
        lines = [f"{self.rows:,}{expected} rows done{percent}: {self.ok:,} ok, {self.failed:,} failed"]
        codes = sorted(self.failures.items(), key=lambda item: -item[1])
        lines += [f"  {count:>8,} {code}" for code, count in codes]
        if activity := self._activity(about):
            lines.append(", ".join(activity))
        if len(self.shards) > 1:
            states = ", ".join(f"{count:,} {state}" for state, count in self.states.items() if count)
            lines.append(f"{len(self.shards):,} shards: {states}")
        else:
            attempt = self.shards[0].describe_attempt()
            lines.append(self.shards[0].state + (attempt and f", attempt {attempt}"))
        if unfinished := [shard.shard for shard in self.shards if shard.state in ("stale", "stopped")]:
            which = f" for shard{'s' * (len(unfinished) > 1)} {ranges(unfinished)}" if len(self.shards) > 1 else ""
            lines.append(f"to resume: run the same command again{which}")
        return lines

    def _activity(self, about: str) -> list[str]:
        activity = []
        if self.states["running"]:
            activity.append("no rate yet" if self.rows_per_second is None else f"{self.rows_per_second:,.1f} rows/s")
            eta = None if self.eta_seconds is None else f"{about}{_format_eta(self.eta_seconds)} left"
            activity.append(eta or "time left unknown")
        if self.last_sign_seconds is not None and not self.complete:
            activity.append(f"last activity {_format_ago(self.last_sign_seconds)}")
        return activity


_MAX_LISTED = 32
_UNFINISHED = frozenset({"running", "stale", "stopped"})
_HEADER = ("shard", "state", "rows done", "", "failed", "rows/s", "time left", "last activity", "attempt")
_LEFT_ALIGNED = frozenset({"state", "last activity", "attempt"})


def _urgency(shard: ShardStatus) -> tuple[int, float]:
    """Return a sort key: shards with a problem first, then by state, then the slowest first."""
    rank = ("stale", "stopped", "running", "waiting", "complete").index(shard.state)
    eta = shard.eta_seconds if shard.eta_seconds is not None else float("inf")
    return (0 if shard.message else rank, -eta)


def _cells(shard: ShardStatus) -> tuple[str, ...]:
    expected = f" of {shard.expected:,}" if shard.expected is not None else ""
    running, unfinished = shard.state == "running", shard.state in _UNFINISHED
    return (
        str(shard.shard),
        shard.state,
        f"{shard.rows:,}{expected}",
        _format_percent(shard.rows, shard.expected) if shard.expected else "",
        f"{shard.failed:,}",
        f"{shard.rows_per_second:,.1f}" if shard.rows_per_second is not None else "",
        _format_eta(shard.eta_seconds) if running and shard.eta_seconds is not None else "",
        _format_ago(shard.last_sign_seconds) if unfinished and shard.last_sign_seconds is not None else "",
        shard.describe_attempt(),
    )


def _table(rows: list[tuple[str, ...]]) -> Iterator[str]:
    widths = [max(map(len, column)) for column in zip(_HEADER, *rows, strict=True)]
    for row in (_HEADER, *rows):
        cells = (
            cell.ljust(width) if name in _LEFT_ALIGNED else cell.rjust(width)
            for name, cell, width in zip(_HEADER, row, widths, strict=True)
        )
        yield "  ".join(cells).rstrip()


def ranges(numbers: Iterable[int]) -> str:
    """Return ascending numbers in the syntax of `sbatch --array`.

    >>> ranges([3, 17, 20, 21, 22])
    '3,17,20-22'
    """
    bounds: list[list[int]] = []
    for number in numbers:
        if bounds and number == bounds[-1][1] + 1:
            bounds[-1][1] = number
        else:
            bounds.append([number, number])
    return ",".join(str(low) if low == high else f"{low}-{high}" for low, high in bounds)


def _format_percent(rows: int, expected: int) -> str:
    return f"{min(1.0, rows * 1000 // expected / 1000):.1%}"  # rounded down: 100% means all


def _format_eta(seconds: float) -> str:
    return str(tqdm.format_interval(int(seconds)))


def _format_ago(seconds: float) -> str:
    return f"{_format_duration(seconds)} ago"


def _format_duration(seconds: float) -> str:
    for length, unit in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * length:
            return f"{seconds // length:.0f} {unit}"
    return f"{seconds:.0f} s"
