"""How a run is getting on, all shards together and each: what is told of it. `watch.py` finds it out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Literal, get_args

import msgspec
from tqdm import tqdm

State = Literal["complete", "running", "stale", "stopped", "waiting"]
"""complete: all rows are done; running: a runner is at work; stale: its runner was killed or lost, for on this host it
has gone, or from another it has not been heard of for three minutes; stopped: its runner ended in order before all rows
were done; waiting: no runner has begun."""
STATES: tuple[State, ...] = get_args(State)

QUIET_SECONDS = 300.0
"""A runner that has recorded no row for so long is told of."""


class ShardStatus(msgspec.Struct, kw_only=True):
    """How a shard is getting on. Seconds are floats, times are UTC in ISO 8601."""

    shard: int
    """Its index, from 0."""
    state: State
    expected: int | None
    """Its rows; None where the manifest's are not known."""
    rows: int
    """Rows done, that is on disk, by all attempts."""
    ok: int
    failed: int
    failures: dict[str, int]
    """Failed rows by error code."""
    rows_per_second: float | None = None
    """Of a running attempt: the rows that it recorded, over the time since its engine was up."""
    eta_seconds: float | None = None
    """Until it is done, at this rate; 0 where it is complete, None where it cannot be known."""
    attempt: int | None = None
    """The last attempt's number; None where there was none."""
    retry: int = 0
    """Where that is a `batchvl retry` of the run: its how-manieth."""
    host: str | None = None
    pid: int | None = None
    since: str | None = None
    """When it began."""
    last_sign: str | None = None
    """Its last sign of life: when it last wrote anything. A runner does so at least every 30 seconds."""
    last_sign_seconds: float | None = None
    """How long ago that was."""
    last_row_seconds: float | None = None
    """How long ago it last recorded a row."""
    message: str = ""
    """What cannot be read here, or why the last attempt stopped."""

    def who(self) -> str:
        """The last attempt, for people: its number, its runner unless all is done, and what else is to be said."""
        told = []
        if self.attempt is not None:
            number = f"{self.attempt}{f' (retry {self.retry})' if self.retry else ''}"
            runner = f" on {self.host}, process {self.pid}, since {self.since}" if self.state in _OPEN else ""
            told.append(number + runner)
        if self.state == "running" and self.last_row_seconds is not None and self.last_row_seconds >= QUIET_SECONDS:
            told.append(f"no row for {_span(self.last_row_seconds)}")
        return "; ".join([*told, self.message] if self.message else told)


class Status(msgspec.Struct, kw_only=True):
    """How an output folder's run is getting on, all shards together; `batchvl.status` returns it."""

    output: str
    manifest: str
    time: str
    """When this was found out."""
    complete: bool
    """Whether all shards are complete."""
    expected: int | None
    """The manifest's rows; None where nobody has counted them yet."""
    estimated: bool
    """Whether `expected` is an estimate, of a text whose end has not been read."""
    rows: int
    """Rows done, of all shards. This and what follows means the same as for a shard."""
    ok: int
    failed: int
    failures: dict[str, int]
    rows_per_second: float | None
    """Of all running shards together."""
    eta_seconds: float | None
    """What the slowest running shard needs, or all rows left at this rate where that is longer: as if others began as
    soon as those that run are done."""
    last_sign: str | None
    last_sign_seconds: float | None
    states: dict[State, int]
    """How many shards are in each state."""
    stale: list[int]
    """The stale shards' indices."""
    shards: list[ShardStatus]
    """Each of them, in order."""

    def __str__(self) -> str:
        return self.text()

    def as_json(self, indent: int = 2) -> str:
        """One JSON object, on one line where indent is 0."""
        data = msgspec.json.encode(self)
        return (msgspec.json.format(data, indent=indent) if indent else data).decode()

    def text(self, *, all: bool = False, height: int | None = None, width: int | None = None) -> str:
        """For people: the whole, then a line a shard, in at most `height` lines, each cut to `width`.

        Of more than 32 shards those are shown that are at work or need looking after, of these what needs it most and
        what will be done last; `all` shows each.
        """
        lines = self._head()
        if len(self.shards) == 1:
            return "\n".join(line[:width] for line in lines)
        shown = [shard for shard in self.shards if all or len(self.shards) <= _MANY or shard.state in _OPEN]
        room = len(shown) if all else _MANY
        if height is not None:
            room = min(room, max(0, height - len(lines) - 3))
        shown = sorted(sorted(shown, key=_urgency)[:room], key=lambda shard: shard.shard)
        if shown:
            lines += ["", *_table([_cells(shard) for shard in shown])]
        if left := len(self.shards) - len(shown):
            lines.append(f"… and {left:,} more{'' if all else ' (--all shows each)'}")
        return "\n".join(line[:width] for line in lines)

    def _head(self) -> list[str]:
        about = "about " if self.estimated else ""
        of = f" of {about}{self.expected:,}" if self.expected is not None else ""
        share = f" ({_share(self.rows, self.expected)})" if self.expected else ""
        lines = [f"{self.rows:,}{of} rows done{share}: {self.ok:,} ok, {self.failed:,} failed"]
        codes = sorted(self.failures.items(), key=lambda item: -item[1])
        lines += [f"  {count:>8,} {code}" for code, count in codes]
        now = []
        if self.states["running"]:
            now.append("no rate yet" if self.rows_per_second is None else f"{self.rows_per_second:,.1f} rows/s")
            left = None if self.eta_seconds is None else f"{about}{_interval(self.eta_seconds)} left"
            now.append(left or "time left unknown")
        if self.last_sign_seconds is not None and not self.complete:
            now.append(f"last sign of life {_ago(self.last_sign_seconds)}")
        if now:
            lines.append(", ".join(now))
        if len(self.shards) > 1:
            states = ", ".join(f"{count:,} {state}" for state, count in self.states.items() if count)
            lines.append(f"{len(self.shards):,} shards: {states}")
        else:
            who = self.shards[0].who()
            lines.append(self.shards[0].state + (who and f", attempt {who}"))
        if lost := [shard.shard for shard in self.shards if shard.state in ("stale", "stopped")]:
            shards = f", of shards {ranges(lost)}" if len(self.shards) > 1 else ""
            lines.append(f"to go on: the same command again{shards}")
        return lines


