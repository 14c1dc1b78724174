"""LMDeploy without batchvl, in its own process: the best that its engine can do, and what a plain loop achieves.

benchmarks/gpu.py starts this with the file of a Job. It prints "ready" and starts when it reads a line.

ceiling: the engine alone, with the configuration of a run. LMDeploy itself prepares the pixels beforehand, and rows
    enter after the preparation, more of them than the engine computes concurrently. A few images stand for all; each
    row's has another fingerprint.
loop: `pipe(batch of 32)` over files on disk, as in LMDeploy's documentation.
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

BATCH_SIZE = 32
PREPARED = 16
"""Number of different images for the ceiling."""
IN_FLIGHT = 1.25
"""Rows in the ceiling's engine per row that it computes concurrently: as many as a run sends it."""


class Job(msgspec.Struct):
    """The measurement to make."""

    system: str
    options: dict[str, Any]
    """Options of `batchvl run` by their flat names, among them `backend` and `model`."""
    images: str
    """Directory with N.jpg for each image, or for the first PREPARED images for the ceiling."""
    rows: list[Row]


class Done(msgspec.Struct):
    """The result. Times are those of time.monotonic(), which all processes of a machine share."""

    begin: float
    end: float
    rows: int
    input_tokens: int
    output_tokens: int
    wrong: int
    """Answers of the wrong length."""


class AnswerCounts:
    """Totals over the answers so far."""

    def __init__(self) -> None:
        self.rows = self.input_tokens = self.output_tokens = self.wrong = 0

    def add(self, row: Row, answer: Any) -> None:
        """Count a row's last output, or its response."""
        self.rows += 1
        self.input_tokens += answer.input_token_len
        self.output_tokens += answer.generate_token_len
        self.wrong += answer.finish_reason != "length" or answer.generate_token_len != row.tokens


def load(options: dict[str, Any]) -> Any:
    """Return LMDeploy's pipeline, configured like that of a run.

    It has answered one question, as that of a run has before its first row.
    """
    import lmdeploy
    from PIL import Image

    from batchvl.engines.lmdeploy.model import ResolvedModel

    spec = engine_spec(RunOptions.of(engine="lmdeploy", **options))
    backend = spec.flags["backend"]
    try:
        resolved = ResolvedModel(spec)
        resolved.wait_for_memory()
    except UsageError as error:
        sys.exit(str(error))
    pipe = lmdeploy.pipeline(spec.model, backend_config=resolved.config)
    if pipe.async_engine.backend != backend:
        sys.exit(f"LMDeploy runs its engine {pipe.async_engine.backend} instead of {backend}")
    [answer] = pipe([messages(Image.new("RGB", (64, 48)), "?")], gen_config=[generation_config(1)])
    if answer.finish_reason != "length":
        sys.exit(f"the model fails on a blank image: {answer.error_message}")
    return pipe


def messages(image: Any, question: str) -> list[dict[str, Any]]:
    """Return a chat with the image first, as InternVL was trained."""
    part = {"type": "image_data", "image_data": {"data": image}}
    return [{"role": "user", "content": [part, {"type": "text", "text": question}]}]


def generation_config(tokens: int) -> Any:
    from lmdeploy import GenerationConfig

    return GenerationConfig(max_new_tokens=tokens, do_sample=False)


class Loop:
    """`pipe(batch of 32)`, one batch after another."""

    def __init__(self, pipe: Any, job: Job) -> None:
        self._pipe, self._images, self._rows = pipe, Path(job.images), job.rows

    def answer(self) -> AnswerCounts:
        from lmdeploy.vl import load_image

        counts = AnswerCounts()
        for rows in batched(self._rows, BATCH_SIZE):
            images = [load_image(str(self._images / f"{row.image}.jpg")) for row in rows]
            chats = [messages(image, QUESTIONS[row.question]) for image, row in zip(images, rows, strict=True)]
            answers = self._pipe(chats, gen_config=[generation_config(row.tokens) for row in rows])
            for row, answer in zip(rows, answers, strict=True):
                counts.add(row, answer)
        return counts


