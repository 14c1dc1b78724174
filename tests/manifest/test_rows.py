"""How cells become rows, in every format."""

from __future__ import annotations

import base64
import json
from datetime import datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batchvl.manifest.columns import Columns
from batchvl.manifest.rows import RowMaker
from batchvl.types import FileImage, InlineImage, Row, WebImage
from tests.manifest.writing import opened, rows_of, write, write_bytes

ALL = Columns("id", "prompt", "messages", "images", "image", "generation", ("t",), ("k",))


def made(id_type: Any = "string", **cells: Any) -> Row:
    return RowMaker(ALL, id_type).row(7, [cells.get(name) for name in ALL.names])


def failure(**cells: Any) -> tuple[str, str]:
    row = made(**cells)
    assert row.failure is not None
    return row.failure.code, row.failure.message


@pytest.mark.parametrize(
    ("cell", "image"),
    [
        ("https://example.org/cat.jpg?x=1", WebImage("https://example.org/cat.jpg?x=1")),
        ("HTTP://example.org/", WebImage("HTTP://example.org/")),
        (" s3://bucket/a?b#c%2f.jpg\n", WebImage("s3://bucket/a?b#c%2f.jpg")),
        ("hf://datasets/me/cats/a.jpg", WebImage("hf://datasets/me/cats/a.jpg")),
        ("a b/cat.jpg", FileImage("a b/cat.jpg")),
        ("/data/cat.jpg", FileImage("/data/cat.jpg")),
        ("C:cat.jpg", FileImage("C:cat.jpg")),
        ("file:///data/a%20b.jpg", FileImage("/data/a b.jpg")),
        ("file://localhost/data/cat.jpg", FileImage("/data/cat.jpg")),
        ("data:image/png;base64,AAEC", InlineImage(b"\0\1\2", "data:image/png (3 bytes)")),
        (b"\xff\xd8", InlineImage(b"\xff\xd8", "image (2 bytes)")),
        ({"bytes": b"\xff", "path": "cat.jpg"}, InlineImage(b"\xff", "cat.jpg")),
        ({"bytes": b"\xff", "path": None}, InlineImage(b"\xff", "image (1 bytes)")),
        ({"bytes": None, "path": "cat.jpg"}, FileImage("cat.jpg")),
        ({"path": "https://example.org/a"}, WebImage("https://example.org/a")),
    ],
)
def test_image_sources(cell: Any, image: Any) -> None:
    assert made(image=cell).images == (image,)
    assert made(images=[None, "x", None]).images == (FileImage("x"),)


@pytest.mark.parametrize(
    ("cell", "code", "expected"),
    [
        ("sftp://host/cat.jpg", "unsupported_source", "sftp:// is not supported; expected http"),
        ("ftp://user:secret@host/cat.jpg", "unsupported_source", "ftp:// is not supported"),
        ("file://host/cat.jpg", "unsupported_source", "another host"),
        ("data:image/png;base64,A", "invalid_data_uri", "base64"),
        ("", "invalid_row", "empty string, expected a URL or a path"),
        ("a\0b", "invalid_row", "NUL"),
        (7, "invalid_row", "image: found int, expected a URL"),
        ([["a"]], "invalid_row", r"image[0]: found list, expected"),
        ({"bytes": None, "path": None}, "invalid_row", "found {bytes: null, path: null}, expected bytes or a path"),
        ({"url": "x"}, "invalid_row", "found dict"),
    ],
)
def test_bad_image_sources_fail_the_row(cell: Any, code: str, expected: str) -> None:
    actual_code, message = failure(image=cell, prompt="What?", id="a")
    assert actual_code == code
    assert expected in message
    assert "secret" not in message
    assert made(image=cell, id="a", k=1).id == "a"
    assert made(image=cell, id="a", k=1).kept == {"k": 1}


def test_images_takes_precedence_over_image_unless_it_is_null() -> None:
    assert made(images=["a"], image="b").images == (FileImage("a"),)
    assert made(images=None, image="b").images == (FileImage("b"),)
    assert made(images=[], image="b").images == ()


