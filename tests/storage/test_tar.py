"""Headers of tar archives, as tarfile and GNU tar write them, and of archives that are damaged on purpose."""

from __future__ import annotations

import os
import subprocess
import tarfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from batchvl.storage.tar import MAX_EXTENSION, Member, TarError, TarHeaders
from tests.fuzzing import examples
from tests.manifest.tars import special, write_tar

NAMES = ["a.jpg", "d/" * 60 + "deep.jpg", "x" * 300 + ".jpg", "é\u0301.jpg", "/etc/passwd", "../up.jpg", "./here.jpg"]


def members_of(path: Path, start: int = 0) -> list[Member]:
    with open(path, "rb") as file:
        return list(TarHeaders(file.fileno(), path.stat().st_size).members(start))


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_are_where_tarfile_finds_them(tmp_path: Path, format: int) -> None:
    names = [name for name in NAMES if format != tarfile.USTAR_FORMAT or len(name) < 200]
    contents = [(name, os.urandom(511 + number)) for number, name in enumerate(names)]
    path = write_tar(tmp_path / "a.tar", contents, format=format)
    with tarfile.open(path) as tar:
        expected = [(info.name, info.offset, info.offset_data, info.size) for info in tar]
    found = members_of(path)
    assert [(m.name, m.header, m.start, m.size) for m in found] == expected
    assert [name for name, *_ in expected] == names
    data = path.read_bytes()
    assert [data[m.start : m.start + m.size] for m in found] == [content for _, content in contents]
    for at, member in enumerate(found):
        assert members_of(path, member.header) == found[at:]


def test_members_that_are_not_files_have_their_kind(tmp_path: Path) -> None:
    kinds = [
        (special("link", tarfile.SYMTYPE, "/etc/passwd"), "link"),
        (special("hard", tarfile.LNKTYPE, "a.jpg"), "link"),
        (special("directory", tarfile.DIRTYPE), "directory"),
        (special("null", tarfile.CHRTYPE), "special file"),
        (special("pipe", tarfile.FIFOTYPE), "special file"),
        (special("unknown", b"Z"), "special file"),
        (special("old/", tarfile.AREGTYPE), "directory"),
    ]
    path = write_tar(tmp_path / "a.tar", [(info, b"") for info, _ in kinds], format=tarfile.GNU_FORMAT)
    assert [member.kind for member in members_of(path)] == [kind for _, kind in kinds]


@pytest.mark.parametrize("format", ["gnu", "pax"])
def test_sparse_files_are_recognised_and_passed_over(tmp_path: Path, format: str) -> None:
    with open(tmp_path / "sparse.jpg", "wb") as file:
        for number in range(12):  # more pieces than fit into one header
            file.seek(number * 2**20)
            file.write(b"data")
    (tmp_path / "z.jpg").write_bytes(b"z")
    command = ["tar", "-C", str(tmp_path), f"--format={format}", "-S", "-cf", str(tmp_path / "a.tar")]
    subprocess.run([*command, "sparse.jpg", "z.jpg"], check=True)
    sparse, after = members_of(tmp_path / "a.tar")
    assert (sparse.name, sparse.kind) == ("sparse.jpg", "sparse file")
    assert (after.name, after.kind, after.size) == ("z.jpg", "file", 1)


def test_a_link_has_no_contents_whatever_its_size(tmp_path: Path) -> None:
    link = special("link", tarfile.LNKTYPE, "a")
    link.size = 700
    (tmp_path / "a.tar").write_bytes(link.tobuf() + tarfile.TarInfo("a").tobuf() + bytes(1024))
    assert [(member.name, member.size) for member in members_of(tmp_path / "a.tar")] == [("link", 0), ("a", 0)]


def test_a_size_beyond_octal_digits(tmp_path: Path) -> None:
    """A member of 9 GiB, a hole in the file, is passed over without reading it."""
    for format in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        big, small = tarfile.TarInfo("big"), tarfile.TarInfo("small")
        big.size = 9 * 2**30
        path = tmp_path / "a.tar"
        with open(path, "wb") as file:
            file.write(big.tobuf(format))
            file.seek(big.size, os.SEEK_CUR)
            file.write(small.tobuf(format) + bytes(1024))
        assert [(member.name, member.size) for member in members_of(path)] == [("big", 9 * 2**30), ("small", 0)]


