"""docs/tour.md cannot go stale: its quotes stand in the source, and what it types prints what it says."""

import doctest
import re
from pathlib import Path

import pytest
from _pytest.doctest import _get_checker, _get_number_flag

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "tour.md").read_text(encoding="utf-8")
PROGRAMS = ("model", "sample", "distill", "analysis")
SOURCES = [(ROOT / f"{name}.py").read_text(encoding="utf-8") for name in PROGRAMS]
QUOTES = re.findall(r"^```python\n(.*?)^```", PAGE, re.M | re.S)


@pytest.mark.parametrize("quote", QUOTES, ids=[quote.split("\n")[0].strip()[:40] for quote in QUOTES])
def test_quotes_stand_in_the_source(quote):
    assert any(quote in source for source in SOURCES)
    assert quote.count("\n") <= 15


def test_what_it_types_prints_what_it_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tolerant = _get_number_flag()                                # as many digits as the page has
    typed = "\n".join(re.findall(r"^```pycon\n(.*?)^```", PAGE, re.M | re.S))
    test = doctest.DocTestParser().get_doctest(typed, {}, "tour.md", "docs/tour.md", 0)
    slow = ("rows = [", "guidance.png")                          # many pictures, and nothing is printed
    test.examples = [one for one in test.examples if not any(word in one.source for word in slow)]
    results = doctest.DocTestRunner(_get_checker(), optionflags=tolerant).run(test)
    assert results.attempted > 40 and results.failed == 0
