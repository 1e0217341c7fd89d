"""The losses are those of diffusers' networks and the paper's formulas; what a run learns and leaves."""

import shutil
from collections import namedtuple

import pytest
import torch
from common import (
    ANSWERS, RUN, SCHEDULER, SMALL_RUN, UNETS, VAE_OF_RUNS, bundle, checkpoint, contents, filled, log_rows,
    networks_of, refusal, same)
from oracle import CONDITIONS, GRADIENTS, LATENTS, LOSSES, NOISE, STUDENTS, TEACHER, along, weaken
from safetensors.torch import load_file

import distill
import model
import sample
from distill import distill_batch, losses, make_batch, match_features, parse_args, parse_features
from model import UNet, UNetConfig, load_unet, save_unet
from sample import NoiseSchedule
from support import data
from support.data import collate
from support.files import read_csv, write_json
from support.vae import load_vae, save_vae
from toy import judging

# The losses


def test_losses_by_hand():
    features = [torch.tensor([[2.0]]), torch.tensor([0.0, 4.0])], [torch.zeros(1, 1), torch.zeros(2)]
    assert losses(torch.tensor([1.0, 3.0]), torch.zeros(2), torch.ones(2), *features) == (5, 2, 4 + 8)
    assert losses(torch.ones(2), torch.zeros(2)) == (1, 0, 0)
    ours = torch.tensor([2.0]), torch.tensor([3.0, 3.0])
    theirs = torch.tensor([4.0]), torch.tensor([1.0, 3.0])
    assert losses(ours[0], theirs[0], None, ours, theirs, normalize=True)[2] == pytest.approx(4 / 16 + 2 / 5)
    with pytest.raises(ValueError):
        losses(torch.ones(2), torch.ones(2), torch.ones(2), [torch.ones(2)] * 2, [torch.ones(2)])
    far, zero = torch.full((2,), 1e4, dtype=torch.float16), torch.zeros(2, dtype=torch.float16)
    for term in losses(far, zero, zero, [far], [zero]):  # 1e8 is infinite in float16
        assert term.dtype == torch.float32 and term == far[0].float() ** 2


@pytest.fixture(scope="module")
def deep():
    """The oracle's teacher and students, and its batch."""
    networks = {"teacher": filled(TEACHER)}
    for name, config in STUDENTS.items():
        networks[name] = weaken(filled(config))
        assert networks[name].config == model.student_config(networks["teacher"].config, name)
    noisy = NoiseSchedule(SCHEDULER).add_noise(LATENTS, NOISE, CONDITIONS["timestep"])
    return networks, distill.Batch(noisy, *CONDITIONS.values(), NOISE)


@pytest.mark.parametrize("case", LOSSES, ids=" ".join)
@torch.no_grad()
def test_each_term_is_that_of_diffusers_networks_and_hooks(deep, case):
    networks, batch = deep
    compared = networks_of(networks["teacher"], networks[case[0]], *case[1:])
    terms = torch.stack(distill_batch(batch, compared, torch.float32)).double()
    expected = load_file(ANSWERS.with_name("distill.safetensors"))[" ".join(case)]
    torch.testing.assert_close(terms, expected, rtol=1e-5, atol=0)


def test_each_terms_gradient_is_that_of_diffusers_networks(deep):
    networks, batch = deep
    student, expected = networks[GRADIENTS[0]], load_file(ANSWERS.with_name("gradients.safetensors"))
    terms = distill_batch(batch, networks_of(networks["teacher"], student, *GRADIENTS[1:]), torch.float32)
    parameters = dict(sorted(student.named_parameters()))
    for term, stored in zip(terms, (expected["task"], expected["outKD"], expected["featKD"])):
        found = torch.autograd.grad(term, parameters.values(), retain_graph=True, materialize_grads=True)
        for path, gradient, answer in zip(parameters, found, stored, strict=True):
            assert abs(along(path, gradient) - answer) <= 1e-4 * gradient.norm(), path


def test_the_grammar_of_features(deep):
    networks, _ = deep
    assert parse_features(" SA , CA@Mid") == [("SA", None), ("CA", "Mid")] and parse_features("none") == []
    for features in ("SB", "", "SA@", "SA@Mid", "LF@DW-4", "SA@DW-1"):
        with pytest.raises(ValueError, match="--features"):
            match_features(networks["700m"], networks["teacher"], features)


