"""The contract between batchvl and an engine: what it is started with, what it reports and what it does.

An engine runs in a process of its own (`serving/engine_main.py`) and knows nothing of the runner. What its users should
read it logs to a logger below "batchvl", from any thread; records of level INFO and above reach the terminal.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from typing import Any, Protocol

import msgspec

from ..images.preparation import PreparationSpec
from ..types import Request, Response, Sampling, Struct


class EngineSpec(Struct, frozen=True):
    """Which engine to start, and its settings. Sent to the engine's process."""

    engine: str
    """Key of `registry.ENGINE_TYPES`."""
    model: str = ""
    revision: str | None = None
    trust_remote_code: bool = False
    max_tiles: int | None = None
    """Upper limit of tiles per image; None keeps the model's own."""
    draft_decode: bool = False
    """Whether an image file may be decoded at reduced resolution."""
    batch_size: int | None = None
    dtype: str = "auto"
    device: str = "auto"
    sampling: Sampling = Sampling()
    """Defaults of the run; an engine refuses to start with settings that it cannot honour."""
    options: dict[str, Any] = msgspec.field(default_factory=dict)
    """Values of `--engine-option`."""
    flags: dict[str, Any] = msgspec.field(default_factory=dict)
    """The engine's own option group, such as `LmdeployOptions`, by name."""
    hang_timeout: float = 300.0
    """Seconds without progress after which the engine may report itself as hung."""


class EngineInfo(Struct, frozen=True):
    """What was actually started; returned by `Engine.start`, kept in the summary and in the output's metadata."""

    engine: str
    version: str
    model: str
    backend: str = ""
    """What computes: "cpu", "cuda:0 NVIDIA H200", "turbomind on NVIDIA H200", …"""
    revision: str | None = None
    template_sha256: str | None = None
    """Digest of the chat template, on which answers depend."""
    dtype: str = ""
    context: int | None = None
    """Tokens that prompt, images and answer may have together."""
    batch_size: int = 32
    """Rows per batch."""
    rows: int = 64
    """Rows in the engine that keep it busy: those that it computes and those that are ready to follow."""
    replicas: int = 1
    """Replicas that share the run's rows, each with its own GPUs."""
    notes: tuple[str, ...] = ()
    """Remarks for the user: where the engine deviates from what was requested, and why."""

    def __str__(self) -> str:
        where = f" on {self.backend}" if self.backend else ""
        where += f", {self.replicas} replicas" if self.replicas > 1 else ""
        return f"{self.engine} {self.version}: {self.model}{where}"


class Engine(Protocol):
    """One engine, driven on the event loop of its process. It raises only if the engine itself is lost.

    The constructor takes an `EngineSpec` and an `ArenaView`. It raises a `UsageError` for settings that the engine
    cannot honour.
    """

    @property
    def steps(self) -> int:
        """Counter that grows with every sign of progress, such as a token. If it stops while the engine has rows, the
        engine hangs.
        """
        ...

    @property
    def wait_seconds(self) -> float:
        """Total seconds in which the engine was up but short of rows: with more it would have been faster."""
        ...

    async def resolve(self) -> PreparationSpec | None:
        """Find the model's files, without loading weights, and return how its inputs are prepared.

        Returns:
            The preparation that image workers run; None if they run none.

        Raises:
            UsageError: The model, a library or the device is missing or unsupported.
        """
        ...

    async def start(self) -> EngineInfo:
        """Load the model.

        Raises:
            UsageError: The model cannot run here; the message says what to do about it.
        """
        ...

    def infer(self, requests: list[Request]) -> AsyncIterator[Response]:
        """Yield one response per request of a batch, in order of completion. Several batches may be open at a time.

        All turns of a row are asked in here. A request's extent of the arena is read only until its response is
        yielded.
        """
        ...

    async def abort(self, row: int) -> None:
        """End a row as soon as possible. Its response is a failure, or the answer if that was ready."""
        ...

    async def close(self) -> None:
        """Release the model."""
        ...


class Stopwatch:
    """Accumulate time while a condition holds. One thread sets the condition, any thread may read the time."""

    def __init__(self) -> None:
        self._total = 0.0
        self._since: float | None = None

    def running(self, flag: bool) -> None:
        """Set whether the condition holds from now on."""
        now, since = time.monotonic(), self._since
        self._since = (since or now) if flag else None
        if since is not None and not flag:
            self._total += now - since

    @property
    def seconds(self) -> float:
        """Time accumulated so far."""
        since = self._since
        return self._total + (time.monotonic() - since if since is not None else 0.0)
