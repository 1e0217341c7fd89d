"""sample.py: numbers worked out by hand, the pictures of diffusers, and what the command line promises."""

import json
import runpy
import shutil
import signal
import subprocess
import sys
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from bundles import CASES, SCHEDULER, WORDS, bundle
from PIL import Image
from safetensors.torch import load_file, save_file

import model
import sample
from common import FILE, draw, refusal, relative_error
from sample import NoiseSchedule, load_pipeline
from support.cli import PRESETS, SAMPLERS, SPACINGS, Preset, preset
from support.costs import read_configs
from support.plots import image_grid

ROOT = Path(__file__).parents[1]
SMALL = {"steps": 3, "height": 32, "width": 48}
FLAGS = ["--steps", "3", "--height", "32", "--width", "48"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return bundle(tmp_path_factory.mktemp("bundle"))


@pytest.fixture(scope="module")
def pipeline(folder):
    return load_pipeline(folder)


@pytest.fixture
def program(tmp_path, monkeypatch, capsys):
    """Runs the command line as a process would: its exit code, what it printed, the files it wrote."""
    monkeypatch.chdir(tmp_path)

    def run(*args):
        before = {*tmp_path.iterdir()}
        monkeypatch.setattr(sys, "argv", ["sample.py", *map(str, args)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit:
            runpy.run_path(str(ROOT / "sample.py"), run_name="__main__")
        code = exit.value.code or 0
        if isinstance(code, str):
            print(code, file=sys.stderr)
            code = 1
        return code, capsys.readouterr(), {*tmp_path.iterdir()} - before
    return run


def pixels(images):
    return np.stack([np.asarray(image) for image in images]).astype(int)


def same(a, b):
    return len(a) == len(b) and all(x.tobytes() == y.tobytes() for x, y in zip(a, b))


# ------------------------------------------------------------------------------------------------------------
# Noise


def schedule(spacing, **entries):
    return NoiseSchedule(SCHEDULER | {"timestep_spacing": spacing} | entries)


def test_the_noise_of_each_timestep():
    ours = schedule("leading")
    assert len(ours.sigmas) == 1000
    assert ours.sigmas[[0, 999]].tolist() == pytest.approx([0.029167, 14.614641], abs=6e-7)
    timesteps, like = torch.tensor([0, 999]), torch.empty(0, dtype=torch.float16)
    alpha, sigma = ours.alpha_sigma(timesteps, like)
    assert alpha.shape == (2, 1, 1, 1) and alpha.dtype == torch.float16
    assert alpha.flatten().tolist() == pytest.approx([0.999575, 0.068265], abs=5e-4)
    assert sigma.flatten().tolist() == pytest.approx([0.029155, 0.997667], abs=5e-4)


@pytest.mark.parametrize("spacing, steps, first, last, sigmas, scale", [
    ("leading", 25, [961, 921], [41, 1], [11.67605, 0.04131], 11.71879),
    ("leading", 50, [981, 961], [21, 1], [13.12041, 0.04131], 13.15846),
    ("trailing", 10, [999, 899], [199, 99], [14.61464, 0.34167], 14.61464),
    ("trailing", 25, [999, 959], [79, 39], [14.61464, 0.19630], 14.61464),
    ("linspace", 10, [999, 888], [111, 0], [14.61464, 0.02917], 14.61464),
])
def test_timesteps_and_sigmas(spacing, steps, first, last, sigmas, scale):
    noise = schedule(spacing)
    timesteps, ours, following = zip(*noise.levels(steps))
    assert len(timesteps) == steps and [*timesteps[:2]] == first and [*timesteps[-2:]] == last
    assert following == (*ours[1:], 0) and [*ours] == sorted(ours, reverse=True)
    assert [ours[0], ours[-1]] == pytest.approx(sigmas, abs=6e-6)
    # As diffusers scales it, before it divides by sqrt(sigma^2 + 1).
    assert noise.init_noise_std(ours[0]) * (ours[0]**2 + 1)**0.5 == pytest.approx(scale, abs=6e-6)


def test_fractional_timesteps_lie_between_two():
    noise = schedule("linspace")
    timesteps = noise.timesteps(7)
    assert timesteps == [999, 832.5, 666, 499.5, 333, 166.5, 0]
    middle = (noise.sigmas[832] + noise.sigmas[833]).item() / 2
    assert noise.sigma_at(timesteps[1]) == pytest.approx(middle, rel=1e-12)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("steps", [1, 7, 11, 25, 999, 1000])
def test_the_schedule_is_that_of_diffusers(spacing, steps):
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.EulerDiscreteScheduler.from_config(SCHEDULER | {"timestep_spacing": spacing})
    theirs.set_timesteps(steps)
    ours = schedule(spacing)
    timesteps, sigmas, following = zip(*ours.levels(steps))
    np.testing.assert_allclose(timesteps, theirs.timesteps.numpy(), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(sigmas + following[-1:], theirs.sigmas.numpy(), rtol=1e-4)
    scale = ours.init_noise_std(sigmas[0]) * (sigmas[0]**2 + 1)**0.5
    assert scale == pytest.approx(float(theirs.init_noise_sigma), rel=1e-4)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("steps, entries", [
    (3, {}), (25, {}), (7, {"set_alpha_to_one": True}), (30, {"rescale_betas_zero_snr": True})])
def test_the_samplers_are_those_of_diffusers(spacing, prediction, sampler, steps, entries):
    pytest.importorskip("diffusers")
    from oracle_sample import SCHEDULERS
    entries = entries | {"timestep_spacing": spacing, "prediction_type": prediction}
    if "rescale_betas_zero_snr" in entries and (spacing, prediction) != ("trailing", "v_prediction"):
        pytest.skip("a first input that is all noise needs v, and timestep 999")
    theirs = SCHEDULERS[sampler].from_config(SCHEDULER | entries)
    theirs.set_timesteps(steps)
    noise = draw("noise", 2, 4, 6, 5)

    def predict(x, t):
        return (0.9 * x + 0.3 * x.flip(2) + 0.2 * x.flip(3).tanh()) * (1 - t / 3000)
    latents = noise * theirs.init_noise_sigma
    for t in theirs.timesteps:
        latents = theirs.step(predict(theirs.scale_model_input(latents, t), float(t)), t, latents).prev_sample
    ours = sample.sample_latents(predict, noise, NoiseSchedule(SCHEDULER | entries, sampler=sampler), steps)
    assert relative_error(ours, latents) < (2e-3 if "rescale_betas_zero_snr" in entries else 2e-5)


@pytest.mark.parametrize("entry", [
    {"beta_schedule": "linear"}, {"prediction_type": "sample"}, {"timestep_spacing": "other"},
    {"use_karras_sigmas": True}, {"timestep_type": "continuous"}, {"final_sigmas_type": "sigma_min"},
    {"num_train_timesteps": 500}, {"steps_offset": 2}, {"beta_end": 0.0001}, {"beta_start": 0},
], ids=lambda entry: next(iter(entry)))
def test_an_unsupported_schedule_is_refused(entry):
    [(key, value)] = entry.items()
    message = refusal(NoiseSchedule, SCHEDULER | entry)
    assert key in message and repr(value) in message


@pytest.mark.parametrize("name", [
    "LCMScheduler", "TCDScheduler", "EDMEulerScheduler", "FlowMatchEulerDiscreteScheduler"])
def test_schedulers_of_other_models_are_refused_by_name(name):
    assert name in refusal(NoiseSchedule, SCHEDULER | {"_class_name": name})


def test_what_an_absent_entry_of_a_schedule_means():
    assert "beta_schedule='linear'" in refusal(NoiseSchedule, {})
    ours = NoiseSchedule({"beta_schedule": "scaled_linear"})
    assert (ours.spacing, ours.prediction, ours.offset) == ("linspace", "epsilon", 0)
    assert ours.sigmas[[0, 999]].tolist() == pytest.approx([0.0100005, 36.911912], rel=1e-4)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_true_noise_leads_back_to_the_image(sampler):
    image, noise = torch.randn(2, 3, 4, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for spacing in SPACINGS:
        for prediction in ("epsilon", "v_prediction"):
            config = SCHEDULER | {"prediction_type": prediction, "set_alpha_to_one": True}
            ours = NoiseSchedule(config, spacing, sampler)
            _, first, _ = ours.levels(5)[0]
            start = (image + first * noise) / (first**2 + 1) ** 0.5 / ours.init_noise_std(first)

            def predict(x, t):
                sigma = ours.sigma_at(t)
                z = x * (sigma**2 + 1) ** 0.5                    # as Karras et al. scale it
                eps = (z - image) / sigma
                return eps if prediction == "epsilon" else (eps - sigma * image) / (sigma**2 + 1) ** 0.5
            if (spacing, sampler) != ("linspace", "ddim"):       # whose timesteps, in diffusers, do not meet
                torch.testing.assert_close(sample.sample_latents(predict, start, ours, 5), image)


def test_noise_and_targets_are_those_of_the_sampler():
    image, noise = torch.randn(2, 3, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    timesteps = torch.tensor([0, 500, 999])
    for prediction in ("epsilon", "v_prediction"):
        ours = schedule("leading", prediction_type=prediction)
        sigmas = ours.sigmas[timesteps][:, None, None, None]
        scale = (sigmas**2 + 1).sqrt()
        torch.testing.assert_close(ours.add_noise(image, noise, timesteps),
                                   ((image + sigmas * noise) / scale).float())
        target = noise if prediction == "epsilon" else ((noise - sigmas * image) / scale).float()
        torch.testing.assert_close(ours.target(image, noise, timesteps), target)


# ------------------------------------------------------------------------------------------------------------
# Pictures


@pytest.mark.parametrize("name", CASES)
def test_pictures_are_those_of_diffusers(name, tmp_path):
    case = CASES[name]
    ours = load_pipeline(case.bundle(tmp_path), sampler=case.sampler)(
        list(case.PROMPTS), case.negative, case.steps, case.guidance, list(case.SEEDS),
        case.height, case.width)
    stored = load_file(ROOT / "tests" / "answers" / "sample.safetensors")[name].numpy()
    assert pixels(ours).shape == stored.shape and stored.std() > 40
    assert np.abs(pixels(ours) - stored).max() <= 2


@pytest.mark.parametrize("name", CASES)
def test_stored_pictures_are_those_of_the_diffusers_installed(name, tmp_path):
    pytest.importorskip("diffusers")
    from oracle_sample import ANSWERS, draw_pictures
    theirs = draw_pictures(CASES[name], CASES[name].bundle(tmp_path))
    assert (theirs.int() - load_file(ANSWERS)[name].int()).abs().max() <= 1


def test_a_picture_is_the_same_alone_and_in_a_batch(pipeline, monkeypatch):
    noises, sample_latents = [], sample.sample_latents

    def record(predict, noise, *rest):
        noises.append(noise)
        return sample_latents(predict, noise, *rest)

    monkeypatch.setattr(sample, "sample_latents", record)
    prompts, small = [WORDS[i % 7] for i in range(34)], {"steps": 2, "height": 16, "width": 24}
    together = pipeline(prompts, seed=list(range(34)), **small)
    assert [len(noise) for noise in noises] == [32, 2]
    for i in (0, 31, 33):
        alone = pipeline([prompts[i]], seed=i, **small)
        assert torch.equal(noises[-1][0], torch.cat(noises[:2])[i])
        assert np.abs(pixels(alone) - pixels(together[i:i + 1])).max() <= 1
    assert len({image.tobytes() for image in together}) == 34


def test_one_seed_is_for_all_prompts(pipeline):
    prompts = ["a box", "a box"]
    assert same(pipeline(prompts, seed=5, **SMALL), pipeline(prompts, seed=[5, 5], **SMALL))
    for prompts, seeds in ((["a box"], [1, 2]), ([], 0), ([], [])):
        assert "seeds" in refusal(pipeline, prompts, seed=seeds)


def test_the_callback_counts_the_network_calls(pipeline):
    for progress in (None, "a name"):
        calls = []
        pipeline(["a box"] * 33, steps=2, height=16, width=16, progress=progress, callback=calls.append)
        assert calls == [0, 1, 2, 3]  # two batches of two steps


def test_the_default_size_is_the_models_own(pipeline):
    assert pipeline(["a box"], steps=1, width=64)[0].size == (64, 8 * pipeline.unet.config.sample_size)
    assert "100 x 64" in refusal(pipeline, ["a box"], steps=1, width=64, height=100)


def test_the_condition_without_a_prompt(pipeline, tmp_path):
    prompts, text = ["a box", "sky"], pipeline.text
    cond = text(prompts)
    assert all(torch.equal(a, b) for a, b in zip(pipeline.encode(text, prompts, None, 1.0), cond))
    absent, empty = (pipeline.encode(text, prompts, negative, 7.5) for negative in (None, ""))
    for part, zeros, encoded, expected in zip(cond, absent, empty, text([""])):
        assert not zeros[:2].any() and torch.equal(zeros[2:], part)
        assert torch.equal(encoded[0], expected[0]) and torch.equal(encoded[1], expected[0])
        assert torch.equal(encoded[2:], part)
    index = bundle(tmp_path, index={"force_zeros_for_empty_prompt": False})
    other = load_pipeline(index).encode(text, prompts, None, 7.5)
    assert all(torch.equal(a, b) for a, b in zip(other, empty))


def test_each_encoder_pads_as_its_tokenizer_says(pipeline):
    first, second = (tokenizer(["a box"])[0].tolist() for tokenizer in pipeline.text.tokenizers)
    assert len(first) == len(second) == 77 and first[:4] == second[:4]
    assert first[4:] == [first[3]] * 73 and second[4:] == [0] * 73


def test_guidance_1_skips_the_second_half(pipeline):
    sizes = []
    hook = pipeline.unet.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    free = pipeline(["a box", "sky"], guidance=1, **SMALL)
    pipeline(["a box", "sky"], guidance=1.5, **SMALL)
    hook.remove()
    assert sizes == [2] * 3 + [4] * 3
    assert same(free, pipeline(["a box", "sky"], "red", guidance=1, **SMALL))


def test_a_long_prompt_is_cut_with_one_warning(pipeline, capsys):
    words = ["a", "red", "box", "on", "my"] * 15 + ["blue", "sky"] * 200
    capsys.readouterr()
    long = pipeline([" ".join(words)] * 2, seed=[1, 2], **SMALL)
    warning = capsys.readouterr().err
    assert warning.count("warning: ") == 1 and warning.count("\n") == 1
    assert "75" in warning and repr(" ".join(words[75:])) in warning
    assert same(long, pipeline([" ".join(words[:75])] * 2, seed=[1, 2], **SMALL))
    assert capsys.readouterr().err == ""


def test_words_that_a_small_vocabulary_lacks_are_named(pipeline):
    message = refusal(pipeline, ["a Pink box", "my koala"])
    assert "koala, pink" in message and ", ".join(WORDS) in message
    assert "ugly" in refusal(pipeline, ["a box"], negative="ugly")


@pytest.mark.parametrize("upcast, expected", [(True, torch.float32), (False, torch.bfloat16)])
def test_the_vae_is_float32_unless_its_config_says_otherwise(tmp_path, upcast, expected):
    ours = load_pipeline(bundle(tmp_path, vae={"force_upcast": upcast}), dtype=torch.bfloat16)
    seen = []
    ours.vae.decoder.conv_out.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    ours.unet.conv_out.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    images = ours(["a box"], **SMALL)
    assert seen == [torch.bfloat16] * 3 + [expected] and images[0].size == (48, 32)
    assert {p.dtype for p in ours.vae.parameters()} == {expected}
    assert {p.dtype for p in (*ours.unet.parameters(), *ours.text.parameters())} == {torch.bfloat16}


def test_the_unet_alone_is_replaced(pipeline, folder, tmp_path):
    other = bundle(tmp_path, "1b")
    theirs = load_pipeline(other)(["a box"], **SMALL)
    assert not same(theirs, pipeline(["a box"], **SMALL))
    shutil.copytree(other / "unet", tmp_path / "student")
    for unet in (other, other / "unet", str(tmp_path / "student")):
        assert same(load_pipeline(folder, unet)(["a box"], **SMALL), theirs)
    path = tmp_path / "student" / "config.json"
    foreign = model.UNetConfig.from_diffusers(json.loads(path.read_text()) | {"cross_attention_dim": 32})
    model.save_unet(model.UNet(foreign), tmp_path / "student")
    message = refusal(load_pipeline(folder, tmp_path / "student"), ["a box"], **SMALL)
    assert "32" in message and "40" in message  # the widths of its texts


# ------------------------------------------------------------------------------------------------------------
# Memory


def test_low_memory_holds_one_network_at_a_time(pipeline, folder, monkeypatch):
    ours, held, loaded, decoded = load_pipeline(folder, low_memory=True), [], [], []
    for name in ("text", "unet", "vae"):
        def watched(name=name, load=getattr(ours, f"load_{name}")):
            assert not any(network() for network in held), f"{loaded[-1]} is still held when {name} is loaded"
            network = load()
            held.append(weakref.ref(network))
            loaded.append(name)
            if name == "vae":
                network.decoder.register_forward_pre_hook(lambda module, args: decoded.append(len(args[0])))
            return network
        monkeypatch.setattr(ours, f"load_{name}", watched)
    prompts, options = ["a box"] * 33, dict(seed=list(range(33)), steps=1, height=16, width=24)
    images = ours(prompts, **options)
    assert loaded == ["text", "unet", "vae"] and not any(network() for network in held)
    assert decoded == [1] * 33 and (ours.text, ours.unet, ours.vae) == (None, None, None)
    assert np.abs(pixels(images) - pixels(pipeline(prompts, **options))).max() <= 1


# ------------------------------------------------------------------------------------------------------------
# The command line


def test_the_same_command_gives_the_same_bytes(program, folder, tmp_path):
    command = ["--prompt", "a red box", "--model", folder, "--count", "2", "--negative", "", *FLAGS, "--out"]
    for name in ("a.png", "b.png"):
        code, printed, files = program(*command, tmp_path / name)
        assert code == 0 and files == {tmp_path / name}, printed.err
        assert printed.out.count("\n") == 2 and printed.out.endswith(f"{tmp_path / name}\n")
        for part in ("48 x 32", "3 steps", "guidance 7.5", "leading", "seed 0", "fp32"):
            assert part in printed.out, part
        assert "%" in printed.err  # the progress bar
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()

    # The settings in the file are enough to draw it again.
    [settings] = json.loads(Image.open("a.png").text["settings"])
    assert settings["prompt"] == ["a red box"] and settings["guidance"] == 7.5
    assert settings["precision"] == "fp32"
    flags = []
    for name, value in settings.items():
        if value not in (None, False):
            flags += [f"--{name.replace('_', '-')}", *(value if isinstance(value, list) else [str(value)])]
    sample.main([*flags, "--out", "c.png"])
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "c.png").read_bytes()

    program("--prompt", "a red box", "--model", folder, "--seed", "1", "--negative", "", *FLAGS,
            "--out", "d.png")
    second = Image.open("a.png").crop((48, 0, 96, 32))
    assert np.abs(pixels([second]) - pixels([Image.open("d.png")])).max() <= 1


def test_a_column_for_each_model_and_a_row_for_each_prompt_and_seed(program, folder, pipeline, tmp_path):
    other = bundle(tmp_path / "other", "1b")
    program("--prompt", "a box", "my sky", "--model", folder, other, "--count", "2", "--seed", "7", *FLAGS)
    rows = dict(prompts=["a box", "a box", "my sky", "my sky"], seed=[7, 8, 7, 8], **SMALL)
    columns = pipeline(**rows), load_pipeline(other)(**rows)
    picture = Image.open("sample.png")
    assert picture.size == (2 * 48, 4 * 32)
    for x, column in enumerate(columns):
        for y, image in enumerate(column):
            assert picture.crop((48 * x, 32 * y, 48 * x + 48, 32 * y + 32)).tobytes() == image.tobytes()
    assert [entry["model"] for entry in json.loads(picture.text["settings"])] == [[str(folder)], [str(other)]]
    assert image_grid([[column[0] for column in columns]]).tobytes() == picture.crop((0, 0, 96, 32)).tobytes()


def test_the_sampler_and_its_timesteps_are_flags(program, tmp_path):
    case = CASES["sd1"]
    folder = case.bundle(tmp_path / "sd1")
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(path.read_text().replace("EulerDiscreteScheduler", "PNDMScheduler"))
    code, printed, _ = program("--prompt", "a box", "--model", folder, *FLAGS)
    assert code == 0 and "euler (its file has PNDMScheduler), leading" in printed.out
    flags = ["--sampler", "dpm", "--spacing", "trailing"]
    assert "dpm (its file has PNDMScheduler), trailing" in program(
        "--prompt", "a box", "--model", folder, *FLAGS, *flags)[1].out
    ours, = load_pipeline(folder, sampler="dpm", spacing="trailing")(["a box"], **SMALL)
    assert Image.open("sample.png").tobytes() == ours.tobytes()


def test_a_unet_for_inpainting_is_refused(tmp_path):
    folder = bundle(tmp_path, "sd1")
    config = model.UNetConfig.from_diffusers(json.loads((folder / "unet" / "config.json").read_text()))
    model.save_unet(model.UNet(replace(config, in_channels=9)), folder / "unet")
    assert "9 channels" in refusal(load_pipeline(folder), ["a box"], **SMALL)


def test_one_model_has_a_column_for_each_seed(program, folder, pipeline):
    program("--prompt", "a box", "my sky", "--model", folder, "--count", "3", "--seed", "7", *FLAGS)
    images = pipeline(prompts=["a box"] * 3 + ["my sky"] * 3, seed=[7, 8, 9] * 2, **SMALL)
    assert Image.open("sample.png").tobytes() == image_grid([images[:3], images[3:]]).tobytes()


def test_all_columns_have_the_size_of_the_first(program, folder, pipeline, tmp_path):
    other = shutil.copytree(folder, tmp_path / "other")
    config = json.loads((other / "unet" / "config.json").read_text())
    (other / "unet" / "config.json").write_text(json.dumps(config | {"sample_size": 4}))
    assert program("--prompt", "a box", "--model", other, folder, "--steps", "1")[0] == 0
    picture = Image.open("sample.png")
    assert picture.size == (64, 32)
    second = pipeline(["a box"], steps=1, height=32, width=32)
    assert picture.crop((32, 0, 64, 32)).tobytes() == second[0].tobytes()


PROMPT = ("--prompt", "a box")


@pytest.mark.parametrize("args, named", [
    ([*PROMPT, "--stesp", "3"], "--stesp"),
    ([*PROMPT, "--step", "3"], "--step"),  # flags are not abbreviated
    ([*PROMPT, "--steps", "0"], "--steps"), ([*PROMPT, "--steps", "2.5"], "--steps"),
    ([*PROMPT, "--guidance", "nan"], "--guidance"), ([*PROMPT, "--guidance", "0.5"], "--guidance"),
    ([*PROMPT, "--guidance", "inf"], "--guidance"),
    ([*PROMPT, "--height", "100"], "96 or 104"), ([*PROMPT, "--width", "0"], "--width"),
    ([*PROMPT, "--seed", "-1"], "--seed"), ([*PROMPT, "--seed", "9" * 400], "--seed"),
    ([*PROMPT, "--count", "0"], "--count"), ([*PROMPT, "--precision", "int8"], "--precision"),
    ([*PROMPT, "--model", "700M"], "700M"), ([*PROMPT, "--model", "m" * 300], "--model"),
    ([*PROMPT, "--unet", "700M"], "--unet"), ([*PROMPT, "--unet", "toy", "--model", "toy", "1b"], "--unet"),
    ([*PROMPT, "--out", "picture.jpg"], "picture.jpg"), ([*PROMPT, "--out", ""], "--out"),
    ([*PROMPT, "--device", " "], "--device"),
    (["--prompt"], "--prompt"), (["--prompt", "a box", " "], "--prompt"), ([], "--prompt"),
])
def test_a_bad_command_line_is_one_line(program, args, named):
    code, printed, files = program(*args)
    assert code == 2 and printed.err.startswith("error: ") and named in printed.err and not files
    assert printed.err.count("\n") == 1 and printed.out == ""


def test_an_output_that_cannot_be_written_is_reported_first(program, tmp_path, monkeypatch):
    monkeypatch.setattr(model, "load_unet", None)
    (tmp_path / "file").touch()
    (tmp_path / "folder.png").mkdir()
    for out in ("missing/x.png", "file/x.png", "/proc/x.png", "folder.png"):
        code, printed, _ = program(*PROMPT, "--out", out)
        assert code == 2 and "--out" in printed.err and str(Path(out).parent) in printed.err
        assert printed.err.count("\n") == 1
    (tmp_path / "sample.png").mkdir()  # the default
    assert program(*PROMPT)[0] == 2


def error_of(result, expected: int = 1) -> str:
    """The one line of a program that failed, and wrote no file."""
    code, printed, files = result
    error = printed.err.splitlines()[-1]
    assert code == expected and error.startswith("error: ") and not files
    assert printed.err.count("error: ") == 1 and "Traceback" not in printed.err
    return error


@pytest.mark.parametrize("path", [
    "model_index.json", "scheduler/scheduler_config.json", "vae/config.json", "unet/config.json",
    "text_encoder/config.json", "text_encoder_2/model.safetensors", "tokenizer/merges.txt",
    "tokenizer_2/vocab.json", f"vae/{FILE}"])
def test_a_missing_file_is_named(folder, tmp_path, path):
    broken = shutil.copytree(folder, tmp_path / "broken")
    (broken / path).unlink()
    message = refusal(load_pipeline, broken)
    assert (broken / path).name in message and str((broken / path).parent) in message


def test_damaged_weights_are_named(program, folder, tmp_path):
    broken = shutil.copytree(folder, tmp_path / "broken")
    weights = broken / "text_encoder_2" / "model.safetensors"
    tensors = load_file(weights)
    del tensors["text_projection.weight"]
    save_file(tensors, weights)
    error = error_of(program(*PROMPT, "--model", broken))
    assert str(weights.parent) in error and "text_projection.weight" in error
    weights.write_bytes((folder / "text_encoder_2" / "model.safetensors").read_bytes()[:-8])
    assert str(weights) in error_of(program(*PROMPT, "--model", broken))
    weights.write_text("version https://git-lfs.github.com/spec/v1")
    assert "git-lfs" in error_of(program(*PROMPT, "--model", broken))


@pytest.mark.parametrize("path, key, value", [
    ("scheduler/scheduler_config.json", "use_karras_sigmas", True),
    ("scheduler/scheduler_config.json", "beta_start", "x"),
    ("scheduler/scheduler_config.json", "beta_start", -1.0),
    ("scheduler/scheduler_config.json", "steps_offset", None),
    ("unet/config.json", "norm_num_groups", 0), ("unet/config.json", "norm_num_groups", 7),
    ("unet/config.json", "attention_head_dim", [3, 3, 5]), ("unet/config.json", "sample_size", None),
    ("unet/config.json", "layers_per_block", 0), ("unet/config.json", "block_out_channels", []),
    ("unet/config.json", "block_out_channels", ["32", "64", "96"]),
    ("unet/config.json", "cross_attention_dim", 10**9),
    ("vae/config.json", "norm_num_groups", 0), ("vae/config.json", "scaling_factor", None),
    ("vae/config.json", "scaling_factor", float("inf")),
    ("text_encoder/config.json", "num_attention_heads", 3), ("text_encoder/config.json", "hidden_act", []),
    ("text_encoder_2/config.json", "eos_token_id", None),
    ("tokenizer/tokenizer_config.json", "model_max_length", None),
    ("tokenizer_2/tokenizer_config.json", "model_max_length", 0),
    ("tokenizer/special_tokens_map.json", "bos_token", None),
    ("tokenizer_2/special_tokens_map.json", "pad_token", ""),
    ("preset.json", "steps", 0), ("preset.json", "guidance", 0.5), ("preset.json", "guidance", float("inf")),
    ("preset.json", "spacing", "foo"), ("preset.json", "sampler", "foo")])
def test_bad_values_are_reported(folder, tmp_path, path, key, value):
    broken = shutil.copytree(folder, tmp_path / "broken")
    old = json.loads((broken / path).read_text()) if (broken / path).exists() else {}
    (broken / path).write_text(json.dumps(old | {key: value}))
    assert Path(path).name.replace("special_tokens_map", "tokenizer_config") in refusal(load_pipeline, broken)


def test_a_model_that_is_nowhere(program, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert "etri-vilab/koala-700m" in error_of(program(*PROMPT, "--model", "700m"))
    assert "/no/folder" in error_of(program(*PROMPT, "--model", "/no/folder"))


def test_unknown_words_and_devices(program, folder):
    assert "pink" in error_of(program("--prompt", "a pink box", "--model", folder))
    for device in ("meta:x", "meta", *["cuda"] * (not torch.cuda.is_available())):
        assert device in error_of(program(*PROMPT, "--model", folder, "--device", device))


def test_a_picture_that_is_not_finite_is_not_saved(program, tmp_path):
    broken = bundle(tmp_path / "broken", vae={"scaling_factor": 1e-39})
    assert "not finite" in error_of(program(*PROMPT, "--model", broken, *FLAGS))


@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), MemoryError(),
    RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: 8 bytes."),
    RuntimeError("could not create a primitive")])
def test_out_of_memory_says_what_to_lower(program, folder, monkeypatch, error):
    def load_unet(*args):
        raise error
    monkeypatch.setattr(model, "load_unet", load_unet)
    error = error_of(program(*PROMPT, "--model", folder))
    assert "out of memory" in error and "--low-memory" in error


def test_words_that_are_not_utf8_are_refused(program, tmp_path):
    for flags in (["--prompt", "a \udcff"], [*PROMPT, "--negative", "\udcff"],
                  [*PROMPT, "--out", f"{tmp_path}/\udcff.png"]):
        assert "UTF-8" in error_of(program(*flags), 2)


def test_an_error_of_the_compiler_is_one_line(program, folder, monkeypatch):
    def load_unet(*args):
        raise torch._dynamo.exc.TorchDynamoException("no C++ compiler\nmore")
    monkeypatch.setattr(model, "load_unet", load_unet)
    assert "--compile: no C++ compiler;" in error_of(program(*PROMPT, "--model", folder))


def test_escapes_in_names_do_not_reach_the_screen(program, folder, monkeypatch):
    def load_unet(*args):
        raise ValueError("\x1b[31mred")
    monkeypatch.setattr(model, "load_unet", load_unet)
    assert "error: ?[31mred" in error_of(program(*PROMPT, "--model", folder))


def test_a_bug_keeps_its_traceback(program, folder, monkeypatch):
    def load_unet(*args):
        raise RuntimeError("shapes cannot be multiplied")
    monkeypatch.setattr(model, "load_unet", load_unet)
    with pytest.raises(RuntimeError, match="multiplied"):
        program(*PROMPT, "--model", folder)


def test_an_interrupt_leaves_nothing(program, folder, monkeypatch):
    monkeypatch.setattr(model.UNet, "forward", lambda *args: signal.raise_signal(signal.SIGINT))
    code, printed, files = program(*PROMPT, "--model", folder, *FLAGS)
    assert code == 130 and not files and "Traceback" not in printed.err


def test_a_start_imports_neither_transformers_nor_the_compiler(tmp_path):
    code = (f"import runpy, sys; sys.path.insert(0, {str(ROOT)!r})\n"
            f"sys.argv = ['sample.py', '--prompt', 'a red circle', '--steps', '1', '--out', 'x.png']\n"
            f"try: runpy.run_path({str(ROOT / 'sample.py')!r}, run_name='__main__')\n"
            f"except SystemExit as exit: assert not exit.code, exit.code\n"
            f"print({{'transformers', 'torch._dynamo', 'diffusers', 'huggingface_hub'}} & set(sys.modules))")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0 and (tmp_path / "x.png").exists(), done.stderr
    assert done.stdout.splitlines()[-1] == "set()"  # they would take most of the time of a start


def test_help_fits_a_screen(program, monkeypatch):
    monkeypatch.setenv("COLUMNS", "110")
    code, printed, _ = program("--help")
    lines = printed.out.splitlines()
    assert code == 0 and len(lines) <= 40 and max(map(len, lines)) <= 110
    assert "None" not in printed.out and printed.out.count("[toy]") == 1


@pytest.mark.parametrize("text", [
    "{", "[]", '{"step": 3}', '{"steps": "x"}', '{"guidance": null}', "[" * 100_000])
def test_a_broken_preset_is_named(text, tmp_path):
    (tmp_path / "preset.json").write_text(text)
    assert str(tmp_path / "preset.json") in refusal(preset, str(tmp_path))


def test_presets(tmp_path):
    for name in ("lightning-700m", "etri-vilab/koala-lightning-700m"):
        assert preset(name)[1:5] == (10, 3.5, "trailing", "euler")
    assert preset("toy") == preset(ROOT / "toy" / "checkpoint") and preset(tmp_path)[1:5] == (25, 7.5, None, "euler")
    (tmp_path / "preset.json").write_text('{"steps": 4, "guidance": 2, "spacing": "trailing"}')
    assert preset(tmp_path) == (str(tmp_path), 4, 2.0, "trailing", "euler", None)


def test_a_preset_may_be_a_student_of_another(tmp_path, monkeypatch):
    """As the toy's students are: a U-Net alone, drawn with all else of its teacher."""
    teacher, other = bundle(tmp_path / "teacher"), bundle(tmp_path / "other", "1b")
    student = shutil.copytree(other / "unet", tmp_path / "student")
    monkeypatch.setitem(PRESETS, "small", Preset(str(teacher), student=str(student)))
    expected = load_pipeline(teacher, student)(["a box"], **SMALL)
    assert same(load_pipeline("small")(["a box"], **SMALL), expected)
    assert same(load_pipeline(other, "small")(["a box"], **SMALL), load_pipeline(other)(["a box"], **SMALL))
    assert read_configs("small")[2] == model.load_unet(student).config
