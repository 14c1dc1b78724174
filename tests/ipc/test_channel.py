"""Connections between the runner and its child processes."""

import asyncio
import socket
import struct
import threading

import pytest

from batchvl.ipc.channel import AsyncConnection, BlockingConnection, encode_frame


async def test_a_connection_cancelled_while_it_opens_is_not_reported_as_lost():
    """The caller gets the cancellation, and has no connection that could be lost."""
    near, far = socket.socketpair()
    lost = []
    with far:
        opening = asyncio.ensure_future(
            AsyncConnection.open(near, int, lambda message: None, lambda: lost.append(True))
        )
        await asyncio.sleep(0)
        opening.cancel()
        with pytest.raises(asyncio.CancelledError):
            await opening
        await asyncio.sleep(0.05)
    assert not lost


async def test_a_connection_is_lost_when_the_other_end_closes():
    near, far = socket.socketpair()
    lost = asyncio.Event()
    await AsyncConnection.open(near, int, lambda message: None, lost.set)
    far.close()
    await asyncio.wait_for(lost.wait(), 5)


async def test_frames_may_arrive_in_pieces():
    near, far = socket.socketpair()
    messages: asyncio.Queue[list[int]] = asyncio.Queue()
    connection = await AsyncConnection.open(near, list[int], messages.put_nowait, lambda: None)
    with far:
        data = encode_frame([1]) + encode_frame([]) + encode_frame(list(range(300)))
        for byte in data:
            far.sendall(bytes([byte]))
            await asyncio.sleep(0)
        assert [await asyncio.wait_for(messages.get(), 5) for _ in range(3)] == [[1], [], list(range(300))]
        connection.close()


def test_both_kinds_of_connection_understand_each_other():
    near, far = socket.socketpair()

    async def echo():
        lost = asyncio.Event()
        connection = await AsyncConnection.open(near, str, lambda text: connection.send(text.upper()), lost.set)
        await asyncio.wait_for(lost.wait(), 5)

    thread = threading.Thread(target=asyncio.run, args=(echo(),))
    thread.start()
    with far:
        connection = BlockingConnection(far, str)
        connection.send("hello")
        assert connection.receive() == "HELLO"
        far.shutdown(socket.SHUT_RDWR)
    thread.join()


@pytest.mark.parametrize("data", [b"", b"\x05\x00", struct.pack("<I", 5) + b"\x93\x01"])
def test_a_connection_that_closes_within_a_frame_ends_with_eof(data):
    near, far = socket.socketpair()
    with near, far:
        far.sendall(data)
        far.shutdown(socket.SHUT_WR)
        with pytest.raises(EOFError):
            BlockingConnection(near, list[int]).receive()
