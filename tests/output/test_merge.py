import asyncio
import gzip
import json
import os
import subprocess
import sys
from dataclasses import replace
from datetime import UTC, date, datetime
from decimal import Decimal
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batchvl.errors import BatchvlError, OptionError, ResumeError, StoppedEarly
from batchvl.output import Counts, Output, merge
from batchvl.output import merge as merge_function
from batchvl.output.disk import Disk
from batchvl.output.merge import windows
from batchvl.output.parts import Group, Part
from batchvl.values import Shard

from .samples import GUARD, failed, fill, only_folder, options, sample


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
    await fill(tmp_path, [*say([0], "retry"), failed(1), failed(4, "c")], retry=1)
    report = merge(tmp_path)
    assert answers(report.file) == [(0, "retry"), (1, "1"), (2, "2"), (3, None), (4, None)]
    assert [error and error["code"] for error in pq.read_table(report.file)["error"].to_pylist()][3:] == ["a", "c"]
    assert report.counts == Counts(3, {"a": 1, "c": 1})
    output = Output.open(tmp_path, GUARD)
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
    report = merge(tmp_path)
    assert answers(report.file)[9:11] == [(9, sample(9).response), (10, "later")]
    assert report.rows == 20
    assert hidden(tmp_path) == []


async def test_missing_rows_are_counted_and_the_first_named(tmp_path: Path) -> None:
    await fill(tmp_path, [sample(row) for row in range(20, 50)], replace(GUARD, total=100))
    report = merge(tmp_path)
    assert (report.rows, report.missing, report.first_missing) == (30, 70, tuple(range(10)))
    assert merge(tmp_path, total=51).missing == 21


async def test_a_text_manifests_total_is_known_once_it_was_read_to_its_end(tmp_path: Path) -> None:
    await fill(tmp_path, [sample(1)])
    assert (merge(tmp_path).total, merge(tmp_path).missing) == (None, 0)
    output = Output.open(tmp_path, GUARD)
    await output.close(complete=True, total=3)
    assert (merge(tmp_path).total, merge(tmp_path).first_missing) == (3, (0, 2))


async def test_nothing_done_yet(tmp_path: Path) -> None:
    await fill(tmp_path, [], replace(GUARD, total=2))
    report = merge(tmp_path)
    assert (report.rows, report.first_missing) == (0, (0, 1))
    assert pq.read_schema(report.file).names == GUARD.schema.names


async def test_while_a_run_goes_on(tmp_path: Path) -> None:
    told = Counts()
    output = Output.open(tmp_path, GUARD, options=options(part_rows=7), on_commit=told.add)
    output.describe({})
    for row in range(40):
        output.add(sample(row))
        if row % 5 == 0:
            await asyncio.sleep(0.02)
            before = told.rows
            report = await asyncio.to_thread(merge_function, tmp_path)
            assert before <= report.rows <= row + 1
    await output.close()
    assert merge(tmp_path).rows == 40


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
        report = merge(tmp_path, tmp_path / name)
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
    found = pq.read_table(merge(tmp_path).file).to_pylist()[0]
    assert {name: found[name] for name in values} == values
    assert found["images"][0]["source"] == "0.jpg"


async def test_the_files_metadata(tmp_path: Path) -> None:
    await fill(tmp_path, [sample(0)], metadata={"version": "1", "engine": "old"})
    await fill(tmp_path, [sample(1)], metadata={"version": "1", "engine": "new"})
    found = {key.decode(): value.decode() for key, value in pq.read_metadata(merge(tmp_path).file).metadata.items()}
    assert {key: value for key, value in found.items() if key.startswith("batchvl")} == {
        "batchvl.engine": "old", "batchvl.engine.2": "new", "batchvl.fingerprint": "f00d",
        "batchvl.options": '{"model":"shapes"}', "batchvl.version": "1",
    }  # fmt: skip


async def test_what_cannot_be_merged(tmp_path: Path) -> None:
    with pytest.raises(ResumeError, match=r"is no output folder of batchvl: it has no run.json"):
        merge(tmp_path)
    await fill(tmp_path, [sample(0)])
    with pytest.raises(OptionError, match=r"r.csv: the file's ending tells its format"):
        merge(tmp_path, tmp_path / "r.csv")
    with pytest.raises(OptionError, match="cannot be written: No such file"):
        merge(tmp_path, tmp_path / "nowhere" / "r.parquet")
    part = only_folder(tmp_path).part((1, 1))
    data = bytearray(part.read_bytes())
    response = pq.read_metadata(part).row_group(0).column(3)
    data[response.data_page_offset + response.total_compressed_size - 10] ^= 1
    part.write_bytes(data)
    with pytest.raises(BatchvlError, match=r"part-0001-000001.parquet: damaged"):
        merge(tmp_path)
    assert hidden(tmp_path) == []


async def test_a_full_disk_leaves_the_old_file(tmp_path: Path) -> None:
    class Full(Disk):
        def write(self, fd: int, data: bytes | memoryview) -> None:
            raise OSError(28, "No space left on device")

    await fill(tmp_path, [sample(0)])
    merge(tmp_path)
    await fill(tmp_path, [sample(1)])
    for name in ("results.parquet", "r.jsonl", "r.jsonl.gz"):
        with pytest.raises(StoppedEarly, match="ENOSPC"):
            merge(tmp_path, tmp_path / name, disk=Full())
    assert len(answers(tmp_path / "results.parquet")) == 1
    assert hidden(tmp_path) == []


def parts_of(*groups: list[tuple[int, int]]) -> list[Part]:
    return [
        Part(Path(str(n)), 1, 0, tuple(Group(low, high, 10) for low, high in some), {}, "")
        for n, some in enumerate(groups)
    ]


def test_windows_follow_the_row_groups() -> None:
    def cut(*groups: list[tuple[int, int]]) -> list[tuple[int, int, list[str]]]:
        found = windows(parts_of(*groups), 20)
        return [(window.low, window.high, [part.path.name for part in window.parts]) for window in found]

    assert cut() == []
    assert cut([(3, 9)]) == [(3, 10, ["0"])]
    assert cut([(0, 9), (10, 19), (20, 29)], [(30, 39)]) == [(0, 20, ["0"]), (20, 40, ["0", "1"])]
    # A part of few rows far apart is looked at in each window that it reaches into.
    assert cut([(0, 9), (10, 19), (20, 29)], [(5, 99)]) == [(0, 10, ["0", "1"]), (10, 100, ["0", "1"])]
    assert cut([(0, 5)], [(0, 5)], [(0, 5)]) == [(0, 6, ["0", "1", "2"])]
    assert cut([(0, 1), (2, 3)], [(0, 50)], [(60, 70)]) == [(0, 2, ["0", "1"]), (2, 71, ["0", "1", "2"])]


MEMORY = """
import asyncio, resource, sys
from pathlib import Path
from batchvl.output import merge
from tests.output.samples import fill, sample

# Out of order within 5000 rows, as rows that were slow or tried again are.
rows = (base + 7919 * row % 5000 for base in range(0, 40_000, 5000) for row in range(5000))
asyncio.run(fill(Path(sys.argv[1]), (sample(row, response="x%d " % row * 700) for row in rows), part_rows=3000))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
assert merge(Path(sys.argv[1])).rows == 40_000
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_memory_is_for_a_window_not_for_the_rows(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, tmp_path], check=True, capture_output=True, text=True,
        cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert int(done.stdout) < 150_000, f"{done.stdout} kB for 190 MB of rows"
