"""
SDXL's VAE, an AutoencoderKL: images in [-1, 1] to latents and back. Only toy/make.py trains it.

Modules are named as in the official files. Shapes: B batch, C channels, H W height and width of latents.
"""

import re
from collections import OrderedDict
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import torch
from torch import Tensor, nn

from model import (
    WEIGHTS, Attention, ResBlock, Upsample, build, check_fixed, part_folder, read_json, read_weights,
    save_network, to_map, to_tokens)


@dataclass(frozen=True)
class VAEConfig:
    """An AutoencoderKL in numbers; the defaults are SDXL's."""

    channels: tuple[int, ...] = (128, 256, 512, 512)  # width of each level, finest first
    layers: int = 2                                   # residual blocks per encoder stage; 1 more in decoders
    latent_channels: int = 4
    groups: int = 32                                  # of every group norm
    scaling_factor: float = 0.13025                   # the U-Net sees latents times this
    force_upcast: bool = True                         # its activations overflow float16: run it in float32
    sample_size: int = 1024                           # height and width of the images it was trained on

    @property
    def downscale(self) -> int:
        """Image pixels per latent pixel, in height and in width."""
        return 2 ** (len(self.channels) - 1)

    @classmethod
    def from_diffusers(cls, config: dict) -> "VAEConfig":
        """Reads the official vae/config.json. Raises ValueError for anything this VAE does not support."""
        result = cls(
            channels=tuple(config["block_out_channels"]),
            layers=config.get("layers_per_block", 1),
            latent_channels=config.get("latent_channels", 4),
            groups=config.get("norm_num_groups", 32),
            scaling_factor=config.get("scaling_factor", 0.18215),
            force_upcast=bool(config.get("force_upcast", True)),
            sample_size=config.get("sample_size", 32),
        )
        check_fixed(config, result.to_diffusers())
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


class VAEAttention(Attention):
    """One head over all the pixels of an image."""

    def __init__(self, channels: int, groups: int):
        super().__init__(channels, heads=1, bias=True)
        self.group_norm = nn.GroupNorm(groups, channels, 1e-6)

    def forward(self, x: Tensor) -> Tensor:
        return x + to_map(super().forward(to_tokens(self.group_norm(x))), x)


class VAEMid(nn.Module):
    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.resnets = nn.ModuleList([ResBlock(channels, channels, groups, 1e-6) for _ in range(2)])
        self.attentions = nn.ModuleList([VAEAttention(channels, groups)])

    def forward(self, x: Tensor) -> Tensor:
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


def vae_stage(cin: int, cout: int, blocks: int, groups: int, sampler: dict[str, nn.Module]) -> nn.Sequential:
    """Residual blocks, then the down- or upsampler, if any, under its official name."""
    widths = [cin] + [cout] * (blocks - 1)
    resnets = nn.Sequential(*(ResBlock(width, cout, groups, 1e-6) for width in widths))
    samplers = {name: nn.Sequential(module) for name, module in sampler.items()}
    return nn.Sequential(OrderedDict(resnets=resnets, **samplers))


def encoder(config: VAEConfig) -> nn.Sequential:
    """Images (B, 3, 8H, 8W) to (B, 8, H, W)."""
    width, last = config.channels[0], len(config.channels) - 1
    conv_in, stages = nn.Conv2d(3, width, 3, padding=1), nn.Sequential()
    for i, cout in enumerate(config.channels):
        down = OrderedDict(pad=nn.ZeroPad2d((0, 1, 0, 1)), conv=nn.Conv2d(cout, cout, 3, stride=2))
        sampler = {} if i == last else {"downsamplers": nn.Sequential(down)}
        stages.append(vae_stage(width, cout, config.layers, config.groups, sampler))
        width = cout
    return nn.Sequential(OrderedDict(
        conv_in=conv_in, down_blocks=stages, mid_block=VAEMid(width, config.groups),
        conv_norm_out=nn.GroupNorm(config.groups, width, 1e-6), act=nn.SiLU(),
        conv_out=nn.Conv2d(width, 2 * config.latent_channels, 3, padding=1)))


