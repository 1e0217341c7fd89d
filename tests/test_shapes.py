"""The toy's pictures are what their captions say, and the judge can tell."""

import io

import numpy as np
import pytest
from PIL import Image, ImageFilter

from toy.shapes import (
    COLOURS, GAP, MARGIN, RELATIONS, SCORES, SHAPES, SIZE, WORDS, Object, Scene, caption, coverage, describe,
    judge, parse, read, render, sample, scene, scores)

RED = Object("red", "circle", 18, 30, 10)
BLUE = Object("blue", "square", 46, 34, 9)
CAPTION = "a red circle left of a blue square"


@pytest.fixture(scope="module")
def samples():
    return [sample(1, index) for index in range(300)]


def test_a_sample_depends_on_its_numbers_alone(samples):
    for index in (7, 3):            # out of order, after others
        image, text = sample(1, index)
        assert np.array_equal(image, samples[index][0]) and text == samples[index][1] == caption(1, index)
    assert (image.mode, image.size) == ("RGB", (SIZE, SIZE))
    assert len({image.tobytes() for image, _ in samples}) == len(samples)
    assert sample(2, 3)[0].tobytes() != image.tobytes()


def test_captions_say_what_the_scene_is():
    assert describe(Scene([RED, BLUE], "left of")) == CAPTION
    assert describe(Scene([RED._replace(colour="orange")], None)) == "an orange circle"
    scenes = [scene(0, index) for index in range(2000)]
    for s in scenes:
        assert parse(describe(s)) == ([(o.colour, o.shape) for o in s.objects], s.relation)
        assert len({o.colour for o in s.objects}) == len(s.objects)
    assert sorted({word for s in scenes for word in describe(s).split()}) == sorted(WORDS)
    shares = [np.mean([len(s.objects) == 1 for s in scenes])]
    shares += [np.mean([s.relation == r for s in scenes]) for r in RELATIONS]
    assert shares == pytest.approx([1 / 4] + [1 / 8] * 4, abs=0.03)


def test_objects_keep_their_distance():
    for s in (scene(2, index) for index in range(300)):
        boxes = []                  # of every pixel touched: first and last, in y and x
        for o in s.objects:
            places = np.argwhere(coverage(o) > 0)
            boxes.append((places.min(axis=0), places.max(axis=0)))
            assert boxes[-1][0].min() >= MARGIN and boxes[-1][1].max() < SIZE - MARGIN
        if len(boxes) == 2:
            (first_a, last_a), (first_b, last_b) = boxes
            between = np.maximum(first_b - last_a, first_a - last_b) - 1
            assert between.max() >= GAP
            if s.relation:
                assert between.argmax() == (0 if s.relation in ("above", "below") else 1)


def test_the_judge_reads_every_true_picture(samples):
    assert scores(*zip(*samples)) == {"colour": 1.0, "shape": 1.0, "spatial": 1.0}
    for index in range(50):
        order = list(COLOURS).index
        drawn = sorted(scene(1, index).objects, key=lambda o: order(o.colour))
        for seen, o in zip(read(samples[index][0]), drawn, strict=True):
            assert (seen.colour, seen.shape) == (o.colour, o.shape)
            assert (seen.x, seen.y, seen.radius) == pytest.approx((o.x, o.y, o.radius), abs=1)


def test_captions_of_other_pictures_score_at_chance(samples):
    images, captions = zip(*samples)
    score = scores(images, captions[1:] + captions[:1])
    pairs = len(COLOURS) * (len(COLOURS) - 1) / 2
    one, two = 0.25 ** 2 / len(COLOURS), 0.75 ** 2 / pairs       # as many objects, of the same colours
    assert score["colour"] == pytest.approx(one + two, abs=0.04)    # 0.048
    assert score["shape"] == pytest.approx(one / len(SHAPES) + two / len(SHAPES) ** 2, abs=0.015)    # 0.005
    assert score["spatial"] == pytest.approx(0.75 / pairs / len(RELATIONS), abs=0.03)    # 0.013


def noise(image, std=10):
    values = np.asarray(image) + np.random.default_rng(0).normal(0, std, (SIZE, SIZE, 3))
    return Image.fromarray(values.round().clip(0, 255).astype(np.uint8))


def jpeg(image, quality=50):
    file = io.BytesIO()
    image.save(file, "jpeg", quality=quality)
    return Image.open(file)


def blur(image, radius=1):
    return image.filter(ImageFilter.GaussianBlur(radius))


@pytest.mark.parametrize("harm", [noise, blur, jpeg, lambda image: noise(blur(image))],
                         ids=["noise", "blur", "jpeg", "both"])
def test_the_judge_reads_imperfect_pictures(samples, harm):
    images, captions = zip(*samples[:80])
    assert min(scores(map(harm, images), captions).values()) >= 0.95


@pytest.mark.parametrize("objects, expected", [
    pytest.param([RED, BLUE], (1, 1, 1), id="as asked"),
    pytest.param([RED], (0, 0, 0), id="one missing"),
    pytest.param([], (0, 0, 0), id="nothing"),
    pytest.param([RED, BLUE, Object("green", "cross", 32, 53, 9)], (0, 0, 1), id="one more"),
    pytest.param([RED, BLUE, Object("red", "circle", 32, 53, 9)], (0, 0, 0), id="one twice"),
    pytest.param([RED, BLUE._replace(colour="purple")], (0, 0, 0), id="another colour"),
    pytest.param([RED._replace(colour="blue"), BLUE._replace(colour="red")], (1, 0, 0), id="swap colours"),
    pytest.param([RED._replace(shape="square"), BLUE._replace(shape="circle")], (1, 0, 1), id="swap shapes"),
    pytest.param([RED._replace(x=46), BLUE._replace(x=18)], (1, 1, 0), id="swap places"),
    pytest.param([RED._replace(x=30, y=15), BLUE._replace(x=34, y=50)], (1, 1, 0), id="wrong axis"),
])
def test_each_fault_costs_its_score(objects, expected):
    verdict = judge(render(Scene(objects, None)), CAPTION)
    assert verdict == dict(zip(SCORES, expected))
    assert judge(render(Scene(objects, None)), CAPTION.replace("left of", "and"))["spatial"] is None


def test_the_judge_names_only_what_it_knows():
    picture = np.array(render(Scene([RED], None)))
    picture[50:54, 50:54] = COLOURS["blue"]                             # a speck is no object
    assert judge(Image.fromarray(picture), "a red circle") == {"colour": 1, "shape": 1, "spatial": None}
    picture[48:54, 10:60] = COLOURS["blue"]                             # a bar is no square
    picture[5:20, 40:55] = (120, 120, 120)                              # grey has no name
    assert {(o.colour, o.shape) for o in read(Image.fromarray(picture))} == {
        ("red", "circle"), ("blue", None), (None, "square")}
    with pytest.raises(ValueError, match="not 32 x 64"):
        read(Image.new("RGB", (32, 64)))


def test_bad_captions_are_refused_in_one_line():
    with pytest.raises(ValueError, match=f"does not know: koala, pink. It knows: {', '.join(WORDS)}$"):
        parse("a koala left of a pink koala")
    for text in ("", "left of", "a red circle a blue square", "a red circle and a red square"):
        with pytest.raises(ValueError, match=f'cannot read "{text}".*COLOUR SHAPE.*and, left of'):
            parse(text)
    assert parse("A red circle  LEFT of an blue square") == parse(CAPTION)
    assert np.isnan(scores([render(Scene([RED], None))], ["a red circle"])["spatial"])
