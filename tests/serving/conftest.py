"""Fixtures of the tests of supervision."""

from typing import NamedTuple

import pytest

from batchvl.runner.progress import log_to
from batchvl.serving.process import EngineProcess


class Batch(NamedTuple):
    """A batch that an engine received: the process, and the rows' numbers."""

    pid: int
    rows: list[int]


@pytest.fixture
def logged():
    """The lines that batchvl logs, as a run writes them."""
    lines: list[str] = []
    with log_to(lines.append):
        yield lines


@pytest.fixture
def batches(monkeypatch):
    """The batches that engines receive, in order."""
    sent: list[Batch] = []
    infer = EngineProcess.infer

    def record(process, requests):
        sent.append(Batch(process.pid, [request.row for request in requests]))
        infer(process, requests)

    monkeypatch.setattr(EngineProcess, "infer", record)
    return sent
