"""
How a toy such as toy/checkpoint is made: a whole SDXL in miniature, trained on captioned shapes.

    OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 -m toy.make        # hours on two cores; rerun it to resume
    python -m toy.make                                               # the same, in one process
    python -m toy.make judge --captions 256
    python -m toy.make publish                                       # copies it to toy/checkpoint, in float16
    python -m toy.make publish --out runs/1b                         # a student by distill.py, to toy/students/1b

First the VAE is trained, then the U-Net and both text encoders together. Everything has SDXL's form: the text
is the second-to-last layers of two CLIP encoders, side by side; the second's pooled output and six size numbers
are further conditions. The U-Net predicts v (Salimans and Ho, arXiv 2202.00512), with the plain loss.
"""

import argparse
import copy
import shutil
from collections import Counter, defaultdict
from dataclasses import replace
from datetime import timedelta
from itertools import product
from pathlib import Path
from typing import Sequence

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import model
from sample import SDXL_SCHEDULER, NoiseSchedule, load_pipeline
from support.checkpoint import lock_run_dir, process_ranks, resume, save_checkpoint
from support.cli import PRESETS, STUDENTS, TOY, ArgumentParser, number, path, run
from support.data import micro_batches
from support.files import atomic_write, write_json
from support.plots import image_grid
from support.text import ENCODERS, TOKENIZERS, CLIP, CLIPConfig, CLIPTokenizer, load_clip, save_clip
from support.vae import VAE, VAEConfig, load_vae, save_vae
from toy import shapes

