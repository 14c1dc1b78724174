"""An engine in this process, with its Preparation in place of image workers and an arena between."""

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


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """Coarse random patterns: unlike noise they survive being scaled."""
    cells = numpy.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=numpy.uint8)
    return Image.fromarray(cells).resize((width, height), Image.Resampling.NEAREST)


def ask(text: str, *images: int) -> Message:
    return Message("user", (*(ContentPart(image=number) for number in images), ContentPart(text)))


def request(row: int, *turns: Message, **sampling: object) -> Request:
    return Request(row, (turns[0],), turns[1:], Sampling(**{"max_new_tokens": 12, **sampling}))


Question = tuple[Request, Sequence[Image.Image]]


class Line:
    """An engine that is started, and what leads to it."""

    def __init__(self, engine: Engine, prepared_by: PreparationSpec, info: EngineInfo, arena: Arena):
        self.engine, self.preparation_spec, self.info, self.arena = engine, prepared_by, info, arena
        self.preparation = _made(prepared_by)

    async def infer(self, questions: Sequence[Question]) -> AsyncIterator[Response]:
        """Responses in order of completion; each row's part of the arena is wiped the moment its response is there."""
        requests = [await self.prepared(*question) for question in questions]
        extents = {request.row: request.extent for request in requests}
        async for response in self.engine.infer(requests):
            if (extent := extents[response.row]) is not None:
                self.arena.at(extent)[:] = b"\xff" * extent.length
                self.arena.release(extent)
            yield response

    async def ask(self, *questions: Question) -> list[Response]:
        """Responses in the order of the questions."""
        found = {response.row: response async for response in self.infer(questions)}
        assert len(found) == len(questions)
        return [found[request.row] for request, _ in questions]

    async def ask_each(self, *questions: Question) -> list[Response]:
        """The same, every question alone."""
        return [(await self.ask(question))[0] for question in questions]

    async def prepared(self, request: Request, pictures: Sequence[Image.Image]) -> Request:
        if not pictures and not self.preparation_spec.prepares_text:
            return request
        arrays, tensors, at = self.preparation.prepare(request, pictures), [], 0
        for key, array in arrays.items():
            name, _, dtype = key.partition(":")
            tensors.append(Tensor(name, dtype or array.dtype.name, array.shape, at))
            at += -(-array.nbytes // 64) * 64
        [extent] = await self.arena.reserve([at])
        for array, tensor in zip(arrays.values(), tensors, strict=True):
            self.arena.at(extent)[tensor.offset : tensor.offset + array.nbytes] = memoryview(array).cast("B")
        return Request(
            request.row, request.messages, request.followups, request.sampling, Extent(extent.start, at), tuple(tensors)
        )


def _made(spec: PreparationSpec) -> Preparation:
    """As image workers make it."""
    module, _, name = spec.factory.partition(":")
    return getattr(importlib.import_module(module), name)(**spec.options)


@asynccontextmanager
async def started(spec: EngineSpec, *, megabytes: int = 16) -> AsyncIterator[Line]:
    """A Line for an engine, which is closed at the end."""
    arena = Arena(megabytes * 16)
    engine = ENGINE_TYPES[spec.engine].create(spec, arena)
    try:
        preparation = await engine.resolve()
        assert preparation is not None
        yield Line(engine, preparation, await engine.start(), arena)
    finally:
        await asyncio.wait_for(engine.close(), 30)
        arena.close()


@asynccontextmanager
async def line(model: Path, *, megabytes: int = 16, **spec: object) -> AsyncIterator[Line]:
    """The engine transformers with a model in float32, on a CPU with one thread unless BATCHVL_TEST_DEVICE names
    another device.
    """
    wanted = {
        "device": os.environ.get("BATCHVL_TEST_DEVICE", "cpu"),
        "dtype": "float32",
        "options": {"threads": 1},
        **spec,
    }
    async with started(EngineSpec("transformers", str(model), **wanted), megabytes=megabytes) as found:
        yield found
