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

from ..samples import GUARD, failed, fill, only_folder, options, sample


def answers(file: Path) -> list[tuple[int, str | None]]:
    table = pq.read_table(file)
    return list(zip(table["row"].to_pylist(), table["response"].to_pylist(), strict=True))


def hidden(folder: Path) -> list[str]:
    """Temporary files that were left."""
    return [name for name in os.listdir(folder) if name.startswith(".")]


async def test_manifest_order_over_shards_and_parts(tmp_path: Path) -> None:
    guard = replace(GUARD, shards=3, total=100)
    for index in range(3):
        rows = Shard(index, 3).rows(100)
        await fill(tmp_path, [sample(row) for row in reversed(rows)], guard, shard=Shard(index, 3), part_rows=10)
    report = merge(tmp_path)
    assert (report.rows, report.total, report.missing, report.first_missing) == (100, 100, 0, ())
    assert report.file == tmp_path / "results.parquet"
    assert answers(report.file) == [(row, sample(row).response) for row in range(100)]
    assert set(os.listdir(tmp_path)) == {"run.json", "results.parquet"} | {f"shard-0000{n}-of-00003" for n in range(3)}


async def test_the_winner_is_ok_then_the_later_retry_then_the_lower_attempt(tmp_path: Path) -> None:
    def say(rows: list[int], text: str) -> list:
        return [sample(row, response=text) for row in rows]

    await fill(tmp_path, [*say([0, 1], "1"), failed(2, "a"), failed(3, "a"), failed(4, "a")])
    await fill(tmp_path, [*say([0, 2], "2"), failed(1), failed(3, "b")])
    await fill(tmp_path, [*say([0], "retry"), failed(1), failed(4, "c")], retry=RetrySelection.of(all=True))
    report = merge(tmp_path, partial=True)
    assert answers(report.file) == [(0, "retry"), (1, "1"), (2, "2"), (3, None), (4, None)]
    assert [error and error["code"] for error in pq.read_table(report.file)["error"].to_pylist()][3:] == ["a", "c"]
    assert report.counts == Counts(3, {"a": 1, "c": 1})
    output = ResultStore.open(tmp_path, GUARD)
    assert output.counts == report.counts  # resume and merge agree
    await output.close()


async def test_journals_that_a_killed_attempt_left(tmp_path: Path) -> None:
    class Killed(Disk):
        def rename(self, source: Path, target: Path) -> None:
            if target.name.startswith("part"):
                raise OSError(5, "as if killed before the part was there")
            super().rename(source, target)

    with pytest.raises(StoppedEarly):
        await fill(tmp_path, [sample(row) for row in range(10)], disk=Killed())
    await fill(tmp_path, [sample(row, response="later") for row in range(5, 20)])
    report = merge(tmp_path, partial=True)
    assert answers(report.file)[9:11] == [(9, sample(9).response), (10, "later")]
    assert report.rows == 20
    assert hidden(tmp_path) == []


async def test_missing_rows_are_counted_and_the_first_named(tmp_path: Path) -> None:
    await fill(tmp_path, [sample(row) for row in range(20, 50)], replace(GUARD, total=100))
    report = merge(tmp_path, partial=True)
    assert (report.rows, report.missing, report.first_missing) == (30, 70, tuple(range(10)))
    assert merge(tmp_path, total=51).missing == 21


async def test_where_rows_are_missing_nothing_is_written_unless_it_may_be_partial(tmp_path: Path) -> None:
    guard = replace(GUARD, shards=4, total=40)
    await fill(tmp_path, [sample(row) for row in range(10)], guard, shard=Shard(0, 4))
    await fill(tmp_path, [sample(row) for row in range(10, 17)], guard, shard=Shard(1, 4))
    (tmp_path / "results.parquet").write_bytes(b"of yesterday")
    report = merge(tmp_path)
    assert (report.file, report.rows, report.complete, report.missing) == (None, 0, False, 23)
    assert report.gaps == (Gap(1, True, 3), Gap(2, False, 10), Gap(3, False, 10))
    assert str(report).splitlines() == [
        f"{tmp_path}: 23 of 40 rows are missing: 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, …",
        "  shards 2-3 of 4 not begun: 20 rows",
        "  shard 1/4 begun and not finished: 3 rows",
        f"{tmp_path}/results.parquet was not written: run these shards to their end, or write what there is by "
        "--partial",
    ]
    assert (tmp_path / "results.parquet").read_bytes() == b"of yesterday"
    partial = merge(tmp_path, partial=True)
    assert str(partial).splitlines() == [
        f"{tmp_path}/results.parquet: 17 rows, 17 ok, 0 failed", *str(report).splitlines()[:-1]
    ]  # fmt: skip
    assert answers(tmp_path / "results.parquet") == [(row, sample(row).response) for row in range(17)]
    assert (partial.complete, partial.gaps) == (False, report.gaps)
    assert json.loads(partial.as_json())["gaps"][0] == {"shard": 1, "begun": True, "missing": 3}


async def test_a_text_manifests_total_is_known_once_it_was_read_to_its_end(tmp_path: Path) -> None:
    await fill(tmp_path, [sample(1)])
    report = merge(tmp_path)
    assert (report.total, report.missing, report.complete, report.file) == (None, 0, False, None)
    assert "how many rows the manifest has is not known: no attempt has read it to its end" in str(report)
    assert merge(tmp_path, partial=True).rows == 1
    output = ResultStore.open(tmp_path, GUARD)
    await output.close(complete=True, total=3)
    assert (merge(tmp_path).total, merge(tmp_path).first_missing) == (3, (0, 2))


