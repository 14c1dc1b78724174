"""How fast rows are answered by what, and what that takes: `Bench.measure`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import msgspec
import pyarrow.parquet as pq

from batchvl.config.options import NAMES, OPTION_TYPES, env_variable, flag
from benchmarks.baseline import PREPARED, Done, Job
from benchmarks.meter import Meter
from benchmarks.picture_server import PictureServer
from benchmarks.pictures import numbered, photographs
from benchmarks.scenarios import QUESTIONS, Options, Row, Scenario, shown

ROOT = Path(__file__).resolve().parents[1]
PHOTOGRAPHS = 8
"""JPEGs that pictures are made of, where they need not differ in their pixels."""
UP = ", lists of "
"""What `batchvl run` says once its engine is up, among other things."""


class Failed(Exception):
    """Nothing was measured; the message has the last words of what was to be."""


class Result(msgspec.Struct, kw_only=True):
    """What was measured of one system, over the span from the first rows that its engine had to the last answer."""

    scenario: str
    title: str
    backend: str
    system: str
    rows: int
    seconds: float
    start_seconds: float
    """From the start of the process to the first rows."""
    input_tokens: int
    output_tokens: int
    wrong: int
    """Answers that failed or are not as long as they should be."""
    cores: float | None
    host_bytes: int | None
    gpu_busy: float | None
    gpu_bytes: int | None
    gpu_wait: float | None = None
    """Of a run: the share of the span in which the engine waited for rows."""
    server_cores: float | None = None
    """What the pictures' server took besides."""

    @property
    def rate(self) -> float:
        """Rows a second."""
        return self.rows / self.seconds


class Bench:
    """Measures one scenario with a backend. `folder` takes what that leaves; `gpus` are CUDA's names of those there."""

    def __init__(
        self, scenario: Scenario, model: Path, backend: str, options: Options, gpus: Sequence[str], folder: Path,
        timeout: float,
    ) -> None:  # fmt: skip
        self._scenario, self._model, self._backend, self._folder = scenario, model, backend, folder
        self._options = [*scenario.options, *options]
        self._title = ", ".join([str(scenario), *map(shown, options)])
        self._gpus, self._timeout = gpus[: scenario.gpu_count], timeout

    def measure(self, system: str, rows: Sequence[Row]) -> Result:
        """system: ceiling, loop or run. Raises Failed."""
        folder = self._folder / system
        folder.mkdir(parents=True)
        count = 1 + max(row.picture for row in rows)
        count = min(count, PREPARED) if system == "ceiling" else count
        jpegs = photographs(self._scenario.picture, count if self._scenario.different else PHOTOGRAPHS)
        pictures = folder / "pictures"
        pictures.mkdir()
        if system == "run":
            for number, jpeg in enumerate(jpegs):
                (pictures / f"{number:05}.jpg").write_bytes(jpeg)
            return self._run(rows, folder, pictures)
        for number in range(count):
            (pictures / f"{number}.jpg").write_bytes(numbered(jpegs, number))
        return self._baseline(system, rows, folder, pictures)

    def _baseline(self, system: str, rows: Sequence[Row], folder: Path, pictures: Path) -> Result:
        """LMDeploy alone: a process for each GPU, which begin together."""
        options = {**values(self._options), "backend": self._backend, "model": str(self._model)}
        started, logs, processes = time.monotonic(), [], []
        with ExitStack() as stack:
            for at, gpu in enumerate(self._gpus):
                job = Job(system, options, str(pictures), list(rows[at :: len(self._gpus)]))
                file = folder / f"job-{at}.json"
                file.write_bytes(msgspec.json.encode(job))
                command = [sys.executable, "-m", "benchmarks.baseline", str(file)]
                logs.append(folder / f"log-{at}.txt")
                log = stack.enter_context(logs[-1].open("wb"))
                process = subprocess.Popen(
                    command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, env=environment([gpu])
                )
                processes.append(stack.enter_context(ended(process, self._timeout)))
            meter = stack.enter_context(Meter([process.pid for process in processes], self._gpus))
            for process, path in zip(processes, logs, strict=True):
                if self._line(process) != b"ready\n":
                    raise Failed(last_words(path))
            for process in processes:
                assert process.stdin is not None
                process.stdin.write(b"go\n")
                process.stdin.flush()
            done = []
            for process, path in zip(processes, logs, strict=True):
                if not (line := self._line(process)):
                    raise Failed(last_words(path))
                done.append(msgspec.json.decode(line, type=Done))
        begin, end = min(each.begin for each in done), max(each.end for each in done)
        total = {name: sum(getattr(each, name) for each in done) for name in Done.__struct_fields__[2:]}
        return self._result(system, meter, begin, end - begin, started, **total)

    def _line(self, process: subprocess.Popen[bytes]) -> bytes:
        assert process.stdout is not None
        return process.stdout.readline()

    def _run(self, rows: Sequence[Row], folder: Path, pictures: Path) -> Result:
        """`batchvl run`, with pictures over HTTP."""
        output, log, up = folder / "out", folder / "log.txt", None
        command = [sys.executable, "-m", "batchvl", "run", str(folder / "manifest.jsonl"), "-o", str(output)]
        command += ["--model", str(self._model), "--engine", "lmdeploy", "--backend", self._backend]
        command += ["--allow-private", "127.0.0.0/8", *flags(self._options)]
        command += ["--gpus", str(self._scenario.gpus)] if self._scenario.gpus else []
        with ExitStack() as stack:
            server = stack.enter_context(PictureServer(pictures))
            write_manifest(folder / "manifest.jsonl", rows, server)
            file, started = stack.enter_context(log.open("wb")), time.monotonic()
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                env=environment(self._gpus),
            )  # fmt: skip
            stack.enter_context(ended(process, self._timeout))
            meter = stack.enter_context(Meter([process.pid], self._gpus))
            serving = stack.enter_context(Meter([server.pid], ()))
            while line := self._line(process):
                file.write(line)
                file.flush()
                if up is None and UP.encode() in line:
                    up = time.monotonic()
            code = process.wait()
        if code or up is None:
            raise Failed(f"exit code {code}; its last words:\n{last_words(log)}")
        summary = json.loads((output / "summary.json").read_bytes())
        seconds = summary["engine_seconds"]
        found = pq.read_table(summary["results"], columns=["row", "status", "input_tokens", "output_tokens"])
        answers = found.to_pylist()
        return self._result(
            "run", meter, up, seconds, started, rows=len(answers),
            input_tokens=sum(answer["input_tokens"] or 0 for answer in answers),
            output_tokens=sum(answer["output_tokens"] or 0 for answer in answers),
            wrong=sum(
                answer["status"] != "ok" or answer["output_tokens"] != rows[answer["row"]].tokens for answer in answers
            ),
            gpu_wait=summary["gpu_wait"],
            server_cores=serving.use(up, up + seconds).cores,
        )  # fmt: skip

    def _result(self, system: str, meter: Meter, begin: float, seconds: float, started: float, **more: Any) -> Result:
        return Result(
            scenario=self._scenario.name, title=self._title, backend=self._backend, system=system,
            seconds=seconds, start_seconds=begin - started, **asdict(meter.use(begin, begin + seconds)), **more,
        )  # fmt: skip


