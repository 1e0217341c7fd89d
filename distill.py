"""
Teacher to student: KOALA's knowledge distillation with self-attention features (sections 4.2, 5.1 and A.1).

    python distill.py --student 700m                                   # the toy: minutes on a laptop
    python distill.py --student 700m --teacher sdxl --data laion/ --vae madebyollin/sdxl-vae-fp16-fix
    torchrun --nproc-per-node 4 --shutdown-timeout 600 distill.py ...  # the same on four GPUs

A run is a folder with log.csv, previews/, checkpoints, unet/ (the newest student, for sample.py --unet and
diffusers) and, at the end, a complete model. Rerun the same command to resume. All randomness in a training
sample comes from the seed and its position: a run sees the same samples on one process or many, interrupted
or not.
"""

import argparse
import contextlib
import math
import os
import signal
import time
from functools import partial
from pathlib import Path
from typing import NamedTuple, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import model
from sample import Pipeline, images_at_once, load_pipeline
from support import costs
from support.data import (
    REASONS, CaptionedImages, Encode, Samples, Shapes, format_counts, load_samples, read_ahead)
from support.files import atomic_write
from support.hub import (
    PRECISIONS, PRESETS, ArgumentParser, local_folder, model_name, nonempty, number, path, peak_memory,
    preset, resolve_device, resolve_dtype, run)
from support.plots import loss_curves
from support.run import (
    Log, StopSignal, complete_model, fingerprint, join_processes, lock_run_dir, process_ranks, rank_0_first,
    read_results, record_step, resume, save_checkpoint, say)
from toy import judging

# ------------------------------------------------------------------------------------------------------------
# Which student feature learns from which teacher feature


def match_features(student: model.UNet, teacher: model.UNet, features: str,
                   sa_blocks: str = "bottom") -> dict[str, str]:
    """
    Maps the path of each student module to that of the teacher module it learns from (Table 3).

    The surgery does not change widths or resolutions, so matched features have the same shape and need no
    projection.

    `features` lists types, each at all stages or at one ("SA,LF@DW-1"). `model.teacher_path` maps the pair in
    a path, and `teacher_block` its transformer block (Table 3c). Raises ValueError for types and stages that
    the student lacks.
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
            source = model.teacher_path(path)
            if ".transformer_blocks." in source:
                blocks, index, layer = source.rsplit(".", 2)     # ....transformer_blocks, 3, attn1
                depth = len(student.get_submodule(path.rsplit(".", 2)[0]))
                index = teacher_block(int(index), depth, len(teacher.get_submodule(blocks)), sa_blocks)
                source = f"{blocks}.{index}.{layer}"
            matched[path] = source
    return matched


def teacher_block(block: int, depth: int, teacher_depth: int, sa_blocks: str) -> int:
    """
    The teacher's transformer block that the student's `block` learns from (Table 3c), both counted from 0.

    bottom: the first blocks; up: the last; interleave: 0, 2, 4, 6, 8, 9 of ten. With equal depths, blocks
    match one to one.
    """
    if sa_blocks == "up":
        return block + teacher_depth - depth
    if sa_blocks == "interleave" and depth != teacher_depth:
        return min(2 * block, teacher_depth - 1)
    return block


def parse_features(text: str) -> list[tuple[str, str | None]]:
    """Parses "SA,LF@DW-1" to [("SA", None), ("LF", "DW-1")]; None is every stage. Raises ValueError."""
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

    equation (1)  task    || eps - eps_S ||^2            the added noise (or v), the student's prediction
    equation (2)  outKD   || eps_T - eps_S ||^2          the teacher's prediction, the student's
    equation (3)  featKD  sum_i || f_T^i - f_S^i ||^2    the teacher's features, the student's

    Each is a mean of squared differences. Equation (3) has its sum inside the norm, but features of different
    shapes cannot be added; here it is outside, as in BK-SDM's code. Features of some modules are ten times
    larger than others and dominate the sum; `normalize` divides each term by its teacher's mean square over
    the batch, so the sum then depends on the micro-batch size.
    """
    task = mean_square(prediction.float() - target.float())
    out_kd = feat_kd = torch.zeros_like(task)
    if teacher_prediction is not None:
        out_kd = mean_square(prediction.float() - teacher_prediction.float())
    for student_feature, teacher_feature in zip(features, teacher_features, strict=True):
        difference = mean_square(student_feature.float() - teacher_feature.float())
        feat_kd = feat_kd + (difference / mean_square(teacher_feature.float()) if normalize else difference)
    return task, out_kd, feat_kd


