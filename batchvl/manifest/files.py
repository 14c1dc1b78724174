"""The files of a manifest: one file, a directory or a glob of files, or a directory of images."""

from __future__ import annotations

import glob
import json
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..errors import ManifestError

Format = Literal["parquet", "jsonl", "csv", "webdataset", "images"]

FORMAT_NOUNS: dict[Format, str] = {
    "parquet": "Parquet file",
    "jsonl": "JSONL file",
    "csv": "CSV file",
    "webdataset": "tar file",
    "images": "image",
}
"""One file of each format, in words."""
MANIFEST_SUFFIXES: dict[str, Format] = {
    ".parquet": "parquet",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".csv": "csv",
    ".tar": "webdataset",
}
COMPRESSED_SUFFIXES = (".gz", ".zst")
"""Suffixes that text formats may have after their own. Parquet compresses inside the file; tars must allow seeking."""
_TEXT: tuple[Format, ...] = ("jsonl", "csv")
_COMPRESSED_TAR = re.compile(r"\.(tgz|tbz2?|txz|tar\.\w+)$", re.IGNORECASE)
IMAGE_SUFFIXES = frozenset(
    {
        *(".jpg", ".jpeg", ".jfif", ".png", ".webp", ".gif", ".avif", ".bmp", ".tif", ".tiff", ".mpo"),
        *(".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".j2k"),
    }
)
SUPPORTED = ".parquet, .jsonl, .ndjson or .csv (text also as .gz or .zst), .tar, or a directory of images"


@dataclass(frozen=True, slots=True)
class Files:
    """A manifest's files, sorted by their paths relative to `directory`."""

    directory: Path
    format: Format
    names: tuple[str, ...] | None
    """None: every image below the directory. It is walked on each iteration, since there may be millions."""
    notes: tuple[str, ...] = ()
    """What the user should know about the choice of these files."""

    def __iter__(self) -> Iterator[str]:
        """Yield the files' relative paths in order."""
        if self.names is not None:
            return iter(self.names)
        return (name for name in walk(self.directory) if format_of(name) == "images")


def find_files(source: str | Path) -> Files:
    """Return the files that `source` names.

    A directory is searched with all its subdirectories, except names that begin with `_` or `.` and output directories
    of batchvl. If it has both manifests and images, the manifests count: the images are what their rows refer to. So it
    is with manifests and tars, unless each manifest is a Parquet file that belongs to a tar, as img2dataset writes it.

    Raises:
        ManifestError: Nothing is found, nothing of a known format, or manifests of several formats.
    """
    text = str(source)
    if "://" in text:
        scheme = text.split("://")[0]
        raise ManifestError(f"{scheme}://…: manifests are read from local files; copy it to this machine first")
    path = Path(source)
    try:
        if path.is_file():
            format = format_of(path.name)
            if format is None or format == "images":
                hint = "decompress it first" if _COMPRESSED_TAR.search(path.name) else f"expected {SUPPORTED}"
                raise ManifestError(f"{path}: not a manifest by its name; {hint}")
            return Files(path.parent, format, (path.name,))
        if path.is_dir():
            return _files_of_one_format(path, walk(path), f"{path}: the directory", lazy=True)
        if glob.has_magic(text):
            return _find_by_glob(text)
    except (OSError, ValueError) as error:
        raise ManifestError(f"{path}: cannot be read: {error}") from None
    raise ManifestError(f"{path}: no such file or directory")


def format_of(name: str) -> Format | None:
    """Return a file's format by its name; None if it is neither a manifest nor an image.

    >>> format_of("a.JSONL.gz"), format_of("b.jpg"), format_of("c.txt")
    ('jsonl', 'images', None)
    """
    stem, suffix = os.path.splitext(name.lower())
    if suffix in IMAGE_SUFFIXES:
        return "images"
    if suffix in COMPRESSED_SUFFIXES:
        format = MANIFEST_SUFFIXES.get(os.path.splitext(stem)[1])
        return format if format in _TEXT else None
    return MANIFEST_SUFFIXES.get(suffix)


def walk(directory: Path) -> Iterator[str]:
    """Yield the sorted relative paths of the files below a directory.

    Memory holds the names of one directory on each level only.
    """
    stack = [iter(_entries(directory, ""))]
    while stack:
        for name, is_directory in stack[-1]:
            if is_directory:
                stack.append(iter(_entries(directory, name)))
                break
            yield name
        else:
            stack.pop()


def _entries(root: Path, below: str) -> list[tuple[str, bool]]:
    """Return the sorted relative paths in a directory, each with whether it is a directory."""
    with os.scandir(root / below) as found:
        # A directory sorts with its slash, so that the walk is in the order of whole relative paths.
        entries = [
            (below + entry.name + "/" * entry.is_dir(follow_symlinks=False), entry.is_dir(follow_symlinks=False))
            for entry in found
            if not entry.name.startswith((".", "_"))
        ]
    if below and any(name == below + "run.json" for name, _ in entries) and _is_output(root / below):
        return []
    return sorted(entries)


def _is_output(directory: Path) -> bool:
    """Return whether a run writes to a directory. Its parts must not become part of the manifest of a second run."""
    try:
        run = json.loads((directory / "run.json").read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(run, dict) and "fingerprint" in run


def _find_by_glob(pattern: str) -> Files:
    paths = [Path(name) for name in glob.glob(pattern, recursive=True) if os.path.isfile(name)]
    if not paths:
        raise ManifestError(f"{pattern}: matches no file")
    parts = Path(pattern).parts
    root = Path(*parts[: next(at for at, part in enumerate(parts) if glob.has_magic(part))])
    below_root = {above for path in paths for above in path.parents if above != root and above.is_relative_to(root)}
    outputs = {directory for directory in below_root if _is_output(directory)}
    names = sorted(path.relative_to(root).as_posix() for path in paths if outputs.isdisjoint(path.parents))
    return _files_of_one_format(root, names, f"{pattern}: the glob", lazy=False)


def _files_of_one_format(directory: Path, names: Iterable[str], what: str, *, lazy: bool) -> Files:
    """Return the manifests among the files, else the images. lazy: do not keep the images' names."""
    manifests: list[str] = []
    images: list[str] = []
    others: set[str] = set()
    for name in names:
        match format_of(name):
            case "images":
                if not (lazy and images):
                    images.append(name)
            case None:
                compressed_tar = _COMPRESSED_TAR.search(name)
                others.add(compressed_tar[0] if compressed_tar else os.path.splitext(name)[1] or name)
            case _:
                manifests.append(name)
    manifests, notes = _without_companions(manifests)
    formats = {name: format for name in manifests if (format := format_of(name)) is not None}
    if len(set(formats.values())) > 1:
        raise ManifestError(
            f"{what} has manifests of several formats ({', '.join(sorted(set(formats.values())))}, "
            f"such as {manifests[0]}); expected one: select it with a glob, such as 'directory/*.parquet'"
        )
    if manifests:
        return Files(directory, formats[manifests[0]], tuple(manifests), notes)
    if images:
        return Files(directory, "images", None if lazy else tuple(images))
    found = ", ".join(sorted(others)[:5]) or "nothing"
    if any(map(_COMPRESSED_TAR.search, others)):
        raise ManifestError(f"{what} has compressed tars, but neither a manifest nor an image; decompress them first")
    raise ManifestError(f"{what} has neither a manifest nor an image; found {found}, expected {SUPPORTED}")


def _without_companions(names: list[str]) -> tuple[list[str], tuple[str, ...]]:
    """Return the manifests without the tars that they refer to, or the tars without their lists; and notes about it."""
    tars = [name for name in names if format_of(name) == "webdataset"]
    others = [name for name in names if format_of(name) != "webdataset"]
    if not tars or not others:
        return names, ()
    stems = {os.path.splitext(name)[0] for name in tars}
    if all(name.endswith(".parquet") and name.removesuffix(".parquet") in stems for name in others):
        more = "the Parquet files next to them also list failed downloads; '*.parquet' has these as failed rows"
        return tars, (f"only the tars are read: {more}",)
    return others, (f"the tars next to {others[0]} are not read as manifests; its rows can name their members",)
