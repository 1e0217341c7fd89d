"""Table 3 in miniature: the rows are runs, each is run once, and the verdicts are by the spread."""

import subprocess

import pytest
from common import UNETS
from PIL import Image

import ablation
import analysis
import distill
from ablation import TABLE
from files import read_csv as read
from model import FEATURES, UNet, UNetConfig
from options import PRESETS, preset


def run(*words):
    args = analysis.command_line(list(map(str, words)))
    ablation.ablation(args)


def test_every_row_is_a_run_that_distill_knows():
    assert set(distill.KINDS) == set(FEATURES)
    unet = lambda name: UNet(UNetConfig.from_diffusers(UNETS[name]))
    student, teacher, matched = unet("1b"), unet("sdxl"), {}
    for rows in TABLE.values():
        for _, features, blocks in rows.values():
            distill.command_line(["--features", features, "--sa-blocks", blocks, "--student", "1b"])
            found = distill.match_features(student, teacher, features, blocks)
            matched.setdefault(tuple(found.items()), set()).add((features, blocks))
    assert all(len(same) == 1 for same in matched.values()), "different rows learn different things"
    assert all(name in TABLE[table] for table, _, better, worse in ablation.FINDINGS.values()
               for name in sum(worse, better))


def test_a_verdict_is_by_the_spread():
    high, low, wide = [0.9, 0.8, 0.85], [0.5, 0.4, 0.48], [0.2, 1.5, 0.9]
    assert (ablation.verdict([high], [[low]], 1) == "agrees"
            and ablation.verdict([high], [[low]], -1) == "disagrees")
    assert ablation.verdict([high], [[low], [wide]], 1) == "too close to tell"
    assert ablation.verdict([high, low], [[[0.1, 0.1, 0.1]]], 1) == "agrees"
    assert "one seed" in ablation.verdict([[1.0]], [[[0.0]]], 1)


def test_ablation_runs_each_run_once_and_resumes(tmp_path, monkeypatch, capsys):
    started = []

    def run_here(command, **rest):
        started.append(command[2:])
        return subprocess.CompletedProcess(command, distill.main(distill.command_line(command[2:])) or 0)

    # Runs are in this thread, where signals can be heard.
    monkeypatch.setattr(ablation, "in_parallel",
                        lambda jobs, work, items: {item: work(item) for item in items})
    monkeypatch.setattr(ablation.subprocess, "run", run_here)
    monkeypatch.setitem(PRESETS, "toy", PRESETS["toy"]._replace(steps=3))
    command = ("ablation", "--table", "3c", "--seeds", 1, "--steps", 1, "--batch", 1, "--judge", 2,
               "--runs", tmp_path / "runs", "--out", tmp_path / "t.png")
    run(*command)
    rows = read(tmp_path / "t.csv")
    assert [row["row"] for row in rows] == list(TABLE["3c"]) and len(started) == 3
    assert [row["paper's HPSv2"] for row in rows] == ["26.74", "26.58", "26.48"]
    folder = tmp_path / "runs" / "SA-up-0"                       # a bundle, sampled as its teacher is
    assert preset(str(folder)) == preset("toy")._replace(source=str(folder)) and preset("toy").guidance != 7.5
    assert all(0 < float(row["distance"]) < 1 and 0 <= float(row["colour"]) <= 1 for row in rows)
    assert "F3" in capsys.readouterr().out and Image.open(tmp_path / "t.png").width >= 960
    monkeypatch.setattr(ablation, "draw", None)                  # nothing is drawn again
    run(*command)
    assert read(tmp_path / "t.csv") == rows


def test_a_run_that_fails_is_named(tmp_path, monkeypatch):
    def fails(command, stdout, **rest):
        stdout.write("error: the disk is full\n")
        return subprocess.CompletedProcess(command, 1)
    monkeypatch.setattr(ablation.subprocess, "run", fails)
    with pytest.raises(ValueError, match="none-bottom-0: the disk is full"):
        run("ablation", "--runs", tmp_path, "--out", tmp_path / "t.png")
    monkeypatch.setattr(ablation.subprocess, "run",
                        lambda command, **rest: subprocess.CompletedProcess(command, -9))
    with pytest.raises(ValueError, match="none-bottom-0: it ended with -9"):
        run("ablation", "--runs", tmp_path, "--out", tmp_path / "t.png")


def test_once_a_run_has_failed_no_other_is_begun():
    begun = []

    def work(item):
        begun.append(item)
        if item == 2:
            raise ValueError("no")
        return -item

    assert ablation.in_parallel(2, work, [0, 1]) == {0: 0, 1: -1}
    begun.clear()
    with pytest.raises(ValueError, match="no"):
        ablation.in_parallel(1, work, list(range(100)))
    assert begun == [0, 1, 2]


def test_the_teacher_is_read_as_distill_reads_it():
    for words, teacher in (([], "toy"), (["--", "--teacher", "sdxl"], "sdxl"),
                           (["--", "--teacher=a/b"], "a/b")):
        assert ablation.teacher_of(analysis.command_line(["ablation", *words])) == teacher


@pytest.mark.parametrize("words", [
    "--seed 7", "--steps=9", "--out runs/x", "--feat-kd 0", "--cache x", "--dry-run"])
def test_what_is_the_tables_own_is_not_taken_from_the_flags_for_distill(tmp_path, monkeypatch, words):
    monkeypatch.setattr(ablation.subprocess, "run", None)        # no run is begun
    with pytest.raises(ValueError, match=f"^{words.split('=')[0].split()[0]}.* is not for distill.py"):
        run("ablation", "--runs", tmp_path, "--out", tmp_path / "t.png", "--", *words.split())
    with pytest.raises(ValueError, match="teacher none"):
        run("ablation", "--out", tmp_path / "t.png", "--", "--teacher", "none", "--init", "random")
    assert not list(tmp_path.iterdir())


def test_the_flags_are_checked_as_the_runs_will_read_them(tmp_path, capsys):
    args = analysis.command_line(["ablation", "--batch", "24", "--", "--micro-batch", "12"])
    assert ablation.teacher_of(args) == "toy"
    with pytest.raises(SystemExit):
        ablation.teacher_of(analysis.command_line(["ablation", "--", "--task", "0"]))
    assert "nothing to learn" in capsys.readouterr().err


@pytest.mark.parametrize("damage", [b"colour,shape\n1\n", b"\xff\xfe\x00"])
def test_a_damaged_table_is_named(tmp_path, damage):
    (tmp_path / "score-1-1.csv").write_bytes(damage)
    with pytest.raises(ValueError, match="score-1-1.csv .*; remove it"):
        ablation.score(tmp_path, 1, "toy", ("a red circle",))
