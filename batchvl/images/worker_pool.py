"""The pool of image workers, seen from the runner.

Image workers are processes that decode images and make the engine's inputs of them, one job at a time. They are forked
from a host process (`forkserver.py`), which loads the engine's preparation once for all of them. `worker.py` is what
they do, and `messages.py` how runner, host and workers talk.
"""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import IO, Any

import msgspec

from ..config.units import enc_hook
from ..errors import EngineLost, EngineUnavailable, PrepareCrashed, PrepareTimeout, RowError
from ..ipc.arena import Arena
from ..ipc.channel import AsyncConnection
from ..ipc.spawn import ParentPipe, exit_reason, sanitized_env, spawn
from ..types import Extent, Failure, Image, Request, Struct
from .messages import (
    ForkWorker,
    FromHost,
    FromWorker,
    HostReady,
    HostSetup,
    JobDone,
    JobFailed,
    KillWorker,
    PrepareJob,
    Source,
    SpaceGranted,
    SpaceNeeded,
    ToWorker,
    UnexpectedMessage,
    WorkerExited,
    WorkerLimits,
)
from .preparation import PreparationSpec

_MAX_DEATHS = 2
"""Workers that may die over a job before it fails."""


class Prepared(Struct, frozen=True):
    """Rows that are ready for the engine."""

    requests: tuple[Request | Failure, ...]
    """In the order given: each request with its tensors, or why there are none."""
    extent: Extent | None
    """The tensors of all requests. Whoever asked for them releases it."""
    images: tuple[Image, ...]
    seconds: float
    """Working time of the worker."""


class RowFailed(Exception):
    """A row failed in a worker. `images` is what is known of its images."""

    def __init__(self, failure: Failure, images: tuple[Image, ...] = ()) -> None:
        super().__init__(failure.message)
        self.failure, self.images = failure, images


class _WorkerDied(Exception):
    """A worker's process ended. The message is the reason."""


