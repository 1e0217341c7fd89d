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
        if not settings.exists():
            write_json(settings, identity)
        check_settings(f"--cache {folder}", read_json(settings), identity, "--cache")
        self.path.touch()

    def reader(self) -> Callable[[int], dict[str, Tensor] | None]:
        """`read_record` for this cache, without the networks, for data workers."""
        return partial(read_record, self.path, sum(self.sizes) + 4)

    def encode(self, batch: dict) -> dict[str, Tensor]:
        """Encodes a batch of samples: runs `encode_new` only on new ones, and caches the results."""
        records = batch.get("record")                            # (B, bytes) if all are cached
        if "pixels" in batch:
            encoded, new = self.encode_new(batch), torch.tensor(batch["new"])
            records = encoded["mean"].new_empty(len(new), sum(self.sizes), dtype=torch.uint8)
            for part, (name, (_, dtype)) in zip(records.split(self.sizes, dim=1), self.layout.items()):
                part[new] = encoded[name].to(dtype).flatten(1).view(torch.uint8)
            if "record" in batch:
                records[~new] = batch["record"]
            if not self.full:
                self.write(batch["index"], records.cpu())        # cached ones are written again, unchanged
        parts = zip(self.layout.items(), records.split(self.sizes, dim=1))
        return {name: part.clone().view(dtype).view(len(part), *shape)
                for (name, (shape, dtype)), part in parts}

    def write(self, indices: list[int], records: Tensor):
        """Writes records; when the disk is full, the rest of the run does without."""
        try:
            with open(self.path, "r+b") as file:
                for index, record in zip(indices, records.numpy()):
                    file.seek(index * (len(record) + 4))
                    file.write(record.tobytes() + checksum(index, record))
        except OSError as error:
            self.full = True
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
