"""distill.py against diffusers' networks, numbers worked out by hand, and what a run promises to survive."""

import copy
import csv
import itertools
import os
import resource
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import traceback
from dataclasses import replace
from pathlib import Path

import bundles
import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image
from common import SDXL, fill
from oracle_distill import ANSWERS, CASES, CONDITIONS, LATENTS, NOISE, STUDENTS, TEACHER, answers, weaken
from safetensors.torch import load_file

import distill
import files
import model
import sample
from costs import unet_parts
from data import Samples, Shapes
from distill import (
    Distillation, command_line, load_checkpoint, losses, main, match_features,
    parse_features, save_checkpoint)
from model import UNet, UNetConfig, load_unet, save_unet
from toy import shapes

ROOT = Path(__file__).parents[1]
SMALL = SDXL | {"block_out_channels": [8, 16, 24], "attention_head_dim": [1, 2, 3],
                "transformer_layers_per_block": [1, 1, 1]}
VAE = {"block_out_channels": [8, 8, 16], "down_block_types": ["DownEncoderBlock2D"] * 3,
       "up_block_types": ["UpDecoderBlock2D"] * 3}
RUN = ["--steps", "4", "--batch", "2", "--dropout", "0.3", "--preview-every", "0", "--judge", "0"]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A bundle that draws 64 pixels and knows the words of the shapes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bundles, "WORDS", shapes.WORDS)
        folder = bundles.bundle(tmp_path_factory.mktemp("teacher"), "sdxl", vae=VAE)
    save_unet(filled(SMALL), folder / "unet")
    return folder


def filled(config):
    return fill(UNet(UNetConfig.from_diffusers(config)))


@pytest.fixture
def run(teacher, tmp_path):
    """Runs `distill.py` in this process with more flags than RUN has; its exit code."""
    def run(*flags, out="run"):
        args = command_line([*map(str, ("--teacher", teacher, "--out", tmp_path / out, *RUN, *flags))])
        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            return main(args)
        except Exception as error:
            raise error.with_traceback(None)  # whose frames would keep the folder locked
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
            torch.set_default_dtype(torch.float32)
    return run


@pytest.fixture
def during(monkeypatch):
    """Calls an action with the number of each call of `losses`; multiplies the terms by what it returns."""
    def during(action):
        calls = itertools.count(1)

        def watched(*inputs):
            factor = action(next(calls))
            return tuple(term * (1 if factor is None else factor) for term in losses(*inputs))
        monkeypatch.setattr(distill, "losses", watched)
    return during


def distillation(folder, *flags):
    return Distillation(command_line(["--teacher", str(folder), *map(str, flags)]), "cpu")


def shapes_data(dropout=0.0):
    return Samples(Shapes(), 64, (4, 16, 16), 0, dropout, False, None)


def forked(*jobs):
    """Exit codes of functions, each in a process of its own, all at the same time."""
    children = []
    for job in jobs:
        if (child := os.fork()) == 0:
            code = 99
            try:
                signal.alarm(120)
                torch.set_num_threads(1)  # threads do not survive a fork
                code = job() or 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        children.append(child)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


needs_fork = pytest.mark.skipif(torch.cuda.is_available(),
                                reason="gradients with a GPU do not survive a fork")


