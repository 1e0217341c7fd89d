"""What tests and oracles share: small configurations, weights made from names, models, runs of programs."""

import math
import zlib
from collections import namedtuple
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import analysis
import distill
from model import WEIGHTS, Features, UNet, UNetConfig, read_json, read_tensors, save_unet
from support.files import read_csv, write_json
from support.hub import TOY
from support.run import load_checkpoint
from support.text import ENCODERS, TOKENIZERS
from support.vae import VAE, VAEConfig, save_vae
from toy import shapes

ANSWERS = Path(__file__).with_name("answers") / "diffusers.safetensors"
FILE, HALF_FILE = f"{WEIGHTS}.safetensors", f"{WEIGHTS}.fp16.safetensors"
PARAMETERS = {"sdxl": 2_567_463_684, "1b": 1_161_184_324, "700m": 782_822_724}  # Table 2

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
    "sd1": SD1, "sd2": SD1 | {
        "attention_head_dim": [2, 4, 6, 8], "use_linear_projection": True, "upcast_attention": True},
    "bk-sdm-tiny": SD1 | {
        "block_out_channels": [32, 64, 96], "layers_per_block": 1, "mid_block_type": None,
        "down_block_types": ["CrossAttnDownBlock2D"] * 3, "up_block_types": ["CrossAttnUpBlock2D"] * 3}}
