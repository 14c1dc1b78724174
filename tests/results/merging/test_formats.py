from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from batchvl.results.merging.formats import GROUP_BYTES, GROUP_ROWS, ParquetFile
from batchvl.results.record import schema, to_batch
from batchvl.storage.disk import Disk

from ..samples import sample

SCHEMA = schema("string")


def written(tmp_path: Path, tables: list[pa.Table]) -> pq.FileMetaData:
    path = tmp_path / "results.parquet"
    with ParquetFile(path, tmp_path / "temporary", SCHEMA, {"batchvl.engine": "fake"}, Disk()) as file:
        for table in tables:
            file.write(table)
    assert pq.read_table(path).equals(
        pa.concat_tables(tables, promote_options="none") if tables else SCHEMA.empty_table()
    )
    assert [path.name for path in tmp_path.iterdir()] == ["results.parquet"]
    return pq.read_metadata(path)


def table_of(rows: range, **changed: str) -> pa.Table:
    return pa.Table.from_batches([to_batch([sample(row, **changed) for row in rows], SCHEMA)])


def groups(metadata: pq.FileMetaData) -> list[int]:
    return [metadata.row_group(number).num_rows for number in range(metadata.num_row_groups)]


def test_small_tables_are_combined_into_large_row_groups(tmp_path: Path) -> None:
    metadata = written(tmp_path, [table_of(range(start, start + 700)) for start in range(0, 35_000, 700)])
    assert groups(metadata) == [16_800, 16_800, 1400]
    assert all(GROUP_ROWS <= rows < GROUP_ROWS + 700 for rows in groups(metadata)[:-1])
    assert metadata.row_group(0).column(3).compression == "ZSTD"
    assert metadata.row_group(1).column(0).statistics.min == 16_800
    assert metadata.metadata[b"batchvl.engine"] == b"fake"


def test_row_groups_are_bounded_in_bytes(tmp_path: Path) -> None:
    metadata = written(tmp_path, [table_of(range(at, at + 10), response="x" * 100_000) for at in range(0, 200, 10)])
    assert groups(metadata) == [90, 90, 20]
    assert all(metadata.row_group(at).total_byte_size < 2 * GROUP_BYTES for at in range(3))


def test_a_file_without_rows_has_no_row_group(tmp_path: Path) -> None:
    assert groups(written(tmp_path, [])) == []
