"""
What networks cost: parameters, work, memory and seconds (Figures 2 and 5, Tables 1 and 2).
"""

import argparse
import math
import re
import statistics
import time
from collections import defaultdict
from dataclasses import replace
from functools import cache
from typing import Callable, NamedTuple

import torch
from PIL import Image
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from tqdm import tqdm

import chart
import files
import model
import text
from options import preset
from sample import SDXL_SCHEDULER, Schedule, dtype_of, euler, guide, peak_memory, restart_peak, usable

# ------------------------------------------------------------------------------------------------------------
# Counting


def flop_counter() -> FlopCounterMode:
    """Counts the work within `with`: matrix products, convolutions and attention, 2 FLOPs a multiply-add."""
    return FlopCounterMode(display=False, custom_mapping={  # of the CPU's attention, which it does not know
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu:
            lambda q, k, v, *rest, **names: sdpa_flop_count(q, k, v),
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward:
            lambda out, q, k, v, *rest, **names: sdpa_backward_flop_count(out, q, k, v)})


def work(network: nn.Module, *inputs: Tensor) -> tuple[int, int]:
    """FLOPs of a network's forward pass, and backward if it is trained; bytes it keeps to go backward."""
    own = {parameter.untyped_storage()._cdata for parameter in network.parameters()}
    kept = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage()._cdata not in own:
            kept[tensor.untyped_storage()._cdata] = tensor  # itself too, or its number is used again
        return tensor

    with (flop_counter() as counter,
          torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)):
        output = network(*inputs)
        if output.requires_grad:
            output.sum().backward()
    return counter.get_total_flops(), sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


class Networks(NamedTuple):
    """A model's networks in numbers, which need no weights."""

    texts: tuple[text.CLIPConfig, ...]
    vae: model.VAEConfig
    unet: model.UNetConfig

    @property
    def size(self) -> int:
        """Height and width of its images, in pixels."""
        return self.unet.sample_size * self.vae.downscale


PAPER = {  # Tables 1 and 2: millions of parameters, GB of the checkpoint, seconds on an RTX 4090
    "sdxl": (2567, 10.3, 3.133), "1b": (1161, 4.4, 1.604), "700m": (782, 3.0, 1.257)}
PAPER_PARTS = {"text encoders": (817, 0.008), "VAE": (83, 0.002)}  # Table 1; the seconds are its decoder's
# What those seconds imply for float16 on an RTX 4090, if all of the time were the counted work; and its peak.
PAPER_RATE, PEAK_RATE = 107.5e12, 165.2e12
ORDER = [*model.stages(model.CONFIGS["sdxl"]), "rest"]           # of stages, in figures


def networks(name: str) -> Networks:
    """Of sdxl, 1b and 700m from what is written here, of all others from their config files."""
    if name in model.CONFIGS:
        return Networks((text.CLIPConfig(), text.OPENCLIP), model.VAEConfig(), model.CONFIGS[name])
    source = preset(name).source
    return Networks(tuple(text.read_config(source, folder) for folder in text.ENCODERS),
                    *(model.read_config(kind, source)[0] for kind in (model.VAE, model.UNet)))


def unet_inputs(config: model.UNetConfig, tokens: int, side: int, batch: int = 1) -> list[Tensor]:
    """What a U-Net's `forward` takes, all zeros, for latents of `side` x `side` and a text of `tokens`."""
    shapes = ((config.in_channels, side, side), (), (tokens, config.context_dim), (config.pooled_dim,), (6,))
    return [torch.zeros(batch, *shape) for shape in shapes]


def unet_parts(config: model.UNetConfig, tokens: int) -> dict[tuple[str, str], tuple[int, int]]:
    """Parameters and multiply-adds of a forward pass, of each stage's residual blocks, transformers and rest.

    The stage "rest" has the first and last convolution and what embeds the conditions. No memory is needed.
    """
    with FakeTensorMode(), flop_counter() as counter:
        unet = model.UNet(config)
        unet(*unet_inputs(config, tokens, config.sample_size))
    work, parts = counter.get_flop_counts(), defaultdict(lambda: [0, 0])
    kinds = {"resnets": "residual", "attentions": "transformer"}
    names = {path: stage for stage, path in model.stages(config).items()}
    for path, module in unet.named_modules():
        where = re.match(r"(down_blocks\.\d+|mid_block|up_blocks\.\d+)\.(\w+)\.\d+$", path)
        if where or (path and "block" not in path and "." not in path):
            part = (names[where[1]], kinds.get(where[2], "rest")) if where else ("rest", "rest")
            parts[part][0] += sum(parameter.numel() for parameter in module.parameters())
            parts[part][1] += sum(work.get(f"UNet.{path}", {}).values()) // 2
    parts["rest", "rest"] = parts.pop(("rest", "rest"))          # at the end
    return {part: tuple(counts) for part, counts in parts.items()}


