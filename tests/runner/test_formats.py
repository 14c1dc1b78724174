"""Manifests of all formats give the same rows and answers, in the manifest's order, each once."""

import json
import os
import signal
import sys

import pytest

import batchvl
from batchvl.runner.progress import Progress

from ..manifest.tars import FAILED, img2dataset, write_tar
from ..manifest.writing import write
from .running import answers, codes, image_digest, make_image, questions, responses, run, shell

ROWS = 12


@pytest.fixture
def rows(tmp_path):
    """Rows whose columns have other names than the default ones, each with an image next to the manifest."""
    for number in range(ROWS):
        make_image(tmp_path / f"images/{number}.png", number)
    return [
        {"key": f"k{n}", "question": f"what is {n}?", "photo": f"images/{n}.png", "site": f"s{n % 3}"}
        for n in range(ROWS)
    ]


MAPPED = {"prompt_column": "question", "image_column": "photo", "id_column": "key", "keep": ["site"]}


def check(summary, directory):
    rows = [(row["row"], row["id"], row["response"], row["site"], row["status"]) for row in answers(summary)]
    digests = [image_digest(directory / f"images/{n}.png") for n in range(ROWS)]
    assert rows == [(n, f"k{n}", f"what is {n}? {digests[n]}", f"s{n % 3}", "ok") for n in range(ROWS)]
    assert (summary.exit_code, summary.rows, summary.expected, summary.images) == (0, ROWS, ROWS, ROWS)


@pytest.mark.parametrize("name", ["m.parquet", "m.jsonl", "m.jsonl.gz", "m.jsonl.zst", "m.csv"])
def test_files(name, rows, tmp_path):
    summary = run(write(tmp_path / name, rows), **MAPPED)
    check(summary, tmp_path)
    assert summary.output == str(tmp_path / "m-batchvl")


def test_a_directory_and_a_glob_of_parquet(rows, tmp_path):
    for number, cut in enumerate([rows[:5], rows[5:6], rows[6:]]):
        write(tmp_path / f"day-{number}.parquet", cut)
    check(run(tmp_path / "day-*.parquet", **MAPPED), tmp_path)
    assert (tmp_path / "day-batchvl").is_dir()
    again = run(str(tmp_path / "**/*.parquet"), output=tmp_path / "other", **MAPPED)
    check(again, tmp_path)
    summary = run(tmp_path, **MAPPED)
    check(summary, tmp_path)
    assert summary.output == f"{tmp_path}-batchvl"


def test_images_as_bytes_and_a_prompt_from_columns(rows, tmp_path):
    for row in rows:
        file = tmp_path / row["photo"]
        row["photo"] = {"bytes": file.read_bytes(), "path": file.name}
    summary = run(
        write(tmp_path / "m.parquet", rows),
        prompt="{site}: {question}",
        prompt_column="key",
        **{name: value for name, value in MAPPED.items() if name != "prompt_column"},
    )
    wanted = [f"s{n % 3}: what is {n}? {image_digest(tmp_path / f'images/{n}.png')}" for n in range(ROWS)]
    assert responses(summary) == wanted


def test_a_directory_of_images(rows, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path / "images")
    summary = run(".")  # from inside the directory
    names = sorted(f"{n}.png" for n in range(ROWS))
    assert responses(summary) == [f"describe this image {image_digest(tmp_path / 'images' / name)}" for name in names]
    assert [row["images"][0]["source"] for row in answers(summary)] == names
    assert summary.output == str(tmp_path / "images-batchvl")


def test_members_of_tars(rows, tmp_path):
    members = [(row["photo"], (tmp_path / row["photo"]).read_bytes()) for row in rows]
    write_tar(tmp_path / "a.tar", members[:7])
    write_tar(tmp_path / "sub/b.tar", members[7:])
    for n, row in enumerate(rows):
        row["photo"] = f"{'sub/b' if n >= 7 else 'a'}.tar#{row['photo']}"
    manifest = write(tmp_path / "m.jsonl", [*rows, {**rows[0], "key": "none", "photo": "a.tar#none.png"}])
    summary = run(manifest, image_workers=2, **MAPPED)
    assert codes(summary) == {ROWS: "missing_file"}
    digests = [image_digest(tmp_path / f"images/{n}.png") for n in range(ROWS)]
    assert responses(summary)[:ROWS] == [f"what is {n}? {digests[n]}" for n in range(ROWS)]
    assert [row["images"][0]["source"] for row in answers(summary)][:ROWS] == [row["photo"] for row in rows]
    report = batchvl.validate(manifest, quiet=True, probe=50, **MAPPED)
    assert [(problem.code, problem.rows) for problem in report.problems if problem.level == "error"] == [
        ("missing_file", 1)
    ]
    assert (report.probe.rows, report.probe.failed) == (ROWS, 0)