def write_manifest(path: Path, rows: Sequence[Row], server: PictureServer) -> None:
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            line = {"image": server.url(row.picture), "prompt": QUESTIONS[row.question]}
            print(json.dumps({**line, "generation": {"max_new_tokens": row.tokens}}), file=file)


def values(options: Options) -> dict[str, Any]:
    """Options as batchvl.run takes them. Raises ValueError for one that there is not."""
    found: dict[str, Any] = {}
    for name, value in options:
        if name not in NAMES:
            raise ValueError(f"batchvl has no option {name!r}")
        several = str(OPTION_TYPES[name]).startswith("tuple")
        found[name] = [*found.get(name, ()), value] if several else value
    return found


def flags(options: Options) -> list[str]:
    """Options as the command takes them."""
    found = []
    for name, value in options:
        if OPTION_TYPES[name] is not bool:
            found += [flag(name), value]
        elif value == "true":
            found.append(flag(name))
    return found


def environment(gpus: Sequence[str]) -> dict[str, str]:
    """For what is measured: with these GPUs, without options in variables, and with nothing to be downloaded."""
    kept = {name: value for name, value in os.environ.items() if name not in map(env_variable, NAMES)}
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    quiet = {"HF_HUB_OFFLINE": "1", "LMDEPLOY_ENABLE_CHECK_ENV": "0", "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
    return {**kept, **quiet, "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ",".join(gpus)}


@contextmanager
def ended(process: subprocess.Popen[bytes], seconds: float) -> Iterator[subprocess.Popen[bytes]]:
    """The process, which is killed after so many seconds, or where nobody waits for it any more."""

    def late() -> None:
        print(f"killed, since it took longer than {seconds:g} s (--timeout)", file=sys.stderr)
        process.kill()

    timer = threading.Timer(seconds, late)
    timer.start()
    try:
        yield process
        process.wait()
    finally:
        timer.cancel()
        process.kill()
        process.communicate()


def last_words(log: Path) -> str:
    return log.read_text(encoding="utf-8", errors="replace")[-3000:]