@pytest.mark.parametrize(
    ("cells", "expected"),
    [
        ({"prompt": 7}, "prompt: found int, expected a string or a list of strings"),
        ({"prompt": ["a", None]}, "prompt: found a list with null"),
        ({"prompt": "a", "id": True}, "id: found True, expected a string"),
        ({"prompt": "a", "id": 1.5}, "id: found 1.5, expected a string"),
        ({"prompt": "a", "id": ["x"]}, "id: found list"),
        ({"prompt": "a", "generation": 5}, "generation: found int, expected an object"),
        ({"prompt": "a", "generation": "{"}, "generation: found a string that is not JSON"),
    ],
)
def test_wrong_types_fail_the_row(cells: dict[str, Any], expected: str) -> None:
    code, message = failure(**cells)
    assert code == "invalid_row"
    assert expected in message


@pytest.mark.parametrize("messages", [5, "{", "{}", {"role": "user"}])
def test_messages_that_are_not_a_list_fail_the_row(messages: Any) -> None:
    assert failure(messages=messages)[0] == "invalid_messages"


def test_ids_are_int64_or_strings() -> None:
    assert made("int64", id=2**63 - 1).id == 2**63 - 1
    assert made("string", id=12).id == "12"
    assert made(None, id=12).id is None
    row = made("int64", id=2**63)
    assert row.failure is not None
    assert "expected a 64-bit integer" in row.failure.message
    assert row.id is None


def test_generation_is_an_object_or_json_without_its_nulls() -> None:
    expected = {"seed": 1, "stop": ["a"]}
    assert made(generation={**expected, "top_k": None}).generation == expected
    assert made(generation=json.dumps({**expected, "top_k": None})).generation == expected
    assert made(generation=[("seed", 1), ("stop", ["a"])]).generation == expected


def test_a_null_prompt_is_not_a_manifest_without_prompts() -> None:
    assert made(image="a").prompt == ""
    assert RowMaker(Columns(image="image"), None).row(0, ["a"]).prompt is None


def image_part(source: str | None) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": source}} if source else {"type": "image"}


def image_numbers(row: Row) -> list[Any]:
    assert row.messages is not None
    return [part["image"] for part in row.messages[0]["content"] if part["type"] == "image"]


def test_images_in_messages_become_the_rows_images() -> None:
    content = [image_part("a.jpg"), {"type": "text", "text": "and"}, {"type": "image", "image": "b.jpg"}]
    row = made(messages=[{"role": "user", "content": content}])
    assert row.images == (FileImage("a.jpg"), FileImage("b.jpg"))
    assert image_numbers(row) == [0, 1]
    assert row.messages == made(messages=json.dumps([{"role": "user", "content": content}])).messages


def test_images_of_the_column_fill_placeholders_or_come_first() -> None:
    row = made(
        messages=[{"role": "user", "content": [image_part(None), image_part("m"), image_part(None)]}], images=["c", "d"]
    )
    assert row.images == (FileImage("c"), FileImage("m"), FileImage("d"))
    assert image_numbers(row) == [0, 1, 2]
    row = made(messages=[{"role": "user", "content": [image_part("m")]}], images=["c", "d"])
    assert row.images == (FileImage("c"), FileImage("d"), FileImage("m"))
    assert image_numbers(row) == [2]
    assert made(messages=[{"role": "user", "content": "x"}], images=["c"]).images == (FileImage("c"),)


def test_an_image_url_part_without_a_url_fails_the_row() -> None:
    code, message = failure(messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}])
    assert (code, "without" in message) == ("invalid_messages", True)


RICH = [
    {
        "id": 5,
        "prompt": ["one", "two {x}"],
        "images": ["a.jpg", "https://example.org/b.jpg"],
        "generation": {"seed": 1, "temperature": None},
        "note": "ü",
    },
    {"id": 6, "prompt": None, "images": None, "generation": None, "note": None},
    {"id": 7, "prompt": ["<|im_end|>"], "images": [], "generation": {"seed": None, "temperature": 0.5}, "note": ""},
]


def test_parquet_and_jsonl_give_the_same_rows(tmp_path: Path) -> None:
    options: dict[str, Any] = {"keep": ("note",), "prompt": "{prompt} in {note}"}
    parquet = rows_of(write(tmp_path / "m.parquet", RICH), **options)
    for name in ("m.jsonl", "m.jsonl.gz", "m.ndjson.zst"):
        assert rows_of(write(tmp_path / name, RICH), **options) == parquet
    assert parquet[0].columns == {"note": "ü"} == parquet[0].kept
    assert parquet[0].generation == {"seed": 1}


