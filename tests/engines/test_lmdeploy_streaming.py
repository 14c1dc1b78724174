"""Answers of LMDeploy's PyTorch engine in one piece: its own handles, over a core that gives every token."""

from __future__ import annotations

import asyncio

import pytest
import pytest_asyncio

from batchvl.shapes import MODEL
from batchvl.types import InlineImage, Row
from tests.engines.cpu_core import ROWS
from tests.engines.in_process import draw_image
from tests.engines.lmdeploy_harness import LmdeployHarness, start_lmdeploy

pytestmark = [pytest.mark.lmdeploy, pytest.mark.asyncio(loop_scope="module")]
DRAWN = (InlineImage(b"", "drawn"),)
TEXT = "a red square and a blue circle, and then one more of each"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared():
    async with start_lmdeploy(MODEL, {"answer": "text", "text": TEXT, "own_handles": True}) as harness:
        yield harness


@pytest.fixture
def lmdeploy(shared: LmdeployHarness):
    with shared.restored_behaviour() as harness:
        yield harness


async def count_outputs(lmdeploy: LmdeployHarness, prompt: object = "hello", **settings):
    """Return a row's response, and the number of outputs that LMDeploy gave for it."""
    before = lmdeploy.model.steps
    response, _ = await lmdeploy.ask(prompt, [draw_image(28, 28)], **settings)
    return response, lmdeploy.model.steps - before


async def test_an_answer_is_one_output(lmdeploy: LmdeployHarness):
    response, count = await count_outputs(lmdeploy)

    assert (response.texts, response.finish_reason) == ((TEXT,), "stop")
    assert response.output_tokens > 10
    assert count <= 2, "LMDeploy gives the text, and says that this was all"


async def test_a_truncated_answer_is_one_output(lmdeploy: LmdeployHarness):
    response, count = await count_outputs(lmdeploy, max_new_tokens=4)

    assert (response.finish_reason, response.output_tokens) == ("length", 4)
    assert TEXT.startswith(response.texts[0].strip())
    assert count <= 2


async def test_an_answer_that_ends_within_a_character_keeps_its_text(lmdeploy: LmdeployHarness):
    lmdeploy.core.behaviour.update(text="one 🦊🦊🦊🦊")
    texts = [(await count_outputs(lmdeploy, max_new_tokens=limit))[0].texts[0] for limit in range(1, 24)]

    assert all("one 🦊🦊🦊🦊".startswith(text.strip()) for text in texts)
    assert texts == sorted(texts, key=len)
    assert texts[-1] == "one 🦊🦊🦊🦊"


async def test_every_turn_is_one_output(lmdeploy: LmdeployHarness):
    response, count = await count_outputs(lmdeploy, ["one", "two", "three"])

    assert response.texts == (TEXT,) * 3
    assert count <= 6


async def test_an_answer_with_a_stop_text_is_streamed_and_ends_there(lmdeploy: LmdeployHarness):
    lmdeploy.core.behaviour.update(text=TEXT * 20, delay=0.01)
    response, count = await count_outputs(lmdeploy, stop=(" circle",), max_new_tokens=2000)

    assert (response.texts, response.finish_reason) == (("a red square and a blue",), "stop")
    assert 5 < count < 60
    lmdeploy.core.behaviour.update(text=TEXT)
    assert (await count_outputs(lmdeploy))[1] <= 2, "the next answer of that handle is one output again"


async def test_failures_arrive(lmdeploy: LmdeployHarness):
    lmdeploy.core.behaviour.update(status="INTERNAL_ENGINE_ERROR", after=3)
    response, _ = await count_outputs(lmdeploy)

    assert response.failure is not None
    assert response.failure.code == "engine_error"


async def test_more_rows_than_handles(lmdeploy: LmdeployHarness):
    lmdeploy.core.behaviour.update(answer="digest", delay=0.002)
    alone, questions = [], []
    for number in range(3 * ROWS):
        image = draw_image(28, 28, number)
        response, _ = await lmdeploy.ask(f"row {number}", [image])
        alone.append(response.texts)
        questions.append((lmdeploy.request(Row(number, prompt=f"row {number}", images=DRAWN)), [image]))
    responses = await asyncio.gather(*(lmdeploy.harness.ask(question) for question in questions))

    assert [response.texts for [response] in responses] == alone
    assert len(set(alone)) == 3 * ROWS
