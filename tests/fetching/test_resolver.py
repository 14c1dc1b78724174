"""Names are resolved independently of each other, by a deadline, and answers are remembered."""

from __future__ import annotations

import asyncio
import errno
import socket
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest

from batchvl.fetching.http1.connections import Connections
from batchvl.fetching.network import AddressRefused, NetworkGuard
from batchvl.fetching.resolver import Resolver
from batchvl.fetching.urls import parse_url
from tests.faults.dns import PUBLIC, DNSServer, Failure, run_in_namespace
from tests.timing import scaled

NO_SUCH_NAME = socket.gaierror(socket.EAI_NONAME, "Name or service not known")
TRY_AGAIN = socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")


class System:
    """In place of `socket.getaddrinfo`. Every name has an address, but for those in `errors` and `unanswered`."""

    def __init__(self) -> None:
        self.lookups: Counter[str] = Counter()
        self.errors: dict[str, Exception] = {}
        self.unanswered: set[str] = set()
        """Their lookups last until `answer` is set."""
        self.answer = threading.Event()
        self.reached = threading.Semaphore(0)
        """Released for each lookup that has begun."""

    def __call__(self, host: str, port: Any, **options: Any) -> list[Any]:
        self.lookups[host] += 1
        self.reached.release()
        if host in self.unanswered:
            self.answer.wait()
        if host in self.errors:
            raise self.errors[host]
        return [
            (socket.AF_INET6, socket.SOCK_STREAM, 6, "", ("2606:4700:4700::1111", 0, 0, 0)),
            (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("1.1.1.1", 0)),
            (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("1.0.0.1", 0)),
        ]


@pytest.fixture
def system(monkeypatch: pytest.MonkeyPatch) -> Iterator[System]:
    system = System()
    monkeypatch.setattr(socket, "getaddrinfo", system)
    yield system
    system.answer.set()


def resolver_threads() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name == "batchvl-dns"}


async def test_the_addresses_are_the_systems_in_its_order(system: System) -> None:
    results = await Resolver().resolve("example.org", 8080)
    assert [result["host"] for result in results] == ["2606:4700:4700::1111", "1.1.1.1", "1.0.0.1"]
    assert results[1] == {
        "hostname": "example.org",
        "host": "1.1.1.1",
        "port": 8080,
        "family": socket.AF_INET,
        "proto": socket.IPPROTO_TCP,
        "flags": socket.AI_NUMERICHOST | socket.AI_NUMERICSERV,
    }


@pytest.mark.parametrize(
    ("host", "address"),
    [
        ("127.0.0.1", "127.0.0.1"),
        ("0x7F.1", "127.0.0.1"),
        ("017700000001", "127.0.0.1"),
        ("0", "0.0.0.0"),
        ("::1", "::1"),
        ("fe80::1%eth0", "fe80::1%eth0"),
    ],
)
async def test_addresses_need_no_lookup(system: System, host: str, address: str) -> None:
    before = resolver_threads()
    [result] = await Resolver().resolve(host, 80)
    assert result["host"] == address
    assert result["family"] == (socket.AF_INET6 if ":" in address else socket.AF_INET)
    assert not system.lookups
    assert resolver_threads() <= before


@pytest.mark.parametrize("host", ["a..b", ".", f"{'a' * 64}.example", "127.0.0.1\0.example.org"])
async def test_what_cannot_be_a_name_is_not_looked_up(system: System, host: str) -> None:
    with pytest.raises(ValueError):
        await Resolver().resolve(host)
    assert not system.lookups


async def test_concurrent_lookups_of_a_name_are_one(system: System) -> None:
    system.unanswered.add("example.org")
    resolver = Resolver(deadline=scaled(60))
    waiting = [asyncio.create_task(resolver.resolve("example.org", port)) for port in range(50)]
    await asyncio.to_thread(system.reached.acquire)
    waiting[0].cancel()  # of no concern to the others
    system.answer.set()
    results = await asyncio.gather(*waiting[1:])
    assert [result[0]["port"] for result in results] == list(range(1, 50))
    assert system.lookups == {"example.org": 1}


@pytest.mark.parametrize(
    ("error", "seconds"), [(None, 300), (NO_SUCH_NAME, 60), (TRY_AGAIN, 10), (OSError(errno.EMFILE, "descriptors"), 0)]
)
async def test_answers_are_remembered(system: System, error: Exception | None, seconds: float) -> None:
    now = 1000.0
    resolver = Resolver(clock=lambda: now)
    if error is not None:
        system.errors["example.org"] = error

    async def resolve() -> None:
        with suppress(socket.gaierror):
            await resolver.resolve("example.org")
            assert error is None

    await resolve()
    now += seconds - 1
    await resolve()
    assert system.lookups["example.org"] == (1 if seconds else 2)
    now += 2
    await resolve()
    assert system.lookups["example.org"] == (2 if seconds else 3)


