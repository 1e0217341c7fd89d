"""The embedded toy: its bundle, what it draws, and the script that made it."""

import ast
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from runs import checkpoint, contents, equal
from safetensors.torch import load_file
from test_model import PARAMETERS

import model
import sample
from sample import load_pipeline
from support import cli
from support.cli import PRESETS, TOY
from support.vae import load_vae
from toy import make, shapes

PROMPT = "a red circle left of a blue square"


@pytest.fixture(scope="module")
def toy():
    return load_pipeline("toy")


def test_the_bundle_is_small_and_has_sdxls_topology():
    assert sum(path.stat().st_size for path in TOY.rglob("*") if path.is_file()) <= 20e6
    unet = model.load_unet(TOY)
    assert unet.config == make.UNET_CONFIG and {p.dtype for p in unet.parameters()} == {torch.float16}
    assert unet.config.depths == model.CONFIGS["sdxl"].depths and unet.config.pairs == 2
    student = model.student_config(unet.config, "700m")
    ours, theirs = (sum(p.numel() for p in model.UNet(config).parameters()) for config in (student, unet.config))
    assert ours / theirs == pytest.approx(PARAMETERS["700m"] / PARAMETERS["sdxl"], abs=0.005)


def test_every_word_of_a_caption_is_one_token(toy):
    for tokenizer in toy.text.tokenizers:
        assert {*tokenizer.words} == {*shapes.WORDS}
        ids = tokenizer(list(shapes.WORDS))
        assert (ids[:, 0] == tokenizer.start).all() and (ids[:, 2] == tokenizer.end).all()
        assert len(set(ids[:, 1].tolist()) - {tokenizer.end}) == len(shapes.WORDS)
    ids = [tokenizer([PROMPT])[0].tolist() for tokenizer in toy.text.tokenizers]
    assert ids[0][:10] == ids[1][:10] and ids[0][10:] != ids[1][10:], "the second pads with another token"


def test_it_draws_what_captions_say(toy):
    """Far above chance, which is under 0.05; toy/README.md has the figures of many more captions."""
    seeds = list(range(8))
    captions = shapes.judge_captions(len(seeds))
    scores = shapes.scores(toy(captions, seed=seeds, steps=10), captions)
    assert min(scores.values()) >= 0.7


def test_diffusers_draws_the_same(toy):
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.StableDiffusionXLPipeline.from_pretrained(TOY)
    theirs.set_progress_bar_config(disable=True)
    expected = theirs(PROMPT, num_inference_steps=10, guidance_scale=PRESETS["toy"].guidance,
                      generator=torch.Generator().manual_seed(3)).images[0]
    difference = np.abs(np.int16(toy([PROMPT], seed=3, steps=10)[0]) - np.int16(expected))
    assert difference.max() <= 2


def test_a_damaged_bundle_says_how_to_restore_it(tmp_path, monkeypatch):
    def message(action) -> str:
        with pytest.raises(SystemExit, match="^error: ") as error:
            cli.run(action, "")
        return error.value.code

    folder = shutil.copytree(TOY, tmp_path / "toy", ignore=shutil.ignore_patterns("vae"))
    monkeypatch.setitem(PRESETS, "toy", PRESETS["toy"]._replace(source=str(folder)))
    monkeypatch.setattr(cli, "TOY", folder)
    missing = message(lambda: load_pipeline("toy"))
    assert "vae" in missing and "git checkout toy" in missing
    shutil.copytree(TOY / "vae", folder / "vae")
    (folder / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"half")
    damaged = message(lambda: load_pipeline("toy"))
    assert "safetensors" in damaged and "git checkout toy" in damaged
    assert "git checkout" not in message(lambda: load_pipeline("./nowhere"))


@pytest.mark.parametrize("words", [
    "judge --out runs/none", "publish --out runs/none", "--out ", "--steps 0", "--batch 3", "paint", "--lr -1"])
def test_slips_in_the_command_line_of_its_making(tmp_path, monkeypatch, capsys, words):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit) as exit:
        make.main(words.split(" "))
    err = capsys.readouterr().err
    assert exit.value.code == 2 and err.startswith("error: ") and err.count("\n") == 1
    assert words.split(" ")[-1] in err and not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------------------------
# Its making


@pytest.fixture(scope="module")
def vae():
    vae = load_vae(TOY, torch.float32).requires_grad_(False)
    make.set_scaling_factor(vae, 64)
    return vae


@pytest.fixture(scope="module")
def means(vae):
    return make.MeanPictures(vae, count=8)


def test_mean_pictures_are_means_of_pictures(vae, means):
    """Nearly the mean latents of pictures that have these objects at the training scenes' places."""
    kinds = (("red", "circle"), ("blue", "square"))
    scenes = [shapes.scene(shapes.TRAIN_SEED, index) for index in range(8)]
    images = [shapes.render(shapes.Scene([o._replace(colour=colour, shape=shape)
                                          for o, (colour, shape) in zip(scene.objects, kinds)], None))
              for scene in scenes if scene.relation == "above"]
    true = vae.encode(make.pixels(images))[0].mean(0) * vae.config.scaling_factor
    right, swapped = means(["a red circle above a blue square", "a blue square above a red circle"])

    def error(guess: torch.Tensor) -> float:
        return ((guess - true).norm() / (true - means.empty).norm()).item()

    assert error(right) < 0.2 < 0.5 < error(swapped)


