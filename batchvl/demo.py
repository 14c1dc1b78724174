"""The demonstration: questions about drawn pictures, answered by the tiny model that batchvl carries, and checked.

`draw` makes the pictures and the manifests, `demo` runs them. The folder `manifests/` of the project is what `draw`
makes.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from importlib.util import find_spec
from itertools import chain, count, zip_longest
from pathlib import Path
from random import Random
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from .errors import EngineUnavailable, OptionError
from .prompts.tokens import IMAGE_TOKEN
from .runner.job import run
from .shapes.scenes import KINDS, ask_about, ask_about_pair, draw_scene, make_scene

FOLDER = "batchvl-demo"
PICTURES = "pictures"
MANIFEST = "shapes.parquet"
SIZES = ((144, 144), (224, 112), (112, 224), (224, 224))
"""Width and height in pixels: the model cuts these into one, two, two and four tiles."""
EACH, PAIRS, TALKS = 6, 14, 12
"""Rows of each kind of question about one picture, rows of two pictures, and rows of three turns."""
BAD = ("missing_file", "corrupt_image", "forbidden_address")
"""Rows that must fail. Their ids are the codes of their errors."""
SCHEMA = pa.schema([
    ("id", pa.string()), ("prompt", pa.list_(pa.string())), ("images", pa.list_(pa.string())),
    ("truth", pa.list_(pa.string())),
])  # fmt: skip

Row = dict[str, Any]


def demo(folder: Path | None = None) -> int:
    """Draws, runs and checks; prints what came of it. Returns 0 if every answer is right and exactly the bad rows
    failed, each for its own reason, else 1.

    `folder` is made, or is empty. By default it is a new one, `batchvl-demo`, with a number if that is taken.

    Raises EngineUnavailable where torch or transformers is missing, OptionError where `folder` holds something.
    """
    missing = [library for library in ("torch", "transformers") if find_spec(library) is None]
    if missing:
        raise EngineUnavailable(
            f"the demo needs torch and transformers, and this Python has no {' and no '.join(missing)}:\n"
            "  pip install 'batchvl[transformers]'"
        )
    folder = new_folder(folder)
    rows = draw(folder)
    manifest = folder / MANIFEST
    print(f"Drew pictures and wrote {len(rows)} rows that ask about them: {manifest}")
    print("The model 'shapes' looks at them ...\n", flush=True)
    summary = run(manifest, model="shapes", engine="transformers", keep=("truth",), quiet=True)
    if summary.results is None:
        print(f"The run did not come to its end. {summary.message}")
        return 1
    good = report(rows, pq.read_table(summary.results).to_pylist()) and summary.exit_code == 3
    where = f" on {summary.engine.backend}" if summary.engine else ""
    print(f"\nThat took {summary.seconds:.0f} s{where}. Everything is in {summary.results}; the same by hand:")
    print(f"  batchvl run {manifest} --model shapes --keep truth")
    return 0 if good else 1


def draw(folder: Path) -> list[Row]:
    """Draws pictures into `folder`/pictures, and writes shapes.parquet and shapes.jsonl, the same rows. Returns them.

    Always the same, but for what other versions of Pillow and pyarrow make of it.
    """
    (folder / PICTURES).mkdir(parents=True, exist_ok=True)
    rng = Random("batchvl")
    rows = [*_rows(folder, rng), *_bad_rows(folder, rng)]
    rng.shuffle(rows)
    # The two ways to write a prompt: Parquet's columns have one type, a list of turns; a line of JSON is free.
    pq.write_table(pa.Table.from_pylist(rows, SCHEMA), folder / MANIFEST)
    plain = ({**row, "prompt": row["prompt"] if len(row["prompt"]) > 1 else row["prompt"][0]} for row in rows)
    lines = "".join(f"{json.dumps(row)}\n" for row in plain)
    (folder / MANIFEST).with_suffix(".jsonl").write_text(lines, encoding="utf-8")
    return rows


def report(rows: list[Row], results: list[Row]) -> bool:
    """Prints examples, right and wrong answers and failures; whether all of `results`, rows of the output with their
    `truth`, is as it should be.
    """
    _show_examples(rows, results)
    right, failures = _check_answers(results), _check_failures(results)
    return right and failures


def new_folder(folder: Path | None) -> Path:
    """`folder`, which must be empty or not there, else a new name: `batchvl-demo`, `batchvl-demo-2`, and so on."""
    if folder is None:
        names = (f"{FOLDER}-{number}" for number in count(2))
        return next(path for path in map(Path, chain([FOLDER], names)) if not path.exists())
    if folder.is_dir() and any(folder.iterdir()):
        raise OptionError(f"{folder}: is not empty; name a new folder, or none")
    return folder


def _rows(folder: Path, rng: Random) -> Iterator[Row]:
    """The rows that can be answered; `truth` is what was drawn."""
    for kind in KINDS:
        for number in range(1, EACH + 1):
            # Captions show that pictures of any shape are cut right; the model knows the other questions at one size.
            size = SIZES[number % len(SIZES)] if kind == "caption" else SIZES[0]
            asked = None
            while asked is None:
                scene = make_scene(rng)
                asked = ask_about(scene, kind, rng)
            name = f"{kind.replace('_', '-')}-{number:02}"
            picture = _save(draw_scene(scene, *size, rng), folder, f"{name}.png")
            yield {"id": name, "prompt": [asked[0]], "images": [picture], "truth": [asked[1]]}
    for number in range(1, PAIRS + 1):
        name, scenes = f"pair-{number:02}", (make_scene(rng), make_scene(rng))
        pictures = [
            _save(draw_scene(scene, *SIZES[0], rng), folder, f"{name}{letter}.jpg")
            for scene, letter in zip(scenes, "ab", strict=True)
        ]
        question, answer = ask_about_pair(*scenes, rng)
        prompt = f"Image-1: {IMAGE_TOKEN}\nImage-2: {IMAGE_TOKEN}\n{question}"
        yield {"id": name, "prompt": [prompt], "images": pictures, "truth": [answer]}
    for number in range(1, TALKS + 1):
        name, scene = f"talk-{number:02}", make_scene(rng)
        turns = [ask_about(scene, kind, rng) for kind in ("background", "is_there", "caption")]
        questions, answers = zip(*filter(None, turns), strict=True)
        picture = _save(draw_scene(scene, *SIZES[0], rng), folder, f"{name}.png")
        yield {"id": name, "prompt": list(questions), "images": [picture], "truth": list(answers)}


def _bad_rows(folder: Path, rng: Random) -> Iterator[Row]:
    whole = io.BytesIO()
    draw_scene(make_scene(rng), *SIZES[0], rng).save(whole, "JPEG")
    data = whole.getvalue()
    (folder / PICTURES / "corrupt.jpg").write_bytes(data[:100] + bytes(100) + data[200:])
    sources = f"{PICTURES}/missing.png", f"{PICTURES}/corrupt.jpg", "http://127.0.0.1/private.png"
    for code, source in zip(BAD, sources, strict=True):
        yield {"id": code, "prompt": ["describe this image"], "images": [source], "truth": None}


def _save(picture: Image.Image, folder: Path, name: str) -> str:
    """Saves a picture, and returns its path as the manifest names it."""
    picture.save(folder / PICTURES / name, quality=95)
    return f"{PICTURES}/{name}"


def _show_examples(rows: list[Row], results: list[Row]) -> None:
    """A table of pictures, questions and answers: of each kind of row the one with the shortest lines."""
    tables: dict[str, list[tuple[str, str, str]]] = {}
    for result in results:
        if result["status"] != "ok" or result["truth"] is None:
            continue
        row = rows[result["row"]]
        pictures = " ".join(name.removeprefix(f"{PICTURES}/") for name in row["images"])
        questions = [prompt.split("\n")[-1] for prompt in row["prompt"]]
        names = [pictures, *[""] * (len(questions) - 1)]
        table = list(zip(names, questions, _answers(result), strict=False))  # `_check_answers` counts
        kind = row["id"].rpartition("-")[0]
        if kind not in tables or _width(table) < _width(tables[kind]):
            tables[kind] = table
    lines = [line for _, table in sorted(tables.items()) for line in table]
    wide, wider = (max((len(line[column]) for line in lines), default=0) for column in (0, 1))
    for name, question, answer in lines:
        print(f"  {name:{wide}}  {question:{wider}}  {answer}")


def _check_answers(results: list[Row]) -> bool:
    """Counts the right answers, and prints the others."""
    pairs = [
        (result["id"], truth, answer)
        for result in results
        for truth, answer in zip_longest(result["truth"] or (), _answers(result) if result["truth"] else ())
    ]
    wrong = [(name, truth, answer) for name, truth, answer in pairs if answer != truth]
    print(f"\n{len(pairs) - len(wrong)} of {len(pairs)} answers are right.")
    for name, truth, answer in wrong:
        print(f"  {name}: drawn was {truth!r}, the answer is {answer!r}")
    return not wrong


def _check_failures(results: list[Row]) -> bool:
    """Prints the failed rows; whether they are those that must fail, each with its own error."""
    failed = {result["id"]: result["error"] for result in results if result["status"] == "failed"}
    expected = {name: error for name, error in failed.items() if name in BAD and error["code"] == name}
    print(f"{len(expected)} rows failed, and are meant to: a bad row ends with its reason, and stops no other.")
    wide = max(map(len, BAD))
    for name, error in expected.items():
        print(f"  {name:{wide}}  {error['message']}")
    others = [
        f"  {name}: {error['code']}: {error['message']}" for name, error in failed.items() if name not in expected
    ]
    amiss = others + [f"  {name}: did not fail, and should have" for name in BAD if name not in failed]
    if amiss:
        print("These are not as they should be:", *amiss, sep="\n")
    return not amiss


def _answers(result: Row) -> list[str]:
    answers: list[str] = result["responses"] or ([] if result["response"] is None else [result["response"]])
    return [answer.strip() for answer in answers]


def _width(table: list[tuple[str, str, str]]) -> int:
    return max(sum(map(len, line)) for line in table)
