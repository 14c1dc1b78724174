"""An engine that is kept alive: lists go in, answers come out, and a process that dies is replaced.

Deaths by the contract: the rows that the dead process held come back as `EngineDied`, for the runner to try again
after all others, in halves. A death before the first answer ever is taken for a configuration error and is final the
second time; later, five deaths without progress in between are. A process whose memory grows too large is no death:
it is handed no more rows, and is replaced once it has answered those that it holds.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType

from ..errors import BatchvlError, EngineLost
from ..images.arena import Arena
from ..images.preparation import PreparationSpec
from ..lifeline import Lifeline
from ..options import EngineOptions
from ..request import Request, Response
from .feed import Feed
from .growth import MemoryLimit, amount
from .process import EngineDied, EngineProcess
from .protocol import EngineInfo, EngineSpec
from .rows import Rows

DEATHS_BEFORE_FIRST_ANSWER = 2
DEATHS_WITHOUT_PROGRESS = 5
MEMORY_SECONDS = 3.0
"""How often the memory of the engine's processes is looked at."""
CLOSE_SECONDS = 30.0
"""For a process to leave that is replaced."""


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
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        self._spec, self._options, self._arena = spec, options, arena
        self._lifeline, self._environment, self._log, self._say = lifeline, environment, log, say
        self._rows = Rows(options.row_timeout)
        self._feed = Feed(self._rows, options)
        self._limit = MemoryLimit(options.engine_memory)
        self._process: EngineProcess | None = None
        self.info: EngineInfo | None = None
        self.deaths = 0
        self.restarts = 0
        """How often a process was replaced because its memory had grown."""
        self._answers_before = self._deaths_in_vain = 0
        self._lost: BatchvlError | None = None
        self._killed = False
        self._closing: asyncio.Task[None] | None = None
        self._down_since: float | None = None
        self._advised: set[str] = set()
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
    def held(self) -> int:
        """How many rows are in the engine."""
        return len(self._rows.held)

    @property
    def row_seconds(self) -> float:
        """Seconds that rows were in the engine, summed over the rows."""
        return self._rows.seconds

    @property
    def idle_seconds(self) -> float:
        """Seconds in which the engine was up and had nothing to do, between its first list and its last."""
        return self._feed.idle_seconds

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
        self._killed = True
        if self._process is not None:
            self._process.kill(reason)

    def holds(self, row: int) -> bool:
        """Whether the row is in the engine, rather than waiting to go in."""
        return row in self._rows.held

    def halved(self) -> None:
        """The runner has split the rows of a death in two: that is progress."""
        self._deaths_in_vain = 0

    async def _launch(self) -> EngineProcess:
        process = EngineProcess(self._answered, self._feed.alive, self._say)
        await process.open(self._spec, self._arena, self._lifeline, self._environment, self._log)
        self._process = process
        return process

    async def _live(self, process: EngineProcess) -> None:
        """Sees process after process through to its end, until one ends it all."""
        try:
            while True:
                try:
                    await self._start(process)
                except TimeoutError:
                    process.kill(f"it was not up after {self._options.start_timeout:g} s (--start-timeout)")
                except EngineDied:
                    pass
                died = await asyncio.shield(process.died)
                was_up, self._down_since = self._up.is_set(), self._down_since or time.monotonic()
                self._up.clear()
                self._feed.close()
                died.answered, self._answers_before = self._feed.answers - self._answers_before, self._feed.answers
                if self._killed:
                    self._lost = EngineLost(str(died))  # for who comes now: nobody will answer
                    self._rows.release(died)
                    self._ended.set()
                    return
                if self._closing is None:
                    self._bury(died, was_up)
                else:
                    await self._closing
                    self._closing = None
                    self.restarts += 1
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
            self.info = await asyncio.shield(process.started)
        note = self._limit.started(await process.memory())
        if note is not None:
            self._say(note)
        if self._down_since is not None:
            self._say(f"the engine is up again, after {time.monotonic() - self._down_since:.1f} s")
            self._down_since = None
        self._up.set()
        self._feed.open(process, self.info)

    def _bury(self, died: EngineDied, was_up: bool) -> None:
        """Counts a death and gives its rows back. Raises EngineLost where that was the last."""
        self.deaths += 1
        self._deaths_in_vain += 1
        self._feed.singly = True
        told = f"the engine {died.how} {f'with {_rows(self.held)} in it' if was_up else 'while it was starting'}"
        if not self._feed.answers and self.deaths >= DEATHS_BEFORE_FIRST_ANSWER:
            lost = EngineLost(f"the engine died {self.deaths} times before its first answer: {died}")
        elif self._deaths_in_vain >= DEATHS_WITHOUT_PROGRESS:
            lost = EngineLost(f"the engine died {self._deaths_in_vain} times without an answer in between: {died}")
        else:
            self._say(f"{told}; it is started again")
            if self.deaths == 1:
                after = "; its rows are asked again after all others, in ever smaller groups" if self.held else ""
                self._say(f"note: its last words are in {self._log}{after}")
            if died.advice and died.advice not in self._advised:
                self._advised.add(died.advice)
                self._say(died.advice)
            self._rows.give_back(died)
            return
        self._say(told)
        self._rows.release(lost)  # not as a death, for which a row could be blamed
        raise lost

    def _answered(self, responses: list[Response]) -> None:
        self._deaths_in_vain = 0
        self._feed.answered(responses)

    async def _watch_memory(self) -> None:
        """Has a process replaced that has grown beyond the limit."""
        while True:
            await asyncio.sleep(MEMORY_SECONDS)
            process = self._process
            if process is None or process.gone:
                continue
            found = await process.memory()
            if found > self._limit.bytes and self._feed.is_open and not process.gone:
                then = f", once it has answered the {_rows(self.held)} that it has" if self.held else ""
                self._say(
                    f"the engine holds {amount(found)} of memory, more than {amount(self._limit.bytes)} "
                    f"(--engine-memory): it is started afresh{then}"
                )
                self._feed.drain(self._close)

    def _close(self) -> None:
        if self._closing is None and self._process is not None:
            self._closing = asyncio.get_running_loop().create_task(self._process.close(CLOSE_SECONDS))


def _rows(count: int) -> str:
    return "1 row" if count == 1 else f"{count} rows"
