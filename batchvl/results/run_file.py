"""The resume guard, `run.json`: what an output folder's run is, so that a different one cannot go on in it."""

from __future__ import annotations

from base64 import b64decode, b64encode
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import pyarrow as pa

from ..config.options import RunOptions, flag
from ..errors import ResumeError
from ..storage.disk import Disk
from ..storage.object_store import Bucket
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
    """The kept columns as base64 of Arrow's own form: `kept` is for people."""
    options: dict[str, Any]


@dataclass(frozen=True)
class RunFile:
    """What all attempts at all shards of an output folder must agree on."""

    fingerprint: str
    """The manifest's."""
    options: dict[str, Any]
    """`RunOptions.meaning()`."""
    shards: int = 1
    id_type: IdType = None
    kept: pa.Schema = field(default=_NO_COLUMNS)
    manifest: str = ""
    """The manifest's name, for people."""
    total: int | None = None
    """The manifest's rows where they are known; may change, since `--limit` may."""

    def __post_init__(self) -> None:
        # As run.json gives them back: tuples become lists, in defaults as well.
        object.__setattr__(self, "options", _json(self.options))

    @property
    def schema(self) -> pa.Schema:
        """The output's. Raises OptionError where a kept column has the name of an output column."""
        return schema(self.id_type, self.kept)

    @classmethod
    def read(cls, out: Path | Bucket) -> RunFile:
        """The guard of an output folder.

        Raises ResumeError where there is none, or one that is damaged or of a later format, and other OSErrors.
        """
        try:
            data = out.read(RUN_FILE) if isinstance(out, Bucket) else (out / RUN_FILE).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            raise ResumeError(f"{out}: is no output folder of batchvl: it has no {RUN_FILE}") from None
        return cls._decoded(data, out)

    @classmethod
    def _decoded(cls, data: bytes, out: Path | Bucket) -> RunFile:
        try:
            number = msgspec.json.decode(data, type=_Format).format
            if number > FORMAT:
                raise ResumeError(f"{out}: has format {number}; this batchvl reads up to {FORMAT}: use a later version")
            found = msgspec.json.decode(data, type=_Content)
            kept = pa.ipc.read_schema(pa.py_buffer(b64decode(found.kept_schema)))
        except (msgspec.DecodeError, pa.ArrowException, ValueError) as error:
            raise ResumeError(f"{out}/{RUN_FILE}: damaged ({error}): choose another output folder with -o") from None
        return cls(
            found.fingerprint, found.options, found.shards, found.id_type, kept, found.manifest, found.total
        )  # fmt: skip

    def claim(self, out: Path, disk: Disk) -> None:
        """Makes the folder this run's, or finds that it is; of several first attempts at once, one makes it.

        Raises ResumeError naming all that differs where it is another run's, and OSError.
        """
        disk.make_folder(out)
        path = out / RUN_FILE
        if not path.exists():
            try:
                disk.put_new(path, self._encoded())
                return
            except FileExistsError:
                pass
        elif _is_torn(path) and not any(out.glob("shard-*")):
            disk.put(path, self._encoded())  # where there are no hard links, a first attempt can die over writing it
        self.compare(RunFile.read(out), out)

    def claim_prefix(self, bucket: Bucket) -> None:
        """The same for a prefix on an object store. Of several first attempts at once the last one makes it: until each
        has claimed it once more, others may believe that they did.
        """
        self.compare(self._decoded(bucket.put_first(RUN_FILE, self._encoded()), bucket), bucket)

    def compare(self, there: RunFile, out: Path | Bucket) -> None:
        """Raises ResumeError naming all in which this run differs from the one that the folder `out` belongs to."""
        found = list(self._differences(there))
        if found:
            lines = "\n".join(f"  {what}: {was} there, {now} here" for what, was, now in found)
            raise ResumeError(
                f"{out}: belongs to a run with other settings:\n{lines}\n"
                f"To go on with that run, give its settings; for a new run, choose another output folder with -o"
            )

    def _differences(self, there: RunFile) -> list[tuple[str, str, str]]:
        found = []
        if self.fingerprint != there.fingerprint:
            names = [f"{guard.manifest or 'manifest'} {guard.fingerprint[:12]}" for guard in (there, self)]
            found.append(("the manifest's contents", names[0], names[1]))
        if self.shards != there.shards:
            found.append(("number of shards (--shard I/N)", str(there.shards), str(self.shards)))
        # An option that only one of the two versions knows has its default in the other.
        defaults = _json(RunOptions().meaning())
        for name in sorted(self.options.keys() | there.options.keys()):
            was, now = (guard.options.get(name, defaults.get(name)) for guard in (there, self))
            if was != now:
                found.append((flag(name), _shown(was), _shown(now)))
        if self.id_type != there.id_type:
            found.append(("type of the ids", there.id_type or "no ids", self.id_type or "no ids"))
        if not self.kept.equals(there.kept) and self.options.get("keep") == there.options.get("keep"):
            found.append(("types of the kept columns", _shown(_types(there.kept)), _shown(_types(self.kept))))
        return found

    def _encoded(self) -> bytes:
        file = _Content(
            FORMAT, self.manifest, self.fingerprint, self.total, self.shards, self.id_type, _types(self.kept),
            b64encode(self.kept.serialize()).decode(), self.options,
        )  # fmt: skip
        return msgspec.json.format(msgspec.json.encode(file), indent=2) + b"\n"


def _is_torn(path: Path) -> bool:
    data = path.read_bytes().rstrip(b"\0")
    try:
        msgspec.json.decode(data)
    except msgspec.DecodeError:
        return _BEGINNING.startswith(data[: len(_BEGINNING)])
    return False


def _types(kept: pa.Schema) -> dict[str, str]:
    return {field.name: str(field.type) for field in kept}


def _json(value: Any) -> Any:
    return msgspec.json.decode(msgspec.json.encode(value))


def _shown(value: Any) -> str:
    return "not given" if value is None else msgspec.json.encode(value).decode()
