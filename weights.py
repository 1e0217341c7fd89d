"""
Weights of networks: safetensors files that fit, or one line that says why they do not.
"""

import math
import sys
from dataclasses import fields
from pathlib import Path
from typing import Callable

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import files

WEIGHTS = "diffusion_pytorch_model"  # the official name of the files of a U-Net or VAE, without their suffix
HALF = (torch.float16, torch.bfloat16)


def weight_files(source: str | Path, prefix: str, dtype: torch.dtype | None) -> list[Path]:
    """The file or shards with the weights: of float16 if there are some and half precision is asked for."""
    plain = [f"{prefix}{WEIGHTS}.safetensors", f"{prefix}{WEIGHTS}.safetensors.index.json"]
    half = [f"{prefix}{WEIGHTS}.fp16.safetensors", f"{prefix}{WEIGHTS}.safetensors.index.fp16.json"]
    path = files.find(source, *(half + plain if dtype in HALF else plain + half))
    if path is None:
        pickled = files.find(source, f"{prefix}{WEIGHTS}.bin", f"{prefix}{WEIGHTS}.fp16.bin")
        hint = f"; {pickled.name} is a pickle and is not opened: convert it to safetensors" if pickled else ""
        raise FileNotFoundError(f"no {plain[0]} in {files.described(source)}{hint}")
    if (".fp16." in path.name) != (dtype in HALF):
        print(f"{files.described(source)}: using {prefix}{path.name}", file=sys.stderr)
    if path.suffix != ".json":
        return [path]
    index = files.read_json(path)
    try:
        shards = sorted(set(index["weight_map"].values()))
    except (KeyError, TypeError, AttributeError):
        raise ValueError(f"{path} does not say which file has which tensor; fetch it anew") from None
    paths = [files.find(source, prefix + shard) for shard in shards]
    if None in paths:
        lost = prefix + shards[paths.index(None)]
        raise FileNotFoundError(f"no {lost}, named in {path.name}, in {files.described(source)}")
    return paths


MAY_BE_0 = ("depths", "mid_depth", "pooled_dim", "size_dim", "eos_token_id")  # numbers of a configuration


def check_numbers(config):
    """
    Raises ValueError unless the entries of a configuration, a dataclass of numbers, tuples of them and flags,
    are of the type of their defaults, and above 0 where these are.
    """
    for field in fields(config):
        value, default = getattr(config, field.name), field.default
        least = 0 if field.name in MAY_BE_0 else 1
        if isinstance(default, tuple):
            good = bool(value) and all(type(entry) is int and entry >= least for entry in value)
        elif isinstance(default, float):
            good = type(value) in (int, float) and 0 < value < math.inf
        else:
            good = type(value) is type(default) and (type(value) is not int or value >= least)
        if not good:
            raise ValueError(f"{field.name} cannot be {value!r}")


Advice = Callable[[dict[str, tuple[int, ...]]], str]  # on weights that do not fit, by their names and shapes


def check_tensors(weights: dict[str, Tensor], network: nn.Module, where: Path, advice: Advice):
    """Raises ValueError unless names and shapes are the network's, and numbers are floating and finite."""
    shapes = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    wrong = {"missing": [name for name in shapes if name not in found],
             "unexpected": [name for name in found if name not in shapes],
             "of another shape": [name for name in shapes if name in found and found[name] != shapes[name]]}
    if any(wrong.values()):
        counts = "; ".join(f"{len(names)} {what} ({', '.join(names[:5])}{', ...' * (len(names) > 5)})"
                           for what, names in wrong.items() if names)
        raise ValueError(f"the weights in {where} do not fit their config.json: {counts}{advice(found)}")
    for name, tensor in weights.items():
        if tensor.dtype not in (torch.float32, *HALF):
            raise ValueError(f"the weights in {where} are {tensor.dtype} ({name}); float32 or a half is read")
        if not all(bound.isfinite() for bound in tensor.aminmax()):
            raise ValueError(f"the weights in {where} are NaN or infinite ({name}): fetch or train them anew")


def with_weights(make: Callable[[], nn.Module], weights: dict[str, Tensor], where: Path,
                 dtype: torch.dtype | None, device: str = "cpu",
                 advice: Advice = lambda found: "") -> nn.Module:
    """The network that `make` makes, with these weights, from the folder `where`, as its parameters."""
    with torch.device("meta"):  # takes no memory: the tensors of the file become the parameters
        network = make()
    check_tensors(weights, network, where, advice)
    for name in weights:  # one by one, so that both types of all of them are never in memory
        weights[name] = weights[name].to(device, dtype)
    network.load_state_dict(weights, strict=True, assign=True)
    return network


def write_weights(network: nn.Module, path: Path):
    """Writes a network's tensors, as they are typed, with the metadata that transformers asks for."""
    weights = {name: tensor.contiguous() for name, tensor in network.state_dict().items()}
    files.write(path, lambda path: save_file(weights, path, {"format": "pt"}))
