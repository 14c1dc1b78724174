"""Replicas of the fake engine in real processes, for tests."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import psutil

from batchvl.config.options import EngineOptions
from batchvl.engines.base import EngineSpec
from batchvl.hardware.gpus import GpuAssignment
from batchvl.ipc.arena import Arena
from batchvl.ipc.spawn import ParentPipe
from batchvl.ipc.watchdog import NAME
from batchvl.serving.pool import ReplicaPool
from batchvl.serving.process import EngineProcess
from batchvl.serving.replica import Status
from batchvl.types import ContentPart, Message, Request, Response, Sampling
from tests.runner.running import alive


def request(row: int, *followups: str) -> Request:
    messages = [
        Message("user", (ContentPart(f"row {row}"),)),
        *(Message("user", (ContentPart(text),)) for text in followups),
    ]
    return Request(row, (messages[0],), tuple(messages[1:]), Sampling())


@asynccontextmanager
async def supervised(
    log: Path,
    *,
    batch_size: int = 4,
    hang_timeout: float = 300.0,
    row_timeout: float = 300.0,
    engine_memory: int | None = None,
    replicas: int = 1,
    **fake: Any,
) -> AsyncIterator[ReplicaPool]:
    """Start replicas of the fake engine; `fake` are its options."""
    arena, parent_pipe = Arena(8, 4096), ParentPipe()
    spec = EngineSpec("fake", batch_size=batch_size, options={"images": False, **fake})
    options = EngineOptions(hang_timeout=hang_timeout, row_timeout=row_timeout, engine_memory=engine_memory)
    try:
        assignments = [GpuAssignment((number,)) for number in range(replicas)]
        async with ReplicaPool(spec, options, assignments, arena, parent_pipe, dict(os.environ), log) as engine:
            yield engine
    finally:
        parent_pipe.close()
        arena.close()


async def ask(engine: ReplicaPool, *rows: int) -> list[Response | BaseException]:
    """Submit rows together. Return their responses, or what was raised instead."""
    return await asyncio.gather(*(engine.answer(request(row)) for row in rows), return_exceptions=True)


async def eventually(condition: Callable[[], object]) -> None:
    """Wait until a condition holds, or the test's time limit ends it."""
    while not condition():
        await asyncio.sleep(0.005)


def is_up(engine: ReplicaPool, replica: int = 0) -> bool:
    return engine.replicas[replica].status is Status.UP


def process_of(engine: ReplicaPool, replica: int = 0) -> EngineProcess:
    """Return a replica's current process."""
    process = engine.replicas[replica].process
    assert process is not None
    return process


def group(leader: int) -> list[psutil.Process]:
    """Return the living processes of a process group; the engine's watchdog comes last."""
    members = []
    for process in alive(psutil.process_iter()):
        try:
            if os.getpgid(process.pid) == leader:
                members.append(process)
        except ProcessLookupError:
            pass
    return sorted(members, key=is_guardian)


def is_guardian(process: psutil.Process) -> bool:
    return Path(f"/proc/{process.pid}/comm").read_text().strip() == NAME
