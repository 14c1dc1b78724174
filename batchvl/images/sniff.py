"""What bytes look like that a decoder cannot use, for the message that tells people so."""

from __future__ import annotations

_MAGIC = (
    (b"%PDF", "a PDF document"),
    (b"PK\x03\x04", "a ZIP archive"),
    (b"\x1f\x8b", "gzip data"),
    (b"\x28\xb5\x2f\xfd", "zstd data"),
    (b"8BPS", "a Photoshop file"),
    (b"\0\0\1\0", "an icon (ICO)"),
    (b"\xff\x0a", "a JPEG XL picture"),
    (b"\0\0\0\x0cJXL ", "a JPEG XL picture"),
    (b"\x1aE\xdf\xa3", "a WebM or Matroska video"),
    (b"version https://git-lfs", "a Git LFS pointer, not the file itself (run: git lfs pull)"),
)
_PICTURES = (
    b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF8", b"BM", b"II*\0", b"MM\0*", b"II+\0", b"MM\0+", b"\0\0\0\x0cjP  ",
    b"\xff\x4f\xff\x51", b"P1", b"P2", b"P3", b"P4", b"P5", b"P6", b"Pf",
)  # fmt: skip


def is_picture(data: bytes) -> bool:
    """Whether the bytes begin as a picture does that batchvl reads."""
    if data.startswith(_PICTURES):
        return True
    return (data[:4], data[8:12]) == (b"RIFF", b"WEBP") or data[4:12] in (b"ftypavif", b"ftypavis")


def ends_early(data: bytes) -> bool:
    """Whether a picture lacks its end by its own account: its end marker, or the length that its header gives."""
    if data.startswith((b"\xff\xd8", b"\xff\x4f")):  # JPEG and JPEG 2000 end with the same marker
        return b"\xff\xd9" not in data[-64:]
    if data.startswith(b"\x89PNG"):
        return b"IEND" not in data[-64:]
    if data.startswith(b"GIF8"):
        return not data.rstrip(b"\0").endswith(b";")
    if data.startswith(b"RIFF"):
        return int.from_bytes(data[4:8], "little") + 8 > len(data)
    if data.startswith(b"BM"):
        return int.from_bytes(data[2:6], "little") > len(data)
    at = 0
    if data[4:8] in (b"ftyp", b"jP  "):  # boxes: AVIF, JPEG 2000
        while (size := int.from_bytes(data[at : at + 4], "big")) > 0:
            at += size
    return at > len(data)


def looks_like(data: bytes) -> str:
    """A few words on what the bytes are.

    >>> looks_like(b"<!DOCTYPE html><title>Not found</title>")
    'an HTML page'
    >>> looks_like(bytes([1, 2, 3]))
    'bytes that begin with 01 02 03'
    """
    if not data.strip(b"\0"):
        return f"{len(data):,} zero bytes" if data else "no bytes at all"
    for magic, name in _MAGIC:
        if data.startswith(magic):
            return name
    if data[4:8] == b"ftyp":
        heif = data[8:12] in (b"heic", b"heix", b"hevc", b"mif1", b"msf1")
        return "a HEIC picture, which Pillow does not read" if heif else "a video (MP4)"
    text = data[:1024].removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if text.startswith(b"<svg") or (text.startswith(b"<?xml") and b"<svg" in text):
        return "an SVG drawing, which is code to be run and not pixels"
    if text.startswith((b"<!doctype html", b"<html", b"<head", b"<body")) or b"<html" in text:
        return "an HTML page"
    if text.startswith(b"<"):
        return "XML"
    if text.startswith((b"{", b"[")):
        return "JSON"
    start = data[:24]
    if all(32 <= byte < 127 or byte in b"\t\r\n" for byte in start):
        return f"text that begins with {start.decode()!r}"
    return f"bytes that begin with {start[:12].hex(' ')}"
