"""Rows that are told to end, wherever in LMDeploy they are: they do, soon, leave nothing behind and harm nobody."""

from __future__ import annotations

import asyncio
import time

import pytest
import pytest_asyncio

from batchvl.images import arena
from batchvl.request import InlineImage, Row
from batchvl.shapes import MODEL
from tests.engines.cpu_core import ROWS
from tests.engines.in_process import picture
from tests.engines.lmdeploy_line import PREPARING, CoreLine, with_core

pytestmark = [pytest.mark.lmdeploy, pytest.mark.asyncio(loop_scope="module")]

SOON = 4.0
"""Seconds; a row that LMDeploy's own abort does not reach is given 2 before it is cancelled."""


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine():
    async with with_core(
        MODEL, {"answer": "digest", "rules": {"slow": {"delay": 0.5, "answer": "say", "say": "z" * 200}}}
    ) as found:
        yield found


@pytest_asyncio.fixture(loop_scope="module")
async def line(engine: CoreLine):
    await engine.idle()
    yield engine
    await engine.idle()


class Rows:
    """Rows in the engine, each a task; pictures are drawn by the row's number."""

    def __init__(self, line: CoreLine) -> None:
        self.line, self.answers = line, {}

    async def put(self, number: int, prompt, pictures: int = 0) -> None:
        drawn = [picture(60 + number, 40, number) for _ in range(pictures)]
        row = Row(number, prompt=prompt, images=(InlineImage(b"", "drawn"),) * pictures)
        asked = self.line.request(row, max_new_tokens=200)
        self.answers[number] = asyncio.create_task(self.line.line.ask((asked, drawn)))

    async def __getitem__(self, number: int):
        return (await asyncio.wait_for(asyncio.shield(self.answers[number]), 30))[0]

    async def aborted(self, number: int, within: float = SOON):
        """Aborts a row; its response, which came soon."""
        started = time.monotonic()
        await self.line.line.engine.abort(number)
        response = await self[number]
        assert time.monotonic() - started < within
        assert (response.failure.code, response.failure.stage) == ("row_timeout", "engine")
        assert response.finish_reason is None
        return response

    async def end(self) -> None:
        for number, answer in self.answers.items():
            if not answer.done():
                await self.line.line.engine.abort(number)
        await asyncio.gather(*self.answers.values())


@pytest_asyncio.fixture(loop_scope="module")
async def rows(line: CoreLine):
    found = Rows(line)
    yield found
    await found.end()


async def until(what) -> None:
    end = time.monotonic() + 20
    while not what():
        assert time.monotonic() < end, "it never came"
        await asyncio.sleep(0.005)


async def test_a_row_that_is_being_answered(line: CoreLine, rows: Rows):
    await rows.put(0, "slow", pictures=1)
    await until(lambda: line.core.inflight == 1)
    await rows.put(1, "quick", pictures=1)
    assert (await rows[1]).failure is None

    await rows.aborted(0, within=1)

    await line.idle()


async def test_a_row_that_waits_for_a_handle(line: CoreLine, rows: Rows):
    for number in range(ROWS):
        await rows.put(number, "slow")
    await until(lambda: line.core.inflight == ROWS)
    for number in (20, 21, 22):
        await rows.put(number, "quick", pictures=1)
    await until(lambda: line.left()["rows"] == ROWS + 3 and not line.left()["preparing"])

    await rows.aborted(21)
    assert line.core.inflight == ROWS, "the others were left alone"
    assert not rows.answers[20].done()
    assert not rows.answers[22].done()

    await rows.aborted(3, within=1)
    for number in (20, 22):
        assert (await rows[number]).failure is None, "the handle is free for the others"
    assert line.core.inflight == ROWS - 1


async def test_all_handles_come_back(line: CoreLine, rows: Rows):
    for number in range(ROWS * 2):
        await rows.put(number, "slow", pictures=number % 2)
    await until(lambda: line.core.inflight == ROWS)
    await asyncio.gather(*(rows.aborted(number, within=2 * SOON) for number in range(ROWS * 2)))
    await line.idle()

    for number in range(100, 100 + ROWS * 2):
        await rows.put(number, "quick", pictures=1)
    for number in range(100, 100 + ROWS * 2):
        assert (await rows[number]).failure is None
    assert line.core.peak == ROWS


