"""
What networks cost: parameters, FLOPs, memory and seconds (Figures 2 and 5, Tables 1 and 2).

Networks are counted on PyTorch's meta device, whose tensors have shapes but no data: this needs neither
weights nor memory. A multiply-add is two FLOPs.
"""

import argparse
import math
from collections import defaultdict
from itertools import product
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import model
from support.files import write_csv
from support.hub import local_folder, peak_memory, preset, reset_peak_memory, resolve_device, resolve_dtype
from support.plots import bar_chart, image_grid, print_table
from support.text import ENCODERS, encoder_names
from support.vae import VAE, VAEConfig

BLOCKS = {"resnets": "residual", "attentions": "transformer"}  # of a stage
KINDS = (*BLOCKS.values(), "rest")
SDXL_CLIPS = [  # from the config.json of its two text encoders
    {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
     "vocab_size": 49408, "max_position_embeddings": 77, "projection_dim": 768, "hidden_act": "quick_gelu"},
    {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20,
     "vocab_size": 49408, "max_position_embeddings": 77, "projection_dim": 1280, "hidden_act": "gelu"}]
SHARED = {"text encoders": (817, math.nan, 0.008), "VAE decoder": (math.nan, math.nan, 0.002)}
PAPER = {  # Tables 1 and 2: millions of parameters, GB of the checkpoint, seconds on an RTX 4090
    "sdxl": {"U-Net": (2567, 10.3, 3.133)} | SHARED,
    "1b": {"U-Net": (1161, 4.4, 1.604)} | SHARED,
    "700m": {"U-Net": (782, 3.0, 1.257)} | SHARED}


def read_configs(name: str) -> tuple[list[dict], VAEConfig, model.UNetConfig]:
    """A model's configurations: built in for sdxl, 1b and 700m, read from config.json for others."""
    if name in model.CONFIGS:
        return SDXL_CLIPS, VAEConfig(), model.CONFIGS[name]
    folder = local_folder(preset(name).source, (*ENCODERS, "vae", "unet"), weights=False)
    unet = Path(preset(name).student or folder / "unet")
    clips = [model.read_json(folder / encoder / "config.json") for encoder in encoder_names(folder)]
    return (clips, model.read_json(folder / "vae" / "config.json", VAEConfig.from_diffusers),
            model.read_json(unet / "config.json", model.UNetConfig.from_diffusers))


# ------------------------------------------------------------------------------------------------------------
# Counting


