"""
What networks cost: parameters, FLOPs, memory and seconds (Figures 2 and 5, Tables 1 and 2).
"""

import argparse
import math
import statistics
import time
from collections import defaultdict
from itertools import product
from pathlib import Path
from typing import Callable

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from tqdm import tqdm

import model
from support.cli import peak_memory, preset, reset_peak_memory, resolve_device, resolve_dtype
from support.files import local_folder, write_csv
from support.plots import bar_chart, draw_table, format_number, print_table, stack
from support.text import CLIP, ENCODERS, OPENCLIP, CLIPConfig, TextEncoders, encoder_names
from support.vae import VAE, VAEConfig

STAGES = list(model.stages(model.CONFIGS["sdxl"]))
SA_STAGES = STAGES[1:-1]  # those with self-attention
PAPER = {  # Tables 1 and 2: millions of parameters, GB of the checkpoint, seconds on an RTX 4090
    "U-Net": {"sdxl": (2567, 10.3, 3.133), "1b": (1161, 4.4, 1.604), "700m": (782, 3.0, 1.257)},
    "text encoders": dict.fromkeys(model.CONFIGS, (817, math.nan, 0.008)),
    "VAE": dict.fromkeys(model.CONFIGS, (83, math.nan, 0.002))}
# The VAE's seconds are its decoder's, and too few: an RTX 4090 at its peak of 165.2 TFLOP/s needs 0.063.
PAPER_RATE = 107.5e12  # FLOP/s of float16 that the U-Nets' seconds imply, if all of the time is counted work


def read_configs(name: str) -> tuple[tuple[CLIPConfig, ...], VAEConfig, model.UNetConfig]:
    """A model's configurations: of sdxl, 1b and 700m without any files, of others from their config.json."""
    if name in model.CONFIGS:
        return (CLIPConfig(), OPENCLIP), VAEConfig(), model.CONFIGS[name]
    folder = local_folder(preset(name).source, (*ENCODERS, "vae", "unet"), weights=False)
    clip_configs = [model.read_config(folder / name, CLIPConfig.from_dict) for name in encoder_names(folder)]
    return (tuple(clip_configs),
            model.read_config(folder / "vae", VAEConfig.from_diffusers),
            model.read_config(Path(preset(name).student or folder / "unet"), model.UNetConfig.from_diffusers))


# ------------------------------------------------------------------------------------------------------------
# Counting


def count_flops() -> FlopCounterMode:
    """Counts FLOPs within `with`, two for a multiply-add: matrix products, convolutions and attention."""
    return FlopCounterMode(display=False, custom_mapping={  # the CPU's attention, which PyTorch leaves out
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu:
            lambda q, k, v, *rest, **names: sdpa_flop_count(q, k, v),
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward:
            lambda out, q, k, v, *rest, **names: sdpa_backward_flop_count(out, q, k, v)})


def count_parameters(*networks: nn.Module) -> int:
    return sum(parameter.numel() for network in networks for parameter in network.parameters())


def unet_inputs(config: model.UNetConfig, tokens: int, side: int, batch: int = 1) -> list[Tensor]:
    """What a U-Net's `forward` takes, all zeros, for latents of `side` x `side` and a text of `tokens`."""
    shapes = ((config.in_channels, side, side), (), (tokens, config.context_dim), (config.pooled_dim,), (6,))
    return [torch.zeros(batch, *shape) for shape in shapes]


def build_networks(clip_configs: tuple[CLIPConfig, ...], vae_config: VAEConfig, config: model.UNetConfig,
                   size: int, batch: int = 1) -> dict[str, tuple[nn.Module, list[Tensor]]]:
    """
    A model's networks, each with what its `forward` takes for one image of `size` x `size`, all on the meta
    device: shapes without numbers. `batch` is the U-Net's, 2 for guidance.
    """
    side, tokens = size // vae_config.downscale, clip_configs[0].max_position_embeddings
    with torch.device("meta"):
        encoders = [CLIP(clip, projection=i == 1) for i, clip in enumerate(clip_configs)]
        vae = VAE(vae_config)
        return {  # the text encoders take token ids in the place of prompts
            "text encoders": (TextEncoders(encoders, [nn.Identity()] * len(encoders)),
                              [torch.zeros(1, tokens, dtype=torch.long)]),
            "VAE decoder": (nn.Sequential(vae.post_quant_conv, vae.decoder),
                            [torch.zeros(1, vae_config.latent_channels, side, side)]),
            "VAE encoder": (nn.Sequential(vae.encoder, vae.quant_conv), [torch.zeros(1, 3, size, size)]),
            "U-Net": (model.UNet(config), unet_inputs(config, tokens, side, batch))}


