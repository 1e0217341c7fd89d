"""Table 3 in miniature: each different run is done once, and findings are judged by the spread over seeds."""

import argparse
import subprocess

import numpy as np
import pytest
from PIL import Image
from common import UNETS

import analysis
import distill
from model import UNet, UNetConfig
from support import table3
from support.cli import PRESETS, preset
from support.files import read_csv
from support.table3 import FINDINGS, TABLE, verdict


def run(*words):
    analysis.main(["ablation", *map(str, words)])


def test_every_row_is_a_different_run_of_distill():
    student, teacher = (UNet(UNetConfig.from_diffusers(UNETS[name])) for name in ("1b", "sdxl"))
    settings = {}
    for table in TABLE.values():
        for _, features, blocks, normalize in table.values():
            distill.parse_args(["--features", features, "--sa-blocks", blocks, "--student", "1b"])
            matched = distill.match_features(student, teacher, features, blocks)
            settings.setdefault((*matched.items(), normalize), set()).add((features, blocks))
    assert all(len(same) == 1 for same in settings.values())


def test_findings_are_about_rows_of_their_table():
    for table, (_, better, worse) in FINDINGS.items():
        assert set(sum(worse, better)) <= TABLE[table].keys()


def test_a_verdict_is_by_the_spread():
    clear, wide = np.array([0.4, 0.32, 0.37]), np.array([0.7, -0.7, -0.05])
    assert verdict([clear]) == verdict([clear, 2 * clear]) == "agrees"
    assert verdict([-clear]) == verdict([clear, -clear]) == "disagrees"
    assert verdict([clear, wide]) == verdict([wide]) == "too close to tell"
    assert verdict([clear[:1]]).startswith("too close to tell")


def test_a_finding_compares_means_of_rows_seed_by_seed():
    first, second = np.full((4, 3), 0.5), np.full((4, 3), 0.7)
    low = np.array([[0.1, 0.2, 0.3]] * 3 + [[0.9, 0.8, 0.9]])
    text = table3.check_finding(["a", "b"], [["c"]], {"a": first, "b": second, "c": low})
    assert text.split("; ") == [f"by {score} agrees" for score in ("colour", "shape", "spatial", "distance")]
    low[:3] = np.nan                                             # a teacher that is not the toy has no judge
    assert table3.check_finding(["c"], [["a"]], {"a": first, "c": low}) == "by distance disagrees"


class NoThreads:
    """In the place of a ThreadPoolExecutor, as distill.py hears signals in the main thread alone."""

    def __init__(self, jobs):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    map = staticmethod(map)


def test_ablation_does_each_run_once_and_resumes(tmp_path, monkeypatch, capsys):
    started = []

    def run_here(command, **rest):
        started.append(command[2:])
        return subprocess.CompletedProcess(command, distill.main(command[2:]))

    monkeypatch.setattr(table3, "ThreadPoolExecutor", NoThreads)
    monkeypatch.setattr(table3.subprocess, "run", run_here)
    monkeypatch.setitem(PRESETS, "toy", PRESETS["toy"]._replace(steps=3))
    command = ("--table", "3c", "--seeds", 1, "--steps", 1, "--batch", 1, "--judge", 2, "--jobs", 2,
               "--runs", tmp_path / "runs", "--out", tmp_path / "t.png")
    run(*command)
    rows = read_csv(tmp_path / "t.csv")
    assert [row["row"] for row in rows] == list(TABLE["3c"]) and len(started) == 3
    assert [row["paper's HPSv2"] for row in rows] == ["26.74", "26.58", "26.48"]
    folder = tmp_path / "runs" / "SA-up-1-0"                       # a complete model, sampled as its teacher is
    assert preset(str(folder)) == preset("toy")._replace(source=str(folder)) and preset("toy").guidance != 7.5
    assert all(0 < float(row["distance"]) < 1 and 0 <= float(row["colour"]) <= 1 for row in rows)
    assert "F3" in capsys.readouterr().out and Image.open(tmp_path / "t.png").width >= 960
    monkeypatch.setattr(table3, "draw", None)                    # nothing is drawn again
    run(*command)
    assert read_csv(tmp_path / "t.csv") == rows


@pytest.mark.parametrize("log, status, message", [
    ("error: the disk is full\n", 1, "the disk is full"), ("", -9, "-9")])
def test_a_run_that_fails_is_named_and_no_other_is_started(tmp_path, monkeypatch, log, status, message):
    started = []

    def fail(command, stdout, **rest):
        started.append(command)
        stdout.write(log)
        return subprocess.CompletedProcess(command, status)

    monkeypatch.setattr(table3.subprocess, "run", fail)
    with pytest.raises(ValueError, match=f"none-bottom-200-0: .*{message}"):
        run("--runs", tmp_path, "--out", tmp_path / "t.png")
    assert len(started) == 1


@pytest.mark.parametrize("flags, teacher", [
    ([], "toy"), (["--teacher", "sdxl"], "sdxl"), (["--teacher=a/b"], "a/b"), (["--micro-batch", "8"], "toy")])
def test_the_teacher_is_read_as_distill_reads_it(flags, teacher):
    assert table3.parse_teacher(argparse.Namespace(steps=1, batch=16, distill=flags)) == teacher


@pytest.mark.parametrize("words", [
    "--seed 7", "--steps=9", "--out runs/x", "--feat-kd 0", "--no-normalize-features", "--dry-run",
    "--teacher none --init random"])
def test_flags_that_the_table_sets_itself_are_refused(tmp_path, monkeypatch, words):
    monkeypatch.setattr(table3.subprocess, "run", None)          # no run is started
    with pytest.raises(ValueError, match=words.split("=")[0].split()[0]):
        run("--runs", tmp_path, "--out", tmp_path / "t.png", "--", *words.split())
    assert not list(tmp_path.iterdir())


def test_flags_for_distill_are_checked_before_any_run(tmp_path, monkeypatch):
    monkeypatch.setattr(table3.subprocess, "run", None)
    with pytest.raises(SystemExit, match="2"):
        run("--runs", tmp_path, "--out", tmp_path / "t.png", "--", "--micro-batch", "0")


@pytest.mark.parametrize("damage", [b"colour,shape\n1\n", b"\xff\xfe\x00"])
def test_a_damaged_table_of_scores_is_named(tmp_path, damage):
    (tmp_path / "score-1-1.csv").write_bytes(damage)
    with pytest.raises(ValueError, match="score-1-1.csv"):
        table3.score(tmp_path, 1, "toy", ("a red circle",))
