"""
Our speed beside diffusers', in turns, so that a slow moment of the machine falls on both.

    python tests/benchmark.py                              # all; needs diffusers
    python tests/benchmark.py --only toy sample distill    # these three

A line: median seconds of ours and theirs, and the median ratio of neighbors (below 1: ours is faster).
"""

import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Callable

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, StableDiffusionXLPipeline, UNet2DConditionModel
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

import model
from common import networks_of
from distill import KOALA_FEATURES, Batch, distill_batch, match_features
from oracle import predict
from sample import load_pipeline
from support.hub import TOY, ArgumentParser
from support.vae import VAEConfig

TOY_UNET = model.read_json(TOY / "unet" / "config.json", model.UNetConfig.from_diffusers)
NARROW = replace(model.CONFIGS["sdxl"], channels=(64, 128, 256), heads=(1, 2, 4), context_dim=256,
                 pooled_dim=128)


def in_turns(name: str, ours: Callable, theirs: Callable, runs: int = 7):
    """Times both calls by turns and prints a line; the first pair warms up."""
    pairs = []
    for _ in range(runs + 1):
        times = [time.perf_counter()]
        for call in (ours, theirs):
            call()
            times.append(time.perf_counter())
        pairs.append((times[1] - times[0], times[2] - times[1]))
    a, b = (statistics.median(side) for side in zip(*pairs[1:]))
    ratio = statistics.median(mine / yours for mine, yours in pairs[1:])
    print(f"{name:34} ours {a:8.3f} s   diffusers {b:8.3f} s   ratio {ratio:.3f}   {runs} runs", flush=True)


def same_network(ours: model.UNet) -> UNet2DConditionModel:
    """diffusers' network with the same weights; ours gets the memory layout that our programs give it."""
    theirs = UNet2DConditionModel.from_config(ours.config.to_diffusers()).to(ours.conv_in.weight.dtype)
    theirs.load_state_dict(ours.state_dict())
    ours.to(memory_format=torch.channels_last)
    return theirs


def inputs(config: model.UNetConfig, batch: int, side: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """What our U-Net reads, with the argument names of `model.UNet.forward`."""
    return {"sample": torch.randn(batch, 4, side, side, dtype=dtype), "timestep": torch.full((batch,), 500),
            "context": torch.randn(batch, 77, config.context_dim, dtype=dtype),
            "pooled": torch.randn(batch, config.pooled_dim, dtype=dtype),
            "time_ids": torch.full((batch, 6), 1024.0, dtype=dtype)}


@torch.inference_mode()
def forward(name: str, config: model.UNetConfig, batch: int, side: int, dtype=torch.float32):
    ours = model.UNet(config).to(dtype)
    theirs, x = same_network(ours), inputs(config, batch, side, dtype)
    in_turns(f"{name} {str(dtype)[6:]}", lambda: ours(**x), lambda: predict(theirs, **x))
    expected = predict(theirs, **x)
    print(f"{'':34} relative difference {(ours(**x) - expected).norm() / expected.norm():.1e}")


def unet():
    for dtype in (torch.float32, torch.bfloat16):
        forward("700m, batch 2, latent 64, forward", model.CONFIGS["700m"], 2, 64, dtype)


def toy():
    for batch in (2, 32):
        forward(f"toy, batch {batch}, forward", TOY_UNET, batch, 32)


def sample():
    ours, theirs = load_pipeline("toy"), StableDiffusionXLPipeline.from_pretrained(TOY)
    theirs.set_progress_bar_config(disable=True)
    prompts = ["a red circle left of a blue square"] * 4
    in_turns("toy, 25 steps, 4 images", lambda: ours(prompts, guidance=5.0),
             lambda: theirs(prompts, num_inference_steps=25, guidance_scale=5.0))


def distill():
    """A step of ours, and of a plain loop with diffusers' networks and hooks for the same losses."""
    distillation_step("toy, distillation step of 16", TOY_UNET, 16, 32)
    distillation_step("SDXL a fifth as wide, step of 2", NARROW, 2, 64)
    distillation_step("... latents cached / BK-SDM's recipe", NARROW, 2, 64, recipe=True)


def distillation_step(name: str, config: model.UNetConfig, batch: int, side: int, recipe: bool = False):
    """With `recipe` theirs is as BK-SDM trains: it encodes the images each time and recomputes all blocks."""
    teacher, student = model.UNet(config), model.UNet(model.student_config(config, "700m"))
    model.inherit(student, teacher)
    their_teacher, their_student = same_network(teacher.requires_grad_(False)), same_network(student)
    their_teacher.requires_grad_(False)
    matched, kept = match_features(student, teacher, KOALA_FEATURES), {}
    networks = networks_of(teacher, student, KOALA_FEATURES)

    def keep(network: UNet2DConditionModel, path: str):
        def hook(module, args, output):
            kept.setdefault((network, path), output[0] if isinstance(output, tuple) else output)
        network.get_submodule(path).register_forward_hook(hook)

    for ours, theirs in matched.items():
        keep(their_student, ours)
        keep(their_teacher, theirs)
    x, pixels = inputs(config, batch, side, torch.float32), torch.randn(batch, 3, 8 * side, 8 * side)
    noise = torch.randn_like(x["sample"])
    if recipe:
        their_student.enable_gradient_checkpointing()
        their_student.train()
        vae = AutoencoderKL.from_config(replace(
            VAEConfig(), channels=(24, 48, 96, 96), groups=8).to_diffusers()).requires_grad_(False)
    optimizers = [torch.optim.AdamW(student.parameters(), lr=1e-5, fused=True),
                  torch.optim.AdamW(their_student.parameters(), lr=1e-5)]

    def our_step():
        sum(distill_batch(Batch(*x.values(), noise), networks, torch.float32)).backward()
        optimizers[0].step()
        optimizers[0].zero_grad()

    def their_step():
        kept.clear()
        with torch.no_grad():
            if recipe:
                vae.encode(pixels).latent_dist.sample()  # as long as the latents of x would take
            wanted = predict(their_teacher, **x)
        prediction = predict(their_student, **x)
        loss = F.mse_loss(prediction, noise) + F.mse_loss(prediction, wanted)
        for ours, theirs in matched.items():
            loss = loss + F.mse_loss(kept[their_student, ours], kept[their_teacher, theirs])
        loss.backward()
        optimizers[1].step()
        optimizers[1].zero_grad()

    in_turns(name, our_step, their_step)


BENCHMARKS = {run.__name__: run for run in (unet, toy, sample, distill)}

if __name__ == "__main__":
    parser = ArgumentParser(__doc__)
    parser.add_argument("--only", choices=BENCHMARKS, nargs="+", default=[*BENCHMARKS], help="[all]")
    names = parser.parse_args().only
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, "
          f"{torch.backends.cpu.get_cpu_capability()}")
    torch.manual_seed(0)
    for name in names:
        BENCHMARKS[name]()
