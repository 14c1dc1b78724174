import asyncio
import gzip
import json
import os
from dataclasses import replace
from datetime import UTC, date, datetime
from decimal import Decimal
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batchvl.config.units import Shard
from batchvl.errors import BatchvlError, OptionError, ResumeError, StoppedEarly
from batchvl.manifest.index import FileIndex, Index
from batchvl.results import Counts, ResultStore, merge
from batchvl.results.merging.report import Gap
from batchvl.results.retry_selection import RetrySelection
from batchvl.storage.disk import Disk

from ..samples import RUN_FILE, failed, fill, only_shard, options, sample


def responses(file: Path) -> list[tuple[int, str | None]]:
    table = pq.read_table(file)
    return list(zip(table["row"].to_pylist(), table["response"].to_pylist(), strict=True))


def leftovers(directory: Path) -> list[str]:
    """Return the names of temporary files that were left."""
    return [name for name in os.listdir(directory) if name.startswith(".")]


async def test_rows_of_all_shards_and_parts_in_manifest_order(tmp_path: Path) -> None:
    run_file = replace(RUN_FILE, shards=3, total=100)
    for index in range(3):
        rows = Shard(index, 3).rows(100)
        await fill(tmp_path, [sample(row) for row in reversed(rows)], run_file, shard=Shard(index, 3), part_rows=10)
    report = merge(tmp_path)
    assert (report.rows, report.total, report.missing, report.first_missing) == (100, 100, 0, ())
    assert report.file == tmp_path / "results.parquet"
    assert responses(report.file) == [(row, sample(row).response) for row in range(100)]
    assert set(os.listdir(tmp_path)) == {"run.json", "results.parquet"} | {f"shard-0000{n}-of-00003" for n in range(3)}


async def test_precedence_of_ok_then_later_retry_then_lower_attempt(tmp_path: Path) -> None:
    def ok(rows: list[int], text: str) -> list:
        return [sample(row, response=text) for row in rows]

    await fill(tmp_path, [*ok([0, 1], "1"), failed(2, "a"), failed(3, "a"), failed(4, "a")])
    await fill(tmp_path, [*ok([0, 2], "2"), failed(1), failed(3, "b")])
    await fill(tmp_path, [*ok([0], "retry"), failed(1), failed(4, "c")], retry=RetrySelection.of(all=True))
    report = merge(tmp_path, partial=True)
    assert responses(report.file) == [(0, "retry"), (1, "1"), (2, "2"), (3, None), (4, None)]
    assert [error and error["code"] for error in pq.read_table(report.file)["error"].to_pylist()][3:] == ["a", "c"]
    assert report.counts == Counts(3, {"a": 1, "c": 1})
    output = ResultStore.open(tmp_path, RUN_FILE)
    assert output.counts == report.counts  # resume and merge agree
    await output.close()


async def test_journals_of_a_killed_attempt_are_merged(tmp_path: Path) -> None:
    class Killed(Disk):
        def rename(self, source: Path, target: Path) -> None:
            if target.name.startswith("part"):
                raise OSError(5, "simulates a kill before the part exists")
            super().rename(source, target)

    with pytest.raises(StoppedEarly):
        await fill(tmp_path, [sample(row) for row in range(10)], disk=Killed())
    await fill(tmp_path, [sample(row, response="later") for row in range(5, 20)])
    report = merge(tmp_path, partial=True)
    assert responses(report.file)[9:11] == [(9, sample(9).response), (10, "later")]
    assert report.rows == 20
    assert leftovers(tmp_path) == []


async def test_missing_rows_are_reported(tmp_path: Path) -> None:
    await fill(tmp_path, [sample(row) for row in range(20, 50)], replace(RUN_FILE, total=100))
    report = merge(tmp_path, partial=True)
    assert (report.rows, report.missing, report.first_missing) == (30, 70, tuple(range(10)))
    assert merge(tmp_path, total=51).missing == 21


