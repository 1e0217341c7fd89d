"""
What only a GPU can tell: whether the toy comes out right on it, how fast it draws, and how fast it trains.

    python tests/gpu.py | tee gpu.md       # for a card of 80 GB; on a smaller one, what fits
    python tests/gpu.py --narrow           # the same with narrow networks, in a minute, on a CPU too

Needs no download: "right" uses the embedded toy, the others SDXL and KOALA in full size with noise for
weights. Prints tables in Markdown, row by row. Exits with 1 if any row says FAILED.
"""

import contextlib
import gc
import io
import math
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections import defaultdict
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Callable
from unittest import mock

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import distill
import model
from common import networks_of
from sample import Pipeline, load_pipeline
from support import costs, hub
from support.data import Samples, Shapes, collate
from support.files import error_summary, read_csv
from support.plots import format_number
from support.run import load_checkpoint
from support.text import TextEncoders
from support.vae import VAE, VAEConfig
from toy import shapes

CAPTION = "a red circle left of a blue square"
FULL = {"clips": costs.SDXL_CLIPS, "vae": VAEConfig(), "unet": model.CONFIGS["sdxl"],
        "size": 1024, "steps": 25, "batch": 32, "micro_batches": (1, 4, 8), "narrow": False}
NARROW = {"clips": [clip | {"hidden_size": width, "intermediate_size": width, "num_hidden_layers": 2,
                            "num_attention_heads": 1, "projection_dim": 64}
                    for clip, width in zip(costs.SDXL_CLIPS, (32, 64))],
          "vae": VAEConfig(channels=(16, 16, 16, 16), groups=8),
          "unet": replace(model.CONFIGS["sdxl"], channels=(16, 32, 64), heads=(1, 2, 4), groups=8,
                          context_dim=96, pooled_dim=64, size_dim=32, sample_size=8),
          "size": 64, "steps": 2, "batch": 2, "micro_batches": (1, 2), "narrow": True}
failed = []  # names of rows


def start_table(title: str, *columns: str):
    print(f"\n{title}\n\n| {' | '.join(columns)} |\n|---|{'---:|' * (len(columns) - 1)}")


def print_row(*cells):
    print(f"| {' | '.join(format_number(cell) for cell in cells)} |", flush=True)


def row(name: str, measure: Callable[..., list], *arguments):
    """Prints what a measurement returns, or why it has nothing to return. Frees the memory that it used."""
    try:
        cells = measure(*arguments)
    except Exception as error:                                   # the other rows are worth having
        cells = ["out of memory"]
        if not hub.out_of_memory(error):
            traceback.print_exc()
            cells = ["FAILED", error_summary(error)]
    if cells[0] == "FAILED":
        failed.append(name)
    print_row(name, *cells)
    torch.compiler.reset()
    gc.collect()
    torch.cuda.empty_cache()                                     # does nothing without a GPU


# Right: the toy on this device

BOUNDS = {  # of differences: a picture's largest and mean, of 255 levels; relative ones of losses, gradients
    "fp32": (1, 0.01, 1e-4, 1e-3), "fp16": (16, 0.2, 0.01, 0.05), "bf16": (64, 1, 0.05, 0.2)}
PYTHON = [sys.executable, "-c", """
import sys, torch
torch.use_deterministic_algorithms(True)
import distill
for arguments in sys.argv[1:]:
    distill.main(arguments.split())
"""]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
            "--no-python"]


def run_toy(setup: SimpleNamespace, device: str, precision: str) -> list[Tensor]:
    """A picture by the toy; losses and all gradients of a distillation step; on the CPU in float64."""
    dtype = hub.PRECISIONS[precision]
    pipeline = load_pipeline("toy", dtype=dtype, device=device)
    picture = torch.tensor(np.array(pipeline([CAPTION], steps=setup.steps)[0]))
    student = distill.new_student(distill.parse_args([]), pipeline.unet.config, device)
    networks = networks_of(pipeline.unet, student, distill.KOALA_FEATURES)
    data = Samples(Shapes(), shapes.SIZE, (4, 32, 32), seed=0)
    batch = distill.make_batch(collate([data[0], data[1]]), pipeline, partial(distill.encode, pipeline))
    terms = torch.stack(distill.distill_batch(batch, networks, dtype, normalize=True))
    terms.sum().backward()
    gradients = torch.cat([parameter.grad.flatten() for parameter in student.parameters()])
    return [tensor.detach().double().cpu() for tensor in (picture, terms, gradients)]


