"""
The U-Net of SDXL and KOALA, the KOALA surgery, features for distillation, weights in and out.

    teacher = load_unet("stable-diffusion-xl-base-1.0")              # a folder in the official layout
    student = UNet(student_config(teacher.config, "700m"))           # section 4.1
    inherit(student, teacher)                                        # section 5.1

KOALA: Lee et al., arXiv 2312.04005v1. SDXL: Podell et al., arXiv 2307.01952.

All models are one class, UNet, configured by a UNetConfig; `student_config` derives a student's config from
its teacher's. Stages have the paper's names:

    noisy latents                                                                 prediction
       DW-1  R R v ........................ skips ........................ UP-3  R R R
        DW-2  RT RT v .................................................. UP-2  RT RT RT ^
         DW-3  RT RT ................................................. UP-1  RT RT RT ^
                                       Mid  R T R

    R  residual block       v  downsampler       ^  upsampler
    T  a transformer: blocks of self-attention (SA), cross-attention (CA) and feed-forward (FFN),
       in SDXL two at DW-2 and UP-2, ten at DW-3, Mid and UP-1

KOALA (section 4.1) drops the second RT pair of every DW and UP stage. Of ten transformer blocks it keeps the
first six (1B) or five (700M); KOALA-700M has no Mid either. Modules are named as in the official checkpoints:
`down_blocks.1` is DW-2, `up_blocks.0` is UP-1. `to_out.0` and `ff.net.2` keep the official
numbers, which count a dropout.

Shapes: B batch, C channels, H W height and width, T = H*W tokens, D token width, L text tokens, P pooled
width. This file stands alone: it needs torch and safetensors, and no other file of the project.
"""

import json
import re
from collections import OrderedDict
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Callable, NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

# ------------------------------------------------------------------------------------------------------------
# Configurations


