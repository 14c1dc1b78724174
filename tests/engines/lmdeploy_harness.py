"""The lmdeploy engine in the test's own process, over a core that needs no GPU. Imports LMDeploy only when called."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
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
from .in_process import EngineHarness, draw_image, start_engine

ABORT_LIMIT = 4.0
"""Seconds in which an aborted row must end. One that LMDeploy's own abort does not reach is cancelled after 2."""


def lmdeploy_spec(model: Path | str, *, flags: dict[str, Any] | None = None, **settings: Any) -> EngineSpec:
    """Return a spec of the engine; `flags` are options of LmdeployOptions."""
    options = asdict(LmdeployOptions(**{"backend": "pytorch", **(flags or {})}))
    return EngineSpec("lmdeploy", str(model), **{"dtype": "float16", "flags": options, **settings})


class LmdeployHarness:
    """The started engine, and the core that it ends in."""

    def __init__(self, engine_harness: EngineHarness, core: cpu_core.Core) -> None:
        self.harness, self.core = engine_harness, core
        self.model = engine_harness.engine.model

    def request(self, row: Row, prompt: dict[str, Any] | None = None, **sampling: Any) -> Request:
        """Return the row's request as the runner makes it; `prompt` are options of PromptOptions."""
        settings = SamplingOptions(**{"max_new_tokens": 64, **sampling})
        special = self.harness.preparation_spec.special_tokens
        return Prompter(PromptOptions(**(prompt or {})), settings, special).request(row)

    async def ask(
        self, prompt: Any, images: Sequence[Image.Image] = (), options: dict[str, Any] | None = None, **sampling: Any
    ) -> tuple[Response, list[cpu_core.CoreRequest]]:
        """Ask a single row.

        Args:
            prompt: A prompt, a list of prompts, or a dict of the fields of a Row.
            images: The row's images.
            options: Options of PromptOptions.
            sampling: Options of SamplingOptions.

        Returns:
            The response, and what reached the core for it.
        """
        fields = prompt if isinstance(prompt, dict) else {"prompt": prompt}
        row = Row(0, images=(InlineImage(b"", "drawn"),) * len(images), **fields)
        before = len(self.core.requests)
        [response] = await self.harness.ask((self.request(row, options, **sampling), images))
        return response, self.core.requests[before:]

    async def ask_once(self, *arguments: Any, **settings: Any) -> cpu_core.CoreRequest:
        """Return what reached the core for a row that is answered in one turn."""
        response, requests = await self.ask(*arguments, **settings)
        assert response.failure is None, response.failure
        [request] = requests
        assert response.input_tokens == request.tokens
        return request

    def in_use(self) -> dict[str, Any]:
        """Return what rows hold: handles, sessions, memory for tiles, slots of the preparation, …"""
        return {
            "handles": self.model.sessions.request_handle_pool.num_dispatched,
            "sessions": len(self.model.sessions.sessions),
            "tile bytes": self.model.tile_budget.held,
            "preparing": self.model.preparing,
            "rows": self.harness.engine.rows_in_flight,
            "core": self.core.in_flight,
            "blocks": self.harness.arena.blocks - self.harness.arena.free_blocks,
        }

    @contextmanager
    def restored_behaviour(self) -> Iterator[LmdeployHarness]:
        """Restore the core's behaviour at the end."""
        behaviour = dict(self.core.behaviour)
        yield self
        self.core.behaviour.clear()
        self.core.behaviour.update(behaviour)

    async def idle(self) -> None:
        """Wait until no row holds anything, which must be very soon after its end."""
        end = time.monotonic() + 2
        while any(self.in_use().values()):
            assert time.monotonic() < end, self.in_use()
            await asyncio.sleep(0.01)


@asynccontextmanager
async def start_lmdeploy(
    model: Path | str,
    behaviour: dict[str, Any] | None = None,
    *,
    prepares_images: bool = False,
    megabytes: int = 16,
    **settings: Any,
) -> AsyncIterator[LmdeployHarness]:
    """Start the engine and forget its first request.

    Args:
        model: Directory of the model.
        behaviour: The core's, see `cpu_core.Core`.
        prepares_images: Whether LMDeploy itself prepares images, as in a version that is not supported.
        megabytes: Size of the arena.
        settings: Arguments of `lmdeploy_spec`.
    """
    with pytest.MonkeyPatch.context() as patch:
        series = "0.0." if prepares_images else "0.18."
        patch.setattr("batchvl.engines.lmdeploy.model.SUPPORTED_SERIES", series)
        cores = cpu_core.install(patch.setattr, **(behaviour or {"answer": "digest"}))
        async with start_engine(lmdeploy_spec(model, **settings), megabytes=megabytes) as harness:
            [core] = cores
            core.requests.clear()
            yield LmdeployHarness(harness, core)


class OpenRows:
    """Rows in the engine, each in a task of its own. Images are drawn with the row's number as seed."""

    def __init__(self, engine: LmdeployHarness) -> None:
        self.engine, self.tasks = engine, {}

    async def put(self, number: int, prompt: Any, images: int = 0) -> None:
        """Hand in a row."""
        drawn = [draw_image(60 + number, 40, number) for _ in range(images)]
        row = Row(number, prompt=prompt, images=(InlineImage(b"", "drawn"),) * images)
        request = self.engine.request(row, max_new_tokens=200)
        self.tasks[number] = asyncio.create_task(self.engine.harness.ask((request, drawn)))

    async def response(self, number: int) -> Response:
        """Return a row's response."""
        return (await asyncio.wait_for(asyncio.shield(self.tasks[number]), 30))[0]

    async def abort(self, number: int, within: float = ABORT_LIMIT) -> Response:
        """Abort a row and return its response, which must come within a number of seconds."""
        started = time.monotonic()
        await self.engine.harness.engine.abort(number)
        response = await self.response(number)
        assert time.monotonic() - started < within
        assert (response.failure.code, response.failure.stage) == ("row_timeout", "engine")
        assert response.finish_reason is None
        return response

    async def close(self) -> None:
        """Abort the rows that are left."""
        for number, task in self.tasks.items():
            if not task.done():
                await self.engine.harness.engine.abort(number)
        await asyncio.gather(*self.tasks.values())


async def wait_until(condition: Callable[[], object]) -> None:
    """Wait until a condition holds."""
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end, "the condition never held"
        await asyncio.sleep(0.005)
