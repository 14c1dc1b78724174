"""The library's errors as messages and exit codes."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import click

from ..errors import BatchvlError, StoppedEarly

EXIT_CODES = {
    0: "all rows done; no more failed than --accept-failures allows",
    1: "any other error",
    2: "invalid usage, manifest or model: nothing was run",
    3: "all rows done, but more failed than --accept-failures allows",
    4: "stopped by --max-failures",
    75: "stopped early by a signal, a time limit or a full disk; the same command resumes the run",
}


class CommandError(click.ClickException):
    """An error of the library, with its exit code."""

    def __init__(self, error: BatchvlError) -> None:
        super().__init__(str(error))
        self.exit_code = error.exit_code  # type: ignore[misc]


def handle_errors(command: Callable[..., Any]) -> Callable[..., Any]:
    """Make a command print the library's errors as messages, and exit with their codes."""

    @functools.wraps(command)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        try:
            return command(*args, **kwargs)
        except BatchvlError as error:
            raise CommandError(error) from None
        except KeyboardInterrupt:
            raise CommandError(StoppedEarly("interrupted before the run started")) from None

    return wrapper
