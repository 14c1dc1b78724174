"""LMDeploy's own preparation of a row, run by the caller instead of by LMDeploy's threads and event loop."""

from __future__ import annotations

from collections.abc import Coroutine
from typing import Any

import torch
from lmdeploy.model import ChatTemplateConfig, get_chat_template
from lmdeploy.serve.processors import MultimodalProcessor
from lmdeploy.tokenizer import Tokenizer
from lmdeploy.vl.engine import ImageEncoder
from lmdeploy.vl.model.builder import load_vl_model


class Encoder(ImageEncoder):  # type: ignore[misc]  # LMDeploy has no types
    """LMDeploy's ImageEncoder for a model without its weights.

    Args:
        path: The model's directory.
        trust_remote_code: Whether the model's own code may run.
        dtype: The pixels' dtype; None leaves them as the model's processor returns them.
    """

    def __init__(self, path: str, trust_remote_code: bool, dtype: torch.dtype | None) -> None:
        # The models that can be prepared outside are prepared for TurboMind in the same way as for PyTorch.
        self.model = load_vl_model(path, "pytorch", trust_remote_code=trust_remote_code)
        self.mm_feature_dtype = dtype
        self.model.set_mm_feature_dtype(dtype)
        self._uses_new_preprocess = self._is_new_preprocess_api(self.model)

    @property
    def separates_images(self) -> bool:
        """Whether an image's pixels are made independently of the prompt, and can be used with other turns as well."""
        return not self._uses_new_preprocess

    async def preprocess(
        self, messages: list[dict[str, Any]], input_prompt: Any = None, mm_processor_kwargs: Any = None
    ) -> Any:
        """Prepare a message's images in the calling thread."""
        if self._uses_new_preprocess:
            return self.model.preprocess(messages, input_prompt, mm_processor_kwargs)
        return self.model.preprocess(messages)


class Processor(MultimodalProcessor):  # type: ignore[misc]
    """LMDeploy's MultimodalProcessor without anything that waits, so that `run_now` can run its coroutines.

    Args:
        path: The model's directory.
        trust_remote_code: Whether the model's own code may run.
        dtype: The pixels' dtype; None leaves them as the model's processor returns them.
        template: Fields of a ChatTemplateConfig; None for the model's own template.
    """

    vl_encoder: Encoder

    def __init__(
        self, path: str, trust_remote_code: bool, dtype: torch.dtype | None, template: dict[str, Any] | None
    ) -> None:
        config = ChatTemplateConfig(**template) if template is not None else None
        super().__init__(
            Tokenizer(path, trust_remote_code=trust_remote_code),
            get_chat_template(path, config, trust_remote_code=trust_remote_code),
            Encoder(path, trust_remote_code, dtype),
            "pytorch",
        )

    @staticmethod
    async def async_parse_multimodal_item(messages: list[dict[str, Any]], *_: Any, **__: Any) -> list[dict[str, Any]]:
        """Parse messages in the calling thread."""
        parsed: list[dict[str, Any]] = [{}] * len(messages)
        for number in range(len(messages)):
            MultimodalProcessor._parse_multimodal_item(number, messages, parsed, {})
        return parsed


def run_now(work: Coroutine[Any, Any, Any]) -> Any:
    """Return the result of a coroutine that never waits.

    Raises:
        RuntimeError: It waits. What it raises itself is raised as well.
    """
    try:
        work.send(None)
    except StopIteration as done:
        return done.value
    work.close()
    raise RuntimeError("LMDeploy's preparation waits for something, which it does not do in the supported version")
