"""
The networks of SDXL and KOALA: U-Net, VAE, the KOALA surgery, features for distillation, weights in and out.

KOALA   Lee et al., arXiv 2312.04005          SDXL   Podell et al., arXiv 2307.01952

One U-Net is written here; every variant is a row of numbers in CONFIGS. Its stages have the paper's names:

    noisy latent                                                                  prediction
       DW-1  R R v ........................ skips ........................ UP-3  R R R
        DW-2  RT RT v .................................................. UP-2  RT RT RT ^
         DW-3  RT RT ................................................. UP-1  RT RT RT ^
                                       Mid  R T R

    R  residual block       v  downsampler       ^  upsampler
    T  transformer blocks, each self-attention (SA), cross-attention (CA), feed-forward (FFN):
       in SDXL two at DW-2 and UP-2, ten at DW-3, Mid and UP-1

KOALA (section 4.1) drops one RT pair of every stage, cuts ten T to six (1B) or five (700M); 700M has no Mid.
Modules are named as in the official checkpoints, which load directly: `down_blocks.1` is DW-2, `up_blocks.0`
is UP-1, and a lone `to_out.0` or `ff.net.2` has its number from a dropout that once stood beside it.

Shapes: B batch, C channels, H W height and width, T = H*W tokens, D token width, L text tokens,
P pooled width.
"""

import re
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import files
from options import one_line
from weights import WEIGHTS, check_numbers, weight_files, with_weights, write_weights

# ------------------------------------------------------------------------------------------------------------
# Configurations


@dataclass(frozen=True)
class UNetConfig:
    """A U-Net of the Stable Diffusion family in numbers; the defaults are SDXL's."""

    channels: tuple[int, ...] = (320, 640, 1280)  # width of each level, finest first
    depths: tuple[int, ...] = (0, 2, 10)          # transformer blocks in a pair, by level; 0: R alone
    mid_depth: int = 10                           # transformer blocks in Mid; 0: there is no Mid
    pairs: int = 2                                # RT in an encoder stage; a decoder stage has one more
    heads: tuple[int, ...] = (5, 10, 20)          # of attention, by level
    context_dim: int = 2048                       # D of the text sequence
    pooled_dim: int = 1280                        # P of the pooled text; 0: no conditions but text and time
    size_dim: int = 256                           # sinusoids for each of the six size and crop numbers
    linear_projection: bool = True                # into and out of a transformer; or a 1x1 convolution
    groups: int = 32                              # of every group norm
    in_channels: int = 4
    out_channels: int = 4
    sample_size: int = 128                        # latent height and width that it was trained for

    @property
    def emb_dim(self) -> int:
        """Width of the embedding of time and other conditions."""
        return 4 * self.channels[0]

    @classmethod
    def from_diffusers(cls, config: dict) -> "UNetConfig":
        """Reads an official unet/config.json; ValueError names what it asks for that is not here."""
        levels = len(config["block_out_channels"])
        attention = ["CrossAttn" in block for block in config["down_block_types"]]
        depths = per_level(config.get("transformer_layers_per_block", 1), levels)
        heads = per_level(config.get("attention_head_dim", 8), levels)  # a number of heads, despite its name
        if {len(attention), len(depths), len(heads)} != {levels}:
            raise ValueError("its lists are not all as long as block_out_channels")
        added = config.get("addition_embed_type") is not None
        size_dim = config["addition_time_embed_dim"] if added else 0
        result = cls(
            channels=tuple(config["block_out_channels"]),
            depths=tuple(depth if attends else 0 for depth, attends in zip(depths, attention)),
            mid_depth=depths[-1] if config.get("mid_block_type", MID_TYPE) else 0,
            pairs=config.get("layers_per_block", 2),
            heads=heads,
            context_dim=config["cross_attention_dim"],
            pooled_dim=config["projection_class_embeddings_input_dim"] - 6 * size_dim if added else 0,
            size_dim=size_dim,
            linear_projection=bool(config.get("use_linear_projection")),
            groups=config.get("norm_num_groups", 32),
            in_channels=config.get("in_channels", 4),
            out_channels=config.get("out_channels", 4),
            sample_size=config.get("sample_size", 128),
        )
        spelled_out = {"transformer_layers_per_block": list(depths), "attention_head_dim": list(heads)}
        check_supported({**config, **spelled_out}, result.to_diffusers())
        check_numbers(result)
        attend = [level for level in range(levels) if attention[level]] + [-1]
        if any(width % result.groups for width in result.channels) or any(
                result.channels[level] % heads[level] for level in attend):
            raise ValueError(f"widths {result.channels} cannot be parted into {result.groups} groups "
                             f"and {heads} heads")
        return result

    def to_diffusers(self) -> dict:
        """The official unet/config.json of this configuration."""
        depths = [depth or 1 for depth in self.depths]  # the official files write an unused depth as 1
        depths[-1] = self.depths[-1] or self.mid_depth or 1
        if self.mid_depth not in (0, depths[-1]):
            raise ValueError(f"the official format has no depth {self.mid_depth} of Mid beside {depths[-1]}")
        return {
            "_class_name": "UNet2DConditionModel",
            "act_fn": "silu",
            "addition_embed_type": "text_time" if self.pooled_dim else None,
            "addition_embed_type_num_heads": 64,
            "addition_time_embed_dim": self.size_dim if self.pooled_dim else None,
            "attention_head_dim": list(self.heads),
            "attention_type": "default",
            "block_out_channels": list(self.channels),
            "conv_in_kernel": 3,
            "conv_out_kernel": 3,
            "cross_attention_dim": self.context_dim,
            "down_block_types": ["CrossAttnDownBlock2D" if depth else "DownBlock2D" for depth in self.depths],
            "downsample_padding": 1,
            "flip_sin_to_cos": True,
            "freq_shift": 0,
            "in_channels": self.in_channels,
            "layers_per_block": self.pairs,
            "mid_block_scale_factor": 1,
            "mid_block_type": MID_TYPE if self.mid_depth else None,
            "norm_eps": 1e-05,
            "norm_num_groups": self.groups,
            "out_channels": self.out_channels,
            "projection_class_embeddings_input_dim":
                self.pooled_dim + 6 * self.size_dim if self.pooled_dim else None,
            "resnet_out_scale_factor": 1.0,
            "resnet_time_scale_shift": "default",
            "sample_size": self.sample_size,
            "time_embedding_type": "positional",
            "transformer_layers_per_block": depths,
            "up_block_types": ["CrossAttnUpBlock2D" if depth else "UpBlock2D" for depth in self.depths[::-1]],
            "use_linear_projection": self.linear_projection,
        }


