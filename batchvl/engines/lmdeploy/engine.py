"""The lmdeploy engine. torch and LMDeploy are imported only once it resolves its model."""

from __future__ import annotations

import asyncio
import faulthandler
import os
import re
import traceback
from collections.abc import AsyncIterator, Callable, Coroutine
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from ...errors import EngineLost, EngineUnavailable, OptionError
from ...hardware.gpus import VISIBLE_DEVICES, parse_visible_devices
from ...images.preparation import PreparationSpec
from ...ipc.arena import ArenaView
from ...types import Request, Response
from ..base import EngineInfo, EngineSpec
from .sampling import MAX_TEMPERATURE

if TYPE_CHECKING:
    from .conversation import ConversationTask
    from .handles import IdleMeter
    from .model import LoadedModel, ResolvedModel

PROBE_SECONDS = 1.0
"""How often the health of LMDeploy's engine is checked."""


class LmdeployEngine:
    """Runs rows on the event loop of LMDeploy's pipeline, while this process's own loop only communicates.

    So the runner can still be heard if LMDeploy's loop stops, and sees that `steps` no longer grow. Input tokens are
    those of prompt and images, summed over the turns; output tokens are those of the answers.
    """

    def __init__(self, spec: EngineSpec, arena: ArenaView) -> None:
        self._spec, self._arena = spec, arena
        if spec.dtype == "float32":
            raise OptionError("--dtype float32: LMDeploy computes in float16 or bfloat16")
        if spec.sampling.temperature > MAX_TEMPERATURE:
            raise OptionError(
                f"--temperature {spec.sampling.temperature:g}: LMDeploy takes {MAX_TEMPERATURE:g} at most"
            )
        restrict_to_device(spec.device, spec.flags["tp"])
        self._resolved: ResolvedModel | None = None
        self.model: LoadedModel | None = None
        self._thread = ThreadPoolExecutor(1, "lmdeploy")
        self._rows: dict[int, ConversationTask] = {}  # used on the pipeline's loop only, as is the next
        self._tasks: set[asyncio.Task[None]] = set()
        self._open_batches: set[asyncio.Queue[Response | BaseException]] = set()
        self._health_task: asyncio.Task[None] | None = None
        self._idle_meter: IdleMeter | None = None
        self._idle_future: Future[None] | None = None
        self._ticks = 0

    @property
    def steps(self) -> int:
        """Counter of LMDeploy's outputs and of the rounds of its scheduler."""
        return self._ticks + (self.model.steps if self.model else 0)

    @property
    def wait_seconds(self) -> float:
        """Seconds in which half of LMDeploy's handles were free and no row waited for memory."""
        return self._idle_meter.seconds if self._idle_meter else 0.0

    @property
    def rows_in_flight(self) -> int:
        """Rows that have been handed in and have not ended."""
        return len(self._rows)

    async def resolve(self) -> PreparationSpec:
        """Find or download the model and read its configuration, template and tokenizer.

        Raises:
            EngineUnavailable: A library or the GPU is missing.
            OptionError: The settings are invalid.
            ModelError: The model was not found or is not supported.
        """
        self._resolved = await asyncio.get_running_loop().run_in_executor(self._thread, self._resolve)
        return self._resolved.preparation_spec

    async def start(self) -> EngineInfo:
        """Load the weights and generate a first token."""
        loop = asyncio.get_running_loop()
        if (resolved := self._resolved) is None:
            resolved = self._resolved = await loop.run_in_executor(self._thread, self._resolve)
        await loop.run_in_executor(self._thread, resolved.wait_for_memory)
        if resolved.wants_main_thread:
            self.model = resolved.load()
        else:
            self.model = await loop.run_in_executor(self._thread, resolved.load)
        from .handles import IdleMeter

        self._health_task = loop.create_task(self._watch_health(self.model))
        self._idle_meter = IdleMeter(self.model.engine, self.model.sessions)
        self._idle_future = asyncio.run_coroutine_threadsafe(self._idle_meter.run(), self.model.loop)
        return self.model.info

    async def infer(self, requests: list[Request]) -> AsyncIterator[Response]:
        """Yield each row's response in order of completion. Raises EngineLost if LMDeploy's engine is gone."""
        if self.model is None:
            raise RuntimeError("infer was called before start")
        loop = asyncio.get_running_loop()
        responses: asyncio.Queue[Response | BaseException] = asyncio.Queue()

        def emit(response: Response | BaseException) -> None:
            with suppress(RuntimeError):  # this process is exiting: its loop is closed, and nobody awaits the response
                loop.call_soon_threadsafe(responses.put_nowait, response)

        self._open_batches.add(responses)
        pending = {request.row for request in requests}
        self.model.loop.call_soon_threadsafe(self._begin, self.model, requests, emit)
        try:
            while pending:
                response = await responses.get()
                if isinstance(response, BaseException):
                    raise response
                pending.discard(response.row)
                yield response
        finally:
            self._open_batches.discard(responses)
            for row in pending:  # the caller has stopped listening
                await self.abort(row)

    async def abort(self, row: int) -> None:
        """End the row that has this number now."""
        if self.model is not None:
            self.model.loop.call_soon_threadsafe(self._abort, row)

    async def close(self) -> None:
        """Stop LMDeploy's pipeline."""
        if self._health_task is not None:
            self._health_task.cancel()
            await asyncio.wait([self._health_task])  # it uses the loop that is about to be closed
        if self._idle_future is not None:
            self._idle_future.cancel()
        if self.model is not None:
            await asyncio.get_running_loop().run_in_executor(self._thread, self.model.pipe.close)
        self._thread.shutdown(wait=False)
        self.model = self._resolved = None

    def _resolve(self) -> ResolvedModel:
        # LMDeploy's check of its environment starts a process that takes torch and GPU memory, and does not report what
        # it finds. Whatever it would find fails while loading as well, with a reason.
        os.environ.setdefault("LMDEPLOY_ENABLE_CHECK_ENV", "0")
        try:
            from .model import ResolvedModel
        except ImportError as error:
            raise EngineUnavailable(
                f"the engine lmdeploy needs a library that is not installed ({error}): "
                "pip install 'batchvl[lmdeploy]', or choose another engine with --engine"
            ) from error
        return ResolvedModel(self._spec)

    def _begin(
        self, model: LoadedModel, requests: list[Request], emit: Callable[[Response | BaseException], None]
    ) -> None:
        """Start the rows of a batch. Called on the pipeline's loop."""
        from .conversation import ConversationTask
        from .prefix import share_prefixes

        try:
            rows = {request.row: ConversationTask(request, model, self._arena) for request in requests}
            if model.keeps_prefixes:
                share_prefixes(rows.values(), model)
        except Exception as error:  # otherwise these rows would never end
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
        except BaseException as error:  # the engine's failure: a row's own failure is a response
            emit(error if isinstance(error, Exception) else EngineLost(f"LMDeploy's event loop ended: {error!r}"))
        finally:
            del self._rows[number]

    def _abort(self, row: int) -> None:
        """Called on the pipeline's loop: look up the row now, since its number may be handed in again later."""
        if (conversation := self._rows.get(row)) is not None:
            self._keep(conversation.abort())

    def _keep(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _watch_health(self, model: LoadedModel) -> None:
        """Check every second whether LMDeploy's engine is alive and makes progress; if not, fail all open batches."""
        last_tick = None
        while True:
            await asyncio.sleep(PROBE_SECONDS)
            try:
                async with asyncio.timeout(self._spec.hang_timeout):
                    tick, health = await probe_health(model, self._spec.hang_timeout)
            except TimeoutError:
                continue  # LMDeploy's loop hangs: `steps` stop growing, and the runner acts on that
            except Exception:
                traceback.print_exc()
                continue
            self._ticks += tick != last_tick
            last_tick = tick
            if health["status"] == "unhealthy":
                faulthandler.dump_traceback(all_threads=True)
                lost = EngineLost(f"LMDeploy's engine is unhealthy: {health['message']}")
                for responses in self._open_batches:
                    responses.put_nowait(lost)


async def probe_health(model: LoadedModel, stall_seconds: float) -> tuple[int, dict[str, Any]]:
    """Return the tick of LMDeploy's scheduler and the result of its health probe.

    Args:
        model: The running model.
        stall_seconds: Time without progress after which LMDeploy reports its engine as unhealthy.
    """

    async def probe() -> tuple[int, dict[str, Any]]:
        metrics = await model.engine.get_schedule_metrics()
        return metrics.scheduler_tick, await model.engine.health_probe(stall_seconds)

    return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(probe(), model.loop))


def restrict_to_device(device: str, tp: int) -> None:
    """Leave this process only the GPU that `--device` names. To be called before CUDA is initialized.

    Raises:
        OptionError: There is no such device, or it contradicts `--tp`.
    """
    number = re.fullmatch(r"cuda(?::(\d+))?", device)
    if device != "auto" and not number:
        raise OptionError(f"--device {device}: the engine lmdeploy takes auto, cuda or cuda:N")
    if number is None or number[1] is None:
        return
    if tp > 1:
        raise OptionError(
            f"--device {device} names one GPU, but --tp {tp} needs several; choose them with CUDA_VISIBLE_DEVICES"
        )
    names, index = parse_visible_devices(), int(number[1])
    if names is not None and index >= len(names):
        visible = os.environ[VISIBLE_DEVICES]
        raise OptionError(f"--device {device}: {VISIBLE_DEVICES}={visible} leaves {len(names)} GPUs, from cuda:0")
    os.environ[VISIBLE_DEVICES] = names[index] if names is not None else str(index)
