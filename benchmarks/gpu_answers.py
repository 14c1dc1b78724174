"""Whether an engine answers right under load and when it is killed: fresh pictures, and every answer checked.

    python benchmarks/gpu_answers.py                                              # LMDeploy, both backends, on a GPU
    python benchmarks/gpu_answers.py --engine transformers --scenes 60 --kills 1  # any machine, about a minute

Each backend runs twice, by the command `batchvl run`: undisturbed, and with its engine process killed in mid-run. One
manifest holds the rows of manifests/shapes.jsonl and rows about fresh pictures, mixed: captions of one to four tiles,
short questions, pairs of pictures, conversations. Every fresh caption is another, so that an answer that went to the
wrong row is told from one that is merely wrong.

Exit code 1: fewer than 99.5 % of the rows are right, an answer belongs to another row, a row is missing, doubled or
failed that should not have, a bad row did not fail for its own reason, or a death was not counted.
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
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import chain, cycle
from pathlib import Path
from random import Random
from typing import NamedTuple

import msgspec
import pyarrow.parquet as pq

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from batchvl.demo import PICTURES, SIZES  # noqa: E402
from batchvl.hardware.limits import cpus  # noqa: E402
from batchvl.prompts.tokens import IMAGE_TOKEN  # noqa: E402
from batchvl.results.location import open_output  # noqa: E402
from batchvl.runner.summary import Summary  # noqa: E402
from batchvl.shapes.scenes import KINDS, Scene, ask_about, ask_about_pair, draw_scene, make_scene  # noqa: E402
from benchmarks.answers import Check, Owners, Row, check, swaps_seen  # noqa: E402

SHORT = tuple(kind for kind in KINDS if kind != "caption")
MIX = [("caption", size) for size in SIZES] + [(kind, SIZES[0]) for kind in (*SHORT, "pair", "talk", "talk")]
"""What is asked, of pictures of which size, in turn."""
BATCH = 16
SHOWN = 10


class Picture(NamedTuple):
    """One to draw, and where."""

    scene: Scene
    size: tuple[int, int]
    path: Path
    seed: str


def draw(picture: Picture) -> None:
    draw_scene(picture.scene, *picture.size, Random(picture.seed)).save(picture.path, quality=95)


def make_manifest(folder: Path, scenes: int, seed: int) -> tuple[Path, list[Row]]:
    """The manifest with its pictures, about so many fresh ones, and its rows in order."""
    known = (ROOT / "manifests" / "shapes.jsonl").read_text(encoding="utf-8")
    rng, pictures, rows = Random(seed), [], [json.loads(line) for line in known.splitlines()]
    taken = {text for row in rows for text in row["truth"] or ()}
    (folder / "scenes").mkdir()
    for kind, size in cycle(MIX):
        if len(pictures) >= scenes:
            break
        row_id, names = f"{kind}-{len(rows):05}", []
        shown, prompts, truth = ask(kind, rng, taken)
        for scene in shown:
            names.append(f"scenes/{len(pictures):05}{rng.choice(('.png', '.jpg'))}")
            pictures.append(Picture(scene, size, folder / names[-1], f"{seed} {names[-1]}"))
        prompt = prompts if len(prompts) > 1 else prompts[0]
        rows.append({"id": row_id, "prompt": prompt, "images": names, "truth": truth})
    with ProcessPoolExecutor(cpus()) as processes:
        list(processes.map(draw, pictures, chunksize=16))
    shutil.copytree(ROOT / "manifests" / PICTURES, folder / PICTURES)
    rng.shuffle(rows)
    manifest = folder / "questions.jsonl"
    manifest.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return manifest, rows


def ask(kind: str, rng: Random, taken: set[str]) -> tuple[list[Scene], list[str], list[str]]:
    """Scenes, what is asked about them turn by turn, and the answers. A caption is a new one, and goes to `taken`."""
    if kind == "pair":
        scenes = [make_scene(rng), make_scene(rng)]
        question, answer = ask_about_pair(*scenes, rng)
        return scenes, [f"Image-1: {IMAGE_TOKEN}\nImage-2: {IMAGE_TOKEN}\n{question}"], [answer]
    kinds = [*rng.sample(SHORT, 2), "caption"] if kind == "talk" else [kind]
    while True:
        scene = make_scene(rng)
        turns = [turn for each in kinds if (turn := ask_about(scene, each, rng))]
        if len(turns) == len(kinds) and (kinds[-1] != "caption" or turns[-1][1] not in taken):
            break
    if kinds[-1] == "caption":
        taken.add(turns[-1][1])
    return [scene], [question for question, _ in turns], [answer for _, answer in turns]


@dataclass
class Run:
    """A run's end."""

    exit_code: int
    summary: Summary | None
    killed_at: list[int]
    """How many rows were on disk at each kill."""
    words: str
    """The last that it printed."""


