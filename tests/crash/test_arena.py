"""2,000 rows through arenas of eight blocks, with aborted rows and killed workers and engines: no image is swapped."""

import hashlib
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

import batchvl
from batchvl.engines.fake import THUMBNAIL_SIDE

ROWS = 2_000
EIGHT_BLOCKS = 2 * 8 * 64 * 1024  # each of the two arenas, for encoded images and for tensors


def digest(colour):
    return hashlib.sha256(bytes(colour) * THUMBNAIL_SIDE * THUMBNAIL_SIDE).hexdigest()[:12]


def children(name):
    matching = []
    for child in psutil.Process().children(recursive=True):
        try:
            if name in " ".join(child.cmdline()):
                matching.append(child)
        except psutil.NoSuchProcess:
            pass
    return matching


@pytest.mark.crash
@pytest.mark.timeout(400)
def test_no_row_ever_sees_another_row_s_image(tmp_path):
    rng = random.Random(3)
    colours = [(i % 256, i // 256, 99) for i in range(600)]
    for i, colour in enumerate(colours):
        Image.new("RGB", (48, 48), colour).save(tmp_path / f"{i}.png")
    inline = [(tmp_path / f"{i}.png").read_bytes() for i in range(600)]
    rows, expected = [], []
    for row in range(ROWS):
        chosen = [rng.randrange(600) for _ in range(rng.choice((1, 1, 2)))]
        # By path or by bytes; bytes pass through an arena as well.
        images = [{"bytes": inline[i] if rng.random() < 0.5 else None, "path": f"{i}.png"} for i in chosen]
        rows.append({"prompt": f"row {row}", "images": images})
        expected.append(" ".join([f"row {row}", *(digest(colours[i]) for i in chosen)]))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "m.parquet")
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    done = threading.Event()
    killed = {"worker": 0, "engine": 0}

    def kill() -> None:
        engine_at = time.monotonic() + 1.5
        while not done.wait(0.1):
            hosts = {c.pid for c in children("batchvl.images.forkserver")}
            workers = [c for c in children("batchvl.images.forkserver") if c.ppid() in hosts]
            if workers and rng.random() < 0.3:
                rng.choice(workers).kill()
                killed["worker"] += 1
            engines = children("batchvl.serving.engine_main")
            if engines and time.monotonic() > engine_at:
                engines[0].kill()
                killed["engine"] += 1
                engine_at = time.monotonic() + 2.5

    with ThreadPoolExecutor(1) as killer:
        killing = killer.submit(kill)
        try:
            summary = batchvl.run(
                str(tmp_path / "m.parquet"),
                engine="fake",
                quiet=True,
                arena_bytes=EIGHT_BLOCKS,
                batch_size=3,
                engine_option=("delay=0.002", "spread=0.02", "slow_every=97"),
                row_timeout=0.5,
                image_workers=2,
                retries=0,
            )
        finally:
            done.set()
        killing.result()
    results = pq.read_table(summary.results).to_pylist()
    assert [r["row"] for r in results] == list(range(ROWS))
    answered = [r for r in results if r["status"] == "ok"]
    assert len(answered) > ROWS * 0.9
    for result in answered:
        assert result["response"] == expected[result["row"]]
    assert {r["error"]["code"] for r in results if r["error"]} <= {"row_timeout", "prepare_crashed", "engine_crashed"}
    assert any(r["error"] and r["error"]["code"] == "row_timeout" for r in results)
    assert killed["worker"] >= 3
    assert killed["engine"] >= 2
    assert summary.engine_deaths >= killed["engine"] - 1
    left = [c for c in psutil.Process().children(recursive=True) if c.pid not in before and c.is_running()]
    assert not left
