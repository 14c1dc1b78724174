"""Fetching from a synthetic open web (benchmarks/web_server.py): throughput with faults and without, and lost rows.

    python benchmarks/web.py run --rows 20000
    python benchmarks/web.py run --option fetch_concurrency=1000 --option engine_option=encoded=true
    python benchmarks/web.py fetch --latency 0 --web clean
    python benchmarks/web.py fetcher aiohttp --latency 0 --rounds 3
    python benchmarks/web.py img2dataset --img2dataset ~/img2dataset/bin/python --rows 20000

run          the command `batchvl run` with the FakeEngine
fetch        the command `batchvl fetch`, with and without decoding
fetcher      batchvl's fetcher alone, without a manifest, checks or files
aiohttp      a bare aiohttp client, without faults and delays: what fetching costs at least
img2dataset  img2dataset in an environment of its own, with 2 processes of 16 and of 128 threads, without resizing

The web with faults has, in random order, rows of dead hosts, of hosts that refuse, of names that do not resolve, rows
that are not found, and rows of one host with a limited rate. The web without faults is the same manifest without these
rows: the other images have the same hosts, order and delays. Of both, a rate is the number of these other images over
the time from the first request until all rows are recorded, apart from those of the limited host: its rate alone says
when it is done. `steady` is the rate between the first tenth of these images and the last, without the start and
without the last slow answers, which dominate small webs. A row is lost if a patient client would have had its image.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack, closing
from functools import partial
from pathlib import Path
from statistics import fmean

import aiohttp
import msgspec
import pyarrow.parquet as pq

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from batchvl.concurrency import run_sync  # noqa: E402
from batchvl.config.options import RunOptions, convert  # noqa: E402
from batchvl.errors import RowError  # noqa: E402
from batchvl.fetching.download import Fetch  # noqa: E402
from batchvl.fetching.fetcher import Fetcher  # noqa: E402
from batchvl.fetching.processes.pool import ProcessPool  # noqa: E402
from batchvl.images.fetch_ahead import MAX_GROUPS  # noqa: E402
from batchvl.ipc.arena import BLOCK, Arena  # noqa: E402
from batchvl.results.journal import Tail  # noqa: E402
from batchvl.results.rowset import Outcomes, RowSet  # noqa: E402
from batchvl.types import WebImage  # noqa: E402
from benchmarks.web_server import NAME_SERVER, RATE, Kind, Row, Statistics, WebServer, raise_file_limit  # noqa: E402

PATIENT: tuple[Kind, ...] = ("ok", "limited")
"""The kinds of rows whose images a patient client gets."""
POLL_SECONDS = 0.1
NOT_RECORDED = "not recorded"
WORKERS = (32, 128)
"""Numbers of concurrent requests of the aiohttp client."""
ARENA_BYTES = 2**28
"""Arena of the fetcher alone: small, so that most images find memory that was in use before, as in a long run."""
THREADS = (16, 128)
"""Numbers of threads of each of img2dataset's processes."""


class MeasurementFailed(Exception):
    """The system failed, and nothing was measured. The message ends with the last lines of its log."""


class Progress(msgspec.Struct):
    """The rows recorded by some time."""

    time: float
    """By `time.monotonic()`."""
    ok: int
    """Images that no fault and no limit concerns."""
    recorded: int
    """Rows of any outcome, apart from those of the limited host."""


class Observation(msgspec.Struct):
    """What was seen of one system at work."""

    progress: list[Progress]
    """In the order of time; the last one is that of the end."""
    codes: Mapping[int, str]
    """The error code of each recorded row, "ok" if it is ok, by its place in the manifest."""
    complete: bool = True
    """False if it was stopped before its end."""


class Result(msgspec.Struct, kw_only=True):
    """The measurement of one system on one web."""

    system: str
    faults: bool
    rows: int
    complete: bool
    images: int
    """Images recorded that no fault and no limit concerns."""
    seconds: float
    """From the first request until all rows were recorded, apart from those of the limited host."""
    steady: float
    """Images per second between the first tenth of these images and the last; 0 if only the end was seen."""
    total_seconds: float
    """From the first request to the end."""
    lost: int
    cpu_seconds: float
    """CPU time of the system, with all of its processes."""
    own_cpu_seconds: float
    """Of these, what this process used: of `fetcher`, the part that decides."""
    outcomes: dict[Kind, dict[str, int]]
    """Rows by kind and error code, "ok" if they are ok."""
    server: Statistics

    @property
    def rate(self) -> float:
        """Images per second."""
        return self.images / self.seconds


