"""What rows would fail with in a run, as far as that can be told without a model: `Checks`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from ..config.options import RunOptions
from ..errors import RowError
from ..images.decode import check_count
from ..images.fetch import check_given
from ..images.url_checker import UrlChecker
from ..prompts.template import Prompter
from ..types import Failure, FileImage, Request, Row, WebImage
from .paths import Paths


class Checked(NamedTuple):
    """A row with what a run would ask, and why it would fail instead."""

    row: Row
    request: Request | None
    """None where it cannot be made."""
    failure: Failure | None


class Checks:
    """Checks rows in the order of a run, by the same code, so that each has the error that it would have there.

    No picture is opened, and no name looked up. What only the model knows is not found: its special tokens, and how
    many tokens it takes.
    """

    def __init__(self, options: RunOptions, reach: UrlChecker, paths: Paths) -> None:
        self._prompter = Prompter(options.prompt, options.sampling)
        self._most_bytes, self._limits = options.fetch.max_image_bytes, options.image
        self._reach, self._paths = reach, paths

    async def of(self, rows: Sequence[Row]) -> list[Checked]:
        """Some rows, checked."""
        checked = [await self._row(row) for row in rows]
        paths = [
            image.path
            for row, _, failure in checked
            if failure is None
            for image in row.images
            if isinstance(image, FileImage)
        ]
        if not paths or not (failures := self._paths.failures(paths)):
            return checked
        return [one if one.failure is not None else _with_files(one, failures) for one in checked]

    def request(self, row: Row) -> Request | None:
        """What a run would ask, None where it cannot be made."""
        try:
            return self._prompter.request(row) if row.failure is None else None
        except RowError:
            return None

    async def _row(self, row: Row) -> Checked:
        """The row without a look at its files, which a run opens last."""
        if row.failure is not None:
            return Checked(row, None, row.failure)
        request = None
        try:
            request = self._prompter.request(row)
            for image in row.images:
                if not isinstance(image, FileImage):
                    check_given(image, self._most_bytes)
            for image in row.images:
                if isinstance(image, WebImage):
                    await self._reach.check(image)
            check_count(len(row.images), self._limits)
        except RowError as error:
            return Checked(row, request, Failure.of(error))
        return Checked(row, request, None)


def _with_files(checked: Checked, failures: dict[str, Failure]) -> Checked:
    """The row fails with the first of its files that does."""
    for image in checked.row.images:
        if isinstance(image, FileImage) and (failure := failures.get(image.path)) is not None:
            return checked._replace(failure=failure)
    return checked
