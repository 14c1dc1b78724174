"""Name resolution by the system's resolver, in threads that no other work waits for.

A name whose servers never answer keeps a thread for as long as the system's resolver is patient, often 10 s and more.
In a thread pool that is shared, as asyncio's is, a few dozens of such names hold up every other name, and the end of
the process. Here each lookup has a thread, a deadline, and nobody else waits for it.
"""

from __future__ import annotations

import asyncio
import ipaddress
import re
import socket
import time
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

from aiohttp.abc import AbstractResolver, ResolveResult
from cachetools import TLRUCache

from ..concurrency import DaemonThreadExecutor

_FOUND_SECONDS = 300.0
_NO_SUCH_NAME_SECONDS = 60.0
_UNCERTAIN_SECONDS = 10.0
"""How long a failure that another lookup may not have is remembered: servers are not asked at every retry of a row."""
NO_SUCH_NAME = {socket.EAI_NONAME, socket.EAI_NODATA}
_FLAGS = socket.AI_NUMERICHOST | socket.AI_NUMERICSERV
_IPV4 = re.compile(r"[0-9a-fx.]+", re.IGNORECASE)

_MAX_YOUNG = 128
_YOUNG_SECONDS = 1.0
"""Lookups that have just begun are limited: name servers drop what comes in larger bursts, and the system asks again
only after 5 s. An older one is taken for a name without an answer, which hardly burdens them."""

_Key = tuple[str, int]
"""A name and an address family."""


@dataclass(frozen=True)
class _Answer:
    seconds: float
    """How long it is remembered."""
    addresses: tuple[tuple[int, int, str], ...] = ()
    """Family, protocol and address of each."""
    failure: tuple[int, str] | None = None
    """Number and text of a gaierror."""


