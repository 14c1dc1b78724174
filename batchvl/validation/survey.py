"""One pass over a manifest's rows, and what it counts: `Survey`."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable, Container, Hashable, Iterator, Mapping
from contextlib import ExitStack
from hashlib import blake2b

import msgspec

from ..errors import ManifestError
from ..images.grouping import group_by_images
from ..types import ImageRef, InlineImage, Request, Row, WebImage
from .checks import Checked, Checks
from .duplicates import Counted, Digests, mix64
from .problems import DUPLICATE_ID, MISSING_ID, NO_PICTURE, REPEATED_QUESTION, Problems
from .quantiles import Histogram
from .report import Ids, Pictures, Prompts, Sharing
from .sample import AllExcept, Sample

Chunks = Iterator[list[Row]]
Labels = Mapping[int, int | str | None]


class Survey:
    """Checks every row, and counts what the rows have in common; a context manager, for one pass.

    look_ahead: as of a run, whose own `group_by_images` tells which rows share their pictures. sample: is offered the
    rows that have pictures and would not fail. Memory does not grow with the rows; on disk each takes 64 bytes at most.
    """

    def __init__(self, checks: Checks, look_ahead: int, sample: Sample) -> None:
        self._checks, self._look_ahead, self._sample = checks, look_ahead, sample
        self.rows = self.failing = 0
        self.problems = Problems()
        self._labelled = self._asked = self._conversations = 0
        self._characters = Histogram()
        self._illustrated = self._references = self._most = self._reads = 0
        self._kinds: Counter[str] = Counter()

    def __enter__(self) -> Survey:
        with ExitStack() as stack:
            self._ids, self._questions, self._pictures, self._sets = (stack.enter_context(Digests()) for _ in range(4))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    async def go(self, chunks: Chunks) -> None:
        """Takes the rows in. Raises ManifestError where they end too early; what came before is counted."""
        async for group in group_by_images(self._each(chunks), self._look_ahead):
            self._reads += bool(group[0].images)

    async def _each(self, chunks: Chunks) -> AsyncIterator[Row]:
        for rows in chunks:
            await asyncio.sleep(0)  # where an interrupt is heard
            for checked in await self._checks.of(rows):
                self._take(checked)
                yield checked.row

    def _take(self, checked: Checked) -> None:
        row, request, failure = checked
        self.rows += 1
        if row.id is not None:
            self._labelled += 1
            self._ids.add(mix64(row.id) if isinstance(row.id, int) else hash(row.id), row.number)
        elif row.failure is None:
            self.problems.add(MISSING_ID, row.number, None, "has none")
        if request is not None:
            self._asked += 1
            self._conversations += bool(request.followups)
            self._characters.add(_characters(request))
        self._take_pictures(row)
        if failure is not None or request is None:
            self.failing += 1
            assert failure is not None
            self.problems.add(failure.code, row.number, row.id, failure.message)
            return
        self._questions.add(hash(_question(row, request)), row.number)
        if row.images:
            self._sample.offer(row.number)
        else:
            self.problems.add(NO_PICTURE, row.number, row.id, "has none")

    def _take_pictures(self, row: Row) -> None:
        if not row.images:
            return
        self._illustrated += 1
        self._references += len(row.images)
        self._most = max(self._most, len(row.images))
        self._sets.add(hash(row.images), row.number)
        for image in row.images:
            self._kinds[_kind(image)] += 1
            self._pictures.add(hash(image), row.number)

    def end(self, read: Callable[[Container[int]], Chunks], *, has_ids: bool, wants_pictures: bool) -> None:
        """Once, after the pass: finds what is there twice.

        Of digests that are the same the first rows are read again, and compared, for two may be the same by chance.
        read: the rows again, but for those in what it is given. has_ids, wants_pictures: whether the manifest has a
        column of them.
        """
        ids, questions = self._ids.count(), self._questions.count()
        labels: dict[int, int | str | None] = {}
        asked: dict[int, bytes] = {}
        suspects = {number for pair in (*ids.pairs, *questions.pairs) for number in pair}
        try:
            for row in (row for rows in (read(AllExcept(suspects)) if suspects else ()) for row in rows):
                labels[row.number] = row.id
                if (request := self._checks.request(row)) is not None:
                    asked[row.number] = blake2b(msgspec.msgpack.encode(_question(row, request))).digest()
        except ManifestError:
            pass  # as before: what cannot be read a second time counts by its digest alone
        self._distinct_ids = ids.distinct + self._confirm(DUPLICATE_ID, ids, labels, labels, "the same as row")
        self._confirm(REPEATED_QUESTION, questions, asked, labels, "asks the same as row")
        if not has_ids:
            self.problems.drop(MISSING_ID)
        if not (wants_pictures or self._illustrated):
            self.problems.drop(NO_PICTURE)

    def _confirm(self, code: str, found: Counted, values: Mapping[int, Hashable], labels: Labels, text: str) -> int:
        """Counts what repeats an earlier row as problems; returns how often that only seemed so."""
        seeming = 0
        for number, earlier in found.pairs:
            if values.get(number) == values.get(earlier):
                self.problems.add(code, number, labels.get(number), f"{text} {earlier}")
            else:
                seeming += 1
        self.problems.count(code, found.repeated - len(found.pairs))
        return seeming

    def ids(self, type: str | None) -> Ids | None:
        """The labels, after `end`; None where there are none."""
        return Ids(type, self._labelled, self._distinct_ids) if type is not None else None

    def prompts(self) -> Prompts:
        """What is asked."""
        return Prompts(self._asked, self._conversations, self._characters.spread())

    def pictures(self) -> Pictures:
        """Where pictures are; once, after the pass."""
        distinct = self._pictures.count().distinct
        return Pictures(self._references, distinct, self._illustrated, self._most, dict(self._kinds))

    def sharing(self) -> Sharing:
        """How often pictures are read; once, after the pass."""
        return Sharing(self._illustrated, self._sets.count().distinct, self._reads, self._look_ahead)


def _question(row: Row, request: Request) -> tuple[Hashable, ...]:
    """All that an answer comes from."""
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
