"""Sampling settings of the run and of a row's `generation`."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchvl.config.options import SamplingOptions
from batchvl.errors import InvalidGeneration
from batchvl.prompts.sampling import RowSampling, row_seed
from batchvl.types import Row, Sampling

RUN = SamplingOptions(seed=3, temperature=0.5, stop=("###",))


def sampling(number: int = 0, **generation: Any) -> Sampling:
    return RowSampling(RUN).for_row(Row(number, prompt="a", generation=generation))


def test_settings_are_the_runs_with_a_seed_per_row() -> None:
    assert sampling(12) == Sampling(temperature=0.5, stop=("###",), seed=row_seed(3, 12))
    # Stored answers depend on this: a change here changes the meaning of `--seed`.
    assert row_seed(3, 12) == 5966764642074109582
    assert len({row_seed(seed, number) for seed in range(10) for number in range(100)}) == 1000
    assert all(0 <= row_seed(0, number) < 2**63 for number in range(1000))


def test_a_rows_generation_takes_precedence() -> None:
    given = {"max_tokens": 7.0, "temperature": 1, "top_p": 0.5, "top_k": 4, "repetition_penalty": 1.5, "seed": 9}
    assert sampling(**given, stop="x") == Sampling(7, 1.0, 0.5, 4, 1.5, 9, ("x",))
    assert sampling(stop=["x", "y"]).stop == ("x", "y")
    assert sampling(max_completion_tokens=3).max_new_tokens == 3


@pytest.mark.parametrize(
    ("generation", "expected"),
    [
        ({"max_length": 5}, "unknown setting 'max_length'; expected max_new_tokens, temperature"),
        ({"max_new_tokens": 0}, "max_new_tokens: expected a whole number >= 1; found 0"),
        ({"max_tokens": "5"}, "max_tokens: expected a whole number; found '5'"),
        ({"max_tokens": 5.5}, "max_tokens: "),
        ({"max_tokens": True}, "max_tokens: "),
        ({"max_tokens": 5, "max_new_tokens": 5}, "found both max_new_tokens and another name of it"),
        ({"temperature": -0.1}, "temperature: expected a number >= 0"),
        ({"temperature": float("nan")}, "temperature: "),
        ({"temperature": float("inf")}, "temperature: "),
        ({"top_p": 0}, "top_p: "),
        ({"top_p": 1.1}, "top_p: "),
        ({"top_k": -1}, "top_k: "),
        ({"top_k": 2**70}, "top_k: "),
        ({"repetition_penalty": 0}, "repetition_penalty: "),
        ({"seed": 2**63}, "seed: expected a whole number <= 9223372036854775807; found 9223372036854775808"),
        ({"stop": [1]}, "stop: "),
        ({"stop": ""}, "stop: found an empty string"),
        ({"seed": {"a": 1}}, "seed: "),
    ],
)
def test_bad_settings_fail_and_are_named(generation: dict[str, Any], expected: str) -> None:
    with pytest.raises(InvalidGeneration) as error:
        sampling(**generation)
    assert expected in str(error.value)


@given(st.dictionaries(st.sampled_from(["seed", "top_k", "temperature", "max_tokens"]), st.integers() | st.floats()))
def test_any_settings_can_be_serialized_or_fail(generation: dict[str, Any]) -> None:
    try:
        settings = sampling(**generation)
    except InvalidGeneration:
        return
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(settings), type=Sampling) == settings
