"""distill.py against diffusers' networks and numbers worked out by hand, and what a run does and leaves."""

import copy
import csv
import shutil
import signal
from dataclasses import replace
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import torch
from bundles import SCHEDULER, bundle, write_json
from oracle_distill import ANSWERS, CASES, CONDITIONS, LATENTS, NOISE, STUDENTS, TEACHER, answers, weaken
from PIL import Image
from common import UNETS
from runs import RUN, SMALL, VAE as VAE_OF_RUNS, checkpoint, contents, equal, filled, log_rows, write_vae
from safetensors.torch import load_file
from torch import Tensor

import distill
import model
import sample
from distill import encode_batch, hook_features, losses, match_features, objective, parse_args, parse_features
from model import Features, UNet, UNetConfig, load_unet, read_json, save_unet
from sample import NoiseSchedule, Pipeline
from support import costs
from support.data import Samples, Shapes
from support.vae import VAE, load_vae
from toy import judging

# ------------------------------------------------------------------------------------------------------------
# The losses


def test_losses_by_hand():
    task, out_kd, feat_kd = losses(
        torch.tensor([1.0, 3.0]), torch.tensor([0.0, 0.0]), torch.tensor([1.0, 1.0]),
        [torch.tensor([[2.0]]), torch.tensor([0.0, 4.0])], [torch.tensor([[0.0]]), torch.tensor([0.0, 0.0])])
    assert (task, out_kd, feat_kd) == (5, 2, 4 + 8)
    assert losses(torch.ones(2), torch.zeros(2)) == (1, 0, 0)
    _, _, feat_kd = losses(torch.ones(2), torch.zeros(2), None, [torch.tensor([2.0]), torch.tensor([3.0, 3.0])],
                           [torch.tensor([4.0]), torch.tensor([1.0, 3.0])], normalize=True)
    assert feat_kd == pytest.approx(4 / 16 + 2 / 5)


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
def deep():
    """The oracle's teacher and students, and its batch."""
    networks = {"teacher": filled(TEACHER)} | {name: weaken(filled(config)) for name, config in STUDENTS.items()}
    for name in STUDENTS:
        assert networks[name].config == model.student_config(networks["teacher"].config, name)
    pipeline = SimpleNamespace(device="cpu", text=None, zero_negative=True, schedule=NoiseSchedule(SCHEDULER),
                               vae=SimpleNamespace(config=SimpleNamespace(scaling_factor=0.5)))
    samples = [{"mean": LATENTS[i] / 0.5, "std": torch.zeros_like(NOISE[i]), "latent_noise": NOISE[i],
                "noise": NOISE[i], "dropped": False, "timestep": int(CONDITIONS["timestep"][i]),
                **{name: CONDITIONS[name][i] for name in ("context", "pooled", "time_ids")}} for i in range(3)]
    return networks, encode_batch(samples, pipeline)


