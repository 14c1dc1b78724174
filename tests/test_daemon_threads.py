"""`DaemonThreadExecutor`: calls in threads that a process does not wait for when it exits."""

import subprocess
import sys
import threading
from concurrent.futures import CancelledError

import pytest

from batchvl.concurrency import DaemonThreadExecutor
from tests.timing import scaled


def test_results_and_errors_arrive():
    executor = DaemonThreadExecutor(3, "test")
    futures = [executor.submit(divmod, 7, number) for number in (2, 0, 3)]
    assert (futures[0].result(scaled(10)), futures[2].result(scaled(10))) == ((3, 1), (2, 1))
    with pytest.raises(ZeroDivisionError):
        futures[1].result(scaled(10))
    executor.shutdown()


def test_no_more_calls_than_threads_run_at_the_same_time():
    executor, barrier, release = DaemonThreadExecutor(2, "test"), threading.Barrier(3), threading.Event()

    def call():
        barrier.wait(scaled(10))
        release.wait()
        return threading.get_ident()

    first = [executor.submit(call) for _ in range(2)]
    barrier.wait(scaled(10))
    last = executor.submit(threading.get_ident)
    assert not last.running()
    release.set()
    assert last.result(scaled(10)) in [future.result(scaled(10)) for future in first]
    executor.shutdown()


def test_shutdown_cancels_what_has_not_begun():
    executor, begun, release = DaemonThreadExecutor(1, "test"), threading.Event(), threading.Event()
    running = executor.submit(lambda: (begun.set(), release.wait()))
    waiting = executor.submit(int)
    assert begun.wait(scaled(10))
    executor.shutdown(cancel_futures=True)
    with pytest.raises(CancelledError):
        waiting.result(scaled(10))
    release.set()
    assert running.result(scaled(10)) == (None, True)


def test_a_process_exits_although_a_call_never_ends():
    code = """if True:
        import threading
        from batchvl.concurrency import DaemonThreadExecutor
        begun = threading.Event()
        DaemonThreadExecutor(1, "test").submit(lambda: (begun.set(), threading.Event().wait()))
        begun.wait()"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=scaled(60))
