"""
Training samples: captioned images from the toy, from a folder, or from img2dataset's shards.

What cannot be used is skipped and counted by reason; one bad file never ends a run. Everything random about
the sample at position p of the endless, shuffled order comes from a generator seeded with (seed, p). The
sample is the same for any batch size, any number of processes, and any number of restarts.
"""

import argparse
import contextlib
import io
import json
import os
import shutil
import sys
import tarfile
from array import array
from collections import Counter
from pathlib import Path
from typing import Callable, Iterator

import numpy as np
import torch
from PIL import Image, ImageCms, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from model import UNetConfig, read_json
from support.cache import Cache
from support.files import atomic_write, write_json
from support.run import file_checksum, fingerprint, ignore_signals, process_ranks
from toy import shapes

# Why a sample is not used.
REASONS = ("unreadable", "bad_image", "too_large", "too_small", "no_caption", "bad_encoding")
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP", "AVIF")  # of Pillow's; EPS would run a program
KINDS = {ending: "image" for ending, name in Image.registered_extensions().items() if name in FORMATS}
KINDS |= {".txt": "txt", ".json": "json"}
LARGEST_FILE = 64 * 2**20  # bytes; a larger file is not a training image


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
        """For previews: captions of new scenes."""
        return shapes.judge_captions(count)


