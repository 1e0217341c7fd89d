"""Lets `pytest` find the modules at the root of the project, as `python -m pytest` does."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
