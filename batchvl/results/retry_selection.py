"""The rows that a `retry` selects: retryable failures, or failures with the given error codes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ..errors import OptionError, current_code, row_errors
from .rowset import Outcomes, RowSet
from .shard import Recovered, ShardDirectory

RETRYABLE_CODES = frozenset(error.code for error in row_errors() if error.retryable)


@dataclass(frozen=True)
class RetrySelection:
    """A selection of a shard's failed rows by error code. Earlier results stay in place; later ones take precedence."""

    codes: frozenset[str] | None = RETRYABLE_CODES
    """Error codes, in their present spelling; None selects all failures."""

    @classmethod
    def of(cls, codes: Iterable[str] | None = None, *, all: bool = False) -> RetrySelection:
        """Select failures by error code; by default those whose code is retryable.

        Args:
            codes: Error codes (see the table in docs/reference.md), those of version 0.1 included.
            all: Select all failures.

        Raises:
            OptionError: a code is unknown, or both `codes` and `all` are given.

        >>> RetrySelection.of(["http_status"]).codes, RetrySelection.of(all=True).codes
        (frozenset({'http_status'}), None)
        """
        chosen = frozenset(map(current_code, codes or ()))
        if chosen and all:
            raise OptionError("--codes and --all: specify only one of them")
        known = {error.code for error in row_errors()}
        if unknown := chosen - known:
            raise OptionError(
                f"--codes: unknown error code {', '.join(sorted(unknown))}; known codes: {', '.join(sorted(known))}"
            )
        return cls(None if all else chosen or RETRYABLE_CODES)

    def retry_number(self, shard: ShardDirectory) -> int:
        """Return the 1-based number of this retry of the shard.

        A stopped retry with the same codes is resumed under its number.
        """
        attempts = shard.attempts()
        last = max((attempt.retry for attempt in attempts), default=0)
        last_attempts = [attempt for attempt in attempts if attempt.retry == last]
        stopped = last and all(self._has_codes(attempt.codes) and not attempt.ended for attempt in last_attempts)
        # A retry that died after its last row, before it was marked as ended, is over as well.
        return last if stopped and self._has_remaining(shard.recover(), last) else last + 1

    def failed(self, outcomes: Outcomes) -> dict[str, RowSet]:
        """Return the selected failed rows by error code."""
        return {
            code: rows
            for code, rows in outcomes.failed.items()
            if self.codes is None or current_code(code) in self.codes
        }

    def remaining(self, outcomes: Outcomes, retried: RowSet) -> dict[str, RowSet]:
        """Return the selected failed rows by error code, without those that this retry has asked already."""
        return {code: rows - retried for code, rows in self.failed(outcomes).items()}

    def _has_codes(self, codes: list[str] | None) -> bool:
        """Return whether an attempt with these codes, possibly of version 0.1, selected the same failures."""
        return self.codes == (None if codes is None else frozenset(map(current_code, codes)))

    def _has_remaining(self, recovered: Recovered, number: int) -> bool:
        return any(map(len, self.remaining(recovered.outcomes(), recovered.of_retry(number)).values()))

    @property
    def codes_json(self) -> list[str] | None:
        """The codes as an attempt's file holds them."""
        return None if self.codes is None else sorted(self.codes)
