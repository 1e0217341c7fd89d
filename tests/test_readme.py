"""Every command of the READMEs is one its program takes; CI runs most that need no weights."""

import re
import shlex
from pathlib import Path

import pytest

import analysis
import distill
import sample
from support.cli import ArgumentParser
from toy import make

ROOT = Path(__file__).parents[1]
PROGRAMS = ("python", "torchrun", "pip")


def commands(path: Path) -> list[str]:
    """The commands in the indented lines of a README, without the variables set before them."""
    lines = (line for line in path.read_text().splitlines() if line.startswith("    "))
    parts = (re.sub(r"^[A-Z_]+=\S+ ", "", part.strip()) for line in lines for part in line.split("&&"))
    return [part for part in parts if part.startswith(PROGRAMS)]


COMMANDS = commands(ROOT / "README.md")
OFFICIAL = {"sdxl", "sd14", "etri-vilab/koala-700m"}  # a word that needs official weights
LONG = {"ablation"}  # 38 trainings; tests/test_table3.py runs it with one step and two captions


def words_of(command: str) -> list[str]:
    words = shlex.split(command, comments=True)
    return words[1:] if words[0] == "python" else words[3:]      # after torchrun --nproc-per-node N


class Parsed(Exception):
    """The command line was accepted."""


@pytest.mark.parametrize("command", COMMANDS + commands(ROOT / "toy" / "README.md"))
def test_its_program_takes_it(command, monkeypatch, tmp_path):
    parse = ArgumentParser.parse_args

    def parse_only(self, words):
        parse(self, words)
        raise Parsed

    program, *words = words_of(command)
    programs = {"distill.py": distill, "sample.py": sample, "analysis.py": analysis, "toy.make": make}
    if program == "-m":
        program, *words = words
    if program not in programs:
        assert command in ("pip install -r requirements.txt", "python -m pytest"), "nothing checks this command"
        return
    monkeypatch.setattr(ArgumentParser, "parse_args", parse_only)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Parsed):
        programs[program].main(words)


def test_ci_runs_what_needs_no_official_weights():
    ran = [set(shlex.split(line, comments=True)) for line in (ROOT / ".ci" / "run").read_text().splitlines()]
    for command in COMMANDS:
        words = shlex.split(command, comments=True)
        if not (OFFICIAL | LONG) & set(words):
            assert any(set(words) <= one for one in ran), command
