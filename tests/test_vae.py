"""The VAE equals diffusers', reads older files, and decodes in tiles what it decodes at once."""

import json

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from common import ANSWERS, FILE, PICTURES, VAES, digest, draw, fill, pictures, refusal, relative_error, same
from support.vae import VAE, VAEConfig, load_vae, save_vae

VAE_FILE = {  # vae/config.json of stabilityai/stable-diffusion-xl-base-1.0
    "_class_name": "AutoencoderKL", "_diffusers_version": "0.20.0.dev0", "_name_or_path": "../sdxl-vae/",
    "act_fn": "silu", "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4, "force_upcast": True, "in_channels": 3,
    "latent_channels": 4, "layers_per_block": 2,
    "norm_num_groups": 32, "out_channels": 3, "sample_size": 1024, "scaling_factor": 0.13025,
    "up_block_types": ["UpDecoderBlock2D"] * 4}


@pytest.fixture(scope="module")
def vae():
    return fill(VAE(VAEConfig.from_diffusers(VAES["vae"])))


# ------------------------------------------------------------------------------------------------------------
# Exactness


@torch.no_grad()
def test_vae_gives_the_stored_answers(vae):
    answers = load_file(ANSWERS)
    for size in PICTURES:
        picture, latent = pictures(size)
        for name, tensor in zip(("mean", "logvar", "image"), (*vae.encode(picture), vae.decode(latent))):
            assert relative_error(tensor, answers[f"vae {size} {name}"]) <= 1e-5, (size, name)


@torch.no_grad()
def test_vae_equals_diffusers(vae):
    diffusers = pytest.importorskip("diffusers")
    theirs = fill(diffusers.AutoencoderKL.from_config(VAES["vae"]))
    assert digest(vae) == digest(theirs)
    picture, latent = pictures("batch")
    mean, logvar = vae.encode(picture)
    expected = theirs.encode(picture).latent_dist
    assert relative_error(mean, expected.mean) <= 1e-5 and relative_error(logvar, expected.logvar) <= 1e-5
    assert relative_error(vae.decode(latent), theirs.decode(latent).sample) <= 1e-5


def test_tensors_are_the_official_ones():
    with torch.device("meta"):
        network = VAE(VAEConfig())
    assert sum(parameter.numel() for parameter in network.parameters()) == 83_653_863
    with safe_open(ANSWERS, framework="pt") as file:
        assert digest(network) == file.metadata()["vae"]


@torch.no_grad()
def test_log_variance_is_bounded():
    vae = fill(VAE(VAEConfig.from_diffusers(VAES["vae"])))
    vae.quant_conv.bias[4:] += torch.tensor([100.0, -100, 0, 0])
    logvar = vae.encode(pictures("square")[0])[1]
    assert (logvar[:, 0] == 20).all() and (logvar[:, 1] == -30).all() and logvar[:, 2:].abs().max() < 20


# ------------------------------------------------------------------------------------------------------------
# Configuration and files


def test_the_official_file_is_the_default():
    assert VAEConfig.from_diffusers(VAE_FILE) == VAEConfig() and VAEConfig().downscale == 8
    written = VAEConfig().to_diffusers()
    for key in VAE_FILE.keys() & written.keys():
        assert written[key] == VAE_FILE[key], key
    assert VAEConfig.from_diffusers(VAES["vae"]).scaling_factor == 0.18215  # what an absent entry means


@pytest.mark.parametrize("config", [VAEConfig(), *map(VAEConfig.from_diffusers, VAES.values())])
def test_config_survives_its_file(config):
    assert VAEConfig.from_diffusers(json.loads(json.dumps(config.to_diffusers()))) == config


@pytest.mark.parametrize("changed", [
    {"act_fn": "gelu"}, {"use_quant_conv": False}, {"mid_block_add_attention": False}, {"in_channels": 1},
    {"down_block_types": ["AttnDownEncoderBlock2D"] * 4}, {"shift_factor": 0.1}, {"scaling_factor": None},
], ids=lambda changed: next(iter(changed)))
def test_unsupported_values_are_named(changed):
    assert next(iter(changed)) in refusal(VAEConfig.from_diffusers, VAE_FILE | changed)


def test_vae_and_diffusers_read_each_other(vae, tmp_path):
    diffusers = pytest.importorskip("diffusers")
    save_vae(vae, tmp_path / "ours")
    theirs = diffusers.AutoencoderKL.from_pretrained(tmp_path / "ours")
    assert same(vae, theirs.state_dict())
    theirs.save_pretrained(tmp_path / "theirs" / "vae")
    assert same(load_vae(tmp_path / "theirs"), theirs.state_dict())


def test_older_files_have_other_names(vae, tmp_path):
    save_vae(vae, tmp_path)
    old = load_file(tmp_path / FILE)
    old_names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    for new_name, old_name in old_names.items():
        for half in ("encoder", "decoder"):
            for kind in ("weight", "bias"):
                attention = f"{half}.mid_block.attentions.0"
                old[f"{attention}.{old_name}.{kind}"] = old.pop(f"{attention}.{new_name}.{kind}")
    save_file(old, tmp_path / FILE)
    assert same(load_vae(tmp_path), vae.state_dict())


def test_bad_files_are_refused(vae, tmp_path):
    assert "config.json" in refusal(load_vae, tmp_path)
    save_vae(vae, tmp_path)
    whole = (tmp_path / FILE).read_bytes()
    (tmp_path / FILE).write_bytes(whole[:-1])
    assert FILE in refusal(load_vae, tmp_path)
    save_file(vae.state_dict() | {"stranger": torch.zeros(1)}, tmp_path / FILE)
    assert "stranger" in refusal(load_vae, tmp_path)


# ------------------------------------------------------------------------------------------------------------
# Tiles


@pytest.mark.parametrize("size", [(8, 8), (20, 13), (21, 5), (9, 8), (14, 32)])
def test_tiles_are_put_together_again(vae, monkeypatch, size):
    def enlarge(latent: torch.Tensor) -> torch.Tensor:
        """A decoder that treats each latent pixel by itself, so that tiles cannot differ."""
        return F.interpolate(latent[:, :3], scale_factor=8)

    monkeypatch.setattr(vae, "decode", enlarge)
    latent = draw("latent", 1, 4, *size)
    tiled = vae.decode_tiled(latent, tile=8, overlap=4)
    torch.testing.assert_close(tiled, enlarge(latent), rtol=0, atol=1e-6)
    ones = vae.decode_tiled(torch.ones(1, 4, *size), tile=8, overlap=4)
    assert (ones == 1).all() and ones.shape == (1, 3, 8 * size[0], 8 * size[1])


@torch.inference_mode()
def test_tiles_are_close_to_the_whole(vae):
    latent = draw("latent", 1, 4, 40, 56)
    whole, sizes = vae.decode(latent), []
    handle = vae.decoder.register_forward_pre_hook(lambda module, args: sizes.append(args[0].shape[2:]))
    tiled = vae.decode_tiled(latent, tile=32, overlap=8)
    handle.remove()
    assert sizes == [(32, 32)] * 4
    assert (tiled - whole).square().mean().sqrt() < 0.1 * whole.std()  # group norms differ from tile to tile
    seams = [(image[..., 1:] - image[..., :-1]).abs().mean((0, 1, 2)) for image in (tiled, whole)]
    assert seams[0].max() < 1.2 * seams[1].max()