@pytest.mark.parametrize("case", CASES, ids=" ".join)
def test_each_term_equals_that_of_diffusers_networks_and_hooks(deep, case):
    networks, batch = deep
    name, features, blocks = case
    student, teacher = networks[name], networks["teacher"]
    matched = match_features(student, teacher, features, blocks)
    args = parse_args(["--task", "2", "--out-kd", "3", "--feat-kd", "5", "--no-normalize-features"])
    with torch.no_grad():
        loss, terms = objective(args, batch, hook_features(teacher, student, matched), torch.float32)
    expected = load_file(ANSWERS)[" ".join(case)]
    torch.testing.assert_close(terms.double(), expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(loss.double(), expected @ torch.tensor([2.0, 3, 5]).double(), rtol=1e-5, atol=0)


def test_features_are_normalized_if_asked_for(deep):
    networks, batch = deep
    student, teacher = networks["700m"], networks["teacher"]
    matched = match_features(student, teacher, "SA,LF@UP-3")
    networks = hook_features(teacher, student, matched)
    args = parse_args(["--normalize-features"])
    with torch.no_grad():
        _, terms = objective(args, batch, networks, torch.float32)
        _, ours = distill.student_forward(networks, batch, torch.float32)
        _, theirs = distill.teacher_forward(networks, batch, torch.float32)
    expected = sum(((a - b)**2).mean() / (b**2).mean() for a, b in zip(ours, theirs))
    torch.testing.assert_close(terms[2], expected, rtol=1e-5, atol=0)


def test_the_stored_answers_are_those_of_diffusers():
    pytest.importorskip("diffusers")
    stored, live = load_file(ANSWERS), answers()
    assert stored.keys() == live.keys() == {" ".join(case) for case in CASES}
    for name in live:
        torch.testing.assert_close(live[name], stored[name], rtol=1e-5, atol=0)


# ------------------------------------------------------------------------------------------------------------
# Which feature learns from which


@pytest.fixture(scope="module")
def full_size():
    with torch.device("meta"):
        return {name: UNet(config) for name, config in model.CONFIGS.items()}


def test_the_default_features_of_the_paper(full_size):
    matched = match_features(full_size["700m"], full_size["sdxl"], parse_args([]).features)
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
    def number(path: str) -> int:
        return int(path.split(".")[5]) + 1

    matched = match_features(full_size[student], full_size["sdxl"], "SA", blocks)
    for series in ("down_blocks.2.attentions.0", "up_blocks.0.attentions.0", "up_blocks.0.attentions.1"):
        found = {number(ours): number(theirs) for ours, theirs in matched.items() if ours.startswith(series)}
        assert found == dict(enumerate(expected, 1))
    for ours, theirs in matched.items():
        if ours.startswith(("down_blocks.1", "up_blocks.1")):  # where there are as many as the teacher's
            assert number(ours) == number(theirs)


def test_features_of_bk_sdm():
    """As in its code, but for DW-3 of the tiny student: what leaves the last pair, not what is added there."""
    networks = {"teacher": filled(UNETS["sd1"] | {"block_out_channels": [8, 16, 24, 24]})}
    for name in ("base", "small", "tiny"):
        networks[name] = UNet(model.student_config(networks["teacher"].config, name))
    stages = [*(f"down_blocks.{i}" for i in range(4)), *(f"up_blocks.{i}" for i in range(4))]
    matched = match_features(networks["base"], networks["teacher"], "LF")
    assert matched == {stage: stage for stage in [*stages[:4], "mid_block", *stages[4:]]}
    assert match_features(networks["small"], networks["teacher"], "LF") == {stage: stage for stage in stages}
    assert match_features(networks["tiny"], networks["teacher"], "LF") == {
        "down_blocks.0": "down_blocks.0", "down_blocks.1": "down_blocks.1",
        "down_blocks.2": "down_blocks.2.attentions.1",
        "up_blocks.0": "up_blocks.1", "up_blocks.1": "up_blocks.2", "up_blocks.2": "up_blocks.3"}
    assert parse_args(["--student", "tiny", "--teacher", "sd14"]).features == "SA"  # Ours-SDM
    assert len(match_features(networks["base"], networks["teacher"], "SA")) == 3 + 1 + 6


def test_the_grammar_of_features(full_size):
    assert parse_features("SA,LF@DW-1") == [("SA", None), ("LF", "DW-1")]
    assert parse_features(" SA , CA@Mid") == [("SA", None), ("CA", "Mid")]
    assert parse_features("none") == []
    student, teacher = full_size["700m"], full_size["sdxl"]
    assert match_features(student, teacher, "SA,SA@DW-2,LF,LF@UP-3") == match_features(student, teacher, "SA,LF")


@pytest.mark.parametrize("features", ["SB", "sa", "", "SA,,LF", "SA@", "SA@Mid", "LF@DW-4", "SA@DW-1", "FFN@UP-3"])
def test_features_that_a_student_lacks_are_an_error(full_size, features):
    with pytest.raises(ValueError, match="--features") as error:
        match_features(full_size["700m"], full_size["sdxl"], features)
    assert "\n" not in str(error.value)


# ------------------------------------------------------------------------------------------------------------
# The objective


class Parts(NamedTuple):
    """What `main` hands to `train`."""

    args: object
    pipeline: Pipeline
    networks: distill.Networks
    samples: Samples
    identity: dict
    stop: object
    least_seconds: float

    @property
    def teacher(self) -> UNet | None:
        return self.networks.teacher

    @property
    def student(self) -> UNet:
        return self.networks.student

    def objective(self, batch: distill.Batch) -> tuple[Tensor, Tensor]:
        return objective(self.args, batch, self.networks, self.pipeline.dtype)

    def batch(self, *positions: int) -> distill.Batch:
        return encode_batch([self.samples[p] for p in positions], self.pipeline)

    def gradients(self, batch: distill.Batch) -> dict[str, Tensor]:
        self.student.zero_grad()
        self.objective(batch)[0].backward()
        return {name: parameter.grad for name, parameter in self.student.named_parameters()}

    def but(self, *flags) -> "Parts":
        """The same networks, and other weights of the terms or other features."""
        args = parse_args([*flags])
        matched = match_features(self.student, self.teacher, args.features)
        return self._replace(args=args, networks=hook_features(self.teacher, self.student, matched, args.out_kd))


@pytest.fixture(scope="module")
def parts(teacher, tmp_path_factory):
    """The parts of a run of distill.py with these flags, which ends where the training would begin."""
    def parts(*flags) -> Parts:
        found = []
        flags = ["--teacher", teacher, "--out", tmp_path_factory.mktemp("parts"), *RUN, *flags]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(distill, "train", lambda *parts: found.append(Parts(*parts)) or 15)
            assert distill.main([*map(str, flags)]) == 128 + 15
        return found[0]
    return parts


@pytest.fixture(scope="module")
def given(parts):
    return parts()


@pytest.mark.parametrize("term", ["task", "out-kd", "feat-kd"])
def test_each_term_alone_has_a_gradient_that_checkpointing_leaves_as_it_is(given, term):
    given = given.but(*[f"--{name}={int(name == term)}" for name in ("task", "out-kd", "feat-kd")])
    batch, gradients = given.batch(0, 1), {}
    for mode in ("none", "selective", "full"):
        given.student.set_checkpointing(mode)
        gradients[mode] = given.gradients(batch)
    assert all(gradient.isfinite().all() for gradient in gradients["none"].values())  # every layer has one
    assert sum(bool(gradient.any()) for gradient in gradients["none"].values()) > 100
    assert equal(gradients["none"], gradients["selective"]) and equal(gradients["none"], gradients["full"])


@pytest.mark.parametrize("features", model.FEATURE_TYPES)
def test_each_kind_of_feature_has_a_gradient(given, features):
    given = given.but("--features", features, "--task", "0", "--out-kd", "0")
    given.student.set_checkpointing("full")
    gradients = given.gradients(given.batch(0))
    assert sum(bool(gradient.any()) for gradient in gradients.values()) > 50
    assert gradients["conv_in.weight"].any() and not gradients["conv_out.weight"].any()


@pytest.mark.parametrize("flags, ran, terms", [
    ([], [1, 1, 1], [True, True, True]),
    (["--out-kd", "0", "--features", "SA@DW-2"], [1, 0, 0], [True, False, True]),
    (["--out-kd", "0"], [1, 1, 0], [True, False, True]),           # LF at UP-3 is the last
    (["--out-kd", "0", "--feat-kd", "0"], [0, 0, 0], [True, False, False]),
    (["--out-kd", "0", "--features", "none"], [0, 0, 0], [True, False, False]),
    (["--feat-kd", "0"], [1, 1, 1], [True, True, False])])
def test_nothing_of_the_teacher_runs_that_no_loss_needs(given, flags, ran, terms):
    counts, handles = dict.fromkeys(("conv_in", "up_blocks.2.resnets.2", "conv_out"), 0), []
    for name in counts:
        def count(module, inputs, name=name):
            counts[name] += 1
        handles.append(given.teacher.get_submodule(name).register_forward_pre_hook(count))
    _, found = given.but(*flags).objective(given.batch(0))
    for handle in handles:
        handle.remove()
    assert [*counts.values()] == ran and [bool(term) for term in found] == terms


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_what_the_networks_read(parts, teacher, tmp_path, prediction):
    """Noised latents of the VAE's distribution, text or zeros, size and crop."""
    folder = shutil.copytree(teacher, tmp_path / "teacher")
    write_json(folder / "scheduler" / "scheduler_config.json", SCHEDULER | {"prediction_type": prediction})
    given = parts("--teacher", folder, "--dropout", "0.5")
    samples = [given.samples[p] for p in range(6)]
    batch = encode_batch(copy.deepcopy(samples), given.pipeline)
    stacked = {name: torch.stack([one[name] for one in samples])
               for name in ("pixels", "latent_noise", "noise", "time_ids")}
    with torch.no_grad():
        mean, logvar = given.pipeline.vae.encode(stacked["pixels"] / 127.5 - 1)
        context, pooled = given.pipeline.text([one["caption"] for one in samples])
    latents = (mean + (logvar / 2).exp() * stacked["latent_noise"]) * given.pipeline.vae.config.scaling_factor
    alphas = (1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2).cumprod(0)
    alpha = alphas[batch.timesteps][:, None, None, None].sqrt()
    sigma, noise = (1 - alpha**2).sqrt(), stacked["noise"]
    torch.testing.assert_close(batch.noisy, (alpha * latents + sigma * noise).float())
    target = noise if prediction == "epsilon" else (alpha * noise - sigma * latents).float()
    torch.testing.assert_close(batch.target, target)
    assert batch.timesteps.tolist() == [one["timestep"] for one in samples]
    assert torch.equal(batch.time_ids, stacked["time_ids"])
    dropped = [one["dropped"] for one in samples]
    assert 0 < sum(dropped) < 6
    for i, without in enumerate(dropped):
        torch.testing.assert_close(batch.context[i], context[i] * (not without))
        torch.testing.assert_close(batch.pooled[i], pooled[i] * (not without))
    read = []
    for network in (given.teacher, given.student):
        network.register_forward_pre_hook(lambda module, inputs: read.append(inputs))
    given.objective(batch)
    assert len(read) == 2
    for inputs in read:
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(inputs, batch[:5], strict=True))