VAE_CONFIG = VAEConfig(channels=(16, 32), layers=1, groups=8, force_upcast=False, sample_size=shapes.SIZE)
TEXT_WIDTHS, TEXT_LENGTH = dict(zip(ENCODERS, (32, 64))), 16
UNET_CONFIG = model.UNetConfig(
    channels=(16, 32, 64), heads=(1, 2, 4), context_dim=sum(TEXT_WIDTHS.values()),
    pooled_dim=TEXT_WIDTHS[ENCODERS[1]], size_dim=32, groups=8, sample_size=shapes.SIZE // VAE_CONFIG.downscale)
# Stronger noise than SDXL's: shapes are so coarse that they still show at its last timestep, sigma 14.6, and a
# sample's initial noise, not its caption, would decide where things are. Here sigma is 73.
SCHEDULER = SDXL_SCHEDULER | {"prediction_type": "v_prediction", "beta_start": 0.008, "beta_end": 0.0091}
SAVE_EVERY = 100  # steps
INDEX = {
    "_class_name": "StableDiffusionXLPipeline", "_diffusers_version": "0.19.0.dev0",
    "force_zeros_for_empty_prompt": True,
    "scheduler": ["diffusers", "EulerDiscreteScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
    "tokenizer": ["transformers", "CLIPTokenizer"], "tokenizer_2": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"], "vae": ["diffusers", "AutoencoderKL"]}


# ------------------------------------------------------------------------------------------------------------
# Text


def byte_pairs(words: tuple[str, ...]) -> tuple[dict[str, int], list[str]]:
    """A byte-pair vocabulary in which each of the words is one token, and the merges that lead there."""
    spelled = [[*word[:-1], word[-1] + "</w>"] for word in words]
    tokens, merges = ["!", *sorted({letter for word in spelled for letter in word})], []
    while any(len(word) > 1 for word in spelled):
        pairs = Counter(pair for word in spelled for pair in zip(word, word[1:]))
        pair = max(pairs, key=lambda pair: (pairs[pair], pair))
        merges.append(" ".join(pair))
        tokens.append("".join(pair))
        for word in spelled:
            for i in reversed(range(len(word) - 1)):
                if tuple(word[i:i + 2]) == pair:
                    word[i:i + 2] = ["".join(pair)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]  # last: CLIP pools where the largest id is
    return {token: i for i, token in enumerate(dict.fromkeys(tokens))}, merges


def write_tokenizers(folder: Path):
    """Writes tokenizer/ and tokenizer_2/, which pads with another token, as SDXL's does."""
    vocabulary, merges = byte_pairs(shapes.WORDS)
    for name, pad in zip(TOKENIZERS, ("<|endoftext|>", "!")):
        special = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>",
                   "pad_token": pad}
        write_json(folder / name / "vocab.json", vocabulary)
        write_json(folder / name / "special_tokens_map.json", special)
        write_json(folder / name / "tokenizer_config.json", {
            "tokenizer_class": "CLIPTokenizer", "model_max_length": TEXT_LENGTH, **special})
        lines = "\n".join(["#version: 0.2", *merges, ""])
        atomic_write(folder / name / "merges.txt", lambda path: path.write_text(lines))


class Toy(nn.Module):
    """What is trained together: the U-Net and both text encoders."""

    def __init__(self, tokenizer: CLIPTokenizer):
        super().__init__()
        for name, width in TEXT_WIDTHS.items():
            config = CLIPConfig(
                vocab_size=tokenizer.end + 1, max_position_embeddings=TEXT_LENGTH, num_hidden_layers=2,
                hidden_size=width, intermediate_size=4 * width, num_attention_heads=width // 16,
                projection_dim=width, bos_token_id=tokenizer.start, eos_token_id=tokenizer.end)
            self.add_module(name, CLIP(config, projection=name == ENCODERS[1]))
        self.unet = model.UNet(UNET_CONFIG).to(memory_format=torch.channels_last)
        for name, parameter in self.named_parameters():
            if name.endswith("position_embedding.weight"):
                nn.init.normal_(parameter, std=0.3)  # large, so that the order of two objects shows
            if name.endswith("token_embedding.weight"):
                nn.init.normal_(parameter, std=0.7)  # from CLIP's 0.02 cross-attention hardly learns
            if any(f"{last}." in name for last in ("proj_out", "conv2", "conv_out")):
                nn.init.zeros_(parameter)  # as SDXL's own code starts: every block adds nothing at first

    def forward(self, noisy: Tensor, timesteps: Tensor, ids: Tensor, ids_2: Tensor, kept: Tensor) -> Tensor:
        """v for latents (B, 4, H, W); `kept` (B,) is 0 where the caption is to be dropped, else 1."""
        (first, _), (second, pooled) = self.text_encoder(ids), self.text_encoder_2(ids_2)
        context = torch.cat([first, second], dim=2) * kept[:, None, None]
        time_ids = torch.tensor([[shapes.SIZE, shapes.SIZE, 0, 0, shapes.SIZE, shapes.SIZE]] * len(noisy))
        return self.unet(noisy, timesteps, context, pooled * kept[:, None], time_ids)


# ------------------------------------------------------------------------------------------------------------
# Training


def pixels(images: Sequence[Image.Image]) -> Tensor:
    """(B, 3, H, W) in [-1, 1]."""
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2) / 127.5 - 1


def pictures(indices: list[int]) -> tuple[Tensor, list[str]]:
    """Training pictures (B, 3, 64, 64) and their captions."""
    images, captions = zip(*(shapes.sample(shapes.TRAIN_SEED, index) for index in indices))
    return pixels(images), list(captions)


def train_vae(steps: int) -> VAE:
    """The VAE on its own."""
    torch.manual_seed(0)
    vae = VAE(VAE_CONFIG).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3)
    rate = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    bar = tqdm(micro_batches(0, steps, 16, 16, 0, 1), "VAE", steps, unit="step")
    for indices in bar:
        images, _ = pictures(indices)
        mean, logvar = vae.encode(images)
        error = vae.decode(mean + (logvar / 2).exp() * torch.randn_like(mean)) - images
        divergence = (mean.square() + logvar.exp() - 1 - logvar).mean() / 2
        loss = error.square().mean() + 0.5 * error.abs().mean() + 1e-3 * divergence
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rate.step()
        bar.set_postfix(mse=f"{error.square().mean():.4f}")
    return vae


@torch.no_grad()
def set_scaling_factor(vae: VAE, count: int = 512):
    """Gives the scaled latents of training pictures unit variance."""
    std = vae.encode(pictures(range(count))[0])[0].std().item()
    vae.config = replace(vae.config, scaling_factor=round(1 / std, 5))


class MeanPictures:
    """
    The mean latents, nearly, of all pictures of a caption: the best prediction where all else is noise.

    There only the caption says what lies where, and one picture says little about the mean. From single
    pictures the U-Net learned the axis of "left of" but, in thousands of steps, not the side; from means,
    once it could draw, it learned the side in three hundred.
    """

    def __init__(self, vae: VAE, count: int = 600):
        places = defaultdict(list)                               # where objects lie, by their caption's form
        for scene in (shapes.scene(shapes.TRAIN_SEED, index) for index in range(count)):
            for i, o in enumerate(scene.objects):
                places[len(scene.objects), scene.relation, i].append(o)
        # Objects do not overlap: nearly, a picture's latents are the empty one's and what each object adds.
        self.empty, self.added = self.mean(vae, [[]]), {}
        for place, objects in tqdm(places.items(), "mean pictures"):
            for kind in product(shapes.COLOURS, shapes.SHAPES):
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


