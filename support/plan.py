"""
What a run of distill.py needs, known before it starts: memory, work and hours.

They are counted in the step that trains, on networks whose tensors have shapes and no numbers.
"""

import argparse
import re
import weakref
from functools import cache
from itertools import product
from types import SimpleNamespace
from typing import Callable

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import model
from support.cli import PRECISIONS
from support.costs import count_flops, count_parameters, unet_inputs
from support.plots import print_table
from support.text import CLIP, CLIPConfig, TextEncoders
from support.vae import VAE, VAEConfig

PEAKS = {  # TFLOP/s of dense 16-bit matrix products that sum in float32, by what is in a device's name
    "A100": 312, "H100 PCIe": 756, "H100": 989, "H200": 989, "B200": 2250, "L4": 121, "L40S": 362, "A10": 125,
    "RTX 3090": 71, "RTX 4090": 165}
CARDS = {  # bytes that PyTorch finds on cards of 24, 40, 80, 80 and 141 GB
    "RTX 4090": 25.3e9, "A100-40GB": 42.2e9, "A100-80GB": 85e9, "H100-80GB": 85e9, "H200": 150e9}
USABLE = 0.9  # of these bytes, assumed; the rest is for CUDA itself, workspaces and fragments
SHARE = 0.2   # of the peak that a training reaches, assumed; published ones like it reach 0.13 to 0.28 on A100


def peak_flops(device_name: str) -> float:
    """The peak FLOP/s of a device in 16 bits, or 0 if it is not known."""
    return next((1e12 * peak for name, peak in PEAKS.items() if re.search(rf"\b{name}\b", device_name)), 0.0)


