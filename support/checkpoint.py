"""
A training run: a folder that can be left at any moment and taken up again.

Checkpoints with checksums, a log without gaps or repeats, and a stop that waits for the step under way.
"""

import csv
import fcntl
import json
import os
import shutil
import signal
import sys
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import files

MOMENTS = ("exp_avg", "exp_avg_sq")  # Adam's


def claim(folder: Path):
    """Makes the folder of a run and holds its lock. Raises OSError if another has it, or it is a model's."""
    model = any(Path(folder, name).exists() for name in ("model_index.json", "config.json", "unet"))
    if model and not (Path(folder, "log.csv").exists() or any(folder.glob("state-*.safetensors"))):
        raise FileExistsError(f"{folder} has a model and no run; give another --out")
    folder.mkdir(parents=True, exist_ok=True)
    lock = open(folder / ".lock", "w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise BlockingIOError(
            f"another process is at work in {folder}; wait, or give another --out") from None
    for left in folder.rglob(f"{files.WRITING}*"):  # by a process that was killed
        shutil.rmtree(left, ignore_errors=True)
    return lock


def trained(network: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """All that training changes: parameters and Adam's moments, by name."""
    tensors = {}
    for name, parameter in network.named_parameters():
        tensors[f"parameter.{name}"] = parameter.detach()
        if state := optimizer.state.get(parameter):
            tensors |= {f"{moment}.{name}": state[moment] for moment in MOMENTS}
    return tensors


def restore(tensors: dict[str, Tensor], updates: int, network: nn.Module, optimizer: torch.optim.Optimizer):
    """Puts the tensors of `trained` back, as they were after so many updates; takes them out of `tensors`."""
    for name, parameter in network.named_parameters():
        parameter.data.copy_(tensors.pop(f"parameter.{name}"))
        if f"{MOMENTS[0]}.{name}" in tensors:
            step = torch.tensor(float(updates), device=parameter.device)
            optimizer.state[parameter] = {"step": step} | {
                moment: torch.empty_like(parameter).copy_(tensors.pop(f"{moment}.{name}"))
                for moment in MOMENTS}


def save_checkpoint(folder: Path, step: int, tensors: dict[str, Tensor], **metadata):
    """
    Writes state-STEP.safetensors with a checksum for each tensor, and keeps the one before.

    Raises FloatingPointError rather than write numbers that are not finite.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    if bad := [name for name, tensor in tensors.items() if not tensor.isfinite().all()]:
        raise FloatingPointError(f"{bad[0]} is not finite and not saved; the checkpoint before is good")
    metadata |= {"step": step, "checksums": {name: checksum(tensor) for name, tensor in tensors.items()}}
    run = {"run": json.dumps(metadata)}
    run["checksum"] = str(zlib.crc32(run["run"].encode()))
    files.write(folder / f"state-{step:08d}.safetensors", lambda path: save_file(tensors, path, run))
    for old in sorted(folder.glob("state-*.safetensors"))[:-2]:
        old.unlink()


def load_checkpoint(folder: Path) -> tuple[dict, dict[str, Tensor]] | None:
    """
    Metadata and tensors of the newest good checkpoint; None if there is none.

    Raises ValueError if none is good.
    """
    paths = sorted(folder.glob("state-*.safetensors"), reverse=True)
    for path in paths:
        try:
            tensors = files.read_tensors(path)
            with safe_open(path, "pt") as file:
                run = file.metadata()
            if run["checksum"] != str(zlib.crc32(run["run"].encode())):
                raise ValueError(f"{path} is damaged: the checksum of its description is wrong")
            metadata = json.loads(run["run"])
            for name, tensor in tensors.items():
                if checksum(tensor) != metadata["checksums"][name]:
                    raise ValueError(f"{path} is damaged: the checksum of {name} is wrong")
            return metadata, tensors
        except (ValueError, KeyError, TypeError) as error:
            wrong = error if isinstance(error, ValueError) else f"{path} is not a checkpoint of a run"
            print(f"warning: {wrong}; trying the checkpoint before", file=sys.stderr)
    if paths:
        raise ValueError(f"no checkpoint in {folder} is good; move the folder away to start anew")
    return None


def checksum(tensor: Tensor) -> int:
    return zlib.crc32(tensor.numpy().reshape(-1).view(np.uint8))


class Log:
    """log.csv: a line for each step, of the steps that the checkpoint has and no other."""

    COLUMNS = ("step", "task", "outKD", "featKD", "total", "lr", "norm", "seconds", "images",
               "skipped_samples", "skipped_steps")

    def __init__(self, path: Path, step: int):
        try:
            rows = [row for row in files.read_csv(path) if int(row["step"]) <= step] if path.exists() else []
        except (KeyError, ValueError):
            raise ValueError(f"{path} is not the log of a run; remove it") from None
        files.write_csv(path, self.COLUMNS, [list(row.values()) for row in rows])
        self.file = open(path, "a", newline="")
        self.writer = csv.DictWriter(self.file, self.COLUMNS)

    def write(self, **row):
        self.writer.writerow({name: f"{value:.6g}" if isinstance(value, float) else value
                              for name, value in row.items()})
        self.file.flush()


class Signals:
    """Within `with`, SIGINT and SIGTERM ask for an end after the step under way; a second ends at once."""

    def __enter__(self) -> "Signals":
        self.asked = 0
        heard = [number for number in (signal.SIGINT, signal.SIGTERM)
                 if signal.getsignal(number) is not signal.SIG_IGN]
        self.before = {number: signal.signal(number, self.ask) for number in heard}
        return self

    def __exit__(self, *error):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def ask(self, number: int, frame):
        if self.asked:
            os._exit(128 + number)
        self.asked = number

    def agreed(self, device: str) -> int:
        """The signal that any of the processes has had, 0 for none; the same in all of them."""
        if not dist.is_initialized():
            return self.asked
        asked = torch.tensor(self.asked, device=device)
        dist.all_reduce(asked, dist.ReduceOp.MAX)
        return asked.item()


def leave_signals_alone(worker: int):
    """In the processes that read data: what torchrun tells a whole group is the main process's to hear."""
    os.setpgrp()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def union(mine: dict, world: int) -> dict:
    """The entries of a dictionary of every process."""
    parts = [mine]
    if world > 1:
        parts = [None] * world
        dist.all_gather_object(parts, mine)
    return {key: value for part in parts for key, value in part.items()}
