"""Fixtures of all tests of the replicas."""

import pytest

from batchvl.runner.progress import log_to


@pytest.fixture
def logged():
    """The lines that batchvl logs, as a run writes them."""
    lines: list[str] = []
    with log_to(lines.append):
        yield lines
