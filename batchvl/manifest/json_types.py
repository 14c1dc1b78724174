"""Arrow types for the members of JSON objects."""

from __future__ import annotations

from types import NoneType
from typing import Any

import pyarrow as pa

from ..errors import ManifestError

MAX_COLUMNS = 1000
JSON = {b"batchvl": b"json"}
"""The metadata of a field whose strings are JSON."""


class _ExactInt(int):
    """The kind of integers that fit 64 bits and that a double cannot represent."""


class _BigInt(int):
    """The kind of integers that do not fit 64 bits."""


class JsonTypes:
    """Infer a schema from objects, one after another. Only the kinds of values are kept.

    >>> types = JsonTypes()
    >>> types.add({"score": 1, "tags": ["a"], "meta": {"b": 2}})
    >>> types.add({"score": 0.5, "tags": None})
    >>> [str(field.type) for field in types.schema()]
    ['double', 'list<item: string>', 'string']
    """

    def __init__(self) -> None:
        self._kinds: dict[str, set[type]] = {}
        self._item_kinds: dict[str, set[type]] = {}

    def add(self, row: dict[str, Any]) -> None:
        """Take an object into account.

        Raises:
            ManifestError: The objects so far have more than MAX_COLUMNS different members.
        """
        for name, value in row.items():
            if (kinds := self._kinds.get(name)) is None:
                if len(self._kinds) == MAX_COLUMNS:
                    raise ManifestError(
                        f"more than {MAX_COLUMNS:,} columns, {name!r:.80} and others: such rows cannot be joined"
                    )
                kinds = self._kinds[name] = set()
            kind = type(value)
            if kind is list:
                self._item_kinds.setdefault(name, set()).update(map(_kind, value))
            kinds.add(_kind(value) if kind is int else kind)

    def schema(self) -> pa.Schema:
        """Return a field for each member, in the order of first appearance. Nulls and absent members do not count.

        Types are booleans, strings, 64-bit integers, doubles, and lists of one of these. All other members (objects,
        and values of several kinds) become JSON in strings: their fields have the metadata JSON.
        """
        fields = []
        for name, kinds in self._kinds.items():
            kinds = kinds - {NoneType}
            type = _scalar_type(kinds)
            if kinds == {list}:
                item_type = _scalar_type(self._item_kinds[name] - {NoneType})
                type = item_type and pa.list_(item_type)
            fields.append(pa.field(name, type or pa.string(), metadata=None if type else JSON))
        return pa.schema(fields)


def _kind(value: Any) -> type:
    if type(value) is not int:
        return type(value)
    return int if -(2**53) <= value <= 2**53 else _ExactInt if -(2**63) <= value < 2**63 else _BigInt


def _scalar_type(kinds: set[type]) -> pa.DataType | None:
    """Return the type that holds values of all these kinds; None if there is none."""
    if kinds <= {str}:
        return pa.string()
    if kinds == {bool}:
        return pa.bool_()
    if kinds <= {int, _ExactInt}:
        return pa.int64()
    return pa.float64() if kinds <= {int, float} else None