class Ceiling:
    """The engine alone, fed from the event loop of LMDeploy's pipeline."""

    def __init__(self, pipe: Any, job: Job) -> None:
        from batchvl.engines.lmdeploy.handles import disable_streaming

        self._pipe, self._engine, self._rows = pipe, pipe.async_engine, job.rows
        disable_streaming(pipe.session_mgr)
        gc.collect()
        gc.freeze()
        self._loop = pipe.internal_thread.loop
        self._inputs: dict[tuple[int, int], dict[str, Any]] = {}
        asyncio.run_coroutine_threadsafe(self._prepare(Path(job.images)), self._loop).result()

    def answer(self) -> AnswerCounts:
        return asyncio.run_coroutine_threadsafe(self._answer_all(), self._loop).result()

    async def _prepare(self, directory: Path) -> None:
        from lmdeploy.vl import load_image

        for number, question in dict.fromkeys((row.image % PREPARED, row.question) for row in self._rows):
            image = load_image(str(directory / f"{number}.jpg"))
            session = self._pipe.session_mgr.get()
            request = await self._engine.preprocess(
                messages(image, QUESTIONS[question]), session, gen_config=generation_config(1)
            )
            self._pipe.session_mgr.remove(session)
            self._inputs[number, question] = request.inputs

    async def _answer_all(self) -> AnswerCounts:
        counts, rows = AnswerCounts(), iter(self._rows)
        concurrency = int(self._engine.backend_config.max_batch_size * IN_FLIGHT)
        await asyncio.gather(*(self._answer_rows(rows, counts) for _ in range(concurrency)))
        return counts

    async def _answer_rows(self, rows: Iterator[Row], counts: AnswerCounts) -> None:
        """Answer rows of an iterator that several tasks share."""
        for row in rows:
            inputs, last = self._inputs[row.image % PREPARED, row.question], None
            session = self._pipe.session_mgr.get()
            try:
                request = await self._engine.preprocess(
                    None, session, gen_config=generation_config(row.tokens), input_ids=inputs["input_ids"]
                )
                request.inputs["multimodal"] = [self._as_image(item, row.image) for item in inputs["multimodal"]]
                async with aclosing(self._engine.generate(request, stream_response=False)) as outputs:
                    async for output in outputs:
                        last = output
            finally:
                self._pipe.session_mgr.remove(session)
            counts.add(row, last)

    def _as_image(self, item: Any, number: int) -> Any:
        """Return a prepared image with the fingerprint of another.

        TurboMind identifies images by fingerprints of 32 bytes. Without one it would read all pixels to compute it.
        """
        if self._engine.backend != "turbomind":
            return item
        item = copy.copy(item)
        item["fingerprint"] = number.to_bytes(32)
        return item


def batched(rows: Iterable[Row], size: int) -> Iterator[list[Row]]:
    """Yield consecutive batches of `size` rows; the last may be smaller."""
    iterator = iter(rows)
    while batch := list(islice(iterator, size)):
        yield batch


SYSTEMS: dict[str, Callable[[Any, Job], Ceiling | Loop]] = {"ceiling": Ceiling, "loop": Loop}


def main() -> None:
    # Messages to the parent go to standard output; what LMDeploy prints there is redirected to the log.
    output = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    job = msgspec.json.decode(Path(sys.argv[1]).read_bytes(), type=Job)
    pipe = load(job.options)
    system = SYSTEMS[job.system](pipe, job)
    print("ready", file=output)
    if not sys.stdin.readline():
        return  # the parent has ended
    begin = time.monotonic()
    counts = system.answer()
    done = Done(begin, time.monotonic(), **vars(counts))
    print(msgspec.json.encode(done).decode(), file=output)
    pipe.close()


if __name__ == "__main__":
    main()
