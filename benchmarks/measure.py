"""Measurement of one system in one scenario: throughput and resource usage. See `Bench.measure`."""

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
from benchmarks.image_server import ImageServer
from benchmarks.images import numbered, photographs
from benchmarks.meter import Meter
from benchmarks.scenarios import QUESTIONS, Options, Row, Scenario, format_option
from benchmarks.web import PATIENT
from benchmarks.web_server import WebServer, raise_file_limit

ROOT = Path(__file__).resolve().parents[1]
PHOTOGRAPHS = 8
"""Number of JPEGs with different pixels where images need not differ in their pixels."""
WEB_HOSTS = 2000
ENGINE_UP = ", batches of "
"""Part of the line that `batchvl run` prints once its engine is up."""


class MeasurementFailed(Exception):
    """The system failed, and nothing was measured. The message ends with the last lines of its log."""


class Result(msgspec.Struct, kw_only=True):
    """The measurement of one system, from the first rows that its engine was handed to the last answer."""

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
    """Answers that failed or have the wrong length."""
    cores: float | None
    host_bytes: int | None
    gpu_busy: float | None
    gpu_bytes: int | None
    gpu_wait: float | None = None
    """For a run: the share of the time in which the engine waited for rows."""
    server_cores: float | None = None
    """CPU of the image server, which is not part of `cores`."""

    @property
    def rate(self) -> float:
        """Rows per second."""
        return self.rows / self.seconds


class Bench:
    """Measures one scenario with one backend.

    Args:
        scenario: The scenario.
        model: Directory of the checkpoint.
        backend: LMDeploy's backend.
        options: More options of `batchvl run`, for all systems.
        gpus: CUDA's names of the GPUs that may be used.
        directory: Takes images, logs and outputs.
        timeout: Time limit of each process in seconds.
        web: Whether a run gets its images from the synthetic open web (benchmarks/web_server.py).
    """

    def __init__(
        self,
        scenario: Scenario,
        model: Path,
        backend: str,
        options: Options,
        gpus: Sequence[str],
        directory: Path,
        timeout: float,
        web: bool = False,
    ) -> None:
        self._web = web
        self._scenario, self._model, self._backend, self._directory = scenario, model, backend, directory
        self._options = [*scenario.options, *options]
        self._title = ", ".join([str(scenario), *map(format_option, options)])
        self._gpus, self._timeout = gpus[: scenario.gpu_count], timeout

    def measure(self, system: str, rows: Sequence[Row]) -> Result:
        """Measure one system: "ceiling", "loop" or "run".

        Raises:
            MeasurementFailed: The system failed.
        """
        directory = self._directory / system
        directory.mkdir(parents=True)
        count = 1 + max(row.image for row in rows)
        count = min(count, PREPARED) if system == "ceiling" else count
        jpegs = photographs(self._scenario.image_size, count if self._scenario.distinct_pixels else PHOTOGRAPHS)
        images = directory / "images"
        images.mkdir()
        if system == "run":
            for number, jpeg in enumerate(jpegs):
                (images / f"{number:05}.jpg").write_bytes(jpeg)
            return self._measure_run(rows, directory, images)
        for number in range(count):
            (images / f"{number}.jpg").write_bytes(numbered(jpegs, number))
        return self._measure_baseline(system, rows, directory, images)

    def _measure_baseline(self, system: str, rows: Sequence[Row], directory: Path, images: Path) -> Result:
        """Measure LMDeploy alone, in one process per GPU, which start together."""
        options = {**option_values(self._options), "backend": self._backend, "model": str(self._model)}
        started, logs, processes = time.monotonic(), [], []
        with ExitStack() as stack:
            for index, gpu in enumerate(self._gpus):
                job = Job(system, options, str(images), list(rows[index :: len(self._gpus)]))
                file = directory / f"job-{index}.json"
                file.write_bytes(msgspec.json.encode(job))
                command = [sys.executable, "-m", "benchmarks.baseline", str(file)]
                logs.append(directory / f"log-{index}.txt")
                log = stack.enter_context(logs[-1].open("wb"))
                process = subprocess.Popen(
                    command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, env=child_environment([gpu])
                )
                processes.append(stack.enter_context(killed_after(process, self._timeout)))
            meter = stack.enter_context(Meter([process.pid for process in processes], self._gpus))
            for process, path in zip(processes, logs, strict=True):
                if _read_line(process) != b"ready\n":
                    raise MeasurementFailed(log_tail(path))
            for process in processes:
                assert process.stdin is not None
                process.stdin.write(b"go\n")
                process.stdin.flush()
            results = []
            for process, path in zip(processes, logs, strict=True):
                if not (line := _read_line(process)):
                    raise MeasurementFailed(log_tail(path))
                results.append(msgspec.json.decode(line, type=Done))
        begin, end = min(done.begin for done in results), max(done.end for done in results)
        totals = {name: sum(getattr(done, name) for done in results) for name in Done.__struct_fields__[2:]}
        return self._result(system, meter, begin, end - begin, started, **totals)

    def _measure_run(self, rows: Sequence[Row], directory: Path, images: Path) -> Result:
        """Measure `batchvl run`, with images over HTTP."""
        output, log, engine_up = directory / "out", directory / "log.txt", None
        command = [sys.executable, "-m", "batchvl", "run", str(directory / "manifest.jsonl"), "-o", str(output)]
        command += ["--model", str(self._model), "--engine", "lmdeploy", "--backend", self._backend]
        command += ["--allow-private", "127.0.0.0/8", *option_flags(self._options)]
        if self._web:
            raise_file_limit()
            command += ["--accept-failures", "100%"]
        command += ["--gpus", str(self._scenario.gpus)] if self._scenario.gpus else []
        with ExitStack() as stack:
            server: ImageServer | WebServer
            if self._web:
                server = stack.enter_context(WebServer())
                sources = server.rows(len(rows), WEB_HOSTS)
                urls, good = [row.url for row in sources], [row.kind in PATIENT for row in sources]
            else:
                server = stack.enter_context(ImageServer(images))
                urls, good = [server.url(row.image) for row in rows], [True] * len(rows)
            write_manifest(directory / "manifest.jsonl", rows, urls)
            file, started = stack.enter_context(log.open("wb")), time.monotonic()
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                env=child_environment(self._gpus),
            )
            stack.enter_context(killed_after(process, self._timeout))
            meter = stack.enter_context(Meter([process.pid], self._gpus))
            server_meter = stack.enter_context(Meter([server.pid], ()))
            while line := _read_line(process):
                file.write(line)
                file.flush()
                if engine_up is None and ENGINE_UP.encode() in line:
                    engine_up = time.monotonic()
            code = process.wait()
        if code or engine_up is None:
            raise MeasurementFailed(f"exit code {code}; the end of its log:\n{log_tail(log)}")
        summary = json.loads((output / "summary.json").read_bytes())
        seconds = summary["engine_seconds"]
        columns = ["row", "status", "input_tokens", "output_tokens"]
        results = pq.read_table(summary["results"], columns=columns).to_pylist()
        answers = [answer for answer in results if good[answer["row"]]]
        return self._result(
            "run",
            meter,
            engine_up,
            seconds,
            started,
            rows=len(answers),
            input_tokens=sum(answer["input_tokens"] or 0 for answer in answers),
            output_tokens=sum(answer["output_tokens"] or 0 for answer in answers),
            wrong=sum(
                answer["status"] != "ok" or answer["output_tokens"] != rows[answer["row"]].tokens for answer in answers
            ),
            gpu_wait=summary["gpu_wait"],
            server_cores=server_meter.usage(engine_up, engine_up + seconds).cores,
        )

    def _result(self, system: str, meter: Meter, begin: float, seconds: float, started: float, **more: Any) -> Result:
        return Result(
            scenario=self._scenario.name,
            title=self._title,
            backend=self._backend,
            system=system,
            seconds=seconds,
            start_seconds=begin - started,
            **asdict(meter.usage(begin, begin + seconds)),
            **more,
        )


