"""Files of fetched images, in the directory that a run then reads as its manifest.

They are Parquet files with rows and images, or pairs of a tar with the images and a Parquet file whose rows point at
them. A file is complete or not there: it is written under a name that begins with a dot, synced, and renamed; of a pair
the tar comes first, and counts only with its rows. The footer has the numbers of the rows, so that the files themselves
say which rows are fetched. Names hold the shard, the attempt and a number, so that attempts that do not see each other
cannot harm each other.
"""

from __future__ import annotations

import hashlib
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq

from ..config.options import FileFormat
from ..config.units import Shard
from ..errors import ResumeError, RowError
from ..fetching.sniff import suffix_of
from ..images.image_files import ImageFiles
from ..storage.buffered_file import BufferedFile
from ..storage.disk import Disk
from ..storage.tar import END, member_header, padding
from ..types import FileImage, Image
from .fetched_rows import SOURCE_IMAGES, FileSchema, RowGroup
from .parts import damaged
from .record import Record
from .rowset import RowSet

_KEY = b"batchvl.images"
_ROWS: Mapping[FileFormat, str] = {"parquet": "images", "tar": "rows"}
"""How the names of the Parquet files begin. They must differ from those of the tars: Parquet files next to tars of the
same names, as img2dataset writes them, are no manifest."""
_UNKNOWN = ".img"
"""The suffix of an image whose format is unknown: it was decoded, but does not begin as others of its format do."""
_MAX_MEMBER = 2**33
"""Bytes of a member: the size in a header has 11 octal digits."""


class _Footer(msgspec.Struct, omit_defaults=True):
    fingerprint: str
    shard: str
    rows: str
    tar_bytes: int | None = None
    """Size of the tar that the rows point at."""


class ImageFile(ABC):
    """A file, or a pair of files, that is being written. Every method raises OSError as the disk does.

    Args:
        path: The Parquet file, once it is complete.
        schema: Its columns.
        disk: Writes it.
    """

    def __init__(self, path: Path, schema: FileSchema, disk: Disk) -> None:
        self.path, self.size = path, 0
        self.records: list[Record] = []
        self._schema = schema
        self._file = BufferedFile(disk, _temporary(path))
        is_parquet = schema.format == "parquet"
        # Images are compressed already; a dictionary of them, or statistics, would be wasted effort.
        self._writer = pq.ParquetWriter(
            self._file,
            schema.arrow(),
            compression="none" if is_parquet else "zstd",
            use_dictionary=not is_parquet,
            write_statistics=[schema.columns.names[0]],
            write_page_checksum=True,
        )

    @abstractmethod
    def write(self, group: RowGroup) -> None:
        """Append a row group."""

    @abstractmethod
    def complete(self, shard: Shard, fingerprint: str) -> None:
        """Finish the file. It is on the disk under its name on return.

        Args:
            shard: The shard of the manifest that its rows are of.
            fingerprint: The manifest's.
        """

    def abandon(self) -> None:
        """Remove what was written."""
        self._file.abandon()

    def _append(self, group: RowGroup, table: pa.Table, images: Path) -> None:
        """Append rows. images: the file with their images."""
        self._writer.write_table(table, row_group_size=len(group.rows))
        self.records += group.records(images.name)

    def _publish(self, shard: Shard, fingerprint: str, tar_bytes: int | None = None) -> None:
        rows = RowSet(record.row for record in self.records).dump()
        footer = _Footer(fingerprint, str(shard), rows, tar_bytes)
        self._writer.add_key_value_metadata({_KEY: msgspec.json.encode(footer)})
        self._writer.close()
        self._file.publish(self.path)


class ParquetImages(ImageFile):
    """A Parquet file of rows with their images."""

    def write(self, group: RowGroup) -> None:
        self._append(group, group.table(self._schema), self.path)
        self.size = self._file.tell()

    def complete(self, shard: Shard, fingerprint: str) -> None:
        self._publish(shard, fingerprint)


