"""The result of a validation, as an object, as text and as JSON."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec

from ..config.units import pluralize
from ..manifest.files import FORMAT_NOUNS, Format
from .problems import Problem
from .quantiles import Quantiles

_WIDTH = 120
_INDENT = 11
_MIN_SAVING = 0.1
"""Share of the reads that sorting must save for the report to suggest it."""


class Ids(msgspec.Struct, frozen=True):
    """The rows' ids."""

    type: str
    """"int64" or "string"."""
    rows: int
    """Rows that have an id."""
    distinct: int

    def __str__(self) -> str:
        kind = "integers" if self.type == "int64" else "strings"
        return f"{self.rows:,} {kind}, {_distinct(self.rows, self.distinct)}"


class Prompts(msgspec.Struct, frozen=True):
    """The rows' prompts."""

    rows: int
    """Rows that have a valid prompt."""
    conversations: int
    """Rows with several turns."""
    characters: Quantiles | None
    """Characters of a row's turns together, including the system message."""

    def __str__(self) -> str:
        if self.characters is None:
            return "none"
        turns = f"; {pluralize(self.conversations, 'row')} with several turns" if self.conversations else ""
        return f"{_range(self.characters, 'character')}{turns}"


class Images(msgspec.Struct, frozen=True):
    """The rows' references to images."""

    references: int
    distinct: int
    rows: int
    """Rows that have images."""
    max_per_row: int
    kinds: dict[str, int]
    """References by kind: http, file, data (URIs) or bytes."""

    def __str__(self) -> str:
        if not self.references:
            return "none"
        most = f" (up to {self.max_per_row:,} per row)" if self.max_per_row > 1 else ""
        kinds = ", ".join(f"{count:,} {kind}" for kind, count in sorted(self.kinds.items(), key=lambda kind: -kind[1]))
        return (
            f"{self.references:,} in {pluralize(self.rows)}{most}, {_distinct(self.references, self.distinct)}: {kinds}"
        )


class Sharing(msgspec.Struct, frozen=True):
    """How often images are read (fetched, decoded and prepared) for rows that have the same ones in the same order."""

    rows: int
    """Rows that have images."""
    sets: int
    """Different sets of images: the number of reads that are necessary."""
    reads: int
    """The number of reads of a run: up to 64 rows within `look_ahead` share one."""
    look_ahead: int

    @property
    def shared(self) -> int:
        """Rows that share the read of another row nearby."""
        return self.rows - self.reads

    @property
    def repeated_reads(self) -> int:
        """Reads of images that an earlier row had, too far away to share them. Sorting the manifest saves these."""
        return self.reads - self.sets

    def __str__(self) -> str:
        repeats = self.rows - self.sets
        if not repeats:
            return "no row has the same images as another"
        text = (
            f"{repeats:,} of {pluralize(self.rows)} repeat the images of an earlier row; "
            f"{self.shared / repeats:.0%} of these are within --look-ahead {self.look_ahead} and share one read"
        )
        if self.repeated_reads < _MIN_SAVING * self.reads:
            return text
        saving = f"{self.repeated_reads / self.reads:.0%}"
        return f"{text}; sort the manifest by image, or raise --look-ahead, to fetch and decode {saving} less"


class Probe(msgspec.Struct, frozen=True):
    """The result of fetching and decoding the images of some rows."""

    rows: int
    failed: int
    """Rows that failed."""
    images: int
    """Images that were decoded."""
    bytes: Quantiles | None
    """Bytes of the encoded images."""
    pixels: Quantiles | None
    """Width times height."""
    largest: tuple[int, int] | None
    """Width and height of the image with the most pixels."""
    seconds: float
    """Duration of the probe, after the image workers had started."""
    fetch_seconds: float
    """Mean time to fetch an image, including the wait for a connection."""
    decode_seconds: float
    """Mean time of an image worker to decode an image; for files, including the time to read them."""
    problems: tuple[Problem, ...]

    def __str__(self) -> str:
        text = f"{pluralize(self.rows)}, {self.failed:,} failed; {pluralize(self.images, 'good image')}"
        if self.bytes is None or self.pixels is None or self.largest is None:
            return text
        sizes = f"{_range(self.bytes, 'byte')}; {_range(self.pixels, 'pixel')}"
        width, height = self.largest
        fetch, decode = self.fetch_seconds * 1000, self.decode_seconds * 1000
        rate = self.images / max(self.seconds, 1e-9)
        return (
            f"{text}; {sizes}, the largest {width:,} x {height:,}; "
            f"{fetch:,.1f} ms to fetch and {decode:,.1f} ms to decode an image; {rate:,.1f} images per second"
        )


