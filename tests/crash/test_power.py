"""Power failures by the model of `power.py`, at every moment of an attempt and of the attempt after a kill."""

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
from .seam import attempt, check


class RecorderWithoutLinks(NoLinks, Recorder):
    """Records on a file system without hard links."""


def moments(scratch: Path, *, fail_from: int | None = None, kind: type[Recorder] = Recorder) -> list[Moment]:
    """Return all moments of an attempt, or of a failing attempt and the next one."""
    reported: set[int] = set()
    root = scratch / "disk"
    root.mkdir()
    with kind(root, lambda: reported) as disk:
        if fail_from is not None:
            disk.fail_from = fail_from
            with suppress(StoppedEarly):
                attempt(root / "out", disk, reported.update)
            disk.fail_from = None
        attempt(root / "out", disk, reported.update)
    assert len(reported) == 24
    shutil.rmtree(root)
    return disk.moments


def aftermaths(moment: Moment, target: Path, draw: random.Random) -> Iterator[None]:
    """Create, one after another, several directories that a power failure at the moment may leave."""
    for chance, names in ((None, False), (None, True), (draw, False), (draw, False)):
        moment.leave(target, chance, new_names=names)
        yield
        shutil.rmtree(target)


def survive(scratch: Path, failures: list[Moment], draw: random.Random, disk: type[Seam] = Seam) -> int:
    """Resume after a power failure at each of the moments, and return the number of cases."""
    count = 0
    for moment in failures:
        for _ in aftermaths(moment, scratch / "left", draw):
            check(scratch / "left" / "out", moment.reported, disk())
            count += 1
    return count


def test_a_power_failure_at_some_moments(tmp_path: Path) -> None:
    draw = random.Random(5)
    all_moments = moments(tmp_path)
    assert len(all_moments) > 70
    assert len({len(moment.reported) for moment in all_moments}) > 3
    survive(tmp_path, draw.sample(all_moments, 8), draw)


def test_the_model_detects_missing_syncs(tmp_path: Path) -> None:
    """Without the fsync of journals or of directories, reported rows are lost."""

    class NoFileSync(Recorder):
        def sync(self, fd: int) -> None:
            Seam.sync(self, fd)

    class NoDirectorySync(Recorder):
        def sync_directory(self, path: Path) -> None:
            Seam.sync_directory(self, path)

    for kind in (NoFileSync, NoDirectorySync):
        last = moments(tmp_path, kind=kind)[-1]
        last.leave(tmp_path / "left", None)
        with pytest.raises((AssertionError, pa.ArrowInvalid)):  # missing rows or a damaged part
            check(tmp_path / "left" / "out", last.reported, Seam())
        shutil.rmtree(tmp_path / "left")


def test_a_power_failure_after_a_kill_while_directories_were_created(tmp_path: Path) -> None:
    """The killed attempt has not synced their names; the next one finds them and must sync them."""
    for fail_from in range(1, 13):
        last = moments(tmp_path, fail_from=fail_from)[-1]
        last.leave(tmp_path / "left", None)
        check(tmp_path / "left" / "out", last.reported, Seam())
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
    """Rows that a killed attempt wrote without syncing count in the next one, and must be durable from then on."""
    draw = random.Random(7)
    for fail_from in draw.sample(range(2, 80), 20):
        after_kill = moments(tmp_path, fail_from=fail_from)
        survive(tmp_path, [*draw.sample(after_kill, 4), after_kill[-1]], draw)
