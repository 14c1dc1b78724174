"""Reading of image files, and only of those in the directories that a manifest may read."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from batchvl.errors import EmptyImage, ForbiddenPath, MissingFile, TooManyBytes
from batchvl.images.files import check_beneath, open_beneath


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    (tmp_path / "in" / "sub").mkdir(parents=True)
    (tmp_path / "in" / "cat").write_bytes(b"cat")
    (tmp_path / "in" / "sub" / "dog").write_bytes(b"dog")
    (tmp_path / "in" / "empty").touch()
    (tmp_path / "in" / "inside").symlink_to("sub/dog")
    (tmp_path / "in" / "outside").symlink_to("../secret")
    (tmp_path / "in" / "up").symlink_to("..")
    (tmp_path / "in" / "loop").symlink_to("loop")
    (tmp_path / "in" / "dangling").symlink_to("nowhere")
    (tmp_path / "secret").write_bytes(b"secret")
    (tmp_path / "in-not").mkdir()
    (tmp_path / "in-not" / "x").write_bytes(b"x")
    os.mkfifo(tmp_path / "in" / "pipe")
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(tmp_path / "in" / "socket"))
    return tmp_path / "in"


@pytest.mark.parametrize(
    ("path", "data"),
    [("cat", b"cat"), ("sub/../cat", b"cat"), ("inside", b"dog"), ("up/in/cat", b"cat"), ("./sub//dog", b"dog")],
)
def test_files_below_a_root_are_read(directory: Path, path: str, data: bytes) -> None:
    assert open_beneath(path, [directory], 3) == data
    assert open_beneath(str(directory / path), [directory], 3) == data


@pytest.mark.parametrize("path", ["../secret", "outside", "up/secret", "/etc/passwd", "../in-not/x", "..", "/dev/null"])
def test_files_outside_the_roots_are_forbidden(directory: Path, path: str) -> None:
    with pytest.raises(ForbiddenPath, match="--image-root"):
        open_beneath(path, [directory], 100)


def test_there_may_be_several_roots_and_roots_may_be_links(directory: Path, tmp_path: Path) -> None:
    assert open_beneath("../secret", [directory, tmp_path], 100) == b"secret"
    assert open_beneath("outside", [directory, tmp_path], 100) == b"secret"
    (tmp_path / "link").symlink_to("in")
    assert open_beneath("cat", [tmp_path / "link"], 100) == b"cat"


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("nothing", "No such file"),
        ("cat/x", "Not a directory"),
        ("loop", "Too many levels"),
        ("dangling", "No such"),
        ("pipe", "is a pipe"),
        ("socket", "is a socket"),
        ("sub", "is a directory"),
        ("", "is a directory"),
        ("a\0b", "null"),
        ("x" * 300, "too long"),
    ],
)
def test_paths_that_are_not_files(directory: Path, path: str, message: str) -> None:
    with pytest.raises(MissingFile, match=message):
        open_beneath(path, [directory], 100)


def test_empty_and_too_large_files_are_errors(directory: Path) -> None:
    with pytest.raises(TooManyBytes, match="3 bytes, more than --max-image-bytes 2"):
        open_beneath("cat", [directory], 2)
    with pytest.raises(EmptyImage):
        open_beneath("empty", [directory], 2)


def test_no_descriptor_is_left_open(directory: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for path in ("cat", "empty", "pipe", "outside", "nothing"):
        try:
            open_beneath(path, [directory], 100)
        except (EmptyImage, MissingFile, ForbiddenPath):
            pass
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize(
    "path",
    ["cat", "inside", "empty", "outside", "../secret", "nothing", "dangling", "loop", "pipe", "sub", "a\0b", "sub/dog"],
)
def test_checking_a_path_raises_what_opening_it_raises(directory: Path, path: str) -> None:
    (directory / "sub" / "dog").write_bytes(b"a large dog")
    outcomes: list[object] = []
    for read in (open_beneath, check_beneath):
        try:
            read(path, [directory], 5)
        except (EmptyImage, MissingFile, ForbiddenPath, TooManyBytes) as error:
            outcomes.append((type(error), str(error)))
        else:
            outcomes.append(None)
    assert outcomes[0] == outcomes[1]
