"""
Table 3 in miniature: which features to distill, at which stages, from which blocks, in which combination.

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
from typing import NamedTuple, Sequence
from urllib.parse import quote

import numpy as np
from PIL import Image
from tqdm import tqdm

import distill
from sample import load_pipeline
from support.files import read_csv, write_csv
from support.hub import resolve_device
from support.plots import dot_chart, print_table
from support.table4 import PROMPTS, all_toys, find_clip, load_clip
from toy import shapes


class Row(NamedTuple):
    """A row of Table 3: the paper's HPSv2, and distill.py's flags for what is distilled."""

    hpsv2: str
    features: str
    blocks: str = "bottom"
    normalize: bool = False


TABLE = {  # from the paper's best row to its worst
    "3a": {"SA": Row("26.74", "SA"), "LF (BK-SDM)": Row("26.63", "LF"), "FFN": Row("26.48", "FFN"),
           "Res": Row("26.27", "Res"), "CA": Row("26.11", "CA"), "task loss only": Row("25.53", "none")},
    "3b": {"SA at UP-1": Row("26.52", "SA@UP-1"), "SA at UP-2": Row("26.05", "SA@UP-2"),
           "SA at Mid": Row("25.66", "SA@Mid"), "SA at DW-3": Row("25.57", "SA@DW-3"),
           "task loss only": Row("25.53", "none"), "SA at DW-2": Row("25.32", "SA@DW-2")},
    "3c": {"SA-bottom": Row("26.74", "SA"), "SA-interleave": Row("26.58", "SA", "interleave"),
           "SA-up": Row("26.48", "SA", "up")},
    "3d": {"SA + LF at DW-1 & UP-3": Row("26.98", "SA,LF@DW-1,LF@UP-3"),
           "SA + Res at DW-1 & UP-3": Row("26.94", "SA,Res@DW-1,Res@UP-3"),
           "SA + LF all": Row("26.83", "SA,LF"), "SA + Res all": Row("26.80", "SA,Res"),
           "SA only": Row("26.74", "SA"),
           "SA + CA + Res + FFN + LF all": Row("26.39", "SA,CA,Res,FFN,LF"),
           "SA + LF at DW-1 & UP-3, normalized": Row("", "SA,LF@DW-1,LF@UP-3", normalize=True)}}
FINDINGS = {  # of section 4.2: the first rows have a better mean than each other group
    "3a": ("F1, self-attention is the best type of feature",
           ["SA"], [["task loss only"], ["CA"], ["Res"], ["FFN"], ["LF (BK-SDM)"]]),
    "3b": ("F2, the decoder's stages matter more",
           ["SA at UP-1", "SA at UP-2"], [["SA at DW-2", "SA at DW-3"]]),
    "3c": ("F3, the first blocks of a transformer matter most",
           ["SA-bottom"], [["SA-interleave"], ["SA-up"]]),
    "3d": ("F4, LF helps where there is no self-attention, and only there",
           ["SA + LF at DW-1 & UP-3"], [["SA only"], ["SA + LF all"], ["SA + CA + Res + FFN + LF all"]])}
SCORES = (*shapes.SCORES, "distance")  # of a run


def distill_flags(args: argparse.Namespace, row: Row, seed: int) -> list[str]:
    """The flags of a run: KOALA-1B on task and featKD, without outKD (section 4.2). Later flags win."""
    return [*args.distill, "--student", "1b", "--out-kd", "0", "--feat-kd", "1", "--features", row.features,
            "--sa-blocks", row.blocks, "--steps", str(args.steps), "--seed", str(seed), "--judge", "0",
            "--preview-every", "0", "--normalize-features" if row.normalize else "--no-normalize-features"]


def run_distill(args: argparse.Namespace, row: Row, seed: int) -> Path:
    """Runs or resumes distill.py in a folder of `--runs`, which it returns; raises ValueError if it fails."""
    features = re.sub("[^A-Za-z0-9]+", "-", row.features) + "-normalized" * row.normalize
    folder = args.runs / f"{features}-{row.blocks}-{args.steps}-{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, distill.__file__, *distill_flags(args, row, seed), "--out", str(folder)]
    threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // args.jobs))} if args.jobs > 1 else {}
    with open(folder / "distill.log", "w", encoding="utf-8") as log:
        status = subprocess.run(command, stdout=log, stderr=log, env=os.environ | threads).returncode
    if status:
        raise ValueError(f"distill.py ended with {status}; {folder / 'distill.log'} says why")
    return folder


@lru_cache(maxsize=2)  # the current student's, and the teacher's, which are used again
def draw(teacher: str, prompts: tuple[str, ...], unet: Path | None = None) -> list[Image.Image]:
    """Images by the teacher, or by a student in the place of its U-Net, from the same noise."""
    return load_pipeline(teacher, unet)(list(prompts), seed=list(range(len(prompts))))


def picture_distance(image: Image.Image, other: Image.Image) -> float:
    """The root mean square difference of two pictures, in 0..1."""
    difference = np.asarray(image, float) / 255 - np.asarray(other, float) / 255
    return float((difference**2).mean() ** 0.5)


def score(folder: Path, steps: int, teacher: str, prompts: tuple[str, ...],
          scorer: str | None = None) -> list[float]:
    """
    SCORES of a run, and its mean score by the CLIP `scorer`; saved in the run's folder.

    The judge's are nan unless the teacher is a toy. The distance is to the teacher's images.
    """
    name = f"score-{steps}-{len(prompts)}-{quote(scorer or '', safe='')}.csv"  # a run may be made longer
    if not (folder / name).exists():
        images, expected = draw(teacher, prompts, folder / "unet"), draw(teacher, prompts)
        scores = dict.fromkeys(SCORES, math.nan)
        if all_toys([teacher]):
            scores |= shapes.scores(images, prompts)
        scores["distance"] = statistics.fmean(map(picture_distance, images, expected))
        if scorer:
            clip = load_clip(scorer, resolve_device(None))       # after the pipelines, which are gone
            scores[scorer] = statistics.fmean(map(clip, images, prompts))
        write_csv(folder / name, list(scores), [list(scores.values())])
    row, = read_csv(folder / name)
    return [float(value) for value in row.values()]


def mean_and_spread(scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation over seeds, the last axis; a single one has a spread of nan."""
    means = scores.mean(axis=-1)
    return means, scores.std(axis=-1, ddof=1) if scores.shape[-1] > 1 else means * math.nan


