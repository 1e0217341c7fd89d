"""
A training run: its folder, which can be resumed after any interruption, and its processes.

    runs/NAME/step-00000500/    a checkpoint: unet/, optimizer.safetensors, state.json with their checksums
    runs/NAME/log.csv           one row for each step
"""

import contextlib
import csv
import json
import os
import shutil
import signal
import sys
import zlib
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Callable

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from model import read_json, read_tensors
from support.files import (
    WRITING, atomic_write, error_summary, name_in_errors, read_csv, share_weights, write_csv, write_json)
from support.hub import Preset
from support.text import TOKENIZERS, load_text
from support.vae import load_vae, save_vae

try:
    import fcntl
except ImportError:  # Windows has no such locks
    fcntl = None

CHECKPOINTS = "step-" + 8 * "[0-9]"  # pattern of their folders' names
MOMENTS = ("exp_avg", "exp_avg_sq")  # Adam's, besides its step count


def lock_run_dir(folder: Path):
    """
    Creates a run's folder and locks it until the process ends; the caller keeps the returned file open.

    Raises OSError if another process has the lock, or if the folder has a model but no run.
    """
    if (folder / "model_index.json").exists() and not (folder / "log.csv").exists():
        raise FileExistsError(f"{folder} contains a model, but no run of this program; give another --out")
    folder.mkdir(parents=True, exist_ok=True)
    lock = open(folder / ".lock", "a")
    try:
        if fcntl:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        raise BlockingIOError(f"another process is using {folder}; wait, or give another --out") from None
    except OSError as error:                                     # a file system without locks
        print(f"warning: {folder} cannot be locked ({error_summary(error)}); run one process on it at a time",
              file=sys.stderr)
    for leftover in list(folder.rglob(f"{WRITING}*")):           # left by a killed process
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink(missing_ok=True)
    return lock


def fingerprint(*networks: nn.Module) -> str:
    """A checksum to tell models apart, over each parameter's name and about 1,024 of its values."""
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
        for chunk in iter(partial(file.read, 2**24), b""):
            checksum = zlib.crc32(chunk, checksum)
    return checksum


def save_checkpoint(run: Path, identity: dict, state: dict, network: nn.Module,
                    optimizer: torch.optim.Optimizer, save_weights: Callable[[Path], object]):
    """
    Writes the checkpoint of `state["step"]`, and deletes all others but the previous one.

    `save_weights(folder)` writes the weights; a folder unet/ that it creates is also copied to the run's
    folder. `state` is everything else, as JSON. Raises OSError, or FloatingPointError instead of saving
    non-finite numbers.
    """
    moments = {f"{moment}.{name}": optimizer.state[parameter][moment]
               for name, parameter in network.named_parameters() if parameter in optimizer.state
               for moment in ("step", *MOMENTS)}
    tensors = [*network.parameters(), *moments.values()]
    if not torch.stack([tensor.detach().isfinite().all() for tensor in tensors]).all():
        raise FloatingPointError(f"step {state['step']} has numbers that are not finite and is not saved; "
                                 f"the last checkpoint in {run} is good")

    def write(folder: Path):
        folder.mkdir()
        save_weights(folder)
        save_file({name: moment.cpu().contiguous() for name, moment in moments.items()},
                  folder / "optimizer.safetensors")
        files = {path.relative_to(folder).as_posix(): file_checksum(path)
                 for path in sorted(folder.rglob("*")) if path.is_file()}
        content = json.dumps({"identity": identity, "state": state, "files": files})
        (folder / "state.json").write_text(f"{content}\n{zlib.crc32(content.encode())}\n", encoding="utf-8")

    folder = run / f"step-{state['step']:08d}"
    shutil.rmtree(folder, ignore_errors=True)                    # damaged, or it would have been resumed
    atomic_write(folder, write)
    copy_unet(run, folder)
    kept = sorted(path for path in run.glob(CHECKPOINTS) if path <= folder)[-2:]
    for path in run.glob(CHECKPOINTS):                           # newer ones are damaged
        if path not in kept:
            shutil.rmtree(path)


def copy_unet(run: Path, checkpoint: Path):
    """Copies unet/ of a checkpoint to the run's folder."""
    for path in checkpoint.glob("unet/*"):
        atomic_write(run / "unet" / path.name, partial(shutil.copyfile, path))


