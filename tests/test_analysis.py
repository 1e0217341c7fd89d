"""The figures: maps are softmaxes, components are numpy's, charts show their numbers."""

import argparse
import math

import numpy as np
import pytest
import torch
from common import analyze, fill
from PIL import Image, ImageColor
from torch import nn

import analysis
import model
from analysis import (
    ALL, attention_map, block_similarity, feature_groups, find_object, knock_out, on_object,
    principal_components)
from sample import load_pipeline
from support import plots, table4
from support.files import read_csv, write_csv
from support.hub import TOY
from support.table4 import PROMPTS
from toy import shapes


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("a red box\n\nblue sky on my box\n")
    return path


@torch.no_grad()
def test_an_attention_map_is_the_mean_of_softmaxes_over_heads():
    attention, x = fill(model.Attention(12, heads=3)), 4 * torch.randn(2, 5, 12)
    q, k = (layer(x).view(2, 5, 3, 4) for layer in (attention.to_q, attention.to_k))
    expected = torch.einsum("bthd,bshd->bhts", q, k).div(2).softmax(3).mean(1)  # 2 = sqrt(d)
    torch.testing.assert_close(attention_map(attention, x), expected)
    assert expected.std(2).mean() > 0.05, "a map that is not uniform"


def test_principal_components_are_numpys():
    rows = torch.randn(40, 30, generator=torch.Generator().manual_seed(0)) * torch.linspace(0.1, 3, 30)
    scores, explained = principal_components(rows)
    centered = rows.double().numpy() - rows.double().numpy().mean(0)
    left, values, right = np.linalg.svd(centered, full_matrices=False)
    signs = np.sign(right[np.arange(3), np.abs(right[:3]).argmax(1)])
    np.testing.assert_allclose(scores.numpy(), (left * values)[:, :3] * signs, atol=1e-9)
    np.testing.assert_allclose(explained.numpy(), (values**2 / (values**2).sum())[:3], atol=1e-12)
    torch.testing.assert_close(principal_components(-rows)[0], -scores)  # the sign is the direction's


def test_the_query_is_on_the_object_that_the_caption_names_first():
    blue, red = shapes.Object("blue", "square", 20, 40, 10), shapes.Object("red", "circle", 46, 18, 10)
    image = shapes.render(shapes.Scene([blue, red], None))
    found = find_object(image, "a red circle and a blue square")
    assert (round(found.x), round(found.y), found.color) == (46, 18, "red")
    assert find_object(image, "a portrait of a koala") is find_object(image, "a green circle") is None
    uniform, patch = torch.full((64,), 1 / 64), torch.zeros(64)
    patch[2 * 8 + 5] = 1                                         # at (44, 20), inside the circle
    assert on_object(uniform, found) == pytest.approx(1)
    assert on_object(patch, found) == pytest.approx(64 * 64 / shapes.coverage(found).sum(), rel=0.01)
    assert math.isnan(on_object(uniform, None))


def test_attention_measures_every_stage_with_self_attention(small, prompts, tmp_path):
    analyze("attention", "--model", small["sdxl"], small["700m"], "--prompts", prompts, "--steps", 2,
            "--out", tmp_path / "a.png")
    rows = read_csv(tmp_path / "a.csv")
    with_mid, without = ["DW-2", "DW-3", "Mid", "UP-1", "UP-2"], ["DW-2", "DW-3", "UP-1", "UP-2"]
    assert [row["stage"] for row in rows] == 2 * with_mid + 2 * without
    assert [row["prompt"] for row in rows] == 5 * ["a red box"] + 5 * ["blue sky on my box"] + [
        *4 * ["a red box"], *4 * ["blue sky on my box"]]
    for row in rows:
        parts = [float(row[f"PC{i}"]) for i in (1, 2, 3)]
        assert 1 >= parts[0] >= parts[1] >= parts[2] >= 0 and sum(parts) <= 1 + 1e-9
    picture = Image.open(tmp_path / "a.png")
    assert picture.width >= 11 * 152 and picture.height >= 4 * 152