async def test_a_remembered_failure_is_the_same_failure(system: System) -> None:
    system.errors["example.org"] = NO_SUCH_NAME
    resolver = Resolver()
    for _ in range(2):
        with pytest.raises(socket.gaierror) as raised:
            await resolver.resolve("example.org")
        assert raised.value.args == NO_SUCH_NAME.args
    assert system.lookups == {"example.org": 1}


async def test_a_limited_number_of_names_is_remembered(system: System) -> None:
    resolver = Resolver(cache_size=2)
    for name in ("a", "b", "a", "c", "a", "b"):
        await resolver.resolve(name)
    assert system.lookups == {"a": 1, "b": 2, "c": 1}


async def test_a_name_without_an_answer_fails_at_the_deadline(system: System) -> None:
    system.unanswered.add("dead.test")
    resolver = Resolver(deadline=0.05)
    for _ in range(2):
        with pytest.raises(socket.gaierror, match=r"no answer within 0\.05 s") as raised:
            await resolver.resolve("dead.test")
        assert raised.value.errno == socket.EAI_AGAIN
    await asyncio.to_thread(system.reached.acquire)
    assert system.lookups["dead.test"] == 1  # one thread, however often it is asked for


async def test_a_late_answer_counts(system: System) -> None:
    system.unanswered.add("late.test")
    now = 1000.0
    resolver = Resolver(deadline=0.05, clock=lambda: now)
    for _ in range(2):
        with pytest.raises(socket.gaierror):
            await resolver.resolve("late.test")
        now += 11  # forgotten by now, but the thread is still at it
    system.answer.set()
    async with asyncio.timeout(scaled(10)):
        while True:
            with suppress(socket.gaierror):
                assert await resolver.resolve("late.test")
                break
            now += 11
    assert system.lookups["late.test"] == 1


async def test_names_without_an_answer_hold_up_no_other(system: System) -> None:
    dead = [f"dead{number}.test" for number in range(100)]
    system.unanswered.update(dead)
    resolver = Resolver(deadline=scaled(60), max_threads=101)
    waiting = [asyncio.create_task(resolver.resolve(name)) for name in dead]
    await asyncio.gather(*(resolver.resolve(f"live{number}.test") for number in range(200)))
    assert not any(task.done() for task in waiting)
    system.answer.set()
    await asyncio.gather(*waiting)


async def test_lookups_begin_in_small_bursts(system: System) -> None:
    names = [f"dead{number}.test" for number in range(200)]
    system.unanswered.update(names)
    before, resolver = resolver_threads(), Resolver(deadline=scaled(60))
    waiting = [asyncio.create_task(resolver.resolve(name)) for name in names]
    await asyncio.sleep(0)
    assert len(resolver_threads() - before) == 128
    for _ in names:  # once those are a second old
        assert await asyncio.to_thread(system.reached.acquire, timeout=scaled(10))
    system.answer.set()
    await asyncio.gather(*waiting)


async def test_lookups_fail_at_the_deadline_if_no_thread_is_free(system: System) -> None:
    system.unanswered.update(["dead0.test", "dead1.test"])
    before = resolver_threads()
    resolver = Resolver(deadline=0.05, max_threads=2)
    results = await asyncio.gather(
        *(resolver.resolve(name) for name in ("dead0.test", "dead1.test", "live.test")), return_exceptions=True
    )
    errors = [(result.errno, result.strerror) for result in results if isinstance(result, socket.gaierror)]
    assert errors == [
        (socket.EAI_AGAIN, "no answer within 0.05 s"),
        (socket.EAI_AGAIN, "no answer within 0.05 s"),
        (socket.EAI_AGAIN, "not looked up within 0.05 s: too many other names have no answer"),
    ]
    assert "live.test" not in system.lookups
    assert len(resolver_threads() - before) == 2
    system.answer.set()
    async with asyncio.timeout(scaled(10)):
        while True:  # what was not looked up is not remembered either
            with suppress(socket.gaierror):
                assert await resolver.resolve("live.test")
                break


async def test_threads_end_when_the_resolver_is_closed(system: System) -> None:
    before, resolver = resolver_threads(), Resolver(deadline=scaled(60))
    system.unanswered.add("late.test")
    waiting = asyncio.create_task(resolver.resolve("late.test"))
    await asyncio.to_thread(system.reached.acquire)
    await resolver.resolve("example.org")
    threads = resolver_threads() - before
    assert len(threads) == 2
    await resolver.close()
    system.answer.set()
    assert await waiting
    for thread in threads:
        await asyncio.to_thread(thread.join, scaled(5))
        assert not thread.is_alive()


