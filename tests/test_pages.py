"""Commands of the pages are those of the programs, files they name exist, and the tour shows what is true."""

import doctest
import importlib
import re
import shlex
from pathlib import Path

import pytest
from _pytest.doctest import _get_checker, _get_number_flag

from support.hub import ArgumentParser

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
OFFICIAL = {"sdxl", "sd14", "etri-vilab/koala-700m"}  # a word that needs official weights
LONG = {"ablation"}  # 38 trainings; tests/test_table3.py runs it with one step and two captions
CHECKED = {"pip install -r requirements.txt", "python -m pytest"}  # by CI, which starts with them
TOUR = (ROOT / "docs" / "tour.md").read_text(encoding="utf-8")
SOURCES = [(ROOT / f"{name}.py").read_text(encoding="utf-8")
           for name in ("model", "sample", "distill", "analysis")]
QUOTES = re.findall(r"^```python\n(.*?)^```", TOUR, re.M | re.S)


def commands(page: Path) -> list[str]:
    """The commands in the indented lines of a page, without the variables set before them."""
    lines = (line for line in page.read_text(encoding="utf-8").splitlines() if line.startswith("    "))
    parts = (re.sub(r"^[A-Z_]+=\S+ ", "", part.strip()) for line in lines for part in line.split("&&"))
    return [part for part in parts if part.startswith(("python ", "torchrun ", "pip "))]


@pytest.mark.parametrize("command", sorted(set(sum(map(commands, PAGES), [])) - CHECKED))
def test_its_program_takes_it(command, monkeypatch, tmp_path):
    parse = ArgumentParser.parse_args

    def parse_only(self, words):
        parse(self, words)
        raise KeyboardInterrupt  # the command line was accepted

    words = shlex.split(command, comments=True)
    start = 1 if words[0] == "python" else words.index("distill.py")
    program, *words = [word for word in words[start:] if word != "-m"]
    if program == "tests/benchmark.py":  # needs diffusers
        return
    monkeypatch.setattr(ArgumentParser, "parse_args", parse_only)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        importlib.import_module(program.removesuffix(".py")).main(words)


def test_ci_runs_what_needs_no_official_weights():
    ran = [set(shlex.split(line, comments=True)) for line in (ROOT / ".ci" / "run").read_text().splitlines()]
    for command in commands(ROOT / "README.md"):
        words = set(shlex.split(command.removeprefix("python analysis.py "), comments=True))
        assert (OFFICIAL | LONG) & words or any(words <= line for line in ran), command


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_files_it_names_exist(page):
    text = page.read_text(encoding="utf-8")
    linked = re.findall(r"\]\((?!http)([^)#]+)[^)]*\)", text)
    assert all((page.parent / name).exists() for name in linked), linked
    for name in re.findall(r"`((?:[a-z_]+/)*[a-z_0-9]+\.(?:py|md))`", text):
        assert any((place / name).exists() for place in (ROOT, page.parent, ROOT / "support")), name


@pytest.mark.parametrize("quote", QUOTES, ids=[quote.split("\n")[0].strip()[:40] for quote in QUOTES])
def test_quotes_of_the_tour_stand_in_the_source(quote):
    assert any(quote in source for source in SOURCES)
    assert quote.count("\n") <= 15


def test_what_the_tour_types_prints_what_it_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tolerant = _get_number_flag()                                # as many digits as the page has
    typed = "\n".join(re.findall(r"^```pycon\n(.*?)^```", TOUR, re.M | re.S))
    test = doctest.DocTestParser().get_doctest(typed, {}, "tour.md", "docs/tour.md", 0)
    slow = ("rows = [", "guidance.png")                          # many pictures, and nothing is printed
    test.examples = [one for one in test.examples if not any(word in one.source for word in slow)]
    results = doctest.DocTestRunner(_get_checker(), optionflags=tolerant).run(test)
    assert results.attempted > 40 and results.failed == 0
