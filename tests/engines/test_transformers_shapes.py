"""The trained model of the package: right answers, so that a swapped picture or a lost turn shows."""

from __future__ import annotations

from random import Random

import pytest

from batchvl.shapes import MODEL, scenes
from tests.engines.in_process import ask, line, request

pytestmark = pytest.mark.skipif(not (MODEL / "model.safetensors").exists(), reason="the model is not there")


async def test_fresh_pictures_are_described_right():
    rng, questions, truths = Random("fresh"), [], []
    for row in range(100):
        scene = scenes.make_scene(rng)
        truths.append(scenes.caption(scene))
        drawn = scenes.draw_scene(scene, 150, 140, rng)
        questions.append((request(row, ask("Describe this image.", 0), max_new_tokens=48), [drawn]))
    async with line(MODEL, megabytes=64, batch_size=25) as started:
        answers = [response.texts[0].strip() for response in await started.ask(*questions)]

    right = sum(answer == truth for answer, truth in zip(answers, truths, strict=True))
    assert right >= 97, [pair for pair in zip(answers, truths, strict=True) if len(set(pair)) > 1]


async def test_turns_keep_to_their_picture():
    rng, questions, truths = Random("turns"), [], []
    for row in range(12):
        scene = scenes.make_scene(rng)
        asked = [scenes.ask_about(scene, kind, rng) for kind in ("count", "background", "caption")]
        truths.append(tuple(answer for _, answer in asked))
        drawn = scenes.draw_scene(scene, 140, 140, rng)
        first, *later = [question for question, _ in asked]
        turns = [ask(first, 0), *map(ask, later)]
        questions.append((request(row, *turns, max_new_tokens=48), [drawn]))
    async with line(MODEL, megabytes=64) as started:
        answers = [tuple(text.strip() for text in response.texts) for response in await started.ask(*questions)]

    assert sum(answer == truth for answer, truth in zip(answers, truths, strict=True)) >= 11
