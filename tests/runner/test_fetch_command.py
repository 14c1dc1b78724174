"""`batchvl fetch`: what a run reads afterwards is what it would have fetched itself, whatever happened in between."""

from __future__ import annotations

import asyncio
import base64
import errno
import io
import json
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
from collections import Counter
from contextlib import contextmanager
from random import Random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from aiohttp import web
from PIL import Image

import batchvl
from batchvl.errors import ManifestError, OptionError, ResumeError, StoppedEarly

from ..crash.disks import Failing, Seam
from ..faults.server import FaultServer
from ..manifest.tars import img2dataset
from ..manifest.writing import write
from .running import PATIENCE, alive, answers, descendants, environment, make_image, run, wait_until

ROWS = 40
FORMATS = pytest.mark.parametrize("format", ["parquet", "tar"])
FILE_BYTES = 10_000
"""Bytes of a file: a few rows of the tests' images."""


class HoldingServer(FaultServer):
    """Also has /held/NAME: `images[NAME]`, held back until `release` is called; /flaky-image/NAME fails once."""

    def __init__(self) -> None:
        super().__init__()
        self._released = asyncio.Event()
        self._failed = False

    def release(self) -> None:
        self._released.set()

    async def _held(self, request: web.Request) -> web.StreamResponse:
        await self._released.wait()
        return web.Response(body=self.images[request.path.split("/")[2]], content_type="image/png")

    async def _missing(self, request: web.Request) -> web.StreamResponse:
        if not request.path.startswith("/flaky-image/"):
            return await super()._missing(request)
        self._failed, failed = True, self._failed
        return web.Response(body=self.images[request.path.split("/")[2]]) if failed else web.Response(status=500)


@contextmanager
def serving():
    """Run a server in a thread. Yields it, and a function that calls another one on its loop."""
    loop, ready, stop = asyncio.new_event_loop(), threading.Event(), asyncio.Event()
    servers = []

    async def serve() -> None:
        async with HoldingServer() as server:
            servers.append(server)
            ready.set()
            await stop.wait()

    thread = threading.Thread(target=lambda: loop.run_until_complete(serve()))
    thread.start()
    ready.wait()
    try:
        yield servers[0], loop.call_soon_threadsafe
    finally:
        loop.call_soon_threadsafe(servers[0].release)
        loop.call_soon_threadsafe(stop.set)
        thread.join()
        loop.close()


@pytest.fixture
def served():
    with serving() as (server, call):
        for number in range(ROWS):
            server.images[f"{number}.png"] = png(number)
        yield server, call


def png(number, size=(30, 20)) -> bytes:
    file = io.BytesIO()
    width, height = size
    Image.frombytes("RGB", size, Random(number).randbytes(3 * width * height)).save(file, "PNG")
    return file.getvalue()


def fetch(manifest, output, **options):
    settings = {"quiet": True, "image_workers": 1, "allow_private": ["127.0.0.0/8"], "file_bytes": FILE_BYTES}
    return batchvl.fetch(manifest, output=output, **{**settings, **options})


def command(manifest, output, *flags):
    first = [sys.executable, "-m", "batchvl", "fetch", str(manifest), "-o", str(output), "--image-workers", "1"]
    return [*first, "--allow-private", "127.0.0.0/8", "--file-bytes", str(FILE_BYTES), *flags]


def web_manifest(path, server, held=()):
    """Write a manifest of ROWS images, of which some are held back."""
    kinds = ["held" if number in held else "image" for number in range(ROWS)]
    rows = [{"id": f"r{n}", "image": server.url(f"/{kind}/{n}.png"), "n": n} for n, kind in enumerate(kinds)]
    return write(path, rows)


def fetched(output):
    """Return the rows of all files, in the order of the manifest, each with the bytes of its `image`."""
    rows = [row for path in sorted(output.glob("*.parquet")) for row in pq.read_table(path).to_pylist()]
    for row in rows:
        if isinstance(row.get("image"), str):
            row["image"] = {"bytes": member(output, row["image"]), "path": row["source_images"]}
    return sorted(rows, key=lambda row: row["source_row"])


