"""Which files a manifest consists of: one file, a folder of them, or a glob; or a folder of pictures."""

from __future__ import annotations

import glob
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..errors import ManifestError

Format = Literal["parquet", "jsonl", "csv", "pictures"]

COMPRESSED = (".gz", ".zst")
MANIFESTS: dict[str, Format] = {".parquet": "parquet", ".jsonl": "jsonl", ".ndjson": "jsonl", ".csv": "csv"}
PICTURES = {
    ".jpg", ".jpeg", ".jfif", ".png", ".webp", ".gif", ".avif", ".bmp", ".tif", ".tiff", ".mpo",
    ".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".j2k",
}  # fmt: skip
SUPPORTED = ".parquet, .jsonl, .ndjson or .csv (text also as .gz or .zst), or a folder of pictures"


@dataclass(frozen=True, slots=True)
class Files:
    """A manifest's files, sorted by their paths relative to `folder`."""

    folder: Path
    format: Format
    names: tuple[str, ...] | None
    """None: every picture below the folder, walked anew each time, since there may be millions."""

    def __iter__(self) -> Iterator[str]:
        """The files' relative paths, in order."""
        if self.names is not None:
            return iter(self.names)
        return (name for name in walk(self.folder) if format_of(name) == "pictures")


def find(source: str | Path) -> Files:
    """The files that `source` names.

    In a folder, manifests win over pictures, which then are what the rows name; folders below are searched too,
    but neither hidden ones, nor names that begin with `_` or `.`, nor an output folder of batchvl.

    Raises ManifestError where there is nothing, nothing of a known format, or manifests of several formats.
    """
    text = str(source)
    if "://" in text:
        raise ManifestError(f"{text.split('://')[0]}://…: manifests are read from local files; copy it here first")
    path = Path(source)
    try:
        if path.is_file():
            format = format_of(path.name)
            if format is None or format == "pictures":
                raise ManifestError(f"{path}: no manifest by its name; want {SUPPORTED}")
            return Files(path.parent, format, (path.name,))
        if path.is_dir():
            return _one_format(path, walk(path), f"{path}: a folder", lazy=True)
        if glob.has_magic(text):
            return _from_glob(text)
    except (OSError, ValueError) as error:
        raise ManifestError(f"{path}: cannot be read: {error}") from None
    raise ManifestError(f"{path}: no such file or folder")


def format_of(name: str) -> Format | None:
    """A file's format by its name; None where it is neither a manifest nor a picture.

    >>> format_of("a.JSONL.gz"), format_of("b.jpg"), format_of("c.txt")
    ('jsonl', 'pictures', None)
    """
    stem, suffix = os.path.splitext(name.lower())
    if suffix in PICTURES:
        return "pictures"
    if suffix in COMPRESSED:
        found = MANIFESTS.get(os.path.splitext(stem)[1])
        return found if found != "parquet" else None
    return MANIFESTS.get(suffix)


def walk(folder: Path) -> Iterator[str]:
    """The relative paths of the files below a folder, sorted; one folder's names are in memory at a time."""
    stack = [iter(_entries(folder, ""))]
    while stack:
        for name, is_folder in stack[-1]:
            if is_folder:
                stack.append(iter(_entries(folder, name)))
                break
            yield name
        else:
            stack.pop()


def _entries(root: Path, below: str) -> list[tuple[str, bool]]:
    with os.scandir(root / below) as found:
        # A folder sorts with its slash, so that walking gives the order of the whole relative paths.
        entries = [
            (below + entry.name + "/" * entry.is_dir(follow_symlinks=False), entry.is_dir(follow_symlinks=False))
            for entry in found
            if not entry.name.startswith((".", "_"))
        ]
    if below and any(name == below + "run.json" for name, _ in entries) and _is_output(root / below):
        return []
    return sorted(entries)


def _is_output(folder: Path) -> bool:
    """Whether a run writes there: its parts, found by a second run, would make the manifest another one."""
    try:
        run = json.loads((folder / "run.json").read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(run, dict) and "fingerprint" in run


def _from_glob(pattern: str) -> Files:
    names = [name for name in glob.glob(pattern, recursive=True) if os.path.isfile(name)]
    if not names:
        raise ManifestError(f"{pattern}: matches no file")
    parts = Path(pattern).parts
    literal = next(at for at, part in enumerate(parts) if glob.has_magic(part))
    folder = Path(*parts[:literal])
    outputs = {Path(name).parent for name in names}
    outputs |= {above for path in outputs for above in path.parents if above.is_relative_to(folder)}
    outputs = {path for path in outputs if path != folder and _is_output(path)}
    relative = sorted(
        path.relative_to(folder).as_posix() for path in map(Path, names) if outputs.isdisjoint(path.parents)
    )
    return _one_format(folder, relative, f"{pattern}: a glob", lazy=False)


def _one_format(folder: Path, names: Iterable[str], what: str, *, lazy: bool) -> Files:
    manifests: list[str] = []
    pictures: list[str] = []
    others: set[str] = set()
    for name in names:
        match format_of(name):
            case "pictures":
                if not (lazy and pictures):
                    pictures.append(name)
            case None:
                others.add(os.path.splitext(name)[1] or name)
            case _:
                manifests.append(name)
    formats = sorted({str(format_of(name)) for name in manifests})
    if len(formats) > 1:
        raise ManifestError(
            f"{what} with manifests of several formats ({', '.join(formats)}, such as {manifests[0]}); "
            "want one: name it by a glob, such as 'folder/*.parquet'"
        )
    if manifests:
        format = format_of(manifests[0])
        assert format is not None
        return Files(folder, format, tuple(manifests))
    if pictures:
        return Files(folder, "pictures", None if lazy else tuple(pictures))
    found = ", ".join(sorted(others)[:5]) or "nothing"
    raise ManifestError(f"{what} with no manifest and no picture; found {found}, want {SUPPORTED}")