@dataclass(frozen=True)
class VAEConfig:
    """An AutoencoderKL in numbers; the defaults are SDXL's."""

    channels: tuple[int, ...] = (128, 256, 512, 512)  # width of each level, finest first
    layers: int = 2                                   # R in an encoder stage; a decoder stage has one more
    latent_channels: int = 4
    groups: int = 32                                  # of every group norm
    scaling_factor: float = 0.13025                   # the U-Net sees latents times this
    force_upcast: bool = True                         # its activations overflow float16: run it in float32
    sample_size: int = 1024                           # image height and width that it was trained for

    @property
    def downscale(self) -> int:
        """Image pixels to one latent pixel, in height and in width."""
        return 2 ** (len(self.channels) - 1)

    @classmethod
    def from_diffusers(cls, config: dict) -> "VAEConfig":
        """Reads an official vae/config.json; ValueError names what it asks for that is not here."""
        result = cls(
            channels=tuple(config["block_out_channels"]),
            layers=config.get("layers_per_block", 1),
            latent_channels=config.get("latent_channels", 4),
            groups=config.get("norm_num_groups", 32),
            scaling_factor=config.get("scaling_factor", 0.18215),
            force_upcast=bool(config.get("force_upcast", True)),
            sample_size=config.get("sample_size", 32),
        )
        check_supported(config, result.to_diffusers())
        check_numbers(result)
        if any(width % result.groups for width in result.channels):
            raise ValueError(f"widths {result.channels} cannot be parted into {result.groups} groups")
        return result

    def to_diffusers(self) -> dict:
        """The official vae/config.json of this configuration."""
        return {
            "_class_name": "AutoencoderKL",
            "act_fn": "silu",
            "block_out_channels": list(self.channels),
            "down_block_types": ["DownEncoderBlock2D"] * len(self.channels),
            "force_upcast": self.force_upcast,
            "in_channels": 3,
            "latent_channels": self.latent_channels,
            "layers_per_block": self.layers,
            "mid_block_add_attention": True,
            "norm_num_groups": self.groups,
            "out_channels": 3,
            "sample_size": self.sample_size,
            "scaling_factor": self.scaling_factor,
            "up_block_types": ["UpDecoderBlock2D"] * len(self.channels),
            "use_post_quant_conv": True,
            "use_quant_conv": True,
        }


