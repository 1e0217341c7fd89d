"""Table 4: scores are transformers' own, pictures are drawn once and named as T2I-CompBench reads them."""

import json
import math
from statistics import fmean

import numpy as np
import pytest
import torch
from common import analyze, refusal
from PIL import Image
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

from support import table4
from support.files import read_csv, write_json
from support.hub import PRESETS
from support.table4 import PAPER, load_clip, mean_and_error, picture_path, read_prompts

NARROW = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """The folder of a small random CLIPModel with a processor."""
    folder = tmp_path_factory.mktemp("clip") / "clip"
    torch.manual_seed(0)
    text = NARROW | {"vocab_size": 300, "max_position_embeddings": 16, "eos_token_id": 2}
    sight = NARROW | {"image_size": 32, "patch_size": 16}
    CLIPModel(CLIPConfig(text_config=text, vision_config=sight, projection_dim=8)).save_pretrained(folder)
    images = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    tokenizer = CLIPTokenizer.from_pretrained(PRESETS["toy"].source + "/tokenizer")
    CLIPProcessor(images, tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(tmp_path):
    write_json(tmp_path / "prompts" / "anime.json", ["a red box", "my sky", "blue sky on my box"])
    write_json(tmp_path / "prompts" / "photo.json", ["a blue box", "a red sky"])
    return tmp_path / "prompts"


def noise(seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (40, 56, 3), dtype=np.uint8))


def test_clip_scores_are_those_of_transformers(clip, tmp_path, monkeypatch):
    score, prompt = load_clip(str(clip), "cpu"), "a red circle above a blue square"
    network, processor = CLIPModel.from_pretrained(clip), CLIPProcessor.from_pretrained(clip)
    with torch.no_grad():
        output = network(**processor(text=prompt, images=noise(), return_tensors="pt"))
    expected = 100 * output.logits_per_image.item() / network.logit_scale.exp().item()
    assert score(noise(), prompt) == pytest.approx(expected, rel=1e-5) and abs(expected) < 99
    long = "a red circle " * 20
    assert score(noise(), long) == score(noise(), long + "cross")  # beyond what CLIP reads
    monkeypatch.setitem(table4.CLIPS, "clip", str(clip))
    for name in ("config.json", "model.safetensors"):            # a conversion without a processor
        (tmp_path / name).write_bytes((clip / name).read_bytes())
    assert load_clip(str(tmp_path), "cpu")(noise(), prompt) == score(noise(), prompt)
    config = json.loads((clip / "config.json").read_text())
    config["vision_config"]["num_hidden_layers"] = 2
    write_json(tmp_path / "config.json", config)
    assert "lacks" in refusal(load_clip, str(tmp_path), "cpu")
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    assert "pickle" in refusal(table4.find_clip, str(tmp_path))  # and it says so before pictures are drawn


def test_mean_and_error():
    assert mean_and_error([1.0, math.nan, 4.0, 4.0]) == pytest.approx((3, 1))  # deviation sqrt(3), of three
    assert mean_and_error([1.0, math.nan]) == pytest.approx((1, math.nan), nan_ok=True)
    assert mean_and_error([math.nan]) == pytest.approx((math.nan, math.nan), nan_ok=True)


def test_averages_of_the_papers_rows_are_those_it_prints():
    averages = {  # of Table 4, HPSv2 and T2I-CompBench
        "SDM-v1.4": (26.95, 0.3150), "SDM-v2.0": (27.13, 0.3672), "DALLE-2": (26.95, 0.4268),
        "SDXL": (27.73, 0.4441), "BK-SDM-Small": (26.72, 0.3237), "Ours-SDM-Small": (26.86, 0.3417),
        "BK-SDM-Base": (26.84, 0.3301), "Ours-SDM-Base": (26.95, 0.3582), "BK-SDXL-700M": (27.26, 0.3723),
        "KOALA-700M": (27.43, 0.3791), "BK-SDXL-1B": (27.12, 0.3719), "KOALA-1B": (27.44, 0.3912)}
    assert averages.keys() == PAPER.keys()
    for name, (hpsv2, compbench) in averages.items():
        assert abs(fmean(PAPER[name][1:5]) - hpsv2) < 0.0051, name
        assert abs(fmean(PAPER[name][5:]) - compbench) < 0.000051, name


def test_the_judge_is_the_toys(tmp_path, monkeypatch):
    monkeypatch.setitem(PRESETS, "toy", PRESETS["toy"]._replace(steps=2))
    analyze("quality", "--limit", 3, "--pictures", tmp_path / "kept", "--out", tmp_path / "t.png")
    rows = read_csv(tmp_path / "t.csv")
    assert [row["column"] for row in rows] == ["color", "shape", "spatial", "average"]
    assert all(0 <= float(row["mean"]) <= 1 for row in rows[:2]) and rows[0]["parameters"] == "6449092"