def check_toy(setup: SimpleNamespace, precision: str, expected: list[Tensor]) -> list:
    picture, terms, gradients = (a - b for a, b in zip(run_toy(setup, setup.device, precision), expected))
    found = {"picture": picture.abs().max(), "its mean": picture.abs().mean(),
             "losses": (terms / expected[1]).abs().max(), "gradients": gradients.norm() / expected[2].norm()}
    bounds = dict(zip(found, BOUNDS[precision]))
    return ["ok" if all(found[name] <= bounds[name] for name in found) else "FAILED",
            ", ".join(f"{name} {found[name]:.1e} (bound {bounds[name]:g})" for name in found)]


def distill_toy(setup: SimpleNamespace, command: list[str], runs: list[tuple[str, int, str]]):
    """Runs distill.py, deterministic, for runs of (name, steps, precision), on one GPU, and without TF32."""
    flags = [f"--out {setup.folder / name} --steps {steps} --precision {precision} --batch 2 --micro-batch 1 "
             f"--device {setup.device.split(':')[0]} --decay 0 --lr 1e-4 --workers 0 --preview-every 0 "
             f"--judge 0" for name, steps, precision in runs]
    gpu = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    environment = os.environ | {
        "CUDA_VISIBLE_DEVICES": gpu, "CUBLAS_WORKSPACE_CONFIG": ":4096:8", "NVIDIA_TF32_OVERRIDE": "0",
        "OMP_NUM_THREADS": "1"}                                  # as torchrun sets it: then sums round alike
    done = subprocess.run([*command, *flags], cwd=ROOT, env=environment, text=True, capture_output=True)
    if done.returncode:
        raise RuntimeError(f"{done.stderr.strip().splitlines()[-1]}\n{done.stderr}")


def check_fp16(setup: SimpleNamespace) -> list:
    out, steps = setup.folder / "fp16", 5 if setup.narrow else 20  # the first three scales are too large
    distill_toy(setup, PYTHON, [(out.name, steps, "fp16")])
    last, state = read_csv(out / "log.csv")[-1], load_checkpoint(out)[1]["state"]
    finite = all(math.isfinite(float(last[name])) for name in ("total", "norm"))
    updates = state["step"] - state["skipped_steps"]
    return ["ok" if updates and finite else "FAILED", f"{updates} of {steps} steps were finite; the scale "
            f"ended at {state['scaler']['scale']:g}, the loss at {last['total']}"]


def check_same(setup: SimpleNamespace, command: list[str], runs: list[tuple[str, int, str]]) -> list:
    """Whether the last run's losses are those of the run "unstopped"; and bits too, of one process's runs."""
    distill_toy(setup, command, runs)
    folders = setup.folder / "unstopped", setup.folder / runs[-1][0]
    ratios = [float(one[column]) / float(other[column])
              for one, other in zip(*(read_csv(folder / "log.csv") for folder in folders), strict=True)
              for column in ("task", "outKD", "featKD", "norm")]
    losses = (torch.tensor(ratios) - 1).abs().max()              # nan, if there is one
    ones, others = (model.load_unet(folder).state_dict() for folder in folders)
    different = sum(not torch.equal(ones[name], others[name]) for name in ones)
    good = losses < 1.1e-5 and (different == 0 or command != PYTHON)
    return ["ok" if good else "FAILED", f"losses and norms differ by {losses:.1e} (bound 1e-05: log.csv has "
            f"six digits), and bits in {different} of {len(ones)} tensors"]


def right(setup: SimpleNamespace):
    start_table("Right: the toy here, beside the CPU in fp32", "check", "verdict", "figures")
    torch.backends.cudnn.allow_tf32 = False
    expected = run_toy(setup, "cpu", "fp32")
    for precision in BOUNDS:
        row(f"a picture and a step in {precision}", check_toy, setup, precision, expected)
    row("a run in fp16", check_fp16, setup)
    own = "fp32" if setup.device == "cpu" else "bf16"            # distill.py's default
    row("a run that was stopped and resumed", check_same, setup, PYTHON,
        [("unstopped", 3, own), ("resumed", 1, own), ("resumed", 3, own)])
    row("a run by two processes", check_same, setup, TORCHRUN + PYTHON, [("two", 3, own)])


# Fast: drawing an image


