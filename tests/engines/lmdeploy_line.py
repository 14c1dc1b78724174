"""The lmdeploy engine in this process, over the core without a GPU. Imports LMDeploy only when called."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from batchvl.config.options import LmdeployOptions, PromptOptions, SamplingOptions
from batchvl.engines.base import EngineSpec
from batchvl.prompts.prompter import Prompter
from batchvl.types import InlineImage, Request, Response, Row

from . import cpu_core
from .in_process import Line, picture, started

SOON = 4.0
"""Seconds; a row that LMDeploy's own abort does not reach is given 2 before it is cancelled."""

def spec(model: Path | str, *, flags: dict[str, Any] | None = None, **settings: Any) -> EngineSpec:
    """What the engine is told; `flags` are of LmdeployOptions."""
    lmdeploy = asdict(LmdeployOptions(**{"backend": "pytorch", **(flags or {})}))
    return EngineSpec("lmdeploy", str(model), **{"dtype": "float16", "flags": lmdeploy, **settings})


class CoreLine:
    """A Line of the engine, and the core that it ends in."""

    def __init__(self, line: Line, core: cpu_core.Core) -> None:
        self.line, self.core = line, core
        self.loaded = line.engine.model

    def request(self, row: Row, prompt: dict[str, Any] | None = None, **sampling: Any) -> Request:
        """The row as the runner asks it."""
        settings = SamplingOptions(**{"max_new_tokens": 64, **sampling})
        return Prompter(PromptOptions(**(prompt or {})), settings, self.line.preparation_spec.special_tokens).request(
            row
        )

    async def ask(
        self, prompt: Any, pictures: Sequence[Image.Image] = (), options: dict[str, Any] | None = None, **sampling: Any
    ) -> tuple[Response, list[cpu_core.Asked]]:
        """One row, alone, and what the core was asked for it. `prompt` is one, or a Row's fields."""
        fields = prompt if isinstance(prompt, dict) else {"prompt": prompt}
        row = Row(0, images=(InlineImage(b"", "drawn"),) * len(pictures), **fields)
        before = len(self.core.asked)
        [response] = await self.line.ask((self.request(row, options, **sampling), pictures))
        return response, self.core.asked[before:]

    async def asked(self, *what: Any, **how: Any) -> cpu_core.Asked:
        """What the core was asked for a row that is answered in one turn."""
        response, found = await self.ask(*what, **how)
        assert response.failure is None, response.failure
        [asked] = found
        assert response.input_tokens == asked.tokens
        return asked

    def left(self) -> dict[str, Any]:
        """What is still held for rows: handles, sessions, bytes of room, turns in preparation, rows."""
        loaded = self.loaded
        return {
            "handles": loaded.sessions.request_handle_pool.num_dispatched,
            "sessions": len(loaded.sessions.sessions),
            "room": loaded.tile_budget.held,
            "preparing": loaded.preparing,
            "rows": self.line.engine.rows_in_flight,
            "core": self.core.inflight,
            "blocks": self.line.arena.blocks - self.line.arena.free_blocks,
        }

    @contextmanager
    def ordered_back(self) -> Iterator[CoreLine]:
        """The line; what is ordered of its core meanwhile is taken back."""
        ordered = dict(self.core.behaviour)
        yield self
        self.core.behaviour.clear()
        self.core.behaviour.update(ordered)

    async def idle(self) -> None:
        """Returns when nothing is held for any row, which is very soon after its end."""
        end = time.monotonic() + 2
        while any(self.left().values()):
            assert time.monotonic() < end, self.left()
            await asyncio.sleep(0.01)


@asynccontextmanager
async def with_core(
    model: Path | str,
    behaviour: dict[str, Any] | None = None,
    *,
    own: bool = False,
    megabytes: int = 16,
    **settings: Any,
) -> AsyncIterator[CoreLine]:
    """The engine, started; what it was asked at its start is forgotten. own: LMDeploy prepares the pictures itself."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("batchvl.engines.lmdeploy.model.SUPPORTED_SERIES", "0.0." if own else "0.18.")
        cores = cpu_core.install(patch.setattr, **(behaviour or {"answer": "digest"}))
        async with started(spec(model, **settings), megabytes=megabytes) as line:
            [core] = cores
            core.asked.clear()
            yield CoreLine(line, core)


class Rows:
    """Rows in the engine, each a task; pictures are drawn by the row's number."""

    def __init__(self, line: CoreLine) -> None:
        self.line, self.answers = line, {}

    async def put(self, number: int, prompt, pictures: int = 0) -> None:
        drawn = [picture(60 + number, 40, number) for _ in range(pictures)]
        row = Row(number, prompt=prompt, images=(InlineImage(b"", "drawn"),) * pictures)
        asked = self.line.request(row, max_new_tokens=200)
        self.answers[number] = asyncio.create_task(self.line.line.ask((asked, drawn)))

    async def __getitem__(self, number: int):
        return (await asyncio.wait_for(asyncio.shield(self.answers[number]), 30))[0]

    async def aborted(self, number: int, within: float = SOON):
        """Aborts a row; its response, which came soon."""
        started = time.monotonic()
        await self.line.line.engine.abort(number)
        response = await self[number]
        assert time.monotonic() - started < within
        assert (response.failure.code, response.failure.stage) == ("row_timeout", "engine")
        assert response.finish_reason is None
        return response

    async def end(self) -> None:
        for number, answer in self.answers.items():
            if not answer.done():
                await self.line.line.engine.abort(number)
        await asyncio.gather(*self.answers.values())


async def until(what) -> None:
    end = time.monotonic() + 20
    while not what():
        assert time.monotonic() < end, "it never came"
        await asyncio.sleep(0.005)
