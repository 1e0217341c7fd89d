"""Samplers and pictures are those of diffusers, schedules are what they say, and so is the command line."""

import json
import runpy
import shutil
import sys
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from common import ANSWERS, CASES, FILE, SCHEDULER, WORDS, bundle, draw, fill, refusal, relative_error
from PIL import Image
from safetensors.torch import load_file

import model
import oracle
import sample
from sample import NoiseSchedule, load_pipeline
from support.hub import PRESETS, SAMPLERS, SPACINGS, Preset, preset
from support.plots import image_grid

ROOT = Path(__file__).parents[1]
SMALL = {"steps": 3, "height": 32, "width": 48}
FLAGS = ["--steps", "3", "--height", "32", "--width", "48"]
PROMPT = ["--prompt", "a box"]
STORED = load_file(ANSWERS.with_name("sample.safetensors"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return bundle(tmp_path_factory.mktemp("bundle"))


@pytest.fixture(scope="module")
def pipeline(folder):
    return load_pipeline(folder)


@pytest.fixture
def program(tmp_path, monkeypatch, capsys):
    """Runs the command line as a process would: its exit code, its output and error, the files it wrote."""
    monkeypatch.chdir(tmp_path)

    def run(*args):
        before = {*tmp_path.iterdir()}
        monkeypatch.setattr(sys, "argv", ["sample.py", *map(str, args)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit:
            runpy.run_path(str(ROOT / "sample.py"), run_name="__main__")
        code, (out, err) = exit.value.code or 0, capsys.readouterr()
        if isinstance(code, str):  # Python prints it
            code, err = 1, code + "\n"
        return code, out, err, {*tmp_path.iterdir()} - before
    return run


def pixels(images) -> np.ndarray:
    return np.stack([np.asarray(image) for image in images]).astype(int)


def same(a: list, b: list) -> bool:
    return len(a) == len(b) and all(x.tobytes() == y.tobytes() for x, y in zip(a, b))


# ------------------------------------------------------------------------------------------------------------
# Noise


def schedule(spacing: str | None = None, sampler: str = "euler", **entries) -> NoiseSchedule:
    return NoiseSchedule(SCHEDULER | entries, spacing, sampler)


def test_the_noise_of_each_timestep():
    ours = schedule()
    assert ours.sigmas[[0, 999]].tolist() == pytest.approx([0.029167, 14.614641], abs=6e-7)
    assert ours.alpha_t[[0, 999]].tolist() == pytest.approx([0.999575, 0.068265], abs=1e-6)
    assert ours.sigma_t[[0, 999]].tolist() == pytest.approx([0.029155, 0.997667], abs=1e-6)
    image, noise = draw("image", 2, 4, 2, 2), draw("noise", 2, 4, 2, 2)
    timesteps = torch.tensor([0, 999])
    alpha, sigma = (x[timesteps][:, None, None, None] for x in (ours.alpha_t, ours.sigma_t))
    torch.testing.assert_close(ours.add_noise(image, noise, timesteps), alpha * image + sigma * noise)
    assert torch.equal(ours.target(image, noise, timesteps), noise)
    v = schedule(prediction_type="v_prediction").target(image, noise, timesteps)
    torch.testing.assert_close(v, alpha * noise - sigma * image)


@pytest.mark.parametrize("spacing, steps, first, last, sigmas, scale", [
    ("leading", 25, [961, 921], [41, 1], [11.67605, 0.04131], 11.71879),
    ("trailing", 10, [999, 899], [199, 99], [14.61464, 0.34167], 14.61464),
    ("trailing", 25, [999, 959], [79, 39], [14.61464, 0.19630], 14.61464),
    ("linspace", 10, [999, 888], [111, 0], [14.61464, 0.02917], 14.61464),
    ("linspace", 7, [999, 832.5], [166.5, 0], [14.61464, 0.02917], 14.61464)])
def test_timesteps_and_sigmas(spacing, steps, first, last, sigmas, scale):
    noise = schedule(spacing)
    timesteps, ours, following = zip(*noise.levels(steps))
    assert len(timesteps) == steps and [*timesteps[:2]] == first and [*timesteps[-2:]] == last
    assert following == (*ours[1:], 0) and [*ours] == sorted(ours, reverse=True)
    assert [ours[0], ours[-1]] == pytest.approx(sigmas, abs=6e-6)
    # As diffusers scales it, before it divides by sqrt(sigma^2 + 1).
    assert noise.init_noise_std(ours[0]) * (ours[0]**2 + 1)**0.5 == pytest.approx(scale, abs=6e-6)


def predict(x: torch.Tensor, t: float) -> torch.Tensor:
    return (0.9 * x + 0.3 * x.flip(2) + 0.2 * x.flip(3).tanh()) * (1 - t / 3000)


def theirs_and_ours(sampler: str, steps: int, config: dict) -> float:
    """The relative difference between what diffusers' scheduler and ours lead to, from the same noise."""
    theirs = oracle.scheduler(sampler, config)
    theirs.set_timesteps(steps)
    noise = draw("noise", 2, 4, 6, 5)
    latents = noise * theirs.init_noise_sigma
    for t in theirs.timesteps:
        latents = theirs.step(predict(theirs.scale_model_input(latents, t), float(t)), t, latents).prev_sample
    ours = sample.sample_latents(predict, noise, NoiseSchedule(config, sampler=sampler), steps)
    return relative_error(ours, latents)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_samplers_are_those_of_diffusers(spacing, prediction, sampler):
    pytest.importorskip("diffusers")
    config = SCHEDULER | {"timestep_spacing": spacing, "prediction_type": prediction}
    for steps, entries in ((1, {}), (3, {"steps_offset": 0}), (25, {}), (7, {"set_alpha_to_one": True})):
        assert theirs_and_ours(sampler, steps, config | entries) < 2e-5, (steps, entries)
    if (spacing, prediction) == ("trailing", "v_prediction"):  # a first input that is all noise needs both
        assert theirs_and_ours(sampler, 30, config | {"rescale_betas_zero_snr": True}) < 2e-3


@pytest.mark.parametrize("sampler, spacing", [
    ("euler", "linspace"), ("ddim", "leading"), ("dpm", "linspace")])
def test_an_absent_entry_has_the_default_of_the_samplers_class(sampler, spacing):
    """Not of the class that the file is of."""
    config = {"_class_name": "PNDMScheduler", "beta_schedule": "scaled_linear", "clip_sample": False}
    ours = NoiseSchedule(config, sampler=sampler)
    assert (ours.spacing, ours.prediction, ours.offset, ours.last_sigma) == (spacing, "epsilon", 0, 0)
    assert ours.sigmas[[0, 999]].tolist() == pytest.approx([0.0100005, 36.911912], rel=1e-4)
    assert "beta_schedule='linear'" in refusal(NoiseSchedule, {}, sampler=sampler)
    pytest.importorskip("diffusers")
    assert theirs_and_ours(sampler, 7, config) < 2e-5


@pytest.mark.parametrize("entries, readers", [
    ({"solver_order": 3}, ["dpm"]), ({"algorithm_type": "sde-dpmsolver++"}, ["dpm"]),
    ({"solver_type": "heun"}, ["dpm"]), ({"lower_order_final": False}, ["dpm"]),
    ({"clip_sample": True}, ["ddim"]), ({"thresholding": True}, ["ddim", "dpm"]),
    ({"use_karras_sigmas": True}, ["euler", "dpm"]), ({"final_sigmas_type": "sigma_min"}, ["euler", "dpm"]),
    ({"timestep_type": "continuous"}, ["euler"])], ids=lambda value: " ".join(value))
def test_what_is_not_implemented_is_refused_by_the_sampler_that_reads_it(entries, readers):
    for sampler in SAMPLERS:
        ours = schedule(None, sampler, **entries)
        ours.add_noise(torch.ones(1, 4, 2, 2), torch.ones(1, 4, 2, 2), torch.tensor([5]))  # training goes on
        if sampler in readers:
            assert next(iter(entries)) in refusal(ours.levels, 5)
        else:
            assert ours.levels(5) == schedule(None, sampler).levels(5)
    if entries == {"clip_sample": True}:
        config = {key: value for key, value in SCHEDULER.items() if key != "clip_sample"}
        assert "clip_sample" in refusal(NoiseSchedule(config, sampler="ddim").levels, 5)  # as it is absent


@pytest.mark.parametrize("entry", [
    {"beta_schedule": "linear"}, {"num_train_timesteps": 500}, {"trained_betas": [0.1]},
    {"prediction_type": "sample"}, {"timestep_spacing": "other"}, {"_class_name": "LCMScheduler"},
    {"_class_name": "EDMEulerScheduler"}, {"_class_name": "FlowMatchEulerDiscreteScheduler"}], ids=str)
def test_another_noise_or_prediction_is_refused_at_once(entry):
    [(key, value)] = entry.items()
    assert f"{value!r}" in refusal(NoiseSchedule, SCHEDULER | entry)


def test_dpm_with_too_many_steps():
    assert "fewer" in refusal(schedule("linspace", "dpm").levels, 1000)
    assert len(schedule("trailing", "dpm").levels(1000)) == 1000


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_true_noise_leads_back_to_the_image(sampler):
    image, noise = draw("image", 2, 3, 4, 8, 8).double()
    for spacing in SPACINGS:
        for prediction in ("epsilon", "v_prediction"):
            ours = schedule(spacing, sampler, prediction_type=prediction, set_alpha_to_one=True)
            _, first, _ = ours.levels(5)[0]
            start = (image + first * noise) / (first**2 + 1) ** 0.5 / ours.init_noise_std(first)

            def predict(x, t):
                sigma = ours.sigma_at(t)
                z = x * (sigma**2 + 1) ** 0.5                    # as Karras et al. scale it
                eps = (z - image) / sigma
                return eps if prediction == "epsilon" else (eps - sigma * image) / (sigma**2 + 1) ** 0.5
            if (spacing, sampler) != ("linspace", "ddim"):       # whose timesteps, in diffusers, do not meet
                torch.testing.assert_close(sample.sample_latents(predict, start, ours, 5), image)


# ------------------------------------------------------------------------------------------------------------
# Pictures


def distance(name: str, folder: Path) -> int:
    """The largest difference of a pixel between what we draw for a case and what diffusers drew."""
    case, stored = CASES[name], STORED[name].numpy()
    ours = pixels(load_pipeline(folder, sampler=case.sampler)(
        [*case.PROMPTS], case.negative, case.steps, case.guidance, [*case.SEEDS], case.height, case.width))
    assert ours.shape == stored.shape and stored.std() > 40
    return np.abs(ours - stored).max()


@pytest.mark.parametrize("name", CASES)
def test_pictures_are_those_of_diffusers(name, tmp_path):
    assert distance(name, CASES[name].bundle(tmp_path)) <= 2


def test_stored_pictures_are_those_of_the_diffusers_installed(tmp_path):
    pytest.importorskip("diffusers")
    theirs = oracle.draw_pictures(CASES["1b"], CASES["1b"].bundle(tmp_path))
    assert (theirs.int() - STORED["1b"].int()).abs().max() <= 1


def test_stable_diffusion_overrides_its_file(tmp_path):
    """As diffusers' pipeline does; SDXL's does not."""
    entries = {"steps_offset": 0, "clip_sample": True}
    assert distance("sd1", bundle(tmp_path / "sd1", "sd1", entries)) <= 2
    xl = load_pipeline(bundle(tmp_path / "xl", scheduler=entries), sampler="ddim")
    assert xl.schedule.offset == 0 and "clip_sample" in refusal(xl, ["a box"], **SMALL)


def test_a_picture_is_the_same_alone_and_in_a_batch(pipeline):
    prompts, small, calls = [WORDS[i % 7] for i in range(34)], {"steps": 2, "height": 16, "width": 24}, []
    together = pipeline(prompts, seed=list(range(34)), **small, progress="a name", callback=calls.append)
    assert calls == [0, 1, 2, 3]  # two batches of two steps
    for i in (0, 31, 33):
        alone = pipeline([prompts[i]], seed=i, **small)
        assert np.abs(pixels(alone) - pixels(together[i:i + 1])).max() <= 1
    assert len({image.tobytes() for image in together}) == 34
    one_seed = pipeline(["a box"] * 2, seed=5, **small)
    assert same(one_seed, pipeline(["a box"] * 2, seed=[5, 5], **small)) and same(one_seed[:1], one_seed[1:])
    for prompts, seeds in ((["a box"], [1, 2]), ([], 0)):
        assert "seeds" in refusal(pipeline, prompts, seed=seeds)


def test_the_default_size_is_the_models_own(pipeline):
    assert pipeline(["a box"], steps=1, width=64)[0].size == (64, 8 * pipeline.unet.config.sample_size)
    assert "100 x 64" in refusal(pipeline, ["a box"], steps=1, width=64, height=100)


def test_guidance_compares_with_no_prompt_or_is_off(pipeline, tmp_path):
    prompts, text, sizes = ["a box", "sky"], pipeline.text, []
    cond = text(prompts)
    absent, empty = (pipeline.encode(text, prompts, negative, 7.5) for negative in (None, ""))
    for part, zeros, encoded, expected in zip(cond, absent, empty, text([""])):
        assert not zeros[:2].any() and torch.equal(zeros[2:], part)
        assert torch.equal(encoded[0], expected[0]) and torch.equal(encoded[1], expected[0])
    other = load_pipeline(bundle(tmp_path, index={"force_zeros_for_empty_prompt": False}))
    assert all(map(torch.equal, other.encode(text, prompts, None, 7.5), empty))
    hook = pipeline.unet.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    free = pipeline(prompts, guidance=1, **SMALL)
    assert same(free, pipeline(prompts, "red", guidance=0, **SMALL))
    assert not same(free, pipeline(prompts, guidance=1.5, **SMALL))
    hook.remove()
    assert sizes == [2] * 6 + [4] * 3


@pytest.mark.parametrize("upcast, expected", [(True, torch.float32), (False, torch.bfloat16)])
def test_the_vae_is_float32_unless_its_config_says_otherwise(tmp_path, upcast, expected):
    ours = load_pipeline(bundle(tmp_path, vae={"force_upcast": upcast}), dtype=torch.bfloat16)
    assert ours(["a box"], **SMALL)[0].size == (48, 32)
    assert {p.dtype for p in ours.vae.parameters()} == {expected}
    assert {p.dtype for p in (*ours.unet.parameters(), *ours.text.parameters())} == {torch.bfloat16}


def test_the_unet_alone_is_replaced(pipeline, folder, tmp_path, monkeypatch):
    other = bundle(tmp_path / "other", "1b")
    theirs, unet = load_pipeline(other)(["a box"], **SMALL), other / "unet"
    assert not same(theirs, pipeline(["a box"], **SMALL))
    monkeypatch.setitem(PRESETS, "small", Preset(str(folder), student=str(unet)))  # as the toy's students are
    for pipeline in (load_pipeline(folder, other), load_pipeline(folder, str(unet)), load_pipeline("small")):
        assert same(pipeline(["a box"], **SMALL), theirs)
    config = model.load_unet(unet).config
    for entry, words in (({"context_dim": 32}, ("32", "40")), ({"in_channels": 9}, ("9 channels",))):
        model.save_unet(fill(model.UNet(replace(config, **entry))), tmp_path / "foreign")
        message = refusal(load_pipeline(folder, tmp_path / "foreign"), ["a box"], **SMALL)
        assert all(word in message for word in words)


def test_low_memory_holds_one_network_at_a_time(pipeline, folder, monkeypatch):
    ours, held, loaded, decoded = load_pipeline(folder, low_memory=True), [], [], []
    for name in ("text", "unet", "vae"):
        def watched(name=name, load=getattr(ours, f"load_{name}")):
            assert not any(network() for network in held), f"{loaded[-1]} is still held when {name} is loaded"
            network = load()
            held.append(weakref.ref(network))
            loaded.append(name)
            if name == "vae":
                network.decoder.register_forward_pre_hook(lambda module, args: decoded.append(args[0].shape))
            return network
        monkeypatch.setattr(ours, f"load_{name}", watched)
    prompts, options = ["a box"] * 2, dict(seed=[1, 2], steps=1, height=16, width=600)
    images = ours(prompts, **options)
    assert loaded == ["text", "unet", "vae"] and not any(network() for network in held)
    assert decoded == [(1, 4, 2, 64)] * 4 and images[0].size == (600, 16)  # in tiles, one picture at a time
    whole = pipeline(prompts, **options)
    assert np.abs(pixels(images) - pixels(whole)).mean() < 0.1 * pixels(whole).std()


# ------------------------------------------------------------------------------------------------------------
# The command line


def test_the_same_command_gives_the_same_bytes(program, folder, tmp_path):
    command = ["--prompt", "a red box", "--model", folder, "--count", "2", "--negative", "", *FLAGS, "--out"]
    for name in ("a.png", "B.PNG"):
        code, out, err, files = program(*command, tmp_path / name)
        assert code == 0 and files == {tmp_path / name} and out.endswith(f"{tmp_path / name}\n"), err
        assert all(part in out for part in ("48 x 32", "3 steps", "guidance 7.5", "leading", "seed 0"))
    assert Path("a.png").read_bytes() == Path("B.PNG").read_bytes()

    # The settings in the file are enough to draw it again.
    [settings] = json.loads(Image.open("a.png").text["settings"])
    flags = []
    for name, value in settings.items():
        if value not in (None, False):
            flags += [f"--{name.replace('_', '-')}", *(value if isinstance(value, list) else [str(value)])]
    sample.main([*flags, "--out", "c.png"])
    assert Path("a.png").read_bytes() == Path("c.png").read_bytes()
    program("--prompt", "a red box", "--model", folder, "--guidance", "0", *FLAGS, "--out", "d.png")
    assert json.loads(Image.open("d.png").text["settings"])[0]["guidance"] == 0


def test_columns_and_rows(program, folder, pipeline, tmp_path):
    other = bundle(tmp_path / "other", "1b")
    flags = ["--prompt", "a box", "my sky", "--count", "2", "--seed", "7", *FLAGS, "--model", folder]
    program(*flags)
    rows = dict(prompts=["a box", "a box", "my sky", "my sky"], seed=[7, 8, 7, 8], **SMALL)
    ours, theirs = pipeline(**rows), load_pipeline(other)(**rows)
    assert Image.open("sample.png").tobytes() == image_grid([ours[:2], ours[2:]]).tobytes()
    program(*flags, other)
    picture = Image.open("sample.png")
    assert picture.tobytes() == image_grid([list(row) for row in zip(ours, theirs)]).tobytes()
    assert picture.crop((48, 32, 96, 64)).tobytes() == theirs[1].tobytes()
    assert [entry["model"] for entry in json.loads(picture.text["settings"])] == [[str(folder)], [str(other)]]
    config = json.loads((other / "unet" / "config.json").read_text()) | {"sample_size": 4}
    (other / "unet" / "config.json").write_text(json.dumps(config))
    program(*PROMPT, "--model", other, folder, "--steps", "1")
    assert Image.open("sample.png").size == (64, 32)  # all columns have the size of the first


def test_the_sampler_and_its_timesteps_are_flags(program, tmp_path):
    folder = bundle(tmp_path / "sd1", "sd1", {"_class_name": "PNDMScheduler"})
    assert "euler (its file has PNDMScheduler), leading" in program(*PROMPT, "--model", folder, *FLAGS)[1]
    flags = ["--sampler", "dpm", "--spacing", "trailing"]
    out = program(*PROMPT, "--model", folder, *FLAGS, *flags)[1]
    assert "dpm (its file has PNDMScheduler), trailing" in out
    ours, = load_pipeline(folder, sampler="dpm", spacing="trailing")(["a box"], **SMALL)
    assert Image.open("sample.png").tobytes() == ours.tobytes()


@pytest.mark.parametrize("line", [
    "--stesp 3", "--step 3", "--steps 0", "--steps 2.5", "--guidance nan", "--guidance -1", "--guidance inf",
    "--height 100", "--width 0", "--seed -1", f"--seed {'9' * 400}", "--count 0", "--precision int8",
    "--model 700M", f"--model {'m' * 300}", "--unet 700M", "--unet toy --model toy 1b", "--out picture.jpg",
    "--out ", "--out missing/x.png", "--out file/x.png", "--out folder.png", "--device  ", "--prompt",
    "--prompt "])
def test_a_bad_command_line_is_one_line(program, tmp_path, line, monkeypatch):
    (tmp_path / "file").touch()
    (tmp_path / "folder.png").mkdir()
    monkeypatch.setattr(model, "load_unet", None)  # nothing is loaded before
    code, out, err, files = program(*PROMPT, *line.split(" "))
    assert code == 2 and err.startswith("error: ") and err.count("\n") == 1 and out == "" and not files
    assert line.split(" ")[0].lstrip("-") in err


@pytest.mark.parametrize("path", [
    "model_index.json", "scheduler/scheduler_config.json", "vae/config.json", f"unet/{FILE}",
    "text_encoder_2/model.safetensors"])
def test_a_missing_file_is_named(folder, tmp_path, path):
    broken = shutil.copytree(folder, tmp_path / "broken")
    (broken / path).unlink()
    assert str((broken / path).parent) in refusal(load_pipeline, broken)


def test_what_the_world_lacks_is_one_line(program, folder, tmp_path, monkeypatch):
    def error(*flags) -> str:
        code, _, err, files = program(*PROMPT, *FLAGS, *flags)
        assert code == 1 and err.startswith("error: ") and err.count("\n") == 1 and not files
        return err

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert "etri-vilab/koala-700m" in error("--model", "700m")
    assert "/no/folder" in error("--model", "/no/folder")
    assert "pink" in error("--model", folder, "--negative", "pink")
    assert "meta:x" in error("--model", folder, "--device", "meta:x")
    assert "not finite" in error("--model", bundle(tmp_path / "broken", vae={"scaling_factor": 1e-39}))
    monkeypatch.setattr(model, "load_unet", lambda *args: torch.empty(2**60))
    assert "--low-memory" in error("--model", folder)


def test_presets(tmp_path):
    for name in ("lightning-700m", "etri-vilab/koala-lightning-700m"):
        assert preset(name)[1:5] == (10, 3.5, "trailing", "euler")
    assert preset("toy") == preset(ROOT / "toy" / "checkpoint")
    assert preset(tmp_path)[1:5] == (25, 7.5, None, "euler")
    (tmp_path / "preset.json").write_text('{"steps": 4, "guidance": 2, "spacing": "trailing"}')
    assert preset(tmp_path) == (str(tmp_path), 4, 2.0, "trailing", "euler", None)