def check_finding(better: list[str], worse: list[list[str]], scores: dict[str, np.ndarray],
                  names: Sequence[str]) -> str:
    """
    What each score in `names` says about a finding; `scores` maps its table's rows to (names, seeds).

    A gain is clear if its mean is larger than its spread over seeds: runs of a seed share data and noise.
    """
    def mean(rows: list[str]) -> np.ndarray:
        return np.mean([scores[row] for row in rows], axis=0)    # (names, seeds)

    gains = np.stack([mean(better) - mean(group) for group in worse])  # (groups, names, seeds)
    means, spreads = mean_and_spread(gains)                      # (groups, names)
    verdicts = []
    for name, gain, spread in zip(names, means.T, spreads.T):    # (groups,)
        if name == "distance":                                   # lower is better here only
            gain = -gain
        if (gain > spread).all():
            verdicts.append(f"by {name} agrees")
        elif (gain < -spread).any():
            verdicts.append(f"by {name} disagrees")
        elif not np.isnan(gain).any():
            verdicts.append(f"by {name} too close to tell")
    return "; ".join(verdicts)


def ablation(args: argparse.Namespace) -> Image.Image:
    """Runs and scores every row with every seed; identical rows share one run."""
    tables = list(TABLE) if args.table == "all" else [args.table]
    settings = distill.parse_args(distill_flags(args, TABLE["3a"]["SA"], 0))  # fails now if a flag is wrong
    teacher = settings.teacher
    prompts, names, shown = tuple(PROMPTS[:args.judge]), [*SCORES], ["distance"]
    if all_toys([teacher]):                                      # captions of new scenes
        prompts, shown = tuple(shapes.judge_captions(args.judge)), [*shapes.SCORES]
    if args.scorer:
        find_clip(args.scorer)                                   # fails now, and not after hours of runs
        names, shown = [*SCORES, args.scorer], [args.scorer]
    results = {}                                                 # by row and seed
    for seed, table in product(range(args.seeds), tables):
        results |= {(row, seed): None for row in TABLE[table].values()}
    for i in tqdm(range(0, len(results), args.jobs), "runs"):    # a failed run stops the rest
        runs = list(results)[i:i + args.jobs]
        with ThreadPoolExecutor(args.jobs) as pool:
            folders = list(pool.map(lambda run: run_distill(args, *run), runs))
        for run, folder in zip(runs, folders):
            results[run] = score(folder, args.steps, teacher, prompts, args.scorer)

    rows, dots, verdicts = [], {}, []
    for table in tables:
        scores = {}
        for label, row in TABLE[table].items():
            scores[label] = np.array([results[row, seed] for seed in range(args.seeds)]).T  # (names, seeds)
            cells = np.stack(mean_and_spread(scores[label]), axis=1)  # (names, 2)
            rows.append([table, label, row.hpsv2, *cells.flatten().tolist()])
            dots[f"{table}  {label}  {row.hpsv2}"] = [cells[names.index(name)] for name in shown]
        claim, better, worse = FINDINGS[table]
        verdicts.append(f"{claim}: {check_finding(better, worse, scores, names)}")
    columns = [name + kind for name, kind in product(names, ("", " spread"))]
    header = ["table", "row", "paper's HPSv2", *columns]
    write_csv(args.out.with_suffix(".csv"), header, rows)
    print_table(header, rows)
    print(*verdicts, sep="\n")
    title = (f"Table 3, KOALA-1B of {Path(teacher).name}: {args.steps} steps of {settings.batch}, "
             f"{args.seeds} seeds, {len(prompts)} captions")
    return dot_chart(title, shown, dots, "score, and its spread over seeds; rows have the paper's HPSv2",
                     share=shown == [*shapes.SCORES])
