"""The host process of the image workers: loads the engine's preparation once and forks the workers.

`ImageWorkers` starts it as `python -m batchvl.images.forkserver CONTROL PARENT_PIPE PARENT PRELOAD`: two file
descriptors, the process id of the runner, and a module to import while the engine looks for its model, or "". The host
has a single thread when it forks. It does no work of its own except to reap.
"""

from __future__ import annotations

import gc
import importlib
import os
import select
import signal
import socket
import sys
import traceback
from contextlib import suppress
from typing import Any

import msgspec

from ..config.units import dec_hook
from ..errors import BatchvlError
from ..ipc.spawn import die_with_parent, watch_parent
from .decode import configure_pillow
from .messages import ForkWorker, HostReady, HostSetup, ToHost, WorkerExited
from .preparation import Preparation, PreparationSpec
from .worker import Worker

_CHECK_PARENT_SECONDS = 5


def main() -> None:
    control = socket.socket(fileno=int(sys.argv[1]))
    parent_pipe, parent, preload = int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    die_with_parent(parent)
    if preload:
        with suppress(ImportError):  # the engine will report what is missing
            importlib.import_module(preload)
    setup = msgspec.msgpack.decode(control.recv(1 << 20), type=HostSetup, dec_hook=dec_hook)
    try:
        preparation = load(setup.preparation)
    except BatchvlError as error:
        _send(control, HostReady(str(error)))
        return
    except Exception as error:
        traceback.print_exc()
        _send(control, HostReady(f"the image workers cannot start: {type(error).__name__}: {error}"))
        return
    worker = Worker(setup, preparation)
    configure_pillow()
    gc.collect()
    gc.freeze()  # the pages of what is loaded stay shared with the workers
    _send(control, HostReady())
    Host(control, parent_pipe, parent, worker).serve()


def load(spec: PreparationSpec | None) -> Preparation | None:
    """Return the preparation that a spec names, None if it names none. Raises BatchvlError if it cannot be loaded."""
    if spec is None or spec.factory is None:
        return None
    module, _, name = spec.factory.partition(":")
    preparation: Preparation = getattr(importlib.import_module(module), name)(**spec.options)
    return preparation


class Host:
    """Forks, kills and reaps workers.

    Args:
        control: Socket to the runner.
        parent_pipe: Read end of the runner's `ParentPipe`.
        parent: Process id of the runner.
        worker: What each worker runs.
    """

    def __init__(self, control: socket.socket, parent_pipe: int, parent: int, worker: Worker) -> None:
        self._control, self._parent_pipe, self._parent, self._worker = control, parent_pipe, parent, worker
        self._pids: dict[int, int] = {}

    def serve(self) -> None:
        """Obey the runner until it closes the control socket or ends."""
        child_ended, wakeup = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.signal(signal.SIGCHLD, lambda *_: None)  # a handler must exist for the wakeup descriptor to work
        signal.set_wakeup_fd(wakeup)
        inputs = [self._control.fileno(), child_ended, self._parent_pipe]
        while os.getppid() == self._parent:
            readable, _, _ = select.select(inputs, [], [], _CHECK_PARENT_SECONDS)
            if self._parent_pipe in readable:
                return
            if child_ended in readable:
                os.read(child_ended, 4096)
                self._reap()
            if self._control.fileno() not in readable:
                continue
            data, fds, _, _ = socket.recv_fds(self._control, 65536, 1)
            if not data:
                return
            message: ToHost = msgspec.msgpack.decode(data, type=ToHost)
            if isinstance(message, ForkWorker):
                self._fork(message.worker, fds[0])
            elif message.worker in self._pids:
                os.kill(self._pids[message.worker], signal.SIGKILL)

    def _fork(self, worker: int, fd: int) -> None:
        host = os.getpid()
        pid = os.fork()
        if pid == 0:
            try:
                signal.set_wakeup_fd(-1)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                self._control.close()
                watch_parent(self._parent_pipe, host)
                self._worker.run(socket.socket(fileno=fd))
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        os.close(fd)
        self._pids[worker] = pid

    def _reap(self) -> None:
        for worker, pid in list(self._pids.items()):
            reaped, status = os.waitpid(pid, os.WNOHANG)
            if reaped:
                del self._pids[worker]
                code = os.waitstatus_to_exitcode(status)
                reason = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
                _send(self._control, WorkerExited(worker, reason))


def _send(control: socket.socket, message: Any) -> None:
    control.send(msgspec.msgpack.encode(message))


if __name__ == "__main__":
    main()
