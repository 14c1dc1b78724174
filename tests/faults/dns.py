"""A DNS server on loopback that misbehaves on request, and a network in which the system asks no other.

The server speaks as much of RFC 1035 as a stub resolver needs: one question, over UDP, about an A or AAAA record.
"""

from __future__ import annotations

import asyncio
import enum
import fcntl
import ipaddress
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Coroutine
from pathlib import Path
from types import TracebackType
from typing import Any

import pytest

from tests import timing

ADDRESS = ("127.0.0.1", 53)
PUBLIC = "8.8.8.8"
"""A public address which is the machine's own in the namespace, and nowhere else."""
PATIENCE = 30
"""Seconds after which the system gives up a name without an answer: its longest, so that a busy machine can do the rest
of a test before that."""

_A, _AAAA = 1, 28
_RESPONSE = 0x8180  # a response, recursion desired and available
_TTL = 0  # nobody caches
_BUFFER_BYTES = 2**20  # or as much as the system allows: a query that is lost is not repeated
_POINTER_TO_QUESTION = 0xC00C
_REPOSITORY = Path(__file__).parents[2]
_NAMESPACE = ["unshare", "--user", "--map-root-user", "--mount", "--net"]


class Failure(enum.Enum):
    """An answer without addresses. The values are the codes of responses (RFC 1035, section 4.1.1)."""

    SERVFAIL = 2
    NXDOMAIN = 3
    SILENCE = -1
    """No response."""


Answer = list[str] | Failure


class DNSServer(asyncio.DatagramProtocol):
    """The server, an async context manager. Names that it does not know do not exist.

    Args:
        address: Address and port to listen at; port 0: any.
    """

    def __init__(self, address: tuple[str, int] = ADDRESS) -> None:
        self.address = address
        self.answers: dict[str, list[Answer]] = {}
        """By name: the answer to each query in turn, for each of the record types. The last one stays."""
        self.queries: Counter[tuple[str, int]] = Counter()
        """Number of queries by name and record type."""

    async def __aenter__(self) -> DNSServer:
        server = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BUFFER_BYTES)
        server.bind(self.address)
        self._transport, _ = await asyncio.get_running_loop().create_datagram_endpoint(lambda: self, sock=server)
        self.address = self._transport.get_extra_info("sockname")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._transport.close()

    def lookups(self, name: str) -> int:
        """Return how often the addresses of a name were asked for."""
        return self.queries[name, _A]

    def datagram_received(self, data: bytes, addr: tuple[Any, ...]) -> None:
        name, record, question = _parse_query(data)
        number = self.queries[name, record]
        self.queries[name, record] += 1
        answers = self.answers.get(name, [Failure.NXDOMAIN])
        answer = answers[min(number, len(answers) - 1)]
        if answer is not Failure.SILENCE:
            self._transport.sendto(_response(data[:2], question, record, answer), addr)


def _parse_query(data: bytes) -> tuple[str, int, bytes]:
    """Return the name, the record type, and the question as it is in the query."""
    labels, position = [], 12
    while length := data[position]:
        labels.append(data[position + 1 : position + 1 + length].decode("ascii").lower())
        position += 1 + length
    (record,) = struct.unpack_from(">H", data, position + 1)
    return ".".join(labels), record, data[12 : position + 5]


def _response(identifier: bytes, question: bytes, record: int, answer: Answer) -> bytes:
    if isinstance(answer, Failure):
        return identifier + struct.pack(">5H", _RESPONSE | answer.value, 1, 0, 0, 0) + question
    version = {_A: 4, _AAAA: 6}.get(record)
    addresses = [address for address in map(ipaddress.ip_address, answer) if address.version == version]
    records = b"".join(
        struct.pack(">3HIH", _POINTER_TO_QUESTION, record, 1, _TTL, len(address.packed)) + address.packed
        for address in addresses
    )
    return identifier + struct.pack(">5H", _RESPONSE, 1, len(addresses), 0, 0) + question + records


Scenario = Callable[[DNSServer], Coroutine[Any, Any, None]]


def run_in_namespace(scenario: Scenario) -> None:
    """Run a part of a test in a process of its own, whose names are all resolved by a DNSServer.

    Its network has only a loopback interface, with 127.0.0.0/8 and PUBLIC. Skips the test where the system does not
    allow that.

    Args:
        scenario: A function of a module. It fails by raising.
    """
    if shutil.which("unshare") is None:
        pytest.skip("needs unshare, of util-linux")
    probe = _run([*_NAMESPACE, "mount", "--bind", "/dev/null", "/etc/resolv.conf"])
    if probe.returncode:
        pytest.skip(f"needs namespaces of users, mounts and networks: {probe.stderr.strip()}")
    module, name = scenario.__module__, scenario.__name__
    code = f"from tests.faults import dns; from {module} import {name}; dns.enter({name}, {timing.factor()})"
    process = _run([*_NAMESPACE, sys.executable, "-c", code])
    assert process.returncode == 0, process.stdout + process.stderr


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=_REPOSITORY, capture_output=True, text=True)


def enter(scenario: Scenario, factor: float) -> None:
    """Set up the namespaces that this process is in, and run a scenario."""
    timing.set_factor(factor)
    _set_up_loopback()
    with tempfile.TemporaryDirectory() as directory:
        for path, text in {
            "/etc/resolv.conf": f"nameserver {ADDRESS[0]}\noptions timeout:{PATIENCE} attempts:1\n",
            "/etc/nsswitch.conf": "hosts: files dns\n",
        }.items():
            file = Path(directory) / Path(path).name
            file.write_text(text)
            subprocess.run(["mount", "--bind", file, path], check=True)
        asyncio.run(_serve(scenario))


async def _serve(scenario: Scenario) -> None:
    async with DNSServer() as server:
        await scenario(server)


def _set_up_loopback() -> None:
    """Bring up the interface `lo`, and give it PUBLIC (netdevice(7))."""
    set_address, set_flags, up = 0x8916, 0x8914, 0x1
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        fcntl.ioctl(control, set_flags, struct.pack("16sH22x", b"lo", up))
        fcntl.ioctl(
            control, set_address, struct.pack("16sHH4s16x", b"lo:1", socket.AF_INET, 0, socket.inet_aton(PUBLIC))
        )
