"""Power failures, by the model of `power.py`: at any moment of an attempt, and of the one after a kill."""

import random
import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pyarrow as pa
import pytest

from batchvl.errors import StoppedEarly

from .disks import NoLinks, Seam
from .power import Moment, Recorder
from .seam import attempt, look


class RecorderWithoutLinks(NoLinks, Recorder):
    """Both."""


def moments(scratch: Path, *, fail_from: int | None = None, kind: type[Recorder] = Recorder) -> list[Moment]:
    """All of an attempt, or of one that fails and the one after it."""
    told: set[int] = set()
    root = scratch / "disk"
    root.mkdir()
    with kind(root, lambda: told) as disk:
        if fail_from is not None:
            disk.fail_from = fail_from
            with suppress(StoppedEarly):
                attempt(root / "out", disk, told.update)
            disk.fail_from = None
        attempt(root / "out", disk, told.update)
    assert len(told) == 24
    shutil.rmtree(root)
    return disk.moments


def ways(moment: Moment, target: Path, draw: random.Random) -> Iterator[None]:
    """Leaves what may be left of a moment, in this way and that."""
    for chance, names in ((None, False), (None, True), (draw, False), (draw, False)):
        moment.leave(target, chance, new_names=names)
        yield
        shutil.rmtree(target)


def survive(scratch: Path, some: list[Moment], draw: random.Random, disk: type[Seam] = Seam) -> int:
    """Goes on after a power failure at each of the moments; in how many ways."""
    count = 0
    for moment in some:
        for _ in ways(moment, scratch / "left", draw):
            look(scratch / "left" / "out", moment.told, disk())
            count += 1
    return count


def test_a_power_failure_at_some_moments(tmp_path: Path) -> None:
    draw = random.Random(5)
    found = moments(tmp_path)
    assert len(found) > 70
    assert len({len(moment.told) for moment in found}) > 3
    survive(tmp_path, draw.sample(found, 8), draw)


def test_the_model_sees_what_is_not_synced(tmp_path: Path) -> None:
    """Without the fsync of journals, or that of folders, rows that were reported are gone."""

    class Forgetful(Recorder):
        def sync(self, fd: int) -> None:
            Seam.sync(self, fd)

    class ForgetfulOfNames(Recorder):
        def sync_directory(self, path: Path) -> None:
            Seam.sync_directory(self, path)

    for kind in (Forgetful, ForgetfulOfNames):
        last = moments(tmp_path, kind=kind)[-1]
        last.leave(tmp_path / "left", None)
        with pytest.raises((AssertionError, pa.ArrowInvalid)):  # rows, or a part, that are not there
            look(tmp_path / "left" / "out", last.told, Seam())
        shutil.rmtree(tmp_path / "left")


def test_a_power_failure_after_a_kill_while_folders_were_made(tmp_path: Path) -> None:
    """Whose names the dead attempt has not synced: the next one finds them there, and must."""
    for fail_from in range(1, 13):
        last = moments(tmp_path, fail_from=fail_from)[-1]
        last.leave(tmp_path / "left", None)
        look(tmp_path / "left" / "out", last.told, Seam())
        shutil.rmtree(tmp_path / "left")


@pytest.mark.crash
@pytest.mark.timeout(600)
def test_a_power_failure_at_any_moment(tmp_path: Path) -> None:
    draw = random.Random(6)
    assert survive(tmp_path, moments(tmp_path), draw) > 280
    survive(tmp_path, draw.sample(moments(tmp_path, kind=RecorderWithoutLinks), 30), draw, NoLinks)


@pytest.mark.crash
@pytest.mark.timeout(600)
def test_a_power_failure_after_a_kill(tmp_path: Path) -> None:
    """What a dead attempt wrote and did not sync is counted by the next one: from then on it must be durable."""
    draw = random.Random(7)
    for fail_from in draw.sample(range(2, 80), 20):
        found = moments(tmp_path, fail_from=fail_from)
        survive(tmp_path, [*draw.sample(found, 4), found[-1]], draw)
