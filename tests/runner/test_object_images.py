"""Runs over manifests whose images are in buckets, with a real object store on loopback."""

from __future__ import annotations

import subprocess
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow.parquet as pq
import pytest

import batchvl

from ..faults.clouds import Clouds
from ..faults.store import ObjectStore, StoreRequest
from ..manifest.writing import write
from .running import (
    PATIENCE,
    answers,
    codes,
    command,
    environment,
    image_digest,
    journalled,
    make_image,
    responses,
    run,
    shell,
    wait_until,
)

ROWS = 1000
DISTINCT = 50


@pytest.fixture
def store() -> Iterator[ObjectStore]:
    with ObjectStore() as store:
        yield store


def photos(store: ObjectStore, directory: Path, rows: int, objects: int) -> tuple[Path, list[str]]:
    """Put objects with `DISTINCT` different images into the store. Return a manifest of them, and the right answers."""
    files = [make_image(directory / f"{number}.png", number) for number in range(min(DISTINCT, objects))]
    contents, digests = [file.read_bytes() for file in files], [image_digest(file) for file in files]
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda n: store.put(f"photos/{n} #?.png", contents[n % len(files)]), range(objects)))
    manifest = [{"prompt": f"q {n}", "image": f"s3://night/photos/{n % objects} #?.png"} for n in range(rows)]
    return write(directory / "m.jsonl", manifest), [f"q {n} {digests[n % objects % len(files)]}" for n in range(rows)]


def reads(store: ObjectStore) -> Counter[str]:
    """Return how often each object was read."""
    return Counter(request.path for request in store.requests if request.method == "GET")


def answered(out: Path) -> list[str | None]:
    table = pq.read_table(out / "results.parquet")
    assert table["row"].to_pylist() == list(range(table.num_rows))
    return table["response"].to_pylist()


@pytest.mark.slow
def test_a_thousand_objects_and_a_store_that_fails_now_and_then(store, tmp_path):
    manifest, expected = photos(store, tmp_path, ROWS, ROWS)
    failed: set[str] = set()

    def fault(asked: StoreRequest) -> str | None:
        """Fail the first request for every tenth object."""
        number = asked.path.removeprefix("/night/photos/").partition(" ")[0]
        if not number.endswith("7") or number in failed:
            return None
        failed.add(number)
        return "failed" if number.endswith("77") else "drop"

    store.fault = fault
    done = shell(
        command(manifest, "-o", str(tmp_path / "out"), "--allow-bucket", "s3://night"),
        env=environment(**store.environment()),
    )
    assert done.returncode == 0, done.stderr
    assert answered(tmp_path / "out") == expected
    assert len(failed) == ROWS // 10
    assert store.max_open > 16, "a bucket takes more requests at a time than other hosts"


@pytest.mark.slow
def test_a_run_that_was_killed_resumes(store, tmp_path):
    manifest, expected = photos(store, tmp_path, 400, 400)
    flags = (
        "-o",
        str(tmp_path / "out"),
        "--allow-bucket",
        "s3://night",
        "--commit-seconds",
        "0.02",
        "--batch-size",
        "8",
    )
    variables = environment(**store.environment())
    store.delay = 0.02
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(
            command(manifest, *flags, fake={"delay": 0.05}), stdout=log, stderr=log, env=variables
        )
    wait_until(lambda: journalled(tmp_path / "out") > 10_000 or process.poll() is not None)
    assert process.poll() is None
    process.kill()
    process.wait(PATIENCE)
    store.requests.clear()
    done = shell(command(manifest, *flags), env=variables)
    assert done.returncode == 0, done.stderr
    assert answered(tmp_path / "out") == expected
    assert 0 < len(reads(store)) < 400, "images of rows that were done are not read again"


def test_each_object_is_read_once(store, tmp_path, monkeypatch):
    for name, value in store.environment().items():
        monkeypatch.setenv(name, value)
    manifest, expected = photos(store, tmp_path, 200, 20)
    summary = run(manifest, allow_bucket="s3://ni*", arena_bytes="4MB")
    assert responses(summary) == expected
    assert len(reads(store)) == 20
    assert set(reads(store).values()) == {1}
    assert answers(summary)[0]["images"][0]["source"] == "s3://night/photos/0 #?.png"


def test_rows_fail_and_validate_says_so_before(store, tmp_path, monkeypatch):
    for name, value in store.environment().items():
        monkeypatch.setenv(name, value)
    with Clouds() as clouds:
        store.put("good.png", make_image(tmp_path / "good.png", 1).read_bytes())
        store.put("text.png", b"not an image")
        for name, value in clouds.environment().items():
            monkeypatch.setenv(name, value)
        for path in ("/datasets/me/cats/resolve/main/good.png", "good.png"):
            clouds.objects[path] = (tmp_path / "good.png").read_bytes()
        wanted = {
            "s3://night/good.png": None,
            "hf://datasets/me/cats/good.png": None,
            "hf://datasets/me/cats/missing.png": "http_status",
            "s3://night/missing.png": "missing_file",
            "s3://night/text.png": "not_an_image",
            "s3://private/good.png": "forbidden_address",
            "s3://night/../private/good.png": "invalid_url",
            "hf://datasets/good.png": "invalid_url",
            "abfs://night/good.png": None,
            "abfss://night/missing.png": "missing_file",
            "abfs://night@evil.dfs.core.windows.net/good.png": "forbidden_address",
            "adl://night/good.png": "unsupported_source",
        }
        manifest = write(tmp_path / "m.jsonl", [{"prompt": "q", "image": url} for url in wanted])
        options = {"allow_bucket": ["s3://night", "abfs://night"], "allow_private": ["127.0.0.0/8"]}
        summary = run(manifest, **options)
    assert codes(summary) == {row: code for row, code in enumerate(wanted.values()) if code is not None}
    report = batchvl.validate(manifest, quiet=True, **options)
    told = {problem.code: problem.rows for problem in report.problems if problem.level == "error"}
    assert told == {"forbidden_address": 2, "invalid_url": 2, "unsupported_source": 1}
