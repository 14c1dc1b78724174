"""A manifest's rows with all columns, as Arrow record batches."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batchvl.errors import ManifestError
from batchvl.manifest.batches import Batches
from batchvl.manifest.json_types import JSON

from .writing import write, write_bytes


def rows_of(manifest: Batches, rows: range, skip: set[int] | frozenset[int] = frozenset()) -> dict[int, dict]:
    read = {}
    for batch in manifest.read(rows, skip):
        assert batch.columns.schema == manifest.schema
        read |= dict(zip(batch.rows, batch.columns.to_pylist(), strict=True))
    return read


def test_parquet_keeps_the_types_of_the_files(tmp_path: Path) -> None:
    table = pa.table(
        {
            "a": pa.array([1, None, 3], pa.int8()),
            "when": pa.array([datetime(2024, 1, 1, tzinfo=UTC)] * 3, pa.timestamp("ns", "UTC")),
            "site": pa.array(["x", "y", "x"]).dictionary_encode(),
            "raw": pa.array([b"\0", b"\xff", None], pa.large_binary()),
            "nested": pa.array([{"t": [1]}, None, {"t": None}], pa.struct([("t", pa.list_(pa.duration("ns")))])),
        }
    )
    pq.write_table(table, tmp_path / "m.parquet", row_group_size=2)
    manifest = Batches(tmp_path / "m.parquet")
    nested = table.schema.field("nested").type
    assert manifest.schema.types == [pa.int8(), pa.timestamp("ns", "UTC"), pa.string(), pa.large_binary(), nested]
    assert manifest.total == 3
    [first, second] = manifest.read(range(1, 3))
    assert (list(first.rows), list(second.rows), first.unreadable) == ([1], [2], frozenset())
    assert pa.Table.from_batches([second.columns]).equals(table.slice(2).cast(manifest.schema))


def test_parquet_files_may_lack_a_column(tmp_path: Path) -> None:
    write(tmp_path / "m" / "a.parquet", [{"prompt": "a", "x": None}])
    write(tmp_path / "m" / "b.parquet", [{"prompt": "b", "x": 1, "y": 2.5}])
    manifest = Batches(tmp_path / "m")
    assert rows_of(manifest, range(2)) == {
        0: {"prompt": "a", "x": None, "y": None},
        1: {"prompt": "b", "x": 1, "y": 2.5},
    }
    write(tmp_path / "m" / "c.parquet", [{"prompt": "c", "x": "text"}])
    with pytest.raises(ManifestError, match=r"c\.parquet: column 'x' is string, but int64 in .*b\.parquet: it cannot"):
        _ = Batches(tmp_path / "m").schema


def test_a_corrupt_row_group_of_parquet_becomes_nulls(tmp_path: Path) -> None:
    rows = [{"prompt": f"{n}" * 50} for n in range(20)]
    options = {"compression": "none", "use_dictionary": False, "write_page_checksum": True}
    path = write(tmp_path / "m.parquet", rows, row_group_size=10, **options)
    data = bytearray(path.read_bytes())
    column = pq.read_metadata(path).row_group(0).column(0)
    data[column.data_page_offset] ^= 0xFF
    path.write_bytes(data)
    [first, second] = Batches(path).read(range(20))
    assert first.unreadable == frozenset(range(10))
    assert first.columns.column(0).null_count == 10
    assert second.unreadable == frozenset()
    assert second.columns.column(0)[9].as_py() == "19" * 50


def test_strings_that_are_not_utf8_become_null(tmp_path: Path) -> None:
    values = pa.Array.from_buffers(pa.string(), 2, pa.array([b"ok", b"\xff\xfe"], pa.binary()).buffers())
    pq.write_table(pa.table({"prompt": values}), tmp_path / "m.parquet")
    [batch] = Batches(tmp_path / "m.parquet").read(range(2))
    assert (batch.columns.column(0).to_pylist(), batch.unreadable) == (["ok", None], {1})


def test_json_types_fit_all_rows(tmp_path: Path) -> None:
    rows = [
        {"prompt": "a", "n": 1, "x": 1, "big": 2**60, "flag": True, "tags": [], "meta": {"k": 1}, "mixed": 1},
        {"prompt": None, "n": 2, "x": 0.5, "big": 0.5, "flag": None, "tags": ["t"], "mixed": "two"},
    ]
    path = write(tmp_path / "m.jsonl", [*rows, *([{"prompt": "more"}] * 1500), {"late": [[1], {"a": "é"}]}])
    manifest = Batches(path)
    fields = {field.name: (str(field.type), field.metadata == JSON) for field in manifest.schema}
    assert fields == {
        "prompt": ("string", False),
        "n": ("int64", False),
        "x": ("double", False),
        "big": ("string", True),
        "flag": ("bool", False),
        "tags": ("list<item: string>", False),
        "meta": ("string", True),
        "mixed": ("string", True),
        "late": ("string", True),
    }
    assert manifest.total == 1503
    found = rows_of(manifest, range(1503))
    texts = {"big": str(2**60), "meta": '{"k":1}', "mixed": "1"}
    assert found[0] == rows[0] | texts | {"x": 1.0, "late": None}
    assert found[1] == rows[1] | {"big": "0.5", "meta": None, "mixed": '"two"', "late": None}
    assert found[1502] == dict.fromkeys(fields) | {"late": '[[1],{"a":"é"}]'}


def test_lines_that_are_not_json_become_nulls(tmp_path: Path) -> None:
    lines = [b'{"prompt": "%d"}' % n for n in range(20)]
    lines[7] = b'{"prompt": '
    path = write_bytes(tmp_path / "m.jsonl.gz", b"\n".join(lines))
    [batch] = Batches(path).read(range(5, 20))
    assert (list(batch.rows), batch.unreadable) == (list(range(5, 20)), {7})
    assert batch.columns.column(0).to_pylist()[:4] == ["5", "6", None, "8"]


def test_too_many_members_of_objects(tmp_path: Path) -> None:
    path = write(tmp_path / "m.jsonl", [{f"key {n}": n} for n in range(1001)])
    with pytest.raises(
        ManifestError, match=r"more than 1,000 columns, 'key 1000' and others: such rows cannot be joined"
    ):
        _ = Batches(path).schema


def test_csv_and_image_paths_are_strings(tmp_path: Path) -> None:
    manifest = Batches(write(tmp_path / "m.csv", [{"prompt": "a", "n": 1}, {"prompt": "", "n": 2}]))
    assert rows_of(manifest, range(2)) == {0: {"prompt": "a", "n": "1"}, 1: {"prompt": None, "n": "2"}}
    for name in ("b.png", "a.png"):
        write_bytes(tmp_path / "images" / name, b"")
    manifest = Batches(tmp_path / "images")
    assert rows_of(manifest, range(2), {0}) == {1: {"id": "b.png", "image": "b.png"}}
