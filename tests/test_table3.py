"""Table 3 in miniature: each different run is done once, and findings are judged by the spread over seeds."""

import math
from contextlib import nullcontext
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
from common import UNETS, analyze
from PIL import Image

import distill
from model import UNet, UNetConfig
from support import table3
from support.files import read_csv
from support.table3 import FINDINGS, TABLE, check_finding


def test_every_row_is_a_different_run_of_distill():
    student, teacher = (UNet(UNetConfig.from_diffusers(UNETS[name])) for name in ("1b", "sdxl"))
    args, settings = SimpleNamespace(steps=1, distill=["--seed", "7", "--lr", "0.5"]), {}
    for row in (row for table in TABLE.values() for row in table.values()):
        parsed = distill.parse_args(table3.distill_flags(args, row, 2))
        assert (parsed.seed, parsed.out_kd, parsed.lr) == (2, 0, 0.5)  # the table's flags win
        matched = distill.match_features(student, teacher, parsed.features, parsed.sa_blocks)
        settings.setdefault((*matched.items(), parsed.normalize_features), set()).add(row[1:])
    assert all(len(same) == 1 for same in settings.values()) and len(settings) == 19


def test_the_papers_numbers():
    hpsv2 = [float(row.hpsv2) for row in TABLE["3a"].values()]
    assert hpsv2 == [26.74, 26.63, 26.48, 26.27, 26.11, 25.53]
    for table, (_, better, worse) in FINDINGS.items():
        scores = {label: np.array([[float(row.hpsv2) + x for x in (0, 0.01, 0)]])
                  for label, row in TABLE[table].items() if row.hpsv2}
        assert check_finding(better, worse, scores, ["HPSv2"]) == "by HPSv2 agrees", table


@pytest.mark.parametrize("gain, other, name, expected", [
    ([0.4, 0.3], [0.4, 0.3], "shape", "agrees"), ([0.4, 0.3], [-0.4, -0.3], "shape", "disagrees"),
    ([0.4, 0.3], [0.7, -0.3], "shape", "too close to tell"),     # its mean is less than its spread
    ([-0.4, -0.3], [-0.4, -0.3], "distance", "agrees"), ([0.4], [0.4], "shape", "too close to tell")])
def test_a_finding_compares_means_of_rows_by_the_spread_over_seeds(gain, other, name, expected):
    a, b = np.array([gain]), np.array([gain]) - np.array([other])
    scores = {"best": a + 0.1, "second": a - 0.1, "zero": 0 * a, "other": b}
    assert check_finding(["best", "second"], [["zero"], ["other"]], scores, [name]) == f"by {name} {expected}"
    assert check_finding(["best"], [["nan"]], {"best": a, "nan": math.nan * a}, [name]) == ""  # not the toy


def test_ablation_does_each_run_once_and_resumes(teacher, tmp_path, monkeypatch, capsys):
    run_here = mock.Mock(
        side_effect=lambda command, **rest: SimpleNamespace(returncode=distill.main(command[2:])))
    # In this thread: distill.py hears signals in the main thread alone.
    monkeypatch.setattr(table3, "ThreadPoolExecutor", lambda jobs: nullcontext(SimpleNamespace(map=map)))
    monkeypatch.setattr(table3.subprocess, "run", run_here)
    command = ("ablation", "--table", "3c", "--seeds", 1, "--steps", 1, "--judge", 2, "--jobs", 2,
               "--runs", tmp_path / "runs", "--out", tmp_path / "t.png",
               "--", "--teacher", teacher, "--batch", 1)
    analyze(*command)
    rows = read_csv(tmp_path / "t.csv")
    assert [row["row"] for row in rows] == list(TABLE["3c"]) and run_here.call_count == 3
    assert [row["paper's HPSv2"] for row in rows] == ["26.74", "26.58", "26.48"]
    assert all(0 < float(row["distance"]) < 1 and 0 <= float(row["color"]) <= 1 for row in rows)
    assert "F3" in capsys.readouterr().out and Image.open(tmp_path / "t.png").width == 1600
    monkeypatch.setattr(table3, "draw", None)                    # nothing is drawn again
    analyze(*command)
    assert read_csv(tmp_path / "t.csv") == rows


def test_a_run_that_fails_is_named_and_no_other_is_started(tmp_path, monkeypatch):
    fail = mock.Mock(return_value=SimpleNamespace(returncode=1))
    monkeypatch.setattr(table3.subprocess, "run", fail)
    command = ("ablation", "--runs", tmp_path, "--out", tmp_path / "t.png", "--")
    with pytest.raises(SystemExit, match="2"):                   # flags are checked before any run
        analyze(*command, "--micro-batch", "0")
    assert not fail.called
    with pytest.raises(ValueError, match="SA-bottom-200-0/distill.log"):
        analyze(*command)
    fail.assert_called_once()


def test_a_run_is_scored_by_a_clip_too(tmp_path, monkeypatch):
    drawn = {None: Image.new("RGB", (8, 8)), tmp_path / "unet": Image.new("RGB", (8, 8), "white")}
    monkeypatch.setattr(table3, "draw", lambda teacher, prompts, unet=None: 2 * [drawn[unet]])
    monkeypatch.setattr(table3, "all_toys", lambda names: False)
    monkeypatch.setattr(table3, "load_clip", lambda name, device: lambda image, prompt: len(prompt))
    *judged, distance, clip = table3.score(tmp_path, 1, "sdxl", ("a", "abc"), "a/clip")
    assert (distance, clip) == (1, 2) and all(math.isnan(score) for score in judged)
    assert len(table3.score(tmp_path, 1, "sdxl", ("a", "abc"))) == 4  # another file
