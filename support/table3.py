"""
Table 3 in miniature: which features to distil, at which stages, from which blocks, in which combination.

`python analysis.py ablation` runs distill.py for each row and seed, and checks the paper's findings F1 to F4.
"""

import argparse
import math
import os
import re
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from itertools import product
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

import numpy as np
from PIL import Image
from tqdm import tqdm

import distill
from sample import load_pipeline
from support.cli import resolve_device
from support.data import PROMPTS
from support.files import read_csv, write_csv
from support.plots import dot_chart, draw_table, format_score, print_table, stack
from support.scorers import find_scorer
from toy import shapes


class Row(NamedTuple):
    """A row of Table 3: what is distilled, and the paper's HPSv2."""

    hpsv2: float
    features: str
    blocks: str = "bottom"
    normalize: bool = False                                      # each feature by its teacher's mean square


TABLE = {
    "3a": {"task loss only": Row(25.53, "none"), "SA": Row(26.74, "SA"), "CA": Row(26.11, "CA"),
           "Res": Row(26.27, "Res"), "FFN": Row(26.48, "FFN"), "LF (BK-SDM)": Row(26.63, "LF")},
    "3b": {"task loss only": Row(25.53, "none"), "SA at DW-2": Row(25.32, "SA@DW-2"),
           "SA at DW-3": Row(25.57, "SA@DW-3"), "SA at Mid": Row(25.66, "SA@Mid"),
           "SA at UP-1": Row(26.52, "SA@UP-1"), "SA at UP-2": Row(26.05, "SA@UP-2")},
    "3c": {"SA-bottom": Row(26.74, "SA"), "SA-interleave": Row(26.58, "SA", "interleave"),
           "SA-up": Row(26.48, "SA", "up")},
    "3d": {"SA only": Row(26.74, "SA"), "SA + LF at DW-1 & UP-3": Row(26.98, "SA,LF@DW-1,LF@UP-3"),
           "SA + Res at DW-1 & UP-3": Row(26.94, "SA,Res@DW-1,Res@UP-3"),
           "SA + LF all": Row(26.83, "SA,LF"), "SA + Res all": Row(26.80, "SA,Res"),
           "SA + CA + Res + FFN + LF all": Row(26.39, "SA,CA,Res,FFN,LF"),
           "SA + LF at DW-1 & UP-3, normalized": Row(math.nan, "SA,LF@DW-1,LF@UP-3", normalize=True)}}
FINDINGS = {  # of section 4.2: the mean of some rows is better than that of each group of others
    "3a": ("F1, self-attention is the best type of feature",
           ["SA"], [["task loss only"], ["CA"], ["Res"], ["FFN"], ["LF (BK-SDM)"]]),
    "3b": ("F2, the decoder's stages matter more",
           ["SA at UP-1", "SA at UP-2"], [["SA at DW-2", "SA at DW-3"]]),
    "3c": ("F3, the first blocks of a transformer matter most",
           ["SA-bottom"], [["SA-interleave"], ["SA-up"]]),
    "3d": ("F4, LF helps where there is no self-attention, and only there",
           ["SA + LF at DW-1 & UP-3"], [["SA only"], ["SA + LF all"], ["SA + CA + Res + FFN + LF all"]])}
SIGNS = dict.fromkeys(shapes.SCORES, 1) | {"distance": -1}       # the scores of a run; 1: more is better


def distill_flags(args: argparse.Namespace, features: str, blocks: str, normalize: bool,
                  seed: int) -> list[str]:
    """The flags of a run: KOALA-1B on task and featKD, without outKD (section 4.2)."""
    return ["--student", "1b", "--out-kd", "0", "--features", features, "--sa-blocks", blocks,
            "--steps", str(args.steps), "--batch", str(args.batch), "--seed", str(seed),
            "--judge", "0", "--preview-every", "0",
            "--normalize-features" if normalize else "--no-normalize-features"]