def test_in_half_precision_sizes_weights_and_the_vae_are_not_rounded(parts, teacher):
    given = parts("--precision", "bf16", "--checkpointing", "full")
    assert {module.checkpointing for module in given.student.modules() if isinstance(module, model.Checkpointed)} \
        == {"full"}
    assert {p.dtype for p in given.student.parameters()} == {torch.float32}
    assert torch.equal(given.student.conv_in.weight, load_unet(teacher).conv_in.weight)  # as exact as the file
    batch = given.batch(0)._replace(time_ids=torch.tensor([[1333.0, 777, 501, 0, 64, 64]]))
    read, decoded = [], []
    for network in (given.teacher, given.student):
        network.register_forward_pre_hook(lambda module, inputs: read.append(inputs))
    given.pipeline.vae.decoder.register_forward_hook(lambda module, inputs, output: decoded.append(output))
    given.objective(batch)
    assert [inputs[4].tolist() for inputs in read] == [[[1333, 777, 501, 0, 64, 64]]] * 2
    assert {read[0][i].dtype for i in (0, 2, 3)} == {torch.bfloat16}
    judging.draw(given.pipeline, given.student, ["a red circle"])
    assert given.pipeline.vae.config.force_upcast and {image.dtype for image in decoded} == {torch.float32}


