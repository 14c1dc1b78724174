"""The rows of a manifest: `Manifest`."""

from __future__ import annotations

from array import array
from collections.abc import Container, Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from ..config.options import ManifestOptions, PromptOptions
from ..config.units import Shard
from ..errors import ManifestError
from ..prompts.template import template_columns
from ..types import Row
from .columns import Columns, choose
from .files import Files, Format, find
from .fingerprint import fingerprint
from .readers.base import Reader
from .readers.csv import CsvReader
from .readers.image_folder import ImageFolderReader
from .readers.jsonl import JsonlReader
from .readers.parquet import ParquetReader
from .readers.text import EVERY_ROW, TextReader
from .rows import IdType, RowMaker

ALL = Shard()
CHECKED_IDS = 100_000
"""Rows whose ids are checked for being the same."""
_CHECKED_BYTES = 64 * 2**20
_LOOKED_AT = 100
_FEW = 10

READERS: dict[Format, type[ParquetReader | JsonlReader | CsvReader | ImageFolderReader]] = {
    "parquet": ParquetReader, "jsonl": JsonlReader, "csv": CsvReader, "pictures": ImageFolderReader,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Schema:
    """What the output takes over from the manifest."""

    id_type: IdType | None
    """None: no row has an id."""
    kept: pa.Schema
    """The columns of `--keep`; from text they are strings."""


class Manifest:
    """The rows of a file, of a folder or a glob of files, or of a folder of pictures, in batches and lazily.

    manifest = Manifest.open("manifest.jsonl", ManifestOptions(), PromptOptions())
    manifest.check()
    for rows in manifest.rows():
        print(rows[0].number, rows[0].prompt)
    """

    def __init__(self, files: Files, reader: Reader, columns: Columns, options: ManifestOptions) -> None:
        self.folder: Path = files.folder
        """Pictures' relative paths start here."""
        self.fingerprint: str = fingerprint(files)
        """Tells this manifest from others: by contents, not by place or time."""
        self.files = files
        self.roles = columns
        """The columns that are read, by what they are for."""
        self._reader, self._options = reader, options

    @classmethod
    def open(cls, source: str | Path, options: ManifestOptions, prompt: PromptOptions) -> Manifest:
        """Finds the files and chooses the columns; footers, or the first rows of text, are read.

        Raises ManifestError where the files cannot be read, are empty or of no known format, or where a column that
        an option or the prompt's template names is missing or of a wrong type.
        """
        files = find(source)
        reader: Reader = READERS[files.format](files)
        available = reader.available
        if options.prompt_column in available:
            available = tuple(dict.fromkeys((*available, "prompt")))
        template = template_columns(prompt.prompt, available) if prompt.prompt is not None else ()
        columns = choose(options, template, reader.available, str(source))
        if not columns.has_prompts and not columns.images and not columns.image and not template:
            there = ", ".join(map(repr, reader.available[:40]))
            raise ManifestError(
                f"{source}: neither prompts nor pictures; the columns are {there}; want 'prompt', 'messages', 'images' "
                "or 'image': map others by --prompt-column, --messages-column or --image-column"
            )
        reader.use(columns)
        return cls(files, reader, columns, options)

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that the files have; of JSONL, those of the first rows."""
        return self._reader.available

    @property
    def schema(self) -> Schema:
        """What the output takes over."""
        return Schema(self._reader.id_type, self._reader.kept)

    @property
    def total(self) -> int | None:
        """Rows, at most `--limit`; None for text until it was counted for a shard or read to its end."""
        return self._limited(self._reader.total)

    def estimate(self) -> int | None:
        """About how many rows there are, at most `--limit`, by what was read so far; `total` where that is known."""
        return self._limited(self._reader.estimate())

    def _limited(self, rows: int | None) -> int | None:
        limit = self._options.limit
        return rows if rows is None or limit is None else min(rows, limit)

    def check(self) -> None:
        """Looks at the first rows, before anything dear is started.

        Raises ManifestError where two of the first 100,000 have the same id, or where each of the first 100 of a text
        file is bad.
        """
        if self._reader.is_text:
            first = next(self._rows(range(_LOOKED_AT), ()), [])[:_LOOKED_AT]
            if len(first) >= _FEW and all(row.failure and row.failure.code == "invalid_row" for row in first):
                reason = first[0].failure.message if first[0].failure else ""
                raise ManifestError(f"each of the first {len(first)} rows is bad; the first: {reason}")
        if self._reader.id_type is not None and self.files.format != "pictures":
            self._check_ids()

    def _check_ids(self) -> None:
        # 8 bytes an id, so that memory does not grow with the manifest.
        hashes, numbers = array("q"), array("q")
        for number, label in self._ids():
            hashes.append(hash(label))
            numbers.append(number)
        hashed = pa.array(hashes, pa.int64())
        order = pc.sort_indices(hashed)
        ordered = hashed.take(order)
        same = pc.equal(ordered[1:], ordered[:-1])
        if not pc.any(same).as_py():
            return
        # Once more for those alone, for hashes can be the same by chance.
        suspects = set(ordered[1:].filter(same).to_pylist())
        seen: dict[int | str, int] = {}
        for number, label in self._ids():
            if hash(label) in suspects and seen.setdefault(label, number) != number:
                raise ManifestError(
                    f"column {self._options.id_column!r}: rows {seen[label]} and {number} (from 0) have the same id "
                    f"{label!r:.80}; want unique ids, or another column by --id-column"
                )

    def _ids(self) -> Iterator[tuple[int, int | str]]:
        columns = Columns(id=self.roles.id)
        maker = RowMaker(columns, self._reader.id_type)
        most = min(CHECKED_IDS, _CHECKED_BYTES // max(1, self._reader.row_bytes))
        for chunk in self._reader.chunks(columns.read, range(self._limited(most) or 0), ()):
            for number, cells in chunk:
                if (label := maker.label(cells)) is not None:
                    yield number, label

    def rows(
        self, shard: Shard = ALL, skip: Container[int] = (), index_folder: Path | None = None
    ) -> Iterator[list[Row]]:
        """The shard's rows that are not in `skip`, in order, lazily, in lists of at most 256 rows and about 8 MiB.

        A bad row has its `failure` set. Of text, an index is kept in `index_folder` for other shards and later runs,
        and all is read for it first where there are several. Blocks. Raises ManifestError where a file can no longer
        be read.
        """
        if isinstance(self._reader, TextReader):
            self._reader.index_in(index_folder, self.fingerprint)
            if shard.count > 1:
                self._reader.count()
        if (total := self.total) is not None:
            return self._rows(shard.rows(total), skip)
        return self._rows(EVERY_ROW[: self._options.limit], skip)

    def _rows(self, numbers: range, skip: Container[int]) -> Iterator[list[Row]]:
        text = self._reader.is_text
        maker = RowMaker(self.roles, self._reader.id_type, json_lists=self.files.format == "csv", keep_text=text)
        make = maker.row
        for chunk in self._reader.chunks(self.roles.read, numbers, skip):
            yield [make(number, cells) for number, cells in chunk]
