"""Random scenes of coloured shapes: their images, and questions about them with the correct answers.

All randomness comes from the `random.Random` argument, so that a seed determines scenes, pixels and questions.

>>> import random
>>> rng = random.Random(6)
>>> scene = make_scene(rng)
>>> caption(scene)
'a black square above a white star on a green background'
>>> draw_scene(scene, 144, 144, rng).size
(144, 144)
>>> ask_about(scene, "count", rng)
('How many shapes are in this image?', '2')
"""

import math
from dataclasses import dataclass
from random import Random

from PIL import Image, ImageDraw

RGB = tuple[int, int, int]

COLOURS: dict[str, RGB] = {
    "red": (220, 30, 40),
    "green": (30, 160, 60),
    "blue": (40, 80, 220),
    "yellow": (245, 220, 50),
    "purple": (140, 50, 170),
    "orange": (250, 140, 30),
    "black": (20, 20, 20),
    "white": (250, 250, 250),
}
SHAPES = ("circle", "square", "triangle", "star")
#: Places of a shape: the offset from the centre to the right and downwards, in steps of `STEP`.
PLACES = {"left": (-1, 0), "right": (1, 0), "top": (0, -1), "bottom": (0, 1), "centre": (0, 0)}
ROW, COLUMN = ("left", "centre", "right"), ("top", "centre", "bottom")
#: A fraction of the image's width or height.
STEP = 0.32

#: The kinds of questions of `ask_about`.
KINDS = ("caption", "count", "colour", "shape", "background", "is_there")
#: Phrases that ask for a caption.
DESCRIBE = (
    "describe this image",
    "Describe this image.",
    "Describe the image.",
    "describe the picture",
    "Describe this image in detail.",
    "Describe this image in one sentence.",
    "Please describe this image.",
    "What is in this image?",
    "what do you see?",
    "caption this image",
    "Write a caption.",
    "Caption:",
    "Please describe the image shortly.",
    "Describe the image in detail.",
    "What's in the picture?",
)


