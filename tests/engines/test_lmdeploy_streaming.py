"""Answers of LMDeploy's PyTorch engine in one piece: its own handles, over a core that tells every token."""

from __future__ import annotations

import asyncio

import pytest
import pytest_asyncio

from batchvl.shapes import MODEL
from batchvl.types import InlineImage, Row
from tests.engines.cpu_core import ROWS
from tests.engines.in_process import picture
from tests.engines.lmdeploy_line import CoreLine, with_core

pytestmark = [pytest.mark.lmdeploy, pytest.mark.asyncio(loop_scope="module")]
DRAWN = (InlineImage(b"", "drawn"),)
SAID = "a red square and a blue circle, and then one more of each"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine():
    async with with_core(MODEL, {"answer": "say", "say": SAID, "own_handles": True}) as started:
        yield started


@pytest.fixture
def line(engine: CoreLine):
    """The engine; what a test orders of its core is taken back."""
    with engine.ordered_back() as found:
        yield found


async def outputs(line: CoreLine, prompt: object = "hello", **how):
    """A row's response, and how many outputs LMDeploy gave for it."""
    before = line.loaded.steps
    response, _ = await line.ask(prompt, [picture(28, 28)], **how)
    return response, line.loaded.steps - before


async def test_an_answer_is_told_once(line: CoreLine):
    response, count = await outputs(line)

    assert (response.texts, response.finish_reason) == ((SAID,), "stop")
    assert response.output_tokens > 10
    assert count <= 2, "LMDeploy tells the text, and that this was all"


async def test_so_is_one_that_is_cut_off(line: CoreLine):
    response, count = await outputs(line, max_new_tokens=4)

    assert (response.finish_reason, response.output_tokens) == ("length", 4)
    assert SAID.startswith(response.texts[0].strip())
    assert count <= 2


async def test_a_character_that_is_cut_in_two_costs_no_text(line: CoreLine):
    line.core.behaviour.update(say="one 🦊🦊🦊🦊")
    found = [(await outputs(line, max_new_tokens=limit))[0].texts[0] for limit in range(1, 24)]

    assert all("one 🦊🦊🦊🦊".startswith(text.strip()) for text in found)
    assert found == sorted(found, key=len)
    assert found[-1] == "one 🦊🦊🦊🦊"


async def test_every_turn_is(line: CoreLine):
    response, count = await outputs(line, ["one", "two", "three"])

    assert response.texts == (SAID,) * 3
    assert count <= 6


async def test_an_answer_in_which_a_text_is_looked_for_is_told_token_by_token_and_ends_there(line: CoreLine):
    line.core.behaviour.update(say=SAID * 20, delay=0.01)
    response, count = await outputs(line, stop=(" circle",), max_new_tokens=2000)

    assert (response.texts, response.finish_reason) == (("a red square and a blue",), "stop")
    assert 5 < count < 60
    line.core.behaviour.update(say=SAID)
    assert (await outputs(line))[1] <= 2, "the next answer of that handle is told once again"


async def test_rows_that_fail_are_told(line: CoreLine):
    line.core.behaviour.update(status="INTERNAL_ENGINE_ERROR", after=3)
    response, _ = await outputs(line)

    assert response.failure is not None
    assert response.failure.code == "engine_error"


async def test_more_rows_than_handles(line: CoreLine):
    line.core.behaviour.update(answer="digest", delay=0.002)
    asked = [line.ask(f"row {number}", [picture(28, 28, number)]) for number in range(3 * ROWS)]
    alone = [(await each)[0].texts for each in asked]
    asked = [
        line.line.ask((line.request(Row(number, prompt=f"row {number}", images=DRAWN)), [picture(28, 28, number)]))
        for number in range(3 * ROWS)
    ]
    together = [found[0].texts for found in await asyncio.gather(*asked)]

    assert together == alone
    assert len(set(alone)) == 3 * ROWS
