"""What several tasks need is made once, for as long as one of them uses it."""

import asyncio

import pytest

from batchvl.concurrency import SharedTask


class Thing:
    """Made when `go` is set; counts."""

    def __init__(self, users, error=None):
        self.go, self.error = asyncio.Event(), error
        self.made = self.cancelled = 0
        self.gone = []
        self.shared = SharedTask(users, self.make, self.gone.append)

    async def make(self):
        self.made += 1
        try:
            await self.go.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        if self.error is not None:
            raise self.error
        return "thing"

    async def use(self, until=None):
        try:
            found = await self.shared.get()
            if until is not None:
                await until.wait()
            return found
        finally:
            self.shared.done()


async def test_it_is_made_once_and_let_go_of_after_the_last_user():
    thing, until = Thing(3), asyncio.Event()
    users = [asyncio.create_task(thing.use()), asyncio.create_task(thing.use(until))]
    thing.go.set()
    assert await users[0] == "thing"
    assert thing.gone == []
    until.set()
    await users[1]
    assert thing.gone == []
    assert await thing.use() == "thing"
    assert (thing.made, thing.gone) == (1, ["thing"])


async def test_every_user_gets_what_making_it_raises():
    thing = Thing(2, RuntimeError("no"))
    thing.go.set()
    for _ in range(2):
        with pytest.raises(RuntimeError, match="no"):
            await thing.use()
    assert (thing.made, thing.gone) == (1, [])


async def test_a_cancelled_user_leaves_it_to_the_others():
    thing = Thing(2)
    first, second = asyncio.create_task(thing.use()), asyncio.create_task(thing.use())
    await asyncio.sleep(0)
    first.cancel()
    await asyncio.wait([first])
    thing.go.set()
    assert await second == "thing"
    assert (thing.cancelled, thing.gone) == (0, ["thing"])


async def test_where_all_are_cancelled_so_is_the_making_of_it():
    thing = Thing(2)
    users = [asyncio.create_task(thing.use()) for _ in range(2)]
    await asyncio.sleep(0)
    for user in users:
        user.cancel()
    await asyncio.wait(users)
    await asyncio.sleep(0)
    assert (thing.made, thing.cancelled, thing.gone) == (1, 1, [])


async def test_one_user_alone():
    thing, bad = Thing(1), Thing(1, RuntimeError("no"))
    for each in (thing, bad):
        each.go.set()
    assert await thing.use() == "thing"
    assert thing.gone == ["thing"]
    with pytest.raises(RuntimeError, match="no"):
        await bad.use()
    assert bad.gone == []
