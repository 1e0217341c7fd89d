"""Samplers and pictures are those of diffusers, schedules are what they say, and so is the command line."""

import json
import shutil
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from common import ANSWERS, CASES, SCHEDULER, bundle, draw, fill, refusal, relative_error
from PIL import Image
from safetensors.torch import load_file

import model
import oracle
import sample
from sample import NoiseSchedule, load_pipeline
from support.files import write_json
from support.hub import PRESETS, SAMPLERS, SPACINGS, Preset
from support.plots import image_grid

SMALL = {"steps": 3, "height": 32, "width": 48}
FLAGS = ["--steps", 3, "--height", 32, "--width", 48]
STORED = load_file(ANSWERS.with_name("sample.safetensors"))


@pytest.fixture(scope="module")
def pipeline(small):
    return load_pipeline(small["700m"])


@pytest.fixture
def changed(small, tmp_path):
    """Copies the model with other entries in one of its files."""
    def changed(name: str, **entries) -> Path:
        copy = shutil.copytree(small["700m"], tmp_path / "changed", dirs_exist_ok=True)
        write_json(copy / name, model.read_json(copy / name) | entries)
        return copy
    return changed


@pytest.fixture
def program(program, tmp_path, monkeypatch):
    """Runs sample.py in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    return lambda *flags: program("sample.py", "--prompt", "a box", *flags)


def pixels(images) -> np.ndarray:
    return np.stack([np.asarray(image) for image in images]).astype(int)


# Noise


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
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_samplers_are_those_of_diffusers(spacing, sampler):
    pytest.importorskip("diffusers")
    for prediction in ("epsilon", "v_prediction"):
        config = SCHEDULER | {"timestep_spacing": spacing, "prediction_type": prediction}
        for steps, entries in ((1, {}), (3, {"steps_offset": 0}), (25, {}), (7, {"set_alpha_to_one": True})):
            error = theirs_and_ours(sampler, steps, config | entries)
            assert error < 2e-5, (prediction, steps, entries)


@pytest.mark.parametrize("sampler, spacing", [
    ("euler", "linspace"), ("ddim", "leading"), ("dpm", "linspace")])
def test_an_absent_entry_has_the_default_of_the_samplers_class(sampler, spacing):
    """Not of the class that the file is of."""
    config = {"_class_name": "PNDMScheduler", "beta_schedule": "scaled_linear", "clip_sample": False}
    ours = NoiseSchedule(config, sampler=sampler)
    assert (ours.spacing, ours.prediction, ours.config["steps_offset"], ours.last_sigma) == (
        spacing, "epsilon", 0, 0)
    assert ours.sigmas[[0, 999]].tolist() == pytest.approx([0.0100005, 36.911912], rel=1e-4)
    assert "beta_schedule" in refusal(NoiseSchedule, {}, sampler=sampler)
    if sampler == "ddim":
        clipped = NoiseSchedule({"beta_schedule": "scaled_linear"}, sampler=sampler)
        assert "clip_sample" in refusal(clipped.levels, 5)
    pytest.importorskip("diffusers")
    assert theirs_and_ours(sampler, 7, config) < 2e-5


@pytest.mark.parametrize("entry, readers", [
    ({"solver_order": 3}, ["dpm"]), ({"clip_sample": True}, ["ddim"]),
    ({"use_karras_sigmas": True}, ["euler", "dpm"]), ({"timestep_type": "continuous"}, ["euler"]),
    ({"use_beta_sigmas": True}, ["euler", "dpm"]), ({"interpolation_type": "log_linear"}, ["euler"]),
    ({"sigma_max": 9.0}, ["euler"]), ({"euler_at_final": True}, ["dpm"]), ({"use_lu_lambdas": True}, ["dpm"]),
    ({"variance_type": "learned"}, ["dpm"]), ({"thresholding": True}, ["ddim", "dpm"]),
    (dict.fromkeys(("use_karras_sigmas", "thresholding", "clip_sample", "euler_at_final")), [])], ids=str)
def test_what_is_not_implemented_is_refused_by_the_sampler_that_reads_it(entry, readers):
    for sampler in SAMPLERS:
        ours = NoiseSchedule(SCHEDULER | entry, sampler=sampler)
        ours.add_noise(torch.ones(1, 4, 2, 2), torch.ones(1, 4, 2, 2), torch.tensor([5]))  # training goes on
        if sampler in readers:
            assert next(iter(entry)) in refusal(ours.levels, 5)
        else:
            assert ours.levels(5) == NoiseSchedule(SCHEDULER, sampler=sampler).levels(5)


@pytest.mark.parametrize("name, value", [
    ("beta_schedule", "linear"), ("rescale_betas_zero_snr", True), ("trained_betas", [0.1]),
    ("prediction_type", "sample"), ("timestep_spacing", "other"), ("_class_name", "LCMScheduler"),
    ("_class_name", "TCDScheduler")])
def test_another_noise_or_prediction_is_refused_at_once(name, value):
    assert str(value) in refusal(NoiseSchedule, SCHEDULER | {name: value})


# Pictures


@pytest.mark.parametrize("name", CASES)
def test_pictures_are_those_of_diffusers(name, tmp_path):
    case, stored = CASES[name], STORED[name].numpy()
    ours = pixels(load_pipeline(case.bundle(tmp_path), sampler=case.sampler)(
        [*case.PROMPTS], case.negative, case.steps, case.guidance, [*case.SEEDS], case.height, case.width))
    assert ours.shape == stored.shape and stored.std() > 40
    assert np.abs(ours - stored).max() <= 2


def test_a_picture_is_the_same_alone_and_in_a_batch(pipeline, monkeypatch):
    monkeypatch.setattr(sample, "images_at_once", lambda pixels: 2)
    prompts, calls = ["a box", "my sky", "red"], []
    together = pipeline(prompts, seed=[3, 4, 5], **SMALL, progress="a name", callback=calls.append)
    assert calls == [0, 1, 2, 3, 4, 5] and len({image.tobytes() for image in together}) == 3  # two batches
    for i in range(3):
        alone = pipeline([prompts[i]], seed=3 + i, **SMALL)
        assert np.abs(pixels(alone) - pixels(together[i:i + 1])).max() <= 1
    one_seed = pipeline(["a box"] * 2, seed=5, **SMALL)
    assert np.array_equal(pixels(one_seed), pixels(pipeline(["a box"] * 2, seed=[5, 5], **SMALL)))
    assert pipeline(["a box"], steps=1, width=64)[0].size == (64, 8 * pipeline.unet.config.sample_size)
    assert "100 x 64" in refusal(pipeline, ["a box"], steps=1, width=64, height=100)
    assert "seeds" in refusal(pipeline, ["a box"], seed=[1, 2])


def test_guidance_of_at_most_1_is_off(pipeline):
    prompts, sizes = ["a box", "sky"], []
    hook = pipeline.unet.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    free = pixels(pipeline(prompts, guidance=1, **SMALL))
    assert np.array_equal(free, pixels(pipeline(prompts, "red", guidance=0, **SMALL)))
    pipeline(prompts, guidance=1.5, **SMALL)
    hook.remove()
    assert sizes == [2] * 6 + [4] * 3


def test_the_vae_is_float32_unless_its_config_says_otherwise(changed):
    for upcast, expected in ((True, torch.float32), (False, torch.bfloat16)):
        ours = load_pipeline(changed("vae/config.json", force_upcast=upcast), dtype=torch.bfloat16)
        assert ours(["a box"], **SMALL)[0].size == (48, 32)
        assert {p.dtype for p in ours.vae.parameters()} == {expected}
        assert {p.dtype for p in (*ours.unet.parameters(), *ours.text.parameters())} == {torch.bfloat16}


def test_the_unet_alone_is_replaced(pipeline, small, tmp_path, monkeypatch):
    folder, other, unet = small["700m"], small["1b"], small["1b"] / "unet"
    theirs = pixels(load_pipeline(other)(["a box"], **SMALL))
    assert not np.array_equal(pixels(pipeline(["a box"], **SMALL)), theirs)
    monkeypatch.setitem(PRESETS, "small", Preset(str(folder), student=str(unet)))  # as the toy's students are
    for pipeline in (load_pipeline(folder, other), load_pipeline(folder, str(unet)), load_pipeline("small")):
        assert np.array_equal(pixels(pipeline(["a box"], **SMALL)), theirs)
    for entry, word in (({"context_dim": 32}, "32"), ({"in_channels": 9}, "9 channels")):
        foreign = fill(model.UNet(replace(pipeline.unet.config, **entry)))
        model.save_unet(foreign, tmp_path / "foreign")
        assert word in refusal(load_pipeline(folder, tmp_path / "foreign"), ["a box"], **SMALL)


def test_low_memory_holds_one_network_at_a_time(pipeline, small, monkeypatch):
    ours, held, loaded, decoded = load_pipeline(small["700m"], low_memory=True), [], [], []
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


# The command line


def test_the_settings_in_a_file_are_enough_to_draw_it_again(program, small):
    flags = ["--prompt", "a box", "my sky", "--model", small["700m"], "--count", 2, "--seed", 7,
             "--negative", "", "--sampler", "dpm", "--spacing", "trailing", *FLAGS]
    code, out, _ = program(*flags, "--out", "a.png")
    assert code == 0 and all(part in out for part in ("48 x 32", "3 steps", "7.5", "a.png\n"))
    [settings] = json.loads(Image.open("a.png").text["settings"])
    flags = []
    for name, value in settings.items():
        if value not in (None, False):
            flags += [f"--{name.replace('_', '-')}", *(value if isinstance(value, list) else [str(value)])]
    sample.main([*flags, "--out", "B.PNG"])
    assert Path("a.png").read_bytes() == Path("B.PNG").read_bytes()
    ours = load_pipeline(small["700m"], sampler="dpm", spacing="trailing")(
        ["a box", "a box", "my sky", "my sky"], "", seed=[7, 8, 7, 8], **SMALL)
    assert Image.open("a.png").tobytes() == image_grid([ours[:2], ours[2:]]).tobytes()


def test_a_column_for_each_model(program, small, pipeline):
    program("--count", 2, *FLAGS, "--model", small["700m"], small["1b"])
    columns = [drawn(["a box"] * 2, seed=[0, 1], **SMALL) for drawn in (pipeline, load_pipeline(small["1b"]))]
    picture = Image.open("sample.png")
    assert picture.tobytes() == image_grid([list(row) for row in zip(*columns)]).tobytes()
    models = [entry["model"] for entry in json.loads(picture.text["settings"])]
    assert models == [[str(small["700m"])], [str(small["1b"])]]


def test_what_the_world_lacks_is_one_line(program, small, changed, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    for word, *flags in (
            ("etri-vilab/koala-700m", "--model", "700m"), ("/no/folder", "--model", "/no/folder"),
            ("pink", "--model", small["700m"], "--negative", "pink"), ("meta:x", "--device", "meta:x"),
            ("cuda:99", "--device", "cuda:99"),
            ("not finite", "--model", changed("vae/config.json", scaling_factor=1e-39))):
        code, _, err = program(*flags, *FLAGS)
        assert code == 1 and err.startswith("error: ") and err.count("\n") == 1 and word in err
    assert not Path("sample.png").exists()


def test_a_model_that_is_not_whole_and_a_vae_of_other_latents(small, tmp_path):
    shutil.copytree(small["700m"] / "unet", tmp_path / "run" / "unet")
    assert "--unet" in refusal(load_pipeline, tmp_path / "run")
    other = bundle(tmp_path / "other", vae={"scaling_factor": 0.13})
    assert "--vae" in refusal(load_pipeline, small["700m"], vae=other)
