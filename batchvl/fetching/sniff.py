"""What bytes look like: the format of an image, and guesses about what cannot be decoded, for error messages."""

from __future__ import annotations

_MAGIC = (
    (b"%PDF", "a PDF document"),
    (b"PK\x03\x04", "a ZIP archive"),
    (b"\x1f\x8b", "gzip data"),
    (b"\x28\xb5\x2f\xfd", "zstd data"),
    (b"8BPS", "a Photoshop file"),
    (b"\0\0\1\0", "an icon (ICO)"),
    (b"\xff\x0a", "a JPEG XL image"),
    (b"\0\0\0\x0cJXL ", "a JPEG XL image"),
    (b"\x1aE\xdf\xa3", "a WebM or Matroska video"),
    (b"version https://git-lfs", "a Git LFS pointer, not the file itself (run: git lfs pull)"),
)
_SUFFIXES = (
    (b"\xff\xd8\xff", ".jpg"),
    (b"\0\0\0\x0cjP  ", ".jp2"),
    (b"\xff\x4f\xff\x51", ".j2k"),
    (b"\x89PNG\r\n\x1a\n", ".png"),
    (b"GIF8", ".gif"),
    (b"BM", ".bmp"),
    *((magic, ".tif") for magic in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")),
    *((magic, ".pnm") for magic in (b"P1", b"P2", b"P3", b"P4", b"P5", b"P6", b"Pf")),
)
"""How images begin, and the suffix of their files."""


def is_image(data: bytes) -> bool:
    """Return whether the bytes begin like an image in a format that batchvl reads."""
    return suffix_of(data) is not None


def suffix_of(data: bytes | memoryview) -> str | None:
    """Return the suffix for the name of an image's file, by its format; None if batchvl does not read it.

    >>> suffix_of(b"GIF89a"), suffix_of(b"RIFF....WEBPVP8 ")
    ('.gif', '.webp')
    """
    head = bytes(data[:16])
    if head[4:12] in (b"ftypavif", b"ftypavis"):
        return ".avif"
    if (head[:4], head[8:12]) == (b"RIFF", b"WEBP"):
        return ".webp"
    return next((suffix for magic, suffix in _SUFFIXES if head.startswith(magic)), None)


def ends_early(data: bytes) -> bool:
    """Return whether an image lacks its end marker, or is shorter than its header says."""
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
    end = 0
    if data[4:8] in (b"ftyp", b"jP  "):  # boxes: AVIF, JPEG 2000
        while (size := int.from_bytes(data[end : end + 4], "big")) > 0:
            end += size
    return end > len(data)


def describe(data: bytes) -> str:
    """Return in a few words what the bytes look like, without any of them: they may be secret.

    >>> describe(b"<!DOCTYPE html><title>Not found</title>")
    'an HTML page'
    >>> describe(bytes([1, 2, 3]))
    'bytes of an unknown format'
    """
    if not data.strip(b"\0"):
        return f"{len(data):,} zero bytes" if data else "no bytes at all"
    for magic, name in _MAGIC:
        if data.startswith(magic):
            return name
    if data[4:8] == b"ftyp":
        is_heif = data[8:12] in (b"heic", b"heix", b"hevc", b"mif1", b"msf1")
        return "a HEIC image, which Pillow does not read" if is_heif else "a video (MP4)"
    text = data[:1024].removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if text.startswith(b"<svg") or (text.startswith(b"<?xml") and b"<svg" in text):
        return "an SVG drawing, which has no pixels"
    if text.startswith((b"<!doctype html", b"<html", b"<head", b"<body")) or b"<html" in text:
        return "an HTML page"
    if text.startswith(b"<"):
        return "XML"
    if text.startswith((b"{", b"[")):
        return "JSON"
    if all(32 <= byte < 127 or byte in b"\t\r\n" for byte in data[:24]):
        return "text"
    return "bytes of an unknown format"