def test_where_the_student_starts(given, teacher, tmp_path):
    def student(*flags) -> UNet:
        args = parse_args(["--teacher", str(teacher), *map(str, flags)])
        return distill.new_student(args, given.teacher.config, "cpu")

    inherited, random = student(), student("--init", "random")
    source = load_unet(teacher).state_dict()
    assert torch.equal(inherited.up_blocks[1].resnets[1].conv1.weight, source["up_blocks.1.resnets.2.conv1.weight"])
    assert not torch.equal(random.conv_in.weight, inherited.conv_in.weight)
    assert equal(random.state_dict(), student("--init", "random").state_dict())
    assert not torch.equal(random.conv_in.weight, student("--init", "random", "--seed", "1").conv_in.weight)
    save_unet(copy.deepcopy(random).half(), tmp_path / "begun")
    begun = student("--init", tmp_path / "begun")
    assert equal(begun.state_dict(), load_unet(tmp_path / "begun", torch.float32).state_dict())
    with pytest.raises(ValueError, match="--init.*1b"):
        student("--student", "1b", "--init", tmp_path / "begun")


# ------------------------------------------------------------------------------------------------------------
# A run, and what is in its folder


def test_what_a_run_leaves(run, tmp_path, monkeypatch, capsys):
    preset = sample.preset
    monkeypatch.setattr(sample, "preset", lambda name: preset(name)._replace(steps=2))
    flags = ["--steps", "3", "--judge", "2", "--preview-every", "2", "--decay", "1"]
    assert run(*flags) == 0
    folder = tmp_path / "run"
    log = log_rows(folder)
    assert list(log[0]) == ["step", "task", "outKD", "featKD", "total", "lr", "norm", "images",
                            "skipped_samples", "skipped_steps", "fixed_outKD"]
    assert [(row["step"], row["images"]) for row in log] == [("1", "2"), ("2", "4"), ("3", "6")]
    assert [float(row["lr"]) for row in log] == pytest.approx([1e-5, 1e-5 * 2 / 3, 1e-5 / 3], rel=1e-5)
    for row in log:
        terms = [float(row[name]) for name in ("task", "outKD", "featKD")]
        assert float(row["total"]) == pytest.approx(sum(terms), rel=1e-5) and min(terms) > 0
    previews = sorted(path.name for path in (folder / "previews").iterdir())
    assert previews == ["step-0000002.png", "step-0000003.png"]
    with open(folder / "scores.csv", newline="") as file:
        scores = list(csv.reader(file))
    assert [row[0] for row in scores] == ["", "teacher", "student before", "student after"]
    assert scores[0][1:4] == ["colour", "shape", "spatial"]
    with Image.open(folder / "judged.png") as image:
        image.load()
    for where in (folder, folder / "unet"):
        assert equal(load_unet(where).state_dict(), load_unet(folder / "step-00000003").state_dict())
    image, = sample.load_pipeline(folder)(["a red circle"], steps=1)
    assert image.size == (64, 64)

    before = contents(folder)
    capsys.readouterr()
    assert run(*flags) == 0                                      # the same command again
    assert "teacher" in capsys.readouterr().out and contents(folder) == before
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.UNet2DConditionModel.from_pretrained(folder / "unet")
    assert equal(theirs.state_dict(), load_unet(folder).state_dict())
    assert diffusers.StableDiffusionXLPipeline.from_pretrained(folder).unet.config.layers_per_block == 1


