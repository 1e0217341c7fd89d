"""
Atomic file writes, and CSV.
"""

import contextlib
import csv
import io
import json
import os
import tempfile
from pathlib import Path
from typing import Callable, Sequence

from safetensors import SafetensorError

WRITING = ".writing-"  # prefix of half-written files and folders, which a kill leaves behind


def atomic_write(path: Path, write: Callable[[Path], object]):
    """
    Calls `write` with a temporary path and renames the result to `path`.

    So `path` is always the old version or the complete new one. A folder must not exist yet. Raises OSError.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with name_in_errors(path), tempfile.TemporaryDirectory(prefix=WRITING, dir=path.parent) as folder:
        temporary = Path(folder, path.name)
        write(temporary)
        share_weights(temporary)
        for inside in [*temporary.rglob("*"), temporary]:
            sync(inside)
        os.replace(temporary, path)
    sync(path.parent)


@contextlib.contextmanager
def name_in_errors(path: Path):
    """Adds `path` to write errors in its block that name no file, such as a full disk."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        if getattr(error, "filename", None):
            raise
        raise OSError(f"{path} cannot be written: {error_summary(error)}") from None


def share_weights(folder: Path):
    """Gives weight files the permissions that other new files have; safetensors lets only the owner read."""
    mask = os.umask(0)                                           # there is no other way to read it
    os.umask(mask)
    for path in folder.rglob("*.safetensors"):
        with contextlib.suppress(OSError):                       # not every file system has permissions
            path.chmod(0o666 & ~mask)


def sync(path: Path):
    """Flushes a file or folder to disk; not every file system can flush a folder."""
    with contextlib.suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def error_summary(error: Exception) -> str:
    """An error's first line, with the file at fault first."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename2 or error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error).strip().split("\n")[0]


def write_json(path: Path, value: dict):
    """Writes a JSON file atomically, indented and with sorted keys."""
    text = json.dumps(value, indent=2, sort_keys=True) + "\n"
    atomic_write(path, lambda path: path.write_text(text, encoding="utf-8"))


def write_csv(path: Path, header: Sequence[str], rows: list[list]):
    """Writes a CSV file atomically."""
    text = io.StringIO()
    csv.writer(text).writerows([header, *rows])
    atomic_write(path, lambda path: path.write_text(text.getvalue(), encoding="utf-8", newline=""))


def read_csv(path: Path, numbers: Sequence[str] = ()) -> list[dict[str, str]]:
    """
    The rows of a CSV file as dicts, without a last row that was cut off while being written.

    Raises ValueError if the file is damaged, or if a column of `numbers` is missing or not numeric.
    """
    try:
        with open(path, newline="", encoding="utf-8") as file:
            header, *rows = csv.reader(line for line in file if line.endswith("\n"))
        rows = [dict(zip(header, row, strict=True)) for row in rows]
        for row in [dict.fromkeys(header, 0), *rows]:
            for name in numbers:
                float(row[name])
        return rows
    except (ValueError, KeyError, csv.Error):  # not UTF-8, an empty file, a cut row, a missing column
        raise ValueError(f"{path} is damaged or the wrong file; remove it") from None
