"""Image workers as real processes: correct images, deaths, timeouts, limits, secrets, and no process left over."""

import asyncio
import io
import os
import random
from contextlib import asynccontextmanager
from pathlib import Path

import psutil
import pytest
from PIL import Image

from batchvl.config.options import ImageOptions
from batchvl.errors import EngineLost, EngineUnavailable
from batchvl.images.messages import Source, WorkerLimits
from batchvl.images.preparation import PreparationSpec
from batchvl.images.worker_pool import ImageWorkers, RowFailed
from batchvl.ipc.arena import Arena
from batchvl.types import ContentPart, Failure, FileImage, Message, Request
from tests.timing import scaled

BLOCK = 4096
MISBEHAVING = PreparationSpec("tests.images.misbehaving:Misbehaving")


def request(row: int, text: str = "") -> Request:
    return Request(row, (Message("user", (ContentPart(text),)),))


def png(color, size=(8, 8)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, color).save(file, "PNG")
    return file.getvalue()


class Pool:
    """A running pool, and the arenas it works on."""

    def __init__(self, workers, encoded, prepared):
        self.workers, self.encoded, self.prepared = workers, encoded, prepared

    async def run(self, row, text="", colors=()):
        """Prepare one row. Return its tensors by name, and what the pool returned."""
        [tensors], prepared = await self.run_all([request(row, text)], [png(color) for color in colors])
        if isinstance(tensors, Failure):
            raise RowFailed(tensors, prepared.images)
        return tensors, prepared

    async def run_all(self, requests, files):
        """Prepare rows about the same images. Return the tensors or the failure of each, and what the pool returned."""
        extents = await self.encoded.reserve([len(data) for data in files])
        for extent, data in zip(extents, files, strict=True):
            self.encoded.at(extent)[:] = data
        try:
            sources = [Source(f"image {i}", extent=extent, is_copied=True) for i, extent in enumerate(extents)]
            prepared = await self.workers.prepare(requests, sources)
        finally:
            self.encoded.release(*extents)
        if prepared.extent is None:
            return list(prepared.requests), prepared
        view = self.prepared.at(prepared.extent)
        tensors = [
            outcome
            if isinstance(outcome, Failure)
            else {t.name: bytes(view[t.offset : t.offset + t.shape[0]]) for t in outcome.tensors}
            for outcome in prepared.requests
        ]
        self.prepared.release(prepared.extent)
        return tensors, prepared


