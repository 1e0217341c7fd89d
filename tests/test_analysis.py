"""The figures: what is drawn and counted is diffusers', numpy's and the paper's."""

import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from bundles import bundle
from common import ANSWERS, UNETS, fill, inputs
from PIL import Image
from safetensors.torch import load_file

import analysis
import chart
import costs
import model
from analysis import attention_map, block_similarity, on_object, principal_components, query_of, watch
from files import read_csv as read
from model import UNet, UNetConfig
from sample import load_pipeline
from toy import shapes

ROOT = Path(__file__).parents[1]
STORED = load_file(ANSWERS.with_name("analysis.safetensors"))


def run(*words):
    args = analysis.command_line(list(map(str, words)))
    getattr(analysis, args.command)(args)


# Attention


@torch.no_grad()
def maps(paths: list[str]) -> dict[str, torch.Tensor]:
    unet, found = fill(UNet(UNetConfig.from_diffusers(UNETS["sdxl"]))), {}
    norms = [path.replace("attn1", "norm1") for path in paths]
    each = lambda outputs: found.update({path: attention_map(unet.get_submodule(path), outputs[norm])
                                         for path, norm in zip(paths, norms)})
    with watch(unet, norms, each):
        unet(**inputs(UNETS["sdxl"], "batch"))
    return found


def test_attention_maps_are_those_of_diffusers():
    found = maps(list(STORED))
    for path, expected in STORED.items():
        torch.testing.assert_close(found[path], expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found[path].sum(2), torch.ones(expected.shape[:2]))
        assert expected.std(2).mean() > 0.05 / expected.shape[2], "not every token is attended to alike"


def test_all_attention_maps_are_those_of_the_diffusers_that_is_installed():
    pytest.importorskip("diffusers")
    import oracle_analysis
    unet = UNet(UNetConfig.from_diffusers(UNETS["sdxl"]))
    paths = [path for stage in model.stages(unet.config) for path in model.feature_paths(unet, "SA", stage)]
    expected = oracle_analysis.maps(paths)
    for path, found in maps(paths).items():
        torch.testing.assert_close(found, expected[path], rtol=1e-5, atol=1e-5)


def test_principal_components_are_numpys():
    rows = (torch.randn(40, 30, generator=torch.Generator().manual_seed(0))
            @ torch.diag(torch.linspace(0.1, 3, 30)))
    scores, explained = principal_components(rows)
    centred = rows.double().numpy() - rows.double().numpy().mean(0)
    left, values, right = np.linalg.svd(centred, full_matrices=False)
    signs = np.sign(right[np.arange(3), np.abs(right[:3]).argmax(1)])
    np.testing.assert_allclose(scores.numpy(), (left * values)[:, :3] * signs, atol=1e-9)
    np.testing.assert_allclose(explained.numpy(), (values**2 / (values**2).sum())[:3], atol=1e-12)
    assert torch.equal(scores, principal_components(rows)[0])
    # The sign is the direction's, not the data's.
    torch.testing.assert_close(principal_components(-rows)[0], -scores)


def test_the_toys_query_lies_on_what_the_caption_names_first():
    blue, red = (shapes.Object("blue", "square", 20, 40, 10), shapes.Object("red", "circle", 46, 18, 10))
    image = shapes.render(shapes.Scene([blue, red], None))
    x, y, found = query_of(image, "a red circle and a blue square")
    assert (round(x * 64), round(y * 64)) == (46, 18) and found.colour == "red"
    assert query_of(image, "a portrait of a koala") == (0.5, 0.5, None)
    assert query_of(image, "a green circle") == (0.5, 0.5, None)
    uniform, there = torch.full((64,), 1 / 64), torch.zeros(64)
    there[2 * 8 + 5] = 1                                         # the patch at (44, 20), inside of the circle
    assert on_object(uniform, found) == pytest.approx(1)
    assert on_object(there, found) == pytest.approx(64 * 64 / shapes.coverage(found).sum(), rel=0.01)
    assert math.isnan(on_object(uniform, None))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return bundle(tmp_path_factory.mktemp("sdxl"), "sdxl")


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("a red box\n\nblue sky on my box\n")
    return path


def test_attention_draws_models_below_each_other_and_gaps_for_what_is_not_there(
        folder, prompts, tmp_path, capsys):
    small = bundle(tmp_path / "700m", "700m")
    command = ("attention", "--model", folder, small, "--prompts", prompts, "--steps", 2, "--out")
    run(*command, tmp_path / "a.png")
    rows = read(tmp_path / "a.csv")
    assert [(Path(row["model"]).name, row["prompt"], row["stage"]) for row in rows] == [
        (name, prompt, stage) for name, stages in ((folder.name, ("DW-2", "DW-3", "Mid", "UP-1", "UP-2")),
                                                   ("700m", ("DW-2", "DW-3", "UP-1", "UP-2")))
        for prompt in ("a red box", "blue sky on my box") for stage in stages]
    for row in rows:
        parts = [float(row[f"PC{i}"]) for i in (1, 2, 3)]
        assert 1 >= parts[0] >= parts[1] >= parts[2] >= 0 and sum(parts) <= 1 + 1e-9
    picture = np.asarray(Image.open(tmp_path / "a.png"))
    assert picture.shape[1] >= 6 * 152 and "PC1" in capsys.readouterr().out
    run(*command, tmp_path / "b.png")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert (tmp_path / "a.csv").read_bytes() == (tmp_path / "b.csv").read_bytes()


