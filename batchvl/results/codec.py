"""Lossless encoding of kept columns in the journal: any value that Arrow returns, as msgpack.

msgpack has no dates, times, decimals or tuples (Arrow's map entries), and msgspec would turn some of them into strings.
Each of these types is encoded as an extension with a number of its own; all other values are unchanged.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from typing import Any
from uuid import UUID

from msgspec.msgpack import Decoder, Encoder, Ext

_NATIVE = frozenset({type(None), bool, float, str, bytes})
_encode = Encoder().encode

# The numbers are part of the journal's format: never change or reuse one.
_INT, _DATETIME, _DATE, _TIME, _TIMEDELTA, _DECIMAL, _TUPLE, _UUID = range(1, 9)


def pack(value: Any) -> Any:
    """Return the value in a form that msgpack can represent: the same object if nothing needs to change.

    Raises:
        TypeError: the value has a type that Arrow never returns.

    >>> pack("a"), pack([1, None])
    ('a', [1, None])
    """
    kind = type(value)
    if kind in _NATIVE:
        return value
    if kind is int:
        return value if -(2**63) <= value < 2**64 else Ext(_INT, str(value).encode())
    if kind is list:
        return _keep_identity(value, [pack(item) for item in value])
    if kind is dict:
        return _keep_identity(value, {name: pack(item) for name, item in value.items()})
    return _pack_extension(value)


def _keep_identity(value: Any, packed: Any) -> Any:
    old, new = (value.values(), packed.values()) if isinstance(value, dict) else (value, packed)
    return value if all(a is b for a, b in zip(old, new, strict=True)) else packed


def _pack_extension(value: Any) -> Any:
    # With pandas installed, Arrow returns pandas types for nanoseconds. Arrow accepts their integer value back.
    if hasattr(value, "nanosecond") or hasattr(value, "nanoseconds"):
        return int(value.value)
    if isinstance(value, datetime):
        return Ext(_DATETIME, value.isoformat().encode())
    if isinstance(value, date):
        return Ext(_DATE, value.isoformat().encode())
    if isinstance(value, time):
        return Ext(_TIME, value.isoformat().encode())
    if isinstance(value, timedelta):
        return Ext(_TIMEDELTA, _encode((value.days, value.seconds, value.microseconds)))
    if isinstance(value, Decimal):
        return Ext(_DECIMAL, str(value).encode())
    if isinstance(value, tuple):
        return Ext(_TUPLE, _encode([pack(item) for item in value]))
    if isinstance(value, UUID):
        return Ext(_UUID, value.bytes)
    if isinstance(value, bytearray | memoryview):
        return bytes(value)
    raise TypeError(f"a kept column holds a {type(value).__name__}, which the journal cannot store: {value!r:.100}")


def unpack(code: int, data: memoryview) -> Any:
    """Return the value of an extension (msgspec's `ext_hook`). Raises ValueError for an unknown one."""
    if code not in _UNPACK:
        raise ValueError(f"unknown extension {code} in a journal")
    return _UNPACK[code](bytes(data))


_decode = Decoder(ext_hook=unpack).decode
_UNPACK: dict[int, Callable[[bytes], Any]] = {
    _INT: lambda data: int(data),
    _DATETIME: lambda data: datetime.fromisoformat(data.decode()),
    _DATE: lambda data: date.fromisoformat(data.decode()),
    _TIME: lambda data: time.fromisoformat(data.decode()),
    _TIMEDELTA: lambda data: timedelta(*_decode(data)),
    _DECIMAL: lambda data: Decimal(data.decode()),
    _TUPLE: lambda data: tuple(_decode(data)),
    _UUID: lambda data: UUID(bytes=data),
}
