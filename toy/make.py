"""
Trains a toy such as toy/checkpoint: a miniature SDXL, on captioned shapes.

    python -m toy.make                                               # hours; rerun it to resume
    python -m toy.make judge --captions 256
    python -m toy.make publish                                       # to toy/checkpoint, in float16
    python -m toy.make publish --out runs/1b                         # a run of distill.py, to toy/students/1b

First the VAE is trained, then the U-Net and both text encoders together. Everything mirrors SDXL: the text
condition joins the second-to-last layers of two CLIP encoders; the second's pooled text and six size numbers
are further conditions. The U-Net predicts v (Salimans and Ho, arXiv 2202.00512), with the unweighted loss.
"""

import argparse
import copy
import shutil
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_model, save_file, save_model
from torch import Tensor, nn
from tqdm import tqdm

import model
from sample import NoiseSchedule, load_pipeline
from support.hub import PRESETS, STUDENTS, TOY, ArgumentParser, number, path, run
from support.plots import image_grid
from support.run import lock_run_dir, resume, save_checkpoint
from support.text import TOKENIZERS, TextEncoders, load_text
from support.vae import VAE, VAEConfig, load_vae, save_vae
from toy import shapes

VAE_CONFIG = VAEConfig(channels=(16, 32), layers=1, groups=8, force_upcast=False, sample_size=shapes.SIZE)
UNET_CONFIG = model.UNetConfig(  # the text encoders have widths 32 and 64
    channels=(16, 32, 64), heads=(1, 2, 4), context_dim=32 + 64, pooled_dim=64, size_dim=32, groups=8,
    sample_size=shapes.SIZE // VAE_CONFIG.downscale)
# Stronger noise than SDXL's: at its last timestep, sigma 14.6, coarse shapes still show, and the initial
# noise instead of the caption would decide where objects are. Here the last sigma is 73.
SCHEDULER = model.read_json(TOY / "scheduler" / "scheduler_config.json")
SAVE_EVERY = 100  # steps


class Toy(nn.Module):
    """The networks trained together: text encoders and U-Net."""

    def __init__(self, text: TextEncoders, unet: model.UNet):
        super().__init__()
        self.text, self.unet = text, unet.to(memory_format=torch.channels_last)

    def forward(self, noisy: Tensor, timesteps: Tensor, captions: list[str], kept: Tensor) -> Tensor:
        """v for noisy latents (B, 4, H, W); `kept` (B,) is 0 where the caption is to be dropped, else 1."""
        context, pooled = self.text(captions)                    # (B, L, D), (B, P)
        time_ids = torch.tensor([[shapes.SIZE, shapes.SIZE, 0, 0, shapes.SIZE, shapes.SIZE]] * len(noisy))
        return self.unet(noisy, timesteps, context * kept[:, None, None], pooled * kept[:, None], time_ids)

    def save(self, bundle: Path):
        """Makes a folder with a VAE a whole model in the official layout."""
        for name in ("scheduler", *TOKENIZERS):
            shutil.copytree(TOY / name, bundle / name, dirs_exist_ok=True)
        self.text.save(bundle)
        model.save_unet(self.unet, bundle / "unet")
        shutil.copyfile(TOY / "model_index.json", bundle / "model_index.json")


def new_toy() -> Toy:
    """A toy with random weights. Configs and tokenizers of its text encoders are those of toy/checkpoint."""
    toy = Toy(load_text(TOY, torch.float32), model.UNet(UNET_CONFIG))
    for module in toy.text.modules():
        if isinstance(module, (nn.Linear, nn.LayerNorm)):
            module.reset_parameters()
    for name, parameter in toy.named_parameters():
        if name.endswith("token_embedding.weight"):
            nn.init.normal_(parameter, std=0.7)  # with CLIP's 0.02, cross-attention hardly learns
        if name.endswith("position_embedding.weight"):
            nn.init.normal_(parameter, std=0.3)  # large, so that the order of two objects shows
        if any(f"{last}." in name for last in ("proj_out", "conv2", "conv_out")):
            nn.init.zeros_(parameter)  # as in SDXL's code: at first no block adds anything
    return toy


def pixels(images: list) -> Tensor:
    """PIL images to (B, 3, H, W) in [-1, 1]."""
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2) / 127.5 - 1


def pictures(indices: range) -> tuple[Tensor, list[str]]:
    """Training pictures (B, 3, 64, 64) and their captions."""
    images, captions = zip(*(shapes.sample(shapes.TRAIN_SEED, index) for index in indices))
    return pixels(images), list(captions)


