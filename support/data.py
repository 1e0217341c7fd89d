"""
Training samples: captioned images from the toy, from a folder, or from img2dataset's shards.

What cannot be used is skipped and counted by reason; one bad file never ends a run. Everything random about
the sample at position p of the endless, shuffled order comes from a generator seeded by (seed, p). So it is
the same for any batch size, any number of processes, and however often a run was stopped.
"""

import argparse
import contextlib
import io
import json
import os
import struct
import sys
import tarfile
import zlib
from array import array
from collections import Counter
from itertools import product
from pathlib import Path, PurePosixPath
from typing import Iterable, Iterator, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageOps
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.utils.data import Dataset

from model import UNetConfig
from support.cache import Cache
from support.checkpoint import fingerprint, process_ranks
from support.files import atomic_write
from toy import shapes

# ------------------------------------------------------------------------------------------------------------
# Sources: sample i is always the same


class Skip(Exception):
    """A sample that cannot be used; its text is the reason, under which it is counted."""


class Span(NamedTuple):
    """Bytes of a file below a folder: a whole image, a member of a shard, or a line."""

    path: str
    start: int
    size: int


IMAGES, FORMATS = (".jpg", ".jpeg", ".png", ".webp"), ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP")
LARGEST_FILE = 64 * 2**20  # bytes; a larger file is no image of a training set
LARGEST_CAPTION = 2**16    # bytes; CLIP reads 77 tokens


class Shapes:
    """The toy's pictures, endless."""

    skipped, fingerprint = Counter(), "shapes"

    def __len__(self) -> int:
        return 2**31

    def load(self, index: int) -> tuple[Image.Image, str, tuple[int, int]]:
        picture, caption = shapes.sample(shapes.TRAIN_SEED, index)
        return picture, caption, picture.size[::-1]

    def prompts(self, count: int) -> list[str]:
        """For previews: captions that are not trained on."""
        return shapes.judge_captions(count)


PROMPTS = [  # for real models, in the four styles of HPSv2's prompts (Wu et al., arXiv 2306.09341)
    f"{subject}, {style}" for subject, style in product(
        ("a portrait of an old fisherman", "a fox and a rabbit in the snow", "a castle above a foggy valley",
         "two children flying a kite", "a bowl of oranges beside a blue vase", "a tram in a rainy street",
         "a knight resting under a tree", "a koala on a branch"),
        ("anime", "concept art", "oil painting", "photo"))]


