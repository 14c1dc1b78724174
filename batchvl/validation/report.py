"""What a validation found: `Report`."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec

from ..config.units import pluralize
from .problems import Problem
from .quantiles import Quantiles

_WIDTH = 120
_INDENT = 11
_FILES = {"parquet": "Parquet file", "jsonl": "JSONL file", "csv": "CSV file", "pictures": "picture"}
_WORTH_SORTING = 0.1
"""Share of the reads that sorting would save from which on that is told."""


class Ids(msgspec.Struct, frozen=True):
    """The rows' labels. type: "int64" or "string"."""

    type: str
    rows: int
    """That have one."""
    distinct: int

    def __str__(self) -> str:
        kind = "integers" if self.type == "int64" else "strings"
        return f"{self.rows:,} {kind}, {_different(self.rows, self.distinct)}"


class Prompts(msgspec.Struct, frozen=True):
    """What is asked, by the characters of a row's turns all together, the system message included."""

    rows: int
    conversations: int
    """Rows of several turns."""
    characters: Quantiles | None

    def __str__(self) -> str:
        if self.characters is None:
            return "none"
        turns = f"; {pluralize(self.conversations, 'conversation')} of several turns" if self.conversations else ""
        return f"{_spread(self.characters)} characters{turns}"


class Pictures(msgspec.Struct, frozen=True):
    """What the rows say about where their pictures are."""

    references: int
    distinct: int
    rows: int
    """That have any."""
    most: int
    """Of one row."""
    kinds: dict[str, int]
    """References by kind: http, file, data (URIs) or bytes."""

    def __str__(self) -> str:
        if not self.references:
            return "none"
        most = f", up to {self.most:,} in one" if self.most > 1 else ""
        kinds = ", ".join(f"{count:,} {kind}" for kind, count in sorted(self.kinds.items(), key=lambda kind: -kind[1]))
        different = _different(self.references, self.distinct)
        return f"{self.references:,} in {pluralize(self.rows)}{most}, {different}: {kinds}"


class Sharing(msgspec.Struct, frozen=True):
    """How often pictures are read (fetched, decoded, prepared), for rows that have the same ones in the same order."""

    rows: int
    """With pictures."""
    sets: int
    """Different ones: so many reads are needed."""
    reads: int
    """As often a run reads: rows among `look_ahead` share theirs, up to 64 of them."""
    look_ahead: int

    @property
    def shared(self) -> int:
        """Rows whose pictures another one near has had read for them."""
        return self.rows - self.reads

    @property
    def apart(self) -> int:
        """Reads of what was read for an earlier row that is too far away: what sorting saves."""
        return self.reads - self.sets

    def __str__(self) -> str:
        repeats = self.rows - self.sets
        if not repeats:
            return "no row has the same pictures as another"
        text = (
            f"{pluralize(repeats)} of {self.rows:,} with the pictures of an earlier one: "
            f"{self.shared / repeats:.0%} within --look-ahead {self.look_ahead} share its reading, "
            f"{self.apart / repeats:.0%} are read again"
        )
        if self.apart < _WORTH_SORTING * self.reads:
            return text
        less = f"{self.apart / self.reads:.0%} less to fetch and decode"
        return f"{text}; sort the manifest by picture, or raise --look-ahead: {less}"


class Probe(msgspec.Struct, frozen=True):
    """What came of fetching and decoding the pictures of some rows."""

    rows: int
    failed: int
    """Of these rows."""
    pictures: int
    """That are good."""
    bytes: Quantiles | None
    """Of the encoded pictures."""
    pixels: Quantiles | None
    """Width times height."""
    largest: tuple[int, int] | None
    """Width and height of the picture with the most pixels."""
    seconds: float
    """In which all was done, after the image workers had started."""
    fetch_seconds: float
    """For one picture of a row, waiting for a connection included."""
    decode_seconds: float
    """For one picture, of an image worker's time; of a file this holds its reading."""
    problems: tuple[Problem, ...]

    def __str__(self) -> str:
        failed = f"{pluralize(self.failed)} failed"
        text = f"{pluralize(self.rows)}, {failed}; {pluralize(self.pictures, 'good picture')}"
        if self.bytes is None or self.pixels is None or self.largest is None:
            return text
        width, height = self.largest
        return (
            f"{text}; {_spread(self.bytes)} bytes; {_spread(self.pixels)} pixels, the largest {width:,} x {height:,}; "
            f"a picture took {self.fetch_seconds * 1000:,.1f} ms to fetch and {self.decode_seconds * 1000:,.1f} ms to "
            f"decode, {self.pictures / max(self.seconds, 1e-9):,.0f} a second"
        )