def test_a_table_of_two_models_and_resuming(small, folder, clip, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(table4.CLIPS, "hpsv2", str(clip))
    command = ("quality", "--model", small["sdxl"], small["700m"], "--scorer", "hpsv2", "--prompts", folder,
               "--steps", 1, "--limit", 2, "--low-memory", "--pictures", tmp_path / "kept",
               "--out", tmp_path / "t.png")
    analyze(*command)
    printed, rows = capsys.readouterr().out, read_csv(tmp_path / "t.csv")
    assert [row["column"] for row in rows] == 2 * ["anime", "photo", "average"]
    assert "KOALA-700M, published" in printed and "27.65" in printed and "concept" not in printed
    kept = sorted((tmp_path / "kept").rglob("*.png"))
    score = load_clip(str(clip), "cpu")
    scores = [score(Image.open(path), path.name.split("_")[0]) for path in kept[:2]]
    assert float(rows[3]["mean"]) == pytest.approx(np.mean(scores))  # the folder of 700m is first
    assert float(rows[3]["standard error"]) == pytest.approx(abs(scores[0] - scores[1]) / 2)
    assert float(rows[5]["mean"]) == pytest.approx((float(rows[3]["mean"]) + float(rows[4]["mean"])) / 2)
    assert float(rows[0]["parameters"]) > float(rows[3]["parameters"]) and float(rows[0]["seconds"]) > 0

    before = [path.stat().st_mtime_ns for path in kept]
    kept[1].unlink()                                             # one is missing, one is another program's
    noise().save(kept[6])
    analyze(*command)
    assert [path.stat().st_mtime_ns != time for path, time in zip(kept, before)] == [
        False, True, False, False, False, False, True, False]
    analyze(*command, "--seed", 5)                               # other settings are other pictures
    assert all(path.stat().st_mtime_ns != time for path, time in zip(kept, before))
    write_json(folder / "anime.json", ["a blue sky", "my sky"])  # another prompt takes the first one's place
    analyze(*command)
    names = [path.name for path in sorted((tmp_path / "kept").glob("*/anime/samples/*"))]
    assert names == 2 * ["a blue sky_000000.png", "my sky_000001.png"]


def test_t2i_compbench_reads_the_pictures(small, tmp_path, capsys):
    (tmp_path / "spatial_val.txt").write_text("a red box\nmy sky\n")
    analyze("quality", "--model", small["700m"], "--scorer", "compbench", "--steps", 1,
            "--prompts", tmp_path / "spatial_val.txt",
            "--pictures", tmp_path / "kept", "--out", tmp_path / "t.png")
    printed = capsys.readouterr().out
    folder, = (tmp_path / "kept").glob("*/spatial")
    assert f"2D_spatial_eval.py --outpath {folder}" in printed and "0.1535" in printed  # KOALA-700M's
    names = sorted(path.name for path in (folder / "samples").iterdir())
    assert names == ["a red box_000000.png", "my sky_000001.png"]
    assert math.isnan(float(read_csv(tmp_path / "t.csv")[0]["mean"]))
    for prompt in ("a_b: c/d?", "\u732b" * 300, "."):
        path = picture_path(tmp_path, 41, prompt)
        text, number = path.name.split("_")                      # as the benchmark's scripts do
        assert path.parent == tmp_path / "samples" and number == "000041.png"
        assert len(path.name.encode()) < 255 and not set(text) & set('/\\:*?"<>|')


def test_prompts_are_read_as_the_benchmarks_publish_them(folder, tmp_path):
    assert read_prompts(folder) == {
        "anime": ["a red box", "my sky", "blue sky on my box"], "photo": ["a blue box", "a red sky"]}
    assert read_prompts(folder, 1) == {"anime": ["a red box"], "photo": ["a blue box"]}
    for name in ("color_val", "color_val_seen", "shape_val", "color"):
        (tmp_path / f"{name}.txt").write_text(f"a {name}\n\n", encoding="utf-8-sig")
    assert read_prompts(tmp_path) == {"color": ["a color_val"], "shape": ["a shape_val"]}
    assert read_prompts(tmp_path / "color.txt") == {"color": ["a color"]}
    for content in (b"[1]", b"[", b"[]", b"7", b"\xff"):
        (tmp_path / "x.json").write_bytes(content)
        assert "x.json" in refusal(read_prompts, tmp_path / "x.json")
