"""One row on its way through LMDeploy: its turns, the growing answer, and how it ends or fails."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

from ...errors import (
    ContextLengthExceeded,
    EngineError,
    EngineLost,
    InferError,
    PrepareFailed,
    RequestRefused,
    RowError,
    RowTimeout,
    Unsupported,
)
from ...ipc.arena import ArenaView
from ...types import ContentPart, Failure, Message, Request, Response
from ..checkpoint import first_line
from .inputs import IMAGES, is_packed, unpack
from .precomputed import CompleteInputs, ImagesOnly
from .preparation import read_image
from .sampling import StopTexts, generation_config_fields

if TYPE_CHECKING:
    from .model import LoadedModel
    from .prefix import SharedPrefix

ABORT_SECONDS = 2.0
"""How long an aborted row may take to end before its task is cancelled: LMDeploy's own abort has no effect on a request
that has not begun."""

_REPLACEMENT_CHARACTER = "\N{REPLACEMENT CHARACTER}"


class ConversationTask:
    """The state of one request. Everything in it runs on the event loop of LMDeploy's pipeline.

    The images stay in the arena until the row ends; every turn reads them from there.
    """

    def __init__(self, request: Request, model: LoadedModel, arena: ArenaView) -> None:
        self._request, self._model, self._arena = request, model, arena
        self._messages = list(request.messages)
        self._texts: list[str] = []
        self._input_tokens = self._output_tokens = 0
        self._truncated = self._aborted = False
        self._session: Any = None
        self._prepared = unpack(request, arena) if is_packed(request) else None
        self._tile_bytes = 0
        self._task: asyncio.Task[Response] | None = None
        self.prefix: SharedPrefix | None = None
        """The computation of what this row has in common with others, which reads the same images."""

    @property
    def complete_inputs(self) -> dict[str, Any] | None:
        """LMDeploy's inputs, if an image worker has prepared all of them."""
        return None if self._prepared is None or IMAGES in self._prepared else self._prepared

    @property
    def images_key(self) -> tuple[int, int] | None:
        """Where in the arena the prepared images are, and their salt: equal for rows that share them."""
        request = self._request
        return (request.extent.start, request.cache_salt) if request.extent is not None else None

    async def answer(self) -> Response:
        """Ask all turns. Raises EngineLost if LMDeploy's engine is gone."""
        self._task = asyncio.current_task()
        try:
            await self._ask_turn()
            for message in self._request.followups:
                answer = ContentPart(text=self._model.tokenizer_info.escape(self._texts[-1]))
                self._messages += (Message("assistant", (answer,)), message)
                await self._ask_turn()
        except RowError as error:
            return self._response(error)
        except asyncio.CancelledError:
            if not self._aborted:
                raise
            return self._response(RowTimeout("aborted"))
        finally:
            if self.prefix is not None:
                await self.prefix.wait()
        return self._response()

    async def abort(self) -> None:
        """End the row, whatever it is doing, and return once it has ended."""
        self._aborted = True
        while self._task is None or not self._task.done():
            if self._session is not None:
                await self._session.async_abort()
            if self.prefix is not None:
                await self.prefix.abort()
            if self._task is not None and not (await asyncio.wait([self._task], timeout=ABORT_SECONDS))[0]:
                self._task.cancel()
            await asyncio.sleep(0)

    async def _ask_turn(self) -> None:
        if self._aborted:
            raise RowTimeout("aborted")
        model = self._model
        self._tile_bytes = await model.tile_budget.acquire(0 if self._prepared else self._image_count())
        self._session = model.sessions.get()
        try:
            answer = await self._generate()
        finally:
            model.sessions.remove(self._session)
            self._session = None
            model.tile_budget.release(self._tile_bytes)
        self._texts.append(answer.finish())
        self._truncated |= answer.truncated

    async def _generate(self) -> Answer:
        from lmdeploy.serve.core import RequestError

        model, special = self._model, self._model.tokenizer_info.special
        stops = StopTexts(text for text in self._request.sampling.stop if text not in special)
        answer = Answer(stops, model.engine.tokenizer)
        try:
            prompt = await self._preprocess()
            async with aclosing(model.engine.generate(prompt, stream_response=bool(stops))) as outputs:
                async for output in outputs:
                    model.steps += 1
                    if answer.add(output):
                        await self._session.async_abort()
        except RequestError as error:
            raise row_error(error.code.value, error.message, error.__cause__) from error
        finally:
            self._output_tokens += answer.tokens
        if self._aborted:
            raise RowTimeout("aborted")
        return answer

    async def _preprocess(self) -> Any:
        """Return LMDeploy's PreprocessedRequest: prompt, tiles and settings. Raises its RequestError."""
        from lmdeploy import GenerationConfig

        model = self._model
        fields = generation_config_fields(self._request.sampling, model.stop_ids, model.tokenizer_info)
        config = GenerationConfig(**fields)
        if self._prepared is None:
            async with model.preparation_slots:
                model.preparing += 1
                try:
                    messages = await self._copy_messages()
                    prompt = await model.engine.preprocess(messages, self._session, gen_config=config)
                finally:
                    model.preparing -= 1
            self._tile_bytes = model.tile_budget.settle(self._tile_bytes, prompt)
        else:
            inputs = self._precomputed(self._prepared)
            prompt = await model.engine.preprocess(inputs, self._session, gen_config=config)
        self._input_tokens += prompt.input_token_len
        available = model.engine.session_len - prompt.input_token_len
        prompt.gen_config.max_new_tokens = min(prompt.gen_config.max_new_tokens, available)
        return prompt

    def _precomputed(self, prepared: dict[str, Any]) -> CompleteInputs | ImagesOnly:
        """Return what image workers have prepared of this turn."""
        if IMAGES not in prepared:
            return CompleteInputs(prepared)
        return ImagesOnly(self._model.chat.messages(self._messages), prepared[IMAGES][: self._image_count()])

    def _image_count(self) -> int:
        """Return the number of images up to this turn."""
        return sum(part.image is not None for message in self._messages for part in message.parts)

    async def _copy_messages(self) -> list[dict[str, Any]]:
        """Return LMDeploy's messages with the images copied out of the arena, in a thread: large ones take long."""
        copying = asyncio.ensure_future(asyncio.to_thread(self._model.chat.messages, self._messages, self._read_image))
        cancelled = False
        while not copying.done():  # the row may not end, even if it is aborted, while its images are read
            try:
                await asyncio.wait([copying])
            except asyncio.CancelledError:
                cancelled = True
        if cancelled:
            raise asyncio.CancelledError
        return copying.result()

    def _read_image(self, number: int) -> Any:
        return read_image(self._request, number, self._arena)

    def _response(self, error: RowError | None = None) -> Response:
        return Response(
            self._request.row,
            tuple(self._texts),
            None if error else "length" if self._truncated else "stop",
            self._input_tokens,
            self._output_tokens,
            Failure.of(error) if error else None,
        )


