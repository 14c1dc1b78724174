"""The transformers engine. Imports torch and transformers only when it resolves its model."""

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
from ..base import EngineInfo, EngineSpec, Stopwatch

if TYPE_CHECKING:
    from .conversation import Conversation
    from .loading import LoadedModel, ResolvedModel

Emit = Callable[[Response], None]


class TransformersOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Options of this engine, given as `--engine-option KEY=VALUE`."""

    threads: Annotated[int, Meta(ge=1)] | None = None
    """Compute threads for a model on a CPU. [default: the usable CPUs minus one]"""
    attention: Literal["sdpa", "eager", "flash_attention_2", "flash_attention_3"] | None = None
    """Attention implementation. [default: transformers' choice]"""


class TransformersEngine:
    """Answers requests batch by batch, in its own thread; each row's response is sent as soon as it is finished.

    A full batch is computed as it is. The rows of short batches that are waiting when a batch ends are merged into
    one: where rows arrive slowly, each would otherwise be computed alone.

    A request's arrays are those of `ProcessorPreparation`. Input tokens are those of prompt and images, summed over
    the turns; output tokens do not include end tokens. In bfloat16 and float16, rounding lets the logits of a row
    depend on its neighbours in the batch; which token is sampled from given logits does not.
    """

    def __init__(self, spec: EngineSpec, arena: ArenaView) -> None:
        self._spec, self._arena = spec, arena
        try:
            self._options = msgspec.convert(spec.options, TransformersOptions, strict=False)
        except msgspec.ValidationError as error:
            known = ", ".join(TransformersOptions.__struct_fields__)
            raise OptionError(
                f"--engine-option: {error}; the options of the engine 'transformers' are {known}"
            ) from None
        self._resolved: ResolvedModel | None = None
        self._loaded: LoadedModel | None = None
        self._thread = ThreadPoolExecutor(1, "transformers")
        # Requests that no batch has taken yet. Both threads pop from it; the one that pops a request answers it.
        self._pending: dict[int, tuple[Request, Emit]] = {}
        self._running: set[int] = set()
        self._aborted: set[int] = set()
        self._open_batches = 0
        self._idle = Stopwatch()

    @property
    def steps(self) -> int:
        """Number of forward passes so far."""
        return self._loaded.generation.steps if self._loaded else 0

    @property
    def wait_seconds(self) -> float:
        """Seconds without any row: none can be added to a batch that is being computed."""
        return self._idle.seconds

    @property
    def pending(self) -> int:
        """Number of rows that wait for the current batch to end."""
        return len(self._pending)

    async def resolve(self) -> PreparationSpec:
        """Find or download the model, load its processor and try it on a blank image.

        Raises:
            EngineUnavailable: A library or the device is missing.
            OptionError: An option's value is not supported.
            ModelError: The model is not found or not supported.
        """
        return (await self._resolve_model()).preparation_spec

    async def start(self) -> EngineInfo:
        """Load the weights and generate one token about a blank image, so that a model that cannot work fails here."""
        resolved = self._resolved or await self._resolve_model()
        self._loaded = await asyncio.get_running_loop().run_in_executor(
            self._thread, resolved.load, self._options.threads, self._options.attention
        )
        self._idle.running(True)
        return self._loaded.info

    async def infer(self, requests: list[Request]) -> AsyncIterator[Response]:
        """Answer the requests, in order of completion."""
        if self._loaded is None:
            raise RuntimeError("infer() called before start()")
        loop = asyncio.get_running_loop()
        responses: asyncio.Queue[Response | None] = asyncio.Queue()

        def emit(response: Response) -> None:
            loop.call_soon_threadsafe(responses.put_nowait, response)

        self._idle.running(False)
        self._open_batches += 1
        for request in requests:
            self._pending[request.row] = request, emit
        work = loop.run_in_executor(self._thread, self._answer, self._loaded, requests)
        # The loop runs callbacks in order, so this one comes after those of all responses.
        work.add_done_callback(lambda _: responses.put_nowait(None))
        unanswered = {request.row for request in requests}
        try:
            while unanswered:
                response = await responses.get()
                if response is None:
                    break
                unanswered.discard(response.row)
                yield response
            await work
        finally:
            self._open_batches -= 1
            self._idle.running(not self._open_batches)
            for row in unanswered:  # the caller no longer reads responses
                await self.abort(row)

    async def abort(self, row: int) -> None:
        """End a row at its next token; its response is a failure."""
        if pending := self._pending.pop(row, None):
            _, emit = pending
            emit(Response(row, failure=Failure.of(RowTimeout("aborted"))))
        elif row in self._running:
            self._aborted.add(row)

    async def close(self) -> None:
        """Abort all rows and release the model."""
        self._aborted |= self._running
        self._pending.clear()
        await asyncio.to_thread(self._thread.shutdown)
        self._loaded = self._resolved = None

    async def _resolve_model(self) -> ResolvedModel:
        self._resolved = await asyncio.get_running_loop().run_in_executor(self._thread, self._resolve_in_thread)
        return self._resolved

    def _resolve_in_thread(self) -> ResolvedModel:
        try:
            from .loading import ResolvedModel
        except ImportError as error:
            raise EngineUnavailable(
                f"the engine 'transformers' needs a library that is not installed ({error}): "
                "run pip install 'batchvl[transformers]', or choose another engine with --engine"
            ) from error
        return ResolvedModel(self._spec)

    def _answer(self, loaded: LoadedModel, requests: Sequence[Request]) -> None:
        """Answer one batch of pending requests after another until none of `requests` is pending."""
        from .conversation import Conversation, read_arrays

        while any(request.row in self._pending for request in requests):
            batch = self._next_batch(loaded.info.batch_size)
            emits = {request.row: emit for request, emit in batch}

            def finish(row: Conversation, emits: dict[int, Emit] = emits) -> None:
                self._running.discard(row.request.row)
                self._aborted.discard(row.request.row)
                emits[row.request.row](row.response())

            rows = [Conversation(request, read_arrays(request, self._arena), loaded.decoder) for request, _ in batch]
            loaded.generation.answer(rows, finish, self._aborted)

    def _next_batch(self, size: int) -> list[tuple[Request, Emit]]:
        batch = []
        for row in list(self._pending)[:size]:
            self._running.add(row)  # before it leaves `_pending`: an abort must find it in one of them
            if pending := self._pending.pop(row, None):
                batch.append(pending)
            else:
                self._running.discard(row)
        return batch