def examples(indices: list[int], vae: VAE,
             means: MeanPictures | None) -> tuple[Tensor, Tensor, list[str]]:
    """What a step is trained on: latents (B, 4, H, W), timesteps (B,) and captions."""
    if means:
        captions = [shapes.caption(shapes.TRAIN_SEED, index) for index in indices]
        return means(captions), torch.full((len(captions),), 999), captions
    images, captions = pictures(indices)
    mean, logvar = vae.encode(images)
    latents = (mean + (logvar / 2).exp() * torch.randn_like(mean)) * vae.config.scaling_factor
    return latents, torch.randint(0, 1000, (len(captions),)), captions


def prepare(bundle: Path, init: Path | None, vae_steps: int):
    """Writes tokenizers and VAE into a bundle; the VAE is that of `init` if given, else trained."""
    write_tokenizers(bundle)
    vae = load_vae(init, torch.float32) if init else train_vae(vae_steps)
    set_scaling_factor(vae)
    save_vae(vae, bundle / "vae")


def on_means(args: argparse.Namespace, step: int) -> bool:
    """Whether a step is trained on mean pictures: the first ones of each half of a cycle."""
    return step % args.cycle % ((args.cycle + 1) // 2) < args.mean_steps


def learning_rate(args: argparse.Namespace, step: int) -> float:
    """In each cycle it rises within 100 steps and, at the end, falls to 0."""
    step = step % args.cycle
    return args.lr * min(1, (step + 1) / 100, (args.cycle - step) / (args.decay * args.cycle))


def save(folder: Path, toy: Toy, average: Toy):
    for name, network in (("weights", toy), ("average", average)):
        tensors = {path: tensor.contiguous() for path, tensor in network.state_dict().items()}
        save_file(tensors, folder / f"{name}.safetensors")


def load(folder: Path, toy: Toy, average: Toy):
    toy.load_state_dict(model.read_tensors(folder / "weights.safetensors"))
    average.load_state_dict(model.read_tensors(folder / "average.safetensors"))


def write_bundle(folder: Path, toy: Toy):
    """Writes U-Net and text encoders beside the VAE and the tokenizers: a model in the official layout."""
    model.save_unet(toy.unet, folder / "unet")
    for name in TEXT_WIDTHS:
        save_clip(getattr(toy, name), folder / name)
    write_json(folder / "scheduler" / "scheduler_config.json", SCHEDULER)
    write_json(folder / "model_index.json", INDEX)


def judge(args: argparse.Namespace) -> dict[str, float]:
    """The judge's scores of the bundle on captions not trained on; writes some pictures to grid.png."""
    seeds = list(range(args.captions))
    captions = shapes.judge_captions(args.captions)
    pipeline = load_pipeline(args.out / "bundle")
    images = pipeline(captions, guidance=args.guidance, seed=seeds, progress="judging")
    rows = [images[i:i + 8] for i in range(0, min(args.captions, 48) // 8 * 8, 8)]
    image_grid(rows or [images], gap=4).save(args.out / "grid.png")
    return {name: round(score, 3) for name, score in shapes.scores(images, captions).items()}


def train(args: argparse.Namespace):
    """Trains the VAE, if there is none yet, and then the U-Net and the text encoders; resumes."""
    rank, world, _ = process_ranks()
    if world > 1:
        dist.init_process_group("gloo", timeout=timedelta(hours=2))
    bundle = args.out / "bundle"
    _lock = lock_run_dir(args.out, other="log.csv") if rank == 0 else None  # held until the process ends
    if rank == 0 and not (bundle / "vae" / "config.json").exists():
        prepare(bundle, args.init, args.vae_steps)
    if world > 1:
        dist.barrier()
    vae = load_vae(bundle, torch.float32).requires_grad_(False)
    tokenizers = [CLIPTokenizer(bundle / name) for name in TOKENIZERS]

    torch.manual_seed(0)
    toy, schedule = Toy(tokenizers[0]), NoiseSchedule(SCHEDULER)
    if args.init:
        toy.unet.load_state_dict(model.load_unet(args.init, torch.float32).state_dict())
        for name in TEXT_WIDTHS:
            getattr(toy, name).load_state_dict(load_clip(args.init / name, torch.float32).state_dict())
    average = copy.deepcopy(toy)
    optimizer = torch.optim.AdamW(toy.parameters(), lr=args.lr, betas=(0.9, 0.99), fused=True)
    identity = {name: getattr(args, name) for name in ("cycle", "mean_steps", "batch", "lr", "decay")}
    state = resume(args.out, identity, toy, optimizer, lambda folder: load(folder, toy, average))
    first_step = state.get("step", 0)
    means = MeanPictures(vae) if any(on_means(args, step) for step in range(first_step, args.steps)) else None
    # The last layer of a text encoder has no part in the second-to-last's output.
    ddp = DistributedDataParallel(toy, find_unused_parameters=True) if world > 1 else toy
    positions = micro_batches(first_step, args.steps, args.batch, args.batch // world, rank, world)
    bar = tqdm(range(first_step, args.steps), "U-Net", args.steps, initial=first_step, unit="step",
               disable=rank > 0)

    for step, indices in zip(bar, positions):
        torch.manual_seed(step * world + rank)
        latents, timesteps, captions = examples(indices, vae, means if on_means(args, step) else None)
        noise = torch.randn_like(latents)
        ids = [tokenizer(captions) for tokenizer in tokenizers]
        kept = (torch.rand(len(latents)) >= 0.1).float()
        prediction = ddp(schedule.add_noise(latents, noise, timesteps), timesteps, *ids, kept)
        loss = F.mse_loss(prediction, schedule.target(latents, noise, timesteps))
        optimizer.param_groups[0]["lr"] = learning_rate(args, step)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(toy.parameters(), 1.0)
        optimizer.step()
        done = step + 1
        with torch.no_grad():
            weight = 1 - min(0.996, done / (done + 9))
            torch._foreach_lerp_(list(average.parameters()), list(toy.parameters()), weight)
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
        if rank == 0 and (done % SAVE_EVERY == 0 or done == args.steps):
            save_checkpoint(args.out, identity, {"step": done, "updates": done}, toy, optimizer,
                            lambda folder: save(folder, toy, average))
        if rank == 0 and (done % args.judge_every == 0 or done == args.steps):
            write_bundle(bundle, average)
            bar.write(f"step {done}: {judge(args)}")


def publish(bundle: Path, target: Path):
    """Copies the bundle to `target`, weights in float16. A damaged one raises before anything is written."""
    unet, vae = model.load_unet(bundle).half(), load_vae(bundle).half()
    encoders = {name: load_clip(bundle / name, torch.float16) for name in TEXT_WIDTHS}
    shutil.copytree(bundle, target, dirs_exist_ok=True)
    model.save_unet(unet, target / "unet")
    save_vae(vae, target / "vae")
    for name, clip in encoders.items():
        save_clip(clip, target / name)


def publish_student(run: Path, target: Path):
    """Copies the U-Net of a run of distill.py to `target`, in float16, and its log."""
    model.save_unet(model.load_unet(run).half(), target)
    shutil.copyfile(run / "log.csv", target / "log.csv")


def main(argv: list[str] | None = None):
    parser = ArgumentParser(__doc__, "%(prog)s [train | judge | publish] [options]",
                            prog="python -m toy.make")
    parser.add_argument("command", nargs="?", choices=["train", "judge", "publish"], default="train",
                        help="what to do")

    def add(flag: str, kind, default, meaning: str, metavar: str = "N"):
        parser.add_argument(flag, type=kind, default=default, help=meaning, metavar=metavar)

    count = number(int, 1)
    add("--steps", count, 12000, "of U-Net and text encoders; a finished run goes on if asked for more")
    add("--cycle", count, 6000, "steps after which the learning rate starts again")
    add("--mean-steps", number(int, 0), 400, "the first ones of each half of a cycle, on mean pictures")
    add("--vae-steps", count, 900, "of the VAE, in batches of 16")
    add("--batch", count, 16, "images in a step, over all processes")
    add("--lr", number(float, 0), 1e-3, "learning rate of AdamW")
    add("--decay", number(float, 1e-9, 1), 0.5, "last share of a cycle, over which it falls to 0")
    add("--init", path, None, "first weights, such as toy/checkpoint [random]", "FOLDER")
    add("--judge-every", count, 1000, "steps between judgements while training")
    add("--captions", count, 64, "to judge on")
    add("--guidance", number(float, 1), PRESETS["toy"].guidance, "guidance scale of what is judged")
    add("--out", path, Path("runs/toy"), "of the run", "FOLDER")
    args = parser.parse_args(argv)
    if args.batch % process_ranks().world:
        parser.error(f"--batch {args.batch} is not a multiple of the number of processes")
    of_student = args.command == "publish" and (args.out / "unet").is_dir()
    if args.command != "train" and not of_student and not Path(args.out, "bundle", "model_index.json").is_file():
        parser.error(f"{args.out} has no model to {args.command}: train it first")
    if args.command == "train":
        train(args)
    elif args.command == "judge":
        print(judge(args))
    elif of_student:
        publish_student(args.out, STUDENTS / args.out.name)
    else:
        publish(args.out / "bundle", TOY)


if __name__ == "__main__":
    run(main, "lower --batch")