@pytest.fixture
def pool(tmp_path):
    @asynccontextmanager
    async def start(*, workers=2, preparation=MISBEHAVING, environment=None, **options):
        encoded, prepared = Arena(8, BLOCK), Arena(8, BLOCK)
        limits = WorkerLimits(ImageOptions(**options), 1 << 20, (str(tmp_path),), memory=1 << 30)
        path = os.pathsep.join((str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")))
        variables = {**os.environ, "PYTHONPATH": path, **(environment or {})}
        with (tmp_path / "log").open("wb") as log:
            async with ImageWorkers(workers, limits, encoded, prepared, log, environment=variables) as running:
                await running.load(preparation)
                yield Pool(running, encoded, prepared)
        assert encoded.free_blocks == prepared.free_blocks == 8, "an extent was leaked"
        encoded.close()
        prepared.close()

    return start


def failure(excinfo):
    return excinfo.value.failure


def host_process():
    return next(c for c in psutil.Process().children() if "batchvl.images.forkserver" in " ".join(c.cmdline()))


async def test_each_row_gets_its_own_images(pool):
    async with pool() as p:
        colors = [[(i, 0, 0), (0, i, 0)] for i in range(40)]
        results = await asyncio.gather(*(p.run(i, colors=pair) for i, pair in enumerate(colors)))
    for i, (tensors, prepared) in enumerate(results):
        assert int.from_bytes(tensors["number"], "little") == i
        assert tensors["pixels"] == bytes((i, 0, 0)) * 64 + bytes((0, i, 0)) * 64
        assert [(image.width, image.height) for image in prepared.images] == [(8, 8), (8, 8)]
        assert [image.source for image in prepared.images] == ["image 0", "image 1"]


async def test_rows_about_the_same_images_are_one_job(pool):
    """The images are read once and stored once. A row that fails does not fail the others."""
    async with pool() as p:
        (one, two, bad, three), prepared = await p.run_all(
            [request(1), request(2), request(3, "raise"), request(4)], [png((255, 0, 0)), png((0, 0, 255))]
        )
    pixels = Image.new("RGB", (8, 8), (255, 0, 0)).tobytes() + Image.new("RGB", (8, 8), (0, 0, 255)).tobytes()
    assert [tensors["pixels"] for tensors in (one, two, three)] == [pixels] * 3
    assert [int.from_bytes(tensors["number"], "little") for tensors in (one, two, three)] == [1, 2, 4]
    assert (bad.code, bad.message) == ("prepare_failed", "RuntimeError: by order")
    offsets = {outcome.tensors[1].offset for outcome in prepared.requests if not isinstance(outcome, Failure)}
    assert len(offsets) == 1
    assert prepared.extent.length == 3 * 64 + len(pixels)
    assert len(prepared.images) == 2


async def test_the_worker_opens_files(pool, tmp_path):
    (tmp_path / "red.png").write_bytes(png((255, 0, 0)))
    async with pool() as p:
        prepared = await p.workers.prepare([request(1)], [Source("red.png", file=FileImage("red.png"))])
        p.prepared.release(prepared.extent)
        with pytest.raises(RowFailed) as outside:
            await p.workers.prepare([request(1)], [Source("passwd", file=FileImage("/etc/passwd"))])
    assert prepared.images[0].bytes == len(png((255, 0, 0)))
    assert failure(outside).code == "forbidden_path"


async def test_encoded_images_are_copied_if_that_is_asked_for(pool, tmp_path):
    (tmp_path / "green.png").write_bytes(png((0, 255, 0)))
    red = png((255, 0, 0), size=(32, 24))
    async with pool(preparation=None) as p:
        [extent] = await p.encoded.reserve([len(red)])
        p.encoded.at(extent)[:] = red
        sources = [
            Source("red", extent=extent, is_copied=True),
            Source("blue", extent=extent),
            Source("green.png", file=FileImage("green.png"), is_copied=True),
        ]
        prepared = await p.workers.prepare([request(1)], sources)
        p.encoded.release(extent)
        [result] = prepared.requests
        assert [(tensor.name, tensor.dtype) for tensor in result.tensors] == [("image0", "uint8"), ("image2", "uint8")]
        view = p.prepared.at(result.extent)
        stored = [bytes(view[tensor.offset : tensor.offset + tensor.shape[0]]) for tensor in result.tensors]
        assert stored == [red, png((0, 255, 0))]
        assert [(image.width, image.height, image.bytes) for image in prepared.images] == [
            (32, 24, len(red)),
            (32, 24, len(red)),
            (8, 8, len(stored[1])),
        ]
        p.prepared.release(prepared.extent)


async def test_encoded_images_of_several_rows_are_stored_once(pool):
    async with pool(preparation=None) as p:
        rows, prepared = await p.run_all([request(number) for number in range(5)], [png((1, 2, 3))])
    assert rows == [{"image0": png((1, 2, 3))}] * 5
    assert prepared.extent.length < len(png((1, 2, 3))) + 64


async def test_encoded_images_are_checked_as_strictly(pool):
    truncated = png((1, 2, 3), size=(64, 64))[:-40]
    async with pool(preparation=None, max_image_pixels=10_000, max_images=3) as p:
        for files, code in [
            ([truncated], "truncated_image"),
            ([b"<html>"], "not_an_image"),
            ([png((1, 2, 3), size=(101, 100))], "too_many_pixels"),
            ([png((1, 2, 3))] * 4, "too_many_images"),
        ]:
            with pytest.raises(RowFailed) as failed:
                await p.run_all([request(1)], files)
            assert failure(failed).code == code


async def test_encoded_images_need_no_module_and_rows_without_images_no_space(pool):
    async with pool(preparation=None) as p:
        prepared = await p.workers.prepare([request(1)], [])
    assert prepared.extent is None
    assert prepared.requests == (request(1),)


@pytest.mark.parametrize("arguments", [{}, {"factory": "a:b", "input": "encoded"}])
def test_only_a_preparation_of_pixels_has_a_factory(arguments):
    with pytest.raises(ValueError, match="only pixels have a factory"):
        PreparationSpec(**arguments)


@pytest.mark.parametrize(
    ("factory", "draft"), [("Misbehaving", False), ("Halving", True)], ids=("size unknown", "size known")
)
async def test_jpegs_are_scaled_for_preparations_that_know_their_size(pool, tmp_path, factory, draft):
    Image.new("RGB", (32, 24), (9, 9, 9)).save(tmp_path / "gray.jpg")
    async with pool(preparation=PreparationSpec(f"tests.images.misbehaving:{factory}"), draft_decode=True) as p:
        prepared = await p.workers.prepare([request(1)], [Source("gray.jpg", file=FileImage("gray.jpg"))])
        p.prepared.release(prepared.extent)
    [pixels] = [tensor for tensor in prepared.requests[0].tensors if tensor.name == "pixels"]
    assert pixels.shape == (16 * 12 * 3 if draft else 32 * 24 * 3,)
    assert [(image.width, image.height) for image in prepared.images] == [(32, 24)]


async def test_a_worker_that_dies_is_replaced_and_its_row_tried_again_once(pool, tmp_path):
    async with pool(workers=1) as p:
        tensors, _ = await p.run(5, f"die once {tmp_path}/died", [(9, 9, 9)])
        assert tensors["pixels"] == bytes((9, 9, 9)) * 64
        with pytest.raises(RowFailed) as died:
            await p.run(6, "die")
        assert failure(died).code == "prepare_crashed"
        assert "SIGKILL" in failure(died).message
        await p.run(7)


async def test_a_timeout_ends_the_worker_but_not_the_pool(pool, tmp_path):
    timeout = scaled(0.5)
    async with pool(workers=1, prepare_timeout=timeout) as p:
        with pytest.raises(RowFailed) as slow:
            await p.run(1, f"hang {tmp_path}/hangs")
        assert failure(slow).code == "prepare_timeout"
        assert f"{timeout:g} s" in failure(slow).message
        await p.run(2)


async def test_exceptions_memory_and_size_fail_only_the_row(pool):
    async with pool(workers=1) as p:
        for text, code in (("raise", "prepare_failed"), ("use 1 TiB", "prepare_failed"), ("large 32769", "too_large")):
            with pytest.raises(RowFailed) as failed:
                await p.run(1, text)
            assert failure(failed).code == code
        tensors, _ = await p.run(2, "large 32768")
        assert len(tensors["large"]) == 32768


async def test_jobs_wait_for_space_without_holding_any(pool):
    """Each job needs more than half of the arena: at most one has its space at any time."""
    async with pool(workers=2) as p, asyncio.timeout(scaled(60)):
        results = await asyncio.gather(*(p.run(i, f"large {5 * BLOCK - i}") for i in range(20)))
    assert [len(tensors["large"]) for tensors, _ in results] == [5 * BLOCK - i for i in range(20)]


async def test_too_many_images_fail_before_any_is_decoded(pool):
    async with pool(max_images=2) as p:
        with pytest.raises(RowFailed) as failed:
            await p.run(1, colors=[(1, 1, 1)] * 3)
    assert failure(failed).code == "too_many_images"
    assert "3 images" in failure(failed).message


async def test_a_cancelled_row_frees_its_space_only_when_nobody_writes_to_it(pool, tmp_path):
    async with pool(workers=1) as p, asyncio.timeout(scaled(60)):
        await p.run(0)
        [worker] = host_process().children()
        task = asyncio.create_task(p.run(1, f"hang {tmp_path}/hangs", [(1, 1, 1)]))
        while not (tmp_path / "hangs").exists():
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert not worker.is_running()
        await p.run(2)


async def test_jobs_raise_why_the_preparation_cannot_be_loaded(pool):
    async with pool(preparation=PreparationSpec("tests.images.misbehaving:broken")) as p:
        with pytest.raises(EngineUnavailable, match="no such library"):
            await p.workers.prepare([request(1)], [])


async def test_workers_see_no_secrets(pool):
    async with pool(environment={"HF_TOKEN": "hf_secret", "AWS_SECRET_ACCESS_KEY": "secret"}) as p:
        tensors, _ = await p.run(1, "environment")
    assert b"PATH" in tensors["environment"]
    assert b"HF_TOKEN" not in tensors["environment"]
    assert b"AWS" not in tensors["environment"]


async def test_no_process_is_left_over(pool):
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    async with pool() as p:
        await p.run(1)
        host = next(c for c in psutil.Process().children() if c.pid not in before)
        processes = [host, *host.children()]
        assert len(processes) == 3
    _, alive = psutil.wait_procs(processes, timeout=scaled(5))
    assert not alive


async def test_no_row_gets_the_image_of_another_when_workers_are_killed(pool):
    rng = random.Random(1)
    async with pool(workers=3) as p:
        await p.run(0)
        host = host_process()
        stop, codes = asyncio.Event(), set()

        async def kill():
            while not stop.is_set():
                await asyncio.sleep(0.02)
                for child in host.children():
                    if rng.random() < 0.3:
                        child.kill()

        async def row(i):
            color = (i % 256, i // 256, 7)
            try:
                tensors, _ = await p.run(i, colors=[color])
            except RowFailed as failed:
                codes.add(failed.failure.code)
                return 0
            assert int.from_bytes(tensors["number"], "little") == i
            assert tensors["pixels"] == bytes(color) * 64
            return 1

        killing = asyncio.create_task(kill())
        succeeded = sum(await asyncio.gather(*(row(i) for i in range(400))))
        stop.set()
        await killing
    assert succeeded > 200
    assert codes <= {"prepare_crashed"}


async def test_no_row_is_to_blame_for_the_end_of_the_host(pool):
    async with pool(workers=1) as p:
        await p.run(0)
        host = host_process()
        for child in host.children():
            child.kill()
        host.kill()
        with pytest.raises(EngineLost, match="host process of the image workers ended"):
            await asyncio.gather(*(p.run(i) for i in range(9)))


async def test_the_end_of_the_host_is_seen_if_it_has_not_read_a_message(pool, tmp_path):
    """Its socket then reports an error before its end."""
    async with pool(workers=1) as p, asyncio.timeout(scaled(60)):
        await p.run(0)
        host = host_process()
        task = asyncio.create_task(p.run(1, f"hang {tmp_path}/hangs", [(1, 1, 1)]))
        while not (tmp_path / "hangs").exists():
            await asyncio.sleep(0.01)
        host.suspend()
        task.cancel()  # which asks the host to kill the worker
        await asyncio.sleep(0)
        host.kill()
        with pytest.raises(asyncio.CancelledError):
            await task
        with pytest.raises(EngineLost, match="host process of the image workers ended"):
            await p.run(2)


async def test_many_special_tokens_do_not_block_the_host(pool):
    tokens = tuple(f"<unused{i}>" for i in range(30_000))
    preparation = PreparationSpec("tests.images.misbehaving:Misbehaving", special_tokens=tokens)
    async with pool(workers=1, preparation=preparation) as p:
        tensors, _ = await p.run(1)
    assert int.from_bytes(tensors["number"], "little") == 1
