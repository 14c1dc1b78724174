"""`SharedTask`: a value that several tasks need is made once and kept as long as one of them uses it."""

import asyncio

import pytest

from batchvl.concurrency import SharedTask


class Thing:
    """A shared value that is made once `may_finish` is set, with counts of what happened to it."""

    def __init__(self, users, error=None):
        self.may_finish, self.error = asyncio.Event(), error
        self.made = self.cancelled = 0
        self.released = []
        self.shared = SharedTask(users, self.make, self.released.append)

    async def make(self):
        self.made += 1
        try:
            await self.may_finish.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        if self.error is not None:
            raise self.error
        return "thing"

    async def use(self, until=None):
        try:
            value = await self.shared.get()
            if until is not None:
                await until.wait()
            return value
        finally:
            self.shared.release()


async def test_made_once_and_released_after_the_last_user():
    thing, until = Thing(3), asyncio.Event()
    users = [asyncio.create_task(thing.use()), asyncio.create_task(thing.use(until))]
    thing.may_finish.set()
    assert await users[0] == "thing"
    assert thing.released == []
    until.set()
    await users[1]
    assert thing.released == []
    assert await thing.use() == "thing"
    assert (thing.made, thing.released) == (1, ["thing"])


async def test_every_user_gets_the_error():
    thing = Thing(2, RuntimeError("no"))
    thing.may_finish.set()
    for _ in range(2):
        with pytest.raises(RuntimeError, match="no"):
            await thing.use()
    assert (thing.made, thing.released) == (1, [])


async def test_a_cancelled_user_does_not_affect_the_others():
    thing = Thing(2)
    first, second = asyncio.create_task(thing.use()), asyncio.create_task(thing.use())
    await asyncio.sleep(0)
    first.cancel()
    await asyncio.wait([first])
    thing.may_finish.set()
    assert await second == "thing"
    assert (thing.cancelled, thing.released) == (0, ["thing"])


async def test_making_is_cancelled_with_the_last_user():
    thing = Thing(2)
    users = [asyncio.create_task(thing.use()) for _ in range(2)]
    await asyncio.sleep(0)
    for user in users:
        user.cancel()
    await asyncio.wait(users)
    await asyncio.sleep(0)
    assert (thing.made, thing.cancelled, thing.released) == (1, 1, [])


async def test_a_single_user():
    thing, failing = Thing(1), Thing(1, RuntimeError("no"))
    for each in (thing, failing):
        each.may_finish.set()
    assert await thing.use() == "thing"
    assert thing.released == ["thing"]
    with pytest.raises(RuntimeError, match="no"):
        await failing.use()
    assert failing.released == []