def mean_square(x: Tensor) -> Tensor:
    """The mean of squares. For a - b the backward pass needs one tensor, that of `F.mse_loss` two."""
    return x.square().mean()


# ------------------------------------------------------------------------------------------------------------
# A step: encode and noise a batch, run teacher and student


class Batch(NamedTuple):
    """What the U-Nets read, and what the student has to predict."""

    noisy: Tensor      # (B, 4, H, W) noisy latents
    timesteps: Tensor  # (B,)
    context: Tensor    # (B, L, D) text; unconditional for a dropped caption
    pooled: Tensor     # (B, P) pooled text, likewise
    time_ids: Tensor   # (B, 6) original height and width, crop top and left, target height and width
    target: Tensor     # (B, 4, H, W) the noise, or v


@torch.no_grad()
def encode(pipeline: Pipeline, samples: dict) -> dict[str, Tensor]:
    """Encodes a batch's pixels and captions with the frozen VAE and text encoders."""
    pixels = (samples["pixels"] / 127.5 - 1).to(next(pipeline.vae.parameters()).dtype)  # (B, 3, 8H, 8W)
    parts = [pipeline.vae.encode(part) for part in pixels.split(4 * images_at_once(pixels[0, 0].numel()))]
    mean, logvar = (torch.cat(part) for part in zip(*parts))     # (B, 4, H, W)
    context, pooled = pipeline.text(samples["caption"])          # (B, L, D), (B, P)
    return {"mean": mean, "std": (logvar / 2).exp(), "context": context, "pooled": pooled,
            "time_ids": samples["time_ids"]}


@torch.no_grad()
def make_batch(samples: dict, pipeline: Pipeline, encode_samples: Encode) -> Batch:
    """Encodes samples of `support.data.collate`, adds noise and drops captions."""
    samples = {name: value.to(pipeline.device, non_blocking=True) if isinstance(value, Tensor) else value
               for name, value in samples.items()}
    encoded = {name: value.float() for name, value in encode_samples(samples).items()}
    noise, timesteps, keep = samples["noise"], samples["timestep"], ~samples["dropped"]
    latents = encoded["mean"] + encoded["std"] * samples["latent_noise"]  # drawn from the VAE's distribution
    latents = latents * pipeline.vae.config.scaling_factor
    context, pooled = encoded["context"], encoded["pooled"]
    absent = (context.new_zeros(1), pooled.new_zeros(1)) if pipeline.zero_negative else pipeline.text([""])
    return Batch(noisy=pipeline.schedule.add_noise(latents, noise, timesteps), timesteps=timesteps,
                 context=torch.where(keep[:, None, None], context, absent[0].float()),
                 pooled=torch.where(keep[:, None], pooled, absent[1].float()),
                 time_ids=encoded["time_ids"], target=pipeline.schedule.target(latents, noise, timesteps))


class Networks(NamedTuple):
    """Teacher and student, and the features of each that equation (3) compares."""

    teacher: model.UNet | None                                   # None if no loss uses it
    student: nn.Module                                           # a UNet, alone or in DistributedDataParallel
    teacher_features: model.Features
    student_features: model.Features


