"""What benchmarks/gpu.py measures: models, pictures and how many rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

QUESTIONS = (
    "describe this image in detail.",
    "what is in the foreground?",
    "what is in the background?",
    "which colours stand out most?",
    "where may this have been taken?",
    "which time of the day is it?",
    "is there any text? what does it say?",
    "how many people are to be seen?",
    "what is unusual about this image?",
    "write a caption for this image.",
)
SHORTEST, LENGTHS = 16, 113


Options = Sequence[tuple[str, str]]
"""Of `batchvl run`, by their flat names; those that take several values stand several times."""


class Row(NamedTuple):
    """A question about a picture. `tokens`: of its answer, neither more nor fewer."""

    picture: int
    question: int
    tokens: int


@dataclass(frozen=True)
class Scenario:
    """One line of the table. Rows are a GPU's; they are meant to keep an H200 at work for 40 to 60 s."""

    name: str
    size: str
    """Of the model: see benchmarks/internvl.py."""
    picture: tuple[int, int]
    """Width and height."""
    max_tiles: int
    rows: int
    loop_rows: int
    """For `pipe(list)`, which is slower by far."""
    questions: int = 1
    """About each picture, one after another."""
    fp8: bool = False
    """Whether the model's language half has its matrices in 8 bits."""
    gpus: int | None = None
    """What --gpus is told; None tells it nothing, which is one GPU."""
    options: Options = ()
    """For all that is measured."""

    @property
    def gpu_count(self) -> int:
        return self.gpus or 1

    @property
    def different(self) -> bool:
        """Whether pictures must differ in their pixels too: what is remembered of one must be of use for no other."""
        return self.questions > 1

    def make_rows(self, count: int) -> list[Row]:
        """Rows in the manifest's order. Answers have 16 to 128 tokens, 72 on average, and neighbours differ."""
        lengths = (SHORTEST + number * 61 % LENGTHS for number in range(count))  # each length once in LENGTHS rows
        return [Row(*divmod(number, self.questions), tokens) for number, tokens in enumerate(lengths)]

    def __str__(self) -> str:
        tiles = "1 tile" if self.max_tiles == 1 else f"{self.max_tiles + 1} tiles"
        parts = [self.size.upper() + " FP8" * self.fp8, "{}x{}".format(*self.picture), tiles]
        parts += [f"{self.questions} questions a picture"] * (self.questions > 1)
        parts += map(shown, self.options)
        parts += [f"{self.gpus} GPU{'s' * (self.gpus > 1)}"] if self.gpus else []
        return ", ".join(parts)


def shown(option: tuple[str, str]) -> str:
    """An option for people.

    >>> shown(("engine_option", "enable_prefix_caching=false")), shown(("image_workers", "4"))
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
    "tiny": [Scenario("tiny", "tiny", SMALL, 1, 256, 64)],  # whether all of this works: no figures to be kept
}
"""By what the command line calls them; the parts of those that have several have names as well."""
SCENARIOS = {scenario.name: [scenario] for several in SCENARIOS.values() for scenario in several} | SCENARIOS