def member(output, path):
    """Return the contents of a tar's member, as Python reads it."""
    tar, _, name = path.partition("#")
    with tarfile.open(output / tar) as file:
        return file.extractfile(name).read()


def complete_rows(output):
    """Return the numbers of the rows in all files."""
    return [row["source_row"] for row in fetched(output)]


def source_rows(output):
    """Return the numbers of the rows in all files, of a fetch that nobody killed: no tar is without its rows."""
    rows = complete_rows(output)
    tars = sorted(output.glob("*.tar"))
    if tars:
        assert [path.stem.removeprefix("images") for path in tars] == sorted(
            path.stem.removeprefix("rows") for path in output.glob("*.parquet")
        )
        keys = [name[:9] for tar in tars for name in names(tar) if name.endswith(".json")]
        assert sorted(map(int, keys)) == rows
    return rows


def names(tar):
    with tarfile.open(tar) as file:
        return file.getnames()


def recorded(output):
    """Return the merged records."""
    return pq.read_table(output / "_fetch" / "results.parquet").to_pylist()


def leftovers(output):
    return [path.name for path in output.iterdir() if path.name.startswith(".")]


def by_id(summary):
    return {row["id"]: row for row in answers(summary)}


@pytest.fixture
def mixed(served, tmp_path):
    """A manifest with every kind of image and of prompt."""
    server, _ = served
    make_image(tmp_path / "file.png", 7)
    uri = "data:image/png;base64," + base64.b64encode(png(8)).decode()
    part = {"type": "text", "text": "and now?"}
    url = {"type": "image_url", "image_url": {"url": server.url("/image/5.png")}}
    rows = [
        {"id": "web", "prompt": "q", "images": server.url("/image/0.png")},
        {"id": "two", "prompt": ["q 1", "q 2"], "images": [server.url("/image/1.png"), server.url("/image/2.png?a=b")]},
        {"id": "file", "prompt": "in {x}", "images": "file.png", "generation": {"max_new_tokens": 7}},
        {"id": "inline", "prompt": "q", "images": [uri], "x": 3},
        {"id": "none", "prompt": "no image"},
        {"id": "chat", "messages": [{"role": "user", "content": [part, url]}], "x": "text"},
        {"id": "both", "messages": [{"role": "user", "content": [url, part]}], "images": server.url("/image/3.png")},
        {"id": "places", "prompt": "<IMAGE_TOKEN> or <IMAGE_TOKEN>?", "images": [server.url("/image/4.png"), uri]},
    ]
    return write(tmp_path / "m.jsonl", rows)


@FORMATS
@pytest.mark.parametrize("decode", [True, False])
def test_a_run_on_the_files_is_a_run_on_the_manifest(decode, format, mixed, tmp_path):
    """Also with --keep, and with a column of several types."""
    summary = fetch(mixed, tmp_path / "out", decode=decode, format=format)
    assert (summary.rows, summary.ok, summary.exit_code, summary.message) == (8, 8, 0, "")
    more = ("source_images",) if format == "tar" else ()
    options = {"allow_private": ["127.0.0.0/8"]}
    there = by_id(run(mixed, output=tmp_path / "there", keep=("x",), **options))
    here = by_id(run(tmp_path / "out", output=tmp_path / "here", keep=("x", *more), **options))
    assert here.keys() == there.keys()
    for id, row in there.items():
        differing = {"row", "seconds", "images"}
        assert {k: v for k, v in here[id].items() if k not in {*differing, *more}} == {
            k: v for k, v in row.items() if k not in differing
        }
        facts = [[{k: v for k, v in image.items() if k != "source"} for image in r["images"]] for r in (here[id], row)]
        assert facts[0] == facts[1], "the same bytes"
    sources = [image["source"] for image in here["two"]["images"]]
    if format == "tar":
        assert [source.partition("#")[2] for source in sources] == ["000000001.0.png", "000000001.1.png"]
        sources = here["two"]["source_images"]
    assert sources == [image["source"] for image in there["two"]["images"]], "without the query, which may be secret"


