"""
Text to image with SDXL, KOALA, Stable Diffusion or the toy, with classifier-free guidance.

    python sample.py --prompt "a red circle left of a blue square"
    python sample.py --prompt "a red circle left of a blue square" --unet runs/toy-700m/unet
    python sample.py --prompt "A portrait of a koala, watercolor" --model sdxl 1b 700m --out columns.png

With several models, the picture has a column per model and a row per prompt and seed, each with the same
noise (Figures 10 to 16); with one, a row per prompt and a column per seed. The PNG stores the settings.
"""

import argparse
import itertools
import json
import math
import time
from pathlib import Path
from typing import Callable

import torch
from PIL import Image, PngImagePlugin
from torch import Tensor
from tqdm import tqdm

import model
from support.files import atomic_write
from support.hub import (
    PARTS, PRECISIONS, PRESETS, SAMPLERS, SPACINGS, ArgumentParser, Preset, local_folder, model_name,
    nonempty, number, peak_memory, png_path, preset, reset_peak_memory, resolve_device, resolve_dtype, run)
from support.plots import image_grid
from support.text import TextEncoders, encoder_names, load_text
from support.vae import VAE, VAEConfig, load_vae

# ------------------------------------------------------------------------------------------------------------
# Noise


class NoiseSchedule:
    """
    The noise of Stable Diffusion, z_t = alpha_t z + sigma_t noise for t = 0, ..., 999.

    alpha_t^2 is `alphas_cumprod`, and sigma_t^2 = 1 - alpha_t^2. Samplers use the sigma of Karras et al.
    (arXiv 2206.00364), written without t: sigma = sigma_t / alpha_t, in `sigmas`. Reads the
    scheduler_config.json of any sampler. Raises ValueError for unsupported noise.
    """

    def __init__(self, config: dict, spacing: str | None = None, sampler: str = "euler", device: str = "cpu"):
        name = str(config.get("_class_name"))
        if name.startswith(OTHER_NOISE):
            raise ValueError(f"scheduler_config.json has {name}, which is not supported")
        self.sampler, self.config = sampler, DEFAULTS | SAMPLER_DEFAULTS[sampler] | config
        self.check_entries(NOISE)
        start, end = self.config["beta_start"], self.config["beta_end"]
        betas = torch.linspace(start**0.5, end**0.5, 1000, dtype=torch.float64) ** 2
        self.alphas_cumprod = (1 - betas).cumprod(0)             # (1000,)
        self.sigmas = (1 / self.alphas_cumprod - 1).sqrt()       # (1000,)
        self.alpha_t = self.alphas_cumprod.sqrt().float().to(device)  # (1000,), where training reads them
        self.sigma_t = (1 - self.alphas_cumprod).sqrt().float().to(device)
        self.spacing = spacing or self.config["timestep_spacing"]
        self.prediction = self.config["prediction_type"]
        if self.spacing not in SPACINGS or self.prediction not in ("epsilon", "v_prediction"):
            raise ValueError(f"scheduler_config.json: timestep_spacing {self.spacing!r} or prediction_type "
                             f"{self.prediction!r} is not supported")
        self.last_sigma = 0.0 if self.config["set_alpha_to_one"] else self.sigmas[0].item()  # DDIM's

    def check_entries(self, supported: dict):
        """Raises ValueError for an entry that affects the result and is not implemented."""
        for name, value in supported.items():
            found = self.config.get(name, value)
            if (found or None) != (value or None):               # null, false and absent are the same
                raise ValueError(f"scheduler_config.json has {name}={found!r}, but {self.sampler} supports "
                                 f"only {value!r}: use another --sampler, or edit the file")

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """z_t of scaled latents z and noise, each (B, C, H, W), at integer timesteps (B,)."""
        alpha, sigma = self.alpha_t[timesteps, None, None, None], self.sigma_t[timesteps, None, None, None]
        return alpha * latents + sigma * noise

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What the network has to predict at z_t: the noise, or v of Salimans and Ho (arXiv 2202.00512)."""
        if self.prediction == "epsilon":
            return noise
        alpha, sigma = self.alpha_t[timesteps, None, None, None], self.sigma_t[timesteps, None, None, None]
        return alpha * noise - sigma * latents

    def timesteps(self, steps: int) -> list[float]:
        """The timesteps of `steps` network calls, noisiest first (Lin et al., arXiv 2305.08891, Table 2)."""
        points = steps + (self.sampler == "dpm")                 # DPM-Solver's last point is where it ends
        offset = self.config["steps_offset"]
        if self.spacing == "linspace":
            timesteps = torch.linspace(0, 999, points, dtype=torch.float64).flip(0).tolist()
        elif self.spacing == "leading":
            timesteps = [float(i * (1000 // points) + offset) for i in reversed(range(points))]
        else:  # trailing
            timesteps = [float(round(1000 - i * 1000 / steps) - 1) for i in range(steps)]
        if self.sampler != "euler":                              # only Euler uses fractional timesteps
            timesteps = [float(round(t)) for t in timesteps]
        return timesteps[:steps]

    def sigma_at(self, t: float) -> float:
        """sigma at timestep t, interpolated linearly; DDIM's last one if t is below 0."""
        if t < 0:
            return self.last_sigma
        low = min(int(t), 999)
        return torch.lerp(self.sigmas[low], self.sigmas[min(low + 1, 999)], t - low).item()

    def levels(self, steps: int) -> list[tuple[float, float, float]]:
        """
        For each network call: its timestep, its sigma, and the sigma after the step.

        Raises ValueError for an entry that this sampler reads but this code does not support.
        """
        self.check_entries(SAMPLER_ENTRIES[self.sampler])
        timesteps = self.timesteps(steps)
        sigmas = [self.sigma_at(t) for t in timesteps]
        following = sigmas[1:] + [0.0]
        if self.sampler == "ddim":
            following = [self.sigma_at(t - 1000 // steps) for t in timesteps]
        if self.sampler == "dpm" and any(sigma == next_sigma for sigma, next_sigma in zip(sigmas, following)):
            raise ValueError(f"DPM-Solver cannot take {steps} steps of {self.spacing} timesteps: give fewer")
        return list(zip(timesteps, sigmas, following))

    def init_noise_std(self, sigma: float) -> float:
        """Standard deviation of the first z_t, as in diffusers: sigma_t for Euler, but 1 for "leading"."""
        if self.sampler == "euler" and self.spacing != "leading":
            return sigma / math.sqrt(sigma**2 + 1)
        return 1.0


def sample_latents(predict: Callable[[Tensor, float], Tensor], noise: Tensor, schedule: NoiseSchedule,
                   steps: int) -> Tensor:
    """
    Denoises unit-variance noise (B, C, H, W) to latents z, with `schedule.sampler`.

    `predict(z_t, t)` is the network. Its prediction gives the noise eps in z_t and the clean latents z. A
    step to s mixes them again, with less noise: z_s = alpha_s z + sigma_s eps. For
    x = z_t / alpha_t = z + sigma * eps, this is Euler's method: x + (next_sigma - sigma) * eps (Karras et
    al., Algorithm 1 without churn). DDIM (Song et al., arXiv 2010.02502, eta 0) differs only in its end
    point. DPM-Solver++ (Lu et al., arXiv 2211.01095, Algorithm 2) also extrapolates z from the previous step.
    Sigmas are Python floats, so nothing here waits for the device.
    """
    levels = schedule.levels(steps)
    z_t = noise * schedule.init_noise_std(levels[0][1])
    before = None                                                # z and sigma of the step before
    for t, sigma, next_sigma in levels:
        alpha = 1 / math.sqrt(sigma**2 + 1)                      # as alpha_t^2 + sigma_t^2 = 1
        prediction = predict(z_t, t)
        if schedule.prediction == "epsilon":
            eps = prediction
            z = z_t / alpha - sigma * eps
        else:                                                    # v = alpha_t eps - sigma_t z
            eps = alpha * (prediction + sigma * z_t)
            z = alpha * (z_t - sigma * prediction)
        z_s = z
        if schedule.sampler == "dpm" and before and next_sigma:
            z_before, sigma_before = before
            ratio = math.log(sigma / next_sigma) / math.log(sigma_before / sigma)  # of the steps' lengths
            z_s = z + (1 - next_sigma / sigma) * ratio / 2 * (z - z_before)
        z_t = (z_s + next_sigma * eps) / math.sqrt(next_sigma**2 + 1)
        before = z, sigma
    return z_t


def guide(prediction: Tensor, guidance: float) -> Tensor:
    """Classifier-free guidance (Ho and Salimans, arXiv 2207.12598); the unconditional half comes first."""
    uncond, cond = prediction.chunk(2)
    return uncond + guidance * (cond - uncond)


# ------------------------------------------------------------------------------------------------------------
# Scheduler files


# The only values that this code supports for these entries, grouped by what reads them.
NOISE = {"num_train_timesteps": 1000, "beta_schedule": "scaled_linear", "trained_betas": None,
         "rescale_betas_zero_snr": False}
SIGMAS = {"use_karras_sigmas": False, "use_exponential_sigmas": False, "use_beta_sigmas": False,
          "final_sigmas_type": "zero"}
SAMPLER_ENTRIES = {
    "euler": SIGMAS | {"interpolation_type": "linear", "timestep_type": "discrete", "sigma_min": None,
                       "sigma_max": None},
    "ddim": {"clip_sample": False, "thresholding": False},
    "dpm": SIGMAS | {"algorithm_type": "dpmsolver++", "solver_order": 2, "solver_type": "midpoint",
                     "thresholding": False, "lower_order_final": True, "euler_at_final": False,
                     "use_lu_lambdas": False, "use_flow_sigmas": False, "variance_type": None}}
# diffusers' defaults for entries that a file lacks, where they differ from the values above.
DEFAULTS = {"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02, "prediction_type": "epsilon",
            "steps_offset": 0, "set_alpha_to_one": True}
SAMPLER_DEFAULTS = {"euler": {"timestep_spacing": "linspace"}, "dpm": {"timestep_spacing": "linspace"},
                    "ddim": {"timestep_spacing": "leading", "clip_sample": True}}
OTHER_NOISE = ("EDM", "FlowMatch", "LCM", "TCD")  # schedulers of models with another noise, or other steps


# ------------------------------------------------------------------------------------------------------------
# Pipeline


def images_at_once(pixels: int) -> int:
    """How many images of `pixels` pixels to run at once: about a megapixel, to save memory."""
    return max(1, min(16, 2**20 // pixels))                      # more small ones are slower on a CPU


class Pipeline:
    """
    Prompts in, images out; made by `load_pipeline`.

    `text`, `unet` and `vae` are its networks. With `low_memory` they are None: each is loaded when needed and
    dropped after use, and images are decoded one by one, in tiles.
    """

    def __init__(self, folder: Path, unet_folder: Path, vae_folder: Path, preset: Preset, dtype: torch.dtype,
                 device: str, low_memory: bool = False):
        self.folder, self.unet_folder, self.preset = folder, unet_folder, preset
        self.vae_folder = model.part_folder(vae_folder, "vae")
        self.dtype, self.device, self.low_memory = dtype, device, low_memory
        if not (folder / "model_index.json").exists() and (folder / "unet").exists():
            raise FileNotFoundError(f"{folder} is not a complete model; for an unfinished run, give its "
                                    f"teacher as --model, and --unet {folder / 'unet'}")
        index = model.read_json(folder / "model_index.json")
        # Without a negative prompt, SDXL uses zeros, and Stable Diffusion 1 and 2 the empty text.
        self.zero_negative = index.get("force_zeros_for_empty_prompt", len(encoder_names(folder)) > 1)
        scheduler = model.read_json(folder / "scheduler" / "scheduler_config.json")
        if len(encoder_names(folder)) == 1:                      # whatever the file says, as in diffusers
            scheduler |= {"steps_offset": 1, "clip_sample": False}
        self.schedule = NoiseSchedule(scheduler, preset.spacing, preset.sampler, device)
        self.vae_config = model.read_json(self.vae_folder / "config.json", VAEConfig.from_diffusers)
        if vae_folder != folder and (folder / "vae").exists():
            own = model.read_json(folder / "vae" / "config.json", VAEConfig.from_diffusers)
            if own.scaling_factor != self.vae_config.scaling_factor:
                raise ValueError(f"--vae: its scaling_factor {self.vae_config.scaling_factor} is not the "
                                 f"model's {own.scaling_factor}: it is for other latents")
        self.text = self.unet = self.vae = None
        if not low_memory:
            self.text, self.unet, self.vae = self.load_text(), self.load_unet(), self.load_vae()

    def load_text(self) -> TextEncoders:
        return load_text(self.folder, self.dtype, self.device)

    def load_unet(self) -> model.UNet:
        unet = model.load_unet(self.unet_folder, self.dtype, self.device)
        return unet.to(memory_format=torch.channels_last)

    def load_vae(self) -> VAE:
        dtype = torch.float32 if self.vae_config.force_upcast else self.dtype
        if dtype == torch.bfloat16 and self.device.startswith("cuda"):
            dtype = torch.float16                                # ten times as precise, no overflow
        return load_vae(self.vae_folder, dtype, self.device).to(memory_format=torch.channels_last)

    @torch.inference_mode()
    def __call__(self, prompts: list[str], negative: str | None = None, steps: int | None = None,
                 guidance: float | None = None, seed: int | list[int] = 0, height: int | None = None,
                 width: int | None = None, progress: str | None = None,
                 callback: Callable[[int], None] | None = None) -> list[Image.Image]:
        """
        One RGB image for each prompt, from noise drawn by a CPU generator with its seed.

        Steps, guidance and size default to the model's; height and width are in pixels; one seed serves all
        prompts. `progress` names a progress bar; `callback(i)` is called after network call i = 0, 1, ...
        Raises ValueError for words or sizes that the model does not support, for a wrong number of seeds, and
        for images that are not finite.
        """
        steps = self.preset.steps if steps is None else steps
        guidance = self.preset.guidance if guidance is None else guidance
        seeds = [seed] * len(prompts) if isinstance(seed, int) else seed
        if not prompts or len(seeds) != len(prompts):
            raise ValueError(f"{len(prompts)} prompts, {len(seeds)} seeds: give one, or one for each prompt")
        text = self.text or self.load_text()
        conditions = self.encode(text, prompts, negative, guidance)
        del text                                                 # with `low_memory`, before the next loads
        unet = self.unet or self.load_unet()
        latents = self.denoise(unet, conditions, steps, guidance, seeds, height, width, progress, callback)
        del unet
        return self.decode(self.vae or self.load_vae(), latents)

    def encode(self, text: TextEncoders, prompts: list[str], negative: str | None,
               guidance: float) -> tuple[Tensor, Tensor]:
        """
        Encodes prompts to text sequences (N, L, D) and pooled texts (N, P); with guidance to 2N rows each,
        N unconditional and then N conditional.
        """
        text.warn_of_cuts(prompts + ([negative] if negative else []))
        cond = text(prompts)
        if guidance <= 1:
            return cond
        if negative is None and self.zero_negative:
            uncond = [torch.zeros_like(part) for part in cond]
        else:
            uncond = [part.expand(len(prompts), *part.shape[1:]) for part in text([negative or ""])]
        return torch.cat([uncond[0], cond[0]]), torch.cat([uncond[1], cond[1]])

    def denoise(self, unet: model.UNet, conditions: tuple[Tensor, Tensor], steps: int, guidance: float,
                seeds: list[int], height: int | None, width: int | None, progress: str | None,
                callback: Callable[[int], None] | None) -> Tensor:
        """Scaled latents (N, 4, H, W) of all images, made in batches of about a megapixel."""
        downscale, config, dtype = self.vae_config.downscale, unet.config, next(unet.parameters()).dtype
        height, width = (side or config.sample_size * downscale for side in (height, width))
        if height % downscale or width % downscale:
            raise ValueError(f"{height} x {width} is not a multiple of {downscale}, this VAE's factor")
        context, pooled = (part.to(dtype) for part in conditions)
        widths, channels = (context.shape[2], pooled.shape[1]), self.vae_config.latent_channels
        if (config.context_dim, config.pooled_dim) != widths or config.in_channels != channels:
            raise ValueError(f"the U-Net is of another model: it reads texts of widths {config.context_dim}, "
                             f"{config.pooled_dim} and latents of {config.in_channels} channels, but gets "
                             f"{widths} and {channels}")
        shape = (config.in_channels, height // downscale, width // downscale)
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        noise = torch.stack([torch.randn(shape, generator=generator) for generator in generators])
        batches = torch.arange(len(seeds)).split(images_at_once(height * width))
        bar = tqdm(total=len(batches) * steps, desc=progress, unit="step", disable=progress is None)
        calls, latents = itertools.count(), []
        guided = guidance > 1
        for batch in batches:
            # With guidance, the unconditional and the conditional row of each image.
            rows = torch.cat([batch, len(seeds) + batch]) if guided else batch
            c, p = context[rows], pooled[rows]
            # Original size, crop and target size: the whole image, uncropped.
            time_ids = torch.tensor([[height, width, 0, 0, height, width]] * len(rows), device=self.device)

            def predict(z_t: Tensor, t: float) -> Tensor:
                z_t = torch.cat([z_t, z_t]).to(dtype) if guided else z_t.to(dtype)
                # `t` itself would be copied to the device, and the host would wait for it.
                timestep = torch.full((len(z_t),), t, device=z_t.device)
                prediction = unet(z_t, timestep, c, p, time_ids).float()
                if callback:
                    callback(next(calls))
                bar.update()
                return guide(prediction, guidance) if guided else prediction

            latents.append(sample_latents(predict, noise[batch].to(self.device), self.schedule, steps))
        bar.close()
        return torch.cat(latents)

    def decode(self, vae: VAE, latents: Tensor) -> list[Image.Image]:
        """Decodes scaled latents (N, 4, H, W) in batches as in `denoise`, or in tiles with `low_memory`."""
        latents = (latents / vae.config.scaling_factor).to(next(vae.parameters()).dtype)
        batch = 1 if self.low_memory else images_at_once(latents[0, 0].numel() * vae.config.downscale**2)
        images = []
        for part in latents.split(batch):
            with torch.autocast(self.device.split(":")[0], enabled=False):  # previews enable it
                pixels = vae.decode_tiled(part) if self.low_memory else vae.decode(part)
            if not pixels.isfinite().all():
                raise ValueError("the image is not finite: use --precision fp32, or check the weights")
            pixels = ((pixels.float() / 2 + 0.5).clamp(0, 1) * 255).round().byte()
            images += [Image.fromarray(image) for image in pixels.permute(0, 2, 3, 1).cpu().numpy()]
        return images


def load_pipeline(name: str | Path, unet: str | Path | None = None, dtype: torch.dtype | None = None,
                  device: str | None = None, low_memory: bool = False, vae: str | Path | None = None,
                  sampler: str | None = None, spacing: str | None = None) -> Pipeline:
    """
    The pipeline of a preset's name, a hub id or a folder in the official layout.

    `unet` and `vae`, each a folder, hub id or name, replace these networks. `dtype` defaults to float16 on a
    GPU and float32 elsewhere, `sampler` and `spacing` to the preset's. Raises FileNotFoundError or
    ValueError, one line that says what is wrong and what to do.
    """
    device = resolve_device(device)
    dtype = dtype or resolve_dtype(None, device)
    chosen, half = preset(name), dtype in model.HALF
    chosen = chosen._replace(sampler=sampler or chosen.sampler, spacing=spacing or chosen.spacing)
    unet = preset(unet).unet if unet else chosen.student
    vae = preset(vae).source if vae else None
    others = {"unet": unet, "vae": vae}
    folder = local_folder(chosen.source, tuple(part for part in PARTS if not others.get(part)), half)
    unet_folder = local_folder(unet, ("unet",), half) if unet else folder
    vae_folder = local_folder(vae, ("vae",), half) if vae else folder
    if vae:
        local_folder(chosen.source, ("vae",), weights=False)     # its config, for Pipeline to compare
    return Pipeline(folder, unet_folder, vae_folder, chosen, dtype, device, low_memory)


# ------------------------------------------------------------------------------------------------------------
# The program


def main(argv: list[str] | None = None):
    args = parse_args(argv)
    prompts = [prompt for prompt in args.prompt for _ in range(args.count)]
    seeds = [args.seed + i for _ in args.prompt for i in range(args.count)]
    device = resolve_device(args.device)
    dtype = resolve_dtype(args.precision, device)
    precision = next(name for name in PRECISIONS if PRECISIONS[name] == dtype)
    columns, settings = [], []
    for name in args.model:
        reset_peak_memory(device)
        pipeline = load_pipeline(name, args.unet, dtype, device, args.low_memory, args.vae, args.sampler,
                                 args.spacing)
        steps = args.steps or pipeline.preset.steps
        guidance = pipeline.preset.guidance if args.guidance is None else args.guidance
        start = time.perf_counter()
        images = pipeline(prompts, args.negative, steps, guidance, seeds, args.height, args.width,
                          progress=name)
        seconds, peak = time.perf_counter() - start, peak_memory(device)
        args.width, args.height = images[0].size                 # for all columns, as they share their noise
        used = {"model": [name], "steps": steps, "guidance": guidance, "sampler": pipeline.schedule.sampler,
                "spacing": pipeline.schedule.spacing, "precision": precision, "device": device}
        print(f"{name}: {len(images)} image(s), {args.width} x {args.height}, {steps} steps, guidance "
              f"{guidance:g}, {used['sampler']}, {used['spacing']}, seed {args.seed}, {precision}: "
              f"{seconds:.1f} s with warm-up" + (f", peak {peak:.2f} GB" if math.isfinite(peak) else ""))
        columns.append(images)
        settings.append({flag: value for flag, value in (vars(args) | used).items() if flag != "out"})
        del pipeline                                             # before the next is loaded
    if len(columns) == 1:
        images, = columns
        rows = [images[i:i + args.count] for i in range(0, len(images), args.count)]
    else:
        rows = [list(row) for row in zip(*columns)]
    text = PngImagePlugin.PngInfo()
    text.add_text("settings", json.dumps(settings))
    atomic_write(args.out, lambda path: image_grid(rows).save(path, pnginfo=text))
    print(args.out)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = ArgumentParser(__doc__, "%(prog)s --prompt TEXT [options]")
    size = number(int, 8, 8192, multiple=8)
    add = parser.add_argument
    add("--prompt", type=nonempty, nargs="+", required=True, metavar="TEXT", help="one row each")
    add("--model", type=model_name, nargs="+", default=["toy"], metavar="NAME",
        help=f"{', '.join(PRESETS)}, a hub id or a folder; one column each [toy]")
    add("--unet", type=model_name, metavar="FOLDER", help="take the U-Net from here")
    add("--vae", type=model_name, metavar="FOLDER", help="take the VAE from here")
    add("--negative", metavar="TEXT", help="negative prompt")
    add("--steps", type=number(int, 1, 1000), metavar="N", help="denoising steps [the model's preset]")
    add("--sampler", choices=SAMPLERS, help="dpm is DPM-Solver++(2M) [the model's preset]")
    add("--spacing", choices=SPACINGS, help="timestep spacing [the model's preset or scheduler file]")
    add("--guidance", type=number(float, 0), metavar="X", help="scale; <= 1: off [the model's preset]")
    add("--seed", type=number(int, 0, 2**63 - 1), default=0, metavar="N", help="seed of the noise")
    add("--count", type=number(int, 1, 1000), default=1, metavar="N",
        help="images per prompt (seeds seed, seed+1, ...)")
    add("--height", type=size, metavar="N", help="in pixels [the first model's own]")
    add("--width", type=size, metavar="N", help="in pixels [the first model's own]")
    add("--precision", choices=list(PRECISIONS), help="[fp16 on a GPU, fp32 elsewhere]")
    add("--device", type=nonempty, help="[a GPU if there is one]")
    add("--low-memory", action="store_true", help="hold one network at a time, decode in tiles")
    add("--out", type=png_path, default="sample.png", metavar="PNG", help="the picture to write")
    args = parser.parse_args(argv)
    if args.unet and len(args.model) > 1:
        parser.error("--unet is for one --model")
    return args


if __name__ == "__main__":
    run(main, "lower --height and --width, or use --low-memory or --precision fp16")
