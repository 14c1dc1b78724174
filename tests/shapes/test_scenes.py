"""Scenes: image, caption, questions and answers agree for every seed."""

from random import Random

import pytest
from PIL import Image

from batchvl.shapes.scenes import (
    COLOURS,
    COLUMN,
    KINDS,
    PLACES,
    RGB,
    ROW,
    SHAPES,
    STEP,
    Scene,
    Thing,
    ask_about,
    ask_about_pair,
    caption,
    draw_scene,
    make_scene,
)

SEEDS = range(200)
SIZES = [(144, 144), (224, 112), (112, 224)]


def colour_at(image: Image.Image, x: float, y: float) -> str:
    """Return the name of the colour nearest to a pixel's; x and y are fractions of width and height."""
    pixel = image.getpixel((int(x * image.width), int(y * image.height)))
    assert isinstance(pixel, tuple)

    def distance(colour: RGB) -> float:
        return sum((a - b) ** 2 for a, b in zip(pixel, colour, strict=True))

    return min(COLOURS, key=lambda name: distance(COLOURS[name]))


def position(place: str) -> tuple[float, float]:
    right, down = PLACES[place]
    return 0.5 + STEP * right, 0.5 + STEP * down


@pytest.mark.parametrize("size", SIZES)
def test_every_shape_has_its_colour_at_its_place_on_the_background(size: tuple[int, int]) -> None:
    for seed in SEEDS:
        rng = Random(seed)
        scene = make_scene(rng)
        image = draw_scene(scene, *size, rng)
        assert (image.mode, image.size) == ("RGB", size)
        colours = {thing.place: thing.colour for thing in scene.things}
        for place in PLACES:
            assert colour_at(image, *position(place)) == colours.get(place, scene.background), (seed, place)
        for corner in ((0.0, 0.0), (0.99, 0.0), (0.0, 0.99), (0.99, 0.99)):
            assert colour_at(image, *corner) == scene.background


def test_the_mask_marks_the_pixels_of_each_shape() -> None:
    for seed in SEEDS:
        rng = Random(seed)
        scene = make_scene(rng)
        mask = Image.new("L", (144, 144))
        image = draw_scene(scene, 144, 144, rng, mask)
        background = image.getpixel((0, 0))
        assert all(
            (mask.getpixel((x, y)) == 0) == (image.getpixel((x, y)) == background)
            for x in range(0, 144, 3)
            for y in range(0, 144, 3)
        )
        for thing in scene.things:
            x, y = position(thing.place)
            assert mask.getpixel((int(x * 144), int(y * 144))) == 1 + SHAPES.index(thing.shape)


def test_the_shapes_have_the_areas_that_geometry_predicts() -> None:
    areas = {}
    for shape in SHAPES:
        mask = Image.new("L", (144, 144))
        draw_scene(Scene("white", (Thing(shape, "black", "centre"),)), 144, 144, Random(0), mask)
        areas[shape] = sum(value > 0 for value in mask.tobytes()) / 144**2
    # In units of the squared radius: star 1.99, triangle 2.03, square 2.88, circle 3.14.
    assert areas["star"] / areas["circle"] == pytest.approx(1.99 / 3.14, rel=0.06)
    assert areas["triangle"] / areas["circle"] == pytest.approx(2.03 / 3.14, rel=0.06)
    assert areas["square"] / areas["circle"] == pytest.approx(2.88 / 3.14, rel=0.06)


def test_a_seed_determines_scene_image_and_questions() -> None:
    def everything(seed: int) -> tuple[object, ...]:
        rng = Random(seed)
        scene = make_scene(rng)
        pixels = draw_scene(scene, 144, 144, rng).tobytes()
        return scene, pixels, [ask_about(scene, kind, rng) for kind in KINDS]

    assert all(everything(seed) == everything(seed) for seed in SEEDS)
    assert len({everything(seed)[1] for seed in SEEDS}) == len(SEEDS)


def test_the_scenes_are_those_that_the_model_was_trained_on() -> None:
    scenes = [make_scene(Random(seed)) for seed in (1, 2, 6)]
    assert [caption(scene) for scene in scenes] == [
        "a purple star, a white star and a red square from left to right on a blue background",
        "a white triangle on the left on a red background",
        "a black square above a white star on a green background",
    ]