class Report(msgspec.Struct, frozen=True):
    """What `validate` found: counts, and the first rows that have each problem."""

    manifest: str
    format: str
    files: int
    rows: int
    failing: int
    """Rows that would fail in a run, as far as can be told without a model."""
    unreadable: str | None
    """Why the manifest could not be read to its end; the counts are of the rows before."""
    roles: dict[str, str | tuple[str, ...]]
    """The columns that are read, by what for."""
    ignored: tuple[str, ...]
    """The columns that are not; of JSONL, of those in the first rows."""
    ids: Ids | None
    prompts: Prompts
    pictures: Pictures
    sharing: Sharing
    problems: tuple[Problem, ...]
    probe: Probe | None
    seconds: float

    @property
    def exit_code(self) -> int:
        """3 where there is an error, which a warning is not; else 0."""
        problems = (*self.problems, *(self.probe.problems if self.probe is not None else ()))
        return 3 if self.unreadable or any(problem.level == "error" for problem in problems) else 0

    def as_json(self) -> str:
        """All of it as a JSON object."""
        whole: dict[str, Any] = {"exit_code": self.exit_code, **msgspec.to_builtins(self)}
        whole["sharing"] |= {"shared": self.sharing.shared, "apart": self.sharing.apart}
        return msgspec.json.format(msgspec.json.encode(whole), indent=2).decode()

    def __str__(self) -> str:
        where = pluralize(self.files, _FILES[self.format])
        lines = [f"{self.manifest}: {pluralize(self.rows)} in {where}, looked at in {self.seconds:,.1f} s"]
        for name, text in (
            ("columns", self._columns()), ("ids", str(self.ids or "none")), ("prompts", str(self.prompts)),
            ("pictures", str(self.pictures)), ("repeats", str(self.sharing) if self.pictures.references else ""),
            ("probe", str(self.probe or "")),
        ):  # fmt: skip
            if text:
                lines += _wrapped(f"{name:{_INDENT}}{text}")
        errors, warnings = ([p for p in self.problems if p.level == level] for level in ("error", "warning"))
        lines += _listed("errors", errors)
        if self.probe is not None:
            lines += _listed("errors among the rows that were fetched", self.probe.problems)
        lines += _listed("warnings", warnings)
        return "\n".join([*lines, "", *textwrap.wrap(self._verdict(), _WIDTH)])

    def _columns(self) -> str:
        named = ((role, name if isinstance(name, str) else ", ".join(name)) for role, name in self.roles.items())
        roles = ", ".join(name if name == role else f"{name} ({role})" for role, name in named)
        return roles + (f"; not read: {', '.join(self.ignored)}" if self.ignored else "")

    def _verdict(self) -> str:
        if self.unreadable:
            return f"The manifest cannot be read to its end: {self.unreadable}"
        if self.failing:
            return f"{pluralize(self.failing)} of {self.rows:,} would fail in a run."
        if self.exit_code:
            return "Every row can be asked, but for the errors above."
        fetched = "" if self.probe is not None or not self.pictures.references else "; --probe N fetches some pictures"
        return f"Every row can be asked, as far as can be told without a model{fetched}."


def _listed(what: str, problems: Sequence[Problem]) -> Iterator[str]:
    if not problems:
        return
    yield ""
    yield f"{what}:"
    for problem in problems:
        yield from _wrapped(f"{problem.rows:>{_INDENT - 1},} {problem.code}: {problem.meaning}")
        for example in problem.examples:
            label = "" if example.id is None else f" (id {example.id!r})"
            yield from _wrapped(f"{' ' * _INDENT}  row {example.row}{label}: {example.found}", 2)


def _wrapped(line: str, more: int = 0) -> list[str]:
    return textwrap.wrap(
        line, _WIDTH, subsequent_indent=" " * (_INDENT + more), break_long_words=False, break_on_hyphens=False
    )


def _different(number: int, distinct: int) -> str:
    return "all different" if number == distinct else f"{distinct:,} different"


def _spread(spread: Quantiles) -> str:
    if spread.least == spread.greatest:
        return f"{spread.least:,}"
    return f"{spread.least:,} to {spread.greatest:,}, median {spread.median:,}"
