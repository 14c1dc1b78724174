"""Whole runs with LMDeploy on a GPU: right answers for every form of checkpoint, and every way in which it can fail.

    python3 -m pytest -c /dev/null --rootdir . -m gpu tests/gpu -k 'not memory' -n 6    # two minutes on an H200
    python3 -m pytest -c /dev/null --rootdir . -m gpu tests/gpu -k memory               # five minutes, no other load

Each test prints the output of its runs.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from tests.gpu import checkpoints

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]
SHAPES = Path("manifests/shapes.jsonl").resolve()
ENGINE_UP = ", batches of "
"""Part of the line that a run prints once its engine is up."""
BAD = {"missing_file", "corrupt_image", "forbidden_address"}
GOOD = [row for row in map(json.loads, SHAPES.read_text().splitlines()) if row["id"] not in BAD]
SMALL = ("--engine-option", "max_batch_size=16", "--cache-max-entry-count", "0.1")
# By default LMDeploy needs the library ray for several GPUs.
PYTORCH_TP = ("--backend", "pytorch", "--engine-option", "distributed_executor_backend=mp")


class Run:
    """A run of the command and its results.

    Args:
        out: The output directory.
        arguments: Options of `batchvl run`.
        manifest: The manifest.
        before: Python code for the runner's process, run before batchvl.
    """

    def __init__(self, out: Path, *arguments: str, manifest: Path = SHAPES, before: str = "") -> None:
        self.out, self.truth = out, [json.loads(line).get("truth") for line in manifest.read_text().splitlines()]
        command = [sys.executable, "-c", f"{before}\nfrom batchvl.cli import main; main(prog_name='batchvl')"]
        command += ["run", str(manifest), "--engine", "lmdeploy", "-o", str(out)]
        command += ["--image-root", str(SHAPES.parent)]
        self._log = out.with_name(out.name + ".log")
        self._journals: dict[str, int] = {}
        with self._log.open("w") as file:
            self.process = subprocess.Popen([*command, *arguments], stderr=file)

    def wait(self, seconds: float = 240) -> Run:
        try:
            self.process.wait(seconds)
        finally:
            self.process.kill()
            print(self.output)
        return self

    def wait_for(self, text: str, seconds: float = 120) -> None:
        """Wait until the run has printed the text."""
        end = time.monotonic() + seconds
        while text not in self.output:
            assert self.process.poll() is None, self.output
            assert time.monotonic() < end, self.output
            time.sleep(0.1)

    def wait_for_rows(self, seconds: float = 120) -> None:
        """Wait until the run has committed rows since this call."""
        before, end = self._saved_bytes(), time.monotonic() + seconds
        while self._saved_bytes() < before + 4096:
            assert self.process.poll() is None, self.output
            assert time.monotonic() < end, self.output
            time.sleep(0.01)

    def _saved_bytes(self) -> int:
        """Return the size of all journals: of those that are there, and of those that have become parts."""
        for path in self.out.rglob("journal-*.log"):
            with suppress(FileNotFoundError):
                self._journals[path.name] = path.stat().st_size
        return sum(self._journals.values())

    @property
    def output(self) -> str:
        return self._log.read_text()

    @property
    def code(self) -> int:
        return self.process.returncode

    @property
    def summary(self) -> dict[str, Any]:
        [file] = self.out.rglob("summary.json")
        summary: dict[str, Any] = json.loads(file.read_text())
        return summary

    def rows(self) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = pq.read_table(self.out / "results.parquet").to_pylist()
        return rows

    def right(self) -> int:
        """Return the number of rows with the true answers."""
        return sum((row["responses"] or [row["response"]]) == self.truth[row["row"]] for row in self.rows())

    def engine(self) -> psutil.Process:
        """Wait for the engine's process and return it."""
        return self.engines(1)[0]

    def engines(self, count: int, seconds: float = 60) -> list[psutil.Process]:
        """Wait until there are `count` engine processes and return them."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            children = psutil.Process(self.process.pid).children(recursive=True)
            engines = [child for child in children if "batchvl.serving.engine_main" in child.cmdline()]
            if len(engines) >= count:
                return engines
            time.sleep(0.2)
        raise AssertionError(f"fewer than {count} engine processes")


def questions(path: Path, rows: int, **columns: Any) -> Path:
    """Write a manifest of `rows` questions about the images of the good rows, each several times."""
    lines = []
    for number in range(rows):
        row = GOOD[number % len(GOOD)]
        images = [str((SHAPES.parent / image).resolve()) for image in row["images"]]
        lines.append(json.dumps({**row, "id": number, "images": images, **columns}))
    path.write_text("\n".join(lines))
    return path


@contextmanager
def gpu_occupant() -> Iterator[Callable[[float], None]]:
    """Start a process that allocates the GPU's memory except for some GiB when told to, and frees it at the end.

    It imports torch beforehand, which takes longer than a short run.
    """
    script = (
        "import sys, time, torch\n"
        "torch.cuda.mem_get_info()\n"
        "print('started', flush=True)\n"
        "left = float(sys.stdin.readline())\n"
        "free, _ = torch.cuda.mem_get_info()\n"
        "total = size = int(free - left * 2**30)\n"
        "held = []\n"
        "while size > 2**20 and sum(map(len, held)) < total:\n"
        "    try: held.append(torch.empty(size, dtype=torch.uint8, device='cuda'))\n"
        "    except torch.OutOfMemoryError: size //= 2\n"
        "torch.cuda.synchronize()\n"
        "print('ready', flush=True); time.sleep(600)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None
    assert process.stdout is not None
    stdin, stdout = process.stdin, process.stdout

    def allocate_all_but(gibibytes: float) -> None:
        stdin.write(f"{gibibytes}\n")
        stdin.flush()
        assert stdout.readline() == "ready\n"

    try:
        assert stdout.readline() == "started\n"
        yield allocate_all_but
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("backend", ["turbomind", "pytorch"])
def test_a_chat_model_gives_right_answers(tmp_path: Path, backend: str) -> None:
    model = checkpoints.chat_model(tmp_path / "model")
    run = Run(tmp_path / "out", "--model", str(model), "--trust-remote-code", "--backend", backend, *SMALL).wait()
    assert run.code == 3
    assert run.right() >= 58
    assert backend in run.summary["engine"]["backend"]


def test_4_bit_weights(tmp_path: Path) -> None:
    model = checkpoints.awq(tmp_path / "model")
    run = Run(tmp_path / "out", "--model", str(model), "--model-format", "awq", "--quant-policy", "8", *SMALL).wait()
    assert run.code == 3
    assert run.right() >= 40
    assert "turbomind" in run.summary["engine"]["backend"]


def test_an_abort_in_native_code_is_reported_and_ends_the_run_after_two(tmp_path: Path) -> None:
    model = checkpoints.unsupported_heads(tmp_path / "model")
    run = Run(tmp_path / "out", "--model", str(model), "--backend", "turbomind", *SMALL).wait()
    assert run.code == 1
    assert run.output.count("SIGABRT") >= 2
    assert "unsupported InternVit PrepareQKV head_dim: 32" in run.output


def test_auto_chooses_the_other_backend_for_a_model_that_would_abort(tmp_path: Path) -> None:
    model = checkpoints.unsupported_heads(tmp_path / "model")
    run = Run(tmp_path / "out", "--model", str(model), "--max-new-tokens", "4", *SMALL).wait()
    assert run.code == 3
    assert "pytorch" in run.summary["engine"]["backend"]
    assert "vision heads" in run.output


@pytest.mark.parametrize("backend", ["turbomind", "pytorch"])
def test_only_rows_past_their_timeout_are_aborted(tmp_path: Path, backend: str) -> None:
    """Two of a batch of eight rows are computed concurrently: most endless rows time out while waiting for a handle."""
    model = checkpoints.endless(tmp_path / "model")
    lines = []
    for number in range(40):
        endless = number % 2 == 0
        lines.append({"id": number, "prompt": "go on", "generation": {"max_new_tokens": 4000 if endless else 2}})
    manifest = tmp_path / "m.jsonl"
    manifest.write_text("\n".join(map(json.dumps, lines)))
    options = ("--batch-size", "8", "--engine-option", "max_batch_size=2", "--cache-max-entry-count", "0.1")
    options += ("--row-timeout", "1", "--retries", "0")  # 4,000 tokens take longer than that, even alone
    run = Run(tmp_path / "out", "--model", str(model), "--backend", backend, *options, manifest=manifest).wait()
    rows = run.rows()
    codes = Counter(row["error"]["code"] if row["error"] else "ok" for row in rows)
    print(codes, run.summary["seconds"], [row["output_tokens"] for row in rows])
    assert set(codes) <= {"ok", "row_timeout"}
    assert codes["row_timeout"] >= 5
    assert all(row["output_tokens"] == 2 for row in rows if row["id"] % 2 and not row["error"])
    assert run.summary["engine_deaths"] == 0


def test_settings_reach_the_engine(tmp_path: Path) -> None:
    """A penalty changes greedy answers, a seed makes sampled ones repeatable, and a stop string ends one."""
    model = checkpoints.endless(tmp_path / "model")
    sampled = {"temperature": 1.5, "max_new_tokens": 24}
    settings = [
        {"max_new_tokens": 24},
        {"max_new_tokens": 24},
        {"max_new_tokens": 24, "repetition_penalty": 1.5},
        {**sampled, "seed": 1},
        {**sampled, "seed": 1},
        {**sampled, "seed": 2},
        {**sampled, "seed": 1, "top_k": 1},
        {"max_new_tokens": 7},
    ]
    manifest = tmp_path / "m.jsonl"
    manifest.write_text("\n".join(json.dumps({"prompt": "go on", "generation": generation}) for generation in settings))
    run = Run(tmp_path / "out", "--model", str(model), *SMALL, manifest=manifest).wait()
    greedy, repeated, penalty, seed_1, seed_1_again, seed_2, top_1, short = [row["response"] for row in run.rows()]
    print(run.rows())
    assert greedy == repeated == top_1
    assert penalty != greedy
    assert seed_1 == seed_1_again != seed_2
    assert seed_1 != greedy
    assert greedy.startswith(short)
    stop = greedy[len(greedy) // 2 :][:3]
    (tmp_path / "n.jsonl").write_text(
        json.dumps({"prompt": "go on", "generation": {"max_new_tokens": 24, "stop": stop}})
    )
    run = Run(tmp_path / "stop", "--model", str(model), *SMALL, manifest=tmp_path / "n.jsonl").wait()
    [row] = run.rows()
    assert row["response"] == greedy[: greedy.index(stop)]
    assert row["finish_reason"] == "stop"


def test_a_hanging_engine_is_replaced(tmp_path: Path) -> None:
    manifest = questions(tmp_path / "m.jsonl", 4000)
    options = ("--model", "shapes", "--hang-timeout", "8", "--commit-seconds", "0.05", *SMALL)
    run = Run(tmp_path / "out", *options, manifest=manifest)
    engine = run.engine()
    run.wait_for_rows()
    engine.send_signal(signal.SIGSTOP)
    run.wait()
    assert run.code == 0
    assert run.summary["engine_deaths"] == 1
    assert "the engine hangs" in run.output
    assert run.right() == 4000


@pytest.mark.parametrize("backend", ["turbomind", "pytorch"])
def test_a_killed_run_is_resumed_by_the_same_command(tmp_path: Path, backend: str) -> None:
    """kill -9 three times: while the model is loading, and twice while rows are being answered."""
    manifest = questions(tmp_path / "m.jsonl", 3000)
    arguments = ("--model", "shapes", "--backend", backend, *SMALL, "--part-rows", "300", "--commit-seconds", "0.05")
    for moment in ("starting", "answering", "answering"):
        run = Run(tmp_path / "out", *arguments, manifest=manifest)
        engine = run.engine()
        if moment == "answering":
            run.wait_for_rows()
        else:
            time.sleep(2)  # into the loading of the model, which takes longer
        descendants = psutil.Process(run.process.pid).children(recursive=True)
        assert engine in descendants
        run.process.kill()
        assert run.process.wait() == -signal.SIGKILL, run.output
        left = psutil.wait_procs(descendants, timeout=20)[1]
        assert not left, "a process outlived the runner"
    run = Run(tmp_path / "out", *arguments, manifest=manifest).wait()
    assert run.code == 0
    assert 0 < run.summary["resumed"] < 3000
    assert [row["row"] for row in run.rows()] == list(range(3000))
    assert run.right() == 3000


@contextmanager
def images_after(event: threading.Event) -> Iterator[str]:
    """Serve images of noise from loopback once an event is set, each request's a different one; yield the URL."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            event.wait(120)
            self.send_response(200)
            self.end_headers()
            Image.effect_noise((1280, 960), 40).convert("RGB").save(self.wfile, "JPEG")

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            event.set()
            server.shutdown()
            thread.join()


