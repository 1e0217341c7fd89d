"""
Table 4: what pictures score, and what they cost, beside the paper's numbers.

`python analysis.py quality` draws each prompt with each model from the same noise, keeps the pictures, and
scores them: means, their standard errors, and the share of prompts on which each model is best.
"""

import argparse
import json
import math
import os
import statistics
import time
import zlib
from pathlib import Path
from typing import Callable
from urllib.parse import quote

import numpy as np
import torch
from PIL import Image, PngImagePlugin
from tqdm import tqdm

import model
from sample import load_pipeline
from support.cli import preset, resolve_device, resolve_dtype
from support.costs import count_parameters, describe_device, read_configs
from support.data import PROMPTS
from support.files import atomic_write, local_folder, write_csv
from support.plots import draw_table, format_score, print_table
from support.scorers import find_scorer
from support.text import CLIPTokenizer
from toy import shapes

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


def paper_scores(name: str, scorer: str) -> dict[str, float]:
    """The published scores of a row of PAPER, by column; none of a scorer that the paper does not use."""
    scores = dict(zip(sum(COLUMNS.values(), ()), PAPER[name][1:]))
    return {column: scores[column] for column in COLUMNS.get(scorer, ())}


# ------------------------------------------------------------------------------------------------------------
# Prompts


def read_prompt_file(path: Path) -> list[str]:
    """The prompts of a text, one a line, or of a JSON list, as HPSv2's are. Raises OSError or ValueError."""
    try:
        text = path.read_text(encoding="utf-8")
        lines = json.loads(text) if path.suffix == ".json" else text.splitlines()
        if not isinstance(lines, list):
            raise TypeError
        prompts = [line.strip() for line in lines if line.strip()]
    except UnicodeDecodeError:
        raise ValueError(f"--prompts {path} is not a text in UTF-8") from None
    except (ValueError, TypeError, AttributeError, RecursionError):
        raise ValueError(f"--prompts {path} is not a JSON list of prompts") from None
    if not prompts:
        raise ValueError(f"--prompts {path} has no prompts")
    return prompts


def read_prompt_groups(path: Path, limit: int | None) -> dict[str, list[str]]:
    """
    The first `limit` prompts of a file, or of each file of a folder, by the name of the file.

    Of a folder these are the JSON lists, as HPSv2 publishes them, or T2I-CompBench's *_val.txt, or any *.txt.
    """
    files = [path]
    if path.is_dir():
        lists = ([*path.glob(pattern)] for pattern in ("*.json", "*_val.txt", "*.txt"))
        files = sorted(next((found for found in lists if found), []))
        if not files:
            raise FileNotFoundError(f"--prompts {path} has no .json or .txt files")
    return {file.stem.removesuffix("_val"): read_prompt_file(file)[:limit] for file in files}


def all_toys(names: list[str]) -> bool:
    """Whether all these models have a small vocabulary, as the toy has, and so read only its captions."""
    for name in names:
        if CLIPTokenizer(local_folder(preset(name).source, ("tokenizer",)) / "tokenizer").words is None:
            return False
    return True


def read_groups(args: argparse.Namespace, toys: bool) -> dict[str, list[str]]:
    """The prompts by file; without --prompts, captions that the toy was not trained on, or PROMPTS."""
    if args.prompts:
        return read_prompt_groups(args.prompts, args.limit)
    if toys:
        return {"captions": shapes.judge_captions(args.limit or 256)}
    return {"prompts": PROMPTS[:args.limit]}


# ------------------------------------------------------------------------------------------------------------
# Pictures


def save_picture(path: Path, image: Image.Image, settings: dict, cost: dict):
    """Writes a PNG that says how it was drawn, and at what cost."""
    text = PngImagePlugin.PngInfo()
    text.add_text("drawn", json.dumps(settings | cost | {"pixels": zlib.crc32(image.tobytes())}))
    atomic_write(path, lambda path: image.save(path, pnginfo=text, compress_level=1))