def test_a_map_is_of_the_step_and_of_the_half_with_the_prompt(small):
    pipeline = load_pipeline(small["sdxl"])

    def mid_map(prompt: str, at: float) -> torch.Tensor:
        return next(analysis.stage_maps(pipeline, [prompt], 0, 4, at))[1]["Mid"]

    early = mid_map("a red box", 0.0)
    assert torch.equal(early, mid_map("a red box", 0.0))
    assert not torch.equal(early, mid_map("a red box", 1.0))
    assert not torch.equal(early, mid_map("blue sky", 0.0))


def test_similarity_is_the_mean_over_prompts(small, prompts, tmp_path):
    analyze("similarity", "--model", small["sdxl"], "--prompts", prompts, "--steps", 2, "--seed", 5,
            "--out", tmp_path / "s.png")
    rows = [row for row in read_csv(tmp_path / "s.csv") if row["stage"] == "UP-1"]
    pipeline = load_pipeline(small["sdxl"])
    found = analysis.stage_similarities(pipeline, ["a red box"], 5, 2)
    assert {stage: tuple(values.shape) for stage, values in found.items()} == {
        "DW-2": (1, 1), "DW-3": (1, 2), "Mid": (1, 2), "UP-1": (1, 2), "UP-2": (1, 1)}
    one, = found["UP-1"].tolist()
    two, = analysis.stage_similarities(pipeline, ["blue sky on my box"], 6, 2)["UP-1"].tolist()
    for row, a, b in zip(rows, one, two, strict=True):
        assert float(row["cosine"]) == pytest.approx((a + b) / 2)
        assert float(row["spread"]) == pytest.approx(abs(a - b) / 2**0.5)
    assert [float(row["normalized index"]) for row in rows] == [0.5, 1.0]
    outputs = torch.tensor([[[1.0, 0.0]], [[3.0, 4.0]], [[-6.0, -8.0]]])
    assert block_similarity(outputs).tolist() == pytest.approx([0.6, -1.0])


@torch.no_grad()
def test_a_knockout_is_the_mean_over_tokens_or_pixels_and_ends():
    network = fill(nn.ModuleDict({"linear": nn.Linear(3, 5), "conv": nn.Conv2d(3, 5, 1)}))
    tokens, pixels = torch.randn(2, 7, 3), torch.randn(2, 3, 4, 6)
    a, b = network["linear"](tokens), network["conv"](pixels)
    with pytest.raises(KeyError), knock_out(network, ["linear", "conv"]):
        torch.testing.assert_close(network["linear"](tokens), a.sum(1, keepdim=True).div(7).repeat(1, 7, 1))
        torch.testing.assert_close(network["conv"](pixels), b.sum((2, 3), True).div(24).expand(2, 5, 4, 6))
        raise KeyError                                           # what a stop does not leave behind
    with knock_out(network, ["conv"], zero=True):
        assert torch.equal(network["linear"](tokens), a) and not network["conv"](pixels).any()
    assert torch.equal(network["linear"](tokens), a) and torch.equal(network["conv"](pixels), b)


def test_knockouts_are_the_same_on_the_unet_of_diffusers():
    diffusers = pytest.importorskip("diffusers")
    ours = load_pipeline("toy", device="cpu")
    theirs = diffusers.StableDiffusionXLPipeline.from_pretrained(TOY)
    groups, caption = feature_groups(ours.unet), "a red circle left of a blue square"
    # Not LF at DW stages: those of diffusers also return their skips.
    for group in (("SA", ALL), ("FFN", "UP-2"), ("Res", "DW-2"), ("LF", "UP-1")):
        with knock_out(ours.unet, groups[group]), knock_out(theirs.unet, groups[group]):
            image, = ours([caption], steps=2, seed=5)
            expected, = theirs(caption, num_inference_steps=2, guidance_scale=ours.preset.guidance,
                               generator=torch.Generator().manual_seed(5)).images
        assert abs(np.asarray(image, int) - np.asarray(expected, int)).max() <= 1, group


