"""
Captioned pictures of shapes, made on the fly, and the judge that reads them back.

A picture is a pure function of (seed, index): one or two flat shapes on a plain background, with a caption
such as "a red circle left of a blue square". Nothing is stored: the training set is endless.

    image, caption = sample(seed=0, index=7)        # a 64 x 64 picture and its caption
    judge(image, caption)                           # {"color": 1.0, "shape": 1.0, "spatial": 1.0}

The judge's color, shape and spatial scores are the toy's T2I-CompBench (Huang et al., 2023). It asks a
VQA model about each object and multiplies the answers; this judge reads the pixels, and a score is 0 or 1.

Coordinates are in pixels from the top left corner; y grows downward.
"""

import math
import re
from collections import Counter
from typing import Iterable, Iterator, NamedTuple

import numpy as np
from PIL import Image

SIZE = 64                           # height and width of a picture
MARGIN, GAP = 2, 3                  # least distance to the border, and between two objects
RADII = range(9, 14)                # half the side of the box around an object
BACKGROUND = (238, 238, 232)
COLORS = {
    "red":    (220,  40,  45),
    "orange": (245, 140,  20),
    "yellow": (245, 220,  50),
    "green":  (40,  160,  70),
    "blue":   (40,   90, 220),
    "purple": (150,  50, 180),
}
SHAPES = {                          # is (u, v) inside? the box around the object is -1..1 both ways
    "circle":   lambda u, v: u * u + v * v <= 1,
    "square":   lambda u, v: np.maximum(abs(u), abs(v)) <= 1,
    "triangle": lambda u, v: (2 * abs(u) <= v + 1) & (v <= 1),
    "cross":    lambda u, v: (np.maximum(abs(u), abs(v)) <= 1) & (np.minimum(abs(u), abs(v)) <= 1 / 3),
}
TRAIN_SEED, JUDGE_SEED = 0, 1       # judged scenes are not trained on
SCORES = ("color", "shape", "spatial")  # the judge's
RELATIONS = ("left of", "right of", "above", "below")


# ------------------------------------------------------------------------------------------------------------
# Pictures


class Object(NamedTuple):
    color: str | None               # None: the judge found a color that has no name here
    shape: str | None               # None: the judge found a blob
    x: float                        # center of the box around the object
    y: float
    radius: float


class Scene(NamedTuple):
    objects: list[Object]           # one, or two of different colors
    relation: str | None            # of the first object to the second, if the caption says it


def relate(a: Object, b: Object, dominance: float = 1.0) -> str | None:
    """
    Where `a` lies, seen from `b`.

    None unless they are more than `dominance` times as far apart along one axis as along the other.
    """
    dx, dy = a.x - b.x, a.y - b.y
    if abs(dx) > dominance * abs(dy):
        return "left of" if dx < 0 else "right of"
    if abs(dy) > dominance * abs(dx):
        return "above" if dy < 0 else "below"
    return None


def scene(seed: int, index: int) -> Scene:
    """
    The scene with this number: a quarter have one object, a quarter two, and half two and their relation.

    Both numbers are non-negative integers. Scenes of different numbers are independent of each other.
    """
    rng = np.random.default_rng((seed, index))
    kind = rng.choice(["one", "two", "relation"], p=[0.25, 0.25, 0.5])
    colors = rng.permutation(list(COLORS)).tolist()
    while True:
        objects = []
        for color in colors[:1 if kind == "one" else 2]:
            radius = int(rng.integers(RADII.start, RADII.stop))
            x, y = rng.integers(MARGIN + radius, SIZE - MARGIN - radius, size=2, endpoint=True).tolist()
            objects.append(Object(color, list(SHAPES)[rng.integers(len(SHAPES))], x, y, radius))
        if kind == "one":
            return Scene(objects, None)
        a, b = objects
        # The positions give the relation, so all four are equally likely; ambiguous ones are redrawn.
        relation = relate(a, b, dominance=1.5) if kind == "relation" else None
        apart = max(abs(a.x - b.x), abs(a.y - b.y)) >= a.radius + b.radius + GAP
        if apart and (relation or kind == "two"):
            return Scene(objects, relation)


def describe(scene: Scene) -> str:
    """The caption of a scene."""
    nouns = [f"{'an' if o.color[0] in 'aeiou' else 'a'} {o.color} {o.shape}" for o in scene.objects]
    return f" {scene.relation or 'and'} ".join(nouns)


def coverage(o: Object) -> np.ndarray:
    """How much of each pixel the object covers: (SIZE, SIZE), 0..1, from 4 x 4 points in each pixel."""
    points = (np.arange(4 * SIZE, dtype=np.float32) + 0.5) / 4
    inside = SHAPES[o.shape]((points[None, :] - o.x) / o.radius, (points[:, None] - o.y) / o.radius)
    # 240 = 15 * 16: the means of 16 points stay whole numbers.
    return np.asarray(Image.fromarray(inside.astype(np.uint8) * 240).reduce(4)) / np.float32(240)


def render(scene: Scene) -> Image.Image:
    """The picture of a scene, RGB, SIZE x SIZE, anti-aliased."""
    picture = np.full((SIZE, SIZE, 3), BACKGROUND, dtype=np.float32)
    for o in scene.objects:
        picture += coverage(o)[..., None] * (np.float32(COLORS[o.color]) - picture)
    return Image.fromarray(picture.round().astype(np.uint8))


def judge_captions(count: int) -> list[str]:
    """Captions to judge on, of scenes not trained on."""
    return [describe(scene(JUDGE_SEED, i)) for i in range(count)]