def load_picture(path: Path, settings: dict) -> tuple[Image.Image, dict] | None:
    """A picture, and its settings and cost; None if it is absent or damaged, or has other settings."""
    try:
        with Image.open(path) as image:
            image.load()
            drawn = json.loads(image.info["drawn"])
            intact = drawn["pixels"] == zlib.crc32(image.tobytes())
            same = all(drawn[key] == value for key, value in settings.items())
    except (OSError, ValueError, LookupError, TypeError, SyntaxError):
        return None                                              # a SyntaxError is Pillow's, for a broken PNG
    return (image, drawn) if intact and same else None


class Pictures:
    """The pictures of one model for groups of prompts; prompt i of each group has the seed `--seed` + i."""

    def __init__(self, name: str, args: argparse.Namespace, groups: dict[str, list[str]]):
        self.name, self.device, self.low_memory = name, resolve_device(args.device), args.low_memory
        self.dtype, chosen = resolve_dtype(args.precision, self.device), preset(name)
        steps = args.steps or chosen.steps
        unet = model.part_folder(local_folder(chosen.unet, ("unet",), self.dtype in model.HALF), "unet")
        weights = []                                             # identified without reading them
        for file in sorted(unet.glob("*.safetensors")):
            status = os.stat(file)
            weights.append(f"{file.name} {status.st_size} {status.st_mtime_ns}")
        folder = args.pictures / f"{quote(name, safe='')}-{steps}"
        shared = {"steps": steps, "guidance": chosen.guidance, "dtype": str(self.dtype), "unet": weights}
        self.targets = {}                                        # paths and settings of each group's pictures
        for group, prompts in groups.items():
            self.targets[group] = []
            for i, prompt in enumerate(prompts):
                settings = {"prompt": prompt, "seed": args.seed + i} | shared
                self.targets[group].append((folder / f"{group}-{i:05}.png", settings))

    def complete(self):
        """Draws what is missing, damaged or of other settings, 32 at a time: a kill loses at most 32."""
        missing = [one for one in sum(self.targets.values(), []) if load_picture(*one) is None]
        if not missing:
            return
        pipeline = load_pipeline(self.name, None, self.dtype, self.device, self.low_memory)
        where = describe_device(self.device, self.dtype)
        bar = tqdm(total=len(missing), desc=f"drawing {self.name}")
        for first in range(0, len(missing), 32):
            part, start = missing[first:first + 32], time.perf_counter()
            images = pipeline([settings["prompt"] for _, settings in part], steps=part[0][1]["steps"],
                              seed=[settings["seed"] for _, settings in part])
            cost = {"seconds": (time.perf_counter() - start) / len(part), "where": where}
            for image, (path, settings) in zip(images, part):
                save_picture(path, image, settings, cost)
            bar.update(len(part))
        bar.close()

    def score(self, scorer: Callable) -> tuple[list[np.ma.MaskedArray], list[dict]]:
        """Scores (N, K) of each group, masked where they do not apply; each picture's settings and cost."""
        scores, drawn = [], []
        for group, targets in self.targets.items():
            rows = []
            for path, settings in tqdm(targets, f"scoring {self.name}, {group}"):
                image, facts = load_picture(path, settings)
                rows.append(scorer(image, settings["prompt"], group))
                drawn.append(facts)
            scores.append(np.ma.masked_invalid(np.array(rows)))
        return scores, drawn


# ------------------------------------------------------------------------------------------------------------
# Scores


def bootstrap(groups: list[np.ma.MaskedArray], resamples: int = 1000) -> tuple[np.ndarray, float]:
    """
    Standard errors of the mean of each column, and of the average of these means.

    Each group is the scores (N, K) of its N prompts in its K columns, masked where one does not apply.
    Resamples prompts within each group, with replacement; one seed gives all models the same prompts.
    """
    rng, means = np.random.default_rng(0), []
    for scores in groups:
        picks = rng.integers(len(scores), size=(resamples, len(scores)))
        means.append(scores[picks].mean(axis=1))                 # (resamples, K)
    means = np.ma.concatenate(means, axis=1)
    return means.std(axis=0, ddof=1).filled(math.nan), float(means.mean(axis=1).std(ddof=1))


