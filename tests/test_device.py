"""The path of a device without a device: on `meta`, a tensor on the wrong device or a wait for a number raises."""

import contextlib

import pytest
import torch

import distill
import model
from sample import load_pipeline
from support.data import Samples, Shapes


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
    captured = [model.Features(teacher, list(matched.values())), model.Features(student, list(matched))]
    data = Samples(Shapes(), 64, (4, 32, 32), 0, 0.5, False)
    batch = distill.encode_batch([data[p] for p in range(2)], pipeline)
    assert {tensor.device.type for tensor in batch} == {"meta"}
    loss, terms = distill.objective(args, batch, teacher, captured[0], student, captured[1], torch.float32)
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
