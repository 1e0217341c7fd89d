"""
Table 4: what pictures score, and what they cost, beside the paper's numbers.

`python analysis.py quality` draws each prompt with each model from the same noise, keeps the pictures, and
scores them with HPSv2 or another CLIP, or for the toy with its judge. For T2I-CompBench's prompts it prints
that benchmark's commands, which read the pictures; `--scorer compbench` leaves the scores to them.
"""

import argparse
import json
import math
import re
import statistics
import time
from collections import defaultdict
from itertools import product
from pathlib import Path
from typing import Callable, Iterable
from urllib.parse import quote

import torch
from PIL import Image, PngImagePlugin
from tqdm import tqdm

import model
from sample import load_pipeline
from support.costs import count_parameters, describe_device, read_configs
from support.files import atomic_write, write_csv
from support.hub import local_folder, preset, resolve_device, resolve_dtype
from support.plots import dot_chart, print_table
from support.text import SMALL_VOCABULARY
from toy import shapes

CLIPS = {
    "hpsv2": "adams-story/HPSv2-hf",                             # xswu/HPSv2 as a CLIPModel
    "pickscore": "yuvalkirstain/PickScore_v1",
    "clip": "openai/clip-vit-large-patch14"}
OWN_SCORERS = {"judge": shapes.judge, "compbench": lambda image, prompt: math.nan}
SCORERS = (*CLIPS, *OWN_SCORERS)
UNKNOWN = math.nan, math.nan  # a mean, and its standard error
PROMPTS = [  # for real models, in the four styles of HPSv2's prompts (Wu et al., arXiv 2306.09341)
    f"{subject}, {style}" for subject, style in product(
        ("a portrait of an old fisherman", "a fox and a rabbit in the snow", "a castle above a foggy valley",
         "two children flying a kite", "a bowl of oranges beside a blue vase", "a tram in a rainy street",
         "a knight resting under a tree", "a koala on a branch"),
        ("anime", "concept art", "oil painting", "photo"))]
COLUMNS = {  # of Table 4, named as the benchmarks' files are
    "hpsv2": ("anime", "concept-art", "paintings", "photo"),
    "compbench": ("color", "shape", "texture", "spatial", "non_spatial", "complex")}
PAPER = {  # millions of parameters of the U-Net; HPSv2 and T2I-CompBench in these columns; 50 Euler steps
    "SDM-v1.4":      (860,  27.26, 26.61, 26.66, 27.27, 0.3765, 0.3576, 0.4156, 0.1246, 0.3079, 0.3080),
    "SDM-v2.0":      (865,  27.48, 26.89, 26.86, 27.27, 0.5065, 0.4221, 0.4922, 0.1342, 0.3096, 0.3386),
    "DALLE-2":   (math.nan, 27.34, 26.54, 26.68, 27.24, 0.5750, 0.5464, 0.6374, 0.1283, 0.3043, 0.3696),
    "SDXL":          (2567, 27.69, 27.44, 27.50, 28.29, 0.6369, 0.5408, 0.5637, 0.2032, 0.3110, 0.4091),
    "BK-SDM-Small":  (483,  26.64, 26.77, 26.87, 26.61, 0.3984, 0.3783, 0.4225, 0.0731, 0.3003, 0.3695),
    "Ours-SDM-Small": (483, 26.73, 26.95, 27.00, 26.74, 0.4386, 0.3950, 0.4549, 0.0832, 0.3007, 0.3777),
    "BK-SDM-Base":   (580,  27.01, 26.64, 27.06, 26.63, 0.4192, 0.4096, 0.4409, 0.0979, 0.3077, 0.3052),
    "Ours-SDM-Base": (580,  26.79, 27.12, 27.11, 26.79, 0.4436, 0.4338, 0.4680, 0.1077, 0.3090, 0.3872),
    "BK-SDXL-700M":  (782,  27.59, 27.13, 27.17, 27.14, 0.5202, 0.4506, 0.4564, 0.1360, 0.3008, 0.3699),
    "KOALA-700M":    (782,  27.65, 27.28, 27.58, 27.21, 0.5068, 0.4731, 0.4674, 0.1535, 0.3008, 0.3731),
    "BK-SDXL-1B":    (1161, 27.52, 26.90, 27.17, 26.87, 0.4876, 0.4498, 0.4578, 0.1551, 0.3035, 0.3777),
    "KOALA-1B":      (1161, 27.73, 27.26, 27.61, 27.16, 0.5223, 0.5108, 0.4864, 0.1563, 0.3019, 0.3697)}
BLIP = "(cd BLIPvqa_eval && python BLIP_vqa.py --out_dir {0})"
COMPBENCH = {  # the commands by which T2I-CompBench (Huang et al., arXiv 2307.06350) scores a category
    "color": BLIP, "shape": BLIP, "texture": BLIP,
    "spatial": "(cd UniDet_eval && python 2D_spatial_eval.py --outpath {0})",
    "non_spatial": "python CLIPScore_eval/CLIP_similarity.py --outpath {0}",
    "complex": f"""{BLIP}
(cd UniDet_eval && python 2D_spatial_eval.py --outpath {{0}} --complex True)
python CLIPScore_eval/CLIP_similarity.py --outpath {{0}} --complex True
(cd 3_in_1_eval && python 3_in_1.py --outpath {{0}})  # ten pictures per prompt: list it ten times"""}


