"""`batchvl bench`: a run compared with its engine alone, and what limits it."""

from __future__ import annotations

import base64
import json
import sys

import pytest
from PIL import Image

from batchvl.engines.base import EngineInfo
from batchvl.errors import BatchvlError, OptionError
from batchvl.images import pipeline
from batchvl.runner.bench import Comparison, Pace, bench, measure_engine
from batchvl.types import Request, Response

from ..manifest.writing import write
from .running import children, engine_options, questions, shell


def compare(manifest, fake=None, **options):
    return bench(manifest, engine="fake", engine_option=engine_options(fake or {}), quiet=True, **options)


def test_the_limit_is_an_engine_slower_than_all_else(tmp_path):
    """Sixteen rows at a time, a tenth of a second each: at most 160 rows per second."""
    found = compare(questions(tmp_path / "m.jsonl", 2000), {"delay": 0.1, "rows": 16}, batch_size=16, limit=320)

    assert (found.run.rows, found.ceiling.rows, found.prepared) == (320, 320, 320)
    assert found.run.tokens == found.ceiling.tokens == 640
    assert 80 < found.ceiling.rate < 161
    assert 0.7 < found.ratio < 1.3
    assert found.gpu_wait < 0.5
    assert not children()


def test_the_limit_is_image_workers_that_cannot_keep_up(tmp_path):
    for number in range(8):
        Image.effect_noise((1200, 900), 50).convert("RGB").save(tmp_path / f"{number}.png")
    manifest = write(tmp_path / "m.jsonl", [{"prompt": "?", "image": f"{n % 8}.png"} for n in range(80)])

    found = compare(manifest, image_workers=1, look_ahead=0)

    assert (found.run.rows, found.ceiling.rows) == (80, 80)
    assert found.ratio < 0.2
    assert found.gpu_wait > 0.8
    assert found.limit.startswith("the image workers")


def test_preparing_stops_when_the_arena_is_full(tmp_path):
    """Rows of one block of memory each; then a row of three, which is the whole arena."""
    Image.new("RGB", (40, 30)).save(tmp_path / "a.png")
    small, large = {"prompt": "?", "image": "a.png"}, {"prompt": "?", "images": ["a.png"] * 64}
    options = {"look_ahead": 0, "prepare_timeout": "2s"}

    found = compare(write(tmp_path / "m.jsonl", [small] * 6), arena_bytes="384KiB", **options)
    assert (found.run.rows, found.ceiling.rows, found.prepared) == (6, 6, 2)

    found = compare(write(tmp_path / "n.jsonl", [small, large, small]), arena_bytes="256KiB", **options)
    assert (found.run.rows, found.ceiling.rows, found.prepared) == (3, 3, 1)


def test_rows_with_more_inline_images_than_may_be_in_flight(tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "INLINE_BYTES", 2**16)
    Image.effect_noise((60, 60), 50).convert("RGB").save(tmp_path / "a.png")
    url = "data:image/png;base64," + base64.b64encode((tmp_path / "a.png").read_bytes()).decode()
    assert 40 * len(url) > 2 * 2**16

    found = compare(write(tmp_path / "m.jsonl", [{"prompt": "?", "image": url}] * 40), look_ahead=0)

    assert (found.run.rows, found.prepared) == (40, 40)


def test_the_limit_is_what_is_busy():
    def limit(ratio, workers=0.1, runner=0.1, seconds=100.0):
        pace, info = Pace(int(100 * seconds), 100, seconds), EngineInfo("fake", "1", "none")
        run = Pace(int(100 * ratio * seconds), 1, seconds)
        return Comparison(info, run, pace, 1, 0.5, workers, runner).limit

    assert limit(0.97, workers=0.99).startswith("the engine itself")
    assert limit(0.5, workers=0.9, runner=0.8).startswith("the image workers")
    assert limit(0.5, workers=0.8, runner=0.95).startswith("the runner's process")
    assert limit(0.5).startswith("no CPU of this machine")
    assert limit(0.5, seconds=4.0).startswith("unknown, too few rows: in 4 s")
    assert "--limit 6000 " in limit(0.5, seconds=4.0)
    assert limit(0.5, workers=0.9, seconds=4.0).startswith("the image workers")


async def test_the_enginemeasure_engine_is_asked_about_pictures_that_it_has_not_seen():
    """Otherwise it would be faster with the same few images than with new ones."""
    asked = []

    class RecordingEngine:
        async def answer(self, request):
            asked.append(request)
            return Response(request.row, ("yes",), output_tokens=2)

    pace = await measure_engine(RecordingEngine(), [Request(7, ()), Request(8, ())], 5, concurrency=1)

    assert (pace.rows, pace.tokens) == (5, 10)
    assert [(request.row, request.cache_salt) for request in asked] == [(0, 1), (1, 1), (2, 2), (3, 2), (4, 3)]


def test_results_are_discarded_and_no_output_may_be_given(tmp_path):
    manifest = questions(tmp_path / "m.jsonl", 20)
    compare(manifest)
    assert [path.name for path in tmp_path.iterdir()] == ["m.jsonl"]
    with pytest.raises(OptionError, match="--output: not allowed, since bench discards its results"):
        compare(manifest, output=tmp_path / "out")


def test_an_error_if_no_row_can_be_answered(tmp_path):
    manifest = write(tmp_path / "m.jsonl", [{"prompt": "?", "image": "missing.png"}] * 5)
    with pytest.raises(BatchvlError, match=r"nothing was measured: .*5 missing_file"):
        compare(manifest)


def test_the_command(tmp_path):
    manifest = questions(tmp_path / "m.jsonl", 200)
    base = ["batchvl", "bench", str(manifest), "--engine", "fake"]
    done = shell([sys.executable, "-m", *base])
    assert done.returncode == 0, done.stderr
    assert "the engine alone" in done.stdout
    assert "what limits the run: " in done.stdout
    found = json.loads(shell([sys.executable, "-m", *base, "--json", "--limit", "50"]).stdout)
    assert (found["run"]["rows"], found["ceiling"]["rows"]) == (50, 50)
    assert shell([sys.executable, "-m", *base, "-o", "x"]).returncode == 2