async def test_an_incomplete_output_is_written_only_with_partial(tmp_path: Path) -> None:
    run_file = replace(RUN_FILE, shards=4, total=40)
    await fill(tmp_path, [sample(row) for row in range(10)], run_file, shard=Shard(0, 4))
    await fill(tmp_path, [sample(row) for row in range(10, 17)], run_file, shard=Shard(1, 4))
    (tmp_path / "results.parquet").write_bytes(b"of yesterday")
    report = merge(tmp_path)
    assert (report.file, report.rows, report.complete, report.missing) == (None, 0, False, 23)
    assert report.gaps == (Gap(1, True, 3), Gap(2, False, 10), Gap(3, False, 10))
    assert str(report).splitlines() == [
        f"{tmp_path}: 23 of 40 rows are missing: 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, …",
        "  shards 2-3 of 4 not started: 20 rows",
        "  shard 1/4 not complete: 3 rows",
        f"{tmp_path}/results.parquet was not written: complete these shards, or write the available rows with "
        "--partial",
    ]
    assert (tmp_path / "results.parquet").read_bytes() == b"of yesterday"
    partial = merge(tmp_path, partial=True)
    summary = f"{tmp_path}/results.parquet: 17 rows, 17 ok, 0 failed"
    assert str(partial).splitlines() == [summary, *str(report).splitlines()[:-1]]
    assert responses(tmp_path / "results.parquet") == [(row, sample(row).response) for row in range(17)]
    assert (partial.complete, partial.gaps) == (False, report.gaps)
    assert json.loads(partial.as_json())["gaps"][0] == {"shard": 1, "begun": True, "missing": 3}


async def test_the_total_of_a_text_is_known_once_it_was_read_to_the_end(tmp_path: Path) -> None:
    await fill(tmp_path, [sample(1)])
    report = merge(tmp_path)
    assert (report.total, report.missing, report.complete, report.file) == (None, 0, False, None)
    assert "number of rows in the manifest unknown: no attempt has read it to the end" in str(report)
    assert merge(tmp_path, partial=True).rows == 1
    output = ResultStore.open(tmp_path, RUN_FILE)
    await output.close(complete=True, total=3)
    assert (merge(tmp_path).total, merge(tmp_path).first_missing) == (3, (0, 2))


async def test_a_limited_run_is_complete_until_a_run_without_a_limit(tmp_path: Path) -> None:
    output = ResultStore.open(tmp_path, RUN_FILE)
    output.add(sample(0))
    await output.close(total=1)  # like a run of a text manifest with --limit 1
    assert (merge(tmp_path).complete, merge(tmp_path).total) == (True, 1)
    await fill(tmp_path, [sample(1)])
    assert (merge(tmp_path).complete, merge(tmp_path).total) == (False, None)


async def test_the_total_of_a_sharded_text_comes_from_the_index(tmp_path: Path) -> None:
    run_file = replace(RUN_FILE, shards=2)
    await fill(tmp_path, [sample(0)], run_file, shard=Shard(0, 2))
    Index(RUN_FILE.fingerprint, [FileIndex(rows=6)], whole=True).write(tmp_path)
    assert (merge(tmp_path).total, merge(tmp_path).gaps) == (6, (Gap(0, True, 2), Gap(1, False, 3)))


async def test_no_rows_yet(tmp_path: Path) -> None:
    await fill(tmp_path, [], replace(RUN_FILE, total=2))
    report = merge(tmp_path, partial=True)
    assert (report.rows, report.first_missing) == (0, (0, 1))
    assert pq.read_schema(report.file).names == RUN_FILE.schema.names


async def test_merge_during_a_run(tmp_path: Path) -> None:
    committed = Counts()
    output = ResultStore.open(tmp_path, RUN_FILE, options=options(part_rows=7), on_commit=committed.add)
    output.describe({})
    for row in range(40):
        output.add(sample(row))
        if row % 5 == 0:
            await asyncio.sleep(0.02)
            before = committed.rows
            report = await asyncio.to_thread(merge, tmp_path, partial=True)
            assert before <= report.rows <= row + 1
    await output.close()
    assert merge(tmp_path, partial=True).rows == 40


