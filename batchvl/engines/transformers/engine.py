"""The transformers engine: its side of the contract. Imports torch and transformers only once it is started."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Annotated, Literal

import msgspec
from msgspec import Meta

from ...errors import EngineUnavailable, OptionError, RowTimeout
from ...images.preparation import PreparationSpec
from ...ipc.arena import ArenaView
from ...types import Failure, Request, Response
from ..base import EngineInfo, EngineSpec, Stopwatch, ignore

if TYPE_CHECKING:
    from .conversation import Conversation
    from .loading import LoadedModel, ResolvedModel

Emit = Callable[[Response], None]


class TransformersOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The engine's own options, as `--engine-option KEY=VALUE`."""

    threads: Annotated[int, Meta(ge=1)] | None = None
    """Threads that a model on a CPU computes with. [default: the usable CPUs less one]"""
    attention: Literal["sdpa", "eager", "flash_attention_2", "flash_attention_3"] | None = None
    """How attention is computed. [default: transformers' choice]"""


class TransformersEngine:
    """Answers requests batch by batch, in a thread of its own; rows leave as each is done.

    A full list is a batch. Rows of short lists that lie ready when a batch ends make one together: where rows come
    slowly, each would else be a batch of its own.

    A request's arrays are `ProcessorPreparation`'s. Counts of tokens are of prompt and pictures, summed over the
    turns, and of the answers without their end token. An answer's bits may depend on its neighbours in the batch in
    bfloat16 and float16, where rounding shows; which token is drawn for given logits does not.
    """

    def __init__(self, spec: EngineSpec, arena: ArenaView, say: Callable[[str], None] = ignore) -> None:
        self._spec, self._arena, self._say = spec, arena, say
        try:
            self._options = msgspec.convert(spec.options, TransformersOptions, strict=False)
        except msgspec.ValidationError as error:
            known = ", ".join(TransformersOptions.__struct_fields__)
            raise OptionError(f"--engine-option of the engine 'transformers': {error} (it knows {known})") from None
        self._resolved: ResolvedModel | None = None
        self._loaded: LoadedModel | None = None
        self._thread = ThreadPoolExecutor(1, "transformers")
        self._waiting: dict[int, tuple[Request, Emit]] = {}  # handed in and not begun; who pops one answers for it
        self._running: set[int] = set()
        self._aborted: set[int] = set()
        self._lists = 0
        self._idle = Stopwatch()

    @property
    def steps(self) -> int:
        """Grows with every token of a batch."""
        return self._loaded.generation.steps if self._loaded else 0

    @property
    def wait_seconds(self) -> float:
        """It waits while it has no row: to a batch that is being computed none can be added."""
        return self._idle.seconds

    async def resolve(self) -> PreparationSpec:
        """Finds or downloads the model, loads its processor and tries it on a picture.

        Raises EngineUnavailable where a library or the device is missing, OptionError for a device, type or number of
        tiles that cannot be, ModelError for a model that is not found or not served.
        """
        self._resolved = await asyncio.get_running_loop().run_in_executor(self._thread, self._resolve)
        return self._resolved.preparation_spec

    async def start(self) -> EngineInfo:
        """Loads the weights and asks for one token about a blank picture, so that what cannot work fails here."""
        resolved = self._resolved
        if resolved is None:
            resolved = self._resolved = await asyncio.get_running_loop().run_in_executor(self._thread, self._resolve)
        loading = asyncio.get_running_loop().run_in_executor(
            self._thread, resolved.load, self._say, self._options.threads, self._options.attention
        )
        self._loaded = await loading
        self._idle.set(True)
        return self._loaded.info

    async def infer(self, requests: list[Request]) -> AsyncIterator[Response]:
        loop = asyncio.get_running_loop()
        answers: asyncio.Queue[Response | None] = asyncio.Queue()

        def emit(response: Response) -> None:
            loop.call_soon_threadsafe(answers.put_nowait, response)

        self._idle.set(False)
        self._lists += 1
        for request in requests:
            self._waiting[request.row] = request, emit
        work = loop.run_in_executor(self._thread, self._answer, requests)
        work.add_done_callback(lambda _: answers.put_nowait(None))  # comes after every answer: the loop keeps order
        left = {request.row for request in requests}
        try:
            while left:
                response = await answers.get()
                if response is None:
                    break
                left.discard(response.row)
                yield response
            await work
        finally:
            self._lists -= 1
            self._idle.set(not self._lists)
            for row in left:  # nobody listens any more
                await self.abort(row)

    async def abort(self, row: int) -> None:
        if waiting := self._waiting.pop(row, None):
            _, emit = waiting
            emit(Response(row, failure=Failure.of(RowTimeout("aborted"))))
        elif row in self._running:
            self._aborted.add(row)

    async def close(self) -> None:
        self._aborted |= self._running
        self._waiting.clear()
        await asyncio.to_thread(self._thread.shutdown)
        self._loaded = self._resolved = None

    def _resolve(self) -> ResolvedModel:
        try:
            from .loading import ResolvedModel
        except ImportError as error:
            raise EngineUnavailable(
                f"the engine 'transformers' needs a library that is missing here ({error}): "
                "pip install 'batchvl[transformers]', or take another engine with --engine"
            ) from error
        return ResolvedModel(self._spec)

    def _answer(self, requests: Sequence[Request]) -> None:
        """Batch after batch of what lies ready, until these requests are among what was answered."""
        from .conversation import Conversation, read_arrays

        assert self._loaded is not None, "infer before start"
        loaded = self._loaded
        while any(request.row in self._waiting for request in requests):
            batch = self._next_batch(loaded.info.batch_size)
            emits = {request.row: emit for request, emit in batch}

            def done(row: Conversation, emits: dict[int, Emit] = emits) -> None:
                self._running.discard(row.request.row)
                self._aborted.discard(row.request.row)
                emits[row.request.row](row.response())

            rows = [Conversation(request, read_arrays(request, self._arena), loaded.words) for request, _ in batch]
            loaded.generation.answer(rows, done, self._aborted)

    def _next_batch(self, size: int) -> list[tuple[Request, Emit]]:
        batch = []
        for row in list(self._waiting)[:size]:
            self._running.add(row)  # before it leaves `_waiting`: an abort must find it in one of them
            if waiting := self._waiting.pop(row, None):
                batch.append(waiting)
            else:
                self._running.discard(row)
        return batch
