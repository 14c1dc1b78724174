"""A manifest, and its output folder as earlier attempts left it, made in far less time than runs would take."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image as Picture

from batchvl.config.options import RunOptions
from batchvl.config.units import Shard
from batchvl.results import Record, parts
from batchvl.results.attempt import Attempt
from batchvl.results.journal import Journal, Segment, frame
from batchvl.results.record import encode, schema, to_batch
from batchvl.results.rowset import Outcomes
from batchvl.results.shard import ShardFolder
from batchvl.storage.disk import Disk
from batchvl.types import Failure, Image

GROUP_ROWS = 1_000_000
"""Rows of the manifest's row groups, about what pyarrow makes them by default."""
CHARACTERS = 300
"""Of an answer, about."""
AHEAD = 512
"""Rows are done up to so many places before their turn."""
FAILED_EVERY = 50
CODES = ("missing_file", "http_status", "row_timeout")


def image_of(row: int) -> str:
    """A row's picture, relative to the manifest."""
    return f"images/{row // 1000:05d}/{row % 1000:03d}.png"


def manifest(folder: Path, rows: int, kind: str) -> Path:
    """A manifest of `rows` rows, a prompt and the path of a picture each. kind: parquet or jsonl."""
    path = folder / f"manifest.{kind}"
    names = ["prompt", "image"]

    def columns(start: int, size: int) -> list[list[str]]:
        numbers = range(start, min(rows, start + size))
        return [[f"What is to be seen in picture number {row}?" for row in numbers], [*map(image_of, numbers)]]

    if kind == "parquet":
        with pq.ParquetWriter(path, pa.schema([(name, pa.string()) for name in names])) as writer:
            for start in range(0, rows, GROUP_ROWS):
                writer.write_table(pa.table(columns(start, GROUP_ROWS), names))
    else:
        with open(path, "w") as file:
            for start in range(0, rows, 10_000):
                lines = zip(*columns(start, 10_000), strict=True)
                file.writelines(json.dumps(dict(zip(names, line, strict=True))) + "\n" for line in lines)
    return path


def pictures(folder: Path, rows: int) -> None:
    """The pictures of so many rows: a thousand small files, under as many names as are needed."""
    images = folder / "images"
    images.mkdir()
    for number in range(1000):
        Picture.new("RGB", (32, 32), (number % 256, number // 256, 0)).save(images / f"{number:03d}.png")
    for thousand in range(-(-rows // 1000)):
        (images / f"{thousand:05d}").symlink_to(".")


def records(rows: int) -> list[Record]:
    """Results of rows 0, 1, … that describe a picture each; every fiftieth failed."""
    chance = Random(7)
    words = ["".join(chance.choices("etaoinshrdlu", k=chance.randint(2, 9))) for _ in range(3000)]
    found = []
    for row in range(rows):
        image = Image(image_of(row), f"{chance.getrandbits(256):064x}", 640, 480, 100_000 + row)
        if row % FAILED_EVERY == 0:
            error = Failure(CODES[row // FAILED_EVERY % len(CODES)], "fetch", f"{image.source}: failed by order")
            found.append(Record(row, "failed", images=[image], error=error, seconds=chance.random()))
            continue
        text = ""
        while len(text) < CHARACTERS:
            text += words[int(chance.paretovariate(0.6)) % len(words)] + " "
        found.append(
            Record(
                row, "ok", response=text, finish_reason="stop", input_tokens=1800 + row % 50,
                output_tokens=len(text) // 5, images=[image], seconds=chance.random(),
            )
        )  # fmt: skip
    return found


class History:
    """The only shard of an output folder, which attempts did rows of that are dead now. part_rows: as `--part-rows`."""

    def __init__(self, out: Path, part_rows: int) -> None:
        self.folder, self._disk = ShardFolder.of(out, Shard()), Disk()
        self._records, self._schema = records(part_rows), schema(None)
        self._columns = dict(zip(self._schema.names, to_batch(self._records, self._schema).columns, strict=True))
        options = msgspec.json.encode(RunOptions().meaning()).decode()
        self._metadata = {"batchvl": "1", "engine": '{"engine": "fake"}', "fingerprint": "0" * 32, "options": options}

    def parts(self, rows: range, but: range = range(0)) -> None:
        """An attempt that did the rows, all but some, nearly in their order, and ended in order."""
        attempt, chance = self._attempt(), np.random.default_rng(7)
        numbers = np.setdiff1d(np.arange(rows.start, rows.stop, rows.step), np.arange(but.start, but.stop, but.step))
        turns = np.arange(len(numbers)) + chance.integers(0, AHEAD, len(numbers))
        numbers = numbers[np.argsort(turns, kind="stable")]
        for number, start in enumerate(range(0, len(numbers), len(self._records)), 1):
            some = np.sort(numbers[start : start + len(self._records)])
            tally = Outcomes()
            for row, record in zip(some.tolist(), self._records, strict=False):
                tally.add(row, record.error.code if record.error else None)
            columns = {name: column[: len(some)] for name, column in self._columns.items()}
            table = pa.table({**columns, "row": pa.array(some)}, self._schema)
            with pq.ParquetWriter(
                self.folder.part((attempt, number)), self._schema, compression="zstd", write_page_checksum=True,
                use_dictionary=parts.DICTIONARY,
            ) as writer:  # fmt: skip
                writer.write_table(table, row_group_size=parts.GROUP_ROWS)
                writer.add_key_value_metadata(parts.footer(Journal(attempt, 0, b""), tally, self._metadata))

    def journal(self, rows: range) -> None:
        """An attempt that did the rows, and was killed before it made a part of them."""
        attempt = self._attempt()
        segment = Segment(self.folder.journal((attempt, 1)), attempt, 0, self._disk)
        done = (msgspec.structs.replace(self._records[row % len(self._records)], row=row) for row in rows)
        segment.append([frame(encode(record)) for record in done])
        segment.close()

    def _attempt(self) -> int:
        attempt = Attempt(self.folder, retry=0, total=None, disk=self._disk)
        attempt.release()
        return attempt.number
