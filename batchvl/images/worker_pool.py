"""The image workers: a pool of processes that decode pictures and make the engine's inputs of them.

The runner's side. `host.py` is the other: one process that loads the engine's preparation once and forks the workers,
so that importing it is paid for once. `messages.py` has what they say; a worker does one row at a time.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO

import msgspec

from ..config.options import ImageOptions
from ..config.units import enc_hook
from ..errors import EngineLost, EngineUnavailable, PrepareCrashed, PrepareTimeout, RowError
from ..ipc.arena import Arena
from ..ipc.channel import AsyncConnection
from ..ipc.spawn import ParentPipe, sanitized_env, spawn
from ..types import Extent, Failure, Image, Request, Struct
from .messages import (
    Died,
    Done,
    Failed,
    Fork,
    FromHost,
    FromWorker,
    Grant,
    Kill,
    Need,
    PrepareJob,
    Setup,
    Source,
    ToWorker,
)
from .preparation import PreparationSpec


class Prepared(Struct, frozen=True):
    """Rows ready for the engine: requests with tensors in the arena, or why there is none, in the order asked.

    extent: holds the tensors of all of them, until it is released. seconds: that it took.
    """

    requests: tuple[Request | Failure, ...]
    extent: Extent | None
    images: tuple[Image, ...]
    seconds: float


class RowFailed(Exception):
    """A row's failure in a worker, with what is known of its pictures."""

    def __init__(self, failure: Failure, images: tuple[Image, ...] = ()) -> None:
        super().__init__(failure.message)
        self.failure, self.images = failure, images


class _WorkerDied(Exception):
    """The worker's process ended; the message says how."""


class _Worker:
    """One worker, seen from the runner: it is sent a message and answers with one."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.died: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._deadline = 0.0
        self._channel: AsyncConnection[FromWorker] | None = None
        self._answer: asyncio.Future[FromWorker] | None = None

    async def open(self, sock: socket.socket) -> None:
        self._channel = await AsyncConnection.open(sock, FromWorker, self._received, lambda: None)

    async def ask(self, message: ToWorker, seconds: float) -> FromWorker:
        """The worker's next message. Raises _WorkerDied, or TimeoutError after `seconds`."""
        assert self._channel is not None
        if self.died.done():
            raise _WorkerDied(self.died.result())
        self._answer = asyncio.get_running_loop().create_future()
        self._deadline = time.monotonic() + seconds
        self._channel.send(message)
        return await self._answer

    def check(self, now: float) -> None:
        """Lets `ask` raise TimeoutError if its time is over. A timer a row would cost more than all else here."""
        if self._answer is not None and not self._answer.done() and now > self._deadline:
            self._answer.set_exception(TimeoutError())

    def ended(self, reason: str) -> None:
        """The host has reaped the process: nobody writes to its extents any more."""
        if not self.died.done():
            self.died.set_result(reason)
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(_WorkerDied(reason))
        if self._channel is not None:
            self._channel.close()

    def _received(self, message: FromWorker) -> None:
        if self._answer is not None and not self._answer.done():
            self._answer.set_result(message)