def test_a_scene_has_one_to_three_different_shapes_in_reading_order() -> None:
    counts = set()
    for seed in SEEDS:
        scene = make_scene(Random(seed))
        places = [thing.place for thing in scene.things]
        counts.add(len(places))
        assert len({(thing.shape, thing.colour) for thing in scene.things}) == len(places)
        assert scene.background not in {thing.colour for thing in scene.things}
        if len(places) > 1:
            line = ROW if set(places) <= set(ROW) else COLUMN
            assert places == [place for place in line if place in places]
    assert counts == {1, 2, 3}


def test_scenes_with_the_same_caption_have_the_same_shapes() -> None:
    contents: dict[str, tuple[object, ...]] = {}
    repeats = 0
    for seed in range(20_000):
        scene = make_scene(Random(seed))
        content = (scene.background, [(thing.shape, thing.colour) for thing in scene.things])
        repeats += caption(scene) in contents
        assert contents.setdefault(caption(scene), content) == content
    assert repeats > 1000


@pytest.mark.parametrize(
    ("scene", "expected"),
    [
        (Scene("orange", (Thing("star", "red", "top"),)), "a red star at the top on an orange background"),
        (
            Scene("blue", (Thing("circle", "orange", "left"), Thing("star", "red", "centre"))),
            "an orange circle left of a red star on a blue background",
        ),
        (
            Scene(
                "white", tuple(Thing("square", colour, place) for colour, place in zip(COLOURS, COLUMN, strict=False))
            ),
            "a red square, a green square and a blue square from top to bottom on a white background",
        ),
    ],
)
def test_caption(scene: Scene, expected: str) -> None:
    assert caption(scene) == expected


def test_answers_agree_with_the_scene() -> None:
    questions = dict.fromkeys(KINDS, 0)
    for seed in SEEDS:
        rng = Random(seed)
        scene = make_scene(rng)
        for kind in KINDS:
            if pair := ask_about(scene, kind, rng):
                question, answer = pair
                questions[kind] += 1
                assert answer == expected_answer(scene, kind, question), (seed, question)
    assert min(questions.values()) > len(SEEDS) / 2


def expected_answer(scene: Scene, kind: str, question: str) -> str:
    words = set(question.rstrip("?").split())
    if kind == "caption":
        return caption(scene)
    if kind == "count":
        return str(len(scene.things))
    if kind == "background":
        return scene.background
    if kind == "is_there":
        return "yes" if words & {thing.shape for thing in scene.things} else "no"
    matches = [thing for thing in scene.things if (thing.shape if kind == "colour" else thing.colour) in words]
    assert len(matches) == 1, "the question must have one answer"
    return matches[0].colour if kind == "colour" else matches[0].shape


def test_no_question_without_a_unique_answer() -> None:
    same_shape = Scene("white", (Thing("star", "red", "left"), Thing("star", "blue", "right")))
    same_colour = Scene("white", (Thing("star", "red", "left"), Thing("circle", "red", "right")))
    assert ask_about(same_shape, "colour", Random(0)) is None
    assert ask_about(same_colour, "shape", Random(0)) is None
    assert ask_about(same_shape, "shape", Random(0)) is not None
    assert ask_about(same_colour, "colour", Random(0)) is not None


def test_an_unknown_kind_is_an_error() -> None:
    with pytest.raises(ValueError, match="colours"):
        ask_about(make_scene(Random(0)), "colours", Random(0))


def test_answers_about_two_images_agree_with_both() -> None:
    answers = set()
    for seed in SEEDS:
        rng = Random(seed)
        first, second = make_scene(rng), make_scene(rng)
        question, answer = ask_about_pair(first, second, rng)
        shape = next(shape for shape in SHAPES if shape in question)
        matches = [
            name
            for name, scene in (("image 1", first), ("image 2", second))
            if any(thing.shape == shape for thing in scene.things)
        ]
        assert answer == {0: "neither", 1: "".join(matches), 2: "both"}[len(matches)]
        answers.add(answer)
    assert answers == {"image 1", "image 2", "both", "neither"}
