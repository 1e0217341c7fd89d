"""
Table 3 in miniature: which features to distil, at which stages, from which blocks, in which combination.

`python analysis.py ablation` runs distill.py for each row of the paper's table, scores each student, and
says of each of the paper's findings whether it was found again.
"""

import argparse
import math
import os
import re
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import cache
from pathlib import Path
from threading import Event, Lock
from typing import Callable, NamedTuple

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

import chart
import distill
import files
from data import PROMPTS
from sample import load_pipeline
from toy import shapes


class Row(NamedTuple):
    """A row of Table 3: what is distilled, and the HPSv2 that the paper has for it."""

    hpsv2: float
    features: str
    blocks: str = "bottom"


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
           "SA + CA + Res + FFN + LF all": Row(26.39, "SA,CA,Res,FFN,LF")}}


class Finding(NamedTuple):
    """What section 4.2 says: the mean of some rows is better than that of each group of others."""

    table: str
    claim: str
    better: list[str]
    worse: list[list[str]]


FINDINGS = {
    "F1": Finding("3a", "self-attention is the best type of feature", ["SA"],
                  [["task loss only"], ["CA"], ["Res"], ["FFN"], ["LF (BK-SDM)"]]),
    "F2": Finding("3b", "the decoder's stages matter more", ["SA at UP-1", "SA at UP-2"],
                  [["SA at DW-2", "SA at DW-3"]]),
    "F3": Finding("3c", "the first blocks of a transformer matter most", ["SA-bottom"],
                  [["SA-interleave"], ["SA-up"]]),
    "F4": Finding("3d", "LF helps where there is no self-attention, and only there",
                  ["SA + LF at DW-1 & UP-3"],
                  [["SA only"], ["SA + LF all"], ["SA + CA + Res + FFN + LF all"]])}
SIGNS = {"colour": 1, "shape": 1, "spatial": 1, "distance": -1}  # 1: more is better


def flags(args: argparse.Namespace, seed: int, row: Row) -> dict:
    """What distill.py is told of a run: KOALA-1B on task and featKD, no outKD (section 4.2)."""
    return {"--student": "1b", "--out-kd": 0, "--features": row.features, "--sa-blocks": row.blocks,
            "--steps": args.steps, "--batch": args.batch, "--seed": seed, "--judge": 0, "--preview-every": 0}


def words_of(flags: dict) -> list[str]:
    """Flags and their values, as on a command line."""
    return [str(word) for flag in flags.items() for word in flag]


def teacher_of(args: argparse.Namespace) -> str:
    """The teacher that the flags for distill.py name. Raises ValueError if they are not for this command."""
    own = flags(args, 0, TABLE["3a"]["task loss only"])
    refused = [*own, "--feat-kd", "--cache", "--out", "--dry-run"]
    if taken := [flag for flag in args.distill if flag.split("=")[0] in refused]:
        raise ValueError(f"{taken[0]} is not for distill.py here: each run of the table has its own")
    teacher = distill.command_line([*words_of(own), *args.distill]).teacher
    if teacher == "none":
        raise ValueError("--teacher none: Table 3 is about what a teacher's features teach")
    return teacher


def prompts_of(teacher: str, count: int) -> tuple[str, ...]:
    """What is drawn to score a run: the toy's captions that were not trained on, else prompts of ours."""
    if teacher != "toy":
        return tuple(PROMPTS[:count])
    return tuple(shapes.caption(shapes.JUDGE_SEED, i) for i in range(count))


def threads_of(args: argparse.Namespace) -> int:
    """Of each of the runs that are done at the same time."""
    return max(1, (os.cpu_count() or 1) // args.jobs)


def distilled(args: argparse.Namespace, seed: int, row: Row) -> Path:
    """The folder of a finished run of distill.py, made or made longer if there is none."""
    folder = args.runs / f"{re.sub('[^A-Za-z0-9]+', '-', row.features)}-{row.blocks}-{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, Path(__file__).with_name("distill.py"), *words_of(flags(args, seed, row)),
               "--out", folder, *args.distill]
    environment = os.environ | ({"OMP_NUM_THREADS": str(threads_of(args))} if args.jobs > 1 else {})
    with open(folder / "distill.log", "w") as log:
        done = subprocess.run(list(map(str, command)), stdout=log, stderr=log, env=environment)
    if done.returncode:
        told = (folder / "distill.log").read_text().strip().splitlines()
        told = told or [f"it ended with {done.returncode}"]
        said = re.sub(r"--out\b(?!-)", "--runs", told[-1].removeprefix("error: "))
        raise ValueError(f"{folder}: {said}")
    return folder


def draw(teacher: str, prompts: tuple[str, ...], unet: Path | None = None) -> list[Image.Image]:
    """Pictures by the teacher, or by a student in the place of its U-Net, sampled alike."""
    return load_pipeline(teacher, unet)(list(prompts), seed=list(range(len(prompts))))


@cache
def drawn_by(teacher: str, prompts: tuple[str, ...]) -> list[Image.Image]:
    """Pictures by the teacher, drawn once for all runs."""
    return draw(teacher, prompts)


DRAWING = Lock()  # runs that are scored at the same time wait for the first of them to draw the teacher's


