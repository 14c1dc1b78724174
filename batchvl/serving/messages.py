"""Messages between the runner and an engine's process."""

from __future__ import annotations

from .. import errors
from ..engines.base import EngineInfo, EngineSpec
from ..errors import UsageError
from ..images.preparation import PreparationSpec
from ..ipc.notes import Note
from ..types import Request, Response, Struct


class ProtocolError(Exception):
    """A process received a message that it did not expect."""


class Open(Struct, frozen=True, tag="open"):
    """The first message to a process: the engine to start, and the arena of prepared tensors."""

    spec: EngineSpec
    arena_fd: int
    arena_size: int
    """Bytes."""


class Infer(Struct, frozen=True, tag="infer"):
    """A batch of requests."""

    requests: list[Request]


class Abort(Struct, frozen=True, tag="abort"):
    """Stop generating for a row. Its response follows all the same."""

    row: int


ToEngine = Open | Infer | Abort


class ModelResolved(Struct, frozen=True, tag="resolved"):
    """The engine has found its model. Says how the model's inputs are prepared."""

    preparation: PreparationSpec | None


class Started(Struct, frozen=True, tag="started"):
    """The model is loaded."""

    info: EngineInfo


class StartRefused(Struct, frozen=True, tag="refused"):
    """The engine raised a UsageError instead of starting."""

    error: str
    """Name of its class in `errors`."""
    message: str

    @classmethod
    def of(cls, error: UsageError) -> StartRefused:
        """Return the message for an error."""
        return cls(type(error).__name__, str(error))

    def as_error(self) -> UsageError:
        """Return the error. If its class is unknown here, it becomes a plain UsageError.

        >>> StartRefused.of(errors.ModelError("no such model")).as_error()
        ModelError('no such model')
        """
        kind = getattr(errors, self.error, None)
        if isinstance(kind, type) and issubclass(kind, UsageError):
            return kind(self.message)
        return UsageError(f"{self.error}: {self.message}")


class Answers(Struct, frozen=True, tag="answers"):
    """Responses, in the order in which they were completed."""

    responses: list[Response]


class Alive(Struct, frozen=True, tag="alive"):
    """A heartbeat; sent only if something has changed since the last one."""

    progress: bool
    """Whether the engine's steps have increased."""
    wait_seconds: float
    """Seconds since the start in which the engine was short of rows."""


FromEngine = ModelResolved | Started | StartRefused | Answers | Alive | Note