class TarImages(ImageFile):
    """A tar of images, and a Parquet file of rows with their paths.

    The tar is one of WebDataset as well: each row is a sample, with its images, and its other columns as JSON. So rows
    that share an image each have it; the paths in the Parquet file lead to the first, from which a run knows them as
    one.
    """

    def __init__(self, path: Path, schema: FileSchema, disk: Disk) -> None:
        super().__init__(path, schema, disk)
        self._tar_path = tar_of(path)
        self._members: dict[str, str] = {}
        """Names of members by the hash of the image."""
        try:
            self._tar = BufferedFile(disk, _temporary(self._tar_path))
        except BaseException:
            super().abandon()
            raise

    def write(self, group: RowGroup) -> None:
        group.hash_images()
        contents = group.contents()
        members = []
        for row, cells, images in zip(group.rows, group.cells, group.images, strict=True):
            key = f"{row:09d}"
            for place, image in enumerate(images):
                data = next(contents)
                order = f".{place}" if len(images) > 1 else ""
                name = f"{key}{order}{suffix_of(data) or _UNKNOWN}"
                self._add(name, data)
                members.append(f"{self._tar_path.name}#{self._members.setdefault(image.sha256 or name, name)}")
            self._add(f"{key}.json", self._json(cells, images))
        self._append(group, group.table(self._schema, members), self._tar_path)
        self.size = self._tar.tell()

    def complete(self, shard: Shard, fingerprint: str) -> None:
        self._tar.write(END)
        self._tar.publish(self._tar_path)
        self._publish(shard, fingerprint, self._tar.tell())

    def abandon(self) -> None:
        super().abandon()
        self._tar.abandon()

    def _add(self, name: str, data: bytes | memoryview) -> None:
        self._tar.write(member_header(name, len(data)))
        self._tar.write(data)
        self._tar.write(padding(len(data)))

    def _json(self, cells: list[object], images: list[Image]) -> bytes:
        """Return a row's columns besides the images as JSON."""
        sources = [image.source for image in images]
        named = zip(self._schema.columns.names, cells, strict=True)
        source = sources if self._schema.has_lists else next(iter(sources), None)
        return msgspec.json.encode({**dict(named), SOURCE_IMAGES: source}, enc_hook=str)


_WRITERS: Mapping[FileFormat, type[ImageFile]] = {"parquet": ParquetImages, "tar": TarImages}


def create_file(path: Path, schema: FileSchema, disk: Disk) -> ImageFile:
    """Create a file of the schema's format. Raises OSError.

    Args:
        path: The Parquet file, once it is complete; see `file_path`.
        schema: Its columns.
        disk: Writes it.
    """
    return _WRITERS[schema.format](path, schema, disk)


def file_path(directory: Path, shard: Shard, attempt: int, number: int, format: FileFormat = "parquet") -> Path:
    """Return the path of a Parquet file.

    >>> file_path(Path("images"), Shard(3, 16), 1, 2).name
    'images-00003-0001-000002.parquet'
    """
    return directory / f"{_ROWS[format]}-{shard.index:05d}-{attempt:04d}-{number:06d}.parquet"


def tar_of(path: Path) -> Path:
    """Return the path of the tar that the rows of a Parquet file point at.

    >>> tar_of(Path("rows-00003-0001-000002.parquet")).name
    'images-00003-0001-000002.tar'
    """
    return path.with_name(f"images-{path.stem.removeprefix('rows-')}.tar")


def _temporary(path: Path) -> Path:
    """Return where a file is while it is written.

    >>> _temporary(Path("images-00003-0001-000002.parquet")).name
    '.images-00003-0001-000002.parquet.tmp'
    """
    return path.with_name(f".{path.name}.tmp")


