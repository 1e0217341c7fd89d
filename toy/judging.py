"""
Draws with teacher and student, and scores both with the toy's judge.
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


def draw(pipeline: Pipeline, unet: UNet, prompts: list[str],
         progress: str | None = None) -> list[Image.Image]:
    """An image of each prompt by this U-Net, from seeds 0, 1, ..."""
    pipeline = copy.copy(pipeline)
    pipeline.unet, dtype = unet, pipeline.dtype
    with torch.autocast(pipeline.device.split(":")[0], dtype, enabled=dtype != torch.float32):
        return pipeline(prompts, seed=list(range(len(prompts))), progress=progress)


def preview(pipeline: Pipeline, teacher: UNet | None, student: UNet, prompts: list[str], png: Path):
    """Draws the teacher's images above the student's, from the same noise; gray where drawing fails."""
    unets = {"teacher": teacher, "student": student} if teacher else {"student": student}
    rows = []
    for name, unet in unets.items():
        try:
            rows.append(draw(pipeline, unet, prompts))
        except (ValueError, torch.OutOfMemoryError) as error:    # such as overflow in float16
            print(f"warning: no preview of the {name}: {error}", file=sys.stderr)
            side = unet.config.sample_size * pipeline.vae_config.downscale
            rows.append([Image.new("RGB", (side, side), "gray")] * len(prompts))
    atomic_write(png, lambda path: image_grid(rows, list(unets), gap=4).save(path))


def judge_run(run: Path, steps: int, count: int, pipeline: Pipeline, unets: dict[str, UNet | None]):
    """
    Prints the judge's scores of U-Nets, by name, on `count` captions; writes scores.csv and judged.png.

    Skips a U-Net that is None. The untrained student cannot draw yet: of more than eight captions it draws
    eight and gets no scores. Scores are kept with the run's steps; a longer run is judged again.
    """
    path, header = run / "scores.csv", ["", *shapes.SCORES, "steps", "captions"]
    rows = [list(row.values()) for row in read_csv(path)] if path.exists() else []
    if not rows or rows[-1][-2:] != [str(steps), str(count)]:
        captions, rows, pictures = shapes.judge_captions(count), [], {}
        for name in [name for name in unets if unets[name]]:
            drawn = captions[:8] if name == "student before" else captions
            images = draw(pipeline, unets[name], drawn, f"judging {name}")
            pictures[name] = [image.resize((128, 128), Image.Resampling.BICUBIC) for image in images[:8]]
            if drawn == captions:
                scores = shapes.scores(images, captions).values()
                rows.append([name, *[f"{score:.3f}" for score in scores], steps, count])
        grid = image_grid([*pictures.values()], [*pictures], gap=4)
        atomic_write(run / "judged.png", grid.save)
        write_csv(path, header, rows)
    print_table(header, rows)
