"""
Drawing with teacher and student, and what the toy's judge says of them.
"""

import copy
from pathlib import Path

import torch
from PIL import Image

from model import UNet
from sample import Pipeline
from support.files import atomic_write, read_csv, write_csv
from support.plots import image_grid
from toy import shapes


def draw(pipeline: Pipeline, unet: UNet, prompts: list[str], progress: str | None = None) -> list[Image.Image]:
    """An image of each prompt by this U-Net, from seeds 0, 1, ..."""
    pipeline = copy.copy(pipeline)
    pipeline.unet = unet
    dtype = pipeline.dtype
    with torch.autocast(pipeline.device.split(":")[0], dtype, enabled=dtype != torch.float32):
        return pipeline(prompts, seed=list(range(len(prompts))), progress=progress)


def preview(pipeline: Pipeline, teacher: UNet | None, student: UNet, prompts: list[str], png: Path):
    """Draws the teacher's images and, below them, the student's, from the same noise."""
    unets = {"teacher": teacher, "student": student} if teacher else {"student": student}
    rows = [draw(pipeline, unet, prompts) for unet in unets.values()]
    atomic_write(png, lambda path: image_grid(rows, list(unets), gap=4).save(path))


def judge_run(run: Path, steps: int, count: int, pipeline: Pipeline, unets: dict[str, UNet]):
    """
    Prints the judge's scores of some U-Nets on `count` captions, and writes scores.csv and judged.png.

    The scores are kept with the run's number of steps, so that a run that goes on is judged again.
    """
    path = run / "scores.csv"
    header = ["", *shapes.SCORES, "steps", "captions"]
    rows = read_csv(path, header[1:]) if path.exists() else []
    if [(row["steps"], row["captions"]) for row in rows[-1:]] != [(str(steps), str(count))]:
        captions = shapes.judge_captions(count)
        images = {name: draw(pipeline, unet, captions, f"judging {name}") for name, unet in unets.items()}
        rows = []
        for row in images.values():
            rows.append([image.resize((128, 128), Image.Resampling.BICUBIC) for image in row[:8]])
        atomic_write(run / "judged.png", lambda path: image_grid(rows, list(images), gap=4).save(path))
        scores = {name: shapes.scores(row, captions) for name, row in images.items()}
        write_csv(path, header, [[name, *(f"{score:.3f}" for score in scores[name].values()), steps, count]
                                 for name in scores])
        rows = read_csv(path)
    for cells in [header, *(list(row.values()) for row in rows)]:
        print(f"{cells[0]:16}" + "".join(f"{cell:>9}" for cell in cells[1:4]))