def decoder(config: VAEConfig) -> nn.Sequential:
    """(B, 4, H, W) to images (B, 3, 8H, 8W)."""
    width = config.channels[-1]
    conv_in, stages = nn.Conv2d(config.latent_channels, width, 3, padding=1), nn.Sequential()
    mid_block = VAEMid(width, config.groups)
    for i, cout in reversed(list(enumerate(config.channels))):
        sampler = {} if i == 0 else {"upsamplers": Upsample(cout)}
        stages.append(vae_stage(width, cout, config.layers + 1, config.groups, sampler))
        width = cout
    return nn.Sequential(OrderedDict(
        conv_in=conv_in, mid_block=mid_block, up_blocks=stages,
        conv_norm_out=nn.GroupNorm(config.groups, width, 1e-6), act=nn.SiLU(),
        conv_out=nn.Conv2d(width, 3, 3, padding=1)))


class VAE(nn.Module):
    """Images in [-1, 1] to unscaled latents and back; the caller applies `config.scaling_factor`."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        self.config = config
        self.encoder, self.decoder = encoder(config), decoder(config)
        self.quant_conv = nn.Conv2d(2 * config.latent_channels, 2 * config.latent_channels, 1)
        self.post_quant_conv = nn.Conv2d(config.latent_channels, config.latent_channels, 1)

    def encode(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B, 3, 8H, 8W) to mean and log variance of their latents, each (B, 4, H, W)."""
        mean, logvar = self.quant_conv(self.encoder(image)).chunk(2, dim=1)
        return mean, logvar.clamp(-30, 20)

    def decode(self, latent: Tensor) -> Tensor:
        """Latents (B, 4, H, W) to images (B, 3, 8H, 8W)."""
        return self.decoder(self.post_quant_conv(latent))

    def decode_tiled(self, latent: Tensor, tile: int = 64, overlap: int = 16) -> Tensor:
        """Decodes one latent (1, 4, H, W) in overlapping, blended tiles to save memory."""
        scale, (H, W) = self.config.downscale, latent.shape[2:]
        if max(H, W) <= tile:
            return self.decode(latent)
        image = torch.zeros(1, 3, H * scale, W * scale, device=latent.device)
        total = torch.zeros_like(image[:, :1])
        tops, lefts = ([*range(0, side - tile, tile - overlap), max(side - tile, 0)] for side in (H, W))
        for y, x in product(tops, lefts):
            pixels = self.decode(latent[:, :, y:y + tile, x:x + tile]).float()
            h, w = pixels.shape[2:]
            ramps = [torch.arange(1, n + 1, device=latent.device).clamp(max=overlap * scale) for n in (h, w)]
            down, across = (torch.minimum(ramp, ramp.flip(0)).float() for ramp in ramps)
            weight = down[:, None] * across                      # (h, w)
            area = (..., slice(y * scale, y * scale + h), slice(x * scale, x * scale + w))
            image[area] += pixels * weight
            total[area] += weight
        return image / total


OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}  # of older VAE files


def load_vae(folder: str | Path, dtype: torch.dtype | None = None, device: str = "cpu") -> VAE:
    """Loads the VAE of a folder, or of its vae/, in `dtype` or else as stored; raises as `load_unet`."""
    folder = part_folder(folder, "vae")
    config = read_json(folder / "config.json", VAEConfig.from_diffusers)
    old = re.compile(rf"(?<=attentions\.0\.)({'|'.join(OLD_NAMES)})\b")
    weights = {old.sub(lambda match: OLD_NAMES[match[0]], name): tensor
               for name, tensor in read_weights(folder, WEIGHTS, dtype).items()}
    return build(VAE, config, weights, folder, dtype, device)


def save_vae(vae: VAE, folder: str | Path):
    """Writes config.json and weights, in their own dtype, in the official layout; diffusers reads them."""
    save_network(vae, vae.config.to_diffusers(), Path(folder), WEIGHTS)