@torch.inference_mode()
def draw(setup: SimpleNamespace, name: str, part: str, precision: str) -> list:
    unet = setup.unet if name == "sdxl" else model.student_config(setup.unet, name)
    network, inputs = costs.build_networks(setup.clips, setup.vae, unet, setup.size, batch=2)[part]
    passes = setup.steps if part == "U-Net" else 1
    flops = passes * costs.count_network(network, inputs)[1]
    inputs = costs.fill(network, inputs, hub.PRECISIONS[precision], setup.device)
    hub.reset_peak_memory(setup.device)
    seconds = costs.time_network(network, inputs, passes, repeat=3)
    paper = math.nan if setup.narrow else costs.PAPER[name][part][2]
    return [seconds, paper, hub.peak_memory(setup.device), flops / 1e12, flops / seconds / 1e12]


def fast(setup: SimpleNamespace):
    torch.backends.cudnn.allow_tf32 = True                       # as sample.py leaves it
    start_table(f"Fast: an image of {setup.size} x {setup.size} in {setup.steps} steps with guidance",
                "network", "seconds", "paper, RTX 4090", "peak GB", "TFLOP", "TFLOP/s")
    for name in ("700m", "1b", "sdxl"):
        row(f"{name}, fp16", draw, setup, name, "U-Net", "fp16")
    for precision in ("fp16", "fp32"):
        row(f"VAE decoder, {precision}", draw, setup, "sdxl", "VAE decoder", precision)


# Training: distillation steps, KOALA-700M from SDXL


