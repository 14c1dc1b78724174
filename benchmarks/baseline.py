"""LMDeploy without batchvl, in a process of its own: what its engine can do at best, and what a plain loop makes of it.

benchmarks/gpu.py starts it, with the file of a Job. It says when it is ready and starts upon a line of its input.

ceiling: the engine alone, set up as a run sets it up. Pixels are prepared beforehand, by LMDeploy itself, and rows
    enter behind that, more of them than the engine computes at once. A few pictures stand for all; each goes under
    another fingerprint.
loop: `pipe(list of 32)` over files on disk, as LMDeploy's documentation has it.
"""

from __future__ import annotations

import asyncio
import copy
import gc
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import aclosing
from itertools import islice
from pathlib import Path
from typing import Any

import msgspec

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from batchvl.config.options import RunOptions  # noqa: E402
from batchvl.engines.registry import engine_spec  # noqa: E402
from batchvl.errors import UsageError  # noqa: E402
from benchmarks.scenarios import QUESTIONS, Row  # noqa: E402

LIST = 32
PREPARED = 16
"""Different pictures at the ceiling."""
IN_FLIGHT = 1.25
"""Rows that the ceiling's engine has, to one that it computes at once: as many as a run hands it."""


class Job(msgspec.Struct):
    """What is to be measured. `pictures`: the folder with N.jpg for each picture, at the ceiling for the first ones."""

    system: str
    options: dict[str, Any]
    """Of `batchvl run`, by their flat names; `backend` and `model` are among them."""
    pictures: str
    rows: list[Row]


class Done(msgspec.Struct):
    """What came of it. `begin` and `end` are of time.monotonic(), which all processes of a machine share."""

    begin: float
    end: float
    rows: int
    input_tokens: int
    output_tokens: int
    wrong: int
    """Answers that are not as long as they should be."""


class Count:
    """Of answers."""

    def __init__(self) -> None:
        self.rows = self.input_tokens = self.output_tokens = self.wrong = 0

    def add(self, row: Row, answer: Any) -> None:
        """The row's last output, or its response."""
        self.rows += 1
        self.input_tokens += answer.input_token_len
        self.output_tokens += answer.generate_token_len
        self.wrong += answer.finish_reason != "length" or answer.generate_token_len != row.tokens


def load(options: dict[str, Any]) -> Any:
    """LMDeploy's pipeline, configured as a run's is. It has answered one question, as batchvl's has before its rows."""
    import lmdeploy
    from PIL import Image

    from batchvl.engines.lmdeploy.model import ResolvedModel

    spec = engine_spec(RunOptions.of(engine="lmdeploy", **options))
    backend = spec.flags["backend"]
    try:
        resolved = ResolvedModel(spec)
        resolved.wait(print)
    except UsageError as error:
        sys.exit(str(error))
    pipe = lmdeploy.pipeline(spec.model, backend_config=resolved.config)
    if pipe.async_engine.backend != backend:
        sys.exit(f"LMDeploy runs its engine {pipe.async_engine.backend} although {backend} was asked for")
    [answer] = pipe([messages(Image.new("RGB", (64, 48)), "?")], gen_config=[settings(1)])
    if answer.finish_reason != "length":
        sys.exit(f"a first question about a blank picture failed: {answer.error_message}")
    return pipe


def messages(picture: Any, question: str) -> list[dict[str, Any]]:
    """The picture first, as InternVL was trained."""
    image = {"type": "image_data", "image_data": {"data": picture}}
    return [{"role": "user", "content": [image, {"type": "text", "text": question}]}]


def settings(tokens: int) -> Any:
    from lmdeploy import GenerationConfig

    return GenerationConfig(max_new_tokens=tokens, do_sample=False)


