"""Check rows without a model and without opening images: report the errors that they would have in a run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from ..config.options import RunOptions
from ..errors import RowError
from ..fetching.sources import check_count, check_inline
from ..fetching.url_checker import UrlChecker
from ..prompts.prompter import Prompter
from ..types import Failure, FileImage, InlineImage, Request, Row, WebImage
from .file_checker import FileChecker


class CheckedRow(NamedTuple):
    """A row with the request that a run would make of it, or the failure that it would have."""

    row: Row
    request: Request | None
    """None if it cannot be made."""
    failure: Failure | None


class RowChecker:
    """Check rows with a run's own code and in its order, so that each row has the error that it would have there.

    Errors that only the model reveals are not found: its special tokens, and prompts that are too long for it.

    Args:
        options: The run's options.
        urls: Checks URLs without a lookup or a connection.
        files: Checks files without opening them.
    """

    def __init__(self, options: RunOptions, urls: UrlChecker, files: FileChecker) -> None:
        self._prompter = Prompter(options.prompt, options.sampling)
        self._max_bytes, self._limits = options.fetch.max_image_bytes, options.image
        self._urls, self._files = urls, files

    def check(self, rows: Sequence[Row]) -> list[CheckedRow]:
        """Check some rows."""
        checked = [self._check(row) for row in rows]
        files = [
            image
            for row, _, failure in checked
            if failure is None
            for image in row.images
            if isinstance(image, FileImage)
        ]
        if not files or not (failures := self._files.failures(files)):
            return checked
        return [row if row.failure is not None else _with_file_failure(row, failures) for row in checked]

    def request(self, row: Row) -> Request:
        """Return the request that a run would make of a row. Raises RowError."""
        return self._prompter.request(row)

    def _check(self, row: Row) -> CheckedRow:
        """Check a row except for its files, which a run opens last."""
        if row.failure is not None:
            return CheckedRow(row, None, row.failure)
        request = None
        try:
            request = self._prompter.request(row)
            for image in row.images:
                if isinstance(image, WebImage):
                    self._urls.parse(image)
                elif isinstance(image, InlineImage):
                    check_inline(image, self._max_bytes)
            for image in row.images:
                if isinstance(image, WebImage):
                    self._urls.check(image)
            check_count(len(row.images), self._limits)
        except RowError as error:
            return CheckedRow(row, request, Failure.of(error))
        return CheckedRow(row, request, None)


def _with_file_failure(checked: CheckedRow, failures: dict[FileImage, Failure]) -> CheckedRow:
    """Return the row with the failure of its first bad file."""
    for image in checked.row.images:
        if isinstance(image, FileImage) and (failure := failures.get(image)) is not None:
            return checked._replace(failure=failure)
    return checked
