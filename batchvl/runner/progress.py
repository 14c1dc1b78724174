"""What a run has done so far: counts, rates and where the time went, on a terminal's line or in a log."""

from __future__ import annotations

import asyncio
import logging
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm

from ..results.record import Counts, Record

LOG_SECONDS = 30.0
"""How often a line is written where there is no terminal."""
EXAMPLE_CHARACTERS = 200
STAGES = ("fetch", "prepare", "engine", "waiting")


class Bar(tqdm):  # type: ignore[type-arg]
    """A bar of this process alone.

    The lock that tqdm makes otherwise is a semaphore in /dev/shm for a moment, which kill -9 can leave there.
    """


Bar.set_lock(threading.RLock())


class LogHandler(logging.Handler):
    """Write log records of INFO and above as lines, by `write`; any thread may log."""

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
    """Write what the package "batchvl" logs, INFO and above, by `write`, inside the `with`."""
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
    """Counts of one run. Rows count once they are on disk; rates are over this run, not over what it resumed.

    `expected()` is the number of rows of the shard, as well as it is known yet; `before` counts the rows that were
    done already. Lines go to standard error: a tqdm bar on a terminal, else one plain line every LOG_SECONDS. When
    standard error is gone, as with a closed terminal, it falls silent.
    """

    def __init__(self, expected: Callable[[], int | None], before: Counts, *, quiet: bool = False) -> None:
        self.started = time.monotonic()
        self.committed = Counts()
        self.images = self.input_tokens = self.output_tokens = 0
        self._expected, self._before, self._quiet = expected, before, quiet
        self._spent: Counter[str] = Counter()
        self.examples: dict[str, str] = {}
        """The first failure of each code, with its row."""
        self._up_at: float | None = None
        self._gpu_wait: Callable[[], float] = lambda: 0.0
        self._bar: Bar | None = None
        if not quiet and sys.stderr.isatty():
            self._bar = Bar(
                total=expected(), initial=before.rows, unit=" rows", dynamic_ncols=True, smoothing=0.05,
                desc="starting the engine",
            )  # fmt: skip

    def engine_up(self, gpu_wait: Callable[[], float]) -> None:
        """Rates are told from now on. gpu_wait: the share of the time in which the engine was short of rows."""
        self._up_at, self._gpu_wait = time.monotonic(), gpu_wait

    def spent(self, name: str, seconds: float) -> None:
        """A row's time in a stage."""
        self._spent[name] += seconds  # type: ignore[assignment]

    def answered(self, record: Record) -> None:
        """A row has come to its end, though it is not on disk yet."""
        if record.status == "ok":
            self.images += len(record.images)
        elif record.error is not None and record.error.code not in self.examples:
            said = " ".join(record.error.message.split())
            self.examples[record.error.code] = f"row {record.row}: {said[:EXAMPLE_CHARACTERS]}"
        self.input_tokens += record.input_tokens or 0
        self.output_tokens += record.output_tokens or 0
        self._spent["row"] += record.seconds  # type: ignore[assignment]

    def commit(self, counts: Counts) -> None:
        """Rows are on disk."""
        self.committed.add(counts)
        with self._lenient():
            if self._bar is not None:
                self._bar.total = self._expected()
                self._bar.set_description_str(refresh=False)
                self._bar.set_postfix_str(self._rates(), refresh=False)
                self._bar.update(counts.rows)

    async def tick(self) -> None:
        """Keeps telling how far it is, also where nothing is committed for long."""
        while True:
            await asyncio.sleep(LOG_SECONDS)
            if self._bar is None and self._before.rows + self.committed.rows != self._expected():
                self.write(self._line())

    def write(self, text: str) -> None:
        """Write a line without breaking the bar."""
        with self._lenient():
            if not self._quiet:
                Bar.write(text, file=sys.stderr)
                sys.stderr.flush()

    def close(self) -> None:
        """Leaves the bar as it stands."""
        with self._lenient():
            if self._bar is not None:
                self._bar.close()

    @contextmanager
    def _lenient(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError):  # no such terminal any more; a closed file
            self._quiet, self._bar = True, None

    def leading_failures(self, most: int = 3) -> str:
        """The most frequent error codes, earlier runs included, with how many rows each and an example, for people."""
        total = Counts()
        total.add(self._before)
        total.add(self.committed)
        causes = Counter(total.failed).most_common(most)
        examples = {code: f", such as {example}" for code, example in self.examples.items()}
        return "; ".join(f"{count:,} {code}{examples.get(code, '')}" for code, count in causes)

    @property
    def seconds(self) -> float:
        """Since the start."""
        return time.monotonic() - self.started

    def mean_seconds(self) -> dict[str, float]:
        """Mean seconds that a row spent in each stage; "waiting" is all between them."""
        rows = max(1, self.committed.rows)
        spent = {name: self._spent[name] for name in STAGES[:-1]}
        waiting = max(0.0, self._spent["row"] - sum(spent.values()))
        return {name: round(value / rows, 6) for name, value in {**spent, "waiting": waiting}.items()}

    def _rates(self) -> str:
        seconds = self._up_seconds()
        parts = [f"{self.output_tokens / seconds:,.0f} tokens/s"]
        if self.images:
            parts.insert(0, f"{self.images / seconds:,.1f} images/s")
        failed = self._before.failures + self.committed.failures
        return ", ".join([*parts, f"{failed:,} failed", f"the engine waits {self._gpu_wait():.0%}"])

    def _up_seconds(self) -> float:
        return max(time.monotonic() - (self._up_at or self.started), 1e-9)

    def _line(self) -> str:
        if self._up_at is None:
            return f"the engine is starting, for {Bar.format_interval(int(self.seconds))} so far"
        done, total = self._before.rows + self.committed.rows, self._expected()
        rate = self.committed.rows / self._up_seconds()
        of, left = f" of {total:,}" if total is not None else "", ""
        if total is not None and rate > 0:
            left = f", {Bar.format_interval(int((total - done) / rate))} left"
        return f"{done:,}{of} rows, {rate:,.1f} rows/s, {self._rates()}{left}"
