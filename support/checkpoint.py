"""
A training run as a folder that can be left at any moment and resumed: lock, checkpoints, log, stop.

    runs/NAME/step-00000500/    a checkpoint: weights, Adam's moments, and state.json with their checksums
    runs/NAME/log.csv           one row for each step
"""

import csv
import json
import os
import shutil
import signal
import sys
import time
import weakref
import zlib
from functools import partial
from pathlib import Path
from typing import Callable, NamedTuple

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import nn

from model import read_json, read_tensors
from support.cli import Preset
from support.files import (
    PARTS, WRITING, atomic_write, bundle_files, error_summary, name_in_errors, read_csv, write_csv,
    write_json)
from support.text import ENCODERS

if os.name == "nt":
    import msvcrt
else:
    import fcntl

CHECKPOINTS = "step-" + 8 * "[0-9]"  # pattern of their folders' names
MOMENTS = ("exp_avg", "exp_avg_sq")  # Adam's


def lock_run_dir(folder: Path, other: str = "bundle"):
    """
    Makes the folder of a run and locks it until the process ends, however it ends.

    Raises OSError if another process has the lock, if the folder has a model and no run, or if it has
    `other`, the file or folder that a run of the other program leaves.
    """
    has_model = any(Path(folder, name).exists() for name in ("model_index.json", "config.json", "unet"))
    has_run = Path(folder, "log.csv").exists() or any(folder.glob(CHECKPOINTS))
    if has_model and not has_run or Path(folder, other).exists():
        raise FileExistsError(f"{folder} has a model and no run of this program; give another --out")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / ".lock"
    if path.is_symlink() or path.exists() and not path.is_file():
        raise FileExistsError(f"{path} is not a plain file; remove it")
    lock = open(path, "a")
    if os.name != "nt":  # readers of data, which may outlive this process, do not keep the lock
        lock_ref = weakref.ref(lock)
        os.register_at_fork(after_in_child=lambda: lock_ref() and lock_ref().close())
    try:
        if os.name == "nt":
            msvcrt.locking(lock.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise BlockingIOError(f"another process is using {folder}; wait, or give another --out") from None
    for leftover in list(folder.rglob(f"{WRITING}*")):  # by a process that was killed
        if leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)
    return lock


def check_settings(where: str, before: dict, now: dict, flag: str):
    """Raises ValueError if `where` was made with other settings than now; `flag` gives another place."""
    changed = [f"{name} was {before.get(name)} and is {now.get(name)}"
               for name in {**before, **now} if before.get(name) != now.get(name)]
    if changed:
        raise ValueError(f"{where} was made with other settings: {'; '.join(changed)}; give another {flag}")


