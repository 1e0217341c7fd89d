"""What networks cost: the paper's totals, transformers' own counts, and what autograd keeps."""

import math

import pytest
import torch
from common import PARAMETERS, UNETS, VAES, analyze
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import model
from support import costs
from support.files import read_csv
from support.vae import VAE, VAEConfig

CLIP = costs.SDXL_CLIPS[0] | {
    "hidden_size": 20, "num_attention_heads": 2, "intermediate_size": 28, "num_hidden_layers": 3,
    "projection_dim": 12, "vocab_size": 50, "max_position_embeddings": 9}


def test_clips_are_counted_as_transformers_has_them():
    for clips in (costs.SDXL_CLIPS, [CLIP], [CLIP, CLIP]):
        assert costs.count_clips(clips) == costs.count_network(*costs.build_clips(clips))


def test_budget_is_the_papers(tmp_path):
    analyze("budget", "--out", tmp_path / "budget.png")
    rows = read_csv(tmp_path / "budget.csv")

    def total(key: str, **parts: str) -> int:
        return sum(int(row[key]) for row in rows if parts.items() <= row.items())

    for name, teraflops in (("sdxl", 6.761), ("1b", 3.432), ("700m", 2.702)):
        assert total("parameters", model=name, network="U-Net") == PARAMETERS[name]
        work = 2 * total("multiply-adds", model=name, network="U-Net") / 1e12
        assert work == pytest.approx(teraflops, rel=2e-3)        # counted in another way, at 1024 px
        # The paper's seconds of 25 steps with guidance imply the same rate for all three.
        assert 50 * work / costs.PAPER[name]["U-Net"][2] == pytest.approx(107.5, rel=6e-3)
    assert total("parameters", model="sdxl", kind="transformer") > 0.8 * PARAMETERS["sdxl"]  # section 3
    assert total("parameters", model="700m", stage="Mid") == 0
    assert total("multiply-adds", model="700m", network="U-Net", stage="rest") > 0
    assert total("parameters", model="sdxl", network="text encoders") // 10**6 == 817   # Table 1
    vae = [total("parameters", model="sdxl", network=f"VAE {part}") for part in ("encoder", "decoder")]
    assert sum(vae) == 83_653_863


def test_a_step_is_a_teacher_forward_and_a_student_both_ways():
    teacher, student = (model.UNetConfig.from_diffusers(UNETS[name]) for name in ("sdxl", "700m"))
    vae, texts = VAEConfig.from_diffusers(VAES["vae"]), [CLIP, CLIP]
    counts = costs.step_flops(teacher, student, vae, texts, 64)
    with sdpa_kernel(SDPBackend.MATH):                           # real networks, not on the meta device
        inputs = [torch.zeros(1, *shape) for shape in ((4, 8, 8), (), (9, 40), (24,), (6,))]
        assert counts["teacher"] == costs.count_network(model.UNet(teacher), inputs)
        assert counts["student"] == costs.count_network(model.UNet(student), inputs, backward=True)
        encoder = nn.Sequential(VAE(vae).encoder, VAE(vae).quant_conv)
        assert counts["VAE encoder"] == costs.count_network(encoder, [torch.zeros(1, 3, 64, 64)])
    del counts["teacher"]
    assert costs.step_flops(None, student, vae, texts, 64) == counts


def test_saved_bytes_shrink_with_checkpointing():
    kept = []
    for checkpointing in (False, True):
        networks = costs.build_networks(costs.SDXL_CLIPS, VAEConfig(), model.CONFIGS["700m"], 1024)
        kept.append(costs.saved_bytes(*networks["U-Net"], checkpointing))
    assert 3.2e9 < kept[0] < 3.6e9 and kept[1] < 0.5e9


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_latency_on_any_machine(small, tmp_path, precision):
    analyze("latency", "--model", small["sdxl"], "--steps", 2, "--repeat", 1, "--size", 64, "--device", "cpu",
            "--precision", precision, "--out", tmp_path / "l.png")
    clips, vae, unet = costs.read_configs(str(small["sdxl"]))
    networks = costs.build_networks(clips, vae, unet, 64)
    flops = {name: costs.count_network(*network)[1] for name, network in networks.items()}
    text, unet, decoder = read_csv(tmp_path / "l.csv")
    assert float(text["GFLOP"]) == pytest.approx(costs.count_clips(clips)[1] / 1e9)
    assert float(unet["GFLOP"]) == pytest.approx(2 * 2 * flops["U-Net"] / 1e9)  # two steps, with guidance
    assert float(decoder["GFLOP"]) == pytest.approx(flops["VAE decoder"] / 1e9)
    assert float(unet["seconds"]) > 0 and math.isnan(float(unet["paper, RTX 4090"]))
