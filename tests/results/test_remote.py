import asyncio
import logging
import os
import shutil
import signal
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batchvl.config.units import Shard
from batchvl.errors import OptionError, ResumeError, StoppedEarly
from batchvl.results import Counts, ResultStore, merge, status
from batchvl.results.attempt import Attempt
from batchvl.results.location import open_output
from batchvl.results.record import Record
from batchvl.results.remote import SPAN, RemoteStorage
from batchvl.results.shard import AttemptFile
from batchvl.results.writer import Writer
from batchvl.storage import object_store
from batchvl.storage.disk import Disk
from batchvl.storage.object_store import Bucket, RemoteError

from ..faults.store import BUCKET, ObjectStore, StoreRequest
from .samples import RUN_FILE, failed, fill, options, sample

SHARD = "shard-00000-of-00001"
URI = f"s3://{BUCKET}/out"


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[ObjectStore]:
    with ObjectStore() as server:
        for name, value in server.environment().items():
            monkeypatch.setenv(name, value)
        yield server


def machine(tmp_path: Path, name: str = "here") -> RemoteStorage:
    """Return the results as a machine with its own working directories sees it."""
    out = open_output(URI, tmp_path / name)
    assert isinstance(out, RemoteStorage)
    return out


def kinds(store: ObjectStore) -> Counter[str]:
    """Return the number of objects of each kind."""
    return Counter(key.removeprefix(f"{SHARD}/").partition("-")[0] for key in store.names("out/"))


def local(out: RemoteStorage) -> set[str]:
    """Return the journals and parts in the shard's working directory."""
    return {path.name for path in (out.path / SHARD).iterdir() if path.name.startswith(("journal-", "part-", "."))}


def is_part(asked: StoreRequest) -> bool:
    return "/part-" in asked.path


async def die(
    out: RemoteStorage, records: list[Record], metadata: dict[str, str] | None = None
) -> tuple[Attempt, Writer]:
    """Make an attempt that commits the records and then stops as if killed: nothing is closed, its lock is free."""
    committed, disk = Counts(), Disk()
    out.create_or_verify(RUN_FILE, disk)
    attempt = Attempt(out.shard(Shard()), retry=0, total=None, disk=disk)
    writer = Writer(attempt, RUN_FILE.schema, commit_seconds=0.01, part_rows=10_000, disk=disk, on_commit=committed.add)
    if metadata is not None:
        attempt.describe(metadata)
        attempt.directory.wait_for_uploads()
        writer.describe(metadata)
    for record in records:
        writer.add(record)
    while committed.rows < len(records):
        await asyncio.sleep(0.005)
    attempt.release()
    return attempt, writer


async def test_an_output_in_a_bucket_equals_one_in_a_directory(store: ObjectStore, tmp_path: Path) -> None:
    records = [sample(row) if row % 7 else failed(row) for row in range(100)]
    out = machine(tmp_path)
    await fill(out, records, replace(RUN_FILE, total=100), part_rows=30, complete=True)
    await fill(tmp_path / "local", records, replace(RUN_FILE, total=100), part_rows=30, complete=True)
    assert kinds(store) == {"run.json": 1, "attempt": 1, "part": 4, "complete.json": 1, "lock": 1}
    assert local(out) == set()
    report, expected = merge(out), merge(tmp_path / "local")
    assert (report.file, report.counts) == (f"{URI}/results.parquet", expected.counts)
    assert pq.read_table(pa.BufferReader(store.read("out/results.parquet"))).equals(pq.read_table(expected.file))
    assert not (out.path / "results.parquet").exists()
    elsewhere = merge(machine(tmp_path, "elsewhere"), tmp_path / "results.jsonl")
    assert (elsewhere.file, elsewhere.rows) == (tmp_path / "results.jsonl", 100)


async def test_another_machine_resumes_from_the_parts(store: ObjectStore, tmp_path: Path) -> None:
    await fill(machine(tmp_path), [sample(row, response="x" * 5000 + str(row)) for row in range(400)], part_rows=40)
    store.requests.clear()
    results = ResultStore.open(machine(tmp_path, "elsewhere"), RUN_FILE)
    assert list(results.done.missing(range(401))) == [400]
    await results.close()
    ranges = [asked.range for asked in store.requests if is_part(asked) and asked.method == "GET"]
    sizes = [int(end) - int(start) + 1 for start, end in (text.removeprefix("bytes=").split("-") for text in ranges)]
    assert len(sizes) == 10
    assert max(sizes) <= 64 * 1024, "footers were read, not parts"