def test_csv_has_text_json_and_nulls(tmp_path: Path) -> None:
    uri = "data:image/png;base64," + base64.b64encode(bytes(200_000)).decode()
    rows = [
        {"id": "007", "prompt": 'a "b",\nc', "images": '["x.jpg", "y.jpg"]', "generation": '{"seed": 1}', "k": "v"},
        {"id": "8", "prompt": "p", "images": uri, "generation": "", "k": ""},
        {"id": "9", "prompt": "p", "images": "[x].jpg", "generation": "", "k": ""},
    ]
    first, second, third = rows_of(write(tmp_path / "m.csv", rows), keep=("k",))
    assert (first.id, first.prompt, first.generation, first.kept) == ("007", 'a "b",\nc', {"seed": 1}, {"k": "v"})
    assert first.images == (FileImage("x.jpg"), FileImage("y.jpg"))
    assert (second.inline_bytes, second.generation, second.kept) == (200_000, None, {"k": None})
    assert third.failure is not None


def test_bytes_and_hugging_face_images_in_parquet(tmp_path: Path) -> None:
    rows = [{"prompt": "p", "image": {"bytes": b"\xff\xd8", "path": None}}, {"prompt": "p", "image": None}]
    first, second = rows_of(write(tmp_path / "m.parquet", rows))
    assert first.images == (InlineImage(b"\xff\xd8", "image (2 bytes)"),)
    assert second.images == ()
    lists = [{"prompt": "p", "pics": [b"\1", b"\2"]}]
    (row,) = rows_of(write(tmp_path / "l.parquet", lists), image_column="pics")
    assert [image.data for image in row.images if isinstance(image, InlineImage)] == [b"\1", b"\2"]


def test_messages_as_structs_in_parquet(tmp_path: Path) -> None:
    content = [image_part("a.jpg"), {"type": "text", "text": "what?"}]
    (row,) = rows_of(write(tmp_path / "m.parquet", [{"messages": [{"role": "user", "content": content}]}]))
    assert row.images == (FileImage("a.jpg"),)
    assert row.messages is not None
    assert row.messages[0]["content"][0] == {"type": "image", "image": 0}


def test_kept_columns_keep_their_types(tmp_path: Path) -> None:
    schema = pa.schema(
        {
            "prompt": pa.string(),
            "n": pa.int16(),
            "d": pa.dictionary(pa.int8(), pa.string()),
            "t": pa.timestamp("ns"),
            "u": pa.timestamp("us", "UTC"),
            "l": pa.list_(pa.float32()),
        }
    )
    stamp = datetime(2024, 1, 2, 3, 4, 5, 678)
    table = pa.table(
        {
            "prompt": ["p"],
            "n": [3],
            "d": pa.array(["x"]).dictionary_encode(),
            "t": pa.array([1704164645000000001], pa.timestamp("ns")),
            "u": [stamp],
            "l": [[0.5]],
        }
    )
    path = tmp_path / "m.parquet"
    pq.write_table(table.cast(schema), path)
    manifest = opened(path, keep=("n", "d", "t", "u", "l"))
    kept = manifest.schema.kept
    types = ["int16", "string", "timestamp[ns]", "timestamp[us, tz=UTC]", "list<element: float>"]
    assert [str(kind) for kind in kept.types] == types
    ((row,),) = manifest.rows()
    read = pa.table({name: pa.array([value], kept.field(name).type) for name, value in row.kept.items()})
    assert read["t"].cast(pa.int64()).to_pylist() == [1704164645000000001]
    assert (row.kept["n"], row.kept["d"], row.kept["l"]) == (3, "x", [0.5])
    (row,) = rows_of(path, prompt="at {t}", keep=("t",))
    assert row.columns == row.kept == {"t": "2024-01-02 03:04:05.000000001"}