def load_checkpoint(run: Path) -> tuple[Path, dict] | None:
    """
    Folder and content (`identity`, `state`) of the newest undamaged checkpoint; None if there is none.

    Raises ValueError if all are damaged.
    """
    folders = sorted(run.glob(CHECKPOINTS), reverse=True)
    for folder in folders:
        try:
            text, checksum, _ = (folder / "state.json").read_text(encoding="utf-8").split("\n")
            if int(checksum) != zlib.crc32(text.encode()):
                raise ValueError("the checksum of state.json is wrong")
            content = json.loads(text)
            for name, expected in content["files"].items():
                if file_checksum(folder / name) != expected:
                    raise ValueError(f"the checksum of {name} is wrong")
            return folder, content
        except PermissionError:                                  # not damage: another user's run
            raise
        except (OSError, ValueError) as error:
            print(f"warning: {folder} is damaged: {error_summary(error)}; trying the previous one",
                  file=sys.stderr)
    if folders:
        raise ValueError(f"all checkpoints in {run} are damaged; move the folder away to start over")
    return None


def resume(run: Path, identity: dict, state: dict, network: nn.Module, optimizer: torch.optim.Optimizer,
           load_weights: Callable[[Path], object]) -> dict:
    """
    Restores weights and moments of the newest checkpoint and returns its state, or else `state`.

    Raises ValueError if the run was started with another `identity`.
    """
    newest = load_checkpoint(run)
    if newest is None:
        return state
    folder, content = newest
    check_settings(str(run), content["identity"], identity, "--out")
    load_weights(folder)
    moments = read_tensors(folder / "optimizer.safetensors")
    for name, parameter in network.named_parameters():
        if f"step.{name}" in moments:
            restored = {"step": moments.pop(f"step.{name}").to(parameter.device)}
            for moment in MOMENTS:
                restored[moment] = torch.empty_like(parameter).copy_(moments.pop(f"{moment}.{name}"))
            optimizer.state[parameter] = restored
    rank, _ = process_ranks()
    if rank == 0:
        copy_unet(run, folder)
    return content["state"]


def record_step(state: dict, finite: bool, skipped: dict[str, int]):
    """
    Records a step in a run's state; one with non-finite gradients changed nothing.

    Raises FloatingPointError after 20 steps in a row that changed nothing.
    """
    state["step"] += 1
    state["skipped_steps"] += not finite
    state["skipped_in_a_row"] = 0 if finite else state["skipped_in_a_row"] + 1
    for reason, count in skipped.items():
        state["skipped"][reason] += count
    if state["skipped_in_a_row"] >= 20:
        raise FloatingPointError("20 steps in a row had gradients that are not finite; start another run "
                                 "from unet/ (--init), with --precision bf16 or a lower --lr")


def check_settings(where: str, before: dict, now: dict, flag: str):
    """Raises ValueError if `where` was made with other settings than now; `flag` chooses another folder."""
    changed = [f"{name} was {before.get(name)} and is {now.get(name)}"
               for name in {**before, **now} if before.get(name) != now.get(name)]
    if changed:
        raise ValueError(f"{where} was made with other settings: {'; '.join(changed)}; give another {flag}")


def complete_model(run: Path, teacher: Path, vae: Path, preset: Preset):
    """
    Makes a run's folder a complete model: adds the teacher's text encoders, the VAE and the preset.

    Everything is float32, like the student, because diffusers needs one dtype.
    """
    with name_in_errors(run):
        load_text(teacher, torch.float32).save(run)
        save_vae(load_vae(vae, torch.float32), run / "vae")
        share_weights(run)
        for part in ("scheduler", *TOKENIZERS):
            if (teacher / part).is_dir():
                shutil.copytree(teacher / part, run / part, copy_function=shutil.copyfile, dirs_exist_ok=True)
    write_json(run / "preset.json", {name: value for name, value in preset._asdict().items()
                                     if name not in ("source", "student")})
    index = read_json(teacher / "model_index.json")
    for part in index:
        if isinstance(index[part], list) and not (run / part).is_dir():
            index[part] = [None, None]                           # such as Stable Diffusion's safety checker
    write_json(run / "model_index.json", index)                  # last: now it is whole