_MANY = 32
_OPEN = frozenset({"running", "stale", "stopped"})
_HEAD = ("shard", "state", "rows done", "", "failed", "rows/s", "left", "last sign", "attempt")
_LEFT = frozenset({"state", "last sign", "attempt"})


def _urgency(shard: ShardStatus) -> tuple[int, float]:
    rank = ("stale", "stopped", "running", "waiting", "complete").index(shard.state)
    left = shard.eta_seconds if shard.eta_seconds is not None else float("inf")
    return (0 if shard.message else rank, -left)


def _cells(shard: ShardStatus) -> tuple[str, ...]:
    of = f" of {shard.expected:,}" if shard.expected is not None else ""
    working, unfinished = shard.state == "running", shard.state in _OPEN
    return (
        str(shard.shard),
        shard.state,
        f"{shard.rows:,}{of}",
        _share(shard.rows, shard.expected) if shard.expected else "",
        f"{shard.failed:,}",
        f"{shard.rows_per_second:,.1f}" if shard.rows_per_second is not None else "",
        _interval(shard.eta_seconds) if working and shard.eta_seconds is not None else "",
        _ago(shard.last_sign_seconds) if unfinished and shard.last_sign_seconds is not None else "",
        shard.who(),
    )


def _table(rows: list[tuple[str, ...]]) -> Iterator[str]:
    widths = [max(map(len, column)) for column in zip(_HEAD, *rows, strict=True)]
    for row in (_HEAD, *rows):
        cells = zip(_HEAD, row, widths, strict=True)
        yield "  ".join(c.ljust(width) if name in _LEFT else c.rjust(width) for name, c, width in cells).rstrip()


def ranges(numbers: Iterable[int]) -> str:
    """Ascending numbers as `sbatch --array` takes them.

    >>> ranges([3, 17, 20, 21, 22])
    '3,17,20-22'
    """
    found: list[list[int]] = []
    for number in numbers:
        if found and number == found[-1][1] + 1:
            found[-1][1] = number
        else:
            found.append([number, number])
    return ",".join(str(low) if low == high else f"{low}-{high}" for low, high in found)


def _share(rows: int, of: int) -> str:
    return f"{min(1.0, rows * 1000 // of / 1000):.1%}"  # rounded down: 100% is all


def _interval(seconds: float) -> str:
    return str(tqdm.format_interval(int(seconds)))


def _ago(seconds: float) -> str:
    return f"{_span(seconds)} ago"


def _span(seconds: float) -> str:
    for length, unit in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * length:
            return f"{seconds // length:.0f} {unit}"
    return f"{seconds:.0f} s"