class MemoryCounter(TorchDispatchMode):
    """Counts the bytes of tensors that are made within `with`: of those still alive, and their peak."""

    def __init__(self):
        super().__init__()
        self.alive, self.peak, self.storages = 0, 0, set()

    def __torch_dispatch__(self, op: Callable, types: tuple, args: tuple = (), kwargs: dict | None = None):
        output = op(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            if isinstance(tensor, Tensor):
                self.add(tensor.untyped_storage())
        return output

    def add(self, storage: torch.UntypedStorage):
        key, size = storage._cdata, storage.nbytes()
        if key not in self.storages:                             # neither a view nor changed in place
            self.storages.add(key)
            self.alive += size
            self.peak = max(self.peak, self.alive)
            weakref.finalize(storage, self.remove, key, size)

    def remove(self, key: int, size: int):
        self.storages.remove(key)
        self.alive -= size


def in_float32(norm: nn.Module, inputs: tuple[Tensor]) -> Tensor:
    """A hook: norms compute in float32 under CUDA's autocast, and keep such inputs; the CPU's leaves them."""
    return inputs[0].float()


def frozen(build: Callable[[], nn.Module], dtype: torch.dtype) -> nn.Module:
    """A network created in `dtype`, since fake tensors cannot be cast."""
    torch.set_default_dtype(dtype)
    try:
        return build().requires_grad_(False)
    finally:
        torch.set_default_dtype(torch.float32)


class Rehearsal:
    """
    The networks of a run as tensors without numbers, and what a step on them costs.

    `schedule` is the run's noise schedule; `hook_features` and `sample_loss` are distill.py's. `matched` has
    paths of the student's modules and of the teacher's that they learn from.
    """

    def __init__(self, args: argparse.Namespace, texts: tuple[CLIPConfig, ...], vae: VAEConfig,
                 teacher: model.UNetConfig | None, student: model.UNetConfig, matched: dict[str, str],
                 schedule, hook_features: Callable, sample_loss: Callable):
        self.args, self.matched, self.sample_loss = args, matched, sample_loss
        self.config, self.vae_config, self.tokens = student, vae, texts[0].max_position_embeddings
        self.size = args.size or student.sample_size * vae.downscale
        self.fake, self.memory = FakeTensorMode(allow_non_fake_inputs=True), MemoryCounter()
        dtype = PRECISIONS[args.precision or "bf16"]
        with self.fake, self.memory:
            self.student = model.UNet(student)
            for parameter in self.student.parameters():  # DistributedDataParallel's buckets are the gradients
                parameter.grad = torch.zeros_like(parameter)
            self.others = [torch.zeros_like(parameter) for parameter in self.student.parameters()
                           for _ in range(3 if args.ema else 2)]  # Adam's moments, and the average
            self.teacher = frozen(lambda: model.UNet(teacher), dtype) if teacher else None
            encoder = frozen(lambda: VAE(vae), torch.float32 if vae.force_upcast else dtype)
            text = frozen(lambda: TextEncoders(
                [CLIP(config, i == 1, last=len(texts) == 1) for i, config in enumerate(texts)],
                [lambda prompts: torch.zeros(len(prompts), self.tokens, dtype=torch.long)] * len(texts)), dtype)
        self.pipeline = SimpleNamespace(device="cpu", dtype=dtype, text=text, vae=encoder, schedule=schedule,
                                        zero_negative=len(texts) > 1)
        for module in self.student.modules():
            if isinstance(module, (nn.GroupNorm, nn.LayerNorm)):
                module.register_forward_pre_hook(in_float32)
        self.networks = hook_features(self.teacher, self.student, matched, args.out_kd)

    def loss(self, images: int) -> Tensor:
        """The loss of a micro-batch of so many images, none of which is in a cache."""
        side = self.size // self.vae_config.downscale
        noise = torch.zeros(self.config.in_channels, side, side)
        pixels = torch.zeros(3, self.size, self.size, dtype=torch.uint8)
        sample = {"pixels": pixels, "caption": "", "timestep": 0, "dropped": False, "noise": noise,
                  "latent_noise": noise, "time_ids": torch.zeros(6)}
        samples = [dict(sample) for _ in range(images)]
        loss, _ = self.sample_loss(self.args, samples, self.pipeline, self.networks)
        return loss

    @cache
    def peak(self, images: int, checkpointing: str) -> int:
        """Peak bytes of a process with micro-batches of so many images: networks, Adam, activations, all."""
        self.student.set_checkpointing(checkpointing)
        with self.fake, self.memory as memory:
            memory.peak = memory.alive
            self.loss(images).backward()
        return memory.peak

    @cache
    def flops(self, checkpointing: str = "none") -> int:
        """FLOPs of an image, with what is recomputed."""
        self.student.set_checkpointing(checkpointing)
        with self.fake, count_flops() as counter:  # by itself, as this counter holds on to tensors
            self.loss(1).backward()
        return counter.get_total_flops()

    def parts(self) -> dict[str, int]:
        """FLOPs of an image, by network, with nothing recomputed."""
        self.student.set_checkpointing("none")
        counts = {}
        with self.fake:
            inputs = unet_inputs(self.config, self.tokens, self.size // self.vae_config.downscale)
            networks = {"teacher": (self.teacher, inputs),
                        "student, forward and backward": (self.student, inputs),
                        "VAE encoder": (self.pipeline.vae.encoder, [torch.zeros(1, 3, self.size, self.size)])}
            for name, (network, inputs) in networks.items():
                if network and (network != self.teacher or self.args.out_kd or self.matched):
                    dtype = next(network.parameters()).dtype
                    with count_flops() as counter:
                        output = network(*(x.to(dtype) for x in inputs))
                        if output.requires_grad:
                            output.sum().backward()
                    counts[name] = counter.get_total_flops()
        return counts

    def sizes(self) -> list[int]:
        """Micro-batches to choose from: that of the settings, and smaller ones that divide it."""
        largest = self.args.micro_batch
        return [size for size in range(largest, 0, -1) if largest % size == 0]

    def modes(self) -> list[str]:
        """Kinds of checkpointing to choose from, those that recompute least before others."""
        return [self.args.checkpointing] if self.args.checkpointing else list(model.CHECKPOINTING)

    def fit(self, memory: float) -> tuple[int, str] | None:
        """The largest micro-batch for a GPU of so many bytes, and then the least checkpointing, if any fit."""
        for size, mode in product(self.sizes(), self.modes()):
            if self.peak(size, mode) <= USABLE * memory:
                return size, mode
        return None


def dry_run(rehearsal: Rehearsal):
    """Prints what a run of distill.py would be: settings, features, parameters, work, memory, hours."""
    args, matched, total = rehearsal.args, rehearsal.matched, rehearsal.flops()
    networks = rehearsal.teacher, rehearsal.student, rehearsal.pipeline.vae
    t, s, v = (count_parameters(network) if network else 0 for network in networks)
    for name in sorted(vars(args).keys() - {"dry_run"}):
        print(f"{name:14} {getattr(args, name)}")
    print(f"\n{len(matched)} features, student <- teacher")
    for path, source in matched.items():
        print(f"  {path} <- {source}")
    print(f"\nparameters   teacher {t:,}, student {s:,}{f' ({s / t - 1:+.1%})' if t else ''}, VAE {v:,}")
    parts = ", ".join(f"{name} {flops / 1e12:.4g}" for name, flops in rehearsal.parts().items())
    print(f"work         TFLOP an image: {parts};\n"
          f"             with text {total / 1e12:.4g}, a step of {args.batch}: {args.batch * total / 1e12:.4g}")
    rows = []
    for card, memory in CARDS.items():
        size, mode = choice = rehearsal.fit(memory) or ("none fits", "")
        row = [card, f"{memory / 1e9:g}", size, mode]
        if mode:
            seconds = args.steps * args.batch * rehearsal.flops(mode) / (SHARE * peak_flops(card))
            hours = [seconds / 3600 / gpus for gpus in (1, 4, 8)]
            row += [f"{number:.1f}" for number in (rehearsal.peak(*choice) / 1e9, *hours)]
        rows.append(row + [""] * (8 - len(row)))
    print(f"memory       what fits {USABLE:.0%} of a card, the GB that a process then needs, and the run's hours\n"
          f"             on 1, 4 and 8 of them at {SHARE:.0%} of the peak; counted, not measured\n")
    print_table(["card", "GB", "micro-batch", "checkpointing", "needs GB", "h on 1", "h on 4", "h on 8"], rows)
