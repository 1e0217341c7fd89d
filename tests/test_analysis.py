"""The figures: attention maps are diffusers', components are numpy's, counts are the paper's."""

import argparse
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageColor
from bundles import bundle
from common import ANSWERS, UNETS, fill, inputs
from safetensors.torch import load_file
from test_model import PARAMETERS

import analysis
import model
from analysis import attention_map, block_similarity, find_query, main, on_object, principal_components
from model import UNet, UNetConfig
from sample import load_pipeline
from support import costs, plots
from support.data import PROMPTS
from support.files import read_csv, write_csv
from support.plots import loss_curves
from support.text import CLIPTokenizer
from toy import shapes

STORED = load_file(ANSWERS.with_name("analysis.safetensors"))


def run(*words):
    main([str(word) for word in words])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return bundle(tmp_path_factory.mktemp("sdxl"), "sdxl")


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("a red box\n\nblue sky on my box\n")
    return path


# Attention


@torch.no_grad()
def attention_maps(paths: list[str]) -> dict[str, torch.Tensor]:
    """Maps (B, T, T) of self-attention layers of a small U-Net."""
    unet = fill(UNet(UNetConfig.from_diffusers(UNETS["sdxl"])))
    norms = {path: path.replace("attn1", "norm1") for path in paths}
    with model.Features(unet, list(norms.values())) as captured:
        unet(**inputs(UNETS["sdxl"], "batch"))
    return {path: attention_map(unet.get_submodule(path), captured[norm]) for path, norm in norms.items()}


