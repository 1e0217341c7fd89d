"""Runs of distill.py in the tests: a small teacher, flags that make a run short, and what a run leaves."""

import csv
import os
import signal
import tarfile
import traceback
from pathlib import Path
from typing import Callable

import pytest
import torch
from PIL import Image
from common import SDXL, fill
from torch import Tensor

import bundles
from model import UNet, UNetConfig, read_tensors, save_unet
from support.checkpoint import load_checkpoint
from support.vae import load_vae, save_vae
from toy import shapes

SMALL = SDXL | {"block_out_channels": [8, 16, 24], "attention_head_dim": [1, 2, 3],
                "transformer_layers_per_block": [1, 1, 1]}
VAE = {"block_out_channels": [8, 8, 16], "down_block_types": ["DownEncoderBlock2D"] * 3,
       "up_block_types": ["UpDecoderBlock2D"] * 3}
RUN = ["--steps", "4", "--batch", "2", "--dropout", "0.3", "--preview-every", "0", "--judge", "0", "--workers", "0"]

needs_fork = pytest.mark.skipif(torch.cuda.is_available(), reason="gradients with a GPU do not survive a fork")


def filled(config: dict) -> UNet:
    return fill(UNet(UNetConfig.from_diffusers(config)))


def write_teacher(folder: Path) -> Path:
    """A model that draws 64 pixels and knows the words of the shapes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bundles, "WORDS", shapes.WORDS)
        bundles.bundle(folder, vae=VAE)
    save_unet(filled(SMALL), folder / "unet")
    return folder


def write_vae(teacher: Path, folder: Path) -> Path:
    """Another VAE than a teacher's."""
    vae = load_vae(teacher)
    with torch.no_grad():
        vae.quant_conv.weight += 0.1
    save_vae(vae, folder)
    return folder


def write_pairs(folder: Path) -> Path:
    """Six captioned images, of which two are bad, and a caption without an image."""
    folder.mkdir()
    for i in range(6):
        Image.new("RGB", (70, 64), (40 * i, 0, 0)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text("a red circle")
    (folder / "1.png").write_bytes(b"")
    (folder / "4.txt").write_text(" ")
    (folder / "7.txt").write_text("a circle without a picture")
    return folder


def write_tar(folder: Path):
    """Puts the files of a folder into a shard."""
    paths = sorted(folder.iterdir())
    with tarfile.open(folder / "0.tar", "w") as tar:
        for path in paths:
            tar.add(path, path.name)
            path.unlink()


def in_processes(*jobs: Callable[[], int | None]) -> list[int]:
    """Exit codes of functions that run at the same time, each in a process of its own."""
    children = []
    for job in jobs:
        if (child := os.fork()) == 0:
            code = 99
            try:
                signal.alarm(120)
                torch.set_num_threads(1)                         # threads do not survive a fork
                code = job() or 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        children.append(child)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def log_rows(run: Path) -> list[dict[str, str]]:
    """log.csv without the time that steps took, and what follows from it."""
    with open(run / "log.csv", newline="") as file:
        return [{name: value for name, value in row.items() if name not in ("seconds", "images_per_s", "mfu")}
                for row in csv.DictReader(file)]


def checkpoint(run: Path) -> tuple[dict, dict[str, Tensor]]:
    """The state, the weights and the moments of the newest checkpoint."""
    folder, content = load_checkpoint(run)
    tensors = {}
    for path in sorted(folder.rglob("*.safetensors")):
        tensors |= read_tensors(path)
    return content["state"], tensors


def equal(ones: dict[str, Tensor], others: dict[str, Tensor]) -> bool:
    return ones.keys() == others.keys() and all(torch.equal(ones[name], others[name]) for name in ones)


def contents(folder: Path) -> dict[Path, bytes]:
    """What is in the files of a folder, by their names."""
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
