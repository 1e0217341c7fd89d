"""
Makes answers/distill.safetensors: the losses that diffusers' networks, with hooks, give for the cases below.

    python tests/oracle_distill.py        run by hand; the file was made with diffusers 0.42 and torch 2.13

Which module of the teacher each module of the student learns from is written out once more, from the paper.
"""

import argparse

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import common
from common import SDXL, draw, fill, inputs

ANSWERS = common.ANSWERS.with_name("distill.safetensors")
TEACHER = SDXL | {"block_out_channels": [16, 32, 48], "attention_head_dim": [1, 2, 3],
                  "transformer_layers_per_block": [1, 2, 10]}
STUDENTS = {
    "700m": TEACHER | {"layers_per_block": 1, "transformer_layers_per_block": [1, 2, 5],
                       "mid_block_type": None},
    "1b": TEACHER | {"layers_per_block": 1, "transformer_layers_per_block": [1, 2, 6]},
}
CASES = [  # student, features, teacher's blocks
    *[("700m", features, "bottom") for features in (
        "SA", "CA", "Res", "FFN", "LF", "SA@UP-1", "SA,LF@DW-1,LF@UP-3", "SA,Res@DW-1,Res@UP-3", "SA,LF",
        "SA,Res", "SA,CA,Res,FFN,LF")],
    ("700m", "SA", "interleave"), ("700m", "SA", "up"),
    *[("1b", "SA,CA,Res,FFN,LF", blocks) for blocks in ("bottom", "interleave", "up")],
]
LATENTS, NOISE = draw("latents", 3, 4, 8, 12), draw("noise", 3, 4, 8, 12)
CONDITIONS = {name: value for name, value in inputs(TEACHER, "batch").items() if name != "sample"}

# Modules of the student and of its teacher, which has a pair more in each stage.
RESIDUAL = {f"{path}.resnets.{i}": f"{path}.resnets.{j}" for path, i, j in (
    ("down_blocks.0", 0, 0), ("down_blocks.1", 0, 0), ("down_blocks.2", 0, 0),
    ("mid_block", 0, 0), ("mid_block", 1, 1), ("up_blocks.0", 0, 0), ("up_blocks.0", 1, 2),
    ("up_blocks.1", 0, 0), ("up_blocks.1", 1, 2), ("up_blocks.2", 0, 0), ("up_blocks.2", 1, 2))}
TRANSFORMERS = {f"{path}.attentions.{i}": f"{path}.attentions.{j}" for path, i, j in (
    ("down_blocks.1", 0, 0), ("down_blocks.2", 0, 0), ("mid_block", 0, 0),
    ("up_blocks.0", 0, 0), ("up_blocks.0", 1, 2), ("up_blocks.1", 0, 0), ("up_blocks.1", 1, 2))}
BLOCKS = {("700m", "bottom"): [0, 1, 2, 3, 4], ("1b", "bottom"): [0, 1, 2, 3, 4, 5],
          ("700m", "interleave"): [0, 2, 4, 6, 8], ("1b", "interleave"): [0, 2, 4, 6, 8, 9],
          ("700m", "up"): [5, 6, 7, 8, 9], ("1b", "up"): [4, 5, 6, 7, 8, 9]}
STAGES = {"DW-1": "down_blocks.0", "DW-2": "down_blocks.1", "DW-3": "down_blocks.2", "Mid": "mid_block",
          "UP-1": "up_blocks.0", "UP-2": "up_blocks.1", "UP-3": "up_blocks.2"}
LAYERS = {"SA": "attn1", "CA": "attn2", "FFN": "ff"}


def weaken(student: nn.Module) -> nn.Module:
    """As filled, it has the teacher's weights wherever names and shapes agree."""
    with torch.no_grad():
        for parameter in student.parameters():
            parameter *= 0.9
    return student


def pairs(student: str, features: str, blocks: str) -> list[tuple[str, str]]:
    """Modules, of the student and of the teacher, that a case compares."""
    found = []
    for term in features.split(","):
        kind, _, stage = term.partition("@")
        places = [STAGES[stage]] if stage else [
            place for place in STAGES.values() if student == "1b" or place != "mid_block"]
        for place in places:
            if kind == "LF":
                found.append((place, place))
            elif kind == "Res":
                found += [(ours, theirs) for ours, theirs in RESIDUAL.items() if ours.startswith(place)]
            else:
                for ours, theirs in TRANSFORMERS.items():
                    lowest = place in ("down_blocks.2", "mid_block", "up_blocks.0")
                    matched = enumerate(BLOCKS[student, blocks] if lowest else [0, 1])
                    found += [(f"{ours}.transformer_blocks.{i}.{LAYERS[kind]}",
                               f"{theirs}.transformer_blocks.{j}.{LAYERS[kind]}")
                              for i, j in matched if ours.startswith(place)]
    return found


@torch.no_grad()
def outputs(unet, noisy: Tensor) -> dict[str, Tensor]:
    """What every module puts out; the prediction has the name ""."""
    found = {}

    def keep(name: str):
        def hook(module, args, output):
            found[name] = output[0] if isinstance(output, tuple) else output
        return hook

    handles = [module.register_forward_hook(keep(name)) for name, module in unet.named_modules() if name]
    found[""] = unet(noisy, CONDITIONS["timestep"], CONDITIONS["context"], added_cond_kwargs={
        "text_embeds": CONDITIONS["pooled"], "time_ids": CONDITIONS["time_ids"]}).sample
    for handle in handles:
        handle.remove()
    return found


def distance(a: Tensor, b: Tensor) -> Tensor:
    return (a.double() - b.double()).square().mean()


def answers() -> dict[str, Tensor]:
    """task, outKD and featKD (3,) of each case."""
    from diffusers import DDPMScheduler, UNet2DConditionModel  # here, as the tests read the cases without it
    schedule = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    noisy = schedule.add_noise(LATENTS, NOISE, CONDITIONS["timestep"])
    teacher = outputs(fill(UNet2DConditionModel.from_config(TEACHER)), noisy)
    found = {}
    for name, config in STUDENTS.items():
        student = outputs(weaken(fill(UNet2DConditionModel.from_config(config))), noisy)
        for case in CASES:
            if case[0] == name:
                features = [distance(student[ours], teacher[theirs]) for ours, theirs in pairs(*case)]
                found[" ".join(case)] = torch.stack(
                    [distance(student[""], NOISE), distance(student[""], teacher[""]), sum(features)])
    return found


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()
    save_file(answers(), ANSWERS)
