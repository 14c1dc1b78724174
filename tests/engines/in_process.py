"""An engine in the test's own process, with its preparation in place of image workers and an arena between them."""

from __future__ import annotations

import asyncio
import importlib
import os
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import numpy
from PIL import Image

from batchvl.engines.base import Engine, EngineInfo, EngineSpec
from batchvl.engines.registry import ENGINE_TYPES
from batchvl.images.preparation import Preparation, PreparationSpec
from batchvl.ipc.arena import Arena
from batchvl.types import ContentPart, Extent, Message, Request, Response, Sampling, Tensor

Question = tuple[Request, Sequence[Image.Image]]
"""A request and its images."""


def draw_image(width: int, height: int, seed: int = 0) -> Image.Image:
    """Return a coarse random pattern, which unlike noise survives resizing."""
    cells = numpy.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=numpy.uint8)
    return Image.fromarray(cells).resize((width, height), Image.Resampling.NEAREST)


def user_message(text: str, *images: int) -> Message:
    """Return a message with images, by their number in the row, and a text behind them."""
    return Message("user", (*(ContentPart(image=number) for number in images), ContentPart(text)))


def make_request(row: int, *turns: Message, **sampling: object) -> Request:
    """Return a request of one or more turns."""
    return Request(row, (turns[0],), turns[1:], Sampling(**{"max_new_tokens": 12, **sampling}))


class EngineHarness:
    """A started engine, and what prepares its requests."""

    def __init__(self, engine: Engine, preparation_spec: PreparationSpec, info: EngineInfo, arena: Arena) -> None:
        self.engine, self.preparation_spec, self.info, self.arena = engine, preparation_spec, info, arena
        self.preparation = _load(preparation_spec)

    async def infer(self, questions: Sequence[Question]) -> AsyncIterator[Response]:
        """Yield responses in order of completion, wiping each row's part of the arena before its response."""
        requests = [await self.prepare(*question) for question in questions]
        extents = {request.row: request.extent for request in requests}
        async for response in self.engine.infer(requests):
            if (extent := extents[response.row]) is not None:
                self.arena.at(extent)[:] = b"\xff" * extent.length
                self.arena.release(extent)
            yield response

    async def ask(self, *questions: Question) -> list[Response]:
        """Return the responses to one batch, in the order of the questions."""
        responses = {response.row: response async for response in self.infer(questions)}
        assert len(responses) == len(questions)
        return [responses[request.row] for request, _ in questions]

    async def ask_each(self, *questions: Question) -> list[Response]:
        """Return the responses to batches of one question each."""
        return [(await self.ask(question))[0] for question in questions]

    async def prepare(self, request: Request, images: Sequence[Image.Image]) -> Request:
        """Return the request with its arrays in the arena."""
        if not images and not self.preparation_spec.prepares_text:
            return request
        arrays, tensors, offset = self.preparation.prepare(request, images), [], 0
        for key, array in arrays.items():
            name, _, dtype = key.partition(":")
            tensors.append(Tensor(name, dtype or array.dtype.name, array.shape, offset))
            offset += -(-array.nbytes // 64) * 64
        [extent] = await self.arena.reserve([offset])
        for array, tensor in zip(arrays.values(), tensors, strict=True):
            self.arena.at(extent)[tensor.offset : tensor.offset + array.nbytes] = memoryview(array).cast("B")
        extent = Extent(extent.start, offset)
        return Request(request.row, request.messages, request.followups, request.sampling, extent, tuple(tensors))


def _load(spec: PreparationSpec) -> Preparation:
    """Return the preparation as image workers load it."""
    module, _, name = spec.factory.partition(":")
    return getattr(importlib.import_module(module), name)(**spec.options)


@asynccontextmanager
async def start_engine(spec: EngineSpec, *, megabytes: int = 16) -> AsyncIterator[EngineHarness]:
    """Start an engine, and close it at the end."""
    arena = Arena(megabytes * 16)
    engine = ENGINE_TYPES[spec.engine].create(spec, arena)
    try:
        preparation = await engine.resolve()
        assert preparation is not None
        yield EngineHarness(engine, preparation, await engine.start(), arena)
    finally:
        await asyncio.wait_for(engine.close(), 30)
        arena.close()


@asynccontextmanager
async def start_transformers(model: Path, *, megabytes: int = 16, **spec: object) -> AsyncIterator[EngineHarness]:
    """Start the transformers engine with a model in float32.

    It runs in one thread on a CPU, unless BATCHVL_TEST_DEVICE names another device.
    """
    values = {
        "device": os.environ.get("BATCHVL_TEST_DEVICE", "cpu"),
        "dtype": "float32",
        "options": {"threads": 1},
        **spec,
    }
    async with start_engine(EngineSpec("transformers", str(model), **values), megabytes=megabytes) as harness:
        yield harness