class Answer:
    """The answer of one turn as it grows.

    Args:
        stops: Texts that end it.
        tokenizer: LMDeploy's tokenizer.
    """

    def __init__(self, stops: StopTexts, tokenizer: Any) -> None:
        self._stops, self._tokenizer = stops, tokenizer
        self._text = ""
        self._ids: list[int] = []
        self._finish_reason: str | None = None
        self._text_withheld = self._stopped = False
        self.tokens = 0
        """Tokens so far, without the one that ends the answer."""

    def add(self, output: Any) -> bool:
        """Add LMDeploy's next output, a GenOut. Returns True once a stop text ends the answer; later outputs are
        ignored.
        """
        if self._stopped:
            return False
        self.tokens, self._finish_reason = output.generate_token_len, output.finish_reason or self._finish_reason
        self._text += output.response
        if output.token_ids:
            self._ids += output.token_ids
            self._text_withheld = not output.response
        return self._cut()

    def finish(self) -> str:
        """Return the whole text. Raises EngineError if LMDeploy ended the answer early."""
        if self._text_withheld and not self._stopped:
            # LMDeploy gives no text for an output that ends within a character, and TurboMind's answer is one output.
            text = self._tokenizer.decode(self._ids, skip_special_tokens=True).rstrip(_REPLACEMENT_CHARACTER)
            self._text = max(self._text, text, key=len)
            self._cut()
        if not self._stopped and self._finish_reason not in ("stop", "length"):
            raise ended_early(self._finish_reason)
        return self._text

    @property
    def truncated(self) -> bool:
        """Whether the answer reached its maximum length."""
        return not self._stopped and self._finish_reason == "length"

    def _cut(self) -> bool:
        if self._stops and (text := self._stops.cut(self._text)) is not None:
            self._text, self._stopped = text, True
        return self._stopped


ROW_ERRORS: dict[str, type[RowError]] = {
    "invalid_request": RequestRefused,
    "context_length_exceeded": ContextLengthExceeded,
    "unsupported_feature": Unsupported,
    "preprocess_failed": PrepareFailed,
    "request_conflict": EngineError,
    "request_cancelled": EngineError,
    "internal_error": EngineError,
    "unauthorized": EngineError,  # only LMDeploy's server uses this code and the next
    "model_not_found": EngineError,
}
"""The row's error for each `ErrorCode` of lmdeploy.serve.core, except `engine_unavailable`, which is not a row's."""


def row_error(code: str, message: str, cause: BaseException | None) -> RowError:
    """Return the row's error that stands for an error of LMDeploy.

    Args:
        code: Value of its `ErrorCode`.
        message: Its message.
        cause: The exception behind it, which LMDeploy writes only to its log.

    Raises:
        EngineLost: LMDeploy's engine is gone.
    """
    reason = message if cause is None else f"{message} ({type(cause).__name__}: {first_line(cause)})"
    if code == "engine_unavailable":
        raise EngineLost(f"LMDeploy's engine is gone: {reason}")
    kind = ROW_ERRORS.get(code, EngineError)
    if kind is ContextLengthExceeded:
        reason += " --session-len raises the limit, as far as the model and the GPU's memory allow"
    return kind(f"LMDeploy, {code}: {reason}")


def ended_early(reason: str | None) -> InferError:
    """Return the error of an incomplete answer. `reason` is "abort", "error" or None."""
    return EngineError(f"LMDeploy ended the answer early ({reason or 'without a reason'})")
