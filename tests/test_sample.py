"""sample.py against numbers worked out by hand, diffusers, and what a command line promises."""

import argparse
import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
import weakref
from argparse import Namespace
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from bundles import CASES, SCHEDULER, WORDS, bundle
from PIL import Image
from safetensors.torch import load_file, save_file

import model
import sample
from chart import sheet
from options import number, preset
from sample import Schedule, decode_tiled, load_pipeline

ROOT = Path(__file__).parents[1]
SPACINGS = ("leading", "trailing", "linspace")
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
    """Runs the command line as a process would: its exit code, what it printed, what it wrote."""
    monkeypatch.chdir(tmp_path)

    def run(*args):
        before = {*tmp_path.iterdir()}
        monkeypatch.setattr(sys, "argv", ["sample.py", *map(str, args)])
        capsys.readouterr()
        code = 0
        try:
            runpy.run_path(str(ROOT / "sample.py"), run_name="__main__")
        except SystemExit as exit:
            code = exit.code
            if isinstance(code, str):
                print(code, file=sys.stderr)
                code = 1
        return code, capsys.readouterr(), {*tmp_path.iterdir()} - before
    return run


def pixels(images):
    return np.stack([np.asarray(image) for image in images]).astype(int)


def same(a, b):
    return len(a) == len(b) and all(x.tobytes() == y.tobytes() for x, y in zip(a, b))


# Noise


def schedule(spacing, **entries):
    return Schedule(SCHEDULER | {"timestep_spacing": spacing} | entries)


def test_the_noise_of_each_timestep():
    sigmas = schedule("leading").all_sigmas
    assert len(sigmas) == 1000
    assert [sigmas[0].item(), sigmas[999].item()] == pytest.approx([0.029167, 14.614641], abs=6e-7)


@pytest.mark.parametrize("spacing, steps, first, last, sigmas, scale", [
    ("leading", 25, [961, 921], [41, 1], [11.67605, 0.04131], 11.71879),
    ("leading", 50, [981, 961], [21, 1], [13.12041, 0.04131], 13.15846),
    ("trailing", 10, [999, 899], [199, 99], [14.61464, 0.34167], 14.61464),
    ("trailing", 25, [999, 959], [79, 39], [14.61464, 0.19630], 14.61464),
    ("linspace", 10, [999, 888], [111, 0], [14.61464, 0.02917], 14.61464),
])
def test_timesteps_and_sigmas(spacing, steps, first, last, sigmas, scale):
    noise = schedule(spacing)
    timesteps = noise.timesteps(steps)
    assert len(timesteps) == steps and timesteps[:2] == first and timesteps[-2:] == last
    found = noise.sigmas(timesteps)
    assert len(found) == steps + 1 and found == sorted(found, reverse=True) and found[-1] == 0
    assert [found[0], found[-2]] == pytest.approx(sigmas, abs=6e-6)
    assert noise.initial_scale(found) == pytest.approx(scale, abs=6e-6)


def test_fractional_timesteps_lie_between_two():
    noise = schedule("linspace")
    timesteps = noise.timesteps(7)
    assert timesteps == [999, 832.5, 666, 499.5, 333, 166.5, 0]
    middle = (noise.all_sigmas[832] + noise.all_sigmas[833]).item() / 2
    assert noise.sigmas(timesteps)[1] == pytest.approx(middle, rel=1e-12)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("steps", [1, 7, 11, 25, 999, 1000])
