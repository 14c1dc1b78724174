"""What rows about the same images have in common is computed once, ahead of them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

import msgspec
import pytest
import pytest_asyncio

from batchvl.images.packing import ArenaPacker
from batchvl.shapes import MODEL
from batchvl.types import InlineImage, Request, Row
from tests.engines.in_process import draw_image
from tests.engines.lmdeploy_harness import ABORT_LIMIT, LmdeployHarness, start_lmdeploy, wait_until

pytestmark = [pytest.mark.lmdeploy, pytest.mark.asyncio(loop_scope="module")]
QUESTIONS = [{"prompt": text} for text in ("how many?", "what shape?", "which colour is it?")]
DRAWN = (InlineImage(b"", "drawn"),)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared():
    async with start_lmdeploy(MODEL) as harness:
        harness.model.keeps_prefixes = True  # as with TurboMind and prefix caching
        yield harness


@pytest_asyncio.fixture(loop_scope="module")
async def lmdeploy(shared: LmdeployHarness):
    shared.core.requests.clear()
    with shared.restored_behaviour() as harness:
        yield harness


async def prepare_group(
    lmdeploy: LmdeployHarness, prompts: Sequence[dict[str, object]], seed: int = 0
) -> list[Request]:
    """Prepare rows about one image as an image worker does: in one extent, which contains the image once."""
    packer, images = ArenaPacker(), [draw_image(56, 28, seed)]
    rows = [Row(seed * 100 + at, images=DRAWN, **fields) for at, fields in enumerate(prompts)]
    requests = list(map(lmdeploy.request, rows))
    tensors = [packer.add(lmdeploy.harness.preparation.prepare(request, images)) for request in requests]
    [extent] = await lmdeploy.harness.arena.reserve([packer.size])
    packer.write(lmdeploy.harness.arena.at(extent))
    return [
        msgspec.structs.replace(request, extent=extent, tensors=each)
        for request, each in zip(requests, tensors, strict=True)
    ]


async def ask_groups(lmdeploy: LmdeployHarness, *groups: list[Request]) -> dict[int, str]:
    """Return each row's answer. Each group's images are wiped once its last row is answered."""
    requests = [request for group in groups for request in group]
    open_rows, answers = {id(group): len(group) for group in groups}, {}
    async for response in lmdeploy.harness.engine.infer(requests):
        assert response.failure is None, response.failure
        [group] = [group for group in groups if any(request.row == response.row for request in group)]
        answers[response.row] = " ".join(response.texts)
        open_rows[id(group)] -= 1
        if not open_rows[id(group)]:
            lmdeploy.harness.arena.at(group[0].extent)[:] = b"\xff" * group[0].extent.length
            lmdeploy.harness.arena.release(group[0].extent)
    return answers


async def test_the_prefix_precedes_rows_that_share_an_image(lmdeploy: LmdeployHarness):
    alone = [(await ask_groups(lmdeploy, await prepare_group(lmdeploy, [question])))[0] for question in QUESTIONS]
    assert len(lmdeploy.core.requests) == len(QUESTIONS), "nothing precedes a single row"
    lmdeploy.core.requests.clear()

    groups = await prepare_group(lmdeploy, QUESTIONS), await prepare_group(lmdeploy, QUESTIONS[:2], seed=1)
    answers = await ask_groups(lmdeploy, *groups)

    prefixes = [request for request in lmdeploy.core.requests if request.config.max_new_tokens == 1]
    assert lmdeploy.core.requests[:2] == prefixes, "one for each image, before any row"
    assert len(lmdeploy.core.requests) == 2 + len(answers)
    assert [answers[number] for number in range(3)] == alone
    for request in lmdeploy.core.requests[2:5]:
        assert request.prompt.startswith(prefixes[0].prompt)
        assert request.images == prefixes[0].images
        assert prefixes[0].tokens < request.tokens
    assert not any(question["prompt"] in prefix.prompt for prefix in prefixes for question in QUESTIONS)


async def test_the_prefix_ends_one_token_behind_the_last_image(lmdeploy: LmdeployHarness):
    await ask_groups(lmdeploy, await prepare_group(lmdeploy, QUESTIONS))

    prefix, row = lmdeploy.core.requests[0].prompt, lmdeploy.core.requests[1].prompt
    token = "<IMG_CONTEXT>"
    assert prefix.count(token) == row.count(token) == 1  # the core shows a run of them as one
    assert len(lmdeploy.core.tokenizer.encode(prefix.partition(token)[2], add_special_tokens=False)) == 1


async def test_rows_that_begin_differently_share_nothing(lmdeploy: LmdeployHarness):
    image, text = {"type": "image", "image": 0}, {"type": "text", "text": "what is it?"}
    messages = [{"role": "user", "content": [text, image]}]
    group = await prepare_group(lmdeploy, [QUESTIONS[0], {"messages": messages}, {"prompt": ["one", "two"]}])

    assert len(await ask_groups(lmdeploy, group)) == 3

    assert len(lmdeploy.core.requests) == 4, "three rows, one of which has two turns"
    assert len({request.prompt for request in lmdeploy.core.requests}) == 4


async def test_rows_with_different_salts_share_nothing(lmdeploy: LmdeployHarness):
    group = await prepare_group(lmdeploy, QUESTIONS)
    group = [msgspec.structs.replace(request, cache_salt=number % 2) for number, request in enumerate(group)]

    assert len(await ask_groups(lmdeploy, group)) == 3

    assert len(lmdeploy.core.requests) == 3 + 1, "two rows have the same salt"


async def test_rows_do_without_a_prefix_that_fails(lmdeploy: LmdeployHarness, tmp_path):
    once = {"status": "INTERNAL_ENGINE_ERROR", "after": 0, "once": str(tmp_path / "once")}
    lmdeploy.core.behaviour["rules"] = {"user": once}

    assert len(await ask_groups(lmdeploy, await prepare_group(lmdeploy, QUESTIONS))) == len(QUESTIONS)


async def test_images_are_kept_until_the_prefix_has_ended(lmdeploy: LmdeployHarness, tmp_path):
    lmdeploy.core.behaviour["rules"] = {"user": {"delay": 0.5, "once": str(tmp_path / "once")}}
    started = time.monotonic()

    await ask_groups(lmdeploy, await prepare_group(lmdeploy, QUESTIONS))

    assert time.monotonic() - started > 0.5


async def test_aborted_rows_do_not_wait_for_the_prefix(lmdeploy: LmdeployHarness):
    lmdeploy.core.behaviour["rules"] = {"user": {"delay": 60}}
    group = await prepare_group(lmdeploy, QUESTIONS)
    failing = asyncio.create_task(_failures(lmdeploy, group))
    await wait_until(lambda: lmdeploy.core.in_flight > len(QUESTIONS))
    started = time.monotonic()

    for request in group:
        await lmdeploy.harness.engine.abort(request.row)

    assert await failing == ["row_timeout"] * len(QUESTIONS)
    assert time.monotonic() - started < ABORT_LIMIT
    assert not lmdeploy.core.in_flight
    lmdeploy.harness.arena.release(group[0].extent)


async def _failures(lmdeploy: LmdeployHarness, requests: list[Request]) -> list[str]:
    return [response.failure.code async for response in lmdeploy.harness.engine.infer(requests)]
