"""An engine without a model, for tests, benchmarks and trying out a manifest. It misbehaves in any way requested."""

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

if TYPE_CHECKING:
    import PIL.Image

THUMBNAIL_SIDE = 32
"""Width and height, in pixels, to which `Thumbnails` resizes images."""

_FOREVER = 1e6
Seconds = Annotated[float, Meta(ge=0)]


class FakeOptions(Struct, frozen=True, forbid_unknown_fields=True):
    """What a FakeEngine does. Rows are numbered as in the manifest; an `every` of 0 means never."""

    delay: Seconds = 0.0
    """Seconds between a batch's arrival and each of its answers."""
    spread: Seconds = 0.0
    """Maximum of an additional delay that depends on the row, so that rows finish out of order."""
    slow_every: int = 0
    """Every n-th row takes a minute unless it is aborted."""
    start_delay: Seconds = 0.0
    fail_every: int = 0
    """Every n-th row fails in a way that a retry does not fix."""
    flaky_every: int = 0
    """Every n-th row fails the first time that this process receives it."""
    die_on: tuple[int, ...] = ()
    """The process kills itself when it receives one of these rows."""
    die_after: int = 0
    """The process kills itself after this many answers."""
    hang_on: tuple[int, ...] = ()
    """The process stops answering when it receives one of these rows."""
    stuck_on: tuple[int, ...] = ()
    """Like `hang_on`, but in a library that holds Python's global interpreter lock."""
    grow: int = 0
    """Bytes of memory that are kept for each answer."""
    forks: int = 0
    """Child processes to fork, which keep everything open that the engine has open."""
    refuse: str = ""
    """The engine does not start, for this reason."""
    unavailable: str = ""
    """Path of a file: while it exists, the engine is unavailable, for the reason that it contains."""
    hub: str = ""
    """Path of a file that stands for a hub: it contains the latest revision and the chat template's digest."""
    images: bool = True
    """Whether image workers decode images and send their thumbnails."""
    encoded: bool = False
    """Whether image workers only check images and send the original bytes, as for a server."""
    rows: int | None = None
    """Rows that keep it busy. [default: four batches]"""


class FakeEngine:
    """Answers every turn with the prompt's text and a digest of what it received of the row's images.

    The digest is of the tensors in the arena, so a test that knows the images detects one that was swapped.
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
        self._open_batches = 0
        self._idle = Stopwatch()
        self._kept: list[bytes] = []

    @property
    def wait_seconds(self) -> float:
        """Seconds without rows: it computes any number of rows at a time."""
        return self._idle.seconds

    async def resolve(self) -> PreparationSpec | None:
        """Return the preparation of thumbnails or of encoded images, if images are enabled."""
        if self._options.encoded:
            return PreparationSpec(input="encoded")
        return PreparationSpec("batchvl.engines.fake:Thumbnails") if self._options.images else None

    async def start(self) -> EngineInfo:
        """Start after `start_delay`, unless an option prevents it."""
        if self._options.refuse:
            raise OptionError(self._options.refuse)
        revision, template = self._find_model()
        for _ in range(self._options.forks):
            _fork_idle()
        await asyncio.sleep(self._options.start_delay)
        self._idle.running(True)
        batch_size = self._spec.batch_size or 32
        return EngineInfo(
            "fake",
            "1",
            self._spec.model,
            "nothing",
            revision=revision,
            template_sha256=template,
            batch_size=batch_size,
            rows=self._options.rows or 4 * batch_size,
        )

    async def infer(self, requests: list[Request]) -> AsyncIterator[Response]:
        """Answer in order of completion; without delays that is the order of the batch."""
        self._idle.running(False)
        self._open_batches += 1
        options, arrived = self._options, time.monotonic()
        for request in requests:
            if request.row in options.die_on:
                self._die(f"on row {request.row}")
            self._hung |= request.row in options.hang_on
            if request.row in options.stuck_on:
                _hold_lock()
        due = sorted((options.delay + self._extra_delay(request.row), i, request) for i, request in enumerate(requests))
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
        self._open_batches -= 1
        self._idle.running(not self._open_batches)

    async def abort(self, row: int) -> None:
        """Answer the row soon, with a failure."""
        self._aborted.add(row)

    async def close(self) -> None:
        """Close the arena."""
        self._arena.close()

    def _find_model(self) -> tuple[str | None, str | None]:
        """Return the model's revision and its template's digest."""
        if self._options.unavailable and (file := Path(self._options.unavailable)).exists():
            raise EngineUnavailable(file.read_text())
        if not self._options.hub:
            return None, None
        try:
            latest, template = Path(self._options.hub).read_text().split()
        except FileNotFoundError:
            raise ModelError(f"{self._options.hub}: no such model") from None
        return self._spec.revision or latest, template

    def _die(self, reason: str) -> None:
        print(f"FakeEngine kills itself {reason}, as configured", file=sys.stderr, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)

    def _extra_delay(self, row: int) -> float:
        if self._options.slow_every and row % self._options.slow_every == 0:
            return 60.0
        return self._options.spread * (row * 2654435761 % 997) / 997

    def _answer(self, request: Request) -> Response:
        row, options = request.row, self._options
        if row in self._aborted:
            self._aborted.discard(row)
            return Response(row, failure=Failure.of(RowTimeout("the row was aborted")))
        if options.fail_every and row % options.fail_every == 0:
            error = Failure(EngineError.code, EngineError.stage, "this row fails, as configured", retryable=False)
            return Response(row, failure=error)
        if options.flaky_every and row % options.flaky_every == 0 and row not in self._failed_once:
            self._failed_once.add(row)
            return Response(row, failure=Failure.of(EngineError("this row fails once, as configured")))
        digests = self._digests(request)
        turns = (request.messages[-1], *request.followups)
        texts = tuple(" ".join([*(part.text for part in turn.parts if part.text), *digests]) for turn in turns)
        words = sum(len(text.split()) for text in texts)
        return Response(row, texts, "stop", input_tokens=words, output_tokens=words)

    def _digests(self, request: Request) -> list[str]:
        """Return the beginning of the SHA-256 of each image's tensor."""
        if request.extent is None:
            return []
        data = self._arena.at(request.extent)
        return [hashlib.sha256(data[t.offset : t.offset + t.shape[0]]).hexdigest()[:12] for t in request.tensors]


class Thumbnails:
    """The preparation of FakeEngine: each image as THUMBNAIL_SIDE x THUMBNAIL_SIDE pixels of three bytes."""

    def prepare(
        self, request: Request, images: Sequence[PIL.Image.Image], infos: Sequence[Image] = (), /
    ) -> dict[str, bytes]:
        """Return the pixels of each image's thumbnail."""
        size = THUMBNAIL_SIDE, THUMBNAIL_SIDE
        return {f"image{number}": image.resize(size).tobytes() for number, image in enumerate(images)}


def _fork_idle() -> None:
    if not os.fork():
        time.sleep(_FOREVER)
        os._exit(0)


def _hold_lock() -> None:
    sleep = ctypes.PyDLL(None).sleep  # PyDLL does not release the lock
    while True:
        sleep(int(_FOREVER))  # a signal interrupts it
