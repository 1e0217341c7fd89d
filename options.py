"""
What the command lines share: names of models, numbers within bounds, one line for a mistake.

Nothing heavy is imported here, so that a mistake is reported at once.
"""

import argparse
import json
import math
import os
import re
import shutil
import signal
import sys
import tempfile
from pathlib import Path
from typing import Callable, NamedTuple


class Preset(NamedTuple):
    """Where a model is, and how its makers sample it."""

    source: str
    steps: int = 25
    guidance: float = 7.5
    spacing: str | None = None  # of the timesteps; None: as the model's scheduler_config.json says


PRESETS = {
    "toy": Preset(str(Path(__file__).parent / "toy" / "checkpoint"), guidance=1.5),
    "sdxl": Preset("stabilityai/stable-diffusion-xl-base-1.0"),
    "1b": Preset("etri-vilab/koala-1b"),
    "700m": Preset("etri-vilab/koala-700m"),
    "1b-llava-cap": Preset("etri-vilab/koala-1b-llava-cap"),
    "700m-llava-cap": Preset("etri-vilab/koala-700m-llava-cap"),
    # The scheduler files of these say "leading"; their cards and demo set "trailing" by hand.
    "lightning-1b": Preset("etri-vilab/koala-lightning-1b", 10, 3.5, "trailing"),
    "lightning-700m": Preset("etri-vilab/koala-lightning-700m", 10, 3.5, "trailing"),
}


SPACINGS = ("linspace", "leading", "trailing")
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
        try:
            found = Preset(str(name), **json.loads(own.read_text()))
            known = found.spacing in (None, *SPACINGS)
            if not (known and found.steps in range(1, 1001) and 1 <= found.guidance < math.inf):
                raise ValueError("steps, guidance or spacing out of range")
            return found._replace(steps=int(found.steps), guidance=float(found.guidance))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{own} is not a preset, remove it or make it anew ({error})") from None
    same = lambda source: source == str(name) or Path(source).resolve() == Path(name).resolve()
    return next((preset for preset in PRESETS.values() if same(preset.source)), Preset(str(name)))


def may_be_model(name: str) -> bool:
    """Whether it is a preset's name, a folder, or looks like a hub id."""
    return name in PRESETS or "/" in name or os.path.isdir(name)


def number(kind: type, low: float, high: float = math.inf, multiple: int = 1):
    """A type for argparse: a finite number within bounds, and a multiple of something."""
    def parse(text: str):
        value = kind(text)
        if not (low <= value <= high and value < math.inf):
            bounds = f"finite and at least {low}" if high == math.inf else f"between {low} and {high}"
            raise argparse.ArgumentTypeError(f"{text} is not {bounds}")
        if kind is int and value % multiple:
            below = value - value % multiple
            near = " or ".join(str(size) for size in (below, below + multiple) if low <= size <= high)
            raise argparse.ArgumentTypeError(f"{text} is not a multiple of {multiple}; the nearest: {near}")
        return value
    parse.__name__ = "number"  # argparse says: invalid number value
    return parse


def filled(kind: type):
    """A type for argparse: any text but a blank one, which as a path would be the current folder."""
    def parse(text: str):
        if not text.strip():
            raise argparse.ArgumentTypeError("is blank")
        return kind(text)
    return parse


def parser_of(description: str, usage: str = "[options]") -> argparse.ArgumentParser:
    """A parser that shows defaults as [default], and tells a mistake in one line."""
    class Formatter(argparse.RawDescriptionHelpFormatter):
        def __init__(self, prog: str):
            super().__init__(prog, max_help_position=24, width=min(110, shutil.get_terminal_size().columns))

        def _get_help_string(self, action: argparse.Action) -> str:
            none = any(action.default is value for value in (None, False, argparse.SUPPRESS))
            return action.help if none or "[" in action.help else f"{action.help} [%(default)s]"
    parser = argparse.ArgumentParser(usage=f"%(prog)s {usage}", description=description.strip(),
                                     formatter_class=Formatter, allow_abbrev=False)
    parser.error = lambda message: parser.exit(2, f"error: {message} (see --help)\n")
    return parser


def check(parser: argparse.ArgumentParser, args: argparse.Namespace):
    """Ends the program unless each --model may be one, and the picture --out can be written."""
    for name in getattr(args, "model", []):
        if not may_be_model(name):
            parser.error(f"--model {name} is neither {', '.join(PRESETS)}, nor a folder, nor a hub id")
    if args.out.suffix != ".png" or os.path.isdir(args.out):
        parser.error(f"--out {args.out} is not the name of a .png file")
    try:
        tempfile.TemporaryFile(dir=args.out.parent).close()
    except OSError as error:
        sys.exit(f"error: --out: nothing can be written in the folder {args.out.parent} ({error.strerror})")


def process() -> tuple[int, int, int]:
    """This process's number, how many there are, and its number on this machine, as torchrun says."""
    names = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0}
    try:
        rank, world, local = (int(os.environ.get(name, default)) for name, default in names.items())
        if not (0 <= rank < world and local >= 0):
            raise ValueError
        return rank, world, local
    except ValueError:
        raise ValueError(f"{', '.join(names)} are numbers that torchrun sets: unset them") from None


def one_line(error: Exception) -> str:
    """The first line of what an error says, with the file at fault first."""
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.filename2 or error.filename}: {error.strerror}"
    return str(error).strip().split("\n")[0]


def begin(command_line: Callable[[], argparse.Namespace]) -> argparse.Namespace:
    """The arguments of a program. Up to `program` it only imports, and an interrupt ends it in silence."""
    try:
        args = command_line()
    except ValueError as error:
        sys.exit(f"error: {one_line(error)}")
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # a job in the background ignores it
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    return args


def program(main: Callable[[], int | None], memory: str):
    """Runs a program, and ends it in one line if the world is at fault; `memory` is advice if it is full."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        if status := main():
            sys.exit(status)
    except (OSError, ValueError, FloatingPointError) as error:
        told, toy = one_line(error), PRESETS["toy"].source
        if f"{toy}/" in told or f"in the folder {toy}" in told:
            told += "; git checkout toy restores it, and toy/README.md says how it is made"
        sys.exit(f"error: {told}")
    except (MemoryError, RuntimeError) as error:  # PyTorch says "out of memory", or what it cannot allocate
        if isinstance(error, RuntimeError) and not re.search("alloc|out of memory", str(error), re.I):
            raise
        sys.exit(f"error: out of memory; {memory}")
    except KeyboardInterrupt:
        sys.exit(130)
