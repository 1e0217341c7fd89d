"""
Our speed and memory beside diffusers', in turns, so that a slow moment of the machine falls on both.

    python tests/benchmark.py                       # all; needs diffusers
    python tests/benchmark.py toy sample distill    # these three

A line: median seconds of ours and theirs, and the median ratio of neighbours (below 1: ours is faster). Only
memory is ours alone.
"""

import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import model  # noqa: E402
from distill import Batch, Networks, distill_batch, match_features  # noqa: E402
from sample import load_pipeline  # noqa: E402
from support.hub import TOY, ArgumentParser  # noqa: E402
from support.vae import VAEConfig  # noqa: E402

TOY_UNET = model.read_config(TOY / "unet", model.UNetConfig.from_diffusers)
NARROW = replace(model.CONFIGS["sdxl"], channels=(64, 128, 256), heads=(1, 2, 4), context_dim=256,
                 pooled_dim=128)


def in_turns(name: str, ours, theirs, runs: int = 7):
    times = []
    for run in range(runs + 1):  # the first pair warms up
        pair = []
        for call in (ours, theirs):
            start = time.perf_counter()
            call()
            pair.append(time.perf_counter() - start)
        times += [pair] * (run > 0)
    a, b = (statistics.median(side) for side in zip(*times))
    ratio = statistics.median(mine / yours for mine, yours in times)
    print(f"{name:34} ours {a:8.3f} s   diffusers {b:8.3f} s   ratio {ratio:.3f}   {runs} runs", flush=True)


