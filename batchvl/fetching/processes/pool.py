"""Requests that processes send, for machines on which one core is not enough for them.

The decisions stay in the runner: which image is requested when, where its room is, and what follows from a failure.
"""

from __future__ import annotations

import dataclasses
import os
from contextlib import AsyncExitStack
from types import TracebackType
from typing import IO
from zlib import crc32

import msgspec

from ...config.options import FetchOptions
from ...config.units import enc_hook
from ...errors import InvalidUrl
from ...ipc.arena import Arena
from ...ipc.spawn import ParentPipe
from ..client import Visit
from ..host_headers import HostHeaders
from ..image_cache import ImageBuffer, max_private_bytes
from ..requester import LocalRequester
from .messages import Setup
from .process import FetchProcess, Launch


class ProcessPool:
    """Has images requested by processes: a `Requester` for which one core is not enough.

    Requests to a host go to the same process, which keeps its connections. A bucket is many machines, so its objects
    are spread over all processes.

    Args:
        options: Limits, and the number of processes.
        arena: Where the images go.
        log: File for the output of the processes.

    Raises:
        OptionError: An option, or the file of --host-headers, is not valid.
    """

    def __init__(self, options: FetchOptions, arena: Arena, log: IO[bytes]) -> None:
        self.host_headers = HostHeaders.read(options.host_headers)
        self._local = LocalRequester(options, self.host_headers)
        """Checks the options, and the proxy."""
        self._seconds, self._count, self._log = float(options.fetch_timeout), options.fetch_processes, log
        proxy = options.proxy
        options = dataclasses.replace(options, proxy=None)
        self._setup = Setup(
            msgspec.Raw(msgspec.msgpack.encode(options, enc_hook=enc_hook)),
            (proxy.host, proxy.port, proxy.authorization) if proxy is not None else None,
            {host: dict(table) for host, table in self.host_headers.tables.items()},
            (arena.fd, arena.size),
            max_private_bytes(arena) // self._count,
        )

    async def __aenter__(self) -> ProcessPool:
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(self._local)
            parent_pipe = ParentPipe()
            stack.callback(parent_pipe.close)
            launch = Launch(self._setup, parent_pipe, dict(os.environ), self._log)
            self._processes = [FetchProcess(launch) for _ in range(self._count)]
            for process in self._processes:
                stack.push_async_callback(process.close)
                await process.open()
            self._stack = stack.pop_all()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stack.aclose()

    @property
    def pids(self) -> list[int]:
        """The process ids of the processes."""
        return [process.pid for process in self._processes]

    async def check_proxy(self) -> None:
        """Check the proxy, if there is one. Raises ProxyError if it cannot be used."""
        await self._local.check_proxy()

    async def get(self, visit: Visit, buffer: ImageBuffer, seconds: float, *, close: bool = False) -> Visit | None:
        """Have an image requested once. See `HttpClient.get`.

        The image is in the arena only once the call has returned or raised. If it is cancelled, it raises as soon as
        the process has let go of the image's room.
        """
        target = visit.target
        try:
            key = target.key.encode()
        except UnicodeEncodeError:
            raise InvalidUrl("not a valid URL") from None
        process = self._processes[crc32(key if "://" in target.origin else target.origin.encode()) % self._count]
        return await process.get(visit, buffer, min(seconds, self._seconds), close=close)