def test_the_map_is_of_the_step_and_of_the_half_that_sees_the_prompt(folder):
    pipeline = load_pipeline(str(folder))
    _, early = analysis.stage_maps(pipeline, "a red box", 0, 4, 0.0)
    _, late = analysis.stage_maps(pipeline, "a red box", 0, 4, 1.0)
    _, other = analysis.stage_maps(pipeline, "blue sky", 0, 4, 0.0)
    assert not torch.equal(early["Mid"], late["Mid"]) and not torch.equal(early["Mid"], other["Mid"])
    _, again = analysis.stage_maps(pipeline, "a red box", 0, 4, 0.0)
    assert all(torch.equal(early[stage], again[stage]) for stage in early)
    assert not any(module._forward_hooks for module in pipeline.unet.modules()), "no hook is left behind"


# Similarity


def test_similarity_of_known_vectors():
    a, b, c = torch.tensor([[[1.0, 0.0]]]), torch.tensor([[[3.0, 4.0]]]), torch.tensor([[[-6.0, -8.0]]])
    assert block_similarity([a, b, c]).tolist() == [[0.6, -1.0]]


def test_similarity_of_blocks_that_add_nothing_is_one(folder):
    pipeline = load_pipeline(str(folder))
    for path, module in pipeline.unet.mid_block.named_modules():
        if path.endswith(("attn1.to_out.0", "attn2.to_out.0", "ff.net.2")):
            torch.nn.init.zeros_(module.weight), torch.nn.init.zeros_(module.bias)
    found = analysis.stage_similarity(pipeline, "a red box", 0, 2)
    assert found["Mid"].tolist() == [1.0, 1.0]                   # three blocks
    assert found.keys() == {"DW-2", "DW-3", "Mid", "UP-1", "UP-2"} and len(found["DW-2"]) == 1
    assert all(-1 <= value < 1 for stage in ("DW-3", "UP-1") for value in found[stage].tolist())


def test_similarity_averages_prompts(folder, prompts, tmp_path):
    run("similarity", "--model", folder, "--prompts", prompts, "--steps", 2, "--seed", 5,
        "--out", tmp_path / "s.png")
    rows = [row for row in read(tmp_path / "s.csv") if row["stage"] == "UP-1"]
    pipeline = load_pipeline(str(folder))
    one, two = (analysis.stage_similarity(pipeline, prompt, seed, 2)["UP-1"].tolist()
                for prompt, seed in (("a red box", 5), ("blue sky on my box", 6)))
    for row, a, b in zip(rows, one, two, strict=True):
        assert (float(row["cosine"]) == pytest.approx((a + b) / 2)
                and float(row["spread"]) == pytest.approx(abs(a - b) / 2**0.5))
    assert [float(row["normalised index"]) for row in rows] == [0.5, 1.0]


# Budget and latency


