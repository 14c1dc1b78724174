"""Image workers as real processes: right pictures, deaths, deadlines, limits, secrets, and nobody left behind."""

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
from batchvl.images.messages import Source
from batchvl.images.preparation import PreparationSpec
from batchvl.images.worker_pool import ImageWorkers, RowFailed
from batchvl.ipc.arena import Arena
from batchvl.ipc.spawn import ParentPipe
from batchvl.types import ContentPart, Failure, FileImage, Message, Request

BLOCK = 4096


def request(row: int, text: str = "") -> Request:
    return Request(row, (Message("user", (ContentPart(text),)),))


def picture(colour, size=(8, 8)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, "PNG")
    return file.getvalue()


class Pool:
    def __init__(self, workers, encoded, prepared):
        self.workers, self.encoded, self.prepared = workers, encoded, prepared

    async def run(self, row, text="", colours=()):
        """One row through the pool: its own tensors, by name."""
        [tensors], done = await self.run_all([request(row, text)], colours)
        if isinstance(tensors, Failure):
            raise RowFailed(tensors, done.images)
        return tensors, done

    async def run_all(self, requests, colours):
        """Rows about the same pictures: each one's tensors, or its failure."""
        data = [picture(colour) for colour in colours]
        extents = await self.encoded.reserve([len(d) for d in data])
        for extent, d in zip(extents, data, strict=True):
            self.encoded.at(extent)[:] = d
        try:
            sources = [Source(f"picture {i}", extent=e) for i, e in enumerate(extents)]
            done = await self.workers.prepare(requests, sources)
        finally:
            self.encoded.release(*extents)
        if done.extent is None:
            return list(done.requests), done
        view = self.prepared.at(done.extent)
        tensors = [
            each
            if isinstance(each, Failure)
            else {t.name: bytes(view[t.offset : t.offset + t.shape[0]]) for t in each.tensors}
            for each in done.requests
        ]
        self.prepared.release(done.extent)
        return tensors, done


