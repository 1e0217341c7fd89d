"""The toy's pictures are what their captions say, and the judge can tell."""

import math

import numpy as np
import pytest
from PIL import Image

from common import CAPTION_WORDS
from toy.shapes import (
    COLORS, RELATIONS, SCORES, SHAPES, Object, Scene, describe, judge, parse, read, render, sample, scene,
    scores)

RED = Object("red", "circle", 18, 30, 10)
BLUE = Object("blue", "square", 46, 34, 9)
GREEN = Object("green", "cross", 32, 53, 9)
CAPTION = "a red circle left of a blue square"


@pytest.fixture(scope="module")
def samples():
    return [sample(1, index) for index in range(200)]


def test_a_sample_depends_on_its_numbers_alone(samples):
    image, text = sample(1, 7)
    assert np.array_equal(image, samples[7][0]) and text == samples[7][1] == describe(scene(1, 7))
    assert len({image.tobytes() for image, _ in [*samples, sample(2, 3)]}) == len(samples) + 1


def test_captions_say_what_the_scene_is():
    assert describe(Scene([RED, BLUE], "left of")) == CAPTION
    scenes = [scene(0, index) for index in range(1000)]
    for s in scenes:
        assert parse(describe(s)) == ([(o.color, o.shape) for o in s.objects], s.relation)
    assert {word for s in scenes for word in describe(s).split()} == {*CAPTION_WORDS}
    for text in ("", "left of", "a pink koala", "a red circle and a red square"):
        with pytest.raises(ValueError):
            parse(text)
    shares = [np.mean([len(s.objects) == 1 for s in scenes])]
    shares += [np.mean([s.relation == relation for s in scenes]) for relation in RELATIONS]
    assert shares == pytest.approx([1 / 4] + [1 / 8] * 4, abs=0.04)


def test_the_judge_tells_true_captions_from_those_of_other_pictures(samples):
    images, captions = zip(*samples)
    assert scores(images, captions) == {"color": 1.0, "shape": 1.0, "spatial": 1.0}
    for index in range(50):
        for seen, drawn in zip(sorted(read(images[index])), sorted(scene(1, index).objects), strict=True):
            assert seen[:2] == drawn[:2] and seen[2:] == pytest.approx(drawn[2:], abs=1)  # places to a pixel
    pairs = len(COLORS) * (len(COLORS) - 1) / 2
    one, two = 0.25**2 / len(COLORS), 0.75**2 / pairs           # as many objects, of the same colors
    chance = {"color": one + two, "shape": one / len(SHAPES) + two / len(SHAPES)**2,
              "spatial": 0.75 / pairs / len(RELATIONS)}          # 0.048, 0.005 and 0.013
    assert scores(images, captions[1:] + captions[:1]) == pytest.approx(chance, abs=0.03)


@pytest.mark.parametrize("objects, expected", [
    pytest.param([RED, BLUE], (1, 1, 1), id="as asked"),
    pytest.param([RED], (0, 0, 0), id="one missing"),
    pytest.param([RED, BLUE, GREEN], (0, 0, 1), id="one more"),
    pytest.param([RED, BLUE, GREEN._replace(color="red")], (0, 0, 0), id="one color twice"),
    pytest.param([RED._replace(color="blue"), BLUE._replace(color="red")], (1, 0, 0), id="colors"),
    pytest.param([RED._replace(shape="square"), BLUE._replace(shape="circle")], (1, 0, 1), id="shapes"),
    pytest.param([RED._replace(x=46), BLUE._replace(x=18)], (1, 1, 0), id="places"),
    pytest.param([RED._replace(x=30, y=15), BLUE._replace(x=34, y=50)], (1, 1, 0), id="wrong axis"),
])
def test_each_fault_costs_its_score(objects, expected):
    picture = render(Scene(objects, None))
    assert judge(picture, CAPTION) == dict(zip(SCORES, expected))
    assert math.isnan(judge(picture, CAPTION.replace("left of", "and"))["spatial"])


def test_the_judge_names_only_what_it_knows():
    picture = np.array(render(Scene([RED], None))) - 8           # not quite the colors
    picture[50:54, 50:54] = COLORS["blue"]                      # a speck is no object
    assert [*judge(Image.fromarray(picture), "a red circle").values()][:2] == [1, 1]
    picture[48:54, 10:60] = COLORS["blue"]                      # a bar is no square
    picture[5:20, 40:55] = (120, 120, 120)                       # gray has no name
    seen = {(o.color, o.shape) for o in read(Image.fromarray(picture))}
    assert seen == {("red", "circle"), ("blue", None), (None, "square")}
