"""The lmdeploy engine: its side of the contract. Imports torch and LMDeploy only once it is started."""

from __future__ import annotations

import asyncio
import faulthandler
import os
import re
import traceback
from collections.abc import AsyncIterator, Callable, Coroutine
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from ...errors import EngineLost, EngineUnavailable, OptionError
from ...images.preparation import PreparationSpec
from ...ipc.arena import ArenaView
from ...types import Request, Response
from ..base import EngineInfo, EngineSpec
from .idle import IdleMeter
from .sampling import MAX_TEMPERATURE

if TYPE_CHECKING:
    from .conversation import ConversationTask
    from .model import LoadedModel, ResolvedModel

PROBE_SECONDS = 1.0


class LmdeployEngine:
    """Hands rows to LMDeploy's pipeline, on the pipeline's own event loop; this process's other loop only talks.

    So a loop of LMDeploy's that stands still does not keep this one from hearing, and the runner sees that `steps`
    stand still. Counts of tokens are of prompt and pictures, summed over the turns, and of the answers.
    """

    def __init__(self, spec: EngineSpec, arena: ArenaView) -> None:
        self._spec, self._arena = spec, arena
        if spec.dtype == "float32":
            raise OptionError("--dtype float32: LMDeploy computes in float16 or bfloat16")
        if spec.sampling.temperature > MAX_TEMPERATURE:
            raise OptionError(
                f"--temperature {spec.sampling.temperature:g}: LMDeploy takes {MAX_TEMPERATURE:g} at most"
            )
        _narrow(spec.device, spec.flags["tp"])
        self._resolved: ResolvedModel | None = None
        self._model: LoadedModel | None = None
        self._thread = ThreadPoolExecutor(1, "lmdeploy")
        self._rows: dict[int, ConversationTask] = {}  # for the pipeline's loop
        self._tasks: set[asyncio.Task[None]] = set()  # likewise
        self._open: set[asyncio.Queue[Response | BaseException]] = set()
        self._watching: asyncio.Task[None] | None = None
        self._waits: IdleMeter | None = None
        self._looking: Future[None] | None = None
        self._ticks = 0

    @property
    def steps(self) -> int:
        """Grows with every output of LMDeploy and every round of its scheduler."""
        return self._ticks + (self._model.steps if self._model else 0)

    @property
    def wait_seconds(self) -> float:
        """Seconds in which LMDeploy had half of its handles free, and no row waited for memory."""
        return self._waits.seconds if self._waits else 0.0

    async def resolve(self) -> PreparationSpec:
        """Finds or downloads the model and reads its configuration, template and tokenizer.

        Raises EngineUnavailable where a library or the GPU is missing, OptionError for settings that cannot be,
        ModelError for a model that is not found or not served.
        """
        self._resolved = await asyncio.get_running_loop().run_in_executor(self._thread, self._resolve)
        return self._resolved.preparation_spec

    async def start(self) -> EngineInfo:
        """Loads the weights and asks a first question."""
        loop = asyncio.get_running_loop()
        if self._resolved is None:
            await self.resolve()
        assert self._resolved is not None
        await loop.run_in_executor(self._thread, self._resolved.wait)
        if self._resolved.wants_main_thread:
            self._model = self._resolved.load()
        else:
            self._model = await loop.run_in_executor(self._thread, self._resolved.load)
        self._watching = loop.create_task(self._watch(self._model))
        self._waits = IdleMeter(self._model)
        self._looking = asyncio.run_coroutine_threadsafe(self._waits.look(), self._model.loop)
        return self._model.info

    async def infer(self, requests: list[Request]) -> AsyncIterator[Response]:
        assert self._model is not None, "infer before start"
        loop = asyncio.get_running_loop()
        answers: asyncio.Queue[Response | BaseException] = asyncio.Queue()

        def emit(answer: Response | BaseException) -> None:
            loop.call_soon_threadsafe(answers.put_nowait, answer)

        self._open.add(answers)
        left = {request.row for request in requests}
        self._model.loop.call_soon_threadsafe(self._begin, requests, emit)
        try:
            while left:
                answer = await answers.get()
                if isinstance(answer, BaseException):
                    raise answer
                left.discard(answer.row)
                yield answer
        finally:
            self._open.discard(answers)
            for row in left:  # nobody listens any more
                await self.abort(row)

    async def abort(self, row: int) -> None:
        if self._model is not None:
            self._model.loop.call_soon_threadsafe(self._abort, row)

    async def close(self) -> None:
        if self._watching is not None:
            self._watching.cancel()
            await asyncio.wait([self._watching])  # what it asks is asked on a loop that is about to be closed
        if self._looking is not None:
            self._looking.cancel()
        if self._model is not None:
            await asyncio.get_running_loop().run_in_executor(self._thread, self._model.pipe.close)
        self._thread.shutdown(wait=False)
        self._model = self._resolved = None

    def _resolve(self) -> ResolvedModel:
        # LMDeploy's check of its surroundings takes a process with torch and GPU memory of its own, and keeps to itself
        # what it finds; what cannot work fails in loading as well, with a reason.
        os.environ.setdefault("LMDEPLOY_ENABLE_CHECK_ENV", "0")
        try:
            from .model import ResolvedModel
        except ImportError as error:
            raise EngineUnavailable(
                f"the engine lmdeploy needs a library that is missing here ({error}): "
                "pip install 'batchvl[lmdeploy]', or take another engine with --engine"
            ) from error
        return ResolvedModel(self._spec)

    def _begin(self, requests: list[Request], emit: Callable[[Response | BaseException], None]) -> None:
        """On the pipeline's loop: each row of a list on its way."""
        from .conversation import ConversationTask
        from .prefix import compute_ahead

        assert self._model is not None
        try:
            rows = {request.row: ConversationTask(request, self._model, self._arena) for request in requests}
            if self._model.keeps_prefixes:
                compute_ahead(rows.values(), self._model)
        except Exception as error:  # else nobody would ever hear of these rows
            emit(error)
            return
        self._rows |= rows
        for number, row in rows.items():
            self._keep(self._answer(number, row, emit))

    async def _answer(
        self, number: int, row: ConversationTask, emit: Callable[[Response | BaseException], None]
    ) -> None:
        try:
            emit(await row.answer())
        except BaseException as error:  # of the engine, not of the row: that is a response
            emit(error if isinstance(error, Exception) else EngineLost(f"LMDeploy's loop ended: {error!r}"))
        finally:
            del self._rows[number]

    def _abort(self, row: int) -> None:
        """On the pipeline's loop: the row that has this number now, and none that is handed in later."""
        if (conversation := self._rows.get(row)) is not None:
            self._keep(conversation.abort())

    def _keep(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _watch(self, model: LoadedModel) -> None:
        """Looks every second whether LMDeploy's engine lives and gets on, and ends all open lists if not."""
        told = None
        while True:
            await asyncio.sleep(PROBE_SECONDS)
            try:
                async with asyncio.timeout(self._spec.hang_timeout):
                    tick, health = await self._probe(model)
            except TimeoutError:
                continue  # its loop stands still: then so do the steps, and the runner sees that
            except Exception:
                traceback.print_exc()
                continue
            self._ticks += tick != told
            told = tick
            if health["status"] == "unhealthy":
                faulthandler.dump_traceback(all_threads=True)
                lost = EngineLost(f"LMDeploy's engine is not well: {health['message']}")
                for answers in self._open:
                    answers.put_nowait(lost)

    async def _probe(self, model: LoadedModel) -> tuple[int, dict[str, Any]]:
        async def ask() -> tuple[int, dict[str, Any]]:
            metrics = await model.engine.get_schedule_metrics()
            return metrics.scheduler_tick, await model.engine.health_probe(self._spec.hang_timeout)

        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(ask(), model.loop))


def _narrow(device: str, tp: int) -> None:
    """Leaves this process the GPU that `--device` names, before CUDA is asked for any. Raises OptionError."""
    number = re.fullmatch(r"cuda(?::(\d+))?", device)
    if device != "auto" and not number:
        raise OptionError(f"--device {device}: want auto, cuda or cuda:N for the engine lmdeploy")
    if number is None or number[1] is None:
        return
    if tp > 1:
        raise OptionError(
            f"--device {device}: names one GPU, and --tp {tp} wants more; CUDA_VISIBLE_DEVICES names several"
        )
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = None if visible is None else [name for name in visible.split(",") if name.strip()]
    index = int(number[1])
    if names is not None and index >= len(names):
        raise OptionError(f"--device {device}: CUDA_VISIBLE_DEVICES={visible} leaves {len(names)} GPUs, from cuda:0")
    os.environ["CUDA_VISIBLE_DEVICES"] = names[index] if names is not None else str(index)
