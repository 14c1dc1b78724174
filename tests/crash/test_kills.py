"""Whole runs killed at random moments: the runner, an engine, image workers, their fork server, or all together."""

import random
from pathlib import Path

import pytest

from ..runner.running import wait_until
from .campaign import Campaign
from .life import Life
from .work import Work


def test_a_few_kills(tmp_path: Path) -> None:
    figures = Campaign(tmp_path, seed=3, rows=250).run(3)
    assert figures.kills.total() >= 3
    assert (figures.lost, figures.duplicates, figures.orphans) == (0, 0, 0)


def test_an_engine_killed_while_starting_is_restarted(tmp_path: Path) -> None:
    work, out = Work(tmp_path / "work", 20), tmp_path / "out"
    life = Life(work.command(out), tmp_path / "log")
    try:
        wait_until(lambda: life.find("engine") or life.ended)
        assert life.kill("engine", random.Random(0))  # long before it has resolved its model
        assert life.wait() == 0, life.output
    finally:
        life.kill_all()
    assert "while it was starting; restarting it" in life.output
    work.check(out / "results.parquet")


@pytest.mark.crash
@pytest.mark.timeout(900)
def test_many_kills(tmp_path: Path) -> None:
    figures = Campaign(tmp_path, seed=2).run(60)
    assert (figures.lost, figures.duplicates, figures.orphans) == (0, 0, 0)
    assert len(figures.kills) >= 5, "all kinds of processes"
    assert len(figures.moments) >= 4, "all phases"