def distill_batch(batch: Batch, networks: Networks, dtype: torch.dtype,
                  normalize: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Runs teacher and student on a batch, in `dtype`; returns task, outKD and featKD (see `losses`)."""
    teacher_prediction, teacher_captured = None, {}
    if networks.teacher:
        with torch.no_grad(), networks.teacher_features as teacher_captured:
            teacher_prediction = networks.teacher(
                batch.noisy.to(dtype), batch.timesteps, batch.context.to(dtype), batch.pooled.to(dtype),
                batch.time_ids)                                  # not cast: bf16 rounds 1023
    autocast = torch.autocast(batch.noisy.device.type, dtype, enabled=dtype != torch.float32)
    with autocast, networks.student_features as captured:        # the student's weights are float32
        prediction = networks.student(
            batch.noisy, batch.timesteps, batch.context, batch.pooled, batch.time_ids)
    return losses(prediction, batch.target, teacher_prediction,
                  [captured[path] for path in networks.student_features.paths],
                  [teacher_captured[path] for path in networks.teacher_features.paths], normalize)


# ------------------------------------------------------------------------------------------------------------
# Training

MAX_NORM = 1.0  # gradients are clipped to it; unpublished, so the usual choice


def learning_rate(args: argparse.Namespace, step: int) -> float:
    """Constant, then linear to 0 over the last fraction `--decay` of the steps."""
    return args.lr * min(1.0, (args.steps - step) / (args.decay * args.steps)) if args.decay else args.lr


def start_or_resume(args: argparse.Namespace, identity: dict, student: model.UNet,
                    optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler) -> dict:
    """Restores the newest checkpoint and returns its state, or returns the state of a new run."""
    state = {"step": 0, "skipped_steps": 0, "skipped_in_a_row": 0, "skipped": dict.fromkeys(REASONS, 0),
             "scaler": scaler.state_dict()}
    state = resume(args.out, identity, state, student, optimizer,
                   lambda folder: student.load_state_dict(model.load_unet(folder).state_dict()))
    scaler.load_state_dict(state["scaler"])
    if state["step"] > args.steps:
        raise ValueError(f"{args.out} is at step {state['step']}; give more --steps, or another --out")
    rank, _ = process_ranks()
    if state["step"] and rank == 0:
        print(f"resumed at step {state['step']}")
    return state


def train(args: argparse.Namespace, pipeline: Pipeline, networks: Networks, samples: Samples,
          encode_samples: Encode, identity: dict) -> int:
    """
    Trains the student for the rest of a run. Returns 0, or the number of the signal that stopped it.

    `identity` has the settings that a resumed run must share with its checkpoint. Raises FloatingPointError
    after 20 steps in a row with non-finite gradients; other errors come from data and files.
    """
    rank, world = process_ranks()
    device, dtype, student = pipeline.device, pipeline.dtype, networks.student
    optimizer = torch.optim.AdamW(student.parameters(), lr=args.lr, weight_decay=0.01, fused=True)
    scaler = torch.amp.GradScaler(device.split(":")[0], enabled=dtype == torch.float16)
    state = start_or_resume(args, identity, student, optimizer, scaler)
    if args.compile:
        student.compile()
        if networks.teacher:
            networks.teacher.compile()
    if world > 1:
        networks = networks._replace(student=DistributedDataParallel(student, gradient_as_bucket_view=True))
    accumulate = args.batch // (args.micro_batch * world)
    first_step = state["step"]
    loader = read_ahead(args, samples, first_step, device)
    log = Log(args.out / "log.csv", first_step) if rank == 0 else None
    bar = tqdm(desc=args.out.name, total=args.steps, initial=first_step, unit="step", disable=rank > 0)

    with StopSignal() as stop, bar:
        for step in range(first_step, args.steps):
            start, lr = time.perf_counter(), learning_rate(args, step)
            optimizer.param_groups[0]["lr"] = lr
            terms, skipped = torch.zeros(4, device=device), torch.zeros(len(REASONS) + 1)
            for i in range(accumulate):
                loaded = next(loader)
                skipped += loaded["skipped"].bincount(minlength=len(skipped))
                batch = make_batch(loaded, pipeline, encode_samples)
                average = world == 1 or i == accumulate - 1      # processes average gradients at the last one
                with contextlib.nullcontext() if average else networks.student.no_sync():
                    task, out_kd, feat_kd = distill_batch(batch, networks, dtype, args.normalize_features)
                    # Terms of weight 0 stay in the sum: DDP needs gradients of all layers.
                    loss = args.task * task + args.out_kd * out_kd + args.feat_kd * feat_kd
                    scaler.scale(loss / accumulate).backward()
                terms += torch.stack([task, out_kd, feat_kd, loss]).detach() / accumulate
            scaler.unscale_(optimizer)
            norm = nn.utils.clip_grad_norm_(student.parameters(), MAX_NORM)
            means, norm, skips, stopping = read_results(terms, norm, skipped[1:], stop.received > 0)
            if math.isfinite(norm):                              # the same in all processes
                scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=False)               # else DDP keeps a second set of gradients

            done = step + 1
            finished = done == args.steps
            record_step(state, math.isfinite(norm), dict(zip(REASONS, skips)))
            if rank == 0:
                log.write(bar, state, dict(zip(("task", "outKD", "featKD", "total"), means)), args.batch,
                          time.perf_counter() - start, lr=lr, norm=norm)
                if done == first_step + 2 and device.startswith("cuda"):  # Adam's moments exist by now
                    say(bar, f"peak memory: {peak_memory(device):.1f} GB")
                if done % args.save_every == 0 or finished or stopping:
                    state["scaler"] = scaler.state_dict()
                    save_checkpoint(args.out, identity, state, student, optimizer,
                                    lambda folder: model.save_unet(student, folder / "unet"))
                    say(bar, f"saved {args.out} at step {done}")
                if args.preview_every and (done % args.preview_every == 0 or finished):
                    judging.preview(pipeline, networks.teacher, student, samples.source.prompts(8),
                                    args.out / "previews" / f"step-{done:07d}.png")
                if finished:
                    say(bar, f"samples skipped: {format_counts(state['skipped'])}")
            if stopping:
                return stop.received or signal.SIGTERM
    return 0


# ------------------------------------------------------------------------------------------------------------
# The program

KOALA_FEATURES = "SA,LF@DW-1,LF@UP-3"  # SA at every stage that has it, and LF at the others (Table 3d)
RECIPES = {  # the paper's (sections 5.1 and A.1), BK-SDM's for its students, and a quick one for the toy
    "paper": {"steps": 100_000, "batch": 128, "micro_batch": 8, "lr": 1e-5, "decay": 0.0, "save_every": 500,
              "features": KOALA_FEATURES, "normalize_features": False},
    "bk": {"steps": 50_000, "batch": 256, "micro_batch": 8, "lr": 5e-5, "decay": 0.0, "save_every": 500,
           "features": "SA", "normalize_features": False},
    "toy": {"steps": 900, "batch": 8, "micro_batch": 8, "lr": 2e-3, "decay": 0.5, "save_every": 100,
            "features": KOALA_FEATURES, "normalize_features": True},
}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = ArgumentParser(__doc__)

    def add(flag: str, kind, default, meaning: str, metavar: str = "N"):
        setting = flag[2:].replace("-", "_")
        if setting in RECIPES["paper"]:
            own = [f"{name} {recipe[setting]}" for name, recipe in RECIPES.items()]
            meaning += f" [{', '.join(own)}]"
        how = {"choices": kind} if isinstance(kind, list) else {"type": kind}
        parser.add_argument(flag, default=default, help=meaning, metavar=metavar, **how)

    def add_switch(flag: str, meaning: str, action="store_true"):
        parser.add_argument(flag, action=action, help=meaning)

    weight, count = number(float, 0, 1e9), number(int, 1, 10**8)
    teacher, init = (partial(model_name, words=words) for words in (("none",), ("teacher", "random")))
    add("--student", list(model.SURGERIES), "700m", "1b, 700m; BK-SDM's base, small", "NAME")
    add("--teacher", teacher, "toy", "a name such as sdxl, hub id or folder; none: task loss only", "MODEL")
    add("--vae", model_name, None, "another VAE, such as the paper's madebyollin/sdxl-vae-fp16-fix", "MODEL")
    add("--init", init, "teacher", "initial weights: teacher, random, or a model", "MODEL")
    add("--features", str, None, "SA, CA, Res, FFN, LF, each optionally @STAGE (SA,LF@DW-1), or none", "LIST")
    add("--sa-blocks", ["bottom", "interleave", "up"], "bottom", "blocks to learn from (Table 3c)", None)
    add("--data", nonempty, "shapes", "shapes, or a folder: images with .txt, metadata.jsonl, .tar", "FOLDER")
    add("--caption", nonempty, None, "one caption for all images, as in DreamBooth", "TEXT")
    add("--cache", path, None, "cache latents and text here; fixes each image's crop", "FOLDER")
    add("--task", weight, 1.0, "weight of the task loss (equation 1)")
    add("--out-kd", weight, 1.0, "weight of outKD (equation 2)")
    add("--feat-kd", weight, 1.0, "weight of featKD (equation 3)")
    add_switch("--normalize-features", "divide a feature's loss by its teacher's mean square [for the toy]",
               argparse.BooleanOptionalAction)
    add("--steps", count, None, "optimizer steps")
    add("--batch", count, None, "images per step, over all processes")
    add("--micro-batch", count, None, "images per GPU at a time; gradients are accumulated")
    add("--lr", number(float, 1e-12, 1), None, "learning rate of AdamW")
    add("--decay", number(float, 0, 1), None, "last fraction of the steps, over which the rate falls to 0")
    add("--size", number(int, 0, 4096, 8), 0, "height and width of training images; 0: the teacher's")
    add("--workers", number(int, 0, 1000), None, "data workers per GPU [half of cores, at most 8; shapes: 0]")
    add("--save-every", count, None, "steps between checkpoints")
    add("--preview-every", number(int, 0), 1000, "steps between previews, and one at the end; 0: none")
    add("--judge", number(int, 0), 64, "captions to judge the toy on at the end, 0 for none")
    add("--seed", number(int, 0, 2**31 - 1), 0, "seed of data and noise")
    add("--precision", list(PRECISIONS), None, "fp32 (TF32 on a GPU), fp16, bf16 [bf16 on a GPU]", "NAME")
    add("--device", nonempty, None, "[a GPU if there is one]", "NAME")
    add("--out", path, None, "[runs/TEACHER-STUDENT]", "FOLDER")
    add_switch("--checkpointing", "recompute activations for the backward pass: less memory, more work")
    add_switch("--compile", "torch.compile teacher and student")
    add_switch("--dry-run", "print settings, matched features and costs; read no data and no weights")
    args = parser.parse_args(argv)
    fill_in(args)
    check_args(args, parser)
    return args


def fill_in(args: argparse.Namespace):
    """Fills in settings that depend on others, such as the recipe's and the run's folder."""
    recipe = "paper" if args.student in model.CONFIGS else "bk"
    if preset(args.teacher) == PRESETS["toy"]:
        recipe = "toy"
    for name, value in RECIPES[recipe].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.features = args.features.replace(" ", "")
    _, world = process_ranks()
    args.micro_batch = min(args.micro_batch, max(1, args.batch // world))
    if args.workers is None:
        on_machine = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # processes, as torchrun sets it
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 2
        args.workers = min(8, cores // 2 // on_machine)
        if args.data == "shapes":                                # so quick to draw that a process costs more
            args.workers = 0
    if args.teacher == "none" or not args.feat_kd:
        args.features = "none"
    if args.out is None:
        name = f"{Path(args.teacher).name}-{args.student}"
        if args.teacher == "none" and args.init != "random":
            name = Path(args.init).name
        args.out = Path("runs", name)


def check_args(args: argparse.Namespace, parser: ArgumentParser):
    """Ends the program, with one line, if settings contradict each other."""
    _, world = process_ranks()
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
    if args.data != "shapes" and args.out.resolve().is_relative_to(Path(args.data).resolve()):
        parser.error(f"--out {args.out} is in --data, so the run would train on its own previews")
    if args.caption and args.data == "shapes":
        parser.error("--caption is for a folder of images; shapes have their own")


def model_source(args: argparse.Namespace) -> str:
    """The source of text encoders and VAE: the teacher, else --init, or the toy for --init random."""
    if args.teacher != "none":
        return args.teacher
    return "toy" if args.init == "random" else args.init


def new_student(args: argparse.Namespace, config: model.UNetConfig, device: str) -> model.UNet:
    """
    The untrained student in float32, with weights at the precision of the teacher's file.

    `config` is the teacher's, or else the model's. Raises ValueError if --init is not such a student.
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


def dry_run(args: argparse.Namespace):
    """Prints what the run would be, without reading weights or data."""
    clips, vae, config = costs.read_configs(model_source(args))
    if args.init in ("teacher", "random"):
        student_config = model.student_config(config, args.student)
    else:                                                        # a whole model, or a U-Net alone
        folder = local_folder(preset(args.init).unet, ("unet",), weights=False)
        config_file = model.part_folder(folder, "unet") / "config.json"
        student_config = model.read_json(config_file, model.UNetConfig.from_diffusers)
    with torch.device("meta"):
        student = model.UNet(student_config)
        teacher = model.UNet(config) if args.teacher != "none" else None
    matched = match_features(student, teacher, args.features, args.sa_blocks) if teacher else {}
    costs.print_plan(args, matched, clips, vae, teacher, student)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    if args.dry_run:
        dry_run(args)
        return 0
    rank, world = process_ranks()
    device = resolve_device(args.device)
    on_gpu = device.startswith("cuda")
    if on_gpu:
        torch.set_float32_matmul_precision("high")               # TF32, for a VAE in float32
        # All images have the same size, so cuDNN searches for the fastest convolutions once.
        torch.backends.cudnn.benchmark = not torch.are_deterministic_algorithms_enabled()
    join_processes(device, args.device)
    if args.compile:
        torch._dynamo.config.optimize_ddp = False                # it would split the student into 100 graphs
        # Else the backward pass would capture features again.
        torch._dynamo.config.skip_fwd_side_effects_in_bwd_under_checkpoint = True
    _lock = lock_run_dir(args.out) if rank == 0 else None        # held until the process ends

    with rank_0_first():                                         # downloads and indexes; the others find it
        source = Shapes()
        if args.data != "shapes":
            source = CaptionedImages(args.data, args.out / "index", args.caption)
        dtype = resolve_dtype(args.precision, device, on_gpu="bf16")
        pipeline = load_pipeline(model_source(args), None, dtype, device, vae=args.vae)
        student = new_student(args, pipeline.unet.config, device)
    for network in (pipeline.vae, pipeline.text, pipeline.unet):
        network.requires_grad_(False)
    student.set_checkpointing(args.checkpointing)
    config = pipeline.unet.config
    teacher = pipeline.unet if args.teacher != "none" else None
    pipeline.unet = None
    matched = match_features(student, teacher, args.features, args.sa_blocks) if teacher else {}
    networks = Networks(teacher if args.out_kd or matched else None, student,
                        model.Features(teacher, [*matched.values()]), model.Features(student, [*matched]))
    samples, encode_samples = load_samples(args, source, pipeline, student.config, partial(encode, pipeline))
    if rank == 0:
        print(f"{args.out}: a student of {costs.count_parameters(student):,} parameters, "
              f"{len(matched)} features; {dtype} on {world} x {device}")
        print(f"{args.data}: {len(source):,} pairs; left out: {format_counts(source.skipped)}")
    identity = run_identity(args, samples, pipeline, teacher)
    signal_number = train(args, pipeline, networks, samples, encode_samples, identity)
    if world > 1:
        dist.destroy_process_group()
    if signal_number:
        if rank == 0:
            print("stopped; rerun the same command to resume")
        return 128 + signal_number
    if rank == 0:
        finish(args, pipeline, config, teacher, student)
    return 0


def run_identity(args: argparse.Namespace, samples: Samples, pipeline: Pipeline,
                 teacher: model.UNet | None) -> dict:
    """The settings that must not change when a run is resumed."""
    flags = ("student", "init", "features", "sa_blocks", "normalize_features", "caption", "task", "out_kd",
             "feat_kd", "batch", "lr", "decay", "seed")
    return {name: getattr(args, name) for name in flags} | {
        "steps": args.steps if args.decay else None,             # a run of constant rate may be made longer
        "size": samples.size, "precision": str(pipeline.dtype), "cached": bool(args.cache),
        "data": samples.source.fingerprint, "teacher": fingerprint(teacher) if teacher else None,
        "encoders": fingerprint(pipeline.vae, pipeline.text.encoders)}


def finish(args: argparse.Namespace, pipeline: Pipeline, config: model.UNetConfig, teacher: model.UNet | None,
           student: model.UNet):
    """Makes the run's folder a complete model, plots its losses and, on shapes, judges it."""
    complete_model(args.out, pipeline.folder, pipeline.vae_folder, pipeline.preset)
    atomic_write(args.out / "losses.png", lambda path: loss_curves([args.out]).save(path))
    prompt, look_at = "...", ""
    if args.data == "shapes":
        prompt = "a red circle left of a blue square"
    if args.data == "shapes" and args.judge:
        unets = {"teacher": teacher, "student before": new_student(args, config, pipeline.device),
                 "student after": student}
        judging.judge_run(args.out, args.steps, args.judge, pipeline, unets)
        look_at = f"; look at {args.out / 'judged.png'}"
    print(f"{args.out} is finished after {args.steps} steps{look_at}. Next:\n"
          f'    python sample.py --model {args.out} --prompt "{prompt}"\n'
          f"    python analysis.py curves {args.out}")


if __name__ == "__main__":
    run(main, "lower --micro-batch, or use --checkpointing")