def rows(folder):
    """log.csv without the time it took."""
    with open(folder / "log.csv", newline="") as file:
        return [{name: value for name, value in row.items() if name != "seconds"}
                for row in csv.DictReader(file)]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def contents(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def parameters(folder):
    """The student's weights in the newest checkpoint."""
    return {name.removeprefix("parameter."): tensor for name, tensor in load_checkpoint(folder)[1].items()
            if name.startswith("parameter.")}


# Losses

def test_losses_by_hand():
    task, out_kd, feat_kd = losses(
        torch.tensor([1.0, 3.0]), torch.tensor([0.0, 0.0]), torch.tensor([1.0, 1.0]),
        [torch.tensor([[2.0]]), torch.tensor([0.0, 4.0])], [torch.tensor([[0.0]]), torch.tensor([0.0, 0.0])])
    assert (task, out_kd, feat_kd) == (5, 2, 4 + 8)
    assert losses(torch.ones(2), torch.zeros(2)) == (1, 0, 0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_losses_are_in_float32(dtype):
    far, zero = torch.full((2,), 1e4, dtype=dtype), torch.zeros(2, dtype=dtype)
    for term in losses(far, zero, zero, [far], [zero]):  # 1e8 is infinite in float16
        assert term.dtype == torch.float32 and term == far[0].float() ** 2
    assert {term.dtype for term in losses(zero, zero)} == {torch.float32}


def test_features_of_unequal_number_are_an_error():
    x = torch.ones(2)
    with pytest.raises(ValueError):
        losses(x, x, x, [x, x], [x])


@pytest.fixture(scope="module")
def deep(teacher, tmp_path_factory):
    """A bundle of the oracle's teacher and students, and its pipeline, which reads the oracle's inputs."""
    folder = tmp_path_factory.mktemp("deep") / "bundle"
    shutil.copytree(teacher, folder)
    save_unet(filled(TEACHER), folder / "unet")
    for name, config in STUDENTS.items():
        save_unet(weaken(filled(config)), folder / name)
    pipeline = sample.load_pipeline(folder, dtype=torch.float32, device="cpu")
    mean = LATENTS / pipeline.vae.config.scaling_factor
    pipeline.vae.encode = lambda pixels: (mean, torch.full_like(mean, -1e4))
    pipeline.text.forward = lambda prompts: (CONDITIONS["context"], CONDITIONS["pooled"])
    return folder, pipeline


@pytest.mark.parametrize("case", CASES, ids=" ".join)
def test_each_term_equals_that_of_diffusers_networks_and_hooks(deep, case, monkeypatch):
    folder, pipeline = deep
    monkeypatch.setattr(distill, "load_pipeline", lambda *args, **names: copy.copy(pipeline))
    student, features, blocks = case
    objective = distillation(
        folder, "--student", student, "--init", folder / student, "--features", features,
        "--sa-blocks", blocks)
    data = Samples(Shapes(), 64, LATENTS.shape[1:], 0, 0.0, False, None)
    batch = [data[i] | {"noise": NOISE[i], "timestep": int(CONDITIONS["timestep"][i]),
                        "time_ids": CONDITIONS["time_ids"][i]}
             for i in range(3)]
    with torch.no_grad():
        found = torch.stack(objective.terms(objective.student, batch))
    torch.testing.assert_close(found.double(), load_file(ANSWERS)[" ".join(case)], rtol=1e-5, atol=0)


def test_the_stored_answers_are_those_of_diffusers():
    pytest.importorskip("diffusers")
    stored, live = load_file(ANSWERS), answers()
    assert stored.keys() == live.keys() == {" ".join(case) for case in CASES}
    for name in live:
        torch.testing.assert_close(live[name], stored[name], rtol=1e-5, atol=0)


# Which feature learns from which

@pytest.fixture(scope="module")
def full_size():
    with torch.device("meta"):
        return {name: UNet(config) for name, config in model.CONFIGS.items()}


def test_the_default_features_of_the_paper(full_size):
    matched = match_features(full_size["700m"], full_size["sdxl"], "SA,LF@DW-1,LF@UP-3")
    assert len(matched) == 23
    assert matched["down_blocks.0"] == "down_blocks.0" and matched["up_blocks.2"] == "up_blocks.2"
    block = "up_blocks.0.attentions.{}.transformer_blocks.4.attn1"
    assert matched[block.format(1)] == block.format(2)
    assert len(match_features(full_size["1b"], full_size["sdxl"], "SA")) == 2 + 6 + 6 + 2 * 6 + 2 * 2


@pytest.mark.parametrize("student, blocks, expected", [
    ("700m", "bottom", [1, 2, 3, 4, 5]), ("1b", "bottom", [1, 2, 3, 4, 5, 6]),
    ("700m", "interleave", [1, 3, 5, 7, 9]), ("1b", "interleave", [1, 3, 5, 7, 9, 10]),
    ("700m", "up", [6, 7, 8, 9, 10]), ("1b", "up", [5, 6, 7, 8, 9, 10])])
def test_blocks_of_a_deeper_teacher(full_size, student, blocks, expected):
    matched = match_features(full_size[student], full_size["sdxl"], "SA", blocks)
    number = lambda path: int(path.split(".")[5]) + 1
    for series in ("down_blocks.2.attentions.0", "up_blocks.0.attentions.0", "up_blocks.0.attentions.1"):
        found = {number(ours): number(theirs) for ours, theirs in matched.items() if ours.startswith(series)}
        assert found == dict(enumerate(expected, 1))
    for ours, theirs in matched.items():
        if ours.startswith(("down_blocks.1", "up_blocks.1")):  # where there are as many as the teacher's
            assert number(ours) == number(theirs)


def test_the_grammar_of_features():
    assert parse_features("SA,LF@DW-1") == [("SA", None), ("LF", "DW-1")]
    assert parse_features(" SA , CA@Mid") == [("SA", None), ("CA", "Mid")]
    assert parse_features("none") == []


@pytest.mark.parametrize("features, words", [
    ("SB", "'SB'.*SA, CA"), ("sa", "'sa'"), ("", "''"), ("SA,,LF", "''"),
    ("SA@Mid", "no stage Mid"), ("LF@DW-4", "no stage DW-4"), ("SA@", "SA@"),
    ("SA@DW-1", "no SA at DW-1"), ("FFN@UP-3", "no FFN at UP-3")])
def test_features_that_a_student_lacks_are_an_error(full_size, features, words):
    with pytest.raises(ValueError, match=words) as found:
        match_features(full_size["700m"], full_size["sdxl"], features)
    assert "\n" not in str(found.value) and "--features" in str(found.value)


def test_no_feature_is_asked_for_twice(full_size):
    match = lambda text: match_features(full_size["700m"], full_size["sdxl"], text)
    assert match("SA,SA@DW-2,LF,LF@UP-3") == match("SA,LF")


# The objective

def gradients(objective, term, batch):
    objective.student.zero_grad()
    objective.terms(objective.student, batch)[term].backward()
    parameters = objective.student.named_parameters()
    return {name: parameter.grad for name, parameter in parameters if parameter.grad is not None}


@pytest.mark.parametrize("term", ["task", "outKD", "featKD"])
def test_each_term_alone_has_a_gradient_that_checkpointing_leaves_as_it_is(teacher, term):
    objective = distillation(teacher)
    batch = [shapes_data()[p] for p in range(2)]
    number = ("task", "outKD", "featKD").index(term)
    found = {}
    for mode in ("none", "selective", "full"):
        objective.student.set_checkpointing(mode)
        found[mode] = gradients(objective, number, copy.deepcopy(batch))
    assert all(grad.isfinite().all() for grad in found["none"].values())
    assert sum(bool(grad.any()) for grad in found["none"].values()) > 100
    assert same(found["none"], found["selective"]) and same(found["none"], found["full"])


@pytest.mark.parametrize("features", ["SA", "CA", "Res", "FFN", "LF"])
def test_each_kind_of_feature_has_a_gradient(teacher, features):
    objective = distillation(teacher, "--features", features, "--checkpointing", "full")
    found = gradients(objective, 2, [shapes_data()[0]])
    assert sum(bool(grad.any()) for grad in found.values()) > 50


def calls(objective, *modules):
    """How often modules of the teacher run while the terms are computed."""
    counts = dict.fromkeys(modules, 0)
    for name in modules:
        def count(module, args, output, name=name):
            counts[name] += 1
        objective.teacher.get_submodule(name).register_forward_hook(count)
    found = objective.terms(objective.student, [shapes_data()[0]])
    return list(counts.values()), [bool(term) for term in found]


@pytest.mark.parametrize("flags, ran, terms", [
    ([], [1, 1, 1], [True, True, True]),
    (["--out-kd", "0", "--features", "SA@DW-2"], [1, 0, 0], [True, False, True]),
    (["--out-kd", "0"], [1, 1, 0], [True, False, True]),           # LF at UP-3 is the last
    (["--out-kd", "0", "--feat-kd", "0"], [0, 0, 0], [True, False, False]),
    (["--out-kd", "0", "--features", "none"], [0, 0, 0], [True, False, False]),
    (["--feat-kd", "0"], [1, 1, 1], [True, True, False])])
def test_nothing_of_the_teacher_runs_that_no_loss_needs(teacher, flags, ran, terms):
    objective = distillation(teacher, *flags)
    assert calls(objective, "conv_in", "up_blocks.2.resnets.2", "conv_out") == (ran, terms)


def test_what_the_networks_read(teacher):
    """Noised latents of the VAE's distribution, text or zeros, size and crop."""
    objective = distillation(teacher)
    data = shapes_data(dropout=0.5)
    batch = [data[p] for p in range(6)]
    read = []
    objective.terms(lambda *inputs: read.extend(inputs) or objective.student(*inputs), copy.deepcopy(batch))
    noisy, timesteps, context, pooled, time_ids = read
    pipeline, stack = objective.pipeline, lambda name: torch.stack([one[name] for one in batch])
    with torch.no_grad():
        mean, logvar = pipeline.vae.encode(stack("pixels"))
        texts = pipeline.text([one["caption"] for one in batch])
    latents = (mean + (logvar / 2).exp() * stack("latent_noise")) * pipeline.vae.config.scaling_factor
    alphas = (1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2).cumprod(0)
    a = alphas[timesteps][:, None, None, None]
    torch.testing.assert_close(noisy, (a.sqrt() * latents + (1 - a).sqrt() * stack("noise")).float())
    assert timesteps.tolist() == [one["timestep"] for one in batch]
    assert torch.equal(time_ids, stack("time_ids"))
    dropped = [one["dropped"] for one in batch]
    assert 0 < sum(dropped) < 6
    for i, gone in enumerate(dropped):
        for ours, theirs in zip((context, pooled), texts):
            torch.testing.assert_close(ours[i], theirs[i] * (not gone))


def test_in_half_precision_sizes_and_the_vae_are_not_rounded(teacher):
    objective = distillation(teacher, "--precision", "bf16")
    samples = [shapes_data()[0] | {"time_ids": torch.tensor([1333.0, 777, 501, 0, 64, 64])}]
    read, decoded = [], []
    objective.teacher.register_forward_pre_hook(lambda module, args: read.append(args))
    objective.pipeline.vae.decoder.register_forward_hook(lambda module, args, out: decoded.append(out))
    objective.terms(objective.student, samples)
    (noisy, _, context, pooled, time_ids), = read
    assert {noisy.dtype, context.dtype, pooled.dtype} == {torch.bfloat16}
    assert time_ids.tolist() == [[1333, 777, 501, 0, 64, 64]]
    distill.draw(objective, objective.student, ["a red circle"])
    assert objective.pipeline.vae.config.force_upcast and {out.dtype for out in decoded} == {torch.float32}


def test_teacher_vae_and_text_encoders_are_frozen(run, teacher, monkeypatch):
    made = []

    class Kept(Distillation):
        def __init__(self, *args):
            super().__init__(*args)
            made.append(self)

    monkeypatch.setattr(distill, "Distillation", Kept)
    assert run("--lr", "1e-3") == 0
    objective, = made
    frozen = [objective.teacher, objective.pipeline.vae, objective.pipeline.text]
    assert all(p.grad is None and not p.requires_grad for network in frozen for p in network.parameters())
    untouched = sample.load_pipeline(teacher, dtype=torch.float32, device="cpu")
    for ours, theirs in zip(frozen, (untouched.unet, untouched.vae, untouched.text)):
        assert same(ours.state_dict(), theirs.state_dict())
    first = distillation(teacher).student.state_dict()
    assert not any(torch.equal(first[name], tensor) for name, tensor in objective.student.state_dict().items()
                   if tensor.dim() > 1)


def test_the_student_is_in_float32_whatever_the_files_are(teacher, tmp_path):
    shutil.copytree(teacher, tmp_path / "half")
    half = filled(SMALL).half()
    save_unet(half, tmp_path / "half" / "unet")
    objective = distillation(tmp_path / "half")
    assert {p.dtype for p in objective.student.parameters()} == {torch.float32}
    assert torch.equal(objective.student.conv_in.weight, half.conv_in.weight.float())
    save_unet(copy.deepcopy(objective.student).half(), tmp_path / "student")
    begun = distillation(teacher, "--init", tmp_path / "student").student
    assert {p.dtype for p in begun.parameters()} == {torch.float32}


def test_where_the_student_starts(teacher, tmp_path):
    taught, random = distillation(teacher).student, distillation(teacher, "--init", "random").student
    source = load_unet(teacher).state_dict()
    assert torch.equal(taught.up_blocks[1].resnets[1].conv1.weight,
                       source["up_blocks.1.resnets.2.conv1.weight"])
    assert not torch.equal(random.conv_in.weight, taught.conv_in.weight)
    assert same(random.state_dict(), distillation(teacher, "--init", "random").student.state_dict())
    save_unet(random, tmp_path / "begun")
    assert same(distillation(teacher, "--init", tmp_path / "begun").student.state_dict(), random.state_dict())
    with pytest.raises(ValueError, match="--init.*not a 1b student"):
        distillation(teacher, "--student", "1b", "--init", tmp_path / "begun")


# A run, and what is in its folder

def test_what_a_run_leaves(run, teacher, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sample, "preset", lambda name: sample.Preset(str(name), steps=2))
    assert run("--steps", "3", "--judge", "2", "--preview-every", "2", "--decay", "1") == 0
    folder = tmp_path / "run"
    log = rows(folder)
    assert list(log[0]) == ["step", "task", "outKD", "featKD", "total", "lr", "norm", "images",
                            "skipped_samples", "skipped_steps"]
    assert [(row["step"], row["images"]) for row in log] == [("1", "2"), ("2", "4"), ("3", "6")]
    assert [float(row["lr"]) for row in log] == pytest.approx([1e-5, 1e-5 * 2 / 3, 1e-5 / 3], rel=1e-5)
    for row in log:
        terms = [float(row[name]) for name in ("task", "outKD", "featKD")]
        assert float(row["total"]) == pytest.approx(sum(terms), rel=1e-5)
    previews = sorted(path.name for path in (folder / "previews").iterdir())
    assert previews == ["step-0000002.png", "step-0000003.png"]
    with open(folder / "scores.csv", newline="") as file:
        names = [row[0] for row in csv.reader(file)][1:]
    assert names == ["teacher", "student before", "student after"]
    for where in (folder, folder / "unet"):
        assert same(parameters(folder), load_unet(where).state_dict())
    image, = sample.load_pipeline(folder)(["a red circle"], steps=1)
    assert image.size == (64, 64)
    before = contents(folder)
    capsys.readouterr()
    assert run("--steps", "3", "--judge", "2", "--preview-every", "2", "--decay", "1") == 0
    assert "is finished" in capsys.readouterr().out and contents(folder) == before
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.UNet2DConditionModel.from_pretrained(folder / "unet")
    assert same(theirs.state_dict(), load_unet(folder).state_dict())
    assert diffusers.StableDiffusionXLPipeline.from_pretrained(folder).unet.config.layers_per_block == 1


@pytest.fixture
def pairs(tmp_path):
    """A folder of six pairs, of which two are bad, and a caption without a picture."""
    folder = tmp_path / "pairs"
    folder.mkdir()
    for i in range(6):
        Image.new("RGB", (70, 64), (40 * i, 0, 0)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text("a red circle")
    (folder / "1.png").write_bytes(b"")
    (folder / "4.txt").write_text(" ")
    (folder / "7.txt").write_text("a circle without a picture")
    return folder


def test_without_a_teacher_the_task_alone_is_learned(run, teacher, tmp_path, pairs):
    """As in DreamBooth: a student's own weights, pictures, one caption for all."""
    flags = ["--teacher", "none", "--init", teacher, "--data", pairs, "--caption", "a red circle"]
    assert run(*flags, "--lr", "1e-3", "--steps", "1") == 0
    row, = rows(tmp_path / "run")
    assert float(row["task"]) == float(row["total"]) > 0 == float(row["outKD"]) == float(row["featKD"])
    before, after = (load_unet(folder).state_dict() for folder in (teacher, tmp_path / "run"))
    assert before.keys() == after.keys()
    assert not torch.equal(before["conv_in.weight"], after["conv_in.weight"])


def test_a_cache_gives_the_same_losses_without_the_vae(run, tmp_path, monkeypatch):
    encoded = []
    encode = model.VAE.encode
    monkeypatch.setattr(
        model.VAE, "encode", lambda self, image: encoded.append(len(image)) or encode(self, image))
    cache = ["--cache", tmp_path / "cache"]
    for out, flags in (("plain", []), ("first", cache), ("second", cache)):
        encoded.clear()
        assert run(*flags, out=out) == 0
        assert sum(encoded) == (0 if out == "second" else 8)
        assert rows(tmp_path / out) == rows(tmp_path / "plain")
    with pytest.raises(ValueError, match="--cache .*begun with other settings: seed was 0 and is 1; give"):
        run(*cache, "--seed", "1", out="third")
    note = (tmp_path / "cache" / "settings.json").read_text()
    (tmp_path / "cache" / "settings.json").write_text("{}")
    with pytest.raises(ValueError, match="seed was None and is 0"):
        run(*cache, out="third")
    (tmp_path / "cache" / "settings.json").write_text(note)
    for path in (tmp_path / "cache").glob("*.safetensors"):      # of something else: made again
        path.write_bytes(safetensors.torch.save({"a": torch.ones(1)}))
    encoded.clear()
    assert run(*cache, out="fourth") == 0 and sum(encoded) == 8
    assert rows(tmp_path / "fourth") == rows(tmp_path / "plain")


TOLD = "4 pairs used; skipped: bad_image 1, blank_caption 1, no_image 1"


def test_what_is_skipped_is_told_after_the_first_pass(run, tmp_path, pairs, capsys):
    assert run("--data", pairs, out="one") == 0
    assert TOLD in capsys.readouterr().out
    assert int(rows(tmp_path / "one")[-1]["skipped_samples"]) == 2


def test_what_is_skipped_is_told_though_the_pass_was_in_two_sittings(run, tmp_path, pairs, capsys):
    for steps in ("2", "4"):
        assert run("--data", pairs, "--steps", steps) == 0
    assert TOLD in capsys.readouterr().out
    assert int(rows(tmp_path / "run")[-1]["skipped_samples"]) == 2


# Stopped and taken up again

@pytest.mark.parametrize("flags", [["--micro-batch", "1", "--decay", "0.5"],
                                   ["--precision", "fp16", "--batch", "1"]],
                         ids=["accumulated", "fp16"])
def test_a_run_that_is_stopped_after_every_step_is_the_run_that_is_not(run, during, tmp_path, flags, capsys):
    """The first step's gradients are not finite, which fp16's scale must remember."""
    broken = lambda call: float("nan") if call == 1 else None  # of the first sitting
    during(broken)
    assert run(*flags, "--lr", "1e-3", out="whole") == 0
    numbers = itertools.cycle([signal.SIGTERM, signal.SIGINT])
    for sitting in range(4):
        def stop(call):
            if call == 1:
                signal.raise_signal(number)
            return broken(call) if sitting == 0 else None
        number = next(numbers)
        during(stop)
        assert run(*flags, "--lr", "1e-3", out="pieces") == 128 + number
        assert "goes on" in capsys.readouterr().out
        assert load_checkpoint(tmp_path / "pieces")[0]["step"] == sitting + 1
    assert run(*flags, "--lr", "1e-3", out="pieces") == 0
    whole, tensors = load_checkpoint(tmp_path / "whole")
    pieces, others = load_checkpoint(tmp_path / "pieces")
    assert same(tensors, others)
    assert {name.split(".")[0] for name in tensors} == {"parameter", "exp_avg", "exp_avg_sq"}
    assert whole | {"settings": None} == pieces | {"settings": None}
    assert whole["updates"] > 0 and ("fp16" not in flags or whole["scaler"]["scale"] < 2**16)
    assert rows(tmp_path / "whole") == rows(tmp_path / "pieces")
    assert same(load_unet(tmp_path / "whole").state_dict(), load_unet(tmp_path / "pieces").state_dict())


def test_a_run_with_other_settings_is_refused(run, tmp_path, begun):
    shutil.copytree(begun, tmp_path / "run")
    before = contents(tmp_path / "run")
    with pytest.raises(ValueError, match="--out") as found:
        run("--seed", "5", "--lr", "1e-4", "--batch", "4", "--features", "SA", "--student", "1b",
            "--decay", "0.5")
    for words in ("seed was 0 and is 5", "lr was 1e-05 and is 0.0001", "batch was 2 and is 4",
                  "decay was 0.0 and is 0.5", "features was 'SA,LF@DW-1,LF@UP-3' and is 'SA'",
                  "student was '700m' and is '1b'"):
        assert words in str(found.value)
    assert "\n" not in str(found.value) and contents(tmp_path / "run") == before


@pytest.fixture(scope="module")
def begun(teacher, tmp_path_factory):
    """The folder of a run that is finished after two steps, each with a checkpoint."""
    folder = tmp_path_factory.mktemp("begun") / "run"
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    flags = ["--teacher", teacher, "--out", folder, *RUN, "--steps", "2", "--save-every", "1"]
    assert main(command_line([*map(str, flags)])) == 0
    for number, handler in handlers.items():
        signal.signal(number, handler)
    return folder


@pytest.mark.parametrize("flags", [
    ["--micro-batch", "1", "--workers", "1", "--checkpointing", "full"],
    ["--precision", "fp16"]], ids=" ".join)
def test_a_run_may_be_made_longer_and_its_means_changed(run, tmp_path, begun, flags):
    shutil.copytree(begun, tmp_path / "run")
    assert run("--steps", "3", *flags) == 0
    assert [row["step"] for row in rows(tmp_path / "run")] == ["1", "2", "3"]
    assert rows(tmp_path / "run")[:2] == rows(begun)


def test_a_log_of_something_else_is_named(run, tmp_path, begun):
    for content in ("foo,bar\n1,2\n", "step\nx\n"):
        shutil.copytree(begun, tmp_path / "run", dirs_exist_ok=True)
        (tmp_path / "run" / "log.csv").write_text(content)
        with pytest.raises(ValueError, match="log.csv is not the log of a run"):
            run("--steps", "3")


def test_a_line_of_the_log_that_a_crash_cut_is_dropped(run, tmp_path, begun):
    shutil.copytree(begun, tmp_path / "run")
    with open(tmp_path / "run" / "log.csv", "a") as file:
        file.write("3,0.5,0.2")
    assert run("--steps", "3") == 0
    assert [row["step"] for row in rows(tmp_path / "run")] == ["1", "2", "3"]
    assert None not in rows(tmp_path / "run")[2].values()


def test_a_finished_run_gets_back_a_unet_that_was_deleted(run, tmp_path, begun):
    shutil.copytree(begun, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "unet")
    before = contents(tmp_path / "run")
    assert run("--steps", "2", "--save-every", "1") == 0
    after = contents(tmp_path / "run")
    assert {path.name for path in after.keys() - before.keys()} == {
        "config.json", "diffusion_pytorch_model.safetensors"}
    assert same(load_unet(tmp_path / "run").state_dict(), load_unet(begun).state_dict())


def test_a_run_of_falling_rate_may_not_be_made_longer(run):
    assert run("--steps", "1", "--decay", "0.5") == 0
    with pytest.raises(ValueError, match="steps was 1 and is 2"):
        run("--steps", "2", "--decay", "0.5")


def test_two_runs_in_one_folder(run, during, tmp_path):
    refused = []

    def second(call):
        with pytest.raises(BlockingIOError, match="another process.*--out") as found:
            run()
        refused.append(found.type)

    during(second)
    assert run("--steps", "1") == 0 and len(refused) == 1
    during(lambda call: None)
    assert run("--steps", "2") == 0  # the lock went with its owner


# Checkpoints

def small_state(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {f"parameter.{name}": torch.randn(3, 2, generator=generator) for name in "ab"}


def write_two(folder):
    for step in (1, 2):
        save_checkpoint(folder, step, small_state(step), settings={"seed": 7}, updates=step, scaler={})
    return sorted(folder.glob("state-*"))


def test_the_last_two_checkpoints_are_kept(tmp_path):
    for step in range(1, 5):
        save_checkpoint(tmp_path, step, small_state(step), settings={})
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["state-00000003.safetensors", "state-00000004.safetensors"]
    metadata, tensors = load_checkpoint(tmp_path)
    assert metadata["step"] == 4 and same(tensors, small_state(4))
    assert load_checkpoint(tmp_path / "nothing here") is None


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "page", "other"])
def test_a_damaged_checkpoint_is_told_and_the_one_before_used(tmp_path, capsys, damage):
    older, newest = write_two(tmp_path)
    content = bytearray(newest.read_bytes())
    content[-3] ^= 4
    newest.write_bytes({"flip": content, "cut": content[:-9], "empty": b"", "page": b"<html>",
                        "other": safetensors.torch.save({"a": torch.ones(1)})}[damage])
    metadata, tensors = load_checkpoint(tmp_path)
    told = capsys.readouterr().err
    assert metadata["step"] == 1 and same(tensors, small_state(1))
    assert told.count("warning:") == told.count("\n") == 1 and str(newest) in told
    older.write_bytes(b"")
    with pytest.raises(ValueError, match="no checkpoint in .* is good") as found:
        load_checkpoint(tmp_path)
    assert "\n" not in str(found.value)


def test_no_changed_byte_of_a_checkpoint_goes_unnoticed(tmp_path):
    older, newest = write_two(tmp_path)
    older.unlink()
    content, whole = newest.read_bytes(), load_checkpoint(tmp_path)
    rng = np.random.default_rng(0)
    accepted = []
    for i in range(len(content)):
        damaged = bytearray(content)
        damaged[i] ^= 1 << int(rng.integers(8))
        newest.write_bytes(damaged)
        try:
            metadata, tensors = load_checkpoint(tmp_path)
        except ValueError:
            continue
        if metadata != whole[0] or not same(tensors, whole[1]):
            accepted.append(content[max(i - 12, 0):i + 1])
    assert not accepted, f"{len(accepted)} of {len(content)}, such as the one after {accepted[0]}"


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_not_saved(tmp_path, number):
    paths = write_two(tmp_path)
    with pytest.raises(FloatingPointError, match="parameter.a"):
        bad = {"parameter.a": torch.tensor([1.0, number])}
        save_checkpoint(tmp_path, 3, small_state() | bad, settings={})
    assert sorted(tmp_path.iterdir()) == paths


@needs_fork
def test_a_save_that_is_killed_at_any_line_leaves_a_good_checkpoint(tmp_path):
    def killed_at(line, folder):
        def job():
            lines = itertools.count(1)

            def trace(frame, event, value):
                if frame.f_code.co_name not in ("save_checkpoint", "write"):
                    return None
                if event == "line" and next(lines) == line:
                    os._exit(7)
                return trace
            sys.settrace(trace)
            save_checkpoint(folder, 3, small_state(3), settings={"seed": 7}, updates=3, scaler={})
        return job

    found = []
    for line in itertools.count(1):
        folder = tmp_path / "killed"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        write_two(folder)
        code, = forked(killed_at(line, folder))
        metadata, tensors = load_checkpoint(folder)
        assert same(tensors, small_state(metadata["step"]))
        found.append(metadata["step"])
        save_checkpoint(folder, 4, small_state(4), settings={"seed": 7})  # what was left is in nobody's way
        assert load_checkpoint(folder)[0]["step"] == 4
        if code == 0:
            break
        assert code == 7
    assert found == sorted(found) and set(found) == {2, 3} and len(found) > 15


def test_a_crash_after_the_last_step_leaves_no_older_unet(run, tmp_path, monkeypatch):
    save, steps = model.save_unet, itertools.count(1)

    def crash(*args):
        if next(steps) == 2:
            raise OSError("the power is gone")
        save(*args)

    monkeypatch.setattr(model, "save_unet", crash)
    with pytest.raises(OSError, match="power"):
        run("--steps", "2", "--save-every", "1", "--lr", "1e-3")
    assert run("--steps", "2", "--save-every", "1", "--lr", "1e-3") == 0
    weights = load_unet(tmp_path / "run").state_dict()
    assert same(parameters(tmp_path / "run"), weights)


@pytest.fixture
def program(teacher, tmp_path, monkeypatch, capsys):
    """Runs the command line as a process would: its exit code and what it printed."""
    def program(*flags):
        monkeypatch.setattr(sys, "argv", ["distill.py", *map(str, flags)])
        capsys.readouterr()
        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        code = 0
        try:
            runpy.run_path(str(ROOT / "distill.py"), run_name="__main__")
        except SystemExit as exit:
            code = exit.code
        for number, handler in handlers.items():
            signal.signal(number, handler)
        torch.set_default_dtype(torch.float32)
        if isinstance(code, str):  # which the interpreter prints
            return 1, capsys.readouterr().out, code
        return code or 0, *capsys.readouterr()
    return program


@pytest.mark.parametrize("limit", [4096, 1_000_000])
def test_a_full_disk(program, teacher, tmp_path, begun, limit):
    shutil.copytree(begun, tmp_path / "run")
    before = contents(tmp_path / "run")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        code, _, told = program("--teacher", teacher, "--out", tmp_path / "run", *RUN, "--steps", "3")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert code == 1 and told.startswith("error: ") and "\n" not in told
    after = contents(tmp_path / "run")
    assert after.keys() == before.keys()
    assert all(after[path] == before[path] for path in before if path.name.startswith("state-"))
    assert load_checkpoint(tmp_path / "run")[0]["step"] == 2 and load_unet(tmp_path / "run")


# Losses that are not finite

def test_a_step_that_is_not_finite_is_skipped_and_counted(run, during, tmp_path):
    during(lambda call: float("nan") if call == 2 else None)
    assert run("--steps", "1") == 0
    first = load_checkpoint(tmp_path / "run")[1]
    assert run("--steps", "3", "--save-every", "1") == 0  # the second call is its first step
    log = rows(tmp_path / "run")
    assert [row["skipped_steps"] for row in log] == ["0", "1", "1"] and log[1]["task"] == "nan"
    second, third = (load_file(path) for path in sorted((tmp_path / "run").glob("state-*")))
    assert same(first, second)
    assert not torch.equal(second["parameter.conv_in.weight"], third["parameter.conv_in.weight"])


def test_twenty_steps_in_a_row_that_are_not_finite_end_the_run(run, during, tmp_path):
    during(lambda call: float("inf") if call > 1 else None)
    with pytest.raises(FloatingPointError, match="20 steps in a row.*not finite.*bf16") as found:
        run("--steps", "30", "--save-every", "7", "--batch", "1", "--features", "none", "--out-kd", "0")
    assert "\n" not in str(found.value)
    assert len(rows(tmp_path / "run")) == 21
    metadata, tensors = load_checkpoint(tmp_path / "run")
    assert metadata["updates"] == 1 and all(tensor.isfinite().all() for tensor in tensors.values())


# Several processes

@needs_fork
@pytest.mark.parametrize("flags", [[], ["--task", "0", "--out-kd", "0", "--features", "SA@DW-2"]],
                         ids=["all", "one feature"])
def test_two_processes_are_one(run, tmp_path, pairs, flags):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = ["--steps", "3", "--micro-batch", "1", "--device", "cpu", "--lr", "1e-3", "--data", pairs,
             "--seed", "3", *flags]  # with which the second process skips a sample that the first does not

    def rank(number):
        def job():
            os.environ |= {"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": "2",
                           "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            return run(*flags, out="two")
        return job

    assert forked(rank(0), rank(1), lambda: run(*flags, out="one")) == [0, 0, 0]
    assert same(load_checkpoint(tmp_path / "one")[1], load_checkpoint(tmp_path / "two")[1])
    assert rows(tmp_path / "one") == rows(tmp_path / "two")


def test_a_run_in_the_background_goes_on_ignoring_interrupts():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    with distill.Signals() as signals:
        signal.raise_signal(signal.SIGINT)
    assert signals.asked == 0 and signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    signal.signal(signal.SIGINT, before)


@needs_fork
def test_a_signal_to_the_readers_of_data_too_loses_no_step(run, during, tmp_path):
    during(lambda call: os.killpg(0, signal.SIGTERM) if call == 2 else None)

    def job():
        os.setpgrp()
        return run("--workers", "1")

    assert forked(job) == [128 + signal.SIGTERM]
    assert [row["step"] for row in rows(tmp_path / "run")] == ["1", "2"]


@needs_fork
def test_a_second_signal_ends_at_once(run, during, tmp_path):
    def twice(call):
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
        os._exit(98)

    during(twice)
    assert forked(run) == [130]
    during(lambda call: None)
    assert run("--steps", "1") == 0


# The command line

BAD = [
    "--steps 0", "--steps -1", "--steps 1.5", "--steps x", "--lr nan", "--lr inf", "--lr 0", "--lr -1",
    "--batch 0", "--micro-batch 0", "--batch 5 --micro-batch 2", "--task -1", "--task nan", "--out-kd inf",
    "--feat-kd x", "--decay 1.1", "--clip 0", "--dropout -0.1", "--dropout 1.5", "--dropout nan", "--size 7",
    "--size 100", "--size -8", "--size 100000", "--workers -1", "--save-every 0", "--preview-every -1",
    "--judge -1", "--seed -1", "--seed 1e3", "--student sdxl", "--sa-blocks middle", "--precision int8",
    "--checkpointing some", "--unknown", "--feat 1", "toy", "--teacher none", "--caption dog", "--student",
    "--features SB", "--teacher absent", "--init absent", "--out ", "--data ", "--cache ", "--device "]


@pytest.mark.parametrize("line", BAD)
def test_a_slip_in_the_command_line_is_told_in_one_line(line, capsys):
    with pytest.raises(SystemExit) as found:
        command_line(line.split(" "))
    out, told = capsys.readouterr()
    assert found.value.code == 2 and out == "" and told.startswith("error: ") and told.count("\n") == 1
    assert line.split()[0].lstrip("-") in told


def test_a_folder_that_is_a_model_and_no_run_is_left_alone(program, tmp_path):
    config = replace(model.CONFIGS["700m"], channels=(32, 32, 32), heads=(1, 1, 1))
    model.save_unet(model.UNet(config), tmp_path / "unet")
    before = (tmp_path / "unet" / "config.json").read_bytes()
    code, _, told = program("--out", tmp_path, "--steps", 1)
    assert code == 1 and "has a model and no run" in told
    assert (tmp_path / "unet" / "config.json").read_bytes() == before


def test_a_run_that_learns_nothing_is_refused(program):
    for flags in (["--task", 0, "--out-kd", 0, "--feat-kd", 0],
                  ["--task", 0, "--out-kd", 0, "--features", "none"]):
        code, _, told = program(*flags)
        assert code == 2 and "nothing to learn" in told


def test_torchruns_variables_are_numbers(program, monkeypatch):
    for value in ("x", "0"):
        monkeypatch.setenv("WORLD_SIZE", value)
        code, _, told = program("--dry-run")
        assert code == 1 and told.startswith("error: RANK, WORLD_SIZE, LOCAL_RANK are numbers")


def test_a_device_that_cannot_be_used_is_told(program, tmp_path):
    code, _, told = program("--device", "meta:x", "--out", tmp_path / "run")
    assert code == 1 and told.startswith("error: the device meta:x cannot be used")


def test_slips_and_help_are_told_before_anything_heavy_is_imported(tmp_path):
    code = f"""
import runpy, sys
sys.path.insert(0, {str(ROOT)!r})
for line in (["--help"], ["--steps", "0"], ["--size", "100"], ["--batch", "5", "--micro-batch", "2"]):
    sys.argv = ["distill.py", *line]
    try:
        runpy.run_path({str(ROOT / "distill.py")!r}, run_name="__main__")
    except SystemExit as exit:
        print("exit", exit.code)
print("torch" in sys.modules, "numpy" in sys.modules)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    lines = done.stdout.split("\n")
    assert [line for line in lines if line.startswith("exit")] == ["exit 0", "exit 2", "exit 2", "exit 2"]
    assert lines[-2] == "False False" and done.stderr.count("\n") == 3 and not list(tmp_path.iterdir())
    for name in ("--features", "--sa-blocks", "[1.0]", "paper 100000", "toy 300", "SA,LF@DW-1,LF@UP-3"):
        assert name in done.stdout


def test_the_recipes():
    toy, paper = command_line([]), command_line(["--teacher", "sdxl", "--data", "laion/"])
    assert (paper.steps, paper.batch, paper.lr, paper.decay, paper.dropout) == (100_000, 128, 1e-5, 0, 0.1)
    assert (paper.task, paper.out_kd, paper.feat_kd, paper.features) == (1, 1, 1, "SA,LF@DW-1,LF@UP-3")
    assert toy.steps < 1000 and (toy.out, paper.out) == (Path("runs/toy-700m"), Path("runs/sdxl-700m"))
    assert command_line(["--teacher", "sdxl", "--steps", "7", "--data", "x"]).steps == 7


@pytest.mark.parametrize("flags, words", [
    (["--data", "absent"], "--data: no folder absent"), (["--teacher", "./absent"], "no folder ./absent"),
    (["--size", "72"], "--data shapes"), (["--out", "file"], "file")])
def test_what_the_world_lacks_is_told_in_one_line(program, teacher, tmp_path, monkeypatch, flags, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    code, out, told = program("--teacher", teacher, "--out", "run", *RUN, *flags)
    assert code == 1 and told.startswith("error: ") and words in told and "\n" not in told


def test_data_of_which_nothing_is_good_ends_the_run(program, teacher, tmp_path):
    (tmp_path / "data").mkdir()
    for i in range(3):
        (tmp_path / "data" / f"{i}.png").touch()
        (tmp_path / "data" / f"{i}.txt").write_text("a red circle")
    for workers in (0, 1):
        code, _, told = program("--teacher", teacher, "--out", tmp_path / "run", *RUN,
                                "--data", tmp_path / "data", "--workers", workers)
        assert code == 1 and told.startswith("error: ") and "bad_image 3" in told and "\n" not in told


def test_a_dry_run(program, teacher, tmp_path, monkeypatch):
    """Settings, features, parameters, memory and work; no weights or pictures are read, nothing written."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "configs"
    for name in ("unet", "vae", "text_encoder", "text_encoder_2"):
        (folder / name).mkdir(parents=True)
        shutil.copy(teacher / name / "config.json", folder / name)
    text = files.read_json(folder / "text_encoder" / "config.json") | {"max_position_embeddings": 9}
    files.write_json(folder / "text_encoder" / "config.json", text)
    code, out, _ = program("--teacher", folder, "--data", "laion/", "--batch", "6", "--micro-batch", "3",
                           "--dry-run")
    assert code == 0 and not (tmp_path / "runs").exists()
    ours, theirs = (sum(p.numel() for p in network.parameters()) for network in
                    (UNet(model.student_config(UNetConfig.from_diffusers(SMALL), "700m")), filled(SMALL)))
    parts = unet_parts(UNetConfig.from_diffusers(SMALL), tokens=9)
    asked = 2 * sum(macs for _, macs in parts.values()) / 1e12
    for words in ("lr             1e-05", f"teacher {theirs:,}", f"student {ours:,}", "8 features",
                  f"teacher {asked:.4g}",
                  "down_blocks.0 <- down_blocks.0", "up_blocks.1.attentions.1.transformer_blocks.0.attn1 <- "
                  "up_blocks.1.attentions.2.transformer_blocks.0.attn1"):
        assert words in out
    assert torch.get_default_dtype() == torch.float32
