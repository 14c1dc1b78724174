"""The beginning that rows about the same pictures have in common, computed ahead of them, once.

TurboMind keeps prefixes by blocks of 64 tokens, and skips a picture only where all of its tokens are kept. They end
within a block, and the rest of that block is another question in each row: so the vision half, the larger part of the
work, would be done again for each. But it also keeps the part of a block with which a prompt ends, but for the last
token, if a picture reaches into that. So rows are preceded by one that ends a token behind the last picture.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Iterable, Mapping
from contextlib import aclosing, suppress
from typing import TYPE_CHECKING, Any

from .precomputed import CompleteInputs

if TYPE_CHECKING:
    from .conversation import ConversationTask
    from .model import LoadedModel


def compute_ahead(rows: Iterable[ConversationTask], model: LoadedModel) -> None:
    """Has LMDeploy begin with what rows of a list have in common, before any of them is begun."""
    groups: defaultdict[tuple[int, int] | None, list[tuple[ConversationTask, dict[str, Any]]]] = defaultdict(list)
    for row in rows:
        if row.inputs is not None:
            groups[row.pictures_at].append((row, row.inputs))
    for group in groups.values():
        if (common := beginning(group[0][1])) is None:
            continue
        tokens = common["input_ids"]
        sharing = [row for row, inputs in group if inputs["input_ids"][: len(tokens)] == tokens]
        if len(sharing) > 1:
            prefix = Prefix(common, model)
            for row in sharing:
                row.prefix = prefix


def beginning(inputs: Mapping[str, Any]) -> dict[str, Any] | None:
    """LMDeploy's inputs up to one token behind the last picture; None where there is no picture, or nothing behind it.

    >>> beginning({"input_ids": [1, 9, 9, 2, 3, 4], "multimodal": [{"image_token_id": 9}], "prompt": "1 9 9 2 3 4"})
    {'input_ids': [1, 9, 9, 2], 'multimodal': [{'image_token_id': 9}], 'prompt': None}
    >>> beginning({"input_ids": [1, 2, 9], "multimodal": [{"image_token_id": 9}]}), beginning({"input_ids": [1, 2]})
    (None, None)
    """
    places = {int(item["image_token_id"]) for item in inputs.get("multimodal") or () if "image_token_id" in item}
    tokens = inputs["input_ids"]
    end = next((at + 1 for at in reversed(range(len(tokens))) if tokens[at] in places), len(tokens))
    if end == len(tokens):
        return None
    return {**inputs, "input_ids": tokens[: end + 1], "prompt": None}


class Prefix:
    """That beginning on its way through LMDeploy. All of it lives on the loop of LMDeploy's pipeline.

    It reads the pictures where they lie: the rows behind it let go of them once it is `over`.
    """

    def __init__(self, inputs: dict[str, Any], model: LoadedModel) -> None:
        self._model, self._session = model, model.sessions.get()
        self._task = asyncio.get_running_loop().create_task(self._compute(inputs))

    async def over(self) -> None:
        """Returns once it is, also to a task that is cancelled: pictures are not let go of while they may be read."""
        while not self._task.done():
            with suppress(asyncio.CancelledError):
                await asyncio.wait([self._task])

    async def abort(self) -> None:
        await self._session.async_abort()  # which does nothing before it is begun
        self._task.cancel()

    async def _compute(self, inputs: dict[str, Any]) -> None:
        from lmdeploy import GenerationConfig

        model = self._model
        try:
            with suppress(Exception):  # what fails here fails for its rows as well, which tell it
                one = GenerationConfig(max_new_tokens=1, do_sample=False)
                asked = await model.engine.preprocess(CompleteInputs(inputs), self._session, gen_config=one)
                async with aclosing(model.engine.generate(asked, stream_response=False)) as outputs:
                    async for _ in outputs:
                        model.steps += 1
        finally:
            model.sessions.remove(self._session)
