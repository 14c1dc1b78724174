import json
import threading
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest

from batchvl.config.options import RunOptions
from batchvl.errors import OptionError, ResumeError
from batchvl.results import RunFile
from batchvl.results.output import LocalStorage
from batchvl.storage.disk import Disk

RUN_FILE = RunFile(
    "f00d" * 8,
    RunOptions.of(model="shapes", keep=["site"]).meaning(),
    shards=4,
    id_type="int64",
    kept=pa.schema([("site", pa.list_(pa.timestamp("us", "UTC")))]),
    manifest="m.parquet",
    total=100,
)


def test_the_first_attempt_creates_the_file_and_the_next_one_verifies_it(tmp_path: Path) -> None:
    out = tmp_path / "a" / "out"
    LocalStorage(out).create_or_verify(RUN_FILE, Disk())
    assert LocalStorage(out).run_file() == RUN_FILE
    assert [path.name for path in out.iterdir()] == ["run.json"]
    renamed = replace(RUN_FILE, total=50, manifest="elsewhere/m.parquet")  # the name and --limit may change
    LocalStorage(out).create_or_verify(renamed, Disk())
    assert LocalStorage(out).run_file() == RUN_FILE
    assert json.loads((out / "run.json").read_bytes())["kept"] == {"site": "list<item: timestamp[us, tz=UTC]>"}


def test_all_differences_are_reported(tmp_path: Path) -> None:
    LocalStorage(tmp_path).create_or_verify(RUN_FILE, Disk())
    options = RunOptions.of(model="other", keep=["site"], temperature=0.5, prompt="hi").meaning()
    other = RunFile("beef" * 8, options, shards=8, kept=pa.schema([("site", pa.string())]), manifest="n.parquet")
    with pytest.raises(ResumeError) as raised:
        LocalStorage(tmp_path).create_or_verify(other, Disk())
    assert str(raised.value).split("\n") == [
        f"{tmp_path}: belongs to a run with other settings:",
        "  the manifest's contents: m.parquet f00df00df00d there, n.parquet beefbeefbeef here",
        "  number of shards (--shard I/N): 4 there, 8 here",
        '  --model: "shapes" there, "other" here',
        '  --prompt: not given there, "hi" here',
        "  --temperature: 0.0 there, 0.5 here",
        "  type of the ids: int64 there, no ids here",
        '  types of the kept columns: {"site":"list<item: timestamp[us, tz=UTC]>"} there, {"site":"string"} here',
        "To resume that run, use its settings; to start a new run, choose another output directory with -o",
    ]


def test_an_option_missing_in_an_older_version_has_its_default(tmp_path: Path) -> None:
    older = {name: value for name, value in RUN_FILE.options.items() if name != "top_p"}
    LocalStorage(tmp_path).create_or_verify(replace(RUN_FILE, options=older), Disk())
    LocalStorage(tmp_path).create_or_verify(RUN_FILE, Disk())
    with pytest.raises(ResumeError, match=r"--top-p: 1\.0 there, 0\.5 here"):
        LocalStorage(tmp_path).create_or_verify(replace(RUN_FILE, options=RUN_FILE.options | {"top_p": 0.5}), Disk())


def test_one_of_many_concurrent_first_attempts_wins(tmp_path: Path) -> None:
    winners: list[str] = []

    def create(number: int) -> None:
        try:
            LocalStorage(tmp_path).create_or_verify(replace(RUN_FILE, fingerprint=str(number)), Disk())
            winners.append(str(number))
        except ResumeError:
            pass

    threads = [threading.Thread(target=create, args=[number]) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert winners == [LocalStorage(tmp_path).run_file().fingerprint]
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


def test_creation_is_exclusive_without_hard_links(tmp_path: Path) -> None:
    class Fuse(Disk):
        def link(self, source: Path, target: Path) -> None:
            raise PermissionError(1, "Operation not permitted")

    LocalStorage(tmp_path).create_or_verify(RUN_FILE, Fuse())
    with pytest.raises(FileExistsError):
        Fuse().put_new(tmp_path / "run.json", b"")
    assert LocalStorage(tmp_path).run_file() == RUN_FILE


def test_a_later_format_and_damage_are_reported(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text('{"format": 2, "something": "new"}')
    with pytest.raises(ResumeError, match="has format 2; this version reads up to format 1"):
        LocalStorage(tmp_path).create_or_verify(RUN_FILE, Disk())
    (tmp_path / "run.json").write_text("{]")
    with pytest.raises(ResumeError, match=r"run.json: damaged"):
        LocalStorage(tmp_path).create_or_verify(RUN_FILE, Disk())


def test_a_torn_file_is_replaced_if_no_shard_was_started(tmp_path: Path) -> None:
    """Without hard links the file is not written atomically."""
    LocalStorage(tmp_path).create_or_verify(RUN_FILE, Disk())
    whole = (tmp_path / "run.json").read_bytes()
    for torn in (whole[:0], whole[:7], whole[: len(whole) // 2], whole[:40] + bytes(100), bytes(len(whole))):
        (tmp_path / "run.json").write_bytes(torn)
        LocalStorage(tmp_path).create_or_verify(replace(RUN_FILE, fingerprint="another"), Disk())
        assert LocalStorage(tmp_path).run_file().fingerprint == "another"
    (tmp_path / "run.json").write_bytes(whole[:50])
    (tmp_path / "shard-00000-of-00001").mkdir()
    with pytest.raises(ResumeError, match=r"run.json: damaged"):
        LocalStorage(tmp_path).create_or_verify(RUN_FILE, Disk())


def test_a_kept_column_with_the_name_of_an_output_column() -> None:
    with pytest.raises(OptionError, match="--keep row"):
        _ = replace(RUN_FILE, kept=pa.schema([("row", pa.int64())])).schema