def test_knockouts_of_every_type_and_stage_that_a_model_has(small, prompts, tmp_path):
    analyze("knockout", "--model", small["sdxl"], "--prompts", prompts, "--limit", 1, "--steps", 1,
            "--out", tmp_path / "k.png")
    rows = read_csv(tmp_path / "k.csv")
    distances = {(row["features"], row["stage"]): float(row["distance"]) for row in rows}
    assert {row["color"] for row in rows} == {"nan"}            # not a caption of the toy's
    assert [kind for kind, stage in distances if stage == "DW-1"] == ["Res", "LF"]
    assert len(rows) == len(distances) == 1 + 3 * (1 + 5) + 2 * (1 + 7)
    assert distances.pop(("intact", ALL)) == 0 and min(distances.values()) > 0


def pixels_of(picture: Image.Image, color: str) -> np.ndarray:
    """Where a picture, below its title and legend, has exactly this color: (N, 2), y and x."""
    found = (np.asarray(picture) == ImageColor.getrgb(color)).all(axis=2)
    return np.argwhere(found[110:]) + (110, 0)


def test_bars_are_as_long_as_their_numbers():
    picture = plots.bar_chart("t", ["first", "second"], {"a": [1.0, 2.0], "b": [4.0]}, "x")
    first, second = (pixels_of(picture, color)[:, 1] for color in plots.COLORS[:2])
    assert np.ptp(first) / np.ptp(second) == pytest.approx(2, rel=0.02)
    assert second.min() - first.min() == pytest.approx(np.ptp(first) / 4, rel=0.02)  # beside each other


def test_dots_are_at_their_numbers_and_a_share_ends_at_one():
    rows = {"a": [(0.0, math.nan), (math.nan, math.nan), (1.0, 0.5)]}
    picture = plots.dot_chart("t", ["x", "y", "z"], rows, "score", share=True)
    low, none, high = (pixels_of(picture, color) for color in plots.COLORS[:3])
    zero, one = low[:, 1].min() + 8, high[:, 1].max() - 8        # dots have a radius of 8
    assert np.ptp(low[:, 1]) == 16 and not len(none)
    assert high[:, 1].min() == pytest.approx((zero + one) / 2, abs=3)  # a spread of 0.5, to the left alone


def test_numbers_are_readable():
    numbers = [1234567, 2567.46, 0.123456, math.nan, "text", (0.5, 0.25), (0.5, math.nan)]
    assert [plots.format_number(number) for number in numbers] == [
        "1,234,567", "2,567", "0.1235", "", "text", "0.5 ± 0.25", "0.5"]


def test_curves_draw_every_loss_that_a_run_has(tmp_path):
    header = ["step", "task", "outKD", "featKD"]
    for name in ("a", "b"):
        rows = [[i, 1 / i, 0, 10 / i] for i in range(1, 41)]
        write_csv(tmp_path / name / "log.csv", header, rows)
    analyze("curves", tmp_path / "a", tmp_path / "b", "--out", tmp_path / "c.png")
    assert Image.open(tmp_path / "c.png").size == (1600, 2 * 846)  # two charts: outKD is 0 throughout
    write_csv(tmp_path / "new" / "log.csv", header, [])
    with pytest.raises(ValueError, match="log.csv"):
        plots.loss_curves([tmp_path / "new"])


def test_small_vocabularies_are_given_captions_and_others_prompts(small, monkeypatch):
    args = argparse.Namespace(prompts=None, limit=None, model=["toy", str(small["sdxl"])])
    captions = analysis.choose_prompts(args, 5)
    assert len(captions) == 5 and all(len(shapes.parse(caption)[0]) == 2 for caption in captions)
    monkeypatch.setattr(table4, "SMALL_VOCABULARY", 50)           # the toy has 85 words
    assert analysis.choose_prompts(args, 5) == PROMPTS