async def test_footers_are_read_concurrently(store: ObjectStore, tmp_path: Path) -> None:
    await fill(machine(tmp_path), [sample(row) for row in range(24)], part_rows=1)
    store.delay, store.max_open = 0.05, 0
    assert len(machine(tmp_path).shard(Shard()).recover().outcomes().rows()) == 24
    assert store.max_open >= 8


async def test_a_large_footer(store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    await fill(machine(tmp_path), [sample(row) for row in range(50)])
    monkeypatch.setattr(object_store, "FOOTER_BYTES", 100)
    assert len(machine(tmp_path).shard(Shard()).recover().outcomes().rows()) == 50


async def test_what_an_attempt_left_on_this_machine_is_uploaded(store: ObjectStore, tmp_path: Path) -> None:
    dead, _ = await die(machine(tmp_path), [sample(row) for row in range(10)], {"engine": "the dead one's"})
    assert kinds(store)["part"] == 0
    assert len(ResultStore.open(machine(tmp_path, "elsewhere"), RUN_FILE).done) == 0, "not uploaded yet"
    assert merge(machine(tmp_path), tmp_path / "a.parquet", partial=True).rows == 10, (
        "the machine that has the rows merges them"
    )

    out = machine(tmp_path)
    results = ResultStore.open(out, RUN_FILE)
    assert (len(results.done), local(out)) == (10, set())
    await results.close()
    [key] = [key for key in store.names(f"out/{SHARD}/") if key.startswith("part-")]
    assert key == f"part-{dead.number}-000001.parquet", "named after the attempt that recorded the rows"
    [part] = machine(tmp_path, "elsewhere").shard(Shard()).sources()
    assert (part.attempt, part.metadata["engine"]) == (dead.number, "the dead one's")
    assert part.metadata["fingerprint"] == RUN_FILE.fingerprint


async def test_a_part_that_was_made_but_not_uploaded_is_uploaded_later(store: ObjectStore, tmp_path: Path) -> None:
    out = machine(tmp_path)
    attempt, writer = await die(out, [sample(row) for row in range(10)], {"engine": "fake"})
    journal = attempt.directory.journal((attempt.number, 1))
    journal_data = journal.read_bytes()
    await writer.close()
    out.uploads.wait()
    [name] = [key for key in store.names(f"out/{SHARD}/") if key.startswith("part-")]
    data = store.read(f"out/{SHARD}/{name}")
    for journal_there in (True, False):  # before and after the journal is removed
        store.delete(f"out/{SHARD}/{name}")
        (journal.parent / name).write_bytes(data)
        if journal_there:
            journal.write_bytes(journal_data)
        again = ResultStore.open(machine(tmp_path), RUN_FILE)
        assert (len(again.done), local(out)) == (10, set())
        await again.close()
        assert store.read(f"out/{SHARD}/{name}") == data


async def test_a_temporary_rejection_delays_no_commit(
    store: ObjectStore, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    refused: list[StoreRequest] = []

    def fault(asked: StoreRequest) -> str | None:
        if is_part(asked) and asked.uploads and len(refused) < 3:
            refused.append(asked)
            return "denied"  # which pyarrow does not retry by itself
        return None

    store.fault = fault
    committed: list[int] = []
    out = machine(tmp_path)
    results = ResultStore.open(
        out, RUN_FILE, options=options(part_rows=10), on_commit=lambda counts: committed.append(counts.rows)
    )
    results.describe({"engine": "fake"})
    for row in range(10):
        results.add(sample(row))
    while not refused:
        await asyncio.sleep(0.005)
    for row in range(10, 20):
        results.add(sample(row))
    while sum(committed) < 20:
        await asyncio.sleep(0.005)
    assert kinds(store)["part"] == 0, "all 20 were durable before the store accepted anything"
    with caplog.at_level(logging.WARNING):
        await results.close()
    assert len(refused) == 3
    assert (kinds(store)["part"], local(out)) == (2, set())
    [warning] = [r.getMessage() for r in caplog.records if "cannot be written" in r.getMessage()]
    assert "ACCESS_DENIED" in warning
    assert str(out.path) in warning


async def test_a_permanent_rejection_stops_the_run_and_loses_nothing(store: ObjectStore, tmp_path: Path) -> None:
    store.fault = lambda asked: "denied" if is_part(asked) and asked.uploads else None
    out = RemoteStorage(URI, tmp_path / "here", retry_seconds=0.3)
    with pytest.raises(StoppedEarly, match=r"part-.*cannot be written: .*ACCESS_DENIED.* run the same command again"):
        await fill(out, [sample(row) for row in range(10)])
    assert any(name.startswith("journal-") for name in local(out))
    store.fault = lambda asked: None
    results = ResultStore.open(machine(tmp_path), RUN_FILE)
    assert len(results.done) == 10
    await results.close()
    assert kinds(store)["part"] == 1


async def test_a_part_counts_as_uploaded_once_it_is_found(store: ObjectStore, tmp_path: Path) -> None:
    looked: list[StoreRequest] = []

    def fault(asked: StoreRequest) -> str | None:
        if is_part(asked) and asked.method == "HEAD" and len(looked) < 1:
            looked.append(asked)
            return "missing"
        return None

    store.fault = fault
    out = machine(tmp_path)
    await fill(out, [sample(0)])
    uploaded = [asked for asked in store.requests if is_part(asked) and asked.uploads and "partNumber" in asked.path]
    assert (len(looked), len(uploaded), local(out)) == (1, 2, set())


async def test_a_part_is_made_after_some_time_however_few_rows_it_has(store: ObjectStore, tmp_path: Path) -> None:
    stores = [
        ResultStore.open(out, RUN_FILE, options=options(upload_seconds=0.1))
        for out in (tmp_path / "local", machine(tmp_path))
    ]
    for results in stores:
        results.describe({"engine": "fake"})
        results.add(sample(0))
    while kinds(store)["part"] < 1:
        await asyncio.sleep(0.01)
    for results in stores:
        results.add(sample(1))
        await results.close()
    assert kinds(store)["part"] == 2
    assert len([*(tmp_path / "local").rglob("part-*")]) == 1, "a directory needs no early parts"


async def test_another_run_is_rejected_on_any_machine(store: ObjectStore, tmp_path: Path) -> None:
    await fill(machine(tmp_path), [sample(0)])
    with pytest.raises(ResumeError, match=rf'^{URI}: belongs to a run with other settings:\n  --model: "shapes" there'):
        ResultStore.open(machine(tmp_path, "elsewhere"), replace(RUN_FILE, options={"model": "another"}))


async def test_of_two_concurrent_first_attempts_the_overwritten_one_uploads_nothing(
    store: ObjectStore, tmp_path: Path
) -> None:
    out = machine(tmp_path)
    results = ResultStore.open(out, RUN_FILE, options=options())
    results.describe({"engine": "fake"})
    store.put("out/run.json", replace(RUN_FILE, options={"model": "another"}).encode())  # as a late writer does
    results.add(sample(0))
    with pytest.raises(ResumeError, match='--model: "another" there, "shapes" here'):
        await results.close()
    assert kinds(store)["part"] == 0
    assert any(name.startswith("journal-") for name in local(out)), "results are kept"


async def test_a_working_directory_belongs_to_one_run(store: ObjectStore, tmp_path: Path) -> None:
    await die(machine(tmp_path), [sample(0)])
    store.clear()  # another run starts at the same address
    with pytest.raises(ResumeError, match=r"belongs to a run with other settings(?s:.*)or remove .*did not upload"):
        ResultStore.open(machine(tmp_path), replace(RUN_FILE, options={"model": "another"}))


async def test_two_machines_at_once(store: ObjectStore, tmp_path: Path) -> None:
    storages = [machine(tmp_path, name) for name in ("one", "two")]
    stores = [ResultStore.open(out, RUN_FILE, options=options(part_rows=5)) for out in storages]
    for results in stores:
        results.describe({"engine": "fake"})
        for row in range(20):
            results.add(sample(row, response=f"of {results.attempt}"))
    await asyncio.gather(*(results.close() for results in stores))
    assert kinds(store)["part"] == 8
    assert stores[0].attempt != stores[1].attempt
    report = merge(machine(tmp_path, "three"), tmp_path / "all.parquet", 20)
    table = pq.read_table(report.file)
    assert table["row"].to_pylist() == list(range(20))
    assert set(table["response"].to_pylist()) == {f"of {min(results.attempt for results in stores)}"}


async def test_attempt_numbers_ascend(store: ObjectStore, tmp_path: Path) -> None:
    numbers = [(await fill(machine(tmp_path, name), [])).attempt for name in ("a", "b", "a", "c")]
    assert [number // SPAN for number in numbers] == [1, 2, 3, 4]


async def test_one_runner_per_machine(store: ObjectStore, tmp_path: Path) -> None:
    results = ResultStore.open(machine(tmp_path), RUN_FILE)
    with pytest.raises(ResumeError, match="in use by another runner"):
        ResultStore.open(machine(tmp_path), RUN_FILE)
    await results.close()


async def test_status_on_another_machine(store: ObjectStore, tmp_path: Path) -> None:
    run_file = replace(RUN_FILE, total=30)
    results = ResultStore.open(machine(tmp_path), run_file, options=options(part_rows=10))
    results.heartbeat(30)
    results.describe({"engine": "fake"})
    for row in range(20):
        results.add(sample(row))
    while kinds(store)["part"] < 2:
        await asyncio.sleep(0.01)
    seen = status(machine(tmp_path, "elsewhere"))
    assert (seen.output, seen.rows, seen.expected, seen.states["running"]) == (URI, 20, 30, 1)
    assert seen.shards[0].attempt == results.attempt
    await results.close()
    assert status(machine(tmp_path, "elsewhere")).states["stopped"] == 1
    await fill(machine(tmp_path), [sample(row) for row in range(20, 30)], run_file, complete=True)
    assert status(machine(tmp_path, "elsewhere")).complete


async def test_an_attempt_without_rows_can_be_rolled_back(store: ObjectStore, tmp_path: Path) -> None:
    one, two = (ResultStore.open(machine(tmp_path, name), RUN_FILE) for name in ("one", "two"))
    await one.close()
    one.roll_back(logs=False)
    assert kinds(store) == {"run.json": 1, "attempt": 1}, "the other attempt is still active with these settings"
    await two.close()
    two.roll_back(logs=False)
    assert store.names("out/") == []
    await fill(machine(tmp_path, "one"), [sample(0)], replace(RUN_FILE, options={"model": "another"}))


def test_a_damaged_part_is_named(store: ObjectStore, tmp_path: Path) -> None:
    asyncio.run(fill(machine(tmp_path), [sample(0)]))
    [name] = [key for key in store.names("out/") if "part-" in key]
    store.put(f"out/{name}", b"PAR1 is not all there is to it")
    with pytest.raises(ResumeError, match=rf"{URI}/{name}: damaged"):
        ResultStore.open(machine(tmp_path), RUN_FILE)


def test_directory_markers_and_unfinished_uploads_are_ignored(store: ObjectStore, tmp_path: Path) -> None:
    store.put(f"out/{SHARD}/part-0001-000001.parquet", b"")
    assert list(machine(tmp_path).shard(Shard()).names()) == []


def test_errors_are_reported_on_opening(store: ObjectStore, tmp_path: Path) -> None:
    def open_error(uri: str) -> str:
        with pytest.raises(OptionError) as raised:
            ResultStore.open(open_output(uri, tmp_path), RUN_FILE)
        return str(raised.value)

    assert open_error("s3://nowhere/out") == "s3://nowhere/out: bucket 'nowhere' does not exist"
    assert "no bucket given" in open_error("s3://")
    assert "Unexpected query parameter" in open_error(f"s3://{BUCKET}/out?colour=red")
    store.fault = lambda asked: "denied" if asked.uploads else None
    assert open_error(URI).startswith(f"-o {URI}: cannot be written: When initiating")
    store.fault = lambda asked: "denied"
    assert "ACCESS_DENIED" in open_error(URI)
    assert "AWS_ACCESS_KEY_ID" in open_error(URI)
    for uri in ("ftp://host/out", "file:///tmp/out", "hdfs://host/out"):
        with pytest.raises(OptionError, match=r"expected a directory or a URI that starts with s3://, "):
            open_output(uri)


@pytest.mark.slow
def test_an_unreachable_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    with pytest.raises(OptionError, match=rf"^{URI}: cannot be opened: .*NETWORK_CONNECTION.*AWS_ENDPOINT_URL"):
        ResultStore.open(machine(tmp_path), RUN_FILE)


def test_a_failed_read_is_retried(store: ObjectStore) -> None:
    store.put("out/a", b"here")
    bucket = Bucket(URI)
    assert bucket.files().keys() == {"a"}
    refused: list[StoreRequest] = []

    def fault(asked: StoreRequest) -> str | None:
        refused.append(asked)
        return "denied" if len(refused) < 3 else None

    store.fault = fault
    assert bucket.read("a") == b"here"
    with pytest.raises(FileNotFoundError):
        bucket.read("b")


def test_a_failed_upload_leaves_nothing(store: ObjectStore, tmp_path: Path) -> None:
    path = tmp_path / "large"
    path.write_bytes(bytes(25_000_000))  # three pieces
    store.fault = lambda asked: "denied" if "partNumber=3" in asked.path else None
    with pytest.raises(RemoteError, match="ACCESS_DENIED"):
        Bucket(URI).upload(path, "large")
    assert store.names("out/") == []
    store.fault = lambda asked: None
    Bucket(URI).upload(path, "large")
    assert len(store.read("out/large")) == 25_000_000
    Bucket(URI).download("large", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == path.read_bytes()


def test_an_interrupted_upload_leaves_no_partial_file(store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(object_store, "UPLOAD_CHUNK_BYTES", 6_000_000)
    interrupted: list[StoreRequest] = []

    def fault(asked: StoreRequest) -> str | None:
        if "partNumber=1&" in asked.path and not interrupted:
            interrupted.append(asked)
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
        return None

    store.fault = fault
    with pytest.raises(KeyboardInterrupt):
        Bucket(URI).put("large", bytes(25_000_000))
    assert (len(interrupted), store.names("out/")) == (1, [])


async def test_secrets_in_the_uri_are_never_written(store: ObjectStore, tmp_path: Path) -> None:
    where = store.url.removeprefix("http://")
    uri = f"s3://THEKEY:HUSHHUSH@{BUCKET}/out?scheme=http&endpoint_override={where}"
    out = open_output(uri, tmp_path)
    assert isinstance(out, RemoteStorage)
    assert str(out) == URI
    await fill(out, [sample(0)], complete=True)
    merge(out)
    for directory, _, names in os.walk(tmp_path):
        assert "HUSH" not in directory
        for name in names:
            assert b"HUSHHUSH" not in await asyncio.to_thread(Path(directory, name).read_bytes)
    for key in store.names():
        assert b"HUSHHUSH" not in store.read(key)
    for bad in ("s3://THEKEY:HUSH HUSH@night/out", "s3://THEKEY:HUSH/HUSH@night/out", "s3://THEKEY:HUSHHUSH@/out"):
        with pytest.raises(OptionError) as raised:
            ResultStore.open(open_output(bad, tmp_path), RUN_FILE)
        assert "HUSH" not in str(raised.value)


def test_the_default_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BATCHVL_WORK", raising=False)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    out = open_output(Path("s3://night/out"))
    assert isinstance(out, RemoteStorage)
    assert out.path.parent == tmp_path / "batchvl"
    assert out.path.name.startswith("s3-night-out-")
    assert open_output("s3://night/out-").path.name != out.path.name  # type: ignore[union-attr]
    monkeypatch.setenv("BATCHVL_WORK", str(tmp_path / "work"))
    assert open_output("s3://night/out").path.parent == tmp_path / "work"  # type: ignore[union-attr]
    assert open_output("s3://night/out", tmp_path / "x").path.parent == tmp_path / "x"  # type: ignore[union-attr]


async def test_the_working_directory_can_be_removed_between_runs(store: ObjectStore, tmp_path: Path) -> None:
    await fill(machine(tmp_path), [sample(row) for row in range(5)])
    shutil.rmtree(tmp_path / "here")
    await fill(machine(tmp_path), [sample(5)])
    assert merge(machine(tmp_path), total=6).rows == 6
    attempts = [
        msgspec.json.decode(store.read(f"out/{key}"), type=AttemptFile)
        for key in store.names("out/")
        if "attempt-" in key
    ]
    assert [attempt.metadata for attempt in attempts] == [{"engine": "fake"}] * 2
    assert machine(tmp_path).run_file() == RUN_FILE
