"""
What the command lines share: presets, kinds of arguments, devices, and one line for an expected error.
"""

import argparse
import math
import multiprocessing
import os
import re
import sys
import tempfile
from difflib import get_close_matches
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
    "sd20": Preset("stabilityai/stable-diffusion-2", sampler="ddim"),  # as in Figures 10 to 13
    "sd20-base": Preset("stabilityai/stable-diffusion-2-base", sampler="ddim"),
    "sd21": Preset("stabilityai/stable-diffusion-2-1", sampler="ddim"),
    "bk-base": Preset("nota-ai/bk-sdm-base"),
    "bk-small": Preset("nota-ai/bk-sdm-small"),
    "bk-tiny": Preset("nota-ai/bk-sdm-tiny"),
}
SPACINGS, SAMPLERS = ("linspace", "leading", "trailing"), ("euler", "ddim", "dpm")


def preset(name: str | Path) -> Preset:
    """
    The preset with this name, hub id or folder; all others are sampled as SDXL is.

    A folder may have a preset.json, as distill.py leaves it: a student is sampled as its teacher is.
    """
    for key, known in PRESETS.items():
        if name == key or Path(name).resolve() == Path(known.source).resolve():
            return known
    path = Path(name, "preset.json")
    if not path.is_file():
        return Preset(str(name))
    entries = read_json(path)
    try:
        own = Preset(str(name), **entries)
        valid = (own.steps in range(1, 1001) and 1 <= own.guidance < 1e9 and own.spacing in (None, *SPACINGS)
                 and own.sampler in SAMPLERS)
    except TypeError:
        valid = False
    if not valid:
        raise ValueError(f"{path} has not the steps, guidance, spacing and sampler of a preset; remove it")
    return own._replace(steps=int(own.steps), guidance=float(own.guidance))


def model_name(text: str, words: tuple[str, ...] = ()) -> str:
    """A type for argparse: a preset's name, a folder, what looks like a hub id, or one of `words`."""
    names = [*words, *PRESETS]
    if text not in names and "/" not in text and not os.path.exists(text):
        nearest = "".join(f"; did you mean {name}?" for name in get_close_matches(text.lower(), names, 1))
        raise argparse.ArgumentTypeError(
            f"{text!r} is neither {', '.join(names)}, nor a folder, nor a hub id{nearest}")
    return text


# ------------------------------------------------------------------------------------------------------------
# Arguments


def number(kind: type, low: float, high: float = math.inf, multiple: int = 1):
    """A type for argparse: a finite number within bounds, and a multiple of something."""
    def parse(text: str):
        value = kind(text)
        if not (low <= value <= high and value < math.inf):
            bounds = f"of at least {low}" if high == math.inf else f"between {low} and {high}"
            raise argparse.ArgumentTypeError(f"{text} is not a finite number {bounds}")
        if kind is int and value % multiple:
            below = value - value % multiple
            near = f"{below} or {below + multiple}"
            raise argparse.ArgumentTypeError(f"{text} is not a multiple of {multiple}; the nearest: {near}")
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
    if name.suffix != ".png" or name.is_dir():
        raise argparse.ArgumentTypeError(f"{text} is not the name of a .png file")
    try:
        tempfile.TemporaryFile(dir=name.parent).close()
    except OSError as error:
        raise argparse.ArgumentTypeError(f"the folder {name.parent} cannot be written ({error.strerror})")
    return name


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Shows defaults as [default], unless there is none or the help names it."""

    def _get_help_string(self, action: argparse.Action) -> str:
        no_default = action.default is None or action.default is False  # but 0 is one
        if no_default or action.default == argparse.SUPPRESS or "[" in action.help:
            return action.help
        return f"{action.help} [%(default)s]"


class ArgumentParser(argparse.ArgumentParser):
    """Reports a mistake in one line, and takes no abbreviations; -OO leaves it without a description."""

    def __init__(self, description: str, usage: str = "%(prog)s [options]", **options):
        super().__init__(usage=usage, description=(description or "").strip(), formatter_class=HelpFormatter,
                         allow_abbrev=False, **options)

    def parse_known_args(self, args=None, namespace=None):
        for text in sys.argv[1:] if args is None else args:
            if re.search("[\ud800-\udfff]", text):               # stand-ins for bytes that are not
                self.error(f"{ascii(text)} is not UTF-8")
        return super().parse_known_args(args, namespace)

    def error(self, message: str):
        self.exit(2, f"error: {message} (see --help)\n")


# ------------------------------------------------------------------------------------------------------------
# Devices


PRECISIONS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def resolve_device(device: str | None) -> str:
    """The device; None is a GPU if there is one, or else the CPU. Raises ValueError if it cannot be used."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        if torch.device(device).type not in ("cpu", "cuda", "mps"):
            raise RuntimeError("use cpu, cuda or mps")
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # which of the two depends on the build of torch
        raise ValueError(f"the device {device} cannot be used: {error_summary(error)}") from None
    return device


def resolve_dtype(precision: str | None, device: str, on_gpu: str = "fp16") -> torch.dtype:
    """The dtype of a key of PRECISIONS; None is `on_gpu` on a GPU and float32 elsewhere."""
    return PRECISIONS[precision or (on_gpu if device.startswith("cuda") else "fp32")]


def reset_peak_memory(device: str):
    """Starts a new measurement for `peak_memory`."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(device)
    elif os.access("/proc/self/clear_refs", os.W_OK):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory(device: str) -> float:
    """Peak GB since `reset_peak_memory`: allocated on a GPU, or else of the whole process; nan if unknown."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device) / 1e9
    if not os.access("/proc/self/status", os.R_OK):
        return math.nan
    found = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())
    return 1024 * int(found[1]) / 1e9 if found else math.nan


# ------------------------------------------------------------------------------------------------------------
# Errors


OUT_OF_MEMORY = "alloc|out of memory|could not create a primitive"  # PyTorch says it so; oneDNN is the last


def run(main: Callable[[], int | None], out_of_memory: str):
    """Runs a program and exits. What the outside world got wrong is one line; `out_of_memory` is advice."""
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
    except (OSError, ValueError, FloatingPointError) as error:
        message = error_summary(error)
        if str(TOY) in message:
            message += "; git checkout toy restores it, and toy/README.md says how it is made"
    except (MemoryError, RuntimeError) as error:
        # A worker may have been killed for memory too.
        if "DataLoader worker" in str(error):
            message = f"{error_summary(error)}; rerun the same command to resume, or use --workers 0"
        elif isinstance(error, MemoryError) or re.search(OUT_OF_MEMORY, str(error), re.I):
            message = f"out of memory; {out_of_memory}"
        elif "torch._dynamo" in f"{type(error).__mro__}":        # which is slow to import
            message = f"--compile: {error_summary(error)}; leave it out"
        else:
            raise
    finally:
        for reader in multiprocessing.active_children():         # Python would wait for it, and it ignores SIGTERM
            reader.kill()
    sys.exit("error: " + re.sub(r"[\x00-\x1f\x7f-\x9f]", "?", message))  # names in files may have escapes