class Loop:
    """`pipe(list of 32)`, one list after another."""

    def __init__(self, pipe: Any, job: Job) -> None:
        self._pipe, self._folder, self._rows = pipe, Path(job.pictures), job.rows

    def answer(self) -> Count:
        from lmdeploy.vl import load_image

        count = Count()
        for rows in batched(self._rows, LIST):
            files = [str(self._folder / f"{row.picture}.jpg") for row in rows]
            asked = [messages(load_image(file), QUESTIONS[row.question]) for file, row in zip(files, rows, strict=True)]
            answers = self._pipe(asked, gen_config=[settings(row.tokens) for row in rows])
            for row, answer in zip(rows, answers, strict=True):
                count.add(row, answer)
        return count


class Ceiling:
    """The engine alone, fed on the loop of LMDeploy's pipeline."""

    def __init__(self, pipe: Any, job: Job) -> None:
        from batchvl.engines.lmdeploy.streaming import disable_streaming

        self._pipe, self._engine, self._rows = pipe, pipe.async_engine, job.rows
        disable_streaming(pipe.session_mgr)
        gc.collect()
        gc.freeze()
        self._loop = pipe.internal_thread.loop
        self._inputs: dict[tuple[int, int], dict[str, Any]] = {}
        asyncio.run_coroutine_threadsafe(self._prepare(Path(job.pictures)), self._loop).result()

    def answer(self) -> Count:
        return asyncio.run_coroutine_threadsafe(self._answer_all(), self._loop).result()

    async def _prepare(self, folder: Path) -> None:
        from lmdeploy.vl import load_image

        for number, question in dict.fromkeys((row.picture % PREPARED, row.question) for row in self._rows):
            picture = load_image(str(folder / f"{number}.jpg"))
            session = self._pipe.session_mgr.get()
            request = await self._engine.preprocess(
                messages(picture, QUESTIONS[question]), session, gen_config=settings(1)
            )
            self._pipe.session_mgr.remove(session)
            self._inputs[number, question] = request.inputs

    async def _answer_all(self) -> Count:
        count, left = Count(), iter(self._rows)
        together = int(self._engine.backend_config.max_batch_size * IN_FLIGHT)
        await asyncio.gather(*(self._answer_each(left, count) for _ in range(together)))
        return count

    async def _answer_each(self, rows: Iterator[Row], count: Count) -> None:
        for row in rows:
            inputs, last = self._inputs[row.picture % PREPARED, row.question], None
            session = self._pipe.session_mgr.get()
            try:
                request = await self._engine.preprocess(
                    None, session, gen_config=settings(row.tokens), input_ids=inputs["input_ids"]
                )
                request.inputs["multimodal"] = [self._under(item, row.picture) for item in inputs["multimodal"]]
                async with aclosing(self._engine.generate(request, stream_response=False)) as outputs:
                    async for output in outputs:
                        last = output
            finally:
                self._pipe.session_mgr.remove(session)
            count.add(row, last)

    def _under(self, item: Any, picture: int) -> Any:
        """A prepared picture as if it were the one with this number: TurboMind tells them by fingerprints of 32 bytes.
        Without one it would read all pixels to make it.
        """
        if self._engine.backend != "turbomind":
            return item
        item = copy.copy(item)
        item["fingerprint"] = picture.to_bytes(32)
        return item


def batched(rows: Iterable[Row], size: int) -> Iterator[list[Row]]:
    left = iter(rows)
    while found := list(islice(left, size)):
        yield found


SYSTEMS: dict[str, Callable[[Any, Job], Ceiling | Loop]] = {"ceiling": Ceiling, "loop": Loop}


def main() -> None:
    # What is told goes where standard output leads; what LMDeploy prints there goes to the log with all else.
    told = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    job = msgspec.json.decode(Path(sys.argv[1]).read_bytes(), type=Job)
    pipe = load(job.options)
    system = SYSTEMS[job.system](pipe, job)
    print("ready", file=told)
    if not sys.stdin.readline():
        return  # whoever started this is gone
    begin = time.monotonic()
    count = system.answer()
    done = Done(begin, time.monotonic(), **vars(count))
    print(msgspec.json.encode(done).decode(), file=told)
    pipe.close()


if __name__ == "__main__":
    main()