# ------------------------------------------------------------------------------------------------------------
# Prompts


def read_prompts(path: Path | None, limit: int | None = None) -> dict[str, list[str]]:
    """
    The first `limit` prompts of a file, one per line or a JSON list, by file name; without a path, PROMPTS.

    From a folder it reads HPSv2's *.json, or else T2I-CompBench's *_val.txt, or else any *.txt.
    Raises OSError or ValueError.
    """
    if path is None:
        return {"prompts": PROMPTS[:limit]}
    groups = {}
    files = sorted(path.glob("*.json")) or sorted(path.glob("*_val.txt")) or sorted(path.glob("*.txt"))
    for file in files or [path]:
        try:
            text = file.read_text(encoding="utf-8-sig")
            lines = json.loads(text) if file.suffix == ".json" else text.splitlines()
            prompts = [line.strip() for line in lines if line.strip()]
        except (ValueError, TypeError, AttributeError):          # not UTF-8, not JSON, not a list of texts
            prompts = []
        if not prompts:
            raise ValueError(f"--prompts {file} has no prompts, or is neither UTF-8 nor a JSON list")
        groups[file.stem.removesuffix("_val")] = prompts[:limit]
    return groups


def all_toys(names: list[str]) -> bool:
    """Whether all these models have fewer than 1,000 tokens and read only the toy's captions."""
    files = [local_folder(preset(name).source, ("tokenizer",)) / "tokenizer" / "vocab.json" for name in names]
    return all(file.is_file() and len(model.read_json(file)) < SMALL_VOCABULARY for file in files)


# ------------------------------------------------------------------------------------------------------------
# Scores


def load_clip(name: str, device: str) -> Callable[[Image.Image, str], float]:
    """
    Returns a scorer, 100 x the cosine of picture and prompt, for a key of CLIPS or another CLIPModel.
    HPSv2 (Wu et al., arXiv 2306.09341) and PickScore (Kirstain et al., arXiv 2305.01569) are CLIPs trained
    on human preferences. Raises OSError or ValueError.
    """
    import transformers                                          # slow, and seldom needed
    transformers.logging.set_verbosity_error()                   # no warnings about other packages
    transformers.logging.disable_progress_bar()

    folder = processor_folder = find_clip(name)
    if not any(folder.glob("*processor_config.json")):           # converted CLIPs lack it; all use OpenAI's
        processor_folder = local_folder(CLIPS["clip"], ("scorer",), weights=False)
    processor = transformers.AutoProcessor.from_pretrained(processor_folder)
    network, report = transformers.CLIPModel.from_pretrained(
        folder, dtype=torch.float32, use_safetensors=True, output_loading_info=True)
    if report["missing_keys"]:
        raise ValueError(f"{folder} lacks tensors of a CLIPModel, such as {min(report['missing_keys'])}")
    network.eval().to(device)

    @torch.inference_mode()
    def score(image: Image.Image, prompt: str) -> float:
        length = network.config.text_config.max_position_embeddings
        inputs = processor(images=image, text=prompt, truncation=True, max_length=length, return_tensors="pt")
        output = network(**inputs.to(device))
        return 100 * (output.image_embeds * output.text_embeds).sum().item()
    return score


def find_clip(name: str) -> Path:
    """The folder of a key of CLIPS or of another CLIPModel. Raises FileNotFoundError."""
    folder = local_folder(CLIPS.get(name, name), ("scorer",))
    if not any(folder.glob("model*.safetensors")):
        raise FileNotFoundError(f"no model.safetensors in {folder}; a .bin file is a pickle and is not "
                                f"opened: convert it to safetensors, or choose another --scorer")
    return folder


def mean_and_error(scores: Iterable[float]) -> tuple[float, float]:
    """The mean of those scores that are not nan, and its standard error; nan where there are too few."""
    scores = [score for score in scores if not math.isnan(score)]
    return (statistics.fmean(scores) if scores else math.nan,
            statistics.stdev(scores) / len(scores) ** 0.5 if len(scores) > 1 else math.nan)


# ------------------------------------------------------------------------------------------------------------
# Pictures


def picture_path(folder: Path, index: int, prompt: str) -> Path:
    """Where T2I-CompBench's scripts look for a picture; they split its name at _ into prompt and number."""
    name = re.sub(r'[\\/:*?"<>|_\s]+', " ", prompt).encode()[:200].decode(errors="ignore")
    return folder / "samples" / f"{name}_{index:06}.png"


def read_note(path: Path) -> dict:
    """How `draw_pictures` drew a PNG; nothing if it did not, or if there is no such file."""
    if not path.is_file():
        return {}
    with Image.open(path) as image:
        return json.loads(image.info.get("note", "{}"))


