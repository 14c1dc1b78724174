"""What the runner and an engine's process say to each other."""

from __future__ import annotations

import logging

from ..engines.base import EngineInfo, EngineSpec
from ..images.preparation import PreparationSpec
from ..types import Request, Response, Struct


class Open(Struct, frozen=True, tag="open"):
    """The first message: which engine, and the arena of prepared tensors (a descriptor and its size)."""

    spec: EngineSpec
    arena_fd: int
    arena_size: int


class Infer(Struct, frozen=True, tag="infer"):
    """A list of requests."""

    requests: list[Request]


class Abort(Struct, frozen=True, tag="abort"):
    row: int


ToEngine = Open | Infer | Abort


class ModelResolved(Struct, frozen=True, tag="resolved"):
    preparation: PreparationSpec | None


class Started(Struct, frozen=True, tag="started"):
    info: EngineInfo


class StartRefused(Struct, frozen=True, tag="refused"):
    """A UsageError: its class's name and its message."""

    error: str
    message: str


class Answers(Struct, frozen=True, tag="answers"):
    responses: list[Response]


class Alive(Struct, frozen=True, tag="alive"):
    """What has changed since the last one."""

    progress: bool
    """Whether the engine's steps have grown."""
    wait_seconds: float
    """The engine's own count."""


class Note(Struct, frozen=True, tag="note"):
    """A log record of the engine's process."""

    text: str
    level: int = logging.INFO


FromEngine = ModelResolved | Started | StartRefused | Answers | Alive | Note
