"""A core for LMDeploy's PyTorch engine that needs no GPU. Everything else of LMDeploy that a row passes is real.

In a test's own process the test calls `install`; in an engine's process a sitecustomize.py on its PYTHONPATH does
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
"""Environment variable with the core's behaviour, as JSON."""
ROWS = 8
"""Rows that are computed at a time, unless an option says otherwise."""


@dataclass
class CoreRequest:
    """What reached the core for one answer."""

    prompt: str
    """The decoded prompt. All tokens of an image are shown as one."""
    images: list[list[int]]
    """The shape of each image's pixels."""
    tokens: int
    """Tokens of the prompt, including those of images."""
    config: Any
    """LMDeploy's GenerationConfig."""
    in_flight: int
    """Answers in progress at that time, including this one."""
    digest: str


class Core:
    """Stands for lmdeploy.pytorch.engine.Engine.

    `behaviour` says what it does, and may be changed at any time:

        answer: "model" runs the checkpoint with transformers, greedily; "digest" answers with a digest of the prompt's
            tokens and of each image's pixels; "text" answers with `text`.
        delay: Seconds before each token.
        whole: Give all tokens in one output, like TurboMind, unless the answer is streamed.
        status, after: Name of a ResponseType that is given after a number of tokens.
        raises: Message of an exception to raise.
        silent: Give no output at all.
        hang: Never give a token.
        block: Never return, and so block the event loop.
        die: Kill the process.
        unhealthy: Report the engine as not alive from then on.
        rules: Behaviour for prompts that contain a text, by that text.
        once: In a rule, a file: the rule applies only to the first request that creates it.
        record: A file to which requests are appended as JSON lines.
        load, exit: Message of an exception, or of a SystemExit, while it is created.
        gpus: Number of GPUs that there seem to be.
        own_handles: Use LMDeploy's own handles, which give every token. The `config` of requests then has only the stop
            tokens and the maximum length.
    """

    def __init__(self, path: str, config: Any, **behaviour: Any) -> None:
        from transformers import AutoTokenizer

        if message := behaviour.get("load"):
            raise RuntimeError(message)
        if message := behaviour.get("exit"):
            import logging

            logging.getLogger("lmdeploy").error(message)
            raise SystemExit(1)
        self.engine_config, self.path, self.behaviour = config, path, behaviour
        self.tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=True)
        self.in_flight = self.peak = self.ticks = 0
        self.requests: list[CoreRequest] = []
        self.alive = True
        self.req_manager: Any = None  # LMDeploy's handles use this and the next attribute
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

        self.req_manager = self.req_manager or _request_manager(self)
        return EngineInstance(self)

    def start_loop(self) -> bool:
        return True

    def close(self) -> None:
        pass

    def get_schedule_metrics(self) -> Any:
        from lmdeploy.messages import ScheduleMetrics

        return ScheduleMetrics(active_seqs=self.in_flight, scheduler_tick=self.ticks)

    async def get_health_status(self) -> dict[str, Any]:
        message = "" if self.alive else "unhealthy, as configured"
        return {"alive": self.alive, "message": message, "schedule_metrics": self.get_schedule_metrics()}

    def receive(self, input_ids: list[int], multimodal: list[Any] | None, config: Any) -> dict[str, Any]:
        """Record a request and return the behaviour for it."""
        ids = list(map(int, input_ids))
        image_ids = {int(item["image_token_id"]) for item in multimodal or []}
        shown = [token for token, run in groupby(ids) for token in ([token] if token in image_ids else run)]
        prompt = self.tokenizer.decode(shown, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        images = [list(item["pixel_values"].shape) for item in multimodal or []]
        request = CoreRequest(prompt, images, len(ids), config, self.in_flight, digest(ids, multimodal))
        self.requests.append(request)
        if "record" in self.behaviour:
            with open(self.behaviour["record"], "a") as file:
                file.write(json.dumps(vars(request), default=vars) + "\n")
        rules = [rule for text, rule in self.behaviour.get("rules", {}).items() if text in prompt]
        plan = dict(self.behaviour)
        for rule in rules:
            plan |= rule if "once" not in rule or _create(rule["once"]) else {}
        return plan

    def answer(self, request: CoreRequest, plan: dict[str, Any], input_ids: list[int], multimodal: Any) -> list[int]:
        """Return the answer's tokens, including the one that ends it."""
        config, kind = request.config, plan.get("answer", "digest")
        if kind == "model":
            ids = self._generate(input_ids, multimodal, config)
        else:
            text = plan["text"] if kind == "text" else request.digest
            ids = self.tokenizer.encode(text, add_special_tokens=False)
        ids = [*ids, *config.stop_token_ids[:1]]
        length = next((at + 1 for at, token in enumerate(ids) if token in config.stop_token_ids), len(ids))
        return ids[: min(length, config.max_new_tokens)]

    def _generate(self, input_ids: list[int], multimodal: list[dict[str, Any]] | None, config: Any) -> list[int]:
        import torch

        inputs: dict[str, Any] = {"input_ids": torch.tensor([list(map(int, input_ids))])}
        if multimodal:
            inputs["pixel_values"] = torch.cat([item["pixel_values"].float() for item in multimodal])
        with torch.inference_mode():
            output = self.model.generate(
                **inputs, do_sample=False, max_new_tokens=config.max_new_tokens, eos_token_id=config.stop_token_ids
            )
        return output[0][len(input_ids) :].tolist()


def digest(input_ids: Iterable[int], multimodal: Iterable[Any] | None) -> str:
    """Return a digest of a prompt's tokens and one of each image's pixels, as LMDeploy's preparation makes them."""
    parts = [json.dumps(list(map(int, input_ids))).encode()]
    parts += [item["pixel_values"].float().numpy().tobytes() for item in multimodal or []]
    return " ".join(hashlib.sha256(part).hexdigest()[:8] for part in parts)


def _create(file: str) -> bool:
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
        core.in_flight += 1
        core.peak = max(core.peak, core.in_flight)
        cancelled = self.cancelled[session_id] = asyncio.Event()
        try:
            plan = core.receive(input_ids, multimodal, gen_config)
            request = core.requests[-1]
            if plan.get("die"):
                os.kill(os.getpid(), signal.SIGKILL)
            if plan.get("block"):
                time.sleep(3600)  # noqa: ASYNC251
            if plan.get("unhealthy"):
                core.alive = False
            if "raises" in plan:
                raise RuntimeError(plan["raises"])
            if plan.get("hang"):
                await asyncio.Event().wait()
            if not plan.get("silent"):
                async for output in self._outputs(request, plan, input_ids, multimodal, cancelled, stream_output):
                    yield output
        finally:
            core.in_flight -= 1
            del self.cancelled[session_id]

    async def _outputs(
        self,
        request: CoreRequest,
        plan: dict[str, Any],
        input_ids: list[int],
        multimodal: Any,
        cancelled: asyncio.Event,
        stream: bool,
    ) -> Any:
        from lmdeploy.messages import EngineOutput, ResponseType

        ids = await asyncio.to_thread(self.core.answer, request, plan, input_ids, multimodal)
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


def _request_manager(core: Core) -> Any:
    """Return LMDeploy's RequestManager, through which its handles reach the core as they reach its engine."""
    from lmdeploy.pytorch.engine.engine import ResponseType, response_reqs
    from lmdeploy.pytorch.engine.request import RequestManager, RequestType

    manager = RequestManager()
    answers: dict[int, tuple[Any, asyncio.Task[None]]] = {}

    async def loop() -> None:
        while True:
            await manager.step()

    def confirm(requests: list[Any]) -> None:
        for request in requests:
            if request.data.get("response", True):
                response_reqs(manager, request.resp, ResponseType.SUCCESS)

    def add(requests: list[Any]) -> None:
        for request in requests:
            answers[request.data["session_id"]] = request.resp, asyncio.create_task(answer(request.data, request.resp))

    def stop(requests: list[Any]) -> None:
        for request in requests:
            response, task = answers[request.data["session_id"]]
            task.cancel()
            manager.reject_request(response)
        confirm(requests)

    async def answer(data: dict[str, Any], response: Any) -> None:
        sampling, ids = data["sampling_param"], []
        config = SimpleNamespace(stop_token_ids=sampling.stop_words, max_new_tokens=sampling.max_new_tokens)
        outputs = Instance(core).async_stream_infer(
            data["session_id"], data["token_ids"], config, data["input_multimodals"], stream_output=True
        )
        try:
            async with aclosing(outputs):
                async for output in outputs:
                    ids += output.token_ids
                    response_reqs(manager, response, output.status, {"token_ids": numpy.array(ids, numpy.int64)})
        except Exception:
            response_reqs(manager, response, ResponseType.INTERNAL_ENGINE_ERROR)
            raise

    manager.set_main_loop_func(loop)
    for kind, callback in {
        RequestType.ADD_SESSION: confirm,
        RequestType.ADD_MESSAGE: add,
        RequestType.STOP_SESSION: stop,
        RequestType.END_SESSION: confirm,
    }.items():
        manager.bind_func(kind, callback)
    return manager


def install(set_attribute: Callable[[Any, str, Any], None] = setattr, **behaviour: Any) -> list[Core]:
    """Replace LMDeploy's engine by the core, and pretend that there is a GPU.

    Args:
        set_attribute: Replaces an attribute, such as a MonkeyPatch's setattr.
        behaviour: The core's; by default that of the environment variable.

    Returns:
        A list to which every core is appended once it is created.
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import lmdeploy.pytorch.engine
    import lmdeploy.utils

    from batchvl.engines import cuda

    behaviour = behaviour or json.loads(os.environ.get(VARIABLE, "{}"))
    cores: list[Core] = []

    def from_pretrained(cls: Any, path: str, *_: Any, engine_config: Any = None, **__: Any) -> Core:
        cores.append(Core(path, engine_config, **behaviour))
        return cores[-1]

    set_attribute(lmdeploy.pytorch.engine.Engine, "from_pretrained", classmethod(from_pretrained))
    set_attribute(cuda, "count", lambda: behaviour.get("gpus", 1))
    set_attribute(cuda, "name", lambda _=0: "no GPU")
    set_attribute(cuda, "memory", lambda _=0: (2**34, 2**34))
    set_attribute(lmdeploy.utils, "get_max_batch_size", lambda _: ROWS)
    return cores


def with_cpu_core(directory: Path, **behaviour: Any) -> dict[str, str]:
    """Return an environment in which engine processes use the core.

    Args:
        directory: Where the file that installs it is written.
        behaviour: The core's.
    """
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "sitecustomize.py").write_text(
        "import sys\n"
        "if 'batchvl.serving.engine_main' in sys.orig_argv:\n"
        "    from tests.engines import cpu_core\n"
        "    cpu_core.install()\n"
    )
    root = Path(__file__).parents[2]
    path = os.pathsep.join(filter(None, (str(directory), str(root), os.environ.get("PYTHONPATH"))))
    return {**os.environ, "PYTHONPATH": path, VARIABLE: json.dumps(behaviour)}