@dataclass(frozen=True)
class Thing:
    """A shape with a colour and a place, named as in SHAPES, COLOURS and PLACES."""

    shape: str
    colour: str
    place: str

    def __str__(self) -> str:
        return f"{_article(self.colour)} {self.colour} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """One to three shapes on a background of one colour, ordered from left to right or from top to bottom."""

    background: str
    things: tuple[Thing, ...]


def make_scene(rng: Random) -> Scene:
    """Return a random scene of one to three different shapes.

    Two or three shapes are in one row or one column, so that a caption is unambiguous.
    """
    background = rng.choice(list(COLOURS))
    count = rng.choice((1, 1, 2, 2, 3))
    if count == 1:
        places = [rng.choice(list(PLACES))]
    else:
        line = rng.choice((ROW, COLUMN))
        places = sorted(rng.sample(line, count), key=line.index)
    things: list[Thing] = []
    seen: set[tuple[str, str]] = set()
    for place in places:
        while True:
            pair = rng.choice(SHAPES), rng.choice([colour for colour in COLOURS if colour != background])
            if pair not in seen:
                break
        seen.add(pair)
        things.append(Thing(*pair, place))
    return Scene(background, tuple(things))


def draw_scene(scene: Scene, width: int, height: int, rng: Random, mask: Image.Image | None = None) -> Image.Image:
    """Return an RGB image of the scene; colours, places, sizes and angles vary slightly with `rng`.

    Args:
        scene: The scene.
        width: Width in pixels.
        height: Height in pixels.
        rng: Source of randomness.
        mask: An "L" image of the same size. Pixels that a shape covers are set to 1 + the shape's index in SHAPES.
    """
    image = Image.new("RGB", (width, height), _vary(COLOURS[scene.background], 8, rng))
    image_pen, mask_pen = ImageDraw.Draw(image), ImageDraw.Draw(mask) if mask else None
    max_radius = 0.15 if len(scene.things) > 1 else 0.2
    for thing in scene.things:
        right, down = PLACES[thing.place]
        x = width * (0.5 + STEP * right + rng.uniform(-0.03, 0.03))
        y = height * (0.5 + STEP * down + rng.uniform(-0.03, 0.03))
        radius = min(width, height) * rng.uniform(0.12, max_radius)
        fill, turn = _vary(COLOURS[thing.colour], 10, rng), rng.uniform(-0.15, 0.15)
        _draw_shape(image_pen, thing.shape, x, y, radius, turn, fill)
        if mask_pen:
            _draw_shape(mask_pen, thing.shape, x, y, radius, turn, 1 + SHAPES.index(thing.shape))
    return image


def caption(scene: Scene) -> str:
    """Return the unique description of a scene: shapes, their order or place, and the background."""
    things, background = scene.things, f"on {_article(scene.background)} {scene.background} background"
    if len(things) == 1:
        where = {
            "left": "on the left",
            "right": "on the right",
            "top": "at the top",
            "bottom": "at the bottom",
            "centre": "in the centre",
        }[things[0].place]
        return f"{things[0]} {where} {background}"
    in_row = all(thing.place in ROW for thing in things)
    if len(things) == 2:
        return f"{things[0]} {'left of' if in_row else 'above'} {things[1]} {background}"
    order = "from left to right" if in_row else "from top to bottom"
    return f"{things[0]}, {things[1]} and {things[2]} {order} {background}"


def ask_about(scene: Scene, kind: str, rng: Random) -> tuple[str, str] | None:
    """Return a question and its answer, or None if the kind does not fit the scene.

    "colour" does not fit if no shape occurs only once, and "shape" does not fit if no colour does.

    Args:
        scene: The scene.
        kind: One of KINDS.
        rng: Source of randomness.

    Raises:
        ValueError: The kind is unknown.
    """
    things = scene.things
    if kind == "caption":
        return rng.choice(DESCRIBE), caption(scene)
    if kind == "count":
        questions = ("how many shapes are there?", "How many shapes are in this image?", "count the shapes")
        return rng.choice(questions), str(len(things))
    if kind == "colour":
        single = [thing for thing in things if sum(other.shape == thing.shape for other in things) == 1]
        if not single:
            return None
        thing = rng.choice(single)
        return rng.choice((f"what colour is the {thing.shape}?", f"What color is the {thing.shape}?")), thing.colour
    if kind == "shape":
        single = [thing for thing in things if sum(other.colour == thing.colour for other in things) == 1]
        if not single:
            return None
        thing = rng.choice(single)
        return rng.choice((f"what shape is {thing.colour}?", f"which shape is {thing.colour}?")), thing.shape
    if kind == "background":
        return rng.choice(("what colour is the background?", "What is the background color?")), scene.background
    if kind == "is_there":
        shape = rng.choice(SHAPES)
        question = rng.choice((f"is there a {shape}?", f"Is there a {shape} in the image?"))
        return question, "yes" if _has(scene, shape) else "no"
    raise ValueError(f"unknown kind of question {kind!r}; the kinds are {', '.join(KINDS)}")


def ask_about_pair(first: Scene, second: Scene, rng: Random) -> tuple[str, str]:
    """Return a question about two images and its answer: "image 1", "image 2", "both" or "neither"."""
    shape = rng.choice(SHAPES)
    answers = {(True, False): "image 1", (False, True): "image 2", (True, True): "both", (False, False): "neither"}
    question = rng.choice((f"which image has a {shape}?", f"Which image has a {shape}?"))
    return question, answers[_has(first, shape), _has(second, shape)]


def _has(scene: Scene, shape: str) -> bool:
    return any(thing.shape == shape for thing in scene.things)


def _article(colour: str) -> str:
    return "an" if colour == "orange" else "a"


def _vary(colour: RGB, limit: int, rng: Random) -> RGB:
    """Return the colour with each channel changed by at most `limit`, clipped to 0 … 255."""
    red, green, blue = (max(0, min(255, channel + rng.randint(-limit, limit))) for channel in colour)
    return red, green, blue


def _draw_shape(
    pen: ImageDraw.ImageDraw, shape: str, x: float, y: float, radius: float, turn: float, fill: RGB | int
) -> None:
    """Draw a shape around (x, y), in pixels, rotated by `turn` radians."""
    if shape == "circle":
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=fill)
        return
    if shape == "square":
        corners = [(1.2, math.pi / 4 + k * math.pi / 2) for k in range(4)]
    elif shape == "triangle":
        corners = [(1.25, -math.pi / 2 + k * 2 * math.pi / 3) for k in range(3)]
    else:
        corners = [(1.3 if k % 2 == 0 else 0.52, -math.pi / 2 + k * math.pi / 5) for k in range(10)]
    pen.polygon(
        [
            (x + scale * radius * math.cos(turn + angle), y + scale * radius * math.sin(turn + angle))
            for scale, angle in corners
        ],
        fill=fill,
    )
