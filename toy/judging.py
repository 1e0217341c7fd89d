"""
Drawing with teacher and student, and what the toy's judge says of them.
"""

import copy
import sys
from pathlib import Path

import torch
from PIL import Image

from model import UNet
from sample import Pipeline
from support.files import atomic_write, read_csv, write_csv
from support.plots import image_grid, print_table
from toy import shapes


def draw(pipeline: Pipeline, unet: UNet, prompts: list[str], progress: str | None = None) -> list[Image.Image]:
    """Images of the prompts by this U-Net, from seeds 0, 1, ..."""
    pipeline = copy.copy(pipeline)
    pipeline.unet = unet
    dtype = pipeline.dtype
    with torch.autocast(pipeline.device.split(":")[0], dtype, enabled=dtype != torch.float32):
        return pipeline(prompts, seed=list(range(len(prompts))), progress=progress)


def preview(pipeline: Pipeline, teacher: UNet | None, student: UNet, prompts: list[str], png: Path):
    """Draws the teacher's images above the student's, from the same noise; grey where that fails."""
    unets = {"teacher": teacher, "student": student} if teacher else {"student": student}
    rows = []
    for name, unet in unets.items():
        try:
            rows.append(draw(pipeline, unet, prompts))
        except ValueError as error:                              # in float16 a young student may overflow
            print(f"warning: no preview of the {name}: {error}", file=sys.stderr)
            side = unet.config.sample_size * pipeline.vae_config.downscale
            rows.append([Image.new("RGB", (side, side), "grey")] * len(prompts))
    atomic_write(png, lambda path: image_grid(rows, list(unets), gap=4).save(path))


def judge_run(run: Path, steps: int, count: int, pipeline: Pipeline, unets: dict[str, UNet | None]):
    """
    Prints the judge's scores of teacher and student on `count` captions; writes scores.csv and judged.png.

    Of the "student before" training only the first pictures are drawn: it cannot draw anything yet. The scores
    are kept with the run's number of steps; a run that goes on is judged again.
    """
    path, header = run / "scores.csv", ["", *shapes.SCORES, "steps", "captions"]
    rows = [list(row.values()) for row in read_csv(path)] if path.exists() else []
    if [row[-2:] for row in rows[-1:]] != [[str(steps), str(count)]]:
        captions, pictures, rows = shapes.judge_captions(count), {}, []
        for name, unet in unets.items():
            if unet:
                drawn = captions[:8] if name == "student before" else captions
                images = draw(pipeline, unet, drawn, f"judging {name}")
                pictures[name] = [image.resize((128, 128), Image.Resampling.BICUBIC) for image in images[:8]]
            if unet and name != "student before":
                scores = shapes.scores(images, captions).values()
                rows.append([name, *(f"{score:.3f}" for score in scores), steps, count])
        grid = image_grid(list(pictures.values()), list(pictures), gap=4)
        atomic_write(run / "judged.png", lambda path: grid.save(path))
        write_csv(path, header, rows)
    print_table(header, rows)
