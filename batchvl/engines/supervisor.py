"""An engine that is kept alive: lists go in, answers come out, and a process that dies is replaced.

Deaths by the contract: the rows that the dead process held come back as `EngineDied`, for the runner to try again
after all others, in halves. A death before the first answer ever is taken for a configuration error and is final the
second time; later, five deaths without progress in between are.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

from ..errors import BatchvlError, EngineLost, RowTimeout
from ..images.arena import Arena
from ..images.preparation import PreparationSpec
from ..lifeline import Lifeline
from ..options import EngineOptions
from ..request import Failure, Request, Response
from .process import EngineDied, EngineProcess
from .protocol import EngineInfo, EngineSpec

DEATHS_BEFORE_FIRST_ANSWER = 2
DEATHS_WITHOUT_PROGRESS = 5
LINGER_SECONDS = 0.005
"""How long an incomplete list waits for more rows while the engine has room."""


class _Held:
    """A row in the engine: who waits for it, the list it went in, and its deadline."""

    __slots__ = ("aborted", "answer", "deadline", "members", "sent", "timed_out")

    def __init__(self, answer: asyncio.Future[Response], members: set[int], sent: float, deadline: float) -> None:
        self.answer, self.members, self.sent, self.deadline = answer, members, sent, deadline
        self.aborted = self.timed_out = False


class SupervisedEngine:
    """An engine process and its successors, an async context manager.

    `preparation` is known once entered, `info` once `started` has returned; `answer` may be called before.
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
    ) -> None:
        self._spec, self._options, self._arena = spec, options, arena
        self._lifeline, self._environment, self._log = lifeline, environment, log
        self._pending: deque[tuple[Request, asyncio.Future[Response]]] = deque()
        self._held: dict[int, _Held] = {}
        self._lists_open = 0
        self._process: EngineProcess | None = None
        self.info: EngineInfo | None = None
        self.deaths = 0
        self.idle_seconds = 0.0
        """Seconds in which the engine was up and had nothing to do, between its first list and its last."""
        self.row_seconds = 0.0
        """Seconds that rows were in the engine, summed over the rows."""
        self._idle_since: float | None = None
        self._answers = self._answers_before = 0
        self._deaths_in_vain = 0
        self._lost: BatchvlError | None = None
        self._killed = False
        self._lingering: asyncio.TimerHandle | None = None
        self._up = asyncio.Event()
        self._ended = asyncio.Event()
        self._progress = time.monotonic()

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
        self._life = asyncio.get_running_loop().create_task(self._live(process))
        self._watch = asyncio.get_running_loop().create_task(self._watch_rows())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._watch.cancel()
        self._life.cancel()
        await asyncio.wait([self._life, self._watch])
        if self._process is not None:
            await self._process.close()
        self._release(EngineDied("the run ended"))

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
        answer: asyncio.Future[Response] = asyncio.get_running_loop().create_future()
        self._pending.append((request, answer))
        self._pump()
        try:
            return await answer
        except asyncio.CancelledError:
            held = self._held.get(request.row)
            if held is not None:
                held.answer = asyncio.get_running_loop().create_future()
                self._abort(request.row)
                await asyncio.wait([held.answer])
                held.answer.exception()  # a death then is nobody's news
            raise

    @property
    def held(self) -> int:
        """How many rows are in the engine."""
        return len(self._held)

    @property
    def idle_since(self) -> float | None:
        """When the engine ran out of rows, on the monotonic clock; None while it has some."""
        return self._idle_since

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
        return row in self._held

    def halved(self) -> None:
        """The runner has split the rows of a death in two: that is progress."""
        self._deaths_in_vain = 0

    async def _launch(self) -> EngineProcess:
        process = EngineProcess(self._answered, self._alive)
        await process.open(self._spec, self._arena, self._lifeline, self._environment, self._log)
        self._process = process
        return process

    async def _live(self, process: EngineProcess) -> None:
        """Sees process after process through to its death, until one ends it all."""
        try:
            while True:
                try:
                    async with asyncio.timeout(self._options.start_timeout):
                        self.info = await asyncio.shield(process.started)
                    self._progress = time.monotonic()
                    self._idle_since = self._idle_since or self._progress
                    self._up.set()
                    self._pump()
                except TimeoutError:
                    process.kill(f"it was not up after {self._options.start_timeout:g} s (--start-timeout)")
                except EngineDied:
                    pass
                died = await asyncio.shield(process.died)
                self._up.clear()
                if self._killed:
                    self._lost = EngineLost(str(died))  # for who comes now: nobody will answer
                    self._give_back(died)
                    self._release(died)
                    self._ended.set()
                    return
                self._bury(died)
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
            self._release(lost)
            self._ended.set()

    def _bury(self, died: EngineDied) -> None:
        """Counts a death and gives its rows back. Raises EngineLost where that was the last."""
        self.deaths += 1
        self._deaths_in_vain += 1
        if not self._answers and self.deaths >= DEATHS_BEFORE_FIRST_ANSWER:
            lost = EngineLost(f"the engine died {self.deaths} times before its first answer: {died}")
        elif self._deaths_in_vain >= DEATHS_WITHOUT_PROGRESS:
            lost = EngineLost(f"the engine died {self._deaths_in_vain} times without an answer in between: {died}")
        else:
            self._give_back(died)
            return
        self._release(lost)  # not as a death, for which a row could be blamed
        raise lost

    def _give_back(self, died: EngineDied) -> None:
        died.answered, self._answers_before = self._answers - self._answers_before, self._answers
        self._lists_open = 0
        held, self._held = self._held, {}
        for row in held.values():
            if not row.answer.done():
                row.answer.set_exception(died)

    def _release(self, error: Exception) -> None:
        waiting = [answer for _, answer in self._pending] + [row.answer for row in self._held.values()]
        self._pending.clear()
        self._held.clear()
        for answer in waiting:
            if not answer.done():
                answer.set_exception(error)

    def _pump(self, lingered: bool = False) -> None:
        """Hands the engine lists while it has room; an incomplete one only after a moment's wait for more."""
        if not self._up.is_set() or self.info is None or self._process is None or self._process.gone:
            return
        size, most_open = self.info.batch_size, self.info.lists_open
        if self.deaths and not self._answers:
            size = most_open = 1  # was it the engine or a row? One row, from their middle, tells
            self._pending.rotate(len(self._pending) // 2)
        while self._pending and self._lists_open < most_open:
            if len(self._pending) < size and not lingered:
                if self._lingering is None:
                    loop = asyncio.get_running_loop()
                    self._lingering = loop.call_later(LINGER_SECONDS, self._pump_lingered)
                return
            self._send(self._process, size)

    def _pump_lingered(self) -> None:
        self._lingering = None
        self._pump(lingered=True)

    def _send(self, process: EngineProcess, size: int) -> None:
        now = time.monotonic()
        requests: list[Request] = []
        members: set[int] = set()
        while self._pending and len(requests) < size:
            request, answer = self._pending.popleft()
            if not answer.done():
                requests.append(request)
                members.add(request.row)
                self._held[request.row] = _Held(answer, members, now, now + self._options.row_timeout)
        if not requests:
            return
        if self._idle_since is not None:
            if self._answers:
                self.idle_seconds += now - self._idle_since
            self._idle_since = None
            self._progress = now
        self._lists_open += 1
        process.infer(requests)

    def _answered(self, responses: list[Response]) -> None:
        self._answers += len(responses)
        self._deaths_in_vain = 0
        self._alive()
        for response in responses:
            row = self._held.pop(response.row, None)
            if row is None:
                continue
            self.row_seconds += self._progress - row.sent
            row.members.discard(response.row)
            if not row.members:
                self._lists_open -= 1
            if row.timed_out:
                text = f"the row was longer than {self._options.row_timeout:g} s in the engine (--row-timeout)"
                response = Response(response.row, failure=Failure.of(RowTimeout(text)))
            if not row.answer.done():
                row.answer.set_result(response)
        if not self._held:
            self._idle_since = time.monotonic()
        self._pump()

    def _alive(self) -> None:
        self._progress = time.monotonic()

    def _abort(self, row: int) -> None:
        held = self._held.get(row)
        if held is not None and not held.aborted and self._process is not None:
            held.aborted = True
            self._process.abort(row)

    async def _watch_rows(self) -> None:
        """Aborts rows past their deadline and ends a process that makes no progress."""
        hang = self._options.hang_timeout
        while True:
            await asyncio.sleep(min(1.0, hang / 4, self._options.row_timeout / 4))
            now = time.monotonic()
            for number, row in self._held.items():
                if now > row.deadline and self._process is not None:
                    if row.timed_out:
                        self._process.kill("it did not let go of a row that it was told to abort")
                        break
                    row.timed_out, row.deadline = True, now + hang
                    self._abort(number)
            if self._held and now - self._progress > hang and self._process is not None:
                self._progress, hung = now, self._process
                hung.dump_stacks()
                await asyncio.sleep(0.5)  # in which another may take its place
                hung.kill(f"it made no progress for {hang:g} s (--hang-timeout); its stacks are in the log")
