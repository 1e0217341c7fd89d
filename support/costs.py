"""
What networks cost: parameters, FLOPs, memory and seconds (Figures 2 and 5, Tables 1 and 2).
"""

import argparse
import math
import statistics
import time
from collections import defaultdict
from dataclasses import replace
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import Callable

import torch
from PIL import Image
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
    ("sdxl", "U-Net"): (2567, 10.3, 3.133), ("1b", "U-Net"): (1161, 4.4, 1.604), ("700m", "U-Net"): (782, 3.0, 1.257)}
PAPER |= {(name, "text encoders"): (817, math.nan, 0.008) for name in model.CONFIGS}
PAPER |= {(name, "VAE"): (83, math.nan, 0.002) for name in model.CONFIGS}
# The VAE's seconds are its decoder's, and cannot be right: an RTX 4090, at its peak of 165.2 TFLOP/s, needs 0.063.
PAPER_RATE = 107.5e12  # FLOP/s of float16 that the U-Nets' seconds imply, if all of the time were the counted work


def read_configs(name: str) -> tuple[tuple[CLIPConfig, ...], VAEConfig, model.UNetConfig]:
    """A model's configurations: of sdxl, 1b and 700m without any files, of others from their config.json files."""
    if name in model.CONFIGS:
        return (CLIPConfig(), OPENCLIP), VAEConfig(), model.CONFIGS[name]
    folder = local_folder(preset(name).source, (*ENCODERS, "vae", "unet"), weights=False)
    return (tuple(model.read_config(Path(folder, encoder), CLIPConfig.from_dict) for encoder in ENCODERS),
            model.read_config(Path(folder, "vae"), VAEConfig.from_diffusers),
            model.read_config(Path(folder, "unet"), model.UNetConfig.from_diffusers))


# ------------------------------------------------------------------------------------------------------------
# Counting


