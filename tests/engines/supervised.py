"""A supervised FakeEngine, and the processes that are its own."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import psutil

from batchvl.engines.guardian import NAME
from batchvl.engines.place import Place
from batchvl.engines.process import EngineProcess
from batchvl.engines.protocol import EngineSpec
from batchvl.engines.replicas import Replicas
from batchvl.images.arena import Arena
from batchvl.lifeline import Lifeline
from batchvl.options import EngineOptions
from batchvl.request import Message, Part, Request, Sampling
from tests.run.running import alive


def request(row: int, *followups: str) -> Request:
    messages = [Message("user", (Part(f"row {row}"),)), *(Message("user", (Part(text),)) for text in followups)]
    return Request(row, (messages[0],), tuple(messages[1:]), Sampling())


@asynccontextmanager
async def supervised(
    log: Path,
    said: list[str] | None = None,
    *,
    batch_size: int = 4,
    hang_timeout: float = 300.0,
    row_timeout: float = 300.0,
    engine_memory: int | None = None,
    replicas: int = 1,
    **fake: Any,
) -> AsyncIterator[Replicas]:
    """Engines that behave as `fake` says; what they tell people is appended to `said`."""
    arena, lifeline = Arena(8, 4096), Lifeline()
    spec = EngineSpec("fake", batch_size=batch_size, options={"pictures": False, **fake})
    options = EngineOptions(hang_timeout=hang_timeout, row_timeout=row_timeout, engine_memory=engine_memory)
    say = said.append if said is not None else lambda line: None
    try:
        places = [Place((number,)) for number in range(replicas)]
        async with Replicas(spec, options, places, arena, lifeline, dict(os.environ), log, say) as engine:
            yield engine
    finally:
        lifeline.close()
        arena.close()


def process_of(engine: Replicas, replica: int = 0) -> EngineProcess:
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