def train_vae(steps: int) -> VAE:
    """The VAE, trained in batches of 16. Its scaled latents have unit variance."""
    torch.manual_seed(0)
    vae = VAE(VAE_CONFIG).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3)
    rate = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in tqdm(range(steps), "VAE", unit="step"):
        images, _ = pictures(range(16 * step, 16 * (step + 1)))
        mean, logvar = vae.encode(images)
        error = vae.decode(mean + (logvar / 2).exp() * torch.randn_like(mean)) - images
        divergence = (mean.square() + logvar.exp() - 1 - logvar).mean() / 2
        loss = error.square().mean() + 0.5 * error.abs().mean() + 1e-3 * divergence
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rate.step()
    with torch.no_grad():
        mean, _ = vae.encode(pictures(range(512))[0])
    vae.config = replace(vae.config, scaling_factor=round(1 / mean.std().item(), 5))
    return vae


class MeanPictures:
    """
    Approximate mean latents of all pictures of a caption: the best prediction when the input is pure noise.

    From single pictures the U-Net learned the axis of "left of" but not the side, even in thousands of steps;
    from means, once it could draw, it learned the side in three hundred.
    """

    def __init__(self, vae: VAE, count: int = 600):
        places = {}                                              # where objects lie, by their caption's form
        for index in range(count):
            scene = shapes.scene(shapes.TRAIN_SEED, index)
            for i, o in enumerate(scene.objects):
                places.setdefault((len(scene.objects), scene.relation, i), []).append(o)
        # Objects do not overlap: latents are about those of the empty picture plus what each object adds.
        self.empty, self.added = self.mean(vae, [[]]), {}
        for place, objects in tqdm(places.items(), "mean pictures"):
            for kind in product(shapes.COLORS, shapes.SHAPES):
                alone = [[shapes.Object(*kind, o.x, o.y, o.radius)] for o in objects]
                self.added[place, kind] = self.mean(vae, alone) - self.empty

    @staticmethod
    def mean(vae: VAE, pictures: list[list[shapes.Object]]) -> Tensor:
        images = [shapes.render(shapes.Scene(objects, None)) for objects in pictures]
        return vae.encode(pixels(images))[0].mean(0) * vae.config.scaling_factor

    def __call__(self, captions: list[str]) -> Tensor:
        """Captions to latents (B, 4, H, W)."""
        latents = []
        for caption in captions:
            objects, relation = shapes.parse(caption)
            added = [self.added[(len(objects), relation, i), kind] for i, kind in enumerate(objects)]
            latents.append(self.empty + sum(added))
        return torch.stack(latents)


def examples(indices: range, vae: VAE, means: MeanPictures | None) -> tuple[Tensor, Tensor, list[str]]:
    """What a step is trained on: latents (B, 4, H, W), timesteps (B,) and captions."""
    if means:
        captions = [shapes.describe(shapes.scene(shapes.TRAIN_SEED, index)) for index in indices]
        return means(captions), torch.full((len(captions),), 999), captions
    images, captions = pictures(indices)
    mean, logvar = vae.encode(images)
    latents = (mean + (logvar / 2).exp() * torch.randn_like(mean)) * vae.config.scaling_factor
    return latents, torch.randint(0, 1000, (len(captions),)), captions