@pytest.mark.parametrize("backend", ["turbomind", "pytorch"])
def test_too_little_gpu_memory_at_the_start_is_reported_with_numbers(tmp_path: Path, backend: str) -> None:
    with gpu_occupant() as allocate_all_but:
        allocate_all_but(0.7)
        run = Run(tmp_path / "out", "--model", "shapes", "--backend", backend, *SMALL).wait()
    assert run.code in (1, 2)
    assert "GiB are free" in run.output
    assert "--cache-max-entry-count" in run.output
    assert not list(tmp_path.rglob("results.parquet"))


@pytest.mark.parametrize("options", [("--backend", "turbomind"), PYTORCH_TP], ids=["turbomind", "pytorch"])
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_share_a_model(tmp_path: Path, options: tuple[str, ...]) -> None:
    run = Run(tmp_path / "out", "--model", "shapes", "--tp", "2", *options, *SMALL).wait()
    assert run.code == 3
    assert run.right() == len(GOOD)
    assert "x 2" in run.summary["engine"]["backend"]


@pytest.mark.parametrize("backend", ["turbomind", "pytorch"])
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_one_of_two_replicas_dies(tmp_path: Path, backend: str) -> None:
    manifest = questions(tmp_path / "m.jsonl", 600)
    options = ("--model", "shapes", "--gpus", "all", "--backend", backend, *SMALL)
    run = Run(tmp_path / "out", *options, manifest=manifest)
    run.wait_for(f"2 replicas{ENGINE_UP}")
    first, second = run.engines(2)
    assert {process.environ()["CUDA_VISIBLE_DEVICES"] for process in (first, second)} == {"0", "1"}
    second.send_signal(signal.SIGKILL)
    run.wait()
    assert run.code == 0
    assert run.right() == 600
    assert run.summary["engine"]["replicas"] == 2
    assert run.summary["engine_deaths"] == 1