@dataclass(frozen=True)
class UNetConfig:
    """A U-Net of the Stable Diffusion family in numbers; the defaults are SDXL's."""

    channels: tuple[int, ...] = (320, 640, 1280)  # width of each level, finest first
    depths: tuple[int, ...] = (0, 2, 10)          # transformer blocks in a pair, by level; 0: R alone
    mid_depth: int = 10                           # transformer blocks in Mid; 0: there is no Mid
    pairs: int = 2                                # RT pairs in an encoder stage; a decoder stage has one more
    heads: tuple[int, ...] = (5, 10, 20)          # attention heads, by level
    context_dim: int = 2048                       # D of the text sequence
    pooled_dim: int = 1280                        # P of the pooled text, one vector; 0: none, and no sizes
    size_dim: int = 256                           # sinusoids for each of the six size and crop numbers
    linear_projection: bool = True                # into and out of a transformer; else a 1x1 convolution
    groups: int = 32                              # of every group norm
    in_channels: int = 4
    out_channels: int = 4
    sample_size: int = 128                        # height and width of the latents it was trained on

    @property
    def emb_dim(self) -> int:
        """Width of the embedding of the timestep and other conditions."""
        return 4 * self.channels[0]

    @classmethod
    def from_diffusers(cls, config: dict) -> "UNetConfig":
        """Reads the official unet/config.json. Raises ValueError for what this U-Net does not support."""
        levels = len(config["block_out_channels"])
        has_attention = ["CrossAttn" in block for block in config["down_block_types"]]
        depths = per_level(config.get("transformer_layers_per_block", 1), levels)
        heads = per_level(config.get("attention_head_dim", 8), levels)  # a number of heads, despite its name
        sdxl = config.get("addition_embed_type") is not None
        size_dim = config["addition_time_embed_dim"] if sdxl else 0
        sample_size = config.get("sample_size", 128)
        if re.match(r"0\.[0-8]\.", config.get("_diffusers_version", "")):
            sample_size = max(sample_size, 64)                   # Stable Diffusion 1's first file says 32
        result = cls(
            channels=tuple(config["block_out_channels"]),
            depths=tuple(depth if attends else 0 for depth, attends in zip(depths, has_attention)),
            mid_depth=depths[-1] if config.get("mid_block_type", MID_TYPE) else 0,
            pairs=int(config.get("layers_per_block", 2)),        # not a list, as other networks have
            heads=tuple(heads),
            context_dim=int(config["cross_attention_dim"]),
            pooled_dim=config["projection_class_embeddings_input_dim"] - 6 * size_dim if sdxl else 0,
            size_dim=size_dim,
            linear_projection=bool(config.get("use_linear_projection")),
            groups=config.get("norm_num_groups", 32),
            in_channels=config.get("in_channels", 4),
            out_channels=config.get("out_channels", 4),
            sample_size=sample_size,
        )
        # Not checked: the first three may be written in other ways, and fused attention needs no upcast.
        free = ("transformer_layers_per_block", "attention_head_dim", "sample_size", "upcast_attention")
        check_fixed({key: config[key] for key in config if key not in free}, result.to_diffusers())
        return result

    def to_diffusers(self) -> dict:
        """The official unet/config.json of this configuration."""
        depths = [depth or 1 for depth in self.depths]  # the official files write an unused depth as 1
        depths[-1] = self.depths[-1] or self.mid_depth or 1
        if self.mid_depth not in (0, depths[-1]):
            raise ValueError(f"the official format has no Mid of depth {self.mid_depth} beside {depths[-1]}")
        return {
            "_class_name": "UNet2DConditionModel",
            "addition_embed_type": "text_time" if self.pooled_dim else None,
            "addition_time_embed_dim": self.size_dim if self.pooled_dim else None,
            "attention_head_dim": list(self.heads),
            "block_out_channels": list(self.channels),
            "cross_attention_dim": self.context_dim,
            "down_block_types": ["CrossAttnDownBlock2D" if depth else "DownBlock2D" for depth in self.depths],
            "in_channels": self.in_channels,
            "layers_per_block": self.pairs,
            "mid_block_type": MID_TYPE if self.mid_depth else None,
            "norm_num_groups": self.groups,
            "out_channels": self.out_channels,
            "projection_class_embeddings_input_dim":
                self.pooled_dim + 6 * self.size_dim if self.pooled_dim else None,
            "sample_size": self.sample_size,
            "transformer_layers_per_block": depths,
            "up_block_types": ["CrossAttnUpBlock2D" if depth else "UpBlock2D" for depth in self.depths[::-1]],
            "use_linear_projection": self.linear_projection,
            **FIXED,
        }


# ------------------------------------------------------------------------------------------------------------
# Building blocks


class Checkpointed(nn.Module):
    """A module whose activations the backward pass can recompute, to save memory; results are the same."""

    checkpointing = False

    def __call__(self, *args):
        if not self.checkpointing or not torch.is_grad_enabled():
            return super().__call__(*args)
        # Reentrant checkpointing would give captured features no gradient. Nothing here is random.
        return checkpoint(super().__call__, *args, use_reentrant=False, preserve_rng_state=False)


def norm_silu(norm: nn.GroupNorm, x: Tensor) -> Tensor:
    """SiLU after a norm, in place when no gradient is needed."""
    return F.silu(norm(x), inplace=not torch.is_grad_enabled())