def parse_teacher(args: argparse.Namespace) -> str:
    """The teacher in the flags for distill.py; raises ValueError for flags that the table sets itself."""
    own = distill_flags(args, "none", "bottom", True, 0)
    for flag in args.distill:
        if flag.split("=")[0] in (*own[::2], "--no-normalize-features", "--feat-kd", "--out", "--dry-run"):
            raise ValueError(f"{flag} is not for distill.py here: the table sets it")
    teacher = distill.parse_args(own + args.distill).teacher
    if teacher == "none":
        raise ValueError("--teacher none: Table 3 is about what a teacher's features teach")
    return teacher


def run_distill(args: argparse.Namespace, features: str, blocks: str, normalize: bool, seed: int) -> Path:
    """Runs or resumes distill.py in a folder of `--runs`, which it returns; raises ValueError if it fails."""
    kind = re.sub("[^A-Za-z0-9]+", "-", features) + "-normalized" * normalize
    folder = args.runs / f"{kind}-{blocks}-{args.steps}-{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    flags = distill_flags(args, features, blocks, normalize, seed) + args.distill
    command = [sys.executable, distill.__file__, "--out", str(folder), *flags]
    threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // args.jobs))} if args.jobs > 1 else {}
    with open(folder / "distill.log", "w") as log:
        status = subprocess.run(command, stdout=log, stderr=log, env=os.environ | threads).returncode
    if status:
        lines = (folder / "distill.log").read_text().strip().splitlines() or [f"it ended with {status}"]
        raise ValueError(f"{folder}: {lines[-1].removeprefix('error: ')}")
    return folder


@lru_cache(maxsize=2)  # the teacher's are asked for after each student's, and so stay
def draw(teacher: str, prompts: tuple[str, ...], unet: Path | None = None) -> list[Image.Image]:
    """Images by the teacher, or by a student in the place of its U-Net, from the same noise."""
    return load_pipeline(teacher, unet)(list(prompts), seed=list(range(len(prompts))))


def score(folder: Path, steps: int, teacher: str, prompts: tuple[str, ...],
          scorer: str | None = None) -> list[float]:
    """
    The scores of a run: the judge's (nan unless the teacher is the toy), the distance to the teacher's
    images, and a scorer's mean if there is one.

    The distance is the root mean square difference of images from the same noise, in 0..1.
    """
    name = f"score-{steps}-{len(prompts)}"                       # by steps, as a run may be made longer
    path = folder / (f"{name}-{quote(scorer, safe='')}.csv" if scorer else f"{name}.csv")
    signs = [*SIGNS, scorer] if scorer else [*SIGNS]
    if not path.exists() or not read_csv(path, signs):
        images = draw(teacher, prompts, folder / "unet")
        scores = dict.fromkeys(SIGNS, math.nan)
        if teacher == "toy":
            scores |= shapes.scores(images, prompts)
        distances = []
        for ours, theirs in zip(images, draw(teacher, prompts)):
            difference = np.asarray(ours, np.float64) / 255 - np.asarray(theirs, np.float64) / 255
            distances.append((difference**2).mean() ** 0.5)
        scores["distance"] = statistics.fmean(distances)
        if scorer:
            network = find_scorer(scorer, {"prompts": list(prompts)})
            network.load(resolve_device(None))                   # after the pipelines, which are gone
            scores[scorer] = statistics.fmean(
                network(image, prompt, "prompts")[0] for image, prompt in zip(images, prompts))
        write_csv(path, list(scores), [list(scores.values())])
    row = read_csv(path)[0]
    return [float(row[sign]) for sign in signs]


def verdict(gains: list[np.ndarray]) -> str:
    """
    Whether some rows are better than each group of others, from their gains (seeds,) over each group.

    A gain is clear if its mean is larger than its standard deviation; runs of a seed share data and noise.
    """
    if len(gains[0]) < 2:
        return "too close to tell, for one seed has no spread"
    if all(gain.mean() > gain.std(ddof=1) for gain in gains):
        return "agrees"
    if any(gain.mean() < -gain.std(ddof=1) for gain in gains):
        return "disagrees"
    return "too close to tell"


