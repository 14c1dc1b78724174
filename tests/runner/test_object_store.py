"""Runs with `-o s3://…`: killed, cut off from the store, moved to another machine."""

import json
import random
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ..faults.store import BUCKET, ObjectStore, StoreRequest
from .running import (
    PATIENCE,
    alive,
    command,
    descendants,
    environment,
    journalled,
    questions,
    responses,
    run,
    shell,
    wait_until,
)

URI = f"s3://{BUCKET}/run"
ROWS = 4000


@pytest.fixture
def store() -> Iterator[ObjectStore]:
    with ObjectStore() as store:
        yield store


class Machine:
    """A machine, which has working directories of its own."""

    def __init__(self, store: ObjectStore, state: Path) -> None:
        self._store, self.state = store, state

    def environment(self) -> dict[str, str]:
        return environment(**self._store.environment(self.state))

    def command(self, manifest: Path, *flags: str, fake: dict[str, object] | None = None) -> list[str]:
        return command(manifest, "-o", URI, "--part-rows", "200", *flags, fake=fake)

    def run(self, manifest: Path, *flags: str, fake: dict[str, object] | None = None):
        return shell(self.command(manifest, *flags, fake=fake), env=self.environment())

    def start(self, manifest: Path, *flags: str, fake: dict[str, object] | None = None) -> subprocess.Popen[bytes]:
        self.state.mkdir(exist_ok=True)
        with (self.state / "log").open("wb") as log:
            return subprocess.Popen(
                self.command(manifest, *flags, fake=fake), stdout=log, stderr=log, env=self.environment()
            )

    def journalled(self) -> int:
        return sum(journalled(path) for path in self.state.iterdir() if path.is_dir())


def results(store: ObjectStore) -> pa.Table:
    return pq.read_table(pa.BufferReader(store.read("run/results.parquet")))


def assert_right(store: ObjectStore, rows: int) -> None:
    table = results(store)
    assert table["row"].to_pylist() == list(range(rows))
    assert table["response"].to_pylist() == [f"q {row}" for row in range(rows)]


def parts(store: ObjectStore) -> list[str]:
    return [key for key in store.names("run/") if "/part-" in key]


def test_a_run_into_a_bucket(store, tmp_path):
    manifest, here = questions(tmp_path / "m.jsonl", 500), Machine(store, tmp_path / "here")
    done = here.run(manifest)
    assert (done.returncode, done.stdout) == (0, "")
    assert done.stderr.splitlines()[-1] == f"output: {URI}/results.parquet"
    assert "Warning" not in done.stderr
    assert_right(store, 500)
    local = run(manifest, output=tmp_path / "local", part_rows=200)
    assert responses(local) == results(store)["response"].to_pylist()
    assert b'"rows": 500' in store.read("run/summary.json")
    assert not list((tmp_path / "here").rglob("part-*")), "no part stays on the disk"


@pytest.mark.slow
def test_the_same_command_again_and_a_merge_elsewhere(store, tmp_path):
    manifest = questions(tmp_path / "m.jsonl", 500)
    for state in ("here", "here", "elsewhere"):
        done = Machine(store, tmp_path / state).run(manifest)
        assert done.returncode == 0
    assert "nothing left to do" in done.stderr
    merged = shell(
        [*command(None)[:3], "merge", URI, str(tmp_path / "r.jsonl")],
        env=Machine(store, tmp_path / "third").environment(),
    )
    assert (merged.returncode, merged.stderr) == (0, f"{tmp_path / 'r.jsonl'}: 500 rows, 500 ok, 0 failed\n")


def test_an_inaccessible_store_is_reported_before_a_model_is_loaded(store, tmp_path):
    manifest, here = questions(tmp_path / "m.jsonl", 5), Machine(store, tmp_path / "here")
    store.fault = lambda asked: "denied"
    done = here.run(manifest)
    assert done.returncode == 2
    assert "ACCESS_DENIED" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list((tmp_path / "here").rglob("engine-*.log"))