class Resolver(AbstractResolver):
    """Resolves names for one event loop, each independently of all others.

    A lookup that takes longer than its deadline fails for those who wait, though its thread goes on and remembers what
    it finds. Concurrent lookups of a name are one lookup, and answers are remembered: addresses for 300 s, the absence
    of a name for 60 s, other failures for 10 s. `getaddrinfo` tells no times to live.

    Args:
        deadline: Seconds for a lookup, including the wait for a thread if all are busy.
        max_threads: Lookups at the same time, of which 128 may be younger than a second. Threads are started as needed,
            and end when idle. They are daemons.
        cache_size: Names that are remembered.
        clock: Seconds, for the age of answers.
    """

    def __init__(
        self,
        *,
        deadline: float = 10.0,
        max_threads: int = 512,
        cache_size: int = 65_536,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._deadline, self._max_threads = deadline, max_threads
        self._threads = DaemonThreadExecutor(max_threads, "batchvl-dns")
        self._awaited: dict[_Key, tuple[asyncio.Future[_Answer], asyncio.TimerHandle]] = {}
        """With the timer of the deadline."""
        self._queue: OrderedDict[_Key, None] = OrderedDict()
        self._running: dict[_Key, asyncio.TimerHandle] = {}
        """With the timer of its youth; some are awaited no longer."""
        self._young: set[_Key] = set()
        self._answers: TLRUCache[_Key, _Answer] = TLRUCache(
            cache_size, ttu=lambda _, answer, now: now + answer.seconds, timer=clock
        )

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        """Return the addresses of a host, in the system's order of preference.

        Raises:
            socket.gaierror: There are none; EAI_AGAIN after the deadline.
            ValueError: The host cannot be a name.
        """
        if (address := numeric_address(host)) is not None:
            kind = socket.AF_INET6 if ":" in address else socket.AF_INET
            return [_result(host, port, (kind, socket.IPPROTO_TCP, address))]
        check_name(host)
        key = (host, int(family))
        answer = self._answers.get(key)
        if answer is None:
            answer = await asyncio.shield(self._answer(key))
        if answer.failure is not None:
            raise socket.gaierror(*answer.failure)
        return [_result(host, port, address) for address in answer.addresses]

    async def close(self) -> None:
        """Let idle threads end now. Busy ones end after their lookup, and do not hold up the end of the process."""
        self._threads.shutdown()

    def _answer(self, key: _Key) -> asyncio.Future[_Answer]:
        if key not in self._awaited:
            timer = self._loop.call_later(self._deadline, self._give_up, key)
            self._awaited[key] = self._loop.create_future(), timer
            if key not in self._running:
                self._queue[key] = None
                self._start_lookups()
        return self._awaited[key][0]

    def _start_lookups(self) -> None:
        while self._queue and len(self._young) < _MAX_YOUNG and len(self._running) < self._max_threads:
            key, _ = self._queue.popitem(last=False)
            self._running[key] = self._loop.call_later(_YOUNG_SECONDS, self._grow_old, key)
            self._young.add(key)
            self._threads.submit(self._look_up, key)

    def _grow_old(self, key: _Key) -> None:
        self._young.remove(key)
        self._start_lookups()

    def _look_up(self, key: _Key) -> None:
        """Look up a name, in a thread."""
        answer = _ask_system(*key)
        with suppress(RuntimeError):  # the loop has closed
            self._loop.call_soon_threadsafe(self._finish, key, answer)

    def _finish(self, key: _Key, answer: _Answer) -> None:
        self._running.pop(key).cancel()
        self._young.discard(key)
        self._settle(key, answer)
        self._start_lookups()

    def _give_up(self, key: _Key) -> None:
        """End the wait for a lookup. If a thread is at it, it goes on."""
        if key in self._running:
            reason, seconds = f"no answer within {self._deadline:g} s", _UNCERTAIN_SECONDS
        else:
            del self._queue[key]
            reason, seconds = f"not looked up within {self._deadline:g} s: too many other names have no answer", 0.0
        self._settle(key, _Answer(seconds, failure=(socket.EAI_AGAIN, reason)))

    def _settle(self, key: _Key, answer: _Answer) -> None:
        self._answers[key] = answer
        if key in self._awaited:
            future, timer = self._awaited.pop(key)
            timer.cancel()
            future.set_result(answer)


def numeric_address(host: str) -> str | None:
    """Return the address that a host is written as, in any form that the system reads, or None for a name.

    >>> numeric_address("0x7f.1"), numeric_address("2130706433"), numeric_address("::1"), numeric_address("example.org")
    ('127.0.0.1', '127.0.0.1', '::1', None)
    """
    if _IPV4.fullmatch(host):
        with suppress(OSError):
            return socket.inet_ntoa(socket.inet_aton(host))
    elif ":" in host:
        with suppress(ValueError):
            return str(ipaddress.IPv6Address(host))
    return None


def check_name(host: str) -> None:
    """Raise ValueError if a host cannot be a name for `getaddrinfo`.

    It cuts a name off at a NUL: `127.0.0.1\\0.example.org`, in which others see a subdomain of example.org.
    """
    if "\0" in host:
        raise ValueError("a NUL in the name of a host")
    host.encode("idna")


def _ask_system(host: str, family: int) -> _Answer:
    try:
        infos = socket.getaddrinfo(host, None, family=family, type=socket.SOCK_STREAM, flags=socket.AI_ADDRCONFIG)
    except socket.gaierror as error:
        code = error.errno or socket.EAI_FAIL
        seconds = _NO_SUCH_NAME_SECONDS if code in NO_SUCH_NAME else _UNCERTAIN_SECONDS
        return _Answer(seconds, failure=(code, error.strerror or "no address"))
    except Exception as error:  # out of descriptors or of memory; whoever waits must learn of it
        return _Answer(0, failure=(socket.EAI_AGAIN, f"the lookup failed: {error}"))
    return _Answer(_FOUND_SECONDS, tuple((kind, protocol, str(address[0])) for kind, _, protocol, _, address in infos))


def _result(host: str, port: int, address: tuple[int, int, str]) -> ResolveResult:
    family, protocol, numeric = address
    return ResolveResult(hostname=host, host=numeric, port=port, family=family, proto=protocol, flags=_FLAGS)