def test_a_student_of_stable_diffusion(run, during, tmp_path, pairs):
    """Stopped and resumed, with a cache; complete with float32 text encoders from a float16 teacher."""
    teacher = tmp_path / "teacher"
    flags = ["--data", pairs, "--caption", "a red box", "--cache", tmp_path / "cache"]
    bundle(teacher, "sd1", vae=VAE_OF_RUNS)
    save_unet(filled(UNETS["sd1"] | {"block_out_channels": [8, 16, 24, 24], "attention_head_dim": 2,
                                     "sample_size": 16}), teacher / "unet")
    path = teacher / "text_encoder" / "config.json"
    write_json(path, read_json(path) | {"torch_dtype": "float16"})
    during(lambda call: signal.raise_signal(signal.SIGTERM) if call == 1 else None)
    flags += ["--teacher", teacher, "--student", "tiny", "--features", "SA,LF"]
    assert run(*flags) == 128 + signal.SIGTERM and run(*flags) == 0
    assert run(*flags, out="whole") == 0
    assert log_rows(tmp_path / "run") == log_rows(tmp_path / "whole")
    pipeline = sample.load_pipeline(tmp_path / "run")
    image, = pipeline(["a red box"], steps=1)
    assert image.size == (64, 64)
    one = Samples(Shapes(), 64, (4, 16, 16), 0, 1.0, False)[0] | {"caption": "a red box"}
    with torch.no_grad():                                        # dropped to what guidance compares with
        assert torch.equal(encode_batch([one], pipeline).context, pipeline.text([""])[0])
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "run")
    assert {p.dtype for p in theirs.text_encoder.parameters()} == {torch.float32}
    theirs.scheduler = diffusers.EulerDiscreteScheduler.from_config(theirs.scheduler.config)
    theirs.set_progress_bar_config(disable=True)
    drawn = theirs("a red box", num_inference_steps=3, generator=torch.Generator().manual_seed(5)).images[0]
    ours, = sample.load_pipeline(tmp_path / "run")(["a red box"], steps=3, seed=5)
    assert np.abs(np.asarray(ours).astype(int) - np.asarray(drawn)).max() <= 2


def test_an_average_by_hand():
    student, average = torch.nn.Linear(1, 1, bias=False), torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.constant_(average.weight, 0)
    for updates, expected in ((0, 0.9), (1, 0.9 * 2 / 11 + 2 * 9 / 11), (1000, 3 * 0.5 + 0.5 * 1.8)):
        torch.nn.init.constant_(student.weight, updates + 1 if updates < 2 else 3)
        if updates == 1000:
            torch.nn.init.constant_(average.weight, 1.8)
        distill.update_average(average, student, 0.5, updates)   # 1 / 10, 2 / 11, and then 0.5
        assert average.weight.item() == pytest.approx(expected)


def test_an_average_is_kept_beside_the_student_and_leaves_it_alone(run, tmp_path, during):
    flags = ["--lr", "1e-3", "--steps", "3"]
    assert run(*flags, out="plain") == 0 and run(*flags, "--ema", "0.9", out="whole") == 0
    for sitting in range(3):                                     # stopped after each step
        during(lambda call: signal.raise_signal(signal.SIGTERM) if call == 1 and sitting < 2 else None)
        assert run(*flags, "--ema", "0.9", out="pieces") == (128 + signal.SIGTERM if sitting < 2 else 0)
    folders = {out: {name: load_unet(tmp_path / out / name).state_dict() for name in ("unet", "unet_ema")}
               for out in ("whole", "pieces")}
    assert not (tmp_path / "plain" / "unet_ema").exists() and log_rows(tmp_path / "plain") == log_rows(tmp_path / "whole")
    plain = load_unet(tmp_path / "plain").state_dict()
    for unets in folders.values():
        assert equal(unets["unet"], plain) and equal(unets["unet_ema"], folders["whole"]["unet_ema"])
        assert not torch.equal(unets["unet_ema"]["conv_in.weight"], plain["conv_in.weight"])
    assert equal(load_unet(tmp_path / "whole" / "step-00000003" / "unet_ema").state_dict(),
                 folders["whole"]["unet_ema"])
    with pytest.raises(ValueError, match="ema was 0.9 and is None"):
        run(*flags[:2], "--steps", "4", out="whole")