@pytest.fixture
def pool(tmp_path):
    @asynccontextmanager
    async def start(*, workers=2, factory="tests.images.misbehaving:Misbehaving", environment=None, **limits):
        lifeline, encoded, prepared = ParentPipe(), Arena(8, BLOCK), Arena(8, BLOCK)
        path = os.pathsep.join((str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")))
        with (tmp_path / "log").open("wb") as log:
            async with ImageWorkers(
                None, ImageOptions(**limits), 1 << 20, [tmp_path], (encoded, prepared), workers,
                lifeline, {**os.environ, "PYTHONPATH": path, **(environment or {})}, log, memory=1 << 30,
            ) as started:  # fmt: skip
                await started.load(PreparationSpec(factory))
                yield Pool(started, encoded, prepared)
        assert encoded.free_blocks == prepared.free_blocks == 8, "an extent was leaked"
        lifeline.close()
        encoded.close()
        prepared.close()

    return start


def failure(excinfo):
    return excinfo.value.failure


async def test_each_row_gets_its_own_pictures(pool):
    async with pool() as p:
        colours = [[(i, 0, 0), (0, i, 0)] for i in range(40)]
        results = await asyncio.gather(*(p.run(i, colours=c) for i, c in enumerate(colours)))
    for i, (tensors, done) in enumerate(results):
        assert int.from_bytes(tensors["number"], "little") == i
        assert tensors["pixels"] == bytes((i, 0, 0)) * 64 + bytes((0, i, 0)) * 64
        assert [(image.width, image.height, image.source) for image in done.images] == [
            (8, 8, "picture 0"), (8, 8, "picture 1"),
        ]  # fmt: skip


async def test_rows_about_the_same_pictures_are_one_job(pool):
    """The pictures are read once and lie in the arena once; a row's failure is its own."""
    async with pool() as p:
        (one, two, bad, three), done = await p.run_all(
            [request(1), request(2), request(3, "raise"), request(4)], [(255, 0, 0), (0, 0, 255)]
        )
        pixels = Image.new("RGB", (8, 8), (255, 0, 0)).tobytes() + Image.new("RGB", (8, 8), (0, 0, 255)).tobytes()
        assert [each["pixels"] for each in (one, two, three)] == [pixels] * 3
        assert [int.from_bytes(each["number"], "little") for each in (one, two, three)] == [1, 2, 4]
        assert (bad.code, bad.message) == ("prepare_failed", "RuntimeError: by order")
        places = {each.tensors[1].offset for each in done.requests if not isinstance(each, Failure)}
        assert len(places) == 1
        assert done.extent.length == 3 * 64 + len(pixels)
        assert len(done.images) == 2


async def test_files_are_opened_by_the_worker(pool, tmp_path):
    (tmp_path / "red.png").write_bytes(picture((255, 0, 0)))
    async with pool() as p:
        done = await p.workers.prepare([request(1)], [Source("red.png", file=FileImage("red.png"))])
        p.prepared.release(done.extent)
        with pytest.raises(RowFailed) as outside:
            await p.workers.prepare([request(1)], [Source("passwd", file=FileImage("/etc/passwd"))])
    assert done.images[0].bytes == len(picture((255, 0, 0)))
    assert failure(outside).code == "forbidden_path"


@pytest.mark.parametrize(
    ("factory", "drafted"), [("Misbehaving", False), ("Halving", True)], ids=("cannot tell", "tells")
)
async def test_drafts_are_for_preparations_that_tell_what_they_use(pool, tmp_path, factory, drafted):
    Image.new("RGB", (32, 24), (9, 9, 9)).save(tmp_path / "grey.jpg")
    async with pool(factory=f"tests.images.misbehaving:{factory}", draft_decode=True) as p:
        done = await p.workers.prepare([request(1)], [Source("grey.jpg", file=FileImage("grey.jpg"))])
        p.prepared.release(done.extent)
    [pixels] = [tensor for tensor in done.requests[0].tensors if tensor.name == "pixels"]
    assert pixels.shape == (16 * 12 * 3 if drafted else 32 * 24 * 3,)
    assert [(image.width, image.height) for image in done.images] == [(32, 24)]


async def test_a_worker_that_dies_is_replaced_and_its_row_tried_once_more(pool, tmp_path):
    async with pool(workers=1) as p:
        tensors, _ = await p.run(5, f"die once {tmp_path}/died", [(9, 9, 9)])
        assert tensors["pixels"] == bytes((9, 9, 9)) * 64
        with pytest.raises(RowFailed) as died:
            await p.run(6, "die")
        assert failure(died).code == "prepare_crashed"
        assert "SIGKILL" in failure(died).message
        await p.run(7)


async def test_a_deadline_ends_the_worker_and_not_the_pool(pool):
    async with pool(workers=1, prepare_timeout=0.5) as p:
        with pytest.raises(RowFailed) as slow:
            await p.run(1, "hang")
        assert failure(slow).code == "prepare_timeout"
        assert "0.5 s" in failure(slow).message
        await p.run(2)


async def test_errors_memory_and_size_are_the_rows_own(pool):
    async with pool(workers=1) as p:
        for text, code in (("raise", "prepare_failed"), ("gorge", "prepare_failed"), ("large 32769", "too_large")):
            with pytest.raises(RowFailed) as failed:
                await p.run(1, text)
            assert failure(failed).code == code
        tensors, _ = await p.run(2, "large 32768")
        assert len(tensors["large"]) == 32768


async def test_too_many_pictures_are_refused_before_any_is_decoded(pool):
    async with pool(max_images=2) as p:
        with pytest.raises(RowFailed) as failed:
            await p.run(1, colours=[(1, 1, 1)] * 3)
    assert failure(failed).code == "too_many_images"
    assert "3 pictures" in failure(failed).message


async def test_a_cancelled_row_frees_its_extents_only_once_nobody_writes(pool):
    async with pool(workers=1) as p:
        await p.run(0)
        task = asyncio.create_task(p.run(1, "hang", [(1, 1, 1)]))
        await asyncio.sleep(0.2)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await p.run(2)


async def test_a_preparation_that_cannot_be_loaded_is_told(pool):
    async with pool(factory="tests.images.misbehaving:broken") as p:
        with pytest.raises(EngineUnavailable, match="no such library"):
            await p.workers.prepare([request(1)], [])


async def test_workers_see_no_secrets(pool):
    async with pool(environment={"HF_TOKEN": "hf_secret", "AWS_SECRET_ACCESS_KEY": "secret"}) as p:
        tensors, _ = await p.run(1, "environment")
    assert b"PATH" in tensors["environment"]
    assert b"HF_TOKEN" not in tensors["environment"]
    assert b"AWS" not in tensors["environment"]


async def test_nobody_stays_behind(pool):
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    async with pool() as p:
        await p.run(1)
        host = next(c for c in psutil.Process().children() if c.pid not in before)
        family = [host, *host.children()]
        assert len(family) == 3
    _, alive = psutil.wait_procs(family, timeout=5)
    assert not alive


async def test_killed_at_random_no_row_gets_anothers_picture(pool):
    rng = random.Random(1)
    async with pool(workers=3) as p:
        await p.run(0)
        host = next(c for c in psutil.Process().children() if "batchvl.images.forkserver" in " ".join(c.cmdline()))
        stop, codes = asyncio.Event(), set()

        async def killer():
            while not stop.is_set():
                await asyncio.sleep(0.02)
                for child in host.children():
                    if rng.random() < 0.3:
                        child.kill()

        async def row(i):
            colour = (i % 256, i // 256, 7)
            try:
                tensors, _ = await p.run(i, colours=[colour])
            except RowFailed as failed:
                codes.add(failed.failure.code)
                return 0
            assert int.from_bytes(tensors["number"], "little") == i
            assert tensors["pixels"] == bytes(colour) * 64
            return 1

        killing = asyncio.create_task(killer())
        right = sum(await asyncio.gather(*(row(i) for i in range(400))))
        stop.set()
        await killing
    assert right > 200
    assert codes <= {"prepare_crashed"}


async def test_the_hosts_end_is_no_rows_fault(pool):
    async with pool(workers=1) as p:
        await p.run(0)
        host = next(c for c in psutil.Process().children() if "batchvl.images.forkserver" in " ".join(c.cmdline()))
        for child in host.children():
            child.kill()
        host.kill()
        with pytest.raises(EngineLost, match="host process ended"):
            await asyncio.gather(*(p.run(i) for i in range(9)))


async def test_many_special_tokens_do_not_hold_up_the_host(tmp_path):
    lifeline, arenas = ParentPipe(), (Arena(8, BLOCK), Arena(8, BLOCK))
    tokens = tuple(f"<unused{i}>" for i in range(30_000))
    with (tmp_path / "log").open("wb") as log:
        async with ImageWorkers(
            None, ImageOptions(), 1 << 20, [tmp_path], arenas, 1, lifeline, dict(os.environ), log
        ) as workers:
            await workers.load(PreparationSpec("batchvl.engines.fake:Thumbnails", special_tokens=tokens))
            done = await workers.prepare([request(1)], [])
    assert done.requests[0].row == 1
    lifeline.close()
    for arena in arenas:
        arena.close()
