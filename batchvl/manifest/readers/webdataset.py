"""Tar files in WebDataset's convention: members that follow each other and share a name up to its first dot are a row.

`000.jpg`, `000.json` and `000.txt` are the row with the key `000`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import msgspec
import pyarrow as pa

from ...errors import InvalidRow, ManifestError
from ...storage.tar import Member, TarError, TarHeaders
from ...types import FileImage
from ..columns import Columns
from ..files import IMAGE_SUFFIXES, Files
from ..image_refs import plain_value
from ..index import RowOffset
from ..json_types import JsonTypes
from .base import Cells, utf8
from .text import TextReader

MAX_TEXT = 2**24
"""Bytes of a JSON or text member."""
MAX_MEMBERS = 256
"""Members of a row."""
_JSON = "json"
_TEXT_SUFFIXES = frozenset((".txt", ".text", ".caption", ".cls", ".json"))
_OWN = ("id", "images", "sample")
_RESERVED = frozenset((*_OWN, "image"))
_ID_ROW_BYTES = 2048

_decode_json = msgspec.json.Decoder(dict[str, Any]).decode


class TarFile:
    """An open tar. A context manager. Raises ManifestError if it cannot be opened."""

    compressed = False

    def __init__(self, path: Path) -> None:
        try:
            self._file = open(path, "rb", buffering=0)  # noqa: SIM115
        except OSError as error:
            raise ManifestError(f"{path}: cannot be read: {error.strerror}") from None
        self.size = os.fstat(self._file.fileno()).st_size
        self.headers = TarHeaders(self._file.fileno(), self.size)

    def position(self) -> int:
        return self.headers.position

    def __enter__(self) -> TarFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()


class Sample:
    """The members of a row, by what follows the first dot of their names; or why they cannot be read."""

    def __init__(self, headers: TarHeaders, key: str, offset: int) -> None:
        self.key, self.offset = key, offset
        self.members: dict[str, Member] = {}
        self.error: str | None = None
        self._headers = headers

    def add(self, suffix: str, member: Member) -> None:
        """Add a member. A name that is repeated makes the row invalid, and so do too many members."""
        if suffix in self.members:
            self.error = f"{self.key}: two members are named {member.name!r:.200}"
        elif len(self.members) == MAX_MEMBERS:
            self.error = f"{self.key}: more than {MAX_MEMBERS} members"
        else:
            self.members[suffix] = member

    def images(self) -> list[Member]:
        """Return the members that are images by their names, in order."""
        return [member for suffix, member in self.members.items() if _is_image(suffix)]

    def text(self, suffix: str) -> str | None:
        """Return the contents of a text member, None if there is none. Raises InvalidRow."""
        if (member := self.members.get(suffix)) is None:
            return None
        try:
            return self._read(member).decode().rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise InvalidRow(f"{member.name}: not UTF-8: {error.reason}") from None

    def json(self) -> dict[str, Any]:
        """Return the members of the object in the JSON member; none if there is no such member. Raises InvalidRow."""
        if (member := self.members.get(_JSON)) is None:
            return {}
        try:
            return _decode_json(self._read(member))
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise InvalidRow(f"{member.name}: not a JSON object: {error}") from None

    def _read(self, member: Member) -> bytes:
        if member.kind != "file":
            raise InvalidRow(f"{member.name}: is a {member.kind}, expected a file")
        if member.size > MAX_TEXT:
            raise InvalidRow(f"{member.name}: has {member.size:,} bytes, expected at most {MAX_TEXT:,}")
        try:
            return self._headers.read(member)
        except TarError as error:
            raise InvalidRow(f"{member.name}: {error}") from None


class WebDatasetReader(TextReader[Sample, TarFile]):
    """Read rows of tar files. Columns are inferred from the first rows.

    They are: `id` (the key), `images` (all of the row), `sample` (the path of the tar and the key, which is unique),
    one for each suffix of an image or text (`jpg`, `left.png`, `txt`), and the members of the objects in `.json`. Such
    a member is named `json_…` if there is another column of its name.

    A tar that is damaged has its rows before the damage, then one that fails and says what is wrong.

    Raises:
        ManifestError: There are no rows, or none of the first can be read.
    """

    sample_bytes = 2**40
    """Only headers and text are read, so bytes say little."""

    def __init__(self, files: Files) -> None:
        super().__init__(files)
        self._directory = files.directory
        suffixes: dict[str, None] = {}
        fields: dict[str, None] = {}
        errors: list[str] = []
        rows = 0
        for path, _, sample in self.sample():
            rows += 1
            if sample.error is not None:
                errors.append(f"{path}: {sample.error}")
                continue
            suffixes |= dict.fromkeys(suffix for suffix in sample.members if _is_column(suffix))
            with suppress(InvalidRow):
                fields |= dict.fromkeys(sample.json())
        if len(errors) == rows:
            raise ManifestError(errors[0])
        self.id_row_bytes = _ID_ROW_BYTES
        self._suffixes = frozenset(suffixes)
        """Those that are columns."""
        own = _OWN if any(map(_is_image, suffixes)) else ("id", "sample")
        self.available = (*own, *suffixes, *map(self._column_of, fields))
        json = f", and the members of .{_JSON}" if fields else ""
        self.notes = (
            f"tar files as WebDataset: a row per key, with {', '.join(f'.{name}' for name in suffixes)}{json}",
        )

    def bind(self, columns: Columns) -> None:
        super().bind(columns)
        self.id_type = "string" if columns.id else None
        self._image_columns = {columns.images, columns.image}
        """Columns whose cells are references to images, not paths."""

    def open(self, path: Path) -> TarFile:
        return TarFile(path)

    def place(self, path: Path, after: RowOffset) -> str:
        return str(path)

    def records(self, file: TarFile, start: RowOffset) -> Iterator[tuple[Sample, RowOffset]]:
        sample: Sample | None = None
        try:
            for member in file.headers.members(start.offset):
                if (parts := _split(member)) is None:
                    continue
                key, suffix = parts
                if sample is None or sample.key != key:
                    if sample is not None:
                        yield sample, RowOffset(member.header)
                    sample = Sample(file.headers, key, member.header)
                sample.add(suffix, member)
        except TarError as error:
            # The row before the damage may have lost members. It stands for all that is lost.
            sample = sample or Sample(file.headers, "", start.offset)
            last = f"its rows from {sample.key!r:.200} on are lost" if sample.key else "it has no rows before"
            sample.error = f"{error}; {last}"
        if sample is not None:
            yield sample, RowOffset(file.size)

    def decoder(self, path: Path, names: tuple[str, ...]) -> Callable[[Sample], Cells]:
        tar = path.relative_to(self._directory).as_posix()
        needs_json = any(name not in _OWN and name not in self._suffixes for name in names)

        def cells(sample: Sample) -> Cells:
            if sample.error is not None:
                raise InvalidRow(sample.error)
            fields = {self._column_of(name): value for name, value in sample.json().items()} if needs_json else {}
            return tuple([self._cell(sample, tar, name, fields) for name in names])

        return cells

    def schema(self) -> pa.Schema:
        self.bind(Columns(keep=self.available))
        types = JsonTypes()
        for sample in self.every_record():
            with suppress(InvalidRow):
                types.add({self._column_of(name): value for name, value in sample.json().items()})
        own = [
            pa.field(name, pa.list_(pa.string()) if name == "images" else pa.string())
            for name in self.available
            if name in _OWN or name in self._suffixes
        ]
        return pa.schema([*own, *types.schema()])

    def _column_of(self, field: str) -> str:
        """Return the name of the column for a member of the JSON objects."""
        return f"json_{field}" if field in _RESERVED or field in self._suffixes else field

    def _cell(self, sample: Sample, tar: str, name: str, fields: dict[str, Any]) -> Any:
        if name == "id":
            return utf8(sample.key.removeprefix("./"), "key")
        if name == "sample":
            return utf8(f"{tar}/{sample.key.removeprefix('./')}", "key")
        if name == "images" or (name in self._suffixes and _is_image(name)):
            return self._image_cell(sample, tar, name)
        return sample.text(name) if name in self._suffixes else fields.get(name)

    def _image_cell(self, sample: Sample, tar: str, name: str) -> Any:
        """Return an image or the list of all: as references if the column has that role, else as paths."""
        members = sample.images() if name == "images" else [sample.members[name]] if name in sample.members else []
        images = [FileImage(utf8(f"{tar}#{member.name}", "name"), member.header) for member in members]
        if not images and name in self._image_columns:
            found = ", ".join(f".{suffix}" for suffix in sample.members)
            what = "image" if name == "images" else f".{name}"
            return InvalidRow(f"{tar}: {sample.key} has no {what}, only {found:.100}: are its members together?")
        cell = images if name == "images" else next(iter(images), None)
        return cell if name in self._image_columns else plain_value(cell)


def _split(member: Member) -> tuple[str, str] | None:
    """Return a member's key and its suffix, which begins after the first dot of its base name; None if it has none."""
    directory, slash, base = member.name.rpartition("/")
    stem, dot, suffix = base.partition(".")
    if not stem or not dot or member.kind == "directory":
        return None
    return f"{directory}{slash}{stem}", suffix.lower()


def _is_image(suffix: str) -> bool:
    return "." + suffix.rpartition(".")[2] in IMAGE_SUFFIXES


def _is_column(suffix: str) -> bool:
    is_text = "." + suffix.rpartition(".")[2] in _TEXT_SUFFIXES
    return _is_image(suffix) or (is_text and suffix != _JSON)
