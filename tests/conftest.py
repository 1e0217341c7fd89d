"""Lets `pytest` import the programs at the root of the project, as `python -m pytest` does."""

import signal
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))


@pytest.fixture(autouse=True, scope="session")
def handle_interrupts():
    """A job in the background ignores interrupts, and would pass that on to what is tested."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