def check_finding(better: list[str], worse: list[list[str]], scores: dict[str, np.ndarray],
                  signs: dict[str, int] = SIGNS) -> str:
    """What each score says of a finding; `scores` (scores, seeds) are by row of the finding's table."""
    best = np.mean([scores[row] for row in better], axis=0)      # (scores, seeds)
    gains = [best - np.mean([scores[row] for row in group], axis=0) for group in worse]
    verdicts = []
    for i, (key, sign) in enumerate(signs.items()):
        if not np.isnan(best[i]).any():
            verdicts.append(f"by {key} {verdict([sign * gain[i] for gain in gains])}")
    return "; ".join(verdicts)


def ablation(args: argparse.Namespace) -> Image.Image:
    """Runs and scores every row with every seed; rows that are the same run are run once."""
    teacher, tables = parse_teacher(args), list(TABLE) if args.table == "all" else [args.table]
    prompts = tuple(PROMPTS[:args.judge])
    if teacher == "toy":                                         # captions that were not trained on
        prompts = tuple(shapes.judge_captions(args.judge))
    signs = SIGNS
    if args.scorer:
        find_scorer(args.scorer, {"prompts": list(prompts)})     # fails now, and not after hours of runs
        signs = SIGNS | {args.scorer: 1}
    runs = {}                                                    # to their scores
    for seed, table in product(range(args.seeds), tables):
        runs |= {(*row[1:], seed): None for row in TABLE[table].values()}
    for i in tqdm(range(0, len(runs), args.jobs), "runs"):       # once a run has failed, no other is started
        group = list(runs)[i:i + args.jobs]
        with ThreadPoolExecutor(args.jobs) as pool:
            folders = list(pool.map(lambda run: run_distill(args, *run), group))
        for run, folder in zip(group, folders):
            runs[run] = score(folder, args.steps, teacher, prompts, args.scorer)

    names = [sign for sign in signs if sign != "distance"] if teacher == "toy" or args.scorer else ["distance"]
    kept = [list(signs).index(name) for name in names]           # the scores that are drawn
    rows, cells, findings, groups = [], [], [], {}
    for table in tables:
        scores, points = {}, {}
        for name, row in TABLE[table].items():
            scores[name] = np.array([runs[(*row[1:], seed)] for seed in range(args.seeds)]).T
            means = scores[name].mean(axis=1)
            spreads = scores[name].std(axis=1, ddof=1) if args.seeds > 1 else means * math.nan
            start = [table, name, format_score(row.hpsv2, digits=2)]
            points[name] = list(zip(means, spreads))
            rows.append([*start, *np.stack([means, spreads], axis=1).flatten().tolist()])
            cells.append([*start, *map(format_score, means, spreads)])
        order = sorted(TABLE[table].items(), key=lambda item: -np.nan_to_num(item[1].hpsv2))
        dots = groups[f"Table {table}"] = {}
        for name, row in order:
            dots[f"{name}  {format_score(row.hpsv2, digits=2)}"] = [points[name][k] for k in kept]
        claim, better, worse = FINDINGS[table]
        findings.append([claim, check_finding(better, worse, scores, signs)])
    header = ["table", "row", "paper's HPSv2", *signs]
    csv_header = header[:3] + [key + kind for key, kind in product(signs, ("", " spread"))]
    write_csv(args.out.with_suffix(".csv"), csv_header, rows)
    print_table(header, cells)
    for claim, found in findings:
        print(f"{claim}: {found}")
    title = (f"Table 3, KOALA-1B of {teacher}: {args.steps} steps of {args.batch}, {args.seeds} seeds, "
             f"{len(prompts)} captions. In the paper's order, with its HPSv2")
    return stack(dot_chart(title, names, groups),
                 draw_table("Findings of section 4.2", ["finding", "verdict"], findings))