class Report(msgspec.Struct, frozen=True):
    """The result of `validate`: counts, and the first rows that have each kind of problem."""

    manifest: str
    format: Format
    files: int
    rows: int
    failing: int
    """Rows that would fail in a run, as far as this can be checked without a model."""
    unreadable: str | None
    """Why the manifest could not be read to its end; the counts are of the rows before."""
    roles: dict[str, str | tuple[str, ...]]
    """The columns that are read, by role."""
    ignored: tuple[str, ...]
    """The columns that are not read; for JSONL, those of the first rows."""
    ids: Ids | None
    prompts: Prompts
    images: Images
    sharing: Sharing
    problems: tuple[Problem, ...]
    probe: Probe | None
    seconds: float

    @property
    def exit_code(self) -> int:
        """The exit code of `batchvl validate`: 3 if there is an error, 0 if there are at most warnings."""
        problems = (*self.problems, *(self.probe.problems if self.probe is not None else ()))
        return 3 if self.unreadable or any(problem.level == "error" for problem in problems) else 0

    def as_json(self) -> str:
        """Return the report as a JSON object."""
        report: dict[str, Any] = {"exit_code": self.exit_code, **msgspec.to_builtins(self)}
        report["sharing"] |= {"shared": self.sharing.shared, "repeated_reads": self.sharing.repeated_reads}
        return msgspec.json.format(msgspec.json.encode(report), indent=2).decode()

    def __str__(self) -> str:
        files = pluralize(self.files, FORMAT_NOUNS[self.format])
        lines = [f"{self.manifest}: {pluralize(self.rows)} in {files}, checked in {self.seconds:,.1f} s"]
        sections = {
            "columns": self._columns(),
            "ids": str(self.ids or "none"),
            "prompts": str(self.prompts),
            "images": str(self.images),
            "repeats": str(self.sharing) if self.images.references else "",
            "probe": str(self.probe or ""),
        }
        for name, text in sections.items():
            if text:
                lines += _wrap(f"{name:{_INDENT}}{text}")
        errors, warnings = ([p for p in self.problems if p.level == level] for level in ("error", "warning"))
        lines += _problem_lines("errors", errors)
        if self.probe is not None:
            lines += _problem_lines("errors among the probed rows", self.probe.problems)
        lines += _problem_lines("warnings", warnings)
        return "\n".join([*lines, "", *textwrap.wrap(self._verdict(), _WIDTH)])

    def _columns(self) -> str:
        named = ((role, name if isinstance(name, str) else ", ".join(name)) for role, name in self.roles.items())
        roles = ", ".join(name if name == role else f"{name} ({role})" for role, name in named)
        return roles + (f"; not read: {', '.join(self.ignored)}" if self.ignored else "")

    def _verdict(self) -> str:
        if self.unreadable:
            return f"The manifest cannot be read to its end: {self.unreadable}"
        if self.failing:
            return f"{self.failing:,} of {pluralize(self.rows)} would fail in a run."
        if self.exit_code:
            return "Every row is valid, except for the errors above."
        verdict = "Every row is valid, as far as this can be checked without a model."
        if self.probe is None and self.images.references:
            verdict += " Use --probe N to fetch and decode the images of N rows."
        return verdict


def _problem_lines(title: str, problems: Sequence[Problem]) -> Iterator[str]:
    if not problems:
        return
    yield ""
    yield f"{title}:"
    for problem in problems:
        yield from _wrap(f"{problem.rows:>{_INDENT - 1},} {problem.code}: {problem.meaning}")
        for example in problem.examples:
            id = "" if example.id is None else f" (id {example.id!r})"
            yield from _wrap(f"{' ' * _INDENT}  row {example.row}{id}: {example.found}", 2)


def _wrap(line: str, more: int = 0) -> list[str]:
    return textwrap.wrap(
        line, _WIDTH, subsequent_indent=" " * (_INDENT + more), break_long_words=False, break_on_hyphens=False
    )


def _distinct(number: int, distinct: int) -> str:
    return "all distinct" if number == distinct else f"{distinct:,} distinct"


def _range(quantiles: Quantiles, unit: str) -> str:
    greatest = pluralize(quantiles.greatest, unit)
    if quantiles.least == quantiles.greatest:
        return greatest
    return f"{quantiles.least:,} to {greatest} (median {quantiles.median:,})"
