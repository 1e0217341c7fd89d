"""What a run needs, as support/plan.py counts it: against what real tensors take, and against hand counts."""

from types import SimpleNamespace

import pytest
import torch
from common import fill
from runs import SMALL

import distill
import model
from model import Features, UNet, UNetConfig
from support import costs, plan
from support.plan import MemoryCounter, peak_flops
from support.text import CLIPConfig
from support.vae import VAEConfig

TEACHER = UNetConfig.from_diffusers(SMALL)
STUDENT = model.student_config(TEACHER, "700m")
VAE = VAEConfig(channels=(8,), groups=8, force_upcast=False)  # so small that the student's pass is the peak
TEXT = CLIPConfig(vocab_size=9, hidden_size=20, intermediate_size=20, num_hidden_layers=1,
                  num_attention_heads=2, max_position_embeddings=7, projection_dim=24)


def rehearsal(*flags: str, vae: VAEConfig = VAE) -> plan.Rehearsal:
    args = distill.parse_args(["--teacher", "sdxl", "--data", "laion/", *flags])
    return distill.rehearse(args, (TEXT, TEXT), vae, TEACHER, STUDENT)


@pytest.fixture(scope="module")
def small():
    return rehearsal("--micro-batch", "4")


def kept_by(student: UNet, teacher: UNet, images: int, on_gpu: bool) -> int:
    """Bytes that autograd keeps for the backward pass, in real tensors under the CPU's bf16 autocast."""
    args = distill.parse_args(["--no-normalize-features"])
    matched = distill.match_features(student, teacher, args.features)
    if on_gpu:
        for module in student.modules():
            if isinstance(module, (torch.nn.GroupNorm, torch.nn.LayerNorm)):
                module.register_forward_pre_hook(plan.in_float32)
    latents = torch.randn(images, 4, TEACHER.sample_size, TEACHER.sample_size)
    batch = distill.Batch(latents, torch.full((images,), 500), torch.randn(images, 7, TEACHER.context_dim),
                          torch.randn(images, TEACHER.pooled_dim), torch.ones(images, 6), latents)
    weights = {p.untyped_storage()._cdata for network in (student, teacher) for p in network.parameters()}
    kept = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        distill.objective(args, batch, distill.hook_features(teacher, student, matched), torch.bfloat16)
    return sum(storage.nbytes() for storage in kept.values())


def test_a_counter_of_memory():
    with MemoryCounter() as memory:
        a = torch.zeros(100)
        view, b = a[:50], torch.zeros(10, dtype=torch.int64)
        a += 1
        assert (memory.alive, memory.peak) == (480, 480)
        del b
        c = a + 1
        assert (memory.alive, memory.peak) == (800, 800)
        del c, a
        assert memory.alive == 400                               # the view keeps it
        del view
    assert (memory.alive, memory.peak) == (0, 800)


@pytest.mark.parametrize("images", [1, 3])
def test_what_a_step_keeps_is_what_autograd_keeps_of_real_tensors(small, images):
    small.student.set_checkpointing("none")
    with small.fake, small.memory as memory:
        before = memory.alive
        loss = small.loss(images)
        kept = memory.alive - before
        del loss
        assert memory.alive == before
    student, teacher = fill(UNet(STUDENT)), fill(UNet(TEACHER)).bfloat16().requires_grad_(False)
    on_cpu = kept_by(student, teacher, images, on_gpu=False)
    assert kept == kept_by(student, teacher, images, on_gpu=True) + 4 > 1.1 * on_cpu  # 4: the loss itself


def test_what_is_always_in_memory(small):
    def numbers(network) -> int:
        return sum(parameter.numel() for parameter in network.parameters())

    student, teacher = numbers(small.student), numbers(small.teacher)
    others = numbers(small.pipeline.vae) + numbers(small.pipeline.text)
    assert small.memory.alive == (4 + 4 + 8) * student + 2 * (teacher + others)
    more = rehearsal("--ema", "0.99", vae=VAEConfig(channels=(8,), groups=8)).memory.alive
    assert more == small.memory.alive + 4 * student + 2 * numbers(small.pipeline.vae)


def test_checkpointing_takes_less_memory_and_full_takes_more_work(small):
    slopes = {mode: small.peak(4, mode) - small.peak(2, mode) for mode in ("none", "selective", "full")}
    assert slopes["none"] == pytest.approx(2 * (small.peak(2, "none") - small.peak(1, "none")), rel=1e-3)
    assert slopes["none"] > 1.3 * slopes["selective"] > 1.3 * slopes["full"] > 0
    parts = small.parts()
    assert list(parts) == ["teacher", "student, forward and backward", "VAE encoder"]
    assert sum(parts.values()) < small.flops() < 1.01 * sum(parts.values())  # the text encoders are small
    student = parts["student, forward and backward"]
    assert 1.1 < (small.flops("full") - small.flops() + student) / student < 1.4


def test_the_largest_micro_batch_that_fits_and_then_the_least_checkpointing(small):
    def fit(images: int, mode: str):
        return small.fit(small.peak(images, mode) / plan.USABLE + 1)

    assert small.fit(1e12) == (4, "none")
    for choice in ((4, "full"), (4, "selective"), (2, "full"), (1, "full")):
        assert fit(*choice) == choice
    assert small.fit(small.memory.alive) is None


def test_a_run_is_fitted_to_its_gpu(small, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(
        name="NVIDIA A100-SXM4-80GB", total_memory=1))
    encoders = [SimpleNamespace(config=TEXT)] * 2
    pipeline = SimpleNamespace(device="cuda:0", dtype=torch.bfloat16, vae_config=VAE,
                               text=SimpleNamespace(encoders=encoders))
    given = distill.parse_args(["--teacher", "sdxl", "--data", "x", "--checkpointing", "none"])
    seconds = distill.fit_gpu(given, pipeline, TEACHER, STUDENT, 4)
    assert seconds == pytest.approx(128 * small.flops() / (4 * 312e12))
    assert (given.micro_batch, given.checkpointing) == (8, "none")
    free = distill.parse_args(["--teacher", "sdxl", "--data", "x", "--precision", "fp32", "--micro-batch", "1"])
    pipeline.dtype = torch.float32                               # of which the peak is not known
    assert distill.fit_gpu(free, pipeline, TEACHER, STUDENT, 4) == 0
    assert (free.micro_batch, free.checkpointing) == (1, "full")  # nothing fits one byte


def test_peaks():
    names = {"NVIDIA A100-SXM4-80GB": 312, "NVIDIA A100 80GB PCIe": 312, "NVIDIA H100 80GB HBM3": 989,
             "NVIDIA H100 PCIe": 756, "NVIDIA H200": 989, "NVIDIA L40S": 362, "NVIDIA L4": 121, "NVIDIA A10": 125,
             "NVIDIA GeForce RTX 4090": 165, "NVIDIA A10G": 0, "NVIDIA L40": 0, "Tesla T4": 0}
    assert {name: peak_flops(name) / 1e12 for name in names} == names
    assert all(peak_flops(card) for card in plan.CARDS)


def test_a_step_from_sdxl_to_koala_700m():
    args = distill.parse_args(["--teacher", "sdxl", "--data", "laion/"])
    full = distill.rehearse(args, *costs.read_configs("sdxl"), model.CONFIGS["700m"])
    parts = {name: round(flops / 1e12, 3) for name, flops in full.parts().items()}
    assert parts == {"teacher": 6.761, "student, forward and backward": 8.264, "VAE encoder": 4.879}
    assert full.memory.alive == pytest.approx(19.63e9, rel=1e-3)
