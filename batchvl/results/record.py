"""One row's result: the record, its msgpack form for the journal, and the output's columns."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from typing import Any, Literal, NamedTuple

import msgspec
import pyarrow as pa

from ..errors import OptionError
from ..types import Failure, Image
from .codec import pack, unpack

log = logging.getLogger(__name__)

IdType = Literal["int64", "string"] | None
Status = Literal["ok", "failed"]


class Record(msgspec.Struct, omit_defaults=True):
    """One row of the output."""

    row: int
    status: Status
    id: int | str | None = None
    response: str | None = None
    """The answer; with several turns, the last one."""
    responses: list[str] | None = None
    """All answers, only for rows with several turns."""
    finish_reason: str | None = None
    input_tokens: int | None = None
    output_tokens: int | None = None
    images: list[Image] = msgspec.field(default_factory=list)
    error: Failure | None = None
    attempts: int = 1
    seconds: float = 0.0
    kept: dict[str, Any] = msgspec.field(default_factory=dict)
    """Kept columns, as the Python values that Arrow makes of them."""


class Counts(msgspec.Struct):
    """How many rows, by result."""

    ok: int = 0
    failed: dict[str, int] = msgspec.field(default_factory=dict)
    """By error code."""

    @property
    def rows(self) -> int:
        """All of them."""
        return self.ok + self.failures

    @property
    def failures(self) -> int:
        """The failed ones, whatever the code."""
        return sum(self.failed.values())

    def add(self, other: Counts) -> None:
        """Adds another count to this one."""
        self.ok += other.ok
        for code, rows in other.failed.items():
            self.failed[code] = self.failed.get(code, 0) + rows


class Column(NamedTuple):
    """A column of the output: its Arrow type and the line that explains it."""

    type: pa.DataType
    help: str


_IMAGE = pa.struct([
    ("source", pa.string()), ("sha256", pa.string()), ("width", pa.int32()), ("height", pa.int32()),
    ("bytes", pa.int64()),
])  # fmt: skip
_ERROR = pa.struct([("code", pa.string()), ("stage", pa.string()), ("message", pa.string()), ("retryable", pa.bool_())])

COLUMNS: dict[str, Column] = {
    "row": Column(pa.int64(), "The row's number in the manifest, from 0: its identity."),
    "id": Column(pa.string(), "The manifest's id, of the manifest's type (int64 or string)."),
    "status": Column(pa.string(), "'ok' or 'failed'."),
    "response": Column(pa.string(), "The answer; with several turns, the last one. Null where the row failed."),
    "responses": Column(pa.list_(pa.string()), "All answers, one a turn; null for rows with one turn."),
    "finish_reason": Column(pa.string(), "'stop', or 'length' where the answer was cut at the most tokens allowed."),
    "input_tokens": Column(pa.int64(), "Tokens of prompt and pictures, summed over the turns."),
    "output_tokens": Column(pa.int64(), "Tokens of the answers, summed over the turns."),
    "images": Column(pa.list_(_IMAGE), "Per picture: source, sha256, width, height (pixels), bytes (encoded)."),
    "error": Column(_ERROR, "Why the row failed: code, stage, message, and whether a retry may help; else null."),
    "attempts": Column(pa.int32(), "How many times the row was tried."),
    "seconds": Column(pa.float64(), "From the row's first stage to its result."),
}


def schema(id_type: IdType, kept: pa.Schema | None = None) -> pa.Schema:
    """The output's schema: the columns of `COLUMNS`, then the kept ones with the manifest's own types.

    id_type: the type of the manifest's ids; None (no ids) makes a column of strings, all null.
    Raises OptionError where a kept column has the name of an output column.

    >>> schema("int64", pa.schema([("site", pa.string())])).names[:2]
    ['row', 'id']
    """
    fields = [pa.field(name, column.type) for name, column in COLUMNS.items()]
    if id_type == "int64":
        fields[1] = pa.field("id", pa.int64())
    for field in kept if kept is not None else ():
        if field.name in COLUMNS:
            raise OptionError(
                f"--keep {field.name}: the output has a column of this name; rename the manifest's column, or leave "
                f"it out and join it from the manifest by the row's number"
            )
        # Dictionaries differ from part to part, which readers of many parts handle badly; Parquet compresses either.
        kind = field.type.value_type if pa.types.is_dictionary(field.type) else field.type
        fields.append(pa.field(field.name, kind))
    return pa.schema(fields)


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Record, ext_hook=unpack)


def encode(record: Record) -> bytes:
    """The record as the journal holds it; halves of surrogate pairs, which UTF-8 cannot hold, become U+FFFD.

    Raises TypeError where a kept value is of a type that Arrow never hands out.
    """
    if record.kept and (packed := pack(record.kept)) is not record.kept:
        record = msgspec.structs.replace(record, kept=packed)
    try:
        return _encoder.encode(record)
    except UnicodeEncodeError:
        return _encoder.encode(_clean(record))


def decode(data: bytes | memoryview) -> Record:
    """The record back from `encode`. Raises ValueError where the bytes are none."""
    return _decoder.decode(data)


def _clean(value: Any) -> Any:
    if isinstance(value, str):
        return value.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    if isinstance(value, list):
        return [_clean(item) for item in value]
    if isinstance(value, dict):
        return {_clean(name): _clean(item) for name, item in value.items()}
    if isinstance(value, msgspec.Struct):
        return type(value)(**{name: _clean(getattr(value, name)) for name in value.__struct_fields__})
    return value


def to_batch(records: Sequence[Record], schema: pa.Schema) -> pa.RecordBatch:
    """The records as Arrow: `len(records)` rows of the output's schema, in the order given."""
    columns: list[pa.Array] = []
    for field in schema:
        if field.name == "images":
            columns.append(_images([record.images for record in records]))
        elif field.name == "error":
            columns.append(pa.array([e and msgspec.structs.asdict(e) for e in (r.error for r in records)], _ERROR))
        elif field.name == "id" and pa.types.is_string(field.type):
            columns.append(pa.array([i if i is None else str(i) for i in (r.id for r in records)], field.type))
        elif field.name in COLUMNS:
            columns.append(_fit(field, [getattr(record, field.name) for record in records]))
        else:
            columns.append(_fit(field, [record.kept.get(field.name) for record in records]))
    return pa.RecordBatch.from_arrays(columns, schema=schema)


def _images(lists: list[list[Image]]) -> pa.Array:
    # Column by column: a third of the time that a dictionary per picture takes.
    offsets = [0]
    for images in lists:
        offsets.append(offsets[-1] + len(images))
    flat = [image for images in lists for image in images]
    children = [pa.array([getattr(image, field.name) for image in flat], field.type) for field in _IMAGE]
    return pa.ListArray.from_arrays(
        pa.array(offsets, pa.int32()), pa.StructArray.from_arrays(children, fields=list(_IMAGE))
    )


def _fit(field: pa.Field, values: list[Any]) -> pa.Array:
    try:
        return pa.array(values, field.type)
    except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError):
        # The manifest's reader vouches for the types. Should one slip through, the answer beside it must not be lost.
        fitting = [value if _fits(value, field.type) else None for value in values]
        log.warning("column %s: %d values are no %s: written as null", field.name, _lost(values, fitting), field.type)
        return pa.array(fitting, field.type)


def _fits(value: Any, kind: pa.DataType) -> bool:
    try:
        pa.array([value], kind)
    except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError):
        return False
    return True


def _lost(values: Iterable[Any], fitting: Iterable[Any]) -> int:
    return sum(new is None and old is not None for old, new in zip(values, fitting, strict=True))