async def test_rows_in_lmdeploy_s_preparation_and_in_line_for_it(line: CoreLine, rows: Rows, monkeypatch):
    model, gate = line.loaded.engine.vl_encoder.model, asyncio.Event()
    prepare, loop = model.preprocess, asyncio.get_running_loop()

    def slowly(messages):
        asyncio.run_coroutine_threadsafe(gate.wait(), loop).result()
        return prepare(messages)

    monkeypatch.setattr(model, "preprocess", slowly)
    for number in range(PREPARING + 4):
        await rows.put(number, "quick", pictures=1)
    await until(lambda: line.left()["preparing"] == PREPARING and line.left()["rows"] == PREPARING + 4)

    await rows.aborted(PREPARING + 1)  # in line
    await rows.aborted(2)  # one of those at work
    assert not any(answer.done() for number, answer in rows.answers.items() if number not in (2, PREPARING + 1))

    gate.set()
    for number in range(PREPARING + 4):
        failure = (await rows[number]).failure
        assert (failure is None) == (number not in (2, PREPARING + 1))


async def test_an_aborted_row_s_answer_is_not_told_before_its_pictures_are_read(
    line: CoreLine, rows: Rows, monkeypatch
):
    """The runner gives the arena's bytes to somebody else the moment a row is answered."""
    read, late = [], asyncio.Event()
    at = arena.ArenaView.at
    loop = asyncio.get_running_loop()

    def slowly(self, extent):
        import threading

        if threading.current_thread() is threading.main_thread():
            return at(self, extent)  # this test's own writing
        asyncio.run_coroutine_threadsafe(late.wait(), loop).result()
        read.append(rows.answers[0].done())
        return at(self, extent)

    monkeypatch.setattr(arena.ArenaView, "at", slowly)
    await rows.put(0, "quick", pictures=1)
    await until(lambda: line.left()["preparing"] == 1)
    await line.line.engine.abort(0)
    await asyncio.sleep(3)
    assert not rows.answers[0].done()
    late.set()

    assert (await rows[0]).failure.code == "row_timeout"
    assert read == [False]


async def test_a_row_that_waits_for_room_for_its_pictures(line: CoreLine, rows: Rows):
    room = line.loaded.room
    await rows.put(5, "quick", pictures=1)
    assert (await rows[5]).failure is None  # now it is known what a picture takes
    taken = room._left
    room._left = 0
    try:
        for number in range(3):
            await rows.put(number, "quick", pictures=1)
        await until(lambda: line.left()["rows"] == 3)
        await asyncio.sleep(0.1)
        assert line.left()["sessions"] == 0, "they wait for room"
        await rows.aborted(1)
    finally:
        line.loaded.loop.call_soon_threadsafe(room.give, taken)
    assert [(await rows[number]).failure is None for number in range(3)] == [True, False, True]


async def test_a_row_of_several_turns_ends_with_those_it_has(line: CoreLine, rows: Rows):
    await rows.put(0, ["quick", "slow", "never asked"], pictures=1)
    await until(lambda: line.core.inflight == 1 and "slow" in line.core.asked[-1].prompt)
    before = len(line.core.asked)

    response = await rows.aborted(0, within=1)

    assert len(response.texts) == 1
    await line.idle()
    assert len(line.core.asked) == before
    assert response.output_tokens > 0


async def test_rows_of_one_list_do_not_wait_for_one_another(line: CoreLine):
    asked = [
        line.request(Row(number, prompt="slow" if number == 0 else "quick"), max_new_tokens=200) for number in range(20)
    ]
    found = []
    async for response in line.line.infer([(each, []) for each in asked]):
        found.append(response.row)
        if len(found) == 19:
            await line.line.engine.abort(0)

    assert found[-1] == 0
    assert sorted(found) == list(range(20))


async def test_a_list_that_nobody_listens_to_any_more_ends(line: CoreLine):
    answers = line.line.infer([(line.request(Row(number, prompt="slow")), []) for number in range(ROWS + 4)])
    listening = asyncio.create_task(anext(answers))
    await until(lambda: line.core.inflight == ROWS)

    listening.cancel()
    await asyncio.gather(listening, return_exceptions=True)
    await answers.aclose()

    await until(lambda: not any(line.left().values()))


async def test_aborting_a_row_that_is_not_there_does_nothing(line: CoreLine, rows: Rows):
    await line.line.engine.abort(12345)
    await rows.put(0, "quick")
    assert (await rows[0]).failure is None
    await line.line.engine.abort(0)
    await rows.put(1, "quick")
    assert (await rows[1]).failure is None