def test_kept_values_of_text_become_strings(tmp_path: Path) -> None:
    big = 10**30
    path = write(
        tmp_path / "m.jsonl", [{"prompt": "p", "k": value} for value in ("s", 1, big, [1, {"a": "ü"}], None, True)]
    )
    assert [row.kept["k"] for row in rows_of(path, keep=("k",))] == [
        "s",
        "1",
        str(big),
        '[1, {"a": "ü"}]',
        None,
        "true",
    ]
    assert opened(path, keep=("k",)).schema.kept == pa.schema({"k": pa.string()})


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (b"nonsense", "not JSON"),
        (b'{"prompt": "cut', "not JSON"),
        (b"[1]", "not a JSON object"),
        (b'"text"', "not a JSON object"),
        (b'{"prompt": NaN}', "not JSON"),
        (b'{"prompt": "\\ud800"}', "not JSON"),
        (b'{"prompt": "\xff"}', "not JSON"),
        (b'{"prompt": 1e999}', "out of range"),
        (b'{"x":' + b"[" * 100_000 + b"]" * 100_000 + b"}", "not JSON"),
        (b'{"prompt": "a", "id": 99999999999999999999}', "id: found 99999999999999999999"),
    ],
)
def test_a_bad_line_fails_alone_and_reports_its_number(tmp_path: Path, line: bytes, expected: str) -> None:
    good = b'{"prompt": "a", "id": %d}\n'
    path = write_bytes(tmp_path / "m.jsonl", b"\n" + good % 1 + b"  \r\n" + line + b"\n" + good % 2)
    first, bad, last = rows_of(path)
    assert (first.prompt, last.prompt, last.number) == ("a", "a", 2)
    assert bad.failure is not None
    assert expected in bad.failure.message
    if "id:" not in expected:
        assert f"{path} line 4: " in bad.failure.message
    assert bad.failure.code == "invalid_row"


def test_ids_of_jsonl_have_the_type_of_the_first_rows(tmp_path: Path) -> None:
    rows = [{"prompt": "p", "id": number} for number in range(1200)]
    late = write(tmp_path / "late.jsonl", [*rows, {"prompt": "p", "id": "x"}])
    assert opened(late).schema.id_type == "int64"
    *good, bad = rows_of(late)
    assert [row.id for row in good] == list(range(1200))
    assert bad.failure is not None
    assert "id: found 'x', expected a 64-bit integer, as the first rows have" in bad.failure.message
    early = write(tmp_path / "early.jsonl", [{"prompt": "p", "id": "x"}, *rows])
    assert opened(early).schema.id_type == "string"
    assert [row.id for row in rows_of(early)] == ["x", *map(str, range(1200))]


def test_a_column_without_a_name_is_not_that_of_ids(tmp_path: Path) -> None:
    path = write(tmp_path / "m.jsonl", [{"": 7, "image": "a.png"}])
    manifest = opened(path)
    manifest.check()
    assert [row.id for chunk in manifest.rows() for row in chunk] == [None]


def test_all_that_json_allows_is_read(tmp_path: Path) -> None:
    data = b'\xef\xbb\xbf{"prompt": "a", "prompt": "b\\u0000"}\r\n\r\n{"prompt": "\\ud83d\\ude00", "x": -0.0}'
    assert [row.prompt for row in rows_of(write_bytes(tmp_path / "m.jsonl", data))] == ["b\0", "😀"]


def test_a_bad_record_of_csv_fails_alone(tmp_path: Path) -> None:
    data = b"\xef\xbb\xbfid,prompt\r\n1,a\r\n2\r\n3,\xff\r\n4,x\ry\r\n\r\n5,\xc3\xbc\r\n   \r\n"
    rows = rows_of(write_bytes(tmp_path / "m.csv", data))
    assert [row.prompt for row in rows] == ["a", None, None, None, "ü"]
    messages = [row.failure.message for row in rows if row.failure]
    assert "m.csv line 3: found 1 cells, expected 2" in messages[0]
    assert "m.csv line 4: a cell is not UTF-8" in messages[1]
    assert "m.csv line 5: new-line character" in messages[2]


def test_a_string_of_parquet_that_is_not_utf8_fails_alone(tmp_path: Path) -> None:
    bad = pa.Array.from_buffers(pa.string(), 3, pa.array([b"a", b"\xff", b"c"]).buffers())
    pq.write_table(pa.table({"prompt": bad}), tmp_path / "m.parquet")
    rows = rows_of(tmp_path / "m.parquet")
    assert [row.prompt for row in rows] == ["a", None, "c"]
    assert rows[1].failure is not None
    assert "m.parquet row 1: " in rows[1].failure.message