def draw_pictures(name: str, args: argparse.Namespace,
                  groups: dict[str, list[str]]) -> dict[str, list[Path]]:
    """
    The pictures of one model, by group; prompt i of each group has the seed `--seed` + i.

    Pictures with the same settings are kept; the rest are drawn 32 at a time, so a stop loses at most 32.
    """
    device, chosen = resolve_device(args.device), preset(name)
    dtype, steps = resolve_dtype(args.precision, device), args.steps or chosen.steps
    unet = model.part_folder(local_folder(chosen.unet, ("unet",), dtype in model.HALF), "unet")
    weights = [[file.name, file.stat().st_mtime_ns] for file in sorted(unet.glob("*.safetensors"))]
    folder, paths, missing = args.pictures / f"{quote(name, safe='')}-{steps}", defaultdict(list), []
    for group, prompts in groups.items():
        for i, prompt in enumerate(prompts):
            path = picture_path(folder / group, i, prompt)
            settings = [prompt, args.seed + i, steps, chosen.guidance, str(dtype), weights]
            paths[group].append(path)
            if read_note(path).get("settings") != settings:
                missing.append((path, settings))
    pipeline = load_pipeline(name, None, dtype, device, args.low_memory) if missing else None
    for first in tqdm(range(0, len(missing), 32), f"drawing {name}", unit="batch"):
        batch, start = missing[first:first + 32], time.perf_counter()
        prompts, seeds = [settings[0] for _, settings in batch], [settings[1] for _, settings in batch]
        images = pipeline(prompts, steps=steps, seed=seeds)
        seconds = (time.perf_counter() - start) / len(images)
        for image, (path, settings) in zip(images, batch):
            for old in path.parent.glob(f"*{path.name[-11:]}"):  # of this number, perhaps of another prompt
                old.unlink()
            note = {"settings": settings, "seconds": seconds, "device": describe_device(device, dtype)}
            info = PngImagePlugin.PngInfo()
            info.add_text("note", json.dumps(note))
            atomic_write(path, lambda path: image.save(path, pnginfo=info))
    return paths


# ------------------------------------------------------------------------------------------------------------
# The table


def score_pictures(score: Callable, groups: dict[str, list[str]],
                   paths: dict[str, list[Path]]) -> dict[str, tuple[float, float]]:
    """Mean and standard error of scores by group, or of the judge's by name."""
    scores = defaultdict(list)
    for group, prompts in groups.items():
        for path, prompt in zip(tqdm(paths[group], f"scoring {group}"), prompts):
            with Image.open(path) as image:
                found = score(image, prompt)
            for column, value in (found if score is shapes.judge else {group: found}).items():
                scores[column].append(value)
    return {column: mean_and_error(values) for column, values in scores.items()}


def quality(args: argparse.Namespace) -> Image.Image:
    """Draws with all models, and only then loads the scorer: the two are never in memory together."""
    toys, groups = all_toys(args.model), read_prompts(args.prompts, args.limit)
    if toys and not args.prompts:
        groups = {"captions": shapes.judge_captions(args.limit or 256)}
    scorer = args.scorer or ("judge" if toys else "hpsv2")
    if scorer not in OWN_SCORERS:
        find_clip(scorer)                                        # fails now, and not after hours
    pictures = {name: draw_pictures(name, args, groups) for name in args.model}
    score = OWN_SCORERS.get(scorer) or load_clip(scorer, resolve_device(args.device))

    lines, rows, table, dots = {}, [], [], {}
    for name, paths in pictures.items():
        results = score_pictures(score, groups, paths)
        notes = [read_note(path) for path in sum(paths.values(), [])]
        with torch.device("meta"):
            parameters = count_parameters(model.UNet(read_configs(name)[2]))
        lines[name] = parameters, statistics.median(note["seconds"] for note in notes), results
        for group in groups:
            if group in COMPBENCH:
                print(COMPBENCH[group].format(paths[group][0].parents[1].resolve()))
    columns = list(results)
    for name, (millions, *scores) in PAPER.items():
        known = {column: (mean, math.nan) for column, mean in zip(sum(COLUMNS.values(), ()), scores)
                 if column in columns and column in COLUMNS.get(scorer, ())}
        if known:
            lines[f"{name}, published"] = 1e6 * millions, math.nan, known
    for name, (parameters, seconds, results) in lines.items():
        dots[name] = [results.get(column, UNKNOWN) for column in columns]
        average, _ = mean_and_error(mean for mean, _ in dots[name])
        cells = [*dots[name], (average, math.nan)]
        table.append([name, parameters / 1e6, seconds, *cells])
        if name in pictures:
            rows += [[name, column, *cell, parameters, seconds]
                     for column, cell in zip([*columns, "average"], cells)]
    header = ["model", "column", "mean", "standard error", "parameters", "seconds"]
    write_csv(args.out.with_suffix(".csv"), header, rows)
    print_table(["model", "M parameters", "s per picture", *columns, "average"], table)
    title = f"Table 4 by {scorer}: {len(notes)} prompts, on {notes[0]['device']}"
    print(f"{title}; parameters are the U-Net's, ± is a standard error over prompts")
    return dot_chart(title, columns, dots, "mean, and its standard error over prompts",
                     share=scorer in OWN_SCORERS)
