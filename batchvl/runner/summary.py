"""The summary of a run: printed at its end, and written to `summary.json` in its output."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from ..config.units import pluralize
from ..engines.base import EngineInfo
from ..results.record import Counts
from .progress import FetchProgress, Progress


class EngineUse(NamedTuple):
    """What a run's engine was and how it was used. The defaults are those of a run that started no engine."""

    info: EngineInfo | None = None
    seconds: float = 0.0
    """Seconds for which it was up, from the first batch to the last answer."""
    wait_share: float = 0.0
    """Share of these seconds, 0 to 1, in which it was short of rows."""
    deaths: int = 0
    recycled: int = 0
    """Number of restarts because its memory had grown."""


class _End(msgspec.Struct):
    """The fields of a summary that say how a run ended."""

    rows: int
    exit_code: int


class Ending(msgspec.Struct, kw_only=True):
    """What the summaries of a run and of a fetch have in common. Seconds are of this attempt, counts of the shard."""

    manifest: str
    output: str
    results: str | None
    """The merged file, once there is one."""
    exit_code: int
    rows: int
    """Rows on disk, including those of earlier runs."""
    ok: int
    failed: int
    failures: dict[str, int]
    """Failed rows by error code."""
    examples: dict[str, str]
    """The first failure of each code in this run, with its row."""
    resumed: int
    """Rows that were done before this run."""
    expected: int | None
    """Rows of the shard; None if the run stopped before the number was known."""
    seconds: float
    rows_per_second: float
    images: int
    images_per_second: float
    message: str = ""
    """The reason for an exit code other than 0."""

    def write(self, path: Path) -> None:
        """Write the summary as JSON, replacing an older one."""
        temporary = path.with_name(path.name + ".tmp")
        temporary.write_bytes(msgspec.json.format(msgspec.json.encode(self), indent=2) + b"\n")
        temporary.replace(path)

    def already_recorded(self, path: Path) -> bool:
        """Return whether the file holds a summary with the same end, written by an earlier run."""
        try:
            end = msgspec.json.decode(path.read_bytes(), type=_End)
        except (OSError, msgspec.DecodeError):
            return False
        return (end.rows, end.exit_code) == (self.rows, self.exit_code)

    def counts(self) -> list[str]:
        """Return the counts as lines of text."""
        of = f" of {self.expected:,}" if self.expected is not None and self.expected > self.rows else ""
        lines = [f"{self.rows:,}{of} rows done: {self.ok:,} ok, {self.failed:,} failed"]
        examples = {code: f", such as {example}" for code, example in self.examples.items()}
        for code, count in sorted(self.failures.items(), key=lambda item: -item[1]):
            lines.append(f"  {count:>8,} {code}{examples.get(code, '')}")
        if self.resumed == self.rows == self.expected and self.rows:
            lines.append("all rows were done before this run: nothing left to do")
        elif self.resumed:
            lines.append(f"{self.resumed:,} of them were done before this run")
        return lines


class Summary(Ending, kw_only=True):
    """The end of a run; `batchvl.run` returns it. Seconds are of this run, counts are of the whole shard."""

    output_tokens: int
    tokens_per_second: float
    mean_seconds: dict[str, float]
    """Mean seconds of a row in each stage (fetch, prepare, engine) and between them (waiting)."""
    engine_seconds: float
    """Seconds for which the engine was up, from its first rows to its last answer."""
    gpu_wait: float
    """Share of `engine_seconds`, 0 to 1, in which the engine was short of rows."""
    engine_deaths: int
    engine_restarts: int
    """Number of times that the engine was restarted because its memory had grown."""
    engine: EngineInfo | None = None

    def __str__(self) -> str:
        lines = self.counts()
        if self.rows > self.resumed:
            images = f"{self.images_per_second:,.1f} images/s, " if self.images else ""
            rates = f"{self.rows_per_second:,.1f} rows/s, {images}{self.tokens_per_second:,.0f} tokens/s"
            lines.append(f"{self.seconds:,.1f} s: {rates}")
            stages = ", ".join(f"{name} {_format_seconds(seconds)}" for name, seconds in self.mean_seconds.items())
            lines.append(f"mean time of a row: {stages}")
            waiting = f"it waited for rows {self.gpu_wait:.1%} of that time"
            lines.append(f"the engine was up for {self.engine_seconds:,.1f} s; {waiting}")
        if self.engine is not None:
            lines.append(str(self.engine))
        if self.engine_deaths:
            lines.append(f"the engine died {_times(self.engine_deaths)}")
        if self.engine_restarts:
            lines.append(f"the engine was restarted {_times(self.engine_restarts)} because its memory had grown")
        if self.message:
            lines.append(self.message)
        merge = "" if self.results or self.message else f"; once all shards are done, run: batchvl merge {self.output}"
        lines.append(f"output: {self.results or self.output}{merge}")
        return "\n".join(lines)