class Log:
    """log.csv, with a row for each step; on resuming, the rows after the checkpoint are dropped."""

    COLUMNS = ("step", "task", "outKD", "featKD", "total", "lr", "norm", "seconds", "images",
               "skipped_samples", "skipped_steps", "images_per_s")

    def __init__(self, path: Path, step: int):
        rows = read_csv(path, self.COLUMNS) if path.exists() else []
        rows = [list(row.values()) for row in rows if int(row["step"]) <= step]
        write_csv(path, self.COLUMNS, rows)
        self.file = open(path, "a", newline="", encoding="utf-8")
        self.writer = csv.DictWriter(self.file, self.COLUMNS)

    def write(self, bar: tqdm, state: dict, losses: dict[str, float], images: int, seconds: float,
              lr: float, norm: float):
        """Writes the row of a step with `images` images, and shows its losses in the progress bar."""
        shown = losses | {"images_per_s": images / seconds}
        row = shown | {
            "step": state["step"], "lr": lr, "norm": norm, "seconds": seconds,
            "images": state["step"] * images,
            "skipped_samples": sum(state["skipped"].values()), "skipped_steps": state["skipped_steps"]}
        self.writer.writerow({name: f"{value:.6g}" if isinstance(value, float) else value
                              for name, value in row.items()})
        self.file.flush()
        with contextlib.suppress(OSError):                       # the terminal is gone
            bar.set_postfix({name: f"{value:.3g}" for name, value in shown.items()}, refresh=False)
            bar.update()


def say(bar: tqdm, text: str):
    """Prints a line above a progress bar, or nothing if the terminal is gone."""
    with contextlib.suppress(OSError):
        bar.write(text)


# ------------------------------------------------------------------------------------------------------------
# Several processes, and how they stop


def process_ranks() -> tuple[int, int]:
    """The rank of this process and the number of processes, as torchrun sets them."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def join_processes(device: str, chosen: str | None):
    """Connects the processes of torchrun, over NCCL if each has its own GPU; `chosen` is --device."""
    _, world = process_ranks()
    if world > 1:
        enough = torch.cuda.device_count() >= int(os.environ.get("LOCAL_WORLD_SIZE", world))
        own_gpu = device.startswith("cuda") and enough and chosen in (None, "cuda")
        dist.init_process_group("nccl" if own_gpu else "gloo", timeout=timedelta(hours=2),
                                device_id=torch.device(device) if own_gpu else None)


@contextlib.contextmanager
def rank_0_first():
    """Process 0 enters the block; the others follow when it is done."""
    rank, world = process_ranks()
    if rank > 0:
        dist.barrier()
    yield
    if rank == 0 and world > 1:
        dist.barrier()


def read_results(terms: Tensor, norm: Tensor, skipped: Tensor,
                 stop: bool) -> tuple[list[float], float, list[int], bool]:
    """
    Reduces over all processes and returns Python numbers: the means of `terms`, the gradient norm, skipped
    samples per reason, and whether to stop. A step waits for the device here (and to cache new images).
    """
    counts = torch.tensor([*skipped, stop])
    sums, world = torch.cat([terms, norm[None], counts.to(terms)]), 1
    if dist.is_initialized():
        dist.all_reduce(sums)
        world = dist.get_world_size()
    sums = sums.cpu()                                            # waits for the device
    *means, mean_norm = (sums[:len(terms) + 1] / world).tolist()
    *counts, stops = sums[len(terms) + 1:].int().tolist()
    return means, mean_norm, counts, stops > 0


SIGNALS = [number for number in (signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", None)) if number]


class StopSignal:
    """
    In its block, stores the first SIGINT, SIGTERM or SIGHUP in `received` instead of exiting.

    Later ones are ignored. SIGQUIT (Ctrl-\\) and SIGKILL end the process at once.
    """

    def __enter__(self) -> "StopSignal":
        self.received, self.handlers = 0, {}
        for number in SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:   # nohup and background jobs ignore it
                self.handlers[number] = signal.signal(number, self.receive)
        return self

    def __exit__(self, *error):
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def receive(self, number: int, frame):
        self.received = self.received or number


def ignore_signals(worker: int):
    """For processes that read data: they end with the main process, which handles signals."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