def test_an_archive_may_lack_its_end_marker(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", [("a", b"a" * 512)])
    end = members_of(path)[-1].after
    os.truncate(path, end)
    assert [member.name for member in members_of(path)] == ["a"]


def damaged(tmp_path: Path, cut: int | None = None, **changes: bytes) -> Path:
    """Write an archive with the members 'a' and 'b', cut it off, and change bytes at the positions of `at…`."""
    path = write_tar(tmp_path / "a.tar", [("a", b"a"), ("b", b"b" * 600)], format=tarfile.USTAR_FORMAT)
    data = bytearray(path.read_bytes()[:cut])
    for at, change in changes.items():
        start = int(at.removeprefix("at"))
        data[start : start + len(change)] = change
    path.write_bytes(data)
    return path


@pytest.mark.parametrize(
    ("cut", "changes", "before", "message"),
    [
        (0, {}, [], "has 0 bytes, expected a tar"),
        (100, {}, [], "ends at byte 100, where more is expected"),
        (1100, {}, ["a"], "ends at byte 1,100, where more is expected"),
        (1600, {}, ["a"], "ends at byte 1,600, in the middle of its member 'b'"),
        (None, {"at1030": b"x"}, ["a"], "is damaged at byte 1,024: not a header: the checksum is wrong"),
        (None, {"at1172": b"9"}, ["a"], "is damaged at byte 1,024: not a header: b'9"),
        (None, {"at0": b"\x1f\x8b"}, [], "is compressed with gzip"),
        (None, {"at0": b"\x28\xb5\x2f\xfd"}, [], "is compressed with zstd"),
        (None, {"at0": b"PK\x03\x04"}, [], "is not a tar archive"),
    ],
)
def test_damage_is_an_error_after_the_members_before(
    tmp_path: Path, cut: int | None, changes: dict[str, bytes], before: list[str], message: str
) -> None:
    path = damaged(tmp_path, cut, **changes)
    with open(path, "rb") as file:
        members = TarHeaders(file.fileno(), path.stat().st_size).members()
        assert [next(members).name for _ in before] == before
        with pytest.raises(TarError, match=message):
            next(members)


def extended(kind: bytes, data: bytes, size: int | None = None) -> bytes:
    """Return an extended header, whose size may be wrong."""
    info = special("extended", kind)
    info.size = len(data) if size is None else size
    return info.tobuf(tarfile.USTAR_FORMAT) + data + bytes(-len(data) % 512)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (extended(b"L", b"", MAX_EXTENSION + 1), "has an extended header of 1,048,577 bytes"),
        (extended(b"x", b"", 8**11 - 1), "has an extended header of"),
        (extended(b"x", b"8 path=a\n"), "a malformed extended header"),
        (extended(b"x", b"99 path=a\n"), "a malformed extended header"),
        (extended(b"x", b"1 path=a\n"), "a malformed extended header"),
        (extended(b"x", b"x path=a\n"), "a malformed extended header"),
        (extended(b"x", b"10 size=-1\n"), "malformed|a size of"),
        (extended(b"x", b"9 size=x\n"), "a size of b'x' bytes"),
        (extended(b"x", b"29 size=99999999999999999999\n"), "in the middle of its member"),
        (extended(b"x", b"10 path=a\n"), "ends at byte 1,024, after an extended header"),
    ],
)
def test_a_bad_extended_header(tmp_path: Path, header: bytes, message: str) -> None:
    last = b"" if "after an extended" in message else tarfile.TarInfo("a").tobuf(tarfile.USTAR_FORMAT)
    (tmp_path / "a.tar").write_bytes(header + last + bytes(1024))
    with pytest.raises(TarError, match=message):
        members_of(tmp_path / "a.tar")


def test_a_large_extended_header_of_many_records_is_read_quickly(tmp_path: Path) -> None:
    """If each record cost a copy of the rest, this would take an hour."""
    data = b"6 a=b\n" * (MAX_EXTENSION // 6)
    (tmp_path / "a.tar").write_bytes(extended(b"x", data) + tarfile.TarInfo("a").tobuf() + bytes(1024))
    assert [member.name for member in members_of(tmp_path / "a.tar")] == ["a"]


@given(data=st.data())
@settings(max_examples=examples(200), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_bytes_lead_to_another_error_or_beyond_the_archive(tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / "fuzzed.tar"
    if not (tmp_path / "whole.tar").exists():
        write_tar(tmp_path / "whole.tar", [(name, name.encode() * 9) for name in NAMES])
    whole = bytearray((tmp_path / "whole.tar").read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(whole) - 1))
        whole[at : at + 8] = data.draw(st.binary(min_size=1, max_size=8))
    path.write_bytes(whole[: data.draw(st.integers(0, len(whole)) | st.just(len(whole)))])
    size = path.stat().st_size
    try:
        found = members_of(path)
    except TarError as error:
        assert len(str(error)) < 300  # noqa: PT017
        return
    assert all(0 <= member.start <= member.start + member.size <= size for member in found)
