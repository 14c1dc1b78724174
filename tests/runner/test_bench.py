"""`batchvl bench`: a run beside its engine alone, and what limits it."""

from __future__ import annotations

import json
import sys

import pytest
from PIL import Image

from batchvl.engines.base import EngineInfo
from batchvl.errors import BatchvlError, OptionError
from batchvl.runner.bench import Comparison, Pace, _alone, bench
from batchvl.types import Request, Response

from ..manifest.writing import write
from .running import children, engine_options, questions, shell


def compare(manifest, fake=None, **options):
    return bench(manifest, engine="fake", engine_option=engine_options(fake or {}), quiet=True, **options)


def test_an_engine_that_is_slower_than_all_else_is_the_limit(tmp_path):
    """Sixteen at once, a tenth of a second each: 160 rows a second, whoever asks."""
    found = compare(questions(tmp_path / "m.jsonl", 2000), {"delay": 0.1, "rows": 16}, batch_size=16, limit=320)

    assert (found.run.rows, found.ceiling.rows, found.prepared) == (320, 320, 320)
    assert found.run.tokens == found.ceiling.tokens == 640
    assert 80 < found.ceiling.rate < 161
    assert 0.7 < found.ratio < 1.3
    assert found.gpu_wait < 0.5
    assert not children()


def test_image_workers_that_cannot_keep_up_are_the_limit(tmp_path):
    for number in range(8):
        Image.effect_noise((1200, 900), 50).convert("RGB").save(tmp_path / f"{number}.png")
    manifest = write(tmp_path / "m.jsonl", [{"prompt": "?", "image": f"{n % 8}.png"} for n in range(80)])

    found = compare(manifest, image_workers=1, look_ahead=0)

    assert (found.run.rows, found.ceiling.rows) == (80, 80)
    assert found.ratio < 0.2
    assert found.gpu_wait > 0.8
    assert found.limit.startswith("the image workers")


def test_rows_that_fill_the_arena_are_not_waited_for(tmp_path):
    """Rows of one block of memory each; then one of three, which are all there are."""
    Image.new("RGB", (40, 30)).save(tmp_path / "a.png")
    small, large = {"prompt": "?", "image": "a.png"}, {"prompt": "?", "images": ["a.png"] * 64}
    options = {"look_ahead": 0, "prepare_timeout": "2s"}

    found = compare(write(tmp_path / "m.jsonl", [small] * 6), arena_bytes="384KiB", **options)
    assert (found.run.rows, found.ceiling.rows, found.prepared) == (6, 6, 2)

    found = compare(write(tmp_path / "n.jsonl", [small, large, small]), arena_bytes="256KiB", **options)
    assert (found.run.rows, found.ceiling.rows, found.prepared) == (3, 3, 1)


def test_what_limits_is_told_by_what_is_busy():
    def limit(ratio, workers=0.1, runner=0.1, seconds=100.0):
        pace, info = Pace(int(100 * seconds), 100, seconds), EngineInfo("fake", "1", "none")
        run = Pace(int(100 * ratio * seconds), 1, seconds)
        return Comparison(info, run, pace, 1, 0.5, workers, runner).limit

    assert limit(0.97, workers=0.99).startswith("the engine itself")
    assert limit(0.5, workers=0.9, runner=0.8).startswith("the image workers")
    assert limit(0.5, workers=0.8, runner=0.95).startswith("the runner's process")
    assert limit(0.5).startswith("no CPU of ours")
    assert limit(0.5, seconds=4.0).startswith("too few rows to tell: in 4 s")
    assert "--limit 6000 " in limit(0.5, seconds=4.0)
    assert limit(0.5, workers=0.9, seconds=4.0).startswith("the image workers")


async def test_the_engine_alone_is_asked_about_pictures_that_it_has_not_seen():
    """An engine that remembers pictures would else be faster with the same few than with new ones."""
    asked = []

    class Asked:
        async def answer(self, request):
            asked.append(request)
            return Response(request.row, ("yes",), output_tokens=2)

    pace = await _alone(Asked(), [Request(7, ()), Request(8, ())], 5, open_rows=1)

    assert (pace.rows, pace.tokens) == (5, 10)
    assert [(request.row, request.cache_salt) for request in asked] == [(0, 1), (1, 1), (2, 2), (3, 2), (4, 3)]


def test_nothing_is_kept_and_nothing_may_be_named_for_it(tmp_path):
    manifest = questions(tmp_path / "m.jsonl", 20)
    compare(manifest)
    assert [path.name for path in tmp_path.iterdir()] == ["m.jsonl"]
    with pytest.raises(OptionError, match="--output: bench keeps nothing"):
        compare(manifest, output=tmp_path / "out")


def test_where_no_row_can_be_answered_that_is_told(tmp_path):
    manifest = write(tmp_path / "m.jsonl", [{"prompt": "?", "image": "missing.png"}] * 5)
    with pytest.raises(BatchvlError, match=r"nothing was measured: .*5 missing_file"):
        compare(manifest)


def test_the_command(tmp_path):
    manifest = questions(tmp_path / "m.jsonl", 200)
    base = ["batchvl", "bench", str(manifest), "--engine", "fake"]
    told = shell([sys.executable, "-m", *base])
    assert told.returncode == 0, told.stderr
    assert "the engine alone" in told.stdout
    assert "what limits the run: " in told.stdout
    found = json.loads(shell([sys.executable, "-m", *base, "--json", "--limit", "50"]).stdout)
    assert (found["run"]["rows"], found["ceiling"]["rows"]) == (50, 50)
    assert shell([sys.executable, "-m", *base, "-o", "x"]).returncode == 2
