"""An engine without a model: for tests, benchmarks and trying out a manifest, with every misbehaviour on order."""

from __future__ import annotations

import asyncio
import ctypes
import hashlib
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import msgspec
from msgspec import Meta

from ..errors import EngineError, EngineUnavailable, ModelError, OptionError, RowTimeout
from ..images.preparation import PreparationSpec
from ..ipc.arena import ArenaView
from ..types import Failure, Image, Request, Response, Struct
from .base import EngineInfo, EngineSpec, Stopwatch

_FOREVER = 1e6
Seconds = Annotated[float, Meta(ge=0)]


class FakeOptions(Struct, frozen=True, forbid_unknown_fields=True):
    """What a FakeEngine does. Rows are manifest row numbers; 0 for an `every` means never."""

    delay: Seconds = 0.0
    """Seconds from a list's arrival to each of its answers."""
    spread: Seconds = 0.0
    """Up to so many seconds more, by row, so that rows finish out of order."""
    slow_every: int = 0
    """Every so-many-th row takes a minute, unless it is aborted."""
    start_delay: Seconds = 0.0
    fail_every: int = 0
    """Every so-many-th row is answered with a failure that a retry does not mend."""
    flaky_every: int = 0
    """Every so-many-th row fails the first time that this process sees it."""
    die_on: tuple[int, ...] = ()
    """The process kills itself when it is handed one of these rows."""
    die_after: int = 0
    """The process kills itself after so many answers."""
    hang_on: tuple[int, ...] = ()
    """The process stops answering anything when it is handed one of these rows."""
    stuck_on: tuple[int, ...] = ()
    """As `hang_on`, in a library that does not let go of Python's lock."""
    grow: int = 0
    """So many bytes of memory are kept for each answer."""
    forks: int = 0
    """So many processes of its own, which hold on to all that the engine has open."""
    refuse: str = ""
    """The engine cannot start, for this reason."""
    unavailable: str = ""
    """A file: for as long as it is there the engine is unavailable, for the reason that it holds."""
    hub: str = ""
    """A file that stands for a hub: the newest revision, unless one is asked for, and the chat template's digest."""
    pictures: bool = True
    """Whether image workers decode pictures and hand over their thumbnails."""
    rows: int | None = None
    """So many in it keep it busy. [default: four lists]"""