def shares_of_wins(models: list[list[np.ma.MaskedArray]]) -> list[float]:
    """
    The share of the prompts on which each model alone scores best, by the mean of a prompt's columns.

    Groups are as in `bootstrap`; nan for a model without others.
    """
    if len(models) < 2:
        return [math.nan]
    means = []
    for groups in models:
        means.append(np.ma.concatenate([scores.mean(axis=1) for scores in groups]))
    prompts = np.ma.stack(means)                                 # (models, prompts)
    best = (prompts == prompts.max(axis=0)).filled(False)
    return (best & (best.sum(axis=0) == 1)).mean(axis=1).tolist()


def summarise(scores: list[np.ma.MaskedArray]) -> tuple[list[float], list[float]]:
    """Means of all columns and, last, their average; and the standard errors of both."""
    means = np.ma.concatenate([group.mean(axis=0) for group in scores])  # (columns,)
    errors, error = bootstrap(scores)
    return [*means.filled(math.nan).tolist(), float(means.mean())], [*errors.tolist(), error]


def published_rows(scorer: str, columns: tuple[str, ...], others: list[str], digits: int) -> list[list]:
    """The paper's rows for a table of these columns, averaged over the same; none if it has none of them."""
    rows = []
    for name, (parameters, *_) in PAPER.items():
        published = paper_scores(name, scorer)
        numbers = [published.get(column, math.nan) for column in columns[:-1]]
        if published.keys() & {*columns}:
            numbers += [statistics.fmean(numbers), *(published.get(other, math.nan) for other in others)]
            cells = [format_score(number, digits=digits) for number in numbers]
            rows.append([f"{name}, published", parameters, math.nan, math.nan, *cells])
    return rows


def quality(args: argparse.Namespace) -> Image.Image:
    """Draws with all models, and only then loads the scorer: the two are never in memory together."""
    toys = all_toys(args.model)
    groups, scorer_name = read_groups(args, toys), args.scorer or ("judge" if toys else "hpsv2")
    scorer = find_scorer(scorer_name, groups)                    # fails now, and not after hours of drawing
    scored = {group: prompts for group, prompts in groups.items() if scorer.columns(group)}
    others = [group for group in groups if group not in scored]
    if not scored:
        raise ValueError(f"--prompts: {', '.join(others)}: UniDet scores these, and is not here; give others")
    models = [Pictures(one, args, scored) for one in args.model]
    for pictures in models:
        pictures.complete()
    scorer.load(models[0].device)
    results = [pictures.score(scorer) for pictures in models]

    columns = (*sum((scorer.columns(group) for group in scored), ()), "average")
    rows, cells, places = [], [], {}
    wins = shares_of_wins([scores for scores, _ in results])
    for name, (scores, drawn), share in zip(args.model, results, wins):
        means, errors = summarise(scores)
        with torch.device("meta"):
            parameters = count_parameters(model.UNet(read_configs(name)[2]))
        seconds = statistics.median(facts["seconds"] for facts in drawn)
        places |= dict.fromkeys(facts["where"] for facts in drawn)
        rows += [[name, *numbers, parameters, seconds, share] for numbers in zip(columns, means, errors)]
        with_errors = [format_score(*numbers, scorer.digits) for numbers in zip(means, errors)]
        cells.append([name, parameters / 1e6, seconds, share, *with_errors, *[""] * len(others)])
    cells += published_rows(scorer_name, columns, others, scorer.digits)
    write_csv(args.out.with_suffix(".csv"),
              ["model", "column", "mean", "standard error", "parameters", "seconds", "best on"], rows)
    header = ["model", "M parameters", "s a picture", "best on", *columns,
              *(f"{other} (no UniDet)" for other in others)]
    print_table(header, cells)
    title = f"Table 4 by {scorer_name}: {len(drawn)} prompts, on {' and '.join(places)}"
    print(f"{title}; parameters are the U-Net's, ± is a standard error over prompts")
    return draw_table(title, header, cells)