System = Callable[[Sequence[Row], Path], Observation]
"""Gets the rows and a directory for its files."""


def observe_run(
    rows: Sequence[Row], directory: Path, options: Sequence[str], timeout: float, names: str
) -> Observation:
    """Run `batchvl run`, whose journal holds all rows until the end."""
    return _observe(
        "run", ["--engine", "fake", "--part-rows", str(len(rows) + 1)], rows, directory, options, timeout, names
    )


def observe_fetch(
    rows: Sequence[Row], directory: Path, options: Sequence[str], timeout: float, names: str, *, decode: bool
) -> Observation:
    """Run `batchvl fetch`. Its rows are recorded file by file, so files are small here."""
    flags = ["--file-bytes", "32MiB", *([] if decode else ["--no-decode"])]
    return _observe("fetch", flags, rows, directory, options, timeout, names)


def _observe(
    name: str,
    flags: list[str],
    rows: Sequence[Row],
    directory: Path,
    options: Sequence[str],
    timeout: float,
    names: str,
) -> Observation:
    """Run a command of batchvl and follow its journal."""
    manifest, output, log = (directory / file for file in ("manifest.jsonl", "out", "log.txt"))
    manifest.write_text("".join(json.dumps({"id": row.number, "image": row.url}) + "\n" for row in rows))
    command = [sys.executable, "-m", "batchvl", name, str(manifest), "-o", str(output), *flags, "-q"]
    command += ["--allow-private", "127.0.0.0/8", "--accept-failures", "100%", "--stop-after", f"{timeout}s"]
    command += [f"--{name.replace('_', '-')}={value}" for name, _, value in (o.partition("=") for o in options)]
    if names == "silent":
        command = [*_asking(NAME_SERVER, directory), *command]
    with log.open("wb") as file:
        process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=file, stderr=file)
    journals, progress = Journals(output, directory / "journals"), []
    limited = RowSet(place for place, row in enumerate(rows) if row.kind == "limited")
    faulty = RowSet(place for place, row in enumerate(rows) if row.kind != "ok")

    def note() -> Outcomes:
        outcomes = journals.read()
        progress.append(Progress(time.monotonic(), len(outcomes.ok - faulty), len(outcomes.rows() - limited)))
        return outcomes

    try:
        while process.poll() is None:
            time.sleep(POLL_SECONDS)
            note()
    finally:
        process.kill()
    if process.returncode not in (0, os.EX_TEMPFAIL):
        raise MeasurementFailed(f"exit code {process.returncode}; the end of its log:\n{log.read_text()[-2000:]}")
    outcomes = note()
    codes = {row: code for code, failed in outcomes.failed.items() for row in failed} | dict.fromkeys(outcomes.ok, "ok")
    return Observation(progress, codes, complete=process.returncode == 0)


def _asking(name_server: str, directory: Path) -> list[str]:
    """Return the beginning of a command that has another name server. It needs root."""
    conf = directory / "resolv.conf"
    conf.write_text(f"nameserver {name_server}\n")
    return ["unshare", "--mount", "sh", "-c", f'mount --bind "{conf}" /etc/resolv.conf && exec "$@"', "sh"]


class Journals:
    """The journals of a run's output, followed while they are written and beyond.

    Args:
        output: The output directory, which need not exist yet.
        links: Directory for hard links, by which a journal can still be read once a part has replaced it.
    """

    def __init__(self, output: Path, links: Path) -> None:
        self._output, self._links = output, links
        self._links.mkdir()
        self._tails: dict[str, Tail] = {}

    def read(self) -> Outcomes:
        """Return the outcomes of the rows that are recorded."""
        for path in self._output.rglob("journal-*.log"):
            if path.name not in self._tails:
                link = self._links / path.name
                try:
                    link.hardlink_to(path)
                except FileNotFoundError:
                    continue
                self._tails[path.name] = Tail(link)
        for tail in self._tails.values():
            tail.follow()
        return Outcomes.joined(tail.outcomes for tail in self._tails.values())


