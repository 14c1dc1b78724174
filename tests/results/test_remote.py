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
from batchvl.results import ResultStore, merge, status
from batchvl.results.location import open_output
from batchvl.results.record import Record
from batchvl.results.remote import SPAN, RemoteStorage
from batchvl.results.shard import AttemptFile
from batchvl.storage import object_store as bucket
from batchvl.storage import uploads
from batchvl.storage.object_store import Bucket, RemoteError

from ..faults.store import BUCKET, ObjectStore, StoreRequest
from .samples import GUARD, failed, fill, options, sample

SHARD = "shard-00000-of-00001"
URI = f"s3://{BUCKET}/out"


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[ObjectStore]:
    with ObjectStore() as found:
        for name, value in found.environment().items():
            monkeypatch.setenv(name, value)
        yield found


def machine(tmp_path: Path, name: str = "here") -> RemoteStorage:
    """The output as a machine sees it that keeps its working folders under that name."""
    out = open_output(URI, tmp_path / name)
    assert isinstance(out, RemoteStorage)
    return out


def kinds(store: ObjectStore) -> Counter[str]:
    """How many objects of each kind there are."""
    return Counter(key.removeprefix(f"{SHARD}/").partition("-")[0] for key in store.names("out/"))


def local(out: RemoteStorage) -> set[str]:
    """The journals and parts that lie in the shard's working folder."""
    return {path.name for path in (out.path / SHARD).iterdir() if path.name.startswith(("journal-", "part-", "."))}


def is_part(asked: StoreRequest) -> bool:
    return "/part-" in asked.path


async def die(out: RemoteStorage, records: list[Record], told: dict[str, str] | None = None) -> ResultStore:
    """An attempt that commits the records and then is no more, as after kill -9: nobody holds its lock."""
    committed: list[int] = []
    output = ResultStore.open(out, GUARD, options=options(), on_commit=lambda counts: committed.append(counts.rows))
    if told is not None:
        output.describe(told)
        output._attempt.folder.wait()
    for record in records:
        output.add(record)
    while sum(committed) < len(records):
        await asyncio.sleep(0.005)
    output._attempt._lock.release()
    return output


async def test_an_output_in_a_bucket_is_the_same_as_one_in_a_folder(store: ObjectStore, tmp_path: Path) -> None:
    records = [sample(row) if row % 7 else failed(row) for row in range(100)]
    out = machine(tmp_path)
    await fill(out, records, replace(GUARD, total=100), part_rows=30, complete=True)
    await fill(tmp_path / "local", records, replace(GUARD, total=100), part_rows=30, complete=True)
    assert kinds(store) == {"run.json": 1, "attempt": 1, "part": 4, "complete.json": 1, "lock": 1}
    assert local(out) == set()
    report, expected = merge(out), merge(tmp_path / "local")
    assert (report.file, report.counts) == (f"{URI}/results.parquet", expected.counts)
    assert pq.read_table(pa.BufferReader(store.read("out/results.parquet"))).equals(pq.read_table(expected.file))
    assert not (out.path / "results.parquet").exists()
    elsewhere = merge(machine(tmp_path, "elsewhere"), tmp_path / "results.jsonl")
    assert (elsewhere.file, elsewhere.rows) == (tmp_path / "results.jsonl", 100)


async def test_another_machine_goes_on_from_the_parts_alone(store: ObjectStore, tmp_path: Path) -> None:
    await fill(machine(tmp_path), [sample(row, response="x" * 5000 + str(row)) for row in range(400)], part_rows=40)
    store.requests.clear()
    output = ResultStore.open(machine(tmp_path, "elsewhere"), GUARD)
    assert list(output.done.missing(range(401))) == [400]
    await output.close()
    ranges = [asked.range for asked in store.requests if is_part(asked) and asked.method == "GET"]
    sizes = [int(end) - int(start) + 1 for start, end in (text.removeprefix("bytes=").split("-") for text in ranges)]
    assert len(sizes) == 10
    assert max(sizes) <= 64 * 1024, "footers were read, not parts"


async def test_footers_are_read_at_once(store: ObjectStore, tmp_path: Path) -> None:
    await fill(machine(tmp_path), [sample(row) for row in range(24)], part_rows=1)
    store.delay, store.max_open = 0.05, 0
    assert len(machine(tmp_path).shard(Shard()).recover().outcomes().rows()) == 24
    assert store.max_open >= 8


