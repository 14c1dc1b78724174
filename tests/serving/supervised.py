"""A supervised FakeEngine, and the processes that are its own."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
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
from batchvl.types import ContentPart, Message, Request, Sampling
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
    arena, lifeline = Arena(8, 4096), ParentPipe()
    spec = EngineSpec("fake", batch_size=batch_size, options={"pictures": False, **fake})
    options = EngineOptions(hang_timeout=hang_timeout, row_timeout=row_timeout, engine_memory=engine_memory)
    try:
        places = [GpuAssignment((number,)) for number in range(replicas)]
        async with ReplicaPool(spec, options, places, arena, lifeline, dict(os.environ), log) as engine:
            yield engine
    finally:
        lifeline.close()
        arena.close()


def process_of(engine: ReplicaPool, replica: int = 0) -> EngineProcess:
    """The process that a replica has at present."""
    found = engine._replicas[replica]._process
    assert found is not None
    return found


def group(leader: int) -> list[psutil.Process]:
    """The processes of a group that live; the guardian of an engine's comes last."""
    found = []
    for process in alive(psutil.process_iter()):
        try:
            if os.getpgid(process.pid) == leader:
                found.append(process)
        except ProcessLookupError:
            pass
    return sorted(found, key=is_guardian)


def is_guardian(process: psutil.Process) -> bool:
    return Path(f"/proc/{process.pid}/comm").read_text().strip() == NAME