class FetchSummary(Ending, kw_only=True):
    """The end of a fetch; `batchvl.fetch` returns it. Seconds are of this fetch, counts are of the whole shard."""

    bytes: int
    """Bytes of the images."""
    bytes_per_second: float
    files: int
    """Files of images that the shard has."""

    def __str__(self) -> str:
        lines = self.counts()
        if self.rows > self.resumed:
            rates = f"{self.images_per_second:,.1f} images/s, {self.bytes_per_second / 1e6:,.1f} MB/s"
            lines.append(f"{self.seconds:,.1f} s: {self.images:,} images, {self.bytes / 1e6:,.1f} MB; {rates}")
        if self.message:
            lines.append(self.message)
        lines.append(f"output: {pluralize(self.files, 'file')} of images in {self.output}")
        if self.results:
            lines.append(f"each row with its file, or why it has none: {self.results}")
        return "\n".join(lines)


def summarise(
    progress: Progress, engine: EngineUse, *, manifest: str, output: str, expected: int | None, results: str | None
) -> Summary:
    """Return the summary of a run with exit code 0.

    Args:
        progress: What the run has counted.
        engine: What the run's engine was, and how it was used.
        manifest: The manifest as the user named it.
        output: The output directory.
        expected: Rows of the shard, if known.
        results: The merged file, if there is one.
    """
    seconds = max(progress.seconds, 1e-9)
    return Summary(
        manifest=manifest,
        output=output,
        results=results,
        expected=expected,
        output_tokens=progress.output_tokens,
        tokens_per_second=round(progress.output_tokens / seconds, 3),
        mean_seconds=progress.mean_seconds(),
        engine_seconds=round(engine.seconds, 3),
        gpu_wait=round(engine.wait_share, 4),
        engine_deaths=engine.deaths,
        engine_restarts=engine.recycled,
        engine=engine.info,
        **_counted(progress, seconds),
    )


def summarise_fetch(
    progress: FetchProgress, files: int, *, manifest: str, output: str, expected: int | None, results: str | None
) -> FetchSummary:
    """Return the summary of a fetch with exit code 0.

    Args:
        files: Files of images that the shard has.

    The other arguments are those of `summarise`.
    """
    seconds = max(progress.seconds, 1e-9)
    return FetchSummary(
        manifest=manifest,
        output=output,
        results=results,
        expected=expected,
        bytes=progress.bytes,
        bytes_per_second=round(progress.bytes / seconds, 3),
        files=files,
        **_counted(progress, seconds),
    )


def _counted(progress: Progress, seconds: float) -> dict[str, Any]:
    """Return the fields of `Ending` that are counts or follow from them."""
    total = Counts()
    total.add(progress.before)
    total.add(progress.committed)
    return {
        "exit_code": 0,
        "rows": total.rows,
        "ok": total.ok,
        "failed": total.failures,
        "failures": total.failed,
        "examples": progress.examples,
        "resumed": progress.before.rows,
        "seconds": round(seconds, 3),
        "rows_per_second": round(progress.committed.rows / seconds, 3),
        "images": progress.images,
        "images_per_second": round(progress.images / seconds, 3),
    }


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"


def _format_seconds(seconds: float) -> str:
    return f"{seconds * 1000:,.1f} ms" if seconds < 1 else f"{seconds:,.1f} s"
