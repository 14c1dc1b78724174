"""The library's errors as a shell hears of them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import click

from ..errors import BatchvlError, StoppedEarly

EXIT_CODES = {
    0: "complete; failed rows are within --accept-failures",
    3: "complete, but more rows failed than that",
    4: "stopped by --max-failures",
    75: "stopped early (signal, time, disk): run the same command again to go on",
    2: "usage or configuration: nothing was run",
    1: "anything else",
}


class CommandError(click.ClickException):
    """A library error on its way to the shell."""

    def __init__(self, error: BatchvlError) -> None:
        super().__init__(str(error))
        self.exit_code = error.exit_code  # type: ignore[misc]


def handle_errors(command: Callable[..., Any]) -> Callable[..., Any]:
    """Turns the library's errors into messages and exit codes."""

    @functools.wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        try:
            return command(*args, **kwargs)
        except BatchvlError as error:
            raise CommandError(error) from None
        except KeyboardInterrupt:
            raise CommandError(StoppedEarly("stopped by SIGINT before anything was run")) from None

    return wrapped
