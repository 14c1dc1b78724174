"""Which Arrow types the members of JSON objects can have: `JsonTypes`."""

from __future__ import annotations

from types import NoneType
from typing import Any

import pyarrow as pa

from ..errors import ManifestError

MOST_COLUMNS = 1000
JSON = {b"batchvl": b"json"}
"""The metadata of a field whose strings are JSON."""


class _Exact(int):
    """Stands for integers that 64 bits hold and a double does not."""


class _Huge(int):
    """Stands for integers that 64 bits do not hold."""


class JsonTypes:
    """Looks at objects one after the other, and keeps the kinds of values only.

    >>> types = JsonTypes()
    >>> types.add({"score": 1, "tags": ["a"], "meta": {"b": 2}})
    >>> types.add({"score": 0.5, "tags": None})
    >>> [str(field.type) for field in types.schema()]
    ['double', 'list<item: string>', 'string']
    """

    def __init__(self) -> None:
        self._kinds: dict[str, set[type]] = {}
        self._items: dict[str, set[type]] = {}

    def add(self, row: dict[str, Any]) -> None:
        """Looks at an object. Raises ManifestError where all have more than MOST_COLUMNS members between them."""
        for name, value in row.items():
            if (found := self._kinds.get(name)) is None:
                if len(self._kinds) == MOST_COLUMNS:
                    raise ManifestError(
                        f"more than {MOST_COLUMNS:,} columns, {name!r:.80} and others: such rows cannot be joined"
                    )
                found = self._kinds[name] = set()
            kind = type(value)
            if kind is list:
                self._items.setdefault(name, set()).update(map(_kind, value))
            found.add(_kind(value) if kind is int else kind)

    def schema(self) -> pa.Schema:
        """A column for each member, in the order in which they came, nulls and absent ones aside:

        truth values, strings, integers of 64 bits, numbers as doubles, lists of one of these; all others (objects, and
        what is of several kinds) are JSON in strings, and their fields have the metadata JSON.
        """
        fields = []
        for name, kinds in self._kinds.items():
            kinds = kinds - {NoneType}
            found = _scalar(kinds)
            if kinds == {list}:
                item = _scalar(self._items[name] - {NoneType})
                found = item and pa.list_(item)
            fields.append(pa.field(name, found or pa.string(), metadata=None if found else JSON))
        return pa.schema(fields)


def _kind(value: Any) -> type:
    if type(value) is not int:
        return type(value)
    return int if -(2**53) <= value <= 2**53 else _Exact if -(2**63) <= value < 2**63 else _Huge


def _scalar(kinds: set[type]) -> pa.DataType | None:
    """The type of values of these kinds; None where there is none."""
    if kinds <= {str}:
        return pa.string()
    if kinds == {bool}:
        return pa.bool_()
    if kinds <= {int, _Exact}:
        return pa.int64()
    return pa.float64() if kinds <= {int, float} else None
