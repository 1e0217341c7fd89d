"""
Teacher to student: KOALA's knowledge distillation with self-attention features (sections 4.2, 5.1 and A.1).

    python distill.py --student 700m                                   # the embedded toy: minutes on a laptop
    python distill.py --student 700m --teacher sdxl --data laion/ --vae madebyollin/sdxl-vae-fp16-fix
    torchrun --nproc-per-node 4 distill.py ...                         # the same on four GPUs

A run is a folder: log.csv, previews/, checkpoints, unet/ (the newest student, for sample.py --unet and
diffusers), and in the end a complete model. Rerun the same command to resume. Everything random about a
training sample comes from the seed and its position, so a run sees the same samples on one process or many,
stopped or not.
"""

import argparse
import contextlib
import copy
import math
import os
import signal
import time
from collections import Counter
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Iterator, NamedTuple, Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from tqdm import tqdm

import model
from sample import SDXL_SCHEDULER, NoiseSchedule, Pipeline, images_at_once, load_pipeline
from support import costs, plan
from support.cache import Cache
from support.checkpoint import (
    Log, StopSignal, check_agreement, complete_model, fingerprint, gather_dicts, lock_run_dir, process_ranks,
    resume, save_checkpoint, start_reader)
from support.cli import (
    PRECISIONS, PRESETS, ArgumentParser, model_name, nonempty, number, path, preset, resolve_device,
    resolve_dtype, run)
from support.data import (
    CaptionedImages, Samples, Shapes, format_counts, load_samples, load_source, micro_batches)
from support.files import atomic_write, local_folder
from support.plots import loss_curves
from support.text import CLIPConfig
from support.vae import VAEConfig
from toy import judging

# ------------------------------------------------------------------------------------------------------------
# Which feature of the student learns from which of the teacher


def match_features(student: model.UNet, teacher: model.UNet, features: str,
                   sa_blocks: str = "bottom") -> dict[str, str]:
    """
    Which module of the teacher each module of the student learns from, by their paths (Table 3).

    The surgery leaves widths and resolutions as they are, so matched features have the same shape, and no
    projection is needed.

    `features` is as in "SA,LF@DW-1": types, at every stage or at one. A path changes twice: its pair by
    `model.teacher_path`, as the surgery has it, and its transformer block by `teacher_block` (Table 3c).
    Raises ValueError for types and stages that the student does not have.
    """
    stages, matched = model.stages(student.config), {}
    for kind, at in parse_features(features):
        paths = []
        for stage in stages:
            if at in (None, stage):
                paths += model.feature_paths(student, kind, stage)
        if not paths:
            raise ValueError(f"--features: the student has no {kind} at {at or 'any stage'}; its stages are "
                             f"{', '.join(stages)}")
        for path in paths:
            source = model.teacher_path(path, student.config, teacher.config)
            if ".transformer_blocks." in source:
                blocks, index, layer = source.rsplit(".", 2)     # ....transformer_blocks, 3, attn1
                depth = len(student.get_submodule(path.rsplit(".", 2)[0]))
                index = teacher_block(int(index), depth, len(teacher.get_submodule(blocks)), sa_blocks)
                source = f"{blocks}.{index}.{layer}"
            matched[path] = source
    return matched


def teacher_block(block: int, depth: int, teacher_depth: int, sa_blocks: str) -> int:
    """
    Which transformer block of the teacher the student's learns from (Table 3c), both counted from 0.

    bottom: the first ones; up: the last ones; interleave: 1, 3, 5, 7, 9, 10 of ten, counted from 1. Where the
    depths are equal the blocks match one to one.
    """
    if sa_blocks == "up":
        return block + teacher_depth - depth
    if sa_blocks == "interleave" and depth != teacher_depth:
        return min(2 * block, teacher_depth - 1)
    return block


def parse_features(text: str) -> list[tuple[str, str | None]]:
    """From "SA,LF@DW-1" [("SA", None), ("LF", "DW-1")]; None is every stage. Raises ValueError."""
    features = []
    for term in text.split(",") if text != "none" else []:
        kind, at, stage = term.strip().partition("@")
        if kind not in model.FEATURE_TYPES or at and not stage:
            raise ValueError(f"--features: {term!r} is not one of {', '.join(model.FEATURE_TYPES)}, "
                             f"with or without @STAGE")
        features.append((kind, stage or None))
    return features


# ------------------------------------------------------------------------------------------------------------
# The losses


