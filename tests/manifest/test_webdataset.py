"""Tars in WebDataset's convention, and what img2dataset writes, as manifests."""

from __future__ import annotations

import json
import os
import tarfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batchvl.config.units import Shard
from batchvl.errors import ManifestError
from batchvl.manifest import index
from batchvl.manifest.batches import Batches
from batchvl.manifest.readers import text, webdataset
from batchvl.types import FileImage, InlineImage, Row
from tests.manifest.tars import FAILED, img2dataset, jpeg, special, write_tar
from tests.manifest.test_streaming import bytes_read
from tests.manifest.writing import numbers, opened, rows_of, write


def sample(key: str, *suffixes: str, **fields: Any) -> list[tuple[str, bytes]]:
    """Return the members of a row; with fields, a JSON member too."""
    members = [(f"{key}.{suffix}", f"{key} {suffix}".encode()) for suffix in suffixes]
    return [*members, (f"{key}.json", json.dumps(fields).encode())] if fields else members


def paths(rows: list[Row]) -> list[list[str]]:
    return [[image.path for image in row.images if isinstance(image, FileImage)] for row in rows]


def failure(row: Row) -> str:
    assert row.failure is not None
    assert row.failure.code == "invalid_row"
    return row.failure.message


def test_a_row_per_key_in_the_order_of_the_sorted_tars(tmp_path: Path) -> None:
    write_tar(tmp_path / "b/0.tar", sample("00", "jpg") + sample("01", "png"))
    write_tar(tmp_path / "a.tar", sample("./d/x", "JPG", "txt") + sample("d.d/y", "left.jpg", "0.webp", "txt"))
    rows = rows_of(tmp_path)
    assert numbers(rows) == [0, 1, 2, 3]
    assert [row.id for row in rows] == ["d/x", "d.d/y", "00", "01"]
    assert paths(rows) == [
        ["a.tar#./d/x.JPG"],
        ["a.tar#d.d/y.left.jpg", "a.tar#d.d/y.0.webp"],
        ["b/0.tar#00.jpg"],
        ["b/0.tar#01.png"],
    ]
    assert [row.images[0].header is not None for row in rows if isinstance(row.images[0], FileImage)] == [True] * 4
    assert rows_of(tmp_path / "**" / "*.tar") == rows
    manifest = opened(tmp_path / "b/0.tar")
    assert manifest.directory == tmp_path / "b"
    assert manifest.notes == ("tar files as WebDataset: a row per key, with .jpg, .png",)


def test_json_and_text_are_columns(tmp_path: Path) -> None:
    fields = {"prompt": "what?", "url": "u", "id": 7, "image": "i", "txt": "t", "n": [1]}
    path = write_tar(tmp_path / "a.tar", [*sample("0", "jpg", **fields), ("0.txt", "né\n".encode()), ("0.npy", b"\0")])
    manifest = opened(path)
    assert manifest.columns == (
        *("id", "images", "sample", "jpg", "txt"),
        *("prompt", "url", "json_id", "json_image", "json_txt", "n"),
    )
    names = ("url", "json_id", "json_image", "json_txt", "n", "txt", "sample", "jpg", "images")
    (row,) = rows_of(path, keep=names)
    assert (row.id, row.prompt, row.images) == ("0", "what?", (FileImage("a.tar#0.jpg", 0),))
    assert row.kept == {
        "url": "u",
        "json_id": "7",
        "json_image": "i",
        "json_txt": "t",
        "n": "[1]",
        "txt": "né",
        "sample": "a.tar/0",
        "jpg": "a.tar#0.jpg",
        "images": '["a.tar#0.jpg"]',
    }
    (row,) = rows_of(path, id_column="sample", prompt_column="txt", image_column="jpg")
    assert (row.id, row.prompt, row.images) == ("a.tar/0", "né", (FileImage("a.tar#0.jpg", 0),))
    chunk = next(opened(path, "{txt} {json_id} {images}").rows())
    assert chunk[0].columns == {"txt": "né", "json_id": 7, "images": ["a.tar#0.jpg"]}


