"""The dispatcher of downloads: a scheduler of hosts, which decides whose download starts next.

A download that waits is a descriptor in the queue of its host (`host.py`); only one in progress has a task and a
connection. Three things hold a download back: its host's limits, the number of downloads that raises the throughput
(`level.py`), and room for what is on its way.
"""

from __future__ import annotations

import asyncio
import random
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

from ..config.options import FetchOptions
from ..errors import ConnectionFailed, FetchError, RowError, TooLarge
from ..types import Extent
from .bottleneck import Bottleneck
from .client import Visit, max_connections
from .disk_cache import CACHE, NotCached
from .download import Download, SetAside
from .host import Host
from .http import Rejected, TransientError
from .http1.errors import ProxyError
from .image_cache import ImageBuffer, ImageCache, NoRoom
from .image_client import ImageClient
from .level import ConcurrencyLevel
from .outage import Outage
from .sources import named

FIRST_BACKOFF_SECONDS = 0.5
_MAX_BACKOFF_SECONDS = 30.0
_MAX_HOSTS = 65_536
"""Hosts whose limits and failures are remembered, besides those with downloads."""
_PATIENT_REJECTIONS = 3
"""Rejections of one URL, while its host accepts others, until the URL and not the host is taken for their cause."""
_BEHIND = 4
"""Downloads from a host that come before one that the host has rejected."""
_MANY_HOSTS = 256
"""From this number of hosts on, a connection is kept only to a host that has been requested more than once."""
_TIMER_SECONDS = 0.001
"""How much too early uvloop may call."""
_CROWD = 16
"""Downloads that wait for one host, from which on some of them may be set aside."""
_FEW = 16
"""Downloads that are left, and for which nothing else waits any more."""


Result = Extent | Visit | NotCached | NoRoom | TransientError | RowError | ProxyError
"""What an attempt comes to: the image, where it is redirected to, or why there is none."""


class Outcome(NamedTuple):
    """How a download ended."""

    extent: Extent | None = None
    """The image, if it has arrived."""
    error: Exception | None = None
    """Why it has not."""
    set_aside: SetAside | None = None
    """Why `error` is only about this time, if it is."""