def test_budget_is_the_papers(tmp_path, capsys):
    run("budget", "--out", tmp_path / "budget.png")
    rows = [row for row in read(tmp_path / "budget.csv") if row["network"] == "U-Net"]
    total = lambda name, key: sum(int(row[key]) for row in rows if row["model"] == name)
    assert [total(name, "parameters") // 10**6 for name in ("sdxl", "1b", "700m")] == [2567, 1161, 782]
    assert [total(name, "parameters") for name in ("sdxl", "1b", "700m")] == [
        2_567_463_684, 1_161_184_324, 782_822_724]
    # A count that was made in another way: 6.761, 3.432 and 2.702 TFLOP for a pass at 1024 x 1024.
    work = [2 * total(name, "multiply-adds") / 1e12 for name in ("sdxl", "1b", "700m")]
    assert work == pytest.approx([6.761, 3.432, 2.702], rel=2e-3)
    transformers = sum(int(row["parameters"]) for row in rows
                       if (row["model"], row["kind"]) == ("sdxl", "transformer"))
    assert transformers > 0.8 * total("sdxl", "parameters")      # the bottleneck of section 3
    assert not any(row["stage"] == "Mid" for row in rows if row["model"] == "700m")
    texts, vae = ([row for row in read(tmp_path / "budget.csv") if row["network"].startswith(part)]
                  for part in ("text", "VAE"))
    assert int(texts[0]["parameters"]) // 10**6 == 817
    assert sum(int(row["parameters"]) for row in vae if row["model"] == "sdxl") == 83_653_863
    assert "2,567" in capsys.readouterr().out


def test_parts_of_the_work_are_all_of_it(folder):
    config = model.read_config(UNet, folder)[0]
    with costs.flop_counter() as counter:
        UNet(config)(*costs.unet_inputs(config, 77, config.sample_size))
    assert 2 * sum(macs for _, macs in costs.unet_parts(config, 77).values()) == counter.get_total_flops()


def test_latency_on_any_machine(folder, tmp_path, capsys):
    run("latency", "--model", folder, "--steps", 2, "--repeat", 1, "--size", 64, "--device", "cpu",
        "--out", tmp_path / "l.png")
    rows = read(tmp_path / "l.csv")
    assert [row["network"] for row in rows] == ["text encoders", "U-Net", "VAE decoder"]
    config = replace(model.read_config(UNet, folder)[0], sample_size=8)
    work = 2 * 2 * 2 * sum(macs for _, macs in costs.unet_parts(config, 77).values())  # steps, guidance, FLOP
    assert float(rows[1]["TFLOP"]) == pytest.approx(work / 1e12)
    assert all(float(row["seconds"]) > 0 for row in rows) and "paper, RTX 4090" not in rows[1]
    assert float(rows[1]["by counting"]) == pytest.approx(float(rows[1]["seconds"]))
    assert "TFLOP/s" in capsys.readouterr().out


def test_seconds_is_a_median_after_one_to_warm_up(monkeypatch):
    ends, calls = iter([0, 100, 0, 3, 0, 1, 0, 2]), []
    monkeypatch.setattr(costs.time, "perf_counter", lambda: next(ends))
    assert costs.seconds(lambda: calls.append(1), "cpu", 3) == 2 and len(calls) == 4


# Charts


def test_ticks_are_round_and_enclose():
    for low, high in ((0, 1), (0.75, 1), (-3.2, 8.9), (0.0012, 0.0047), (5, 5.00001), (1, 1), (0.0, 0.0)):
        found = chart.ticks(low, high)
        assert found[0] <= low + 1e-9 and found[-1] >= high - 1e-9 and 2 <= len(found) <= 8
    assert chart.ticks(0, 1) == [0, 0.2, 0.4, 0.6, 0.8, 1.0]


def test_bars_are_as_long_as_their_numbers():
    picture = np.asarray(chart.bars("t", {"a": [[1.0, 2.0]], "b": [[4.0]]}, ["first", "second"]))
    # Without the legend.
    colour = lambda i: (picture == [int(chart.COLOURS[i][j:j + 2], 16) for j in (1, 3, 5)]).all(2)[80:]
    longest = lambda i: np.sort(colour(i).sum(1))
    first, second = longest(0), longest(1)
    assert first[-1] / second[-1] == pytest.approx(2, rel=0.02)


def test_a_curve_goes_up_where_its_numbers_do():
    picture = np.asarray(chart.lines("t", "x", "y", {"c": [(0.0, 0.0, 0.0), (1.0, 1.0, 0.1)]}))
    blue = np.argwhere((picture == [0x00, 0x72, 0xb2]).all(2) & (np.arange(len(picture)) > 120)[:, None])
    left, right = blue[blue[:, 1].argmin()], blue[blue[:, 1].argmax()]
    assert left[0] > right[0] + 200


# Bad input


@pytest.mark.parametrize("words, told", [
    (["attention", "--model", "nothing"], "--model nothing is neither"),
    (["budget", "--out", "x.jpg"], "not the name of a .png file"),
    (["similarity", "--at", "2"], "unrecognized arguments"),
    (["latency", "--size", "60"], "the nearest: 56 or 64"),
    (["ablation", "--table", "3e"], "invalid choice"),
    ([], "required: COMMAND"), (["figures"], "invalid choice")])
def test_mistakes_are_told_in_a_line_before_torch_is_imported(words, told):
    done = subprocess.run([sys.executable, "-X", "importtime", ROOT / "analysis.py", *words],
                          capture_output=True, text=True, env=os.environ | {"PYTHONPATH": ""})
    imported = {line.split("|")[-1].strip() for line in done.stderr.splitlines() if "import time:" in line}
    assert done.returncode in (1, 2) and not imported & {"torch", "numpy", "PIL"}
    assert told in done.stderr.splitlines()[-1] and done.stderr.splitlines()[-1].startswith("error: ")


def test_a_file_of_prompts_without_any_is_told(folder, tmp_path):
    for content, told in ((b"\n\n", "has no prompts"), (b"\xff\xfe\x80", "is not a text in UTF-8")):
        (tmp_path / "none.txt").write_bytes(content)
        with pytest.raises(ValueError, match=f"none.txt {told}"):
            run("similarity", "--model", folder, "--prompts", tmp_path / "none.txt",
                "--out", tmp_path / "s.png")


@pytest.mark.parametrize("command", ["", "attention", "similarity", "budget", "latency", "ablation"])
def test_help_fits_a_screen(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "110")
    with pytest.raises(SystemExit):
        analysis.command_line([*filter(None, [command]), "--help"])
    printed = capsys.readouterr().out
    assert len(printed.splitlines()) <= 40 and "None" not in printed
