"""The result of a row: the record, its msgpack encoding for the journal, and the output's columns."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from typing import Any, Literal, NamedTuple

import msgspec
import pyarrow as pa

from ..errors import OptionError
from ..types import Failure, Image
from .codec import pack, unpack

logger = logging.getLogger(__name__)

IdType = Literal["int64", "string"] | None
Status = Literal["ok", "failed"]


class Record(msgspec.Struct, omit_defaults=True):
    """One row of the output. Field names are part of the journal's format."""

    row: int
    status: Status
    id: int | str | None = None
    response: str | None = None
    """The response; with several turns, the last one."""
    responses: list[str] | None = None
    """All responses, only for rows with several turns."""
    finish_reason: str | None = None
    input_tokens: int | None = None
    output_tokens: int | None = None
    images: list[Image] = msgspec.field(default_factory=list)
    error: Failure | None = None
    attempts: int = 1
    seconds: float = 0.0
    kept: dict[str, Any] = msgspec.field(default_factory=dict)
    """Kept columns, as the Python values that Arrow converts them to."""


class Counts(msgspec.Struct):
    """Numbers of rows, by outcome."""

    ok: int = 0
    failed: dict[str, int] = msgspec.field(default_factory=dict)
    """Failed rows by error code."""

    @property
    def rows(self) -> int:
        """Number of all rows."""
        return self.ok + self.failures

    @property
    def failures(self) -> int:
        """Number of failed rows."""
        return sum(self.failed.values())

    def add(self, other: Counts) -> None:
        """Add other counts to these."""
        self.ok += other.ok
        for code, rows in other.failed.items():
            self.failed[code] = self.failed.get(code, 0) + rows


class Column(NamedTuple):
    """A column of the output: its Arrow type and its description."""

    type: pa.DataType
    help: str


_IMAGE = pa.struct(
    [
        ("source", pa.string()),
        ("sha256", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("bytes", pa.int64()),
    ]
)
_ERROR = pa.struct([("code", pa.string()), ("stage", pa.string()), ("message", pa.string()), ("retryable", pa.bool_())])

COLUMNS: dict[str, Column] = {
    "row": Column(pa.int64(), "Row number in the manifest, from 0; identifies the row."),
    "id": Column(pa.string(), "Id from the manifest, int64 or string as there."),
    "status": Column(pa.string(), "'ok' or 'failed'."),
    "response": Column(pa.string(), "Response of the model; with several turns, the last one. Null if the row failed."),
    "responses": Column(pa.list_(pa.string()), "All responses, one per turn; null for rows with one turn."),
    "finish_reason": Column(pa.string(), "'stop', or 'length' if the response was cut at the token limit."),
    "input_tokens": Column(pa.int64(), "Tokens of prompts and images, summed over the turns."),
    "output_tokens": Column(pa.int64(), "Tokens of the responses, summed over the turns."),
    "images": Column(pa.list_(_IMAGE), "For each image: source, sha256, width, height (pixels), bytes (encoded)."),
    "error": Column(
        _ERROR, "Why the row failed: code, stage, message, and whether a retry may help; null if it is ok."
    ),
    "attempts": Column(pa.int32(), "Number of times the row was attempted."),
    "seconds": Column(pa.float64(), "Time from the row's first stage to its result."),
}


def schema(id_type: IdType, kept: pa.Schema | None = None) -> pa.Schema:
    """Return the output's schema: `COLUMNS`, then the kept columns with the manifest's types.

    Args:
        id_type: Type of the manifest's ids; None (no ids) results in a column of strings, all null.
        kept: The kept columns.

    Raises:
        OptionError: a kept column has the name of an output column.

    >>> schema("int64", pa.schema([("site", pa.string())])).names[:2]
    ['row', 'id']
    """
    fields = [pa.field(name, column.type) for name, column in COLUMNS.items()]
    if id_type == "int64":
        fields[1] = pa.field("id", pa.int64())
    for field in kept if kept is not None else ():
        if field.name in COLUMNS:
            raise OptionError(
                f"--keep {field.name}: the output already has a column of this name: rename the manifest's column, or "
                f"omit it and join it from the manifest by row number"
            )
        # Dictionaries differ between parts, which readers of many parts handle badly; Parquet compresses both well.
        kind = field.type.value_type if pa.types.is_dictionary(field.type) else field.type
        fields.append(pa.field(field.name, kind))
    return pa.schema(fields)


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Record, ext_hook=unpack)


