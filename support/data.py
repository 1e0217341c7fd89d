"""
Training data: pictures with captions from the toy, from a folder, or from img2dataset's shards, as samples at
the positions 0, 1, 2, ... of an endless, shuffled order.

What cannot be used is skipped and counted by reason, never fatal alone. Nothing here has a state: all that is
random about sample p comes from (seed, p), but with a cache its crop from (seed, picture). So it is the same
for any batch, any number of processes, and however often a run was stopped.
"""

import contextlib
import io
import json
import os
import struct
import sys
import tarfile
from array import array
from collections import Counter
from itertools import product
from pathlib import Path
from typing import Iterable, Iterator, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch.utils.data import Dataset

import files
from options import one_line
from toy import shapes

# ------------------------------------------------------------------------------------------------------------
# Sources: sample i is always the same


class Skip(Exception):
    """A sample that cannot be used; its text is the reason, under which it is counted."""


class Span(NamedTuple):
    """Bytes of a file: all of an image, or a member of a shard, or a line; `size` -1 is up to its end."""

    path: str
    start: int = 0
    size: int = -1

    def read(self) -> bytes:
        with open(self.path, "rb") as file:
            file.seek(self.start)
            return file.read(self.size)


IMAGES, FORMATS = (".jpg", ".jpeg", ".png", ".webp"), ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP")
LARGEST_MEMBER = 64 * 2**20  # bytes; what is larger is no image of a training set


class Shapes:
    """The toy's pictures, endless; sample i is always the same."""

    skipped = Counter()

    def __len__(self) -> int:
        return 2**31

    def load(self, index: int) -> tuple[Image.Image, str, tuple[int, int]]:
        picture, caption = shapes.sample(shapes.TRAIN_SEED, index)
        return picture, caption, picture.size[::-1]


PROMPTS = [  # for real models, in the four styles of HPSv2's (Wu et al., arXiv 2306.09341)
    f"{subject}, {style}" for subject, style in product(
        ("a portrait of an old fisherman", "a fox and a rabbit in the snow", "a castle above a foggy valley",
         "two children flying a kite", "a bowl of oranges beside a blue vase", "a tram in a rainy street",
         "a knight resting under a tree", "a koala on a branch"),
        ("anime", "concept art", "oil painting", "photo"))]


