"""The common beginning of rows about the same images, computed once, ahead of them.

TurboMind caches prefixes in blocks of 64 tokens, and skips encoding an image only if all of its tokens are cached. The
image's tokens end within a block whose rest is a different question in each row, so each row would encode the image
again, which is the larger part of the work. But TurboMind also caches the incomplete block at the end of a prompt,
without the last token, if an image reaches into it. So the rows are preceded by a prompt that ends one token behind the
last image.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Iterable, Mapping
from contextlib import aclosing, suppress
from typing import TYPE_CHECKING, Any, Protocol

from .precomputed import CompleteInputs

if TYPE_CHECKING:
    from .model import LoadedModel


class PrefixRow(Protocol):
    """A row as far as `share_prefixes` needs it."""

    prefix: SharedPrefix | None

    @property
    def complete_inputs(self) -> dict[str, Any] | None:
        """LMDeploy's inputs, if an image worker has prepared all of them."""

    @property
    def images_key(self) -> tuple[int, int] | None:
        """Equal for rows that share their images."""


def share_prefixes(rows: Iterable[PrefixRow], model: LoadedModel) -> None:
    """Start to compute what rows of a batch have in common, before any of them starts, and set their `prefix`."""
    groups: defaultdict[tuple[int, int] | None, list[tuple[PrefixRow, dict[str, Any]]]] = defaultdict(list)
    for row in rows:
        if row.complete_inputs is not None:
            groups[row.images_key].append((row, row.complete_inputs))
    for group in groups.values():
        if (common := image_prefix(group[0][1])) is None:
            continue
        tokens = common["input_ids"]
        sharing = [row for row, inputs in group if inputs["input_ids"][: len(tokens)] == tokens]
        if len(sharing) > 1:
            prefix = SharedPrefix(common, model)
            for row in sharing:
                row.prefix = prefix


def image_prefix(inputs: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return LMDeploy's inputs up to one token behind the last image; None if there is no image, or nothing behind it.

    >>> image_prefix({"input_ids": [1, 9, 9, 2, 3, 4], "multimodal": [{"image_token_id": 9}], "prompt": "1 9 9 2 3 4"})
    {'input_ids': [1, 9, 9, 2], 'multimodal': [{'image_token_id': 9}], 'prompt': None}
    >>> image_prefix({"input_ids": [1, 2, 9], "multimodal": [{"image_token_id": 9}]}), image_prefix({"input_ids": [1]})
    (None, None)
    """
    image_ids = {int(item["image_token_id"]) for item in inputs.get("multimodal") or () if "image_token_id" in item}
    tokens = inputs["input_ids"]
    end = next((at + 1 for at in reversed(range(len(tokens))) if tokens[at] in image_ids), len(tokens))
    if end == len(tokens):
        return None
    return {**inputs, "input_ids": tokens[: end + 1], "prompt": None}


class SharedPrefix:
    """A prefix on its way through LMDeploy, on the event loop of LMDeploy's pipeline.

    It reads the images in the arena, so the rows that share it must not end before it.
    """

    def __init__(self, inputs: dict[str, Any], model: LoadedModel) -> None:
        self._model, self._session = model, model.sessions.get()
        self._task = asyncio.get_running_loop().create_task(self._compute(inputs))

    async def wait(self) -> None:
        """Wait for its end, even if the caller is cancelled: images must not be released while they are read."""
        while not self._task.done():
            with suppress(asyncio.CancelledError):
                await asyncio.wait([self._task])

    async def abort(self) -> None:
        """End it as soon as possible."""
        await self._session.async_abort()  # has no effect before it has begun
        self._task.cancel()

    async def _compute(self, inputs: dict[str, Any]) -> None:
        from lmdeploy import GenerationConfig

        model = self._model
        try:
            with suppress(Exception):  # what fails here fails in the rows as well, and they report it
                config = GenerationConfig(max_new_tokens=1, do_sample=False)
                prompt = await model.engine.preprocess(CompleteInputs(inputs), self._session, gen_config=config)
                async with aclosing(model.engine.generate(prompt, stream_response=False)) as outputs:
                    async for _ in outputs:
                        model.steps += 1
        finally:
            model.sessions.remove(self._session)
