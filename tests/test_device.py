"""
A device's path without one: runs on `meta`, where a tensor on another device, a wait for a number, or a
float64 tensor (MPS has none) raises.
"""

import contextlib

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import distill
import model
from analysis import attention_map, block_similarity
from sample import load_pipeline
from support.data import Samples, Shapes


class NoDoubles(TorchDispatchMode):
    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        output = op(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            if isinstance(tensor, torch.Tensor) and (tensor.device.type, tensor.dtype) == ("meta", torch.float64):
                raise AssertionError(f"{op} makes a float64 tensor on the device")
        return output


@pytest.fixture(autouse=True)
def no_doubles():
    with NoDoubles():
        yield


def test_a_float64_tensor_on_the_device_is_found():
    for make in (lambda: torch.zeros(2, dtype=torch.float64, device="meta"), lambda: torch.zeros(2).to("meta").double(),
                 lambda: torch.zeros(2, dtype=torch.float64).to("meta")):
        with pytest.raises(AssertionError):
            make()


@pytest.fixture
def pipeline():
    pipeline = load_pipeline("toy", device="cpu")
    for network in (pipeline.text, pipeline.unet, pipeline.vae):
        network.to("meta")
    pipeline.device = "meta"
    return pipeline


def test_a_distillation_step_stays_on_its_device(pipeline, monkeypatch):
    monkeypatch.setattr(torch, "autocast", lambda *args, **options: contextlib.nullcontext())  # knows no meta
    args = distill.parse_args(["--features", "SA,CA,Res,FFN,LF"])
    teacher = pipeline.unet.requires_grad_(False)
    with torch.device("meta"):
        student = model.UNet(model.student_config(teacher.config, "700m"))
    matched = distill.match_features(student, teacher, args.features)
    data = Samples(Shapes(), 64, (4, 32, 32), 0, 0.5, False)
    samples = [data[p] for p in range(2)]
    assert {tensor.device.type for tensor in distill.encode_batch(samples, pipeline)} == {"meta"}
    loss, terms = distill.sample_loss(args, samples, pipeline, distill.hook_features(teacher, student, matched))
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
    torch.optim.AdamW(student.parameters(), fused=False).step()
    assert loss.device.type == terms.device.type == norm.device.type == "meta" and terms.shape == (3,)
    assert all(parameter.grad.device.type == "meta" for parameter in student.parameters())


@torch.inference_mode()
def test_sampling_stays_on_its_device(pipeline):
    conditions = pipeline.encode(pipeline.text, ["a red circle", "a blue square"], "a green cross", 5.0)
    latents = pipeline.denoise(pipeline.unet, conditions, 3, 5.0, [0, 1], None, None, None, None)
    assert latents.device.type == "meta" and latents.shape == (2, 4, 32, 32)
    assert pipeline.vae.decode(latents).shape == (2, 3, 64, 64)
    assert pipeline.vae.decode_tiled(latents[:1], tile=20, overlap=4).device.type == "meta"


def test_what_figures_measure_stays_on_its_device():
    x = torch.zeros(3, 16, 64, device="meta")
    assert block_similarity(x).device.type == "meta"
    assert attention_map(model.Attention(64, 2).to("meta"), x).shape == (3, 16, 16)
