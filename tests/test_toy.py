"""The embedded toy: its files, what it draws, and the script that made it."""

import shutil
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch
from common import CAPTION_WORDS
from PIL import Image

import model
from sample import load_pipeline
from support.hub import STUDENTS, TOY
from toy import judging, make, shapes


@pytest.fixture(scope="module")
def toy():
    return load_pipeline("toy")


def weights(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    """All tensors in a folder, by file and name."""
    return {str(path.relative_to(folder)): model.read_tensors(path) for path in folder.rglob("*.safetensors")}


def test_the_checkpoint_is_sdxl_in_miniature(toy):
    assert sum(path.stat().st_size for path in TOY.rglob("*") if path.is_file()) <= 20e6
    assert {tensor.dtype for file in weights(TOY).values() for tensor in file.values()} == {torch.float16}
    assert toy.unet.config == make.UNET_CONFIG and toy.vae.config.channels == make.VAE_CONFIG.channels
    assert toy.unet.config.depths == model.CONFIGS["sdxl"].depths
    latents = toy.vae.encode(make.pictures(range(64))[0])[0] * toy.vae.config.scaling_factor
    assert latents.std().item() == pytest.approx(1, rel=0.05)


def test_every_word_of_a_caption_is_one_token(toy):
    words, tokenizers = list(CAPTION_WORDS), toy.text.tokenizers
    first, second = (toy.text.tokenize(tokenizer, words) for tokenizer in tokenizers)  # (B, 16)
    assert len(set(first[:, 1].tolist())) == len(words) and (first[:, 2] == tokenizers[0].eos_token_id).all()
    assert torch.equal(first[:, :3], second[:, :3]) and (first[:, 3:] != second[:, 3:]).all()  # other padding


@pytest.mark.parametrize("name", sorted(path.name for path in STUDENTS.iterdir()))
def test_students_draw_what_captions_say(toy, name):
    """Far above chance, which is 0.05; docs/toy.md has the scores on many captions."""
    pipeline, captions = load_pipeline(f"toy-{name}"), shapes.judge_captions(4)
    assert pipeline.unet.config == model.student_config(toy.unet.config, name.split("-")[0])
    assert shapes.scores(pipeline(captions, seed=[0, 1, 2, 3], steps=5), captions)["color"] >= 0.75


@pytest.fixture(scope="module")
def means(toy):
    with torch.no_grad():
        return make.MeanPictures(toy.vae, count=5)


@torch.no_grad()
def test_mean_pictures_are_means_of_pictures(toy, means):
    """Nearly the mean latents of pictures that have these objects at the training scenes' places."""
    red, blue, images = {"color": "red", "shape": "circle"}, {"color": "blue", "shape": "square"}, []
    for index in (3, 4):                                         # whose captions say "right of"
        first, second = shapes.scene(shapes.TRAIN_SEED, index).objects
        images.append(shapes.render(shapes.Scene([first._replace(**red), second._replace(**blue)], None)))
    true = toy.vae.encode(make.pixels(images))[0].mean(0) * toy.vae.config.scaling_factor
    right, swapped = means(["a red circle right of a blue square", "a blue square right of a red circle"])
    size = (true - means.empty).norm()
    assert (right - true).norm() < 0.2 * size < 0.5 * size < (swapped - true).norm()


def test_a_stopped_run_resumes_and_is_published(means, tmp_path, monkeypatch):
    """Three steps of a smaller toy, the first and the last on mean pictures; the VAE is there."""
    monkeypatch.setattr(make, "MeanPictures", lambda vae: means)
    monkeypatch.setattr(make, "UNET_CONFIG", replace(make.UNET_CONFIG, depths=(0, 1, 1), mid_depth=1))
    monkeypatch.setattr(make, "judge", lambda args: {})
    for name, steps in (("whole", "3"), ("pieces", "1"), ("pieces", "3")):
        shutil.copytree(TOY / "vae", tmp_path / name / "bundle" / "vae", dirs_exist_ok=True)
        make.main(["--steps", steps, "--cycle", "4", "--batch", "1", "--mean-steps", "1",
                   "--out", str(tmp_path / name)])
    for folder in ("step-00000003", "bundle"):
        whole, pieces = (weights(tmp_path / name / folder) for name in ("whole", "pieces"))
        torch.testing.assert_close(whole, pieces, rtol=0, atol=0)
    monkeypatch.setattr(make, "TOY", tmp_path / "published")
    make.main(["publish", "--out", str(tmp_path / "whole")])
    published = weights(tmp_path / "published")
    for name, tensors in whole.items():
        assert all(torch.equal(published[name][key], tensor.half()) for key, tensor in tensors.items())


def test_a_longer_run_is_judged_again(toy, tmp_path, monkeypatch):
    def blank(pipeline, unet, prompts, progress):
        return [Image.new("RGB", (64, 64))] * len(prompts)

    draw = mock.Mock(side_effect=blank)
    monkeypatch.setattr(judging, "draw", draw)
    unets = {"teacher": None, "student before": toy.unet, "student after": toy.unet}
    for steps, drawn in ((1, [8, 9]), (1, [8, 9]), (2, [8, 9, 8, 9])):
        judging.judge_run(tmp_path, steps, 9, toy, unets)
        assert [len(call.args[2]) for call in draw.mock_calls] == drawn


def test_a_preview_that_fails_is_gray(toy, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(judging, "draw", mock.Mock(side_effect=ValueError("the image is not finite")))
    judging.preview(toy, None, toy.unet, ["a red box"], tmp_path / "preview.png")
    with Image.open(tmp_path / "preview.png") as image:
        assert image.getpixel((image.width - 1, 0)) == (128, 128, 128)
    assert "no preview of the student: the image is not finite" in capsys.readouterr().err