def encode(record: Record) -> bytes:
    """Return the record as msgpack. Lone surrogates, which UTF-8 cannot represent, become U+FFFD.

    Raises:
        TypeError: a kept value has a type that Arrow never returns.
    """
    if record.kept and (packed := pack(record.kept)) is not record.kept:
        record = msgspec.structs.replace(record, kept=packed)
    try:
        return _encoder.encode(record)
    except UnicodeEncodeError:
        return _encoder.encode(_replace_surrogates(record))


def decode(data: bytes | memoryview) -> Record:
    """Return the record that `encode` encoded. Raises ValueError for other bytes."""
    return _decoder.decode(data)


def _replace_surrogates(value: Any) -> Any:
    if isinstance(value, str):
        return value.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    if isinstance(value, list):
        return [_replace_surrogates(item) for item in value]
    if isinstance(value, dict):
        return {_replace_surrogates(name): _replace_surrogates(item) for name, item in value.items()}
    if isinstance(value, msgspec.Struct):
        return type(value)(**{name: _replace_surrogates(getattr(value, name)) for name in value.__struct_fields__})
    return value


def to_batch(records: Sequence[Record], schema: pa.Schema) -> pa.RecordBatch:
    """Return the records as an Arrow batch with the output's schema, in the given order."""
    columns: list[pa.Array] = []
    for field in schema:
        if field.name == "images":
            columns.append(_images([record.images for record in records]))
        elif field.name == "error":
            columns.append(
                pa.array(
                    [error and msgspec.structs.asdict(error) for error in (record.error for record in records)], _ERROR
                )
            )
        elif field.name == "id" and pa.types.is_string(field.type):
            columns.append(
                pa.array([None if id is None else str(id) for id in (record.id for record in records)], field.type)
            )
        elif field.name in COLUMNS:
            columns.append(to_array(field, [getattr(record, field.name) for record in records]))
        else:
            columns.append(to_array(field, [record.kept.get(field.name) for record in records]))
    return pa.RecordBatch.from_arrays(columns, schema=schema)


def _images(image_lists: list[list[Image]]) -> pa.Array:
    # Column by column: a third of the time that one dictionary per image takes.
    offsets = [0]
    for images in image_lists:
        offsets.append(offsets[-1] + len(images))
    flat = [image for images in image_lists for image in images]
    children = [pa.array([getattr(image, field.name) for image in flat], field.type) for field in _IMAGE]
    return pa.ListArray.from_arrays(
        pa.array(offsets, pa.int32()), pa.StructArray.from_arrays(children, fields=list(_IMAGE))
    )


def to_array(field: pa.Field, values: list[Any]) -> pa.Array:
    """Return the values of a column; null in place of one that is not of its type."""
    try:
        return pa.array(values, field.type)
    except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError):
        # The manifest's reader checks the types. If a wrong value slips through, the response must not be lost with it.
        fitting = [value if _fits(value, field.type) else None for value in values]
        count = _count_replaced(values, fitting)
        logger.warning("column %s: %d values are not of type %s: written as null", field.name, count, field.type)
        return pa.array(fitting, field.type)


def _fits(value: Any, kind: pa.DataType) -> bool:
    try:
        pa.array([value], kind)
    except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError):
        return False
    return True


def _count_replaced(values: Iterable[Any], fitting: Iterable[Any]) -> int:
    return sum(new is None and old is not None for old, new in zip(values, fitting, strict=True))
