"""The engine's contract: what every engine does, in a process of its own."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable
from typing import Any, Protocol

import msgspec

from ..images.preparation import PreparationSpec
from ..ipc.arena import ArenaView
from ..types import Request, Response, Sampling, Struct


class EngineSpec(Struct, frozen=True):
    """Which engine to start, and what it is told. Crosses into the engine's process."""

    engine: str
    """A name of `registry.ENGINES`."""
    model: str = ""
    revision: str | None = None
    trust_remote_code: bool = False
    max_tiles: int | None = None
    """At most so many tiles a picture; None is the model's own setting."""
    draft_decode: bool = False
    """Whether a picture's file may be decoded with fewer pixels than it has."""
    batch_size: int | None = None
    dtype: str = "auto"
    device: str = "auto"
    sampling: Sampling = Sampling()
    """The run's default: what the engine cannot honour of it is an error before start."""
    options: dict[str, Any] = msgspec.field(default_factory=dict)
    """The engine's own, of `--engine-option`."""
    lmdeploy: dict[str, Any] = msgspec.field(default_factory=dict)
    """The options of `LmdeployOptions`, by name."""
    hang_timeout: float = 300.0
    """Seconds without progress after which the engine may take itself for hung."""


class EngineInfo(Struct, frozen=True):
    """What really runs, told by `start`; it goes into the summary and the output's metadata."""

    engine: str
    version: str
    model: str
    backend: str = ""
    """What really computes: "cpu", "cuda:0 NVIDIA H200", "turbomind on NVIDIA H200", …"""
    revision: str | None = None
    template_sha256: str | None = None
    """Of the chat template, since answers depend on it."""
    dtype: str = ""
    context: int | None = None
    """Tokens of prompt, pictures and answer that fit."""
    batch_size: int = 32
    """Rows of a list."""
    rows: int = 64
    """So many rows in it keep the engine busy: those that it computes, and those that lie ready."""
    replicas: int = 1
    """How many of them share the run's rows, each with GPUs of its own."""
    notes: tuple[str, ...] = ()
    """What a user should know: where the engine does other than was asked, and why."""

    def __str__(self) -> str:
        where = f" on {self.backend}" if self.backend else ""
        where += f", {self.replicas} replicas" if self.replicas > 1 else ""
        return f"{self.engine} {self.version}: {self.model}{where}"


class Engine(Protocol):
    """One engine, driven on its process's event loop. It raises only when the engine itself is lost.

    The constructor takes an `EngineSpec`, an `ArenaView`, and what tells people a line, from any thread; it raises a
    `UsageError` for what it cannot honour.
    """

    @property
    def steps(self) -> int:
        """Grows with every sign of progress, such as a token: an engine with rows whose steps stand still is hung."""
        ...

    @property
    def wait_seconds(self) -> float:
        """Seconds so far in which it was up and short of rows: could have computed more, and faster for it."""
        ...

    async def resolve(self) -> PreparationSpec | None:
        """Finds the model's files, weights not loaded, and tells how its inputs are prepared; None: not at all.

        Raises a `UsageError` where model, library or device is missing or unsupported.
        """
        ...

    async def start(self) -> EngineInfo:
        """Loads the model. Raises a `UsageError` where it cannot run here, with what to do about it."""
        ...

    def infer(self, requests: list[Request]) -> AsyncIterator[Response]:
        """One response a request, in order of completion; several lists may be open at once.

        The turns of one row loop in here. A row's extent is read until its response is given, never after.
        """
        ...

    async def abort(self, row: int) -> None:
        """Ends a row that is in the engine as soon as can be: its response is a failure, or what was ready."""
        ...

    async def close(self) -> None:
        """Lets go of the model."""
        ...


class EngineFactory(Protocol):
    """An engine's class."""

    def __call__(self, spec: EngineSpec, arena: ArenaView, say: Callable[[str], None] = ...) -> Engine: ...


def ignore(text: str) -> None:
    """For an engine that nobody listens to."""


class Stopwatch:
    """Seconds for which something was so, summed. One thread sets it, any may read it."""

    def __init__(self) -> None:
        self._before = 0.0
        self._since: float | None = None

    def set(self, so: bool) -> None:
        """Whether it is so from now on."""
        now, since = time.monotonic(), self._since
        self._since = (since or now) if so else None
        if since is not None and not so:
            self._before += now - since

    @property
    def seconds(self) -> float:
        since = self._since
        return self._before + (time.monotonic() - since if since is not None else 0.0)