def test_the_loss_of_fixed_samples_is_comparable_and_leaves_training_alone(run, teacher, tmp_path, pairs, monkeypatch):
    monkeypatch.setattr(judging, "preview", lambda *parts: None)

    def losses(out: str, *flags) -> list[str]:
        assert run("--data", pairs, *flags, out=out) == 0
        return [row.pop("fixed_outKD") for row in log_rows(tmp_path / out)]

    still = ["--preview-every", "2", "--lr", "1e-12"]
    first, *rest = losses("learning", "--preview-every", "2", "--lr", "1e-3", "--micro-batch", "1")
    assert first == rest[1] == "" and float(rest[0]) > 0 and rest[0] != rest[2]
    losses("without", "--lr", "1e-3", "--micro-batch", "1")
    assert equal(checkpoint(tmp_path / "learning")[1], checkpoint(tmp_path / "without")[1])
    loss = losses("still", *still)[1]
    assert losses("seed", *still, "--seed", "1")[1] == loss
    assert losses("task", *still, "--teacher", "none", "--init", teacher) == [""] * 4


def test_only_the_student_learns(run, teacher, monkeypatch):
    """And the teacher runs no further than its last feature, if that is all that is asked of it."""
    found, ran, train = [], [], distill.train

    def watched(*parts):
        found.append(Parts(*parts))
        for name in ("conv_in", "conv_out"):
            found[0].teacher.get_submodule(name).register_forward_pre_hook(lambda *_, name=name: ran.append(name))
        return train(*parts)

    monkeypatch.setattr(distill, "train", watched)
    assert run("--lr", "1e-3", "--out-kd", "0", "--features", "SA@DW-2") == 0
    assert ran == ["conv_in"] * 4
    frozen = [found[0].teacher, found[0].pipeline.vae, found[0].pipeline.text]
    assert all(p.grad is None and not p.requires_grad for network in frozen for p in network.parameters())
    untouched = sample.load_pipeline(teacher, dtype=torch.float32, device="cpu")
    for ours, theirs in zip(frozen, (untouched.unet, untouched.vae, untouched.text)):
        assert equal(ours.state_dict(), theirs.state_dict())
    first = distill.new_student(found[0].args, untouched.unet.config, "cpu").state_dict()
    assert not any(torch.equal(first[name], tensor) for name, tensor in found[0].student.state_dict().items()
                   if tensor.dim() > 1)


def test_without_a_teacher_the_task_alone_is_learned(run, teacher, tmp_path, pairs):
    """As in DreamBooth: a student's own weights, pictures, one caption for all; and another VAE."""
    vae = write_vae(teacher, tmp_path / "vae")
    flags = ["--teacher", "none", "--init", teacher, "--data", pairs, "--caption", "a red circle", "--vae", vae]
    assert run(*flags, "--lr", "1e-3", "--steps", "1") == 0
    row, = log_rows(tmp_path / "run")
    assert float(row["task"]) == float(row["total"]) > 0 == float(row["outKD"]) == float(row["featKD"])
    before, after = (load_unet(folder).state_dict() for folder in (teacher, tmp_path / "run"))
    assert before.keys() == after.keys()
    assert not torch.equal(before["conv_in.weight"], after["conv_in.weight"])
    assert equal(load_vae(tmp_path / "run").state_dict(), load_vae(vae).state_dict())


def test_skipped_samples_are_reported_after_the_first_pass(run, during, tmp_path, pairs, capsys):
    """In one run, and in one that is stopped within the first pass and after it."""
    def reports(out: str, *stops: int) -> list[str]:
        for stop in stops:
            during(lambda call: signal.raise_signal(signal.SIGTERM) if call == stop else None)
            assert run("--data", pairs, "--steps", "5", out=out) == (128 + signal.SIGTERM if stop else 0)
        return [line for line in capsys.readouterr().out.splitlines() if "pairs used" in line]

    report, = reports("one", 0)
    assert reports("two", 1, 3, 0) == [report]
    for words in ("4 pairs used", "bad_image 1", "blank_caption 1", "no_image 1"):
        assert words in report
    assert log_rows(tmp_path / "one") == log_rows(tmp_path / "two")
    assert log_rows(tmp_path / "two")[-1]["skipped_samples"] == "2"