MID_TYPE = "UNetMidBlock2DCrossAttn"  # also what a file means that has no `mid_block_type`; null means no Mid


def per_level(value: int | list, levels: int) -> tuple:
    """The official files give a number for all levels, or a list of one for each."""
    return tuple(value) if isinstance(value, (list, tuple)) else (value,) * levels


def check_supported(read: dict, written: dict):
    """Raises ValueError for what a config.json has and we would not write; null, false, absent are equal."""
    wrong = [f"{key}={value!r}" for key, value in read.items() if not key.startswith("_")
             and ((value or None) != (written.get(key) or None) or uneven(key, value))]
    if wrong:
        raise ValueError(f"unsupported value in config.json: {', '.join(wrong)}")


def uneven(key: str, value) -> bool:
    """Whether an entry has a number for each level, or for each pair, where this U-Net has one."""
    lists = ("attention_head_dim", "block_out_channels", "transformer_layers_per_block")
    return isinstance(value, (list, tuple)) and not key.endswith("_types") and (
        key not in lists or any(isinstance(entry, (list, tuple)) for entry in value))


CONFIGS = {  #         transformer blocks   in Mid        pairs       parameters (Table 2)
    "sdxl": UNetConfig(depths=(0, 2, 10), mid_depth=10, pairs=2),  # 2,567,463,684
    "1b":   UNetConfig(depths=(0, 2, 6),  mid_depth=6,  pairs=1),  # 1,161,184,324
    "700m": UNetConfig(depths=(0, 2, 5),  mid_depth=0,  pairs=1),  #   782,822,724
}


def student_config(teacher: UNetConfig, name: str) -> UNetConfig:
    """
    The KOALA surgery (section 4.1 and Table 2) on any teacher of SDXL's shape; `name` is "1b" or "700m".

    Appendix B.2 swaps the depths of the two in one sentence; the paper's parameter totals settle it.
    """
    koala = CONFIGS[name]
    if teacher.pairs != 2 or not teacher.mid_depth:
        raise ValueError("the surgery needs a teacher of SDXL's shape: two pairs in encoder stages, and Mid")
    lowest = min(koala.depths[-1], teacher.depths[-1])
    return replace(teacher, pairs=koala.pairs, depths=(*teacher.depths[:-1], lowest),
                   mid_depth=min(koala.mid_depth, teacher.mid_depth))


# ------------------------------------------------------------------------------------------------------------
# Parts that the U-Net and the VAE share


class Recomputed(nn.Module):
    """A part whose activations can be computed anew in the backward pass instead of being kept for it."""

    checkpointing = "none"

    def __call__(self, *args):
        if self.checkpointing == "none" or not torch.is_grad_enabled():
            return super().__call__(*args)
        # Non-reentrant, or a feature taken inside would have no gradient. Nothing here is random.
        return checkpoint(super().__call__, *args, use_reentrant=False, preserve_rng_state=False,
                          **CHECKPOINTING[self.checkpointing])


COSTLY = {  # what "selective" checkpointing keeps: matrix products, convolutions and attention
    torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default,
    torch.ops.aten.convolution.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
}


def keep_costly(context, op, *args, **kwargs) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op in COSTLY else CheckpointPolicy.PREFER_RECOMPUTE


CHECKPOINTING = {
    "none": {},
    "selective": {"context_fn": partial(create_selective_checkpoint_contexts, keep_costly)},
    "full": {},
}


def norm_silu(norm: nn.GroupNorm, x: Tensor) -> Tensor:
    """SiLU of a norm, in place where no gradient will need the norm's output."""
    return F.silu(norm(x), inplace=not torch.is_grad_enabled())