def count_network(network: nn.Module, inputs: list[Tensor]) -> tuple[int, int]:
    """Parameters and, of a forward pass, multiply-adds."""
    with count_flops() as counter:
        network(*inputs)
    return count_parameters(network), counter.get_total_flops() // 2


def count_unet(unet: model.UNet, inputs: list[Tensor]) -> dict[tuple[str, str], tuple[int, int]]:
    """Parameters and multiply-adds of a forward pass, by stage ("rest": outside of all) and kind of block."""
    with count_flops() as counter:
        unet(*inputs)
    kinds, parts = {"resnets": "residual", "attentions": "transformer"}, defaultdict(dict)
    for stage, stage_path in model.stages(unet.config).items():
        for name, blocks in unet.get_submodule(stage_path).named_children():
            for i, block in enumerate(blocks):
                parts[stage, kinds.get(name, "rest")][f"UNet.{stage_path}.{name}.{i}"] = block
    for name, child in unet.named_children():
        if "block" not in name:
            parts["rest", "rest"][f"UNet.{name}"] = child
    flops = {path: sum(by_op.values()) for path, by_op in counter.get_flop_counts().items()}
    counts = {}
    for part, modules in parts.items():
        counts[part] = count_parameters(*modules.values()), sum(flops.get(path, 0) for path in modules) // 2
    return counts


# ------------------------------------------------------------------------------------------------------------
# Figure 2, Tables 1 and 2: parameters and work


def budget(args: argparse.Namespace) -> Image.Image:
    """Parameters and multiply-adds of each stage and kind, beside the paper's sums."""
    rows, table, unets = [], {}, {}
    for name in args.model:
        clips, vae, unet = read_configs(name)
        networks = build_networks(clips, vae, unet, unet.sample_size * vae.downscale)
        unets[name] = count_unet(*networks.pop("U-Net"))
        others = {network: count_network(*built) for network, built in networks.items()}
        rows += [[name, "U-Net", *part, *counts] for part, counts in unets[name].items()]
        rows += [[name, network, "", "", *counts] for network, counts in others.items()]
        (encoder, _), (decoder, decoding) = others["VAE encoder"], others["VAE decoder"]
        totals = {"U-Net": [sum(column) for column in zip(*unets[name].values())],
                  "text encoders": others["text encoders"], "VAE": (encoder + decoder, decoding)}
        for network, (parameters, macs) in totals.items():
            # Models whose encoders, or VAE, have as many parameters share them, and a row.
            key = network, name if network == "U-Net" else parameters
            millions, gigabytes, _ = PAPER[network].get(name, [math.nan] * 3)
            table.setdefault(key, [f"{name}: {network}", parameters / 1e6, millions, macs / 1e12,
                                   4 * parameters / 1e9, gigabytes])
    csv_header = ["model", "network", "stage", "kind", "parameters", "multiply-adds"]
    write_csv(args.out.with_suffix(".csv"), csv_header, rows)
    header = ["", "M parameters", "paper's M", "T multiply-adds", "GB in float32", "paper's GB"]
    table = list(table.values())
    print_table(header, table)
    print("multiply-adds are of one image: a pass of the U-Net, without guidance, and the VAE's decoder")
    return stack(draw_table("Whole networks", header, table),
                 stage_chart("Millions of parameters", unets, 0, 1e6),
                 stage_chart("Billions of multiply-adds", unets, 1, 1e9))


