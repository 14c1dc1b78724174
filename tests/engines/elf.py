"""ELF files made by hand: shared libraries that hold nothing but their needs."""

from __future__ import annotations

import struct
from collections.abc import Iterable
from pathlib import Path


def library(path: Path, needed: Iterable[str] = (), runpath: str = "") -> Path:
    """Writes a library for 64-bit x86 that the loader takes, if it finds what the library needs."""
    strings, names = b"\0", []
    for text in (*needed, runpath):
        names.append(len(strings))
        strings += text.encode() + b"\0"
    entries = [(1, name) for name in names[:-1]] + [(29, names[-1])] * bool(runpath)
    headers, count = 64 + 2 * 56, len(entries) + 6
    symbols = headers + 16 * count
    hashes = symbols + 24
    text_at = hashes + 16
    tables = [(4, hashes), (5, text_at), (6, symbols), (10, len(strings)), (11, 24), (0, 0)]
    size = text_at + len(strings)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(
        b"\x7fELF\x02\x01\x01".ljust(16, b"\0")
        + struct.pack("<HHIQQQIHHHHHH", 3, 62, 1, 0, 64, 0, 0, 64, 56, 2, 64, 0, 0)
        + struct.pack("<IIQQQQQQ", 1, 6, 0, 0, 0, size, size, 4096)
        + struct.pack("<IIQQQQQQ", 2, 6, headers, headers, headers, 16 * count, 16 * count, 8)
        + b"".join(struct.pack("<qQ", *entry) for entry in entries + tables)
        + bytes(24)
        + struct.pack("<IIII", 1, 1, 0, 0)
        + strings
    )
    return path