# What the networks read, and which of them learn


class Parts(namedtuple("Parts", "args pipeline networks samples encode identity")):
    """What `main` hands to `train`."""

    def batch(self, *positions: int) -> distill.Batch:
        return make_batch(collate([self.samples[p] for p in positions]), self.pipeline, self.encode)

    def terms(self, batch: distill.Batch) -> tuple:
        return distill_batch(batch, self.networks, self.pipeline.dtype, self.args.normalize_features)


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


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@torch.no_grad()
def test_what_the_networks_read(parts, teacher, tmp_path, pairs, prediction):
    """Noised latents of the VAE's distribution, text or zeros, size and crop."""
    folder = shutil.copytree(teacher, tmp_path / "teacher")
    write_json(folder / "scheduler" / "scheduler_config.json", SCHEDULER | {"prediction_type": prediction})
    given, positions = parts("--teacher", folder, "--data", pairs), range(24)
    samples, batch = collate([given.samples[p] for p in positions]), given.batch(*positions)
    mean, logvar = given.pipeline.vae.encode(samples["pixels"] / 127.5 - 1)
    context, pooled = given.pipeline.text(samples["caption"])
    latents = (mean + (logvar / 2).exp() * samples["latent_noise"]) * given.pipeline.vae.config.scaling_factor
    alphas = (1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2).cumprod(0)
    alpha = alphas[samples["timestep"]][:, None, None, None].sqrt()
    sigma, noise = (1 - alpha**2).sqrt(), samples["noise"]
    torch.testing.assert_close(batch.noisy, (alpha * latents + sigma * noise).float())
    target = noise if prediction == "epsilon" else (alpha * noise - sigma * latents).float()
    torch.testing.assert_close(batch.target, target)
    assert torch.equal(batch.timesteps, samples["timestep"]) and len(batch.timesteps.unique()) > 20
    assert batch.time_ids[:, [0, 1, 2, 4, 5]].unique(dim=0).tolist() == [[64, 70, 0, 64, 64]]
    assert {*batch.time_ids[:, 3].tolist()} <= {*range(7)} and len(batch.time_ids[:, 3].unique()) > 3
    keep = ~samples["dropped"]
    assert 0 < sum(keep) < 24
    torch.testing.assert_close(batch.context, context * keep[:, None, None])
    torch.testing.assert_close(batch.pooled, pooled * keep[:, None])


def test_in_half_precision_sizes_weights_and_the_vae_are_not_rounded(parts, teacher):
    given = parts("--precision", "bf16", "--checkpointing")
    student, read, types = given.networks.student, [], []
    assert all(module.checkpointing for module in student.modules() if isinstance(module, model.Checkpointed))
    assert torch.equal(student.conv_in.weight, load_unet(teacher).conv_in.weight)  # as exact as the file
    batch = given.batch(0)._replace(time_ids=torch.tensor([[1333.0, 777, 501, 0, 64, 64]]))
    for network in given.networks[:2]:
        network.register_forward_pre_hook(lambda module, inputs: read.append(inputs))
    for module in (student.conv_in, given.pipeline.vae.decoder):
        module.register_forward_hook(lambda module, inputs, output: types.append(output.dtype))
    sum(given.terms(batch)).backward()
    assert len(read) == 2 and all(torch.equal(inputs[4], batch.time_ids) for inputs in read)
    assert {read[0][i].dtype for i in (0, 2, 3)} == {torch.bfloat16} == {*types}
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in student.parameters())
    judging.draw(given.pipeline, student, ["a red circle"])
    assert types[-1] == torch.float32                            # the VAE's


def test_terms_of_no_weight(parts):
    """A teacher that no loss needs does not run; every layer of a student has a gradient all the same."""
    for flags, terms in ((["--task", "0", "--out-kd", "0"], [True, True, True]),
                         (["--out-kd", "0", "--features", "none"], [True, False, False])):
        args, _, networks, *_ = given = parts(*flags)
        assert (networks.teacher is None) == (terms == [True, False, False])
        task, out_kd, feat_kd = given.terms(given.batch(0))
        (args.task * task + args.out_kd * out_kd + args.feat_kd * feat_kd).backward()
        assert [bool(task), bool(out_kd), bool(feat_kd)] == terms
        assert all(p.grad is not None for p in networks.student.parameters())


