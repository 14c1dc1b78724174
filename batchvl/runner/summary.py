"""What a run came to: printed at its end, and the same as `summary.json` in its output."""

from __future__ import annotations

from pathlib import Path

import msgspec

from ..engines.base import EngineInfo
from ..results.record import Counts
from .progress import Progress


class _End(msgspec.Struct):
    rows: int
    exit_code: int


class Summary(msgspec.Struct):
    """The end of a run; `batchvl.run` returns it. Seconds are of this run, counts are of the whole shard."""

    manifest: str
    output: str
    results: str | None
    """The merged file, once there is one."""
    exit_code: int
    rows: int
    """Rows on disk, those of earlier runs included."""
    ok: int
    failed: int
    failures: dict[str, int]
    """Failed rows by error code."""
    examples: dict[str, str]
    """The first failure of each code in this run, with its row."""
    resumed: int
    """Rows that were done before this run."""
    expected: int | None
    """Rows of the shard; None where the run stopped before it was known."""
    seconds: float
    rows_per_second: float
    images: int
    images_per_second: float
    output_tokens: int
    tokens_per_second: float
    mean_seconds: dict[str, float]
    """What a row spent on average in fetching, preparing, the engine, and waiting in between."""
    engine_seconds: float
    """For how long the engine was up, from the first rows that it was handed to its last answer."""
    gpu_wait: float
    """The share of these, 0 to 1, in which it was short of rows."""
    engine_deaths: int
    engine_restarts: int
    """How often the engine was started afresh because its memory had grown."""
    engine: EngineInfo | None = None
    message: str = ""
    """Why the exit code is not 0, where it is not."""

    def write(self, path: Path) -> None:
        """Writes the summary as JSON, in place of an older one."""
        temporary = path.with_name(path.name + ".tmp")
        temporary.write_bytes(msgspec.json.format(msgspec.json.encode(self), indent=2) + b"\n")
        temporary.replace(path)

    def is_told(self, path: Path) -> bool:
        """Whether a summary is there that tells of the same end: of a run killed before its own it would be another."""
        try:
            found = msgspec.json.decode(path.read_bytes(), type=_End)
        except (OSError, msgspec.DecodeError):
            return False
        return (found.rows, found.exit_code) == (self.rows, self.exit_code)

    def __str__(self) -> str:
        of = f" of {self.expected:,}" if self.expected is not None and self.expected > self.rows else ""
        lines = [f"{self.rows:,}{of} rows done: {self.ok:,} ok, {self.failed:,} failed"]
        examples = {code: f", such as {example}" for code, example in self.examples.items()}
        for code, count in sorted(self.failures.items(), key=lambda item: -item[1]):
            lines.append(f"  {count:>8,} {code}{examples.get(code, '')}")
        if self.resumed == self.rows == self.expected and self.rows:
            lines.append("all of them were done before: there was nothing left to do")
        elif self.resumed:
            lines.append(f"{self.resumed:,} of them were done before this run")
        if self.rows > self.resumed:
            images = f"{self.images_per_second:,.1f} images/s, " if self.images else ""
            rates = f"{self.rows_per_second:,.1f} rows/s, {images}{self.tokens_per_second:,.0f} tokens/s"
            lines.append(f"{self.seconds:,.1f} s: {rates}")
            spent = ", ".join(f"{name} {_short(seconds)}" for name, seconds in self.mean_seconds.items())
            lines.append(f"a row's time: {spent}")
            lines.append(
                f"the engine waited for rows {self.gpu_wait:.1%} of the {self.engine_seconds:,.1f} s that it was up"
            )
        if self.engine is not None:
            lines.append(str(self.engine))
        if self.engine_deaths:
            lines.append(f"the engine died {_times(self.engine_deaths)}")
        if self.engine_restarts:
            lines.append(f"the engine was started afresh {_times(self.engine_restarts)}, for its memory had grown")
        if self.message:
            lines.append(self.message)
        shards = "" if self.results or self.message else f"; once all shards are done: batchvl merge {self.output}"
        lines.append(f"output: {self.results or self.output}{shards}")
        return "\n".join(lines)


def summarise(
    progress: Progress, before: Counts, *, manifest: str, output: object, expected: int | None, exit_code: int
) -> Summary:
    """The summary of a run that has counted itself in `progress`, on top of what was done `before`."""
    total = Counts()
    total.add(before)
    total.add(progress.committed)
    seconds = max(progress.seconds, 1e-9)
    return Summary(
        manifest=manifest,
        output=str(output),
        results=None,
        exit_code=exit_code,
        rows=total.rows,
        ok=total.ok,
        failed=total.failures,
        failures=total.failed,
        examples=progress.examples,
        resumed=before.rows,
        expected=expected,
        seconds=round(seconds, 3),
        rows_per_second=round(progress.committed.rows / seconds, 3),
        images=progress.images,
        images_per_second=round(progress.images / seconds, 3),
        output_tokens=progress.output_tokens,
        tokens_per_second=round(progress.output_tokens / seconds, 3),
        mean_seconds=progress.mean_seconds(),
        engine_seconds=0.0,
        gpu_wait=0.0,
        engine_deaths=0,
        engine_restarts=0,
    )


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"


def _short(seconds: float) -> str:
    return f"{seconds * 1000:,.1f} ms" if seconds < 1 else f"{seconds:,.1f} s"
