"""Table 4: scores are transformers' own, pictures are drawn once, errors match the closed form."""

import json
import re
import weakref

import numpy as np
import pytest
import torch
from PIL import Image
from bundles import WORDS, bundle, write_json
from common import refusal
from safetensors.torch import load_file, save_file
from transformers import (
    BertTokenizer, BlipConfig, BlipForQuestionAnswering, BlipImageProcessor, BlipProcessor, CLIPConfig,
    CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer)

import analysis
from support import scorers, table3, table4
from support.cli import PRESETS
from support.files import bundle_files, read_csv
from support.scorers import CLIPScorer, CompBench, find_scorer, noun_phrases
from support.table4 import (
    COLUMNS, PAPER, bootstrap, load_picture, paper_scores, read_prompt_groups, shares_of_wins)

NARROW = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
SIGHT = NARROW | {"image_size": 32, "patch_size": 16}
SIZE = {"height": 32, "width": 32}


def run(*words):
    analysis.main(["quality", *map(str, words)])


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """The folder of a small random CLIPModel with a processor."""
    folder = tmp_path_factory.mktemp("clip") / "clip"
    torch.manual_seed(0)
    text = NARROW | {"vocab_size": 300, "max_position_embeddings": 16, "eos_token_id": 2}
    CLIPModel(CLIPConfig(text_config=text, vision_config=SIGHT, projection_dim=8)).save_pretrained(folder)
    images = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=SIZE)
    tokenizer = CLIPTokenizer.from_pretrained(PRESETS["toy"].source + "/tokenizer")
    CLIPProcessor(images, tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def blip(tmp_path_factory):
    """The folder of a small random BLIP that answers questions, with a processor."""
    folder = tmp_path_factory.mktemp("blip") / "blip"
    torch.manual_seed(1)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "?", "yes", "no", *WORDS]
    (folder.parent / "vocab.txt").write_text("\n".join(words))
    text = NARROW | {"vocab_size": 30, "encoder_hidden_size": 16, "bos_token_id": 29, "sep_token_id": 3,
                     "pad_token_id": 0, "initializer_range": 0.5, "hidden_act": "gelu"}
    config = BlipConfig(text_config=text, vision_config=SIGHT | {"initializer_range": 0.5}, projection_dim=8)
    BlipForQuestionAnswering(config).save_pretrained(folder)
    tokenizer = BertTokenizer(str(folder.parent / "vocab.txt"))
    BlipProcessor(BlipImageProcessor(size=SIZE), tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Two small models, one with the other's U-Net cut as KOALA-700M's."""
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


# Scorers


def test_clip_scores_are_those_of_transformers(clip):
    scorer, prompt = find_scorer(str(clip), {"anime": ["a red circle"]}), "a red circle above a blue square"
    scorer.load("cpu")
    network, processor = CLIPModel.from_pretrained(clip), CLIPProcessor.from_pretrained(clip)
    for seed in range(3):
        with torch.no_grad():
            output = network(**processor(text=prompt, images=noise(seed), return_tensors="pt"))
        expected = 100 * output.logits_per_image.item() / network.logit_scale.exp().item()
        assert scorer(noise(seed), prompt, "anime") == pytest.approx([expected], rel=1e-5)
    assert abs(expected) < 99


def test_a_conversion_without_a_processor_has_clips(clip, tmp_path, monkeypatch):
    monkeypatch.setitem(scorers.COMPBENCH, "clip", str(clip))
    scores = []
    half = {name: tensor.half() for name, tensor in load_file(clip / "model.safetensors").items()}
    save_file(half, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_bytes((clip / "config.json").read_bytes())
    for folder in (clip, tmp_path):
        scorer = find_scorer(str(folder), {})
        scorer.load("cpu")
        scores += scorer(noise(), "a red circle", "")
    assert scorer.network.dtype == torch.float32 and scores[0] == pytest.approx(scores[1], rel=1e-2)


def test_prompts_that_clip_does_not_read_to_their_ends_are_counted(clip, capsys):
    long = "a red circle " * 20
    scorer = CLIPScorer(str(clip), ["a red circle", long, long + "cross"])
    scorer.load("cpu")
    assert "2 prompts" in capsys.readouterr().err
    cut = scorer(noise(), long, "")
    assert cut == scorer(noise(), long + "cross", "") != scorer(noise(), "a red circle", "")


def test_compbench_multiplies_the_answers_of_transformers(clip, blip, monkeypatch):
    monkeypatch.setitem(scorers.COMPBENCH, "blip", str(blip))
    monkeypatch.setitem(scorers.COMPBENCH, "clip", str(clip))
    scorer = CompBench({"color": ["x"], "non_spatial": ["x"], "complex": ["x"]})
    assert [scorer.columns(group) for group in ("color", "non_spatial", "complex")] == [
        ("color",), ("non_spatial",), ()]
    scorer.load("cpu")
    network, processor = BlipForQuestionAnswering.from_pretrained(blip), BlipProcessor.from_pretrained(blip)
    answers = []
    for question in ("a red box?", "my blue sky on?"):           # of different lengths
        inputs = processor(images=noise(), text=question, return_tensors="pt")
        first = network.generate(**inputs, max_new_tokens=1, output_logits=True, return_dict_in_generate=True)
        yes, no = first.logits[0][0, [6, 7]].exp().tolist()
        answers.append(yes / (yes + no))
    assert scorer.answer(noise(), ["a red box?", "my blue sky on?"]) == pytest.approx(answers, abs=1e-5)
    assert abs(answers[0] - answers[1]) > 1e-3 and abs(answers[0] - 0.5) > 1e-3
    product = scorer.answer(noise(), ["a red box?"])[0] * scorer.answer(noise(), ["a sky?"])[0]
    assert scorer(noise(), "a red box and a sky", "color") == pytest.approx([product], abs=1e-6)
    cosine = scorer.clip(noise(), "a red circle", "")[0] / 100
    assert scorer(noise(), "a red circle", "non_spatial") == [cosine]


def test_a_scorer_that_cannot_be_used_is_one_line(clip, blip, tmp_path):
    assert "blip" in refusal(find_scorer, str(blip), {})
    assert "hpsv2" in refusal(find_scorer, "nothing", {})
    config = json.loads((clip / "config.json").read_text())
    write_json(tmp_path / "pickle" / "config.json", config)
    (tmp_path / "pickle" / "pytorch_model.bin").write_bytes(b"PK")
    assert "pickle" in refusal(find_scorer, str(tmp_path / "pickle"), {})
    write_json(tmp_path / "cut" / "config.json", config)
    (tmp_path / "cut" / "model.safetensors").write_bytes((clip / "model.safetensors").read_bytes()[:-9])
    write_json(tmp_path / "cut" / "processor_config.json", {})
    scorer = find_scorer(str(tmp_path / "cut"), {})
    assert "damaged" in refusal(scorer.load, "cpu")
    larger = config | {"vision_config": config["vision_config"] | {"num_hidden_layers": 2}}
    write_json(tmp_path / "cut" / "config.json", larger)
    for name in ("model.safetensors", "processor_config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "cut" / name).write_bytes((clip / name).read_bytes())
    assert "lacks" in refusal(scorer.load, "cpu")


def test_of_a_repository_of_one_network_its_safetensors_are_downloaded():
    names = ["README.md", "config.json", "model.safetensors", "pytorch_model.bin", "vocab.txt",
             "1/model.safetensors"]
    assert bundle_files(names, ("scorer",)) == ["config.json", "vocab.txt", "model.safetensors"]


# Prompts of T2I-CompBench's validation sets (Huang et al., MIT licence); brackets are around their phrases


PROMPTS = {
    "color": """
        [a green bench] and [a blue bowl]            [a red stop sign] and [a white line]
        [a brown cat] and [a gold clock]             [a green cup] and [a blue cell phone]
        [a red apple] and [yellow bananas]           [a red school bus] and [a green bag]
        [a blue bag] and [a green water bottle]      [a white snow] and [a blue sled]
        [a yellow taxi] and [a black tire]           [a green jay] and [a blue parrot]
        [a stop sign] and [red white line]           [a silver spoon] and [a blue plate]
        [A bathroom] with [white tile] and [a beige toilet].
        [A green bathroom] with [a mirror] and [a pink sink].
        [a black gold and white vase] sitting on [a counter]
        [A small white kitchen] with [brown wood floor].
        [A black and white cat] sits in [a white sink].
        [A woman] in [a white shirt] and [jeans] holds [a pink umbrella] in [the rain].
        [A red carpet] in [a bathroom] with [white fixtures].
        [A blue scooter] is parked near [a curb] in front of [a green vintage car].
        [The man] on [the large black motorcycle] has [pink chaps].
        [A man] in [a gray jacket] standing in [a kitchen] next to [a black dog].""",
    "shape": """
        [an oblong cucumber] and [a teardrop plum]   [a cubic ice cube] and [a spherical ice bucket]
        [a round bagel] and [a square piece] of [toast]   [a big hippopotamus] and [a small cat]
        [a conical wizard hat] and [a spherical crystal wand]   [a long snake] and [a short tree]
        [a triangular slice] of [cheese] and [a rectangular cheese board]
        [a cubic Rubik's cube] and [a pentagonal game box]   [a small keychain] and [a big set] of [keys]
        [a cubic block] and [a cylindrical container] of [hand cream]
        [a pentagonal yield sign] and [a pyramidal salt shaker]   [an oval sink] and [a rectangular mirror].
        [The round knob] and [the square plate] were attached to [the door].
        [The oval mirror] and [the rectangular frame] were mounted on [the wall].
        [The triangular sail] and [the square deck] were [the defining features] of [the sailboat].
        [The circular wreath] and [the rectangular picture frame] hung on [the front door].
        [A small kitten] and [a big dog] sat side by side.
        [The cubic room] and [the conical lampshade] were [the unique features] of [the hotel suite].
        [The cylindrical water bottle] with [its square lid] and [conical base] kept hikers hydrated on \
[the triangular trail].
        [The rectangular mirror] with [its oval reflection] and [oblong frame] hung in \
[the round bathroom].""",
    "texture": """
        [a plastic toy] and [a glass bottle]         [rubber sole shoes] and [fluffy clouds]
        [a metallic desk lamp] and [a fluffy sweater]   [a metallic car] and [a leather jacket]
        [rubber gloves] and [leather gloves]         [a metallic door knob] and [a wooden floor]
        [wooden chopsticks] and [a glass cup]        [a plastic phone case] and [a fabric bag]
        [a metallic keychain] and [wooden chopsticks]   [a plastic cutlery] and [a glass mirror]
        [wooden pencils] and [a fluffy scarf]        [fluffy clouds] and [a glass table]
        [The glass perfume bottle] and [metallic cap] release [the fragrance] of [the wooden scent] on \
[the fabric handkerchief].
        [The fluffy rug] and [leather ottoman] rest on [the wooden floor] in [the cozy reading nook].
        [The wooden spoon] and [metallic ladle] serve [the fluffy soup] in [the plastic bowl].
        [The glass vase] and [metallic watering can] hold [the wooden flowers] on [the fabric windowsill].
        [The metallic kettle] and [wooden spoon] boil [the fluffy water] for [the plastic tea].
        [The leather wallet] and [fluffy keychain] hang on [the metallic hook] by [the wooden door].
        [The wooden cutting board] and [metallic cheese grater] slice [the fluffy cheddar] for \
[the plastic sandwich].
        [The metallic scissors] and [plastic ruler] cut [the fluffy paper] for [the wooden craft project]."""}


@pytest.mark.parametrize("category", PROMPTS)
def test_noun_phrases_of_the_benchmarks_prompts(category):
    prompts = [prompt for prompt in re.split(r"\n|   ", PROMPTS[category]) if prompt.strip()]
    assert len(prompts) >= 20
    for prompt in prompts:
        assert noun_phrases(re.sub(r"[\[\]]", "", prompt)) == re.findall(r"\[(.*?)\]", prompt)


def test_what_is_no_noun_phrase():
    assert noun_phrases("The oval sculpture was placed in front of the round fountain.") == [
        "The oval sculpture", "the round fountain"]
    assert noun_phrases("?") == noun_phrases("the") == []


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
            assert abs(np.mean([*paper_scores(name, scorer).values()]) - published) < rounding, name
    assert paper_scores("KOALA-1B", "hpsv2")["paintings"] == 27.61
    assert paper_scores("KOALA-700M", "compbench")["non_spatial"] == 0.3008


# Errors


def test_the_bootstrap_agrees_with_the_closed_form():
    rng = np.random.default_rng(1)
    first, second = (np.ma.masked_invalid(rng.normal(size=(n, 1))) for n in (200, 50))
    errors, error = bootstrap([first, second], 4000)
    closed = [scores.std() / len(scores) ** 0.5 for scores in (first, second)]
    assert errors.tolist() == pytest.approx(closed, rel=0.05)
    assert error == pytest.approx(np.hypot(*closed) / 2, rel=0.05)  # groups are drawn apart
    both = np.ma.concatenate([first, first], axis=1)             # columns of a prompt are drawn together
    assert bootstrap([both], 4000)[1] == pytest.approx(closed[0], rel=0.05)
    half = first.copy()
    half[::2] = np.ma.masked
    assert bootstrap([half], 4000)[0][0] == pytest.approx(half.std() / 10, rel=0.05)


def test_a_tie_is_nobodys_win():
    a, b = np.ma.array([[1.0], [2.0], [3.0], [0.0]]), np.ma.array([[0.0], [2.0], [4.0], [-1.0]])
    assert shares_of_wins([[a], [a]]) == [0, 0] and shares_of_wins([[a], [b]]) == [0.5, 0.25]
    assert shares_of_wins([[a[:2], a[2:]], [b[:2], b[2:]]]) == [0.5, 0.25]
    assert np.isnan(shares_of_wins([[a]])).all()


# The command


def test_a_table_of_two_models_and_resuming(models, folder, clip, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(scorers.CLIPS, "hpsv2", str(clip))
    command = ("--model", *models, "--scorer", "hpsv2", "--prompts", folder, "--steps", 1, "--limit", 2,
               "--low-memory", "--pictures", tmp_path / "kept", "--out", tmp_path / "t.png")
    pipelines, load = [], table4.load_pipeline

    def load_watched(*args):
        pipeline = load(*args)
        pipelines.append(weakref.ref(pipeline))
        return pipeline

    def load_alone(*args, load=scorers.load_network):
        assert len(pipelines) in (0, 2) and not any(pipeline() for pipeline in pipelines)
        return load(*args)

    monkeypatch.setattr(table4, "load_pipeline", load_watched)
    monkeypatch.setattr(scorers, "load_network", load_alone)
    run(*command)
    printed, rows = capsys.readouterr().out, read_csv(tmp_path / "t.csv")
    assert [row["column"] for row in rows] == 2 * ["anime", "photo", "average"]
    assert "KOALA-700M, published" in printed and "27.65" in printed and "concept" not in printed
    first = [float(row["mean"]) for row in rows[:3]]
    assert first[2] == pytest.approx((first[0] + first[1]) / 2)
    assert float(rows[0]["parameters"]) > float(rows[3]["parameters"]) and float(rows[0]["seconds"]) > 0
    assert 0 <= float(rows[0]["best on"]) + float(rows[3]["best on"]) <= 1
    kept = sorted((tmp_path / "kept").glob("*/*.png"))
    assert len(kept) == 8 and Image.open(tmp_path / "t.png").width >= 960

    pipelines.clear()                                            # again: nothing is drawn
    run(*command)
    assert not pipelines and read_csv(tmp_path / "t.csv") == rows
    before = [path.stat().st_mtime_ns for path in kept]          # one will be missing, one damaged
    kept[1].unlink()
    damaged = bytearray(kept[6].read_bytes())
    damaged[-40] ^= 1
    kept[6].write_bytes(damaged)
    run(*command)
    changed = [i for i, path in enumerate(kept) if path.stat().st_mtime_ns != before[i]]
    again = read_csv(tmp_path / "t.csv")
    means, means_again = ([float(row["mean"]) for row in table] for table in (rows, again))
    assert changed == [1, 6] and means_again == pytest.approx(means, rel=0.01)  # alone it may round otherwise


def test_a_kill_loses_at_most_the_pictures_at_hand(models, tmp_path, monkeypatch):
    (tmp_path / "p.txt").write_text("a red box\n" * 33)
    save, saved = table4.save_picture, []

    def save_some(*args):
        if len(saved) == 32:
            raise KeyboardInterrupt
        saved.append(args[0])
        save(*args)

    monkeypatch.setattr(table4, "save_picture", save_some)
    args = ("--model", models[1], "--scorer", "judge", "--steps", 1, "--pictures", tmp_path / "kept", "--out",
            tmp_path / "t.png")
    monkeypatch.setattr(scorers.Judge, "__init__", lambda self, prompts: None)
    with pytest.raises(KeyboardInterrupt):
        run(*args, "--prompts", tmp_path / "p.txt")
    assert len([*tmp_path.rglob("*.png")]) == 32 and not [*tmp_path.rglob(".writing*")]


def test_other_settings_are_another_picture(tmp_path):
    settings = {"prompt": "a", "seed": 1, "unet": ["x 1 2"]}
    table4.save_picture(tmp_path / "a.png", noise(), settings, {"seconds": 2.0, "where": "here"})
    image, drawn = load_picture(tmp_path / "a.png", settings)
    assert image.tobytes() == noise().tobytes() and drawn["seconds"] == 2
    for other in ({"prompt": "b"}, {"seed": 2}, {"unet": ["x 1 3"]}, {"new": 1}):
        assert load_picture(tmp_path / "a.png", settings | other) is None
    whole = (tmp_path / "a.png").read_bytes()
    for damaged in (b"", b"x" * 99, whole[:-200], whole[:50]):
        (tmp_path / "a.png").write_bytes(damaged)
        assert load_picture(tmp_path / "a.png", settings) is None
    noise().save(tmp_path / "a.png")                             # by another program
    assert load_picture(tmp_path / "a.png", settings) is None


def test_flipped_bits_of_a_picture_are_noticed(tmp_path):
    table4.save_picture(tmp_path / "a.png", noise(), {"seed": 1}, {"seconds": 2.0, "where": "here"})
    whole, rng = (tmp_path / "a.png").read_bytes(), np.random.default_rng(0)
    for _ in range(100):
        damaged = bytearray(whole)
        damaged[rng.integers(len(whole))] ^= 1 << int(rng.integers(8))
        (tmp_path / "a.png").write_bytes(damaged)
        found = load_picture(tmp_path / "a.png", {"seed": 1})
        assert found is None or found[0].tobytes() == noise().tobytes()


def test_the_judge_is_the_toys_scorer(tmp_path, monkeypatch):
    monkeypatch.setitem(PRESETS, "toy", PRESETS["toy"]._replace(steps=2))
    run("--limit", 3, "--pictures", tmp_path / "kept", "--out", tmp_path / "t.png")
    rows = read_csv(tmp_path / "t.csv")
    assert [row["column"] for row in rows] == ["colour", "shape", "spatial", "average"]
    assert all(0 <= float(row["mean"]) <= 1 for row in rows[:2]) and rows[0]["parameters"] == "6449092"
    assert not rows[0]["best on"].strip("nan")


def test_prompts_are_read_as_the_benchmarks_publish_them(folder, tmp_path):
    assert read_prompt_groups(folder, None) == {
        "anime": ["a red box", "my sky", "blue sky on my box"], "photo": ["a blue box", "a red sky"]}
    assert read_prompt_groups(folder, 1) == {"anime": ["a red box"], "photo": ["a blue box"]}
    for name in ("color_val", "color_val_seen", "shape_val", "color"):
        (tmp_path / f"{name}.txt").write_text(f"a {name}\n\n")
    assert read_prompt_groups(tmp_path, None) == {"color": ["a color_val"], "shape": ["a shape_val"]}
    assert read_prompt_groups(tmp_path / "color.txt", None) == {"color": ["a color"]}


@pytest.mark.parametrize("content", ['{"a": 1}', "[1]", "[", "[]", "7"])
def test_a_list_that_is_none_is_named(tmp_path, content):
    (tmp_path / "x.json").write_text(content)
    assert "x.json" in refusal(read_prompt_groups, tmp_path / "x.json", None)


def test_what_needs_unidet_is_not_drawn(models, tmp_path, monkeypatch):
    monkeypatch.setattr(table4, "load_pipeline", None)
    (tmp_path / "complex_val.txt").write_text("a red box")
    assert "UniDet" in refusal(run, "--model", models[0], "--scorer", "compbench", "--prompts",
                               tmp_path / "complex_val.txt", "--out", tmp_path / "t.png")


def test_a_run_of_the_ablation_is_scored_too(models, clip, tmp_path, monkeypatch):
    monkeypatch.setattr(table3, "draw", lambda *args: [noise(len(args)), noise(9)])
    scores = table3.score(tmp_path, 1, str(models[0]), ("a red circle", "a cross"), str(clip))
    scorer = CLIPScorer(str(clip), [])
    scorer.load("cpu")
    expected = [scorer(noise(seed), prompt, "")[0] for seed, prompt in ((3, "a red circle"), (9, "a cross"))]
    assert len(scores) == 5 and scores[4] == pytest.approx(np.mean(expected))
    assert len(table3.score(tmp_path, 1, str(models[0]), ("a red circle", "a cross"))) == 4