def test_where_the_student_starts(teacher, tmp_path):
    def student(*flags) -> UNet:
        args = parse_args(["--teacher", str(teacher), *map(str, flags)])
        return distill.new_student(args, UNetConfig.from_diffusers(SMALL_RUN), "cpu")

    random = student("--init", "random")
    assert not same(random, student("--init", "random", "--seed", "1").state_dict())
    save_unet(random, tmp_path / "begun")
    assert same(student("--init", tmp_path / "begun"), random.state_dict())
    with pytest.raises(ValueError, match="--init.*1b"):
        student("--student", "1b", "--init", tmp_path / "begun")
    assert distill.model_source(parse_args(["--teacher", "none", "--init", "random"])) == "toy"
    alone = ["--teacher", "none", "--init", str(tmp_path / "begun"), "--out", str(tmp_path / "run")]
    assert "model_index.json" in refusal(distill.main, alone)    # it has no text encoders


# A run, and what is in its folder


@pytest.mark.parametrize("error", [EOFError, ConnectionResetError, RuntimeError("DataLoader timed out")])
def test_a_reader_that_cannot_hand_over_is_named(monkeypatch, error):
    def loader(*args, **options):
        assert options["timeout"] > 0                            # else it could wait for ever
        raise error
        yield
    monkeypatch.setattr(data, "DataLoader", loader)
    with pytest.raises(RuntimeError, match="DataLoader"):
        next(data.read_ahead(parse_args(["--workers", "1"]), None, 0, "cpu"))


def test_what_a_run_leaves(run, tmp_path, monkeypatch):
    preset = sample.preset
    monkeypatch.setattr(sample, "preset", lambda name: preset(name)._replace(steps=1))
    flags, folder = ["--steps", "3", "--judge", "1", "--preview-every", "2", "--decay", "1"], tmp_path / "run"
    assert run(*flags) == 0 and (log := log_rows(folder))
    assert [(row["step"], row["images"]) for row in log] == [("1", "2"), ("2", "4"), ("3", "6")]
    assert [float(row["lr"]) for row in log] == pytest.approx([1e-5, 1e-5 * 2 / 3, 1e-5 / 3], rel=1e-5)
    terms = [float(log[0][name]) for name in ("task", "outKD", "featKD")]
    assert float(log[0]["total"]) == pytest.approx(sum(terms), rel=1e-5) and min(terms) > 0
    assert {path.name for path in folder.glob("previews/*")} == {"step-0000002.png", "step-0000003.png"}
    names = [row[""] for row in read_csv(folder / "scores.csv")]
    assert names == ["teacher", "student before", "student after"]
    assert same(load_unet(folder), load_unet(folder / "step-00000003").state_dict())
    before = contents(folder)
    shutil.rmtree(folder / "unet")                               # comes back with the same command
    assert run(*flags) == 0 and contents(folder) == before


def test_a_student_of_stable_diffusion(run, parts, tmp_path, pairs):
    checker = {"safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"]}  # which runs leave out
    teacher = bundle(tmp_path / "teacher", "sd1", vae=VAE_OF_RUNS, index=checker)
    save_unet(filled(UNETS["sd1"] | {"block_out_channels": [8, 16, 24, 24], "attention_head_dim": 2}),
              teacher / "unet")
    flags = ["--teacher", teacher, "--student", "small", "--data", pairs, "--caption", "a red box"]
    batch, pipeline = (given := parts(*flags)).batch(*range(24)), given.pipeline
    dropped = collate([given.samples[p] for p in range(24)])["dropped"]
    for rows, prompt in ((dropped, ""), (~dropped, "a red box")):  # guidance compares with the empty text
        torch.testing.assert_close(batch.context[rows], pipeline.text([prompt])[0].expand(sum(rows), -1, -1))
    assert run(*flags, "--features", "SA,LF", "--steps", "1", "--cache", tmp_path / "cache") == 0
    assert sample.load_pipeline(tmp_path / "run")(["a red box"], steps=1)[0].size == (64, 64)
    pytest.importorskip("diffusers").StableDiffusionPipeline.from_pretrained(tmp_path / "run")


