"""The files of a manifest, and its fingerprint."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from batchvl.errors import ManifestError
from batchvl.manifest.files import find_files, walk
from batchvl.types import FileImage
from tests.manifest.writing import numbers, opened, rows_of, write, write_bytes

ROW = {"prompt": "What?", "image": "cat.jpg"}


def touch(directory: Path, *names: str) -> None:
    for name in names:
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_bytes(b"x")


def test_walk_sorts_by_whole_relative_paths(tmp_path: Path) -> None:
    names = ["a.jpg", "a/z.jpg", "a/b/c.jpg", "a-b.jpg", "a0.jpg", "b/a.jpg", "Z.jpg", "é.jpg"]
    touch(tmp_path, *names, ".hidden.jpg", "_temporary/x.jpg")
    assert list(walk(tmp_path)) == sorted(names)


def test_files_of_a_directory_or_glob_are_one_manifest_sorted_by_path(tmp_path: Path) -> None:
    for name in ("b/2.jsonl", "a/1.jsonl", "c.ndjson"):
        write(tmp_path / name, [{"prompt": name}] * 2)
    expected = ["a/1.jsonl", "a/1.jsonl", "b/2.jsonl", "b/2.jsonl", "c.ndjson", "c.ndjson"]
    rows = rows_of(tmp_path)
    assert [row.prompt for row in rows] == expected
    assert numbers(rows) == list(range(6))
    manifest = opened(str(tmp_path / "*" / "?.jsonl"))
    assert [row.prompt for rows in manifest.rows() for row in rows] == expected[:4]
    assert manifest.directory == tmp_path


def test_a_manifest_takes_precedence_over_images(tmp_path: Path) -> None:
    touch(tmp_path, "images/cat.jpg")
    write(tmp_path / "m.jsonl", [ROW])
    assert find_files(tmp_path).names == ("m.jsonl",)


def test_an_output_directory_is_not_part_of_the_manifest(tmp_path: Path) -> None:
    write(tmp_path / "m.parquet", [ROW])
    write(tmp_path / "out/part.parquet", [ROW])
    (tmp_path / "out/run.json").write_text(json.dumps({"fingerprint": "00"}))
    write(tmp_path / "more/m.parquet", [ROW])
    (tmp_path / "more/run.json").write_text("{}")
    assert find_files(tmp_path).names == ("m.parquet", "more/m.parquet")


def test_a_directory_of_images(tmp_path: Path) -> None:
    touch(tmp_path, "b.PNG", "a/x.jpeg", "notes.txt")
    manifest = opened(tmp_path)
    rows = [row for rows in manifest.rows() for row in rows]
    assert [(row.id, row.prompt, row.images) for row in rows] == [
        ("a/x.jpeg", None, (FileImage("a/x.jpeg"),)),
        ("b.PNG", None, (FileImage("b.PNG"),)),
    ]
    assert (manifest.total, manifest.schema.id_type) == (2, "string")
    manifest.check()


def test_an_image_whose_name_is_not_utf8_fails_alone(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").touch()
    try:
        open(os.fsencode(tmp_path) + b"/\xff.jpg", "wb").close()
    except OSError:
        pytest.skip("the file system allows only UTF-8 names")
    good, bad = rows_of(tmp_path)
    assert good.failure is None
    assert bad.failure is not None
    assert "not UTF-8" in bad.failure.message


@pytest.mark.parametrize(
    ("names", "source", "expected"),
    [
        ([], "nothing-here", "no such file or directory"),
        ([], ".", "found nothing, expected .parquet"),
        (["notes.txt"], ".", r"found \.txt, expected .parquet"),
        (["notes.txt"], "notes.txt", "expected .parquet, .jsonl"),
        (["cat.jpg"], "cat.jpg", "expected .parquet, .jsonl"),
        (["m.parquet.gz"], "m.parquet.gz", "expected .parquet"),
        (["a.csv", "b.parquet"], ".", r"several formats \(csv, parquet, such as a.csv\); expected one"),
        ([], "*.jsonl", "matches no file"),
    ],
)
def test_a_source_that_is_not_a_manifest(tmp_path: Path, names: list[str], source: str, expected: str) -> None:
    touch(tmp_path, *names)
    with pytest.raises(ManifestError, match=expected) as error:
        opened(str(tmp_path / source))
    assert str(tmp_path) in str(error.value)


def test_object_stores_are_rejected_without_printing_secrets() -> None:
    with pytest.raises(ManifestError, match="local files") as error:
        opened("s3://key:secret@bucket/m.parquet")
    assert "secret" not in str(error.value)


def fingerprint(path: Path) -> str:
    return opened(path).fingerprint


@pytest.mark.parametrize("name", ["m.parquet", "m.jsonl", "m.csv", "m.jsonl.gz"])
def test_the_fingerprint_depends_on_contents_not_on_location_or_time(tmp_path: Path, name: str) -> None:
    old = write(tmp_path / "old" / name, [ROW] * 3)
    first = fingerprint(old)
    os.utime(old, (1, 1))
    old.parent.rename(tmp_path / "new")
    new = tmp_path / "new" / name
    assert fingerprint(new) == first
    assert fingerprint(new.parent) == first
    if name.endswith(".csv"):
        new.write_text(new.read_text().replace("cat", "dog"))
    else:
        write(new, [ROW, ROW, {**ROW, "prompt": "Whats"}])
    assert fingerprint(new) != first


def test_the_fingerprint_includes_both_ends_of_a_large_text(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    data = bytearray(b'{"prompt": "a"}\n' * 200_000)
    prints = set()
    for at in (12, len(data) - 5, len(data) - 2**20 + 5):
        data[at] ^= 1
        path.write_bytes(bytes(data).replace(b"\x00", b" "))
        try:
            prints.add(fingerprint(path))
        except ManifestError:
            pytest.fail("the flipped byte broke the first line")
    assert len(prints) == 3


def test_the_fingerprint_of_a_directory_includes_names_and_sizes(tmp_path: Path) -> None:
    touch(tmp_path, "a.jpg", "b.jpg")
    first = fingerprint(tmp_path)
    (tmp_path / "b.jpg").rename(tmp_path / "c.jpg")
    renamed = fingerprint(tmp_path)
    write_bytes(tmp_path / "c.jpg", b"longer")
    assert len({first, renamed, fingerprint(tmp_path)}) == 3