async def test_a_limit_was_all_there_is_until_a_run_went_on_without_it(tmp_path: Path) -> None:
    output = ResultStore.open(tmp_path, GUARD)
    output.add(sample(0))
    await output.close(total=1)  # as a run of a text manifest with --limit 1 does
    assert (merge(tmp_path).complete, merge(tmp_path).total) == (True, 1)
    await fill(tmp_path, [sample(1)])
    assert (merge(tmp_path).complete, merge(tmp_path).total) == (False, None)


async def test_shards_of_text_are_counted_by_the_first_of_them(tmp_path: Path) -> None:
    guard = replace(GUARD, shards=2)
    await fill(tmp_path, [sample(0)], guard, shard=Shard(0, 2))
    Index(GUARD.fingerprint, [FileIndex(rows=6)], whole=True).write(tmp_path)
    assert (merge(tmp_path).total, merge(tmp_path).gaps) == (6, (Gap(0, True, 2), Gap(1, False, 3)))


async def test_nothing_done_yet(tmp_path: Path) -> None:
    await fill(tmp_path, [], replace(GUARD, total=2))
    report = merge(tmp_path, partial=True)
    assert (report.rows, report.first_missing) == (0, (0, 1))
    assert pq.read_schema(report.file).names == GUARD.schema.names


async def test_while_a_run_goes_on(tmp_path: Path) -> None:
    told = Counts()
    output = ResultStore.open(tmp_path, GUARD, options=options(part_rows=7), on_commit=told.add)
    output.describe({})
    for row in range(40):
        output.add(sample(row))
        if row % 5 == 0:
            await asyncio.sleep(0.02)
            before = told.rows
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
    guard = replace(GUARD, id_type="int64", kept=kept)
    await fill(tmp_path, [sample(1, id=-5, kept=values, response="é\n\u2028"), failed(0, id=None)], guard)
    for name, opener in (("r.jsonl", open), ("r.jsonl.gz", gzip.open)):
        report = merge(tmp_path, tmp_path / name, partial=True)
        with opener(report.file, "rt", encoding="utf-8", newline="\n") as lines:
            first, second = (json.loads(line) for line in lines)
        assert list(first) == guard.schema.names
        assert (first["row"], first["id"], first["error"]["code"]) == (0, None, "missing_file")
        assert (second["id"], second["response"], second["error"]) == (-5, "é\n\u2028", None)
        assert (second["data"], second["when"], second["price"], second["x"]) == (
            "/wA=", "2024-01-01 00:00:00.000000000Z", "1.50", None,
        )  # fmt: skip


async def test_kept_columns_of_any_name(tmp_path: Path) -> None:
    kept = pa.schema([("images.source", pa.int64()), ("é ", pa.list_(pa.date32()))])
    values = {"images.source": 7, "é ": [date(2024, 2, 29), None]}
    await fill(tmp_path, [sample(0, kept=values)], replace(GUARD, kept=kept))
    found = pq.read_table(merge(tmp_path, partial=True).file).to_pylist()[0]
    assert {name: found[name] for name in values} == values
    assert found["images"][0]["source"] == "0.jpg"


async def test_the_files_metadata(tmp_path: Path) -> None:
    await fill(tmp_path, [sample(0)], metadata={"version": "1", "engine": "old"})
    await fill(tmp_path, [sample(1)], metadata={"version": "1", "engine": "new"})
    file = merge(tmp_path, partial=True).file
    found = {key.decode(): value.decode() for key, value in pq.read_metadata(file).metadata.items()}
    assert {key: value for key, value in found.items() if key.startswith("batchvl")} == {
        "batchvl.engine": "old", "batchvl.engine.2": "new", "batchvl.fingerprint": "f00d",
        "batchvl.options": '{"model":"shapes"}', "batchvl.version": "1",
    }  # fmt: skip


async def test_what_cannot_be_merged(tmp_path: Path) -> None:
    with pytest.raises(ResumeError, match=r"not a batchvl output: no run\.json found"):
        merge(tmp_path)
    await fill(tmp_path, [sample(0)])
    with pytest.raises(OptionError, match=r"r\.csv: unknown file extension; expected one of \.parquet, "):
        merge(tmp_path, tmp_path / "r.csv")
    with pytest.raises(OptionError, match="cannot be written: No such file"):
        merge(tmp_path, tmp_path / "nowhere" / "r.parquet")
    part = only_folder(tmp_path).part((1, 1))
    data = bytearray(part.read_bytes())
    response = pq.read_metadata(part).row_group(0).column(3)
    data[response.data_page_offset + response.total_compressed_size - 10] ^= 1
    part.write_bytes(data)
    with pytest.raises(BatchvlError, match=r"part-0001-000001.parquet: damaged"):
        merge(tmp_path, partial=True)
    assert hidden(tmp_path) == []


async def test_a_full_disk_leaves_the_old_file(tmp_path: Path) -> None:
    class Full(Disk):
        def write(self, fd: int, data: bytes | memoryview) -> None:
            raise OSError(28, "No space left on device")

    await fill(tmp_path, [sample(0)])
    merge(tmp_path, partial=True)
    await fill(tmp_path, [sample(1)])
    for name in ("results.parquet", "r.jsonl", "r.jsonl.gz"):
        with pytest.raises(StoppedEarly, match="ENOSPC"):
            merge(tmp_path, tmp_path / name, partial=True, disk=Full())
    assert len(answers(tmp_path / "results.parquet")) == 1
    assert hidden(tmp_path) == []
