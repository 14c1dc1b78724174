"""Where rows enter LMDeploy's engine: in place of its prompt processor, whose work image workers have done for most."""

from __future__ import annotations

from typing import Any, NamedTuple


class Ready(NamedTuple):
    """LMDeploy's inputs of a turn, whole."""

    inputs: dict[str, Any]


class Around(NamedTuple):
    """A turn's messages, whatever they hold for pictures, and what LMDeploy has made of each of these."""

    messages: list[dict[str, Any]]
    pictures: list[dict[str, Any]]


class Entrance:
    """LMDeploy's `prompt_processor`: takes what image workers have prepared. All else `own`, LMDeploy's, prepares."""

    def __init__(self, own: Any) -> None:
        self._own = own

    async def get_prompt_input(self, prompt: Any, **settings: Any) -> Any:
        own = self._own
        match prompt:
            case Ready(inputs):
                return inputs
            case Around(messages, pictures):
                parsed = await own.async_parse_multimodal_item(messages)
                # LMDeploy notes in them where they stand in the prompt, which is another place in each turn.
                parsed.append({"role": "preprocess", "content": [dict(picture) for picture in pictures]})
                return await own.vl_encoder.wrap_for_pytorch(parsed, own.chat_template, own.tokenizer)
        return await own.get_prompt_input(prompt=prompt, **settings)