@pytest.mark.parametrize("output_format", ["webdataset", "files", "parquet"])
def test_what_img2dataset_writes(output_format, tmp_path, caplog):
    caplog.set_level("INFO", "batchvl")
    directory = img2dataset(tmp_path / "out", output_format)
    summary = run(directory, {"images": True}, keep=["caption"])
    rows = answers(summary)
    ok = [row for row in rows if row["status"] == "ok"]
    assert [row["id"] for row in ok] == [f"00000{n}" for n in (2, 0, 1, 3, 6, 4)]
    assert [row["caption"] for row in ok] == [f"caption {n}" for n in (2, 0, 1, 3, 6, 4)]
    assert len({row["images"][0]["sha256"] for row in ok}) == 6
    assert len({row["response"] for row in ok}) == 6
    if output_format == "webdataset":
        assert (len(rows), summary.exit_code) == (6, 0)
        assert "only the tars are read" in caplog.text
    else:
        assert codes(summary) == {6: "missing_file"}
        assert (rows[6]["id"], rows[6]["caption"]) == (f"00000{FAILED}", f"caption {FAILED}")
        assert "404: Not Found" in rows[6]["error"]["message"]
        assert "img2dataset's output: images in" in caplog.text


def test_a_run_over_tars_in_shards_and_resumed(tmp_path):
    directory = img2dataset(tmp_path / "tars", "webdataset")
    whole = run(directory)
    assert whole.output == f"{directory}-batchvl"
    assert run(directory / "00000.tar").output == str(directory / "00000-batchvl")
    part = run(directory, output=tmp_path / "part", limit=3)
    assert (part.rows, run(directory, output=tmp_path / "part").resumed) == (3, 3)
    for shard in ("1/2", "0/2"):
        run(directory, output=tmp_path / "shards", shard=shard)
    merged = batchvl.merge(tmp_path / "shards", tmp_path / "merged.jsonl", with_manifest=directory)
    assert (merged.rows, merged.missing) == (6, 0)
    lines = [json.loads(line) for line in (tmp_path / "merged.jsonl").read_text().splitlines()]
    assert [line["response"] for line in lines] == responses(whole)
    assert [line["txt"] for line in lines] == [f"caption {n}" for n in (2, 0, 1, 3, 6, 4)]


@pytest.mark.parametrize("name", ["m.parquet", "m.jsonl"])
def test_a_limited_run_is_resumed_without_the_limit(name, tmp_path):
    manifest = questions(tmp_path / name, 400)
    first = run(manifest, limit=50)
    assert (first.rows, first.expected, first.exit_code) == (50, 50, 0)
    assert responses(first) == [f"q {n}" for n in range(50)]
    attempts = len(list((tmp_path / "m-batchvl").rglob("engine-*.log")))
    assert run(manifest, limit=50).resumed == 50
    assert len(list((tmp_path / "m-batchvl").rglob("engine-*.log"))) == attempts, "no engine was started"
    further = run(manifest, limit=60)
    assert (further.rows, further.resumed, further.exit_code) == (60, 50, 0)
    rest = run(manifest)
    assert (rest.rows, rest.resumed, rest.expected, rest.exit_code) == (400, 60, 400, 0)
    assert responses(rest) == [f"q {n}" for n in range(400)]


@pytest.mark.parametrize("name", ["m.parquet", "m.jsonl.gz"])
def test_merged_shards_equal_a_single_run(name, tmp_path):
    manifest = questions(tmp_path / name, 100)
    out = tmp_path / "sharded"
    for index in (2, 0, 1):
        merged = batchvl.merge(out, tmp_path / "early.jsonl", partial=True) if index == 1 else None
        summary = run(manifest, output=out, shard=f"{index}/3")
        assert summary.exit_code == 0
        assert summary.results is None
        assert summary.rows == summary.expected == len(range(index * 100 // 3, (index + 1) * 100 // 3))
        assert "batchvl merge" in str(summary)
    assert merged is not None
    assert merged.missing == 33
    assert run(manifest, output=out, shard="1/3").resumed == 33
    file = tmp_path / "merged.jsonl"
    done = shell([sys.executable, "-m", "batchvl", "merge", str(out), str(file)])
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    whole = run(manifest, output=tmp_path / "whole")
    assert [(line["row"], line["response"]) for line in lines] == list(enumerate(responses(whole)))


def test_the_first_answers_do_not_wait_for_the_end_of_the_manifest(tmp_path, monkeypatch):
    """When the first of 300,000 rows are on disk, most of the file has not been read."""
    manifest = tmp_path / "m.jsonl"
    with manifest.open("w") as file:
        file.writelines(f'{{"prompt": "question {number}"}}\n' for number in range(300_000))
    highest = []
    read = batchvl.manifest.Manifest.rows

    def rows(self, *arguments):
        for chunk in read(self, *arguments):
            highest.append(chunk[-1].number)
            yield chunk

    monkeypatch.setattr("batchvl.manifest.Manifest.rows", rows)
    first = []
    original_commit = Progress.commit

    def commit(self, counts):
        first.append(highest[-1])
        original_commit(self, counts)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Progress, "commit", commit)
    summary = run(manifest, {"images": False})
    assert summary.exit_code == 75
    assert first
    assert first[0] < 30_000