def test_the_columns_of_parquet_are_copied_as_they_are(served, tmp_path):
    server, _ = served
    schema = pa.schema(
        [
            ("id", pa.uint32()),
            ("prompt", pa.string()),
            ("image", pa.string()),
            ("generation", pa.struct([("seed", pa.int64())])),
            ("when", pa.timestamp("ns", "UTC")),
            ("label", pa.dictionary(pa.int8(), pa.string())),
            ("box", pa.list_(pa.float32(), 2)),
        ]
    )
    row = {"prompt": "q", "generation": {"seed": 3}, "when": 1_700_000_000_123_456_789, "label": "a", "box": [0.5, 1]}
    rows = [{"id": n, "image": server.url(f"/image/{n}.png"), **row} for n in range(3)]
    rows.append({"id": 3, "image": None, **row})
    manifest = write(tmp_path / "m.parquet", rows, schema=schema)
    assert fetch(manifest, tmp_path / "out").ok == 4

    [path] = (tmp_path / "out").glob("*.parquet")
    table = pq.read_table(path).sort_by("source_row")
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    assert table.schema.field("image").type == image, "not a list, as in the manifest"
    assert table["image"][3].as_py() is None
    assert table["image"].combine_chunks().field("bytes").to_pylist()[:3] == [png(n) for n in range(3)]
    before = (
        pq.read_table(manifest)
        .drop_columns("image")
        .cast(
            pa.schema([f if f.name != "label" else pa.field("label", pa.string()) for f in schema if f.name != "image"])
        )
    )
    assert table.drop_columns(["source_row", "image"]).equals(before)


def test_rows_that_fail_are_records_with_the_codes_of_a_run(served, tmp_path):
    server, _ = served
    server.images["cut.png"] = png(1, (400, 300))[:-200]
    server.images["page.png"] = b"<!DOCTYPE html><title>gone</title>"
    paths = ("/image/1.png", "/image/cut.png", "/image/page.png", "/status/404", "/empty")
    rows = [{"id": f"r{n}", "image": server.url(path)} for n, path in enumerate(paths)]
    rows.append({"id": "r5", "image": ["x", 3]})
    manifest = write(tmp_path / "m.jsonl", rows)
    strict = fetch(manifest, tmp_path / "strict")
    expected = [None, "truncated_image", "not_an_image", "http_status", "empty_image", "invalid_row"]
    records = recorded(tmp_path / "strict")
    assert [row["error"] and row["error"]["code"] for row in records] == expected
    assert [row["id"] for row in records] == [f"r{n}" for n in range(6)]
    assert (strict.exit_code, strict.failed) == (3, 5)
    assert "404" in records[3]["error"]["message"]
    assert source_rows(tmp_path / "strict") == [0]
    assert records[0]["file"] == next((tmp_path / "strict").glob("*.parquet")).name

    quick = fetch(manifest, tmp_path / "quick", decode=False, accept_failures="4")
    assert quick.exit_code == 0
    assert source_rows(tmp_path / "quick") == [0, 1], "truncated, but an image by its first bytes"


@FORMATS
def test_a_killed_fetch_goes_on_without_what_is_in_complete_files(format, served, tmp_path):
    server, call = served
    out = tmp_path / "out"
    manifest = web_manifest(tmp_path / "m.jsonl", server, held=range(36, ROWS))
    with subprocess.Popen(command(manifest, out, "-q", "--format", format), env=environment()) as process:
        wait_until(lambda: len(list(out.glob("*-*.parquet"))) >= 2 or process.poll() is not None)
        others = descendants(process.pid)
        process.send_signal(signal.SIGKILL)
        assert process.wait(PATIENCE) == -signal.SIGKILL
    wait_until(lambda: not alive(others))
    done = set(complete_rows(out))
    assert 4 < len(done) < ROWS
    prefix = "images" if format == "parquet" else "rows"
    (out / f".{prefix}-00000-0001-000009.parquet.tmp").write_bytes(b"PAR1")  # as if it had been writing
    before = Counter(server.requests)
    call(server.release)
    summary = fetch(manifest, out, format=format)
    assert (summary.rows, summary.ok, summary.exit_code) == (ROWS, ROWS, 0)
    assert source_rows(out) == list(range(ROWS)), "each row once"
    again = {path for path, times in server.requests.items() if times > before[path] > 0}
    assert {f"/image/{row}.png" for row in done}.isdisjoint(again)
    assert [row["row"] for row in recorded(out)] == list(range(ROWS))
    assert leftovers(out) == []
    assert [row["image"]["bytes"] for row in fetched(out)] == [png(number) for number in range(ROWS)]


