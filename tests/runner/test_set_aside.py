"""Runs over images of the web, some of whose hosts are down, slow or limited: which rows are answered, and when."""

from __future__ import annotations

import base64
import random
import signal
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from PIL import Image

from batchvl.errors import ManifestError
from batchvl.fetching import image_cache
from batchvl.images import fetch_ahead
from batchvl.runner import poison

from ..manifest.writing import write
from .running import (
    PATIENCE,
    answers,
    codes,
    command,
    environment,
    image_digest,
    make_image,
    responses,
    run,
    wait_until,
)

LOOPBACK = {"allow_private": ["127.0.0.0/8"]}


class Site:
    """A web server on an address of its own that serves one image under any path, and can be down or busy."""

    def __init__(self, number: int, body: bytes) -> None:
        self.address, self.body, self.port = f"127.0.20.{number}", body, 0
        self.requests: Counter[str] = Counter()
        self.times: list[float] = []
        self.answer: Callable[[str], int | None] = lambda path: None
        """Returns a status instead of the image, or None."""
        self.wait: Callable[[], object] = lambda: None
        self._server: ThreadingHTTPServer | None = None

    def up(self) -> None:
        """Start to listen, on the same port each time."""
        site = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.0"  # without connections that outlive `down`

            def do_GET(self) -> None:
                site.requests[self.path] += 1
                site.times.append(time.monotonic())
                site.wait()
                status = site.answer(self.path)
                self.send_response(status or 200)
                body = b"" if status else site.body
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *args: object) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 512

            def handle_error(self, *args: object) -> None:
                pass

        self._server = Server((self.address, self.port), Handler)
        self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def down(self) -> None:
        """Refuse connections from now on."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None

    def url(self, number: int) -> str:
        return f"http://{self.address}:{self.port}/{number}"


@contextmanager
def serving(image: Path, count: int) -> Iterator[list[Site]]:
    sites = [Site(number + 1, image.read_bytes()) for number in range(count)]
    for site in sites:
        site.up()
    try:
        yield sites
    finally:
        for site in sites:
            site.down()


@pytest.fixture
def image(tmp_path: Path) -> Path:
    return make_image(tmp_path / "image.png", 7)


@pytest.fixture
def sites(image: Path) -> Iterator[list[Site]]:
    with serving(image, 3) as sites:
        yield sites


def manifest_of(path: Path, urls: list[str | list[str]]) -> Path:
    """Write a manifest of questions about images."""
    rows = [{"prompt": f"q {n}", "images": [url] if isinstance(url, str) else url} for n, url in enumerate(urls)]
    return write(path, rows)


def expected(image: Path, rows: int, failed: set[int] = frozenset()) -> list[str | None]:
    digest = image_digest(image)
    return [None if n in failed else f"q {n} {digest}" for n in range(rows)]


def inline(image: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(image.read_bytes()).decode()


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_a_host_that_comes_back_later_has_its_rows_answered_in_another_pass(suffix, image, sites, tmp_path):
    """It is down until its rows have been set aside, and up when all others are done."""
    slow, late = sites[0], sites[1]
    urls = [(late if n % 3 == 1 else slow).url(n) for n in range(90)]
    late.down()

    def wait() -> None:
        if len(slow.times) > 10:
            time.sleep(0.1)
        if len(slow.times) == 40 and late._server is None:
            late.up()

    slow.wait = wait
    summary = run(
        manifest_of(tmp_path / f"m.{suffix}", urls), look_ahead=0, host_patience="0.5s", fetch_per_host=2, **LOOPBACK
    )
    assert responses(summary) == expected(image, 90)
    assert (summary.ok, summary.failed, summary.exit_code) == (90, 0, 0)
    assert set(late.requests.values()) == {1}


def test_another_pass_begins_while_the_last_slow_responses_are_awaited(image, sites, tmp_path):
    """The slowest responses come only when the other host has been asked again."""
    slow, late = sites[0], sites[1]
    urls = [(late if n % 5 == 1 else slow).url(n) for n in range(120)]
    late.down()
    asked_again, in_time = threading.Event(), []
    late.wait = asked_again.set

    def wait() -> None:
        if len(slow.times) == 60 and late._server is None:
            late.up()
        if len(slow.times) > 60:
            in_time.append(asked_again.wait(PATIENCE))

    slow.wait = wait
    summary = run(
        manifest_of(tmp_path / "m.jsonl", urls), look_ahead=0, host_patience="0.5s", fetch_per_host=64, **LOOPBACK
    )
    assert len(in_time) > 20
    assert all(in_time)
    assert responses(summary) == expected(image, 120)


def test_the_rows_of_a_host_that_stays_down_fail_at_the_end_and_no_others(image, sites, tmp_path):
    dead = {n for n in range(120) if n % 4 == 2}
    urls = [(sites[1] if n in dead else sites[0]).url(n) for n in range(120)]
    sites[1].down()
    summary = run(manifest_of(tmp_path / "m.jsonl", urls), host_patience="0.5s", **LOOPBACK)
    assert responses(summary) == expected(image, 120, dead)
    assert codes(summary) == dict.fromkeys(dead, "connection_failed")
    assert (summary.ok, summary.failed, summary.exit_code) == (90, 30, 3)
    [note] = {row["error"]["message"].split("; ")[1].split(" has ")[0] for row in answers(summary) if row["error"]}
    assert note == f"{sites[1].address}:{sites[1].port}"


def test_rows_that_are_set_aside_while_no_slot_is_free_are_not_lost(image, sites, tmp_path):
    """The engine is the bottleneck: whoever receives the rows is busy when the host loses them."""
    dead = set(range(400, 420))
    urls = [(sites[1] if n in dead else sites[0]).url(n) for n in range(420)]
    sites[1].down()
    summary = run(
        manifest_of(tmp_path / "m.jsonl", urls), {"delay": 0.5, "rows": 8}, batch_size=8, look_ahead=0,
        host_patience="0.3s", **LOOPBACK,
    )  # fmt: skip
    assert summary.rows == 420, "every row has a result"
    assert responses(summary) == expected(image, 420, dead)


@pytest.mark.parametrize("limited", [False, True])
def test_more_rows_for_one_host_than_may_wait(limited, image, sites, tmp_path, monkeypatch):
    monkeypatch.setattr(fetch_ahead, "MAX_GROUPS", 20)
    site, last, lock = sites[0], [0.0], threading.Lock()

    def answer(path: str) -> int | None:
        with lock:
            now = time.monotonic()
            if limited and now - last[0] < 0.01:
                return 429
            last[0] = now
        time.sleep(0.005)
        return None

    site.answer = answer
    urls = [(sites[1] if n % 10 == 3 else site).url(n) for n in range(400)]
    summary = run(manifest_of(tmp_path / "m.jsonl", urls), look_ahead=0, **LOOPBACK)
    assert codes(summary) == {}
    assert responses(summary) == expected(image, 400)


def test_rows_that_are_set_aside_are_answered_after_a_signal_by_the_same_command(image, sites, tmp_path):
    late = {n for n in range(120) if n % 3 == 1}
    urls = [(sites[1] if n in late else sites[0]).url(n) for n in range(120)]
    sites[1].down()
    hold = threading.Event()
    sites[0].wait = lambda: len(sites[0].times) > 20 and hold.wait(PATIENCE)
    manifest = manifest_of(tmp_path / "m.jsonl", urls)
    flags = ["--allow-private", "127.0.0.0/8", "--host-patience", "0.3s", "--look-ahead", "0"]
    with subprocess.Popen(command(manifest, *flags), env=environment(), stderr=subprocess.PIPE) as process:
        wait_until(lambda: len(sites[0].times) > 20)
        time.sleep(1)  # the rows of the dead host have been set aside
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=PATIENCE)
        assert process.returncode == 75
    hold.set()
    sites[1].up()
    summary = run(manifest, look_ahead=0, **LOOPBACK)
    assert summary.resumed >= 1
    assert responses(summary) == expected(image, 120)


@pytest.mark.parametrize("options", [{"limit": 50}, {"shard": "1/2"}, {"limit": 50, "shard": "0/2"}])
@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_a_part_of_a_manifest(options, suffix, image, sites, tmp_path):
    urls = [(sites[1] if n % 3 == 1 else sites[0]).url(n) for n in range(90)]
    sites[1].down()
    total = options.get("limit", 90)
    half = total // 2
    mine = {"1/2": range(half, total), "0/2": range(half)}.get(options.get("shard", ""), range(total))
    summary = run(manifest_of(tmp_path / f"m.{suffix}", urls), host_patience="0.3s", **options, **LOOPBACK)
    dead = sum(n % 3 == 1 for n in mine)
    assert (summary.rows, summary.ok, summary.failed) == (len(mine), len(mine) - dead, dead)
    asked = {int(path[1:]) for path in sites[0].requests}
    assert asked == {n for n in mine if n % 3 != 1}


def test_rows_with_inline_and_web_images(image, sites, tmp_path):
    dead = {n for n in range(60) if n % 3 == 1}
    urls = [[inline(image), (sites[1] if n in dead else sites[0]).url(n)] for n in range(60)]
    sites[1].down()
    summary = run(manifest_of(tmp_path / "m.jsonl", urls), host_patience="0.3s", **LOOPBACK)
    digest = image_digest(image)
    assert responses(summary) == [None if n in dead else f"q {n} {digest} {digest}" for n in range(60)]
    assert codes(summary) == dict.fromkeys(dead, "connection_failed")


def test_rows_with_the_same_image_on_a_dead_host(image, sites, tmp_path):
    sites[1].down()
    urls = [(sites[1] if n % 2 else sites[0]).url(0) for n in range(200)]
    summary = run(manifest_of(tmp_path / "m.jsonl", urls), host_patience="0.3s", **LOOPBACK)
    assert responses(summary) == expected(image, 200, set(range(1, 200, 2)))
    assert sum(sites[0].requests.values()) == 1


def test_a_stop_while_many_rows_are_parked_ends_promptly(image, sites, tmp_path):
    sites[1].answer = lambda path: 429
    urls = [(sites[1] if n else sites[0]).url(n) for n in range(5000)]
    manifest = manifest_of(tmp_path / "m.jsonl", urls)
    flags = ["--allow-private", "127.0.0.0/8", "--look-ahead", "0", "--host-patience", "10m"]
    with subprocess.Popen(command(manifest, *flags), env=environment(), stderr=subprocess.PIPE) as process:
        wait_until(lambda: sum(sites[1].requests.values()) >= 4)
        time.sleep(1)
        process.send_signal(signal.SIGTERM)
        started = time.monotonic()
        process.communicate(timeout=PATIENCE)
        assert process.returncode == 75
        assert time.monotonic() - started < PATIENCE / 10


def test_a_file_that_cannot_be_read_ends_the_run_with_an_error(image, sites, tmp_path):
    """It is there when the run begins, and gone when it is its turn."""
    directory = tmp_path / "manifest"
    for part in range(4):
        manifest_of(directory / f"{part}.parquet", [sites[0].url(1000 * part + n) for n in range(1000)])
    sites[0].wait = lambda: (directory / "3.parquet").unlink(missing_ok=True)
    with pytest.raises(ManifestError, match=r"3\.parquet"):
        # A fetch process takes a moment to start, in which the whole manifest may be read.
        run(directory, {"start_delay": 5}, look_ahead=0, **LOOPBACK)


def test_poison_rows_with_images_of_the_web(image, sites, tmp_path):
    urls = [sites[n % 3].url(n) for n in range(120)]
    summary = run(manifest_of(tmp_path / "m.jsonl", urls), {"die_on": [17, 90]}, batch_size=8, **LOOPBACK)
    assert responses(summary) == expected(image, 120, {17, 90})
    assert codes(summary) == dict.fromkeys([17, 90], "engine_crashed")


def noise(path: Path) -> Path:
    """Write an image that takes much room although it is small."""
    size = 200, 150
    Image.frombytes("RGB", size, random.Random(1).randbytes(size[0] * size[1] * 3)).save(path)
    return path


def test_poison_rows_are_found_while_the_images_of_others_fill_the_arena(tmp_path, monkeypatch):
    """Each image has 90 KB, and the arena room for few: what is ready for later must not keep suspects waiting."""
    monkeypatch.setattr(poison, "MAX_ROWS", 4)
    image = noise(tmp_path / "noise.png")
    with serving(image, 2) as sites:
        urls = [sites[n % 2].url(n) for n in range(800)]
        behaviour = {"die_on": [300], "rows": 8, "delay": 0.02}
        summary = run(
            manifest_of(tmp_path / "m.jsonl", urls),
            behaviour,
            batch_size=8,
            arena_bytes="4MB",
            look_ahead=0,
            **LOOPBACK,
        )
    assert responses(summary) == expected(image, 800, {300})


def test_suspects_whose_host_goes_down_are_not_lost(image, sites, tmp_path, monkeypatch):
    """Their images must be fetched again."""
    monkeypatch.setattr(image_cache, "MAX_AGE_SECONDS", -1.0)

    def wait() -> None:
        if len(sites[1].times) == 2:
            threading.Thread(target=sites[1].down).start()

    sites[1].wait = wait
    urls = [sites[1 if n in (4, 5) else 0].url(n) for n in range(8)]
    behaviour = {"die_on": [7], "delay": 1}
    summary = run(manifest_of(tmp_path / "m.jsonl", urls), behaviour, host_patience="0.2s", look_ahead=0, **LOOPBACK)
    assert summary.rows == 8, "every row has a result"
    assert codes(summary) == {4: "connection_failed", 5: "connection_failed", 7: "engine_crashed"}


def test_order_does_not_matter(image, sites, tmp_path):
    dead = set(range(0, 300, 7))
    sites[1].down()
    for name, rows in (("a", list(range(300))), ("b", list(reversed(range(300))))):
        urls = [(sites[1] if n in dead else sites[0]).url(n) for n in rows]
        summary = run(manifest_of(tmp_path / f"{name}.jsonl", urls), host_patience="0.3s", **LOOPBACK)
        assert {rows[n] for n in codes(summary)} == dead
        assert summary.rows == 300
