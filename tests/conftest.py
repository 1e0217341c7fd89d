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
from common import RUN, write_pairs, write_teacher  # noqa: E402
from support import files  # noqa: E402


@pytest.fixture(autouse=True, scope="session")
def session():
    """A job in the background ignores interrupts, and what is tested would; nothing has to be on the disk."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    files.sync = lambda path: None


@pytest.fixture(scope="session")
def teacher(tmp_path_factory):
    """The folder of a small model that runs of distill.py learn from."""
    return write_teacher(tmp_path_factory.mktemp("teacher") / "small")


@pytest.fixture
def pairs(tmp_path):
    """The folder of six captioned images, of which two are bad."""
    return write_pairs(tmp_path / "pairs")


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
    """Runs distill.py as a process would; returns its exit status, its output and its error message."""
    def program(*flags):
        monkeypatch.setattr(sys, "argv", ["distill.py", *map(str, flags)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit:
            runpy.run_path(str(ROOT / "distill.py"), run_name="__main__")
        code, (out, err) = exit.value.code, capsys.readouterr()
        return (1, out, code) if isinstance(code, str) else (code or 0, out, err)  # Python prints a text
    return program
