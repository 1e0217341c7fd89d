"""
Keeps VAE latents and text encodings on disk.
"""

import math
import sys
import zlib
from functools import partial
from pathlib import Path
from typing import Callable

import torch
from torch import Tensor

from model import read_json
from support.files import write_json
from support.run import check_settings


class Cache:
    """
    A file of fixed-size records, shared by all processes and by runs on the same data.

    A record holds the tensors of `layout` as bytes, and a checksum of its index and contents. A record with a
    wrong checksum (never written, half-written, damaged) counts as missing and is rewritten, so no lock is
    needed. `encode_new` makes the contents, and `identity` is what they depend on. Raises ValueError if the
    folder's cache has another identity.
    """

    def __init__(self, folder: Path, identity: dict, encode_new: Callable[[dict], dict[str, Tensor]],
                 latent: tuple[int, ...], context: tuple[int, int], pooled: int, dtype: torch.dtype):
        self.path, self.encode_new, self.full = folder / "records.bin", encode_new, False
        self.layout = {"mean": (latent, torch.float32), "std": (latent, torch.float32),
                       "context": (context, dtype), "pooled": ((pooled,), dtype),
                       "time_ids": ((6,), torch.float32)}
        self.sizes = [math.prod(shape) * dtype.itemsize for shape, dtype in self.layout.values()]
        identity = identity | {name: f"{shape} {dtype}" for name, (shape, dtype) in self.layout.items()}
        settings = folder / "cache.json"
        if settings.exists():
            check_settings(f"--cache {folder}", read_json(settings), identity, "--cache")
        else:
            write_json(settings, identity)
        self.path.touch()

    def reader(self) -> Callable[[int], dict[str, Tensor] | None]:
        """`read_record` for this cache, without the networks, for data workers."""
        return partial(read_record, self.path, sum(self.sizes) + 4)

    def encode(self, batch: dict) -> dict[str, Tensor]:
        """Encodes a batch of samples: runs `encode_new` only on new ones, and caches the results."""
        records = batch.get("record")                            # (B, bytes) if all are cached
        if "pixels" in batch:
            encoded, new = self.encode_new(batch), [i for i, is_new in enumerate(batch["new"]) if is_new]
            parts = [encoded[name].to(dtype).flatten(1).contiguous().view(torch.uint8)
                     for name, (_, dtype) in self.layout.items()]
            made = torch.cat(parts, dim=1)
            old = [i for i in range(len(batch["new"])) if i not in new]
            records = made if not old else torch.cat([made, records])[torch.tensor(new + old).argsort()]
            self.write([batch["index"][i] for i in new], made.cpu())
        tensors, parts = {}, records.split(self.sizes, dim=1)
        for part, (name, (shape, dtype)) in zip(parts, self.layout.items()):
            tensors[name] = part.clone().view(dtype).view(-1, *shape)
        return tensors

    def write(self, indices: list[int], records: Tensor):
        """Writes records, until the disk is full."""
        try:
            with open(self.path, "r+b") as file:
                for index, record in zip(indices, records):
                    if not self.full:
                        content = record.numpy().tobytes()
                        file.seek(index * (len(content) + 4))
                        file.write(content + checksum(index, content))
        except OSError as error:
            self.full = True                                     # for the rest of the run
            print(f"warning: {self.path} cannot be written ({error.strerror}); the run goes on without it",
                  file=sys.stderr)


def read_record(path: Path, size: int, index: int) -> dict[str, Tensor] | None:
    """{"record": bytes} of an image, or None if it is absent."""
    with open(path, "rb") as file:
        file.seek(index * size)
        record = bytearray(file.read(size))
    if record[-4:] != checksum(index, record[:-4]):
        return None
    return {"record": torch.frombuffer(record[:-4], dtype=torch.uint8)}


def checksum(index: int, record: bytes) -> bytes:
    return zlib.crc32(record, zlib.crc32(index.to_bytes(8, "little"))).to_bytes(4, "little")
