"""`batchvl merge` of whole runs: of several shards, first with one missing, then complete."""

import asyncio
import json
import os
import subprocess
import sys
import time

import pyarrow.parquet as pq
import pytest

import batchvl

from ..manifest.writing import write
from ..results.samples import RUN_FILE, fill, sample
from .running import PATIENCE, environment, questions, run, shell, wait_until

ROWS = 90


def merge(*arguments):
    """Run `batchvl merge`. Return its exit code and output."""
    done = shell([sys.executable, "-m", "batchvl", "merge", *map(str, arguments)])
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize("name", ["m.parquet", "m.jsonl"])
def test_three_shards_one_of_them_missing(name, tmp_path):
    rows = [
        {"id": n, "prompt": f"q {n}", "site": f"s{n % 4}", "score": n / 4, "tags": ["a", str(n)], "status": "new"}
        for n in range(ROWS)
    ]
    manifest, out = write(tmp_path / name, rows), tmp_path / "night"
    for index in (0, 2):
        assert run(manifest, output=out, shard=f"{index}/3", keep=["site"]).exit_code == 0
    code, output = merge(out)
    assert code == 3
    assert f"{out}: 30 of 90 rows are missing: 30, 31, 32, 33, 34, 35, 36, 37, 38, 39, …\n" in output
    assert "shard 1/3 not started: 30 rows\n" in output
    advice = "complete these shards, or write the available rows with --partial"
    assert f"results.parquet was not written: {advice}" in output
    assert not (out / "results.parquet").exists()

    code, output = merge(out, "--partial", "--json")
    report = json.loads(output)
    assert (code, report["rows"], report["missing"], report["complete"]) == (3, 60, 30, False)
    there = [*range(30), *range(60, 90)]
    assert pq.read_table(out / "results.parquet")["row"].to_pylist() == there

    assert run(manifest, output=out, shard="1/3", keep=["site"]).exit_code == 0
    for target in (out / "all.parquet", out / "all.jsonl"):
        code, output = merge(out, target, "--with-manifest", manifest)
        assert (code, output) == (0, f"{target}: 90 rows, 90 ok, 0 failed\n")
    table = pq.read_table(out / "all.parquet")
    assert table.column_names[-5:] == ["site", "prompt", "score", "tags", "manifest_status"]
    assert table["score"].to_pylist() == [row["score"] for row in rows]
    lines = [json.loads(line) for line in (out / "all.jsonl").read_text().splitlines()]
    assert table.to_pylist() == lines
    for n, (row, line) in enumerate(zip(rows, lines, strict=True)):
        assert (line["row"], line["id"], line["response"], line["manifest_status"]) == (n, n, f"q {n}", "new")
        assert {key: line[key] for key in ("prompt", "site", "score", "tags")} | {"id": n, "status": "new"} == row


@pytest.mark.parametrize("name", ["m.parquet", "m.jsonl", "m.csv"])
def test_a_limited_run_is_complete_and_so_is_its_merge(name, tmp_path):
    manifest, out = questions(tmp_path / name, 50), tmp_path / "m-batchvl"
    assert run(manifest, limit=20).exit_code == 0
    code, output = merge(out, tmp_path / "r.jsonl", "--with-manifest", manifest)
    assert (code, output) == (0, f"{tmp_path / 'r.jsonl'}: 20 rows, 20 ok, 0 failed\n")
    assert run(manifest).exit_code == 0
    assert batchvl.merge(out).rows == 50


def test_a_limited_run_of_several_shards(tmp_path):
    manifest, out = questions(tmp_path / "m.jsonl", 50), tmp_path / "m-batchvl"
    for index in range(2):
        assert run(manifest, limit=20, shard=f"{index}/2").exit_code == 0
        assert batchvl.merge(out).complete == (index == 1)
    assert pq.read_table(out / "results.parquet")["row"].to_pylist() == list(range(20))


def test_ids_of_another_column_keep_the_id_column(tmp_path):
    manifest = write(tmp_path / "m.jsonl", [{"id": n, "key": f"k{n}", "prompt": "q"} for n in range(5)])
    out = tmp_path / "m-batchvl"
    run(manifest, id_column="key")
    report = batchvl.merge(out, with_manifest=manifest)
    merged = pq.read_table(report.file).to_pylist()
    assert [(row["id"], row["manifest_id"], row["key"]) for row in merged] == [(f"k{n}", n, f"k{n}") for n in range(5)]


def test_another_manifest_is_refused(tmp_path):
    manifest, other = questions(tmp_path / "m.jsonl", 5), questions(tmp_path / "n.jsonl", 5)
    run(manifest)
    code, output = merge(tmp_path / "m-batchvl", "--with-manifest", other)
    assert code == 2
    assert output.startswith(f"Error: {other}: not the manifest of the run in {tmp_path / 'm-batchvl'}: its fingerp")


@pytest.mark.crash
def test_a_killed_merge_keeps_the_old_file_and_the_next_one_cleans_up(tmp_path):
    out = tmp_path / "out"
    asyncio.run(fill(out, (sample(row, response="x" * 2000) for row in range(20_000)), RUN_FILE, part_rows=2000))
    (out / "results.parquet").write_bytes(b"of yesterday")
    left = 0
    for wait in (0, 0.05, 0.1, 0.2):
        process = subprocess.Popen(
            [sys.executable, "-m", "batchvl", "merge", str(out), "--partial"], env=environment(), stderr=subprocess.PIPE
        )
        wait_until(lambda process=process: any(out.glob(".merge-*/results")) or process.poll() is not None)
        time.sleep(wait)
        process.kill()
        process.communicate(timeout=PATIENCE)
        left += len(list(out.glob(".merge-*")))
        assert len(list(out.glob(".merge-*"))) <= 1, "each cleans up after the one before"
        if process.returncode == -9:
            assert (out / "results.parquet").read_bytes() == b"of yesterday"
    assert left, "some were killed while they were merging"
    assert batchvl.merge(out, partial=True).rows == 20_000
    assert not [name for name in os.listdir(out) if name.startswith(".")]
