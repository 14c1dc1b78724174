"""The progress of a run: its counts, rates and mean times, shown on a terminal or as lines in a log."""

from __future__ import annotations

import asyncio
import logging
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import ClassVar

from tqdm import tqdm

from ..results.record import Counts, Record

LOG_SECONDS = 30.0
"""Seconds between two lines if there is no terminal."""
EXAMPLE_CHARACTERS = 200
STAGES = ("fetch", "prepare", "engine", "waiting")


class Bar(tqdm):  # type: ignore[type-arg]
    """A progress bar with a lock for this process only.

    tqdm's own lock is for several processes: a semaphore in /dev/shm, which `kill -9` would leave behind.
    """


Bar.set_lock(threading.RLock())


class LogHandler(logging.Handler):
    """Write log records of level INFO and above as lines. Any thread may log.

    Args:
        write: Writes one line.
    """

    def __init__(self, write: Callable[[str], None]) -> None:
        super().__init__(logging.INFO)
        self._write = write

    def emit(self, record: logging.LogRecord) -> None:
        try:
            text = self.format(record)
        except Exception:
            self.handleError(record)
            return
        self._write(text)


@contextmanager
def log_to(write: Callable[[str], None]) -> Iterator[None]:
    """Write what the package "batchvl" logs, INFO and above, inside the `with`."""
    logger = logging.getLogger("batchvl")
    handler = LogHandler(write)
    level = logger.level
    if not logger.isEnabledFor(logging.INFO):
        logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        if not any(isinstance(other, LogHandler) for other in logger.handlers):
            logger.setLevel(level)


