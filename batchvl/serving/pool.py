"""The replicas of an engine that share a run's rows: one per GPU, one per group of GPUs, or just one.

Rows wait in one queue and go to whichever replica has capacity. A replica whose process dies is restarted while the
others continue. If a replica fails for good, the run continues with the others, and ends with the last one.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import msgspec

from ..config.options import EngineOptions
from ..engines.base import EngineInfo, EngineSpec
from ..errors import BatchvlError, EngineLost, UsageError
from ..hardware.gpus import GpuAssignment
from ..images.preparation import PreparationSpec
from ..ipc.arena import Arena
from ..ipc.spawn import ParentPipe
from ..types import Request, Response
from .client import EngineClient
from .dispatch import Dispatcher
from .exits import EngineExited
from .process import LaunchContext
from .recycle import RecyclePolicy
from .replica import ModelPin, Replica

logger = logging.getLogger(__name__)


class ReplicaPool:
    """An engine with a replica for each GPU assignment. An async context manager.

    Entering finds the model and sets `preparation`; it raises a UsageError or EngineLost if that fails. The model is
    then loaded in the background: `answer` may be called at once, and `started` waits for it.

    Args:
        spec: The engine and its model.
        options: Time and memory limits.
        assignments: The GPUs of each replica.
        arena: Prepared tensors, which the engines read.
        parent_pipe: Ends the processes with the runner.
        environment: Environment variables of the processes.
        log: Log of the first replica's processes. The logs of the others are next to it.
    """

    preparation: PreparationSpec | None

    def __init__(
        self,
        spec: EngineSpec,
        options: EngineOptions,
        assignments: Sequence[GpuAssignment],
        arena: Arena,
        parent_pipe: ParentPipe,
        environment: Mapping[str, str],
        log: Path,
    ) -> None:
        self._pin, self._dispatcher = ModelPin(spec), Dispatcher()
        dispatcher = self._dispatcher
        self.replicas: list[Replica] = []
        for number, assignment in enumerate(assignments):
            name = f"the engine on {assignment}" if len(assignments) > 1 else "the engine"
            own_log = log.with_stem(f"{log.stem}-{assignment.tag}") if number else log
            context = LaunchContext(arena, parent_pipe, {**environment, **assignment.environment}, own_log)
            client = EngineClient(name, options, dispatcher.on_change)
            dispatcher.clients.append(client)
            recycling = RecyclePolicy(options.engine_memory, name, len(assignments))
            replica = Replica(client, context, options, self._pin, recycling, lambda: dispatcher.answers > 0, name)
            self.replicas.append(replica)
        self._tasks: list[asyncio.Task[None]] = []
        self._error: BatchvlError | None = None
        self._killed = False

    async def __aenter__(self) -> ReplicaPool:
        # The first replica resolves the model alone, so that the others find it downloaded.
        self.preparation = await self.replicas[0].resolve()
        loop = asyncio.get_running_loop()
        self._tasks = [loop.create_task(self._run(replica)) for replica in self.replicas]
        return self

    async def __aexit__(self, *exc: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.wait(self._tasks)
        await asyncio.gather(*(replica.close() for replica in self.replicas))
        self._fail_rows(EngineExited("the run ended"))

    async def started(self) -> EngineInfo:
        """Wait until one replica is up. Raises a UsageError or EngineLost if none can be."""
        await self._pin.settled.wait()
        info = self.info
        if self._error is not None or info is None:
            raise self._error or EngineLost("no engine has started")
        return info

    async def answer(self, request: Request) -> Response:
        """Return the engine's response. The request's tensors may be released once this returns or raises.

        Raises:
            EngineExited: The process died with the row in flight.
            EngineLost: No engine will come up any more.
        """
        if self._error is not None:
            raise self._error
        answer = self._dispatcher.submit(request)
        try:
            return await answer
        except asyncio.CancelledError:
            for client in self._dispatcher.clients:
                if request.row in client.in_flight:
                    await client.abandon(request.row)
            raise

    @contextmanager
    def single_replica(self) -> Iterator[None]:
        """Send rows to a single replica inside the `with`: the one that died last.

        Its process is the newest. A row over which it dies again without having answered any is to blame, and the
        other replicas need not die over it first.
        """
        self._dispatcher.only = self._newest()
        try:
            yield
        finally:
            self._dispatcher.only = None

    @property
    def info(self) -> EngineInfo | None:
        """What the first replica that was up reported; None before that."""
        info = self._pin.info
        return info and msgspec.structs.replace(info, replicas=len(self.replicas))

    @property
    def deaths(self) -> int:
        """Number of times that a process died, or refused to restart."""
        return sum(replica.restarts.count for replica in self.replicas)

    @property
    def recycled(self) -> int:
        """Number of times that a process was replaced because its memory had grown."""
        return sum(replica.recycled for replica in self.replicas)

    @property
    def in_flight(self) -> int:
        """Number of rows inside the engines."""
        return sum(len(client.in_flight) for client in self._dispatcher.clients)

    @property
    def answers(self) -> int:
        """Number of rows answered."""
        return self._dispatcher.answers

    @property
    def row_seconds(self) -> float:
        """Seconds that rows were inside the engines, summed over the rows."""
        return sum(client.in_flight.row_seconds for client in self._dispatcher.clients)

    @property
    def seconds(self) -> float:
        """Seconds for which an engine was up, from the first batch to the latest answer: the mean of the replicas."""
        return sum(client.utilization.seconds for client in self._dispatcher.clients) / len(self.replicas)

    @property
    def wait_share(self) -> float:
        """Share of `seconds`, 0 to 1, in which an engine was short of rows."""
        waited = sum(client.utilization.wait_seconds for client in self._dispatcher.clients) / len(self.replicas)
        return min(1.0, waited / self.seconds) if self.seconds else 0.0

    @property
    def idle_since(self) -> float | None:
        """When the engines ran out of rows, on the monotonic clock; None while one has some, or none is up."""
        if self.in_flight:
            return None
        idle = [client.idle_since for client in self._dispatcher.clients if client.idle_since is not None]
        return max(idle, default=None)

    @property
    def prepares_text(self) -> bool:
        """Whether rows without images are prepared by the image workers, too."""
        return self.preparation is not None and self.preparation.prepares_text

    def kill(self, reason: str) -> None:
        """Kill all processes now; no others follow. Their rows fail with `EngineExited`."""
        self._killed = True
        for replica in self.replicas:
            replica.kill(reason)

    def holds(self, row: int) -> bool:
        """Return whether the row is inside an engine, rather than pending."""
        return any(row in client.in_flight for client in self._dispatcher.clients)

    def note_progress(self) -> None:
        """Note progress that the replicas do not see: the rows of a death were split into smaller groups."""
        for replica in self.replicas:
            replica.restarts.note_progress()

    def _newest(self) -> EngineClient | None:
        """Return the client of the replica with the newest process; None if no replica is left."""
        living = [replica for replica in self.replicas if not replica.is_over]
        if not living:
            return None
        return max(living, key=lambda replica: replica.last_exit.time if replica.last_exit else 0.0).client

    async def _run(self, replica: Replica) -> None:
        """Run a replica to its end, and decide what its end means for the others."""
        await replica.run()
        if self._error is not None:
            return
        left = sum(not each.is_over for each in self.replicas)
        exited = replica.last_exit or EngineExited(str(replica.error))
        if left and (self._killed or self.answers or not exited.in_flight):
            self._continue_without(replica, exited, left)
        else:  # the last one, or one that died over rows before any answer: the others would die over them as well
            self._end(replica, exited)

    def _continue_without(self, replica: Replica, exited: EngineExited, left: int) -> None:
        if not self._killed:
            reason = str(replica.error).partition("\n")[0]
            logger.warning(f"{replica.name} failed; continuing with {left} of {len(self.replicas)} replicas: {reason}")
        replica.client.in_flight.fail(exited)
        if self._dispatcher.only is replica.client:
            self._dispatcher.only = self._newest()
        self._dispatcher.on_change()

    def _end(self, replica: Replica, exited: EngineExited) -> None:
        """Fail all rows: no engine will answer them."""
        refusals = [each.error for each in self.replicas if isinstance(each.error, UsageError)]
        if self._killed or replica.error is None:
            self._error = EngineLost(str(exited))
        elif refusals and self._pin.info is None:  # no replica has been up
            self._error = refusals[0]
        else:
            self._error = replica.error
        self._fail_rows(exited if self._killed else self._error)
        self._pin.settled.set()

    def _fail_rows(self, error: Exception) -> None:
        """Fail the rows in flight and the pending ones."""
        for client in self._dispatcher.clients:
            client.in_flight.fail(error)
        self._dispatcher.fail(error)