async def test_other_threads_keep_their_stack_size(system: System) -> None:
    size = 2 * 2**20
    before = threading.stack_size(size)
    try:
        await Resolver().resolve("example.org")
    finally:
        after = threading.stack_size(before)
    assert after == size


def test_an_unanswered_name_does_not_hold_up_the_end_of_the_process() -> None:
    code = """if True:
        import asyncio, socket, threading
        from batchvl.fetching.resolver import Resolver
        socket.getaddrinfo = lambda *arguments, **options: threading.Event().wait()
        async def main():
            await Resolver(deadline=0.01).resolve("dead.test")
        asyncio.run(main())
    """
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=scaled(30))
    assert process.stderr.splitlines()[-1] == "socket.gaierror: [Errno -3] no answer within 0.01 s"


# With a DNS server, and the system's own resolver:


def test_the_systems_resolver() -> None:
    run_in_namespace(system_answers)


async def system_answers(dns: DNSServer) -> None:
    dns.answers = {
        "two.test": [["192.0.2.1", "192.0.2.2"]],
        "broken.test": [Failure.SERVFAIL],
        "empty.test": [[]],
        "v6.test": [["2606:4700:4700::1111"]],
    }
    resolver = Resolver()
    addresses = {result["host"] for result in await resolver.resolve("two.test")}
    assert addresses == {"192.0.2.1", "192.0.2.2"}
    for name, code in {
        "missing.test": socket.EAI_NONAME,
        "broken.test": socket.EAI_AGAIN,
        "empty.test": socket.EAI_NODATA,
    }.items():
        with pytest.raises(socket.gaierror) as raised:
            await resolver.resolve(name)
        assert raised.value.errno == code, name


def test_a_tenth_of_the_names_never_answered_holds_up_no_other() -> None:
    run_in_namespace(a_tenth_never_answered)


async def a_tenth_never_answered(dns: DNSServer) -> None:
    dead = [f"dead{number}.test" for number in range(40)]
    live = [f"live{number}.test" for number in range(360)]
    dns.answers = {name: [Failure.SILENCE] for name in dead} | {name: [["192.0.2.1"]] for name in live}
    resolver = Resolver(deadline=scaled(60))
    waiting = [asyncio.create_task(resolver.resolve(name)) for name in dead]
    await asyncio.gather(*map(resolver.resolve, live))
    # None of them has been given up by the system, so the others did not wait for that.
    assert not any(task.done() for task in waiting)


def test_a_rebound_name_is_refused() -> None:
    run_in_namespace(rebound)


async def rebound(dns: DNSServer) -> None:
    dns.answers["rebound.test"] = [[PUBLIC], ["127.0.0.1"]]
    async with LocalServer() as server:
        target = parse_url(server.url("rebound.test"))
        async with connections(NetworkGuard()) as public:
            for _ in range(2):  # new connections, but the same answer
                with await public.request(target, (), close=True) as response:
                    assert response.status == 200
        assert (dns.lookups("rebound.test"), server.connections) == (1, [PUBLIC, PUBLIC])
        async with connections(NetworkGuard()) as later:
            with pytest.raises(AddressRefused) as raised:
                await later.request(target, ())
        assert (raised.value.address, raised.value.host) == ("127.0.0.1", "rebound.test")
        assert (dns.lookups("rebound.test"), server.connections) == (2, [PUBLIC, PUBLIC])
        # The server can be reached there, were it not for the guard.
        async with connections(NetworkGuard(["127.0.0.0/8"])) as allowed:
            (await allowed.request(target, ())).close()
        assert server.connections == [PUBLIC, PUBLIC, "127.0.0.1"]


def connections(guard: NetworkGuard) -> Connections:
    return Connections(guard, Resolver(), connect_timeout=scaled(5), keep_alive=9, max_idle=9)


class LocalServer:
    """An HTTP server at all addresses of the machine, which notes at which of them it was reached."""

    def __init__(self) -> None:
        self.connections: list[str] = []

    async def __aenter__(self) -> LocalServer:
        self._server = await asyncio.start_server(self._respond, "0.0.0.0")
        self._port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *exc: object) -> None:
        self._server.close()

    def url(self, host: str) -> str:
        return f"http://{host}:{self._port}/"

    async def _respond(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections.append(writer.get_extra_info("sockname")[0])
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
        writer.close()