def count_flops() -> FlopCounterMode:
    """Counts the FLOPs within `with`: of matrix products, convolutions and attention, two for a multiply-add."""
    return FlopCounterMode(display=False, custom_mapping={       # of the CPU's attention, which PyTorch leaves out
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


def count_unet(config: model.UNetConfig, tokens: int) -> dict[tuple[str, str], tuple[int, int]]:
    """Parameters and multiply-adds of a forward pass, by stage ("rest": outside of all) and kind of block."""
    with FakeTensorMode(), count_flops() as counter:
        unet = model.UNet(config)
        unet(*unet_inputs(config, tokens, config.sample_size))
    kinds, parts = {"resnets": "residual", "attentions": "transformer"}, defaultdict(dict)
    for stage, stage_path in model.stages(config).items():
        for name, blocks in unet.get_submodule(stage_path).named_children():
            for i, block in enumerate(blocks):
                parts[stage, kinds.get(name, "rest")][f"UNet.{stage_path}.{name}.{i}"] = block
    parts["rest", "rest"] = {f"UNet.{name}": child for name, child in unet.named_children() if "block" not in name}
    flops = {path: sum(by_op.values()) for path, by_op in counter.get_flop_counts().items()}
    counts = {}
    for part, modules in parts.items():
        counts[part] = count_parameters(*modules.values()), sum(flops.get(path, 0) for path in modules) // 2
    return counts


def count_network(network: nn.Module, *inputs: Tensor) -> tuple[int, int]:
    """Parameters, and multiply-adds of a forward pass."""
    with count_flops() as counter:
        network(*inputs)
    return count_parameters(network), counter.get_total_flops() // 2


@cache
def count_others(texts: tuple[CLIPConfig, ...], vae_config: VAEConfig, size: int) -> dict[str, tuple[int, int]]:
    """Parameters and multiply-adds of the networks beside the U-Net, for one image of `size` x `size`."""
    with FakeTensorMode():
        encoders = [count_network(CLIP(config, projection=i == 1),
                                  torch.zeros(1, config.max_position_embeddings, dtype=torch.long))
                    for i, config in enumerate(texts)]
        vae, side = VAE(vae_config), size // vae_config.downscale
        latents, image = torch.zeros(1, vae_config.latent_channels, side, side), torch.zeros(1, 3, size, size)
        return {"text encoders": tuple(map(sum, zip(*encoders))),
                "VAE decoder": count_network(nn.Sequential(vae.post_quant_conv, vae.decoder), latents),
                "VAE encoder": count_network(nn.Sequential(vae.encoder, vae.quant_conv), image)}


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
    Prints what a run of distill.py would be: settings, features, parameters, FLOPs, memory. It needs no weights.

    `tokens` is the length of a prompt; `matched` has the paths of the student's modules and of their teachers.
    """
    size = args.size or student_config.sample_size * vae_config.downscale
    torch.set_default_dtype(torch.bfloat16)
    with FakeTensorMode():                                       # tensors of all sizes, without memory
        student, vae = model.UNet(student_config), VAE(vae_config).requires_grad_(False)
        inputs = unet_inputs(student_config, tokens, size // vae_config.downscale)
        student_flops, activations = count_pass(student, *inputs)
        vae_flops, _ = count_pass(vae.encoder, torch.empty(1, 3, size, size))
        teacher = model.UNet(teacher_config).requires_grad_(False) if teacher_config else None
        teacher_flops = count_pass(teacher, *inputs)[0] if teacher and (args.out_kd or matched) else 0
        s, t, v = count_parameters(student), count_parameters(teacher) if teacher else 0, count_parameters(vae)
    torch.set_default_dtype(torch.float32)
    # Bytes: the student's weights, gradients and two moments in float32, and its copy in bfloat16, in which
    # the teacher is too; the VAE in float32 if it asks for that.
    weights = (4 + 4 + 8 + 2) * s + 2 * t + (4 if vae_config.force_upcast else 2) * v
    most = "" if args.out_kd else "at most "                     # it stops after its last feature
    for name in sorted(vars(args).keys() - {"dry_run"}):
        print(f"{name:14} {getattr(args, name)}")
    print(f"\n{len(matched)} features, student <- teacher")
    for path, source in matched.items():
        print(f"  {path} <- {source}")
    print(f"""
parameters   teacher {t:,}, student {s:,}{f" ({s / t - 1:+.1%})" if t else ""}, VAE {v:,}
work         TFLOP an image: teacher {most}{teacher_flops / 1e12:.4g}, student forward and backward
             {student_flops / 1e12:.4g}, VAE encoder {vae_flops / 1e12:.4g} (once, with --cache);
             a step of {args.batch}: {args.batch * (teacher_flops + student_flops + vae_flops) / 1e12:.4g}
memory       GB: weights of all, gradients and moments {weights / 1e9:.2f}; activations of {args.micro_batch} images,
             without checkpointing, {args.micro_batch * activations / 1e9:.2f}
             Counted in bfloat16, not measured; text encoders and the allocator's reserve come on top""")


# ------------------------------------------------------------------------------------------------------------
# Figure 2, Tables 1 and 2: parameters and work


def budget(args: argparse.Namespace):
    """Parameters and multiply-adds of each stage and kind, beside the paper's sums."""
    rows, table, unets = [], {}, {}
    for name in args.model:
        texts, vae, unet = read_configs(name)
        unets[name] = count_unet(unet, texts[0].max_position_embeddings)
        others = count_others(texts, vae, unet.sample_size * vae.downscale)
        rows += [[name, "U-Net", *part, *counts] for part, counts in unets[name].items()]
        rows += [[name, network, "", "", *counts] for network, counts in others.items()]
        (encoder, _), (decoder, decoding) = others["VAE encoder"], others["VAE decoder"]
        totals = {"U-Net": [sum(column) for column in zip(*unets[name].values())],
                  "text encoders": others["text encoders"], "VAE": (encoder + decoder, decoding)}
        for network, (parameters, macs) in totals.items():
            key = network, name if network == "U-Net" else parameters  # the others once, if models share them
            millions, gigabytes, _ = PAPER.get((name, network), [math.nan] * 3)
            table.setdefault(key, [f"{name}: {network}", parameters / 1e6, millions, macs / 1e12,
                                   4 * parameters / 1e9, gigabytes])
    csv_header = ["model", "network", "stage", "kind", "parameters", "multiply-adds"]
    write_csv(args.out.with_suffix(".csv"), csv_header, rows)
    header = ["", "M parameters", "paper", "T multiply-adds", "GB in float32", "paper"]
    cells = print_table(header, list(table.values()))
    print("multiply-adds are of one image: a pass of the U-Net, without guidance, and the VAE's decoder")
    picture = stack(draw_table("Whole networks", header, cells),
                    stage_chart("Millions of parameters", unets, 0, 1e6),
                    stage_chart("Billions of multiply-adds", unets, 1, 1e9))
    atomic_write(args.out, picture.save)


def stage_chart(title: str, unets: dict[str, dict], which: int, unit: float) -> Image.Image:
    """For each stage a bar of each model, in three parts; `which` of the counts of `count_unet`, in units."""
    kinds, groups = ("residual", "transformer", "rest"), {}
    for stage in (*STAGES, "rest"):
        groups[stage] = []
        for counts in unets.values():
            groups[stage].append([counts.get((stage, kind), (0, 0))[which] / unit for kind in kinds])
    title = f"{title} by stage; in each, {', '.join(unets)}"
    return bar_chart(title, groups, ["residual blocks", "transformers", "rest"])


# ------------------------------------------------------------------------------------------------------------
# Table 2, Figure 5: latency


def random_network(build: Callable[[], nn.Module], dtype: torch.dtype, device: str) -> nn.Module:
    """A network whose weights are noise: as fast as a trained one, and nothing to download."""
    with torch.device("meta"):
        network = build().requires_grad_(False).to(dtype)
    network = network.to_empty(device=device)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.02)
    return network.to(memory_format=torch.channels_last)


def prepare(network: str, texts: tuple[CLIPConfig, ...], vae_config: VAEConfig, config: model.UNetConfig,
            denoise: Callable, steps: int, dtype: torch.dtype, device: str) -> Callable[[], Tensor]:
    """Builds a network of a model, with random weights; returns what runs it for one image."""
    side, tokens = config.sample_size, texts[0].max_position_embeddings
    noise = torch.randn(1, config.in_channels, side, side, device=device)
    if network == "text encoders":
        encoders = [random_network(partial(CLIP, text, projection=i == 1), dtype, device)
                    for i, text in enumerate(texts)]
        ids = torch.zeros(1, tokens, dtype=torch.long, device=device)
        return lambda: [encoder(ids)[0] for encoder in encoders][-1]
    if network == "U-Net":
        unet = random_network(partial(model.UNet, config), dtype, device)
        _, _, *conditions = unet_inputs(config, tokens, side, batch=2)
        return partial(denoise, unet, noise, [x.to(device, dtype) for x in conditions], steps)
    vae = random_network(partial(VAE, vae_config), dtype, device)
    return partial(vae.decode, noise.to(dtype))


def time_runs(run: Callable[[], Tensor], repeat: int) -> tuple[int, float]:
    """FLOPs of one run, to warm up, and the median seconds of several after it."""
    times = []
    with count_flops() as counter:
        run().sum().item()                                       # a number on the host: waits for the device
    for _ in range(repeat):
        start = time.perf_counter()
        run().sum().item()
        times.append(time.perf_counter() - start)
    return counter.get_total_flops(), statistics.median(times)


@torch.inference_mode()
def latency(args: argparse.Namespace, denoise: Callable[[model.UNet, Tensor, list[Tensor], int], Tensor]):
    """Times each model's networks for one image; `denoise(unet, noise, conditions, steps)` is the sampling loop."""
    device = resolve_device(args.device)
    dtype = resolve_dtype(args.precision, device)
    header = ["model", "network", "TFLOP", "seconds", "TFLOP/s", "by counting", "peak GB", "paper, RTX 4090",
              f"at {PAPER_RATE / 1e12:g} TFLOP/s"]
    rows, bars, rate = [], {}, None
    for name, network in tqdm([*product(args.model, ("text encoders", "U-Net", "VAE decoder"))], "latency"):
        texts, vae, unet = read_configs(name)
        size = args.size or unet.sample_size * vae.downscale
        unet = replace(unet, sample_size=size // vae.downscale)
        reset_peak_memory(device)
        run = prepare(network, texts, vae, unet, denoise, args.steps, dtype, device)
        flops, seconds = time_runs(run, args.repeat)
        del run                                                  # before the next is built and measured
        by_counting = paper = implied = math.nan
        if (size, args.steps) == (1024, 25) and name in model.CONFIGS:
            paper, implied = PAPER[name, network.removesuffix(" decoder")][2], flops / PAPER_RATE
        if network == "U-Net":
            rate = rate or flops / seconds                       # of the first model
            by_counting = flops / rate
            numbers = [seconds, by_counting, paper, implied]     # each a bar in its own colour, after parts of 0
            bars[name] = [[0] * i + [number] for i, number in enumerate(numbers) if number > 0]
        rows.append([name, network, flops / 1e12, seconds, flops / seconds / 1e12, by_counting,
                     peak_memory(device), paper, implied])
    if all(math.isnan(row[7]) for row in rows):                  # of these models the paper says nothing
        header, rows = header[:7], [row[:7] for row in rows]
    write_csv(args.out.with_suffix(".csv"), header, rows)
    cells = print_table(header, rows)
    where = torch.cuda.get_device_name(device) if "cuda" in device else f"a CPU, {torch.get_num_threads()} threads"
    where += f", {str(dtype).removeprefix('torch.')}"
    print(f"on {where}, {args.steps} steps with guidance; by counting: at {rate / 1e12:.3g} TFLOP/s")
    picture = stack(draw_table(f"Latency on {where}", header, cells),
                    bar_chart(f"Seconds of the U-Net in {args.steps} steps", bars,
                              ["measured", "by counting", *header[7:]]))
    atomic_write(args.out, picture.save)
