"""Time limits of the tests: they scale with the machine, and none ends the test session."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from . import timing

ROOT = Path(__file__).parents[1]

TESTS = """
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


@pytest.mark.parametrize("workers", [(), ("-n", "1")], ids=["one process", "xdist"])
def test_a_limit_fails_its_test_and_no_other(tmp_path, workers):
    package = tmp_path / "tests"
    package.mkdir()
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    for module in (ROOT / "tests").glob("*.py"):
        if not module.name.startswith("test_"):  # conftest.py and what it imports
            shutil.copy(module, package)
    (package / "conftest.py").write_text((ROOT / "tests" / "conftest.py").read_text() + SLOW_REPORTS)
    (package / "test_limits.py").write_text(TESTS)
    arguments = (sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *workers)
    session = subprocess.run(arguments, cwd=tmp_path, capture_output=True, text=True)
    assert "INTERNALERROR" not in session.stdout + session.stderr
    assert session.returncode == 1, session.stdout
    ended = set(re.findall(r"^(FAILED|ERROR) \S+::test_(\w+).*Timeout \(>0.5s\)", session.stdout, re.MULTILINE))
    assert ended == {("FAILED", "slow_body"), ("ERROR", "setup"), ("ERROR", "teardown")}, session.stdout
    assert "1 failed, 4 passed, 2 errors" in session.stdout


def test_this_machine_has_a_factor():
    assert 1 <= timing.factor() <= 20
    assert timing.scaled(30) == 30 * timing.factor()