def test_the_schedule_is_that_of_diffusers(spacing, steps):
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.EulerDiscreteScheduler.from_config(SCHEDULER | {"timestep_spacing": spacing})
    theirs.set_timesteps(steps)
    ours = schedule(spacing)
    timesteps = ours.timesteps(steps)
    sigmas = ours.sigmas(timesteps)
    np.testing.assert_allclose(timesteps, theirs.timesteps.numpy(), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(sigmas, theirs.sigmas.numpy(), rtol=1e-4)
    assert ours.initial_scale(sigmas) == pytest.approx(float(theirs.init_noise_sigma), rel=1e-4)


def test_a_schedule_that_is_not_ours_is_refused():
    for entry in ({"beta_schedule": "linear"}, {"prediction_type": "sample"}, {"timestep_spacing": "other"},
                  {"use_karras_sigmas": True}, {"rescale_betas_zero_snr": True},
                  {"final_sigmas_type": "sigma_min"}):
        with pytest.raises(ValueError, match=f"{[*entry][0]}={[*entry.values()][0]!r}"):
            Schedule(SCHEDULER | entry)
    # A file without this entry means linear.
    with pytest.raises(ValueError, match="beta_schedule='linear'"):
        Schedule({})
    assert Schedule({"beta_schedule": "scaled_linear"}).spacing == "linspace"


def test_the_true_noise_leads_back_to_the_image():
    image, noise = torch.randn(2, 3, 4, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for spacing in SPACINGS:
        for prediction in ("epsilon", "v_prediction"):
            ours = schedule(spacing, prediction_type=prediction)
            sigmas = ours.sigmas(ours.timesteps(5))
            start = (image + sigmas[0] * noise) / ours.initial_scale(sigmas)

            def predict(x, t):
                sigma = ours.sigmas([t])[0]
                z = x * (sigma**2 + 1) ** 0.5                    # as Karras et al. scale it
                eps = (z - image) / sigma
                return eps if prediction == "epsilon" else (eps - sigma * image) / (sigma**2 + 1) ** 0.5
            torch.testing.assert_close(sample.euler(predict, start, ours, 5), image)


def test_added_noise_and_targets_are_the_sampler_s():
    image, noise = torch.randn(2, 3, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    timesteps = torch.tensor([0, 500, 999])
    for prediction in ("epsilon", "v_prediction"):
        ours = schedule("leading", prediction_type=prediction)
        sigmas = ours.all_sigmas[timesteps][:, None, None, None]
        scale = (sigmas**2 + 1).sqrt()
        torch.testing.assert_close(ours.add_noise(image, noise, timesteps),
                                   ((image + sigmas * noise) / scale).float())
        target = noise if prediction == "epsilon" else ((noise - sigmas * image) / scale).float()
        torch.testing.assert_close(ours.target(image, noise, timesteps), target)


# Pictures


@pytest.mark.parametrize("name", CASES)
def test_pictures_are_those_of_diffusers(name, tmp_path):
    case = CASES[name]
    ours = load_pipeline(case.bundle(tmp_path))(
        list(case.PROMPTS), case.negative, case.steps, case.guidance, list(case.SEEDS),
        case.height, case.width)
    stored = load_file(ROOT / "tests" / "answers" / "sample.safetensors")[name].numpy()
    assert pixels(ours).shape == stored.shape and stored.std() > 40
    assert np.abs(pixels(ours) - stored).max() <= 2


@pytest.mark.parametrize("name", CASES)
def test_pictures_are_those_of_the_diffusers_installed(name, tmp_path):
    pytest.importorskip("diffusers")
    from oracle_sample import ANSWERS, drawn
    theirs = drawn(CASES[name], CASES[name].bundle(tmp_path))
    assert (theirs.int() - load_file(ANSWERS)[name].int()).abs().max() <= 1


def test_a_picture_is_the_same_alone_and_in_a_batch(pipeline, monkeypatch):
    drawn, euler = [], sample.euler
    monkeypatch.setattr(sample, "euler", lambda predict, noise, *rest: (
        drawn.append(noise), euler(predict, noise, *rest))[1])
    prompts, small = [WORDS[i % 7] for i in range(34)], {"steps": 2, "height": 16, "width": 24}
    together = pipeline(prompts, seed=list(range(34)), **small)
    assert [len(noise) for noise in drawn] == [32, 2]
    for i in (0, 31, 33):
        alone = pipeline([prompts[i]], seed=i, **small)
        assert torch.equal(drawn[-1][0], torch.cat(drawn[:2])[i])
        assert np.abs(pixels(alone) - pixels(together[i:i + 1])).max() <= 1
    assert len({image.tobytes() for image in together}) == 34


def test_one_seed_is_every_prompt_s(pipeline):
    assert same(pipeline(["a box", "a box"], seed=5, **SMALL),
                pipeline(["a box", "a box"], seed=[5, 5], **SMALL))
    for prompts, seeds in ((["a box"], [1, 2]), ([], 0), ([], [])):
        with pytest.raises(ValueError, match="give one, or one for each prompt"):
            pipeline(prompts, seed=seeds)


def test_size_is_the_model_s_own_if_not_given(pipeline):
    assert pipeline(["a box"], steps=1, width=64)[0].size == (64, 8 * pipeline.unet.config.sample_size)
    with pytest.raises(ValueError, match="100 x 64 is not a multiple of 8"):
        pipeline(["a box"], steps=1, width=64, height=100)


def test_an_absent_negative_prompt_is_zeros_if_the_bundle_says_so(pipeline, folder, tmp_path):
    absent, empty = (pipeline.encode(["a box", "sky"], negative) for negative in (None, ""))
    assert not absent[2].any() and not absent[3].any() and absent[2].shape == absent[0].shape
    assert torch.equal(absent[0], empty[0]) and torch.equal(absent[1], empty[1])
    expected = pipeline.text([""])
    assert (torch.equal(empty[2], expected[0].repeat(2, 1, 1))
            and torch.equal(empty[3], expected[1].repeat(2, 1)))
    other = load_pipeline(bundle(tmp_path, index={"force_zeros_for_empty_prompt": False}))
    assert all(torch.equal(a, b) for a, b in zip(other.encode(["a box", "sky"], None), empty))


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
    told = capsys.readouterr().err
    assert told.count("warning: ") == 1 and told.count("\n") == 1
    assert "75 tokens" in told and repr(" ".join(words[75:])) in told
    assert same(long, pipeline([" ".join(words[:75])] * 2, seed=[1, 2], **SMALL))
    assert capsys.readouterr().err == ""


def test_words_that_a_small_vocabulary_lacks_are_named(pipeline):
    with pytest.raises(ValueError, match=rf"does not know koala, pink; it knows {', '.join(WORDS)}\. "
                                         r".*such as 700m"):
        pipeline(["a Pink box", "my koala"])
    with pytest.raises(ValueError, match="does not know ugly"):
        pipeline(["a box"], negative="ugly")


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


def test_the_u_net_alone_is_replaced(pipeline, folder, tmp_path):
    other = bundle(tmp_path, "1b")
    theirs = load_pipeline(other)(["a box"], **SMALL)
    assert not same(theirs, pipeline(["a box"], **SMALL))
    shutil.copytree(other / "unet", tmp_path / "student")
    for unet in (other, other / "unet", tmp_path / "student"):
        assert same(load_pipeline(folder, unet=unet)(["a box"], **SMALL), theirs)
    path = tmp_path / "student" / "config.json"
    foreign = model.UNetConfig.from_diffusers(json.loads(path.read_text()) | {"cross_attention_dim": 32})
    model.save_unet(model.UNet(foreign), tmp_path / "student")
    with pytest.raises(ValueError, match=r"reads texts of widths \(32, 24\).* give \(40, 24\)"):
        load_pipeline(folder, unet=tmp_path / "student")(["a box"], **SMALL)


# Memory


def test_low_memory_holds_one_network_at_a_time(pipeline, folder, monkeypatch):
    ours, held, loaded = load_pipeline(folder, low_memory=True), [], []
    for name, load in ours.loaders.items():
        def watched(name=name, load=load):
            assert not any(network() for network in held), f"{loaded[-1]} is still held as {name} is loaded"
            network = load()
            held.append(weakref.ref(network))
            loaded.append(name)
            return network
        monkeypatch.setitem(ours.loaders, name, watched)
    images = ours(["a box"] * 33, seed=list(range(33)), **SMALL)
    assert loaded == ["text", "unet", "vae"] and not any(network() for network in held)
    assert np.abs(pixels(images) - pixels(pipeline(["a box"] * 33, seed=list(range(33)), **SMALL))).max() <= 1


def stretched(latent):
    """What decodes each latent pixel by itself."""
    return F.interpolate(latent[:, :3], scale_factor=8)


@pytest.mark.parametrize("size", [(8, 8), (20, 13), (21, 5), (9, 8), (14, 32)])
def test_tiles_are_put_together_again(size):
    vae = Namespace(config=Namespace(downscale=8), decode=stretched)
    latent = torch.randn(1, 4, *size, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(decode_tiled(vae, latent, tile=8, overlap=4), stretched(latent),
                               rtol=0, atol=1e-6)
    ones = decode_tiled(vae, torch.ones(1, 4, *size), tile=8, overlap=4)
    assert (ones == 1).all() and ones.shape == (1, 3, 8 * size[0], 8 * size[1])


@torch.inference_mode()
def test_tiles_are_close_to_the_whole(pipeline):
    latent = torch.randn(1, 4, 40, 56, generator=torch.Generator().manual_seed(0))
    whole, sizes = pipeline.vae.decode(latent), []
    hook = pipeline.vae.decoder.register_forward_pre_hook(
        lambda module, args: sizes.append(args[0].shape[2:]))
    tiled = decode_tiled(pipeline.vae, latent, tile=32, overlap=8)
    hook.remove()
    assert sizes == [(32, 32)] * 4
    assert (tiled - whole).square().mean().sqrt() < 0.1 * whole.std()  # group norms differ from tile to tile
    seams = [(image[..., 1:] - image[..., :-1]).abs().mean((0, 1, 2)) for image in (tiled, whole)]
    assert seams[0].max() < 1.2 * seams[1].max()


# The command line


def test_the_same_command_gives_the_same_bytes_and_a_picture_can_be_made_again(program, folder, tmp_path):
    command = ["--prompt", "a red box", "--model", folder, "--count", "2", "--negative", "", *FLAGS, "--out"]
    for name in ("a.png", "b.png"):
        code, told, files = program(*command, tmp_path / name)
        assert code == 0 and files == {tmp_path / name}, told.err
        assert (told.out.count("\n") == 2
                and "48 x 32, 3 steps, guidance 7.5, leading, seed 0, fp32: " in told.out)
        assert "%" in told.err                                   # the progress bar
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    [settings] = json.loads(Image.open("a.png").text["settings"])
    assert (settings["prompt"] == ["a red box"] and settings["guidance"] == 7.5
            and settings["precision"] == "fp32")
    sample.main(Namespace(**settings, out=tmp_path / "c.png"))
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
    drawn = Image.open("sample.png")
    assert drawn.size == (2 * 48, 4 * 32)
    for x, column in enumerate(columns):
        for y, image in enumerate(column):
            assert drawn.crop((48 * x, 32 * y, 48 * x + 48, 32 * y + 32)).tobytes() == image.tobytes()
    assert [entry["model"] for entry in json.loads(drawn.text["settings"])] == [[str(folder)], [str(other)]]
    assert sheet([[column[0] for column in columns]]).tobytes() == drawn.crop((0, 0, 96, 32)).tobytes()


def test_one_model_has_a_column_for_each_seed(program, folder, pipeline):
    program("--prompt", "a box", "my sky", "--model", folder, "--count", "3", "--seed", "7", *FLAGS)
    images = pipeline(prompts=["a box"] * 3 + ["my sky"] * 3, seed=[7, 8, 9] * 2, **SMALL)
    assert Image.open("sample.png").tobytes() == sheet([images[:3], images[3:]]).tobytes()


def test_all_columns_have_the_first_one_s_size(program, folder, pipeline, tmp_path):
    other = shutil.copytree(folder, tmp_path / "other")
    config = json.loads((other / "unet" / "config.json").read_text())
    (other / "unet" / "config.json").write_text(json.dumps(config | {"sample_size": 4}))
    assert program("--prompt", "a box", "--model", other, folder, "--steps", "1")[0] == 0
    drawn = Image.open("sample.png")
    assert drawn.size == (64, 32)
    second = pipeline(["a box"], steps=1, height=32, width=32)
    assert drawn.crop((32, 0, 64, 32)).tobytes() == second[0].tobytes()


PROMPT = ("--prompt", "a box")


@pytest.mark.parametrize("args, told", [
    ([*PROMPT, "--stesp", "3"], "--stesp"),
    ([*PROMPT, "--step", "3"], "--step 3"),  # flags are not abbreviated
    ([*PROMPT, "--steps", "0"], "--steps: 0 is not between 1 and 1000"),
    ([*PROMPT, "--steps", "2.5"], "--steps: invalid number value: '2.5'"),
    ([*PROMPT, "--guidance", "nan"], "--guidance: nan is not finite and at least 1"),
    ([*PROMPT, "--guidance", "0.5"], "--guidance: 0.5 is not finite and at least 1"),
    ([*PROMPT, "--guidance", "inf"], "--guidance: inf is not"),
    ([*PROMPT, "--height", "100"], "--height: 100 is not a multiple of 8; the nearest: 96 or 104"),
    ([*PROMPT, "--width", "0"], "--width: 0 is not between 8 and 8192"),
    ([*PROMPT, "--seed", "-1"], "--seed: -1 is not between"),
    ([*PROMPT, "--seed", "9" * 400], "--seed: 999"),
    ([*PROMPT, "--count", "0"], "--count: 0 is not between"),
    ([*PROMPT, "--precision", "int8"], "--precision: invalid choice: 'int8'"),
    ([*PROMPT, "--model", "700M"], "--model 700M is neither toy, sdxl, 1b, 700m,"),
    ([*PROMPT, "--out", "picture.jpg"], "--out picture.jpg is not the name of a .png file"),
    ([*PROMPT, "--out", ""], "--out: is blank"), ([*PROMPT, "--device", " "], "--device: is blank"),
    ([*PROMPT, "--model", "m" * 300], "is neither toy"),
    (["--prompt"], "--prompt: expected at least one argument"),
    (["--prompt", "a box", " "], "--prompt is empty"),
    ([], "the following arguments are required: --prompt"),
])
def test_a_slip_in_the_command_line_is_told_in_one_line(program, args, told):
    code, printed, files = program(*args)
    assert code == 2 and printed.err.startswith("error: ") and told in printed.err and not files
    assert printed.err.count("\n") == 1 and printed.out == ""


def failed(result, told):
    code, printed, files = result
    error = printed.err.splitlines()[-1]
    assert code == 1 and error.startswith("error: ") and told in error and not files
    assert printed.err.count("error: ") == 1 and "Traceback" not in printed.err
    return printed


def test_a_place_that_cannot_be_written_is_told_before_anything_is_read(
        program, folder, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    for place in ("missing", "file", "/proc"):
        failed(program(*PROMPT, "--model", folder, "--out", Path(place) / "x.png"),
               f"written in the folder {place} (")
    (tmp_path / "folder.png").mkdir()
    code, printed, _ = program(*PROMPT, "--out", "folder.png")
    assert code == 2 and "folder.png is not the name" in printed.err
    (tmp_path / "sample.png").mkdir()                            # the default
    assert program(*PROMPT)[0] == 2


@pytest.mark.parametrize("path", [
    "model_index.json", "scheduler/scheduler_config.json", "vae/config.json", "unet/config.json",
    "text_encoder/config.json", "text_encoder_2/model.safetensors", "tokenizer/merges.txt",
    "tokenizer_2/vocab.json", "vae/diffusion_pytorch_model.safetensors"])
def test_a_missing_component_is_named(program, folder, tmp_path, path):
    broken = shutil.copytree(folder, tmp_path / "broken")
    (broken / path).unlink()
    failed(program(*PROMPT, "--model", broken), f"no {path}")


def test_broken_components_are_named(program, folder, tmp_path):
    broken = shutil.copytree(folder, tmp_path / "broken")
    weights = broken / "text_encoder_2" / "model.safetensors"
    tensors = load_file(weights)
    del tensors["text_projection.weight"]
    save_file(tensors, weights)
    failed(program(*PROMPT, "--model", broken),
           "text_encoder_2 do not fit their config.json: 1 missing (text_projection.weight)")
    weights.write_bytes((folder / "text_encoder_2" / "model.safetensors").read_bytes()[:-8])
    failed(program(*PROMPT, "--model", broken), "text_encoder_2/model.safetensors is cut or damaged")
    weights.write_text("version https://git-lfs.github.com/spec/v1")
    failed(program(*PROMPT, "--model", broken), "is a git-lfs pointer")


@pytest.mark.parametrize("path, changed, told", [
    ("scheduler/scheduler_config.json", {"use_karras_sigmas": True}, "use_karras_sigmas=True"),
    ("scheduler/scheduler_config.json", {"beta_start": "x"}, "beta_start='x'"),
    ("scheduler/scheduler_config.json", {"beta_start": -1.0}, "beta_start=-1.0"),
    ("scheduler/scheduler_config.json", {"steps_offset": None}, "steps_offset=None"),
    ("unet/config.json", {"norm_num_groups": 0}, "groups cannot be 0"),
    ("unet/config.json", {"norm_num_groups": 7}, "cannot be parted into 7 groups"),
    ("unet/config.json", {"attention_head_dim": [3, 3, 5]}, "(3, 3, 5) heads"),
    ("unet/config.json", {"sample_size": None}, "sample_size cannot be None"),
    ("unet/config.json", {"layers_per_block": 0}, "pairs cannot be 0"),
    ("unet/config.json", {"block_out_channels": ["32", "64", "96"]}, "channels cannot be ('32', '64', '96')"),
    ("unet/config.json", {"block_out_channels": []}, "unet/config.json"),
    ("vae/config.json", {"norm_num_groups": 0}, "groups cannot be 0"),
    ("vae/config.json", {"scaling_factor": None}, "scaling_factor cannot be None"),
    ("text_encoder/config.json", {"num_attention_heads": 3}, "cannot be parted into 3 heads"),
    ("text_encoder/config.json", {"hidden_act": []}, "hidden_act cannot be []"),
    ("text_encoder_2/config.json", {"eos_token_id": None}, "eos_token_id cannot be None"),
    ("tokenizer/tokenizer_config.json", {"model_max_length": None}, "model_max_length is None"),
    ("tokenizer_2/tokenizer_config.json", {"model_max_length": 0}, "model_max_length is 0"),
    ("tokenizer/tokenizer_config.json", {"bos_token": None}, "tokenizer_config.json is not a tokenizer's"),
    ("preset.json", {"steps": 0, "guidance": 2.0}, "preset.json is not a preset"),
    ("preset.json", {"guidance": 0.5}, "preset.json is not a preset"),
    ("preset.json", {"guidance": float("inf")}, "preset.json is not a preset"),
    ("vae/config.json", {"scaling_factor": float("inf")}, "scaling_factor cannot be inf"),
    ("tokenizer_2/tokenizer_config.json", {"pad_token": ""}, "pad_token is ''"),
    ("preset.json", {"spacing": "foo"}, "preset.json is not a preset")])
def test_numbers_that_cannot_be_are_told(program, folder, tmp_path, path, changed, told):
    broken = shutil.copytree(folder, tmp_path / "broken")
    old = json.loads((broken / path).read_text()) if (broken / path).exists() else {}
    (broken / path).write_text(json.dumps(old | changed))
    error = failed(program(*PROMPT, "--model", broken, *FLAGS), told).err.splitlines()[-1]
    assert path.rsplit("/")[-1] in error


def test_a_unet_has_the_names_of_models(program, folder):
    failed(program(*PROMPT, "--model", folder, "--unet", "toy", *FLAGS), "it belongs to another --model")


def test_no_weights_and_no_network(program, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    failed(program(*PROMPT, "--model", "700m"), "no folder etri-vilab/koala-700m, no model_index.json of it")
    failed(program(*PROMPT, "--model", "/no/folder"), "no folder /no/folder")


def test_words_the_model_lacks_and_devices_the_machine_lacks(program, folder):
    failed(program("--prompt", "a pink box", "--model", folder), "does not know pink; it knows a, blue, box")
    failed(program(*PROMPT, "--model", folder, "--device", "meta:x"), "the device meta:x cannot be used: ")
    failed(program(*PROMPT, "--model", folder, "--device", "meta"), "use cpu, cuda or mps")
    if not torch.cuda.is_available():
        failed(program(*PROMPT, "--model", folder, "--device", "cuda"), "the device cuda cannot be used: ")


def test_a_picture_that_is_not_finite_is_not_saved(program, tmp_path):
    broken = bundle(tmp_path / "broken", vae={"scaling_factor": 1e-39})
    failed(program(*PROMPT, "--model", broken, *FLAGS), "the image is not finite")


@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), MemoryError(),
    RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: 8 bytes.")])
def test_out_of_memory_says_what_to_lower(program, folder, monkeypatch, error):
    def load_unet(*args):
        raise error
    monkeypatch.setattr(model, "load_unet", load_unet)
    failed(program(*PROMPT, "--model", folder),
           "out of memory; lower --height and --width, or use --low-memory")


def test_a_mistake_of_ours_is_not_taken_for_the_world_s(program, folder, monkeypatch):
    def load_unet(*args):
        raise RuntimeError("shapes cannot be multiplied")
    monkeypatch.setattr(model, "load_unet", load_unet)
    with pytest.raises(RuntimeError, match="multiplied"):
        program(*PROMPT, "--model", folder)


def test_an_interrupt_leaves_nothing(program, folder, monkeypatch):
    monkeypatch.setattr(model.UNet, "forward", lambda *args: signal.raise_signal(signal.SIGINT))
    code, printed, files = program(*PROMPT, "--model", folder, *FLAGS)
    assert code == 130 and not files and "Traceback" not in printed.err


def test_an_interrupt_of_the_imports_is_silent(tmp_path):
    (tmp_path / "torch.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    done = subprocess.run([sys.executable, ROOT / "sample.py", *PROMPT, "--out", tmp_path / "x.png"],
                          capture_output=True, env=os.environ | {"PYTHONPATH": str(tmp_path)},
                          preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))
    assert done.returncode == -signal.SIGINT and done.stderr == b""


def test_mistakes_are_told_before_torch_is_imported(tmp_path):
    for args, code in (([*PROMPT, "--steps", "0"], 2),
                       ([*PROMPT, "--out", tmp_path / "missing" / "x.png"], 1)):
        result = subprocess.run([sys.executable, "-X", "importtime", ROOT / "sample.py", *args],
                                capture_output=True, text=True, env=os.environ | {"PYTHONPATH": ""})
        imported = {line.split("|")[-1].strip() for line in result.stderr.splitlines()
                    if "import time:" in line}
        assert result.returncode == code and result.stderr.splitlines()[-1].startswith("error: ")
        assert ("argparse" in imported
                and not imported & {"torch", "numpy", "PIL", "transformers", "safetensors"})


def test_a_picture_needs_neither_transformers_nor_the_compiler(tmp_path):
    code = (f"import runpy, sys; sys.path.insert(0, {str(ROOT)!r})\n"
            f"sys.argv = ['sample.py', '--prompt', 'a red circle', '--steps', '1', "
            f"'--out', {str(tmp_path / 'x.png')!r}]\n"
            f"runpy.run_path({str(ROOT / 'sample.py')!r}, run_name='__main__')\n"
            f"print({{'transformers', 'torch._dynamo', 'diffusers'}} & set(sys.modules))")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "set()", (
        "they take most of the time of a start")


def test_numbers_are_read():
    whole, real = number(int, 8, 64, multiple=8), number(float, 1)
    assert whole("16") == 16 and real("7.5") == 7.5
    for kind, text, told in ((whole, "20", "nearest: 16 or 24"), (whole, "72", "between 8 and 64"),
                             (real, "inf", "finite"), (real, "nan", "finite"), (real, "0.5", "at least 1")):
        with pytest.raises(argparse.ArgumentTypeError, match=told):
            kind(text)


def test_help_fits_a_screen(program, monkeypatch):
    monkeypatch.setenv("COLUMNS", "110")
    code, printed, _ = program("--help")
    lines = printed.out.splitlines()
    assert code == 0 and len(lines) <= 40 and max(map(len, lines)) <= 110
    assert "None" not in printed.out and printed.out.count("[toy]") == 1


@pytest.mark.parametrize("text", ["{", "[]", '{"step": 3}', '{"steps": "x"}', '{"guidance": null}'])
def test_a_broken_preset_is_told(text, tmp_path):
    (tmp_path / "preset.json").write_text(text)
    with pytest.raises(ValueError, match="preset.json is not a preset"):
        preset(str(tmp_path))
