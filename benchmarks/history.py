"""A manifest and an output directory as earlier attempts left it, written far faster than by runs."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image as PILImage

from batchvl.config.options import RunOptions
from batchvl.config.units import Shard
from batchvl.results import Record, parts
from batchvl.results.attempt import Attempt
from batchvl.results.journal import Journal, Segment, frame
from batchvl.results.output import LocalStorage
from batchvl.results.record import encode, schema, to_batch
from batchvl.results.rowset import Outcomes
from batchvl.storage.disk import Disk
from batchvl.types import Failure, Image

GROUP_ROWS = 1_000_000
"""Rows of the manifest's row groups, about pyarrow's default."""
CHARACTERS = 300
"""Approximate length of an answer."""
AHEAD = 512
"""Rows finish up to this many places before their turn."""
FAILED_EVERY = 50
CODES = ("missing_file", "http_status", "row_timeout")


def image_path(row: int) -> str:
    """Return the path of a row's image, relative to the manifest."""
    return f"images/{row // 1000:05d}/{row % 1000:03d}.png"


def write_manifest(directory: Path, rows: int, suffix: str) -> Path:
    """Write a manifest with a prompt and an image's path per row; `suffix` is "parquet" or "jsonl"."""
    path = directory / f"manifest.{suffix}"
    names = ["prompt", "image"]

    def columns(start: int, size: int) -> list[list[str]]:
        numbers = range(start, min(rows, start + size))
        return [[f"What is in image number {row}?" for row in numbers], [*map(image_path, numbers)]]

    if suffix == "parquet":
        with pq.ParquetWriter(path, pa.schema([(name, pa.string()) for name in names])) as writer:
            for start in range(0, rows, GROUP_ROWS):
                writer.write_table(pa.table(columns(start, GROUP_ROWS), names))
    else:
        with open(path, "w") as file:
            for start in range(0, rows, 10_000):
                lines = zip(*columns(start, 10_000), strict=True)
                file.writelines(json.dumps(dict(zip(names, line, strict=True))) + "\n" for line in lines)
    return path


def write_images(directory: Path, rows: int) -> None:
    """Write the images of the rows: a thousand small files, under as many names as needed."""
    images = directory / "images"
    images.mkdir()
    for number in range(1000):
        PILImage.new("RGB", (32, 32), (number % 256, number // 256, 0)).save(images / f"{number:03d}.png")
    for thousand in range(-(-rows // 1000)):
        (images / f"{thousand:05d}").symlink_to(".")


def records(rows: int) -> list[Record]:
    """Return results of rows 0, 1, …, each about one image; every FAILED_EVERY-th row failed."""
    chance = Random(7)
    words = ["".join(chance.choices("etaoinshrdlu", k=chance.randint(2, 9))) for _ in range(3000)]
    results = []
    for row in range(rows):
        image = Image(image_path(row), f"{chance.getrandbits(256):064x}", 640, 480, 100_000 + row)
        if row % FAILED_EVERY == 0:
            error = Failure(CODES[row // FAILED_EVERY % len(CODES)], "fetch", f"{image.source}: failed on request")
            results.append(Record(row, "failed", images=[image], error=error, seconds=chance.random()))
            continue
        text = ""
        while len(text) < CHARACTERS:
            text += words[int(chance.paretovariate(0.6)) % len(words)] + " "
        results.append(
            Record(
                row,
                "ok",
                response=text,
                finish_reason="stop",
                input_tokens=1800 + row % 50,
                output_tokens=len(text) // 5,
                images=[image],
                seconds=chance.random(),
            )
        )
    return results


class History:
    """Writes what past attempts left in the only shard of an output directory.

    Args:
        out: The output directory.
        part_rows: Rows per part, as of `--part-rows`.
    """

    def __init__(self, out: Path, part_rows: int) -> None:
        self._shard, self._disk = LocalStorage(out).shard(Shard()), Disk()
        self._records, self._schema = records(part_rows), schema(None)
        self._columns = dict(zip(self._schema.names, to_batch(self._records, self._schema).columns, strict=True))
        options = msgspec.json.encode(RunOptions().meaning()).decode()
        self._metadata = {"batchvl": "1", "engine": '{"engine": "fake"}', "fingerprint": "0" * 32, "options": options}

    def add_parts(self, rows: range, excluded: range = range(0)) -> None:
        """Add an attempt that did the rows, nearly in their order, and ended normally."""
        attempt, chance = self._attempt(), np.random.default_rng(7)
        included = np.arange(rows.start, rows.stop, rows.step)
        numbers = np.setdiff1d(included, np.arange(excluded.start, excluded.stop, excluded.step))
        turns = np.arange(len(numbers)) + chance.integers(0, AHEAD, len(numbers))
        numbers = numbers[np.argsort(turns, kind="stable")]
        for number, start in enumerate(range(0, len(numbers), len(self._records)), 1):
            part_rows = np.sort(numbers[start : start + len(self._records)])
            outcomes = Outcomes()
            for row, record in zip(part_rows.tolist(), self._records, strict=False):
                outcomes.add(row, record.error.code if record.error else None)
            columns = {name: column[: len(part_rows)] for name, column in self._columns.items()}
            table = pa.table({**columns, "row": pa.array(part_rows)}, self._schema)
            with pq.ParquetWriter(
                self._shard.part((attempt, number)),
                self._schema,
                compression="zstd",
                write_page_checksum=True,
                use_dictionary=parts.DICTIONARY,
            ) as writer:
                writer.write_table(table, row_group_size=parts.GROUP_ROWS)
                writer.add_key_value_metadata(parts.footer(Journal(attempt, 0, b""), outcomes, self._metadata))

    def add_journal(self, rows: range) -> None:
        """Add an attempt that did the rows and was killed before it wrote them to a part."""
        attempt = self._attempt()
        segment = Segment(self._shard.journal((attempt, 1)), attempt, 0, self._disk)
        results = (msgspec.structs.replace(self._records[row % len(self._records)], row=row) for row in rows)
        segment.append([frame(encode(record)) for record in results])
        segment.close()

    def _attempt(self) -> int:
        attempt = Attempt(self._shard, retry=0, total=None, disk=self._disk)
        attempt.release()
        return attempt.number