@pytest.mark.parametrize("flags", [[], ["--precision", "bf16", "--batch", "1"]], ids=" ".join)
def test_a_cache_gives_the_same_losses_without_the_encoders(run, tmp_path, monkeypatch, flags):
    encoded, encode = [], VAE.encode
    monkeypatch.setattr(VAE, "encode", lambda self, image: encoded.append(len(image)) or encode(self, image))
    count = 4 * (1 if flags else 2)
    cache = ["--cache", tmp_path / "cache"]
    for out, more, expected in (("plain", [], count), ("cold", cache, count), ("warm", cache, 0)):
        encoded.clear()
        assert run(*flags, *more, out=out) == 0
        assert sum(encoded) == expected
        assert log_rows(tmp_path / out) == log_rows(tmp_path / "plain")
    assert equal(checkpoint(tmp_path / "cold")[1], checkpoint(tmp_path / "warm")[1])


def test_a_cache_of_images_is_for_all_runs_that_read_them_alike(run, teacher, tmp_path, pairs, monkeypatch):
    encoded, encode = [], VAE.encode
    monkeypatch.setattr(VAE, "encode", lambda self, image: encoded.append(len(image)) or encode(self, image))
    flags = ["--data", pairs, "--cache", tmp_path / "cache"]
    assert run(*flags, out="cold") == 0
    cold = len(encoded)
    assert run(*flags, out="warm") == 0
    assert run(*flags, "--seed", "1", "--features", "LF", "--student", "1b", "--batch", "4", out="other") == 0
    assert len(encoded) == cold and equal(checkpoint(tmp_path / "cold")[1], checkpoint(tmp_path / "warm")[1])
    records = tmp_path / "cache" / "records.bin"
    damaged = bytearray(records.read_bytes())
    damaged[100] ^= 1
    records.write_bytes(damaged)                                 # of the first image, a good one
    assert run(*flags, out="damaged") == 0 and encoded[cold:] == [1]
    assert log_rows(tmp_path / "damaged") == log_rows(tmp_path / "cold")

    vae = write_vae(teacher, tmp_path / "vae")
    (pairs / "8.png").write_bytes((pairs / "0.png").read_bytes())
    (pairs / "8.txt").write_text("a red circle")
    with pytest.raises(ValueError, match="--cache") as error:
        run(*flags, "--vae", vae, "--flip", "--size", "56", "--precision", "bf16",
            "--caption", "a blue square", out="refused")
    assert "\n" not in str(error.value)
    for name in ("data", "encoders", "size", "flip", "caption", "mean", "context"):
        assert f" {name} was " in str(error.value)


# ------------------------------------------------------------------------------------------------------------
# The command line

SLIPS = [
    "--steps 0", "--steps -1", "--steps 1.5", "--steps x", "--lr nan", "--lr inf", "--lr 0", "--lr -1",
    "--batch 0", "--micro-batch 0", "--batch 5 --micro-batch 2", "--task -1", "--task nan", "--out-kd inf",
    "--feat-kd x", "--decay 1.1", "--clip 0", "--dropout -0.1", "--dropout 1.5", "--dropout nan", "--size 7",
    "--size 100", "--size -8", "--size 100000", "--workers -1", "--save-every 0", "--preview-every -1",
    "--judge -1", "--seed -1", "--ema 2", "--seed 1e3", "--student sdxl", "--sa-blocks middle", "--precision int8",
    "--checkpointing some", "--unknown", "--feat 1", "toy", "--teacher none", "--caption dog", "--student",
    "--features SB", "--teacher absent", "--init absent", "--vae absent",
    "--out ", "--data ", "--cache ", "--device ",
    "--task 0 --out-kd 0 --feat-kd 0", "--task 0 --out-kd 0 --features none",
    "--task 0 --teacher none --init random"]


@pytest.mark.parametrize("line", SLIPS)
def test_a_slip_in_the_command_line_is_reported_in_one_line(line, capsys):
    with pytest.raises(SystemExit) as exit:
        parse_args(line.split(" "))
    out, err = capsys.readouterr()
    assert exit.value.code == 2 and out == "" and err.startswith("error: ") and err.count("\n") == 1
    assert line.split()[0].lstrip("-") in err


def test_help_names_flags_and_their_defaults(program):
    code, out, _ = program("--help")
    assert code == 0
    for name in ("--features", "--sa-blocks", "[1.0]", "paper 100000", "toy 900", "SA,LF@DW-1,LF@UP-3"):
        assert name in out


def test_a_misspelled_model_is_answered_with_the_nearest_name(program):
    code, _, err = program("--teacher", "SDLX")
    assert code == 2 and "did you mean sdxl?" in err and err.count("\n") == 1


def test_data_is_looked_for_before_a_model(program, tmp_path):
    code, _, err = program("--teacher", "./absent", "--data", "absent", "--out", tmp_path / "run")
    assert code == 1 and "--data" in err