@pytest.mark.parametrize("backend", ["turbomind", "pytorch"])
def test_gpu_memory_that_others_allocate_during_a_run_costs_no_row(tmp_path: Path, backend: str) -> None:
    """Another process allocates the rest before rows of 13 tiles come.

    LMDeploy's PyTorch engine needs more for them and exits until it is released; TurboMind needs none.
    """
    model = checkpoints.large(tmp_path / "model")
    allocated = threading.Event()
    with images_after(allocated) as url:
        short = [{"prompt": "go on", "generation": {"max_new_tokens": 64}}] * 600
        tiles = [
            {"prompt": "describe", "image": f"{url}/{number}.jpg", "generation": {"max_new_tokens": 8}}
            for number in range(40)
        ]
        manifest = tmp_path / "m.jsonl"
        manifest.write_text("\n".join(map(json.dumps, short + tiles)))
        options = ("--backend", backend, *SMALL, "--allow-private", "127.0.0.0/8", "--fetch-timeout", "120")
        with gpu_occupant() as allocate_all_but:
            run = Run(tmp_path / "out", "--model", str(model), *options, manifest=manifest)
            run.wait_for(ENGINE_UP)
            allocate_all_but(0)
            allocated.set()
            if backend == "pytorch":
                run.wait_for("restarting it")
                time.sleep(5)
            else:  # nothing was left to allocate, and it answered all rows
                run.wait()
        run.wait()
    assert run.code == 0
    if backend == "pytorch":
        assert run.summary["engine_deaths"] >= 1
        assert "it ran out of GPU memory" in run.output
    assert [row["status"] for row in run.rows()] == ["ok"] * 640


