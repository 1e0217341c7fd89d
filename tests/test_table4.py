"""Table 4: scores are transformers' own, pictures are drawn once and named as T2I-CompBench reads them."""

import json
import math
import weakref

import numpy as np
import pytest
import torch
from common import bundle, refusal
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

import analysis
from support import table4
from support.files import read_csv, write_json
from support.hub import PRESETS
from support.table4 import COLUMNS, PAPER, load_clip, paper_scores, picture_path, read_prompt_groups
from toy import shapes

NARROW = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


def run(*words):
    analysis.main(["quality", *map(str, words)])


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


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Two small models."""
    folder = tmp_path_factory.mktemp("models")
    return bundle(folder / "sdxl", "sdxl"), bundle(folder / "700m", "700m")


@pytest.fixture
def folder(tmp_path):
    """Prompts in two files."""
    write_json(tmp_path / "prompts" / "anime.json", ["a red box", "my sky", "blue sky on my box"])
    write_json(tmp_path / "prompts" / "photo.json", ["a blue box", "a red sky"])
    return tmp_path / "prompts"


def noise(seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (40, 56, 3), dtype=np.uint8))


# Scores


def test_clip_scores_are_those_of_transformers(clip):
    score, prompt = load_clip(clip, "cpu"), "a red circle above a blue square"
    network, processor = CLIPModel.from_pretrained(clip), CLIPProcessor.from_pretrained(clip)
    for seed in range(3):
        with torch.no_grad():
            output = network(**processor(text=prompt, images=noise(seed), return_tensors="pt"))
        expected = 100 * output.logits_per_image.item() / network.logit_scale.exp().item()
        assert score(noise(seed), prompt) == pytest.approx([expected], rel=1e-5)
    assert abs(expected) < 99
    long = "a red circle " * 20
    assert score(noise(), long) == score(noise(), long + "cross")  # beyond what CLIP reads


def test_a_conversion_without_a_processor_has_clips(clip, tmp_path, monkeypatch):
    monkeypatch.setitem(table4.CLIPS, "clip", str(clip))
    half = {name: tensor.half() for name, tensor in load_file(clip / "model.safetensors").items()}
    save_file(half, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_bytes((clip / "config.json").read_bytes())
    scores = [load_clip(folder, "cpu")(noise(), "a red circle")[0] for folder in (clip, tmp_path)]
    assert scores[0] == pytest.approx(scores[1], rel=1e-2)


def test_a_scorer_that_cannot_be_used_is_one_line(clip, tmp_path):
    assert "hpsv2" in refusal(table4.find_clip, "nothing")
    assert table4.find_clip(str(clip)) == clip
    for name in clip.iterdir():
        (tmp_path / name.name).write_bytes(name.read_bytes())
    config = json.loads((clip / "config.json").read_text())
    config["vision_config"]["num_hidden_layers"] = 2
    write_json(tmp_path / "config.json", config)
    assert "lacks" in refusal(load_clip, tmp_path, "cpu")
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "pytorch_model.bin").write_bytes(b"PK")
    assert "pickle" in refusal(load_clip, tmp_path, "cpu")


def test_the_judge_is_the_toys(tmp_path, monkeypatch):
    image, _ = shapes.sample(0, 7)
    assert table4.judge(image, "a red cross") == pytest.approx([0, 0, math.nan], nan_ok=True)
    monkeypatch.setitem(PRESETS, "toy", PRESETS["toy"]._replace(steps=2))
    run("--limit", 3, "--pictures", tmp_path / "kept", "--out", tmp_path / "t.png")
    rows = read_csv(tmp_path / "t.csv")
    assert [row["column"] for row in rows] == ["colour", "shape", "spatial", "average"]
    assert all(0 <= float(row["mean"]) <= 1 for row in rows[:2]) and rows[0]["parameters"] == "6449092"


def test_mean_and_error():
    scores = np.array([1.0, math.nan, 4.0, 4.0])
    assert table4.mean_and_error(scores) == pytest.approx((3, 1))  # deviation sqrt(3), of three
    assert table4.mean_and_error(scores[:2]) == pytest.approx((1, math.nan), nan_ok=True)
    assert table4.mean_and_error(scores[1:2]) == pytest.approx((math.nan, math.nan), nan_ok=True)


# The paper's numbers


def test_averages_of_the_papers_rows_are_those_it_prints():
    averages = {  # of Table 4, HPSv2 and T2I-CompBench
        "SDM-v1.4": (26.95, 0.3150), "SDM-v2.0": (27.13, 0.3672), "DALLE-2": (26.95, 0.4268),
        "SDXL": (27.73, 0.4441), "BK-SDM-Small": (26.72, 0.3237), "Ours-SDM-Small": (26.86, 0.3417),
        "BK-SDM-Base": (26.84, 0.3301), "Ours-SDM-Base": (26.95, 0.3582), "BK-SDXL-700M": (27.26, 0.3723),
        "KOALA-700M": (27.43, 0.3791), "BK-SDXL-1B": (27.12, 0.3719), "KOALA-1B": (27.44, 0.3912)}
    assert averages.keys() == PAPER.keys()
    for name, expected in averages.items():
        for scorer, published, rounding in zip(COLUMNS, expected, (0.0051, 0.000051)):
            assert abs(paper_scores(name, scorer, COLUMNS[scorer])["average"] - published) < rounding, name
    assert paper_scores("KOALA-1B", "hpsv2", ["paintings", "x"]) == {"paintings": 27.61, "average": 27.61}
    assert paper_scores("KOALA-1B", "judge", ["colour"]) == {}


# The command


def test_a_table_of_two_models_and_resuming(models, folder, clip, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(table4.CLIPS, "hpsv2", str(clip))
    command = ("--model", *models, "--scorer", "hpsv2", "--prompts", folder, "--steps", 1, "--limit", 2,
               "--low-memory", "--pictures", tmp_path / "kept", "--out", tmp_path / "t.png")
    pipelines, load = [], table4.load_pipeline

    def load_watched(*args):
        pipeline = load(*args)
        pipelines.append(weakref.ref(pipeline))
        return pipeline

    def load_alone(*args, load=table4.load_clip):
        assert not any(pipeline() for pipeline in pipelines)     # the two are never in memory together
        return load(*args)

    monkeypatch.setattr(table4, "load_pipeline", load_watched)
    monkeypatch.setattr(table4, "load_clip", load_alone)
    run(*command)
    printed, rows = capsys.readouterr().out, read_csv(tmp_path / "t.csv")
    assert [row["column"] for row in rows] == 2 * ["anime", "photo", "average"] and len(pipelines) == 2
    assert "KOALA-700M, published" in printed and "27.65" in printed and "concept" not in printed
    kept = sorted((tmp_path / "kept").rglob("*.png"))
    scores = [load_clip(clip, "cpu")(Image.open(path), path.name.split("_")[0])[0] for path in kept[:2]]
    assert float(rows[3]["mean"]) == pytest.approx(np.mean(scores))  # the folder of 700m is first
    assert float(rows[3]["standard error"]) == pytest.approx(abs(scores[0] - scores[1]) / 2)
    assert float(rows[5]["mean"]) == pytest.approx((float(rows[3]["mean"]) + float(rows[4]["mean"])) / 2)
    assert float(rows[0]["parameters"]) > float(rows[3]["parameters"]) and float(rows[0]["seconds"]) > 0
    assert len(kept) == 8 and Image.open(tmp_path / "t.png").width == 1600

    pipelines.clear()                                            # again: nothing is drawn
    run(*command)
    assert not pipelines and read_csv(tmp_path / "t.csv") == rows
    before = [path.stat().st_mtime_ns for path in kept]
    kept[1].unlink()                                             # one is missing, one is another program's
    noise().save(kept[6])
    run(*command)
    changed = [i for i, path in enumerate(kept) if path.stat().st_mtime_ns != before[i]]
    assert changed == [1, 6]
    run(*command, "--seed", 5)                                   # other settings are other pictures
    assert all(path.stat().st_mtime_ns != time for path, time in zip(kept, before)) and len(pipelines) == 4

    write_json(folder / "anime.json", ["a blue sky", "my sky"])  # another prompt takes the first one's place
    run(*command)
    names = [path.name for path in sorted((tmp_path / "kept").glob("*/anime/samples/*"))]
    assert names == 2 * ["a blue sky_000000.png", "my sky_000001.png"] and len(pipelines) == 6


def test_t2i_compbench_reads_the_pictures(models, tmp_path, capsys):
    (tmp_path / "spatial_val.txt").write_text("a red box\nmy sky\n")
    run("--model", models[1], "--scorer", "compbench", "--prompts", tmp_path / "spatial_val.txt",
        "--steps", 1, "--pictures", tmp_path / "kept", "--out", tmp_path / "t.png")
    printed = capsys.readouterr().out
    folder, = (tmp_path / "kept").glob("*/spatial")
    assert f"2D_spatial_eval.py --outpath {folder}" in printed and "0.1535" in printed  # KOALA-700M's
    names = sorted(path.name for path in (folder / "samples").iterdir())
    assert names == ["a red box_000000.png", "my sky_000001.png"]
    assert math.isnan(float(read_csv(tmp_path / "t.csv")[0]["mean"]))


def test_names_of_pictures_hold_prompt_and_number(tmp_path):
    for prompt in ("a green bench and a blue bowl", "a_b: c/d?", "\u732b" * 300, "."):
        path = picture_path(tmp_path, 41, prompt)
        text, number = path.name.split("_")                      # as the benchmark's scripts do
        assert path.parent == tmp_path / "samples" and number == "000041.png"
        assert len(path.name.encode()) < 255 and not set(text) & set('/\\:*?"<>|')
    assert picture_path(tmp_path, 0, "a red, round box.").name == "a red, round box._000000.png"


def test_prompts_are_read_as_the_benchmarks_publish_them(folder, tmp_path):
    assert read_prompt_groups(folder, None) == {
        "anime": ["a red box", "my sky", "blue sky on my box"], "photo": ["a blue box", "a red sky"]}
    assert read_prompt_groups(folder, 1) == {"anime": ["a red box"], "photo": ["a blue box"]}
    for name in ("color_val", "color_val_seen", "shape_val", "color"):
        (tmp_path / f"{name}.txt").write_text(f"a {name}\n\n")
    assert read_prompt_groups(tmp_path, None) == {"color": ["a color_val"], "shape": ["a shape_val"]}
    assert read_prompt_groups(tmp_path / "color.txt", None) == {"color": ["a color"]}


@pytest.mark.parametrize("content", [b'{"a": 1}', b"[1]", b"[", b"[]", b"7", b"\xff"])
def test_a_list_that_is_none_is_named(tmp_path, content):
    (tmp_path / "x.json").write_bytes(content)
    assert "x.json" in refusal(read_prompt_groups, tmp_path / "x.json", None)
