"""What a check came to."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass
from typing import Literal

import click

WIDTH = 100
GIB = 2**30
_INDENT = 22
_COLOURS = {"ok": "green", "warn": "yellow", "missing": "red"}

Level = Literal["ok", "warn", "missing"]


@dataclass(frozen=True, slots=True)
class Finding:
    """How it stands, what was looked at, what was found, and what to do.

    Lines of the advice that are indented are commands, which stay in one piece.
    """

    level: Level
    what: str
    found: str
    advice: str = ""

    def __str__(self) -> str:
        """For a terminal, in colour."""
        lead = click.style(f"{self.level:8}", fg=_COLOURS[self.level]) + f"{self.what:{_INDENT - 8}}"
        lines = textwrap.wrap(self.found, WIDTH - _INDENT, break_long_words=False, break_on_hyphens=False) or [""]
        for number, line in enumerate(self.advice.splitlines()):
            command = line.startswith(" ")
            parts = [line.strip()] if command else textwrap.wrap(line, WIDTH - _INDENT - 3, break_on_hyphens=False)
            lines += ["   " + part for part in parts]
            if number == 0:
                lines[-len(parts)] = f"-> {parts[0]}"
        return lead + f"\n{' ' * _INDENT}".join(lines)


@dataclass(frozen=True, slots=True)
class Verdict(Finding):
    """The last finding: "missing" where no engine can run."""

    engine: str | None = None
    """What `batchvl run` takes, unless told otherwise."""


def size(size: int | None) -> str:
    """
    >>> size(150754820096), size(1610612736)
    ('140 GiB', '1.5 GiB')
    """
    gib = (size or 0) / GIB
    return f"{gib:.0f} GiB" if gib >= 10 else f"{gib:.1f} GiB"