def fingerprint(*networks: nn.Module) -> str:
    """A checksum that tells models apart: of each parameter's name and about 1,024 of its numbers."""
    checksum = 0
    for network in networks:
        for name, parameter in network.named_parameters():
            numbers = parameter.detach().flatten()
            numbers = numbers[::max(1, len(numbers) // 1024)].float().cpu()
            checksum = zlib.crc32(numbers.numpy().tobytes(), zlib.crc32(name.encode(), checksum))
    return f"{checksum:08x}"


# ------------------------------------------------------------------------------------------------------------
# Checkpoints


def file_checksum(path: Path) -> int:
    checksum = 0
    with open(path, "rb") as file:
        while chunk := file.read(2**24):
            checksum = zlib.crc32(chunk, checksum)
    return checksum


def show_unet(run: Path, checkpoint: Path):
    """Shows unet/ and unet_ema/ of a checkpoint in the run's folder, as hard links where possible."""
    for path in checkpoint.glob("unet*/*"):
        atomic_write(run / path.relative_to(checkpoint), partial(link_or_copy, path))


def link_or_copy(source: Path, target: Path):
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def save_checkpoint(run: Path, identity: dict, state: dict, network: nn.Module,
                    optimizer: torch.optim.Optimizer, save_weights: Callable[[Path], object]):
    """
    Writes the checkpoint of `state["step"]`, and removes all but it and the one before.

    `save_weights(folder)` writes the network's weights; folders unet/ and unet_ema/ that it makes appear in
    the run's folder too. `state` is everything else, as JSON. Raises OSError, and FloatingPointError rather
    than save numbers that are not finite.
    """
    moments = {f"{moment}.{name}": optimizer.state[parameter][moment].contiguous()
               for name, parameter in network.named_parameters() if parameter in optimizer.state
               for moment in MOMENTS}
    tensors = [*network.parameters(), *moments.values()]
    if not torch.stack([tensor.detach().isfinite().all() for tensor in tensors]).all():
        raise FloatingPointError(f"step {state['step']} has numbers that are not finite and is not saved; "
                                 f"the last checkpoint in {run} is good")

    def write(folder: Path):
        folder.mkdir()
        save_weights(folder)
        save_file(moments, folder / "optimizer.safetensors")
        files = {path.relative_to(folder).as_posix(): file_checksum(path)
                 for path in sorted(folder.rglob("*")) if path.is_file()}
        content = json.dumps({"identity": identity, "state": state, "files": files})
        outer = {"checksum": zlib.crc32(content.encode()), "content": content}
        (folder / "state.json").write_text(json.dumps(outer))

    folder = run / f"step-{state['step']:08d}"
    shutil.rmtree(folder, ignore_errors=True)  # a damaged one, or the run would have resumed from it
    atomic_write(folder, write)
    show_unet(run, folder)
    kept = sorted(path for path in run.glob(CHECKPOINTS) if path <= folder)[-2:]
    for path in run.glob(CHECKPOINTS):
        if path not in kept:
            shutil.rmtree(path)


def load_checkpoint(run: Path) -> tuple[Path, dict] | None:
    """
    Folder and content of the newest undamaged checkpoint; None if there is no checkpoint.

    The content has `identity`, `state` and the checksums of `files`. Raises ValueError if all are damaged.
    """
    folders = sorted(run.glob(CHECKPOINTS), reverse=True)
    for folder in folders:
        try:
            outer = read_json(folder / "state.json")
            if outer["checksum"] != zlib.crc32(outer["content"].encode()):
                raise ValueError("the checksum of state.json is wrong")
            content = json.loads(outer["content"])
            for name, checksum in content["files"].items():
                if file_checksum(folder / name) != checksum:
                    raise ValueError(f"the checksum of {name} is wrong")
            return folder, content
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            print(f"warning: {folder} is damaged: {error_summary(error)}; trying the checkpoint before",
                  file=sys.stderr)
    if folders:
        raise ValueError(f"no checkpoint in {run} is undamaged; move the folder away to start again")
    return None


def resume(run: Path, identity: dict, network: nn.Module, optimizer: torch.optim.Optimizer,
           load_weights: Callable[[Path], object]) -> dict:
    """
    Restores weights and moments of the newest checkpoint and returns its state; {} if there is none.

    Raises ValueError if the run was started with another `identity`.
    """
    newest = load_checkpoint(run)
    if newest is None:
        return {}
    folder, content = newest
    check_settings(str(run), content["identity"], identity, "--out")
    state = content["state"]
    load_weights(folder)
    moments = read_tensors(folder / "optimizer.safetensors")
    for name, parameter in network.named_parameters():
        if f"{MOMENTS[0]}.{name}" in moments:
            restored = {"step": torch.tensor(float(state["updates"]), device=parameter.device)}
            for moment in MOMENTS:
                restored[moment] = torch.empty_like(parameter).copy_(moments.pop(f"{moment}.{name}"))
            optimizer.state[parameter] = restored
    show_unet(run, folder)
    return state


def complete_model(run: Path, teacher: Path, vae: Path, preset: Preset):
    """Makes a run's folder a whole model: the teacher's other networks, the VAE, and how it is sampled."""
    names = [path.relative_to(teacher).as_posix() for path in teacher.rglob("*") if path.is_file()]
    others = tuple(part for part in PARTS if part not in ("unet", "vae"))
    copies = [(teacher / name, run / name) for name in bundle_files(names, others)]
    names = [path.name for path in vae.iterdir()]
    copies += [(vae / name, run / "vae" / name) for name in bundle_files(names, ("vae",))]
    for source, target in copies:
        atomic_write(target, partial(shutil.copyfile, source))
        if target.name == "config.json" and target.parent.name in ENCODERS:
            # transformers computes in this dtype: float32, as the U-Net's, for diffusers cannot mix them.
            config = {key: value for key, value in read_json(target).items() if key != "torch_dtype"}
            write_json(target, config | {"dtype": "float32"})
    sampling = preset._asdict()
    del sampling["source"], sampling["student"]
    write_json(run / "preset.json", sampling)


class Log:
    """
    log.csv, with a row for each step; on resuming, the rows after the checkpoint are dropped.

    mfu is the share of the GPUs' peak FLOP/s that is used, empty where the peak is not known; fixed_outKD is
    outKD of a batch that is always the same, every --preview-every steps.
    """

    COLUMNS = ("step", "task", "outKD", "featKD", "total", "lr", "norm", "seconds", "images",
               "skipped_samples", "skipped_steps", "images_per_s", "mfu", "fixed_outKD")

    def __init__(self, path: Path, step: int):
        rows = read_csv(path, ("step",)) if path.exists() else []
        rows = [row for row in rows if float(row["step"]) <= step]
        write_csv(path, self.COLUMNS, [[row.get(name, "") for name in self.COLUMNS] for row in rows])
        self.path, self.file = path, open(path, "a", newline="")
        self.writer = csv.DictWriter(self.file, self.COLUMNS)

    def write(self, **row):
        with name_in_errors(self.path):
            self.writer.writerow({name: f"{value:.6g}" if isinstance(value, float) else value
                                  for name, value in row.items()})
            self.file.flush()


# ------------------------------------------------------------------------------------------------------------
# Several processes, and how they stop


class Ranks(NamedTuple):
    rank: int
    world: int
    local: int


def process_ranks() -> Ranks:
    """Rank, world size and local rank, as torchrun sets them. Raises ValueError."""
    defaults = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0}
    try:
        rank, world, local = (int(os.environ.get(name, default)) for name, default in defaults.items())
    except ValueError:
        rank = world = local = -1
    if not 0 <= rank < world or local < 0:
        raise ValueError(f"{', '.join(defaults)} are numbers that torchrun sets: unset them")
    return Ranks(rank, world, local)


def gather_dicts(mine: dict) -> dict:
    """The entries of all processes' dictionaries."""
    if not dist.is_initialized():
        return mine
    parts = [None] * dist.get_world_size()
    dist.all_gather_object(parts, mine)
    return {key: value for part in parts for key, value in part.items()}


def check_agreement(status: str):
    """Raises ValueError if the processes' statuses differ, as when folders differ between machines."""
    by_rank = gather_dicts({process_ranks().rank: status})
    if len(set(by_rank.values())) > 1:
        raise ValueError(f"processes disagree, by rank: {by_rank}; --out and --data must be the same folders "
                         f"on all machines")


class StopSignal:
    """
    Within `with`, a first SIGINT or SIGTERM sets `received`; one after PATIENCE seconds ends the process.

    An earlier one is the same stop: torchrun passes on a signal that its processes have received themselves.
    """

    PATIENCE = 3

    def __enter__(self) -> "StopSignal":
        self.received, self.handlers = 0, {}
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) is not signal.SIG_IGN:
                self.handlers[number] = signal.signal(number, self.receive)
        return self

    def __exit__(self, *error):
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def receive(self, number: int, frame):
        if not self.received:
            self.received, self.since = number, time.monotonic()
            if process_ranks().rank == 0:                        # not by `print`, which is not reentrant
                os.write(2, b"\nstopping after this step, which is saved; after 3 s a second signal ends at once\n")
        elif time.monotonic() > self.since + self.PATIENCE:
            os._exit(128 + number)


def start_reader(worker: int):
    """
    For the processes that read data: they end with the main process, which handles signals and reports errors.

    A reader that hands over a sample while the run ends would else print that its connection broke.
    """
    def report(kind: type, error: Exception, trace):
        if not isinstance(error, (OSError, EOFError)):
            sys.__excepthook__(kind, error, trace)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.excepthook = report
