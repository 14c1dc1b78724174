"""The rows of a manifest, for a run."""

from __future__ import annotations

from array import array
from collections.abc import Container, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from ..config.options import ManifestOptions, PromptOptions
from ..config.units import Shard
from ..errors import ManifestError
from ..prompts.template import quote_names, template_columns
from ..types import Row
from .arrow import is_list
from .columns import Columns, choose_columns
from .files import Files, find_files
from .fingerprint import fingerprint
from .json_types import JSON
from .readers import Reader, open_reader
from .readers.text import EVERY_ROW
from .rows import IdType, RowMaker

ALL = Shard()
CHECKED_IDS = 100_000
"""The first rows, among which `check` looks for duplicate ids."""
_CHECKED_ID_BYTES = 64 * 2**20
_CHECKED_ROWS = 100
_MIN_BAD_ROWS = 10
"""A manifest is rejected if all of its first rows are bad and there are at least this many."""


@dataclass(frozen=True, slots=True)
class Schema:
    """The columns that the output takes from the manifest."""

    id_type: IdType | None
    """None: no row has an id."""
    kept: pa.Schema
    """The columns of `--keep`; those of text formats are strings."""


class Manifest:
    """The rows of a file, a directory or glob of files, or a directory of images; lazily and in chunks.

    Example:
        manifest = Manifest.open("manifest.jsonl", ManifestOptions(), PromptOptions())
        manifest.check()
        for rows in manifest.rows():
            print(rows[0].number, rows[0].prompt)
    """

    def __init__(
        self, files: Files, reader: Reader, columns: Columns, options: ManifestOptions, typed: pa.Schema | None = None
    ) -> None:
        self.directory = files.directory
        """Images' relative paths are relative to this directory."""
        self.fingerprint: str = fingerprint(files)
        """Identifies the manifest by its contents, not by its location or modification time."""
        self.files = files
        self.roles = columns
        """The columns that are read, by role."""
        self.has_image_lists = True
        """Whether a row of the image column can have several images. Known if the manifest was opened as a whole."""
        self._reader, self._options, self._typed = reader, options, typed

    @classmethod
    def open(cls, source: str | Path, options: ManifestOptions, prompt: PromptOptions) -> Manifest:
        """Find the files and choose the columns. Footers, or the first rows of text, are read.

        Raises:
            ManifestError: The files cannot be read, are empty or of no known format, or a column that an option or
                the prompt template names is missing or has a wrong type.
        """
        files = find_files(source)
        reader = open_reader(files)
        names = reader.available
        if options.prompt_column in names:
            names = tuple(dict.fromkeys((*names, "prompt")))
        template = template_columns(prompt.prompt, names) if prompt.prompt is not None else ()
        columns = choose_columns(options, template, reader.available, str(source), reader.default_columns)
        if not columns.has_prompts and not columns.images and not columns.image and not template:
            raise ManifestError(
                f"{source}: neither prompts nor images; the columns are {quote_names(reader.available)}; expected "
                "'prompt', 'messages', 'images' or 'image': map others with --prompt-column, --messages-column or "
                "--image-column"
            )
        reader.bind(columns)
        return cls(files, reader, columns, options)

    @classmethod
    def open_whole(cls, source: str | Path, options: ManifestOptions) -> Manifest:
        """Open a manifest as `open` does, and keep every column except those of the images, typed as in `Batches`.

        All rows of JSONL are read.

        Raises:
            ManifestError: As for `open`; or a column has values that no type holds.
        """
        files = find_files(source)
        reader = open_reader(files)
        schema = reader.schema()
        reader.available = tuple(schema.names)
        columns = choose_columns(options, (), reader.available, str(source), reader.default_columns)
        kept = [name for name in schema.names if name not in (columns.images, columns.image)]
        columns = replace(columns, keep=tuple(kept))
        reader.bind(columns)
        manifest = cls(files, reader, columns, options, pa.schema([schema.field(name) for name in kept]))
        cells = [schema.field(name) for name in (columns.images, columns.image) if name in schema.names]
        manifest.has_image_lists = reader.has_json_lists or any(is_list(f.type) or f.metadata == JSON for f in cells)
        return manifest

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns of the files; for JSONL, those of the first rows."""
        return self._reader.available

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user should know about how the files are read."""
        return (*self.files.notes, *self._reader.notes)

    @property
    def schema(self) -> Schema:
        """The columns that the output takes from the manifest."""
        return Schema(self._reader.id_type, self._reader.kept if self._typed is None else self._typed)

    @property
    def total(self) -> int | None:
        """The number of rows, at most `--limit`. For text, None until it is counted for a shard or read to its end."""
        return self._limited(self._reader.total)

    def estimate(self) -> int | None:
        """Return the approximate number of rows, at most `--limit`; exact once `total` is known."""
        return self._limited(self._reader.estimate())

    def _limited(self, rows: int | None) -> int | None:
        limit = self._options.limit
        return rows if rows is None or limit is None else min(rows, limit)

    def check(self) -> None:
        """Check the first rows, before anything expensive starts.

        Raises:
            ManifestError: Two of the first 100,000 rows have the same id, or each of the first 100 rows of a text file
                is bad.
        """
        if self._reader.is_text:
            self._check_first_rows()
        if self._reader.id_type is not None and not self._reader.has_unique_ids:
            self._check_ids()

    def _check_first_rows(self) -> None:
        rows = next(self._rows(range(_CHECKED_ROWS), ()), [])[:_CHECKED_ROWS]
        failures = [row.failure for row in rows if row.failure is not None and row.failure.code == "invalid_row"]
        if len(rows) >= _MIN_BAD_ROWS and len(failures) == len(rows):
            raise ManifestError(f"each of the first {len(rows)} rows is bad; the first: {failures[0].message}")

    def _check_ids(self) -> None:
        # 8 bytes per id, so that memory does not grow with the manifest.
        hashes, numbers = array("q"), array("q")
        for number, id in self._ids():
            hashes.append(hash(id))
            numbers.append(number)
        hashed = pa.array(hashes, pa.int64())
        ordered = hashed.take(pc.sort_indices(hashed))
        same = pc.equal(ordered[1:], ordered[:-1])
        if not pc.any(same).as_py():
            return
        # Hashes may be equal by chance: compare the ids themselves, of these rows only.
        suspects = set(ordered[1:].filter(same).to_pylist())
        seen: dict[int | str, int] = {}
        for number, id in self._ids():
            if hash(id) in suspects and seen.setdefault(id, number) != number:
                raise ManifestError(
                    f"column {self.roles.id!r}: rows {seen[id]} and {number} (from 0) have the same id "
                    f"{id!r:.80}; expected unique ids, or another column with --id-column"
                )

    def _ids(self) -> Iterator[tuple[int, int | str]]:
        columns = Columns(id=self.roles.id)
        maker = RowMaker(columns, self._reader.id_type)
        most = min(CHECKED_IDS, _CHECKED_ID_BYTES // max(1, self._reader.id_row_bytes))
        for chunk in self._reader.chunks(columns.names, range(self._limited(most) or 0), ()):
            for number, cells in chunk:
                if (id := maker.id(cells)) is not None:
                    yield number, id

    def rows(
        self, shard: Shard = ALL, skip: Container[int] = (), index_directory: Path | None = None
    ) -> Iterator[list[Row]]:
        """Yield the shard's rows in order and lazily, in chunks of at most 256 rows and about 8 MiB. Blocks.

        A bad row has its `failure` set.

        Args:
            shard: The part of the manifest to read. If there are several, all of a text manifest is indexed first.
            skip: Numbers of rows to leave out.
            index_directory: Where an index of text is kept for other shards and later runs.

        Raises:
            ManifestError: A file can no longer be read.
        """
        self._reader.use_index(index_directory, self.fingerprint)
        if shard.count > 1:
            self._reader.count()
        if (total := self.total) is not None:
            return self._rows(shard.rows(total), skip)
        return self._rows(EVERY_ROW[: self._options.limit], skip)

    def _rows(self, numbers: range, skip: Container[int]) -> Iterator[list[Row]]:
        reader = self._reader
        keep_text = reader.is_text and self._typed is None
        maker = RowMaker(self.roles, reader.id_type, json_lists=reader.has_json_lists, keep_text=keep_text)
        make = maker.row
        for chunk in reader.chunks(self.roles.names, numbers, skip):
            yield [make(number, cells) for number, cells in chunk]
