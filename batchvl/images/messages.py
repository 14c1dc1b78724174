"""What the runner, the image workers and their host process say to each other.

runner ── Job ──▶ worker      the rows, where their pictures' bytes lie, and room as rows usually need it
       ◀─ Need ──             only if that does not do: so many bytes of prepared tensors
       ── Grant ─▶            here
       ◀─ Done ──             written; or Failed, at any point

runner ── Setup ─▶ host       once; then Fork and Kill
       ◀─ Ready ──            once; then Died, for each worker that ended
"""

from __future__ import annotations

from ..config.options import ImageOptions
from ..types import Extent, Failure, FileImage, Image, Request, Struct, Tensor
from .preparation import PreparationSpec


class Source(Struct, frozen=True):
    """One picture of a job: a file that the worker opens, or its bytes in the arena of encoded pictures."""

    label: str
    """What the output says about where it is from."""
    file: FileImage | None = None
    extent: Extent | None = None


class PrepareJob(Struct, frozen=True, tag="job"):
    """Requests about the same pictures: these are read once."""

    requests: tuple[Request, ...]
    sources: tuple[Source, ...]
    room: Extent | None = None


class Grant(Struct, frozen=True, tag="grant"):
    extent: Extent


class Need(Struct, frozen=True, tag="need"):
    size: int


class Done(Struct, frozen=True, tag="done"):
    images: tuple[Image, ...]
    tensors: tuple[tuple[Tensor, ...] | Failure, ...]
    """For each request. What is of the pictures alone lies in the extent once, and is named for each."""
    size: int
    """Bytes that the tensors take in the extent."""
    seconds: float


class Failed(Struct, frozen=True, tag="failed"):
    failure: Failure
    images: tuple[Image, ...]


ToWorker = PrepareJob | Grant
FromWorker = Need | Done | Failed


class Setup(Struct, frozen=True):
    """The host's first message."""

    spec: PreparationSpec | None
    limits: ImageOptions
    max_image_bytes: int
    roots: tuple[str, ...]
    """Folders that files may lie in; relative paths are below the first."""
    encoded: tuple[int, int]
    prepared: tuple[int, int]
    """Descriptor and size of the two arenas."""
    memory: int
    """Bytes of address space that a worker may add to what it has after the fork."""


class Fork(Struct, frozen=True, tag="fork"):
    worker: int


class Kill(Struct, frozen=True, tag="kill"):
    worker: int


class HostReady(Struct, frozen=True, tag="ready"):
    error: str | None = None


class Died(Struct, frozen=True, tag="died"):
    worker: int
    reason: str


ToHost = Fork | Kill
FromHost = HostReady | Died