def _read_line(process: subprocess.Popen[bytes]) -> bytes:
    assert process.stdout is not None
    return process.stdout.readline()


def write_manifest(path: Path, rows: Sequence[Row], urls: Sequence[str]) -> None:
    """Write the rows as a JSONL manifest with their images' URLs."""
    with path.open("w", encoding="utf-8") as file:
        for row, url in zip(rows, urls, strict=True):
            line = {"image": url, "prompt": QUESTIONS[row.question]}
            print(json.dumps({**line, "generation": {"max_new_tokens": row.tokens}}), file=file)


def option_values(options: Options) -> dict[str, Any]:
    """Return options as keyword arguments of batchvl.run.

    Raises:
        ValueError: An option does not exist.
    """
    values: dict[str, Any] = {}
    for name, value in options:
        if name not in NAMES:
            raise ValueError(f"batchvl has no option {name!r}")
        repeatable = str(OPTION_TYPES[name]).startswith("tuple")
        values[name] = [*values.get(name, ()), value] if repeatable else value
    return values


def option_flags(options: Options) -> list[str]:
    """Return options as flags of the command."""
    flags = []
    for name, value in options:
        if OPTION_TYPES[name] is not bool:
            flags += [flag(name), value]
        elif value == "true":
            flags.append(flag(name))
    return flags


def child_environment(gpus: Sequence[str]) -> dict[str, str]:
    """Return the environment of a measured process: these GPUs, no batchvl options, and no downloads."""
    inherited = {name: value for name, value in os.environ.items() if name not in map(env_variable, NAMES)}
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    fixed = {"HF_HUB_OFFLINE": "1", "LMDEPLOY_ENABLE_CHECK_ENV": "0", "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
    return {**inherited, **fixed, "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ",".join(gpus)}


@contextmanager
def killed_after(process: subprocess.Popen[bytes], seconds: float) -> Iterator[subprocess.Popen[bytes]]:
    """Wait for a process at the end of the context. Kill it after a time limit or if the context raises."""

    def expire() -> None:
        print(f"killed because it took longer than {seconds:g} s (--timeout)", file=sys.stderr)
        process.kill()

    timer = threading.Timer(seconds, expire)
    timer.start()
    try:
        yield process
        process.wait()
    finally:
        timer.cancel()
        process.kill()
        process.communicate()


def log_tail(log: Path) -> str:
    """Return the last 3,000 characters of a log."""
    return log.read_text(encoding="utf-8", errors="replace")[-3000:]