def test_an_engine_whose_memory_grows_is_restarted(tmp_path: Path) -> None:
    """By default an engine stays up for minutes and may grow by a quarter; here neither."""
    manifest = questions(tmp_path / "m.jsonl", 6000)
    early = "import batchvl.serving.recycle as r; r.MIN_UP_SECONDS, r.MIN_UP_STARTS, r.MIN_GAIN = 0.0, 0, 1.0"
    options = ("--model", "shapes", "--engine-memory", "1MB", *SMALL)
    run = Run(tmp_path / "out", *options, manifest=manifest, before=early).wait()
    assert run.code == 0
    assert run.right() == 6000
    assert run.summary["engine_restarts"] >= 1
    assert run.summary["engine_deaths"] == 0
    assert "(--engine-memory): restarting it" in run.output


def test_rows_about_the_same_images_share_turbomind_s_prefix_cache(tmp_path: Path) -> None:
    """Their common prefix is computed first; images of up to four tiles end within a block of 64 tokens."""
    manifest = questions(tmp_path / "m.jsonl", 1200)
    options = ("--model", "shapes", "--backend", "turbomind", *SMALL)
    run = Run(tmp_path / "out", *options, manifest=manifest).wait()
    assert run.code == 0
    assert run.right() == 1200


def test_a_missing_library_is_reported(tmp_path: Path) -> None:
    environment = {name: text for name, text in os.environ.items() if name != "LD_LIBRARY_PATH"}
    command = [sys.executable, "-m", "batchvl", "run", str(SHAPES), "--model", "shapes", "-o", str(tmp_path / "out")]
    run = subprocess.run([*command, "--backend", "turbomind"], env=environment, capture_output=True, text=True)
    print(run.stderr)
    if run.returncode == 3:
        pytest.skip("TurboMind finds its libraries without LD_LIBRARY_PATH here")
    assert run.returncode == 2
    assert "libcublas.so.12" in run.stderr