def test_only_the_student_learns(parts, teacher):
    """By a step of AdamW, with its gradients clipped to norm 1."""
    given, untouched = parts("--lr", "1e-3", "--steps", "1", "--task", "20"), sample.load_pipeline(teacher)
    task, out_kd, feat_kd = given.terms(given.batch(0, 1))
    student = dict(given.networks.student.named_parameters())
    expected = {name: tensor.detach().clone().requires_grad_() for name, tensor in student.items()}
    for name, gradient in zip(student, torch.autograd.grad(20 * task + out_kd + feat_kd, student.values())):
        expected[name].grad = gradient
    assert torch.nn.utils.clip_grad_norm_(expected.values(), 1.0) > 1.5
    torch.optim.AdamW(expected.values(), lr=1e-3, weight_decay=0.01).step()
    assert distill.train(*given) == 0
    _, stored = checkpoint(given.args.out)
    for name, tensor in expected.items():
        torch.testing.assert_close(stored[f"exp_avg.{name}"], 0.1 * tensor.grad, rtol=1e-4, atol=1e-7)
        sure = tensor.grad.abs() > 1e-6                          # smaller ones may round to the other sign
        torch.testing.assert_close(stored[name][sure], tensor[sure], rtol=1e-6, atol=1e-6)
    for ours, theirs in ((given.networks.teacher, untouched.unet), (given.pipeline.vae, untouched.vae),
                         (given.pipeline.text, untouched.text)):
        assert all(p.grad is None and not p.requires_grad for p in ours.parameters())
        assert same(ours, theirs.state_dict())


def test_without_a_teacher_the_task_alone_is_learned(run, teacher, tmp_path, pairs):
    vae = load_vae(teacher)
    vae.quant_conv.weight.data += 0.1
    save_vae(vae, tmp_path / "vae")
    flags = ["--teacher", "none", "--init", teacher, "--data", pairs, "--caption", "a red circle"]
    assert run(*flags, "--vae", tmp_path / "vae", "--lr", "1e-3", "--steps", "1") == 0
    row, = log_rows(tmp_path / "run")
    assert row["task"] == row["total"] and [row["outKD"], row["featKD"]] == ["0", "0"]
    assert not same(load_unet(teacher), load_unet(tmp_path / "run").state_dict())
    assert same(load_vae(tmp_path / "run"), vae.state_dict())


def test_the_recipes():
    toy, paper = parse_args([]), parse_args(["--teacher", "sdxl", "--data", "laion/"])
    assert (paper.steps, paper.batch, paper.lr, paper.decay) == (100_000, 128, 1e-5, 0)
    assert (paper.task, paper.out_kd, paper.feat_kd, paper.features) == (1, 1, 1, "SA,LF@DW-1,LF@UP-3")
    assert (paper.normalize_features, toy.normalize_features) == (False, True)
    assert toy.features == paper.features
    assert toy.steps <= 1000 and (str(toy.out), str(paper.out)) == ("runs/toy-700m", "runs/sdxl-700m")
    bk = parse_args(["--student", "base", "--teacher", "sd14", "--data", "x", "--steps", "7"])
    assert (bk.steps, bk.batch, bk.lr, bk.features) == (7, 256, 5e-5, "SA")


def test_a_dry_run(program, teacher, tmp_path, monkeypatch):
    """Settings, features and parameters; no weights or images are read, nothing is written."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(teacher, "configs", ignore=shutil.ignore_patterns("*.safetensors"))
    code, out, _ = program("distill.py", "--teacher", "./configs", "--data", "laion/", "--dry-run")
    assert code == 0 and len([*tmp_path.iterdir()]) == 1
    config = UNetConfig.from_diffusers(SMALL_RUN)
    unets = UNet(model.student_config(config, "700m")), UNet(config)
    block = "up_blocks.1.attentions.{}.transformer_blocks.0.attn1"
    for words in (*(f"{sum(p.numel() for p in unet.parameters()):,}" for unet in unets), "1e-05",
                  f"{block.format(1)} <- {block.format(2)}"):
        assert words in out
