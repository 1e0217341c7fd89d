"""
Text to image with SDXL, KOALA or the embedded toy: Euler sampling with classifier-free guidance.

    python sample.py --prompt "a red circle left of a blue square"
    python sample.py --prompt "a red circle left of a blue square" --unet runs/toy-700m/unet
    python sample.py --prompt "A portrait of a koala, watercolour" --model sdxl 1b 700m --out columns.png

Several models give one picture: a column per model, a row per prompt and seed, the same noise in each row
(Figures 10 to 16). With one model, a row per prompt and a column per seed. The PNG's text has the settings.
"""

import argparse
from pathlib import Path

from options import (
    PRECISIONS, PRESETS, SPACINGS, Preset, begin, check, filled, may_be_model, number, one_line, parser_of,
    preset, program)

# ------------------------------------------------------------------------------------------------------------
# The command line comes before the heavy imports, so that a mistake in it is reported at once


def command_line() -> argparse.Namespace:
    parser = parser_of(__doc__, "--prompt TEXT [options]")
    size = number(int, 8, 8192, multiple=8)
    add = parser.add_argument
    add("--prompt", nargs="+", required=True, metavar="TEXT", help="what to draw; several for several rows")
    add("--model", nargs="+", default=["toy"], metavar="NAME",
        help=f"{', '.join(PRESETS)}, a hub id or a folder; several for several columns [toy]")
    add("--unet", metavar="FOLDER", help="take the U-Net, and it alone, from here")
    add("--negative", metavar="TEXT", help="what not to draw")
    add("--steps", type=number(int, 1, 1000), metavar="N", help="Euler steps, if not the preset's")
    add("--guidance", type=number(float, 1), metavar="X", help="strength, 1 for none, if not the preset's")
    add("--seed", type=number(int, 0, 2**63 - 1), default=0, metavar="N", help="of the initial noise")
    add("--count", type=number(int, 1, 1000), default=1, metavar="N",
        help="pictures of each prompt, seeds counting up")
    add("--height", type=size, metavar="N", help="in pixels, if not the (first) model's own")
    add("--width", type=size, metavar="N", help="in pixels, if not the (first) model's own")
    add("--precision", choices=PRECISIONS, metavar="P",
        help="fp32, fp16 or bf16 [fp16 on a GPU, fp32 elsewhere]")
    add("--device", type=filled(str), help="[a GPU if there is one]")
    add("--low-memory", action="store_true", help="hold one network at a time, decode in tiles")
    add("--compile", action="store_true", help="torch.compile the U-Net")
    add("--out", type=filled(Path), default=Path("sample.png"), metavar="PNG", help="the picture to write")
    args = parser.parse_args()
    if not all(prompt.strip() for prompt in args.prompt):
        parser.error("--prompt is empty; say what to draw")
    check(parser, args)
    if args.unet is not None and (len(args.model) > 1 or not may_be_model(args.unet)):
        parser.error(f"--unet {args.unet!r} is not one folder or hub id for one --model")
    return args


if __name__ == "__main__":
    ARGS = begin(command_line)

import contextlib
import json
import math
import re
import time

import torch
from PIL import Image, PngImagePlugin
from torch import Tensor, nn
from tqdm import tqdm

import files
import model
from chart import sheet
from text import load_text
from weights import WEIGHTS

# ------------------------------------------------------------------------------------------------------------
# Noise


SDXL_SCHEDULER = {  # its scheduler_config.json, and KOALA's
    "_class_name": "EulerDiscreteScheduler", "num_train_timesteps": 1000, "beta_schedule": "scaled_linear",
    "beta_start": 0.00085, "beta_end": 0.012, "prediction_type": "epsilon", "timestep_spacing": "leading",
    "steps_offset": 1}


