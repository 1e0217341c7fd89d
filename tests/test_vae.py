"""The VAE is that of diffusers, reads older files, and decodes in tiles what it decodes at once."""

import pytest
import torch
import torch.nn.functional as F
from common import ANSWERS, FILE, PICTURES, VAES, digest, draw, fill, pictures, refusal, relative_error, same
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import oracle
from support.vae import VAE, VAEConfig, load_vae, save_vae

VAE_FILE = oracle.FULL_VAE | {  # with FULL_VAE, vae/config.json of stabilityai/stable-diffusion-xl-base-1.0
    "_class_name": "AutoencoderKL", "_diffusers_version": "0.20.0.dev0", "_name_or_path": "../sdxl-vae/",
    "act_fn": "silu", "force_upcast": True, "in_channels": 3, "latent_channels": 4, "out_channels": 3,
    "sample_size": 1024, "scaling_factor": 0.13025}


@pytest.fixture
def vae() -> VAE:
    return fill(VAE(VAEConfig.from_diffusers(VAES["vae"])))


@torch.no_grad()
def test_vae_gives_the_stored_answers(vae):
    answers = load_file(ANSWERS)
    for size in PICTURES:
        picture, latent = pictures(size)
        for name, tensor in zip(("mean", "logvar", "image"), (*vae.encode(picture), vae.decode(latent))):
            assert relative_error(tensor, answers[f"vae {size} {name}"]) <= 1e-5, (size, name)
    vae.quant_conv.bias[4:] += torch.tensor([100.0, -100, 0, 0])
    logvar = vae.encode(pictures("square")[0])[1]  # is bounded
    assert (logvar[:, 0] == 20).all() and (logvar[:, 1] == -30).all() and logvar[:, 2:].abs().max() < 20


def test_the_official_file_and_its_tensors():
    assert VAEConfig.from_diffusers(VAE_FILE) == VAEConfig() and VAEConfig().downscale == 8
    written = VAEConfig().to_diffusers()
    assert all(written[key] == VAE_FILE[key] for key in VAE_FILE.keys() & written.keys())
    small = VAEConfig.from_diffusers(VAES["vae"])
    assert small.scaling_factor == 0.18215 and VAEConfig.from_diffusers(small.to_diffusers()) == small
    with torch.device("meta"), safe_open(ANSWERS, framework="pt") as file:
        assert digest(VAE(VAEConfig())) == file.metadata()["vae"]


def test_unsupported_values_are_named():
    for changed in {"act_fn": "gelu"}, {"in_channels": 1}, {"use_quant_conv": False}:
        assert next(iter(changed)) in refusal(VAEConfig.from_diffusers, VAE_FILE | changed)


def test_older_files(vae, tmp_path):
    save_vae(vae, tmp_path)
    stored = load_file(tmp_path / FILE)
    for new, old in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
        stored = {name.replace(f".0.{new}.", f".0.{old}."): tensor for name, tensor in stored.items()}
    save_file(stored, tmp_path / FILE)
    assert same(load_vae(tmp_path), vae.state_dict())


@torch.inference_mode()
@pytest.mark.parametrize("size", [(8, 8), (20, 13), (14, 32)])
def test_tiles_are_put_together_again(vae, monkeypatch, size):
    # A decoder that treats each latent pixel by itself, so that tiles cannot differ.
    monkeypatch.setattr(vae, "decode", lambda latent: F.interpolate(latent[:, :3], scale_factor=8))
    latent = draw("latent", 1, 4, *size)
    tiled = vae.decode_tiled(latent, tile=8, overlap=4)
    torch.testing.assert_close(tiled, vae.decode(latent), rtol=0, atol=1e-6)


@torch.inference_mode()
def test_tiles_are_close_to_the_whole(vae):
    latent = draw("latent", 1, 4, 24, 36)
    tiled, whole = vae.decode_tiled(latent, tile=20, overlap=4), vae.decode(latent)
    assert (tiled - whole).square().mean().sqrt() < 0.2 * whole.std()  # as they are blended