class CaptionedImages:
    """
    The captioned images of a folder: name.jpg with name.txt, or metadata.jsonl, or img2dataset's .tar shards.

    A metadata.jsonl, or else any shard, hides the loose images. `skipped` counts, by reason, what is hidden,
    files without a partner, and shards that are cut; what comes before a cut is used. With `caption` all
    images have this one. As the index of shards takes long to make, it is kept in the file `index` and mapped
    from there while the shards do not change. Raises FileNotFoundError or ValueError if the folder has
    no image with a caption.
    """

    KINDS = ("image", "txt", "json", "line")                     # of spans

    def __init__(self, folder: str | Path, caption: str | None = None, index: Path | None = None):
        self.root, self.caption, self.skipped = Path(folder), caption, Counter()
        if not self.root.is_dir():
            raise FileNotFoundError(f"--data: no folder {folder}; give one, or shapes")
        shards = sorted(path for path in self.root.rglob("*.tar") if path.is_file())
        if (self.root / "metadata.jsonl").is_file():
            self.make_index(self.from_metadata())
            self.count_rest("metadata.jsonl", {*self.paths})
        elif not shards:
            self.make_index(self.pair(self.loose_files()))
        else:
            files = [[self.relative(path), path.stat().st_size, path.stat().st_mtime_ns] for path in shards]
            state = json.dumps([caption is None, files])
            if not index or not self.read_index(index, state):
                self.make_index(item for shard in shards for item in self.pair(self.members(shard)))
                if index:
                    self.write_index(index, state)
            self.count_rest("shards", {name for name, _, _ in files})
        if not len(self):
            raise ValueError(f"--data: {folder} has no image with a caption ({format_counts(self.skipped)}); "
                             f"see --help")
        # Changes if a file is added, removed, renamed or of another size, but not if the folder moves.
        self.fingerprint = self.checksum(self.spans, json.dumps(self.paths))

    def __len__(self) -> int:
        return len(self.spans)

    def count_rest(self, kind: str, used: set[str]):
        """Counts the images and shards other than those `used`, and warns that they are left out."""
        endings = (*IMAGES, ".tar")
        rest = sum(name.lower().endswith(endings) and name not in used for name, _ in self.loose_files())
        self.skipped[f"not_in_{kind}"] = rest
        if rest:
            print(f"warning: {self.root} is read as {kind}; {rest} other images or shards are not used",
                  file=sys.stderr)

    def relative(self, path: Path) -> str:
        return path.relative_to(self.root).as_posix()

    def make_index(self, items: Iterable[dict[str, Span]]):
        """Sets `spans`, one array (N, kinds, 3): millions of objects would take gigabytes in each process."""
        paths, numbers = {"": 0}, array("q")
        for item in items:
            for kind in self.KINDS:
                path, start, size = item.get(kind, Span("", 0, 0))
                numbers.extend((paths.setdefault(path, len(paths)), start, size))
        self.paths, self.spans = list(paths), np.frombuffer(numbers, np.int64).reshape(-1, len(self.KINDS), 3)

    def write_index(self, index: Path, state: str):
        lists = json.dumps([self.paths, self.skipped])
        metadata = {"state": state, "lists": lists, "checksum": self.checksum(self.spans, lists)}
        atomic_write(index, lambda path: save_file({"spans": torch.from_numpy(self.spans)}, path, metadata))

    def read_index(self, index: Path, state: str) -> bool:
        """Maps an index into memory; False if it is not there, damaged, or not of these shards."""
        try:
            with safe_open(index, framework="pt") as file:
                spans, metadata = file.get_tensor("spans").numpy(), file.metadata()
            lists = metadata["lists"]
            if metadata["state"] != state or metadata["checksum"] != self.checksum(spans, lists):
                return False
        except (OSError, SafetensorError, KeyError, TypeError):
            return False
        self.spans, (self.paths, skipped) = spans, json.loads(lists)
        self.skipped = Counter(skipped)
        return True

    @staticmethod
    def checksum(spans: np.ndarray, lists: str) -> str:
        return f"{zlib.crc32(spans.data, zlib.crc32(lists.encode())):08x}"

    def loose_files(self) -> Iterator[tuple[str, Span]]:
        for path in sorted(self.root.rglob("*")):
            name = self.relative(path)
            with contextlib.suppress(OSError):                   # a broken link, or removed just now
                if path.is_file():
                    yield name, Span(name, 0, path.stat().st_size)

    def pair(self, named: Iterable[tuple[str, Span]]) -> Iterator[dict[str, Span]]:
        """Groups the files whose names differ only in their ending."""
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

    def from_metadata(self) -> Iterator[dict[str, Span]]:
        start = 0
        with open(self.root / "metadata.jsonl", "rb") as file:
            for line in file:
                try:
                    name = PurePosixPath(json.loads(line)["file_name"])
                    if name.is_absolute() or ".." in name.parts:
                        raise ValueError("outside of the folder")
                    path = self.root / name
                    image = Span(str(name), 0, path.stat().st_size if path.is_file() else 0)
                    yield {"image": image, "line": Span("metadata.jsonl", start, len(line))}
                except (ValueError, KeyError, TypeError, RecursionError, OSError):
                    self.skipped["bad_line"] += bool(line.strip())
                start += len(line)

    def members(self, shard: Path) -> Iterator[tuple[str, Span]]:
        """The files of a shard. A whole shard ends in a block of zeros, which tarfile does not check."""
        end, path, size = 0, self.relative(shard), shard.stat().st_size
        try:
            with tarfile.open(shard, "r:") as tar:
                for member in tar:
                    end = member.offset_data + -(-member.size // 512) * 512
                    if member.isreg() and member.size <= LARGEST_FILE and end <= size:
                        yield member.name, Span(path, member.offset_data, member.size)
        except (tarfile.TarError, ArithmeticError, RecursionError, ValueError, MemoryError):
            pass                                                 # a damaged header raises any of these
        if not 0 < end <= size or self.read(Span(path, end, 512)) != bytes(512):
            self.skipped["bad_shard"] += 1
            print(f"warning: {shard} is cut or damaged after byte {min(end, size)}; the rest is lost",
                  file=sys.stderr)

    def read(self, span: Span) -> bytes:
        """Reads the bytes of a span. Raises Skip."""
        if span.size > LARGEST_FILE:
            raise Skip("too_large")
        try:
            if not (self.root / span.path).is_file():  # gone, or a pipe, which would not end
                raise Skip("unreadable")
            with open(self.root / span.path, "rb") as file:
                file.seek(span.start)
                return file.read(span.size)
        except OSError:
            raise Skip("unreadable") from None

    def item(self, index: int) -> dict[str, Span]:
        """The spans of a pair, by kind."""
        spans = (Span(self.paths[path], start, size) for path, start, size in self.spans[index].tolist())
        return {kind: span for kind, span in zip(self.KINDS, spans) if span.path}

    def prompts(self, count: int) -> list[str]:
        """For previews: the captions of the first pairs that have one."""
        prompts = []
        for index in range(len(self)):
            with contextlib.suppress(Skip):
                prompts.append(self.caption or self.read_caption(self.item(index)))
            if len(prompts) == count:
                break
        return prompts

    def load(self, index: int) -> tuple[Image.Image, str, tuple[int, int]]:
        """An RGB image, its caption, and its original (height, width). Raises Skip."""
        item = self.item(index)
        caption = self.caption or self.read_caption(item)
        content = io.BytesIO(self.read(item["image"]))
        try:
            image = Image.open(content, formats=FORMATS)
            if image.width * image.height > Image.MAX_IMAGE_PIXELS:
                raise Skip("too_large")
            image = to_rgb(ImageOps.exif_transpose(image))
        except Image.DecompressionBombError:
            raise Skip("too_large") from None
        except (OSError, ValueError, SyntaxError, TypeError, MemoryError, struct.error):
            raise Skip("bad_image") from None                    # damaged EXIF raises most of these
        height, width = image.height, image.width
        if "json" in item:                                       # img2dataset shrank it: sizes before that
            with contextlib.suppress(ValueError, KeyError, TypeError, OverflowError, RecursionError, Skip):
                info = json.loads(self.read(item["json"]))
                original = int(info["original_height"]), int(info["original_width"])
                if all(1 <= side <= 2**16 for side in original):
                    height, width = original
        return image, caption, (height, width)

    def read_caption(self, item: dict[str, Span]) -> str:
        """The caption of an item, with single spaces between its words. Raises Skip."""
        try:
            if "txt" in item:
                text = self.read(item["txt"]._replace(size=min(item["txt"].size, LARGEST_CAPTION)))
                text = text.decode("utf-8-sig", "strict" if len(text) < LARGEST_CAPTION else "ignore")
            else:
                text = json.loads(self.read(item["line"]))["text"][:LARGEST_CAPTION]
                text.encode()  # JSON can spell halves of characters
        except UnicodeError:
            raise Skip("bad_encoding") from None
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise Skip("no_caption") from None
        # `strip` alone would keep invisible characters, such as a zero-width space.
        if not any(character.isprintable() and not character.isspace() for character in text):
            raise Skip("blank_caption")
        words = text.split()
        if len(text) > LARGEST_CAPTION - 4:  # drop a last word that may be cut
            words = words[:-1] or words
        return " ".join(words)


def to_rgb(image: Image.Image) -> Image.Image:
    """The first frame of any image as RGB: transparency on white, 16-bit grey scaled rather than clipped."""
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image).astype(np.float64) / 257).clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def format_counts(reasons: Counter) -> str:
    """The reasons with their counts, as text."""
    return ", ".join(f"{reason} {count}" for reason, count in sorted(reasons.items()) if count) or "none"