@FORMATS
def test_rows_of_a_complete_file_count_even_if_they_were_not_recorded(format, served, tmp_path):
    """A process may be killed between the two. Nor do records count whose file is gone."""
    server, _ = served
    out = tmp_path / "out"
    manifest = web_manifest(tmp_path / "m.jsonl", server)
    fetch(manifest, out, format=format)
    records = recorded(out)
    [directory] = (out / "_fetch").glob("shard-*")
    for path in (*directory.glob("part-*"), directory / "complete.json", out / "_fetch" / "results.parquet"):
        path.unlink()
    server.requests.clear()
    summary = fetch(manifest, out, format=format)
    assert (summary.rows, summary.ok, summary.exit_code) == (ROWS, ROWS, 0)
    assert not server.requests
    for record in records:
        for image in record["images"]:
            image["width"] = image["height"] = None  # not in the files
    assert [{**row, "seconds": 0, "attempts": 1} for row in recorded(out)] == records

    lost = sorted(out.glob("*.parquet"))[0]
    rows = pq.read_table(lost)["source_row"].to_pylist()
    lost.unlink()
    summary = fetch(manifest, out, format=format)
    assert (summary.rows, summary.ok, summary.resumed, summary.exit_code) == (ROWS, ROWS, ROWS - len(rows), 0)
    assert server.requests == {f"/image/{row}.png": 1 for row in rows}
    assert source_rows(out) == list(range(ROWS))


@FORMATS
def test_a_stop_completes_the_file(format, served, tmp_path):
    server, call = served
    out = tmp_path / "out"
    manifest = web_manifest(tmp_path / "m.jsonl", server, held=range(1, ROWS))
    log = tmp_path / "log"
    words = command(manifest, out, "--format", format)
    with log.open("wb") as file, subprocess.Popen(words, env=environment(), stderr=file) as process:
        wait_until(lambda: server.requests["/image/0.png"] and server.open >= 4)
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE) == 75, log.read_text()
    text = log.read_text()
    assert "SIGTERM: no new rows; completing the file with those that have arrived" in text
    assert "run the same command again to resume" in text
    assert "Traceback" not in text
    assert "never retrieved" not in text
    assert leftovers(out) == []
    done = source_rows(out)
    assert done in ([], [0])
    call(server.release)
    summary = fetch(manifest, out, format=format)
    assert (summary.rows, summary.resumed, summary.exit_code) == (ROWS, len(done), 0)
    assert source_rows(out) == list(range(ROWS))


def test_a_time_limit_and_a_limit_of_rows(served, tmp_path):
    server, call = served
    out = tmp_path / "out"
    manifest = web_manifest(tmp_path / "m.jsonl", server, held=[3])
    assert fetch(manifest, out, limit=3).exit_code == 0
    assert source_rows(out) == [0, 1, 2]
    stopped = fetch(manifest, out, stop_after=0.5)
    assert stopped.exit_code == 75
    assert "--stop-after" in stopped.message
    call(server.release)
    assert fetch(manifest, out).ok == ROWS
    assert source_rows(out) == list(range(ROWS))


