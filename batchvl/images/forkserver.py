"""The image workers' processes: a host that loads the engine's preparation once, and the workers that it forks.

Started by `ImageWorkers` as `python -m batchvl.images.forkserver CONTROL LIFELINE PARENT PRELOAD`: two descriptors, the
runner's process id, and a module to import while there is nothing else to do. The host has one thread when it forks,
does no work of its own, and reaps.
"""

from __future__ import annotations

import gc
import importlib
import os
import resource
import select
import signal
import socket
import sys
import time
import traceback
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from ..config.units import dec_hook
from ..errors import BatchvlError, PrepareFailed, RowError
from ..ipc.arena import ArenaView
from ..ipc.channel import BlockingConnection
from ..ipc.spawn import die_with_parent, watch_parent
from ..types import Failure, Image
from .decode import check_count, decode, strict
from .files import open_beneath
from .messages import Died, Done, Failed, Fork, Grant, HostReady, Need, PrepareJob, Setup, Source, ToHost, ToWorker
from .packing import ArenaPacker
from .preparation import Array, Preparation, PreparationSpec, Scaling

if TYPE_CHECKING:
    import PIL.Image


def main() -> None:
    control = socket.socket(fileno=int(sys.argv[1]))
    parent, preload = int(sys.argv[3]), sys.argv[4]
    die_with_parent(parent)
    if preload:
        with suppress(ImportError):  # the engine is about to tell what is missing
            importlib.import_module(preload)
    setup = msgspec.msgpack.decode(control.recv(1 << 20), type=Setup, dec_hook=dec_hook)
    try:
        preparation = load(setup.spec) if setup.spec is not None else None
    except BatchvlError as error:
        control.send(msgspec.msgpack.encode(HostReady(str(error))))
        return
    except Exception as error:
        traceback.print_exc()
        control.send(
            msgspec.msgpack.encode(HostReady(f"the image workers cannot start: {type(error).__name__}: {error}"))
        )
        return
    arenas = ArenaView(*setup.encoded), ArenaView(*setup.prepared)
    strict()
    gc.collect()
    gc.freeze()  # what is loaded stays in pages that the workers share
    control.send(msgspec.msgpack.encode(HostReady()))
    _serve(control, int(sys.argv[2]), parent, setup, preparation, arenas)


def load(spec: PreparationSpec) -> Preparation:
    """The preparation that a spec names. Raises a BatchvlError where it cannot be loaded."""
    module, _, name = spec.factory.partition(":")
    preparation: Preparation = getattr(importlib.import_module(module), name)(**spec.options)
    return preparation


def _serve(
    control: socket.socket,
    lifeline: int,
    parent: int,
    setup: Setup,
    preparation: Preparation | None,
    arenas: tuple[ArenaView, ArenaView],
) -> None:
    """Forks, kills and reaps until the runner's end of the control socket or the lifeline closes."""
    woken, wake = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wake)
    workers: dict[int, int] = {}
    while os.getppid() == parent:
        ready, _, _ = select.select([control.fileno(), woken, lifeline], [], [], 5)
        if lifeline in ready:
            return
        if woken in ready:
            os.read(woken, 4096)
            _reap(control, workers)
        if control.fileno() not in ready:
            continue
        data, fds, _, _ = socket.recv_fds(control, 65536, 1)
        if not data:
            return
        message: ToHost = msgspec.msgpack.decode(data, type=ToHost)
        if isinstance(message, Fork):
            host = os.getpid()
            pid = os.fork()
            if pid == 0:
                signal.set_wakeup_fd(-1)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                control.close()
                watch_parent(lifeline, host)
                try:
                    _work(socket.socket(fileno=fds[0]), setup, preparation, arenas)
                except BaseException:
                    traceback.print_exc()
                    os._exit(1)
                os._exit(0)
            os.close(fds[0])
            workers[message.worker] = pid
        elif message.worker in workers:
            os.kill(workers[message.worker], signal.SIGKILL)


def _reap(control: socket.socket, workers: dict[int, int]) -> None:
    for worker, pid in list(workers.items()):
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            del workers[worker]
            code = os.waitstatus_to_exitcode(status)
            reason = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
            control.send(msgspec.msgpack.encode(Died(worker, reason)))


def _work(
    sock: socket.socket, setup: Setup, preparation: Preparation | None, arenas: tuple[ArenaView, ArenaView]
) -> None:
    """A worker's life: row after row, until the runner closes its end."""
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (_address_space() + setup.memory, hard))
    wire: BlockingConnection[ToWorker] = BlockingConnection(sock, ToWorker)
    while True:
        try:
            job = wire.receive()
        except EOFError:
            return
        assert isinstance(job, PrepareJob)
        wire.send(_answer(job, wire, setup, preparation, arenas))


def _answer(
    job: PrepareJob,
    wire: BlockingConnection[ToWorker],
    setup: Setup,
    preparation: Preparation | None,
    arenas: tuple[ArenaView, ArenaView],
) -> Done | Failed:
    """One job: its rows' tensors are in the arena where this returns Done."""
    start = time.monotonic()
    images = [Image(source.label) for source in job.sources]
    prepared = _prepare(job, images, setup, preparation, arenas[0])
    if isinstance(prepared, Failure):
        return Failed(prepared, tuple(images))
    layout = ArenaPacker()
    tensors = tuple(item if isinstance(item, Failure) else layout.add(item) for item in prepared)
    size = layout.size
    spent = time.monotonic() - start
    room = job.room
    if size and (room is None or room.length < size):
        wire.send(Need(size))
        grant = wire.receive()
        assert isinstance(grant, Grant)
        room = grant.extent
    start = time.monotonic()
    if room is not None and size:
        layout.write(arenas[1].at(room))
    return Done(tuple(images), tensors, size, spent + time.monotonic() - start)


def _prepare(
    job: PrepareJob, images: list[Image], setup: Setup, preparation: Preparation | None, encoded: ArenaView
) -> list[Mapping[str, Array] | Failure] | Failure:
    """Each row's arrays, or why there are none; `images` is filled in as the pictures are read."""
    pictures: list[PIL.Image.Image] = []
    used = preparation.used if isinstance(preparation, Scaling) else None
    try:
        check_count(len(job.sources), setup.limits)
        for number, source in enumerate(job.sources):
            data = _bytes(source, setup, encoded)
            picture, images[number] = decode(data, setup.limits, source.label, used)
            pictures.append(picture)
    except Exception as error:
        return _failure(error)
    prepared: list[Mapping[str, Array] | Failure] = []
    for request in job.requests:
        try:
            prepared.append(preparation.prepare(request, pictures, images) if preparation is not None else {})
        except Exception as error:
            prepared.append(_failure(error))
    return prepared


def _failure(error: Exception) -> Failure:
    match error:
        case RowError():
            return Failure.of(error)
        case MemoryError():
            return Failure.of(PrepareFailed("the pictures need more memory than a worker has"))
    traceback.print_exception(error)
    return Failure.of(PrepareFailed(f"{type(error).__name__}: {error}"))


def _bytes(source: Source, setup: Setup, encoded: ArenaView) -> bytes | memoryview:
    if source.file is not None:
        return open_beneath(source.file.path, [Path(root) for root in setup.roots], setup.max_image_bytes)
    assert source.extent is not None
    return encoded.at(source.extent)


def _address_space() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    return pages * resource.getpagesize()


if __name__ == "__main__":
    main()