class Downsample(nn.Module):
    """Halves height and width by a convolution of stride 2; the VAE pads right and bottom alone."""

    def __init__(self, channels: int, padding: int = 1):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=padding)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x if self.conv.padding[0] else F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Nearest neighbours and a convolution, to `size` or else to twice the height and width."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        return self.conv(F.interpolate(x, size, scale_factor=None if size else 2.0))


class ResBlock(Recomputed):
    """R: two convolutions with, in the U-Net, the time embedding added in between."""

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
    """Multi-head attention of x over `context`, or over itself: the SA that KOALA distils."""

    def __init__(self, dim: int, heads: int, context_dim: int | None = None, bias: bool = False):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(dim, dim, bias)
        self.to_k = nn.Linear(context_dim or dim, dim, bias)
        self.to_v = nn.Linear(context_dim or dim, dim, bias)
        self.to_out = nn.ModuleList([nn.Linear(dim, dim)])

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        context = x if context is None else context
        q = self.split(self.to_q(x))                             # (B, heads, T, D / heads)
        k = self.split(self.to_k(context))                       # (B, heads, T or L, D / heads)
        v = self.split(self.to_v(context))                       # (B, heads, T or L, D / heads)
        h = F.scaled_dot_product_attention(q, k, v)              # (B, heads, T, D / heads)
        return self.to_out[0](h.transpose(1, 2).flatten(2))      # (B, T, D)

    def split(self, x: Tensor) -> Tensor:
        B, T, D = x.shape
        return x.view(B, T, self.heads, D // self.heads).transpose(1, 2)


# ------------------------------------------------------------------------------------------------------------
# The U-Net


def sinusoids(numbers: Tensor, dim: int) -> Tensor:
    """Numbers (N,) as cosines and sines of frequencies from 1 almost to 1/10000: (N, dim), float32."""
    frequencies = 10000 ** (-torch.arange(dim // 2, dtype=torch.float32, device=numbers.device) / (dim // 2))
    angles = numbers.float()[:, None] * frequencies              # (N, dim / 2)
    return torch.cat([angles.cos(), angles.sin()], dim=1)


class Embedding(nn.Module):
    """Two linear layers that make conditions into the embedding that residual blocks read."""

    def __init__(self, din: int, dout: int):
        super().__init__()
        self.linear_1 = nn.Linear(din, dout)
        self.linear_2 = nn.Linear(dout, dout)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(x)))


class GEGLU(nn.Module):
    def __init__(self, din: int, dout: int):
        super().__init__()
        self.proj = nn.Linear(din, 2 * dout)

    def forward(self, x: Tensor) -> Tensor:
        x, gate = self.proj(x).chunk(2, dim=-1)
        return x * F.gelu(gate)


class FeedForward(nn.Module):
    """FFN: four times wider in the middle."""

    def __init__(self, dim: int):
        super().__init__()
        self.net = nn.ModuleList([GEGLU(dim, 4 * dim), nn.Identity(), nn.Linear(4 * dim, dim)])

    def forward(self, x: Tensor) -> Tensor:
        return self.net[2](self.net[0](x))


class TransformerBlock(Recomputed):
    """T: self-attention, cross-attention to the text, feed-forward, each added to what enters it."""

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
    """A series of transformer blocks on the pixels of an image as tokens."""

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
        B, C, H, W = x.shape
        h = self.norm(x)                                         # (B, C, H, W)
        h = self.proj_in(tokens(h)) if self.linear else tokens(self.proj_in(h))
        for block in self.transformer_blocks:
            h = block(h, context)                                # (B, T, C)
        h = image(self.proj_out(h), H, W) if self.linear else self.proj_out(image(h, H, W))
        return x + h                                             # (B, C, H, W)


def tokens(x: Tensor) -> Tensor:
    return x.flatten(2).transpose(1, 2)                          # (B, C, H, W) -> (B, T, C)


def image(x: Tensor, H: int, W: int) -> Tensor:
    return x.transpose(1, 2).unflatten(2, (H, W))                # (B, T, C) -> (B, C, H, W)


class Stage(nn.Module):
    """Residual blocks from one width to another; a transformer follows each of the first `transformers`."""

    def __init__(self, widths: list[tuple[int, int]], transformers: int, depth: int, heads: int,
                 config: UNetConfig):
        super().__init__()
        cout = widths[-1][1]
        self.resnets = nn.ModuleList(
            [ResBlock(din, dout, config.groups, 1e-5, config.emb_dim) for din, dout in widths])
        self.attentions = nn.ModuleList(
            [Transformer(cout, depth, heads, config) for _ in range(transformers)])

    def pair(self, i: int, x: Tensor, emb: Tensor, context: Tensor) -> Tensor:
        x = self.resnets[i](x, emb)                              # (B, C, H, W)    R
        return self.attentions[i](x, context) if i < len(self.attentions) else x


class DownStage(Stage):
    """DW-i. Leaves every pair's output, and the downsampled one, as skips for the decoder."""

    def __init__(self, cin: int, cout: int, depth: int, heads: int, config: UNetConfig, last: bool):
        widths = [(cin if i == 0 else cout, cout) for i in range(config.pairs)]
        super().__init__(widths, config.pairs if depth else 0, depth, heads, config)
        self.downsamplers = nn.ModuleList([] if last else [Downsample(cout)])

    def forward(self, x: Tensor, emb: Tensor, context: Tensor, skips: list[Tensor]) -> Tensor:
        for i in range(len(self.resnets)):
            x = self.pair(i, x, emb, context)                    # (B, C, H, W)
            skips.append(x)
        for downsample in self.downsamplers:
            x = downsample(x)                                    # (B, C, H / 2, W / 2)
            skips.append(x)
        return x                                                 # LF


class MidStage(Stage):
    """Mid: a residual block, a transformer, a residual block."""

    def __init__(self, channels: int, depth: int, heads: int, config: UNetConfig):
        super().__init__([(channels, channels)] * 2, 1, depth, heads, config)

    def forward(self, x: Tensor, emb: Tensor, context: Tensor) -> Tensor:
        for i in range(len(self.resnets)):
            x = self.pair(i, x, emb, context)                    # (B, C, H, W)
        return x                                                 # LF


class UpStage(Stage):
    """UP-i. Each pair also reads a skip; `skip_widths` are the skips' widths, in the order of use."""

    def __init__(self, cin: int, cout: int, skip_widths: list[int], depth: int, heads: int,
                 config: UNetConfig, last: bool):
        widths = [((cin if i == 0 else cout) + skip, cout) for i, skip in enumerate(skip_widths)]
        super().__init__(widths, len(widths) if depth else 0, depth, heads, config)
        self.upsamplers = nn.ModuleList([] if last else [Upsample(cout)])

    def forward(self, x: Tensor, emb: Tensor, context: Tensor, skips: list[Tensor]) -> Tensor:
        for i in range(len(self.resnets)):
            x = torch.cat([x, skips.pop()], dim=1)               # (B, C + C of the skip, H, W)
            x = self.pair(i, x, emb, context)                    # (B, C, H, W)
        for upsample in self.upsamplers:
            x = upsample(x, skips[-1].shape[2:])                 # (B, C, 2H, 2W), or one less, as the skip
        return x                                                 # LF


class UNet(nn.Module):
    """The U-Net of SDXL, KOALA and their kind (Figures 2 and 3)."""

    FOLDER, CONFIG = "unet", UNetConfig

    def __init__(self, config: UNetConfig):
        super().__init__()
        self.config = config
        channels, last = config.channels, len(config.channels) - 1

        self.conv_in = nn.Conv2d(config.in_channels, channels[0], 3, padding=1)
        self.time_embedding = Embedding(channels[0], config.emb_dim)
        if config.pooled_dim:
            self.add_embedding = Embedding(config.pooled_dim + 6 * config.size_dim, config.emb_dim)

        self.down_blocks = nn.ModuleList()
        x, skips = channels[0], [channels[0]]  # widths, followed as `forward` follows tensors
        for i, (cout, depth, heads) in enumerate(zip(channels, config.depths, config.heads)):
            self.down_blocks.append(DownStage(x, cout, depth, heads, config, last=i == last))
            x = cout
            skips += [x] * (config.pairs + (i != last))

        if config.mid_depth:
            self.mid_block = MidStage(x, config.mid_depth, config.heads[-1], config)

        self.up_blocks = nn.ModuleList()
        for i in reversed(range(len(channels))):
            used = [skips.pop() for _ in range(config.pairs + 1)]
            self.up_blocks.append(
                UpStage(x, channels[i], used, config.depths[i], config.heads[i], config, last=i == 0))
            x = channels[i]

        self.conv_norm_out = nn.GroupNorm(config.groups, channels[0], 1e-5)
        self.conv_out = nn.Conv2d(channels[0], config.out_channels, 3, padding=1)

    def forward(self, sample: Tensor, timestep: Tensor, context: Tensor, pooled: Tensor | None = None,
                time_ids: Tensor | None = None) -> Tensor:
        """
        What it was trained to find in `sample`: the noise, or v (`sample.Schedule.target`).

        sample (B, 4, H, W) noisy latent; timestep (B,) or a single number, 0 to 999; context (B, L, D) text;
        pooled (B, P) pooled text; time_ids (B, 6) original height and width, crop top and left, target height
        and width, in pixels. The last two are for configurations with a `pooled_dim`. Returns (B, 4, H, W).
        """
        timestep = torch.as_tensor(timestep, device=sample.device).expand(len(sample))
        emb = self.time_embedding(sinusoids(timestep, self.config.channels[0]).to(sample.dtype))
        if self.config.pooled_dim:
            sizes = sinusoids(time_ids.flatten(), self.config.size_dim).view(len(sample), -1)
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

    def set_checkpointing(self, mode: str):
        """What the backward pass recomputes: "none", "selective" (cheap layers) or "full" (whole blocks)."""
        if mode not in CHECKPOINTING:
            raise ValueError(f"no checkpointing {mode!r}; choose from {', '.join(CHECKPOINTING)}")
        if mode != "none":  # so that `Features` has the forward pass alone, of a compiled U-Net too
            torch._dynamo.config.skip_fwd_side_effects_in_bwd_under_checkpoint = True
        for module in self.modules():
            if isinstance(module, Recomputed):
                module.checkpointing = mode


# ------------------------------------------------------------------------------------------------------------
# From teacher to student: weights and features at the same block location


def teacher_path(path: str, student: UNetConfig, teacher: UNetConfig) -> str:
    """
    Where in the teacher a module or tensor of the student comes from.

    Encoder stages keep the first pair of two, and decoder stages drop the middle one of three (section 4.1):
    pair 1 of a KOALA decoder stage is pair 2 of its teacher. All else keeps its name.
    """
    if student.pairs == teacher.pairs:
        return path
    return re.sub(r"^(up_blocks\.\d+\.(?:resnets|attentions)\.)1\b", r"\g<1>2", path)


def inherit(student: UNet, teacher: UNet):
    """Copies into each tensor of the student its teacher's at the same block location (section 5.1)."""
    weights = teacher.state_dict()
    student.load_state_dict(
        {path: weights[teacher_path(path, student.config, teacher.config)] for path in student.state_dict()})


def stages(config: UNetConfig) -> dict[str, str]:
    """The paper's names of a U-Net's stages, in the order they run, and the paths of their modules."""
    levels = range(len(config.channels))
    return ({f"DW-{i + 1}": f"down_blocks.{i}" for i in levels}
            | ({"Mid": "mid_block"} if config.mid_depth else {})
            | {f"UP-{i + 1}": f"up_blocks.{i}" for i in levels})


BLOCK = r"\.attentions\.\d+\.transformer_blocks\.\d+"
FEATURES = {  # the paper's feature types (section 4.2, F1), as patterns of module paths in a stage
    "SA": BLOCK + r"\.attn1",  # after its output projection, before the residual
    "CA": BLOCK + r"\.attn2",
    "FFN": BLOCK + r"\.ff",
    "Res": r"\.resnets\.\d+",
    "LF": "",  # the stage itself: after its down- or upsampler
}


def feature_paths(unet: UNet, kind: str, stage: str) -> list[str]:
    """Paths of the modules whose outputs are features of this kind at this stage; empty if it has none."""
    pattern = re.escape(stages(unet.config)[stage]) + FEATURES[kind]
    return [path for path, _ in unet.named_modules() if re.fullmatch(pattern, path)]


class Features:
    """
    The outputs of modules of a U-Net during a forward pass:

        features = Features(unet, paths)
        with features as captured:
            unet(...)
        captured[path]  # (B, T, D) or (B, C, H, W)

    Outside of `with` nothing is kept, so that recomputation in the backward pass leaves no second copy. Works
    on module objects: wrap or compile the U-Net afterwards. With `stop` the forward pass ends, and `with` is
    left, when all are captured. Raises RuntimeError if a module did not run.
    """

    class Stop(Exception):
        pass

    def __init__(self, unet: UNet, paths: list[str], stop: bool = False):
        self.paths, self.stop, self.captured = paths, stop, None
        for path in paths:
            unet.get_submodule(path).register_forward_hook(partial(self.keep, path))

    def keep(self, path: str, module: nn.Module, args: tuple, output: Tensor):
        if self.captured is not None:
            self.captured[path] = output
            if self.stop and len(self.captured) == len(self.paths):
                raise self.Stop

    def __enter__(self) -> dict[str, Tensor]:
        self.captured = {}
        return self.captured

    def __exit__(self, error, *rest):
        captured, self.captured = self.captured, None
        missing = [path for path in self.paths if path not in captured]
        if missing and error is None:
            raise RuntimeError(f"{len(missing)} features were not captured, the first {missing[0]}")
        return error is self.Stop


# ------------------------------------------------------------------------------------------------------------
# The VAE


class VAEAttention(Attention):
    """One head over all the pixels of an image."""

    def __init__(self, channels: int, groups: int):
        super().__init__(channels, heads=1, bias=True)
        self.group_norm = nn.GroupNorm(groups, channels, 1e-6)

    def forward(self, x: Tensor) -> Tensor:
        return x + image(super().forward(tokens(self.group_norm(x))), *x.shape[2:])


class VAEStage(nn.Module):
    """Residual blocks and then, except at the end of the way, a down- or upsampler."""

    def __init__(self, cin: int, cout: int, layers: int, groups: int, **sampler: nn.Module):
        super().__init__()
        widths = [cin] + [cout] * (layers - 1)
        self.resnets = nn.ModuleList([ResBlock(width, cout, groups, 1e-6) for width in widths])
        for name, module in sampler.items():
            self.add_module(name, nn.ModuleList([module]))

    def forward(self, x: Tensor) -> Tensor:
        for part in self.children():
            for module in part:
                x = module(x)
        return x


class VAEMid(nn.Module):
    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.resnets = nn.ModuleList([ResBlock(channels, channels, groups, 1e-6) for _ in range(2)])
        self.attentions = nn.ModuleList([VAEAttention(channels, groups)])

    def forward(self, x: Tensor) -> Tensor:
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class Encoder(nn.Module):
    def __init__(self, config: VAEConfig):
        super().__init__()
        x, last = config.channels[0], len(config.channels) - 1
        self.conv_in = nn.Conv2d(3, x, 3, padding=1)
        self.down_blocks = nn.ModuleList()
        for i, cout in enumerate(config.channels):
            sampler = {} if i == last else {"downsamplers": Downsample(cout, padding=0)}
            self.down_blocks.append(VAEStage(x, cout, config.layers, config.groups, **sampler))
            x = cout
        self.mid_block = VAEMid(x, config.groups)
        self.conv_norm_out = nn.GroupNorm(config.groups, x, 1e-6)
        self.conv_out = nn.Conv2d(x, 2 * config.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)                                      # (B, C, H, W)
        for stage in self.down_blocks:
            x = stage(x)                                         # (B, C, H / 2, W / 2), ...
        x = self.mid_block(x)
        return self.conv_out(norm_silu(self.conv_norm_out, x))   # (B, 8, H / 8, W / 8)


class Decoder(nn.Module):
    def __init__(self, config: VAEConfig):
        super().__init__()
        x = config.channels[-1]
        self.conv_in = nn.Conv2d(config.latent_channels, x, 3, padding=1)
        self.mid_block = VAEMid(x, config.groups)
        self.up_blocks = nn.ModuleList()
        for i, cout in reversed(list(enumerate(config.channels))):
            sampler = {} if i == 0 else {"upsamplers": Upsample(cout)}
            self.up_blocks.append(VAEStage(x, cout, config.layers + 1, config.groups, **sampler))
            x = cout
        self.conv_norm_out = nn.GroupNorm(config.groups, x, 1e-6)
        self.conv_out = nn.Conv2d(x, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mid_block(self.conv_in(x))                      # (B, C, H / 8, W / 8)
        for stage in self.up_blocks:
            x = stage(x)                                         # (B, C, H / 4, W / 4), ...
        return self.conv_out(norm_silu(self.conv_norm_out, x))   # (B, 3, H, W)


class VAE(nn.Module):
    """Images in [-1, 1] to latents and back; `config.scaling_factor` is for others to apply."""

    FOLDER, CONFIG = "vae", VAEConfig

    def __init__(self, config: VAEConfig):
        super().__init__()
        self.config = config
        self.encoder, self.decoder = Encoder(config), Decoder(config)
        self.quant_conv = nn.Conv2d(2 * config.latent_channels, 2 * config.latent_channels, 1)
        self.post_quant_conv = nn.Conv2d(config.latent_channels, config.latent_channels, 1)

    def encode(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B, 3, 8H, 8W) to mean and log variance of their latents, each (B, 4, H, W)."""
        mean, logvar = self.quant_conv(self.encoder(image)).chunk(2, dim=1)
        return mean, logvar.clamp(-30, 20)

    def decode(self, latent: Tensor) -> Tensor:
        """Latents (B, 4, H, W) to images (B, 3, 8H, 8W)."""
        return self.decoder(self.post_quant_conv(latent))


# ------------------------------------------------------------------------------------------------------------
# Weights in and out: the official layout, a folder with config.json and diffusion_pytorch_model.safetensors


def load_unet(source: str | Path, dtype: torch.dtype | None = None, device: str = "cpu") -> UNet:
    """
    The U-Net of a folder or hub id, from its unet/ if it has one, in `dtype` or else as stored.

    Raises FileNotFoundError or ValueError whose one line says what is missing or wrong, and what to do.
    """
    return load(UNet, source, dtype, device)


def load_vae(source: str | Path, dtype: torch.dtype | None = None, device: str = "cpu") -> VAE:
    """The VAE of a folder or hub id, from its vae/ if it has one; else as `load_unet`."""
    return load(VAE, source, dtype, device)


def save_unet(unet: UNet, folder: str | Path):
    """Writes config.json and the weights in the official layout, as they are typed; diffusers reads them."""
    save(unet, folder)


def save_vae(vae: VAE, folder: str | Path):
    """As `save_unet`."""
    save(vae, folder)


def read_config(kind: type, source: str | Path) -> tuple[UNetConfig | VAEConfig, Path]:
    """The configuration of a UNet or VAE of a folder or hub id, and where it was found."""
    path = files.needed(source, f"{kind.FOLDER}/config.json", "config.json")
    config = files.read_json(path)
    try:
        return kind.CONFIG.from_diffusers(config), path
    except (LookupError, TypeError) as error:
        what = f"the config.json of a {kind.__name__}"
        raise ValueError(f"{path} is not {what} ({one_line(error)})") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


# In older VAE files, SD-v1.4's among them.
OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def load(kind: type, source: str | Path, dtype: torch.dtype | None, device: str) -> nn.Module:
    config, path = read_config(kind, source)
    prefix = f"{kind.FOLDER}/" if path.parent.name == kind.FOLDER and path.parent != Path(source) else ""
    weights = {}
    for file in weight_files(source, prefix, dtype):
        weights |= files.read_tensors(file)
    old = re.compile(rf"(?<=attentions\.0\.)({'|'.join(OLD_NAMES)})\b")
    weights = {old.sub(lambda match: OLD_NAMES[match[0]], name): tensor for name, tensor in weights.items()}
    return with_weights(partial(kind, config), weights, path.parent, dtype, device, advice)


def advice(found: dict[str, tuple[int, ...]]) -> str:
    """What to do about weights that do not fit their config.json, by names and shapes; "" if unknown."""
    if any(name.startswith(("input_blocks.", "model.diffusion_model.")) for name in found):
        return "; these are names of the single-file format: get the folder in diffusers' layout"
    fits = [name for name, config in CONFIGS.items() if found == meta_shapes(config)]
    return f"; the file fits {fits[0]}, its config.json does not" if fits else ""


def meta_shapes(config: UNetConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all tensors of a U-Net, without making them."""
    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in UNet(config).state_dict().items()}


def save(network: nn.Module, folder: str | Path):
    write_weights(network, Path(folder, f"{WEIGHTS}.safetensors"))
    files.write_json(Path(folder, "config.json"), network.config.to_diffusers())
