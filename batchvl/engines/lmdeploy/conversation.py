"""One row on its way through LMDeploy: its turns, the answer being given, its end."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

from ...errors import ContextLengthExceeded, RowError, RowTimeout
from ...ipc.arena import ArenaView
from ...types import ContentPart, Failure, Message, Request, Response
from . import raw_images as pictures
from .failures import ended, failure
from .inputs import PICTURES, is_packed, unpack
from .precomputed import CompleteInputs, ImagesOnly
from .sampling import Stops, settings

if TYPE_CHECKING:
    from .model import LoadedModel
    from .prefix import Prefix

PATIENCE = 2.0
"""Seconds that an aborted row has to end in order. LMDeploy's own abort does nothing for one that is not begun yet."""


class ConversationTask:
    """A request's state; all of it lives on the loop of LMDeploy's pipeline.

    The pictures stay where they lie until the row is over, and every turn takes them from there.
    """

    def __init__(self, request: Request, model: LoadedModel, arena: ArenaView) -> None:
        self._request, self._model, self._arena = request, model, arena
        self._asked = list(request.messages)
        self._texts: list[str] = []
        self._input_tokens = self._output_tokens = 0
        self._cut = self._aborted = False
        self._session: Any = None
        self._prepared = unpack(request, arena) if is_packed(request) else None
        self._room = 0
        self._task: asyncio.Task[Response] | None = None
        self.prefix: Prefix | None = None
        """What is computed ahead of this row and others, of the same pictures."""

    @property
    def inputs(self) -> dict[str, Any] | None:
        """LMDeploy's, if they are prepared whole."""
        return None if self._prepared is None or PICTURES in self._prepared else self._prepared

    @property
    def pictures_at(self) -> tuple[int, int] | None:
        """Where in the arena they lie, prepared, and their salt: the same for rows that share them."""
        request = self._request
        return (request.extent.start, request.cache_salt) if request.extent is not None else None

    async def answer(self) -> Response:
        """All turns. Raises EngineLost where LMDeploy's engine is gone."""
        self._task = asyncio.current_task()
        try:
            await self._turn()
            for message in self._request.followups:
                self._asked += (
                    Message("assistant", (ContentPart(text=self._model.words.escaped(self._texts[-1])),)),
                    message,
                )
                await self._turn()
        except RowError as error:
            return self._response(error)
        except asyncio.CancelledError:
            if not self._aborted:
                raise
            return self._response(RowTimeout("aborted"))
        finally:
            if self.prefix is not None:
                await self.prefix.over()
        return self._response()

    async def abort(self) -> None:
        """Ends the row, wherever it is, and returns once it has ended."""
        self._aborted = True
        while self._task is None or not self._task.done():
            if self._session is not None:
                await self._session.async_abort()
            if self.prefix is not None:
                await self.prefix.abort()
            if self._task is not None and not (await asyncio.wait([self._task], timeout=PATIENCE))[0]:
                self._task.cancel()
            await asyncio.sleep(0)

    async def _turn(self) -> None:
        if self._aborted:
            raise RowTimeout("aborted")
        model = self._model
        self._room = await model.room.take_pictures(0 if self._prepared else self._pictures())
        self._session = model.sessions.get()
        try:
            answer = await self._ask()
        finally:
            model.sessions.remove(self._session)
            self._session = None
            model.room.release(self._room)
        self._texts.append(answer.end())
        self._cut |= answer.cut

    async def _ask(self) -> Answer:
        from lmdeploy.serve.core import RequestError

        model, stop = self._model, self._request.sampling.stop
        stops = Stops(text for text in stop if text not in model.words.special)
        answer = Answer(stops, model.engine.tokenizer)
        try:
            prepared = await self._preprocessed()
            async with aclosing(model.engine.generate(prepared, stream_response=bool(stops))) as outputs:
                async for out in outputs:
                    model.steps += 1
                    if answer.add(out):
                        await self._session.async_abort()
        except RequestError as error:
            found = failure(error.code.value, error.message, error.__cause__)
            if isinstance(found, ContextLengthExceeded):
                said = f"{error.message} --session-len sets that, as far as the model and the GPU's memory go"
                found = ContextLengthExceeded(said)
            raise found from error
        finally:
            self._output_tokens += answer.tokens
        if self._aborted:
            raise RowTimeout("aborted")
        return answer

    async def _preprocessed(self) -> Any:
        """LMDeploy's request: prompt, tiles and settings. Raises its RequestError."""
        from lmdeploy import GenerationConfig

        model = self._model
        wanted = GenerationConfig(**settings(self._request.sampling, model.stop_ids, model.words))
        if self._prepared is None:
            async with model.preparing:
                found = await model.engine.preprocess(await self._messages(), self._session, gen_config=wanted)
            self._room = model.room.settle(self._room, found)
        else:
            found = await model.engine.preprocess(self._ready(self._prepared), self._session, gen_config=wanted)
        self._input_tokens += found.input_token_len
        left = model.engine.session_len - found.input_token_len
        found.gen_config.max_new_tokens = min(found.gen_config.max_new_tokens, left)
        return found

    def _ready(self, prepared: dict[str, Any]) -> CompleteInputs | ImagesOnly:
        """What image workers have prepared of this turn."""
        if PICTURES not in prepared:
            return CompleteInputs(prepared)
        return ImagesOnly(self._model.chat.messages(self._asked), prepared[PICTURES][: self._pictures()])

    def _pictures(self) -> int:
        """How many have been shown up to this turn."""
        return sum(part.image is not None for message in self._asked for part in message.parts)

    async def _messages(self) -> list[dict[str, Any]]:
        """LMDeploy's messages. Copying a large picture takes long enough to be no work for the loop."""
        copying = asyncio.ensure_future(asyncio.to_thread(self._model.chat.messages, self._asked, self._picture))
        cancelled = False
        while not copying.done():  # an aborted row's pictures are not read once its end is told
            try:
                await asyncio.wait([copying])
            except asyncio.CancelledError:
                cancelled = True
        if cancelled:
            raise asyncio.CancelledError
        return copying.result()

    def _picture(self, number: int) -> Any:
        return pictures.read(self._request, number, self._arena)

    def _response(self, error: RowError | None = None) -> Response:
        return Response(
            self._request.row,
            tuple(self._texts),
            None if error else "length" if self._cut else "stop",
            self._input_tokens,
            self._output_tokens,
            Failure.of(error) if error else None,
        )


