"""Where rows enter LMDeploy's engine: in place of its prompt processor, whose work image workers have done for most."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple


class CompleteInputs(NamedTuple):
    """LMDeploy's inputs of a turn, whole."""

    inputs: dict[str, Any]


class ImagesOnly(NamedTuple):
    """A turn's messages, with the pictures' places marked, and what LMDeploy has made of each picture."""

    messages: list[dict[str, Any]]
    pictures: list[dict[str, Any]]


class PrecomputedPromptProcessor:
    """LMDeploy's `prompt_processor`: takes what image workers have prepared. All else `own`, LMDeploy's, prepares."""

    def __init__(self, own: Any) -> None:
        self._own = own

    async def get_prompt_input(self, prompt: Any, **settings: Any) -> Any:
        match prompt:
            case CompleteInputs(inputs):
                return inputs
            case ImagesOnly(messages, pictures):
                return await around(self._own, messages, pictures)
        return await self._own.get_prompt_input(prompt=prompt, **settings)


async def around(
    processor: Any, messages: list[dict[str, Any]], pictures: Iterable[Mapping[str, Any]]
) -> dict[str, Any]:
    """LMDeploy's inputs of a prompt around pictures that are made, by its MultimodalProcessor."""
    parsed = await processor.async_parse_multimodal_item(messages)
    # LMDeploy notes in them where they stand in the prompt, which is another place in each.
    parsed.append({"role": "preprocess", "content": [dict(picture) for picture in pictures]})
    inputs: dict[str, Any] = await processor.vl_encoder.wrap_for_pytorch(
        parsed, processor.chat_template, processor.tokenizer
    )
    return inputs
