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
import shutil
import sys
import tarfile
import zlib
from array import array
from collections import Counter
from itertools import groupby, product
from pathlib import Path, PurePosixPath
from typing import Callable, Iterator

import numpy as np
import torch
from PIL import Image, ImageCms, ImageOps
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from model import UNetConfig
from support.cache import Cache
from support.files import atomic_write
from support.run import fingerprint, process_ranks
from toy import shapes

REASONS = {  # why a sample is not used
    "unreadable": "the file is gone or may not be read",
    "bad_image": "Pillow cannot decode it",
    "too_large": f"more than 64 MB, or {Image.MAX_IMAGE_PIXELS:,} pixels",
    "too_small": "its short side is less than an eighth of --size",
    "no_caption": 'no "text" in its line of metadata.jsonl',
    "blank_caption": "nothing to read in it",
    "bad_encoding": "the caption is not UTF-8",
}
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP", "AVIF")  # of Pillow's; EPS would run a program
IMAGES = {ending for ending, kind in Image.registered_extensions().items() if kind in FORMATS}
LARGEST_FILE = 64 * 2**20  # bytes; a larger file is no image of a training set
PROMPTS = [  # for real models, in the four styles of HPSv2's prompts (Wu et al., arXiv 2306.09341)
    f"{subject}, {style}" for subject, style in product(
        ("a portrait of an old fisherman", "a fox and a rabbit in the snow", "a castle above a foggy valley",
         "two children flying a kite", "a bowl of oranges beside a blue vase", "a tram in a rainy street",
         "a knight resting under a tree", "a koala on a branch"),
        ("anime", "concept art", "oil painting", "photo"))]


class Skip(Exception):
    """A sample that cannot be used; its text is one of REASONS."""


def format_counts(counts: dict[str, int]) -> str:
    """Reasons with their counts, as text."""
    return ", ".join(f"{reason} {count}" for reason, count in counts.items() if count) or "none"


# ------------------------------------------------------------------------------------------------------------
# Sources: item i is always the same


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


