"""The package's trained model: its answers are right, so that a swapped image or a lost turn is noticed."""

from __future__ import annotations

from random import Random

import pytest

from batchvl.shapes import MODEL, scenes
from tests.engines.in_process import make_request, start_transformers, user_message

pytestmark = pytest.mark.skipif(
    not (MODEL / "model.safetensors").exists(), reason="the model is not in the working tree"
)


async def test_new_images_are_described_correctly():
    rng, questions, expected = Random("fresh"), [], []
    for row in range(100):
        scene = scenes.make_scene(rng)
        expected.append(scenes.caption(scene))
        drawn = scenes.draw_scene(scene, 150, 140, rng)
        questions.append((make_request(row, user_message("Describe this image.", 0), max_new_tokens=48), [drawn]))
    async with start_transformers(MODEL, megabytes=64, batch_size=25) as started:
        answers = [response.texts[0].strip() for response in await started.ask(*questions)]

    right = sum(answer == truth for answer, truth in zip(answers, expected, strict=True))
    assert right >= 97, [pair for pair in zip(answers, expected, strict=True) if len(set(pair)) > 1]


async def test_later_turns_are_about_the_row_s_image():
    rng, questions, expected = Random("turns"), [], []
    for row in range(12):
        scene = scenes.make_scene(rng)
        turns = [scenes.ask_about(scene, kind, rng) for kind in ("count", "background", "caption")]
        expected.append(tuple(answer for _, answer in turns))
        drawn = scenes.draw_scene(scene, 140, 140, rng)
        first, *later = [question for question, _ in turns]
        messages = [user_message(first, 0), *map(user_message, later)]
        questions.append((make_request(row, *messages, max_new_tokens=48), [drawn]))
    async with start_transformers(MODEL, megabytes=64) as started:
        answers = [tuple(text.strip() for text in response.texts) for response in await started.ask(*questions)]

    assert sum(answer == truth for answer, truth in zip(answers, expected, strict=True)) >= 11