def networks(config: model.UNetConfig, dtype: torch.dtype):
    """The same network twice, and a function that makes inputs for both."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    ours = model.UNet(config).to(dtype)
    theirs = UNet2DConditionModel.from_config(config.to_diffusers()).to(dtype)
    theirs.load_state_dict(ours.state_dict())
    ours = ours.to(memory_format=torch.channels_last)  # as load_pipeline does

    def inputs(batch: int, side: int):
        shapes = (batch, 4, side, side), (batch, 77, config.context_dim), (batch, config.pooled_dim)
        noisy, context, pooled = (torch.randn(shape, dtype=dtype) for shape in shapes)
        return noisy, torch.full((batch,), 500), context, pooled, torch.full((batch, 6), 1024.0, dtype=dtype)

    def call_theirs(x, t, context, pooled, time_ids):
        return theirs(x, t, context, added_cond_kwargs={"text_embeds": pooled, "time_ids": time_ids}).sample

    return ours, theirs, call_theirs, inputs


@torch.inference_mode()
def forward(name: str, config: model.UNetConfig, dtype: torch.dtype, batch: int, side: int):
    ours, _, theirs, inputs = networks(config, dtype)
    x = inputs(batch, side)
    difference = (ours(*x) - theirs(*x)).norm() / theirs(*x).norm()
    in_turns(f"{name} {str(dtype)[6:]}", lambda: ours(*x), lambda: theirs(*x))
    print(f"{'':34} relative difference {difference:.1e}")


def unet():
    for dtype in (torch.float32, torch.bfloat16):
        forward("700m, batch 2, latent 64, forward", model.CONFIGS["700m"], dtype, 2, 64)


def toy():
    for batch in (2, 32):
        forward(f"toy, batch {batch}, forward", TOY_UNET, torch.float32, batch, 32)


def train():
    narrow = model.student_config(NARROW, "700m")
    for name, config, batch, side in (("toy", TOY_UNET, 8, 32), ("700m, a fifth as wide", narrow, 2, 64)):
        ours, _, theirs, inputs = networks(config, torch.float32)
        x = inputs(batch, side)
        in_turns(f"{name}, batch {batch}, and backward", lambda: ours(*x).square().mean().backward(),
                 lambda: theirs(*x).square().mean().backward())


def in_process(code: str) -> tuple[float, float]:
    """Seconds and peak GB that a new process gives for `code`, its imports not counted in the seconds."""
    head, body = code.split("# ---\n")
    # VmHWM, and not ru_maxrss, which begins with what this process had when it made the new one.
    program = (f"import re, sys, time; sys.path.insert(0, {str(ROOT)!r})\n{head}\n"
               f"start = time.perf_counter()\n{body}\nseconds = time.perf_counter() - start\n"
               f"print(seconds, int(re.search(r'VmHWM:\\s+(\\d+)', "
               f"open('/proc/self/status').read())[1]) * 1024 / 1e9)")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    seconds, peak = done.stdout.split()[-2:]
    return float(seconds), float(peak)


def load():
    with tempfile.TemporaryDirectory() as folder:
        with torch.device("meta"):
            unet = model.UNet(model.CONFIGS["700m"]).half()
        unet = unet.to_empty(device="cpu").requires_grad_(False)
        for parameter in unet.parameters():
            parameter.normal_(std=0.02)
        model.save_unet(unet, folder)
        del unet
        size = Path(folder, "diffusion_pytorch_model.safetensors").stat().st_size / 1e9
        ours = f"import torch, model\n# ---\nmodel.load_unet({folder!r}, torch.float16)"
        theirs = (f"import torch, diffusers\nfrom diffusers import UNet2DConditionModel\n# ---\n"
                  f"UNet2DConditionModel.from_pretrained({folder!r}, torch_dtype=torch.float16)")
        pairs = [(in_process(ours), in_process(theirs)) for _ in range(8)][1:]
    for i, what in enumerate(("s", "GB at the peak")):
        a, b = (statistics.median(side[i] for side in column) for column in zip(*pairs))
        ratio = statistics.median(mine[i] / yours[i] for mine, yours in pairs)
        name = f"load 700m, a file of {size:.2f} GB"
        print(f"{name:34} ours {a:8.3f} {what}   diffusers {b:8.3f} {what}   ratio {ratio:.3f}")


def sample():
    from diffusers import StableDiffusionXLPipeline

    ours, theirs = load_pipeline("toy"), StableDiffusionXLPipeline.from_pretrained(TOY)
    theirs.set_progress_bar_config(disable=True)
    prompts = ["a red circle left of a blue square"] * 4
    in_turns("toy, 25 steps, 4 images", lambda: ours(prompts, guidance=5.0),
             lambda: theirs(prompts, num_inference_steps=25, guidance_scale=5.0))


def start():
    with tempfile.TemporaryDirectory() as folder:
        ours = ["sample.py", "--prompt", "a red circle", "--steps", "1", "--out", f"{folder}/a.png"]
        theirs = ["-c", f"from diffusers import StableDiffusionXLPipeline as Pipeline\n"
                        f"pipeline = Pipeline.from_pretrained({str(ROOT / 'toy' / 'checkpoint')!r})\n"
                        f"pipeline('a red circle', num_inference_steps=1).images[0].save('{folder}/b.png')"]
        run = lambda command: subprocess.run([sys.executable, *command], check=True, capture_output=True,
                                             cwd=ROOT)
        in_turns("the whole command, 1 step", lambda: run(ours), lambda: run(theirs))


def distill():
    """A step of ours, and of a plain loop with diffusers' networks and hooks for the same losses."""
    distillation_step("toy, distillation step of 16", TOY_UNET, 16, 32)
    distillation_step("SDXL a fifth as wide, step of 2", NARROW, 2, 64)
    distillation_step("... latents cached / BK-SDM's recipe", NARROW, 2, 64, recipe=True)