# ------------------------------------------------------------------------------------------------------------
# Training samples


class Samples(Dataset):
    """
    The training sample at position p, for any p from 0, as a dictionary.

    pixels (3, S, S) uint8 and caption, or what a cache has in their place; dropped, whether the caption is
    dropped; time_ids (6,); timestep; noise and, to draw the latents from the VAE's distribution, latent_noise
    (4, s, s); index in the source; skipped, the reasons why others were not used, by index.
    """

    def __init__(self, source: Shapes | CaptionedImages, size: int, latent_shape: tuple[int, int, int],
                 seed: int, dropout: float, flip: bool, cache: Cache | None = None):
        self.source, self.size, self.latent_shape = source, size, latent_shape
        self.seed, self.dropout, self.flip, self.cache = seed, dropout, flip, cache
        self.epoch, self.order = None, None

    def index_at(self, p: int) -> int:
        """Which item of the source is at position p: each epoch is a new permutation."""
        if isinstance(self.source, Shapes):
            return p
        epoch, place = divmod(p, len(self.source))
        if epoch != self.epoch:
            rng = np.random.default_rng((self.seed, 1, epoch))
            self.epoch, self.order = epoch, rng.permutation(len(self.source))
        return int(self.order[place])

    def __getitem__(self, p: int) -> dict:
        skipped = {}
        # A bad item is replaced by the next good one. At worst, this takes the rest of an epoch and the next.
        for place in range(p, p + 2 * len(self.source)):
            index = self.index_at(place)
            try:
                sample = (self.cache and self.cache.read(index)) or self.picture(index, p)
                break
            except Skip as reason:
                skipped[index] = str(reason)
        else:  # for the main process to raise: from a worker it would come with the worker's traceback
            return {"error": f"--data: no sample can be used: {format_counts(Counter(skipped.values()))}"}
        rng = np.random.default_rng((self.seed, 2, p))
        noise, latent_noise = rng.standard_normal((2, *self.latent_shape), dtype=np.float32)
        return sample | {
            "index": index, "skipped": skipped, "timestep": int(rng.integers(1000)),
            "dropped": bool(rng.random() < self.dropout), "noise": torch.from_numpy(noise),
            "latent_noise": torch.from_numpy(latent_noise)}

    def picture(self, index: int, p: int) -> dict:
        """Resizes an image by its short side, flips it at random, and crops it at random."""
        # With a cache the flip and the crop are the same in every epoch and for every seed.
        rng = np.random.default_rng((0, 3, index) if self.cache else (self.seed, 3, p))
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
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
        time_ids = torch.tensor([height, width, top, left, self.size, self.size], dtype=torch.float32)
        return {"pixels": pixels, "caption": caption, "time_ids": time_ids}