class Schedule:
    """
    The noise of Stable Diffusion, z_t = sqrt(a_t) z + sqrt(1 - a_t) noise for t = 0, ..., 999.

    Karras et al. (arXiv 2206.00364) write z_t / sqrt(a_t) = z + sigma_t noise; sigma_t^2 = (1 - a_t) / a_t.
    Made from a scheduler_config.json; ValueError names what it asks for that is not here.
    """

    CHOICES = {
        "beta_schedule": ["scaled_linear"], "prediction_type": ["epsilon", "v_prediction"],
        "timestep_spacing": SPACINGS, "interpolation_type": ["linear"],
        "final_sigmas_type": ["zero"], "timestep_type": ["discrete"], "trained_betas": [None],
        "num_train_timesteps": [1000],
        "use_karras_sigmas": [False, None], "use_exponential_sigmas": [False, None],
        "use_beta_sigmas": [False, None], "rescale_betas_zero_snr": [False]}

    def __init__(self, config: dict, spacing: str | None = None):
        absent = {key: choices[0] for key, choices in self.CHOICES.items()} | {
            "beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02, "steps_offset": 0}
        config = absent | config
        for key, choices in self.CHOICES.items():
            if config[key] not in choices:
                raise ValueError(f"scheduler_config.json has {key}={config[key]!r}, which is not supported")
        start, end, count = config["beta_start"], config["beta_end"], config["num_train_timesteps"]
        self.offset = config["steps_offset"]
        if {type(start), type(end)} != {float} or not 0 < start < end < 1 or self.offset not in (0, 1):
            raise ValueError(f"scheduler_config.json has beta_start={start!r}, beta_end={end!r} and "
                             f"steps_offset={self.offset!r}, not two rising numbers in 0..1 and 0 or 1")
        betas = torch.linspace(start**0.5, end**0.5, count, dtype=torch.float64) ** 2
        self.alphas = (1 - betas).cumprod(0)                     # a_t, (1000,)
        self.all_sigmas = (1 / self.alphas - 1).sqrt()           # sigma_t, (1000,)
        self.spacing = spacing or config["timestep_spacing"]
        self.prediction = config["prediction_type"]

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """z_t of scaled latents z and noise, each (B, C, H, W), at integer timesteps (B,)."""
        signal, strength = self.rates(latents, timesteps)
        return signal * latents + strength * noise

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What the network is asked for at z_t: the noise, or v of Salimans and Ho (arXiv 2202.00512)."""
        if self.prediction == "epsilon":
            return noise
        signal, strength = self.rates(latents, timesteps)
        return signal * noise - strength * latents

    def rates(self, latents: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """sqrt(a_t) and sqrt(1 - a_t), each (B, 1, 1, 1), in the latents' dtype and on their device."""
        pick = lambda table: table.sqrt().float().to(latents)[timesteps, None, None, None]
        return pick(self.alphas), pick(1 - self.alphas)

    def timesteps(self, steps: int) -> list[float]:
        """Where `steps` steps ask the network, noisiest first (Lin et al., arXiv 2305.08891, Table 2)."""
        count = len(self.alphas)
        if self.spacing == "linspace":
            return torch.linspace(0, count - 1, steps, dtype=torch.float64).flip(0).tolist()
        if self.spacing == "leading":
            return [float(i * (count // steps) + self.offset) for i in reversed(range(steps))]
        return [float(round(count - i * count / steps) - 1) for i in range(steps)]  # trailing

    def sigmas(self, timesteps: list[float]) -> list[float]:
        """The noise at each timestep, between two by interpolation, and the final 0."""
        last = len(self.all_sigmas) - 1
        low = [min(int(t), last) for t in timesteps]
        return [torch.lerp(self.all_sigmas[i], self.all_sigmas[min(i + 1, last)], t - i).item()
                for i, t in zip(low, timesteps)] + [0.0]

    def initial_scale(self, sigmas: list[float]) -> float:
        """What the first noise is multiplied by; only "leading" adds the image's variance, 1, to it."""
        return math.sqrt(sigmas[0] ** 2 + 1) if self.spacing == "leading" else sigmas[0]


def euler(predict, noise: Tensor, schedule: Schedule, steps: int) -> Tensor:
    """
    Euler's method (Karras et al., Algorithm 1, no churn), from noise (B, C, H, W) of variance 1 to latents.

    `predict(x, t)` is the network at its own scale of x, the noise or v as `schedule.prediction` says. Sigmas
    are numbers on the host: nothing here waits for the device.
    """
    timesteps = schedule.timesteps(steps)
    sigmas = schedule.sigmas(timesteps)
    x = noise * schedule.initial_scale(sigmas)
    for t, sigma, next_sigma in zip(timesteps, sigmas, sigmas[1:]):
        scale = 1 / math.sqrt(sigma**2 + 1)                      # sqrt(a_t)
        d = predict(x * scale, t)                                # the noise, (x - z) / sigma
        if schedule.prediction == "v_prediction":                # noise = sqrt(a_t) v + sqrt(1 - a_t) z_t
            d = d * scale + x * (sigma * scale**2)
        x = x + (next_sigma - sigma) * d
    return x


def guide(prediction: Tensor, guidance: float) -> Tensor:
    """Classifier-free guidance (Ho and Salimans, arXiv 2207.12598); the half without the prompt is first."""
    free, led = prediction.chunk(2)
    return free + guidance * (led - free)


# ------------------------------------------------------------------------------------------------------------
# Pipeline


class Pipeline:
    """
    Prompts in, images out; made by `load_pipeline`.

    Its networks `text`, `unet` and `vae` are loaded when first asked for. With `low_memory` they are not
    kept, so that there is one at a time, and images are decoded one by one in tiles.
    """

    def __init__(self, loaders: dict, preset: Preset, schedule: Schedule, downscale: int, zero_negative: bool,
                 dtype: torch.dtype, device: str, low_memory: bool):
        self.loaders, self.preset, self.schedule, self.downscale = loaders, preset, schedule, downscale
        self.zero_negative, self.low_memory = zero_negative, low_memory
        self.dtype, self.device = dtype, device

    def __getattr__(self, name: str) -> nn.Module:
        if name not in ("text", "unet", "vae"):
            raise AttributeError(name)
        network = self.loaders[name]()
        if not self.low_memory:
            setattr(self, name, network)
        return network

    @torch.inference_mode()
    def __call__(self, prompts: list[str], negative: str | None = None, steps: int | None = None,
                 guidance: float | None = None, seed: int | list[int] = 0, height: int | None = None,
                 width: int | None = None, progress: str | None = None) -> list[Image.Image]:
        """
        One RGB image for each prompt, from noise that a CPU generator with its seed draws.

        None stands for the model's preset, and for no negative prompt; height and width are in pixels.
        `progress` names a progress bar. Raises ValueError for words or sizes that the model lacks, for more
        or fewer seeds than prompts, and for images that are not finite.
        """
        steps = self.preset.steps if steps is None else steps
        guidance = self.preset.guidance if guidance is None else guidance
        seeds = [seed] * len(prompts) if isinstance(seed, int) else seed
        if not prompts or len(seeds) != len(prompts):
            raise ValueError(f"{len(prompts)} prompts, {len(seeds)} seeds: give one, or one for each prompt")
        conditions = self.encode(prompts, negative if guidance > 1 else None)
        latents = self.denoise(*conditions, steps, guidance, seeds, height, width, progress)
        if self.low_memory:
            latents = [torch.cat(latents)]                       # the VAE is loaded once
        return [image for latent in latents for image in self.decode(latent)]

    def encode(self, prompts: list[str], negative: str | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Text sequences (N, L, D) and pooled texts (N, P): of the prompts, then of the negative prompt."""
        text = self.text
        text.check(prompts + [negative] * bool(negative))
        context, pooled = text(prompts)
        if negative is None and self.zero_negative:              # SDXL's force_zeros_for_empty_prompt
            return context, pooled, torch.zeros_like(context), torch.zeros_like(pooled)
        context_0, pooled_0 = text([negative or ""])
        return context, pooled, context_0.expand_as(context), pooled_0.expand_as(pooled)

    def denoise(self, context: Tensor, pooled: Tensor, context_0: Tensor, pooled_0: Tensor, steps: int,
                guidance: float, seeds: list[int], height: int | None, width: int | None,
                progress: str | None) -> list[Tensor]:
        """Latents of all images, in batches of about a megapixel, (B, 4, H, W) each."""
        unet = self.unet
        height, width = (side or unet.config.sample_size * self.downscale for side in (height, width))
        if height % self.downscale or width % self.downscale:
            raise ValueError(f"{height} x {width} is not a multiple of {self.downscale}, this VAE's factor")
        reads, given = (unet.config.context_dim, unet.config.pooled_dim), (context.shape[2], pooled.shape[1])
        if reads != given:
            raise ValueError(f"the U-Net reads texts of widths {reads}, and the text encoders give {given}: "
                             f"it belongs to another --model")
        shape = (unet.config.in_channels, height // self.downscale, width // self.downscale)
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        noise = torch.stack([torch.randn(shape, generator=generator) for generator in generators])
        batch = max(1, min(32, 2**20 // (height * width)))
        batches = range(0, len(seeds), batch)
        dtype, guided, latents = next(unet.parameters()).dtype, guidance > 1, []
        with tqdm(total=len(batches) * steps, desc=progress, unit="step", disable=progress is None) as bar:
            for i in batches:
                x = noise[i:i + batch].to(self.device)
                c, p = context[i:i + batch].to(dtype), pooled[i:i + batch].to(dtype)
                if guided:                       # both halves in one batch
                    c = torch.cat([context_0[i:i + batch].to(dtype), c])
                    p = torch.cat([pooled_0[i:i + batch].to(dtype), p])
                # Original size, crop, target size: an image of this size, from its top left corner.
                time_ids = torch.tensor([[height, width, 0, 0, height, width]] * len(c), device=self.device)

                def predict(x: Tensor, t: float) -> Tensor:
                    bar.update()
                    x = torch.cat([x, x] if guided else [x]).to(dtype)
                    out = unet(x, torch.full((len(x),), t, device=x.device), c, p, time_ids).float()
                    return guide(out, guidance) if guided else out

                latents.append(euler(predict, x, self.schedule, steps))
        return latents

    def decode(self, latents: Tensor) -> list[Image.Image]:
        """Images of scaled latents (B, 4, H, W)."""
        vae = self.vae
        latents = (latents / vae.config.scaling_factor).to(next(vae.parameters()).dtype)
        with torch.autocast(self.device.split(":")[0], enabled=False):  # the VAE's own type, in training too
            if self.low_memory:
                pixels = torch.cat([decode_tiled(vae, latent[None]) for latent in latents])
            else:
                pixels = vae.decode(latents)
        if not pixels.isfinite().all():
            raise ValueError("the image is not finite: use --precision fp32, or check the U-Net's weights")
        pixels = (pixels.float() / 2 + 0.5).clamp(0, 1) * 255    # (B, 3, H, W)
        return [Image.fromarray(image) for image in pixels.round().byte().permute(0, 2, 3, 1).cpu().numpy()]


def decode_tiled(vae: model.VAE, latent: Tensor, tile: int = 64, overlap: int = 16) -> Tensor:
    """An image (1, 3, 8H, 8W) of a latent (1, 4, H, W), by tiles that fade into each other."""
    scale, (H, W) = vae.config.downscale, latent.shape[2:]
    if max(H, W) <= tile:
        return vae.decode(latent)
    image = torch.zeros(1, 3, H * scale, W * scale, device=latent.device)
    total = torch.zeros_like(image[:, :1])
    starts = lambda size: [*range(0, max(size - tile, 0), tile - overlap), max(size - tile, 0)]
    for y in starts(H):
        for x in starts(W):
            pixels = vae.decode(latent[:, :, y:y + tile, x:x + tile]).float()
            h, w = pixels.shape[2:]
            fade = [torch.arange(1, n + 1, device=latent.device).clamp(max=overlap * scale) for n in (h, w)]
            down, across = (torch.minimum(up, up.flip(0)).float() for up in fade)
            weight = down[:, None] * across                      # (h, w)
            area = (..., slice(y * scale, y * scale + h), slice(x * scale, x * scale + w))
            image[area] += pixels * weight
            total[area] += weight
    return image / total


BUNDLE = [  # what a pipeline reads beside the U-Net, and other names that it may have
    ["model_index.json"],
    ["scheduler/scheduler_config.json"],
    ["tokenizer/vocab.json"], ["tokenizer/merges.txt"], ["tokenizer/tokenizer_config.json"],
    ["tokenizer_2/vocab.json"], ["tokenizer_2/merges.txt"], ["tokenizer_2/tokenizer_config.json"],
    ["text_encoder/config.json"],
    ["text_encoder/model.safetensors", "text_encoder/model.fp16.safetensors"],
    ["text_encoder_2/config.json"],
    ["text_encoder_2/model.safetensors", "text_encoder_2/model.fp16.safetensors"],
    ["vae/config.json"], [f"vae/{WEIGHTS}.safetensors", f"vae/{WEIGHTS}.fp16.safetensors"],
]


def usable(device: str | None) -> str:
    """The device, or if none is given a GPU if there is one. Raises ValueError if it cannot be used."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        if torch.device(device).type not in ("cpu", "cuda", "mps"):
            raise RuntimeError("use cpu, cuda or mps")
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:              # one of them, as torch was built
        raise ValueError(f"the device {device} cannot be used: {one_line(error)}") from None
    return device


def dtype_of(precision: str | None, device: str, on_gpu: str = "fp16") -> torch.dtype:
    """The type of a key of PRECISIONS; if none is given, `on_gpu` on a GPU and float32 elsewhere."""
    return getattr(torch, PRECISIONS[precision or (on_gpu if device.startswith("cuda") else "fp32")])


def load_pipeline(name: str, unet: str | Path | None = None, dtype: torch.dtype | None = None,
                  device: str | None = None, low_memory: bool = False, compile: bool = False) -> Pipeline:
    """
    The pipeline of a preset's name, a hub id or a folder in the official layout.

    `unet` is a folder or hub id to take the U-Net from instead; `dtype` None is float16 on a GPU and float32
    elsewhere. Raises FileNotFoundError or ValueError, whose one line says what is wrong and what to do.
    """
    chosen = preset(name)
    device = usable(device)
    dtype = dtype or dtype_of(None, device)
    # Weights are looked for when they are loaded.
    found = {file: files.find(chosen.source, file) for file, *half in BUNDLE if not half}
    if missing := [file for file, path in found.items() if path is None]:
        more = ", ..." if len(missing) > 3 else ""
        raise FileNotFoundError(f"no {', '.join(missing[:3])}{more} in {files.described(chosen.source)}")

    def load_unet() -> model.UNet:
        source = preset(str(unet)).source if unet else chosen.source
        network = model.load_unet(source, dtype, device).to(memory_format=torch.channels_last)
        if compile:
            network.compile()
        return network

    def load_vae() -> model.VAE:
        network = model.load_vae(chosen.source, torch.float32, device).to(memory_format=torch.channels_last)
        return network if network.config.force_upcast else network.to(dtype)

    pipeline = Pipeline(
        {"text": lambda: load_text(chosen.source, dtype).to(device), "unet": load_unet, "vae": load_vae},
        chosen, Schedule(files.read_json(found["scheduler/scheduler_config.json"]), chosen.spacing),
        downscale=model.read_config(model.VAE, chosen.source)[0].downscale,
        zero_negative=files.read_json(found["model_index.json"]).get("force_zeros_for_empty_prompt", True),
        dtype=dtype, device=device, low_memory=low_memory)
    if not low_memory:
        for network in pipeline.loaders:                         # whatever is wrong with one is told now
            getattr(pipeline, network)
    return pipeline


# ------------------------------------------------------------------------------------------------------------
# The program


def restart_peak(device: str):
    """Begins anew what `peak_memory` tells, where that is allowed."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")


def peak_memory(device: str) -> float:
    """GB at most since the restart: allocated on a GPU, or else of the whole process; nan if unknown."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device) / 1e9
    try:
        return 1024 * int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1e9
    except (OSError, TypeError):                                 # not Linux
        return math.nan


def main(args: argparse.Namespace):
    """Samples, writes the sheet with its settings, and tells what was used."""
    prompts = [prompt for prompt in args.prompt for _ in range(args.count)]
    seeds = [args.seed + i for _ in args.prompt for i in range(args.count)]
    device = usable(args.device)
    dtype = dtype_of(args.precision, device)
    precision = next(key for key in PRECISIONS if dtype_of(key, device) == dtype)
    height, width = args.height, args.width
    columns, settings = [], []
    for name in args.model:
        restart_peak(device)
        pipeline = load_pipeline(name, args.unet, dtype, device, args.low_memory, args.compile)
        start = time.perf_counter()
        images = pipeline(prompts, args.negative, args.steps, args.guidance, seeds, height, width, name)
        seconds = time.perf_counter() - start
        width, height = images[0].size                           # for all columns, as they share their noise
        used = {"model": [name], "steps": args.steps or pipeline.preset.steps,
                "guidance": args.guidance or pipeline.preset.guidance, "height": height, "width": width,
                "precision": precision, "device": device}
        print(f"{name}: {len(images)} image(s), {width} x {height}, {used['steps']} steps, "
              f"guidance {used['guidance']:g}, {pipeline.schedule.spacing}, seed {args.seed}, "
              f"{used['precision']}: {seconds:.1f} s, peak {peak_memory(device):.2f} GB")
        columns.append(images)
        settings.append({key: value for key, value in (vars(args) | used).items() if key != "out"})
        del pipeline                                             # before the next is loaded
    text = PngImagePlugin.PngInfo()
    text.add_text("settings", json.dumps(settings))
    if len(columns) == 1:
        rows = [images[i:i + args.count] for i in range(0, len(images), args.count)]
    else:
        rows = [list(row) for row in zip(*columns)]
    files.write(args.out, lambda path: sheet(rows).save(path, pnginfo=text))
    print(args.out)


if __name__ == "__main__":
    program(lambda: main(ARGS), "lower --height and --width, or use --low-memory or --precision fp16")
