"""The embedded toy: its bundle, what it draws, and the script that made it."""

import json
import runpy
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import model
from options import PRESETS, program
from sample import load_pipeline
from toy import make, shapes

CHECKPOINT = Path(PRESETS["toy"].source)
PROMPT = "a red circle left of a blue square"


@pytest.fixture(scope="module")
def toy():
    return load_pipeline("toy")


def test_the_bundle_is_small_and_has_sdxls_topology():
    assert sum(path.stat().st_size for path in CHECKPOINT.rglob("*") if path.is_file()) <= 20e6
    unet = model.load_unet(CHECKPOINT)
    assert unet.config == make.UNET and {p.dtype for p in unet.parameters()} == {torch.float16}
    assert unet.config.depths == model.CONFIGS["sdxl"].depths and unet.config.pairs == 2
    student = model.student_config(unet.config, "700m")
    count = lambda config: sum(torch.Size(shape).numel() for shape in model.meta_shapes(config).values())
    assert count(student) / count(unet.config) == pytest.approx(782_822_724 / 2_567_463_684, abs=0.005)


def test_every_word_of_a_caption_is_one_token(toy):
    for tokenizer in toy.text.tokenizers:
        ids = tokenizer(list(shapes.WORDS))
        assert (ids[:, 0] == tokenizer.start).all() and (ids[:, 2] == tokenizer.end).all()
        assert len(set(ids[:, 1].tolist()) - {tokenizer.end}) == len(shapes.WORDS)
    ids = [tokenizer([PROMPT])[0].tolist() for tokenizer in toy.text.tokenizers]
    assert ids[0][:10] == ids[1][:10] and ids[0][10:] != ids[1][10:], "the second pads with another token"


def test_it_draws_what_captions_say(toy):
    """Far above chance, which is under 0.05; toy/README.md has the figures of many more captions."""
    seeds = list(range(8))
    captions = [shapes.caption(shapes.JUDGE_SEED, seed) for seed in seeds]
    scores = shapes.scores(toy(captions, seed=seeds, steps=10), captions)
    assert min(scores.values()) >= 0.7


def test_diffusers_draws_the_same(toy):
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.StableDiffusionXLPipeline.from_pretrained(CHECKPOINT)
    theirs.set_progress_bar_config(disable=True)
    expected = theirs(PROMPT, num_inference_steps=25, guidance_scale=PRESETS["toy"].guidance,
                      generator=torch.Generator().manual_seed(3)).images[0]
    difference = np.abs(np.int16(toy([PROMPT], seed=3)[0]) - np.int16(expected))
    assert difference.max() <= 2


def test_unknown_words_are_named(toy):
    with pytest.raises(ValueError, match=r"does not know dog, pink; it knows .*triangle.*such as 700m"):
        toy(["a pink dog"])


def test_a_damaged_bundle_says_what_is_missing_and_how_to_make_it(tmp_path, monkeypatch):
    shutil.copytree(CHECKPOINT, tmp_path / "toy", ignore=shutil.ignore_patterns("vae"))
    monkeypatch.setitem(PRESETS, "toy", PRESETS["toy"]._replace(source=str(tmp_path / "toy")))
    with pytest.raises(SystemExit, match=r"^error: no vae/config.json in .*; git checkout toy restores it"):
        program(lambda: load_pipeline("toy"), "")
    shutil.copytree(CHECKPOINT / "vae", tmp_path / "toy" / "vae")
    (tmp_path / "toy" / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"half")
    with pytest.raises(SystemExit, match=r"safetensors is cut or damaged.*; git checkout toy restores it"):
        program(lambda: load_pipeline("toy"), "")
    with pytest.raises(SystemExit) as found:
        program(lambda: load_pipeline("./nowhere"), "")
    assert "no folder ./nowhere" in found.value.code and "checkout" not in found.value.code

    def refuse():
        raise ValueError(f"--data: {tmp_path / 'toy'} has no image with a caption")

    with pytest.raises(SystemExit, match="caption$"):
        program(refuse, "")