def count_parameters(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def count_clips(configs: list[dict]) -> tuple[int, int]:
    """Parameters of a model's CLIP text encoders, and FLOPs per prompt; only the second projects."""
    parameters = flops = 0
    for i, config in enumerate(configs):
        width, inner = config["hidden_size"], config["intermediate_size"]
        tokens, layers = config["max_position_embeddings"], config["num_hidden_layers"]
        head = width * config["projection_dim"] if i == 1 else 0
        weights = 4 * width**2 + 2 * width * inner               # of a layer: attention and MLP
        biases = 4 * width + inner + width + 4 * width           # theirs, and two layer norms
        embeddings = (config["vocab_size"] + tokens) * width
        attention = 2 * tokens**2 * width                        # Q K^T, and the mean of V
        parameters += embeddings + layers * (weights + biases) + 2 * width + head
        flops += 2 * (layers * (tokens * weights + attention) + head)
    return parameters, flops


def build_networks(clips: list[dict], vae: VAEConfig, unet: model.UNetConfig, size: int,
                   batch: int = 1) -> dict[str, tuple[nn.Module, list[Tensor]]]:
    """U-Net and VAE on the meta device, with inputs for an image; `batch` is the U-Net's, 2 for guidance."""
    side, tokens = size // vae.downscale, clips[0]["max_position_embeddings"]
    shapes = ((unet.in_channels, side, side), (), (tokens, unet.context_dim), (unet.pooled_dim,), (6,))
    with torch.device("meta"):
        coder = VAE(vae)
        image, latent = torch.zeros(1, 3, size, size), torch.zeros(1, vae.latent_channels, side, side)
        return {"U-Net": (model.UNet(unet), [torch.zeros(batch, *shape) for shape in shapes]),
                "VAE decoder": (nn.Sequential(coder.post_quant_conv, coder.decoder), [latent]),
                "VAE encoder": (nn.Sequential(coder.encoder, coder.quant_conv), [image])}


def count_network(network: nn.Module, inputs: list[Tensor], backward: bool = False) -> tuple[int, int]:
    """Parameters, and FLOPs of a forward pass, or of both a forward and a backward pass."""
    with FlopCounterMode(display=False) as counter:
        output = network(*inputs)
        if backward:
            output.sum().backward()
    return count_parameters(network), counter.get_total_flops()


def count_unet(unet: model.UNet, inputs: list[Tensor]) -> dict[tuple[str, str], tuple[int, int]]:
    """Parameters, and FLOPs of a pass, by stage ("rest": outside of all) and kind of block."""
    with FlopCounterMode(display=False) as counter:
        unet(*inputs)
    modules, counts = counter.get_flop_counts(), {}
    for stage, stage_path in model.stages(unet.config).items():
        for name, blocks in unet.get_submodule(stage_path).named_children():
            flops = sum(sum(modules[f"UNet.{stage_path}.{name}.{i}"].values()) for i in range(len(blocks)))
            if len(blocks):                                      # DW-1 and UP-3 have no transformers
                counts[stage, BLOCKS.get(name, "rest")] = count_parameters(blocks), flops
    parameters, flops = (sum(column) for column in zip(*counts.values()))
    counts["rest", "rest"] = count_parameters(unet) - parameters, counter.get_total_flops() - flops
    return counts


def step_flops(teacher: model.UNetConfig | None, student: model.UNetConfig, vae: VAEConfig,
               clips: list[dict], size: int) -> dict[str, tuple[int, int]]:
    """Parameters of a distillation's networks, and their FLOPs for one `size` x `size` training image."""
    counts, networks = {}, build_networks(clips, vae, student, size)
    if teacher:
        counts["teacher"] = count_network(*build_networks(clips, vae, teacher, size)["U-Net"])
    counts["student"] = count_network(*networks["U-Net"], backward=True)
    counts["VAE encoder"] = count_network(*networks["VAE encoder"])
    return counts | {"text encoders": count_clips(clips)}


class FusedAttention(TorchFunctionMode):
    """Within `with`, attention is fused, as on a GPU, and keeps no maps."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is F.scaled_dot_product_attention:
            return torch.ops.aten._scaled_dot_product_flash_attention(*args)[0]
        return function(*args, **(kwargs or {}))


def saved_bytes(unet: model.UNet, inputs: list[Tensor], checkpointing: bool) -> int:
    """Bytes that a U-Net on the meta device keeps for backward in bf16 autocast; modifies the U-Net."""
    unet.set_checkpointing(checkpointing)
    saved = {}

    def autocast(module: nn.Module, inputs: tuple[Tensor]) -> Tensor:
        return inputs[0].to(module.weight.dtype)

    def keep(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage()._cdata] = tensor.untyped_storage()  # once, however many views it has
        return tensor

    for module in [module for module in unet.modules() if hasattr(module, "weight")]:
        module.register_forward_pre_hook(autocast)
        module.to(torch.float32 if isinstance(module, (nn.GroupNorm, nn.LayerNorm)) else torch.bfloat16)
    with FusedAttention(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = unet(*inputs)                                   # kept alive so that no storage is reused
    weights = [parameter.untyped_storage()._cdata for parameter in unet.parameters()]
    return sum(storage.nbytes() for key, storage in saved.items() if key not in weights)


def print_plan(args: argparse.Namespace, matched: dict[str, str], clips: list[dict], vae: VAEConfig,
               teacher: model.UNet | None, student: model.UNet):
    """What `distill.py --dry-run` prints of a run: settings, matched features, and what a step costs."""
    for name in sorted(vars(args).keys() - {"dry_run"}):
        print(f"{name:18} {getattr(args, name)}")
    print(f"\n{len(matched)} features, student <- teacher")
    for path, source in matched.items():
        print(f"  {path} <- {source}")
    size = args.size or student.config.sample_size * vae.downscale
    counts = step_flops(teacher and teacher.config, student.config, vae, clips, size)
    rows = [[name, parameters, flops / 1e12] for name, (parameters, flops) in counts.items()]
    rows.append(["all", sum(row[1] for row in rows), sum(row[2] for row in rows)])
    print()
    print_table(["network", "parameters", "TFLOP per image"], rows)
    print(f"a step of {args.batch}: {args.batch * rows[-1][2]:.4g} TFLOP")
    # The student's weights, gradients and moments in float32, and copies of all weights in 16 bits.
    # Short-lived tensors, such as a recomputed block's, do not count.
    fixed = 16 * counts["student"][0] + 2 * rows[-1][1]
    networks = build_networks(clips, vae, student.config, size)
    per_image = saved_bytes(*networks["U-Net"], args.checkpointing)
    print(f"GPU memory in 16 bits, counted: {fixed / 1e9:.1f} GB plus {per_image / 1e9:.2f} GB per image, "
          f"or {(fixed + args.micro_batch * per_image) / 1e9:.1f} GB at --micro-batch {args.micro_batch}")


# ------------------------------------------------------------------------------------------------------------
# Figure 2, Tables 1 and 2: parameters and work


def budget(args: argparse.Namespace) -> Image.Image:
    """Parameters and multiply-adds of each stage and kind, beside the paper's sums."""
    rows, table, unets, parameter_bars, work_bars = [], [], {}, {}, {}
    for name in args.model:
        clips, vae, unet = read_configs(name)
        networks = build_networks(clips, vae, unet, unet.sample_size * vae.downscale)
        unets[name] = count_unet(*networks["U-Net"])
        counts = {"U-Net": unets[name], "text encoders": {("", ""): count_clips(clips)}}
        for network in ("VAE decoder", "VAE encoder"):
            counts[network] = {("", ""): count_network(*networks[network])}
        for network, parts in counts.items():
            for (stage, kind), (parameters, flops) in parts.items():
                rows.append([name, network, stage, kind, parameters, flops // 2])
            parameters, flops = (sum(column) for column in zip(*parts.values()))
            millions, gigabytes, _ = PAPER.get(name, {}).get(network, (math.nan, math.nan, math.nan))
            table.append([f"{name}: {network}", parameters / 1e6, millions, flops / 2e12,
                          4 * parameters / 1e9, gigabytes])
    for stage, name in product(dict.fromkeys(row[2] for row in rows if row[1] == "U-Net"), args.model):
        parts = [unets[name].get((stage, kind), (0, 0)) for kind in KINDS]
        if any(parameters for parameters, _ in parts):           # KOALA-700M has no Mid
            parameter_bars[f"{stage}  {name}"] = [parameters / 1e6 for parameters, _ in parts]
            work_bars[f"{stage}  {name}"] = [flops / 2e9 for _, flops in parts]
    header = ["model", "network", "stage", "kind", "parameters", "multiply-adds"]
    write_csv(args.out.with_suffix(".csv"), header, rows)
    print_table(["", "M parameters", "paper's M", "T multiply-adds", "GB in float32", "paper's GB"], table)
    print("multiply-adds are for one image and one U-Net pass, without guidance")
    return image_grid([
        [bar_chart("Parameters by stage", KINDS, parameter_bars, "millions")],
        [bar_chart("Work by stage, in one pass", KINDS, work_bars, "billions of multiply-adds")]])


# ------------------------------------------------------------------------------------------------------------
# Table 2, Figure 5: latency


def build_clips(clips: list[dict]) -> tuple[nn.Module, list[Tensor]]:
    """A model's text encoders on the meta device as one network, and the token ids of a prompt."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection  # slow to import

    class Encoders(nn.ModuleList):
        def forward(self, ids: Tensor) -> Tensor:
            return torch.cat([encoder(ids).last_hidden_state for encoder in self], dim=2)

    kinds = CLIPTextModel, CLIPTextModelWithProjection
    with torch.device("meta"):
        encoders = Encoders([kind(CLIPTextConfig(**clip)) for kind, clip in zip(kinds, clips)])
        return encoders, [torch.zeros(1, clips[0]["max_position_embeddings"], dtype=torch.long)]


def fill(network: nn.Module, inputs: list[Tensor], dtype: torch.dtype, device: str) -> list[Tensor]:
    """Fills a meta-device network with noise, which is as fast as trained weights; returns filled inputs."""
    network.requires_grad_(False).to(dtype).to_empty(device=device).to(memory_format=torch.channels_last)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.02)
    for buffer in network.buffers():                             # positions of the text encoders
        nn.init.zeros_(buffer)
    return [torch.rand(x.shape).to(device, dtype if x.is_floating_point() else x.dtype) for x in inputs]


def time_network(network: nn.Module, inputs: list[Tensor], passes: int, repeat: int) -> float:
    """Mean seconds of `passes` forward passes, measured over `repeat` times as many after a warm-up."""
    timer = Timer("network(*inputs)", globals=locals(), num_threads=torch.get_num_threads())
    return passes * timer.timeit(passes * repeat).mean           # waits for the device


def describe_device(device: str, dtype: torch.dtype) -> str:
    """The device and precision that a time was measured with."""
    name = f"a CPU with {torch.get_num_threads()} threads"
    if device.startswith("cuda"):
        name = torch.cuda.get_device_name(device)
    return f"{name}, {str(dtype).removeprefix('torch.')}"


@torch.inference_mode()
def latency(args: argparse.Namespace) -> Image.Image:
    """Times each model's networks for one image: the U-Net for all steps, the others for one pass."""
    device, names = resolve_device(args.device), ["text encoders", "U-Net", "VAE decoder"]
    dtype, rows, bars = resolve_dtype(args.precision, device), [], defaultdict(list)
    for model_name in tqdm(args.model, "latency"):
        clips, vae, unet = read_configs(model_name)
        size = args.size or unet.sample_size * vae.downscale
        networks = {"text encoders": build_clips(clips)} | build_networks(clips, vae, unet, size, batch=2)
        for name in names:
            network, inputs = networks.pop(name)                 # the previous one is freed
            passes, paper = args.steps if name == "U-Net" else 1, math.nan
            flops = passes * count_network(network, inputs)[1]
            reset_peak_memory(device)
            seconds = time_network(network, fill(network, inputs, dtype, device), passes, args.repeat)
            bars[f"{model_name}, measured"].append(seconds)
            if model_name in PAPER and (size, args.steps) == (1024, 25):
                paper = PAPER[model_name][name][2]
                bars[f"{model_name}, paper's RTX 4090"].append(paper)
            rows.append([model_name, name, flops / 1e9, seconds, flops / seconds / 1e9, peak_memory(device),
                         paper])
    header = ["model", "network", "GFLOP", "seconds", "GFLOP/s", "peak GB", "paper, RTX 4090"]
    write_csv(args.out.with_suffix(".csv"), header, rows)
    print_table(header, rows)
    title = f"One image in {args.steps} steps with guidance, on {describe_device(device, dtype)}"
    print(title)
    return bar_chart(title, names, bars, "seconds")
