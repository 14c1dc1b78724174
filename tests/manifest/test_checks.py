"""Errors of a manifest as a whole, before a model is loaded: they say what was found, what is expected, and where."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from batchvl.errors import ManifestError
from tests.manifest.writing import opened, rows_of, write, write_bytes
from tests.timing import scaled

ROW = {"question": "What?", "url": "cat.jpg", "n": 1}


@pytest.mark.parametrize("name", ["m.parquet", "m.jsonl", "m.csv"])
@pytest.mark.parametrize(
    ("options", "flag"),
    [
        ({"prompt_column": "text"}, "--prompt-column"),
        ({"image_column": "text"}, "--image-column"),
        ({"messages_column": "text"}, "--messages-column"),
        ({"id_column": "text"}, "--id-column"),
        ({"generation_column": "text"}, "--generation-column"),
        ({"keep": ("n", "text")}, "--keep"),
        ({"prompt": "What of {text}?"}, "--prompt"),
    ],
)
def test_a_missing_column_is_reported_with_the_available_ones(
    tmp_path: Path, name: str, options: dict[str, Any], flag: str
) -> None:
    path = write(tmp_path / name, [ROW])
    with pytest.raises(ManifestError) as error:
        opened(path, **options)
    for part in (flag, "'text'", "'question', 'url', 'n'"):
        assert part in str(error.value)


@pytest.mark.parametrize("name", ["m.parquet", "m.jsonl", "m.csv"])
def test_neither_prompts_nor_images(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name, [ROW])
    with pytest.raises(ManifestError, match=r"neither prompts nor images; the columns are 'question'.*--prompt-column"):
        opened(path)
    assert opened(path, prompt="Say {question}").check() is None
    assert rows_of(path, prompt_column="question")[0].prompt == "What?"


def test_naming_one_prompt_column_leaves_the_other_default_unread(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "chat"}]
    path = write(tmp_path / "m.jsonl", [{"prompt": "p", "messages": chat, "other": "o", "chat": chat}])
    (row,) = rows_of(path)
    assert (row.prompt, row.messages) == ("p", chat)
    (row,) = rows_of(path, prompt_column="other")
    assert (row.prompt, row.messages) == ("o", None)
    (row,) = rows_of(path, messages_column="chat")
    assert (row.prompt, row.messages) == (None, chat)


@pytest.mark.parametrize(
    ("column", "kind", "value", "expected"),
    [
        (
            "prompt",
            pa.int64(),
            1,
            "column 'prompt' is int64, expected strings, or lists of strings; see --prompt-column",
        ),
        ("images", pa.list_(pa.list_(pa.string())), [["a"]], "expected strings, binary"),
        ("image", pa.float64(), 0.5, "column 'image' is double, expected strings, binary"),
        ("id", pa.float32(), 1.0, "column 'id' is float, expected integers or strings"),
        (
            "messages",
            pa.list_(pa.string()),
            ["a"],
            "column 'messages' is list<element: string>, expected lists of structs",
        ),
        ("generation", pa.int8(), 1, "expected structs, maps, or JSON in strings"),
        ("t", pa.binary(), b"a", "column 't' is binary, expected values that can be written as text; see --prompt"),
    ],
)
def test_a_wrong_type_in_parquet(tmp_path: Path, column: str, kind: pa.DataType, value: Any, expected: str) -> None:
    schema = pa.schema({"q": pa.string(), column: kind})
    path = write(tmp_path / "m.parquet", [{"q": "?", column: value}], schema=schema)
    with pytest.raises(ManifestError) as error:
        opened(path, prompt="{q} {t}" if column == "t" else "{q}")
    assert expected in str(error.value)
    assert str(path) in str(error.value)


def test_files_with_different_columns_or_types(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", [{"prompt": "p", "k": 1}])
    write(tmp_path / "b.parquet", [{"text": "p", "k": "x"}])
    with pytest.raises(ManifestError, match=r"b.parquet: column 'prompt' is missing here.*the columns are text, k"):
        opened(tmp_path)
    write(tmp_path / "b.parquet", [{"prompt": "p", "k": "x"}])
    with pytest.raises(ManifestError, match=r"b.parquet: column 'k' of --keep is string, but int64 in a.parquet"):
        opened(tmp_path, keep=("k",))
    with pytest.raises(ManifestError, match="'k' has strings in some files and integers in others"):
        opened(tmp_path, id_column="k")
    assert len(rows_of(tmp_path)) == 2


def test_a_column_that_appears_twice(tmp_path: Path) -> None:
    write_bytes(tmp_path / "m.csv", b"prompt,prompt\na,b\n")
    with pytest.raises(ManifestError, match="'prompt' appears twice"):
        opened(tmp_path)


@pytest.mark.parametrize(
    ("name", "data", "expected"),
    [
        ("m.parquet", b"", "has 0 bytes; expected Parquet"),
        ("m.parquet", b"PAR1 no footer here", "not a complete Parquet file"),
        ("m.jsonl", b"", "has no rows (0 bytes)"),
        ("m.jsonl", b"\n \r\n\n", "has no rows (5 bytes)"),
        ("m.jsonl.gz", b"", "has no rows"),
        ("m.csv", b"", "has no rows; expected a line of column names"),
        ("m.csv", b"prompt\n", "has no rows (7 bytes)"),
        ("m.jsonl", b"\nprompt,image\n", "line 2: not JSON"),
        (
            "m.jsonl",
            b'[{"prompt": "a"}]',
            "line 1: not a JSON object: Expected `object`, got `array`; found '[{\"prompt",
        ),
        ("m.jsonl", b'{"prompt": "a"}\n' + b"x\n" * 2, "line 2: not JSON"),
        ("m.jsonl", '{"prompt": "a"}'.encode("utf-16"), "line 1: not JSON"),
        ("m.csv", b"prompt;image\na,b\nc,d\n", "line 2: found 2 cells, expected 1"),
    ],
)
def test_a_file_that_is_not_a_manifest(tmp_path: Path, name: str, data: bytes, expected: str) -> None:
    path = write_bytes(tmp_path / name, data)
    with pytest.raises(ManifestError) as error:
        opened(path)
    assert expected in str(error.value)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("name", ["m.parquet", "m.jsonl.gz", "m.jsonl.zst"])
def test_a_truncated_file(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name, [{"prompt": f"{number}"} for number in range(500)])
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ManifestError, match="truncated") as error:
        opened(path)
    assert str(path) in str(error.value)


def test_parquet_without_rows(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", [], schema=pa.schema({"prompt": pa.string()}))
    with pytest.raises(ManifestError, match=r"a.parquet: has no rows; expected at least one"):
        opened(path)
    write(tmp_path / "b.parquet", [{"prompt": "p"}])
    assert len(rows_of(tmp_path)) == 1


def test_the_first_line_of_every_file_is_checked(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", [{"prompt": "p"}] * 60)
    path = write_bytes(tmp_path / "b.jsonl", b"prompt\nx\n")
    with pytest.raises(ManifestError, match=rf"{path} line 1: not JSON"):
        opened(tmp_path)


def test_text_with_only_bad_rows_at_the_start(tmp_path: Path) -> None:
    manifest = opened(write(tmp_path / "m.jsonl", [{"prompt": 5}] * 10))
    with pytest.raises(ManifestError, match=r"first 10 rows is bad; the first: prompt: found int, expected a string"):
        manifest.check()
    opened(write(tmp_path / "m.jsonl", [{"prompt": 5}] * 10 + [{"prompt": "p"}])).check()


@pytest.mark.parametrize("name", ["m.parquet", "m.jsonl", "m.csv", "m.jsonl.zst"])
@pytest.mark.parametrize("kind", [int, str])
def test_duplicate_ids(tmp_path: Path, name: str, kind: type) -> None:
    rows = [{"prompt": "p", "id": kind(number)} for number in range(1000)]
    path = write(tmp_path / name, rows)
    opened(path).check()
    rows[900]["id"] = rows[17]["id"]
    write(path, rows)
    with pytest.raises(ManifestError, match=r"column 'id': rows 17 and 900 \(from 0\) have the same id '?17'?;"):
        opened(path).check()
    opened(path, limit=900).check()


def test_checking_ids_is_quick_and_bounded(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    with open(path, "w") as file:
        for number in range(100_000):
            file.write(json.dumps({"id": f"row-{number}", "prompt": "What is this?", "image": f"{number}.jpg"}) + "\n")
        file.write('{"id": "row-5", "prompt": "after the first 100,000"}\n')
    manifest = opened(path)
    started = time.process_time()
    manifest.check()
    # 0.2 s on an idle core. The limit finds an implementation that is slower by a factor.
    assert time.process_time() - started < scaled(1)
