"""
Teacher to student: KOALA's knowledge distillation with self-attention features (sections 4.2, 5.1 and A.1).

    python distill.py --student 700m                                   # the embedded toy: minutes on a laptop
    python distill.py --student 700m --teacher sdxl --data laion/      # the paper's recipe, on one GPU
    torchrun --nproc-per-node 4 distill.py --student 700m --teacher sdxl --data laion/

A run is a folder: log.csv, previews/, unet/ (which sample.py --unet and diffusers load at any time), and in
the end a whole bundle. The same command goes on where a run was stopped. All that is random about training
sample p comes from (seed, p), so a run is the same on one process or many, stopped or not.
"""

import argparse
from pathlib import Path

from options import (
    PRECISIONS, PRESETS, begin, filled, may_be_model, number, parser_of, preset, process, program)

RECIPES = {  # the paper's (sections 5.1 and A.1), and a quick one for the toy
    "paper": {"steps": 100_000, "batch": 128, "micro_batch": 8, "lr": 1e-5, "decay": 0.0,
              "save_every": 500, "preview_every": 1000},
    "toy": {"steps": 300, "batch": 32, "micro_batch": 32, "lr": 1e-3, "decay": 0.5,
            "save_every": 50, "preview_every": 100},
}
NUMBERS = [  # flag, least and greatest value, default (None: by recipe), meaning
    ("task", 0.0, 1e9, 1.0, "weight of the task loss (equation 1)"),
    ("out-kd", 0.0, 1e9, 1.0, "weight of outKD (equation 2)"),
    ("feat-kd", 0.0, 1e9, 1.0, "weight of featKD (equation 3)"),
    ("steps", 1, 10**9, None, "optimizer steps"),
    ("batch", 1, 10**6, None, "images in a step, over all processes"),
    ("micro-batch", 1, 10**6, None, "images at once in a process; a batch accumulates them"),
    ("lr", 1e-12, 1.0, None, "learning rate of AdamW"),
    ("decay", 0.0, 1.0, None, "share of the steps, the last, in which the rate falls to 0"),
    ("clip", 1e-9, 1e9, 1.0, "largest norm of the gradients"),
    ("dropout", 0.0, 1.0, 0.1, "share of captions replaced by none"),
    ("size", 0, 4096, 0, "height and width of training images; 0: the teacher's own"),
    ("workers", 0, 1000, 0, "processes that read data"),
    ("save-every", 1, 10**9, None, "steps between checkpoints"),
    ("preview-every", 0, 10**9, None, "steps between previews, 0 for none"),
    ("judge", 0, 10**5, 64, "captions the toy is judged on at the end, 0 for none"),
    ("seed", 0, 2**31 - 1, 0, "of data order and noise"),
]


KINDS = ("SA", "CA", "Res", "FFN", "LF")


def parse_features(text: str) -> list[tuple[str, str | None]]:
    """From "SA,LF@DW-1" [("SA", None), ("LF", "DW-1")]; None: at every stage. ValueError for other words."""
    terms = []
    for term in text.split(",") if text != "none" else []:
        kind, at, stage = term.strip().partition("@")
        if kind not in KINDS or at and not stage:
            raise ValueError(f"--features: {term!r} is none of {', '.join(KINDS)}, with @STAGE or without")
        terms.append((kind, stage or None))
    return terms


