"""
Files: found in a folder or on the hub, read with one clear line for whatever is wrong, written whole or not.
"""

import csv
import json
import os
import re
import tempfile
from functools import cache
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from options import one_line

WRITING = ".writing-"  # begins the names of folders of half-made files, which a killed process leaves


def find(source: str | Path, *names: str) -> Path | None:
    """The first of these files that `source`, a local folder or else a hub id, has; None if it has none."""
    if Path(source).is_dir():
        return next((path for name in names if (path := Path(source, name)).is_file()), None)
    if Path(source).is_file():
        raise FileNotFoundError(f"{source} is a file; give the folder of a model in diffusers' layout")
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", str(source)):
        raise FileNotFoundError(f"no folder {source}; give one, or a hub id such as etri-vilab/koala-700m")
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import (
        EntryNotFoundError, HFValidationError, HTTPError, LocalEntryNotFoundError, RepositoryNotFoundError)

    for name in names:
        try:
            return Path(hf_hub_download(str(source), name, local_files_only=not hub_answers()))
        except LocalEntryNotFoundError:
            unreachable = True  # nor is it in the local cache; another name may be
        except EntryNotFoundError:
            unreachable = False
        except RepositoryNotFoundError:
            raise FileNotFoundError(f"the hub has no {source} (or it needs a login: set HF_TOKEN)") from None
        except (HFValidationError, HTTPError, OSError) as error:
            raise FileNotFoundError(f"the hub did not give {name} of {source}: {one_line(error)}") from None
    if unreachable:
        raise FileNotFoundError(
            f"no folder {source}, no {names[0]} of it in the hub's cache, and the hub is out of reach; where "
            f"it is not: hf download {source}, then give its folder or set HF_HOME")
    return None


def needed(source: str | Path, *names: str) -> Path:
    """As `find`; raises FileNotFoundError if there is none."""
    path = find(source, *names)
    if path is None:
        raise FileNotFoundError(f"no {' or '.join(names)} in {described(source)}")
    return path


@cache
def hub_answers() -> bool:
    """Whether the hub is within reach, asked once: `hf_hub_download` would try for long, for every file."""
    from huggingface_hub import constants
    from huggingface_hub.errors import HTTPError
    from huggingface_hub.utils import get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=5)
    except (HTTPError, OSError):
        return False
    return True


def described(source: str | Path) -> str:
    """A folder or hub id, as an error names it."""
    return f"the folder {source}" if Path(source).is_dir() else f"{source} on the hub"


def read_json(path: Path) -> dict:
    """The object in a JSON file; raises ValueError for anything else."""
    try:
        value = json.loads(path.read_text())
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError):
        raise ValueError(f"{path} is not JSON; fetch it anew") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} is not a JSON object; fetch it anew")
    return value


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file. Raises ValueError for a file that is broken or something else."""
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}
    except SafetensorError as error:
        with open(path, "rb") as file:
            head = file.read(64)
        kinds = {b"version https://git-lfs": "a git-lfs pointer, not the file itself: run git lfs pull",
                 b"<": "an HTML page: fetch the file itself",
                 b"PK\x03\x04": "a pickle, and is not opened", b"\x80": "a pickle, and is not opened"}
        what = f"cut or damaged, fetch it anew ({one_line(error)})"
        if head[8:9] != b"{":  # a safetensors file has its header, which is JSON, after eight bytes
            what = next((kind for start, kind in kinds.items() if head.lstrip().startswith(start)), what)
        raise ValueError(f"{path} is {what}") from None


def write(path: Path, make):
    """Makes a file by `make(temporary path)`, and puts it in its place: it is always the old or the new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=WRITING, dir=path.parent) as beside:
        made = Path(beside, path.name)
        try:
            make(made)
        except SafetensorError as error:
            raise OSError(f"{path} cannot be written: {one_line(error)}") from None
        with open(made, "rb") as file:
            os.fsync(file.fileno())
        os.chmod(made, 0o644)  # safetensors makes files that only their owner can read
        os.replace(made, path)
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)


def write_json(path: Path, value: dict):
    """As `write`: indented, keys in order."""
    write(path, lambda path: path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n"))


def write_csv(path: Path, header: list[str], rows: list[list]):
    """As `write`."""
    def make(path: Path):
        with open(path, "w", newline="") as file:
            csv.writer(file).writerows([header, *rows])
    write(path, make)


def read_csv(path: Path) -> list[dict[str, str]]:
    """
    The rows of a CSV file, by the names in its header, but for a last one that was cut while being written.

    Raises ValueError for a file that is damaged.
    """
    try:
        with open(path, newline="") as file:
            rows = list(csv.DictReader(line for line in file if line.endswith("\n")))
    except (UnicodeDecodeError, csv.Error):
        raise ValueError(f"{path} is not CSV; remove it") from None
    if any(None in row or None in row.values() for row in rows):
        raise ValueError(f"{path} has a row that is not as long as its header; remove it")
    return rows