class _WorkerHandle:
    """The runner's end of one worker, which answers each message with one message."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.died: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        """Resolves with the reason once the process is reaped."""
        self._deadline = 0.0
        self._connection: AsyncConnection[FromWorker] | None = None
        self._reply: asyncio.Future[FromWorker] | None = None

    async def open(self, sock: socket.socket) -> None:
        self._connection = await AsyncConnection.open(sock, FromWorker, self._received, lambda: None)

    async def ask(self, message: ToWorker, seconds: float) -> FromWorker:
        """Send a message and return the reply. Raises _WorkerDied, or TimeoutError after `seconds`."""
        if self._connection is None:
            raise RuntimeError("the worker's connection is not open")
        if self.died.done():
            raise _WorkerDied(self.died.result())
        self._reply = asyncio.get_running_loop().create_future()
        self._deadline = time.monotonic() + seconds
        self._connection.send(message)
        return await self._reply

    def check_deadline(self, now: float) -> None:
        """Make `ask` raise TimeoutError if its time is over. The pool polls: a timer for each job would cost more."""
        if self._reply is not None and not self._reply.done() and now > self._deadline:
            self._reply.set_exception(TimeoutError())

    def exited(self, reason: str) -> None:
        """Record that the process is reaped, so that nobody writes to its extents any more."""
        if not self.died.done():
            self.died.set_result(reason)
        if self._reply is not None and not self._reply.done():
            self._reply.set_exception(_WorkerDied(reason))
        if self._connection is not None:
            self._connection.close()

    def _received(self, message: FromWorker) -> None:
        if self._reply is not None and not self._reply.done():
            self._reply.set_result(message)


class _Space:
    """The extent for the tensors of one job, held until it is released or detached."""

    def __init__(self, arena: Arena) -> None:
        self.extent: Extent | None = None
        self._arena = arena

    def try_reserve(self, size: int) -> None:
        """Reserve space if there is some."""
        extents = self._arena.reserve_now([size])
        self.extent = extents[0] if extents else None

    async def reserve(self, size: int) -> Extent:
        """Wait for space, in exchange for what is held: two jobs that wait while they hold some could wait forever.

        Raises TooLarge.
        """
        self.release()
        [self.extent] = await self._arena.reserve([size])
        return self.extent

    def detach(self, size: int) -> Extent | None:
        """Return the first `size` bytes, which now belong to the caller, and release the rest."""
        if not size:
            return None
        if self.extent is None:
            raise UnexpectedMessage(f"a worker wrote {size} bytes without space for them")
        extent, self.extent = self.extent, None
        return self._arena.shrink(extent, size)

    def release(self) -> None:
        if self.extent is not None:
            extent, self.extent = self.extent, None
            self._arena.release(extent)


class ImageWorkers:
    """A pool of image workers for one run. An async context manager.

    Call `load` once: jobs wait until the preparation is loaded.

    Args:
        count: Number of workers.
        limits: What workers may read, and how much.
        encoded: Arena of encoded images, which workers only read.
        tensors: Arena of prepared tensors.
        log: File for the output of host and workers.
        preload: Module for the host to import before `load`, if it is known which one the preparation will be in.
        environment: Environment of the runner; workers see only its harmless variables. Defaults to `os.environ`.
    """

    def __init__(
        self,
        count: int,
        limits: WorkerLimits,
        encoded: Arena,
        tensors: Arena,
        log: IO[bytes],
        *,
        preload: str | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self._count, self._limits, self._encoded, self._tensors = count, limits, encoded, tensors
        self._log, self._preload = log, preload
        self._environment = os.environ if environment is None else environment
        self._timeout = float(limits.image.prepare_timeout)
        self._loop = asyncio.get_running_loop()
        self._ready: asyncio.Future[None] = self._loop.create_future()
        self._workers: dict[int, _WorkerHandle] = {}
        self._idle: asyncio.LifoQueue[_WorkerHandle] = asyncio.LifoQueue()
        self.busy_seconds = 0.0
        """Working time, summed over the workers."""
        self._typical_size = 0
        """Bytes that the tensors of a job usually need: the most of any job, which decays with each smaller one."""
        self._next_id = 1
        self._lost: EngineLost | None = None
        self._closing = False
        self._forking: set[asyncio.Task[None]] = set()
        self._deadline_task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> ImageWorkers:
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._control.setblocking(False)
        self._parent_pipe = ParentPipe()
        with theirs:
            self._host = spawn(
                "batchvl.images.forkserver",
                [str(theirs.fileno()), str(self._parent_pipe.fd), str(os.getpid()), self._preload or ""],
                [theirs.fileno(), self._parent_pipe.fd, self._encoded.fd, self._tensors.fd],
                sanitized_env(self._environment),
                self._log,
            )
        self._loop.add_reader(self._control, self._receive_from_host)
        self._deadline_task = self._loop.create_task(self._check_deadlines())
        return self

    async def load(self, preparation: PreparationSpec | None) -> None:
        """Make the host load the preparation, if there is one, and fork the workers. `prepare` raises what fails."""
        if preparation is not None:  # special tokens are of no use to the host, and some models have thousands
            preparation = msgspec.structs.replace(preparation, special_tokens=())
        setup = HostSetup(
            preparation, self._limits, (self._encoded.fd, self._encoded.size), (self._tensors.fd, self._tensors.size)
        )
        # The host reads only once it has imported everything, so all messages must fit. If they do not, `send` raises.
        self._control.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2**20 + 2048 * self._count)
        with suppress(BrokenPipeError, ConnectionResetError):  # `_receive_from_host` reports a host that is gone
            self._control.send(msgspec.msgpack.encode(setup, enc_hook=enc_hook))
            for _ in range(self._count):
                await self._fork()

    async def __aexit__(self, *exc: object) -> None:
        self._closing = True
        if self._deadline_task is not None:
            self._deadline_task.cancel()
        self._loop.remove_reader(self._control)
        with suppress(ProcessLookupError):
            self._host.kill()  # the kernel kills its workers with it
        await asyncio.to_thread(self._host.wait)
        self._parent_pipe.close()
        self._control.close()
        for worker in list(self._workers.values()):
            worker.exited("the run ended")
        if not self._ready.done():
            self._ready.cancel()
        elif not self._ready.cancelled():
            self._ready.exception()  # mark as retrieved: there may have been no job to raise it

    async def prepare(self, requests: Sequence[Request], sources: Sequence[Source]) -> Prepared:
        """Prepare rows about the same images. The caller releases the result's extent.

        Raises:
            RowFailed: All of the rows failed.
            EngineUnavailable: The engine's preparation cannot be loaded.
            EngineLost: The host process ended.
        """
        if not self._ready.done():
            await asyncio.shield(self._ready)
        elif (error := self._ready.exception()) is not None:
            raise error
        job = PrepareJob(tuple(requests), tuple(sources))
        reason = ""
        for _ in range(_MAX_DEATHS):
            worker = await self._next_idle()
            try:
                return await self._run(worker, job)
            except _WorkerDied as died:
                if self._lost is not None:
                    raise self._lost from None  # no row is to blame for the host's end
                reason = str(died)
            finally:
                if not worker.died.done():
                    self._idle.put_nowait(worker)
        raise _row_failed(PrepareCrashed(f"the image worker died twice over this row: {reason}"), job)

    async def _next_idle(self) -> _WorkerHandle:
        while True:
            worker = await self._idle.get()
            if self._lost is not None:
                self._idle.put_nowait(worker)  # wakes the next job that waits
                raise self._lost
            if not worker.died.done():
                return worker

    async def _run(self, worker: _WorkerHandle, job: PrepareJob) -> Prepared:
        """Have a worker do a job. Whatever keeps the worker from finishing it ends the worker."""
        space = _Space(self._tensors)
        try:
            reply = await self._converse(worker, job, space)
            if isinstance(reply, JobFailed):
                raise RowFailed(reply.failure, reply.images)
            self.busy_seconds += reply.seconds
            self._typical_size = max(reply.size, self._typical_size - self._typical_size // 256)
            extent = space.detach(reply.size)
            return Prepared(_with_tensors(job.requests, extent, reply), extent, reply.images, reply.seconds)
        except TimeoutError:
            await self._kill(worker)
            raise _row_failed(PrepareTimeout(f"preparing took longer than {self._timeout:g} s"), job) from None
        except RowError as error:
            await self._kill(worker)  # it waits for space that it will never get
            raise _row_failed(error, job) from None
        except asyncio.CancelledError:
            await self._kill(worker)  # it may still be writing
            raise
        finally:
            space.release()

    async def _converse(self, worker: _WorkerHandle, job: PrepareJob, space: _Space) -> JobDone | JobFailed:
        """Send a job, grant the space that the worker needs for it, and return how it ended.

        Waiting for space does not count towards the timeout. Raises TimeoutError, TooLarge or _WorkerDied.
        """
        if self._typical_size:
            space.try_reserve(self._typical_size)
        started = time.monotonic()
        reply = await worker.ask(PrepareJob(job.requests, job.sources, space.extent), self._timeout)
        if isinstance(reply, SpaceNeeded):
            seconds_left = max(1.0, self._timeout - (time.monotonic() - started))
            reply = await worker.ask(SpaceGranted(await space.reserve(reply.size)), seconds_left)
            if isinstance(reply, SpaceNeeded):
                raise UnexpectedMessage(f"an image worker needs space twice for one job: {reply}")
        return reply

    async def _kill(self, worker: _WorkerHandle) -> None:
        """Kill a worker and wait until it is reaped. Another one replaces it."""
        if not worker.died.done():
            with suppress(OSError):
                self._control.send(msgspec.msgpack.encode(KillWorker(worker.number)))
            await asyncio.shield(worker.died)

    async def _check_deadlines(self) -> None:
        while True:
            await asyncio.sleep(min(1.0, self._timeout / 4))
            now = time.monotonic()
            for worker in self._workers.values():
                worker.check_deadline(now)

    async def _fork(self) -> None:
        ours, theirs = socket.socketpair()
        worker = self._workers[self._next_id] = _WorkerHandle(self._next_id)
        self._next_id += 1
        await worker.open(ours)
        with theirs:
            message = msgspec.msgpack.encode(ForkWorker(worker.number))
            socket.send_fds(self._control, [message], [theirs.fileno()])
        self._idle.put_nowait(worker)

    def _receive_from_host(self) -> None:
        """Take all messages that are there: uvloop does not call this again after a reset."""
        while True:
            try:
                data = self._control.recv(65536)
            except BlockingIOError:
                return
            except ConnectionResetError:
                continue  # it comes first if the host died with a message unread; its own messages and its end follow
            if not data:
                self._loop.remove_reader(self._control)
                self._host_ended()
                return
            message: Any = msgspec.msgpack.decode(data, type=FromHost)
            if isinstance(message, HostReady):
                self._host_ready(message)
            elif isinstance(message, WorkerExited):
                self._worker_exited(message)

    def _host_ready(self, message: HostReady) -> None:
        if self._ready.done():
            return
        if message.error is not None:
            self._ready.set_exception(EngineUnavailable(message.error))
        else:
            self._ready.set_result(None)

    def _worker_exited(self, message: WorkerExited) -> None:
        self._workers.pop(message.worker).exited(message.reason)
        if not self._closing:
            forking = self._loop.create_task(self._fork())
            self._forking.add(forking)
            forking.add_done_callback(self._forking.discard)

    def _host_ended(self) -> None:
        with suppress(subprocess.TimeoutExpired):
            self._host.wait(1)
        reason = exit_reason(self._host.returncode)
        self._lost = EngineLost(f"the host process of the image workers ended ({reason}); see its log")
        if not self._ready.done():
            self._ready.set_exception(self._lost)
        for worker in list(self._workers.values()):
            worker.exited(str(self._lost))
            self._idle.put_nowait(worker)  # wakes a job that waits for a worker


def _with_tensors(requests: Sequence[Request], extent: Extent | None, reply: JobDone) -> tuple[Request | Failure, ...]:
    """Return each request with its tensors, or its failure."""
    return tuple(
        tensors
        if isinstance(tensors, Failure)
        else msgspec.structs.replace(request, extent=extent if tensors else None, tensors=tensors)
        for request, tensors in zip(requests, reply.tensors, strict=True)
    )


def _row_failed(error: RowError, job: PrepareJob) -> RowFailed:
    return RowFailed(Failure.of(error), tuple(Image(source.label) for source in job.sources))