class ImageWorkers:
    """A pool of image workers for one run, an async context manager.

    `arenas` are those of pictures' bytes and of tensors. `preload` names the module that the engine's preparation will
    be in, if one is known: the host imports it while the engine still looks for its model. `load` tells what is to be
    prepared and how; the first `prepare` waits until that is loaded.
    """

    def __init__(
        self,
        preload: str | None,
        limits: ImageOptions,
        max_image_bytes: int,
        roots: Sequence[Path],
        arenas: tuple[Arena, Arena],
        workers: int,
        lifeline: ParentPipe,
        environment: Mapping[str, str],
        log: IO[bytes],
        memory: int = 4 * 2**30,
    ) -> None:
        self._encoded, self._prepared = arenas
        self._preload, self._max_image_bytes, self._roots, self._memory = preload, max_image_bytes, roots, memory
        self._limits, self._count = limits, workers
        self._lifeline, self._environment, self._log = lifeline, environment, log
        self._ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._workers: dict[int, _Worker] = {}
        self._idle: asyncio.LifoQueue[_Worker] = asyncio.LifoQueue()
        self.busy_seconds = 0.0
        """That workers were at work, summed over them."""
        self._usual = 0
        self._born = 0
        self._lost: EngineLost | None = None
        self._closing = False
        self._births: set[asyncio.Task[None]] = set()
        self._watch: asyncio.Task[None] | None = None

    async def __aenter__(self) -> ImageWorkers:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            fds = [theirs.fileno(), self._lifeline.fd, self._encoded.fd, self._prepared.fd]
            arguments = [str(theirs.fileno()), str(self._lifeline.fd), str(os.getpid()), self._preload or ""]
            environment = sanitized_env(self._environment)
            self._host = spawn("batchvl.images.forkserver", arguments, fds, environment, self._log)
        self._control = ours
        ours.setblocking(False)
        asyncio.get_running_loop().add_reader(ours, self._heard)
        self._watch = asyncio.get_running_loop().create_task(self._check_deadlines())
        return self

    async def load(self, spec: PreparationSpec | None) -> None:
        """Has the host load the preparation, None for none, and fork the workers. `prepare` raises what goes wrong."""
        if spec is not None:
            spec = msgspec.structs.replace(spec, special_tokens=())  # for the runner alone; models have thousands
        setup = Setup(
            spec, self._limits, self._max_image_bytes, tuple(map(str, self._roots)),
            (self._encoded.fd, self._encoded.size), (self._prepared.fd, self._prepared.size), self._memory,
        )  # fmt: skip
        # The host reads only once it is up: all must fit. What does not is an error, and no wait for ever.
        self._control.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2**20 + 2048 * self._count)
        with suppress(BrokenPipeError, ConnectionResetError):  # a host that is gone is told by `_heard`
            self._control.send(msgspec.msgpack.encode(setup, enc_hook=enc_hook))
            for _ in range(self._count):
                await self._fork()

    async def __aexit__(self, *exc: object) -> None:
        self._closing = True
        if self._watch is not None:
            self._watch.cancel()
        asyncio.get_running_loop().remove_reader(self._control)
        with suppress(ProcessLookupError):
            self._host.kill()  # the kernel ends its workers with it
        await asyncio.to_thread(self._host.wait)
        self._control.close()
        for worker in list(self._workers.values()):
            worker.ended("the run ended")
        if not self._ready.done():
            self._ready.cancel()
        elif not self._ready.cancelled():
            self._ready.exception()  # somebody may never have asked

    async def prepare(self, requests: Sequence[Request], sources: Sequence[Source]) -> Prepared:
        """The tensors of rows about the same pictures in the arena. They are the caller's: it releases `extent`.

        Raises RowFailed, for all of them; EngineUnavailable where the engine's preparation cannot be loaded;
        EngineLost where the workers' host process died.
        """
        if not self._ready.done():
            await asyncio.shield(self._ready)
        elif (error := self._ready.exception()) is not None:
            raise error
        job = PrepareJob(tuple(requests), tuple(sources))
        deaths = 0
        while True:
            worker = await self._next_idle()
            try:
                return await self._run(worker, job)
            except _WorkerDied as error:
                if self._lost is not None:
                    raise self._lost from None  # the host's end, for which no row is to blame
                deaths += 1
                if deaths == 2:
                    message = f"the image worker died twice over this row: {error}"
                    raise RowFailed(Failure.of(PrepareCrashed(message)), _images(sources)) from None
            finally:
                if not worker.died.done():
                    self._idle.put_nowait(worker)

    async def _next_idle(self) -> _Worker:
        while True:
            worker = await self._idle.get()
            if self._lost is not None:
                self._idle.put_nowait(worker)  # for the next who waits
                raise self._lost
            if not worker.died.done():
                return worker

    async def _run(self, worker: _Worker, job: PrepareJob) -> Prepared:
        extent = self._prepared.reserve_now(self._usual) if self._usual else None
        start = time.monotonic()
        try:
            answer = await worker.ask(PrepareJob(job.requests, job.sources, extent), self._limits.prepare_timeout)
            if isinstance(answer, Need):
                left = max(1.0, self._limits.prepare_timeout - (time.monotonic() - start))
                if extent is not None:
                    self._prepared.release(extent)  # holding on to it while waiting for more could last for ever
                    extent = None
                try:
                    [extent] = await self._prepared.reserve([answer.size])
                except RowError as error:
                    await self._end(worker)  # it waits for a grant that never comes
                    raise RowFailed(Failure.of(error), _images(job.sources)) from None
                answer = await worker.ask(Grant(extent), left)
            if isinstance(answer, Done):
                self.busy_seconds += answer.seconds
                self._usual = max(answer.size, self._usual - self._usual // 256)
                done = None
                if answer.size:
                    assert extent is not None
                    done, extent = self._prepared.shrink(extent, answer.size), None
                return Prepared(_ready(job.requests, done, answer), done, answer.images, answer.seconds)
            assert isinstance(answer, Failed)
            raise RowFailed(answer.failure, answer.images)
        except TimeoutError:
            await self._end(worker)
            message = f"preparing took longer than {self._limits.prepare_timeout:g} s"
            raise RowFailed(Failure.of(PrepareTimeout(message)), _images(job.sources)) from None
        except asyncio.CancelledError:
            await self._end(worker)  # it may still be writing
            raise
        finally:
            if extent is not None:
                self._prepared.release(extent)

    async def _end(self, worker: _Worker) -> None:
        """Kills a worker and waits until it is reaped; another takes its place."""
        if not worker.died.done():
            with suppress(OSError):
                self._control.send(msgspec.msgpack.encode(Kill(worker.number)))
            await asyncio.shield(worker.died)

    async def _check_deadlines(self) -> None:
        while True:
            await asyncio.sleep(min(1.0, self._limits.prepare_timeout / 4))
            now = time.monotonic()
            for worker in self._workers.values():
                worker.check(now)

    async def _fork(self) -> None:
        ours, theirs = socket.socketpair()
        self._born += 1
        worker = self._workers[self._born] = _Worker(self._born)
        await worker.open(ours)
        with theirs:
            socket.send_fds(self._control, [msgspec.msgpack.encode(Fork(worker.number))], [theirs.fileno()])
        self._idle.put_nowait(worker)

    def _heard(self) -> None:
        try:
            data = self._control.recv(65536)
        except (BlockingIOError, ConnectionResetError):
            return  # the latter once, where it died with a message unread; what it said comes next, or its end
        if not data:
            asyncio.get_running_loop().remove_reader(self._control)
            self._host_died()
            return
        message: FromHost = msgspec.msgpack.decode(data, type=FromHost)
        if isinstance(message, Died):
            self._workers.pop(message.worker).ended(message.reason)
            if not self._closing:
                birth = asyncio.get_running_loop().create_task(self._fork())
                self._births.add(birth)
                birth.add_done_callback(self._births.discard)
        elif message.error is not None:
            self._ready.set_exception(EngineUnavailable(message.error))
        elif not self._ready.done():
            self._ready.set_result(None)

    def _host_died(self) -> None:
        with suppress(subprocess.TimeoutExpired):
            self._host.wait(1)
        code = self._host.returncode
        reason = signal.Signals(-code).name if code is not None and code < 0 else f"exit code {code}"
        self._lost = EngineLost(f"the image workers' host process ended ({reason}); its log tells more")
        if not self._ready.done():
            self._ready.set_exception(self._lost)
        for worker in list(self._workers.values()):
            worker.ended(str(self._lost))
            self._idle.put_nowait(worker)  # wakes who waits for one


def _ready(requests: Sequence[Request], extent: Extent | None, done: Done) -> tuple[Request | Failure, ...]:
    """Each request with its tensors, or its failure."""
    return tuple(
        tensors
        if isinstance(tensors, Failure)
        else msgspec.structs.replace(request, extent=extent if tensors else None, tensors=tensors)
        for request, tensors in zip(requests, done.tensors, strict=True)
    )


def _images(sources: Sequence[Source]) -> tuple[Image, ...]:
    return tuple(Image(source.label) for source in sources)
