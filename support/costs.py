"""
What networks cost: parameters, FLOPs, memory and seconds (Figures 2 and 5, Tables 1 and 2).

FLOPs are counted from shapes alone: matrix products, convolutions and attention, two for a multiply-add.
"""

import argparse
import math
import re
import statistics
import time
from collections import defaultdict
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Callable, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from tqdm import tqdm

import model
from support.cli import peak_memory, preset, reset_peak_memory, resolve_device, resolve_dtype
from support.files import atomic_write, local_folder, write_csv
from support.plots import bar_chart, draw_table, print_table, stack
from support.text import CLIP, ENCODERS, OPENCLIP, CLIPConfig
from support.vae import VAE, VAEConfig

STAGES = list(model.stages(model.CONFIGS["sdxl"]))
SA_STAGES = STAGES[1:-1]  # those with self-attention
PAPER = {  # Tables 1 and 2: millions of parameters, GB of the checkpoint, seconds on an RTX 4090
    "sdxl": (2567, 10.3, 3.133), "1b": (1161, 4.4, 1.604), "700m": (782, 3.0, 1.257)}
PAPER_PARTS = {"text encoders": (817, 0.008), "VAE": (83, 0.002)}  # Table 1; the seconds are its decoder's
# What those seconds imply for float16 on an RTX 4090, if all of the time were the counted work; and its peak.
PAPER_RATE, PEAK_RATE = 107.5e12, 165.2e12  # FLOP/s


class Configs(NamedTuple):
    """The configurations of a model's networks."""

    texts: tuple[CLIPConfig, ...]
    vae: VAEConfig
    unet: model.UNetConfig

    @property
    def tokens(self) -> int:
        """Length of a prompt."""
        return self.texts[0].max_position_embeddings

    @property
    def size(self) -> int:
        """Height and width of its images, in pixels."""
        return self.unet.sample_size * self.vae.downscale


def read_configs(name: str) -> Configs:
    """Those of sdxl, 1b and 700m without any files, those of another preset, hub id or folder from its files."""
    if name in model.CONFIGS:
        return Configs((CLIPConfig(), OPENCLIP), VAEConfig(), model.CONFIGS[name])
    folder = local_folder(preset(name).source, (*ENCODERS, "vae", "unet"))
    return Configs(tuple(model.read_config(Path(folder, encoder), CLIPConfig.from_dict) for encoder in ENCODERS),
                   model.read_config(Path(folder, "vae"), VAEConfig.from_diffusers),
                   model.read_config(Path(folder, "unet"), model.UNetConfig.from_diffusers))


# ------------------------------------------------------------------------------------------------------------
# Counting


def count_flops() -> FlopCounterMode:
    """Counts the FLOPs of what runs within `with`; of the CPU's attention too, which PyTorch leaves out."""
    ops = torch.ops.aten
    return FlopCounterMode(display=False, custom_mapping={
        ops._scaled_dot_product_flash_attention_for_cpu:
            lambda q, k, v, *rest, **names: sdpa_flop_count(q, k, v),
        ops._scaled_dot_product_flash_attention_for_cpu_backward:
            lambda out, q, k, v, *rest, **names: sdpa_backward_flop_count(out, q, k, v)})


def count_parameters(*networks: nn.Module) -> int:
    return sum(parameter.numel() for network in networks for parameter in network.parameters())


def unet_inputs(config: model.UNetConfig, tokens: int, side: int, batch: int = 1) -> list[Tensor]:
    """What a U-Net's `forward` takes, all zeros, for latents of `side` x `side` and a text of `tokens`."""
    shapes = ((config.in_channels, side, side), (), (tokens, config.context_dim), (config.pooled_dim,), (6,))
    return [torch.zeros(batch, *shape) for shape in shapes]


def count_unet(config: model.UNetConfig, tokens: int) -> dict[tuple[str, str], tuple[int, int]]:
    """
    Parameters and multiply-adds of a forward pass, by stage and kind: residual, transformer or rest.

    The stage "rest" has the first and last convolution and the embeddings of the conditions. No memory is needed.
    """
    with FakeTensorMode(), count_flops() as counter:
        unet = model.UNet(config)
        unet(*unet_inputs(config, tokens, config.sample_size))
    flops, counts = counter.get_flop_counts(), defaultdict(lambda: [0, 0])
    kinds = {"resnets": "residual", "attentions": "transformer"}
    stages = {path: stage for stage, path in model.stages(config).items()}
    for path, module in unet.named_modules():
        found = re.fullmatch(r"(down_blocks\.\d+|mid_block|up_blocks\.\d+)\.(\w+)\.\d+", path)
        if found:
            part = stages[found[1]], kinds.get(found[2], "rest")
        elif path and "." not in path and "block" not in path:
            part = "rest", "rest"
        else:
            continue
        counts[part][0] += count_parameters(module)
        counts[part][1] += sum(flops.get(f"UNet.{path}", {}).values()) // 2
    counts["rest", "rest"] = counts.pop(("rest", "rest"))        # at the end
    return {part: tuple(count) for part, count in counts.items()}


