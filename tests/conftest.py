"""Settings for all tests: signals, the event loop, and time limits that fit the machine and end whatever hangs."""

import asyncio
import contextlib
import faulthandler
import os
import signal

import pytest
import uvloop

from . import timing
from .fuzzing import examples

# A shell starts background processes with SIGINT ignored, and a run inherits that, as it should. The tests' own runs
# must react to SIGINT, wherever the tests are started from.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

with contextlib.suppress(ModuleNotFoundError):  # the tests on a GPU machine do without it
    import hypothesis

    hypothesis.settings.register_profile("fuzz", max_examples=examples(100), deadline=None)
    hypothesis.settings.load_profile("fuzz")


@pytest.hookimpl(optionalhook=True)
def pytest_asyncio_loop_factories(config, item):
    """Let asynchronous tests run in the event loop that the commands use."""
    return {"uvloop": _new_event_loop}


def _new_event_loop():
    loop = uvloop.new_event_loop()
    loop.set_exception_handler(_handle_exception)
    return loop


def _handle_exception(loop, context):
    """End a test whose time is over: uvloop does not raise what pytest-timeout's signal handler raised."""
    error = context.get("exception")
    if isinstance(error, pytest.fail.Exception):
        for task in asyncio.all_tasks(loop):
            task.cancel(str(error))
    else:
        loop.default_exception_handler(context)


def pytest_configure(config):
    config.stash[_STDERR] = os.dup(2)  # not yet captured
    # With pytest-xdist the controller measures, before its workers load the machine, and hands them the result.
    given = getattr(config, "workerinput", {}).get("timing_factor")
    timing.set_factor(timing.measure() if given is None else given)


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node):
    node.workerinput["timing_factor"] = timing.factor()


def pytest_report_header():
    return f"time limits: {timing.factor():.1f} times those of a quiet machine"


# What a signal cannot interrupt, such as waiting for a thread to end, ends the session, with all threads' tracebacks.
_STDERR = pytest.StashKey[int]()
_GRACE_SECONDS = 60


@pytest.hookimpl(optionalhook=True, tryfirst=True)
def pytest_timeout_set_timer(item, settings):
    seconds = settings.timeout + timing.scaled(_GRACE_SECONDS)
    faulthandler.dump_traceback_later(seconds, exit=True, file=item.config.stash[_STDERR])


@pytest.hookimpl(optionalhook=True, tryfirst=True)
def pytest_timeout_cancel_timer(item):
    faulthandler.cancel_dump_traceback_later()


# pytest-timeout arms its timer for a whole test, reports included. A limit that ran out inside a report raised there,
# outside of any test, and ended the session with an internal error. Hence `timeout_func_only` in pyproject.toml, which
# limits the body of a test alone, and the same limit here for set-up and for teardown.


def pytest_collection_modifyitems(config, items):
    if not config.pluginmanager.hasplugin("timeout"):
        return
    default = config.getoption("timeout")
    if default is None:
        default = float(config.getini("timeout") or 0)
    for item in items:
        mark = item.get_closest_marker("timeout")
        seconds = mark.args[0] if mark else default
        item.add_marker(pytest.mark.timeout(timing.scaled(seconds)), append=False)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item):
    with _limited(item):
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item):
    with _limited(item):
        return (yield)


@contextlib.contextmanager
def _limited(item):
    """Give a test's set-up or teardown the time that its body has."""
    plugin = item.config.pluginmanager.getplugin("timeout")
    seconds = item.get_closest_marker("timeout").args[0] if plugin else 0
    if not seconds:
        yield
        return
    settings = plugin.Settings(seconds, plugin.DEFAULT_METHOD, True, False)
    item.config.hook.pytest_timeout_set_timer(item=item, settings=settings)
    try:
        yield
    finally:
        item.config.hook.pytest_timeout_cancel_timer(item=item)
