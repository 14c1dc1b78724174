"""Rows are read lazily, in bounded chunks, and a shard reads no more than it needs."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batchvl.config.units import Shard
from batchvl.errors import ManifestError
from batchvl.manifest import index
from batchvl.manifest.readers import lines
from batchvl.manifest.readers.base import CHUNK_BYTES
from batchvl.types import InlineImage
from tests.manifest.writing import numbers, opened, rows_of, write, write_bytes

FORMATS = ["m.parquet", "m.jsonl", "m.csv", "m.jsonl.gz", "m.csv.zst", "m.tar"]


def big(path: Path, rows: int = 2500) -> Path:
    if path.name.startswith("m.csv"):
        return write_bytes(path, b"prompt\n" + b"".join(b'"a\nb %d"\n' % number for number in range(rows)))
    if path.suffix == ".parquet":
        return write(path, [{"prompt": f"a\nb {number}"} for number in range(rows)], row_group_size=400)
    return write(path, [{"prompt": f"a\nb {number}"} for number in range(rows)])


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("count", [1, 2, 3, 7, 2600])
def test_shards_are_a_partition(tmp_path: Path, name: str, count: int) -> None:
    manifest = opened(big(tmp_path / "manifest" / name))
    read = []
    for at in range(count) if count < 10 else (0, 1, 1299, 2599):
        shard = Shard(at, count)
        rows = [row for rows in manifest.rows(shard, (), tmp_path / "out") for row in rows]
        assert numbers(rows) == list(shard.rows(2500))
        assert all(row.prompt == f"a\nb {row.number}" for row in rows)
        read += numbers(rows)
    assert count > 10 or read == list(range(2500))
    assert manifest.total == 2500


@pytest.mark.parametrize("name", FORMATS)
def test_the_limit_applies_before_shards(tmp_path: Path, name: str) -> None:
    path = big(tmp_path / name)
    assert numbers(rows_of(path, limit=11)) == list(range(11))
    assert numbers(rows_of(path, Shard(1, 2), limit=11)) == list(range(5, 11))
    assert numbers(rows_of(path, Shard(0, 1), limit=9999)) == list(range(2500))


@pytest.mark.parametrize("name", FORMATS)
def test_skipped_rows_are_left_out(tmp_path: Path, name: str) -> None:
    skip = {0, 255, 256, *range(300, 1700), 2499}
    rows = rows_of(big(tmp_path / name), skip=skip)
    assert numbers(rows) == [number for number in range(2500) if number not in skip]
    assert all(row.prompt == f"a\nb {row.number}" for row in rows)
    assert rows_of(tmp_path / name, skip=range(2500)) == []


@pytest.mark.parametrize("name", FORMATS)
def test_chunks_have_few_rows(tmp_path: Path, name: str) -> None:
    sizes = [len(rows) for rows in opened(big(tmp_path / name)).rows()]
    assert max(sizes) == 256
    assert min(sizes) > 0


@pytest.mark.parametrize("name", ["m.jsonl", "m.parquet"])
def test_chunks_have_few_bytes(tmp_path: Path, name: str) -> None:
    rows = [{"prompt": "p", "k": os.urandom(150_000).hex()} for _ in range(60)]
    chunks = list(opened(write(tmp_path / name, rows), keep=("k",)).rows())
    assert [row.kept["k"] for rows in chunks for row in rows] == [row["k"] for row in rows]
    assert max(sum(len(row.kept["k"]) for row in rows) for rows in chunks) < CHUNK_BYTES + 300_000


def test_chunks_of_images_in_one_row_group_stay_small(tmp_path: Path) -> None:
    data = [os.urandom(500_000) for _ in range(64)]
    pq.write_table(pa.table({"prompt": ["p"] * 64, "image": data}), tmp_path / "m.parquet")
    chunks = list(opened(tmp_path / "m.parquet").rows())
    assert max(sum(row.inline_bytes for row in rows) for rows in chunks) <= CHUNK_BYTES
    images = [row.images[0] for rows in chunks for row in rows]
    assert [image.data for image in images if isinstance(image, InlineImage)] == data


def corrupted(path: Path, start: float) -> Path:
    """Overwrite a file from a share of its size on, except the last 2 % with Parquet's footer, and return its path."""
    data = bytearray(path.read_bytes())
    begin, end = int(len(data) * start), int(len(data) * 0.98)
    data[begin:end] = b"\xa5" * (end - begin)
    path.write_bytes(data)
    return path


def test_a_corrupt_row_group_fails_its_own_rows_only(tmp_path: Path) -> None:
    rows = [{"prompt": os.urandom(2000).hex()} for _ in range(1000)]
    path = write(tmp_path / "m.parquet", rows, row_group_size=100, compression="snappy")
    footer = pq.read_metadata(path)
    start = footer.row_group(3).column(0).data_page_offset
    data = bytearray(path.read_bytes())
    data[start : start + 5000] = b"\xa5" * 5000
    path.write_bytes(data)
    read = rows_of(path)
    assert numbers(read) == list(range(1000))
    assert [row.number for row in read if row.failure] == list(range(300, 400))
    assert read[400].prompt == rows[400]["prompt"]
    assert read[300].failure is not None
    assert f"{path}: row group 3 cannot be read" in read[300].failure.message


