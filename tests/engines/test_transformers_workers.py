"""The transformers engine with requests that real image workers, in other processes, have prepared."""

from __future__ import annotations

import asyncio
import io
import os
from pathlib import Path

import pytest

from batchvl.config.options import ImageOptions
from batchvl.engines.base import EngineSpec
from batchvl.engines.transformers import TransformersEngine
from batchvl.images.messages import Source, WorkerLimits
from batchvl.images.worker_pool import ImageWorkers
from batchvl.ipc.arena import Arena
from tests.engines.in_process import draw_image, make_request, start_transformers, user_message
from tests.tiny_models import FAMILIES

SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("internvl", "qwen2_5_vl")]


@pytest.fixture
def log(tmp_path):
    with open(tmp_path / "log", "wb") as file:
        yield file


# One family, whose arrays have three data types, covers the path. A fork server imports transformers for seconds.
@pytest.mark.parametrize("name", ["smolvlm", *SLOW])
async def test_workers_prepare_what_the_engine_reads(tmp_path, log, name):
    model = FAMILIES[name](tmp_path / "model")
    images = [draw_image(90, 40, seed) for seed in range(3)]
    requests = [make_request(row, user_message("hello", 0), user_message("and now?")) for row in range(3)] + [
        make_request(3, user_message("no image"))
    ]
    async with start_transformers(model) as started:
        expected = await started.ask(*((req, images[req.row : req.row + 1]) for req in requests))

    encoded, prepared = Arena(8, 4096), Arena(64)
    spec = EngineSpec("transformers", str(model), device="cpu", dtype="float32", options={"threads": 1})
    engine = TransformersEngine(spec, prepared)
    preparation = await engine.resolve()
    path = os.pathsep.join((str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")))
    limits = WorkerLimits(ImageOptions(), 1 << 20, (str(tmp_path),))
    environment = {**os.environ, "PYTHONPATH": path}
    async with ImageWorkers(2, limits, encoded, prepared, log, environment=environment) as workers:
        await workers.load(preparation)
        sources = []
        for image in images:
            data = io.BytesIO()
            image.save(data, "PNG")
            [extent] = await encoded.reserve([len(data.getvalue())])
            encoded.at(extent)[:] = data.getvalue()
            sources.append([Source("image", extent=extent)])
        ready = await asyncio.gather(
            *(workers.prepare([req], files) for req, files in zip(requests, [*sources, []], strict=True))
        )
    await engine.start()
    responses = {response.row: response async for response in engine.infer([done.requests[0] for done in ready])}
    await engine.close()

    assert [responses[row] for row in range(4)] == expected
