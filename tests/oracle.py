"""
Makes answers/: what diffusers computes where the tests ask our networks, losses and samplers.

    python tests/oracle.py        run by hand; the files were made with diffusers 0.42 and torch 2.13

None of it uses our networks: both sides fill theirs with numbers made from the tensors' names.
"""

import sys
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))

from common import (  # noqa: E402
    ANSWERS, CASES, PICTURES, SDXL, SIZES, UNETS, VAES, Case, digest, draw, fill, inputs, pictures)

try:
    import diffusers
except ImportError:  # the tests read the cases without it
    diffusers = None


# Networks: diffusers.safetensors
FULL = SDXL | {  # the official configurations
    "sample_size": 128, "block_out_channels": [320, 640, 1280], "transformer_layers_per_block": [1, 2, 10],
    "attention_head_dim": [5, 10, 20], "norm_num_groups": 32, "cross_attention_dim": 2048,
    "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816}
SURGERIES = {"sdxl": {}, "1b": {"layers_per_block": 1, "transformer_layers_per_block": [1, 2, 6]},
             "700m": {"layers_per_block": 1, "transformer_layers_per_block": [1, 2, 5],
                      "mid_block_type": None}}
FULL_VAE = VAES["vae"] | {"block_out_channels": [128, 256, 512, 512], "norm_num_groups": 32}


def unet(config: dict) -> nn.Module:
    return fill(diffusers.UNet2DConditionModel.from_config(config))


def predict(unet: nn.Module, sample: Tensor, timestep: Tensor, context: Tensor, **added) -> Tensor:
    """The prediction of diffusers' U-Net for inputs with our names."""
    conditions = {"text_embeds": added["pooled"], "time_ids": added["time_ids"]} if added else None
    return unet(sample, timestep, context, added_cond_kwargs=conditions).sample


@torch.no_grad()
def network_answers() -> dict[str, Tensor]:
    """Outputs of networks of small configurations."""
    answers = {}
    for name, config in UNETS.items():
        theirs = unet(config)
        answers |= {f"{name} {size}": predict(theirs, **inputs(config, size)) for size in SIZES}
    vae = fill(diffusers.AutoencoderKL.from_config(VAES["vae"]))
    for size in PICTURES:
        image, latent = pictures(size)
        found = vae.encode(image).latent_dist
        answers |= {f"vae {size} mean": found.mean, f"vae {size} logvar": found.logvar,
                    f"vae {size} image": vae.decode(latent).sample}
    return answers


def official_digests() -> dict[str, str]:
    with torch.device("meta"):
        networks = {name: diffusers.UNet2DConditionModel.from_config(FULL | surgery)
                    for name, surgery in SURGERIES.items()}
        networks["vae"] = diffusers.AutoencoderKL.from_config(FULL_VAE)
    return {name: digest(network) for name, network in networks.items()}


# Losses: distill.safetensors, and their gradients: gradients.safetensors
# Which module of the teacher each module of the student learns from is written out once more, from the paper.
TEACHER = SDXL | {"block_out_channels": [16, 32, 48], "attention_head_dim": [1, 2, 3],
                  "transformer_layers_per_block": [1, 2, 10]}
STUDENTS = {name: TEACHER | SURGERIES[name] for name in ("700m", "1b")}
LOSSES = [  # student, features, teacher's blocks
    *[("700m", features, "bottom") for features in (
        "SA", "CA", "Res", "FFN", "LF", "SA@UP-1", "SA,LF@DW-1,LF@UP-3", "SA,Res@DW-1,Res@UP-3", "SA,LF",
        "SA,Res", "SA,CA,Res,FFN,LF")], ("700m", "SA", "interleave"), ("700m", "SA", "up"),
    *[("1b", "SA,CA,Res,FFN,LF", blocks) for blocks in ("bottom", "interleave", "up")]]
GRADIENTS = ("700m", "SA,LF@DW-1,LF@UP-3", "bottom")  # of the paper's best row
LATENTS, NOISE = draw("latents", 3, 4, 8, 12), draw("noise", 3, 4, 8, 12)
CONDITIONS = {name: value for name, value in inputs(TEACHER, "batch").items() if name != "sample"}
STAGES = {"DW-1": "down_blocks.0", "DW-2": "down_blocks.1", "DW-3": "down_blocks.2", "Mid": "mid_block",
          "UP-1": "up_blocks.0", "UP-2": "up_blocks.1", "UP-3": "up_blocks.2"}
KEPT = {"down": [(0, 0)], "mid": [(0, 0)], "up": [(0, 0), (1, 2)]}  # pairs of the student, of its teacher
BLOCKS = {("700m", "bottom"): [0, 1, 2, 3, 4], ("1b", "bottom"): [0, 1, 2, 3, 4, 5],
          ("700m", "interleave"): [0, 2, 4, 6, 8], ("1b", "interleave"): [0, 2, 4, 6, 8, 9],
          ("700m", "up"): [5, 6, 7, 8, 9], ("1b", "up"): [4, 5, 6, 7, 8, 9]}
LAYERS = {"SA": "attn1", "CA": "attn2", "FFN": "ff"}


@torch.no_grad()
def weaken(student: nn.Module) -> nn.Module:
    """As filled, it has the teacher's weights wherever names and shapes agree."""
    for parameter in student.parameters():
        parameter *= 0.9
    return student


def pairs(student: str, features: str, blocks: str) -> list[tuple[str, str]]:
    """Modules, of the student and of the teacher, that a case compares."""
    found = []
    for term in features.split(","):
        kind, _, stage = term.partition("@")
        for place in [STAGES[stage]] if stage else STAGES.values():
            kept = KEPT[place.split("_")[0]] + [(1, 1)] * (place == "mid_block" and kind == "Res")
            if kind == "LF":
                found.append((place, place))
            elif kind == "Res":
                found += [(f"{place}.resnets.{i}", f"{place}.resnets.{j}") for i, j in kept]
            elif place not in ("down_blocks.0", "up_blocks.2"):
                lowest = place in ("down_blocks.2", "mid_block", "up_blocks.0")
                sources = enumerate(BLOCKS[student, blocks] if lowest else [0, 1])
                found += [(f"{place}.attentions.{i}.transformer_blocks.{block}.{LAYERS[kind]}",
                           f"{place}.attentions.{j}.transformer_blocks.{source}.{LAYERS[kind]}")
                          for block, source in sources for i, j in kept]
    return [pair for pair in found if student == "1b" or "mid_block" not in pair[0]]  # 700M has no Mid


def outputs(unet: nn.Module) -> dict[str, Tensor]:
    """What every module puts out; the prediction has the name ""."""
    schedule = diffusers.DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    found = {}

    def keep(name: str, module, args, output):
        found[name] = output if isinstance(output, Tensor) else output[0]

    for name, module in unet.named_modules():
        module.register_forward_hook(partial(keep, name))
    predict(unet, schedule.add_noise(LATENTS, NOISE, CONDITIONS["timestep"]), **CONDITIONS)
    return found


def terms(student: dict[str, Tensor], teacher: dict[str, Tensor], case: tuple[str, str, str]) -> list[Tensor]:
    """task, outKD and featKD of a case, from the outputs of all modules."""
    features = [F.mse_loss(student[a].double(), teacher[b].double()) for a, b in pairs(*case)]
    task, out_kd = (F.mse_loss(student[""].double(), x.double()) for x in (NOISE, teacher[""]))
    return [task, out_kd, sum(features)]


@torch.no_grad()
def loss_answers() -> dict[str, Tensor]:
    """task, outKD and featKD (3,) of each case."""
    teacher = outputs(unet(TEACHER))
    students = {name: outputs(weaken(unet(config))) for name, config in STUDENTS.items()}
    return {" ".join(case): torch.stack(terms(students[case[0]], teacher, case)) for case in LOSSES}


def along(name: str, gradient: Tensor) -> Tensor:
    """A parameter's gradient in a direction that its name makes, a float64 scalar."""
    return (gradient.double() * draw(f"direction {name}", *gradient.shape)).sum()


def gradient_answers() -> dict[str, Tensor]:
    """Of task, outKD and featKD, the gradient `along` each parameter of a student, by their sorted names."""
    student = weaken(unet(STUDENTS[GRADIENTS[0]]))
    with torch.no_grad():
        teacher = outputs(unet(TEACHER))
    parameters, answers = dict(sorted(student.named_parameters())), {}
    for name, loss in zip(("task", "outKD", "featKD"), terms(outputs(student), teacher, GRADIENTS)):
        gradients = torch.autograd.grad(loss, parameters.values(), retain_graph=True, materialize_grads=True)
        answers[name] = torch.stack([along(*pair) for pair in zip(parameters, gradients)])
    return answers


# Pictures: sample.safetensors
def scheduler(sampler: str, config: dict):
    names = {"euler": "EulerDiscrete", "ddim": "DDIM", "dpm": "DPMSolverMultistep"}
    return getattr(diffusers, f"{names[sampler]}Scheduler").from_config(config)


def draw_pictures(case: Case, folder: Path) -> Tensor:
    """The pictures (B, H, W, 3), uint8, that diffusers draws for a case, from the model in `folder`."""
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder)
    pipeline.scheduler = scheduler(case.sampler, pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(
        list(case.PROMPTS),
        negative_prompt=None if case.negative is None else [case.negative] * len(case.PROMPTS),
        num_inference_steps=case.steps, guidance_scale=case.guidance, height=case.height, width=case.width,
        generator=[torch.Generator().manual_seed(seed) for seed in case.SEEDS]).images
    return torch.from_numpy(np.stack(images))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as models:
        drawn = {name: draw_pictures(case, case.bundle(Path(models, name))) for name, case in CASES.items()}
    for name, answers in (("diffusers", network_answers()), ("distill", loss_answers()),
                          ("gradients", gradient_answers()), ("sample", drawn)):
        metadata = official_digests() if name == "diffusers" else None
        answers = {key: answer.contiguous() for key, answer in answers.items()}
        save_file(answers, ANSWERS.with_name(f"{name}.safetensors"), metadata)
