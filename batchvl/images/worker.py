"""An image worker: reads the images of one job after another and prepares the engine's inputs. Forked by the host."""

from __future__ import annotations

import resource
import socket
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import PrepareFailed, RowError
from ..fetching.sources import check_count
from ..ipc.arena import ArenaView
from ..ipc.channel import BlockingConnection
from ..types import Extent, Failure, Image
from .decode import check, decode
from .image_files import ImageFiles
from .messages import (
    HostSetup,
    JobDone,
    JobFailed,
    PrepareJob,
    Source,
    SpaceGranted,
    SpaceNeeded,
    ToWorker,
    UnexpectedMessage,
)
from .packing import ArenaPacker
from .preparation import Array, Preparation, Scaling

if TYPE_CHECKING:
    import PIL.Image


class Worker:
    """The work of an image worker. Made in the host before it forks; `run` is called in the worker's process.

    Args:
        setup: What the runner sent to the host.
        preparation: The engine's preparation. None only checks images, and copies those whose source says so.
    """

    def __init__(self, setup: HostSetup, preparation: Preparation | None) -> None:
        self._preparation, self._limits = preparation, setup.limits
        self._files = ImageFiles([Path(root) for root in setup.limits.roots], setup.limits.max_image_bytes)
        self._resize_target = preparation.resized_size if isinstance(preparation, Scaling) else None
        self._encoded, self._tensors = ArenaView(*setup.encoded), ArenaView(*setup.tensors)

    def run(self, sock: socket.socket) -> None:
        """Do jobs until the runner closes its end of the socket."""
        _, hard_limit = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (_address_space() + self._limits.memory, hard_limit))
        connection: BlockingConnection[ToWorker] = BlockingConnection(sock, ToWorker)
        while True:
            try:
                job = connection.receive()
            except EOFError:
                return
            if not isinstance(job, PrepareJob):
                raise UnexpectedMessage(f"found {job}, expected a PrepareJob")
            connection.send(self._do(job, connection))

    def _do(self, job: PrepareJob, connection: BlockingConnection[ToWorker]) -> JobDone | JobFailed:
        started = time.monotonic()
        infos = [Image(source.label) for source in job.sources]
        try:
            outcomes = self._prepare(job, infos)
        except Exception as error:
            return JobFailed(_failure(error), tuple(infos))
        packer = ArenaPacker()
        tensors = tuple(outcome if isinstance(outcome, Failure) else packer.add(outcome) for outcome in outcomes)
        seconds = time.monotonic() - started
        if packer.size:
            extent = _space(job.extent, packer.size, connection)
            started = time.monotonic()
            packer.write(self._tensors.at(extent))
            seconds += time.monotonic() - started
        return JobDone(tuple(infos), tensors, packer.size, seconds)

    def _prepare(self, job: PrepareJob, infos: list[Image]) -> Sequence[Mapping[str, Array] | Failure]:
        """Return the arrays or the failure of each request. Fills in `infos` as images are read.

        Raises what fails for all requests.
        """
        images: list[PIL.Image.Image] = []
        arrays: dict[str, Array] = {}
        check_count(len(job.sources), self._limits.image)
        for number, source in enumerate(job.sources):
            data = self._read(source)
            if self._preparation is None:
                infos[number] = check(data, self._limits.image, source.label)
                if source.is_copied:
                    arrays[f"image{number}"] = data
            else:
                image, infos[number] = decode(data, self._limits.image, source.label, self._resize_target)
                images.append(image)
        if self._preparation is None:
            return [arrays] * len(job.requests)
        outcomes: list[Mapping[str, Array] | Failure] = []
        for request in job.requests:
            try:
                outcomes.append(self._preparation.prepare(request, images, infos))
            except Exception as error:
                outcomes.append(_failure(error))
        return outcomes

    def _read(self, source: Source) -> bytes:
        if source.file is not None:
            return self._files.read(source.file)
        if source.extent is None:
            raise UnexpectedMessage(f"{source.label}: neither a file nor bytes in the arena")
        return bytes(self._encoded.at(source.extent))  # a copy, so that nobody changes it while it is read


def _space(extent: Extent | None, size: int, connection: BlockingConnection[ToWorker]) -> Extent:
    """Return an extent of at least `size` bytes: the given one, or one that the runner grants."""
    if extent is not None and extent.length >= size:
        return extent
    connection.send(SpaceNeeded(size))
    message = connection.receive()
    if not isinstance(message, SpaceGranted) or message.extent.length < size:
        raise UnexpectedMessage(f"found {message}, expected a SpaceGranted of {size} bytes")
    return message.extent


def _failure(error: Exception) -> Failure:
    match error:
        case RowError():
            return Failure.of(error)
        case MemoryError():
            return Failure.of(PrepareFailed("the row's images need more memory than an image worker has"))
    traceback.print_exception(error)
    return Failure.of(PrepareFailed(f"{type(error).__name__}: {error}"))


def _address_space() -> int:
    """Return the size of this process's address space in bytes."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    return pages * resource.getpagesize()