async def test_json_lines(tmp_path: Path) -> None:
    kept = pa.schema(
        [
            ("data", pa.binary()),
            ("when", pa.timestamp("ns", "UTC")),
            ("price", pa.decimal128(9, 2)),
            ("x", pa.float64()),
        ]
    )
    values = {"data": b"\xff\0", "when": datetime(2024, 1, 1, tzinfo=UTC), "price": Decimal("1.50"), "x": float("nan")}
    run_file = replace(RUN_FILE, id_type="int64", kept=kept)
    await fill(tmp_path, [sample(1, id=-5, kept=values, response="é\n\u2028"), failed(0, id=None)], run_file)
    for name, opener in (("r.jsonl", open), ("r.jsonl.gz", gzip.open)):
        report = merge(tmp_path, tmp_path / name, partial=True)
        with opener(report.file, "rt", encoding="utf-8", newline="\n") as lines:
            first, second = (json.loads(line) for line in lines)
        assert list(first) == run_file.schema.names
        assert (first["row"], first["id"], first["error"]["code"]) == (0, None, "missing_file")
        assert (second["id"], second["response"], second["error"]) == (-5, "é\n\u2028", None)
        expected = {"data": "/wA=", "when": "2024-01-01 00:00:00.000000000Z", "price": "1.50", "x": None}
        assert {name: second[name] for name in expected} == expected


async def test_kept_columns_of_any_name(tmp_path: Path) -> None:
    kept = pa.schema([("images.source", pa.int64()), ("é ", pa.list_(pa.date32()))])
    values = {"images.source": 7, "é ": [date(2024, 2, 29), None]}
    await fill(tmp_path, [sample(0, kept=values)], replace(RUN_FILE, kept=kept))
    [row] = pq.read_table(merge(tmp_path, partial=True).file).to_pylist()
    assert {name: row[name] for name in values} == values
    assert row["images"][0]["source"] == "0.jpg"


async def test_the_metadata_of_the_merged_file(tmp_path: Path) -> None:
    await fill(tmp_path, [sample(0)], metadata={"version": "1", "engine": "old"})
    await fill(tmp_path, [sample(1)], metadata={"version": "1", "engine": "new"})
    file = merge(tmp_path, partial=True).file
    metadata = {key.decode(): value.decode() for key, value in pq.read_metadata(file).metadata.items()}
    assert {key: value for key, value in metadata.items() if key.startswith("batchvl")} == {
        "batchvl.engine": "old",
        "batchvl.engine.2": "new",
        "batchvl.fingerprint": "f00d",
        "batchvl.options": '{"model":"shapes"}',
        "batchvl.version": "1",
    }


async def test_errors(tmp_path: Path) -> None:
    with pytest.raises(ResumeError, match=r"not a batchvl output: no run\.json found"):
        merge(tmp_path)
    await fill(tmp_path, [sample(0)])
    with pytest.raises(OptionError, match=r"r\.csv: unknown file extension; expected one of \.parquet, "):
        merge(tmp_path, tmp_path / "r.csv")
    with pytest.raises(OptionError, match="cannot be written: No such file"):
        merge(tmp_path, tmp_path / "nowhere" / "r.parquet")
    part = only_shard(tmp_path).part((1, 1))
    data = bytearray(part.read_bytes())
    response = pq.read_metadata(part).row_group(0).column(3)
    data[response.data_page_offset + response.total_compressed_size - 10] ^= 1
    part.write_bytes(data)
    with pytest.raises(BatchvlError, match=r"part-0001-000001.parquet: damaged"):
        merge(tmp_path, partial=True)
    assert leftovers(tmp_path) == []


async def test_a_full_disk_keeps_the_old_file(tmp_path: Path) -> None:
    class Full(Disk):
        def write(self, fd: int, data: bytes | memoryview) -> None:
            raise OSError(28, "No space left on device")

    await fill(tmp_path, [sample(0)])
    merge(tmp_path, partial=True)
    await fill(tmp_path, [sample(1)])
    for name in ("results.parquet", "r.jsonl", "r.jsonl.gz"):
        with pytest.raises(StoppedEarly, match="ENOSPC"):
            merge(tmp_path, tmp_path / name, partial=True, disk=Full())
    assert len(responses(tmp_path / "results.parquet")) == 1
    assert leftovers(tmp_path) == []
