"""
Makes answers/sample.safetensors: bundles.py's cases as the pipelines of diffusers draw them.

    python tests/oracle_sample.py        run by hand; the file was made with diffusers 0.42 and torch 2.13
"""

import argparse
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import torch
from diffusers import (
    DDIMScheduler, DiffusionPipeline, DPMSolverMultistepScheduler, EulerDiscreteScheduler)
from safetensors.torch import save_file
from torch import Tensor

import common
from bundles import CASES, Case

SCHEDULERS = {"euler": EulerDiscreteScheduler, "ddim": DDIMScheduler, "dpm": DPMSolverMultistepScheduler}
ANSWERS = common.ANSWERS.with_name("sample.safetensors")


def draw_pictures(case: Case, folder: Path) -> Tensor:
    """The pictures (B, H, W, 3), uint8, that diffusers draws for a case, from the model in `folder`."""
    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.scheduler = SCHEDULERS[case.sampler].from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(
        list(case.PROMPTS),
        negative_prompt=None if case.negative is None else [case.negative] * len(case.PROMPTS),
        num_inference_steps=case.steps, guidance_scale=case.guidance, height=case.height, width=case.width,
        generator=[torch.Generator().manual_seed(seed) for seed in case.SEEDS]).images
    return torch.from_numpy(np.stack(images))


def main():
    answers = {}
    for name, case in CASES.items():
        with tempfile.TemporaryDirectory() as folder:
            answers[name] = draw_pictures(case, case.bundle(Path(folder)))
    save_file(answers, ANSWERS)


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()
    main()