def stage_chart(title: str, unets: dict[str, dict], which: int, unit: float) -> Image.Image:
    """For each stage a bar of each model, in three parts: parameters if `which` is 0, multiply-adds if 1."""
    kinds, groups = ("residual", "transformer", "rest"), defaultdict(list)
    for stage, counts in product((*STAGES, "rest"), unets.values()):
        groups[stage].append([counts.get((stage, kind), (0, 0))[which] / unit for kind in kinds])
    title = f"{title} by stage; in each, {', '.join(unets)}"
    return bar_chart(title, groups, ["residual blocks", "transformers", "rest"])


# ------------------------------------------------------------------------------------------------------------
# Table 2, Figure 5: latency


def fill(network: nn.Module, inputs: list[Tensor], dtype: torch.dtype, device: str) -> list[Tensor]:
    """
    Fills a network of the meta device with noise: as fast as trained weights, and nothing to download.

    Returns its inputs, as noise too; token ids are 0.
    """
    network.requires_grad_(False).to(dtype).to_empty(device=device).to(memory_format=torch.channels_last)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.02)
    return [torch.rand(x.shape).to(device, dtype if x.is_floating_point() else x.dtype) for x in inputs]


def time_network(network: Callable, inputs: list[Tensor], passes: int, repeat: int) -> tuple[int, float]:
    """FLOPs of `passes` forward passes, which warm up, and the median seconds of `repeat` such runs."""
    def run() -> float:
        start = time.perf_counter()
        for _ in range(passes):
            output = network(*inputs)
        output[0].sum().item()                                   # a number on the host: waits for the device
        return time.perf_counter() - start

    with count_flops() as counter:
        run()
    return counter.get_total_flops(), statistics.median(run() for _ in range(repeat))


def describe_device(device: str, dtype: torch.dtype) -> str:
    """The device and precision that a time was measured with."""
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else (
        f"a CPU, {torch.get_num_threads()} threads")
    return f"{name}, {str(dtype).removeprefix('torch.')}"


@torch.inference_mode()
def latency(args: argparse.Namespace) -> Image.Image:
    """Times each model's networks for one image: the U-Net's passes of all steps, the others' only one."""
    device = resolve_device(args.device)
    dtype = resolve_dtype(args.precision, device)
    header = ["model", "network", "GFLOP", "seconds", "GFLOP/s", "by counting", "peak GB", "paper, RTX 4090",
              f"at {PAPER_RATE / 1e12:g} TFLOP/s"]
    rows, bars, rate = [], {}, None
    for name, network in tqdm([*product(args.model, ("text encoders", "U-Net", "VAE decoder"))], "latency"):
        clips, vae, unet = read_configs(name)
        size = args.size or unet.sample_size * vae.downscale
        reset_peak_memory(device)
        built, inputs = build_networks(clips, vae, unet, size, batch=2)[network]
        inputs = fill(built, inputs, dtype, device)
        flops, seconds = time_network(built, inputs, args.steps if network == "U-Net" else 1, args.repeat)
        del built, inputs                                        # before the next is built and measured
        by_counting = paper = implied = math.nan
        if (size, args.steps) == (1024, 25) and name in model.CONFIGS:
            paper, implied = PAPER[network.removesuffix(" decoder")][name][2], flops / PAPER_RATE
        if network == "U-Net":
            rate = rate or flops / seconds                       # of the first model
            by_counting = flops / rate
            numbers = [seconds, by_counting, paper, implied]     # a bar each, after parts of 0 for its colour
            bars[name] = [[0] * i + [number] for i, number in enumerate(numbers) if number > 0]
        rows.append([name, network, flops / 1e9, seconds, flops / seconds / 1e9, by_counting,
                     peak_memory(device), paper, implied])
    if all(math.isnan(row[7]) for row in rows):                  # the paper says nothing of these models
        header, rows = header[:7], [row[:7] for row in rows]
    write_csv(args.out.with_suffix(".csv"), header, rows)
    print_table(header, rows)
    where = describe_device(device, dtype)
    print(f"on {where}, {args.steps} steps with guidance; by counting: at {format_number(rate / 1e9)} GFLOP/s")
    return stack(draw_table(f"Latency on {where}", header, rows),
                 bar_chart(f"Seconds of the U-Net in {args.steps} steps", bars,
                           ["measured", "by counting", *header[7:]]))
