"""Lets `pytest` import the programs as `python -m pytest` does, and runs distill.py for the tests."""

import itertools
import runpy
import signal
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import distill  # noqa: E402
from PIL import Image  # noqa: E402
from common import CAPTION_WORDS, RUN, SMALL_RUN, VAE_OF_RUNS, bundle, filled  # noqa: E402
from model import save_unet  # noqa: E402
from support import files  # noqa: E402


@pytest.fixture(autouse=True, scope="session")
def session():
    """A job in the background ignores interrupts, and what is tested would; nothing has to be on the disk."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    files.sync = lambda path: None


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    """The folders of small models of one family, by name."""
    folder = tmp_path_factory.mktemp("small")
    return {name: bundle(folder / name, name) for name in ("sdxl", "1b", "700m")}


@pytest.fixture(scope="session")
def teacher(tmp_path_factory):
    """The folder of a small model that draws 64 pixels and knows the words of the shapes."""
    folder = bundle(tmp_path_factory.mktemp("teacher") / "small", vae=VAE_OF_RUNS, words=CAPTION_WORDS)
    save_unet(filled(SMALL_RUN), folder / "unet")
    return folder


@pytest.fixture
def pairs(tmp_path):
    """The folder of six captioned images, of which two are bad."""
    (tmp_path / "pairs").mkdir()
    for i in range(6):
        Image.new("RGB", (70, 64), (40 * i, 0, 0)).save(tmp_path / f"pairs/{i}.png")
        (tmp_path / f"pairs/{i}.txt").write_text(" " if i == 4 else "a red circle")
    (tmp_path / "pairs/1.png").write_bytes(b"")
    return tmp_path / "pairs"


@pytest.fixture(scope="session")
def short_run(teacher, tmp_path_factory):
    """The folder of a finished run of two steps, each with a checkpoint."""
    folder = tmp_path_factory.mktemp("short") / "run"
    flags = ("--teacher", teacher, "--out", folder, *RUN, "--steps", 2, "--save-every", 1)
    assert distill.main([*map(str, flags)]) == 0
    return folder


@pytest.fixture
def run(teacher, tmp_path):
    """Runs distill.py in this process, with more flags than RUN has; returns its exit status."""
    def run(*flags, out="run"):
        return distill.main([*map(str, ("--teacher", teacher, "--out", tmp_path / out, *RUN, *flags))])
    return run


@pytest.fixture
def during(monkeypatch):
    """Calls an action with the number of each batch, and multiplies the losses by what it returns."""
    losses = distill.losses

    def during(action):
        calls = itertools.count(1)

        def watched(*inputs):
            factor = action(next(calls)) or 1
            return [term * factor for term in losses(*inputs)]
        monkeypatch.setattr(distill, "losses", watched)
    return during


@pytest.fixture
def program(monkeypatch, capsys):
    """Runs a program as a process would; returns its exit status, its output and its error message."""
    def program(name: str, *flags) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [name, *map(str, flags)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit:
            runpy.run_path(str(ROOT / name), run_name="__main__")
        code, (out, err) = exit.value.code, capsys.readouterr()
        return (1, out, f"{code}\n") if isinstance(code, str) else (code or 0, out, err)  # Python prints it
    return program
