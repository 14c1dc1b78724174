"""What the runner and its children say to each other."""

import asyncio
import socket

import pytest

from batchvl.ipc.channel import AsyncConnection


async def test_a_channel_that_is_given_up_while_it_opens_is_not_lost_as_well():
    """Who opens it has nothing yet to hold the loss against."""
    ours, theirs = socket.socketpair()
    lost = []
    with theirs:
        opening = asyncio.ensure_future(
            AsyncConnection.open(ours, int, lambda message: None, lambda: lost.append(True))
        )
        await asyncio.sleep(0)
        opening.cancel()
        with pytest.raises(asyncio.CancelledError):
            await opening
        await asyncio.sleep(0.05)
    assert not lost


async def test_a_channel_is_lost_when_the_other_end_is_gone():
    ours, theirs = socket.socketpair()
    lost = asyncio.Event()
    await AsyncConnection.open(ours, int, lambda message: None, lost.set)
    theirs.close()
    await asyncio.wait_for(lost.wait(), 5)
