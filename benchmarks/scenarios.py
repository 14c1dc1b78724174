"""The scenarios of benchmarks/gpu.py: models, images and numbers of rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

QUESTIONS = (
    "describe this image in detail.",
    "what is in the foreground?",
    "what is in the background?",
    "which colours stand out most?",
    "where might this have been taken?",
    "which time of the day is it?",
    "is there any text? what does it say?",
    "how many people are there?",
    "what is unusual about this image?",
    "write a caption for this image.",
)
MIN_TOKENS, LENGTHS = 16, 113
"""Answers have MIN_TOKENS tokens or up to LENGTHS - 1 more."""

Options = Sequence[tuple[str, str]]
"""Options of `batchvl run` by their flat names; an option with several values is repeated."""


class Row(NamedTuple):
    """A question about an image. Its answer has exactly `tokens` tokens."""

    image: int
    question: int
    tokens: int


@dataclass(frozen=True)
class Scenario:
    """One line of the table. Numbers of rows are per GPU and keep an H200 busy for 40 to 60 s."""

    name: str
    size: str
    """Size of the model: see benchmarks/internvl.py."""
    image_size: tuple[int, int]
    """Width and height."""
    max_tiles: int
    rows: int
    loop_rows: int
    """Rows for the loop over `pipe(batch)`, which is far slower."""
    questions: int = 1
    """Consecutive rows about the same image."""
    fp8: bool = False
    """Whether the matrices of the model's language half have 8 bits."""
    gpus: int | None = None
    """Value of --gpus; None omits the option, which means one GPU."""
    options: Options = ()
    """Options of `batchvl run`, for all systems."""

    @property
    def gpu_count(self) -> int:
        return self.gpus or 1

    @property
    def distinct_pixels(self) -> bool:
        """Whether images must differ in their pixels as well, so that nothing cached for one serves another."""
        return self.questions > 1

    def make_rows(self, count: int) -> list[Row]:
        """Return rows in the manifest's order. Answers have 16 to 128 tokens, 72 on average; neighbours differ."""
        lengths = (MIN_TOKENS + number * 61 % LENGTHS for number in range(count))  # each length once in LENGTHS rows
        return [Row(*divmod(number, self.questions), tokens) for number, tokens in enumerate(lengths)]

    def __str__(self) -> str:
        tiles = "1 tile" if self.max_tiles == 1 else f"{self.max_tiles + 1} tiles"
        parts = [self.size.upper() + " FP8" * self.fp8, "{}x{}".format(*self.image_size), tiles]
        parts += [f"{self.questions} questions per image"] * (self.questions > 1)
        parts += map(format_option, self.options)
        parts += [f"{self.gpus} GPU{'s' * (self.gpus > 1)}"] if self.gpus else []
        return ", ".join(parts)


def format_option(option: tuple[str, str]) -> str:
    """Return an option in human-readable form.

    >>> format_option(("engine_option", "enable_prefix_caching=false")), format_option(("image_workers", "4"))
    ('enable_prefix_caching=false', 'image_workers=4')
    """
    name, value = option
    return value if name == "engine_option" else f"{name}={value}"


SMALL, LARGE, CAMERA = (640, 480), (1280, 960), (4000, 3000)
ONE_TILE = Scenario("2b-1tile", "2b", SMALL, 1, 8000, 1280)
TILES = Scenario("2b-13tiles", "2b", LARGE, 12, 1000, 288)
LARGER = Scenario("8b-13tiles", "8b", LARGE, 12, 448, 192)
QUESTIONED = Scenario("2b-questions-cached", "2b", LARGE, 12, 3000, 320, questions=len(QUESTIONS))
NOT_CACHED = replace(
    QUESTIONED, name="2b-questions-plain", rows=1000, options=(("engine_option", "enable_prefix_caching=false"),)
)
GPUS = [replace(ONE_TILE, name=f"2b-1tile-gpus-{gpus}", gpus=gpus) for gpus in (1, 2, 4)]
SCENARIOS: dict[str, list[Scenario]] = {
    "2b-1tile": [ONE_TILE],
    "2b-13tiles": [TILES],
    "8b-13tiles": [LARGER],
    "2b-12mp": [Scenario("2b-12mp", "2b", CAMERA, 12, 1000, 160)],
    "fp8": [replace(each, name=f"{each.name}-fp8", fp8=True) for each in (ONE_TILE, TILES, LARGER)],
    "2b-questions": [NOT_CACHED, QUESTIONED],
    "2b-1tile-gpus": GPUS,
    "tiny": [Scenario("tiny", "tiny", SMALL, 1, 256, 64)],  # checks that the benchmark works; its figures mean nothing
}
"""Scenarios by their names on the command line; a name may stand for several scenarios that have their own names."""
SCENARIOS = {scenario.name: [scenario] for several in SCENARIOS.values() for scenario in several} | SCENARIOS
