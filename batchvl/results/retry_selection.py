"""What a `retry` asks again: rows whose result is a failure that may pass, or of the codes that it is told."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ..errors import OptionError, row_errors
from .rowset import Outcomes, RowSet
from .shard import Recovered, ShardFolder

RETRYABLE_CODES = frozenset(error.code for error in row_errors() if error.retryable)


@dataclass(frozen=True)
class RetrySelection:
    """A retry of a shard's failed rows. What they came to before stays where it is; the later result wins."""

    codes: frozenset[str] | None = RETRYABLE_CODES
    """Of the failures; None is all of them."""

    @classmethod
    def of(cls, codes: Iterable[str] | None = None, *, all: bool = False) -> RetrySelection:
        """By codes (of the table in docs/reference.md), or all failures, or those that may pass.

        Raises OptionError for an unknown code, and for codes beside `all`.

        >>> RetrySelection.of(["http_status"]).codes, RetrySelection.of(all=True).codes
        (frozenset({'http_status'}), None)
        """
        wanted = frozenset(codes or ())
        if wanted and all:
            raise OptionError("--codes and --all: give one of them")
        known = {error.code for error in row_errors()}
        if unknown := wanted - known:
            raise OptionError(
                f"--codes: no error has the code {', '.join(sorted(unknown))}; there are {', '.join(sorted(known))}"
            )
        return cls(None if all else wanted or RETRYABLE_CODES)

    def number(self, shard: ShardFolder) -> int:
        """The how-manieth retry of the shard this is, from 1. A stopped one goes on if its codes are the same."""
        attempts = shard.attempts()
        last = max((attempt.retry for attempt in attempts), default=0)
        of_last = [attempt for attempt in attempts if attempt.retry == last]
        stopped = last and all(attempt.codes == self.told and not attempt.ended for attempt in of_last)
        # One that died once it had asked all its rows, but before it could say so, is over as well.
        return last if stopped and self._leaves_some(shard.recover(), last) else last + 1

    def failed(self, tally: Outcomes) -> dict[str, RowSet]:
        """The failed rows that it is about, by code."""
        return {code: rows for code, rows in tally.failed.items() if self.codes is None or code in self.codes}

    def left(self, tally: Outcomes, asked: RowSet) -> dict[str, RowSet]:
        """The same, less those that this retry has asked already."""
        return {code: rows - asked for code, rows in self.failed(tally).items()}

    def _leaves_some(self, recovered: Recovered, number: int) -> bool:
        return any(map(len, self.left(recovered.tally(), recovered.of_retry(number)).values()))

    @property
    def told(self) -> list[str] | None:
        """As an attempt's file has it."""
        return None if self.codes is None else sorted(self.codes)
