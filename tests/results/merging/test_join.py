"""The join of the manifest's columns: `merge(..., with_manifest=…)`."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from datetime import timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batchvl.errors import ManifestError, ResumeError
from batchvl.manifest.batches import Batches
from batchvl.results import MergeReport, RunFile, merge
from batchvl.results.merging.formats import writer_for

from ...manifest.writing import write, write_bytes
from ..samples import failed, fill, sample

FORMATS = ["r.parquet", "r.jsonl", "r.jsonl.gz", "r.jsonl.zst"]


def run_file_of(manifest: Path, **values: Any) -> RunFile:
    batches = Batches(manifest)
    return RunFile(batches.fingerprint, {}, manifest=manifest.name, **({"total": batches.total} | values))


def rows_in(report: MergeReport) -> list[dict[str, Any]]:
    assert report.file is not None
    if report.file.suffix == ".parquet":
        return pq.read_table(report.file).to_pylist()
    with pa.input_stream(str(report.file), compression="detect") as file:
        return [json.loads(line) for line in file.read().splitlines()]


@pytest.mark.parametrize("name", FORMATS)
async def test_every_column_is_joined_to_its_row(name: str, tmp_path: Path) -> None:
    rows = [
        {"id": f"id-{n}", "prompt": f"q {n}", "images": [f"{n}.jpg"], "score": n / 8, "time": timedelta(hours=n)}
        for n in range(60)
    ]
    manifest = write(tmp_path / "m.parquet", rows, row_group_size=7)
    records = [failed(n) if n % 9 == 0 else sample(n) for n in range(60)]
    await fill(tmp_path / "out", records[30:], run_file_of(manifest), part_rows=8)
    await fill(tmp_path / "out", records[:30], run_file_of(manifest), part_rows=8)
    report = merge(tmp_path / "out", tmp_path / name, with_manifest=manifest)
    assert (report.rows, report.complete, report.unreadable, report.json_columns) == (60, True, 0, ())
    found = rows_in(report)
    names = [*run_file_of(manifest).schema.names, "prompt", "manifest_images", "score", "time"]
    assert [list(row) for row in found] == [names] * 60
    for n, row in enumerate(found):
        assert (row["row"], row["id"], row["prompt"], row["manifest_images"]) == (n, f"id-{n}", f"q {n}", [f"{n}.jpg"])
        assert (row["score"], row["response"]) == (n / 8, records[n].response)
    if name == "r.parquet":
        schema = pq.read_schema(report.file)
        assert [schema.field(name).type for name in ("score", "time")] == [pa.float64(), pa.duration("us")]
        assert found[59]["time"] == timedelta(hours=59)


async def test_missing_rows_are_skipped(tmp_path: Path) -> None:
    manifest = write(tmp_path / "m.parquet", [{"prompt": f"q {n}"} for n in range(3000)], row_group_size=500)
    present = [*range(3, 50), 700, *range(1400, 1450), 2999]
    await fill(tmp_path / "out", [sample(n) for n in present], run_file_of(manifest))
    assert merge(tmp_path / "out", with_manifest=manifest).file is None
    report = merge(tmp_path / "out", partial=True, with_manifest=manifest)
    assert report.missing == 3000 - len(present)
    assert [(row["row"], row["prompt"]) for row in rows_in(report)] == [(n, f"q {n}") for n in present]


async def test_columns_whose_names_are_taken(tmp_path: Path) -> None:
    row = {"id": "a", "row": 7, "images": None, "manifest_images": "x", "site": "s", "key": 1}
    manifest = write(tmp_path / "m.parquet", [row])
    kept = pa.schema([("site", pa.string())])
    await fill(tmp_path / "own", [sample(0, kept={"site": "s"})], run_file_of(manifest, kept=kept))
    found = pq.read_schema(merge(tmp_path / "own", with_manifest=manifest).file).names
    assert found[-5:] == ["site", "manifest_row", "manifest_manifest_images", "manifest_images", "key"]
    # A run that takes its ids from another column: the manifest's `id` is a column like others.
    await fill(tmp_path / "key", [sample(0, id="1")], run_file_of(manifest), metadata={"id_column": "key"})
    [row] = rows_in(merge(tmp_path / "key", with_manifest=manifest))
    assert (row["id"], row["manifest_id"], row["key"], row["site"]) == ("1", "a", 1, "s")


async def test_json_values_are_unchanged(tmp_path: Path) -> None:
    rows = [
        {"prompt": "a", "meta": {"k": [1, {"é": None}]}, "mixed": 1, "score": 1},
        {"prompt": "b", "mixed": "two", "score": 0.5},
        {"prompt": "c", "mixed": None},
    ]
    manifest = write(tmp_path / "m.jsonl", rows)
    await fill(tmp_path / "out", [sample(n) for n in range(3)], run_file_of(manifest))
    report = merge(tmp_path / "out", tmp_path / "r.jsonl", with_manifest=manifest)
    assert report.complete, "the manifest has the number of rows, which no attempt knows"
    assert report.json_columns == ()
    nothing = dict.fromkeys(rows[0])
    assert [{name: row[name] for name in nothing} for row in rows_in(report)] == [nothing | row for row in rows]
    report = merge(tmp_path / "out", tmp_path / "r.parquet", with_manifest=manifest)
    assert report.json_columns == ("meta", "mixed")
    assert "with objects or mixed types, written as JSON: meta, mixed" in str(report)
    found = rows_in(report)
    assert [row["meta"] for row in found] == ['{"k":[1,{"é":null}]}', None, None]
    assert [row["mixed"] for row in found] == ["1", '"two"', None]
    assert [row["score"] for row in found] == [1.0, 0.5, None]


async def test_unreadable_manifest_rows_are_counted(tmp_path: Path) -> None:
    lines = [b'{"prompt": "%d"}' % n for n in range(6)]
    lines[2] = lines[4] = b"{"
    manifest = write_bytes(tmp_path / "m.jsonl", b"\n".join(lines))
    await fill(tmp_path / "out", [failed(n) for n in (0, 1, 2, 5)], run_file_of(manifest))
    report = merge(tmp_path / "out", partial=True, with_manifest=manifest)
    assert [row["prompt"] for row in rows_in(report)] == ["0", "1", None, "5"]
    assert report.unreadable == 1
    assert "\n1 row of the manifest cannot be read: the manifest's columns are null there" in str(report)


async def test_a_directory_of_csv_files(tmp_path: Path) -> None:
    for name, rows in (("b", [2, 3]), ("a", [0, 1])):
        write(tmp_path / "m" / f"{name}.csv", [{"prompt": f"q {n}", "n": n} for n in rows])
    await fill(tmp_path / "out", [sample(n) for n in range(4)], run_file_of(tmp_path / "m"))
    report = merge(tmp_path / "out", total=4, with_manifest=tmp_path / "m")
    assert [(row["prompt"], row["n"]) for row in rows_in(report)] == [(f"q {n}", str(n)) for n in range(4)]


async def test_another_manifest_is_rejected(tmp_path: Path) -> None:
    manifest = write(tmp_path / "m.parquet", [{"prompt": "a"}])
    run_file = run_file_of(manifest)
    await fill(tmp_path / "out", [sample(0)], run_file)
    other = write(tmp_path / "other" / "m.parquet", [{"prompt": "b" * 100}])
    with pytest.raises(ResumeError, match=r"other/m\.parquet: not the manifest of the run in .*out: ") as raised:
        merge(tmp_path / "out", with_manifest=other)
    assert run_file.fingerprint in str(raised.value)
    assert Batches(other).fingerprint in str(raised.value)
    with pytest.raises(ManifestError, match="no such file or directory"):
        merge(tmp_path / "out", with_manifest=tmp_path / "nowhere")
    same = write(tmp_path / "moved" / "m.parquet", [{"prompt": "a"}])
    assert merge(tmp_path / "out", with_manifest=same).complete
    await fill(tmp_path / "out", [sample(1)], run_file)
    with pytest.raises(ManifestError, match="has changed: it ends before row 1, which the output contains"):
        merge(tmp_path / "out", with_manifest=same)


async def test_nanosecond_times_in_json(tmp_path: Path) -> None:
    fields = [("t", pa.list_(pa.timestamp("ns"))), ("d", pa.duration("ns")), ("p", pa.decimal128(3, 1))]
    times = pa.array([{"t": [1], "d": 5, "p": Decimal("1.5")}], pa.struct(fields))
    manifest = tmp_path / "m.parquet"
    pq.write_table(pa.table({"prompt": ["a"], "times": times}), manifest)
    await fill(tmp_path / "out", [sample(0)], run_file_of(manifest))
    [row] = rows_in(merge(tmp_path / "out", tmp_path / "r.jsonl", with_manifest=manifest))
    assert row["times"] == {"t": ["1970-01-01 00:00:00.000000001"], "d": 5, "p": "1.5"}


MERGE_IMAGES = """
import sys
from pathlib import Path
from batchvl.results import merge

