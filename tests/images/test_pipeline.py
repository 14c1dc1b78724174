"""The pipeline as runs use it: rows in, requests with tensors out, and everything closed at the end."""

from __future__ import annotations

import asyncio
import os
from collections import Counter

import psutil
import pytest

from batchvl.config.options import RunOptions
from batchvl.errors import MissingPrompt, OptionError, StoppedEarly, TruncatedImage
from batchvl.images.pipeline import ImagePipeline, image_stubs
from batchvl.images.preparation import PreparationSpec
from batchvl.images.worker_pool import RowFailed
from batchvl.types import ContentPart, Failure, FileImage, ImageRef, InlineImage, Message, Request, Row, WebImage
from tests.faults.server import FaultServer
from tests.images.drawing import drawing, encoded
from tests.timing import scaled

THUMBNAILS = PreparationSpec("batchvl.engines.fake:Thumbnails")
ENCODED = PreparationSpec(input="encoded")


def make_request(row: Row) -> Request:
    if row.prompt is None:
        raise MissingPrompt("no prompt")
    return Request(row.number, (Message("user", (ContentPart(image=0), ContentPart(str(row.prompt)))),))


def row(number: int, *images: ImageRef, prompt: str | None = "What is it?") -> Row:
    return Row(number, prompt=prompt, images=images)


def pipeline(tmp_path, **options) -> ImagePipeline:
    run = RunOptions.of(**{"image_workers": 1, "arena_bytes": "2MB", "allow_private": ["127.0.0.0/8"], **options})
    return ImagePipeline(run.fetch, run.image, [tmp_path], log=tmp_path / "images.log")


async def one_group(rows):
    yield list(rows)


async def prepare(images: ImagePipeline, *rows: Row):
    """Return the group of rows, and release it."""
    [group] = [group async for group in images.fetch_ahead(one_group(rows))]
    task = images.prepare_group(group)
    for number, _ in enumerate(rows):
        try:
            group = await task.get()
            if not number and group.extent is not None:
                assert images.tensors.free_blocks < images.tensors.blocks
        finally:
            task.release()
    assert images.tensors.free_blocks == images.tensors.blocks
    return group


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


async def test_rows_with_the_same_images_share_their_tensors(tmp_path):
    data = encoded(drawing())
    (tmp_path / "a.png").write_bytes(data)
    seconds = Counter()
    options = RunOptions.of(image_workers=1, arena_bytes="2MB", allow_private=["127.0.0.0/8"])
    async with FaultServer() as server:
        server.images["cat"] = data
        refs = (FileImage("a.png"), InlineImage(data, "inline"), WebImage(server.url("/image/cat")))
        async with ImagePipeline(
            options.fetch, options.image, [tmp_path], on_stage_seconds=lambda stage, s: seconds.update({stage: s})
        ) as images:
            await images.load(THUMBNAILS, make_request)
            group = await prepare(images, row(7, *refs), row(9, *refs), row(11, *refs))
        assert server.requests.total() == 1
    assert list(group.requests) == [7, 9, 11]
    assert len({request.extent for request in group.requests.values()}) == 1
    assert [len(request.tensors) for request in group.requests.values()] == [3, 3, 3]
    assert [(image.width, image.height) for image in group.images] == [(64, 48)] * 3
    assert seconds["fetch"] == pytest.approx(3 * group.fetch_seconds)
    assert seconds["prepare"] == pytest.approx(3 * group.prepare_seconds)
    assert group.fetch_seconds > 0 < group.prepare_seconds


async def test_encoded_images_reach_the_engine_as_they_are(tmp_path):
    files = [encoded(drawing(), "JPEG"), encoded(drawing((9, 9)), "WEBP")]
    (tmp_path / "a.jpg").write_bytes(files[0])
    async with FaultServer() as server, pipeline(tmp_path) as images:
        server.images["cat"] = files[1]
        await images.load(ENCODED, make_request)
        both = row(1, FileImage("a.jpg"), WebImage(server.url("/image/cat")))
        task = images.prepare_group(await images.fetch(both))
        group = await task.get()
        request = group.requests[1]
        view = images.tensors.at(request.extent)
        stored = [bytes(view[tensor.offset : tensor.offset + tensor.shape[0]]) for tensor in request.tensors]
        task.release()
        with pytest.raises(RowFailed) as failed:
            await prepare(images, row(2, InlineImage(files[0][:500], "inline")))
    assert stored == files
    assert failed.value.failure.code == TruncatedImage.code


async def test_a_request_that_cannot_be_made_fails_only_its_row(tmp_path):
    image = InlineImage(encoded(drawing()), "inline")
    async with pipeline(tmp_path) as images:
        await images.load(THUMBNAILS, make_request)
        group = await prepare(images, row(0, image), row(1, image, prompt=None), row(2, image))
        assert isinstance(group.requests[1], Failure)
        assert group.requests[1].code == "missing_prompt"
        assert all(isinstance(group.requests[number], Request) for number in (0, 2))

        missing = FileImage("missing.png")
        group = await prepare(images, row(3, missing, prompt=None))
    assert group.requests[3].code == "missing_prompt", "nothing is fetched for a row without a request"
    assert group.images == image_stubs(row(3, missing))


async def test_a_row_without_images_takes_nothing_of_the_fetcher(tmp_path):
    async with pipeline(tmp_path) as images:
        await images.load(THUMBNAILS, make_request)
        group = await images.fetch(row(0))
    assert (group.fetched, group.error, group.requests) == (None, None, {})


async def test_without_a_preparation_images_are_only_checked(tmp_path):
    async with pipeline(tmp_path) as images:
        await images.load(None, make_request)
        group = await prepare(images, row(0, InlineImage(encoded(drawing()), "inline")))
        with pytest.raises(RowFailed) as failed:
            await prepare(images, row(1, InlineImage(b"<html>", "inline")))
    assert group.requests == {0: make_request(row(0))}
    assert group.images[0].width == 64
    assert failed.value.failure.code == "not_an_image"


async def test_nothing_is_left_open(tmp_path):
    for _ in range(2):  # the event loop keeps a descriptor from the first on
        before = open_descriptors()
        async with pipeline(tmp_path) as images:
            await images.load(THUMBNAILS, make_request)
            with pytest.raises(RowFailed):
                await prepare(images, row(0, InlineImage(b"x", "inline")))
    async with asyncio.timeout(scaled(5)):
        while open_descriptors() > before:  # asyncio closes sockets in the next iteration of its loop
            await asyncio.sleep(0)
    assert not [c for c in psutil.Process().children() if "forkserver" in " ".join(c.cmdline())]


async def test_what_cannot_be_opened_is_an_error_and_leaves_nothing_open(tmp_path):
    before = open_descriptors()
    with pytest.raises(OptionError, match="--arena-bytes: cannot allocate"):
        await pipeline(tmp_path, arena_bytes="1000000GB").__aenter__()
    run = RunOptions.of(image_workers=1)
    with pytest.raises(StoppedEarly, match=r"images\.log"):
        await ImagePipeline(run.fetch, run.image, [tmp_path], log=tmp_path / "missing/images.log").__aenter__()
    assert open_descriptors() == before
