"""One pass over a manifest's rows: check each and count what they have in common."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable, Container, Hashable, Iterator, Mapping
from contextlib import ExitStack, suppress
from hashlib import blake2b

import msgspec

from ..errors import ManifestError, RowError
from ..images.grouping import group_by_images
from ..types import ImageRef, InlineImage, Request, Row, WebImage
from .duplicates import DuplicateFinder, Duplicates, mix64
from .problems import DUPLICATE_ID, MISSING_ID, NO_IMAGE, REPEATED_QUESTION, Problems
from .quantiles import Histogram
from .report import Ids, Images, Prompts, Sharing
from .row_checker import CheckedRow, RowChecker
from .sample import AllExcept, Sample

Chunks = Iterator[list[Row]]
RowIds = Mapping[int, int | str | None]


class Survey:
    """Check every row, and count what the rows have in common. A context manager, for one pass: `scan`, then `finish`.

    Memory does not grow with the rows. On disk each row takes at most 64 bytes.

    Args:
        checker: Checks rows.
        look_ahead: As of a run: rows that a run would group by their images are read together.
        sample: Is offered the rows that have images and would not fail.
    """

    def __init__(self, checker: RowChecker, look_ahead: int, sample: Sample) -> None:
        self._checker, self._look_ahead, self._sample = checker, look_ahead, sample
        self.rows = self.failing = 0
        self.problems = Problems()
        self._rows_with_id = self._requests = self._conversations = 0
        self._characters = Histogram()
        self._rows_with_images = self._references = self._max_per_row = self._reads = 0
        self._kinds: Counter[str] = Counter()

    def __enter__(self) -> Survey:
        with ExitStack() as stack:
            self._ids, self._questions, self._images, self._image_sets = (
                stack.enter_context(DuplicateFinder()) for _ in range(4)
            )
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    async def scan(self, chunks: Chunks) -> None:
        """Check and count the rows.

        Raises:
            ManifestError: The manifest ends too early. The rows before are counted.
        """
        async for group in group_by_images(self._checked_rows(chunks), self._look_ahead):
            self._reads += bool(group[0].images)

    async def _checked_rows(self, chunks: Chunks) -> AsyncIterator[Row]:
        for rows in chunks:
            await asyncio.sleep(0)  # an interrupt is handled here
            for checked in self._checker.check(rows):
                self._count(checked)
                yield checked.row

    def _count(self, checked: CheckedRow) -> None:
        row, request, failure = checked
        self.rows += 1
        self._count_id(row)
        self._count_images(row)
        if request is not None:
            self._requests += 1
            self._conversations += bool(request.followups)
            self._characters.add(_characters(request))
        if failure is not None:
            self.failing += 1
            self.problems.add(failure.code, row.number, row.id, failure.message)
        elif request is not None:
            self._questions.add(hash(_question(row, request)), row.number)
            if row.images:
                self._sample.offer(row.number)
            else:
                self.problems.add(NO_IMAGE, row.number, row.id, "no image")

    def _count_id(self, row: Row) -> None:
        if row.id is not None:
            self._rows_with_id += 1
            self._ids.add(mix64(row.id) if isinstance(row.id, int) else hash(row.id), row.number)
        elif row.failure is None:
            self.problems.add(MISSING_ID, row.number, None, "no id")

    def _count_images(self, row: Row) -> None:
        if not row.images:
            return
        self._rows_with_images += 1
        self._references += len(row.images)
        self._max_per_row = max(self._max_per_row, len(row.images))
        self._image_sets.add(hash(row.images), row.number)
        for image in row.images:
            self._kinds[_kind(image)] += 1
            self._images.add(hash(image), row.number)

    def finish(self, read: Callable[[Container[int]], Chunks], *, has_ids: bool, has_images: bool) -> None:
        """Find duplicates. Call it once, after the scan.

        The first rows whose digests are equal are read again and compared, since digests may be equal by chance.

        Args:
            read: Reads the rows that are not in the set that it is given.
            has_ids: Whether the manifest has a column of ids.
            has_images: Whether the manifest has a column of images.
        """
        ids, questions = self._ids.finish(), self._questions.finish()
        row_ids, row_questions = self._read_again(
            {row for pair in (*ids.pairs, *questions.pairs) for row in pair}, read
        )
        false_duplicates = self._add_duplicates(DUPLICATE_ID, ids, row_ids, row_ids, "same id as row")
        self._distinct_ids = ids.distinct + false_duplicates
        self._add_duplicates(REPEATED_QUESTION, questions, row_questions, row_ids, "same question as row")
        if not has_ids:
            self.problems.discard(MISSING_ID)
        if not (has_images or self._rows_with_images):
            self.problems.discard(NO_IMAGE)

    def _read_again(
        self, numbers: set[int], read: Callable[[Container[int]], Chunks]
    ) -> tuple[dict[int, int | str | None], dict[int, bytes]]:
        """Return the ids and the hashes of the questions of some rows, by row."""
        ids: dict[int, int | str | None] = {}
        questions: dict[int, bytes] = {}
        # What cannot be read a second time counts by its digest alone.
        with suppress(ManifestError):
            for row in (row for rows in (read(AllExcept(numbers)) if numbers else ()) for row in rows):
                ids[row.number] = row.id
                with suppress(RowError):
                    question = _question(row, self._checker.request(row))
                    questions[row.number] = blake2b(msgspec.msgpack.encode(question)).digest()
        return ids, questions

    def _add_duplicates(
        self, code: str, duplicates: Duplicates, values: Mapping[int, Hashable], ids: RowIds, found: str
    ) -> int:
        """Count rows that repeat an earlier row as problems, and return how many only seemed to.

        Args:
            code: The kind of problem.
            duplicates: Rows with equal digests.
            values: The rows' values, which are compared.
            ids: The rows' ids, for examples.
            found: What an example has, in words; the earlier row's number follows.
        """
        false_duplicates = 0
        for number, earlier in duplicates.pairs:
            if values.get(number) == values.get(earlier):
                self.problems.add(code, number, ids.get(number), f"{found} {earlier}")
            else:
                false_duplicates += 1
        self.problems.add_rows(code, duplicates.repeated - len(duplicates.pairs))
        return false_duplicates

    def ids(self, type: str | None) -> Ids | None:
        """Return the counts of ids, after `finish`; None if the manifest has none."""
        return Ids(type, self._rows_with_id, self._distinct_ids) if type is not None else None

    def prompts(self) -> Prompts:
        """Return the counts of prompts."""
        return Prompts(self._requests, self._conversations, self._characters.quantiles())

    def images(self) -> Images:
        """Return the counts of images. Call it once, after the scan."""
        distinct = self._images.finish().distinct
        return Images(self._references, distinct, self._rows_with_images, self._max_per_row, dict(self._kinds))

    def sharing(self) -> Sharing:
        """Return how often images are read. Call it once, after the scan."""
        return Sharing(self._rows_with_images, self._image_sets.finish().distinct, self._reads, self._look_ahead)


def _question(row: Row, request: Request) -> tuple[Hashable, ...]:
    """Return all that an answer depends on."""
    return request.messages, request.followups, request.sampling, row.images


def _characters(request: Request) -> int:
    turns = (*request.messages, *request.followups)
    return sum(len(part.text) for turn in turns for part in turn.parts if part.text is not None)


def _kind(image: ImageRef) -> str:
    if isinstance(image, WebImage):
        return "http"
    if isinstance(image, InlineImage):
        return "data" if image.source.startswith("data:") else "bytes"
    return "file"