@FORMATS
def test_shards_write_files_of_their_own(format, served, tmp_path):
    server, _ = served
    out = tmp_path / "out"
    manifest = web_manifest(tmp_path / "m.jsonl", server)
    for shard in ("1/3", "0/3", "2/3"):
        summary = fetch(manifest, out, shard=shard, format=format)
        assert summary.exit_code == 0
        assert summary.ok == summary.expected
    assert source_rows(out) == list(range(ROWS))
    assert {path.name.split("-")[1] for path in out.glob("*-*")} == {f"{shard:05d}" for shard in range(3)}
    assert batchvl.status(out / "_fetch").complete
    assert batchvl.merge(out / "_fetch").complete
    assert [row["id"] for row in recorded(out)] == [f"r{n}" for n in range(ROWS)]
    with pytest.raises(ResumeError, match="number of shards"):
        fetch(manifest, out, shard="0/2", format=format)


@FORMATS
def test_a_full_disk_stops_it_and_nothing_is_lost(format, served, tmp_path):
    server, _ = served
    manifest = web_manifest(tmp_path / "m.jsonl", server)
    counting = Seam()
    fetch(manifest, tmp_path / "counted", disk=counting, format=format)
    calls = len(counting.names)
    assert calls > 40
    stopped = 0
    for number, at in enumerate(range(8, calls, calls // 9)):
        out = tmp_path / f"out-{number}"
        try:
            summary = fetch(manifest, out, disk=Failing(at, errno.ENOSPC), format=format)
            code, message = summary.exit_code, summary.message
        except StoppedEarly as error:
            code, message = error.exit_code, str(error)
        if code:
            stopped += 1
            assert code == 75, (at, message)
            assert "ENOSPC" in message
        done = complete_rows(out)
        summary = fetch(manifest, out, format=format)
        assert (summary.rows, summary.ok, summary.exit_code) == (ROWS, ROWS, 0), at
        assert source_rows(out) == list(range(ROWS)), at
        assert set(done) <= set(source_rows(out))
        assert leftovers(out) == []
        assert [row["row"] for row in recorded(out)] == list(range(ROWS))
        shutil.rmtree(out)
    assert stopped > 5


KILLING = """
import json, sys, batchvl
from tests.crash.disks import disk_of

manifest, out, disk, options = sys.argv[1:]
batchvl.fetch(manifest, output=out, disk=disk_of(json.loads(disk)), quiet=True, image_workers=1,
              allow_private=["127.0.0.0/8"], **json.loads(options))
"""


def kill(manifest, out, disk, **options):
    """Fetch in a process whose disk kills it."""
    words = [sys.executable, "-c", KILLING, str(manifest), str(out), json.dumps(disk), json.dumps(options)]
    assert subprocess.run(words, env=environment(), timeout=PATIENCE, check=False).returncode == -signal.SIGKILL


@FORMATS
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_kill_at_a_rename(when, format, served, tmp_path):
    """Before it nothing is complete, nor is a tar without its rows; after it nothing is recorded. Both are repaired."""
    server, _ = served
    manifest = web_manifest(tmp_path / "m.jsonl", server)
    counting = Seam()
    fetch(manifest, tmp_path / "counted", disk=counting, format=format)
    renames = [at for at, name in enumerate(counting.names, 1) if name == "rename"]
    seen = set()
    for number, at in enumerate(renames[1:4]):  # the first is about run.json and the attempt
        out = tmp_path / f"out-{number}"
        kill(manifest, out, {"kill": at, "when": when}, format=format, file_bytes=FILE_BYTES)
        rows, tars = len(list(out.glob("*.parquet"))), len(list(out.glob("*.tar")))
        seen.add(tars - rows if format == "tar" else rows)
        done, before = complete_rows(out), Counter(server.requests)
        summary = fetch(manifest, out, format=format)
        assert (summary.rows, summary.ok, summary.exit_code) == (ROWS, ROWS, 0)
        assert source_rows(out) == list(range(ROWS))
        assert [row["row"] for row in recorded(out)] == list(range(ROWS))
        assert leftovers(out) == []
        assert all(server.requests[f"/image/{row}.png"] == before[f"/image/{row}.png"] for row in done)
    assert seen >= ({0, 1} if format == "tar" else {1, 2})


@FORMATS
@pytest.mark.parametrize("when", ["before", "middle"])
def test_kills_from_the_first_call_to_the_last(when, format, tmp_path):
    """Of the calls to the file system."""
    (tmp_path / "in").mkdir()
    for number in range(6):
        (tmp_path / f"in/{number}.png").write_bytes(png(number))
    manifest = write(tmp_path / "in/m.jsonl", [{"id": n, "image": f"{n}.png"} for n in range(6)])
    options = {"format": format, "file_bytes": 3000}
    counting = Seam()
    fetch(manifest, tmp_path / "counted", disk=counting, **options)
    calls = len(counting.names) if when == "before" else counting.names.count("write")
    for at in range(2, calls - 2, calls // 4):
        out = tmp_path / f"out-{at}"
        kill(manifest, out, {"kill": at, "when": when}, **options)
        rows = complete_rows(out) if out.exists() else []
        assert len(rows) == len(set(rows)), at
        summary = fetch(manifest, out, **options)
        assert (summary.rows, summary.ok, summary.exit_code) == (6, 6, 0), at
        assert source_rows(out) == list(range(6)), at
        assert [row["image"]["bytes"] for row in fetched(out)] == [png(number) for number in range(6)], at
        assert leftovers(out) == [], at


def test_a_retry_fetches_what_failed_for_a_time(served, tmp_path):
    server, _ = served
    rows = [{"image": server.url(f"/{path}")} for path in ("image/0.png", "flaky-image/1.png", "status/404")]
    manifest = write(tmp_path / "m.jsonl", rows)
    first = fetch(manifest, tmp_path / "out", fetch_retries=0)
    assert first.failures == {"http_retryable": 1, "http_status": 1}
    server.requests.clear()
    again = fetch(manifest, tmp_path / "out", retry=True)
    assert (again.rows, again.failures) == (3, {"http_status": 1})
    assert server.requests == {"/flaky-image/1.png": 1}
    assert source_rows(tmp_path / "out") == [0, 1]
    assert [row["status"] for row in recorded(tmp_path / "out")] == ["ok", "ok", "failed"]


def test_a_row_that_a_killed_retry_put_into_a_file_counts_once(served, tmp_path):
    """Its file was complete, but the retry was killed before it recorded the row."""
    server, _ = served
    out = tmp_path / "out"
    rows = [{"image": server.url(f"/{path}")} for path in ("image/0.png", "flaky-image/1.png", "status/404")]
    manifest = write(tmp_path / "m.jsonl", rows)
    assert fetch(manifest, out, fetch_retries=0).failed == 2
    shutil.copytree(out, tmp_path / "before")
    assert fetch(manifest, out, retry=True).failed == 1
    shutil.rmtree(out / "_fetch")
    shutil.copytree(tmp_path / "before" / "_fetch", out / "_fetch")
    shutil.copytree(out, tmp_path / "again")

    server.requests.clear()
    summary = fetch(manifest, out)
    assert (summary.rows, summary.ok, summary.failures) == (3, 2, {"http_status": 1})
    assert (summary.expected, summary.exit_code) == (3, 3)
    assert [row["status"] for row in recorded(out)] == ["ok", "ok", "failed"]
    summary = fetch(manifest, tmp_path / "again", retry=True)
    assert (summary.rows, summary.ok, summary.failures) == (3, 2, {"http_status": 1})
    assert not server.requests


@FORMATS
def test_no_file_is_overwritten_if_the_records_are_removed(format, served, tmp_path):
    """Attempts are numbered from 1 again then."""
    server, _ = served
    out = tmp_path / "out"
    manifest = web_manifest(tmp_path / "m.jsonl", server)
    fetch(manifest, out, limit=20, format=format)
    shutil.rmtree(out / "_fetch")
    assert fetch(manifest, out, format=format).ok == ROWS
    assert source_rows(out) == list(range(ROWS))


def test_a_second_fetch_into_the_same_directory_is_refused(served, tmp_path):
    server, _ = served
    out = tmp_path / "out"
    manifest = web_manifest(tmp_path / "m.jsonl", server, held=[0])
    with subprocess.Popen(command(manifest, out, "-q"), env=environment()) as process:
        wait_until(lambda: server.requests["/held/0.png"])
        with pytest.raises(ResumeError, match=f"in use by another runner .*process {process.pid}"):
            fetch(manifest, out)
        process.kill()
    other = write(tmp_path / "other.jsonl", [{"image": server.url("/image/1.png")}])
    with pytest.raises(ResumeError, match="manifest's contents"):
        fetch(other, out)


def test_what_cannot_be_fetched_is_refused(tmp_path):
    manifest = write(tmp_path / "m.jsonl", [{"prompt": "q", "image": "a.png"}])
    with pytest.raises(OptionError, match="--model: not an option of fetch"):
        fetch(manifest, tmp_path / "out", model="shapes")
    with pytest.raises(OptionError, match="-o: expected a directory"):
        fetch(manifest, "s3://bucket/images")
    with pytest.raises(OptionError, match="--file-bytes"):
        fetch(manifest, tmp_path / "out", file_bytes="much")
    with pytest.raises(ManifestError, match="no column of images"):
        fetch(write(tmp_path / "n.jsonl", [{"prompt": "q"}]), tmp_path / "out")
    with pytest.raises(ManifestError, match="source_row"):
        fetch(write(tmp_path / "s.jsonl", [{"image": "a.png", "source_row": 1}]), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@FORMATS
def test_rows_with_the_same_image_each_have_it(format, served, tmp_path):
    """One request, and a copy in every row: a file is complete in itself."""
    server, _ = served
    manifest = write(tmp_path / "m.jsonl", [{"image": server.url(f"/image/{n % 2}.png")} for n in range(6)])
    fetch(manifest, tmp_path / "out", format=format)
    assert [row["image"]["bytes"] for row in fetched(tmp_path / "out")] == [png(n % 2) for n in range(6)]
    assert set(server.requests.values()) == {1}


def test_it_stops_at_too_many_failures(served, tmp_path):
    server, _ = served
    rows = [{"image": server.url(f"/status/404?{n}")} for n in range(20)] + [{"image": server.url("/held/0.png")}]
    summary = fetch(write(tmp_path / "m.jsonl", rows), tmp_path / "out", max_failures="10")
    assert summary.exit_code == 4
    assert "--max-failures" in summary.message


def test_the_command_says_what_it_does_and_writes_its_summary(served, tmp_path):
    server, _ = served
    manifest = web_manifest(tmp_path / "m.jsonl", server)
    done = subprocess.run(
        command(manifest, tmp_path / "out"), env=environment(), capture_output=True, text=True, timeout=PATIENCE
    )
    assert done.returncode == 0, done.stderr
    lines = done.stderr.splitlines()
    assert lines[0] == "fetching the images of column 'image', decoded to check them: 40 rows"
    assert lines[1] == "copied as they are: id, n"
    assert "40 rows done: 40 ok, 0 failed" in lines
    summary = json.loads((tmp_path / "out/_fetch/summary.json").read_bytes())
    assert (summary["images"], summary["bytes"]) == (ROWS, sum(len(png(number)) for number in range(ROWS)))
    assert summary["files"] == len(list((tmp_path / "out").glob("*.parquet"))) > 2


def test_a_run_is_told_which_column_has_the_images(tmp_path):
    make_image(tmp_path / "cat.png", 1)
    manifest = write(tmp_path / "m.jsonl", [{"prompt": "q", "photo of": "cat.png"}])
    done = subprocess.run(
        command(manifest, tmp_path / "an out", "--image-column", "photo of"),
        env=environment(),
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert f"to read them: batchvl run '{tmp_path}/an out' --image-column 'photo of'" in done.stderr.splitlines()


def test_what_img2dataset_wrote_is_read_as_a_run_reads_it(tmp_path):
    directory = img2dataset(tmp_path / "in", "files")
    summary = batchvl.fetch(directory, output=tmp_path / "out", quiet=True)
    assert (summary.ok, summary.failed) == (6, 1)
    assert summary.failures == {"missing_file": 1}