@cache
def whole_parts(texts: tuple[text.CLIPConfig, ...], vae_config: model.VAEConfig,
                size: int) -> dict[str, tuple[int, int]]:
    """Parameters and multiply-adds of the networks beside the U-Net, for one image of `size` x `size`."""
    with FakeTensorMode():
        encoders = [text.CLIP(config, projection=i == 1) for i, config in enumerate(texts)]
        vae = model.VAE(vae_config)
        side = size // vae_config.downscale
        with flop_counter() as reading:
            for clip in encoders:
                clip(torch.zeros(1, clip.config.max_position_embeddings, dtype=torch.long))
        with flop_counter() as decoding:
            vae.decode(torch.zeros(1, vae_config.latent_channels, side, side))
        with flop_counter() as encoding:
            vae.encode(torch.zeros(1, 3, size, size))
    count = lambda modules: sum(p.numel() for module in modules for p in module.parameters())
    return {"text encoders": (count(encoders), reading.get_total_flops() // 2),
            "VAE decoder": (count([vae.decoder, vae.post_quant_conv]), decoding.get_total_flops() // 2),
            "VAE encoder": (count([vae.encoder, vae.quant_conv]), encoding.get_total_flops() // 2)}


# ------------------------------------------------------------------------------------------------------------
# Figure 2, Tables 1 and 2: parameters and work


def budget(args: argparse.Namespace):
    """Parameters and multiply-adds of each stage and kind, beside the paper's sums."""
    rows, sums, bars = [], {}, defaultdict(dict)
    for name in args.model:
        found = networks(name)
        parts = unet_parts(found.unet, found.texts[0].max_position_embeddings)
        whole = whole_parts(found.texts, found.vae, found.size)
        rows += [[name, "U-Net", *part, *counts] for part, counts in parts.items()]
        rows += [[name, part, "", "", *counts] for part, counts in whole.items()]
        total, work = (sum(column) for column in zip(*parts.values()))
        paper, size, _ = PAPER.get(name, [math.nan] * 3)
        sums["U-Net", name] = [f"{name}: U-Net", total / 1e6, paper, work / 1e12, 4 * total / 1e9, size]
        (encoder, _), (decoder, decoding) = whole["VAE encoder"], whole["VAE decoder"]
        for part, (count, work) in (("text encoders", whole["text encoders"]),
                                    ("VAE", (encoder + decoder, decoding))):
            paper = PAPER_PARTS[part][0] if name in PAPER else math.nan
            numbers = [count / 1e6, paper, work / 1e12, 4 * count / 1e9, math.nan]
            sums.setdefault((part, count), [f"{name}: {part}", *numbers])  # once, if models share it
        for stage in (*model.stages(found.unet), "rest"):
            kinds = ("residual", "transformer", "rest")
            bars[stage][name] = [parts.get((stage, kind), (0, 0)) for kind in kinds]
    files.write_csv(args.out.with_suffix(".csv"),
                    ["model", "network", "stage", "kind", "parameters", "multiply-adds"], rows)
    header = ["", "M parameters", "paper", "T multiply-adds", "GB in float32", "paper"]
    cells = chart.show(header, list(sums.values()))
    print("multiply-adds are of one image: a pass of the U-Net, without guidance, and the VAE's decoder")

    def drawn(title: str, which: int, unit: float) -> Image.Image:
        bar = lambda stage, name: [counts[which] / unit for counts in bars[stage].get(name, [(0, 0)])]
        groups = {stage: [bar(stage, name) for name in args.model]
                  for stage in sorted(bars, key=ORDER.index)}
        return chart.bars(f"{title} by stage; in each, {', '.join(args.model)}", groups,
                          ["residual blocks", "transformers", "rest"])

    files.write(args.out, lambda path: chart.stack(
        chart.table("Whole networks", header, cells), drawn("Millions of parameters", 0, 1e6),
        drawn("Billions of multiply-adds", 1, 1e9)).save(path))


# ------------------------------------------------------------------------------------------------------------
# Table 2, Figure 5: latency


def random_weights(network: Callable[[], nn.Module], dtype: torch.dtype, device: str) -> nn.Module:
    """A network whose weights are noise: as fast as a trained one, and nothing to download."""
    with torch.device("meta"):
        made = network().requires_grad_(False)
    made = made.to(dtype).to_empty(device=device)
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.02)
    return made.to(memory_format=torch.channels_last)


def seconds(run: Callable[[], object], device: str, repeat: int) -> float:
    """The median time of several runs after one to warm up; a GPU is waited for."""
    times = []
    for _ in range(repeat + 1):
        start = time.perf_counter()
        run()
        if device.startswith("cuda"):
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


class Timing(NamedTuple):
    """What a network of a model takes for one image."""

    model: str
    network: str
    flops: int
    seconds: float
    peak: float                                                  # GB
    paper: float                                                 # seconds on an RTX 4090; nan: no such figure

    @property
    def rate(self) -> float:
        return self.flops / self.seconds


def workloads(found: Networks, steps: int, dtype: torch.dtype,
              device: str) -> dict[str, tuple[int, Callable[[], Callable]]]:
    """By network, the FLOPs of one image, and what makes the network and gives a function that runs it."""
    config, tokens, side = found.unet, found.texts[0].max_position_embeddings, found.unet.sample_size
    noise = torch.randn(1, config.in_channels, side, side, device=device)
    inputs = [x.to(device, dtype) for x in unet_inputs(config, tokens, side, batch=2)]
    guidance = preset("sdxl").guidance

    def texts():
        encoders = [random_weights(lambda: text.CLIP(one, projection=i == 1), dtype, device)
                    for i, one in enumerate(found.texts)]
        ids = torch.zeros(1, tokens, dtype=torch.long, device=device)
        return lambda: [encoder(ids) for encoder in encoders]

    def denoiser():
        unet = random_weights(lambda: model.UNet(config), dtype, device)

        def predict(x: Tensor, t: float) -> Tensor:
            timesteps = torch.full((2,), t, device=device)
            return guide(unet(torch.cat([x, x]).to(dtype), timesteps, *inputs[2:]).float(), guidance)
        return lambda: euler(predict, noise, Schedule(SDXL_SCHEDULER), steps)

    def decoder():
        vae = random_weights(lambda: model.VAE(found.vae), dtype, device)
        return lambda: vae.decode(noise.to(dtype))

    whole = whole_parts(found.texts, found.vae, found.size)
    step = 2 * sum(macs for _, macs in unet_parts(config, tokens).values())  # with guidance, two passes
    macs = {"text encoders": whole["text encoders"][1], "U-Net": steps * step,
            "VAE decoder": whole["VAE decoder"][1]}
    return {network: (2 * macs[network], make)
            for network, make in zip(macs, (texts, denoiser, decoder))}


@torch.inference_mode()
def timings(args: argparse.Namespace, dtype: torch.dtype, device: str) -> list[Timing]:
    """Of each network of each model, with random weights."""
    timed = []
    bar = tqdm(total=3 * len(args.model) * (args.repeat + 1), desc="latency", unit="run")
    for name in args.model:
        found = networks(name)
        size, said = args.size or found.size, {}
        found = found._replace(unet=replace(found.unet, sample_size=size // found.vae.downscale))
        if name in PAPER and (size, args.steps) == (1024, 25):   # as the paper has it
            said = {"text encoders": PAPER_PARTS["text encoders"][1], "U-Net": PAPER[name][2],
                    "VAE decoder": PAPER_PARTS["VAE"][1]}
        for network, (flops, make) in workloads(found, args.steps, dtype, device).items():
            restart_peak(device)
            run = make()
            took = seconds(lambda: (run(), bar.update()), device, args.repeat)
            del run                                              # before the next is made and measured
            timed.append(
                Timing(name, network, flops, took, peak_memory(device), said.get(network, math.nan)))
    bar.close()
    return timed


def latency(args: argparse.Namespace):
    """Times each model's networks, beside what counting predicts and what the paper says."""
    device = usable(args.device)
    dtype = dtype_of(args.precision, device)
    timed = timings(args, dtype, device)
    unets = [timing for timing in timed if timing.network == "U-Net"]
    rate = unets[0].rate  # what counting alone would say here: the first model's rate for all U-Nets
    counted = {timing: timing.flops / rate for timing in unets}
    implied = {timing: timing.flops / PAPER_RATE for timing in timed if not math.isnan(timing.paper)}
    at_paper_rate = f"at {PAPER_RATE / 1e12:g} TFLOP/s"
    header = ["model", "network", "TFLOP", "seconds", "TFLOP/s", "by counting", "peak GB", "paper, RTX 4090",
              at_paper_rate]
    rows = [[timing.model, timing.network, timing.flops / 1e12, timing.seconds, timing.rate / 1e12,
             counted.get(timing, math.nan), timing.peak, timing.paper, implied.get(timing, math.nan)]
            for timing in timed]
    if not implied:                                              # of these models the paper says nothing
        header, rows = header[:-2], [row[:-2] for row in rows]
    files.write_csv(args.out.with_suffix(".csv"), header, rows)
    cells = chart.show(header, rows)

    where = f"a CPU, {torch.get_num_threads()} threads"
    if device.startswith("cuda"):
        where = torch.cuda.get_device_name(device)
    where += f", {str(dtype).removeprefix('torch.')}"
    print(f"on {where}, {args.steps} steps with guidance; by counting: at {rate / 1e12:.3g} TFLOP/s")
    if implied:
        sdxl = networks("sdxl")
        floor = 2 * whole_parts(sdxl.texts, sdxl.vae, sdxl.size)["VAE decoder"][1] / PEAK_RATE
        print(f"the paper's {PAPER_PARTS['VAE'][1]} s for the VAE decoder cannot be: an RTX 4090 needs "
              f"{floor:.3f} s")
    groups = {}
    for timing in unets:  # a bar for each number, in its own colour: the parts before it are 0
        numbers = (timing.seconds, counted[timing], timing.paper, implied.get(timing, math.nan))
        groups[timing.model] = [[0] * i + [number] for i, number in enumerate(numbers)
                                if not math.isnan(number)]
    kinds = ["measured", "by counting", "paper, RTX 4090", f"counted, {at_paper_rate}"][:4 if implied else 2]
    files.write(args.out, lambda path: chart.stack(
        chart.table(f"Latency on {where}", header, cells),
        chart.bars(f"Seconds of the U-Net in {args.steps} steps", groups, kinds)).save(path))
