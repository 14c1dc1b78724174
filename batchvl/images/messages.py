"""Messages between the runner, the host process of the image workers, and the workers.

runner ── PrepareJob ────▶ worker    rows, where their images are, and as much space as rows usually need
       ◀─ SpaceNeeded ───            only if that is too little: the size of the prepared tensors
       ── SpaceGranted ──▶
       ◀─ JobDone ───────            the tensors are written; or JobFailed, at any point

runner ── HostSetup ─────▶ host      once, then ForkWorker and KillWorker
       ◀─ HostReady ─────            once, then WorkerExited for each worker that ended
"""

from __future__ import annotations

from ..config.options import ImageOptions
from ..types import Extent, Failure, FileImage, Image, Request, Struct, Tensor
from .preparation import PreparationSpec


class UnexpectedMessage(Exception):
    """The other process does not keep to the order above: a bug."""


class Source(Struct, frozen=True):
    """One image of a job: a file for the worker to open, or encoded bytes in the arena."""

    label: str
    """Source of the image in the output."""
    file: FileImage | None = None
    extent: Extent | None = None
    is_copied: bool = False
    """Whether its encoded bytes become the tensor "image0", "image1", … by its number, if there is no preparation."""


class PrepareJob(Struct, frozen=True, tag="job"):
    """Requests about the same images, which are read once."""

    requests: tuple[Request, ...]
    sources: tuple[Source, ...]
    extent: Extent | None = None
    """Space for the tensors, if some was free."""


class SpaceGranted(Struct, frozen=True, tag="space_granted"):
    extent: Extent


class SpaceNeeded(Struct, frozen=True, tag="space_needed"):
    size: int


class JobDone(Struct, frozen=True, tag="done"):
    images: tuple[Image, ...]
    tensors: tuple[tuple[Tensor, ...] | Failure, ...]
    """For each request. Tensors of the images alone are in the extent once, and listed for each request."""
    size: int
    """Bytes of the extent that the tensors take."""
    seconds: float
    """Working time, without waiting for space."""


class JobFailed(Struct, frozen=True, tag="failed"):
    failure: Failure
    images: tuple[Image, ...]


ToWorker = PrepareJob | SpaceGranted
FromWorker = SpaceNeeded | JobDone | JobFailed


class WorkerLimits(Struct, frozen=True):
    """What image workers may read, and how much."""

    image: ImageOptions
    max_image_bytes: int
    roots: tuple[str, ...]
    """Directories that image files may lie in. Relative paths start from the first."""
    memory: int = 4 * 2**30
    """Bytes of address space that a worker may add to what it has after the fork."""


class HostSetup(Struct, frozen=True):
    """The first message to the host."""

    preparation: PreparationSpec | None
    limits: WorkerLimits
    encoded: tuple[int, int]
    tensors: tuple[int, int]
    """File descriptor and size of the two arenas."""


class ForkWorker(Struct, frozen=True, tag="fork"):
    """Comes with the file descriptor of the worker's socket."""

    worker: int


class KillWorker(Struct, frozen=True, tag="kill"):
    worker: int


class HostReady(Struct, frozen=True, tag="ready"):
    error: str | None = None
    """Why the preparation cannot be loaded."""


class WorkerExited(Struct, frozen=True, tag="exited"):
    worker: int
    reason: str


ToHost = ForkWorker | KillWorker
FromHost = HostReady | WorkerExited
