"""Check of every answer of an engine under load and when it is killed, on newly drawn images.

    python benchmarks/gpu_answers.py                                              # LMDeploy, both backends, on a GPU
    python benchmarks/gpu_answers.py --engine transformers --scenes 60 --kills 1  # any machine, about a minute

Each backend runs twice with the command `batchvl run`: undisturbed, and with its engine process killed during the run.
The manifest has the rows of manifests/shapes.jsonl and, in between, rows about new images: captions of one to four
tiles, short questions, pairs of images, conversations. All new captions differ, so that an answer assigned to the wrong
row can be distinguished from one that is merely wrong.

Exit code 1: fewer than 99.5 % of the rows are right; an answer is another row's; a row is missing or duplicated; a good
row failed; a bad row did not fail for its own reason; or the death of an engine was not counted.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from random import Random
from typing import NamedTuple

import msgspec
import psutil
import pyarrow.parquet as pq

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from batchvl.demo import IMAGES, SIZES  # noqa: E402
from batchvl.hardware.limits import cpus  # noqa: E402
from batchvl.prompts.tokens import IMAGE_TOKEN  # noqa: E402
from batchvl.results.location import open_output  # noqa: E402
from batchvl.runner.summary import Summary  # noqa: E402
from batchvl.shapes.scenes import KINDS, Scene, ask_about, ask_about_pair, draw_scene, make_scene  # noqa: E402
from benchmarks.answers import Check, Owners, Row, check, swaps_seen  # noqa: E402

SHORT = tuple(kind for kind in KINDS if kind != "caption")
MIX = [("caption", size) for size in SIZES] + [(kind, SIZES[0]) for kind in (*SHORT, "pair", "talk", "talk")]
"""Kinds of questions and sizes of their images, in turn."""
BATCH_SIZE = 16
ENGINE_MODULE = "batchvl.serving.engine_main"
SHOWN = 10
"""Lines to print per kind of problem."""


class Drawing(NamedTuple):
    """An image to draw, and its file."""

    scene: Scene
    size: tuple[int, int]
    path: Path
    seed: str


def draw(drawing: Drawing) -> None:
    draw_scene(drawing.scene, *drawing.size, Random(drawing.seed)).save(drawing.path, quality=95)


def make_manifest(directory: Path, scenes: int, seed: int) -> tuple[Path, list[Row]]:
    """Write the manifest and its images, about `scenes` of them new; return the manifest's path and its rows."""
    shapes = (ROOT / "manifests" / "shapes.jsonl").read_text(encoding="utf-8")
    rng, drawings, rows = Random(seed), [], [json.loads(line) for line in shapes.splitlines()]
    captions = {text for row in rows for text in row["truth"] or ()}
    (directory / "scenes").mkdir()
    for kind, size in cycle(MIX):
        if len(drawings) >= scenes:
            break
        row_id, names = f"{kind}-{len(rows):05}", []
        row_scenes, prompts, truth = ask(kind, rng, captions)
        for scene in row_scenes:
            names.append(f"scenes/{len(drawings):05}{rng.choice(('.png', '.jpg'))}")
            drawings.append(Drawing(scene, size, directory / names[-1], f"{seed} {names[-1]}"))
        prompt = prompts if len(prompts) > 1 else prompts[0]
        rows.append({"id": row_id, "prompt": prompt, "images": names, "truth": truth})
    with ProcessPoolExecutor(cpus()) as processes:
        list(processes.map(draw, drawings, chunksize=16))
    shutil.copytree(ROOT / "manifests" / IMAGES, directory / IMAGES)
    rng.shuffle(rows)
    manifest = directory / "questions.jsonl"
    manifest.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return manifest, rows


def ask(kind: str, rng: Random, captions: set[str]) -> tuple[list[Scene], list[str], list[str]]:
    """Return scenes with one question and one answer per turn.

    A caption is one that is not in `captions`, to which it is added.
    """
    if kind == "pair":
        scenes = [make_scene(rng), make_scene(rng)]
        question, answer = ask_about_pair(*scenes, rng)
        return scenes, [f"Image-1: {IMAGE_TOKEN}\nImage-2: {IMAGE_TOKEN}\n{question}"], [answer]
    kinds = [*rng.sample(SHORT, 2), "caption"] if kind == "talk" else [kind]
    while True:
        scene = make_scene(rng)
        turns = [turn for turn_kind in kinds if (turn := ask_about(scene, turn_kind, rng))]
        if len(turns) == len(kinds) and (kinds[-1] != "caption" or turns[-1][1] not in captions):
            break
    if kinds[-1] == "caption":
        captions.add(turns[-1][1])
    return [scene], [question for question, _ in turns], [answer for _, answer in turns]