def test_the_first_chunk_does_not_wait_for_the_rest(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    line = json.dumps({"prompt": "What is this?" * 10}).encode() + b"\n"
    path.write_bytes(line * 100_000)
    with open(path, "r+b") as file:
        # A hole of 100 GB follows: reading it would take minutes.
        file.truncate(10**11)
    rows = opened(path).rows()
    assert len(next(rows)) == 256
    rows.close()  # type: ignore[attr-defined]


def test_the_first_rows_of_parquet_do_not_wait_for_their_row_group(tmp_path: Path) -> None:
    rows = [{"prompt": os.urandom(1000).hex()} for _ in range(20_000)]
    path = write(tmp_path / "m.parquet", rows, compression="none", data_page_size=2**16, use_dictionary=False)
    assert pq.read_metadata(path).num_row_groups == 1
    rows_read = opened(corrupted(path, 0.3)).rows()
    before = bytes_read()
    assert [row.prompt for row in next(rows_read)] == [row["prompt"] for row in rows[:256]]
    assert bytes_read() - before < path.stat().st_size / 10


def bytes_read() -> int:
    """Return the bytes that this process has read so far."""
    return int(Path("/proc/self/io").read_text().split()[1])


@pytest.mark.parametrize("name", ["m.jsonl", "m.jsonl.gz", "m.csv"])
def test_the_estimate_is_close_and_becomes_exact(tmp_path: Path, name: str) -> None:
    rows = [{"prompt": os.urandom(100).hex()} for _ in range(20_000)]
    manifest = opened(write(tmp_path / name, rows))
    assert manifest.total is None
    assert 10_000 < (manifest.estimate() or 0) < 40_000
    assert sum(map(len, manifest.rows())) == manifest.total == manifest.estimate() == 20_000
    assert opened(tmp_path / name, limit=50).estimate() == 50


@pytest.mark.parametrize("name", ["m.jsonl", "m.csv"])
def test_later_shards_use_the_index_of_the_first(tmp_path: Path, name: str) -> None:
    path = big(tmp_path / "a" / name, 5000)
    out = tmp_path / "out"
    manifest = opened(path)
    first = list(manifest.rows(Shard(3, 4), (), out))
    assert [file.name for file in out.iterdir()] == ["manifest-index.json"]
    # The rows before the shard are not read again. If they were, this change would shift the rows' numbers.
    fingerprint = manifest.fingerprint
    path.write_bytes(path.read_bytes().replace(b"a\nb 5", b"a\nb\n5").replace(b"b 700", b"\n\n700"))
    written = index.read(out, fingerprint)
    assert written is not None
    assert written.rows == 5000
    later = opened(path)
    later.fingerprint = fingerprint
    assert list(later.rows(Shard(3, 4), (), out)) == first
    assert index.read(out, "another") is None


def test_a_torn_index_is_made_again(tmp_path: Path) -> None:
    manifest = opened(big(tmp_path / "m.jsonl"))
    index.path_in(tmp_path).write_bytes(b'{"fingerprint": "')
    assert numbers([row for rows in manifest.rows(Shard(1, 2), (), tmp_path) for row in rows]) == list(
        range(1250, 2500)
    )
    assert index.read(tmp_path, manifest.fingerprint) is not None


def test_an_index_counts_the_byte_order_mark(tmp_path: Path) -> None:
    path = big(tmp_path / "m.jsonl")
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    rows = [row for rows in opened(path).rows(Shard(1, 2)) for row in rows]
    assert [row.prompt for row in rows] == [f"a\nb {number}" for number in range(1250, 2500)]


def test_shards_over_several_files(tmp_path: Path) -> None:
    for at, name in enumerate(("a.jsonl", "b.jsonl.gz", "c.jsonl", "d.jsonl")):
        write(tmp_path / "m" / name, [{"prompt": f"{at} {number}"} for number in range(1100 + at)])
    expected = [(row.number, row.prompt) for row in rows_of(tmp_path / "m")]
    assert len(expected) == 4406
    read = [
        (row.number, row.prompt)
        for at in range(9)
        for rows in opened(tmp_path / "m").rows(Shard(at, 9), (), tmp_path / "out")
        for row in rows
    ]
    assert read == expected


def test_lines_longer_than_a_block_and_than_the_maximum(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long = "x" * (3 * lines.BLOCK + 11)
    path = write(tmp_path / "m.jsonl", [{"prompt": p} for p in ("a", long, "b", long * 3, "c" * lines.BLOCK, "d")])
    assert [len(row.prompt or "") for row in rows_of(path)] == [1, len(long), 1, 3 * len(long), lines.BLOCK, 1]
    monkeypatch.setattr(lines, "MAX_LINE", 5 * lines.BLOCK)
    rows = rows_of(path)
    assert [row.number for row in rows if row.failure] == [3]
    assert rows[3].failure is not None
    assert "line 4: longer than" in rows[3].failure.message
    shards = [row for at in range(3) for rows in opened(path).rows(Shard(at, 3)) for row in rows]
    assert shards == rows


def test_a_manifest_that_is_replaced_while_it_is_read(tmp_path: Path) -> None:
    path = write(tmp_path / "m.parquet", [{"prompt": "p"}] * 10)
    manifest = opened(path)
    write(path, [{"prompt": "p"}] * 11)
    with pytest.raises(ManifestError, match="has changed"):
        list(manifest.rows())


def test_a_truncated_gzip_is_reported_after_the_rows_before(tmp_path: Path) -> None:
    path = write(tmp_path / "m.jsonl.gz", [{"prompt": os.urandom(500).hex()} for _ in range(10_000)])
    path.write_bytes(path.read_bytes()[:-1000])
    rows = opened(path).rows()
    for _ in range(35):
        next(rows)
    with pytest.raises(ManifestError, match=r"m.jsonl.gz: cannot be decompressed \(truncated\?\)"):
        list(rows)