class Pairs:
    """
    A folder's images and captions: name.jpg with name.txt, or metadata.jsonl, or img2dataset's .tar shards.

    What has no partner is counted in `skipped` by reason, and so is a shard that is cut; what comes before
    the cut is used. Raises FileNotFoundError or ValueError if nothing is left.
    """

    KINDS = ("image", "txt", "json", "line")                     # of spans

    def __init__(self, folder: str, caption: str | None = None):
        self.caption, self.skipped = caption, Counter()
        root = Path(folder)
        if not root.is_dir():
            raise FileNotFoundError(f"--data: no folder {folder}; give one, or shapes")
        shards = sorted(path for path in root.rglob("*.tar") if path.is_file())
        if (root / "metadata.jsonl").is_file():
            items = self.from_metadata(root)
        elif shards:
            items = (item for shard in shards for item in self.pair(self.members(shard)))
        else:
            paths = (path for path in sorted(root.rglob("*")) if path.is_file())
            items = self.pair((str(path.relative_to(root)), Span(str(path))) for path in paths)
        # Millions of spans are numbers in one array: as objects they would take gigabytes in each process.
        places, numbers = {}, array("q")
        for item in items:
            for kind in self.KINDS:
                path, start, size = item.get(kind, Span(""))
                numbers.extend((places.setdefault(path, len(places)), start, size))
        self.paths = list(places)
        self.spans = np.frombuffer(numbers, np.int64).reshape(-1, len(self.KINDS), 3)
        if not len(self):
            raise ValueError(
                f"--data: {folder} has no image with a caption ({counted(self.skipped)}); see --help")

    def pair(self, named: Iterable[tuple[str, Span]]) -> Iterator[dict[str, Span]]:
        """Puts together files that differ in their ending alone."""
        groups = {}
        for name, span in named:
            stem, ending = os.path.splitext(name)
            kind = "image" if ending.lower() in IMAGES else ending.lower()[1:]
            if kind in ("image", "txt", "json"):
                if kind in groups.setdefault(stem, {}):
                    self.skipped["duplicate"] += kind == "image"
                groups[stem].setdefault(kind, span)
        for group in groups.values():
            if "image" not in group:
                self.skipped["no_image"] += "txt" in group
            elif "txt" not in group and not self.caption:
                self.skipped["no_caption"] += 1
            else:
                yield group

    def from_metadata(self, root: Path) -> Iterator[dict[str, Span]]:
        start = 0
        with open(root / "metadata.jsonl", "rb") as file:
            for line in file:
                try:
                    name = json.loads(line)["file_name"]
                    yield {"image": Span(str(root / name)), "line": Span(file.name, start, len(line))}
                except (ValueError, KeyError, TypeError, RecursionError):
                    self.skipped["bad_line"] += bool(line.strip())
                start += len(line)

    def members(self, shard: Path) -> Iterator[tuple[str, Span]]:
        """The files of a shard. A whole one ends in a block of zeros; tarfile does not look."""
        end, size, path = 0, shard.stat().st_size, str(shard)
        try:
            with tarfile.open(shard, "r:") as tar:
                for member in tar:
                    end = member.offset_data + -(-member.size // 512) * 512
                    if member.isreg() and member.size <= LARGEST_MEMBER and end <= size:
                        yield member.name, Span(path, member.offset_data, member.size)
        except tarfile.ReadError:
            pass
        if end > size or Span(path, end, 512).read() != bytes(512) or not end:
            self.skipped["bad_shard"] += 1
            print(f"warning: {shard} is cut or damaged after byte {min(end, size)}; the rest is lost",
                  file=sys.stderr)

    def item(self, index: int) -> dict[str, Span]:
        """What there is of a pair, by kind."""
        spans = (Span(self.paths[place], start, size) for place, start, size in self.spans[index].tolist())
        return {kind: span for kind, span in zip(self.KINDS, spans) if span.path}

    def __len__(self) -> int:
        return len(self.spans)

    def load(self, index: int) -> tuple[Image.Image, str, tuple[int, int]]:
        """An RGB image, its caption, and its original (height, width). Raises Skip."""
        item = self.item(index)
        caption = self.caption or read_caption(item)
        try:
            image = Image.open(io.BytesIO(item["image"].read()), formats=FORMATS)
        except OSError as error:
            raise Skip("unreadable" if error.errno else "bad_image") from None
        except Image.DecompressionBombError:
            raise Skip("too_large") from None
        except (ValueError, SyntaxError):
            raise Skip("bad_image") from None
        if image.width * image.height > Image.MAX_IMAGE_PIXELS:
            raise Skip("too_large")
        try:
            image = rgb(ImageOps.exif_transpose(image))
        except (OSError, ValueError, SyntaxError, TypeError, MemoryError, struct.error):  # EXIF has it all
            raise Skip("bad_image") from None
        height, width = image.height, image.width
        if "json" in item:                                       # img2dataset shrank it: sizes before that
            with contextlib.suppress(ValueError, KeyError, TypeError, OverflowError, RecursionError):
                info = json.loads(item["json"].read())
                height, width = int(info["original_height"]), int(info["original_width"])
        return image, caption, (height, width)


def read_caption(item: dict[str, Span]) -> str:
    """The caption of an item, its white space made single blanks; raises Skip if there is none."""
    try:
        if "txt" in item:
            text = item["txt"].read().decode("utf-8-sig")
        else:
            text = json.loads(item["line"].read())["text"]
            text.encode()  # JSON can spell halves of characters
    except UnicodeError:
        raise Skip("bad_encoding") from None
    except OSError:
        raise Skip("unreadable") from None
    except (ValueError, KeyError, AttributeError, RecursionError):
        raise Skip("no_caption") from None
    # Letters, digits and signs: `strip` alone would keep invisible ones, such as a zero-width space.
    if not any(character.isprintable() and not character.isspace() for character in text):
        raise Skip("blank_caption")
    return " ".join(text.split())


def rgb(image: Image.Image) -> Image.Image:
    """The first frame of any image as RGB: transparency on white, 16-bit grey scaled rather than clipped."""
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image).astype(np.float64) / 257).clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def counted(reasons: Counter) -> str:
    """How often each reason was, in words."""
    return ", ".join(f"{reason} {count}" for reason, count in sorted(reasons.items()) if count) or "none"


# ------------------------------------------------------------------------------------------------------------
# Samples