def observe_img2dataset(rows: Sequence[Row], directory: Path, python: Path, threads: int) -> Observation:
    """Run img2dataset with the number of threads in each of 2 processes. A row is recorded when its file is written."""
    urls, output, log = directory / "urls.txt", directory / "out", directory / "log.txt"
    urls.write_text("".join(row.url + "\n" for row in rows))
    # Shards as large as possible, at least one for each process: at the end of each, it waits for the slowest answer.
    shard = min(10_000, -(-len(rows) // 2))
    options = {
        "url_list": urls,
        "input_format": "txt",
        "output_folder": output,
        "output_format": "files",
        "resize_mode": "no",
        "disable_all_reencoding": True,
        "extract_exif": False,
        "processes_count": 2,
        "thread_count": threads,
        "number_sample_per_shard": shard,
    }
    command = [str(python), "-c", "from img2dataset import main; main()"]
    command += [f"--{name}={value}" for name, value in options.items()]
    with log.open("wb") as file:
        code = subprocess.call(command, stdin=subprocess.DEVNULL, stdout=file, stderr=file)
    end = time.monotonic()
    if code:
        raise MeasurementFailed(f"exit code {code}; the end of its log:\n{log.read_text()[-2000:]}")
    places = {row.url: place for place, row in enumerate(rows)}
    codes: dict[int, str] = {}
    times: list[float] = []
    for path in output.glob("*.parquet"):
        for image in pq.read_table(path, columns=["url", "status", "key"]).to_pylist():
            place = places[image["url"]]
            codes[place] = "ok" if image["status"] == "success" else image["status"]
            if codes[place] == "ok" and rows[place].kind == "ok":
                times.append((path.with_suffix("") / f"{image['key']}.jpg").stat().st_mtime)
    offset = time.time() - time.monotonic()
    progress = [Progress(written - offset, ok, 0) for ok, written in enumerate(sorted(times), 1)]
    return Observation([*progress, _end(rows, codes, end)], codes)


def _end(rows: Sequence[Row], codes: Mapping[int, str], end: float) -> Progress:
    """Return the progress at the end of a system that has recorded all rows."""
    ok = sum(row.kind == "ok" and codes.get(place) == "ok" for place, row in enumerate(rows))
    return Progress(end, ok, sum(row.kind != "limited" for row in rows))


def observe_fetcher(rows: Sequence[Row], directory: Path, options: Sequence[str]) -> Observation:
    """Fetch every image into an arena and forget it."""
    return run_sync(lambda: _fetch_all(rows, options), interrupt=lambda: None)


async def _fetch_all(rows: Sequence[Row], options: Sequence[str]) -> Observation:
    values = {name: convert(name, value, name) for name, _, value in (option.partition("=") for option in options)}
    limits = RunOptions.of(**{"allow_private": ["127.0.0.0/8"], **values}).fetch
    codes: dict[int, str] = {}
    progress = [Progress(time.monotonic(), 0, 0)]
    ok = recorded = 0

    def record(place: int, fetch: Fetch) -> None:
        nonlocal ok, recorded
        error = fetch.error
        codes[place] = "ok" if error is None else error.code if isinstance(error, RowError) else repr(error)
        ok += error is None and rows[place].kind == "ok"
        recorded += rows[place].kind != "limited"
        if fetch.fetched is not None:
            fetch.fetched.release()
        if (now := time.monotonic()) >= progress[-1].time + POLL_SECONDS:
            progress.append(Progress(now, ok, recorded))

    async with AsyncExitStack() as stack:
        arena = stack.enter_context(closing(Arena(ARENA_BYTES // BLOCK)))
        log = stack.enter_context(tempfile.TemporaryFile())  # noqa: SIM115 - the stack closes it
        requester = ProcessPool(limits, arena, log) if limits.fetch_processes else None
        fetcher = await stack.enter_async_context(Fetcher(limits, arena, requester))
        for place, row in enumerate(rows):
            fetcher.submit([WebImage(row.url)], partial(record, place))
            while not fetcher.is_hungry or fetcher.waiting >= MAX_GROUPS:
                await fetcher.wait_for_change()
        while fetcher.waiting:
            await fetcher.wait_for_change()
    return Observation([*progress, _end(rows, codes, time.monotonic())], codes)


def observe_aiohttp(rows: Sequence[Row], directory: Path, workers: int) -> Observation:
    """Read every body with aiohttp and forget it."""
    return asyncio.run(_read_all(rows, workers))


async def _read_all(rows: Sequence[Row], workers: int) -> Observation:
    places = iter(range(len(rows)))
    codes: dict[int, str] = {}

    async def work(session: aiohttp.ClientSession) -> None:
        for place in places:
            async with session.get(rows[place].url) as response:
                await response.read()
                codes[place] = "ok" if response.status == 200 else f"http_{response.status}"

    connector = aiohttp.TCPConnector(limit=0, use_dns_cache=False)
    async with aiohttp.ClientSession(connector=connector, cookie_jar=aiohttp.DummyCookieJar()) as session:
        await asyncio.gather(*(work(session) for _ in range(workers)))
    return Observation([_end(rows, codes, time.monotonic())], codes)


def measure(name: str, system: System, args: argparse.Namespace, *, faults: bool, latency: float) -> Result:
    """Measure a system on a web of its own."""
    with (
        tempfile.TemporaryDirectory(prefix="batchvl-web-") as directory,
        WebServer(latency, args.seed, silent_names=args.names == "silent") as server,
    ):
        rows = [row for row in server.rows(args.rows, args.hosts, args.seed) if faults or row.kind == "ok"]
        before = _cpu_seconds()
        seen = system(rows, Path(directory))
        own, children = (after - earlier for after, earlier in zip(_cpu_seconds(), before, strict=True))
    return evaluate(name, rows, seen, server.statistics, own, children, faults=faults)


def _cpu_seconds() -> tuple[float, float]:
    """Return the CPU time of this process, and of its children that have ended."""
    own, children = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return own.ru_utime + own.ru_stime, children.ru_utime + children.ru_stime


def evaluate(
    name: str,
    rows: Sequence[Row],
    seen: Observation,
    server: Statistics,
    own_cpu_seconds: float,
    child_cpu_seconds: float,
    *,
    faults: bool,
) -> Result:
    """Return the result of what was observed.

    Raises:
        MeasurementFailed: There was no request, or no image.
    """
    end, images = seen.progress[-1].time, seen.progress[-1].ok
    unlimited = sum(row.kind != "limited" for row in rows)
    if server.first is None or not images:
        raise MeasurementFailed(f"{name}: no image was fetched")
    settled = next((item.time for item in seen.progress if item.recorded == unlimited), end)
    low, high = (next(item for item in seen.progress if item.ok >= share * images) for share in (0.1, 0.9))
    outcomes: dict[Kind, Counter[str]] = {}
    for place, row in enumerate(rows):
        outcomes.setdefault(row.kind, Counter())[seen.codes.get(place, NOT_RECORDED)] += 1
    return Result(
        system=name,
        faults=faults,
        rows=len(rows),
        complete=seen.complete,
        images=images,
        seconds=settled - server.first,
        steady=(high.ok - low.ok) / (high.time - low.time) if high is not low else 0.0,
        total_seconds=end - server.first,
        lost=sum(outcomes[kind].total() - outcomes[kind]["ok"] for kind in PATIENT if kind in outcomes),
        cpu_seconds=own_cpu_seconds + child_cpu_seconds,
        own_cpu_seconds=own_cpu_seconds,
        outcomes={kind: dict(counts.most_common()) for kind, counts in outcomes.items()},
        server=server,
    )


def table(results: Sequence[Result]) -> str:
    """Return the results as a table, with the outcomes on the webs with faults below it."""
    head = (
        "system            web      images  images/s    steady  seconds    total   lost    429  open  CPU/image"
        "  (own)     server CPU"
    )
    lines = [head]
    for result in results:
        web, server = "faults" if result.faults else "clean", result.server
        steady = f"{result.steady:,.1f}" if result.steady else ""
        lines.append(
            f"{result.system:16}  {web:6} {result.images:8,} {result.rate:9,.1f} {steady:>9} {result.seconds:8,.1f} "
            f"{result.total_seconds:8,.1f} {result.lost:6,} {sum(server.rejected.values()):6,} {server.most_open:5,} "
            f"{1000 * result.cpu_seconds / result.images:7,.2f} ms "
            f"{1000 * result.own_cpu_seconds / result.images:6,.2f} ms "
            f"{server.cpu_seconds / result.total_seconds:11.0%}"
            f"{'' if result.complete else '  stopped'}"
        )
    for result in results:
        if result.faults:
            lines += ["", f"{result.system}, with faults:"]
            for kind, counts in sorted(result.outcomes.items()):
                lines.append(f"  {kind:10} {', '.join(f'{count:,} {code}' for code, count in counts.items())}")
            limited = sum(result.outcomes.get("limited", {}).values())
            lines.append(f"  the limited host has {limited:,} rows, for which its rate takes {limited / RATE:,.0f} s")
    return "\n".join([*lines, *ratios(results)])


def ratios(results: Sequence[Result]) -> list[str]:
    """Return a line for each system that was measured with faults and without, with its rates as shares."""
    lines = []
    for name in dict.fromkeys(result.system for result in results):
        faults, clean = ([r for r in results if r.system == name and r.faults is faults] for faults in (True, False))
        if faults and clean:
            line = f"{name}: with faults {fmean(r.rate for r in faults) / fmean(r.rate for r in clean):.3f} of the rate"
            if all(r.steady for r in clean):
                line += f", {fmean(r.steady for r in faults) / fmean(r.steady for r in clean):.3f} of the steady rate"
            lines += ["", f"{line} without faults"]
    return lines


def systems(args: argparse.Namespace) -> dict[str, System]:
    """Return what to measure, by name."""
    known: dict[str, dict[str, System]] = {
        "run": {"run": partial(observe_run, options=args.option, timeout=args.timeout, names=args.names)},
        "fetch": {
            name: partial(observe_fetch, options=args.option, timeout=args.timeout, names=args.names, decode=decode)
            for name, decode in (("fetch", True), ("fetch undecoded", False))
        },
        "fetcher": {"fetcher": partial(observe_fetcher, options=args.option)},
        "aiohttp": {f"aiohttp {workers}": partial(observe_aiohttp, workers=workers) for workers in WORKERS},
        "img2dataset": {
            f"img2dataset {threads}": partial(observe_img2dataset, python=args.img2dataset, threads=threads)
            for threads in THREADS
        },
    }
    return {name: system for group in args.system for name, system in known[group].items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("system", nargs="+", choices=("run", "fetch", "fetcher", "aiohttp", "img2dataset"))
    parser.add_argument("--rows", type=int, default=20_000, help="rows of the web with faults [20,000]")
    parser.add_argument("--hosts", type=int, default=2_000, help="hosts without faults [2,000]")
    parser.add_argument("--latency", type=float, default=1.0, help="factor for the delays of answers [1]")
    parser.add_argument("--seed", type=int, default=0, help="seed of the web's order and delays")
    parser.add_argument("--rounds", type=int, default=1, help="measure everything so many times, in turn")
    parser.add_argument("--web", choices=("both", "faults", "clean"), default="both", help="with faults or without")
    parser.add_argument(
        "--names",
        choices=("unknown", "silent"),
        default="unknown",
        help="names that do not resolve: a name server says so, or none answers (for run and fetch; needs root)",
    )
    parser.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="option of `batchvl run` and `fetch`, such as fetch_concurrency=1000; may be repeated",
    )
    parser.add_argument("--timeout", type=int, default=600, help="seconds after which batchvl is stopped [600]")
    parser.add_argument("--img2dataset", type=Path, metavar="PYTHON", help="Python of img2dataset's environment")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results as JSON")
    args = parser.parse_args()
    if "img2dataset" in args.system and args.img2dataset is None:
        parser.error("img2dataset: needs --img2dataset PYTHON")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that `finally` clauses run
    raise_file_limit()
    print(
        f"{os.cpu_count()} CPUs, Python {sys.version.split()[0]}; {args.rows:,} rows, {args.hosts:,} hosts", flush=True
    )
    results = []
    for name, system in [*systems(args).items()] * args.rounds:
        bare = name.startswith("aiohttp")
        for faults in [False] if bare else {"both": [False, True], "faults": [True], "clean": [False]}[args.web]:
            try:
                results.append(measure(name, system, args, faults=faults, latency=0.0 if bare else args.latency))
            except MeasurementFailed as error:
                sys.exit(f"{name}: {error}")
            print(".", end="", flush=True)
    print("", table(results), sep="\n")
    if args.json:
        args.json.write_bytes(msgspec.json.format(msgspec.json.encode(results), indent=2) + b"\n")


if __name__ == "__main__":
    main()