class ResBlock(Checkpointed):
    """R: two convolutions; in the U-Net the time embedding is added between them."""

    def __init__(self, cin: int, cout: int, groups: int, eps: float, emb_dim: int | None = None):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, cin, eps)
        self.conv1 = nn.Conv2d(cin, cout, 3, padding=1)
        if emb_dim:
            self.time_emb_proj = nn.Linear(emb_dim, cout)
        self.norm2 = nn.GroupNorm(groups, cout, eps)
        self.conv2 = nn.Conv2d(cout, cout, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(cin, cout, 1) if cin != cout else None

    def forward(self, x: Tensor, emb: Tensor | None = None) -> Tensor:
        h = self.conv1(norm_silu(self.norm1, x))                 # (B, C, H, W)
        if emb is not None:
            h = h + self.time_emb_proj(emb)[:, :, None, None]    # (B, C, H, W) + (B, C, 1, 1)
        h = self.conv2(norm_silu(self.norm2, h))                 # (B, C, H, W)
        return h + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class Attention(nn.Module):
    """Multi-head attention from x to `context`, or to x: the SA that KOALA distills."""

    def __init__(self, dim: int, heads: int, context_dim: int | None = None, bias: bool = False):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(dim, dim, bias)
        self.to_k = nn.Linear(context_dim or dim, dim, bias)
        self.to_v = nn.Linear(context_dim or dim, dim, bias)
        self.to_out = nn.ModuleList([nn.Linear(dim, dim)])

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        context = x if context is None else context
        q = self.split_heads(self.to_q(x))                       # (B, heads, T, D / heads)
        k = self.split_heads(self.to_k(context))                 # (B, heads, T or L, D / heads)
        v = self.split_heads(self.to_v(context))                 # (B, heads, T or L, D / heads)
        h = F.scaled_dot_product_attention(q, k, v)              # (B, heads, T, D / heads)
        return self.to_out[0](h.transpose(1, 2).flatten(2))      # (B, T, D)

    def split_heads(self, x: Tensor) -> Tensor:
        return x.unflatten(2, (self.heads, -1)).transpose(1, 2)  # (B, T, D) -> (B, heads, T, D / heads)


class FeedForward(nn.Module):
    """FFN: a gated linear unit (GEGLU), four times wider in the middle."""

    def __init__(self, dim: int):
        super().__init__()
        gated = nn.ModuleDict({"proj": nn.Linear(dim, 8 * dim)})
        self.net = nn.ModuleList([gated, nn.Identity(), nn.Linear(4 * dim, dim)])

    def forward(self, x: Tensor) -> Tensor:
        h, gate = self.net[0]["proj"](x).chunk(2, dim=-1)        # (B, T, 4D) each
        return self.net[2](h * F.gelu(gate))                     # (B, T, D)


class TransformerBlock(Checkpointed):
    """A block of T: self-attention, cross-attention to the text, feed-forward, each added to its input."""

    def __init__(self, dim: int, heads: int, context_dim: int):
        super().__init__()
        self.norm1, self.attn1 = nn.LayerNorm(dim), Attention(dim, heads)
        self.norm2, self.attn2 = nn.LayerNorm(dim), Attention(dim, heads, context_dim)
        self.norm3, self.ff = nn.LayerNorm(dim), FeedForward(dim)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        x = x + self.attn1(self.norm1(x))                        # (B, T, D)    SA
        x = x + self.attn2(self.norm2(x), context)               # (B, T, D)    CA
        return x + self.ff(self.norm3(x))                        # (B, T, D)    FFN


class Transformer(nn.Module):
    """T: transformer blocks whose tokens are the pixels of a feature map."""

    def __init__(self, channels: int, depth: int, heads: int, config: UNetConfig):
        super().__init__()
        self.linear = config.linear_projection
        projection = nn.Linear if self.linear else partial(nn.Conv2d, kernel_size=1)
        self.norm = nn.GroupNorm(config.groups, channels, 1e-6)
        self.proj_in = projection(channels, channels)
        self.transformer_blocks = nn.ModuleList(
            [TransformerBlock(channels, heads, config.context_dim) for _ in range(depth)])
        self.proj_out = projection(channels, channels)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        h = self.norm(x)                                         # (B, C, H, W)
        h = self.proj_in(to_tokens(h)) if self.linear else to_tokens(self.proj_in(h))
        for block in self.transformer_blocks:
            h = block(h, context)                                # (B, T, C)
        h = to_map(self.proj_out(h), x) if self.linear else self.proj_out(to_map(h, x))
        return x + h                                             # (B, C, H, W)


def to_tokens(x: Tensor) -> Tensor:
    return x.flatten(2).transpose(1, 2)                          # (B, C, H, W) -> (B, T, C)


def to_map(tokens: Tensor, like: Tensor) -> Tensor:
    return tokens.transpose(1, 2).unflatten(2, like.shape[2:])   # (B, T, C) -> (B, C, H, W)


class Upsample(nn.Module):
    """Nearest-neighbor upsampling, to `size` or by two, then a convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        return self.conv(F.interpolate(x, size, scale_factor=None if size else 2.0))


# ------------------------------------------------------------------------------------------------------------
# The U-Net


class Stage(nn.Module):
    """
    Residual blocks with (input, output) `widths`; a transformer follows each of the first `transformers`.

    Mid is a plain Stage: a residual block, a transformer, a residual block.
    """

    def __init__(self, widths: list[tuple[int, int]], transformers: int, depth: int, heads: int,
                 config: UNetConfig):
        super().__init__()
        self.resnets = nn.ModuleList(
            [ResBlock(cin, cout, config.groups, 1e-5, config.emb_dim) for cin, cout in widths])
        self.attentions = nn.ModuleList(
            [Transformer(widths[-1][1], depth, heads, config) for _ in range(transformers)])

    def pair(self, i: int, x: Tensor, emb: Tensor, context: Tensor) -> Tensor:
        x = self.resnets[i](x, emb)                              # (B, C, H, W)    R
        return self.attentions[i](x, context) if i < len(self.attentions) else x

    def forward(self, x: Tensor, emb: Tensor, context: Tensor) -> Tensor:
        for i in range(len(self.resnets)):
            x = self.pair(i, x, emb, context)                    # (B, C, H, W)
        return x                                                 # LF


class DownStage(Stage):
    """DW-i: pushes the output of every pair, and of the downsampler, onto `skips`."""

    def __init__(self, cin: int, cout: int, depth: int, heads: int, config: UNetConfig, last: bool):
        widths = [(cin if i == 0 else cout, cout) for i in range(config.pairs)]
        super().__init__(widths, config.pairs if depth else 0, depth, heads, config)
        if not last:
            conv = nn.Conv2d(cout, cout, 3, stride=2, padding=1)
            self.downsamplers = nn.ModuleList([nn.Sequential(OrderedDict(conv=conv))])

    def forward(self, x: Tensor, emb: Tensor, context: Tensor, skips: list[Tensor]) -> Tensor:
        for i in range(len(self.resnets)):
            x = self.pair(i, x, emb, context)                    # (B, C, H, W)
            skips.append(x)
        if hasattr(self, "downsamplers"):
            x = self.downsamplers[0](x)                          # (B, C, H / 2, W / 2)
            skips.append(x)
        return x                                                 # LF


class UpStage(Stage):
    """UP-i: each pair pops one of `skips` and concatenates it; `skip_widths` are in the order of use."""

    def __init__(self, cin: int, cout: int, skip_widths: list[int], depth: int, heads: int,
                 config: UNetConfig, last: bool):
        widths = [((cin if i == 0 else cout) + skip, cout) for i, skip in enumerate(skip_widths)]
        super().__init__(widths, len(widths) if depth else 0, depth, heads, config)
        if not last:
            self.upsamplers = nn.ModuleList([Upsample(cout)])

    def forward(self, x: Tensor, emb: Tensor, context: Tensor, skips: list[Tensor]) -> Tensor:
        for i in range(len(self.resnets)):
            x = torch.cat([x, skips.pop()], dim=1)               # (B, C + C of the skip, H, W)
            x = self.pair(i, x, emb, context)                    # (B, C, H, W)
        if hasattr(self, "upsamplers"):
            x = self.upsamplers[0](x, skips[-1].shape[2:])       # (B, C, 2H, 2W), or the skip's size
        return x                                                 # LF


def sinusoidal_embedding(numbers: Tensor, dim: int) -> Tensor:
    """Numbers (N,) as cosines, then sines, of frequencies from 1 to nearly 1/10000: (N, dim), float32."""
    frequencies = 10000 ** (-torch.arange(dim // 2, dtype=torch.float32, device=numbers.device) / (dim // 2))
    angles = numbers.float()[:, None] * frequencies              # (N, dim / 2)
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def embedding_mlp(din: int, dout: int) -> nn.Sequential:
    """An MLP of two layers, from a condition to the embedding that residual blocks read."""
    return nn.Sequential(OrderedDict(
        linear_1=nn.Linear(din, dout), act=nn.SiLU(), linear_2=nn.Linear(dout, dout)))


class UNet(nn.Module):
    """The U-Net of SDXL, KOALA and the like (Figures 2 and 3)."""

    def __init__(self, config: UNetConfig):
        super().__init__()
        self.config = config
        channels, last = config.channels, len(config.channels) - 1

        self.conv_in = nn.Conv2d(config.in_channels, channels[0], 3, padding=1)
        self.time_embedding = embedding_mlp(channels[0], config.emb_dim)
        if config.pooled_dim:
            self.add_embedding = embedding_mlp(config.pooled_dim + 6 * config.size_dim, config.emb_dim)

        self.down_blocks = nn.ModuleList()
        width, skips = channels[0], [channels[0]]  # the widths that `forward` will meet
        for i, (cout, depth, heads) in enumerate(zip(channels, config.depths, config.heads)):
            self.down_blocks.append(DownStage(width, cout, depth, heads, config, last=i == last))
            width = cout
            skips += [width] * (config.pairs + (i != last))

        if config.mid_depth:
            self.mid_block = Stage([(width, width)] * 2, 1, config.mid_depth, config.heads[-1], config)

        self.up_blocks = nn.ModuleList()
        for i in reversed(range(len(channels))):
            skip_widths = [skips.pop() for _ in range(config.pairs + 1)]
            self.up_blocks.append(UpStage(
                width, channels[i], skip_widths, config.depths[i], config.heads[i], config, last=i == 0))
            width = channels[i]

        self.conv_norm_out = nn.GroupNorm(config.groups, channels[0], 1e-5)
        self.conv_out = nn.Conv2d(channels[0], config.out_channels, 3, padding=1)

    def forward(self, sample: Tensor, timestep: Tensor, context: Tensor, pooled: Tensor | None = None,
                time_ids: Tensor | None = None) -> Tensor:
        """
        Predicts the noise in `sample`, or v = alpha_t noise - sigma_t z, whichever it was trained for.

        sample (B, 4, H, W) noisy latents; timestep (B,) or a single number, 0 to 999; context (B, L, D) text;
        pooled (B, P) pooled text; time_ids (B, 6) original height and width, crop top and left, target height
        and width, in pixels. The last two are for configurations with a `pooled_dim`. Returns (B, 4, H, W).
        """
        timestep = torch.as_tensor(timestep, device=sample.device).expand(len(sample))
        emb = self.time_embedding(sinusoidal_embedding(timestep, self.config.channels[0]).to(sample.dtype))
        if self.config.pooled_dim:
            sizes = sinusoidal_embedding(time_ids.flatten(), self.config.size_dim).view(len(sample), -1)
            emb = emb + self.add_embedding(torch.cat([pooled, sizes.to(sample.dtype)], dim=1))
        emb = F.silu(emb)                                        # (B, 4C), as every residual block reads it

        x = self.conv_in(sample)                                 # (B, C, H, W)
        skips = [x]
        for stage in self.down_blocks:                           # DW-1, DW-2, DW-3
            x = stage(x, emb, context, skips)                    # (B, C, H/2, W/2) to (B, 4C, H/4, W/4)
        if self.config.mid_depth:                                # Mid
            x = self.mid_block(x, emb, context)                  # (B, 4C, H/4, W/4)
        for stage in self.up_blocks:                             # UP-1, UP-2, UP-3
            x = stage(x, emb, context, skips)                    # (B, 4C, H/2, W/2) to (B, C, H, W)
        return self.conv_out(norm_silu(self.conv_norm_out, x))   # (B, 4, H, W)

    def set_checkpointing(self, on: bool):
        """Sets whether the backward pass recomputes block activations."""
        for module in self.modules():
            if isinstance(module, Checkpointed):
                module.checkpointing = on


# ------------------------------------------------------------------------------------------------------------
# The surgery: from teacher to student, with weights and features at the same block location


class Surgery(NamedTuple):
    """How a student differs from its teacher, besides one RT pair fewer in every DW and UP stage."""

    depth: int      # first blocks kept in each transformer; a shorter one keeps all
    mid_depth: int  # likewise in Mid; 0: no Mid


SURGERIES = {
    # KOALA, for SDXL (section 4.1, Table 2). Appendix B.2 swaps the depths; the parameter totals decide.
    "1b": Surgery(depth=6, mid_depth=6),
    "700m": Surgery(depth=5, mid_depth=0),
    # BK-SDM, for Stable Diffusion (Kim et al., arXiv 2305.15798), whose pairs have one transformer block.
    "base": Surgery(depth=1, mid_depth=1),
    "small": Surgery(depth=1, mid_depth=0),
}


def student_config(teacher: UNetConfig, name: str) -> UNetConfig:
    """The configuration of a student named in SURGERIES. Raises ValueError if the teacher does not fit."""
    surgery = SURGERIES[name]
    if teacher.pairs != 2 or not teacher.mid_depth:
        raise ValueError("the surgery needs a teacher like SDXL: two pairs in encoder stages, and Mid")
    return replace(teacher, pairs=1, mid_depth=min(surgery.mid_depth, teacher.mid_depth),
                   depths=tuple(min(depth, surgery.depth) for depth in teacher.depths))


CONFIGS = {                                       # parameters (Table 2)
    "sdxl": UNetConfig(),                         # 2,567,463,684
    "1b": student_config(UNetConfig(), "1b"),     # 1,161,184,324
    "700m": student_config(UNetConfig(), "700m"),  #   782,822,724
}


def teacher_path(path: str) -> str:
    """
    The teacher's path for a module or tensor of the student.

    The surgery keeps pair 0 of an encoder stage and pairs 0 and 2 of a decoder stage (section 4.1). Pair 1 of
    a student's decoder stage is the teacher's pair 2: only that pair has the right width, because it reads
    the skip from the level above. All other names stay the same, so a student's transformer blocks are the
    teacher's first ones.
    """
    parts = path.split(".")                                      # such as up_blocks, 0, resnets, 1, conv1
    if parts[0] == "up_blocks" and parts[2:4] in (["resnets", "1"], ["attentions", "1"]):
        parts[3] = "2"
    return ".".join(parts)


def inherit(student: UNet, teacher: UNet):
    """Copies the teacher's weights at the same block location into the student (section 5.1)."""
    weights = teacher.state_dict()
    student.load_state_dict({path: weights[teacher_path(path)] for path in student.state_dict()})


# ------------------------------------------------------------------------------------------------------------
# Features


def stages(config: UNetConfig) -> dict[str, str]:
    """Maps the paper's names of a U-Net's stages, in the order they run, to module paths."""
    levels = range(len(config.channels))
    return ({f"DW-{i + 1}": f"down_blocks.{i}" for i in levels}
            | ({"Mid": "mid_block"} if config.mid_depth else {})
            | {f"UP-{i + 1}": f"up_blocks.{i}" for i in levels})


BLOCK = r"\.attentions\.\d+\.transformer_blocks\.\d+"
FEATURE_TYPES = {  # of the paper (section 4.2, F1), as patterns of module paths below a stage
    "SA": BLOCK + r"\.attn1",  # after its output projection, before the residual
    "CA": BLOCK + r"\.attn2",
    "FFN": BLOCK + r"\.ff",
    "Res": r"\.resnets\.\d+",
    "LF": "",  # last feature: the output of the stage, after its down- or upsampler
}


def feature_paths(unet: UNet, kind: str, stage: str) -> list[str]:
    """Paths of the modules that output the features of a type at a stage; empty if there are none."""
    pattern = re.escape(stages(unet.config)[stage]) + FEATURE_TYPES[kind]
    return [path for path, _ in unet.named_modules() if re.fullmatch(pattern, path)]


class Features:
    """
    Captures the outputs of modules of a U-Net during its forward pass:

        features = Features(unet, paths)
        with features as captured:
            unet(...)
        captured[path]  # (B, T, D) or (B, C, H, W)

    Each forward pass overwrites the previous one's outputs. Nothing is captured outside `with`, so
    recomputation in the backward pass keeps no second copy. A U-Net to be compiled needs it before its first
    call: compiled code ignores later hooks. Raises RuntimeError if a module did not run.
    """

    def __init__(self, unet: UNet, paths: list[str]):
        self.paths, self.captured = paths, None
        for path in paths:
            unet.get_submodule(path).register_forward_hook(partial(self.capture, path))

    def capture(self, path: str, module: nn.Module, args: tuple, output: Tensor):
        if self.captured is not None:
            self.captured[path] = output

    def __enter__(self) -> dict[str, Tensor]:
        self.captured = {}
        return self.captured

    def __exit__(self, error_type, *rest):
        captured, self.captured = self.captured, None
        missing = [path for path in self.paths if path not in captured]
        if missing and error_type is None:
            raise RuntimeError(f"{len(missing)} features were not captured, the first {missing[0]}")


# ------------------------------------------------------------------------------------------------------------
# Weights in and out: the official layout, a folder with config.json and diffusion_pytorch_model.safetensors

HALF = (torch.float16, torch.bfloat16)
WEIGHTS = "diffusion_pytorch_model"  # weight files of U-Net and VAE, without extension
MID_TYPE = "UNetMidBlock2DCrossAttn"  # the default for `mid_block_type`; null means no Mid
FIXED = {  # entries of config.json that are the same in every U-Net of this family
    "act_fn": "silu", "addition_embed_type_num_heads": 64, "attention_type": "default", "conv_in_kernel": 3,
    "conv_out_kernel": 3, "downsample_padding": 1, "flip_sin_to_cos": True, "freq_shift": 0,
    "mid_block_scale_factor": 1, "norm_eps": 1e-05, "resnet_out_scale_factor": 1.0,
    "resnet_time_scale_shift": "default", "time_embedding_type": "positional",
}


def load_unet(folder: str | Path, dtype: torch.dtype | None = None, device: str = "cpu") -> UNet:
    """
    Loads the U-Net of a folder, or of its unet/, in `dtype` or else as stored.

    Raises FileNotFoundError or ValueError, one line that says what is wrong and what to do.
    """
    folder = part_folder(folder, "unet")
    config = read_json(folder / "config.json", UNetConfig.from_diffusers)
    return build(UNet, config, read_weights(folder, WEIGHTS, dtype), folder, dtype, device)


def save_unet(unet: UNet, folder: str | Path):
    """Writes config.json and weights, in their own dtype, in the official layout; diffusers reads them."""
    save_network(unet, unet.config.to_diffusers(), Path(folder), WEIGHTS)


def part_folder(folder: str | Path, part: str) -> Path:
    """The folder of a network such as "unet": that part of a whole model's folder, or the folder itself."""
    whole = Path(folder, part).is_dir() or Path(folder, "model_index.json").is_file()
    return Path(folder, part) if whole else Path(folder)


def read_json(path: Path, parse: Callable[[dict], object] = dict):
    """Parses the object in a JSON file with `parse`. Raises FileNotFoundError or ValueError."""
    try:
        return parse(json.loads(path.read_text(encoding="utf-8-sig")))
    except (LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged or the wrong file ({error!r})") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def per_level(value: int | list, levels: int) -> list:
    """The official files give one number for all levels, or a list with one for each."""
    return list(value) if isinstance(value, (list, tuple)) else [value] * levels


def check_fixed(found: dict, supported: dict):
    """Raises ValueError for unsupported entries of a config.json; null, false and absent are the same."""
    wrong = []
    for key, value in found.items():
        value = list(value) if isinstance(value, tuple) else value
        if not key.startswith("_") and (value or None) != (supported.get(key) or None):
            wrong.append(f"{key}={value!r}")
    if wrong:
        raise ValueError(f"unsupported value: {', '.join(wrong)}")


def read_weights(folder: Path, stem: str, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """
    A folder's tensors, from its shards or its single file; the float16 variant if `dtype` is 16-bit.

    Raises FileNotFoundError or ValueError.
    """
    plain = [f"{stem}.safetensors.index.json", f"{stem}.safetensors"]
    half = [f"{stem}.safetensors.index.fp16.json", f"{stem}.fp16.safetensors"]
    found = [folder / name for name in (half + plain if dtype in HALF else plain + half)]
    found = [path for path in found if path.is_file()]
    if not found:
        hint = ""
        if any(folder.glob("*.bin")):
            hint = "; its .bin file is a pickle and is not opened: convert it to safetensors"
        raise FileNotFoundError(f"no {plain[1]} in the folder {folder}{hint}")
    shards = found[:1]
    if found[0].suffix == ".json":
        names = read_json(found[0]).get("weight_map")
        if not isinstance(names, dict):
            raise ValueError(f"{found[0]} has no weight_map; download it again")
        shards = [folder / name for name in sorted(set(names.values()))]
    weights = {}
    for shard in shards:
        weights |= read_tensors(shard)
    return weights


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file. Raises OSError or ValueError."""
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged, or really a git-lfs pointer or a pickle: download it "
                         f"again ({error})") from None


def build(kind: type[nn.Module], config: object, weights: dict[str, Tensor], folder: Path,
          dtype: torch.dtype | None, device: str) -> nn.Module:
    """`kind(config)` with weights, read from `folder`. Raises ValueError unless they fit and are finite."""
    with torch.device("meta"):  # takes no memory: the tensors of the file become the parameters
        network = kind(config)
    shapes = {name: tensor.shape for name, tensor in network.state_dict().items()}
    missing = [name for name in shapes if name not in weights or weights[name].shape != shapes[name]]
    unexpected = [name for name in weights if name not in shapes]
    if missing or unexpected:
        problems = {"missing or of another shape": missing, "unexpected": unexpected}
        reason = "; ".join(f"{len(names)} tensors {problem}, such as {names[0]}"
                           for problem, names in problems.items() if names)
        if any(name.startswith(("input_blocks.", "model.diffusion_model.")) for name in unexpected):
            reason = "these are names of a single-file checkpoint; convert it to a folder with diffusers"
        raise ValueError(f"the weights in {folder} do not fit their config.json: {reason}")
    for name, tensor in weights.items():
        if tensor.dtype not in (torch.float32, *HALF) or not tensor.isfinite().all():
            raise ValueError(f"the weights in {folder} are not finite, or not fp32, fp16 or bf16 ({name}): "
                             f"download them again")
        weights[name] = tensor.to(device, dtype)  # one by one, so that memory never holds all of them twice
    network.load_state_dict(weights, strict=True, assign=True)
    return network


def save_network(network: nn.Module, config: dict, folder: Path, stem: str):
    """Writes a network's config.json and weights. Raises OSError or SafetensorError."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.cpu().contiguous() for name, tensor in network.state_dict().items()}
    save_file(weights, folder / f"{stem}.safetensors", {"format": "pt"})  # transformers asks for this entry
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