_CUT_CHARACTER = "\N{REPLACEMENT CHARACTER}"


class Answer:
    """What LMDeploy has said so far. `stops` end it; `tokenizer` is LMDeploy's."""

    def __init__(self, stops: Stops, tokenizer: Any) -> None:
        self._stops, self._tokenizer = stops, tokenizer
        self._text = ""
        self._ids: list[int] = []
        self._reason: str | None = None
        self._withheld = self._stopped = False
        self.tokens = 0
        """Of the answer, without the one that ends it."""

    def add(self, out: Any) -> bool:
        """The next output, a GenOut; True at the one in which a stop text ends the answer, after which none counts."""
        if self._stopped:
            return False
        self.tokens, self._reason = out.generate_token_len, out.finish_reason or self._reason
        self._text += out.response
        if out.token_ids:
            self._ids += out.token_ids
            self._withheld = not out.response
        return self._stop()

    def end(self) -> str:
        """The whole text. Raises EngineFailed where it was not given in full."""
        if self._withheld and not self._stopped:
            # LMDeploy gives no text of an output whose last character is cut in two, and all of TurboMind's answer is
            # one output.
            whole = self._tokenizer.decode(self._ids, skip_special_tokens=True).rstrip(_CUT_CHARACTER)
            self._text = max(self._text, whole, key=len)
            self._stop()
        if not self._stopped and self._reason not in ("stop", "length"):
            raise ended(self._reason)
        return self._text

    @property
    def cut(self) -> bool:
        """Whether it ended because it may not be longer."""
        return not self._stopped and self._reason == "length"

    def _stop(self) -> bool:
        if self._stops and (text := self._stops.cut(self._text)) is not None:
            self._text, self._stopped = text, True
        return self._stopped
