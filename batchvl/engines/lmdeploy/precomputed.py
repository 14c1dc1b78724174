"""How rows enter LMDeploy's engine: in place of its prompt processor, most of whose work image workers have done."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple


class CompleteInputs(NamedTuple):
    """LMDeploy's inputs of a turn."""

    inputs: dict[str, Any]


class ImagesOnly(NamedTuple):
    """The messages of a turn, in which images are only marked, and what LMDeploy has made of each image."""

    messages: list[dict[str, Any]]
    images: list[dict[str, Any]]


class PrecomputedPromptProcessor:
    """A `prompt_processor` for LMDeploy that takes what image workers have prepared.

    Args:
        processor: LMDeploy's own, which prepares everything else.
    """

    def __init__(self, processor: Any) -> None:
        self._processor = processor

    async def get_prompt_input(self, prompt: Any, **settings: Any) -> Any:
        """Return LMDeploy's inputs of a prompt."""
        match prompt:
            case CompleteInputs(inputs):
                return inputs
            case ImagesOnly(messages, images):
                return await combine(self._processor, messages, images)
        return await self._processor.get_prompt_input(prompt=prompt, **settings)


async def combine(
    processor: Any, messages: list[dict[str, Any]], images: Iterable[Mapping[str, Any]]
) -> dict[str, Any]:
    """Combine messages and prepared images into LMDeploy's inputs.

    Args:
        processor: LMDeploy's MultimodalProcessor.
        messages: Messages in which images are only marked.
        images: What LMDeploy has made of each image, in the order of the marks.
    """
    parsed = await processor.async_parse_multimodal_item(messages)
    # Copies, since LMDeploy adds each image's position in the prompt, which differs from prompt to prompt.
    parsed.append({"role": "preprocess", "content": [dict(image) for image in images]})
    inputs: dict[str, Any] = await processor.vl_encoder.wrap_for_pytorch(
        parsed, processor.chat_template, processor.tokenizer
    )
    return inputs
