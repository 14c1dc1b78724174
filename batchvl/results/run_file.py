"""The run file, `run.json`: identifies an output's run so that a different run cannot resume in it."""

from __future__ import annotations

from base64 import b64decode, b64encode
from dataclasses import dataclass, field
from typing import Any

import msgspec
import pyarrow as pa

from ..config.options import RunOptions, flag
from ..errors import ResumeError
from .journal import FORMAT
from .record import IdType, schema

RUN_FILE = "run.json"
_BEGINNING = b'{\n  "format": '
_NO_COLUMNS = pa.schema([])


class _Format(msgspec.Struct):
    format: int


class _Content(msgspec.Struct):
    format: int
    manifest: str
    fingerprint: str
    total: int | None
    shards: int
    id_type: IdType
    kept: dict[str, str]
    kept_schema: str
    """The kept columns as a base64 Arrow schema; `kept` is the human-readable form."""
    options: dict[str, Any]


@dataclass(frozen=True)
class RunFile:
    """The settings that all attempts at all shards of an output must share."""

    fingerprint: str
    """The manifest's fingerprint."""
    options: dict[str, Any]
    """`RunOptions.meaning()`."""
    shards: int = 1
    id_type: IdType = None
    kept: pa.Schema = field(default=_NO_COLUMNS)
    manifest: str = ""
    """The manifest's name, informational."""
    total: int | None = None
    """Number of rows in the manifest, if known; may change between attempts, since `--limit` may."""

    def __post_init__(self) -> None:
        # Compare options in the form that run.json returns them: tuples become lists, in defaults as well.
        object.__setattr__(self, "options", _json_round_trip(self.options))

    @property
    def schema(self) -> pa.Schema:
        """The output's schema. Raises OptionError if a kept column has the name of an output column."""
        return schema(self.id_type, self.kept)

    @classmethod
    def decode(cls, data: bytes, location: object) -> RunFile:
        """Return the run file with these contents.

        Args:
            data: The contents of `run.json`.
            location: The output, for error messages.

        Raises:
            ResumeError: the contents are damaged or of a later format.
        """
        try:
            number = msgspec.json.decode(data, type=_Format).format
            if number > FORMAT:
                raise ResumeError(
                    f"{location}: has format {number}; this version reads up to format {FORMAT}: upgrade batchvl"
                )
            content = msgspec.json.decode(data, type=_Content)
            kept = pa.ipc.read_schema(pa.py_buffer(b64decode(content.kept_schema)))
        except (msgspec.DecodeError, pa.ArrowException, ValueError) as error:
            raise ResumeError(
                f"{location}/{RUN_FILE}: damaged ({error}): choose another output directory with -o"
            ) from None
        return cls(
            content.fingerprint, content.options, content.shards, content.id_type, kept, content.manifest, content.total
        )

    def encode(self) -> bytes:
        """Return the contents of `run.json`."""
        content = _Content(
            format=FORMAT,
            manifest=self.manifest,
            fingerprint=self.fingerprint,
            total=self.total,
            shards=self.shards,
            id_type=self.id_type,
            kept=_types(self.kept),
            kept_schema=b64encode(self.kept.serialize()).decode(),
            options=self.options,
        )
        return msgspec.json.format(msgspec.json.encode(content), indent=2) + b"\n"

    @staticmethod
    def is_torn(data: bytes) -> bool:
        """Whether the contents are the beginning of a run file whose writer died."""
        data = data.rstrip(b"\0")
        try:
            msgspec.json.decode(data)
        except msgspec.DecodeError:
            return _BEGINNING.startswith(data[: len(_BEGINNING)])
        return False

    def check_matches(self, existing: RunFile, location: object) -> None:
        """Check that this run may resume in an existing output.

        Raises:
            ResumeError: it may not; the message lists all differences.
        """
        differences = list(self._differences(existing))
        if differences:
            lines = "\n".join(f"  {name}: {before} there, {now} here" for name, before, now in differences)
            raise ResumeError(
                f"{location}: belongs to a run with other settings:\n{lines}\n"
                f"To resume that run, use its settings; to start a new run, choose another output directory with -o"
            )

    def _differences(self, existing: RunFile) -> list[tuple[str, str, str]]:
        """Return the name, the existing value and this run's value of each setting that differs."""
        differences = []
        if self.fingerprint != existing.fingerprint:
            names = [f"{run.manifest or 'manifest'} {run.fingerprint[:12]}" for run in (existing, self)]
            differences.append(("the manifest's contents", names[0], names[1]))
        if self.shards != existing.shards:
            differences.append(("number of shards (--shard I/N)", str(existing.shards), str(self.shards)))
        # An option that only one of the two versions has takes its default value in the other.
        defaults = _json_round_trip(RunOptions().meaning())
        for name in sorted(self.options.keys() | existing.options.keys()):
            before, now = (run.options.get(name, defaults.get(name)) for run in (existing, self))
            if before != now:
                differences.append((flag(name), _format_value(before), _format_value(now)))
        if self.id_type != existing.id_type:
            differences.append(("type of the ids", existing.id_type or "no ids", self.id_type or "no ids"))
        if not self.kept.equals(existing.kept) and self.options.get("keep") == existing.options.get("keep"):
            types = [_format_value(_types(run.kept)) for run in (existing, self)]
            differences.append(("types of the kept columns", types[0], types[1]))
        return differences


def _types(kept: pa.Schema) -> dict[str, str]:
    return {field.name: str(field.type) for field in kept}


def _json_round_trip(value: Any) -> Any:
    return msgspec.json.decode(msgspec.json.encode(value))


def _format_value(value: Any) -> str:
    return "not given" if value is None else msgspec.json.encode(value).decode()
