"""Time limits of the tests: they scale with the machine, and none ends the test session."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from . import timing

ROOT = Path(__file__).parents[1]

TESTS = """
import asyncio
import time
import pytest
from . import timing


def test_factor():
    assert timing.factor() == 2.0
    assert timing.scaled(30) == 60


@pytest.fixture
def slow_setup():
    time.sleep(5)


@pytest.fixture
def slow_teardown():
    yield
    time.sleep(5)


@pytest.mark.timeout(0.25)
def test_slow_body():
    time.sleep(5)


@pytest.mark.timeout(0.25)
async def test_slow_asynchronous_body():
    await asyncio.sleep(60)


@pytest.mark.timeout(0.25)
def test_within_the_stretched_limit():
    time.sleep(0.35)


@pytest.mark.timeout(0.25)
def test_setup(slow_setup):
    pass


@pytest.mark.timeout(0.25)
def test_teardown(slow_teardown):
    pass


@pytest.mark.timeout(0.25)
def test_slow_report():
    pass
"""

# Reports after a body that used most of its time: where pytest-timeout alone ends the session.
SLOW_REPORTS = """
import time


def pytest_runtest_logreport(report):
    if "slow_report" in report.nodeid:
        time.sleep(0.6)


timing.measure = lambda: 2.0
"""


HANGING_THREAD = """
import asyncio
import threading
import pytest


@pytest.mark.timeout(0.25)
def test_thread():
    asyncio.run(asyncio.to_thread(threading.Event().wait))
"""


def run_tests(directory, tests, settings, *arguments):
    """Run tests in a session of their own, with the settings of this one and more."""
    package = directory / "tests"
    package.mkdir()
    shutil.copy(ROOT / "pyproject.toml", directory)
    for module in (ROOT / "tests").glob("*.py"):
        if not module.name.startswith("test_"):  # conftest.py and what it imports
            shutil.copy(module, package)
    (package / "conftest.py").write_text((ROOT / "tests" / "conftest.py").read_text() + settings)
    (package / "test_limits.py").write_text(tests)
    command = (sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *arguments)
    environment = os.environ | {"CI": "true"}  # without it pytest shortens the lines of its summary
    return subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("workers", [(), ("-n", "1")], ids=["one process", "xdist"])
def test_a_limit_fails_its_test_and_no_other(tmp_path, workers):
    session = run_tests(tmp_path, TESTS, SLOW_REPORTS, *workers)
    assert "INTERNALERROR" not in session.stdout + session.stderr
    assert session.returncode == 1, session.stdout
    ended = re.findall(r"^(FAILED|ERROR) \S+::test_(\w+).*Timeout \(>0.5s\)", session.stdout, re.MULTILINE)
    assert sorted(ended) == [
        ("ERROR", "setup"),
        ("ERROR", "teardown"),
        ("FAILED", "slow_asynchronous_body"),
        ("FAILED", "slow_body"),
    ], session.stdout
    assert "2 failed, 4 passed, 2 errors" in session.stdout


def test_a_test_that_waits_for_a_thread_ends_its_session(tmp_path):
    session = run_tests(tmp_path, HANGING_THREAD, "\n_GRACE_SECONDS = 0.5\n")
    assert session.returncode == 1
    assert "Timeout (0:00:" in session.stderr
    assert "in test_thread" in session.stderr


def test_this_machine_has_a_factor():
    assert 1 <= timing.factor() <= 20
    assert timing.scaled(30) == 30 * timing.factor()
