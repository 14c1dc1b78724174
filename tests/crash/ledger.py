"""An independent reader of output directories, which checks that nothing is lost, changed or duplicated.

It knows the files' formats only from their description: names, frames, footers, and which of several records of a row
takes precedence.
"""

from __future__ import annotations

import hashlib
import re
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq

import batchvl
from batchvl.results.record import decode, to_batch

_SEGMENT = re.compile(r"(journal|part)-(\d+)-(\d+)\.(?:log|parquet)")

Key = tuple[str, int, int]
"""Shard directory, attempt and number, which a journal and the part made from it share."""


@dataclass
class Segment:
    """A journal or a part: the digest of its file, and its rows, each with whether it failed."""

    name: str
    digest: bytes
    retry: int = 0
    rows: dict[int, tuple[bool, bytes]] = field(default_factory=dict)


class Ledger:
    """Reads an output directory repeatedly and compares each state with the one before."""

    def __init__(self, out: Path, schema: pa.Schema) -> None:
        self.out, self.schema = out, schema
        self._known: dict[Path, Segment] = {}
        self._durable: dict[int, tuple[bool, bytes]] = {}
        self._dead: dict[Path, bytes] = {}
        self.lost = self.changed = self.duplicates = self.checked = 0

    def rows(self) -> dict[int, tuple[bool, bytes]]:
        """Return each row once, with whether it failed and its columns. Works while a run is in progress.

        Of several records of a row: ok before failed, then the later retry, then the lower attempt.
        """
        best: dict[int, tuple[tuple[bool, int, int], tuple[bool, bytes]]] = {}
        for (_, attempt, _), segment in self._segments().items():
            for row, (failed, data) in segment.rows.items():
                rank = (failed, -segment.retry, attempt)
                if row not in best or rank < best[row][0]:
                    best[row] = rank, (failed, data)
        return {row: entry for row, (_, entry) in best.items()}

    def expect(self) -> int:
        """Require the present rows from now on, and return their number. Called before a kill."""
        return self._expect(self.rows())

    def check(self, scratch: Path) -> int:
        """Check, after a kill and with no run in progress, that all required rows are there unchanged and merged alike.

        Returns:
            The number of rows.

        Raises:
            AssertionError: A row was lost, changed or duplicated, or a finished file was changed.
        """
        rows = self.rows()
        lost = self._durable.keys() - rows.keys()
        self.lost += len(lost)
        assert not lost, f"lost: {sorted(lost)[:10]}"
        changed = [row for row, before in self._durable.items() if rows[row] != before]
        self.changed += len(changed)
        assert not changed, f"row {changed[0]} was {self._durable[changed[0]]}, is {rows[changed[0]]}"
        merged = self.merged(scratch)
        assert merged == rows, f"the merged file differs in rows {[r for r in rows if merged.get(r) != rows[r]][:5]}"
        self.checked += self._expect(rows)
        self._check_files_of_ended_attempts()
        return len(rows)

    def merged(self, scratch: Path) -> dict[int, tuple[bool, bytes]]:
        """Return the rows that batchvl merges now."""
        file = scratch / "merged.parquet"
        batchvl.merge(self.out, file, partial=True)
        return self.table(file)

    def table(self, file: Path) -> dict[int, tuple[bool, bytes]]:
        """Return the rows of a merged file.

        Raises:
            AssertionError: A row is duplicated or out of order.
        """
        table = pq.read_table(file)
        numbers = table["row"].to_pylist()
        self.duplicates += len(numbers) - len(set(numbers))
        assert numbers == sorted(set(numbers)), "rows are duplicated or out of order"
        return _encoded(table.to_pylist())

    def _expect(self, rows: dict[int, tuple[bool, bytes]]) -> int:
        self._durable |= rows
        return len(rows)

    def _check_files_of_ended_attempts(self) -> None:
        for path, digest in self._dead.items():
            assert hashlib.sha256(path.read_bytes()).digest() == digest, f"{path} was changed by another attempt"
        self._dead = {path: segment.digest for path, segment in self._known.items()}

    def _segments(self) -> dict[Key, Segment]:
        # Journals are listed first: a journal is removed only after its part exists. If both exist, the part counts.
        segments: dict[Key, Segment] = {}
        present = set()
        for kind in ("journal", "part"):
            for path in self.out.glob(f"shard-*/{kind}-*"):
                match = _SEGMENT.fullmatch(path.name)
                assert match, f"{path}: unknown file"
                try:
                    segments[path.parent.name, int(match[2]), int(match[3])] = self._read(path)
                    present.add(path)
                except FileNotFoundError:
                    assert kind == "journal", f"{path} is gone: parts are never removed"
        self._known = {path: segment for path, segment in self._known.items() if path in present}
        return segments

    def _read(self, path: Path) -> Segment:
        data = path.read_bytes()
        digest = hashlib.sha256(data).digest()
        known = self._known.get(path)
        if known is None or known.digest != digest:
            known = Segment(path.name, digest)
            if path.suffix == ".log":
                self._read_journal(data, known)
            else:
                file = pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True)
                known.retry = int(file.metadata.metadata[b"batchvl.retry"])
                known.rows = _encoded(file.read().to_pylist())
            self._known[path] = known
        return known

    def _read_journal(self, data: bytes, segment: Segment) -> None:
        if len(data) < 20 or data[:8] == bytes(8):
            return
        assert data[:8] == b"batchvlJ", f"{segment.name} begins with {data[:8]!r}"
        segment.retry = struct.unpack_from("<I", data, 16)[0]
        records, at = [], 20
        while at + 8 <= len(data):
            length, checksum = struct.unpack_from("<II", data, at)
            payload = data[at + 8 : at + 8 + length]
            if not length or len(payload) < length or zlib.crc32(payload) != checksum:
                break
            records.append(decode(payload))
            at += 8 + length
        for row, entry in _entries(to_batch(records, self.schema).to_pylist()):
            known = segment.rows.get(row)
            if known is None or entry[0] < known[0]:  # ok before failed, the first before the later
                segment.rows[row] = entry


def _encoded(rows: list[dict[str, Any]]) -> dict[int, tuple[bool, bytes]]:
    return dict(_entries(rows))


def _entries(rows: list[dict[str, Any]]) -> Iterator[tuple[int, tuple[bool, bytes]]]:
    for row in rows:
        yield row["row"], (row["status"] == "failed", msgspec.json.encode(row))