def test_the_recipes():
    toy, paper = parse_args([]), parse_args(["--teacher", "sdxl", "--data", "laion/"])
    assert (paper.steps, paper.batch, paper.lr, paper.decay, paper.dropout) == (100_000, 128, 1e-5, 0, 0.1)
    assert (paper.task, paper.out_kd, paper.feat_kd, paper.features) == (1, 1, 1, "SA,LF@DW-1,LF@UP-3")
    assert (paper.normalize_features, toy.normalize_features) == (False, True)
    assert toy.steps <= 1000 and (str(toy.out), str(paper.out)) == ("runs/toy-700m", "runs/sdxl-700m")
    assert parse_args(["--teacher", "sdxl", "--steps", "7", "--data", "x"]).steps == 7


@pytest.mark.parametrize("flags, words", [
    (["--data", "absent"], "--data: no folder absent"), (["--teacher", "./absent"], "no folder ./absent"),
    (["--size", "72"], "--data shapes"), (["--out", "file"], "file"), (["--device", "meta:x"], "meta:x"),
    (["--out", "."], "--out"), (["--features", "SA@Mid"], "--features")])
def test_what_the_world_lacks_is_reported_in_one_line(program, teacher, tmp_path, monkeypatch, flags, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    save_unet(UNet(replace(model.CONFIGS["700m"], channels=(32, 32, 32), heads=(1, 1, 1))), tmp_path / "unet")
    before = contents(tmp_path / "unet")
    code, _, err = program("--teacher", teacher, "--out", "run", *RUN, *flags)
    assert code == 1 and err.startswith("error: ") and words in err and "\n" not in err
    assert contents(tmp_path / "unet") == before                 # --out is a model and no run


@pytest.mark.parametrize("value", ["x", "0"])
def test_torchruns_variables_are_numbers(program, monkeypatch, value):
    monkeypatch.setenv("WORLD_SIZE", value)
    code, _, err = program("--dry-run")
    assert code == 1 and err.startswith("error: ") and "WORLD_SIZE" in err


def test_data_of_which_nothing_is_good_ends_the_run(program, teacher, tmp_path):
    (tmp_path / "data").mkdir()
    for i in range(3):
        (tmp_path / "data" / f"{i}.png").touch()
        (tmp_path / "data" / f"{i}.txt").write_text("a red circle")
    for workers in (0, 1):
        code, _, err = program("--teacher", teacher, "--out", tmp_path / "run", *RUN,
                               "--data", tmp_path / "data", "--workers", workers)
        assert code == 1 and err.startswith("error: ") and "bad_image 3" in err and "\n" not in err


def test_a_dry_run(program, teacher, tmp_path, monkeypatch):
    """Settings, features, parameters, memory and work; no weights or images are read, nothing is written."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "configs"
    for name in ("unet", "vae", "text_encoder", "text_encoder_2"):
        (folder / name).mkdir(parents=True)
        shutil.copy(teacher / name / "config.json", folder / name)
    text = read_json(folder / "text_encoder" / "config.json") | {"max_position_embeddings": 9}
    write_json(folder / "text_encoder" / "config.json", text)
    code, out, _ = program("--teacher", folder, "--data", "laion/", "--batch", "6", "--micro-batch", "3",
                           "--dry-run")
    assert code == 0 and not (tmp_path / "runs").exists()
    config = UNetConfig.from_diffusers(SMALL)
    student, teacher = UNet(model.student_config(config, "700m")), UNet(config)
    ours, theirs = (sum(p.numel() for p in unet.parameters()) for unet in (student, teacher))
    with costs.count_flops() as counter, torch.no_grad():
        teacher(*costs.unet_inputs(config, 9, config.sample_size))
    flops = counter.get_total_flops() / 1e12
    for words in ("lr             1e-05", f"teacher {theirs:,}", f"student {ours:,}", "8 features",
                  f"teacher {flops:.4g}", "down_blocks.0 <- down_blocks.0",
                  "up_blocks.1.attentions.1.transformer_blocks.0.attn1 <- "
                  "up_blocks.1.attentions.2.transformer_blocks.0.attn1"):
        assert words in out
    assert torch.get_default_dtype() == torch.float32
    code, out, _ = program("--teacher", folder, "--data", "laion/", "--vae", "toy", "--dry-run")
    assert code == 0 and "VAE 167,959" in out
    save_unet(student, tmp_path / "student")                     # a U-Net alone, as in toy/students
    code, out, _ = program("--teacher", folder, "--data", "laion/", "--init", tmp_path / "student", "--dry-run")
    assert code == 0 and f"student {ours:,}" in out
