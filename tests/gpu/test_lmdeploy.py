"""LMDeploy on a GPU, whole runs: right answers in every form, and every way in which its engine goes down.

    python3 -m pytest -c /dev/null --rootdir . -m gpu tests/gpu -k 'not memory' -n 6    # two minutes on an H200
    python3 -m pytest -c /dev/null --rootdir . -m gpu tests/gpu -k memory               # five: these want the GPU alone

Each test prints what a user would have read.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
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
BAD = {"missing_file", "corrupt_image", "forbidden_address"}
GOOD = [row for row in map(json.loads, SHAPES.read_text().splitlines()) if row["id"] not in BAD]
SMALL = ("--engine-option", "max_batch_size=16", "--cache-max-entry-count", "0.1")
# Without this LMDeploy wants the library ray for several GPUs.
PYTORCH_TP = ("--backend", "pytorch", "--engine-option", "distributed_executor_backend=mp")


class Run:
    """A run of the command and what became of it."""

    def __init__(self, out: Path, *arguments: str, manifest: Path = SHAPES, before: str = "") -> None:
        """before: Python for the runner's process, ahead of all else."""
        self.out, self.truth = out, [json.loads(line).get("truth") for line in manifest.read_text().splitlines()]
        command = [sys.executable, "-c", f"{before}\nfrom batchvl.cli import main; main(prog_name='batchvl')"]
        command += ["run", str(manifest), "--engine", "lmdeploy", "-o", str(out)]
        command += ["--image-root", str(SHAPES.parent)]
        self._told = out.with_name(out.name + ".told")
        with self._told.open("w") as file:
            self.process = subprocess.Popen([*command, *arguments], stderr=file)

    def wait(self, seconds: float = 240) -> Run:
        try:
            self.process.wait(seconds)
        finally:
            self.process.kill()
            print(self.said)
        return self

    def says(self, text: str, seconds: float = 120) -> None:
        """Waits until the run has told that."""
        end = time.monotonic() + seconds
        while text not in self.said:
            assert self.process.poll() is None, self.said
            assert time.monotonic() < end, self.said
            time.sleep(0.1)

    @property
    def said(self) -> str:
        return self._told.read_text()

    @property
    def code(self) -> int:
        return self.process.returncode

    @property
    def summary(self) -> dict[str, Any]:
        [file] = self.out.rglob("summary.json")
        found: dict[str, Any] = json.loads(file.read_text())
        return found

    def rows(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = pq.read_table(self.out / "results.parquet").to_pylist()
        return found

    def right(self) -> int:
        """How many rows have the true answers."""
        return sum((row["responses"] or [row["response"]]) == self.truth[row["row"]] for row in self.rows())

    def engine(self) -> psutil.Process:
        """The engine's process, once it is there."""
        return self.engines(1)[0]

    def engines(self, count: int, seconds: float = 60) -> list[psutil.Process]:
        """The engines' processes, once there are so many."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            children = psutil.Process(self.process.pid).children(recursive=True)
            found = [child for child in children if "batchvl.serving.engine_main" in child.cmdline()]
            if len(found) >= count:
                return found
            time.sleep(0.2)
        raise AssertionError(f"no {count} engine processes")


def questions(path: Path, rows: int, **columns: Any) -> Path:
    """So many questions about the pictures of the good rows, each several times."""
    lines = []
    for number in range(rows):
        row = GOOD[number % len(GOOD)]
        images = [str((SHAPES.parent / image).resolve()) for image in row["images"]]
        lines.append(json.dumps({**row, "id": number, "images": images, **columns}))
    path.write_text("\n".join(lines))
    return path


@contextmanager
def hog(gibibytes_left: float) -> Iterator[None]:
    """Another process that holds all of the GPU's memory but so much."""
    script = (
        "import sys, time, torch\n"
        "free, _ = torch.cuda.mem_get_info()\n"
        f"wanted = size = int(free - {gibibytes_left} * 2**30)\n"
        "held = []\n"
        "while size > 2**20 and sum(map(len, held)) < wanted:\n"
        "    try: held.append(torch.empty(size, dtype=torch.uint8, device='cuda'))\n"
        "    except torch.OutOfMemoryError: size //= 2\n"
        "torch.cuda.synchronize()\n"
        "print('ready', flush=True); time.sleep(600)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("backend", ["turbomind", "pytorch"])
def test_the_classic_form_is_answered_right(tmp_path: Path, backend: str) -> None:
    model = checkpoints.classic(tmp_path / "model")
    run = Run(tmp_path / "out", "--model", str(model), "--trust-remote-code", "--backend", backend, *SMALL).wait()
    assert run.code == 3
    assert run.right() >= 58
    assert backend in run.summary["engine"]["backend"]


def test_weights_of_four_bits(tmp_path: Path) -> None:
    model = checkpoints.awq(tmp_path / "model")
    run = Run(tmp_path / "out", "--model", str(model), "--model-format", "awq", "--quant-policy", "8", *SMALL).wait()
    assert run.code == 3
    assert run.right() >= 40
    assert "turbomind" in run.summary["engine"]["backend"]


def test_an_abort_in_c_is_told_and_ends_after_two(tmp_path: Path) -> None:
    model = checkpoints.strange_heads(tmp_path / "model")
    run = Run(tmp_path / "out", "--model", str(model), "--backend", "turbomind", *SMALL).wait()
    assert run.code == 1
    assert run.said.count("SIGABRT") >= 2
    assert "unsupported InternVit PrepareQKV head_dim: 32" in run.said


def test_auto_takes_the_other_backend_for_a_model_that_would_abort(tmp_path: Path) -> None:
    model = checkpoints.strange_heads(tmp_path / "model")
    run = Run(tmp_path / "out", "--model", str(model), "--max-new-tokens", "4", *SMALL).wait()
    assert run.code == 3
    assert "pytorch" in run.summary["engine"]["backend"]
    assert "vision heads" in run.said


@pytest.mark.parametrize("backend", ["turbomind", "pytorch"])
def test_rows_past_their_time_are_stopped_and_the_others_are_not(tmp_path: Path, backend: str) -> None:
    """Two at once, of lists of eight: most of the endless rows wait for a handle when their time is over."""
    model = checkpoints.babbling(tmp_path / "model")
    lines = []
    for number in range(40):
        endless = number % 2 == 0
        lines.append({"id": number, "prompt": "go on", "generation": {"max_new_tokens": 4000 if endless else 2}})
    manifest = tmp_path / "m.jsonl"
    manifest.write_text("\n".join(map(json.dumps, lines)))
    options = ("--batch-size", "8", "--engine-option", "max_batch_size=2", "--cache-max-entry-count", "0.1")
    options += ("--row-timeout", "2", "--retries", "0")
    run = Run(tmp_path / "out", "--model", str(model), "--backend", backend, *options, manifest=manifest).wait()
    rows = run.rows()
    codes = Counter(row["error"]["code"] if row["error"] else "ok" for row in rows)
    print(codes, run.summary["seconds"], [row["output_tokens"] for row in rows])
    assert set(codes) <= {"ok", "row_timeout"}
    assert codes["row_timeout"] >= 5
    assert all(row["output_tokens"] == 2 for row in rows if row["id"] % 2 and not row["error"])
    assert run.summary["engine_deaths"] == 0


def test_settings_reach_the_engine(tmp_path: Path) -> None:
    """Of a babbling model: a penalty changes greedy answers, a seed repeats drawn ones, a stop text ends one."""
    model = checkpoints.babbling(tmp_path / "model")
    drawn = {"temperature": 1.5, "max_new_tokens": 24}
    kinds = [
        {"max_new_tokens": 24}, {"max_new_tokens": 24}, {"max_new_tokens": 24, "repetition_penalty": 1.5},
        {**drawn, "seed": 1}, {**drawn, "seed": 1}, {**drawn, "seed": 2}, {**drawn, "seed": 1, "top_k": 1},
        {"max_new_tokens": 7},
    ]  # fmt: skip
    manifest = tmp_path / "m.jsonl"
    manifest.write_text("\n".join(json.dumps({"prompt": "go on", "generation": kind}) for kind in kinds))
    run = Run(tmp_path / "out", "--model", str(model), *SMALL, manifest=manifest).wait()
    greedy, again, penalty, one, same, two, best, short = [row["response"] for row in run.rows()]
    print(run.rows())
    assert greedy == again == best
    assert penalty != greedy
    assert one == same != two
    assert one != greedy
    assert greedy.startswith(short)
    stop = greedy[len(greedy) // 2 :][:3]
    (tmp_path / "n.jsonl").write_text(
        json.dumps({"prompt": "go on", "generation": {"max_new_tokens": 24, "stop": stop}})
    )
    run = Run(tmp_path / "stop", "--model", str(model), *SMALL, manifest=tmp_path / "n.jsonl").wait()
    [row] = run.rows()
    assert row["response"] == greedy[: greedy.index(stop)]
    assert row["finish_reason"] == "stop"


def test_an_engine_that_stands_still_is_replaced(tmp_path: Path) -> None:
    manifest = questions(tmp_path / "m.jsonl", 1200)
    run = Run(tmp_path / "out", "--model", "shapes", "--hang-timeout", "8", *SMALL, manifest=manifest)
    engine = run.engine()
    run.says("lists of")
    time.sleep(2)
    engine.send_signal(signal.SIGSTOP)
    run.wait()
    assert run.code == 0
    assert run.summary["engine_deaths"] == 1
    assert "the engine hangs" in run.said
    assert run.right() == 1200


@pytest.mark.parametrize("backend", ["turbomind", "pytorch"])
def test_the_runner_is_killed_and_the_same_command_goes_on(tmp_path: Path, backend: str) -> None:
    """kill -9 at three moments: while the model loads, and twice while rows are answered."""
    manifest = questions(tmp_path / "m.jsonl", 3000)
    arguments = ("--model", "shapes", "--backend", backend, *SMALL, "--part-rows", "300", "--commit-seconds", "0.05")
    for moment in ("starting", "answering", "answering"):
        run = Run(tmp_path / "out", *arguments, manifest=manifest)
        if moment == "answering":
            run.says("lists of")
        engine = run.engine()
        time.sleep(2)
        family = psutil.Process(run.process.pid).children(recursive=True)
        assert engine in family
        run.process.kill()
        assert run.process.wait() == -signal.SIGKILL, run.said
        left = psutil.wait_procs(family, timeout=20)[1]
        assert not left, "somebody outlived the runner"
    run = Run(tmp_path / "out", *arguments, manifest=manifest).wait()
    assert run.code == 0
    assert 0 < run.summary["resumed"] < 3000
    assert [row["row"] for row in run.rows()] == list(range(3000))
    assert run.right() == 3000


@pytest.mark.parametrize("backend", ["turbomind", "pytorch"])
def test_too_little_gpu_memory_at_the_start_is_told_with_numbers(tmp_path: Path, backend: str) -> None:
    with hog(0.7):
        run = Run(tmp_path / "out", "--model", "shapes", "--backend", backend, *SMALL).wait()
    assert run.code in (1, 2)
    assert "GiB are free" in run.said
    assert "--cache-max-entry-count" in run.said
    assert not list(tmp_path.rglob("results.parquet"))


@pytest.mark.parametrize("options", [("--backend", "turbomind"), PYTORCH_TP], ids=["turbomind", "pytorch"])
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="wants two GPUs")
def test_two_gpus_share_a_model(tmp_path: Path, options: tuple[str, ...]) -> None:
    run = Run(tmp_path / "out", "--model", "shapes", "--tp", "2", *options, *SMALL).wait()
    assert run.code == 3
    assert run.right() == len(GOOD)
    assert "x 2" in run.summary["engine"]["backend"]


@pytest.mark.parametrize("backend", ["turbomind", "pytorch"])
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="wants two GPUs")
def test_two_gpus_have_an_engine_each_and_one_dies(tmp_path: Path, backend: str) -> None:
    manifest = questions(tmp_path / "m.jsonl", 600)
    options = ("--model", "shapes", "--gpus", "all", "--backend", backend, *SMALL)
    run = Run(tmp_path / "out", *options, manifest=manifest)
    run.says("2 replicas, lists of")
    first, second = run.engines(2)
    assert {process.environ()["CUDA_VISIBLE_DEVICES"] for process in (first, second)} == {"0", "1"}
    second.send_signal(signal.SIGKILL)
    run.wait()
    assert run.code == 0
    assert run.right() == 600
    assert run.summary["engine"]["replicas"] == 2
    assert run.summary["engine_deaths"] == 1


@pytest.mark.parametrize("backend", ["turbomind", "pytorch"])
def test_gpu_memory_that_others_take_in_mid_run_costs_no_row(tmp_path: Path, backend: str) -> None:
    """While short rows are answered somebody takes what is left; then rows of 13 tiles want more, until it is free."""
    model = checkpoints.large(tmp_path / "model")
    Image.effect_noise((1280, 960), 40).convert("RGB").save(tmp_path / "noise.jpg")
    short = [{"prompt": "go on", "generation": {"max_new_tokens": 64}}] * 600
    tiles = [{"prompt": "describe", "image": "noise.jpg", "generation": {"max_new_tokens": 8}}] * 40
    manifest = tmp_path / "m.jsonl"
    manifest.write_text("\n".join(map(json.dumps, short + tiles)))
    run = Run(tmp_path / "out", "--model", str(model), "--backend", backend, *SMALL, manifest=manifest)
    run.says("lists of")
    with hog(0.0):
        run.says("restarting it")
        time.sleep(5)
    run.wait()
    assert run.code == 0
    assert run.summary["engine_deaths"] >= 1
    assert "it ran out of GPU memory" in run.said
    assert [row["status"] for row in run.rows()] == ["ok"] * 640


def test_memory_that_grows_has_the_engine_started_afresh(tmp_path: Path) -> None:
    """An engine may live for minutes however it grows, and grow by a quarter; here for no time, and by nothing."""
    manifest = questions(tmp_path / "m.jsonl", 6000)
    soon = "import batchvl.serving.recycle as g; g.MIN_UP_SECONDS, g.MIN_UP_STARTS, g.MIN_GAIN = 0.0, 0, 1.0"
    options = ("--model", "shapes", "--engine-memory", "1MB", *SMALL)
    run = Run(tmp_path / "out", *options, manifest=manifest, before=soon).wait()
    assert run.code == 0
    assert run.right() == 6000
    assert run.summary["engine_restarts"] >= 1
    assert run.summary["engine_deaths"] == 0
    assert "note: the engine holds" in run.said


def test_rows_about_the_same_pictures_share_what_turbomind_keeps_of_them(tmp_path: Path) -> None:
    """Their common beginning goes ahead; pictures of up to four tiles end somewhere within a block of 64 tokens."""
    manifest = questions(tmp_path / "m.jsonl", 1200)
    options = ("--model", "shapes", "--backend", "turbomind", *SMALL)
    run = Run(tmp_path / "out", *options, manifest=manifest).wait()
    assert run.code == 0
    assert run.right() == 1200


def test_a_missing_library_is_named(tmp_path: Path) -> None:
    environment = {name: text for name, text in os.environ.items() if name != "LD_LIBRARY_PATH"}
    command = [sys.executable, "-m", "batchvl", "run", str(SHAPES), "--model", "shapes", "-o", str(tmp_path / "out")]
    run = subprocess.run([*command, "--backend", "turbomind"], env=environment, capture_output=True, text=True)
    print(run.stderr)
    if run.returncode == 3:
        pytest.skip("TurboMind's libraries are found without LD_LIBRARY_PATH here")
    assert run.returncode == 2
    assert "libcublas.so.12" in run.stderr