@dataclass
class Run:
    """The outcome of a run."""

    exit_code: int
    summary: Summary | None
    killed_at: list[int]
    """Rows on disk at each kill."""
    log_tail: str
    """The end of its output."""


def run(command: list[str], output: Path, rows: int, kills: int) -> Run:
    """Run the command, and kill its engine process whenever another (kills + 1)-th part of `rows` is done."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = {name: value for name, value in os.environ.items() if not name.startswith("BATCHVL_")}
    log, killed_at, min_done = output.with_suffix(".log"), [], 1
    with log.open("wb") as file:
        process = subprocess.Popen(
            [*command, "-o", str(output)], env={**environment, "PYTHONPATH": path}, stdout=file, stderr=file
        )
    try:
        while process.poll() is None:
            time.sleep(0.05)
            if len(killed_at) == kills:
                continue
            done = rows_done(output)
            if done < max(min_done, rows * (len(killed_at) + 1) // (kills + 1)):
                continue
            if engine := engine_process(process.pid):
                os.kill(engine, signal.SIGKILL)
                killed_at.append(done)
                time.sleep(1)  # for the last answers to reach the disk: rows after them are the next engine's
                min_done = rows_done(output) + 1
    finally:
        process.terminate()  # if this program is stopped, so that the run does not outlive it
        code = process.wait()
    file = output / "summary.json"
    summary = msgspec.json.decode(file.read_bytes(), type=Summary) if file.exists() else None
    return Run(code, summary, killed_at, log.read_text(encoding="utf-8", errors="replace")[-3000:])


def rows_done(output: Path) -> int:
    """Return the number of rows on disk, while the run is in progress."""
    if not output.is_dir():
        return 0
    return sum(len(shard.recover().outcomes().rows()) for shard in open_output(output).shards())


def engine_process(runner: int) -> int | None:
    """Return the pid of the engine: the topmost descendant of the runner with the command line of an engine."""
    level = [psutil.Process(runner)]
    while level:
        children = []
        for process in level:
            try:
                if ENGINE_MODULE in process.cmdline():
                    return process.pid
                children += process.children()
            except psutil.Error:  # the process has just ended
                continue
        level = children
    return None


HEADER = ("backend", "rows", "right", "swapped", "failed", "seconds", "rows/s", "deaths")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--engine", default="lmdeploy", help="lmdeploy, transformers or fake")
    parser.add_argument("--backends", default="turbomind,pytorch", help="backends of lmdeploy, separated by commas")
    parser.add_argument("--scenes", type=int, default=2000, help="number of new images")
    parser.add_argument("--rows-open", type=int, default=64, help="rows that lmdeploy computes concurrently")
    parser.add_argument("--kills", type=int, default=2, help="number of times to kill the engine; 0 skips that run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, metavar="DIR", help="new directory in which to keep images and outputs")
    parser.add_argument("--device", help="as of `batchvl run`")
    args = parser.parse_args()
    if args.keep and args.keep.exists():
        parser.error(f"--keep {args.keep}: already exists")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that `finally` clauses run
    with tempfile.TemporaryDirectory() as temporary:
        if args.keep:
            args.keep.mkdir(parents=True)
        return check_engine(args, (args.keep or Path(temporary)).resolve())


def check_engine(args: argparse.Namespace, directory: Path) -> int:
    """Write the manifest, run all backends, print the findings and return the exit code."""
    started = time.monotonic()
    manifest, rows = make_manifest(directory, args.scenes, args.seed)
    unique, swaps = sum(map(Owners(rows).is_unique, rows)), swaps_seen(rows, Random(args.seed))
    print(f"{len(rows)} rows, images drawn in {time.monotonic() - started:.1f} s.")
    print(
        f"{unique} rows expect a text that no other row expects. Of {swaps.total()} pairs of answers swapped on paper,"
    )
    print(
        f"{swaps['named']} are reported as swaps, {swaps['wrong']} only as wrong, "
        f"{swaps['hidden']} not at all (same answer)."
    )
    command = [sys.executable, "-m", "batchvl", "run", str(manifest), "--model", "shapes", "--engine", args.engine]
    command += ["--batch-size", str(BATCH_SIZE), "--commit-seconds", "0.1", "--accept-failures", "100%"]
    command += ["--device", args.device] if args.device else []
    if args.engine == "fake":
        command += ["--engine-option", "delay=0.3"]  # else a fast machine is done before the kill
    backends = {args.engine: command}
    if args.engine == "lmdeploy":
        command += ["--engine-option", f"max_batch_size={args.rows_open}"]
        backends = {backend: [*command, "--backend", backend] for backend in args.backends.split(",")}
    table, faults, engines = [HEADER], [], []
    for backend, command in backends.items():
        undisturbed: Check | None = None
        for kills in dict.fromkeys((0, args.kills)):
            name = f"{backend}, killed" if kills else backend
            print(f"\n{name}:", flush=True)
            outcome = run(command, directory / f"{backend}-{kills}", len(rows), kills)
            summary = outcome.summary
            if summary is None or summary.results is None or summary.engine is None:
                print(
                    f"  ended with exit code {outcome.exit_code} and no results; the end of its log:\n"
                    f"{outcome.log_tail}"
                )
                faults.append(f"{name}: no results")
                break
            findings = check(rows, pq.read_table(summary.results).to_pylist())
            print_findings(findings, outcome)
            if undisturbed:
                answers = undisturbed.answers
                differ = sum(findings.answers.get(number) != texts for number, texts in answers.items())
                print(f"  {differ} rows differ from the undisturbed run")
            undisturbed, engine = findings, summary.engine
            problems = findings.faults() + run_faults(summary, outcome, len(rows), kills)
            if args.engine == "lmdeploy" and backend not in engine.backend.lower():
                problems.append(f"ran on {engine.backend!r}")
            faults += [f"{name}: {problem}" for problem in problems]
            engines.append(f"{name}: {engine}, {engine.rows} rows in flight, batches of {engine.batch_size}")
            table.append(
                (
                    name,
                    len(rows),
                    f"{findings.right / findings.rows:.2%}",
                    len(findings.swapped),
                    summary.failed,
                    f"{summary.seconds:.1f}",
                    f"{summary.rows_per_second:.1f}",
                    summary.engine_deaths,
                )
            )
    width = max(len(line[0]) for line in table)
    print("", *(f"{line[0]:{width}}" + "".join(f"{cell!s:>9}" for cell in line[1:]) for line in table), sep="\n")
    print(
        "\nSeconds and rows/s include the engine's start and its restarts after kills. Engines:", *engines, sep="\n  "
    )
    print(*(["\nProblems:", *faults] if faults else ["\nNo problems."]), sep="\n  ")
    return 1 if faults else 0


def print_findings(findings: Check, outcome: Run) -> None:
    """Print the counts of a run and the first problems of each kind."""
    print(
        f"  {findings.right} of {findings.rows} rows right, "
        f"{findings.proven} of them with a text that no other row expects"
    )
    print(f"  failed: {', '.join(f'{rows} {code}' for code, rows in sorted(findings.failed.items())) or 'none'}")
    if outcome.killed_at:
        print(f"  engine killed with {' and '.join(map(str, outcome.killed_at))} rows on disk")
    for name in ("wrong", "swapped", "missing", "doubled", "misfailed"):
        if lines := getattr(findings, name):
            print(f"  {len(lines)} {name}:", *lines[:SHOWN], *["…"] * (len(lines) > SHOWN), sep="\n    ")


def run_faults(summary: Summary, outcome: Run, rows: int, kills: int) -> list[str]:
    """Return the problems of the run itself, whatever it answered."""
    faults = [f"exit code {outcome.exit_code}: {summary.message}"] if outcome.exit_code else []
    if summary.rows != rows:
        faults.append(f"{summary.rows} of {rows} rows were written")
    if len(outcome.killed_at) != kills:
        faults.append(f"the run ended after {len(outcome.killed_at)} of {kills} kills: it needs more --scenes")
    if summary.engine_deaths != len(outcome.killed_at):
        faults.append(f"{summary.engine_deaths} deaths counted, {len(outcome.killed_at)} kills")
    return faults


if __name__ == "__main__":
    sys.exit(main())