def losses(prediction: Tensor, target: Tensor, teacher_prediction: Tensor | None = None,
           features: Sequence[Tensor] = (), teacher_features: Sequence[Tensor] = (),
           normalize: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """
    The three terms of the objective, float32 scalars; those without inputs are 0.

    equation (1)  task    || eps - eps_S ||^2            the noise that was added, or v; the student's prediction
    equation (2)  outKD   || eps_T - eps_S ||^2          the teacher's prediction, the student's
    equation (3)  featKD  sum_i || f_T^i - f_S^i ||^2    the features of the teacher, of the student

    Each is a mean of squared differences. Equation (3) has its sum inside the norm, but features of different
    shapes cannot be added; here it is outside, as in BK-SDM's code. Features of some modules are ten times
    larger than others and dominate the sum; `normalize` divides each term by its teacher's mean square.
    """
    task = F.mse_loss(prediction.float(), target.float())
    out_kd = feat_kd = torch.zeros_like(task)
    if teacher_prediction is not None:
        out_kd = F.mse_loss(prediction.float(), teacher_prediction.float())
    for student_feature, teacher_feature in zip(features, teacher_features, strict=True):
        difference = F.mse_loss(student_feature.float(), teacher_feature.float())
        feat_kd = feat_kd + (difference / teacher_feature.float().square().mean() if normalize else difference)
    return task, out_kd, feat_kd


# ------------------------------------------------------------------------------------------------------------
# A step: encode and noise a batch, run teacher and student


class Batch(NamedTuple):
    """What the U-Nets read, and what the student has to predict."""

    noisy: Tensor      # (B, 4, H, W) noisy latents
    timesteps: Tensor  # (B,)
    context: Tensor    # (B, L, D) text; where it is dropped, what guidance takes for no prompt
    pooled: Tensor     # (B, P) pooled text, likewise
    time_ids: Tensor   # (B, 6) original height and width, crop top and left, target height and width
    target: Tensor     # (B, 4, H, W) the noise, or v


@torch.no_grad()
def encode_batch(samples: list[dict], pipeline: Pipeline, cache: Cache | None = None) -> Batch:
    """Encodes and noises samples of `support.data.Samples`; a cache is given what is new to it."""
    device, vae, text = pipeline.device, pipeline.vae, pipeline.text
    new = [sample for sample in samples if "pixels" in sample]
    if new:
        pixels = torch.stack([sample["pixels"] for sample in new]).to(device, non_blocking=True) / 127.5 - 1
        captions = [sample["caption"] for sample in new]
        pixels = pixels.to(next(vae.parameters()).dtype)
        slices = pixels.split(images_at_once(pixels[0, 0].numel()))
        mean, logvar = (torch.cat(parts) for parts in zip(*(vae.encode(part) for part in slices)))
        context, pooled = text(captions)
        for i, sample in enumerate(new):
            std = (logvar[i] / 2).exp()
            sample |= {"mean": mean[i], "std": std, "context": context[i], "pooled": pooled[i]}
            if cache:
                cache.write(sample["index"], sample)
    mean, std, latent_noise, noise, context, pooled, time_ids = (
        torch.stack([sample[name].to(device, non_blocking=True) for sample in samples]).float()
        for name in ("mean", "std", "latent_noise", "noise", "context", "pooled", "time_ids"))
    latents = (mean + std * latent_noise) * vae.config.scaling_factor  # drawn from the VAE's distribution
    timesteps = torch.tensor([sample["timestep"] for sample in samples])
    keep = torch.tensor([not sample["dropped"] for sample in samples], device=device)
    absent = (context.new_zeros(1), pooled.new_zeros(1)) if pipeline.zero_negative else text([""])
    return Batch(noisy=pipeline.schedule.add_noise(latents, noise, timesteps), timesteps=timesteps.to(device),
                 context=torch.where(keep[:, None, None], context, absent[0].float()),
                 pooled=torch.where(keep[:, None], pooled, absent[1].float()), time_ids=time_ids,
                 target=pipeline.schedule.target(latents, noise, timesteps))


class Networks(NamedTuple):
    """Teacher and student, and the features of each that equation (3) compares."""

    teacher: model.UNet | None
    student: nn.Module                                           # a UNet, alone or in DistributedDataParallel
    teacher_features: model.Features
    student_features: model.Features


def hook_features(teacher: model.UNet | None, student: model.UNet, matched: dict[str, str],
                  out_kd: float = 1.0) -> Networks:
    """Hooks the matched modules of both networks; without outKD the teacher stops after its last feature."""
    return Networks(teacher, student, model.Features(teacher, list(matched.values()), stop=not out_kd),
                    model.Features(student, list(matched)))


@torch.no_grad()
def teacher_forward(networks: Networks, batch: Batch,
                    dtype: torch.dtype) -> tuple[Tensor | None, list[Tensor]]:
    """The teacher's prediction in its own dtype, or None if its features end the pass; and its features."""
    prediction, features = None, networks.teacher_features
    with features as captured:
        prediction = networks.teacher(
            batch.noisy.to(dtype), batch.timesteps, batch.context.to(dtype), batch.pooled.to(dtype),
            batch.time_ids)                                      # a half would round 1023 pixels to 1024
    return prediction, [captured[path] for path in features.paths]


def student_forward(networks: Networks, batch: Batch, dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
    """The student's prediction and its features; its float32 weights compute in `dtype`."""
    device, features = batch.noisy.device.type, networks.student_features
    with torch.autocast(device, dtype, enabled=dtype != torch.float32), features as captured:
        prediction = networks.student(*batch[:5])
    return prediction, [captured[path] for path in features.paths]


def objective(args: argparse.Namespace, batch: Batch, networks: Networks,
              dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The loss of a batch, a scalar, and task, outKD and featKD (3,) without gradient."""
    teacher_prediction, teacher_features = None, []
    if networks.teacher and (args.out_kd or networks.teacher_features.paths):
        teacher_prediction, teacher_features = teacher_forward(networks, batch, dtype)
    prediction, features = student_forward(networks, batch, dtype)
    task, out_kd, feat_kd = losses(
        prediction, batch.target, teacher_prediction, features, teacher_features, args.normalize_features)
    # Terms of weight 0 stay in the sum: DistributedDataParallel needs a gradient for every layer.
    loss = args.task * task + args.out_kd * out_kd + args.feat_kd * feat_kd
    return loss, torch.stack([task, out_kd, feat_kd]).detach()


def sample_loss(args: argparse.Namespace, samples: list[dict], pipeline: Pipeline, networks: Networks,
                cache: Cache | None = None) -> tuple[Tensor, Tensor]:
    """`objective` of samples as they come from the data: what a process computes at a time."""
    return objective(args, encode_batch(samples, pipeline, cache), networks, pipeline.dtype)


# ------------------------------------------------------------------------------------------------------------
# Training


def learning_rate(args: argparse.Namespace, step: int) -> float:
    """Constant, then falling linearly to 0 over the last share `--decay` of the steps."""
    return args.lr * min(1.0, (args.steps - step) / (args.decay * args.steps)) if args.decay else args.lr


def read_ahead(args: argparse.Namespace, samples: Samples, step: int, device: str) -> Iterator[list[dict]]:
    """
    The micro-batches of this process from a step on, read by `--workers` other processes.

    Raises RuntimeError in `next` if one of them has died.
    """
    rank, world, _ = process_ranks()
    positions = micro_batches(step, args.steps, args.batch, args.micro_batch, rank, world)
    loader = iter(DataLoader(samples, batch_sampler=positions, num_workers=args.workers, collate_fn=list,
                             pin_memory=device.startswith("cuda"), worker_init_fn=start_reader))
    if os.name != "nt":
        # PyTorch would raise an error wherever this signal comes; `next` finds a reader that died as well.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)

    def deliver() -> Iterator[list[dict]]:
        try:
            yield from loader
        except (ConnectionResetError, ConnectionRefusedError, EOFError) as error:
            raise RuntimeError("DataLoader worker died as it handed over samples") from error
    return deliver()


def skipped_by(samples: list[dict]) -> dict[str, str]:
    """Why pairs were skipped, by index (as text, for JSON). Raises ValueError if there was no other pair."""
    skipped = {}
    for sample in samples:
        if "error" in sample:
            raise ValueError(sample["error"])
        skipped |= {str(index): reason for index, reason in sample["skipped"].items()}
    return skipped


def accumulate_gradients(args: argparse.Namespace, pipeline: Pipeline, networks: Networks,
                         loader: Iterator[list[dict]], cache: Cache | None,
                         scaler: torch.amp.GradScaler) -> tuple[Tensor, dict[str, str]]:
    """
    Adds up the gradients of a step's micro-batches; processes average theirs in the last one.

    Returns task, outKD and featKD (3,), and why samples were skipped, by index.
    """
    _, world, _ = process_ranks()
    count = args.batch // (args.micro_batch * world)
    terms, skipped = torch.zeros(3, device=pipeline.device), {}
    for i in range(count):
        samples = next(loader)
        skipped |= skipped_by(samples)
        with networks.student.no_sync() if world > 1 and i < count - 1 else contextlib.nullcontext():
            loss, part = sample_loss(args, samples, pipeline, networks, cache)
            scaler.scale(loss / count).backward()
        terms += part / count
    return terms, skipped


def read_results(terms: Tensor, norm: Tensor, skipped: int,
                 received: int) -> tuple[list[float], float, int, int]:
    """
    The three terms, the gradients' norm, the number of samples skipped and the signal received, or 0, of all
    processes as numbers. This is the only place where a step waits for the device.
    """
    counts = [skipped, received == signal.SIGINT, received == signal.SIGTERM]
    sums, world = torch.cat([terms, torch.tensor(counts, device=terms.device)]), 1
    if dist.is_initialized():
        dist.all_reduce(sums)
        world = dist.get_world_size()
    *terms, skipped, interrupts, terminations, norm = torch.cat([sums, norm[None]]).tolist()
    number = signal.SIGTERM if terminations else signal.SIGINT if interrupts else 0
    return [term / world for term in terms], norm, int(skipped), number


@torch.no_grad()
def update_average(average: model.UNet, student: model.UNet, decay: float, updates: int):
    """Moves an average towards the student: exponential, and faster at first, as diffusers' EMAModel is."""
    decay = min(decay, (1 + updates) / (10 + updates))
    torch._foreach_lerp_([*average.parameters()], [*student.parameters()], 1 - decay)


FIXED = range(2**30, 2**30 + 16)  # positions of samples beyond the end of any run


def fixed_batches(args: argparse.Namespace, pipeline: Pipeline, samples: Samples) -> list[Batch]:
    """
    Samples that are the same in all runs on the same data: images, crops, timesteps and noise.

    No run trains on this noise, nor on these pictures of shapes; images of a folder are trained on too.
    """
    samples = copy.copy(samples)
    samples.seed = 0
    fixed = [samples[p] for p in FIXED]
    skipped_by(fixed)
    size = args.micro_batch
    return [encode_batch(fixed[i:i + size], pipeline) for i in range(0, len(fixed), size)]


@torch.no_grad()
def fixed_out_kd(pipeline: Pipeline, teacher: model.UNet | None, student: model.UNet,
                 batches: list[Batch]) -> float | str:
    """outKD (equation 2) of `fixed_batches`, which compares steps and runs; "" if there are none."""
    networks, total = hook_features(teacher, student, {}), 0.0
    for batch in batches:
        teacher_prediction, _ = teacher_forward(networks, batch, pipeline.dtype)
        prediction, _ = student_forward(networks, batch, pipeline.dtype)
        total += F.mse_loss(prediction.float(), teacher_prediction.float()).item() * len(batch.noisy)
    return total / len(FIXED) if batches else ""


def data_report(source: Shapes | CaptionedImages, skipped: dict[str, str], seen: int) -> str:
    """How many pairs the first pass over the data used, and why others were skipped."""
    reasons = format_counts(Counter(skipped.values()) + source.skipped)
    return f"first pass over the data: {min(len(source) - len(skipped), seen)} pairs used; skipped: {reasons}"


def load_unets(unets: dict[str, model.UNet], folder: Path):
    """Reads the U-Nets from the folders of these names."""
    for name, unet in unets.items():
        unet.load_state_dict(model.load_unet(folder / name).state_dict())


def save_unets(unets: dict[str, model.UNet], folder: Path):
    """Writes the U-Nets to folders of these names."""
    for name, unet in unets.items():
        model.save_unet(unet, folder / name)


def train(args: argparse.Namespace, pipeline: Pipeline, networks: Networks, samples: Samples, identity: dict,
          stop: StopSignal, least_seconds: float = 0.0) -> int:
    """
    Trains the student for what is left of a run. Returns 0, or the number of the signal that stopped it.

    A step ends with `optimizer.zero_grad()`; log, checkpoint and preview follow. `identity` is what a resumed
    run must have in common with its checkpoint; `least_seconds` is what a step takes at the peak of the GPUs,
    or 0 if that is not known. Raises FloatingPointError after 20 steps in a row whose gradients are not finite;
    other errors are of data and files.
    """
    rank, world, _ = process_ranks()
    device, teacher, student = pipeline.device, networks.teacher, networks.student
    unets = {"unet": student}                                    # what is saved, by folder
    if args.ema:
        unets["unet_ema"] = copy.deepcopy(student)
    optimizer = torch.optim.AdamW(student.parameters(), lr=args.lr, weight_decay=0.01, fused=True)
    scaler = torch.amp.GradScaler(device.split(":")[0], enabled=pipeline.dtype == torch.float16)
    state = {"step": 0, "updates": 0, "skipped_steps": 0, "skipped_in_a_row": 0, "skipped_samples": {},
             "scaler": scaler.state_dict()}
    state |= resume(args.out, identity, student, optimizer, partial(load_unets, unets))
    scaler.load_state_dict(state["scaler"])
    if state["step"] and rank == 0:
        print(f"resumed at step {state['step']}")
    check_agreement(f"step {state['step']}, data {samples.source.fingerprint}, --micro-batch {args.micro_batch}")
    if state["step"] > args.steps:
        raise ValueError(
            f"{args.out} is at step {state['step']}; give at least as many --steps, or another --out")
    if state["step"] == args.steps:
        return 0
    if args.compile:
        student.compile()
    if world > 1:
        networks = networks._replace(student=DistributedDataParallel(student, gradient_as_bucket_view=True))
    loader = read_ahead(args, samples, state["step"], device)
    fixed = fixed_batches(args, pipeline, samples) if teacher and rank == 0 and args.preview_every else []
    first_pass = min(len(samples.source), args.steps * args.batch)  # images, all or all that the run needs
    log = Log(args.out / "log.csv", state["step"]) if rank == 0 else None
    bar = tqdm(range(state["step"], args.steps), args.out.name, args.steps, initial=state["step"],
               unit="step", disable=rank > 0)

    for step in bar:
        start, lr = time.perf_counter(), learning_rate(args, step)
        optimizer.param_groups[0]["lr"] = lr
        terms, skipped = accumulate_gradients(args, pipeline, networks, loader, samples.cache, scaler)
        scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(student.parameters(), args.clip)
        terms, norm, skips, signal_number = read_results(terms, norm, len(skipped), stop.received)
        finite = math.isfinite(norm)                             # the same on all processes, as gradients are
        if finite:
            scaler.step(optimizer)
            if args.ema:
                update_average(unets["unet_ema"], student, args.ema, state["updates"])
        scaler.update()
        optimizer.zero_grad()

        state["step"] = done = step + 1
        state["updates"] += finite
        state["skipped_steps"] += not finite
        state["skipped_in_a_row"] = 0 if finite else state["skipped_in_a_row"] + 1
        if skips:
            state["skipped_samples"] |= gather_dicts(skipped)
        preview = rank == 0 and args.preview_every and (done % args.preview_every == 0 or done == args.steps)
        if rank == 0:
            seconds = time.perf_counter() - start
            task, out_kd, feat_kd = terms
            metrics = {"task": task, "outKD": out_kd, "featKD": feat_kd, "images_per_s": args.batch / seconds}
            if least_seconds:
                metrics["mfu"] = least_seconds / seconds
            bar.set_postfix({name: f"{value:.3g}" for name, value in metrics.items()}, refresh=False)
            log.write(step=done, **metrics, lr=lr, norm=norm,
                      total=args.task * task + args.out_kd * out_kd + args.feat_kd * feat_kd,
                      fixed_outKD=fixed_out_kd(pipeline, teacher, student, fixed) if preview else "",
                      seconds=seconds, images=done * args.batch, skipped_samples=len(state["skipped_samples"]),
                      skipped_steps=state["skipped_steps"])
        if state["skipped_in_a_row"] >= 20:
            raise FloatingPointError(
                f"20 steps in a row had gradients that are not finite (task, outKD and featKD: "
                f"{', '.join(f'{term:.3g}' for term in terms)}); start another run with --init {args.out}/unet "
                f"and --precision bf16 or a lower --lr")
        if rank == 0 and (done % args.save_every == 0 or done == args.steps or signal_number):
            state["scaler"] = scaler.state_dict()
            save_checkpoint(args.out, identity, state, student, optimizer, partial(save_unets, unets))
            bar.write(f"saved {args.out} at step {done}")
        if preview:
            judging.preview(pipeline, teacher, student, samples.source.prompts(8),
                            args.out / "previews" / f"step-{done:07d}.png")
        if rank == 0 and step * args.batch < first_pass <= done * args.batch:
            bar.write(data_report(samples.source, state["skipped_samples"], done * args.batch))
        if signal_number:
            return signal_number
    return 0


# ------------------------------------------------------------------------------------------------------------
# The program

KOALA_FEATURES = "SA,LF@DW-1,LF@UP-3"  # SA at every stage that has it, and LF at the others (Table 3d)
RECIPES = {  # the paper's (sections 5.1 and A.1), BK-SDM's for its students, and a quick one for the toy
    "paper": {"steps": 100_000, "batch": 128, "micro_batch": 8, "lr": 1e-5, "decay": 0.0,
              "features": KOALA_FEATURES, "normalize_features": False, "save_every": 500, "preview_every": 1000},
    "bk": {"steps": 50_000, "batch": 256, "micro_batch": 8, "lr": 5e-5, "decay": 0.0,
           "features": "SA", "normalize_features": False, "save_every": 500, "preview_every": 1000},
    "toy": {"steps": 900, "batch": 8, "micro_batch": 8, "lr": 2e-3, "decay": 0.5,
            "features": KOALA_FEATURES, "normalize_features": True, "save_every": 100, "preview_every": 300},
}
# What changes the mathematics of a run; a resumed run must have it in common with its checkpoint.
IDENTITY = ("student", "features", "sa_blocks", "normalize_features", "caption", "flip", "task", "out_kd",
            "feat_kd", "batch", "lr", "decay", "clip", "dropout", "ema", "seed")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = ArgumentParser(__doc__)

    def add(flag: str, meaning: str, **options):
        name = flag[2:].replace("-", "_")
        if name in RECIPES["paper"]:
            meaning += f" [{', '.join(f'{recipe} {RECIPES[recipe][name]}' for recipe in RECIPES)}]"
        parser.add_argument(flag, help=meaning, **{"metavar": None if "choices" in options else "N"} | options)

    add("--student", "KOALA's 1b, 700m of SDXL; BK-SDM's base, small, tiny of Stable Diffusion",
        default="700m", choices=list(model.SURGERIES), metavar="NAME")
    add("--teacher", "a name such as toy or sdxl, a hub id or a folder; none: the task loss alone",
        default="toy", type=partial(model_name, words=("none",)), metavar="MODEL")
    add("--vae", "another VAE, such as the paper's, madebyollin/sdxl-vae-fp16-fix", type=model_name,
        metavar="MODEL")
    add("--init", "first weights: teacher, random, or a model, as --teacher", default="teacher",
        type=partial(model_name, words=("teacher", "random")), metavar="MODEL")
    add("--features", "of SA, CA, Res, FFN, LF, everywhere or @STAGE (LF alone is BK-SDM); or none",
        metavar="LIST")
    add("--sa-blocks", "which blocks of a deeper teacher: bottom, interleave or up (Table 3c)",
        choices=["bottom", "interleave", "up"], default="bottom", metavar="NAME")
    add("--data", "shapes; or a folder: images with .txt files or metadata.jsonl, .tar shards", type=nonempty,
        default="shapes", metavar="FOLDER")
    add("--caption", "one caption for all images, as in DreamBooth", type=nonempty, metavar="TEXT")
    add("--cache", "keep latents and text there; fixes each image's crop", type=path, metavar="FOLDER")
    parser.add_argument("--flip", action="store_true", help="mirror half of the images")
    add("--task", "weight of the task loss (equation 1)", type=number(float, 0, 1e9), default=1.0)
    add("--out-kd", "weight of outKD (equation 2)", type=number(float, 0, 1e9), default=1.0)
    add("--feat-kd", "weight of featKD (equation 3)", type=number(float, 0, 1e9), default=1.0)
    parser.add_argument("--normalize-features", action=argparse.BooleanOptionalAction,
                        help="divide each feature's loss by its teacher's mean square [for the toy]")
    add("--steps", "optimizer steps", type=number(int, 1, 10**8 - 1))
    add("--batch", "images in a step, over all processes", type=number(int, 1, 10**6))
    add("--micro-batch", "per-GPU batch size, at most; the rest is gradient accumulation",
        type=number(int, 1, 10**6))
    add("--lr", "learning rate of AdamW", type=number(float, 1e-12, 1))
    add("--decay", "last share of the steps, over which that rate falls to 0", type=number(float, 0, 1))
    add("--clip", "largest norm of the gradients", type=number(float, 1e-9, 1e9), default=1.0)
    add("--dropout", "share of captions replaced by none", type=number(float, 0, 1), default=0.1)
    add("--size", "height and width of training images; 0: the teacher's own", type=number(int, 0, 4096, 8),
        default=0)
    add("--workers", "processes that read data [half the cores, at most 8]", type=number(int, 0, 1000),
        default=min(8, (os.cpu_count() or 2) // 2))
    add("--save-every", "steps between checkpoints", type=number(int, 1, 10**9))
    add("--preview-every", "steps between previews, 0 for none", type=number(int, 0, 10**9))
    add("--judge", "captions that the toy is judged on at the end, 0 for none", type=number(int, 0, 10**5),
        default=64)
    add("--seed", "of data order and noise", type=number(int, 0, 2**31 - 1), default=0)
    add("--precision", "fp32, fp16 or bf16 [bf16 on a GPU, fp32 elsewhere]", choices=list(PRECISIONS),
        metavar="NAME")
    add("--checkpointing", "recompute none, selective (cheap layers) or full (all) [as memory asks for]",
        choices=list(model.CHECKPOINTING), metavar="NAME")
    add("--ema", "decay of an average of the weights, kept in unet_ema/, such as 0.9999 [no average]",
        type=number(float, 0, 1))
    parser.add_argument("--compile", action="store_true", help="torch.compile teacher and student")
    add("--device", "[a GPU if there is one]", type=nonempty, metavar="DEVICE")
    add("--out", "[runs/TEACHER-STUDENT]", type=path, metavar="FOLDER")
    parser.add_argument("--dry-run", action="store_true",
                        help="print settings, matched features and costs; reads no data and no weights")
    args = parser.parse_args(argv)
    fill_in(args)
    check_args(args, parser)
    return args


def fill_in(args: argparse.Namespace):
    """Settings that follow from others: what the recipe has, what needs a teacher, where the run is."""
    recipe = "paper" if args.student in model.CONFIGS else "bk"
    if preset(args.teacher) == PRESETS["toy"]:
        recipe = "toy"
    for name, value in RECIPES[recipe].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    _, world, _ = process_ranks()
    args.micro_batch = min(args.micro_batch, max(1, args.batch // world))
    if args.teacher == "none" or not args.feat_kd:
        args.features = "none"
    if args.out is None:
        name = f"{Path(args.teacher).name}-{args.student}"
        if args.teacher == "none" and args.init != "random":
            name = Path(args.init).name
        args.out = Path("runs", name)


def check_args(args: argparse.Namespace, parser: ArgumentParser):
    """Ends the program, with one line, if settings contradict each other."""
    _, world, _ = process_ranks()
    if args.batch % (world * args.micro_batch):
        parser.error(f"--batch {args.batch} is not a multiple of {world} x --micro-batch {args.micro_batch}")
    try:
        parse_features(args.features)
    except ValueError as error:
        parser.error(str(error))
    if args.teacher == "none" and args.init == "teacher":
        parser.error("--teacher none has no weights to start from; give --init FOLDER or --init random")
    if not (args.task or args.teacher != "none" and (args.out_kd or args.features != "none")):
        parser.error("nothing to learn: give a weight to --task, or to --out-kd or --feat-kd and a --teacher")
    if args.caption and args.data == "shapes":
        parser.error("--caption is for a folder of images; shapes have their own")


def model_source(args: argparse.Namespace) -> str:
    """Where text encoders and VAE come from: the teacher; without one --init, or the toy if that has none."""
    if args.teacher != "none":
        return args.teacher
    only_unet = Path(args.init).is_dir() and not Path(args.init, "model_index.json").is_file()
    return "toy" if args.init == "random" or only_unet else args.init


def new_student(args: argparse.Namespace, config: model.UNetConfig, device: str) -> model.UNet:
    """
    The student before training, in float32, its weights as exact as the teacher's file has them.

    `config` is the teacher's, or without one the model's. Raises ValueError if --init is no such student.
    """
    if args.init in ("teacher", "random"):
        torch.manual_seed(args.seed)
        student = model.UNet(model.student_config(config, args.student))
        if args.init == "teacher":
            folder = local_folder(preset(args.teacher).unet, ("unet",))
            model.inherit(student, model.load_unet(folder, torch.float32))
    else:
        student = model.load_unet(local_folder(preset(args.init).unet, ("unet",)), torch.float32)
        if args.teacher != "none" and student.config != model.student_config(config, args.student):
            raise ValueError(f"--init: {args.init} is not a {args.student} student of {args.teacher}")
    return student.to(device, memory_format=torch.channels_last)


def rehearse(args: argparse.Namespace, texts: tuple[CLIPConfig, ...], vae: VAEConfig,
             config: model.UNetConfig, student_config: model.UNetConfig) -> plan.Rehearsal:
    """A run without numbers, to count what it needs; `config` is as in `new_student`."""
    with torch.device("meta"):
        student, teacher = model.UNet(student_config), model.UNet(config)
    matched = match_features(student, teacher, args.features, args.sa_blocks)
    teacher_config = config if args.teacher != "none" else None
    return plan.Rehearsal(args, texts, vae, teacher_config, student_config, matched,
                          NoiseSchedule(SDXL_SCHEDULER), hook_features, sample_loss)


def dry_run(args: argparse.Namespace):
    """Prints what the run would be, without reading weights or data."""
    texts, vae, config = costs.read_configs(model_source(args))
    if args.vae:
        folder = local_folder(preset(args.vae).source, ("vae",), weights=False)
        vae = model.read_config(model.part_folder(folder, "vae"), VAEConfig.from_diffusers)
    if args.init in ("teacher", "random"):
        student_config = model.student_config(config, args.student)
    else:
        folder = local_folder(preset(args.init).unet, ("unet",), weights=False)
        student_config = model.read_config(model.part_folder(folder, "unet"), model.UNetConfig.from_diffusers)
    plan.dry_run(rehearse(args, texts, vae, config, student_config))


def fit_gpu(args: argparse.Namespace, pipeline: Pipeline, config: model.UNetConfig,
            student_config: model.UNetConfig, world: int) -> float:
    """
    Chooses micro-batch and checkpointing by a GPU's memory, unless --checkpointing is given.

    Returns the seconds that a step's counted FLOPs take at the peak of all GPUs, or 0 if that is not known.
    """
    least_seconds = 0.0
    if pipeline.device.startswith("cuda"):
        texts = tuple(encoder.config for encoder in pipeline.text.encoders)
        rehearsal = rehearse(args, texts, pipeline.vae_config, config, student_config)
        gpu = torch.cuda.get_device_properties(pipeline.device)
        peak = plan.peak_flops(gpu.name) if pipeline.dtype in model.HALF else 0
        if peak:
            least_seconds = args.batch * rehearsal.flops() / (world * peak)
        if not args.checkpointing:
            args.micro_batch, args.checkpointing = rehearsal.fit(gpu.total_memory) or (1, "full")
    args.checkpointing = args.checkpointing or "none"
    return least_seconds


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    if args.dry_run:
        dry_run(args)
        return 0
    rank, world, local_rank = process_ranks()
    device = resolve_device(args.device)
    if device.startswith("cuda"):
        if world > 1:
            device = f"cuda:{local_rank}"
        torch.cuda.set_device(torch.device(device).index or 0)
        torch.set_float32_matmul_precision("high")               # TF32, for a VAE in float32
        torch.backends.cudnn.benchmark = True                    # all images have one size
    if world > 1:
        dist.init_process_group("nccl" if device.startswith("cuda") else "gloo", timeout=timedelta(hours=2))
    _lock = lock_run_dir(args.out, other="bundle") if rank == 0 else None  # held until the process ends

    source = load_source(args)                                   # before any model is downloaded
    dtype = resolve_dtype(args.precision, device, on_gpu="bf16")
    pipeline = load_pipeline(
        model_source(args), dtype=dtype, device=device, compile=args.compile, vae=args.vae)
    pipeline.vae.requires_grad_(False)
    pipeline.text.requires_grad_(False)
    config = pipeline.unet.config
    teacher = pipeline.unet.requires_grad_(False) if args.teacher != "none" else None
    pipeline.unet = None
    student = new_student(args, config, device)
    least_seconds = fit_gpu(args, pipeline, config, student.config, world)
    student.set_checkpointing(args.checkpointing)
    matched = match_features(student, teacher, args.features, args.sa_blocks) if teacher else {}
    networks = hook_features(teacher, student, matched, args.out_kd)
    samples = load_samples(args, source, pipeline, student.config)
    identity = {name: getattr(args, name) for name in IDENTITY} | {
        "steps": args.steps if args.decay else None,             # a run of constant rate may be made longer
        "size": samples.size, "precision": str(dtype), "cached": samples.cache is not None,
        "data": samples.source.fingerprint, "teacher": fingerprint(teacher) if teacher else None,
        "encoders": fingerprint(pipeline.vae, pipeline.text.encoders)}
    if rank == 0:
        count = sum(p.numel() for p in student.parameters())
        change = f" ({count / sum(p.numel() for p in teacher.parameters()) - 1:+.0%})" if teacher else ""
        print(f"{args.out}: a student of {count:,} parameters{change}, {len(matched)} features, "
              f"{dtype} on {world} x {device}, micro-batches of {args.micro_batch}, "
              f"checkpointing {args.checkpointing}")
    with StopSignal() as stop:
        signal_number = train(args, pipeline, networks, samples, identity, stop, least_seconds)
    if world > 1:
        dist.destroy_process_group()
    if signal_number:
        if rank == 0:
            print("stopped; rerun the same command to resume")
        return 128 + signal_number
    if rank > 0:
        return 0
    complete_model(args.out, pipeline.folder, pipeline.vae_folder, pipeline.preset)
    atomic_write(args.out / "losses.png", lambda path: loss_curves([args.out]).save(path))
    if args.data == "shapes" and args.judge:
        unets = {"teacher": teacher} if teacher else {}
        unets |= {"student before": new_student(args, config, device), "student after": student}
        judging.judge_run(args.out, args.steps, args.judge, pipeline, unets)
    print(f"{args.out} is finished, {args.steps} steps: python sample.py --model {args.out} --prompt ...")
    return 0


if __name__ == "__main__":
    run(main, "lower --micro-batch, or use --checkpointing selective or full")