def on_means(args: argparse.Namespace, step: int) -> bool:
    """Whether a step trains on mean pictures, as the first steps of each half-cycle do."""
    return step % args.cycle % ((args.cycle + 1) // 2) < args.mean_steps


def learning_rate(args: argparse.Namespace, step: int) -> float:
    """In each cycle, warms up over 100 steps and falls to 0 at the end."""
    step = step % args.cycle
    return args.lr * min(1, (step + 1) / 100, (args.cycle - step) / (args.decay * args.cycle))


def train(args: argparse.Namespace):
    """Trains the VAE, if there is none yet, and then the U-Net and the text encoders; resumes."""
    _lock, bundle = lock_run_dir(args.out), args.out / "bundle"  # held until the process ends
    if not (bundle / "vae" / "config.json").exists():
        vae = load_vae(args.init, torch.float32) if args.init else train_vae(args.vae_steps)
        save_vae(vae, bundle / "vae")
    vae = load_vae(bundle, torch.float32).requires_grad_(False)

    torch.manual_seed(0)
    toy = new_toy()
    if args.init:
        toy = Toy(load_text(args.init, torch.float32), model.load_unet(args.init, torch.float32))
    average = copy.deepcopy(toy)
    both = nn.ModuleDict({"toy": toy, "average": average})
    optimizer = torch.optim.AdamW(toy.parameters(), lr=args.lr, betas=(0.9, 0.99), fused=True)
    identity = {name: getattr(args, name) for name in ("cycle", "mean_steps", "batch", "lr", "decay")}
    state = resume(args.out, identity, {"step": 0}, toy, optimizer,
                   lambda folder: load_model(both, folder / "weights.safetensors"))
    steps, schedule = range(state["step"], args.steps), NoiseSchedule(SCHEDULER)
    means = MeanPictures(vae) if any(on_means(args, step) for step in steps) else None
    bar = tqdm(steps, "U-Net", args.steps, initial=state["step"], unit="step")

    for step in bar:
        torch.manual_seed(step)
        indices = range(step * args.batch, (step + 1) * args.batch)
        latents, timesteps, captions = examples(indices, vae, means if on_means(args, step) else None)
        noise = torch.randn_like(latents)
        kept = (torch.rand(len(latents)) >= 0.1).float()         # dropped captions are for guidance
        prediction = toy(schedule.add_noise(latents, noise, timesteps), timesteps, captions, kept)
        loss = F.mse_loss(prediction, schedule.target(latents, noise, timesteps))
        optimizer.param_groups[0]["lr"] = learning_rate(args, step)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(toy.parameters(), 1.0)
        optimizer.step()
        done = step + 1
        with torch.no_grad():
            weight = 1 - min(0.996, done / (done + 9))
            for mean, parameter in zip(average.parameters(), toy.parameters()):
                mean.lerp_(parameter, weight)
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
        if done % SAVE_EVERY == 0 or done == args.steps:
            save_checkpoint(args.out, identity, {"step": done}, toy, optimizer,
                            lambda folder: save_model(both, folder / "weights.safetensors"))
        if done % args.judge_every == 0 or done == args.steps:
            average.save(bundle)
            bar.write(f"step {done}: {judge(args)}")


# ------------------------------------------------------------------------------------------------------------
# The program


def judge(args: argparse.Namespace) -> dict[str, float]:
    """The judge's scores of the bundle on captions of new scenes; writes some pictures to grid.png."""
    captions, seeds = shapes.judge_captions(args.captions), list(range(args.captions))
    pipeline = load_pipeline(args.out / "bundle")
    images = pipeline(captions, guidance=PRESETS["toy"].guidance, seed=seeds, progress="judging")
    rows = [images[i:i + 8] for i in range(0, min(args.captions, 48), 8)]
    image_grid(rows, gap=4).save(args.out / "grid.png")
    return {name: round(score, 3) for name, score in shapes.scores(images, captions).items()}


def publish(folder: Path, target: Path):
    """Copies a model or a network in float16. A damaged one raises before anything is written."""
    weights = {path.relative_to(folder): model.read_tensors(path) for path in folder.rglob("*.safetensors")}
    shutil.copytree(folder, target, dirs_exist_ok=True)
    for name, tensors in weights.items():
        save_file({key: tensor.half() for key, tensor in tensors.items()}, target / name, {"format": "pt"})


def main(argv: list[str] | None = None):
    parser = ArgumentParser(__doc__, "python -m toy.make [train | judge | publish] [options]")
    add, count = parser.add_argument, number(int, 1)
    add("command", nargs="?", choices=["train", "judge", "publish"], default="train", help="what to do")
    add("--steps", type=count, default=12000, metavar="N", help="total; raise it to extend a run")
    add("--cycle", type=count, default=6000, metavar="N", help="steps per learning-rate cycle")
    add("--mean-steps", type=number(int, 0), default=400, metavar="N", help="mean pictures per half-cycle")
    add("--vae-steps", type=count, default=900, metavar="N", help="of the VAE, in batches of 16")
    add("--batch", type=count, default=16, metavar="N", help="images in a step")
    add("--lr", type=number(float, 0), default=1e-3, metavar="X", help="AdamW's rate")
    add("--decay", type=number(float, 1e-9, 1), default=0.5, metavar="X",
        help="last fraction of a cycle: the rate falls to 0")
    add("--init", type=path, metavar="FOLDER", help="first weights, such as toy/checkpoint [random]")
    add("--judge-every", type=count, default=1000, metavar="N", help="steps between judgments")
    add("--captions", type=count, default=64, metavar="N", help="to judge on")
    add("--out", type=path, default=Path("runs/toy"), metavar="FOLDER", help="of the run")
    args = parser.parse_args(argv)
    bundle, student = args.out / "bundle", args.out / "unet"     # as this program and distill.py leave them
    if args.command == "train":
        train(args)
    elif args.command == "publish" and student.is_dir():
        publish(student, STUDENTS / args.out.name)
        shutil.copyfile(args.out / "log.csv", STUDENTS / args.out.name / "log.csv")
    elif not (bundle / "model_index.json").is_file():
        parser.error(f"{args.out} has no model to {args.command}: train it first")
    elif args.command == "judge":
        print(judge(args))
    else:
        publish(bundle, TOY)


if __name__ == "__main__":
    run(main, "lower --batch")