def command_line(argv: list[str] | None = None) -> argparse.Namespace:
    parser = parser_of(__doc__)
    add = parser.add_argument
    add("--student", choices=["700m", "1b"], default="700m", help="what the surgery makes of the teacher")
    add("--teacher", default="toy", metavar="T",
        help="toy, sdxl, hub id, folder; none: task loss alone")
    add("--init", default="teacher", metavar="I",
        help="first weights: teacher, random; or a model, as --teacher")
    add("--features", default="SA,LF@DW-1,LF@UP-3", metavar="F",
        help="of SA, CA, Res, FFN, LF, everywhere or @STAGE; LF alone is BK-SDM; none")
    add("--sa-blocks", choices=["bottom", "interleave", "up"], default="bottom", metavar="B",
        help="bottom, interleave or up: which of a deeper teacher's transformer blocks (Table 3c)")
    add("--data", type=filled(str), default="shapes", metavar="D",
        help="shapes; or a folder: images with .txt files or metadata.jsonl, .tar shards")
    add("--caption", type=filled(str), metavar="TEXT",
        help="one caption for all images, as DreamBooth has it")
    add("--cache", type=filled(Path), metavar="FOLDER",
        help="keep latents and text there; fixes each image's crop")
    add("--flip", action="store_true", help="mirror half of the images")
    for flag, low, high, default, text in NUMBERS:
        if default is None:
            key = flag.replace("-", "_")
            text += f" [{', '.join(f'{name} {recipe[key]}' for name, recipe in RECIPES.items())}]"
        kind = number(type(low), low, high, multiple=8 if flag == "size" else 1)
        add("--" + flag, type=kind, default=default, metavar="N", help=text)
    add("--precision", choices=PRECISIONS, metavar="P",
        help="fp32, fp16 or bf16 [bf16 on a GPU, fp32 elsewhere]")
    add("--checkpointing", choices=["none", "selective", "full"], default="none", metavar="C",
        help="what is recomputed: none, selective or full")
    add("--compile", action="store_true", help="torch.compile teacher and student")
    add("--device", type=filled(str), help="[a GPU if there is one]")
    add("--out", type=filled(Path), metavar="FOLDER", help="[runs/TEACHER-STUDENT]")
    add("--dry-run", action="store_true", help="print settings, matched features and costs, and stop")
    args = parser.parse_args(argv)

    for name, value in RECIPES["toy" if args.teacher == "toy" else "paper"].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    _, world, _ = process()
    args.micro_batch = min(args.micro_batch, max(1, args.batch // world))
    if args.batch % (world * args.micro_batch):
        parser.error(f"--batch {args.batch} is not a multiple of {world} x --micro-batch {args.micro_batch}")
    try:
        parse_features(args.features)
    except ValueError as error:
        parser.error(str(error))
    for flag, own in (("teacher", ["none"]), ("init", ["teacher", "random"])):
        name = getattr(args, flag)
        if name not in own and not may_be_model(name):
            known = ", ".join([*own, *PRESETS])
            parser.error(f"--{flag} {name} is neither {known}, nor a folder, nor a hub id")
    if args.teacher == "none" and args.init == "teacher":
        parser.error("--teacher none has no weights to start from; give --init FOLDER or --init random")
    taught = args.teacher != "none" and (args.out_kd or args.feat_kd and args.features != "none")
    if not (args.task or taught):
        parser.error("nothing to learn: --task, --out-kd and --feat-kd are 0, or have nothing to weigh")
    if args.caption and args.data == "shapes":
        parser.error("--caption is for a folder of images; shapes have captions")
    made = f"{Path(args.teacher).name}-{args.student}"
    if args.teacher == "none" and args.init != "random":
        made = Path(args.init).name
    args.out = args.out or Path("runs", made)
    return args


if __name__ == "__main__":
    ARGS = begin(command_line)

import contextlib
import copy
import operator
import re
import shutil
import time
from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from typing import Iterator

import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from tqdm import tqdm

import files
import model
from chart import sheet
from costs import networks, unet_inputs, work
from data import PROMPTS, Pairs, Samples, Shapes, counted, positions, write_cached
from run import (
    Log, Signals, claim, leave_signals_alone, load_checkpoint, restore, save_checkpoint, trained, union)
from sample import BUNDLE, dtype_of, load_pipeline, usable
from toy import shapes

# ------------------------------------------------------------------------------------------------------------
# Features and losses


def teacher_block(block: int, depth: int, teacher_depth: int, blocks: str) -> int:
    """
    Which of a teacher's transformer blocks the student's learns from (Table 3c), both counted from 0.

    bottom: the first ones; up: the last ones; interleave: 1, 3, 5, 7, 9, 10 of ten, counted from 1. Where the
    depths are equal the blocks match one to one.
    """
    if depth == teacher_depth or blocks == "bottom":
        return block
    return block + teacher_depth - depth if blocks == "up" else min(2 * block, teacher_depth - 1)


def match_features(student: model.UNet, teacher: model.UNet, text: str,
                   blocks: str = "bottom") -> dict[str, str]:
    """
    Which module of the teacher each module of the student learns from, by their paths (Table 3).

    Raises ValueError for a term of `text` that the student does not have.
    """
    stages, matched = model.stages(student.config), {}
    for kind, stage in parse_features(text):
        if stage and stage not in stages:
            raise ValueError(f"--features: the student has no stage {stage}, only {', '.join(stages)}")
        at = [stage] if stage else stages
        paths = [path for stage in at for path in model.feature_paths(student, kind, stage)]
        if not paths:
            raise ValueError(f"--features: the student has no {kind} at {stage}")
        for path in paths:
            source = model.teacher_path(path, student.config, teacher.config)
            if found := re.fullmatch(r"(.+\.transformer_blocks)\.(\d+)\.(\w+)", source):
                series = found[1]
                depth = len(student.get_submodule(path.rsplit(".", 2)[0]))
                block = teacher_block(int(found[2]), depth, len(teacher.get_submodule(series)), blocks)
                source = f"{series}.{block}.{found[3]}"
            matched[path] = source
    return matched


def losses(prediction: Tensor, target: Tensor, teacher_prediction: Tensor | None = None,
           features: list[Tensor] = (), teacher_features: list[Tensor] = ()) -> tuple[Tensor, Tensor, Tensor]:
    """
    The three terms of the objective, float32 scalars; those without inputs are 0.

    task    the noise that was added (or v) against the student's prediction            equation (1)
    outKD   the teacher's prediction against the student's                               equation (2)
    featKD  the sum over features i of f_T^i against f_S^i                                equation (3)

    Each is a mean of squared differences. Equation (3) has its sum inside the norm, where differences of
    features could cancel; here it is outside, as in BK-SDM's code.
    """
    error = lambda a, b: F.mse_loss(a.float(), b.float())
    zero = prediction.new_zeros((), dtype=torch.float32)
    task = error(prediction, target)
    out_kd = zero if teacher_prediction is None else error(prediction, teacher_prediction)
    feat_kd = sum((error(s, t) for s, t in zip(features, teacher_features, strict=True)), zero)
    return task, out_kd, feat_kd


# ------------------------------------------------------------------------------------------------------------
# The objective


def source_of(args: argparse.Namespace) -> str:
    """The bundle that a run reads: the teacher's; without one --init's, or the toy's if that is not whole."""
    if args.teacher != "none":
        return args.teacher
    bare = Path(args.init).is_dir() and not Path(args.init, "model_index.json").is_file()
    return "toy" if args.init == "random" or bare else args.init


def features_of(args: argparse.Namespace) -> str:
    """The features that a run asks for."""
    return args.features if args.teacher != "none" and args.feat_kd else "none"


class Distillation:
    """Teacher, student, VAE and text encoders, and what the student is asked for: `terms` of a batch."""

    def __init__(self, args: argparse.Namespace, device: str):
        self.args, self.device = args, device
        self.dtype = dtype_of(args.precision, device, on_gpu="bf16")
        self.weights = args.task, args.out_kd, args.feat_kd      # of the terms
        self.source = source_of(args)
        self.pipeline = load_pipeline(self.source, dtype=self.dtype, device=device, compile=args.compile)
        self.pipeline.vae.requires_grad_(False)
        self.pipeline.text.requires_grad_(False)
        self.teacher = self.pipeline.unet.requires_grad_(False) if args.teacher != "none" else None
        self.student = self.new_student().to(memory_format=torch.channels_last)
        self.student.set_checkpointing(args.checkpointing)
        if not self.teacher:
            del self.pipeline.unet  # it gave its shape, and is loaded again if pictures are asked of it

        self.matched = match_features(self.student, self.teacher, features_of(args), args.sa_blocks)
        self.learned = model.Features(self.student, list(self.matched))
        if self.teacher:  # without outKD it stops after its last feature
            self.taught = model.Features(self.teacher, list(self.matched.values()), stop=not args.out_kd)
        self.check_gradients()
        if args.compile:
            self.student.compile()

    def new_student(self) -> model.UNet:
        """The student before training, in float32; what it has of its teacher is as exact as the teacher."""
        args, expected = self.args, None
        if self.teacher:
            expected = model.student_config(self.teacher.config, args.student)
        elif args.init == "random":
            expected = model.student_config(self.pipeline.unet.config, args.student)
        if args.init not in ("teacher", "random"):
            student = model.load_unet(preset(args.init).source, torch.float32, self.device)
            if expected and student.config != expected:
                raise ValueError(f"--init: {args.init} is not a {args.student} student of {args.teacher}")
            return student
        torch.manual_seed(args.seed)
        student = model.UNet(expected)
        if args.init == "teacher":
            model.inherit(student, self.teacher)
        return student.to(self.device)

    def autocast(self):
        return torch.autocast(self.device.split(":")[0], self.dtype, enabled=self.dtype != torch.float32)

    def check_gradients(self):
        """Raises RuntimeError, before training, if a feature of the student gets no gradient."""
        config, zeros = self.student.config, partial(torch.zeros, device=self.device)
        with self.learned as features:
            self.student(zeros(1, config.in_channels, 8, 8), 0, zeros(1, 1, config.context_dim),
                         zeros(1, config.pooled_dim), zeros(1, 6))
        if dead := [path for path, feature in features.items() if not feature.requires_grad]:
            raise RuntimeError(f"{len(dead)} features have no gradient, the first {dead[0]}")

    @torch.no_grad()
    def encode(self, samples: list[dict]) -> tuple[Tensor, Tensor, Tensor]:
        """Scaled latents (B, 4, H, W), text (B, L, D) and pooled text (B, P); text is zero where dropped."""
        new = [sample for sample in samples if "pixels" in sample]
        if new:
            pixels = torch.stack([sample["pixels"] for sample in new]).to(self.device)
            mean, logvar = self.pipeline.vae.encode(pixels.to(next(self.pipeline.vae.parameters()).dtype))
            captions = [sample["caption"] for sample in new]
            self.pipeline.text.tokenizers[0].check_words(captions)
            context, pooled = self.pipeline.text(captions)
            for i, sample in enumerate(new):
                std = (logvar[i] / 2).exp()
                sample |= {"mean": mean[i], "std": std, "context": context[i], "pooled": pooled[i]}
                if self.args.cache:
                    write_cached(sample, self.args.cache)
        mean, std, latent_noise, context, pooled = (
            torch.stack([sample[name].to(self.device) for sample in samples]).float()
            for name in ("mean", "std", "latent_noise", "context", "pooled"))
        kept = torch.tensor([not sample["dropped"] for sample in samples], device=self.device)
        latents = (mean + std * latent_noise) * self.pipeline.vae.config.scaling_factor
        return latents, context * kept[:, None, None], pooled * kept[:, None]

    @torch.no_grad()
    def ask_teacher(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor | None, dict[str, Tensor]]:
        """The teacher's prediction, if outKD wants it, and its features."""
        prediction = None
        if not self.args.out_kd and not self.matched:
            return prediction, {}
        noisy, timesteps, context, pooled, time_ids = inputs     # the last: sizes, which a half would round
        noisy, context, pooled = (x.to(self.dtype) for x in (noisy, context, pooled))
        with self.taught as features:
            prediction = self.teacher(noisy, timesteps, context, pooled, time_ids)
        return prediction, features

    def terms(self, predict, samples: list[dict]) -> tuple[Tensor, Tensor, Tensor]:
        """task, outKD and featKD of samples; `predict` is the student, as DDP may have wrapped it."""
        latents, context, pooled = self.encode(samples)
        noise = torch.stack([sample["noise"] for sample in samples]).to(self.device)
        timesteps = torch.tensor([sample["timestep"] for sample in samples], device=self.device)
        time_ids = torch.stack([sample["time_ids"] for sample in samples]).to(self.device)
        noisy = self.pipeline.schedule.add_noise(latents, noise, timesteps)
        inputs = (noisy, timesteps, context, pooled, time_ids)

        teacher_prediction, taught = self.ask_teacher(inputs) if self.teacher else (None, {})
        with self.autocast(), self.learned as learned:
            prediction = predict(*inputs)
        target = self.pipeline.schedule.target(latents, noise, timesteps)
        return losses(prediction, target, teacher_prediction, [learned[path] for path in self.matched],
                      [taught[path] for path in self.matched.values()])


# ------------------------------------------------------------------------------------------------------------
# Training

# What may differ between the sittings of one run; anything else would make it another run.
MAY_DIFFER = {"micro_batch", "workers", "save_every", "preview_every", "judge", "precision", "checkpointing",
              "compile", "device", "out", "cache", "dry_run"}


def settings(args: argparse.Namespace) -> dict:
    """What a run was begun with and must be continued with."""
    fixed = {name: value for name, value in vars(args).items() if name not in MAY_DIFFER}
    fixed["cached"] = args.cache is not None  # then an image has the same crop in every epoch
    if not args.decay:
        del fixed["steps"]  # a run of constant rate may be made longer
    return fixed


def check_same(old: dict, new: dict, made: str | Path, flag: str):
    """Raises ValueError, about what was `made` with these old settings, if the new ones are others."""
    changed = [f"{name} was {old[name]!r} and is {new.get(name)!r}"
               for name in old if old[name] != new.get(name)]
    if changed:
        raise ValueError(f"{made} was begun with other settings: {'; '.join(changed)}; give another {flag}")


@dataclass
class Progress:
    """How far a run has come; its checkpoints have this as they have the weights."""

    step: int = 0
    updates: int = 0                                             # steps whose gradients were finite
    skipped_steps: int = 0                                       # the others
    skipped_samples: dict[int, str] = field(default_factory=dict)  # the reason, by index


def resume(args: argparse.Namespace, student: model.UNet, optimizer: torch.optim.Optimizer,
           scaler: torch.amp.GradScaler) -> Progress:
    """Puts all back as the last checkpoint has it, if there is one. Raises ValueError as `check_same`."""
    found = load_checkpoint(args.out)
    if not found:
        return Progress()
    past, tensors = found
    check_same(past["settings"], settings(args), args.out, "--out")
    restore(tensors, past["updates"], student, optimizer)
    if past["scaler"]:
        scaler.load_state_dict(past["scaler"])
    skipped = {int(index): reason for index, reason in past["skipped_samples"].items()}  # text, in JSON
    return Progress(past["step"], past["updates"], past["skipped_steps"], skipped)


def save(args: argparse.Namespace, student: model.UNet, optimizer: torch.optim.Optimizer,
         scaler: torch.amp.GradScaler, progress: Progress):
    """Writes unet/, and then what `resume` reads: a run is finished when its checkpoint says so."""
    model.save_unet(student, args.out / "unet")
    save_checkpoint(args.out, tensors=trained(student, optimizer), settings=settings(args),
                    scaler=scaler.state_dict(), **vars(progress))


def learning_rate(args: argparse.Namespace, step: int) -> float:
    """Constant, and in the last share `--decay` of the steps falling to 0."""
    return args.lr * min(1.0, (args.steps - step) / (args.decay * args.steps)) if args.decay else args.lr


def accumulate(distillation: Distillation, predict, batches: Iterator[list[dict]],
               scaler: torch.amp.GradScaler, world: int) -> tuple[Tensor, dict[int, str]]:
    """The gradients of a step's micro-batches; its mean terms (3,), and what samples of it were skipped."""
    args, skipped = distillation.args, {}
    count = args.batch // (args.micro_batch * world)
    total = torch.zeros(3, device=distillation.device)
    for micro in range(count):
        samples = next(batches)
        if error := samples[0].get("error"):
            raise ValueError(error)
        last = micro == count - 1
        with predict.no_sync() if world > 1 and not last else contextlib.nullcontext():
            terms = distillation.terms(predict, samples)
            # Terms of weight 0 too: so all layers have a gradient, as DistributedDataParallel wants it.
            loss = sum(map(operator.mul, distillation.weights, terms))
            scaler.scale(loss / count).backward()
        total += torch.stack(terms).detach() / count
        for sample in samples:
            skipped |= sample["skipped"]
    if world > 1:
        dist.all_reduce(total)
        total /= world
    return total, union(skipped, world)


def train(args: argparse.Namespace, distillation: Distillation, source: Shapes | Pairs, signals: Signals,
          rank: int, world: int) -> int:
    """Runs what is left of the run. Returns 0, or the number of the signal that ended it early."""
    student, device = distillation.student, distillation.device
    optimizer = torch.optim.AdamW(student.parameters(), lr=args.lr, weight_decay=0.01, fused=True)
    scaler = torch.amp.GradScaler(device.split(":")[0], enabled=distillation.dtype == torch.float16)
    progress = resume(args, student, optimizer, scaler)
    if progress.step >= args.steps:
        return 0
    (args.out / "scores.csv").unlink(missing_ok=True)  # of a shorter run
    part = progress.step, args.steps, args.batch, args.micro_batch, rank, world
    batches = iter(DataLoader(
        training_data(args, distillation, source), batch_sampler=positions(*part), num_workers=args.workers,
        collate_fn=list, worker_init_fn=leave_signals_alone))
    predict = DistributedDataParallel(student) if world > 1 else student
    log = Log(args.out / "log.csv", progress.step) if rank == 0 else None
    bar = tqdm(range(progress.step, args.steps), args.out.name, args.steps, initial=progress.step,
               unit="step", disable=rank)
    in_a_row = 0

    for step in bar:
        start = time.perf_counter()
        optimizer.param_groups[0]["lr"] = rate = learning_rate(args, step)
        total, skipped = accumulate(distillation, predict, batches, scaler, world)
        progress.skipped_samples |= skipped

        scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(student.parameters(), args.clip)
        if norm.isfinite():  # the same on all processes, for so are the gradients
            scaler.step(optimizer)
            progress.updates, in_a_row = progress.updates + 1, 0
        else:
            progress.skipped_steps, in_a_row = progress.skipped_steps + 1, in_a_row + 1
        scaler.update()
        optimizer.zero_grad()
        progress.step = done = step + 1

        task, out_kd, feat_kd = total.tolist()
        bar.set_postfix(task=f"{task:.3g}", outKD=f"{out_kd:.3g}", featKD=f"{feat_kd:.3g}", refresh=False)
        stop = signals.agreed(device)
        if rank == 0:
            log.write(step=done, task=task, outKD=out_kd, featKD=feat_kd,
                      total=sum(map(operator.mul, distillation.weights, (task, out_kd, feat_kd))),
                      lr=rate, norm=norm.item(),
                      seconds=time.perf_counter() - start, images=done * args.batch,
                      skipped_samples=len(progress.skipped_samples), skipped_steps=progress.skipped_steps)
        if in_a_row == 20:
            raise FloatingPointError(
                f"20 steps in a row had gradients that are not finite (task {task:.3g}, outKD {out_kd:.3g}, "
                f"featKD {feat_kd:.3g}); the last checkpoint in {args.out} is good: try --precision bf16, "
                f"or a lower --lr")
        if rank == 0 and (done % args.save_every == 0 or done == args.steps or stop):
            save(args, student, optimizer, scaler, progress)
            bar.write(f"saved {args.out} at step {done}")
        if rank == 0 and args.preview_every and (done % args.preview_every == 0 or done == args.steps):
            preview(distillation, args.out / "previews" / f"step-{done:07d}.png")
        if step * args.batch < min(len(source), args.steps * args.batch) <= done * args.batch:
            if rank == 0 and args.data != "shapes":
                bar.write(first_pass(source, progress.skipped_samples, done * args.batch))
        if stop:
            return stop
    return 0


def first_pass(source: Pairs, skipped: dict[int, str], seen: int) -> str:
    """What became of the data, once all of it, or all that the run wants of it, has been seen."""
    reasons = counted(Counter(skipped.values()) + source.skipped)
    return f"first pass over the data: {min(len(source) - len(skipped), seen)} pairs used; skipped: {reasons}"


def training_data(args: argparse.Namespace, distillation: Distillation, source: Shapes | Pairs) -> Samples:
    """The samples of a source. Raises ValueError if the source, or the cache, does not fit the run."""
    config, vae = distillation.student.config, distillation.pipeline.vae.config
    size = args.size or config.sample_size * vae.downscale
    if isinstance(source, Shapes) and size != shapes.SIZE:
        raise ValueError(f"--data shapes has pictures of {shapes.SIZE} pixels, not {size}: give a folder")
    if args.cache:
        args.cache.mkdir(parents=True, exist_ok=True)
        made = {"data": args.data, "source": distillation.source, "size": size, "flip": args.flip,
                "caption": args.caption, "seed": args.seed, "precision": str(distillation.dtype)}
        note = args.cache / "settings.json"
        if note.exists():
            check_same(dict.fromkeys(made) | files.read_json(note), made, f"--cache {args.cache}", "--cache")
        files.write_json(note, made)
    side = size // vae.downscale
    latent = (config.in_channels, side, side)
    return Samples(source, size, latent, args.seed, args.dropout, args.flip, args.cache)


# ------------------------------------------------------------------------------------------------------------
# What there is to see


def draw(distillation: Distillation, unet: model.UNet, prompts: list[str], progress: str | None = None):
    """An image of each prompt by this U-Net, from seeds 0, 1, ..."""
    pipeline = copy.copy(distillation.pipeline)
    pipeline.unet = unet
    with distillation.autocast():
        return pipeline(prompts, seed=list(range(len(prompts))), progress=progress)


def preview(distillation: Distillation, path: Path):
    """Draws the teacher's pictures and below them the student's, from the same noise."""
    args = distillation.args
    prompts = [args.caption] * 4 if args.caption else PROMPTS[::9]
    if args.data == "shapes":
        prompts = [shapes.caption(shapes.JUDGE_SEED, i) for i in range(8)]
    unets = {"teacher": distillation.teacher, "student": distillation.student}
    rows = {name: draw(distillation, unet, prompts) for name, unet in unets.items() if unet}
    path.parent.mkdir(exist_ok=True)
    files.write(path, lambda path: sheet(list(rows.values()), list(rows)).save(path))


def judge(distillation: Distillation):
    """What the toy's judge says of teacher, student before and student after: scores.csv, and judged.png."""
    args = distillation.args
    captions = [shapes.caption(shapes.JUDGE_SEED, i) for i in range(args.judge)]
    unets = {"teacher": distillation.teacher, "student before": distillation.new_student(),
             "student after": distillation.student}
    images = {name: draw(distillation, unet, captions, f"judging {name}")
              for name, unet in unets.items() if unet}

    scores = {name: shapes.scores(images[name], captions) for name in images}
    rows = [[image.resize((128, 128), Image.Resampling.BICUBIC) for image in row[:8]]
            for row in images.values()]
    files.write(args.out / "judged.png", lambda path: sheet(rows, list(images)).save(path))
    files.write_csv(args.out / "scores.csv", ["", "colour", "shape", "spatial"],
                    [[name, *(f"{value:.3f}" for value in scores[name].values())] for name in scores])


def show_scores(path: Path):
    """Prints the table that `judge` wrote."""
    rows = files.read_csv(path)
    for row in [list(rows[0]), *(row.values() for row in rows)] if rows else []:
        name, *cells = row
        print(f"{name:16}" + "".join(f"{cell:>9}" for cell in cells))


def complete(source: str, folder: Path):
    """Makes a bundle of the run's folder: what a pipeline reads of the teacher's, and how it is sampled."""
    for name, *half in BUNDLE:
        names = [name, *half] if name.startswith("vae") else [*half, name]  # the VAE is read in float32
        if path := files.find(source, *names):
            files.write(folder / name, lambda temporary: shutil.copyfile(path, temporary))
    own = preset(source)._asdict()
    files.write_json(folder / "preset.json", {name: own[name] for name in own if name != "source"})


def dry_run(args: argparse.Namespace):
    """Prints what the run would be, without weights: settings, matched features, parameters, memory, work."""
    found = networks(source_of(args))
    base, vae_config = found.unet, found.vae
    if args.init in ("teacher", "random"):
        student_config = model.student_config(base, args.student)
    else:
        known = model.CONFIGS.get(args.init)
        student_config = known or model.read_config(model.UNet, preset(args.init).source)[0]
    size = args.size or found.size
    side = size // vae_config.downscale
    print("\n".join(f"{name:14} {value}" for name, value in sorted(vars(args).items()) if name != "dry_run"))

    with FakeTensorMode(), bfloat16():  # tensors of all sizes, without memory
        student = model.UNet(student_config)
        teacher = model.UNet(base).requires_grad_(False) if args.teacher != "none" else None
        vae = model.VAE(vae_config).requires_grad_(False)
        inputs = unet_inputs(base, found.texts[0].max_position_embeddings, side)
        learned, kept = work(student, *inputs)
        encoded, _ = work(vae.encoder, torch.empty(1, 3, size, size))
        matched = match_features(student, teacher, features_of(args), args.sa_blocks)
        taught = work(teacher, *inputs)[0] if args.out_kd and teacher or matched else 0
    print(f"\n{len(matched)} features, student <- teacher")
    print("\n".join(f"  {path} <- {source}" for path, source in matched.items()))
    s, t, v = (sum(p.numel() for p in network.parameters()) if network else 0
               for network in (student, teacher, vae))
    step = args.batch * (taught + learned + encoded)
    # Bytes: the student's weights, gradients and two moments in float32, and its copy in bfloat16, in which
    # the teacher is too; the VAE in float32 if it asks for that.
    weights = (4 + 4 + 8 + 2) * s + 2 * t + (4 if vae_config.force_upcast else 2) * v
    micro, tera, giga = args.micro_batch, 1e12, 1e9
    most = "" if args.out_kd else "at most "  # it stops after its last feature
    print(f"""
parameters   teacher {t:,}, student {s:,}{f" ({s / t - 1:+.1%})" if t else ""}, VAE {v:,}
work         TFLOP an image: teacher {most}{taught / tera:.4g}, student forward and backward
             {learned / tera:.4g}, VAE encoder {encoded / tera:.4g} (once, with --cache);
             a step of {args.batch}: {step / tera:.4g}
memory       GB: weights of all, gradients and moments {weights / giga:.2f}; activations of {micro} images,
             without checkpointing, {micro * kept / giga:.2f}
             Counted in bfloat16, not measured; text encoders and the allocator's reserve come on top""")


@contextlib.contextmanager
def bfloat16():
    """The type of the tensors that are made within."""
    torch.set_default_dtype(torch.bfloat16)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


def main(args: argparse.Namespace) -> int:
    """Distils, or goes on distilling, and has the student judged; returns the exit status."""
    if args.dry_run:
        dry_run(args)
        return 0
    rank, world, local = process()
    device = usable(args.device or (f"cuda:{local}" if torch.cuda.is_available() else None))
    if world > 1:
        if device.startswith("cuda"):
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    _lock = claim(args.out) if rank == 0 else None  # held until the process ends, however it ends
    source = Shapes() if args.data == "shapes" else Pairs(args.data, args.caption)

    distillation = Distillation(args, device)
    if rank == 0:
        count = sum(p.numel() for p in distillation.student.parameters())
        teacher = sum(p.numel() for p in distillation.teacher.parameters()) if distillation.teacher else count
        print(f"{args.out}: a student of {count:,} parameters ({count / teacher - 1:+.0%}), "
              f"{len(distillation.matched)} features, {distillation.dtype} on {world} x {device}")
    with Signals() as signals:
        stop = train(args, distillation, source, signals, rank, world)
    if world > 1:
        dist.destroy_process_group()
    if rank > 0:
        return stop and 128 + stop
    if stop:
        print("stopped; the same command goes on from here")
        return 128 + stop
    if not (args.out / "unet" / "config.json").exists():
        model.save_unet(distillation.student, args.out / "unet")  # `resume` has it from the checkpoint
    complete(distillation.pipeline.preset.source, args.out)
    scores = args.out / "scores.csv"
    if args.data == "shapes" and args.judge and not (scores.exists() and files.read_csv(scores)):
        judge(distillation)
    if scores.exists():
        show_scores(scores)
    print(f"{args.out} is finished, {args.steps} steps: "
          f"python sample.py --model {distillation.source} --unet {args.out}/unet --prompt ...")
    return 0


if __name__ == "__main__":
    program(lambda: main(ARGS), "lower --micro-batch, or use --checkpointing selective or full")