class Samples(Dataset):
    """
    Training sample p as a dictionary, for any p from 0.

    pixels (3, S, S) in [-1, 1] and caption, or what a cache has in their place; dropped, whether the caption
    is; time_ids (6,); timestep; noise and, to draw the latent from the VAE's distribution, latent_noise
    (4, s, s); index in the source; skipped, the reasons by index why others were not taken.
    """

    def __init__(self, source: Shapes | Pairs, size: int, latent_shape: tuple[int, int, int], seed: int,
                 dropout: float, flip: bool, cache: Path | None):
        self.source, self.size, self.latent_shape = source, size, latent_shape
        self.seed, self.dropout, self.flip, self.cache = seed, dropout, flip, cache
        self.epoch, self.order = None, None

    def index(self, p: int) -> int:
        """Which sample of the source is at position p: each epoch is a new permutation."""
        if isinstance(self.source, Shapes):
            return p
        epoch, place = divmod(p, len(self.source))
        if epoch != self.epoch:
            rng = np.random.default_rng((self.seed, 1, epoch))
            self.epoch, self.order = epoch, rng.permutation(len(self.source))
        return int(self.order[place])

    def __getitem__(self, p: int) -> dict:
        skipped = {}
        # A bad sample is replaced by the next good one; twice the length of the source has one whole epoch.
        for place in range(p, p + 2 * len(self.source)):
            index = self.index(place)
            try:
                sample = self.cached(index) or self.picture(index, p)
                break
            except Skip as reason:
                skipped[index] = str(reason)
        else:  # for the main process to raise: from a worker it would come with the worker's traceback
            return {"error": f"--data: no sample can be used: {counted(Counter(skipped.values()))}"}
        rng = np.random.default_rng((self.seed, 2, p))
        noise, latent_noise = rng.standard_normal((2, *self.latent_shape), dtype=np.float32)
        return sample | {
            "index": index, "skipped": skipped, "timestep": int(rng.integers(1000)),
            "dropped": bool(rng.random() < self.dropout), "noise": torch.from_numpy(noise),
            "latent_noise": torch.from_numpy(latent_noise)}

    def picture(self, index: int, p: int) -> dict:
        """An image resized by its short side, flipped, and only then cropped: the crop's place is as seen."""
        rng = np.random.default_rng((self.seed, 3, index if self.cache else p))
        image, caption, (height, width) = self.source.load(index)
        if min(image.size) < max(8, self.size // 8):
            raise Skip("too_small")
        scale = self.size / min(image.size)
        if max(image.size) * scale * self.size > Image.MAX_IMAGE_PIXELS:
            raise Skip("too_large")
        if scale != 1:
            sides = [max(self.size, round(side * scale)) for side in image.size]
            image = image.resize(sides, Image.Resampling.LANCZOS)
        if self.flip and rng.random() < 0.5:
            image = ImageOps.mirror(image)
        top, left = (int(rng.integers(side - self.size + 1)) for side in (image.height, image.width))
        image = image.crop((left, top, left + self.size, top + self.size))
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1) / 127.5 - 1
        time_ids = torch.tensor([height, width, top, left, self.size, self.size], dtype=torch.float32)
        return {"pixels": pixels, "caption": caption, "time_ids": time_ids}

    def cached(self, index: int) -> dict | None:
        """What a cache has of a sample; a damaged file is as good as none."""
        path = self.cache and in_cache(self.cache, index)
        if not path or not path.exists():
            return None
        with contextlib.suppress(ValueError):
            tensors = files.read_tensors(path)
            return tensors if set(tensors) == set(CACHED) else None


CACHED = ("mean", "std", "context", "pooled", "time_ids")  # what a sample need not be encoded for again


def in_cache(folder: Path, index: int) -> Path:
    return folder / f"{index:09d}.safetensors"


def write_cached(sample: dict, folder: Path):
    """Writes into a cache what it keeps of a sample."""
    path = in_cache(folder, sample["index"])
    tensors = {name: sample[name].cpu().contiguous() for name in CACHED}
    try:  # not `files.write`, which waits for the disk: a file that a crash cut is made again
        save_file(tensors, f"{path}.{os.getpid()}")
    except SafetensorError as error:
        raise OSError(f"{path} cannot be written: {one_line(error)}") from None
    os.replace(f"{path}.{os.getpid()}", path)


def positions(start: int, stop: int, batch: int, micro: int, rank: int, world: int):
    """The micro-batches of a process, as lists of positions: process r takes every world-th of each step."""
    for step in range(start, stop):
        for first in range(step * batch + rank * micro, (step + 1) * batch, world * micro):
            yield list(range(first, first + micro))