def run(command: list[str], output: Path, rows: int, kills: int) -> Run:
    """Runs the command, and kills its engine process each time that another (kills + 1)-th part of `rows` is done."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = {name: value for name, value in os.environ.items() if not name.startswith("BATCHVL_")}
    log, killed_at, least = output.with_suffix(".log"), [], 1
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
            if done < max(least, rows * (len(killed_at) + 1) // (kills + 1)):
                continue
            if engine := engine_process(process.pid):
                os.kill(engine, signal.SIGKILL)
                killed_at.append(done)
                time.sleep(1)  # what the dead one answered is on disk then: more rows are those of the next
                least = rows_done(output) + 1
    finally:
        process.terminate()  # only where this program is stopped: the run is left no orphan
        code = process.wait()
    file = output / "summary.json"
    summary = msgspec.json.decode(file.read_bytes(), type=Summary) if file.exists() else None
    return Run(code, summary, killed_at, log.read_text(encoding="utf-8", errors="replace")[-3000:])


def rows_done(output: Path) -> int:
    """How many rows are on disk, while the run is at work."""
    if not output.is_dir():
        return 0
    return sum(len(shard.recover().outcomes().rows()) for shard in open_output(output).shards())


def engine_process(runner: int) -> int | None:
    """The engine's process id: of the runner's descendants the topmost with the command line of an engine."""
    children: dict[int, list[int]] = defaultdict(list)
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = path.read_text().rpartition(")")[2].split()[1]
        except OSError:  # it has just ended
            continue
        children[int(parent)].append(int(path.parent.name))
    level = [runner]
    while level:
        for process in level:
            try:
                if b"batchvl.serving.engine_main" in Path(f"/proc/{process}/cmdline").read_bytes():
                    return process
            except OSError:
                continue
        level = list(chain.from_iterable(children[process] for process in level))
    return None


HEADER = ("backend", "rows", "right", "swapped", "failed", "seconds", "rows/s", "deaths")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--engine", default="lmdeploy", help="lmdeploy, transformers or fake")
    parser.add_argument("--backends", default="turbomind,pytorch", help="of lmdeploy, separated by commas")
    parser.add_argument("--scenes", type=int, default=2000, help="fresh pictures")
    parser.add_argument("--rows-open", type=int, default=64, help="rows that lmdeploy has at once")
    parser.add_argument("--kills", type=int, default=2, help="times that the engine is killed; 0 leaves that run out")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, metavar="DIR", help="new folder that pictures and outputs stay in")
    parser.add_argument("--device", help="as batchvl run has it")
    told = parser.parse_args()
    if told.keep and told.keep.exists():
        parser.error(f"--keep {told.keep}: is there already")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # by way of the `finally`s
    with tempfile.TemporaryDirectory() as temporary:
        if told.keep:
            told.keep.mkdir(parents=True)
        return prove(told, (told.keep or Path(temporary)).resolve())


def prove(told: argparse.Namespace, folder: Path) -> int:
    """Makes the manifest, runs all there is to run, prints; the exit code."""
    started = time.monotonic()
    manifest, rows = make_manifest(folder, told.scenes, told.seed)
    unique, seen = sum(map(Owners(rows).unique, rows)), swaps_seen(rows, Random(told.seed))
    print(f"{len(rows)} rows, their pictures drawn in {time.monotonic() - started:.1f} s.")
    print(f"{unique} rows expect a text that no other row expects. Of {seen.total()} pairs of rows swapped on paper,")
    print(f"{seen['named']} are named as swaps, {seen['wrong']} only wrong, {seen['hidden']} hidden: the same answer.")
    command = [sys.executable, "-m", "batchvl", "run", str(manifest), "--model", "shapes", "--engine", told.engine]
    command += ["--batch-size", str(BATCH), "--commit-seconds", "0.1", "--accept-failures", "100%"]
    command += ["--device", told.device] if told.device else []
    backends = {told.engine: command}
    if told.engine == "lmdeploy":
        command += ["--engine-option", f"max_batch_size={told.rows_open}"]
        backends = {backend: [*command, "--backend", backend] for backend in told.backends.split(",")}
    table, faults, ran = [HEADER], [], []
    for backend, command in backends.items():
        quiet: Check | None = None
        for kills in dict.fromkeys((0, told.kills)):
            name = f"{backend}, killed" if kills else backend
            print(f"\n{name}:", flush=True)
            done = run(command, folder / f"{backend}-{kills}", len(rows), kills)
            summary = done.summary
            if summary is None or summary.results is None or summary.engine is None:
                print(f"  ended with exit code {done.exit_code} and no results; its last words:\n{done.words}")
                faults.append(f"{name}: no results")
                break
            found = check(rows, pq.read_table(summary.results).to_pylist())
            show(found, done)
            if quiet:
                differ = sum(found.answers.get(number) != texts for number, texts in quiet.answers.items())
                print(f"  {differ} rows differ from the undisturbed run")
            quiet, engine = found, summary.engine
            amiss = found.faults() + run_faults(summary, done, len(rows), kills)
            if told.engine == "lmdeploy" and backend not in engine.backend.lower():
                amiss.append(f"ran on {engine.backend!r}")
            faults += [f"{name}: {fault}" for fault in amiss]
            ran.append(f"{name}: {engine.engine} {engine.version} on {engine.backend}, ")
            ran[-1] += f"{engine.rows} rows in it, lists of {engine.batch_size}"
            table.append((
                name, len(rows), f"{found.right / found.rows:.2%}", len(found.swapped), summary.failed,
                f"{summary.seconds:.1f}", f"{summary.rows_per_second:.1f}", summary.engine_deaths,
            ))  # fmt: skip
    width = max(len(line[0]) for line in table)
    print("", *(f"{line[0]:{width}}" + "".join(f"{cell!s:>9}" for cell in line[1:]) for line in table), sep="\n")
    print("\nSeconds and rows/s include the engine's start, and its starts after kills. What ran:", *ran, sep="\n  ")
    print(*(["\nNot as it should be:", *faults] if faults else ["\nAll as it should be."]), sep="\n  ")
    return 1 if faults else 0


def show(found: Check, done: Run) -> None:
    """Prints what a run came to, and the first of whatever is amiss."""
    print(f"  {found.right} of {found.rows} rows right, {found.proven} of them with a text that no other row expects")
    print(f"  failed: {', '.join(f'{rows} {code}' for code, rows in sorted(found.failed.items())) or 'none'}")
    if done.killed_at:
        print(f"  engine killed with {' and '.join(map(str, done.killed_at))} rows on disk")
    for name in ("wrong", "swapped", "missing", "doubled", "misfailed"):
        if lines := getattr(found, name):
            print(f"  {len(lines)} {name}:", *lines[:SHOWN], *["…"] * (len(lines) > SHOWN), sep="\n    ")


def run_faults(summary: Summary, done: Run, rows: int, kills: int) -> list[str]:
    """What is wrong with the run itself, whatever it answered."""
    found = [f"exit code {done.exit_code}: {summary.message}"] if done.exit_code else []
    if summary.rows != rows:
        found.append(f"{summary.rows} rows were written of {rows}")
    if len(done.killed_at) != kills:
        found.append(f"the run ended after {len(done.killed_at)} of {kills} kills: it needs more --scenes")
    if summary.engine_deaths != len(done.killed_at):
        found.append(f"{summary.engine_deaths} deaths counted, {len(done.killed_at)} kills")
    return found


if __name__ == "__main__":
    sys.exit(main())