def score(folder: Path, steps: int, teacher: str, prompts: tuple[str, ...]) -> dict[str, float]:
    """
    The judge's scores of a run, nan if it is not the toy's, and its distance to the teacher.

    The distance is the root mean square difference of pictures from the same noise, in 0..1.
    """
    path = folder / f"score-{steps}-{len(prompts)}.csv"  # a run may be made longer
    if not path.exists() or not files.read_csv(path):
        with DRAWING:
            taught = drawn_by(teacher, prompts)
        images = draw(teacher, prompts, folder / "unet")
        scores = dict.fromkeys(SIGNS, math.nan)
        if teacher == "toy":
            scores |= shapes.scores(images, prompts)
        pairs = [[np.asarray(image, np.float64) / 255 for image in pair] for pair in zip(images, taught)]
        scores["distance"] = statistics.fmean(float(((a - b) ** 2).mean() ** 0.5) for a, b in pairs)
        files.write_csv(path, list(scores), [list(scores.values())])
    return {key: float(value) for key, value in files.read_csv(path)[0].items()}


def verdict(better: list[list[float]], worse: list[list[list[float]]], sign: int) -> str:
    """
    Whether rows, each with a score for every seed, are better than every group of others, by the spread.

    Runs of one seed have the same data and noise, so a difference is taken seed by seed; it tells something
    if its mean is larger than its standard deviation. `sign` is -1 where less is better.
    """
    if len(better[0]) < 2:
        return "too close to tell, for one seed has no spread"
    by_seed = lambda rows: [statistics.fmean(scores) for scores in zip(*rows)]
    gains = [[sign * (a - b) for a, b in zip(by_seed(better), by_seed(group))] for group in worse]
    if all(statistics.fmean(gain) > statistics.stdev(gain) for gain in gains):
        return "agrees"
    if any(statistics.fmean(gain) < -statistics.stdev(gain) for gain in gains):
        return "disagrees"
    return "too close to tell"


def in_parallel(jobs: int, work: Callable, items: list) -> dict:
    """What `work` gives for each item, so many at a time; once one has failed, no other is begun."""
    failed = Event()

    def one(item):
        if not failed.is_set():
            try:
                return work(item)
            except BaseException:
                failed.set()
                raise

    with ThreadPoolExecutor(jobs) as pool:
        try:
            begun = {pool.submit(one, item): item for item in items}
            return {begun[done]: done.result()
                    for done in tqdm(as_completed(begun), "runs", len(items), unit="run")}
        finally:
            failed.set()


def ablation(args: argparse.Namespace):
    """Runs and scores every row with every seed; rows that are the same run are run once."""
    teacher = teacher_of(args)
    prompts = prompts_of(teacher, args.judge)
    rows = {(table, name): row for table, named in TABLE.items() if args.table in (table, "all")
            for name, row in named.items()}
    runs = list(dict.fromkeys(row._replace(hpsv2=0) for row in rows.values()))
    todo = [(seed, row) for seed in range(args.seeds) for row in runs]
    if args.jobs > 1:
        torch.set_num_threads(threads_of(args))
    both = lambda run: score(distilled(args, *run), args.steps, teacher, prompts)
    found = in_parallel(args.jobs, both, todo)
    scores = {place: {key: [found[seed, row._replace(hpsv2=0)][key] for seed in range(args.seeds)]
                      for key in SIGNS} for place, row in rows.items()}

    spread = lambda values: statistics.stdev(values) if len(values) > 1 else math.nan
    numbers = [[*place, f"{rows[place].hpsv2:.2f}", *(number for values in scores[place].values()
                                             for number in (statistics.fmean(values), spread(values)))]
               for place in rows]
    names = ["table", "row", "paper's HPSv2", *(key + part for key in SIGNS for part in ("", " spread"))]
    files.write_csv(args.out.with_suffix(".csv"), names, numbers)
    cell = lambda *numbers: " ± ".join(f"{number:.3f}" for number in numbers if not math.isnan(number))
    header = [*names[:3], *names[3::2]]
    cells = chart.show(header, [row[:3] + [cell(*pair) for pair in zip(row[3::2], row[4::2])]
                                for row in numbers])
    told = findings(scores)
    print("\n".join(told))
    title = (f"Table 3, KOALA-1B of {teacher}: {args.steps} steps of {args.batch}, {args.seeds} seeds, "
             f"{len(prompts)} captions")
    files.write(args.out, lambda path: chart.stack(
        chart.table(title, header, cells), chart.paragraph(told)).save(path))


def findings(scores: dict[tuple[str, str], dict[str, list[float]]]) -> list[str]:
    """A line for each finding whose table was run; `scores`, one for each seed, are by place and name."""
    told = []
    for name, (table, claim, better, worse) in FINDINGS.items():
        if (table, better[0]) not in scores:
            continue
        verdicts = []
        for key, sign in SIGNS.items():
            of = lambda names: [scores[table, one][key] for one in names]
            if not math.isnan(of(better)[0][0]):
                verdicts.append(f"by {key} {verdict(of(better), [of(group) for group in worse], sign)}")
        told.append(f"{name}, {claim}: {'; '.join(verdicts)}")
    return told
