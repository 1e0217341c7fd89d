"""
A cache of what the frozen VAE and text encoders make of each image and caption.
"""

import math
import zlib
from pathlib import Path

import torch
from torch import Tensor

from model import read_json
from support.checkpoint import check_settings
from support.files import write_json


class Cache:
    """
    One file of fixed-size records, shared by processes, and by runs that read the same data.

    A record is tensors of known shapes and dtypes, and a checksum of its number and contents. If it was never
    written, or is half-written, damaged or in the wrong place, the checksum is wrong: the record counts as
    absent and is made again, so no lock is needed. `identity` is what the contents depend on. Raises
    ValueError if the folder has a cache of another identity.
    """

    def __init__(self, folder: Path, identity: dict, layout: dict[str, tuple[tuple[int, ...], torch.dtype]]):
        self.path, self.layout = folder / "records.bin", layout
        self.sizes = [math.prod(shape) * dtype.itemsize for shape, dtype in layout.values()]
        self.size = sum(self.sizes) + 4
        identity = identity | {name: f"{shape} {dtype}" for name, (shape, dtype) in layout.items()}
        settings = folder / "cache.json"
        if settings.exists():
            check_settings(f"--cache {folder}", read_json(settings), identity, "--cache")
        else:
            write_json(settings, identity)
        self.path.touch()

    def read(self, index: int) -> dict[str, Tensor] | None:
        """The tensors of a record; None if it is absent."""
        with open(self.path, "rb") as file:
            file.seek(index * self.size)
            record = bytearray(file.read(self.size))
        if record[-4:] != self.checksum(index, record[:-4]):
            return None
        *parts, _ = torch.frombuffer(record, dtype=torch.uint8).split([*self.sizes, 4])
        tensors = {}
        for part, (name, (shape, dtype)) in zip(parts, self.layout.items()):
            tensors[name] = part.clone().view(dtype).view(shape)
        return tensors

    def write(self, index: int, tensors: dict[str, Tensor]):
        """Writes the tensors of the layout as a record, unless one is not finite; `tensors` may have more."""
        record = b""
        for name, (shape, dtype) in self.layout.items():
            tensor = tensors[name].to("cpu", dtype).reshape(shape).contiguous()
            if not tensor.isfinite().all():
                return
            record += tensor.flatten().view(torch.uint8).numpy().tobytes()
        with open(self.path, "r+b") as file:
            file.seek(index * self.size)
            file.write(record + self.checksum(index, record))

    def checksum(self, index: int, record: bytes) -> bytes:
        return zlib.crc32(record, zlib.crc32(index.to_bytes(8, "little"))).to_bytes(4, "little")