def memory(name):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(name))

before = memory("VmRSS")
assert merge(Path(sys.argv[1]), Path(sys.argv[2]), with_manifest=sys.argv[3]).rows == 200
print(memory("VmHWM") - before)
"""


@pytest.mark.parametrize("name", ["r.parquet", "r.jsonl"])
def test_memory_for_images_in_the_manifest_is_bounded(name: str, tmp_path: Path) -> None:
    """200 rows of 1 MB each, whose responses fit in one window."""
    image = bytes(range(256)) * 4096
    rows = pa.table({"prompt": ["q"] * 200, "image": pa.array([b"%d" % n + image for n in range(200)], pa.binary())})
    pq.write_table(rows, tmp_path / "m.parquet", compression="none", use_dictionary=False, row_group_size=10)
    asyncio.run(fill(tmp_path / "out", [sample(n) for n in range(200)], run_file_of(tmp_path / "m.parquet")))
    done = subprocess.run(
        [sys.executable, "-c", MERGE_IMAGES, tmp_path / "out", tmp_path / name, tmp_path / "m.parquet"],
        check=True,
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[3],
    )
    assert int(done.stdout) < 130_000, f"{done.stdout} kB for 200 MB of images"


def test_every_format_has_a_writer_of_its_own() -> None:
    assert len({writer_for(Path(name)) for name in FORMATS}) == 4
