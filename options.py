"""
What the command lines share: names of models, numbers within bounds, one line for a mistake.

Nothing heavy is imported here, so that a slip is told at once.
"""

import argparse
import json
import math
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple


class Preset(NamedTuple):
    """Where a model is, and how its makers sample it."""

    source: str
    steps: int = 25
    guidance: float = 7.5
    spacing: str | None = None  # of the timesteps; None: as the model's scheduler_config.json says


PRESETS = {
    "toy": Preset(str(Path(__file__).parent / "toy" / "checkpoint"), guidance=1.75),
    "sdxl": Preset("stabilityai/stable-diffusion-xl-base-1.0"),
    "1b": Preset("etri-vilab/koala-1b"),
    "700m": Preset("etri-vilab/koala-700m"),
    "1b-llava-cap": Preset("etri-vilab/koala-1b-llava-cap"),
    "700m-llava-cap": Preset("etri-vilab/koala-700m-llava-cap"),
    # The scheduler files of these say "leading"; their cards and demo set "trailing" by hand.
    "lightning-1b": Preset("etri-vilab/koala-lightning-1b", 10, 3.5, "trailing"),
    "lightning-700m": Preset("etri-vilab/koala-lightning-700m", 10, 3.5, "trailing"),
}


PRECISIONS = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}  # and their names in torch


def preset(name: str) -> Preset:
    """
    The preset of a name above, or of its hub id or folder. A folder may have a preset.json, as distill.py
    leaves it: a student is sampled as its teacher is. All others are sampled as SDXL is.
    """
    if name in PRESETS:
        return PRESETS[name]
    own = Path(name, "preset.json")
    if own.is_file():
        return Preset(str(name), **json.loads(own.read_text()))
    same = lambda source: source == str(name) or Path(source).resolve() == Path(name).resolve()
    return next((preset for preset in PRESETS.values() if same(preset.source)), Preset(str(name)))


def may_be_model(name: str) -> bool:
    """Whether it is a preset's name, a folder, or looks like a hub id."""
    return name in PRESETS or "/" in name or bool(name) and Path(name).is_dir()


def number(kind: type, low: float, high: float = math.inf, multiple: int = 1):
    """A type for argparse: a finite number within bounds, and a multiple of something."""
    def parse(text: str):
        value = kind(text)
        if not (low <= value <= high and value < math.inf):
            bounds = f"finite and at least {low}" if high == math.inf else f"within {low} and {high}"
            raise argparse.ArgumentTypeError(f"{text} is not {bounds}")
        if kind is int and value % multiple:
            below = value - value % multiple
            near = " or ".join(str(size) for size in (below, below + multiple) if low <= size <= high)
            raise argparse.ArgumentTypeError(f"{text} is not a multiple of {multiple}; the nearest: {near}")
        return value
    parse.__name__ = "number"  # argparse says: invalid number value
    return parse


def parser_of(description: str) -> argparse.ArgumentParser:
    """A parser that shows defaults as [default], and tells a mistake in one line."""
    class Formatter(argparse.RawDescriptionHelpFormatter):
        def _get_help_string(self, action: argparse.Action) -> str:
            told = action.default in (None, False, argparse.SUPPRESS) or "[" in action.help
            return action.help if told else f"{action.help} [%(default)s]"
    parser = argparse.ArgumentParser(description=description, formatter_class=Formatter, allow_abbrev=False)
    parser.error = lambda message: parser.exit(2, f"error: {message} (see --help)\n")
    return parser


def check(parser: argparse.ArgumentParser, args: argparse.Namespace):
    """Ends the program unless each --model may be one, and the picture --out can be written."""
    for name in getattr(args, "model", []):
        if not may_be_model(name):
            parser.error(f"--model {name} is neither {', '.join(PRESETS)}, nor a folder, nor a hub id")
    if args.out.suffix != ".png" or args.out.is_dir():
        parser.error(f"--out {args.out} is not the name of a .png file")
    try:
        tempfile.TemporaryFile(dir=args.out.parent).close()
    except OSError as error:
        sys.exit(f"error: --out: nothing can be written in the folder {args.out.parent} ({error.strerror})")