class FakeEngine:
    """Answers every turn with the prompt's text and a digest of what it saw of the row's pictures.

    The digest is over the tensors in the arena, so a test that knows the pictures can tell a swapped one.
    """

    def __init__(self, spec: EngineSpec, arena: ArenaView) -> None:
        self.steps = 0
        self._spec, self._arena = spec, arena
        try:
            self._options = msgspec.convert(spec.options, FakeOptions, strict=False)
        except msgspec.ValidationError as error:
            raise OptionError(f"--engine-option of the engine 'fake': {error}") from None
        self._aborted: set[int] = set()
        self._failed_once: set[int] = set()
        self._answered = 0
        self._hung = False
        self._lists = 0
        self._idle = Stopwatch()
        self._kept: list[bytes] = []

    @property
    def wait_seconds(self) -> float:
        """It computes any number of rows at once: it waits while it has none."""
        return self._idle.seconds

    async def resolve(self) -> PreparationSpec | None:
        return PreparationSpec("batchvl.engines.fake:Thumbnails") if self._options.pictures else None

    async def start(self) -> EngineInfo:
        if self._options.refuse:
            raise OptionError(self._options.refuse)
        revision, template = self._found()
        for _ in range(self._options.forks):
            _fork_idle()
        await asyncio.sleep(self._options.start_delay)
        self._idle.running(True)
        size = self._spec.batch_size or 32
        return EngineInfo(
            "fake", "1", self._spec.model, "nothing",
            revision=revision, template_sha256=template, batch_size=size, rows=self._options.rows or 4 * size,
        )  # fmt: skip

    async def infer(self, requests: list[Request]) -> AsyncIterator[Response]:
        """Answers in order of completion; without `delay` in the list's."""
        self._idle.running(False)
        self._lists += 1
        options, arrived = self._options, time.monotonic()
        for request in requests:
            if request.row in options.die_on:
                self._die(f"over row {request.row}")
            self._hung |= request.row in options.hang_on
            if request.row in options.stuck_on:
                _hold_lock()
        due = sorted((options.delay + self._spread(request.row), i, request) for i, request in enumerate(requests))
        for after, _, request in due:
            wait = arrived + after - time.monotonic()
            while wait > 0 and request.row not in self._aborted:
                await asyncio.sleep(min(wait, 0.05))
                wait = arrived + after - time.monotonic()
            if self._hung:
                await asyncio.Event().wait()
            if options.die_after and self._answered >= options.die_after:
                self._die(f"after {self._answered} answers")
            self._answered += 1
            self._kept.append(b"." * options.grow)
            self.steps += 1
            yield self._answer(request)
        self._lists -= 1
        self._idle.running(not self._lists)

    async def abort(self, row: int) -> None:
        self._aborted.add(row)

    async def close(self) -> None:
        self._arena.close()

    def _found(self) -> tuple[str | None, str | None]:
        """The model's revision and its template's digest."""
        if self._options.unavailable and (file := Path(self._options.unavailable)).exists():
            raise EngineUnavailable(file.read_text())
        if not self._options.hub:
            return None, None
        try:
            newest, template = Path(self._options.hub).read_text().split()
        except FileNotFoundError:
            raise ModelError(f"{self._options.hub}: no such model") from None
        return self._spec.revision or newest, template

    def _die(self, reason: str) -> None:
        print(f"dying {reason}, by order", file=sys.stderr, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)

    def _spread(self, row: int) -> float:
        if self._options.slow_every and row % self._options.slow_every == 0:
            return 60.0
        return self._options.spread * (row * 2654435761 % 997) / 997

    def _answer(self, request: Request) -> Response:
        row, options = request.row, self._options
        if row in self._aborted:
            self._aborted.discard(row)
            return Response(row, failure=Failure.of(RowTimeout("the row was aborted")))
        if options.fail_every and row % options.fail_every == 0:
            error = Failure(EngineError.code, EngineError.stage, "this row fails by order", retryable=False)
            return Response(row, failure=error)
        if options.flaky_every and row % options.flaky_every == 0 and row not in self._failed_once:
            self._failed_once.add(row)
            return Response(row, failure=Failure.of(EngineError("this row fails once, by order")))
        seen = self._digest(request)
        turns = (request.messages[-1], *request.followups)
        texts = tuple(" ".join([*(part.text for part in turn.parts if part.text), *seen]) for turn in turns)
        words = sum(len(text.split()) for text in texts)
        return Response(row, texts, "stop", input_tokens=words, output_tokens=words)

    def _digest(self, request: Request) -> list[str]:
        if request.extent is None:
            return []
        data = self._arena.at(request.extent)
        return [hashlib.sha256(data[t.offset : t.offset + t.shape[0]]).hexdigest()[:12] for t in request.tensors]


def _fork_idle() -> None:
    if not os.fork():
        time.sleep(_FOREVER)
        os._exit(0)


def _hold_lock() -> None:
    sleep = ctypes.PyDLL(None).sleep  # PyDLL keeps the lock
    while True:
        sleep(int(_FOREVER))  # which a signal cuts short


if TYPE_CHECKING:
    from PIL.Image import Image as Picture

SIDE = 32


class Thumbnails:
    """Each picture as SIDE x SIDE pixels of three bytes."""

    def prepare(self, request: Request, pictures: Sequence[Picture], images: Sequence[Image] = ()) -> dict[str, bytes]:
        return {f"picture{i}": picture.resize((SIDE, SIDE)).tobytes() for i, picture in enumerate(pictures)}
