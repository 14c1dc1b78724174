"""Hand-made ELF files: shared libraries that contain nothing but the list of libraries that they need."""

from __future__ import annotations

import struct
from collections.abc import Iterable
from pathlib import Path


def library(path: Path, needed: Iterable[str] = (), runpath: str = "") -> Path:
    """Write a shared library for 64-bit x86 that the loader accepts if it finds the needed libraries.

    The file has no sections: headers, the dynamic segment, one null symbol, a hash table and the strings (elf(5)).

    Args:
        path: The file to write.
        needed: Names of the libraries that it needs.
        runpath: Directories in which they are searched first, separated by colons.
    """
    strings, names = b"\0", []
    for text in (*needed, runpath):
        names.append(len(strings))
        strings += text.encode() + b"\0"
    entries = [(1, name) for name in names[:-1]] + [(29, names[-1])] * bool(runpath)  # DT_NEEDED, DT_RUNPATH
    headers, count = 64 + 2 * 56, len(entries) + 6
    symbols = headers + 16 * count
    hashes = symbols + 24
    strings_at = hashes + 16
    # DT_HASH, DT_STRTAB, DT_SYMTAB, DT_STRSZ, DT_SYMENT, DT_NULL
    tables = [(4, hashes), (5, strings_at), (6, symbols), (10, len(strings)), (11, 24), (0, 0)]
    size = strings_at + len(strings)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(
        b"\x7fELF\x02\x01\x01".ljust(16, b"\0")
        + struct.pack("<HHIQQQIHHHHHH", 3, 62, 1, 0, 64, 0, 0, 64, 56, 2, 64, 0, 0)
        + struct.pack("<IIQQQQQQ", 1, 6, 0, 0, 0, size, size, 4096)  # PT_LOAD
        + struct.pack("<IIQQQQQQ", 2, 6, headers, headers, headers, 16 * count, 16 * count, 8)  # PT_DYNAMIC
        + b"".join(struct.pack("<qQ", *entry) for entry in entries + tables)
        + bytes(24)
        + struct.pack("<IIII", 1, 1, 0, 0)
        + strings
    )
    return path
