"""Every command of the README is one its program takes, and CI runs those that need no official weights."""

import shlex
import sys
from pathlib import Path

import pytest

import analysis
import distill
import sample

ROOT = Path(__file__).parents[1]
COMMANDS = [part.strip() for line in (ROOT / "README.md").read_text().splitlines() if line.startswith("    ")
            for part in line.split("&&") if part.split()[:1] in (["python"], ["torchrun"], ["pip"])]
OFFICIAL = {"sdxl", "etri-vilab/koala-700m"}  # a word that needs official weights
LONG = {"ablation"}  # takes hours; tests/test_ablation.py runs it with one step and two captions


def words_of(command: str) -> list[str]:
    words = shlex.split(command, comments=True)
    return words[words.index("python") + 1:] if words[0] == "python" else [word for word in words[3:]]


@pytest.mark.parametrize("command", COMMANDS)
def test_its_program_takes_it(command, monkeypatch):
    program, *words = words_of(command)
    if program == "distill.py":
        distill.command_line(words)
    elif program == "sample.py":
        monkeypatch.setattr(sys, "argv", [program, *words])
        sample.command_line()
    elif program == "analysis.py":
        analysis.command_line(words)
    else:
        assert command in ("pip install -r requirements.txt",
                           "python -m pytest"), "nothing checks this command"


def test_ci_runs_what_needs_no_official_weights():
    ran = [set(shlex.split(line, comments=True)) for line in (ROOT / ".ci" / "run").read_text().splitlines()]
    for command in COMMANDS:
        words = shlex.split(command, comments=True)
        if not (OFFICIAL | LONG) & set(words):
            assert any(set(words) <= one for one in ran), command
