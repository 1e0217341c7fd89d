"""
Files: found in a folder or on the hub, written completely or not at all; one clear line for what is wrong.
"""

import contextlib
import csv
import io
import json
import os
import re
import tempfile
from pathlib import Path
from typing import Callable, Sequence

from safetensors import SafetensorError

WRITING = ".writing-"  # prefix of half-written files and folders, which a kill leaves behind

# The folders of a model in the official layout, and the files that are read in them.
PARTS = ("scheduler", "tokenizer", "tokenizer_2", "text_encoder", "text_encoder_2", "unet", "vae")
WEIGHTS = re.compile(r"(diffusion_pytorch_|/|^)model(-\d+-of-\d+)?(\.fp16)?(-\d+-of-\d+)?\.safetensors")


def local_folder(source: str | Path, parts: tuple[str, ...] = PARTS, half: bool = False,
                 weights: bool = True) -> Path:
    """
    The folder of a model: `source` itself if it is a folder, else a hub id's snapshot, downloaded if need be.

    Only `parts` are downloaded, with one variant of the weights: float16 if `half`, none if not `weights`.
    Raises FileNotFoundError, one line that says what to do.
    """
    if Path(source).is_dir():
        return Path(source)
    if Path(source).is_file():
        raise FileNotFoundError(
            f"{source} is a file, not a folder in diffusers' layout; diffusers converts it: StableDiffusionXLPipeline"
            f".from_single_file('{source}').save_pretrained('FOLDER'), or StableDiffusionPipeline for 1 and 2")
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", str(source)):
        raise FileNotFoundError(f"no folder {source}; give one, or a hub id such as etri-vilab/koala-700m")
    from huggingface_hub import model_info, snapshot_download  # slow to import, and seldom needed
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        names = [file.rfilename for file in model_info(source, timeout=5).siblings]
    except (RepositoryNotFoundError, HFValidationError):
        raise FileNotFoundError(f"the hub has no {source} (or it needs a login: set HF_TOKEN)") from None
    except Exception as error:  # the hub is out of reach, which every HTTP library says in its own way
        try:  # no patterns: files that are not in the cache are for the reader to report
            return Path(snapshot_download(source, allow_patterns=[], local_files_only=True))
        except LocalEntryNotFoundError:
            raise FileNotFoundError(
                f"no folder {source}, nothing of it in the hub's cache, and the hub is out of reach "
                f"({error_summary(error)}); elsewhere run: hf download {source}, then give its folder or set "
                f"HF_HOME") from None
    try:
        return Path(snapshot_download(source, allow_patterns=bundle_files(names, parts, half, weights)))
    except Exception as error:
        message = f"the download of {source} failed: {error_summary(error)}; run this again"
        raise FileNotFoundError(message) from None


def bundle_files(names: list[str], parts: tuple[str, ...] = PARTS, half: bool = False,
                 weights: bool = True) -> list[str]:
    """
    Those files of a model that are read: configurations, vocabularies, one variant of the weights.

    The VAE's float32 variant is taken even if `half`, as SDXL's overflows in float16.
    """
    wanted = ["model_index.json"] if "model_index.json" in names else []
    for part in parts:
        own = [name for name in names if name.startswith(f"{part}/") and name.count("/") == 1]
        if len(parts) == 1:
            own = own or [name for name in names if "/" not in name]  # a repository of this network alone
        wanted += [name for name in own if name.endswith((".json", ".txt"))]
        fp16 = [name for name in own if WEIGHTS.search(name) and ".fp16" in name]
        plain = [name for name in own if WEIGHTS.search(name) and ".fp16" not in name]
        if weights:
            wanted += (fp16 or plain) if half and part != "vae" else (plain or fp16)
    return wanted


def error_summary(error: Exception) -> str:
    """An error's first line, with the file at fault first."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename2 or error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error).strip().split("\n")[0]


# ------------------------------------------------------------------------------------------------------------
# Written beside and renamed into place


def atomic_write(path: Path, write: Callable[[Path], object]):
    """
    Calls `write` with a temporary path, where it makes a file or a whole folder, and renames that to `path`.

    So `path` is always the old file or the new one; a folder has to be new. Raises OSError.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with name_in_errors(path), tempfile.TemporaryDirectory(prefix=WRITING, dir=path.parent) as folder:
        temporary = Path(folder, path.name)
        write(temporary)
        for inside in [*temporary.rglob("*"), temporary]:
            sync(inside)
        os.replace(temporary, path)
    sync(path.parent)


@contextlib.contextmanager
def name_in_errors(path: Path):
    """Within `with`, adds `path` to write errors that name no file, such as that of a full disk."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        if getattr(error, "filename", None):
            raise
        raise OSError(f"{path} cannot be written: {error_summary(error)}") from None


def sync(path: Path):
    """Waits until a file or folder is on the disk; Windows cannot open folders, and writes them itself."""
    if os.name == "nt" and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, value: dict):
    """Writes a JSON file atomically, indented and with sorted keys."""
    atomic_write(path, lambda path: path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n"))


def write_csv(path: Path, header: list[str], rows: list[list]):
    """Writes a CSV file atomically."""
    text = io.StringIO()
    csv.writer(text).writerows([header, *rows])
    atomic_write(path, lambda path: path.write_text(text.getvalue(), newline=""))


def read_csv(path: Path, numbers: Sequence[str] = ()) -> list[dict[str, str]]:
    """
    The rows of a CSV file, by the names in its header, without a last row that was cut while being written.

    Raises ValueError for a damaged file, and for one that lacks a column of `numbers` or has text in it.
    """
    try:
        with open(path, newline="", encoding="utf-8") as file:
            header, *rows = csv.reader(line for line in file if line.endswith("\n"))
        rows = [dict(zip(header, row, strict=True)) for row in rows]
        for row in [dict.fromkeys(header, 0), *rows]:
            for name in numbers:
                float(row[name])
    except (ValueError, KeyError, csv.Error):  # not UTF-8, an empty file, a cut row, a missing column
        raise ValueError(f"{path} is damaged, or not what its name says; remove it") from None
    return rows