def test_scaled_latents_have_unit_variance(vae):
    """Those of pictures too that the factor was not measured on."""
    images, captions = make.pictures(range(64, 128))
    assert images.shape == (64, 3, 64, 64) and captions[0] == shapes.caption(shapes.TRAIN_SEED, 64)
    means = vae.encode(images)[0] * vae.config.scaling_factor
    assert means.std().item() == pytest.approx(1, rel=0.1)       # 64 pictures have more or fewer objects
    latents, timesteps, texts = make.examples(range(64, 128), vae, None)
    assert 1 < latents.std() < 1.2 and texts == captions         # the VAE's own noise comes on top
    assert timesteps.min() < 100 and timesteps.max() > 900


def test_the_checkpoint_is_of_the_recipe():
    assert model.read_json(TOY / "scheduler" / "scheduler_config.json") == make.SCHEDULER
    assert model.read_json(TOY / "model_index.json") == make.INDEX
    published = load_vae(TOY, torch.float32)
    means = published.encode(make.pictures(range(64))[0])[0] * published.config.scaling_factor
    assert means.std().item() == pytest.approx(1, rel=0.05)


@pytest.fixture
def train(means, monkeypatch):
    """Trains a smaller toy for three steps, the first and the last on mean pictures, without judging it."""
    monkeypatch.setattr(make, "MeanPictures", lambda vae: means)  # making them takes a while
    monkeypatch.setattr(make, "UNET_CONFIG", replace(make.UNET_CONFIG, depths=(0, 1, 1), mid_depth=1))
    monkeypatch.setattr(make, "set_scaling_factor", lambda vae: None)
    monkeypatch.setattr(make, "judge", lambda args: None)
    monkeypatch.setattr(make, "SAVE_EVERY", 1)

    def train(run: Path, *flags):
        try:
            make.main(["--steps", "3", "--cycle", "3", "--vae-steps", "1", "--batch", "2",
                       "--mean-steps", "1", "--judge-every", "1", "--out", str(run), *flags])
        except Exception as error:
            raise error.with_traceback(None)  # its frames would keep the folder locked
    return train


def test_training_resumes_and_leaves_a_bundle(train, tmp_path, monkeypatch):
    """Stopped while the VAE is saved, killed after the first step, and in the end published."""
    run, killed, calls, examples = tmp_path / "run", tmp_path / "killed", [], make.examples

    def judge(args):
        if not killed.exists():
            shutil.copytree(run, killed)                         # what a kill would leave here
            with pytest.raises(BlockingIOError, match="--out"):
                train(run)

    with monkeypatch.context() as patch:
        patch.setattr(make, "save_vae", lambda vae, folder: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train(run)
    assert not (run / "bundle" / "vae" / "config.json").exists()
    monkeypatch.setattr(make, "judge", judge)
    monkeypatch.setattr(make, "examples", lambda indices, vae, means: (
        calls.append(means is not None), examples(indices, vae, means))[1])
    train(run)
    assert calls == [True, False, True]
    with pytest.raises(ValueError, match="lr was 0.001 and is 0.002"):
        train(killed, "--lr", "0.002")
    train(killed)
    assert len(calls) == 5
    (whole, tensors), (resumed, others) = checkpoint(run), checkpoint(killed)
    assert whole == resumed and whole["step"] == 3 and equal(tensors, others)
    assert equal(model.load_unet(run / "bundle").state_dict(), model.load_unet(killed / "bundle").state_dict())

    make.publish(run / "bundle", tmp_path / "published")
    assert len(load_pipeline(tmp_path / "published")([PROMPT], steps=1)) == 1
    weights = [load_file(path) for path in (tmp_path / "published").rglob("*.safetensors")]
    assert len(weights) == 4 and {tensor.dtype for file in weights for tensor in file.values()} == {torch.float16}
    before = contents(tmp_path / "published")
    path = run / "bundle" / "text_encoder_2" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match="model.safetensors"):
        make.publish(run / "bundle", tmp_path / "published")
    assert contents(tmp_path / "published") == before


@pytest.mark.parametrize("name", ["1b", "700m", "1b-sa", "1b-lf"])
def test_the_students_that_ship_are_the_toys_and_draw(name):
    pipeline = load_pipeline(f"toy-{name}")
    teacher = model.load_unet(TOY).config
    assert pipeline.unet.config == model.student_config(teacher, name.split("-")[0])
    captions = shapes.judge_captions(6)
    assert shapes.scores(pipeline(captions, seed=list(range(6))), captions)["colour"] >= 0.5


def test_a_run_is_published_as_a_student(short_run, tmp_path):
    make.publish_student(short_run, tmp_path / "1b")
    published, student = model.load_unet(tmp_path / "1b"), model.load_unet(short_run)
    assert published.config == student.config and published.conv_in.weight.dtype == torch.float16
    torch.testing.assert_close(published.conv_in.weight.float(), student.conv_in.weight, rtol=1e-3, atol=1e-6)
    assert (tmp_path / "1b" / "log.csv").read_bytes() == (short_run / "log.csv").read_bytes()


def test_a_bundle_is_judged(tmp_path, capsys, monkeypatch):
    shutil.copytree(TOY, tmp_path / "bundle")
    monkeypatch.setattr(sample, "preset", lambda name: cli.preset(name)._replace(steps=2))
    make.main(["judge", "--captions", "2", "--out", str(tmp_path)])
    scores = ast.literal_eval(capsys.readouterr().out)
    assert scores.keys() == {*shapes.SCORES} and all(0 <= score <= 1 for score in scores.values())
    with Image.open(tmp_path / "grid.png") as grid:
        assert grid.size == (2 * shapes.SIZE + 4, shapes.SIZE)
