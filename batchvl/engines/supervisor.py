"""An engine that is kept alive: lists go in, answers come out, and a process that dies is replaced.

Deaths by the contract: the rows that the dead process held come back as `EngineDied`, for the runner to try again
after all others, in halves. A death before the first answer ever is taken for a configuration error and is final the
second time; later, five deaths without progress in between are, and a successor that finds no room to start counts as
one, with a pause. A process whose memory grows too large is no death: it is handed no more rows, and is replaced once
it has answered those that it holds. All processes are of the model that the first one found.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType

import msgspec

from ..errors import BatchvlError, EngineLost, EngineUnavailable
from ..images.arena import Arena
from ..images.preparation import PreparationSpec
from ..lifeline import Lifeline
from ..options import EngineOptions
from ..request import Request, Response
from .death import Deaths, EngineDied, Refused, Unkillable
from .feed import Feed
from .growth import MemoryLimit, amount
from .process import EngineProcess
from .protocol import EngineInfo, EngineSpec, unheard
from .rows import Rows, counted

MEMORY_SECONDS = 3.0
"""How often the memory of the engine's processes is looked at."""


class SupervisedEngine:
    """An engine process and its successors, an async context manager.

    `preparation` is known once entered, `info` once `started` has returned; `answer` may be called before. `say` is
    told, in a line for people each, what befalls the processes.
    """

    preparation: PreparationSpec | None

    def __init__(
        self,
        spec: EngineSpec,
        options: EngineOptions,
        arena: Arena,
        lifeline: Lifeline,
        environment: Mapping[str, str],
        log: Path,
        say: Callable[[str], None] = unheard,
    ) -> None:
        self._spec, self._options, self._arena = spec, options, arena
        self._lifeline, self._environment, self._log, self._say = lifeline, environment, log, say
        self._rows = Rows(options.row_timeout)
        self._feed = Feed(self._rows, options)
        self._limit = MemoryLimit(options.engine_memory, say)
        self._process: EngineProcess | None = None
        self.info: EngineInfo | None = None
        self._deaths = Deaths(say, log)
        self.restarts = 0
        """How often a process was replaced because its memory had grown."""
        self._answers_before = 0
        self._lost: BatchvlError | None = None
        self._killed_for = ""
        self._killed = asyncio.Event()
        self._closing: asyncio.Task[None] | None = None
        self._down_since: float | None = None
        self._up = asyncio.Event()
        self._ended = asyncio.Event()

    async def __aenter__(self) -> SupervisedEngine:
        process = await self._launch()
        try:
            self.preparation = await process.resolved
        except BaseException as error:
            process.kill("it could not start")
            await asyncio.shield(process.died)
            if isinstance(error, EngineDied):
                raise EngineLost(str(error)) from None
            raise
        lives = self._live(process), self._feed.watch(self._say, self._log), self._watch_memory()
        self._tasks = [asyncio.get_running_loop().create_task(life) for life in lives]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.wait(self._tasks)
        if self._process is not None:
            await self._process.close()
        if self._closing is not None:
            await self._closing
        self._rows.release(EngineDied("the run ended"))

    async def started(self) -> EngineInfo:
        """What runs, once the model is loaded. Raises a UsageError or EngineLost where it cannot be."""
        waits = [asyncio.ensure_future(event.wait()) for event in (self._up, self._ended)]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()
        if self._lost is not None:
            raise self._lost
        assert self.info is not None
        return self.info

    async def answer(self, request: Request) -> Response:
        """The engine's response. Its extent may be released once this returns or raises.

        Raises EngineDied where the process died with the row in it, EngineLost where no engine will come again.
        """
        if self._lost is not None:
            raise self._lost
        answer = self._rows.add(request)
        self._feed.pump()
        try:
            return await answer
        except asyncio.CancelledError:
            held = self._rows.held.get(request.row)
            if held is not None:
                held.answer = asyncio.get_running_loop().create_future()
                self._feed.abort(request.row)
                await asyncio.wait([held.answer])
                held.answer.exception()  # a death then is nobody's news
            raise

    @property
    def deaths(self) -> int:
        """How often a process died, or would not start after another had."""
        return self._deaths.count

    @property
    def held(self) -> int:
        """How many rows are in the engine."""
        return len(self._rows.held)

    @property
    def row_seconds(self) -> float:
        """Seconds that rows were in the engine, summed over the rows."""
        return self._rows.seconds

    @property
    def seconds(self) -> float:
        """Seconds in which the engine was up, from the first list to the latest answer."""
        return self._feed.uptime.seconds

    @property
    def wait_share(self) -> float:
        """The share of these in which it could have computed more rows than it had, 0 to 1."""
        uptime = self._feed.uptime
        return min(1.0, uptime.wait_seconds / uptime.seconds) if uptime.seconds else 0.0

    @property
    def idle_since(self) -> float | None:
        """When the engine ran out of rows, on the monotonic clock; None while it has some."""
        return self._feed.idle_since

    @property
    def prepares_text(self) -> bool:
        """Whether rows without pictures go through the image workers as well."""
        return self.preparation is not None and self.preparation.text_too

    def kill(self, reason: str) -> None:
        """Ends the process now and for good: its rows come back as EngineDied."""
        self._killed_for = reason
        self._killed.set()
        if self._process is not None:
            self._process.kill(reason)

    def holds(self, row: int) -> bool:
        """Whether the row is in the engine, rather than waiting to go in."""
        return row in self._rows.held

    def halved(self) -> None:
        """The runner has split the rows of a death in two: that is progress."""
        self._deaths.progress()

    async def _launch(self) -> EngineProcess:
        process = EngineProcess(self._answered, self._feed.alive, self._say)
        await process.open(self._spec, self._arena, self._lifeline, self._environment, self._log)
        self._process = process
        if self._killed.is_set():
            process.kill(self._killed_for)
        return process

    async def _live(self, process: EngineProcess) -> None:
        """Sees process after process through to its end, until one ends it all."""
        try:
            while True:
                refused: Refused | None = None
                try:
                    await self._start(process)
                except TimeoutError:
                    process.kill(f"it was not up after {self._options.start_timeout:g} s (--start-timeout)")
                except EngineDied:
                    pass
                except EngineUnavailable as error:
                    if self.info is None:
                        raise
                    refused = Refused(error)
                died = await asyncio.shield(process.died)
                was_up, self._down_since = self._up.is_set(), self._down_since or time.monotonic()
                self._up.clear()
                self._feed.close()
                died.answered, self._answers_before = self._feed.answers - self._answers_before, self._feed.answers
                if not self._killed.is_set():
                    if isinstance(died, Unkillable):
                        raise EngineLost(str(died))
                    if self._closing is None:
                        await self._bury(refused or died, was_up)
                    else:
                        await self._closing
                        self._closing = None
                        self.restarts += 1
                if self._killed.is_set():  # perhaps while the next one waited
                    self._lost = EngineLost(str(died))  # for who comes now: nobody will answer
                    self._rows.release(died)
                    self._ended.set()
                    return
                process = await self._launch()
        except (BatchvlError, OSError) as error:
            lost: BatchvlError
            if isinstance(error, OSError):
                lost = EngineLost(f"no engine process can be started: {error}")
            elif self.info is not None and not isinstance(error, EngineLost):  # a refusal, but rows were answered
                lost = EngineLost(f"the engine could not be started again: {error}")
            else:
                lost = error
            self._lost = lost
            self._rows.release(lost)
            self._ended.set()

    async def _start(self, process: EngineProcess) -> None:
        """Waits until the process is up. Raises TimeoutError, EngineDied, or a UsageError where it refuses."""
        async with asyncio.timeout(self._options.start_timeout):
            info = await asyncio.shield(process.started)
        self._pin(info)
        self.info = info
        self._deaths.started()
        self._limit.started(await process.memory(), process.start_seconds)
        if self._down_since is not None:
            self._say(f"the engine is up again, after {time.monotonic() - self._down_since:.1f} s")
            self._down_since = None
        self._up.set()
        self._feed.open(process, info)

    def _pin(self, info: EngineInfo) -> None:
        """Has all processes be of the model that the first one found. Raises EngineLost for one that is not."""
        if self.info is None:
            self._spec = msgspec.structs.replace(self._spec, revision=info.revision or self._spec.revision)
            return
        for what in ("revision", "template_sha256"):
            then, now = getattr(self.info, what), getattr(info, what)
            if now != then:
                raise EngineLost(
                    f"the model has changed since the run began: the engine was started again with {what} {now}, not "
                    f"{then}: rows would be answered by another model"
                )

    async def _bury(self, died: EngineDied, was_up: bool) -> None:
        """Gives a death's rows back, and waits until another process may be tried. Raises EngineLost at the last."""
        self._feed.singly = True
        self._deaths.add(died, self._feed.answers, self.held if was_up else None)
        self._rows.give_back(died)
        with suppress(TimeoutError):
            async with asyncio.timeout(self._deaths.pause):
                await self._killed.wait()

    def _answered(self, responses: list[Response]) -> None:
        self._deaths.progress()
        self._feed.answered(responses)

    async def _watch_memory(self) -> None:
        """Has a process replaced that has grown beyond the limit."""
        while True:
            await asyncio.sleep(MEMORY_SECONDS)
            process = self._process
            if process is None:
                continue
            found = await process.memory()
            if self._feed.is_open and not process.gone and self._limit.exceeded(found):
                then = f", once it has answered the {counted(self.held)} that it has" if self.held else ""
                self._say(
                    f"the engine holds {amount(found)} of memory, more than {amount(self._limit.bytes)} "
                    f"(--engine-memory): it is started afresh{then}"
                )
                self._feed.drain(self._close)

    def _close(self) -> None:
        if self._closing is None and self._process is not None:
            self._closing = asyncio.get_running_loop().create_task(self._process.close())