class Dispatcher:
    """Starts downloads, retries them, and reports how each ended. For one event loop, the running one.

    Args:
        options: Limits.
        client: Sends the requests.
        cache: Has the room for the images.
        on_end: Called once for each download that was not cancelled.
        on_change: Called when a download may be able to start.
        on_bug: Called with an exception that nobody else would see, so that no row waits for ever, and with a
            StoppedEarly if the proxy is gone.
        backoff: Seconds before the first retry, doubled for each further one.

    Attributes:
        blocked: The next download, if it has to wait for room.
    """

    def __init__(
        self,
        options: FetchOptions,
        client: ImageClient,
        cache: ImageCache,
        on_end: Callable[[Download, Outcome], object],
        on_change: Callable[[], object],
        on_bug: Callable[[Exception], object],
        *,
        backoff: float = FIRST_BACKOFF_SECONDS,
    ) -> None:
        self._options, self._client, self._cache = options, client, cache
        self._on_end, self._on_change, self._on_bug, self._backoff = on_end, on_change, on_bug, backoff
        self._loop = asyncio.get_running_loop()
        self._level = ConcurrencyLevel(min(options.fetch_concurrency, max_connections()), self._loop.time())
        self._hosts: dict[str, Host] = {}
        self._max_hosts = _MAX_HOSTS
        """Number of hosts at which some are forgotten."""
        self._queued: dict[str, Host] = {}
        """Hosts for which downloads wait."""
        self._ready: deque[Host] = deque()
        """Hosts from which a download may start, in turn."""
        self._attempts: dict[asyncio.Task[None], Host] = {}
        self._retrying = 0
        self._stall_timer: asyncio.TimerHandle | None = None
        self._bottleneck = Bottleneck(self._loop.time())
        self._outage = Outage(client.check_proxy, options.host_patience, on_change, on_bug)
        self.blocked: Download | None = None

    @property
    def is_blocked(self) -> bool:
        """Whether the next download has to wait for room."""
        return self.blocked is not None

    @property
    def active(self) -> int:
        """Number of downloads in progress."""
        return len(self._attempts)

    @property
    def is_hungry(self) -> bool:
        """Whether more downloads could start than are waiting."""
        return not self.is_blocked and len(self._ready) < self._level.value

    @property
    def is_settled(self) -> bool:
        """Whether nearly all downloads that are left are in progress, or wait for hosts that asked for fewer requests.

        Not while any waits for a host that does not respond: it either responds soon, or has them set aside.
        """
        if any(host.opened is not None for hosts in (self._queued, self._attempts) for host in hosts.values()):
            return False
        waiting = sum(len(host.queue) for host in self._queued.values() if not host.is_paced)
        return waiting + self._retrying <= _FEW

    def add(self, download: Download, *, behind: int | None = None) -> None:
        """Put a download into the queue of its host.

        Args:
            download: The download.
            behind: Number of those that wait after which it is put; None is all.
        """
        host = self._host(download.visit.target.origin)
        if not host.may_wait(self._loop.time(), self._options.host_patience):
            self._set_aside(host, download, SetAside.SILENT)
            return
        if behind is None:
            host.queue.append(download)
        else:
            host.queue.insert(behind, download)
        self._queued[host.name] = host
        self._plan(host)

    def cancel(self, download: Download) -> None:
        """Give up a download that has not ended."""
        download.is_cancelled = True  # its host's queue passes over it
        if download.task is not None:
            download.task.cancel()
        elif download.timer is not None:
            download.timer.cancel()
            self._retrying -= 1

    async def close(self) -> None:
        """Wait for the end of downloads that were cancelled."""
        if self._stall_timer is not None:
            self._stall_timer.cancel()
        await self._outage.close()
        await asyncio.gather(*self._attempts, return_exceptions=True)

    def set_aside(self) -> bool:
        """End half of the downloads that wait for one host, the one with the most, with `Outcome.set_aside`.

        Only hosts count that asked for fewer requests or do not respond. Return False if there is none for which many
        wait.
        """
        hosts = [host for host in self._queued.values() if host.is_paced or host.opened is not None]
        host = max(hosts, key=lambda host: len(host.queue), default=None)
        if host is None or len(host.queue) < _CROWD:
            return False
        for _ in range(len(host.queue) // 2):
            self._set_aside(host, host.queue.pop(), SetAside.CROWDED)
        return True

    def pass_over(self, *, is_last: bool = False) -> None:
        """Let another host have the next turn.

        Args:
            is_last: Let the other downloads from this host come before the next one too.
        """
        if is_last and self._ready:
            self._ready[0].queue.rotate(-1)
        self._ready.rotate(-1)

    def probe_hosts(self) -> None:
        """Let every host that did not respond have another request at once."""
        for host in self._hosts.values():
            host.probe_now()

    def dispatch(self) -> None:
        """Start the downloads that may start."""
        now = self._loop.time()
        self.blocked = None
        while self._ready and not self._outage.is_on:
            host = self._ready[0]
            while host.queue and host.queue[0].is_cancelled:
                host.queue.popleft()
            at = host.ready_at(now)
            if not host.queue or at is None or at > now:
                self._unlist(host, now)
                continue
            if host.name != CACHE and self._level_is_reached(now):
                self._bottleneck.forget()
                return
            room = self._room(host.queue[0])
            if room is None:
                self.blocked = host.queue[0]
                self._level.is_enough(now)
                self._bottleneck.forget()
                return
            self._start(host.queue.popleft(), host, room, now)
            self._unlist(host, now)
        self._level.is_enough(now)
        self._bottleneck.look(self._queued.values(), now)

    def _call_at(self, time: float, call: Callable[[], None]) -> asyncio.TimerHandle:
        def guarded() -> None:
            try:
                call()
            except Exception as error:
                self._on_bug(error)

        return self._loop.call_at(time + _TIMER_SECONDS, guarded)

    def _host(self, name: str) -> Host:
        if (host := self._hosts.get(name)) is None:
            if len(self._hosts) >= self._max_hosts:
                self._forget_hosts()
            host = self._hosts[name] = Host(name, *self._client.limits(name))
        return host

    def _forget_hosts(self) -> None:
        """Forget hosts: those without limits and failures first, then those that have been known for longest."""
        busy = {name: host for name, host in self._hosts.items() if host.queue or host.active}
        known = [(name, host) for name, host in self._hosts.items() if name not in busy and not host.is_idle]
        self._hosts = dict(known[-(_MAX_HOSTS // 2) :]) | busy
        self._max_hosts = max(_MAX_HOSTS, 2 * len(self._hosts))  # so that not every new host has this done

    def _plan(self, host: Host, now: float | None = None) -> None:
        """List a host if a download from it may start now, or look at it again when one may."""
        if not host.queue:
            self._queued.pop(host.name, None)
            return
        now = self._loop.time() if now is None else now
        at = host.ready_at(now)
        if host.is_listed or at is None:  # after the end of one in progress it is planned again
            return
        if at <= now:
            host.is_listed = True
            # What is kept waits for no host. A host with a rate gets all of it: its rows would be the last of the run.
            if host.name == CACHE or host.is_limited:
                self._ready.appendleft(host)
            else:
                self._ready.append(host)
            self._on_change()
        elif host.wake_at is None or at < host.wake_at:
            host.wake_at = at
            self._call_at(at, lambda: self._wake(host))

    def _wake(self, host: Host) -> None:
        host.wake_at = None
        self._plan(host)

    def _unlist(self, host: Host, now: float) -> None:
        """Take the first host off the list, and back onto it if another download may start."""
        self._ready.popleft()
        host.is_listed = False
        self._plan(host, now)  # with the time of `dispatch`: what is listed for a later one would be taken off for ever

    def _level_is_reached(self, now: float) -> bool:
        """Return whether as many downloads are in progress as may be. If so, look again when more may start."""
        if self.active < self._level.value:
            return False
        self._level.limits(now)
        if self._stall_timer is None and self._level.stalls_at is not None:
            self._stall_timer = self._call_at(self._level.stalls_at, self._look_for_stall)
        return self.active >= self._level.value

    def _look_for_stall(self) -> None:
        self._stall_timer = None
        self._on_change()

    def _room(self, download: Download) -> list[Extent] | None:
        """Return the room that a download takes before it starts, often none; None if it has to wait for room."""
        cache = self._cache
        if download.room:
            return cache.reserve([download.room])
        if self._attempts and cache.available_bytes < (self.active + 1) * cache.usual_bytes:
            return None
        return []

    def _start(self, download: Download, host: Host, room: list[Extent], now: float) -> None:
        host.start(now)
        buffer = ImageBuffer(self._cache, self._options.max_image_bytes, room[0] if room else None)
        download.task = self._loop.create_task(self._attempt(download, host, buffer, now))
        self._attempts[download.task] = host
        # A task that is cancelled before it begins never runs any of its code.
        download.task.add_done_callback(lambda task: self._end_attempt(task, download, host, buffer))

    def _end_attempt(self, task: asyncio.Task[None], download: Download, host: Host, buffer: ImageBuffer) -> None:
        """Return what an attempt has taken, unless that has been done."""
        if self._attempts.pop(task, None) is None:
            return
        buffer.discard()
        host.end()
        download.task = None
        self._plan(host)
        self._on_change()

    async def _attempt(self, download: Download, host: Host, buffer: ImageBuffer, started: float) -> None:
        """Request an image once, and see to what follows."""
        task = asyncio.current_task()
        assert task is not None
        is_probe = host.opened is not None
        try:
            result = await self._request(download, host, buffer)
        except Exception as error:
            self._on_bug(error)
            return
        finally:
            self._end_attempt(task, download, host, buffer)
        try:
            if host.name != CACHE:
                self._level.complete(self._loop.time(), self._loop.time() - started)
            if not (isinstance(result, Rejected | ProxyError) or is_probe):
                download.seconds += self._loop.time() - started
            self._conclude(download, host, result, started)
            self._plan(host)
        except Exception as error:
            self._on_bug(error)

    async def _request(self, download: Download, host: Host, buffer: ImageBuffer) -> Result:
        close = len(self._hosts) > _MANY_HOSTS and not (host.queue or host.responses)
        seconds = self._options.fetch_deadline - download.seconds
        try:
            visit = await self._client.get(download.visit, buffer, seconds, close=close)
            download.may_be_kept = buffer.may_be_kept
            return buffer.finish() if visit is None else visit
        except (RowError, TransientError, NoRoom, NotCached, ProxyError) as error:
            return error

    def _conclude(self, download: Download, host: Host, result: Result, started: float) -> None:
        """Take the result of an attempt to the host, and to those who wait for the download."""
        now = self._loop.time()
        match result:
            case Extent():
                host.respond()
                self._on_end(download, Outcome(result))
            case Visit():
                host.respond()
                download.visit = result
                self.add(download, behind=0)
            case NotCached():
                host.respond()
                download.visit = Visit(download.target)
                self.add(download, behind=0 if download.is_first else None)
            case NoRoom():
                self._await_room(download, result.needed)
            case ProxyError():
                self._outage.begin(result)
                self.add(download, behind=0)
            case Rejected() if download.rejections < _PATIENT_REJECTIONS or host.responses == download.responses_seen:
                download.rejections += 1
                download.responses_seen = host.responses
                self._slow_down(host, lambda: host.reject(now, started, result.retry_after), result.error)
                self.add(download, behind=_BEHIND)  # their responses show whether it is the host or the URL
            case TransientError():
                if result.blames_host:
                    self._slow_down(host, lambda: host.fail(now), result.error)
                self._retry(download, host, result)
            case _:
                host.respond()
                self._fail(download, download.visit.explain(result))

    def _slow_down(self, host: Host, record: Callable[[], None], error: FetchError) -> None:
        """Record a failure of a host. If it has been failing for long, its downloads are set aside."""
        was_open = host.opened is not None
        record()
        host.error = error
        if host.opened is None:
            return
        now, patience = self._loop.time(), self._options.host_patience
        if not was_open:
            self._call_at(host.opened + patience, lambda: self._lose_patience(host))
        if not host.may_wait(now, patience):
            self._lose_patience(host)

    def _lose_patience(self, host: Host) -> None:
        """Set all downloads of a host aside, unless it responds again or is about to be probed."""
        if host.may_wait(self._loop.time(), self._options.host_patience):
            return
        while host.queue:
            self._set_aside(host, host.queue.popleft(), SetAside.SILENT)
        self._plan(host)

    def _set_aside(self, host: Host, download: Download, reason: SetAside) -> None:
        """End a download that would wait for its host for too long."""
        if download.is_cancelled:
            return
        error, note = host.error or ConnectionFailed("too many images wait for this host"), ""
        if host.opened is not None:
            note = f"; {host.name} has not responded for {self._loop.time() - host.opened:.0f} s"
        self._fail(download, download.visit.explain(error), note, set_aside=reason)

    def _await_room(self, download: Download, needed: int) -> None:
        """Try again when there is room for so many bytes."""
        if needed > self._cache.arena.size:
            text = f"takes {needed:,} bytes of the arena's {self._cache.arena.size:,} for encoded images"
            self._fail(download, TooLarge(f"{text}: increase --arena-bytes"))
            return
        download.room = needed
        download.visit = download.start
        self.add(download, behind=0)

    def _retry(self, download: Download, host: Host, failure: TransientError) -> None:
        """Try again after a pause; while the host does not respond, at the end of its queue and without limit."""
        download.visit, error = Visit(download.target), download.visit.explain(failure.error)
        if failure.blames_host and host.opened is not None:
            self.add(download)
            return
        download.attempts += 1
        pause = min(self._backoff * 2 ** (download.attempts - 1), _MAX_BACKOFF_SECONDS)
        pause += random.uniform(0, self._backoff)
        if isinstance(failure, Rejected):
            pause = max(pause, min(failure.retry_after, _MAX_BACKOFF_SECONDS))
        if download.attempts > self._options.fetch_retries:
            self._fail(download, error)
        elif download.seconds + pause >= self._options.fetch_deadline:
            self._fail(download, error, f"; no time is left of --fetch-deadline {self._options.fetch_deadline:g} s")
        else:
            download.seconds += pause
            download.timer = self._call_at(self._loop.time() + pause, lambda: self._end_pause(download))
            self._retrying += 1

    def _end_pause(self, download: Download) -> None:
        download.timer = None
        self._retrying -= 1
        self.add(download, behind=0)

    def _fail(self, download: Download, error: RowError, note: str = "", *, set_aside: SetAside | None = None) -> None:
        if download.attempts > 1:
            note = f" (after {download.attempts} attempts){note}"
        self._on_end(download, Outcome(error=named(error, download.name, note), set_aside=set_aside))
