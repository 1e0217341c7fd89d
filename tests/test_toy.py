"""The embedded toy: its files, what it draws, and the script that made it."""

import shutil
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import model
from sample import load_pipeline
from support.hub import PRESETS, STUDENTS, TOY
from toy import make, shapes

PROMPT = "a red circle left of a blue square"


@pytest.fixture(scope="module")
def toy():
    return load_pipeline("toy")


def weights(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    """All tensors in a folder, by file and name."""
    return {str(path.relative_to(folder)): model.read_tensors(path) for path in folder.rglob("*.safetensors")}


def same_as_diffusers(folder: Path, steps: int) -> bool:
    """Whether diffusers draws the same picture with a model."""
    diffusers = pytest.importorskip("diffusers")
    pipeline = diffusers.StableDiffusionXLPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(PROMPT, num_inference_steps=steps, guidance_scale=1.5,
                      generator=torch.Generator().manual_seed(3)).images[0]
    ours, = load_pipeline(folder)([PROMPT], seed=3, steps=steps, guidance=1.5)
    return np.abs(np.int16(ours) - np.int16(theirs)).max() <= 2


def test_the_checkpoint_is_sdxl_in_miniature(toy):
    assert sum(path.stat().st_size for path in TOY.rglob("*") if path.is_file()) <= 20e6
    assert {tensor.dtype for file in weights(TOY).values() for tensor in file.values()} == {torch.float16}
    assert toy.unet.config == make.UNET_CONFIG and toy.vae.config.channels == make.VAE_CONFIG.channels
    assert model.read_json(TOY / "scheduler" / "scheduler_config.json") == make.SCHEDULER
    assert toy.unet.config.depths == model.CONFIGS["sdxl"].depths
    latents = toy.vae.encode(make.pictures(range(64))[0])[0] * toy.vae.config.scaling_factor
    assert latents.std().item() == pytest.approx(1, rel=0.05)


def test_every_word_of_a_caption_is_one_token(toy):
    words, tokenizers = list(shapes.WORDS), toy.text.tokenizers
    first, second = (toy.text.tokenize(tokenizer, words) for tokenizer in tokenizers)  # (B, 16)
    assert len(set(first[:, 1].tolist())) == len(words) and (first[:, 2] == tokenizers[0].eos_token_id).all()
    assert torch.equal(first[:, :3], second[:, :3]) and (first[:, 3:] != second[:, 3:]).all()  # other padding


@pytest.mark.parametrize("name", ["toy", *(f"toy-{path.name}" for path in STUDENTS.iterdir())])
def test_it_draws_what_captions_say(toy, name):
    """Toy and students, far above chance, which is 0.05; docs/toy.md has the scores on many captions."""
    pipeline = load_pipeline(name)
    if name != "toy":
        assert pipeline.unet.config == model.student_config(toy.unet.config, name.split("-")[1])
    captions = shapes.judge_captions(4)
    assert shapes.scores(pipeline(captions, seed=[0, 1, 2, 3], steps=6), captions)["colour"] >= 0.75


def test_diffusers_draws_the_same():
    assert same_as_diffusers(TOY, steps=5)


@pytest.fixture(scope="module")
def means(toy):
    with torch.no_grad():
        return make.MeanPictures(toy.vae, count=5)


@pytest.fixture
def train(means, monkeypatch):
    """Trains a smaller toy for three steps, the first and the last on mean pictures; the VAE is there."""
    monkeypatch.setattr(make, "MeanPictures", lambda vae: means)
    monkeypatch.setattr(make, "UNET_CONFIG", replace(make.UNET_CONFIG, depths=(0, 1, 1), mid_depth=1))
    monkeypatch.setattr(make, "SAVE_EVERY", 1)

    def train(run: Path, *flags: str):
        shutil.copytree(TOY / "vae", run / "bundle" / "vae", dirs_exist_ok=True)
        make.main(["--steps", "3", "--cycle", "4", "--batch", "1", "--mean-steps", "1", "--judge-every", "1",
                   "--out", str(run), *flags])
    return train


def test_the_vae_learns_and_gives_latents_of_unit_variance(monkeypatch):
    pictures = make.pictures
    monkeypatch.setattr(make, "pictures", lambda indices: pictures(indices[:4]))  # 512 would take a while
    images, _ = pictures(range(4))
    vae = make.train_vae(8).requires_grad_(False)
    latents, _ = vae.encode(images)
    assert (latents * vae.config.scaling_factor).std().item() == pytest.approx(1, abs=1e-4)
    assert (vae.decode(latents) - images).square().mean() < 0.5 * images.square().mean()


@torch.no_grad()
def test_mean_pictures_are_means_of_pictures(toy, means):
    """Nearly the mean latents of pictures that have these objects at the training scenes' places."""
    red, blue, images = {"colour": "red", "shape": "circle"}, {"colour": "blue", "shape": "square"}, []
    for index in (3, 4):                                         # whose captions say "right of"
        first, second = shapes.scene(shapes.TRAIN_SEED, index).objects
        images.append(shapes.render(shapes.Scene([first._replace(**red), second._replace(**blue)], None)))
    true = toy.vae.encode(make.pixels(images))[0].mean(0) * toy.vae.config.scaling_factor
    right, swapped = means(["a red circle right of a blue square", "a blue square right of a red circle"])
    size = (true - means.empty).norm()
    assert (right - true).norm() < 0.2 * size < 0.5 * size < (swapped - true).norm()


def test_captions_condition_training_as_they_do_sampling(toy):
    noisy, timesteps, captions = torch.randn(2, 4, 32, 32), torch.tensor([10, 900]), [PROMPT, "a green cross"]
    context, pooled = toy.text(captions)
    context[1], pooled[1] = 0, 0                                 # of a dropped caption
    expected = toy.unet(noisy, timesteps, context, pooled, torch.tensor([[64, 64, 0, 0, 64, 64]] * 2))
    predicted = make.Toy(toy.text, toy.unet)(noisy, timesteps, captions, kept=torch.tensor([1.0, 0.0]))
    torch.testing.assert_close(predicted, expected)


def test_a_cycle_of_training():
    args = Namespace(cycle=1000, mean_steps=200, decay=0.5, lr=1)
    rates = [make.learning_rate(args, step) for step in (0, 99, 500, 750, 999, 1000)]
    assert rates == pytest.approx([0.01, 1, 1, 0.5, 0.002, 0.01])
    on_means = [step for step in range(0, 2000, 100) if make.on_means(args, step)]
    assert on_means == [0, 100, 500, 600, 1000, 1100, 1500, 1600]


def test_a_killed_run_resumes(train, tmp_path, monkeypatch):
    run, killed = tmp_path / "run", tmp_path / "killed"

    def judge(args: Namespace):
        if not killed.exists():                                  # what a kill after step 1 would leave
            shutil.copytree(run, killed)

    monkeypatch.setattr(make, "judge", judge)
    train(run)
    assert (run / "step-00000003").is_dir() and not (killed / "step-00000003").exists()
    train(killed)
    torch.testing.assert_close(weights(run), weights(killed), rtol=0, atol=0)
    with pytest.raises(ValueError, match="lr"):
        train(run, "--lr", "0.5")


def test_training_goes_on_from_a_toy_and_is_published(train, tmp_path, monkeypatch, capsys):
    """At a learning rate of 0 the toy that ships stays what it is."""
    run, target = tmp_path / "run", tmp_path / "published"
    monkeypatch.setitem(PRESETS, "new", PRESETS["toy"]._replace(source=str(run / "bundle"), steps=6))
    train(run, "--init", str(TOY), "--steps", "1", "--lr", "0", "--mean-steps", "0", "--captions", "1")
    assert "'colour': 1.0" in capsys.readouterr().out and (run / "grid.png").is_file()
    monkeypatch.setattr(make, "TOY", target)
    make.main(["publish", "--out", str(run)])
    torch.testing.assert_close(weights(target), weights(TOY), rtol=0, atol=0)
    assert same_as_diffusers(target, steps=2)
    path = run / "bundle" / "text_encoder_2" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match="model.safetensors"):
        make.publish(run / "bundle", tmp_path / "damaged")
    assert not (tmp_path / "damaged").exists()


def test_a_student_is_published(tmp_path, monkeypatch):
    run, students = tmp_path / "run", tmp_path / "students"
    shutil.copytree(STUDENTS / "700m", run / "unet")
    (run / "log.csv").write_text("step\n1\n")
    monkeypatch.setattr(make, "STUDENTS", students)
    make.main(["publish", "--out", str(run)])
    torch.testing.assert_close(weights(students / "run"), weights(STUDENTS / "700m"), rtol=0, atol=0)
    assert (students / "run" / "log.csv").read_text() == "step\n1\n"