async def test_a_footer_of_any_size(store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    await fill(machine(tmp_path), [sample(row) for row in range(50)])
    monkeypatch.setattr(bucket, "FOOTER_BYTES", 100)
    assert len(machine(tmp_path).shard(Shard()).recover().outcomes().rows()) == 50


async def test_what_an_attempt_left_on_this_machine_is_brought_in(store: ObjectStore, tmp_path: Path) -> None:
    dead = await die(machine(tmp_path), [sample(row) for row in range(10)], {"engine": "the dead one's"})
    assert kinds(store)["part"] == 0
    assert len(ResultStore.open(machine(tmp_path, "elsewhere"), GUARD).done) == 0, "it is on that machine alone"
    assert merge(machine(tmp_path), tmp_path / "a.parquet", partial=True).rows == 10, "where it counts"

    out = machine(tmp_path)
    output = ResultStore.open(out, GUARD)
    assert (len(output.done), local(out)) == (10, set())
    await output.close()
    [key] = [key for key in store.names(f"out/{SHARD}/") if key.startswith("part-")]
    assert key == f"part-{dead.attempt}-000001.parquet", "under the name of who answered"
    footer = machine(tmp_path, "elsewhere").shard(Shard())
    [part] = footer.sources()
    assert (part.attempt, part.metadata["engine"]) == (dead.attempt, "the dead one's")
    assert part.metadata["fingerprint"] == GUARD.fingerprint


async def test_a_part_that_was_made_but_not_uploaded_is_brought_in(store: ObjectStore, tmp_path: Path) -> None:
    out = machine(tmp_path)
    output = await die(out, [sample(row) for row in range(10)], {"engine": "fake"})
    journal = output.directory / f"journal-{output.attempt}-000001.log"
    kept = journal.read_bytes()
    await output._writer.close()
    out.uploads.wait()
    [name] = [key for key in store.names(f"out/{SHARD}/") if key.startswith("part-")]
    data = store.read(f"out/{SHARD}/{name}")
    for journal_there in (True, False):  # before and after the journal went
        store.delete(f"out/{SHARD}/{name}")
        (output.directory / name).write_bytes(data)
        if journal_there:
            journal.write_bytes(kept)
        again = ResultStore.open(machine(tmp_path), GUARD)
        assert (len(again.done), local(out)) == (10, set())
        await again.close()
        assert store.read(f"out/{SHARD}/{name}") == data


async def test_a_refusal_that_passes_holds_up_no_commit(
    store: ObjectStore, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    refused: list[StoreRequest] = []

    def fault(asked: StoreRequest) -> str | None:
        if is_part(asked) and asked.uploads and len(refused) < 3:
            refused.append(asked)
            return "denied"  # which pyarrow does not try again by itself
        return None

    store.fault = fault
    committed: list[int] = []
    out = machine(tmp_path)
    output = ResultStore.open(
        out, GUARD, options=options(part_rows=10), on_commit=lambda counts: committed.append(counts.rows)
    )
    output.describe({"engine": "fake"})
    for row in range(10):
        output.add(sample(row))
    while not refused:
        await asyncio.sleep(0.005)
    for row in range(10, 20):
        output.add(sample(row))
    while sum(committed) < 20:
        await asyncio.sleep(0.005)
    assert kinds(store)["part"] == 0, "all 20 were durable before the store took anything"
    with caplog.at_level(logging.WARNING):
        await output.close()
    assert len(refused) == 3
    assert (kinds(store)["part"], local(out)) == (2, set())
    [warning] = [r.getMessage() for r in caplog.records if "cannot be written" in r.getMessage()]
    assert "ACCESS_DENIED" in warning
    assert str(out.path) in warning


async def test_a_store_that_refuses_for_long_stops_the_run_and_loses_nothing(
    store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(uploads, "RETRY_SECONDS", 0.3)
    store.fault = lambda asked: "denied" if is_part(asked) and asked.uploads else None
    out = machine(tmp_path)
    with pytest.raises(StoppedEarly, match=r"part-.*cannot be written: .*ACCESS_DENIED.* run the same command again"):
        await fill(out, [sample(row) for row in range(10)])
    assert any(name.startswith("journal-") for name in local(out))
    store.fault = lambda asked: None
    output = ResultStore.open(machine(tmp_path), GUARD)
    assert len(output.done) == 10
    await output.close()
    assert kinds(store)["part"] == 1


async def test_a_part_counts_as_uploaded_once_it_is_seen(store: ObjectStore, tmp_path: Path) -> None:
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
    output = ResultStore.open(machine(tmp_path), GUARD, options=options(upload_seconds=0.1))
    output.describe({"engine": "fake"})
    output.add(sample(0))
    while kinds(store)["part"] < 1:
        await asyncio.sleep(0.01)
    output.add(sample(1))
    await output.close()
    assert kinds(store)["part"] == 2
    assert not ResultStore.open(tmp_path / "local", GUARD)._writer._part_seconds < float("inf"), (
        "a folder has no need of it"
    )


async def test_another_run_is_refused_wherever_it_comes_from(store: ObjectStore, tmp_path: Path) -> None:
    await fill(machine(tmp_path), [sample(0)])
    with pytest.raises(ResumeError, match=rf'^{URI}: belongs to a run with other settings:\n  --model: "shapes" there'):
        ResultStore.open(machine(tmp_path, "elsewhere"), replace(GUARD, options={"model": "another"}))


async def test_of_two_first_attempts_at_once_the_overwritten_one_uploads_nothing(
    store: ObjectStore, tmp_path: Path
) -> None:
    out = machine(tmp_path)
    output = ResultStore.open(out, GUARD, options=options())
    output.describe({"engine": "fake"})
    store.put("out/run.json", replace(GUARD, options={"model": "another"}).encode())  # as a late writer does
    output.add(sample(0))
    with pytest.raises(ResumeError, match='--model: "another" there, "shapes" here'):
        await output.close()
    assert kinds(store)["part"] == 0
    assert any(name.startswith("journal-") for name in local(out)), "what was answered is kept"


async def test_a_working_folder_is_one_runs_too(store: ObjectStore, tmp_path: Path) -> None:
    await die(machine(tmp_path), [sample(0)])
    store.clear()  # somebody begins anew in the same place
    with pytest.raises(ResumeError, match=r"belongs to a run with other settings(?s:.*)or remove .*did not upload"):
        ResultStore.open(machine(tmp_path), replace(GUARD, options={"model": "another"}))


async def test_two_machines_at_once(store: ObjectStore, tmp_path: Path) -> None:
    outs = [machine(tmp_path, name) for name in ("one", "two")]
    outputs = [ResultStore.open(out, GUARD, options=options(part_rows=5)) for out in outs]
    for output in outputs:
        output.describe({"engine": "fake"})
        for row in range(20):
            output.add(sample(row, response=f"of {output.attempt}"))
    await asyncio.gather(*(output.close() for output in outputs))
    assert kinds(store)["part"] == 8
    assert outputs[0].attempt != outputs[1].attempt
    report = merge(machine(tmp_path, "three"), tmp_path / "all.parquet", 20)
    table = pq.read_table(report.file)
    assert table["row"].to_pylist() == list(range(20))
    assert set(table["response"].to_pylist()) == {f"of {min(output.attempt for output in outputs)}"}


async def test_numbers_of_attempts_ascend(store: ObjectStore, tmp_path: Path) -> None:
    numbers = [(await fill(machine(tmp_path, name), [])).attempt for name in ("a", "b", "a", "c")]
    assert [number // SPAN for number in numbers] == [1, 2, 3, 4]


async def test_one_machine_has_one_runner(store: ObjectStore, tmp_path: Path) -> None:
    output = ResultStore.open(machine(tmp_path), GUARD)
    with pytest.raises(ResumeError, match="in use by another runner"):
        ResultStore.open(machine(tmp_path), GUARD)
    await output.close()


async def test_status_from_elsewhere(store: ObjectStore, tmp_path: Path) -> None:
    guard = replace(GUARD, total=30)
    output = ResultStore.open(machine(tmp_path), guard, options=options(part_rows=10))
    output.heartbeat(30)
    output.describe({"engine": "fake"})
    for row in range(20):
        output.add(sample(row))
    while kinds(store)["part"] < 2:
        await asyncio.sleep(0.01)
    found = status(machine(tmp_path, "elsewhere"))
    assert (found.output, found.rows, found.expected, found.states["running"]) == (URI, 20, 30, 1)
    assert found.shards[0].attempt == output.attempt
    await output.close()
    assert status(machine(tmp_path, "elsewhere")).states["stopped"] == 1
    await fill(machine(tmp_path), [sample(row) for row in range(20, 30)], guard, complete=True)
    assert status(machine(tmp_path, "elsewhere")).complete


async def test_an_attempt_without_rows_can_be_taken_back(store: ObjectStore, tmp_path: Path) -> None:
    one, two = (ResultStore.open(machine(tmp_path, name), GUARD) for name in ("one", "two"))
    await one.close()
    one.roll_back(logs=False)
    assert kinds(store) == {"run.json": 1, "attempt": 1}, "the other is still at work, on these terms"
    await two.close()
    two.roll_back(logs=False)
    assert store.names("out/") == []
    await fill(machine(tmp_path, "one"), [sample(0)], replace(GUARD, options={"model": "another"}))


def test_a_damaged_part_is_named(store: ObjectStore, tmp_path: Path) -> None:
    asyncio.run(fill(machine(tmp_path), [sample(0)]))
    [name] = [key for key in store.names("out/") if "part-" in key]
    store.put(f"out/{name}", b"PAR1 is not all there is to it")
    with pytest.raises(ResumeError, match=rf"{URI}/{name}: damaged"):
        ResultStore.open(machine(tmp_path), GUARD)


def test_marks_and_uploads_under_way_are_no_files(store: ObjectStore, tmp_path: Path) -> None:
    store.put(f"out/{SHARD}/part-0001-000001.parquet", b"")
    assert list(machine(tmp_path).shard(Shard()).names()) == []


def test_what_is_wrong_is_told_before_anything_else(store: ObjectStore, tmp_path: Path) -> None:
    def refusal(uri: str) -> str:
        with pytest.raises(OptionError) as raised:
            ResultStore.open(open_output(uri, tmp_path), GUARD)
        return str(raised.value)

    assert refusal("s3://nowhere/out") == "s3://nowhere/out: bucket 'nowhere' does not exist"
    assert "no bucket given" in refusal("s3://")
    assert "Unexpected query parameter" in refusal(f"s3://{BUCKET}/out?colour=red")
    store.fault = lambda asked: "denied" if asked.uploads else None
    assert refusal(URI).startswith(f"-o {URI}: cannot be written: When initiating")
    store.fault = lambda asked: "denied"
    assert "ACCESS_DENIED" in refusal(URI)
    assert "AWS_ACCESS_KEY_ID" in refusal(URI)
    for uri in ("ftp://host/out", "file:///tmp/out", "hdfs://host/out"):
        with pytest.raises(OptionError, match=r"wants a folder, or an address that begins with s3://, "):
            open_output(uri)


@pytest.mark.slow
def test_a_store_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    with pytest.raises(OptionError, match=rf"^{URI}: cannot be opened: .*NETWORK_CONNECTION.*AWS_ENDPOINT_URL"):
        ResultStore.open(machine(tmp_path), GUARD)


def test_a_read_that_fails_is_tried_again(store: ObjectStore) -> None:
    store.put("out/a", b"here")
    found = Bucket(URI)
    assert found.files().keys() == {"a"}
    refused: list[StoreRequest] = []

    def fault(asked: StoreRequest) -> str | None:
        refused.append(asked)
        return "denied" if len(refused) < 3 else None

    store.fault = fault
    assert found.read("a") == b"here"
    with pytest.raises(FileNotFoundError):
        found.read("b")


def test_an_upload_that_fails_leaves_nothing(store: ObjectStore, tmp_path: Path) -> None:
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


def test_an_upload_that_is_interrupted_leaves_no_beginning_of_a_file(
    store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bucket, "UPLOAD_CHUNK_BYTES", 6_000_000)
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


async def test_secrets_of_the_address_are_never_written(store: ObjectStore, tmp_path: Path) -> None:
    where = store.url.removeprefix("http://")
    uri = f"s3://THEKEY:HUSHHUSH@{BUCKET}/out?scheme=http&endpoint_override={where}"
    out = open_output(uri, tmp_path)
    assert isinstance(out, RemoteStorage)
    assert str(out) == URI
    await fill(out, [sample(0)], complete=True)
    merge(out)
    for folder, _, names in os.walk(tmp_path):
        assert "HUSH" not in folder
        for name in names:
            assert b"HUSHHUSH" not in await asyncio.to_thread(Path(folder, name).read_bytes)
    for key in store.names():
        assert b"HUSHHUSH" not in store.read(key)
    for bad in ("s3://THEKEY:HUSH HUSH@night/out", "s3://THEKEY:HUSH/HUSH@night/out", "s3://THEKEY:HUSHHUSH@/out"):
        with pytest.raises(OptionError) as raised:
            ResultStore.open(open_output(bad, tmp_path), GUARD)
        assert "HUSH" not in str(raised.value)


def test_where_the_working_folder_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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


async def test_the_working_folder_can_go_between_runs(store: ObjectStore, tmp_path: Path) -> None:
    await fill(machine(tmp_path), [sample(row) for row in range(5)])
    shutil.rmtree(tmp_path / "here")
    await fill(machine(tmp_path), [sample(5)])
    assert merge(machine(tmp_path), total=6).rows == 6
    attempts = [msgspec.json.decode(store.read(f"out/{key}"), type=AttemptFile)
                for key in store.names("out/") if "attempt-" in key]  # fmt: skip
    assert [attempt.metadata for attempt in attempts] == [{"engine": "fake"}] * 2
    assert machine(tmp_path).run_file() == GUARD