VAES = {"vae": {"block_out_channels": [16, 24, 32, 40], "layers_per_block": 2, "norm_num_groups": 8,
                "down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}}
SMALL_RUN = SDXL | {"block_out_channels": [8, 16, 24], "attention_head_dim": [1, 2, 3],
                    "transformer_layers_per_block": [1, 1, 1]}
VAE_OF_RUNS = {"block_out_channels": [8, 8, 16], "down_block_types": ["DownEncoderBlock2D"] * 3,
               "up_block_types": ["UpDecoderBlock2D"] * 3}
SIZES = {  # latent batch, height and width; one timestep for all or one for each
    "square": (1, 16, 16, 999), "batch": (3, 8, 12, [0, 381, 999]), "odd": (1, 9, 14, [650]),
    "odd batch": (3, 13, 7, 250)}
PICTURES = {"square": (1, 4, 4), "batch": (3, 3, 5), "odd": (1, 3, 2)}  # for the VAE, in latent pixels


def draw(name: str, *shape: int) -> Tensor:
    """Normal random numbers that depend on the name and the shape alone."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))


def weights(name: str, *shape: int) -> Tensor:
    """Numbers of a tensor of this name, so that networks with the same names have the same weights."""
    if len(shape) > 1:
        return draw(name, *shape) / math.sqrt(math.prod(shape[1:]))  # outputs are as large as inputs
    return 0.2 * draw(name, *shape) + name.endswith("weight")        # of a norm, near 1; or a bias, near 0


@torch.no_grad()
def fill(network: nn.Module) -> nn.Module:
    for name, tensor in network.state_dict().items():
        tensor.copy_(weights(name, *tensor.shape))
    return network.eval()


def filled(config: dict) -> UNet:
    return fill(UNet(UNetConfig.from_diffusers(config)))


def networks_of(teacher: UNet, student: UNet, features: str, blocks: str = "bottom") -> distill.Networks:
    """Both networks, and the features that distill.py matches."""
    matched = distill.match_features(student, teacher, features, blocks)
    return distill.Networks(teacher, student, Features(teacher, [*matched.values()]),
                            Features(student, [*matched]))


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


def equal(ones: dict[str, Tensor], others: dict[str, Tensor]) -> bool:
    """Whether the names, dtypes and bits of tensors are the same."""
    return ones.keys() == others.keys() and all(
        ones[name].dtype == others[name].dtype and torch.equal(ones[name], others[name]) for name in ones)


def same(network: nn.Module, weights: dict[str, Tensor]) -> bool:
    """`equal` for the tensors of a network."""
    return equal(network.state_dict(), weights)


def refusal(call, *args, **options) -> str:
    """The one line with which a call refuses its input."""
    with pytest.raises((FileNotFoundError, ValueError)) as caught:
        call(*args, **options)
    message = str(caught.value)
    assert caught.type in (FileNotFoundError, ValueError)  # not a library's own kind
    assert message and "\n" not in message
    return message


# Small models in the official layout

CAPTION_WORDS = tuple(dict.fromkeys(" ".join(  # the vocabulary of the toy's tokenizers
    ("a an and", *shapes.RELATIONS, *shapes.COLORS, *shapes.SHAPES)).split()))
WORDS = ("a", "blue", "box", "my", "on", "red", "sky")  # no pair of letters is in two, and none ends another
SCHEDULER = {
    "_class_name": "EulerDiscreteScheduler", "beta_start": 0.00085, "beta_end": 0.012, "clip_sample": False,
    "beta_schedule": "scaled_linear", "num_train_timesteps": 1000, "prediction_type": "epsilon",
    "timestep_spacing": "leading", "steps_offset": 1, "interpolation_type": "linear",
    "set_alpha_to_one": False, "use_karras_sigmas": False, "trained_betas": None, "skip_prk_steps": True}
SD = ("sd1", "sd2", "bk-sdm-tiny")  # of Stable Diffusion 1 and 2: one text encoder
INDEX = read_json(TOY / "model_index.json")
SD_INDEX = {part: INDEX[part] for part in ("scheduler", "unet", "text_encoder", "tokenizer", "vae")} | {
    "_class_name": "StableDiffusionPipeline", "_diffusers_version": "0.11.1", "safety_checker": [None, None],
    "requires_safety_checker": False, "feature_extractor": [None, None]}


class Case(namedtuple("Case", "unet spacing prediction negative guidance steps height width zeros sampler",
                      defaults=(True, "euler"))):
    """Pictures that both diffusers and we draw; together the cases cover every option."""

    PROMPTS, SEEDS = ("a red box", "blue sky on my box"), (3, 4)

    def bundle(self, folder: Path) -> Path:
        scheduler = {"timestep_spacing": self.spacing, "prediction_type": self.prediction}
        if self.unet in SD:                                      # whose pipeline overrides these two
            return bundle(folder, self.unet, scheduler | {"steps_offset": 0, "clip_sample": True})
        return bundle(folder, self.unet, scheduler, index={"force_zeros_for_empty_prompt": self.zeros})


CASES = {
    "sdxl": Case("sdxl", "leading", "epsilon", None, 7.5, 7, 64, 64),
    "1b": Case("1b", "trailing", "v_prediction", "", 5.0, 11, 72, 48),
    "700m": Case("700m", "linspace", "epsilon", "a blue box", 7.5, 11, 48, 104),
    "guidance 1": Case("1b", "linspace", "v_prediction", None, 1.0, 7, 64, 40),
    "encoded": Case("700m", "trailing", "epsilon", None, 5.0, 7, 56, 56, zeros=False),
    "sd1": Case("sd1", "leading", "epsilon", None, 7.5, 7, 64, 64, sampler="ddim"),
    "sd2": Case("sd2", "leading", "v_prediction", "my sky", 7.5, 11, 64, 128, sampler="dpm"),
    "bk-sdm-tiny": Case("bk-sdm-tiny", "trailing", "epsilon", None, 5.0, 7, 32, 96),
}


def bundle(folder: Path, unet: str = "700m", scheduler: dict = {}, vae: dict = {}, index: dict = {},
           words: tuple[str, ...] = WORDS) -> Path:
    """Writes a model that knows these words; the dicts are entries of its files that differ from SDXL's."""
    vae = VAES["vae"] | {"layers_per_block": 1, "scaling_factor": 0.5, "force_upcast": True} | vae
    save_unet(filled(UNETS[unet]), folder / "unet")
    save_vae(fill(VAE(VAEConfig.from_diffusers(vae))), folder / "vae")
    write_json(folder / "scheduler" / "scheduler_config.json", SCHEDULER | scheduler)
    write_json(folder / "model_index.json", (SD_INDEX if unet in SD else INDEX) | index)
    letters = [[*word[:-1], word[-1] + "</w>"] for word in words]
    merges = [("".join(word[:i]), word[i]) for word in letters for i in range(1, len(word))]  # from the left
    tokens = ["!", *sorted(set(sum(letters, []))), *map("".join, merges), "<|startoftext|>", "<|endoftext|>"]
    for i, width in enumerate([40] if unet in SD else [16, 24]):
        newer, tokenizer = i == 1 or unet == "sd2", folder / TOKENIZERS[i]  # by OpenCLIP
        write_json(tokenizer / "vocab.json", {token: i for i, token in enumerate(tokens)})
        (tokenizer / "merges.txt").write_text("\n".join(["#version: 0.2", *map(" ".join, merges), ""]))
        write_json(tokenizer / "tokenizer_config.json", {
            "tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "bos_token": "<|startoftext|>",
            "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>",
            "pad_token": "!" if newer else "<|endoftext|>"})
        text_encoder(folder / ENCODERS[i], width, "gelu" if newer else "quick_gelu", len(tokens))
    return folder


@torch.no_grad()
def text_encoder(folder: Path, width: int, activation: str, tokens: int):
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection  # slow
    kind = CLIPTextModelWithProjection if folder.name == "text_encoder_2" else CLIPTextModel
    encoder = kind(CLIPTextConfig(  # with the token ids in SDXL's file
        vocab_size=tokens, hidden_size=width, intermediate_size=4 * width, num_hidden_layers=2,
        num_attention_heads=2, projection_dim=width, hidden_act=activation, bos_token_id=0, eos_token_id=2,
        pad_token_id=1))
    for name, tensor in encoder.state_dict().items():
        if not name.startswith("text_"):                         # in some versions of transformers
            name = f"text_model.{name}"
        tensor.copy_(weights(f"{folder.name} {name}", *tensor.shape))
    encoder.save_pretrained(folder)


# Runs of the programs

RUN = ["--steps", "4", "--batch", "2", "--preview-every", "0", "--judge", "0", "--workers", "0"]


def log_rows(run: Path) -> list[dict[str, str]]:
    """log.csv without the time that steps took, and what follows from it."""
    return [{name: value for name, value in row.items() if name not in ("seconds", "images_per_s")}
            for row in read_csv(run / "log.csv")]


def analyze(*words):
    analysis.main([str(word) for word in words])


def checkpoint(run: Path) -> tuple[dict, dict[str, Tensor]]:
    """The state, and the weights and moments of the newest checkpoint."""
    folder, content = load_checkpoint(run)
    weights, moments = (read_tensors(next(folder.rglob(name))) for name in (FILE, "optimizer.safetensors"))
    return content["state"], weights | moments


def contents(folder: Path) -> dict[Path, bytes]:
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
