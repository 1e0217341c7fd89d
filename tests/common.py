"""What the tests and the oracles share: small configurations, and weights and inputs made from names."""

import json
import math
import zlib
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

ANSWERS = Path(__file__).with_name("answers") / "diffusers.safetensors"
STEM = "diffusion_pytorch_model"  # of the names of the weight files of a U-Net or VAE
FILE, HALF_FILE = f"{STEM}.safetensors", f"{STEM}.fp16.safetensors"

# Configurations as the official files write them. All widths differ, so that a swap of two is an error.
SMALL = {"sample_size": 16, "norm_num_groups": 8, "attention_head_dim": [2, 4, 6], "cross_attention_dim": 40}
SDXL = SMALL | {
    "block_out_channels": [32, 64, 96], "layers_per_block": 2, "transformer_layers_per_block": [1, 2, 3],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "use_linear_projection": True, "addition_embed_type": "text_time", "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 24 + 6 * 8, "mid_block_type": "UNetMidBlock2DCrossAttn"}
SD1 = SMALL | {  # the last level is without attention; no `mid_block_type`, which means that there is one
    "block_out_channels": [32, 64, 96, 128], "layers_per_block": 2, "attention_head_dim": 8,
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3}
UNETS = {
    "sdxl": SDXL,
    "1b": SDXL | {"layers_per_block": 1, "transformer_layers_per_block": [1, 2, 2]},
    "700m": SDXL | {"layers_per_block": 1, "transformer_layers_per_block": [1, 2, 1], "mid_block_type": None},
    "sd1": SD1,
    "sd2": SD1 | {"attention_head_dim": [2, 4, 6, 8], "use_linear_projection": True, "upcast_attention": True},
    "bk-sdm-tiny": SD1 | {
        "block_out_channels": [32, 64, 96], "layers_per_block": 1, "mid_block_type": None,
        "down_block_types": ["CrossAttnDownBlock2D"] * 3, "up_block_types": ["CrossAttnUpBlock2D"] * 3},
}
VAES = {
    "vae": {"block_out_channels": [16, 24, 32, 40], "layers_per_block": 2, "norm_num_groups": 8,
            "down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4},
}
SIZES = {  # latent batch, height and width; one timestep for all or one for each
    "square": (1, 16, 16, 999),
    "batch": (3, 8, 12, [0, 381, 999]),
    "odd": (1, 9, 14, [650]),
    "odd batch": (3, 13, 7, 250),
}
PICTURES = {"square": (1, 4, 4), "batch": (3, 3, 5), "odd": (1, 3, 2)}  # for the VAE, in latent pixels


def draw(name: str, *shape: int) -> Tensor:
    """Normal random numbers that depend on the name and the shape alone."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))


@torch.no_grad()
def fill(network: nn.Module) -> nn.Module:
    """Gives each tensor numbers from its name, so that networks with the same names have the same weights."""
    for name, tensor in network.state_dict().items():
        numbers = draw(name, *tensor.shape)
        if tensor.dim() > 1:
            numbers /= math.sqrt(numbers[0].numel())  # a layer's output is as large as its input
        else:
            numbers = 0.2 * numbers + name.endswith("weight")  # of a norm, near 1; or a bias, near 0
        tensor.copy_(numbers)
    return network.eval()


def inputs(config: dict, size: str) -> dict[str, Tensor]:
    """Inputs of a U-Net of this configuration, with the argument names of `model.UNet.forward`."""
    batch, height, width, timestep = SIZES[size]
    result = {"sample": draw(f"sample {size}", batch, 4, height, width), "timestep": torch.tensor(timestep),
              "context": draw(f"context {size}", batch, 7, config["cross_attention_dim"])}
    if config.get("addition_embed_type"):
        sizes = torch.tensor([
            [1024.0, 768, 0, 37, 1024, 1024], [512, 512, 8, 0, 640, 640], [333, 1024, 0, 0, 960, 960]])
        result |= {"pooled": draw(f"pooled {size}", batch, 24), "time_ids": sizes[:batch]}
    return result


def pictures(size: str) -> tuple[Tensor, Tensor]:
    """An image, its sides not always multiples of 8, and a latent."""
    batch, height, width = PICTURES[size]
    odd = 3 * (size == "odd")
    image = draw(f"image {size}", batch, 3, 8 * height + odd, 8 * width + odd).tanh()
    return image, draw(f"latent {size}", batch, 4, height, width)


def digest(network: nn.Module) -> str:
    """A hash of the names and shapes of all tensors of a network."""
    lines = sorted(f"{name} {tuple(tensor.shape)}" for name, tensor in network.state_dict().items())
    return sha256("\n".join(lines).encode()).hexdigest()


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    """Infinite if the shapes differ."""
    return float((ours - theirs).norm() / theirs.norm()) if ours.shape == theirs.shape else math.inf


def same(network: nn.Module, weights: dict[str, Tensor]) -> bool:
    """Whether the names, dtypes and bits of a network's tensors are these."""
    ours = network.state_dict()
    return ours.keys() == weights.keys() and all(
        ours[name].dtype == tensor.dtype and torch.equal(ours[name], tensor)
        for name, tensor in weights.items())


def save_shards(weights: dict[str, Tensor], folder: Path, half: bool = False) -> list[Path]:
    """Writes weights as three files and their index, as diffusers does; `half` gives the names of fp16."""
    variant, names = ".fp16" * half, list(weights)
    files = [f"{STEM}{variant}-{i + 1:05}-of-00003.safetensors" for i in range(3)]
    for i, file in enumerate(files):
        save_file({name: weights[name] for name in names[i::3]}, folder / file)
    index = {"weight_map": {name: files[i % 3] for i, name in enumerate(names)}}
    (folder / f"{STEM}.safetensors.index{variant}.json").write_text(json.dumps(index))
    return [folder / file for file in files]


def refusal(call, *args, **options) -> str:
    """The one line with which a call refuses its input."""
    with pytest.raises((FileNotFoundError, ValueError)) as caught:
        call(*args, **options)
    assert caught.type in (FileNotFoundError, ValueError)  # not a library's own kind
    message = str(caught.value)
    assert message and "\n" not in message
    return message
