"""A core for LMDeploy's PyTorch engine that needs no GPU: all else of LMDeploy that a row passes through is real.

In an engine's process of a test run, `install` is called by a sitecustomize.py on its PYTHONPATH (`with_cpu_core`).
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
from pathlib import Path
from typing import Any

VARIABLE = "BATCHVL_TEST_CORE"


class Core:
    """Stands for lmdeploy.pytorch.engine.Engine. `behaviour` is what a test ordered:

    answer: "model" runs the checkpoint with transformers, greedily; "digest" answers with a digest of the prompt's
    tokens and each picture's pixels. delay: seconds before each token.
    """

    def __init__(self, path: str, config: Any, **behaviour: Any) -> None:
        from transformers import AutoTokenizer

        self.engine_config, self.path, self.behaviour = config, path, behaviour
        self.tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=True)
        self.inflight = self.peak = self.ticks = 0
        self.configs: list[Any] = []
        self.alive = True
        self.model: Any = None
        if behaviour.get("answer", "digest") == "model":
            from transformers import AutoModelForImageTextToText

            self.model = AutoModelForImageTextToText.from_pretrained(path).eval()

    def create_instance(self, *_: Any) -> Instance:
        return Instance(self)

    def start_loop(self) -> bool:
        return True

    def close(self) -> None:
        pass

    def get_schedule_metrics(self) -> Any:
        from lmdeploy.messages import ScheduleMetrics

        return ScheduleMetrics(active_seqs=self.inflight, scheduler_tick=self.ticks)

    async def get_health_status(self) -> dict[str, Any]:
        metrics = self.get_schedule_metrics()
        return {"alive": self.alive, "message": "" if self.alive else "by order", "schedule_metrics": metrics}

    def answer(self, input_ids: list[int], multimodal: list[dict[str, Any]] | None, config: Any) -> list[int]:
        """The answer's tokens, the one that ends it included."""
        if self.model is None:
            seen = [hashlib.sha256(json.dumps(list(map(int, input_ids))).encode()).hexdigest()[:8]]
            for item in multimodal or []:
                pixels = item["pixel_values"].float().numpy().tobytes()
                seen.append(hashlib.sha256(pixels).hexdigest()[:8])
            ids = self.tokenizer.encode(" ".join(seen), add_special_tokens=False)
        else:
            ids = self._generate(input_ids, multimodal, config)
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


class Instance:
    """One of the handles that LMDeploy gives a request."""

    def __init__(self, core: Core) -> None:
        self.core, self.cancelled = core, set()

    async def async_stream_infer(
        self, session_id: int, input_ids: list[int], gen_config: Any = None, multimodal: Any = None, **_: Any
    ) -> Any:
        from lmdeploy.messages import EngineOutput, ResponseType

        core = self.core
        core.configs.append(gen_config)
        core.inflight += 1
        core.peak = max(core.peak, core.inflight)
        try:
            if status := core.behaviour.get("status"):
                yield EngineOutput(ResponseType[status], [])
                return
            ids = await asyncio.to_thread(core.answer, input_ids, multimodal, gen_config)
            for at, token in enumerate(ids):
                await asyncio.sleep(core.behaviour.get("delay", 0.0))
                core.ticks += 1
                if session_id in self.cancelled:
                    yield EngineOutput(ResponseType.CANCEL, [])
                    return
                yield EngineOutput(ResponseType.FINISH if at == len(ids) - 1 else ResponseType.SUCCESS, [token])
        finally:
            core.inflight -= 1

    async def async_cancel(self, session_id: int) -> None:
        self.cancelled.add(session_id)


def install(**behaviour: Any) -> list[Core]:
    """Puts the core in place of the engine's, and a GPU of no substance where one is looked for; the cores made."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import lmdeploy.pytorch.engine
    from batchvl.engines import gpu
    from batchvl.engines.lmdeploy import config

    behaviour = behaviour or json.loads(os.environ.get(VARIABLE, "{}"))
    cores: list[Core] = []

    def from_pretrained(cls: Any, path: str, *_: Any, engine_config: Any = None, **__: Any) -> Core:
        cores.append(Core(path, engine_config, **behaviour))
        return cores[-1]

    lmdeploy.pytorch.engine.Engine.from_pretrained = classmethod(from_pretrained)
    gpu.count, gpu.name, gpu.memory = lambda: 1, lambda _=0: "no GPU", lambda _=0: (2**34, 2**34)
    config.MOST_ROWS = 8
    import lmdeploy.utils

    lmdeploy.utils.get_max_batch_size = lambda _: 8
    return cores


def with_cpu_core(folder: Path, **behaviour: Any) -> dict[str, str]:
    """An environment in which engines' processes have the core; `folder` takes a file for that."""
    (folder / "sitecustomize.py").write_text(
        "import sys\n"
        "if 'batchvl.engines.child' in sys.orig_argv:\n"
        "    from tests.engines import cpu_core\n"
        "    cpu_core.install()\n"
    )
    root = Path(__file__).parents[2]
    path = os.pathsep.join(filter(None, (str(folder), str(root), os.environ.get("PYTHONPATH"))))
    return {**os.environ, "PYTHONPATH": path, VARIABLE: json.dumps(behaviour)}