def test_one_of_several_images_is_chosen_by_its_suffix(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", sample("0", "left.jpg", "right.jpg") + sample("1", "right.jpg"))
    first, second = rows_of(path, image_column="left.jpg", keep=("left.jpg",))
    assert paths([first]) == [["a.tar#0.left.jpg"]]
    assert first.kept == {"left.jpg": "a.tar#0.left.jpg"}, "a path, also where the column has the images"
    assert "a.tar: 1 has no .left.jpg, only .right.jpg" in failure(second)
    assert second.id == "1"


def test_members_without_a_key_or_suffix_are_passed_over(tmp_path: Path) -> None:
    members = [
        (special("d.d", tarfile.DIRTYPE), b""),
        ("README", b""),
        ("._0.jpg", b"resource fork"),
        ("d.d/.hidden.jpg", b""),
        *sample("0", "jpg"),
        ("LICENSE", b""),
        ("0.txt", b"text"),
    ]
    rows = rows_of(write_tar(tmp_path / "a.tar", members), keep=("txt",))
    assert [(row.id, row.kept["txt"]) for row in rows] == [("0", "text")]


def test_a_row_without_an_image_fails_unless_no_row_has_one(tmp_path: Path) -> None:
    apart = sample("0", "jpg") + sample("1", "jpg") + sample("0", prompt="p")
    first, second, third = rows_of(write_tar(tmp_path / "a.tar", apart))
    assert first.failure is second.failure is None
    assert "a.tar: 0 has no image, only .json: are its members together?" in failure(third)
    (row,) = rows_of(write_tar(tmp_path / "b.tar", sample("0", prompt="p")))
    assert (row.prompt, row.images, row.failure) == ("p", (), None)


def test_rows_that_are_bad_fail_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(webdataset, "MAX_MEMBERS", 6)
    monkeypatch.setattr(webdataset, "MAX_TEXT", 1000)
    members: list[tuple[str | tarfile.TarInfo, bytes]] = [
        *sample("good", "jpg", k="k"),
        *[("twice.jpg", b"1"), ("twice.jpg", b"2")],
        *sample("many", *(f"{number}.jpg" for number in range(9))),
        *[("broken.jpg", b""), ("broken.json", b"{")],
        *[("list.jpg", b""), ("list.json", b"[]")],
        *[("long.jpg", b""), ("long.json", b" " * 1001)],
        *[("link.jpg", b""), (special("link.json", tarfile.SYMTYPE, "good.json"), b"")],
        *[("latin.jpg", b""), ("latin.txt", b"\xe9")],
        ("\udce9.jpg", b""),
    ]
    path = write_tar(tmp_path / "a.tar", members)
    good, *bad = rows_of(path, keep=("k", "txt"))
    assert good.kept == {"k": "k", "txt": None}
    expected = [
        "twice: two members are named 'twice.jpg'",
        "many: more than 6 members",
        "broken.json: not a JSON object: Input data was truncated",
        "list.json: not a JSON object: Expected `object`, got `array`",
        "long.json: has 1,001 bytes, expected at most 1,000",
        "link.json: is a link, expected a file",
        "latin.txt: not UTF-8",
        r"\xe9: the key is not UTF-8",
    ]
    for row, message in zip(bad, expected, strict=True):
        assert failure(row).startswith(f"{path}: {message}")


@pytest.mark.parametrize("cut", ["header", "contents", "garbage"])
def test_a_damaged_tar_ends_with_a_row_that_says_so(tmp_path: Path, cut: str) -> None:
    keys = [f"{number:02}" for number in range(9)]
    for name in ("a.tar", "b.tar"):
        write_tar(tmp_path / name, [member for key in keys for member in sample(key, "jpg", "txt")])
    with tarfile.open(tmp_path / "a.tar") as tar:
        broken = tar.getmember("05.txt")
    data = bytearray((tmp_path / "a.tar").read_bytes())
    if cut == "garbage":
        data[broken.offset_data - 500] ^= 1
    (tmp_path / "a.tar").write_bytes(
        data[: broken.offset_data + {"header": -100, "contents": 3, "garbage": 10**6}[cut]]
    )
    for shards in (1, 3):
        rows = [row for at in range(shards) for row in rows_of(tmp_path, Shard(at, shards))]
        assert numbers(rows) == list(range(6 + 9))
        assert [row.id for row in rows] == [*keys[:5], None, *keys]
        assert f"{tmp_path / 'a.tar'}: " in failure(rows[5])
        assert "its rows from '05' on are lost" in failure(rows[5])


def test_tars_that_are_none_fail_as_one_row_each(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", sample("0", "jpg"))
    (tmp_path / "b.tar").write_bytes(b"")
    with tarfile.open(tmp_path / "c.tar", "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("1.jpg"))
    write_tar(tmp_path / "d.tar", [])
    write_tar(tmp_path / "e.tar", sample("2", "jpg"))
    rows = rows_of(tmp_path)
    assert [row.id for row in rows] == ["0", None, None, "2"]
    assert "b.tar: has 0 bytes, expected a tar" in failure(rows[1])
    assert "c.tar: is compressed with gzip; only uncompressed" in failure(rows[2])
    for name in ("b.tar", "c.tar"):
        with pytest.raises(ManifestError, match=f"{name}: "):
            opened(tmp_path / name)
    with pytest.raises(ManifestError, match="has no rows"):
        opened(tmp_path / "d.tar")
    (tmp_path / "f.tar.gz").write_bytes(b"")
    with pytest.raises(ManifestError, match=r"f.tar.gz: .* decompress it first"):
        opened(tmp_path / "f.tar.gz")
    with pytest.raises(ManifestError, match="decompress them first"):
        opened(str(tmp_path / "*.gz"))


def test_keys_that_repeat_are_reported_and_samples_do_not_repeat(tmp_path: Path) -> None:
    for name in ("a.tar", "b.tar"):
        write_tar(tmp_path / name, sample("0", "jpg"))
    with pytest.raises(ManifestError, match=r"rows 0 and 1 .* have the same id '0'.*--id-column"):
        opened(tmp_path).check()
    opened(tmp_path, id_column="sample").check()
    twice = rows_of(write_tar(tmp_path / "c/c.tar", sample("0", "jpg") + sample("1", "jpg") + sample("0", "jpg")))
    first, _, last = (row.images[0] for row in twice)
    assert isinstance(first, FileImage)
    assert isinstance(last, FileImage)
    assert first.path == last.path
    assert first.header != last.header


def test_counting_reads_headers_only_and_a_resumed_run_seeks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "WRITE_INDEX_ROWS", 100)
    monkeypatch.setattr(text, "STEP", 100)
    monkeypatch.setattr(index, "STEP", 100)
    monkeypatch.setattr(text, "SAMPLE_ROWS", 10)
    path = write_tar(tmp_path / "a.tar", [(f"{at:04}.jpg", b"x" * 100_000) for at in range(600)])
    manifest = opened(path)
    before = bytes_read()
    shard = [row for rows in manifest.rows(Shard(5, 6), (), tmp_path / "out") for row in rows]
    assert [row.id for row in shard] == [f"{at:04}" for at in range(500, 600)]
    assert bytes_read() - before < path.stat().st_size / 5
    before = bytes_read()
    rows = opened(path).rows(skip=range(590), index_directory=tmp_path / "out")
    assert [row.id for chunk in rows for row in chunk] == [f"{at:04}" for at in range(590, 600)]
    assert bytes_read() - before < path.stat().st_size / 50


def test_the_fingerprint_and_estimate(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", [(f"{at:04}.jpg", b"x" * 1000) for at in range(2500)])
    manifest = opened(path)
    assert manifest.total is None
    assert 2000 < (manifest.estimate() or 0) < 3000
    assert sum(map(len, manifest.rows())) == manifest.total == 2500
    path.rename(tmp_path / "b.tar")
    write_tar(path, [(f"{at:04}.png", b"x" * 1000) for at in range(2500)])
    assert opened(path).fingerprint != manifest.fingerprint
    (tmp_path / "b.tar").rename(path)
    assert opened(path).fingerprint == manifest.fingerprint


def test_all_columns_for_a_join(tmp_path: Path) -> None:
    rows = sample("0", "jpg", "txt", n=1, tags=["a"]) + sample("1", "jpg", n=2) + [("2.txt", b"alone")]
    batches = Batches(write_tar(tmp_path / "a.tar", rows))
    strings = {name: pa.string() for name in ("sample", "jpg", "txt")}
    lists = pa.list_(pa.string())
    assert dict(zip(batches.schema.names, batches.schema.types, strict=True)) == {
        "id": pa.string(),
        "images": lists,
        **strings,
        "n": pa.int64(),
        "tags": lists,
    }
    (batch,) = batches.read(range(3))
    assert batch.columns.column("images").to_pylist() == [["a.tar#0.jpg"], ["a.tar#1.jpg"], []]
    assert batch.columns.column("txt").to_pylist() == ["0 txt", None, "alone"]
    assert batch.columns.column("n").to_pylist() == [1, 2, None]


def test_manifests_take_precedence_over_the_tars_that_their_rows_refer_to(tmp_path: Path) -> None:
    write_tar(tmp_path / "shards/0.tar", sample("0", "jpg"))
    write(tmp_path / "m.jsonl", [{"prompt": "p", "image": "shards/0.tar#0.jpg"}])
    manifest = opened(tmp_path)
    assert manifest.files.names == ("m.jsonl",)
    assert manifest.notes == ("the tars next to m.jsonl are not read as manifests; its rows can name their members",)
    assert paths(rows_of(tmp_path)) == [["shards/0.tar#0.jpg"]]


ORDER = [2, 0, 1, 3, 6, 4, FAILED]


def check_img2dataset(rows: list[Row], images: list[Any]) -> None:
    """Check rows of `img2dataset`, the last of which failed there, and is left out or a failed row."""
    order = ORDER[: len(rows)]
    assert numbers(rows) == list(range(len(rows)))
    assert [(row.id, row.kept["caption"]) for row in rows] == [(f"00000{n}", f"caption {n}") for n in order]
    assert [row.images for row in rows if row.failure is None] == [(image,) for image in images]
    for row in rows[6:]:
        assert row.failure is not None
        assert row.failure.code == "missing_file"
        assert row.failure.message == (
            "img2dataset has no image of this row: failed_to_download: HTTP Error 404: Not Found"
        )


def test_img2dataset_webdataset(tmp_path: Path) -> None:
    directory = img2dataset(tmp_path / "out", "webdataset")
    manifest = opened(directory)
    assert "only the tars are read" in manifest.notes[0]
    rows = rows_of(directory, keep=("caption",))
    members = [f"0000{int(at > 3)}.tar#00000{n}.jpg" for at, n in enumerate(ORDER[:6])]
    check_img2dataset(rows, [row.images[0] for row in rows])
    assert paths(rows) == [[member] for member in members]
    # The list has the failed downloads too, and no offsets.
    rows = rows_of(directory / "*.parquet", keep=("caption",))
    check_img2dataset(rows, list(map(FileImage, members)))
    assert len(rows) == 7


def test_img2dataset_files(tmp_path: Path) -> None:
    directory = img2dataset(tmp_path / "out", "files")
    rows = rows_of(directory, keep=("caption",))
    check_img2dataset(rows, [FileImage(f"0000{int(at > 3)}/00000{n}.jpg") for at, n in enumerate(ORDER[:6])])
    assert len(rows) == 7
    assert all(os.path.isfile(directory / path) for row in paths(rows) for path in row)
    assert opened(directory).notes == (
        "img2dataset's output: images in the directories or tars next to the Parquet files, ids in column 'key'; "
        "failed downloads are failed rows",
    )


def test_img2dataset_parquet(tmp_path: Path) -> None:
    directory = img2dataset(tmp_path / "out", "parquet")
    rows = rows_of(directory, keep=("caption", "jpg"))
    check_img2dataset(rows, [InlineImage(jpeg(n), f"jpg ({len(jpeg(n))} bytes)") for n in ORDER[:6]])
    assert [row.kept["jpg"] for row in rows] == [*map(jpeg, ORDER[:6]), None]
    shards = [row for at in range(3) for row in rows_of(directory, Shard(at, 3), keep=("caption", "jpg"))]
    assert shards == rows


def test_columns_of_the_user_come_before_what_img2dataset_means(tmp_path: Path) -> None:
    directory = img2dataset(tmp_path / "out", "parquet")
    rows = rows_of(directory, image_column="url", id_column="caption")
    assert [row.id for row in rows] == [f"caption {n}" for n in ORDER]
    assert all(row.failure is None for row in rows)
    table = pq.read_table(directory / "00001.parquet")
    for column in ("status", "key", "error_message", "url"):
        (tmp_path / column).mkdir()
        pq.write_table(table.drop([column]), tmp_path / column / "m.parquet")
        with pytest.raises(ManifestError, match=r"neither prompts nor images.*--image-column"):
            opened(tmp_path / column)
    named = table.append_column("image", pa.array(["a.jpg"] * 3))
    pq.write_table(named, tmp_path / "named.parquet")
    assert paths(rows_of(tmp_path / "named.parquet")) == [["a.jpg"]] * 3


def test_the_reason_of_a_failed_download_is_short_and_has_no_secrets(tmp_path: Path) -> None:
    directory = img2dataset(tmp_path / "out", "parquet")
    table = pq.read_table(directory / "00001.parquet")
    at = table.schema.get_field_index("error_message")
    reasons = [None, None, "bad URL https://example.org/a.jpg?token=secret " + "x" * 500]
    pq.write_table(table.set_column(at, "error_message", pa.array(reasons)), directory / "00001.parquet")
    last = rows_of(directory)[-1]
    assert last.failure is not None
    assert "bad URL https://example.org/a.jpg?… xxx" in last.failure.message
    assert len(last.failure.message) < 250


def test_an_image_that_is_null_without_a_reason_fails(tmp_path: Path) -> None:
    directory = img2dataset(tmp_path / "out", "parquet")
    table = pq.read_table(directory / "00001.parquet")
    at = table.schema.get_field_index("status")
    pq.write_table(table.set_column(at, "status", pa.array(["success"] * 3)), directory / "00001.parquet")
    last = rows_of(directory)[-1]
    assert last.failure is not None
    assert last.failure.message == "column 'jpg' is null, though the row's status is 'success'"
