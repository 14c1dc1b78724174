"""Messages between the runner and a fetch process, which requests images for it.

runner ── Setup ────▶ process    once
       ── Get ──────▶            an image to request; any number at a time, each with a number
       ◀─ RoomNeeded             how long the image is, unless Get comes with enough room
       ── Room ─────▶            where it goes, or that there is no room
       ◀─ Arrived ──             it is all there; or Redirected, Failed or Ended, at any point
       ── Cancel ───▶            the image is not wanted any more; Ended follows, if nothing else has

The last message about a request says that the process writes nothing to its room any more.
"""

from __future__ import annotations

import traceback
from typing import Literal

import msgspec

from ...errors import FetchError, OptionError, row_errors
from ...ipc.notes import Note
from ...types import Extent, Struct
from ..client import Visit
from ..http import Rejected, TransientError
from ..http1.errors import ProxyError
from ..image_cache import NoRoom

_FETCH_ERRORS = {error.code: error for error in row_errors() if issubclass(error, FetchError)}


class Setup(Struct, frozen=True, tag="setup"):
    """What a process is to know. It may hold secrets, so it is sent, and nothing of it is on the command line."""

    options: msgspec.Raw
    """`FetchOptions`, without the proxy, whose password its text does not have."""
    proxy: tuple[str, int, str | None] | None
    """Host, port and authorization."""
    host_headers: dict[str, dict[str, str]]
    """The tables of the file of --host-headers."""
    arena: tuple[int, int]
    """File descriptor and size of the arena of encoded images."""
    private_bytes: int
    """Limit of the bytes of images of unknown length."""


class Get(Struct, frozen=True, tag="get"):
    request: int
    visit: Visit
    seconds: float
    close: bool
    extent: Extent | None
    """Room that was reserved for the image, if any."""


class Room(Struct, frozen=True, tag="room"):
    request: int
    extent: Extent | None
    """None if there is no room."""


class Cancel(Struct, frozen=True, tag="cancel"):
    request: int


class RoomNeeded(Struct, frozen=True, tag="room_needed"):
    request: int
    length: int


class Arrived(Struct, frozen=True, tag="arrived"):
    request: int
    length: int
    may_be_kept: bool
    """See `Receiver.may_be_kept`."""


class Redirected(Struct, frozen=True, tag="redirected"):
    request: int
    visit: Visit


class Ended(Struct, frozen=True, tag="ended"):
    """The request was cancelled."""

    request: int


class Failed(Struct, frozen=True, tag="failed"):
    """There is no image. What is known depends on the kind of error."""

    request: int
    kind: Literal["final", "transient", "rejected", "no_room", "proxy", "option", "bug"]
    text: str = ""
    code: str = ""
    blames_host: bool = False
    retry_after: float = 0.0
    needed: int = 0
    proxy: str = ""

    @classmethod
    def of(cls, request: int, error: Exception) -> Failed:
        """Return the message about an error. A bug's traceback is printed."""
        match error:
            case Rejected():
                return cls(request, "rejected", str(error.error), error.error.code, retry_after=error.retry_after)
            case TransientError():
                text, code = str(error.error), error.error.code
                return cls(request, "transient", text, code, blames_host=error.blames_host)
            case NoRoom():
                return cls(request, "no_room", needed=error.needed)
            case FetchError():
                return cls(request, "final", str(error), error.code)
            case ProxyError():
                return cls(request, "proxy", error.reason, proxy=error.proxy)
            case OptionError():
                return cls(request, "option", str(error))
        traceback.print_exception(error)
        return cls(request, "bug", f"a fetch process: {type(error).__name__}: {error}; see its log")

    def as_error(self) -> Exception:
        """Return the error."""
        match self.kind:
            case "no_room":
                return NoRoom(self.needed)
            case "proxy":
                return ProxyError(self.proxy, self.text)
            case "option":
                return OptionError(self.text)
            case "bug":
                return RuntimeError(self.text)
        error = _FETCH_ERRORS[self.code](self.text)
        match self.kind:
            case "rejected":
                return Rejected(error, self.retry_after)
            case "transient":
                return TransientError(error, blames_host=self.blames_host)
        return error


Outcome = Arrived | Redirected | Failed | Ended
"""The last message about a request."""
ToProcess = Setup | Get | Room | Cancel
FromProcess = RoomNeeded | Outcome | Note