def distillation_step(name: str, config: model.UNetConfig, batch: int, side: int, recipe: bool = False):
    """With `recipe` theirs is as BK-SDM trains: it encodes the images each time and recomputes all blocks."""
    from diffusers import AutoencoderKL, UNet2DConditionModel

    teacher, student = model.UNet(config), model.UNet(model.student_config(config, "700m"))
    model.inherit(student, teacher)
    matched = match_features(student, teacher, "SA,LF@DW-1,LF@UP-3")
    theirs = []
    for network in (teacher, student):
        theirs.append(UNet2DConditionModel.from_config(network.config.to_diffusers()))
        theirs[-1].load_state_dict(network.state_dict())
    teacher.requires_grad_(False).to(memory_format=torch.channels_last)
    theirs[0].requires_grad_(False)
    student.to(memory_format=torch.channels_last)
    networks = Networks(teacher, student, model.Features(teacher, [*matched.values()]),
                        model.Features(student, [*matched]))
    kept = {}
    for key, network, paths in (("t", theirs[0], matched.values()), ("s", theirs[1], matched)):
        for path in paths:
            def hook(module, args, output, key=(key, path)):
                kept.setdefault(key, output[0] if isinstance(output, tuple) else output)

            network.get_submodule(path).register_forward_hook(hook)
    x = (torch.randn(batch, 4, side, side), torch.full((batch,), 500),
         torch.randn(batch, 16, config.context_dim), torch.randn(batch, config.pooled_dim),
         torch.full((batch, 6), 64.0))
    noise, pixels = torch.randn_like(x[0]), torch.randn(batch, 3, 8 * side, 8 * side)
    if recipe:
        theirs[1].enable_gradient_checkpointing()
        theirs[1].train()
        vae = AutoencoderKL.from_config(replace(
            VAEConfig(), channels=(24, 48, 96, 96), groups=8).to_diffusers()).requires_grad_(False)
    optimizers = [torch.optim.AdamW(student.parameters(), lr=1e-5, fused=True),
                  torch.optim.AdamW(theirs[1].parameters(), lr=1e-5)]

    def our_step():
        sum(distill_batch(Batch(*x, noise), networks, torch.float32)).backward()
        optimizers[0].step()
        optimizers[0].zero_grad()

    def their_step():
        kept.clear()
        named = {"added_cond_kwargs": {"text_embeds": x[3], "time_ids": x[4]}}
        with torch.no_grad():
            if recipe:
                vae.encode(pixels).latent_dist.sample()  # as long as the latents of x would take
            wanted = theirs[0](*x[:3], **named).sample
        prediction = theirs[1](*x[:3], **named).sample
        loss = F.mse_loss(prediction.float(), noise.float()) + F.mse_loss(prediction.float(), wanted.float())
        loss = loss + sum(F.mse_loss(kept["s", a].float(), kept["t", b].float()) for a, b in matched.items())
        loss.backward()
        optimizers[1].step()
        optimizers[1].zero_grad()

    in_turns(name, our_step, their_step)


def memory():
    """Student forward and backward with and without checkpointing: seconds, and the process at its peak."""
    for checkpointing in (False, True):
        code = f"""import torch, model
from tests.benchmark import NARROW
torch.manual_seed(0)
unet = model.UNet(model.student_config(NARROW, "700m"))
unet.set_checkpointing({checkpointing})
x = (torch.randn(8, 4, 64, 64), torch.full((8,), 500), torch.randn(8, 77, 256),
     torch.randn(8, 128), torch.ones(8, 6))
# ---
unet(*x).square().mean().backward()
"""
        done = [in_process(code) for _ in range(3)]
        took, peak = (statistics.median(column) for column in zip(*done))
        name = "--checkpointing" * checkpointing
        print(f"700m a fifth as wide, batch 8 {name:15} {took:8.3f} s   {peak:8.3f} GB at the peak")


BENCHMARKS = {run.__name__: run for run in (unet, toy, train, load, sample, start, distill, memory)}


if __name__ == "__main__":
    parser = ArgumentParser(__doc__, "%(prog)s [NAME ...]")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(BENCHMARKS)} [all]")
    names = parser.parse_args().names or [*BENCHMARKS]
    for name in names:
        if name not in BENCHMARKS:
            parser.error(f"there is no benchmark {name}")
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, "
          f"{torch.backends.cpu.get_cpu_capability()}")
    for name in names:
        BENCHMARKS[name]()
