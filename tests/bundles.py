"""Small random models in the official layout. Weights come from their names, the same on every machine."""

import json
import math
from pathlib import Path
from typing import NamedTuple

import torch
from common import UNETS, VAES, draw, fill
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from model import UNet, UNetConfig, save_unet
from support.vae import VAE, VAEConfig, save_vae
from toy.make import INDEX

# No pair of letters occurs in two of them, and none ends another.
WORDS = ("a", "blue", "box", "my", "on", "red", "sky")
SCHEDULER = {
    "_class_name": "EulerDiscreteScheduler", "beta_start": 0.00085, "beta_end": 0.012,
    "beta_schedule": "scaled_linear", "num_train_timesteps": 1000, "prediction_type": "epsilon",
    "timestep_spacing": "leading", "steps_offset": 1, "interpolation_type": "linear",
    "use_karras_sigmas": False, "trained_betas": None, "skip_prk_steps": True, "clip_sample": False,
    "set_alpha_to_one": False}
SD_INDEX = {
    "_class_name": "StableDiffusionPipeline", "_diffusers_version": "0.11.1",
    "requires_safety_checker": False, "safety_checker": [None, None], "feature_extractor": [None, None],
    **{part: INDEX[part] for part in ("scheduler", "unet", "text_encoder", "tokenizer", "vae")}}


class Case(NamedTuple):
    """Pictures that both diffusers and we draw; together the cases cover every option."""

    unet: str
    spacing: str
    prediction: str
    negative: str | None
    guidance: float
    steps: int
    height: int
    width: int
    zeros: bool = True  # force_zeros_for_empty_prompt
    sampler: str = "euler"
    zero_snr: bool = False

    PROMPTS, SEEDS = ("a red box", "blue sky on my box"), (3, 4)

    def bundle(self, folder: Path) -> Path:
        index = {} if self.unet in SD else {"force_zeros_for_empty_prompt": self.zeros}
        return bundle(folder, self.unet, index=index, scheduler={
            "timestep_spacing": self.spacing, "prediction_type": self.prediction,
            "rescale_betas_zero_snr": self.zero_snr})


CASES = {
    "sdxl": Case("sdxl", "leading", "epsilon", None, 7.5, 7, 64, 64),
    "1b": Case("1b", "trailing", "v_prediction", "", 5.0, 11, 72, 48),
    "700m": Case("700m", "linspace", "epsilon", "a blue box", 7.5, 11, 48, 104),
    "25 steps": Case("700m", "leading", "v_prediction", "my sky", 3.5, 25, 48, 64),
    "guidance 1": Case("1b", "linspace", "v_prediction", None, 1.0, 7, 64, 40),
    "encoded": Case("700m", "trailing", "epsilon", None, 5.0, 7, 56, 56, zeros=False),
    "sd1": Case("sd1", "leading", "epsilon", None, 7.5, 7, 64, 64, sampler="ddim"),
    "sd2": Case("sd2", "leading", "v_prediction", "my sky", 7.5, 11, 64, 128, sampler="dpm"),
    "zero SNR": Case("sd2", "trailing", "v_prediction", None, 5.0, 7, 64, 64, sampler="ddim", zero_snr=True),
    "bk-sdm-tiny": Case("bk-sdm-tiny", "trailing", "epsilon", None, 5.0, 7, 32, 96),
    "dpm": Case("700m", "linspace", "epsilon", None, 7.5, 11, 48, 64, sampler="dpm"),
    "ddim": Case("1b", "linspace", "v_prediction", None, 5.0, 7, 64, 40, sampler="ddim"),
}
SD = ("sd1", "sd2", "bk-sdm-tiny")  # of Stable Diffusion 1 and 2: one text encoder


def bundle(folder: Path, unet: str = "700m", scheduler: dict = {}, vae: dict = {}, index: dict = {}) -> Path:
    """Writes a model; the last three are entries of its config files that differ from SDXL's."""
    vae = VAES["vae"] | {"layers_per_block": 1, "scaling_factor": 0.5, "force_upcast": True} | vae
    save_unet(fill(UNet(UNetConfig.from_diffusers(UNETS[unet]))), folder / "unet")
    save_vae(fill(VAE(VAEConfig.from_diffusers(vae))), folder / "vae")
    write_json(folder / "scheduler" / "scheduler_config.json", SCHEDULER | scheduler)
    write_json(folder / "model_index.json", (SD_INDEX if unet in SD else INDEX) | index)
    letters = sorted({letter for word in WORDS for letter in letters_of(word)})
    merges = [pair for word in WORDS for pair in merges_of(word)]
    # The end token has the largest id.
    tokens = ["!", *letters, *map("".join, merges), "<|startoftext|>", "<|endoftext|>"]
    pads = {"tokenizer": "!" if unet == "sd2" else "<|endoftext|>"}
    if unet not in SD:
        pads["tokenizer_2"] = "!"
    for name, pad in pads.items():
        special = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>",
                   "pad_token": pad}
        write_json(folder / name / "vocab.json", {token: i for i, token in enumerate(tokens)})
        write_json(folder / name / "special_tokens_map.json", special)
        write_json(folder / name / "tokenizer_config.json",
                   {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, **special})
        (folder / name / "merges.txt").write_text("\n".join(["#version: 0.2", *map(" ".join, merges), ""]))
    if unet in SD:
        activation = "gelu" if unet == "sd2" else "quick_gelu"
        text_encoder(folder / "text_encoder", CLIPTextModel, 40, activation, len(tokens))
        return folder
    text_encoder(folder / "text_encoder", CLIPTextModel, 16, "quick_gelu", len(tokens))
    text_encoder(folder / "text_encoder_2", CLIPTextModelWithProjection, 24, "gelu", len(tokens))
    return folder


def letters_of(word: str) -> list[str]:
    return [*word[:-1], word[-1] + "</w>"]


def merges_of(word: str) -> list[tuple[str, str]]:
    """The byte-pair merges that build a word from its letters, from the left."""
    letters = letters_of(word)
    return [("".join(letters[:i]), letters[i]) for i in range(1, len(letters))]


def text_encoder(folder: Path, kind: type, width: int, activation: str, tokens: int):
    config = CLIPTextConfig(
        vocab_size=tokens, hidden_size=width, intermediate_size=4 * width, num_hidden_layers=2,
        num_attention_heads=2, projection_dim=width, hidden_act=activation,
        bos_token_id=0, eos_token_id=2, pad_token_id=1)  # as in SDXL's file
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in kind(config).state_dict().items()}
    weights = {}
    for name, shape in shapes.items():
        if not name.startswith("text_"):
            # As in the official files, but not in every version of transformers.
            name = f"text_model.{name}"
        numbers = draw(f"{folder.name} {name}", *shape)
        weights[name] = (numbers / math.sqrt(shape[1]) if len(shape) > 1 else
                         0.2 * numbers + name.endswith("weight"))
    write_json(folder / "config.json", config.to_dict())
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def write_json(path: Path, content: dict):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2))