def test_attention_maps_are_those_of_diffusers():
    maps = attention_maps(list(STORED))
    for path, expected in STORED.items():
        torch.testing.assert_close(maps[path], expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(maps[path].sum(2), torch.ones(expected.shape[:2]))
        assert expected.std(2).mean() > 0.05 / expected.shape[2], "a map that is not uniform"


def test_attention_maps_are_those_of_the_installed_diffusers():
    pytest.importorskip("diffusers")
    import oracle_analysis
    unet, paths = UNet(UNetConfig.from_diffusers(UNETS["sdxl"])), []
    for stage in model.stages(unet.config):
        paths += model.feature_paths(unet, "SA", stage)
    expected = oracle_analysis.attention_maps(paths)
    for path, found in attention_maps(paths).items():
        torch.testing.assert_close(found, expected[path], rtol=1e-5, atol=1e-5)


def test_principal_components_are_numpys():
    rows = torch.randn(40, 30, generator=torch.Generator().manual_seed(0)) @ torch.diag(torch.linspace(0.1, 3, 30))
    scores, explained = principal_components(rows)
    centred = rows.double().numpy() - rows.double().numpy().mean(0)
    left, values, right = np.linalg.svd(centred, full_matrices=False)
    signs = np.sign(right[np.arange(3), np.abs(right[:3]).argmax(1)])
    np.testing.assert_allclose(scores.numpy(), (left * values)[:, :3] * signs, atol=1e-9)
    np.testing.assert_allclose(explained.numpy(), (values**2 / (values**2).sum())[:3], atol=1e-12)
    torch.testing.assert_close(principal_components(-rows)[0], -scores)  # the sign is the direction's


def test_the_query_is_on_the_object_that_the_caption_names_first():
    blue, red = shapes.Object("blue", "square", 20, 40, 10), shapes.Object("red", "circle", 46, 18, 10)
    image = shapes.render(shapes.Scene([blue, red], None))
    x, y, found = find_query(image, "a red circle and a blue square")
    assert (round(x * 64), round(y * 64)) == (46, 18) and found.colour == "red"
    assert find_query(image, "a portrait of a koala") == (0.5, 0.5, None)
    assert find_query(image, "a green circle") == (0.5, 0.5, None)
    assert find_query(image.resize((32, 32)), "a red circle") == (0.5, 0.5, None)
    uniform, patch = torch.full((64,), 1 / 64), torch.zeros(64)
    patch[2 * 8 + 5] = 1                                         # at (44, 20), inside the circle
    assert on_object(uniform, found) == pytest.approx(1)
    assert on_object(patch, found) == pytest.approx(64 * 64 / shapes.coverage(found).sum(), rel=0.01)
    assert math.isnan(on_object(uniform, None))


def test_attention_measures_every_stage_with_self_attention(folder, prompts, tmp_path):
    small = bundle(tmp_path / "700m", "700m")
    command = ("attention", "--model", folder, small, "--prompts", prompts, "--steps", 2, "--out")
    run(*command, tmp_path / "a.png")
    rows, expected = read_csv(tmp_path / "a.csv"), []
    for name, stages in ((folder.name, ("DW-2", "DW-3", "Mid", "UP-1", "UP-2")),
                         ("700m", ("DW-2", "DW-3", "UP-1", "UP-2"))):
        for prompt in ("a red box", "blue sky on my box"):
            expected += [(name, prompt, stage) for stage in stages]
    assert [(Path(row["model"]).name, row["prompt"], row["stage"]) for row in rows] == expected
    for row in rows:
        parts = [float(row[f"PC{i}"]) for i in (1, 2, 3)]
        assert 1 >= parts[0] >= parts[1] >= parts[2] >= 0 and sum(parts) <= 1 + 1e-9
    assert Image.open(tmp_path / "a.png").width >= 6 * 152
    run(*command, tmp_path / "b.png")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert (tmp_path / "a.csv").read_bytes() == (tmp_path / "b.csv").read_bytes()


def test_a_map_is_of_the_step_and_of_the_half_with_the_prompt(folder):
    pipeline = load_pipeline(str(folder))

    def maps(prompt: str, at: float) -> dict[str, torch.Tensor]:
        return next(analysis.stage_maps(pipeline, [prompt], 0, 4, at))[1]

    early = maps("a red box", 0.0)
    assert not torch.equal(early["Mid"], maps("a red box", 1.0)["Mid"])
    assert not torch.equal(early["Mid"], maps("blue sky", 0.0)["Mid"])
    again = maps("a red box", 0.0)
    assert all(torch.equal(early[stage], again[stage]) for stage in early)


# Similarity


def test_similarity_of_known_vectors():
    outputs = torch.tensor([[[1.0, 0.0]], [[3.0, 4.0]], [[-6.0, -8.0]]])
    assert block_similarity(outputs).tolist() == pytest.approx([0.6, -1.0])


def test_similarity_of_blocks_that_add_nothing_is_one(folder):
    pipeline = load_pipeline(str(folder))
    for path, module in pipeline.unet.mid_block.named_modules():
        if path.endswith(("attn1.to_out.0", "attn2.to_out.0", "ff.net.2")):
            torch.nn.init.zeros_(module.weight)
            torch.nn.init.zeros_(module.bias)
    found = analysis.stage_similarities(pipeline, ["a red box"], 0, 2)
    assert found["Mid"].tolist() == [[1.0, 1.0]]                 # three blocks
    assert found.keys() == {"DW-2", "DW-3", "Mid", "UP-1", "UP-2"} and found["DW-2"].shape == (1, 1)
    for stage in ("DW-3", "UP-1"):
        assert (-1 <= found[stage]).all() and (found[stage] < 1).all()


def test_similarity_is_the_mean_over_prompts(folder, prompts, tmp_path):
    run("similarity", "--model", folder, "--prompts", prompts, "--steps", 2, "--seed", 5, "--out", tmp_path / "s.png")
    rows = [row for row in read_csv(tmp_path / "s.csv") if row["stage"] == "UP-1"]
    pipeline = load_pipeline(str(folder))
    one, = analysis.stage_similarities(pipeline, ["a red box"], 5, 2)["UP-1"].tolist()
    two, = analysis.stage_similarities(pipeline, ["blue sky on my box"], 6, 2)["UP-1"].tolist()
    for row, a, b in zip(rows, one, two, strict=True):
        assert float(row["cosine"]) == pytest.approx((a + b) / 2)
        assert float(row["spread"]) == pytest.approx(abs(a - b) / 2**0.5)
    assert [float(row["normalised index"]) for row in rows] == [0.5, 1.0]


# Budget and latency


def test_budget_is_the_papers(tmp_path):
    run("budget", "--out", tmp_path / "budget.png")
    rows = read_csv(tmp_path / "budget.csv")

    def total(key: str, **parts: str) -> int:
        return sum(int(row[key]) for row in rows if parts.items() <= row.items())

    for name, teraflops in (("sdxl", 6.761), ("1b", 3.432), ("700m", 2.702)):
        assert total("parameters", model=name, network="U-Net") == PARAMETERS[name]
        # Counted in another way, for a pass at 1024 x 1024.
        assert 2 * total("multiply-adds", model=name, network="U-Net") / 1e12 == pytest.approx(teraflops, rel=2e-3)
    assert total("parameters", model="sdxl", kind="transformer") > 0.8 * PARAMETERS["sdxl"]  # section 3
    assert total("parameters", model="700m", stage="Mid") == 0
    assert total("parameters", model="sdxl", network="text encoders") // 10**6 == 817   # Table 1
    vae = [total("parameters", model="sdxl", network=f"VAE {part}") for part in ("encoder", "decoder")]
    assert sum(vae) == 83_653_863


def test_the_counts_of_all_parts_are_those_of_the_whole(folder):
    texts, vae, config = costs.read_configs(str(folder))
    parameters, macs = zip(*costs.count_unet(*costs.build_networks(texts, vae, config, 128)["U-Net"]).values())
    unet = UNet(config)                                          # not on the meta device
    assert (sum(parameters), sum(macs)) == costs.count_network(unet, costs.unet_inputs(config, 77, 16))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_latency_on_any_machine(folder, tmp_path, precision):
    run("latency", "--model", folder, "--steps", 2, "--repeat", 1, "--size", 64, "--device", "cpu",
        "--precision", precision, "--out", tmp_path / "l.png")
    rows = read_csv(tmp_path / "l.csv")
    texts, vae, unet = costs.read_configs(str(folder))
    networks = costs.build_networks(texts, vae, unet, 64)
    macs = {name: costs.count_network(*networks[name])[1] for name in ("text encoders", "U-Net", "VAE decoder")}
    macs["U-Net"] *= 2 * 2                                       # two steps, with guidance
    assert [row["network"] for row in rows] == list(macs)
    for row in rows:
        assert float(row["GFLOP"]) == pytest.approx(2 * macs[row["network"]] / 1e9)
        assert float(row["seconds"]) > 0 and "paper, RTX 4090" not in row
    assert float(rows[1]["by counting"]) == pytest.approx(float(rows[1]["seconds"]))


def test_seconds_are_the_median_after_a_run_to_warm_up(monkeypatch):
    ticks, calls = iter([0, 9, 0, 3, 0, 1, 0, 2]), []

    def network(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return a @ b

    monkeypatch.setattr(costs.time, "perf_counter", lambda: next(ticks))
    timed = costs.time_network(network, [torch.ones(2, 3), torch.ones(3, 4)], 5, 3)
    assert timed == (5 * 2 * 2 * 3 * 4, 2) and len(calls) == 4 * 5


# Charts


def test_ticks_are_round_and_enclose():
    for low, high in ((0, 1), (0.75, 1), (-3.2, 8.9), (0.0012, 0.0047), (5, 5.00001), (1, 1), (0.0, 0.0)):
        found = plots.ticks(low, high)
        assert found[0] <= low + 1e-9 and found[-1] >= high - 1e-9 and 2 <= len(found) <= 8
    assert plots.ticks(0, 1) == [0, 0.2, 0.4, 0.6, 0.8, 1.0]


def pixels_of(picture: np.ndarray, colour: str) -> np.ndarray:
    """Where a picture (H, W, 3), below its title and legend, has exactly this colour."""
    rgb = [int(colour[i:i + 2], 16) for i in (1, 3, 5)]
    return (picture[80:] == rgb).all(axis=2)


def test_bars_are_as_long_as_their_numbers():
    picture = np.asarray(plots.bar_chart("t", {"a": [[1.0, 2.0]], "b": [[4.0]]}, ["first", "second"]))
    first, second = (pixels_of(picture, plots.COLOURS[i]).sum(axis=1).max() for i in (0, 1))
    assert first / second == pytest.approx(2, rel=0.02)


def test_a_curve_goes_up_where_its_numbers_do():
    picture = np.asarray(plots.line_chart("t", "x", "y", {"c": [(0.0, 0.0, 0.0), (1.0, 1.0, 0.1)]}))
    points = np.argwhere(pixels_of(picture, plots.COLOURS[0]))
    left, right = points[points[:, 1].argmin()], points[points[:, 1].argmax()]
    assert left[0] > right[0] + 200


def test_numbers_are_readable():
    numbers = [1234567, 2567.46, 0.123456, math.nan, "text"]
    assert [plots.format_number(number) for number in numbers] == ["1,234,567", "2,567", "0.1235", "", "text"]


# Bad input


@pytest.mark.parametrize("words", [
    "attention --model nothing", "budget --out x.jpg", "similarity --at 2", "latency --size 60", "ablation --table 3e",
    "", "figures"])
def test_a_mistake_on_the_command_line_is_one_line(words, capsys):
    with pytest.raises(SystemExit, match="2"):
        run(*words.split())
    assert capsys.readouterr().err.startswith("error: ")


@pytest.mark.parametrize("content", [b"\n\n", b"\xff\xfe\x80"])
def test_a_file_without_prompts_is_named(folder, tmp_path, content):
    (tmp_path / "none.txt").write_bytes(content)
    with pytest.raises(ValueError, match="none.txt"):
        run("similarity", "--model", folder, "--prompts", tmp_path / "none.txt", "--out", tmp_path / "s.png")


def test_small_vocabularies_are_given_captions_and_others_prompts(folder, monkeypatch):
    args = argparse.Namespace(prompts=None, model=["toy", str(folder)])
    captions = analysis.read_prompts(args, 5)
    assert len(captions) == 5 and all(len(shapes.parse(caption)[0]) == 2 for caption in captions)
    monkeypatch.setattr(CLIPTokenizer, "SMALL", 0)
    assert analysis.read_prompts(args, 5) == PROMPTS


@pytest.mark.parametrize("command", ["", "attention", "similarity", "budget", "latency", "ablation", "quality"])
def test_help_fits_a_screen(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "110")
    with pytest.raises(SystemExit):
        run(*command.split(), "--help")
    printed = capsys.readouterr().out
    assert len(printed.splitlines()) <= 40 and "None" not in printed


def test_curves_draw_every_loss_that_a_run_has(tmp_path):
    header = ["step", "task", "outKD", "featKD"]
    for name, scale in (("a", 1.0), ("b", 0.5)):
        write_csv(tmp_path / name / "log.csv", header, [[i, scale / i, 0, 10 * scale / i] for i in range(1, 41)])
    run("curves", tmp_path / "a", tmp_path / "b", "--out", tmp_path / "c.png")
    both = Image.open(tmp_path / "c.png")
    one = loss_curves([tmp_path / "a"])
    assert both.size == one.size  # two charts: outKD is 0 throughout
    for index, colour in enumerate(plots.COLOURS[:2]):
        ours = (np.asarray(both.convert("RGB")) == ImageColor.getrgb(colour)).all(axis=2)
        assert ours[60:].sum() > 500, index  # below the legend
    write_csv(tmp_path / "new" / "log.csv", header, [])
    with pytest.raises(ValueError, match="log.csv"):
        loss_curves([tmp_path / "new"])
