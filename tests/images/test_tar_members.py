"""Members of tar archives as images: found by name, below the roots, never anything else."""

from __future__ import annotations

import os
import tarfile
from pathlib import Path

import pytest

from batchvl.errors import EmptyImage, FetchError, ForbiddenPath, MissingFile, TooManyBytes
from batchvl.images import image_files
from batchvl.images.image_files import ImageFiles
from batchvl.storage.tar import TarHeaders
from batchvl.types import FileImage
from tests.manifest.tars import special, write_tar


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A directory with archives, next to others that the manifest may not read."""
    root = tmp_path / "in"
    members = [
        ("cat.jpg", b"cat"),
        ("sub/dog.jpg", b"dog"),
        ("./here.jpg", b"here"),
        ("%41 é#.jpg", b"odd"),
        ("/etc/passwd", b"absolute"),
        ("../up.jpg", b"up"),
        ("empty.jpg", b""),
        ("large.jpg", b"x" * 11),
        ("twice.jpg", b"first"),
        ("n" * 200 + ".jpg", b"long"),
        (special("link.jpg", tarfile.SYMTYPE, "/etc/passwd"), b""),
        (special("hard.jpg", tarfile.LNKTYPE, "cat.jpg"), b""),
        (special("directory", tarfile.DIRTYPE), b""),
        (special("null.jpg", tarfile.CHRTYPE), b""),
        ("twice.jpg", b"last"),
    ]
    write_tar(root / "a.tar", members)
    write_tar(tmp_path / "secret.tar", [("cat.jpg", b"secret")])
    (root / "outside.tar").symlink_to("../secret.tar")
    (root / "inside.tar").symlink_to("a.tar")
    (root / "b.tar#cat.jpg").write_bytes(b"a file")
    write_tar(root / "b.tar", [("cat.jpg", b"member"), ("dog.jpg", b"dog")])
    os.mkfifo(root / "pipe.tar")
    return root


def read(directory: Path, path: str, header: int | None = None) -> bytes:
    return ImageFiles([directory], 10).read(FileImage(path, header))


@pytest.mark.parametrize(
    ("path", "data"),
    [
        ("a.tar#cat.jpg", b"cat"),
        ("a.tar#sub/dog.jpg", b"dog"),
        ("a.tar#./here.jpg", b"here"),
        ("a.tar#%41 é#.jpg", b"odd"),
        ("a.tar#/etc/passwd", b"absolute"),
        ("a.tar#../up.jpg", b"up"),
        ("a.tar#twice.jpg", b"last"),
        (f"a.tar#{'n' * 200}.jpg", b"long"),
        ("inside.tar#cat.jpg", b"cat"),
        ("../in/a.tar#cat.jpg", b"cat"),
        ("b.tar#cat.jpg", b"a file"),
        ("b.tar#dog.jpg", b"dog"),
    ],
)
def test_members_are_read_by_their_exact_names(directory: Path, path: str, data: bytes) -> None:
    assert read(directory, path) == data
    assert read(directory, f"{directory}/{path}") == data
    ImageFiles([directory], 10).check(FileImage(path))


@pytest.mark.parametrize(
    ("path", "error", "message"),
    [
        ("a.tar#none.jpg", MissingFile, "a.tar: has no member 'none.jpg'"),
        ("a.tar#here.jpg", MissingFile, "has no member 'here.jpg'"),
        ("a.tar#", MissingFile, "has no member ''"),
        ("none.tar#cat.jpg", MissingFile, "none.tar: No such file"),
        ("a.tar#link.jpg", MissingFile, "link.jpg: is a link in the archive"),
        ("a.tar#hard.jpg", MissingFile, "is a link in the archive"),
        ("a.tar#directory/", MissingFile, "is a directory in the archive"),
        ("a.tar#null.jpg", MissingFile, "is a special file in the archive"),
        ("pipe.tar#cat.jpg", MissingFile, "pipe.tar: is a pipe, expected a file"),
        ("a.tar#cat.jpg\0", MissingFile, "null"),
        ("outside.tar#cat.jpg", ForbiddenPath, "outside.tar: is outside the manifest's directory"),
        ("../secret.tar#cat.jpg", ForbiddenPath, "--image-root"),
        ("a.tar#empty.jpg", EmptyImage, "a.tar#empty.jpg: has no bytes"),
        ("a.tar#large.jpg", TooManyBytes, "11 bytes, more than --max-image-bytes 10"),
    ],
)
def test_everything_else_is_an_error_of_the_row(
    directory: Path, path: str, error: type[FetchError], message: str
) -> None:
    before = len(os.listdir("/proc/self/fd"))
    files = ImageFiles([directory], 10)
    for use in (files.read, files.check):
        with pytest.raises(error, match=message):
            use(FileImage(path))
    assert len(os.listdir("/proc/self/fd")) <= before


def test_another_root_may_hold_archives(directory: Path) -> None:
    assert ImageFiles([directory, directory.parent], 10).read(FileImage("../secret.tar#cat.jpg")) == b"secret"


def test_a_known_header_is_read_without_an_index_and_only_if_it_is_still_there(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open(directory / "a.tar", "rb") as file:
        members = list(TarHeaders(file.fileno(), (directory / "a.tar").stat().st_size).members())
    monkeypatch.setattr(image_files, "TarIndex", None)
    first, last = (member.header for member in members if member.name == "twice.jpg")
    assert [read(directory, "a.tar#twice.jpg", header) for header in (first, last)] == [b"first", b"last"]
    assert read(directory, "b.tar#cat.jpg", 0) == b"member"
    for header in (0, first - 512, first + 1, 10**9):
        with pytest.raises(MissingFile, match="has changed since the manifest was read"):
            read(directory, "a.tar#twice.jpg", header)


def test_a_damaged_archive_has_the_members_before_the_damage(directory: Path) -> None:
    names = [f"{number}.jpg" for number in range(9)]
    path = write_tar(directory / "c.tar", [(name, name.encode()) for name in names])
    with open(path, "rb") as file:
        cut = [member.start for member in TarHeaders(file.fileno(), path.stat().st_size).members()][5] + 2
    os.truncate(path, cut)
    assert [read(directory, f"c.tar#{name}") for name in names[:5]] == [name.encode() for name in names[:5]]
    for name in names[5:]:
        with pytest.raises(MissingFile, match=rf"no member '{name}'; the archive ends at byte .* member '5.jpg'"):
            read(directory, f"c.tar#{name}")


@pytest.mark.parametrize(("mode", "name"), [("w:gz", "gzip"), ("w:bz2", "bzip2"), ("w:xz", "xz")])
def test_a_compressed_archive_is_an_error_that_says_so(directory: Path, mode: str, name: str) -> None:
    for path in ("d.tar", "d.tar.gz", "d.tgz"):
        with tarfile.open(directory / path, mode) as tar:  # type: ignore[call-overload]
            tar.addfile(tarfile.TarInfo("cat.jpg"))
        with pytest.raises(MissingFile, match=f"compressed with {name}; only uncompressed"):
            read(directory, f"{path}#cat.jpg")


def test_an_archive_that_is_replaced_is_read_anew(directory: Path) -> None:
    files = ImageFiles([directory], 10)
    image = FileImage("a.tar#cat.jpg")
    assert files.read(image) == b"cat"
    write_tar(directory / "new.tar", [("dog.jpg", b"dog"), ("cat.jpg", b"new")]).rename(directory / "a.tar")
    assert files.read(image) == b"new"


def test_headers_are_read_once_and_indexes_are_bounded(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []

    class CountedIndex(image_files.TarIndex):
        def __init__(self, fd: int, size: int) -> None:
            super().__init__(fd, size)
            made.append(len(self))

    monkeypatch.setattr(image_files, "TarIndex", CountedIndex)
    monkeypatch.setattr(image_files, "MAX_MEMBERS", 200)
    for number in range(4):
        write_tar(directory / f"n{number}.tar", [(f"{at}.jpg", b"x") for at in range(30)])
    files = ImageFiles([directory], 10)

    def read_all(*archives: int) -> None:
        for at in range(30):
            for number in archives:
                assert files.read(FileImage(f"n{number}.tar#{at}.jpg")) == b"x"

    read_all(0, 1)
    assert made == [30, 30]
    read_all(2)
    read_all(1)
    assert made == [30, 30, 30]
    read_all(0)
    assert made == [30, 30, 30, 30]


def test_an_archive_with_too_many_members_says_so(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_files, "MAX_MEMBERS", 3)
    write_tar(directory / "many.tar", [(f"{at}.jpg", b"x") for at in range(9)])
    assert read(directory, "many.tar#2.jpg") == b"x"
    with pytest.raises(MissingFile, match="has more than 3 members"):
        read(directory, "many.tar#3.jpg")


def test_names_with_the_same_hash_are_told_apart(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_files, "hash", lambda name: 1, raising=False)
    assert read(directory, "a.tar#cat.jpg") == b"cat"
    assert read(directory, "a.tar#twice.jpg") == b"last"
    with pytest.raises(MissingFile):
        read(directory, "a.tar#none.jpg")
