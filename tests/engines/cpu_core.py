"""A core for LMDeploy's PyTorch engine that needs no GPU: all else of LMDeploy that a row passes through is real.

In a test's own process a test calls `install`; in an engine's process a sitecustomize.py on its PYTHONPATH does
(`with_cpu_core`).
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import aclosing
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy

VARIABLE = "BATCHVL_TEST_CORE"
ROWS = 8
"""Rows at once, unless an option says otherwise."""


@dataclass
class Asked:
    """What reached the core for one answer."""

    prompt: str
    """Decoded; a picture's tokens, however many, are one."""
    pictures: list[list[int]]
    """The shape of each picture's pixels."""
    tokens: int
    """Of the prompt, pictures' included."""
    config: Any
    """LMDeploy's GenerationConfig."""
    inflight: int
    """Answers being given at that moment, this one included."""
    digest: str


class Core:
    """Stands for lmdeploy.pytorch.engine.Engine. `behaviour` is what a test ordered, and may be changed any time:

    answer: "model" runs the checkpoint with transformers, greedily; "digest" answers with a digest of the prompt's
    tokens and each picture's pixels; "say" says `say`. delay: seconds before each token; whole: all
    tokens at once, as TurboMind gives them to who does not want a stream. status: a ResponseType's name,
    told after `after` tokens. raises: text of an exception. silent: no output at all. hang: not a token, ever; block:
    nor does anything else on the loop move. die: the process is gone. unwell: reported as not alive from then on.
    once: a file; only the first to make it behaves so. rules: by a text that the prompt holds, the behaviour it calls
    for. record: a file that takes what is asked, as JSON lines. load, exit: text of an exception and of a SystemExit
    while it is made. gpus: how many there seem to be. own_handles: rows reach it by LMDeploy's own handles, which tell
    every token; `config` of what is asked holds the ends and the length only.
    """

    def __init__(self, path: str, config: Any, **behaviour: Any) -> None:
        from transformers import AutoTokenizer

        if text := behaviour.get("load"):
            raise RuntimeError(text)
        if text := behaviour.get("exit"):
            import logging

            logging.getLogger("lmdeploy").error(text)
            raise SystemExit(1)
        self.engine_config, self.path, self.behaviour = config, path, behaviour
        self.tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=True)
        self.inflight = self.peak = self.ticks = 0
        self.asked: list[Asked] = []
        self.alive = True
        self.req_manager: Any = None  # this and the next are what LMDeploy's handles ask for
        self.max_session_len = 2**20
        self.in_main_thread = threading.current_thread() is threading.main_thread()
        self.model: Any = None
        if behaviour.get("answer") == "model":
            from transformers import AutoModelForImageTextToText

            self.model = AutoModelForImageTextToText.from_pretrained(path).eval()

    def create_instance(self, *_: Any) -> Any:
        if not self.behaviour.get("own_handles"):
            return Instance(self)
        from lmdeploy.pytorch.engine.engine_instance import EngineInstance

        self.req_manager = self.req_manager or _manager(self)
        return EngineInstance(self)

    def start_loop(self) -> bool:
        return True

    def close(self) -> None:
        pass

    def get_schedule_metrics(self) -> Any:
        from lmdeploy.messages import ScheduleMetrics

        return ScheduleMetrics(active_seqs=self.inflight, scheduler_tick=self.ticks)

    async def get_health_status(self) -> dict[str, Any]:
        metrics = self.get_schedule_metrics()
        return {"alive": self.alive, "message": "" if self.alive else "unwell by order", "schedule_metrics": metrics}

    def ask(self, input_ids: list[int], multimodal: list[Any] | None, config: Any) -> dict[str, Any]:
        """Notes what is asked; how to behave."""
        ids = list(map(int, input_ids))
        places = {int(item["image_token_id"]) for item in multimodal or []}
        once = [token for token, run in groupby(ids) for token in ([token] if token in places else run)]
        prompt = self.tokenizer.decode(once, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        pictures = [list(item["pixel_values"].shape) for item in multimodal or []]
        asked = Asked(prompt, pictures, len(ids), config, self.inflight, digest(ids, multimodal))
        self.asked.append(asked)
        if "record" in self.behaviour:
            with open(self.behaviour["record"], "a") as file:
                file.write(json.dumps(vars(asked), default=vars) + "\n")
        rules = [rule for text, rule in self.behaviour.get("rules", {}).items() if text in prompt]
        plan = dict(self.behaviour)
        for rule in rules:
            plan |= rule if "once" not in rule or _first(rule["once"]) else {}
        return plan

    def answer(self, asked: Asked, plan: dict[str, Any], input_ids: list[int], multimodal: Any) -> list[int]:
        """The answer's tokens, the one that ends it included."""
        config, answer = asked.config, plan.get("answer", "digest")
        if answer == "model":
            ids = self._generate(input_ids, multimodal, config)
        else:
            said = plan["say"] if answer == "say" else asked.digest
            ids = self.tokenizer.encode(said, add_special_tokens=False)
        ends = [*ids, *config.stop_token_ids[:1]]
        return next((ends[: at + 1] for at, token in enumerate(ends) if token in config.stop_token_ids), ends)[
            : config.max_new_tokens
        ]

    def _generate(self, input_ids: list[int], multimodal: list[dict[str, Any]] | None, config: Any) -> list[int]:
        import torch

        inputs: dict[str, Any] = {"input_ids": torch.tensor([list(map(int, input_ids))])}
        if multimodal:
            inputs["pixel_values"] = torch.cat([item["pixel_values"].float() for item in multimodal])
        with torch.inference_mode():
            out = self.model.generate(
                **inputs, do_sample=False, max_new_tokens=config.max_new_tokens, eos_token_id=config.stop_token_ids
            )
        return out[0][len(input_ids) :].tolist()


def digest(input_ids: Iterable[int], multimodal: Iterable[Any] | None) -> str:
    """Of a prompt's tokens and each picture's pixels, as LMDeploy's preparation makes them."""
    seen = [json.dumps(list(map(int, input_ids))).encode()]
    seen += [item["pixel_values"].float().numpy().tobytes() for item in multimodal or []]
    return " ".join(hashlib.sha256(part).hexdigest()[:8] for part in seen)


def _first(file: str) -> bool:
    try:
        Path(file).touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


class Instance:
    """One of the handles that LMDeploy gives a request."""

    def __init__(self, core: Core) -> None:
        self.core = core
        self.cancelled: dict[int, asyncio.Event] = {}

    async def async_stream_infer(
        self,
        session_id: int,
        input_ids: list[int],
        gen_config: Any = None,
        multimodal: Any = None,
        stream_output: bool = False,
        **_: Any,
    ) -> Any:
        core = self.core
        core.inflight += 1
        core.peak = max(core.peak, core.inflight)
        cancelled = self.cancelled[session_id] = asyncio.Event()
        try:
            plan = core.ask(input_ids, multimodal, gen_config)
            asked = core.asked[-1]
            if plan.get("die"):
                os.kill(os.getpid(), signal.SIGKILL)
            if plan.get("block"):
                time.sleep(3600)  # noqa: ASYNC251 - by order
            if plan.get("unwell"):
                core.alive = False
            if "raises" in plan:
                raise RuntimeError(plan["raises"])
            if plan.get("hang"):
                await asyncio.Event().wait()
            if not plan.get("silent"):
                async for output in self._outputs(asked, plan, input_ids, multimodal, cancelled, stream_output):
                    yield output
        finally:
            core.inflight -= 1
            del self.cancelled[session_id]

    async def _outputs(
        self,
        asked: Asked,
        plan: dict[str, Any],
        input_ids: list[int],
        multimodal: Any,
        cancelled: asyncio.Event,
        stream: bool,
    ) -> Any:
        from lmdeploy.messages import EngineOutput, ResponseType

        ids = await asyncio.to_thread(self.core.answer, asked, plan, input_ids, multimodal)
        if plan.get("whole") and not stream:
            yield EngineOutput(ResponseType.FINISH, ids)
            return
        for at, token in enumerate(ids):
            if "status" in plan and at >= plan.get("after", 0):
                yield EngineOutput(ResponseType[plan["status"]], [])
                return
            try:
                await asyncio.wait_for(cancelled.wait(), plan.get("delay", 0.0))
                yield EngineOutput(ResponseType.CANCEL, [])
                return
            except TimeoutError:
                self.core.ticks += 1
            yield EngineOutput(ResponseType.FINISH if at == len(ids) - 1 else ResponseType.SUCCESS, [token])

    async def async_cancel(self, session_id: int) -> None:
        if session_id in self.cancelled:
            self.cancelled[session_id].set()


def _manager(core: Core) -> Any:
    """LMDeploy's, through which its handles reach the core as they reach its engine."""
    from lmdeploy.pytorch.engine.engine import ResponseType, response_reqs
    from lmdeploy.pytorch.engine.request import RequestManager, RequestType

    manager = RequestManager()
    answers: dict[int, tuple[Any, asyncio.Task[None]]] = {}

    async def loop() -> None:
        while True:
            await manager.step()

    def done(requests: list[Any]) -> None:
        for request in requests:
            if request.data.get("response", True):
                response_reqs(manager, request.resp, ResponseType.SUCCESS)

    def add(requests: list[Any]) -> None:
        for request in requests:
            answers[request.data["session_id"]] = request.resp, asyncio.create_task(answer(request.data, request.resp))

    def stop(requests: list[Any]) -> None:
        for request in requests:
            told, answering = answers[request.data["session_id"]]
            answering.cancel()
            manager.reject_request(told)
        done(requests)

    async def answer(asked: dict[str, Any], told: Any) -> None:
        sampling, ids = asked["sampling_param"], []
        config = SimpleNamespace(stop_token_ids=sampling.stop_words, max_new_tokens=sampling.max_new_tokens)
        outputs = Instance(core).async_stream_infer(
            asked["session_id"], asked["token_ids"], config, asked["input_multimodals"], stream_output=True
        )
        try:
            async with aclosing(outputs):
                async for output in outputs:
                    ids += output.token_ids
                    response_reqs(manager, told, output.status, {"token_ids": numpy.array(ids, numpy.int64)})
        except Exception:
            response_reqs(manager, told, ResponseType.INTERNAL_ENGINE_ERROR)
            raise

    manager.set_main_loop_func(loop)
    for kind, callback in {
        RequestType.ADD_SESSION: done,
        RequestType.ADD_MESSAGE: add,
        RequestType.STOP_SESSION: stop,
        RequestType.END_SESSION: done,
    }.items():
        manager.bind_func(kind, callback)
    return manager


def install(put: Callable[[Any, str, Any], None] = setattr, **behaviour: Any) -> list[Core]:
    """Puts the core in place of the engine's, and a GPU of no substance where one is looked for; the cores made.

    put: how an attribute is replaced, such as a MonkeyPatch's setattr.
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import lmdeploy.pytorch.engine
    import lmdeploy.utils

    from batchvl.engines import cuda as gpu

    behaviour = behaviour or json.loads(os.environ.get(VARIABLE, "{}"))
    cores: list[Core] = []

    def from_pretrained(cls: Any, path: str, *_: Any, engine_config: Any = None, **__: Any) -> Core:
        cores.append(Core(path, engine_config, **behaviour))
        return cores[-1]

    put(lmdeploy.pytorch.engine.Engine, "from_pretrained", classmethod(from_pretrained))
    put(gpu, "count", lambda: behaviour.get("gpus", 1))
    put(gpu, "name", lambda _=0: "no GPU")
    put(gpu, "memory", lambda _=0: (2**34, 2**34))
    put(lmdeploy.utils, "get_max_batch_size", lambda _: ROWS)
    return cores


def with_cpu_core(folder: Path, **behaviour: Any) -> dict[str, str]:
    """An environment in which engines' processes have the core; `folder` takes a file for that."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "sitecustomize.py").write_text(
        "import sys\n"
        "if 'batchvl.serving.engine_main' in sys.orig_argv:\n"
        "    from tests.engines import cpu_core\n"
        "    cpu_core.install()\n"
    )
    root = Path(__file__).parents[2]
    path = os.pathsep.join(filter(None, (str(folder), str(root), os.environ.get("PYTHONPATH"))))
    return {**os.environ, "PYTHONPATH": path, VARIABLE: json.dumps(behaviour)}
