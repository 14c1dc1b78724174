"""What rows about the same pictures have in common: computed once, ahead of them."""

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
from tests.engines.in_process import picture
from tests.engines.lmdeploy_line import SOON, CoreLine, until, with_core

pytestmark = [pytest.mark.lmdeploy, pytest.mark.asyncio(loop_scope="module")]
QUESTIONS = [{"prompt": text} for text in ("how many?", "what shape?", "which colour is it?")]
DRAWN = (InlineImage(b"", "drawn"),)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine():
    async with with_core(MODEL) as found:
        found.loaded.keeps_prefixes = True  # as TurboMind does when it is told to
        yield found


@pytest_asyncio.fixture(loop_scope="module")
async def line(engine: CoreLine):
    engine.core.asked.clear()
    with engine.ordered_back() as found:
        yield found


async def together(line: CoreLine, prompts: Sequence[dict[str, object]], seed: int = 0) -> list[Request]:
    """Rows about one picture as an image worker prepares them: in one extent, and the picture once."""
    layout, pictures = ArenaPacker(), [picture(56, 28, seed)]
    rows = [Row(seed * 100 + at, images=DRAWN, **fields) for at, fields in enumerate(prompts)]
    asked = list(map(line.request, rows))
    tensors = [layout.add(line.line.preparation.prepare(request, pictures)) for request in asked]
    [extent] = await line.line.arena.reserve([layout.size])
    layout.write(line.line.arena.at(extent))
    return [
        msgspec.structs.replace(request, extent=extent, tensors=each)
        for request, each in zip(asked, tensors, strict=True)
    ]


async def answers(line: CoreLine, *groups: list[Request]) -> dict[int, str]:
    """Each row's answer; the pictures' memory is wiped once the last row about them is answered."""
    requests = [request for group in groups for request in group]
    left, found = {id(group): len(group) for group in groups}, {}
    async for response in line.line.engine.infer(requests):
        assert response.failure is None, response.failure
        [group] = [group for group in groups if any(request.row == response.row for request in group)]
        found[response.row] = " ".join(response.texts)
        left[id(group)] -= 1
        if not left[id(group)]:
            line.line.arena.at(group[0].extent)[:] = b"\xff" * group[0].extent.length
            line.line.arena.release(group[0].extent)
    return found


async def test_it_goes_ahead_of_rows_that_share_a_picture(line: CoreLine):
    alone = [(await answers(line, await together(line, [question])))[0] for question in QUESTIONS]
    assert len(line.core.asked) == len(QUESTIONS), "nothing goes ahead of a row alone"
    line.core.asked.clear()

    found = await answers(line, await together(line, QUESTIONS), await together(line, QUESTIONS[:2], seed=1))

    ahead = [asked for asked in line.core.asked if asked.config.max_new_tokens == 1]
    assert line.core.asked[:2] == ahead, "once for each picture, before any row"
    assert len(line.core.asked) == 2 + len(found)
    assert [found[number] for number in range(3)] == alone
    for asked in line.core.asked[2:5]:
        assert asked.prompt.startswith(ahead[0].prompt)
        assert asked.pictures == ahead[0].pictures
        assert ahead[0].tokens < asked.tokens
    assert not any(question["prompt"] in asked.prompt for asked in ahead for question in QUESTIONS)


async def test_it_ends_a_token_behind_the_last_picture(line: CoreLine):
    await answers(line, await together(line, QUESTIONS))

    ahead, row = line.core.asked[0].prompt, line.core.asked[1].prompt
    end = "<IMG_CONTEXT>"
    assert ahead.count(end) == row.count(end) == 1  # of a run of them the core keeps one
    assert len(line.core.tokenizer.encode(ahead.partition(end)[2], add_special_tokens=False)) == 1


async def test_rows_that_begin_otherwise_have_nothing_in_common(line: CoreLine):
    image, text = {"type": "image", "image": 0}, {"type": "text", "text": "what is it?"}
    asked = await together(
        line, [QUESTIONS[0], {"messages": [{"role": "user", "content": [text, image]}]}, {"prompt": ["one", "two"]}]
    )

    assert len(await answers(line, asked)) == 3

    assert len(line.core.asked) == 4, "the three, of which one has two turns"
    assert len({each.prompt for each in line.core.asked}) == 4


async def test_rows_of_another_salt_have_nothing_in_common(line: CoreLine):
    asked = await together(line, QUESTIONS)
    asked = [msgspec.structs.replace(request, cache_salt=number % 2) for number, request in enumerate(asked)]

    assert len(await answers(line, asked)) == 3

    assert len(line.core.asked) == 3 + 1, "two rows share a salt"


async def test_where_it_fails_the_rows_do_without(line: CoreLine, tmp_path):
    once = {"status": "INTERNAL_ENGINE_ERROR", "after": 0, "once": str(tmp_path / "once")}
    line.core.behaviour["rules"] = {"user": once}

    assert len(await answers(line, await together(line, QUESTIONS))) == len(QUESTIONS)


async def test_pictures_are_kept_until_it_is_over(line: CoreLine, tmp_path):
    line.core.behaviour["rules"] = {"user": {"delay": 0.5, "once": str(tmp_path / "once")}}
    begun = time.monotonic()

    await answers(line, await together(line, QUESTIONS))

    assert time.monotonic() - begun > 0.5


async def test_rows_that_are_told_to_end_do_not_wait_for_it(line: CoreLine):
    line.core.behaviour["rules"] = {"user": {"delay": 60}}
    asked = await together(line, QUESTIONS)
    answering = asyncio.create_task(_failures(line, asked))
    await until(lambda: line.core.inflight > len(QUESTIONS))
    begun = time.monotonic()

    for request in asked:
        await line.line.engine.abort(request.row)

    assert await answering == ["row_timeout"] * len(QUESTIONS)
    assert time.monotonic() - begun < SOON
    assert not line.core.inflight
    line.line.arena.release(asked[0].extent)


async def _failures(line: CoreLine, asked: list[Request]) -> list[str]:
    return [response.failure.code async for response in line.line.engine.infer(asked)]