def sample(seed: int, index: int) -> tuple[Image.Image, str]:
    """A picture and its caption, always the same for the same two non-negative integers."""
    drawn = scene(seed, index)
    return render(drawn), describe(drawn)


# ------------------------------------------------------------------------------------------------------------
# The judge


def parse(caption: str) -> tuple[list[tuple[str, str]], str | None]:
    """
    What a caption asks for: [(color, shape), ...] and the relation of the first to the second, or None.

    Raises ValueError, in one line, for what the toy cannot read.
    """
    noun = f"an? ({'|'.join(COLORS)}) ({'|'.join(SHAPES)})"
    match = re.fullmatch(f"{noun}(?: (and|{'|'.join(RELATIONS)}) {noun})?", " ".join(caption.lower().split()))
    if not match or match[1] == match[4]:
        raise ValueError(f'the toy cannot read "{caption}". It reads "a COLOR SHAPE", or two of different '
                         f'colors joined by one of: {", ".join(("and", *RELATIONS))}')
    objects = [(match[1], match[2]), (match[4], match[5])]
    return objects[:2 if match[3] else 1], None if match[3] == "and" else match[3]


def segment(picture: np.ndarray) -> np.ndarray:
    """The color of each pixel: (H, W, 3) in 0..255 -> (H, W) index into COLORS, -1 for the background."""
    # A rim pixel is a mixture: background + share * (color - background). By its distance to the colors,
    # the rim of red would be orange; by its distance to these mixtures it is red, as it should be.
    away = picture - np.float32(BACKGROUND)                                     # (H, W, 3)
    rays = np.float32(list(COLORS.values())) - np.float32(BACKGROUND)          # (6, 3)
    share = ((away @ rays.T) / (rays ** 2).sum(axis=1)).clip(0, 1)              # (H, W, 6)
    error = ((away[:, :, None] - share[..., None] * rays) ** 2).sum(axis=-1)    # (H, W, 6)
    nearest = error.argmin(axis=-1)                                             # (H, W)
    return np.where(np.take_along_axis(share, nearest[..., None], axis=-1)[..., 0] >= 0.5, nearest, -1)


def components(mask: np.ndarray) -> Iterator[np.ndarray]:
    """The 4-connected parts of a mask (H, W), each as a mask, the topmost first."""
    todo = set(map(tuple, np.argwhere(mask).tolist()))
    while todo:
        edge, part = [min(todo)], np.zeros_like(mask)
        todo.remove(edge[0])
        while edge:
            y, x = edge.pop()
            part[y, x] = True
            near = {(y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)} & todo
            todo -= near
            edge.extend(near)
        yield part


def read(image: Image.Image) -> list[Object]:
    """
    The objects in a picture of SIZE x SIZE, even noisy or blurred, in the order of COLORS.

    `read(render(scene))` returns the scene's objects, to about a pixel.
    Raises ValueError for a picture of another size.
    """
    if image.size != (SIZE, SIZE):
        raise ValueError(f"the judge reads {SIZE} x {SIZE} pixels, not {image.width} x {image.height}")
    picture = np.asarray(image.convert("RGB"), dtype=np.float32)
    labels = segment(picture)
    parts = [part for i in range(len(COLORS)) for part in components(labels == i)]
    found = []
    for part in parts:
        if part.sum() < 40:         # a speck: a quarter of the smallest object
            continue
        # The nearest color need not be near: a pale, gray or brown object has none of the names. 60 is well
        # above what noise does to a median, and the two most similar colors are 85 apart.
        paint = np.median(picture[part], axis=0)
        error = {name: np.linalg.norm(paint - rgb) for name, rgb in COLORS.items()}
        color = min(error, key=error.get)
        places = np.argwhere(part)
        (top, left), (bottom, right) = places.min(axis=0).tolist(), (places.max(axis=0) + 1).tolist()
        x, y, radius = (left + right) / 2, (top + bottom) / 2, (right - left + bottom - top) / 4
        overlap = {}                # intersection over union with the ideal of each shape in this box
        for shape in SHAPES:
            ideal = coverage(Object(color, shape, x, y, radius)) >= 0.5
            overlap[shape] = (part & ideal).sum() / (part | ideal).sum()
        shape = max(overlap, key=overlap.get)
        found.append(Object(color if error[color] < 60 else None,
                            shape if overlap[shape] >= 0.75 else None, x, y, radius))
    return found


def judge(image: Image.Image, caption: str) -> dict[str, float]:
    """
    Whether a picture shows what its caption says: 1.0 or 0.0 for each of SCORES.

    color    the objects have exactly the caption's colors: one each, none missing, none extra
    shape    and each color has its own shape (attribute binding)
    spatial  each of its two colors is there once, in the caption's relation; nan if the caption has none

    Raises ValueError if `parse` rejects the caption or `read` the picture.
    """
    asked, relation = parse(caption)
    found = read(image)
    color = Counter(o.color for o in found) == Counter(name for name, _ in asked)
    shape = Counter((o.color, o.shape) for o in found) == Counter(asked)
    spatial = math.nan
    if relation:
        first, second = ([o for o in found if o.color == name] for name, _ in asked)
        spatial = float(len(first) == len(second) == 1 and relate(first[0], second[0]) == relation)
    return dict(zip(SCORES, (float(color), float(shape), spatial)))


def scores(images: Iterable[Image.Image], captions: Iterable[str]) -> dict[str, float]:
    """The mean of each of the judge's scores over the captions it applies to; nan if there is none."""
    verdicts = [list(judge(*pair).values()) for pair in zip(images, captions, strict=True)]
    return dict(zip(SCORES, np.nanmean(verdicts, axis=0).tolist()))
