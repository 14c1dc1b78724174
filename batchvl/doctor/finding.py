"""The result of a check, and how a terminal shows it."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass
from typing import Literal

import click

WIDTH = 100
"""Columns of a terminal that the screen fits."""
GIB = 2**30

_INDENT = 22
_COLOURS = {"ok": "green", "warn": "yellow", "missing": "red"}

Level = Literal["ok", "warn", "missing"]


@dataclass(frozen=True, slots=True)
class Finding:
    """The result of a check.

    Indented lines of the advice are commands. They are never wrapped, so that they can be copied.
    """

    level: Level
    what: str
    """What was checked, such as "GPU"."""
    found: str
    advice: str = ""

    def __str__(self) -> str:
        """Format the finding for a terminal, in colour."""
        lead = click.style(f"{self.level:8}", fg=_COLOURS[self.level]) + f"{self.what:{_INDENT - 8}}"
        lines = textwrap.wrap(self.found, WIDTH - _INDENT, break_long_words=False, break_on_hyphens=False) or [""]
        for number, line in enumerate(self.advice.splitlines()):
            is_command = line.startswith(" ")
            parts = [line.strip()] if is_command else textwrap.wrap(line, WIDTH - _INDENT - 3, break_on_hyphens=False)
            lines += ["   " + part for part in parts]
            if number == 0:
                lines[-len(parts)] = f"-> {parts[0]}"
        return lead + f"\n{' ' * _INDENT}".join(lines)


@dataclass(frozen=True, slots=True)
class Verdict(Finding):
    """The last finding: whether a run can start. Its level is "missing" if no engine can run."""

    engine: str | None = None
    """The default engine of `batchvl run` on this machine."""


def format_size(size: int | None) -> str:
    """Format a number of bytes in GiB.

    >>> format_size(150754820096), format_size(1610612736)
    ('140 GiB', '1.5 GiB')
    """
    gib = (size or 0) / GIB
    return f"{gib:.0f} GiB" if gib >= 10 else f"{gib:.1f} GiB"