class Progress:
    """The counts of one run, shown on standard error: a tqdm bar on a terminal, else a line every LOG_SECONDS.

    Rows count once they are on disk. Rates are of this run, without the rows that it resumed from. If standard error
    is gone, as with a closed terminal, nothing is shown any more.

    Args:
        expected: Returns the number of rows of the shard, as far as it is known.
        before: Counts of the rows that earlier runs finished.
        quiet: Show nothing.
    """

    starting: ClassVar[str] = "starting the engine"

    def __init__(self, expected: Callable[[], int | None], before: Counts, *, quiet: bool = False) -> None:
        self.started = time.monotonic()
        self.committed = Counts()
        """Counts of the rows that this run has written to disk."""
        self.images = self.input_tokens = self.output_tokens = 0
        self.examples: dict[str, str] = {}
        """The first failure of each error code, with its row."""
        self._expected, self.before, self._quiet = expected, before, quiet
        self._stage_seconds: Counter[str] = Counter()
        self._up_at: float | None = None
        self._wait_share: Callable[[], float] = lambda: 0.0
        self._bar: Bar | None = None
        if not quiet and sys.stderr.isatty():
            self._bar = Bar(
                total=expected(),
                initial=before.rows,
                unit=" rows",
                dynamic_ncols=True,
                smoothing=0.05,
                desc=self.starting,
            )

    def engine_up(self, wait_share: Callable[[], float] = lambda: 0.0) -> None:
        """Show rates from now on.

        Args:
            wait_share: Returns the share of its time in which the engine was short of rows.
        """
        self._up_at, self._wait_share = time.monotonic(), wait_share

    def add_stage_time(self, stage: str, seconds: float) -> None:
        """Add the time that rows spent in a stage."""
        self._stage_seconds[stage] += seconds  # type: ignore[assignment]

    def add_record(self, record: Record) -> None:
        """Count a row that is finished but not on disk yet."""
        if record.status == "ok":
            self.images += len(record.images)
        elif record.error is not None and record.error.code not in self.examples:
            message = " ".join(record.error.message.split())
            self.examples[record.error.code] = f"row {record.row}: {message[:EXAMPLE_CHARACTERS]}"
        self.input_tokens += record.input_tokens or 0
        self.output_tokens += record.output_tokens or 0
        self._stage_seconds["row"] += record.seconds  # type: ignore[assignment]

    def commit(self, counts: Counts) -> None:
        """Count rows that are on disk now."""
        self.committed.add(counts)
        with self._ignore_closed_terminal():
            if self._bar is not None:
                self._bar.total = self._expected()
                self._bar.set_description_str(refresh=False)
                self._bar.set_postfix_str(self.rates(), refresh=False)
                self._bar.update(counts.rows)

    async def tick(self) -> None:
        """Write a line every LOG_SECONDS if there is no terminal, even if no rows are committed. Runs for ever."""
        while True:
            await asyncio.sleep(LOG_SECONDS)
            if self._bar is None and self.before.rows + self.committed.rows != self._expected():
                self.write(self._line())

    def write(self, text: str) -> None:
        """Write a line without breaking the bar."""
        with self._ignore_closed_terminal():
            if not self._quiet:
                Bar.write(text, file=sys.stderr)
                sys.stderr.flush()

    def close(self) -> None:
        """Stop updating the bar, and leave it on the screen."""
        with self._ignore_closed_terminal():
            if self._bar is not None:
                self._bar.close()

    @contextmanager
    def _ignore_closed_terminal(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError):  # the terminal is gone; the file is closed
            self._quiet, self._bar = True, None

    def leading_failures(self, count: int = 3) -> str:
        """Return the most frequent error codes, also of earlier runs, each with its number of rows and an example."""
        total = Counts()
        total.add(self.before)
        total.add(self.committed)
        causes = Counter(total.failed).most_common(count)
        examples = {code: f", such as {example}" for code, example in self.examples.items()}
        return "; ".join(f"{rows:,} {code}{examples.get(code, '')}" for code, rows in causes)

    @property
    def seconds(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.started

    def mean_seconds(self) -> dict[str, float]:
        """Return the mean seconds that a row spent in each stage; "waiting" is the time between them."""
        rows = max(1, self.committed.rows)
        stages = {stage: self._stage_seconds[stage] for stage in STAGES[:-1]}
        waiting = max(0.0, self._stage_seconds["row"] - sum(stages.values()))
        return {name: round(seconds / rows, 6) for name, seconds in {**stages, "waiting": waiting}.items()}

    def rates(self) -> str:
        """Return the rates since the engine was up, and the failures."""
        seconds = self.up_seconds()
        parts = [f"{self.output_tokens / seconds:,.0f} tokens/s"]
        if self.images:
            parts.insert(0, f"{self.images / seconds:,.1f} images/s")
        failed = self.before.failures + self.committed.failures
        return ", ".join([*parts, f"{failed:,} failed", f"engine waiting {self._wait_share():.0%}"])

    def up_seconds(self) -> float:
        """Return the seconds over which rates are taken."""
        return max(time.monotonic() - (self._up_at or self.started), 1e-9)

    def _line(self) -> str:
        if self._up_at is None:
            return f"{self.starting} ({Bar.format_interval(int(self.seconds))} so far)"
        done, total = self.before.rows + self.committed.rows, self._expected()
        rate = self.committed.rows / self.up_seconds()
        of, left = f" of {total:,}" if total is not None else "", ""
        if total is not None and rate > 0:
            left = f", {Bar.format_interval(int((total - done) / rate))} left"
        return f"{done:,}{of} rows, {rate:,.1f} rows/s, {self.rates()}{left}"


class FetchProgress(Progress):
    """The progress of a fetch. Its rows are on disk only once their file is complete; its images count before that."""

    starting = "starting to fetch"

    def __init__(self, expected: Callable[[], int | None], before: Counts, *, quiet: bool = False) -> None:
        super().__init__(expected, before, quiet=quiet)
        self.bytes = 0
        """Bytes of the images."""

    def add_images(self, sizes: Sequence[int]) -> None:
        """Count the images of a row, by their bytes."""
        self.images += len(sizes)
        self.bytes += sum(sizes)

    def rates(self) -> str:
        seconds = self.up_seconds()
        failed = self.before.failures + self.committed.failures
        speed = f"{self.images / seconds:,.1f} images/s, {self.bytes / seconds / 1e6:,.1f} MB/s"
        return f"{self.images:,} images fetched, {speed}, {failed:,} failed"
