"""Arrow types of manifest columns, and which of them fit which role."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import pyarrow as pa
from pyarrow import types

from .columns import Columns
from .rows import IdType


def id_type(kind: pa.DataType) -> IdType | None:
    """Return the type of ids in a column of this type; None if all of its values are null."""
    kind = storage_type(kind)
    return None if types.is_null(kind) else "int64" if types.is_integer(kind) else "string"


def storage_type(kind: pa.DataType) -> pa.DataType:
    """Return the type of a column's values, without dictionary or extension."""
    if isinstance(kind, pa.BaseExtensionType):
        kind = kind.storage_type
    return kind.value_type if types.is_dictionary(kind) else kind


def exceeds_python_precision(kind: pa.DataType) -> bool:
    """Return whether values have nanoseconds, which Python's times lack: Arrow raises an error or needs pandas."""
    temporal = types.is_timestamp(kind) or types.is_time64(kind) or types.is_duration(kind)
    return bool(temporal and kind.unit == "ns")


def _is_string(kind: pa.DataType) -> bool:
    return bool(types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind))


def _is_binary(kind: pa.DataType) -> bool:
    tests = (types.is_binary, types.is_large_binary, types.is_fixed_size_binary, types.is_binary_view)
    return any(test(kind) for test in tests)


def is_list(kind: pa.DataType) -> bool:
    """Return whether a column of this type has lists."""
    return bool(types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind))


def _is_prompt(kind: pa.DataType) -> bool:
    return _is_string(kind) or (is_list(kind) and (_is_string(kind.value_type) or types.is_null(kind.value_type)))


def _is_messages(kind: pa.DataType) -> bool:
    return _is_string(kind) or (is_list(kind) and types.is_struct(kind.value_type))


def _is_image(kind: pa.DataType) -> bool:
    if is_list(kind):
        return not is_list(kind.value_type) and (_is_image(kind.value_type) or types.is_null(kind.value_type))
    if types.is_struct(kind):
        return any(field.name in ("bytes", "path") for field in kind)
    return _is_string(kind) or _is_binary(kind)


def _is_id(kind: pa.DataType) -> bool:
    return bool(types.is_integer(kind) or _is_string(kind))


def _is_generation(kind: pa.DataType) -> bool:
    return bool(types.is_struct(kind) or types.is_map(kind) or _is_string(kind))


def _is_template_value(kind: pa.DataType) -> bool:
    return not _is_binary(kind)


class ColumnSpec(NamedTuple):
    """The types that fit a role, the same in words, and the flag that names another column for it."""

    fits: Callable[[pa.DataType], bool]
    wanted: str
    flag: str


_PROMPT = ColumnSpec(_is_prompt, "strings, or lists of strings", "--prompt-column")
_MESSAGES = ColumnSpec(_is_messages, "lists of structs, or JSON in strings", "--messages-column")
_IMAGES = ColumnSpec(_is_image, "strings, binary, {bytes, path}, or lists of these", "--image-column")
_ID = ColumnSpec(_is_id, "integers or strings", "--id-column")
_GENERATION = ColumnSpec(_is_generation, "structs, maps, or JSON in strings", "--generation-column")
_TEMPLATE = ColumnSpec(_is_template_value, "values that can be written as text", "--prompt")


def column_specs(columns: Columns) -> Iterator[tuple[str, ColumnSpec]]:
    """Yield the columns with the types that they may have. Columns of `--keep` may have any."""
    single = (
        (columns.prompt, _PROMPT),
        (columns.messages, _MESSAGES),
        (columns.images, _IMAGES),
        (columns.image, _IMAGES),
        (columns.id, _ID),
        (columns.generation, _GENERATION),
    )
    yield from ((name, spec) for name, spec in single if name is not None)
    yield from ((name, _TEMPLATE) for name in columns.template)