def micro_batches(start: int, stop: int, batch: int, micro_batch: int, rank: int,
                  world: int) -> Iterator[list[int]]:
    """The positions of a process's micro-batches from step `start` to `stop`; each rank takes its share."""
    for step in range(start, stop):
        for first in range(step * batch + rank * micro_batch, (step + 1) * batch, world * micro_batch):
            yield list(range(first, first + micro_batch))


def load_source(args: argparse.Namespace) -> Shapes | CaptionedImages:
    """
    The images and captions that the flags of distill.py ask for.

    The first process makes the index of shards; the others read it. Raises FileNotFoundError or ValueError.
    """
    if args.data == "shapes":
        return Shapes()
    rank, world, _ = process_ranks()
    if rank > 0:
        dist.barrier()
    source = CaptionedImages(args.data, args.caption, args.out / "index.safetensors")
    if rank == 0 and world > 1:
        dist.barrier()
    return source


def load_samples(args: argparse.Namespace, source: Shapes | CaptionedImages, pipeline,
                 config: UNetConfig) -> Samples:
    """
    Training samples for a student of this configuration, with the pipeline's VAE and text encoders.

    Raises ValueError if the data or the cache does not fit the run.
    """
    downscale = pipeline.vae_config.downscale
    size = args.size or config.sample_size * downscale
    latent_shape = (config.in_channels, size // downscale, size // downscale)
    if args.data == "shapes" and size != shapes.SIZE:
        raise ValueError(f"--data shapes has pictures of {shapes.SIZE} pixels, not {size}: give a folder")
    cache = None
    if args.cache:
        encoders = pipeline.text.encoders
        length = encoders[0].config.max_position_embeddings
        layout = {"mean": (latent_shape, torch.float32), "std": (latent_shape, torch.float32),
                  "context": ((length, config.context_dim), pipeline.dtype),
                  "pooled": ((config.pooled_dim,), pipeline.dtype), "time_ids": ((6,), torch.float32)}
        identity = {"data": source.fingerprint, "encoders": fingerprint(pipeline.vae, encoders), "size": size,
                    "flip": args.flip, "caption": args.caption}
        cache = Cache(args.cache, identity, layout)
    return Samples(source, size, latent_shape, args.seed, args.dropout, args.flip, cache)