class CaptionedImages:
    """
    The captioned images of a folder: name.jpg with name.txt, or metadata.jsonl, or img2dataset's .tar shards.

    If there is a metadata.jsonl, only its images are used; otherwise, if there are shards, only theirs.
    `skipped` counts by reason what is left out. `caption` replaces all captions. The folder `index` holds one
    line of JSON for each pair, because millions of objects would take gigabytes in each process; the index of
    shards is used again until they change. Raises FileNotFoundError or ValueError if there is no pair.
    """

    def __init__(self, folder: str | Path, index: Path, caption: str | None = None):
        self.root, self.index, self.caption, self.skipped = Path(folder), index, caption, Counter()
        self.pairs = self.starts = None                          # the index, mapped into memory when used
        if not self.root.is_dir():
            raise FileNotFoundError(f"--data: no folder {folder}; give one, or shapes")
        shards = [name for name in self.walk() if name.endswith(".tar")]
        has_metadata = (self.root / "metadata.jsonl").is_file()
        state, pairs = None, self.from_metadata() if has_metadata else self.loose_pairs()
        if shards and not has_metadata:
            status = [(self.root / name).stat() for name in shards]
            state = [str(self.root), caption is None,
                     *([name, file.st_size, file.st_mtime_ns] for name, file in zip(shards, status))]
            pairs = (pair for name in shards for pair in self.shard_pairs(name))
        keep = state or process_ranks().local                    # the first has just made the index
        if not (keep and self.read_index(state)):
            self.write_index(pairs, state)
        if has_metadata or shards:
            images = sum(file_kind(name) == "image" for name in self.walk())
            self.skipped["hidden"] = max(0, images - has_metadata * len(self))
        if not len(self):
            others = [name for name in self.walk() if Path(name).name in ("metadata.csv", "metadata.jsonl")]
            hint = f"; {others[0]} is not read: write a metadata.jsonl at the top" if others else ""
            raise ValueError(f"--data: {folder} has no image with a caption ({format_counts(self.skipped)})"
                             f"{hint}; see --help")

    def __len__(self) -> int:
        return self.length

    def __getstate__(self) -> dict:
        return self.__dict__ | {"pairs": None, "starts": None}   # another process maps the index itself

    # What is there

    def walk(self) -> Iterator[str]:
        """The files below the folder, linked folders too, but for hidden ones; names use slashes."""
        seen = set()
        for folder, folders, files in os.walk(self.root, followlinks=True):
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            if os.path.realpath(folder) in seen:                 # a link to a folder above it
                folders.clear()
                continue
            seen.add(os.path.realpath(folder))
            for name in sorted(files):
                if not name.startswith("."):
                    yield Path(folder, name).relative_to(self.root).as_posix()

    def group(self, names: list[str]) -> Iterator[dict[str, str]]:
        """The files of each pair, whose names differ only in their ending, by kind. Counts the others."""
        for _, group in groupby(sorted(names, key=os.path.splitext), lambda name: os.path.splitext(name)[0]):
            files = {}
            for name in group:
                kind = file_kind(name)
                self.skipped["duplicate"] += kind == "image" and kind in files
                self.skipped["other_file"] += kind is None
                files.setdefault(kind, name)
            if "image" not in files:
                self.skipped["no_image"] += "txt" in files
            elif "txt" not in files and not self.caption:
                self.skipped["no_caption"] += 1
            else:
                yield files

    def loose_pairs(self) -> Iterator[dict[str, list]]:
        for _, names in groupby(self.walk(), os.path.dirname):
            for files in self.group(list(names)):
                yield {kind: [name] for kind, name in files.items() if kind}

    def shard_pairs(self, shard: str) -> Iterator[dict[str, list]]:
        """A whole shard ends in a block of zeros, which tarfile does not check."""
        members, end, path = {}, 0, self.root / shard
        size = path.stat().st_size
        with contextlib.suppress(tarfile.TarError, ArithmeticError, ValueError, MemoryError):  # a bad header
            with tarfile.open(path, "r:") as tar:
                for member in tar:
                    end = member.offset_data + -(-member.size // 512) * 512
                    if member.isreg() and end <= size:
                        self.skipped["duplicate"] += member.name in members
                        members.setdefault(member.name, [shard, member.offset_data, member.size])
        if not 0 < end <= size or self.read(shard, end, 512) != bytes(512):
            self.skipped["bad_shard"] += 1
            print(f"warning: {path} is cut or damaged after byte {min(end, size)}; the rest is lost",
                  file=sys.stderr)
        for files in self.group(list(members)):
            yield {kind: members[name] for kind, name in files.items() if kind}

    def from_metadata(self) -> Iterator[dict[str, list]]:
        start = 0
        with open(self.root / "metadata.jsonl", "rb") as file:
            for line in file:
                try:
                    name = PurePosixPath(json.loads(line)["file_name"])
                    if name.is_absolute() or ".." in name.parts:
                        raise ValueError("outside of the folder")
                    yield {"image": [str(name)], "line": ["metadata.jsonl", start, len(line)]}
                except (ValueError, KeyError, TypeError, RecursionError):
                    self.skipped["bad_line"] += bool(line.strip())
                start += len(line)

    # The index

    def write_index(self, pairs: Iterator[dict[str, list]], state: list | None):
        """Writes the pairs, line by line, and where the lines start."""
        def write(folder: Path):
            folder.mkdir()
            starts, checksum = array("q", [0]), 0
            with open(folder / "pairs.jsonl", "wb") as file:
                for pair in pairs:
                    line = json.dumps(pair).encode() + b"\n"
                    file.write(line)
                    starts.append(starts[-1] + len(line))
                    checksum = zlib.crc32(line, checksum)
            np.save(folder / "starts.npy", starts)
            facts = {"state": state, "skipped": self.skipped, "fingerprint": f"{checksum:08x}"}
            (folder / "index.json").write_text(json.dumps(facts), encoding="utf-8")

        shutil.rmtree(self.index, ignore_errors=True)
        atomic_write(self.index, write)
        self.read_index(state)

    def read_index(self, state: list | None) -> bool:
        """Takes the index that is there; False if there is none, or if it is of other shards."""
        try:
            facts = json.loads((self.index / "index.json").read_text(encoding="utf-8"))
            length = len(np.load(self.index / "starts.npy", mmap_mode="r")) - 1
        except (OSError, ValueError, EOFError):
            return False
        if facts["state"] != state:
            return False
        self.length, self.skipped, self.fingerprint = length, Counter(facts["skipped"]), facts["fingerprint"]
        return True

    def pair(self, index: int) -> dict[str, list]:
        """Where the files of a pair are, by kind: a path, and in a shard the first byte and the size."""
        if self.starts is None:
            self.starts = np.load(self.index / "starts.npy", mmap_mode="r")
            self.pairs = np.memmap(self.index / "pairs.jsonl", np.uint8, "r")
        return json.loads(self.pairs[self.starts[index]:self.starts[index + 1]].tobytes())

    # Reading

    def read(self, path: str, start: int = 0, size: int = LARGEST_FILE + 1) -> bytes:
        """Reads a file, or a part of it. Raises Skip."""
        try:
            with open(self.root / path, "rb") as file:
                file.seek(start)
                content = file.read(min(size, LARGEST_FILE + 1))
        except (OSError, ValueError):                            # a name with a zero byte
            raise Skip("unreadable") from None
        if len(content) > LARGEST_FILE:
            raise Skip("too_large")
        return content

    def load(self, index: int) -> tuple[Image.Image, str, tuple[int, int]]:
        """An RGB image, its caption, and its original (height, width). Raises Skip."""
        pair = self.pair(index)
        caption = self.caption or self.read_caption(pair)
        content = io.BytesIO(self.read(*pair["image"]))
        try:
            stored = Image.open(content, formats=FORMATS)
            if stored.width * stored.height > Image.MAX_IMAGE_PIXELS:
                raise Skip("too_large")
            image = to_rgb(ImageOps.exif_transpose(stored))
        except Skip:
            raise
        except Image.DecompressionBombError:
            raise Skip("too_large") from None
        except Exception:                                        # damaged files make decoders raise anything
            raise Skip("bad_image") from None
        height, width = image.height, image.width
        if "json" in pair:                                       # img2dataset shrank it: sizes before that
            with contextlib.suppress(ValueError, KeyError, TypeError, OverflowError, RecursionError, Skip):
                info = json.loads(self.read(*pair["json"]))
                original = [min(max(int(info[f"original_{side}"]), 1), 2**16) for side in ("height", "width")]
                turned = image.size != stored.size               # by EXIF; the sidecar is from before
                height, width = reversed(original) if turned else original
        return image, caption, (height, width)

    def read_caption(self, pair: dict[str, list]) -> str:
        """The caption of a pair, with single spaces between its words. Raises Skip."""
        try:
            if "txt" in pair:
                text = self.read(*pair["txt"]).decode("utf-8-sig")
            else:
                text = json.loads(self.read(*pair["line"]))["text"]
                text.encode()                                    # JSON can spell halves of characters
        except UnicodeError:
            raise Skip("bad_encoding") from None
        except (ValueError, KeyError, TypeError, AttributeError):
            raise Skip("no_caption") from None
        # `strip` alone would keep invisible characters, such as a zero-width space.
        if not any(character.isprintable() and not character.isspace() for character in text):
            raise Skip("blank_caption")
        return " ".join(text[:2**16].split())                    # CLIP reads 77 tokens

    def prompts(self, count: int) -> list[str]:
        """For previews: the captions of the first pairs that have one."""
        prompts = []
        for index in range(len(self)):
            with contextlib.suppress(Skip):
                prompts.append(self.caption or self.read_caption(self.pair(index)))
            if len(prompts) == count:
                break
        return prompts


def file_kind(name: str) -> str | None:
    """image, txt or json by a file's ending; None for others."""
    ending = os.path.splitext(name)[1].lower()
    return "image" if ending in IMAGES else ending[1:] if ending in (".txt", ".json") else None


def to_rgb(image: Image.Image) -> Image.Image:
    """
    The first frame of any image as sRGB: transparency on white, 16-bit grey scaled rather than clipped, and
    the colors of another profile, such as a phone's Display P3, converted.
    """
    profile = image.info.get("icc_profile")
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image).astype(np.float64) / 257).clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    if profile:
        with contextlib.suppress(ImageCms.PyCMSError, OSError):  # a damaged profile, or of another mode
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            if "sRGB" not in ImageCms.getProfileDescription(source):
                image = image if image.mode in ("RGB", "CMYK", "L") else image.convert("RGB")
                image = ImageCms.profileToProfile(
                    image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
    return image.convert("RGB")


# ------------------------------------------------------------------------------------------------------------
# Training samples


class Samples(Dataset):
    """
    The training sample at position p, for any p from 0, as a dictionary.

    pixels (3, S, S) uint8, caption and time_ids (6,), or instead what `cached(index)` returns unless that is
    None; dropped, whether the caption is dropped; timestep; noise and, to draw latents from the VAE's
    distribution, latent_noise (4, s, s); index in the source; skipped, 0 or the number in REASONS (from 1) of
    why the item at this position was replaced.
    """

    DROPPED = 0.1  # of captions, so that classifier-free guidance has an unconditional prediction

    def __init__(self, source: Shapes | CaptionedImages, size: int, latent_shape: tuple[int, int, int],
                 seed: int, cached: Callable[[int], dict | None] | None = None):
        self.source, self.size, self.latent_shape = source, size, latent_shape
        self.seed, self.cached = seed, cached
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
        skipped = Counter()
        # A bad item is replaced by the next good one. At worst, this takes the rest of an epoch and the next.
        for place in range(p, p + 2 * len(self.source)):
            index = self.index_at(place)
            try:
                sample = (self.cached and self.cached(index)) or self.picture(index, p)
                break
            except Skip as reason:
                skipped[str(reason)] += 1
        else:  # for the main process to raise: from a reader it would come with the reader's traceback
            reasons = "; ".join(f"{reason} ({REASONS[reason]})" for reason in skipped)
            return {"error": f"--data: no sample can be used: {reasons}"}
        rng = np.random.default_rng((self.seed, 2, p))
        noise, latent_noise = rng.standard_normal((2, *self.latent_shape), dtype=np.float32)
        reason = next(iter(skipped), None)                       # of the item of this position
        return sample | {
            "index": index, "skipped": [None, *REASONS].index(reason), "timestep": int(rng.integers(1000)),
            "dropped": bool(rng.random() < self.DROPPED), "noise": torch.from_numpy(noise),
            "latent_noise": torch.from_numpy(latent_noise)}

    def picture(self, index: int, p: int) -> dict:
        """Resizes an image by its short side, and crops it at random."""
        # With a cache the crop is the same in every epoch and for every seed.
        rng = np.random.default_rng((0, 3, index) if self.cached else (self.seed, 3, p))
        image, caption, (height, width) = self.source.load(index)
        if min(image.size) < max(8, self.size // 8):
            raise Skip("too_small")
        scale = self.size / min(image.size)
        if max(image.size) * scale * self.size > Image.MAX_IMAGE_PIXELS:
            raise Skip("too_large")
        if scale != 1:
            sides = [max(self.size, round(side * scale)) for side in image.size]
            image = image.resize(sides, Image.Resampling.LANCZOS)
        top, left = (int(rng.integers(side - self.size + 1)) for side in (image.height, image.width))
        image = image.crop((left, top, left + self.size, top + self.size))
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
        time_ids = torch.tensor([height, width, top, left, self.size, self.size], dtype=torch.float32)
        return {"pixels": pixels, "caption": caption, "time_ids": time_ids}


def collate(samples: list[dict]) -> dict[str, Tensor | list]:
    """
    Stacks each entry of the samples, in memory that processes share; captions are a list.

    `new`, a list, says which samples have pixels; the others are cached, and their entries are stacked apart.
    """
    errors = [sample for sample in samples if "error" in sample]
    if errors:
        return errors[0]
    batch = {"new": ["pixels" in sample for sample in samples]}
    for name in dict.fromkeys(name for sample in samples for name in sample):
        values = [sample[name] for sample in samples if name in sample]
        batch[name] = values if name == "index" else default_collate(values)  # of texts a list
    return batch


def micro_batches(start: int, stop: int, batch: int, micro_batch: int, rank: int,
                  world: int) -> Iterator[list[int]]:
    """The positions of a process's micro-batches from step `start` to `stop`; each rank takes its share."""
    for step in range(start, stop):
        for first in range(step * batch + rank * micro_batch, (step + 1) * batch, world * micro_batch):
            yield list(range(first, first + micro_batch))


Encode = Callable[[dict], dict[str, Tensor]]


def load_samples(args: argparse.Namespace, source: Shapes | CaptionedImages, pipeline, config: UNetConfig,
                 encode: Encode) -> tuple[Samples, Encode]:
    """
    Training samples for a student of this configuration, and what encodes a batch: `encode` or a cache.

    Raises ValueError if the data or the cache does not fit the run.
    """
    downscale, text = pipeline.vae_config.downscale, pipeline.text
    size = args.size or config.sample_size * downscale
    shape = (config.in_channels, size // downscale, size // downscale)
    if args.data == "shapes" and size != shapes.SIZE:
        raise ValueError(f"--data shapes has pictures of {shapes.SIZE} pixels, not {size}: give a folder")
    if not args.cache:
        return Samples(source, size, shape, args.seed), encode
    identity = {"data": source.fingerprint, "size": size, "caption": args.caption,
                "encoders": fingerprint(pipeline.vae, text.encoders)}
    cache = Cache(args.cache, identity, encode, shape, (text.length, config.context_dim), config.pooled_dim,
                  pipeline.dtype)
    return Samples(source, size, shape, args.seed, cache.reader()), cache.encode