class CaptionedImages:
    """
    The captioned images of a folder: name.jpg with name.txt, or metadata.jsonl, or img2dataset's .tar shards.

    If there is a metadata.jsonl, only its images are used; otherwise, if there are shards, only theirs.
    `skipped` counts by reason what is left out. `caption` replaces all captions. The folder `index` has one
    line of JSON for each pair, because millions of objects would take gigabytes in each process.
    Raises ValueError if there is no pair.
    """

    def __init__(self, folder: str | Path, index: Path, caption: str | None = None):
        self.root, self.index, self.caption, self.skipped = Path(folder), index, caption, Counter()
        rank, _ = process_ranks()
        if rank == 0:                                            # the other processes read what it writes
            self.write_index()
        facts = read_json(index / "index.json")
        self.length, self.fingerprint = facts["length"], facts["fingerprint"]
        self.skipped = Counter(facts["skipped"])
        if not self.length:
            raise ValueError(f"--data: {folder} has no usable images with .txt files, metadata.jsonl or "
                             f".tar shards; left out: {format_counts(self.skipped)}")

    def __len__(self) -> int:
        return self.length

    def walk(self) -> Iterator[dict[str, list]]:
        """Where the files of each folder are, by name; linked folders are followed, hidden names left out."""
        seen = set()
        for folder, folders, files in os.walk(self.root, followlinks=True):
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            if os.path.realpath(folder) in seen:                 # a link to a folder above it
                folders.clear()
                continue
            seen.add(os.path.realpath(folder))
            below = Path(folder).relative_to(self.root)
            names = [(below / name).as_posix() for name in sorted(files) if not name.startswith(".")]
            yield {name: [name] for name in names}

    def members(self, shard: str) -> dict[str, list]:
        """Locations of a shard's files by name, [shard, first byte, size], up to any damage."""
        path, members, end = self.root / shard, {}, 0
        size = path.stat().st_size
        with contextlib.suppress(tarfile.TarError), tarfile.open(path, "r:") as tar:
            for member in tar:
                end = member.offset_data + -(-member.size // 512) * 512
                if member.isreg() and end <= size:
                    members.setdefault(member.name, [shard, member.offset_data, member.size])
        # A whole shard ends in a block of zeros, which tarfile does not check.
        if self.read(shard, end, 512) != bytes(512):
            self.skipped["bad_shard"] += 1
            print(f"warning: {path} is truncated or damaged; the rest is lost", file=sys.stderr)
        return members

    def pairs(self, shards: list[str]) -> Iterator[dict[str, list]]:
        """Locations of each pair's files by kind; their names differ only in the extension."""
        groups = map(self.members, shards) if shards else self.walk()  # a pair is within a shard or folder
        for files in groups:
            pairs = {}
            for name in sorted(files, key=os.path.splitext):
                stem, ending = os.path.splitext(name)
                kind = KINDS.get(ending.lower())
                if kind:
                    pairs.setdefault(stem, {}).setdefault(kind, files[name])
            for pair in pairs.values():
                if "image" in pair and ("txt" in pair or self.caption):
                    yield pair
                elif "image" in pair:
                    self.skipped["no_caption"] += 1
                elif "txt" in pair:
                    self.skipped["no_image"] += 1

    def metadata_pairs(self) -> Iterator[dict[str, list | str]]:
        """The pairs of metadata.jsonl, whose captions are in the index."""
        with open(self.root / "metadata.jsonl", "rb") as file:
            for line in file:
                try:
                    entry = json.loads(line)
                    text = entry.get("text")
                    yield {"image": [str(entry["file_name"])], "text": text if isinstance(text, str) else ""}
                except (ValueError, KeyError, AttributeError, RecursionError):
                    self.skipped["bad_line"] += bool(line.strip())

    def write_index(self):
        """Writes a line per pair and the lines' offsets; keeps an existing index of the same shards."""
        shards, pairs = [], self.metadata_pairs()
        if not (self.root / "metadata.jsonl").is_file():
            shards = [name for files in self.walk() for name in files if name.endswith(".tar")]
            pairs = self.pairs(shards)
        files = [(self.root / name).stat() for name in shards]
        state = [self.caption is None, shards, [[file.st_size, file.st_mtime_ns] for file in files]]
        facts = self.index / "index.json"
        if shards and facts.exists() and read_json(facts)["state"] == state:
            return

        def write(folder: Path):
            folder.mkdir()
            starts = array("q", [0])
            with open(folder / "pairs.jsonl", "wb") as file:
                for pair in pairs:
                    file.write(json.dumps(pair).encode() + b"\n")
                    starts.append(file.tell())
            np.save(folder / "starts.npy", starts)
            write_json(folder / "index.json", {
                "state": state, "skipped": self.skipped, "length": len(starts) - 1,
                "fingerprint": f"{file_checksum(folder / 'pairs.jsonl'):08x}"})

        shutil.rmtree(self.index, ignore_errors=True)
        atomic_write(self.index, write)

    def pair(self, index: int) -> dict[str, list | str]:
        """A line of the index."""
        start, end = np.load(self.index / "starts.npy", mmap_mode="r")[index:index + 2]
        with open(self.index / "pairs.jsonl", "rb") as file:
            file.seek(start)
            return json.loads(file.read(end - start))

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
        caption = self.read_caption(pair)
        content = io.BytesIO(self.read(*pair["image"]))
        try:
            stored = Image.open(content, formats=FORMATS)
            if stored.width * stored.height > Image.MAX_IMAGE_PIXELS:
                raise Image.DecompressionBombError               # Pillow itself only warns up to twice that
            image = to_rgb(ImageOps.exif_transpose(stored))
        except Image.DecompressionBombError:
            raise Skip("too_large") from None
        except Exception:                                        # damaged files make decoders raise anything
            raise Skip("bad_image") from None
        height, width = image.height, image.width
        if "json" in pair:                                       # the sizes before img2dataset shrank it
            with contextlib.suppress(ValueError, KeyError, TypeError, OverflowError, RecursionError, Skip):
                info = json.loads(self.read(*pair["json"]))
                original = [min(max(int(info[f"original_{side}"]), 1), 2**16) for side in ("height", "width")]
                turned = image.size != stored.size               # by EXIF; the sidecar is not
                height, width = reversed(original) if turned else original
        return image, caption, (height, width)

    def read_caption(self, pair: dict[str, list | str]) -> str:
        """The caption of a pair, with single spaces between its words. Raises Skip."""
        if self.caption:
            return self.caption
        try:
            text = self.read(*pair["txt"]).decode("utf-8-sig") if "txt" in pair else pair["text"]
            text.encode()                                        # JSON can escape lone surrogates
        except UnicodeError:
            raise Skip("bad_encoding") from None
        # `strip` alone would keep invisible characters, such as a zero-width space.
        if not any(character.isprintable() and not character.isspace() for character in text):
            raise Skip("no_caption")
        return " ".join(text[:2**16].split())                    # CLIP reads 77 tokens

    def prompts(self, count: int) -> list[str]:
        """For previews: the captions of the first pairs that have one."""
        prompts = []
        for index in range(len(self)):
            with contextlib.suppress(Skip):
                prompts.append(self.read_caption(self.pair(index)))
            if len(prompts) == count:
                break
        return prompts


def to_rgb(image: Image.Image) -> Image.Image:
    """
    The first frame of any image as sRGB: transparency on white, 16-bit gray scaled rather than clipped, and
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
    distribution, latent_noise (4, s, s); index in the source; skipped, 0 or, for
    a replaced item, the number of the reason in REASONS (from 1).
    """

    DROPPED = 0.1  # of captions; classifier-free guidance needs unconditional predictions

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
        """The sample at position p. Raises ValueError if no sample can be used."""
        skipped = []
        # A bad item is replaced by the next good one. At worst, this takes the rest of an epoch and the next.
        for place in range(p, p + 2 * len(self.source)):
            index = self.index_at(place)
            try:
                sample = (self.cached and self.cached(index)) or self.picture(index, p)
                break
            except Skip as reason:
                skipped.append(str(reason))
        else:
            raise ValueError(f"--data: no sample can be used: {', '.join(sorted(set(skipped)))}")
        rng = np.random.default_rng((self.seed, 2, p))
        noise, latent_noise = rng.standard_normal((2, *self.latent_shape), dtype=np.float32)
        return sample | {
            "index": index, "skipped": REASONS.index(skipped[0]) + 1 if skipped else 0,
            "timestep": int(rng.integers(1000)), "dropped": bool(rng.random() < self.DROPPED),
            "noise": torch.from_numpy(noise), "latent_noise": torch.from_numpy(latent_noise)}

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


def read_ahead(args: argparse.Namespace, samples: Samples, step: int, device: str) -> Iterator[dict]:
    """
    This process's micro-batches from `step` on, read by `--workers` other processes.

    Raises RuntimeError if a worker died.
    """
    rank, world = process_ranks()
    positions = micro_batches(step, args.steps, args.batch, args.micro_batch, rank, world)
    loader = DataLoader(samples, batch_sampler=positions, num_workers=args.workers, collate_fn=collate,
                        pin_memory=device.startswith("cuda"), worker_init_fn=ignore_signals,
                        timeout=600 if args.workers else 0)      # a worker out of memory may wait forever
    try:
        yield from loader
    except (ConnectionError, EOFError) as error:
        raise RuntimeError("DataLoader worker died as it handed over samples") from error


Encode = Callable[[dict], dict[str, Tensor]]


def load_samples(args: argparse.Namespace, source: Shapes | CaptionedImages, pipeline, config: UNetConfig,
                 encode: Encode) -> tuple[Samples, Encode]:
    """
    Training samples for a student of this configuration, and what encodes a batch: `encode` or a cache.

    Raises ValueError if no sample can be used, or if the data or the cache does not fit the run.
    """
    downscale, text = pipeline.vae_config.downscale, pipeline.text
    size = args.size or config.sample_size * downscale
    shape = (config.in_channels, size // downscale, size // downscale)
    if args.data == "shapes" and size != shapes.SIZE:
        raise ValueError(f"--data shapes has pictures of {shapes.SIZE} pixels, not {size}: give a folder")
    samples = Samples(source, size, shape, args.seed)
    if args.cache:
        identity = {"data": source.fingerprint, "size": size, "caption": args.caption,
                    "encoders": fingerprint(pipeline.vae, text.encoders)}
        cache = Cache(args.cache, identity, encode, shape, (text.length, config.context_dim),
                      config.pooled_dim, pipeline.dtype)
        samples.cached, encode = cache.reader(), cache.encode
    samples[0]                                                   # raises now, not in a data worker
    return samples, encode