def complete_files(
    directory: Path, shard: Shard, fingerprint: str, format: FileFormat = "parquet"
) -> Mapping[Path, RowSet]:
    """Return the complete Parquet files of a shard, with the numbers of their rows.

    Raises:
        ResumeError: A file is damaged or of another fetch, or has lost its tar.
        OSError: A file cannot be read.
    """
    files = {}
    for path in sorted(directory.glob(f"{_ROWS[format]}-{shard.index:05d}-*.parquet")):
        try:
            metadata = pq.read_metadata(path).metadata or {}
            footer = msgspec.json.decode(metadata.get(_KEY, b""), type=_Footer)
            rows = RowSet.load(footer.rows)
        except (pa.ArrowException, msgspec.DecodeError, ValueError, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise  # the system's error; Arrow's own errors about the contents have no number
            raise ResumeError(damaged(path, error)) from None
        if (footer.fingerprint, footer.shard) != (fingerprint, str(shard)):
            raise ResumeError(f"{path}: belongs to another fetch: choose another output directory with -o")
        if footer.tar_bytes is not None:
            _check_tar(path, footer.tar_bytes)
        files[path] = rows
    return files


def _check_tar(path: Path, size: int) -> None:
    tar = tar_of(path)
    found = f"{tar.stat().st_size:,} bytes" if tar.exists() else "none"
    if found != f"{size:,} bytes":
        raise ResumeError(
            f"{path}: expected its images in {tar.name}, of {size:,} bytes, found {found}: put that tar back, or "
            "remove both files to fetch their rows again"
        )


def remove_incomplete_files(directory: Path, shard: Shard, attempt: int, disk: Disk) -> None:
    """Remove what killed attempts at a shard left. Call it with the shard's lock held.

    Args:
        directory: The files' directory.
        shard: The shard.
        attempt: The present attempt. A tar without rows is only removed if it is of an earlier one.
        disk: Removes the files.
    """
    of_shard = f"-{shard.index:05d}-"
    for prefix in _ROWS.values():
        for path in directory.glob(f".{prefix}{of_shard}*.tmp"):
            disk.discard(path)
    for path in directory.glob(f"images{of_shard}*.tar"):
        parts = re.fullmatch(rf"images{of_shard}(\d+)-(\d+)\.tar", path.name)
        if parts is None or int(parts[1]) >= attempt:
            continue
        if not file_path(directory, shard, int(parts[1]), int(parts[2]), "tar").exists():
            disk.discard(path)


def read_records(path: Path, rows: RowSet, schema: FileSchema) -> Iterator[Record]:
    """Yield the records of rows in a complete file, for a process that was killed before it recorded them.

    The sizes in pixels are not known any more.

    Args:
        path: The Parquet file.
        rows: Numbers of the rows to yield.
        schema: The columns of the file.

    Raises:
        ResumeError: An image is not in the tar.
    """
    if not len(rows):
        return
    number = schema.columns.names[0]
    names = [number, *([schema.id] if schema.id else []), *schema.image_columns()]
    tar = tar_of(path) if schema.format == "tar" else None
    members = ImageFiles([path.parent], _MAX_MEMBER)
    with pq.ParquetFile(path, pre_buffer=False) as file:
        for group in range(file.num_row_groups):
            for batch in file.read_row_group(group, columns=names).to_batches(max_chunksize=256):
                for cells in batch.to_pylist():
                    if cells[number] not in rows:
                        continue
                    id = cells[schema.id] if schema.id else None
                    try:
                        images = [_image(data, source, members) for data, source in _stored(cells, schema)]
                    except RowError as error:
                        raise ResumeError(damaged(path, error)) from None
                    yield Record(cells[number], "ok", id=id, images=images, kept={"file": (tar or path).name})


def _stored(cells: dict[str, Any], schema: FileSchema) -> list[tuple[bytes | str, str]]:
    """Return each image of a row, as bytes or as the path of a member, and where it comes from."""
    columns = [cells[name] for name in schema.image_columns()]
    values = [column if schema.has_lists else [column] for column in columns if column is not None]
    if schema.format == "parquet":
        return [(image["bytes"], image["path"]) for images in values for image in images]
    return list(zip(*values, strict=True))


def _image(data: bytes | str, source: str, members: ImageFiles) -> Image:
    if isinstance(data, str):
        data = members.read(FileImage(data))
    return Image(source, hashlib.sha256(data).hexdigest(), bytes=len(data))