@pytest.mark.parametrize("words, told", [
    ("judge --out runs/none", "runs/none has no bundle to judge: train it first"),
    ("publish --out runs/none", "no bundle to publish"), ("--out README.md", "README.md is a file"),
    ("--out ", "--out: is blank"), ("--steps 0", "--steps: 0 is not")])
def test_slips_in_the_command_line_of_its_making(monkeypatch, capsys, words, told):
    monkeypatch.setattr(sys, "argv", ["make", *words.split(" ")])
    monkeypatch.chdir(Path(model.__file__).parent)
    with pytest.raises(SystemExit) as found:
        runpy.run_path(make.__file__, run_name="__main__")
    printed = capsys.readouterr().err
    assert found.value.code == 2 and printed.startswith("error: ") and told in printed
    assert printed.count("\n") == 1


@pytest.fixture(scope="module")
def vae():
    return model.load_vae(CHECKPOINT, torch.float32).requires_grad_(False)


@pytest.fixture(scope="module")
def means(vae):
    return make.MeanPictures(vae, count=8)


def test_mean_pictures_are_means_of_pictures(vae, means):
    """Of the same places, told by colour and shape: nearly what the pictures themselves have in the mean."""
    kinds = (("red", "circle"), ("blue", "square"))
    scenes = [shapes.scene(shapes.TRAIN_SEED, index) for index in range(8)]
    images = [shapes.render(shapes.Scene([o._replace(colour=colour, shape=shape)
                                          for o, (colour, shape) in zip(scene.objects, kinds)], None))
              for scene in scenes if scene.relation == "above"]
    true = vae.encode(make.pixels(images))[0].mean(0) * vae.config.scaling_factor
    told, swapped = means(["a red circle above a blue square", "a blue square above a red circle"])
    error = lambda guess: ((guess - true).norm() / (true - means.empty).norm()).item()
    assert error(told) < 0.2 < 0.5 < error(swapped)


def test_latents_are_scaled_to_their_standard_deviation():
    other = model.load_vae(CHECKPOINT, torch.float32)
    published, other.config = other.config, replace(other.config, scaling_factor=1.0)
    assert make.scaled(other, 64).config.scaling_factor == pytest.approx(published.scaling_factor, rel=0.05)


def test_training_resumes_and_leaves_a_bundle(means, tmp_path, monkeypatch):
    """Three steps, on means, a picture and means, stopped after the first or not, give the same weights."""
    def run(folder: Path, steps: int):
        monkeypatch.setattr(sys, "argv", [
            "make", "--steps", str(steps), "--vae-steps", "2", "--batch", "2", "--decay", "0.1",
            "--mean-steps", "1", "--captions", "1", "--out", str(folder)])
        make.main(make.command_line())

    monkeypatch.setattr(make, "MeanPictures", lambda vae: means)  # these four take a while
    monkeypatch.setattr(make, "UNET", replace(make.UNET, depths=(0, 1, 1), mid_depth=1))
    monkeypatch.setattr(make, "scaled", lambda vae: vae)
    judge, examples, on_means = make.judge, make.examples, []
    monkeypatch.setattr(make, "judge", lambda args: None)
    monkeypatch.setattr(make, "examples", lambda indices, vae, means: (
        on_means.append(means is not None), examples(indices, vae, means))[1])
    run(tmp_path / "whole", 3)
    assert on_means == [True, False, True]
    shutil.copytree(tmp_path / "whole" / "bundle" / "vae", tmp_path / "parts" / "bundle" / "vae")
    make.write_tokenizers(tmp_path / "parts" / "bundle")
    run(tmp_path / "parts", 1)
    monkeypatch.setattr(make, "judge", judge)
    run(tmp_path / "parts", 3)
    whole, parts = (make.load_checkpoint(tmp_path / name)[1] for name in ("whole", "parts"))
    assert whole.keys() == parts.keys() and all(torch.equal(whole[name], parts[name]) for name in whole)
    make.publish(tmp_path / "parts" / "bundle", tmp_path / "published")
    assert len(load_pipeline(str(tmp_path / "published"))([PROMPT], steps=1)) == 1
    assert json.loads((tmp_path / "published" / "model_index.json").read_text()) == make.INDEX