def write_images(setup: SimpleNamespace):
    """Smooth noise with captions; half of a batch, so that a cache is full after the first step."""
    (setup.folder / "images").mkdir()
    for i in range(setup.batch // 2):
        image = Image.effect_noise((27, 18), 64).resize((setup.size * 27 // 16, setup.size * 9 // 8))
        image.convert("RGB").save(setup.folder / f"images/{i}.jpg", quality=90)
        (setup.folder / f"images/{i}.txt").write_text(CAPTION)


def build(setup: SimpleNamespace) -> tuple[Pipeline, model.UNet]:
    """What distill.py loads in bf16, noise for weights. The toy lends its tokenizers and noise schedule."""
    with torch.device("meta"):
        teacher, vae = model.UNet(setup.unet), VAE(setup.vae)
        student = model.UNet(model.student_config(setup.unet, "700m"))
    encoders, _ = costs.build_clips(setup.clips)
    half = torch.bfloat16
    vae_dtype = torch.float32 if setup.device == "cpu" else torch.float16  # see `Pipeline.load_vae`
    for network, dtype in (teacher, half), (encoders, half), (vae, vae_dtype), (student, torch.float32):
        costs.fill(network, [], dtype, setup.device)
    pipeline = load_pipeline("toy", dtype=half, device=setup.device)
    for tokenizer in pipeline.text.tokenizers:
        tokenizer.model_max_length = setup.clips[0]["max_position_embeddings"]
    pipeline.text = TextEncoders([*encoders], pipeline.text.tokenizers)
    pipeline.unet, pipeline.vae, pipeline.vae_config = teacher, vae, setup.vae
    return pipeline, student.requires_grad_(True)


def timed(function: Callable, calls: list[float]) -> Callable:
    """The function, which adds its seconds to `calls`; a GPU has finished before and after."""
    wait = torch.cuda.synchronize if torch.cuda.is_available() else list

    def call(*args, **options):
        wait()
        start = time.perf_counter()
        result = function(*args, **options)
        wait()
        calls.append(time.perf_counter() - start)
        return result
    return call


def train(setup: SimpleNamespace, counts: dict, micro_batch: int, kind: str,
          calls: dict[str, list[float]] | None = None) -> list:
    """Figures of the last of three steps of distill.py; `calls` takes the seconds of its parts."""
    out = setup.folder / f"{micro_batch}, {kind}"
    flags = ["--teacher", "sdxl", "--data", f"{setup.folder}/images", "--size", f"{setup.size}", "--steps",
             "3", "--batch", f"{setup.batch}", "--micro-batch", f"{micro_batch}", "--precision", "bf16",
             "--preview-every", "0", "--out", f"{out}",
             *(["--cache", f"{out}/cache"] if "cached" in kind else []),
             *[f"--{flag}" for flag in ("checkpointing", "compile") if flag in kind]]
    pipeline, student = build(setup)
    parts = {"text encoders": (pipeline.text, "forward"), "VAE encoder": (pipeline.vae, "encode"),
             "teacher": (pipeline.unet, "forward"), "student, forward": (student, "forward"),
             "student, backward": (Tensor, "backward"), "clipping": (nn.utils, "clip_grad_norm_"),
             "optimizer": (torch.optim.AdamW, "step")}
    for name, (owner, attribute) in parts.items() if calls is not None else ():
        setattr(owner, attribute, timed(getattr(owner, attribute), calls[name]))

    def load(*args, compile: bool = False, **options) -> Pipeline:
        if compile:
            pipeline.unet.compile()
        return pipeline

    hub.reset_peak_memory(setup.device)
    # With these networks, and without files of 10 GB or lines between the rows.
    with mock.patch.multiple(distill, load_pipeline=load, new_student=lambda *args: student,
                             save_checkpoint=mock.Mock(), finish=mock.Mock(), say=mock.Mock()):
        with contextlib.redirect_stdout(io.StringIO()):
            if distill.main(flags):
                raise KeyboardInterrupt
    peak, rate = hub.peak_memory(setup.device), float(read_csv(out / "log.csv")[-1]["images_per_s"])
    flops = sum(counts[name][1] for name in counts if "cached" not in kind or name in ("teacher", "student"))
    unet, inputs = costs.build_networks(setup.clips, setup.vae, student.config, setup.size)["U-Net"]
    # As `distill.py --dry-run` counts: 18 bytes for each weight of the student, 2 for each frozen one.
    fixed = 16 * counts["student"][0] + 2 * sum(parameters for parameters, _ in counts.values())
    counted = fixed + micro_batch * costs.saved_bytes(unet, inputs, "checkpointing" in kind)
    return [rate, rate * flops / 1e12, peak, counted / 1e9]


def time_parts(setup: SimpleNamespace, counts: dict, micro_batch: int) -> list:
    """Prints a row for each part of a step, and returns that of the rest."""
    calls = defaultdict(list)
    total = rest = setup.batch / train(setup, counts, micro_batch, "in parts", calls)[0]
    flops = {name: count for name, (_, count) in counts.items()}
    flops |= {"student, forward": flops["student"] / 3, "student, backward": flops["student"] * 2 / 3}
    for name, times in calls.items():
        seconds = sum(times[-len(times) // 3:])                  # of the last of three steps
        rest -= seconds
        print_row(name, 1000 * seconds / setup.batch, 100 * seconds / total,
                  flops.get(name, math.nan) * setup.batch / seconds / 1e12)
    return [1000 * rest / setup.batch, 100 * rest / total, math.nan]


def training(setup: SimpleNamespace):
    torch.backends.cudnn.allow_tf32 = True                       # as distill.py leaves it
    write_images(setup)
    student = model.student_config(setup.unet, "700m")
    counts = costs.step_flops(setup.unet, student, setup.vae, setup.clips, setup.size)
    start_table(f"Training: 700m from sdxl, {setup.size} x {setup.size}, steps of {setup.batch} in bf16",
                "micro-batch", "images/s", "TFLOP/s", "peak GB", "counted GB")
    for micro_batch in setup.micro_batches:
        for kind in ("plain", "checkpointing"):
            row(f"{micro_batch}, {kind}", train, setup, counts, micro_batch, kind)
    for kind in ("cached", *(() if setup.narrow else ("compile", "compile, checkpointing, cached"))):
        row(f"{micro_batch}, {kind}", train, setup, counts, micro_batch, kind)
    start_table(f"Parts of a step, each waited for, micro-batch {setup.micro_batches[1]}",
                "part", "ms an image", "%", "TFLOP/s")
    row("the rest: copies, noise, losses", time_parts, setup, counts, setup.micro_batches[1])


def main() -> int:
    parts = {"right": right, "fast": fast, "training": training}
    parser = hub.ArgumentParser(__doc__)
    parser.add_argument("--narrow", action="store_true", help="narrow networks, and nothing is compiled")
    parser.add_argument("--only", choices=parts, nargs="+", default=[*parts], help="[all]")
    args = parser.parse_args()
    device = hub.resolve_device(None)
    if device == "cpu" and not args.narrow:
        parser.error("there is no GPU; --narrow runs on a CPU")
    print(f"{costs.describe_device(device, torch.float32).split(',')[0]}, torch {torch.__version__}"
          + ", narrow networks, nothing compiled" * args.narrow)
    with tempfile.TemporaryDirectory() as folder:
        setup = SimpleNamespace(**(NARROW if args.narrow else FULL), device=device, folder=Path(folder))
        for part in args.only:
            parts[part](setup)
    print(f"\n{f'FAILED: {failed}' if failed else 'nothing failed'}")
    return 1 if failed else 0


if __name__ == "__main__":
    hub.run(main, "end other programs on this GPU")