@pytest.mark.crash
@pytest.mark.timeout(300)
def test_kill_9_on_one_machine_and_on_another(store, tmp_path):
    manifest = questions(tmp_path / "m.jsonl", ROWS)
    machines = [Machine(store, tmp_path / name) for name in ("one", "two")]
    flags = ("--batch-size", "8", "--commit-seconds", "0.02", "--upload-seconds", "1")
    draw, uploaded = random.Random(11), 0
    for attempt in range(6):
        machine = machines[attempt % 2]
        process = machine.start(manifest, *flags, fake={"delay": 0.1, "spread": 0.1})
        had = machine.journalled()
        wait_until(lambda m=machine, p=process, had=had: m.journalled() > had or p.poll() is not None)
        time.sleep(draw.random() * 1.5)
        others = descendants(process.pid)
        process.kill()
        assert process.wait(PATIENCE) == -signal.SIGKILL, (machine.state / "log").read_text()
        wait_until(lambda others=others: not alive(others))
        for key in parts(store):  # each is complete
            pq.read_table(pa.BufferReader(store.read(f"run/{key}")))
        assert len(parts(store)) >= uploaded, "uploaded parts stay"
        uploaded = len(parts(store))
    assert uploaded
    for machine in machines:  # each uploads what it has left
        merged = shell(
            [*command(None)[:3], "merge", URI, str(tmp_path / "r.parquet"), "--partial"], env=machine.environment()
        )
        had = pq.read_metadata(tmp_path / "r.parquet").num_rows
        done = machine.run(manifest)
        assert done.returncode == 0, (merged.stderr, done.stderr)
        assert f"{had:,} of them were done before" in done.stderr or "nothing left to do" in done.stderr
        assert not list(machine.state.rglob("journal-*"))
    assert_right(store, ROWS)


@pytest.mark.crash
def test_a_kill_in_the_middle_of_an_upload_leaves_no_object(store, tmp_path):
    manifest, here = questions(tmp_path / "m.jsonl", 200), Machine(store, tmp_path / "here")
    hanging: list[StoreRequest] = []

    def fault(asked: StoreRequest) -> str | None:
        if "/part-" in asked.path and "partNumber" in asked.path:
            hanging.append(asked)
            return "hang"
        return None

    store.fault = fault
    process = here.start(manifest)
    wait_until(lambda: hanging or process.poll() is not None)
    others = descendants(process.pid)
    process.kill()
    assert process.wait(PATIENCE) == -signal.SIGKILL
    wait_until(lambda: not alive(others))
    assert parts(store) == []
    store.fault = lambda asked: None
    elsewhere = Machine(store, tmp_path / "elsewhere")
    assert elsewhere.run(manifest, "--limit", "1").returncode == 0, "it does not block another machine"
    done = here.run(manifest)
    assert done.returncode == 0
    assert "200 of them were done before this run" in done.stderr or "nothing left to do" in done.stderr
    assert_right(store, 200)


@pytest.mark.slow
def test_a_store_that_goes_away_for_longer_than_pyarrow_waits(store, tmp_path):
    manifest, here = questions(tmp_path / "m.jsonl", 400), Machine(store, tmp_path / "here")
    began: list[float] = []

    def fault(asked: StoreRequest) -> str | None:
        if "/part-" in asked.path and not began:
            began.append(time.monotonic())
        return "drop" if began and time.monotonic() - began[0] < 9 else None

    store.fault = fault
    done = here.run(manifest)
    assert done.returncode == 0, done.stderr
    assert "cannot be written" in done.stderr, "the outage is reported"
    assert_right(store, 400)


@pytest.mark.slow
def test_two_machines_concurrently(store, tmp_path):
    manifest = questions(tmp_path / "m.jsonl", 600)
    machines = [Machine(store, tmp_path / name) for name in ("one", "two")]
    running = [machine.start(manifest, fake={"delay": 0.02}) for machine in machines]
    ends = [process.wait(PATIENCE) for process in running]
    assert ends == [0, 0], [(machine.state / "log").read_text() for machine in machines]
    assert len({key.split("-")[-2] for key in parts(store)}) == 2, "both have answered rows"
    assert_right(store, 600)


@pytest.mark.slow
def test_failed_rows_are_retried_elsewhere(store, tmp_path):
    manifest = questions(tmp_path / "m.jsonl", 50)
    assert Machine(store, tmp_path / "one").run(manifest, fake={"fail_every": 7}).returncode == 3
    two = Machine(store, tmp_path / "two")
    again = [*command(None)[:3], "retry", URI, "--all", "--image-workers", "1", "--quiet"]
    done = shell(again, env=two.environment())
    assert done.returncode == 0, done.stderr
    status = json.loads(shell([*command(None)[:3], "status", URI, "--json"], env=two.environment()).stdout)
    assert (status["ok"], status["complete"], status["shards"][0]["retry"]) == (50, True, 1)
    assert_right(store, 50)


@pytest.mark.slow
def test_shards_and_a_merge_elsewhere(store, tmp_path):
    manifest = questions(tmp_path / "m.jsonl", 300)
    for shard in ("0/2", "1/2"):
        assert Machine(store, tmp_path / shard[0]).run(manifest, "--shard", shard).returncode == 0
    merged = shell([*command(None)[:3], "merge", URI], env=Machine(store, tmp_path / "third").environment())
    assert merged.returncode == 0, merged.stderr
    assert_right(store, 300)