@cache
def count_others(texts: tuple[CLIPConfig, ...], vae_config: VAEConfig, size: int) -> dict[str, tuple[int, int]]:
    """Parameters and multiply-adds of the networks beside the U-Net, for one image of `size` x `size`."""
    side = size // vae_config.downscale
    with FakeTensorMode():
        encoders, vae = [CLIP(config, projection=i == 1) for i, config in enumerate(texts)], VAE(vae_config)
        with count_flops() as reading:
            for clip in encoders:
                clip(torch.zeros(1, clip.config.max_position_embeddings, dtype=torch.long))
        with count_flops() as decoding:
            vae.decode(torch.zeros(1, vae_config.latent_channels, side, side))
        with count_flops() as encoding:
            vae.encode(torch.zeros(1, 3, size, size))
    return {"text encoders": (count_parameters(*encoders), reading.get_total_flops() // 2),
            "VAE decoder": (count_parameters(vae.decoder, vae.post_quant_conv), decoding.get_total_flops() // 2),
            "VAE encoder": (count_parameters(vae.encoder, vae.quant_conv), encoding.get_total_flops() // 2)}


def count_pass(network: nn.Module, *inputs: Tensor) -> tuple[int, int]:
    """FLOPs of a forward pass, and backward if the network is trained; bytes kept between the two."""
    weights = {parameter.untyped_storage()._cdata for parameter in network.parameters()}
    kept = {}                                                    # storages by their number, each once

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage                       # held on to, or its number is used again
        return tensor

    with count_flops() as counter, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = network(*inputs)
        if output.requires_grad:
            output.sum().backward()
    return counter.get_total_flops(), sum(storage.nbytes() for storage in kept.values())


def dry_run(args: argparse.Namespace, teacher_config: model.UNetConfig | None, student_config: model.UNetConfig,
            vae_config: VAEConfig, tokens: int, matched: dict[str, str]):
    """
    Prints what a run of distill.py would be, without weights: settings, features, parameters, FLOPs, memory.

    `args` are its settings; `tokens` is the length of a prompt; `matched` are the paths of the student's modules
    and of those of the teacher that they learn from.
    """
    size = args.size or student_config.sample_size * vae_config.downscale
    torch.set_default_dtype(torch.bfloat16)
    with FakeTensorMode():                                       # tensors of all sizes, without memory
        student, vae = model.UNet(student_config), VAE(vae_config).requires_grad_(False)
        inputs = unet_inputs(student_config, tokens, size // vae_config.downscale)
        student_flops, activations = count_pass(student, *inputs)
        vae_flops, _ = count_pass(vae.encoder, torch.empty(1, 3, size, size))
        s, t, v, teacher_flops = count_parameters(student), 0, count_parameters(vae), 0
        if teacher_config:
            teacher = model.UNet(teacher_config).requires_grad_(False)
            t = count_parameters(teacher)
            if args.out_kd or matched:
                teacher_flops, _ = count_pass(teacher, *inputs)
    torch.set_default_dtype(torch.float32)
    # Bytes: the student's weights, gradients and two moments in float32, and its copy in bfloat16, in which
    # the teacher is too; the VAE in float32 if it asks for that.
    weights = (4 + 4 + 8 + 2) * s + 2 * t + (4 if vae_config.force_upcast else 2) * v
    step = args.batch * (teacher_flops + student_flops + vae_flops)
    most = "" if args.out_kd else "at most "                     # it stops after its last feature
    for name, value in sorted(vars(args).items()):
        if name != "dry_run":
            print(f"{name:14} {value}")
    print(f"\n{len(matched)} features, student <- teacher")
    for path, source in matched.items():
        print(f"  {path} <- {source}")
    print(f"""
parameters   teacher {t:,}, student {s:,}{f" ({s / t - 1:+.1%})" if t else ""}, VAE {v:,}
work         TFLOP an image: teacher {most}{teacher_flops / 1e12:.4g}, student forward and backward
             {student_flops / 1e12:.4g}, VAE encoder {vae_flops / 1e12:.4g} (once, with --cache);
             a step of {args.batch}: {step / 1e12:.4g}
memory       GB: weights of all, gradients and moments {weights / 1e9:.2f}; activations of {args.micro_batch} images,
             without checkpointing, {args.micro_batch * activations / 1e9:.2f}
             Counted in bfloat16, not measured; text encoders and the allocator's reserve come on top""")


# ------------------------------------------------------------------------------------------------------------
# Figure 2, Tables 1 and 2: parameters and work


def budget(args: argparse.Namespace):
    """Parameters and multiply-adds of each stage and kind, beside the paper's sums."""
    rows, table, unets = [], {}, {}
    for name in args.model:
        configs = read_configs(name)
        unets[name] = count_unet(configs.unet, configs.tokens)
        others = count_others(configs.texts, configs.vae, configs.size)
        rows += [[name, "U-Net", *part, *counts] for part, counts in unets[name].items()]
        rows += [[name, network, "", "", *counts] for network, counts in others.items()]
        parameters, macs = map(sum, zip(*unets[name].values()))
        paper, size, _ = PAPER.get(name, [math.nan] * 3)
        table["U-Net", name] = [f"{name}: U-Net", parameters / 1e6, paper, macs / 1e12, 4 * parameters / 1e9, size]
        encoder, (decoder, decoding) = others["VAE encoder"][0], others["VAE decoder"]
        for part, (parameters, macs) in (("text encoders", others["text encoders"]), ("VAE", (encoder + decoder, decoding))):
            paper = PAPER_PARTS[part][0] if name in PAPER else math.nan
            row = [f"{name}: {part}", parameters / 1e6, paper, macs / 1e12, 4 * parameters / 1e9, math.nan]
            table.setdefault((part, parameters), row)            # once, if models share it
    write_csv(args.out.with_suffix(".csv"),
              ["model", "network", "stage", "kind", "parameters", "multiply-adds"], rows)
    header = ["", "M parameters", "paper", "T multiply-adds", "GB in float32", "paper"]
    cells = print_table(header, list(table.values()))
    print("multiply-adds are of one image: a pass of the U-Net, without guidance, and the VAE's decoder")
