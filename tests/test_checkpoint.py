"""A run's folder survives being stopped, killed, damaged, moved and shared; what must not be mixed is refused."""

import multiprocessing
import os
import resource
import shutil
import signal
import socket
import sys
import time
from functools import partial
from pathlib import Path
from typing import Callable

import numpy as np
import pytest
import torch
from runs import (
    RUN, checkpoint, contents, equal, in_processes, log_rows, needs_fork, write_pairs, write_tar, write_vae)
from safetensors.torch import save_file
from torch import nn

import distill
from model import load_unet, read_tensors, save_unet
from support import checkpoint as checkpoints
from support import cli, files
from support.checkpoint import (
    Log, StopSignal, load_checkpoint, lock_run_dir, resume, save_checkpoint, start_reader)

# ------------------------------------------------------------------------------------------------------------
# Checkpoints of a small network

IDENTITY = {"seed": 7, "decay": 0.5, "steps": None}


class Small(nn.Linear):
    """A network and its optimizer after one step, with numbers of their own for each seed."""

    def __init__(self, seed: int):
        torch.manual_seed(seed)
        super().__init__(3, 2)
        self.optimizer = torch.optim.AdamW(self.parameters())
        self(torch.randn(4, 3)).square().sum().backward()
        self.optimizer.step()

    def write(self, folder: Path):
        (folder / "unet").mkdir()
        save_file(self.state_dict(), folder / "unet" / "weights.safetensors")
        (folder / "unet" / "config.json").write_text("{}")

    def read(self, folder: Path):
        self.load_state_dict(read_tensors(folder / "unet" / "weights.safetensors"))

    def save(self, run: Path, step: int, **state):
        save_checkpoint(run, IDENTITY, {"step": step, "updates": 1, **state}, self, self.optimizer, self.write)

    def resume(self, run: Path, identity: dict = IDENTITY) -> dict:
        return resume(run, identity, self, self.optimizer, self.read)


def same_state(one: Small, other: Small) -> bool:
    """Whether two networks have the same weights and moments."""
    ours, theirs = (network.optimizer.state_dict()["state"] for network in (one, other))
    return (equal(one.state_dict(), other.state_dict()) and ours.keys() == theirs.keys()
            and all(equal(ours[i], theirs[i]) for i in ours))


NETWORKS = [Small(seed) for seed in range(5)]


def write_two(run: Path) -> list[Path]:
    for step in (1, 2):
        NETWORKS[step].save(run, step)
    return sorted(run.glob("step-*"))


def resumed(run: Path) -> int:
    """The step that a run resumes from; its weights, moments and unet/ have to be those of this step."""
    network = Small(99)
    step = network.resume(run)["step"]
    assert same_state(network, NETWORKS[step])
    assert equal(read_tensors(run / "unet" / "weights.safetensors"), network.state_dict())
    assert (run / "unet" / "config.json").read_text() == "{}"
    return step


def test_the_last_two_checkpoints_are_kept(tmp_path):
    for step in range(1, 5):
        NETWORKS[step].save(tmp_path, step, scaler={"scale": 2.0})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000003", "step-00000004", "unet"]
    assert resumed(tmp_path) == 4 and Small(9).resume(tmp_path)["scaler"] == {"scale": 2.0}
    assert Small(9).resume(tmp_path / "absent") == {}
    assert not list(tmp_path.rglob(".*"))                        # nothing is left half-written


@pytest.mark.parametrize(
    "name", ["unet/weights.safetensors", "unet/config.json", "optimizer.safetensors", "state.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "page", "older", "absent"])
def test_of_a_damaged_checkpoint_the_one_before_is_used(tmp_path, capsys, name, damage):
    older, newest = write_two(tmp_path)
    path, content = newest / name, bytearray((newest / name).read_bytes())
    content[-1] ^= 4
    content = {"flip": content, "cut": content[:-1], "empty": b"", "page": b"<html>",
               "older": (older / name).read_bytes() + b" " * (name == "unet/config.json"), "absent": b""}[damage]
    path.unlink()                                                # unet/ has a link to it
    if damage != "absent":
        path.write_bytes(content)
    if (name, damage) == ("state.json", "older"):                # of other files
        assert "weights" in path.read_text()
    assert resumed(tmp_path) == 1
    err = capsys.readouterr().err
    assert err.startswith("warning: ") and err.count("\n") == 1 and str(newest) in err
    (older / name).write_bytes(b"")
    with pytest.raises(ValueError, match=str(tmp_path)) as error:
        resumed(tmp_path)
    assert "\n" not in str(error.value)


def test_a_run_goes_on_past_its_damaged_checkpoints(tmp_path):
    for path in write_two(tmp_path):
        shutil.copytree(path, tmp_path / path.name.replace("0000000", "0000001"))
    for path in tmp_path.glob("step-*[1-9][12]"):
        (path / "state.json").write_text("")
    assert resumed(tmp_path) == 2
    NETWORKS[3].save(tmp_path, 3)
    assert [path.name for path in sorted(tmp_path.glob("step-*"))] == ["step-00000002", "step-00000003"]
    (tmp_path / "step-00000003" / "state.json").write_text("")
    assert resumed(tmp_path) == 2
    NETWORKS[3].save(tmp_path, 3)
    assert resumed(tmp_path) == 3


def test_no_changed_byte_of_a_checkpoint_goes_unnoticed(tmp_path, capsys):
    older, newest = write_two(tmp_path)
    shutil.rmtree(older)
    whole, rng = load_checkpoint(tmp_path), np.random.default_rng(0)
    for path in newest.rglob("*.*"):
        content = path.read_bytes()
        for i in range(0, len(content), 2):
            damaged = bytearray(content)
            damaged[i] ^= 1 << int(rng.integers(8))
            path.write_bytes(damaged)
            try:
                assert load_checkpoint(tmp_path) == whole, (path, content[max(i - 12, 0):i + 1])
            except ValueError:
                continue
            assert path.name == "state.json", (path, i)          # whose spaces may change
        path.write_bytes(content)
    assert load_checkpoint(tmp_path) == whole


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_not_saved(tmp_path, number):
    write_two(tmp_path)
    before = contents(tmp_path)
    for part in ("weights", "moments"):
        network = Small(3)
        moments = network.optimizer.state[network.weight]["exp_avg_sq"]
        (network.bias if part == "weights" else moments).data[0] = number
        with pytest.raises(FloatingPointError):
            network.save(tmp_path, 3)
        assert contents(tmp_path) == before


def test_a_save_that_is_killed_at_any_line_leaves_a_good_checkpoint(tmp_path, monkeypatch):
    """Before each line of a save, copies what a kill would leave on the disk, unless it is as before."""
    run, copies = tmp_path / "run", []
    write_two(run)

    def trace(frame, event, value):
        if frame.f_code.co_filename not in (checkpoints.__file__, files.__file__):
            return None
        if event == "line" and (not copies or contents(copies[-1]) != contents(run)):
            copies.append(shutil.copytree(run, tmp_path / f"copy {len(copies)}"))
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        NETWORKS[3].save(run, 3)
    finally:
        sys.settrace(before)
    monkeypatch.setattr(files, "sync", lambda path: None)        # these saves need not be on the disk
    found = []
    for killed in [*copies, run]:
        lock_run_dir(killed).close()
        assert not list(killed.rglob(".writing-*"))              # what was left is removed
        shown = read_tensors(killed / "unet" / "weights.safetensors")
        assert any(equal(shown, NETWORKS[step].state_dict()) for step in (2, 3))
        found.append(resumed(killed))
        NETWORKS[4].save(killed, 4)
        assert resumed(killed) == 4 and len(list(killed.glob("step-*"))) == 2
    assert found == sorted(found) and set(found) == {2, 3} and len(found) > 10


# ------------------------------------------------------------------------------------------------------------
# The folder of a run


@pytest.mark.parametrize("limit", [4096, 900_000])
def test_a_full_disk(program, teacher, tmp_path, short_run, limit):
    """The limit ends the writing of the weights, or only of the larger moments."""
    shutil.copytree(short_run, tmp_path / "run")
    before = contents(tmp_path / "run")
    sizes = sorted(len(content) for content in before.values())
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        code, _, err = program("--teacher", teacher, "--out", tmp_path / "run", *RUN, "--steps", "3")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert code == 1 and err.startswith("error: ") and "\n" not in err and str(tmp_path) in err
    after = contents(tmp_path / "run")
    assert after.keys() == before.keys() and sizes[-1] > limit
    assert all(after[path] == before[path] for path in before if path.name != "log.csv")
    assert checkpoint(tmp_path / "run")[0]["step"] == 2


def test_a_second_run_in_a_folder_is_refused(tmp_path):
    lock = lock_run_dir(tmp_path / "run")
    with pytest.raises(BlockingIOError, match="--out"):
        lock_run_dir(tmp_path / "run")
    lock.close()
    (tmp_path / "run" / ".writing-x").mkdir()
    (tmp_path / "run" / ".writing-x" / ".writing-y").touch()
    lock_run_dir(tmp_path / "run").close()
    assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]


def test_a_lock_is_a_plain_file(tmp_path):
    (tmp_path / "victim").write_text("kept")
    (tmp_path / ".lock").symlink_to(tmp_path / "victim")
    with pytest.raises(FileExistsError, match=".lock"):
        lock_run_dir(tmp_path)
    assert (tmp_path / "victim").read_text() == "kept"
    (tmp_path / ".lock").unlink()
    os.mkfifo(tmp_path / ".lock")
    with pytest.raises(FileExistsError, match=".lock"):
        lock_run_dir(tmp_path)


@needs_fork
def test_a_child_that_outlives_its_process_does_not_keep_the_lock(tmp_path):
    def job():
        _lock = lock_run_dir(tmp_path)
        begun, begin = os.pipe()
        if os.fork() == 0:
            os.write(begin, b"1")
            time.sleep(5)
            os._exit(0)
        os.read(begun, 1)
        os._exit(0)

    assert in_processes(job) == [0]
    lock_run_dir(tmp_path).close()


def test_a_run_of_another_program_is_refused(tmp_path):
    (tmp_path / "bundle").mkdir()
    with pytest.raises(FileExistsError, match="--out"):
        lock_run_dir(tmp_path, other="bundle")
    lock_run_dir(tmp_path, other="log.csv").close()
    (tmp_path / "log.csv").touch()
    with pytest.raises(FileExistsError, match="--out"):
        lock_run_dir(tmp_path, other="log.csv")


def test_a_folder_that_has_a_model_and_no_run_is_refused(tmp_path):
    for name in ("model_index.json", "config.json", "unet"):
        folder = tmp_path / name
        (folder / name).mkdir(parents=True)
        with pytest.raises(FileExistsError, match="--out"):
            lock_run_dir(folder)
        assert [path.name for path in folder.iterdir()] == [name]
        (folder / "log.csv").touch()
        lock_run_dir(folder).close()


@pytest.mark.parametrize("content", [b"foo,bar\n1,2\n", b"step\nx\n", b"step,task\n1,2,3\n", b"\xff\xfe\n"])
def test_a_log_of_something_else_is_refused(tmp_path, content):
    (tmp_path / "log.csv").write_bytes(content)
    with pytest.raises(ValueError, match="log.csv"):
        Log(tmp_path / "log.csv", 3)
    assert (tmp_path / "log.csv").read_bytes() == content


def test_a_row_of_the_log_that_was_cut_or_is_of_no_checkpoint_is_dropped(run, tmp_path, short_run):
    shutil.copytree(short_run, tmp_path / "run")
    with open(tmp_path / "run" / "log.csv", "a") as file:
        file.write("3" + ",0.5" * (len(Log.COLUMNS) - 1) + "\n4,0.5,0.2")
    assert run("--steps", "3") == 0
    rows = log_rows(tmp_path / "run")
    assert [row["step"] for row in rows] == ["1", "2", "3"] and rows[:2] == log_rows(short_run)
    assert rows[2]["task"] != "0.5" and None not in rows[2].values()


def test_a_log_with_fewer_columns_goes_on(tmp_path):
    (tmp_path / "log.csv").write_text("step,task,seconds\n1,0.5,9\n2,0.4,9\n")
    Log(tmp_path / "log.csv", 1).write(step=2, task=0.3, mfu=0.25)
    rows = log_rows(tmp_path)
    assert [(row["step"], row["task"], row["fixed_outKD"]) for row in rows] == [("1", "0.5", ""), ("2", "0.3", "")]
    assert list(rows[0]) == [name for name in Log.COLUMNS if name not in ("seconds", "images_per_s", "mfu")]


def test_a_finished_run_gets_back_a_unet_that_was_deleted(run, tmp_path, short_run):
    shutil.copytree(short_run, tmp_path / "run")
    before = contents(tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "unet")
    assert run("--steps", "2", "--save-every", "1") == 0
    assert contents(tmp_path / "run") == before


# ------------------------------------------------------------------------------------------------------------
# Stopped and resumed


@pytest.mark.parametrize("steps, flags", [
    (3, ["--micro-batch", "1", "--decay", "0.5"]), (4, ["--precision", "fp16", "--batch", "1"])])
def test_a_run_that_is_stopped_after_every_step_is_the_run_that_is_not(run, during, tmp_path, steps, flags, capfd):
    """The first step's gradients are not finite, which fp16's scale must remember."""
    def broken(call: int) -> float | None:
        return float("nan") if call == 1 else None

    during(broken)
    flags = [*flags, "--lr", "1e-3", "--steps", steps]
    assert run(*flags, out="whole") == 0
    for sitting in range(steps):
        number = signal.SIGINT if sitting % 2 else signal.SIGTERM

        def stop(call):
            if call == 1:
                signal.raise_signal(number)
            return broken(call) if sitting == 0 else None
        during(stop)
        assert run(*flags, out="pieces") == 128 + number
        out, err = capfd.readouterr()
        assert "rerun the same command to resume" in out and "after 3 s a second signal ends at once" in err
        assert (f"resumed at step {sitting}" in out) == (sitting > 0)
        assert checkpoint(tmp_path / "pieces")[0]["step"] == sitting + 1
    assert run(*flags, out="pieces") == 0
    (whole, tensors), (pieces, others) = checkpoint(tmp_path / "whole"), checkpoint(tmp_path / "pieces")
    assert equal(tensors, others) and whole == pieces
    assert sum(name.startswith("exp_avg_sq.") for name in tensors) == len(tensors) // 3
    assert whole["updates"] > 0 and ("fp16" not in flags or whole["scaler"]["scale"] < 2**16)
    assert log_rows(tmp_path / "whole") == log_rows(tmp_path / "pieces")
    assert equal(load_unet(tmp_path / "whole").state_dict(), load_unet(tmp_path / "pieces").state_dict())
    if "--decay" in flags:                                       # a run of falling rate cannot be made longer
        with pytest.raises(ValueError, match="steps was 3 and is 4"):
            run(*flags, "--steps", "4", out="whole")


def test_a_reader_says_nothing_of_a_connection_that_the_end_of_the_run_breaks(monkeypatch, capsys):
    monkeypatch.setattr(signal, "signal", lambda number, handler: None)
    monkeypatch.setattr(sys, "excepthook", None)
    start_reader(0)
    for kind in (ConnectionResetError, EOFError):
        sys.excepthook(kind, kind("cut"), None)
    assert capsys.readouterr().err == ""
    sys.excepthook(KeyError, KeyError("pixels"), None)
    assert "KeyError: 'pixels'" in capsys.readouterr().err


def test_a_step_that_is_not_finite_is_skipped_and_counted(run, during, tmp_path):
    def locked_and_broken(call):
        with pytest.raises(BlockingIOError):
            lock_run_dir(tmp_path / "run")
        return float("nan") if call == 2 else None

    during(locked_and_broken)
    assert run("--steps", "1") == 0
    first = checkpoint(tmp_path / "run")[1]
    assert run("--steps", "3", "--save-every", "1") == 0         # the second call is its first step
    log = log_rows(tmp_path / "run")
    assert [row["skipped_steps"] for row in log] == ["0", "1", "1"] and log[1]["task"] == "nan"
    third, weights = checkpoint(tmp_path / "run")
    assert not equal(first, weights) and (third["updates"], third["skipped_in_a_row"]) == (2, 0)
    shutil.rmtree(tmp_path / "run" / "step-00000003")
    assert equal(first, checkpoint(tmp_path / "run")[1])


def test_twenty_steps_in_a_row_that_are_not_finite_end_the_run(run, during, tmp_path):
    """Though the run was stopped in between."""
    flags = ["--steps", "30", "--batch", "1", "--features", "none", "--out-kd", "0"]

    def broken(call):
        if call == 12:
            signal.raise_signal(signal.SIGTERM)
        return float("inf") if call > 1 else None

    during(broken)
    assert run(*flags) == 128 + signal.SIGTERM
    during(lambda call: float("inf"))
    with pytest.raises(FloatingPointError, match="--precision bf16") as error:
        run(*flags)
    assert "\n" not in str(error.value) and len(log_rows(tmp_path / "run")) == 21
    state, tensors = checkpoint(tmp_path / "run")
    assert state["updates"] == 1 and all(tensor.isfinite().all() for tensor in tensors.values())


def test_a_run_in_the_background_goes_on_ignoring_interrupts():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    with StopSignal() as stop:
        signal.raise_signal(signal.SIGINT)
        assert not stop.received and signal.getsignal(signal.SIGTERM) == stop.receive
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    signal.signal(signal.SIGINT, before)


@needs_fork
def test_a_signal_to_the_readers_of_data_too_loses_no_step(run, during, tmp_path):
    during(lambda call: os.killpg(0, signal.SIGTERM) if call == 2 else None)

    def job():
        os.setpgrp()
        return run("--workers", "1")

    assert in_processes(job) == [128 + signal.SIGTERM]
    assert [row["step"] for row in log_rows(tmp_path / "run")] == ["1", "2"]


@needs_fork
def test_a_reader_of_data_that_is_killed_ends_the_run_in_one_line(run, during, tmp_path):
    def kill_reader(call):
        if call == 2:
            os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
            time.sleep(0.5)

    def job() -> int:
        try:
            cli.run(lambda: run("--workers", "1", "--steps", "40", "--save-every", "1"), "advice")
        except SystemExit as error:
            return 7 if str(error.code).startswith("error: DataLoader worker") and "\n" not in error.code else 8

    during(kill_reader)
    assert in_processes(job) == [7] and checkpoint(tmp_path / "run")[0]["step"] >= 1


@pytest.mark.parametrize("error", [ConnectionResetError("cut"), ConnectionRefusedError("cut"), EOFError()])
def test_a_reader_that_dies_as_it_hands_over_samples_is_named(monkeypatch, error):
    def cut(*args, **kwargs):
        yield ["samples"]
        raise error

    monkeypatch.setattr(distill, "DataLoader", cut)
    loader = distill.read_ahead(distill.parse_args([]), [], 0, "cpu")
    assert next(loader) == ["samples"]
    with pytest.raises(RuntimeError, match="^DataLoader worker died"):
        next(loader)


@needs_fork
def test_no_reader_of_data_outlives_a_run_that_ends_with_an_error():
    def deaf():
        start_reader(0)
        time.sleep(60)

    def main():
        reader.start()
        time.sleep(0.2)
        raise RuntimeError("DataLoader worker died")

    reader = multiprocessing.get_context("fork").Process(target=deaf)
    with pytest.raises(SystemExit, match="^error: DataLoader worker died; rerun the same command"):
        cli.run(main, "advice")
    reader.join(10)
    assert reader.exitcode == -signal.SIGKILL


@needs_fork
@pytest.mark.parametrize("patience, code", [(-1, 130), (60, 143)])
def test_a_second_signal_ends_at_once_unless_it_is_the_first_told_twice(run, during, monkeypatch, patience, code):
    monkeypatch.setattr(StopSignal, "PATIENCE", patience)

    def twice(call):
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)

    during(twice)
    assert in_processes(run) == [code]
    during(lambda call: None)
    assert run("--steps", "1") == 0


# ------------------------------------------------------------------------------------------------------------
# What a resumed run must have in common with its checkpoint


def test_a_run_with_other_settings_is_refused(run, teacher, tmp_path, short_run):
    shutil.copytree(short_run, tmp_path / "run")
    before = contents(tmp_path / "run")
    changes = {"seed": 5, "lr": 1e-4, "batch": 4, "features": "SA", "student": "1b", "decay": 0.5, "task": 2.0,
               "normalize_features": None, "flip": None,
               "out_kd": 2.0, "feat_kd": 2.0, "clip": 2.0, "dropout": 0.5, "sa_blocks": "up",
               "precision": "fp16", "cache": tmp_path / "cache", "vae": write_vae(teacher, tmp_path / "vae")}
    flags = []
    for name, value in changes.items():
        flags += [f"--{name.replace('_', '-')}"] + ([str(value)] if value else [])
    with pytest.raises(ValueError, match="--out") as error:
        run(*flags)
    message = str(error.value)
    assert "\n" not in message and contents(tmp_path / "run") == before
    names = {"cache": "cached", "vae": "encoders"}
    for name in [*changes, "steps"]:                             # as --decay depends on them
        assert f" {names.get(name, name)} was " in message
    assert "lr was 1e-05 and is 0.0001" in message


def test_a_run_may_be_made_longer_and_its_means_changed(run, tmp_path, short_run):
    shutil.copytree(short_run, tmp_path / "run")
    assert run("--steps", "3", "--micro-batch", "1", "--workers", "1", "--checkpointing", "full") == 0
    rows = log_rows(tmp_path / "run")
    assert [row["step"] for row in rows] == ["1", "2", "3"] and rows[:2] == log_rows(short_run)


def test_folders_may_move_and_what_is_in_them_may_not_change(run, teacher, tmp_path):
    """The teacher's weights and the data are known by their contents, whatever their names."""
    def flags(teacher: Path, data: Path) -> list:
        return ["--teacher", teacher, "--data", data, "--steps"]

    first = [shutil.copytree(teacher, tmp_path / "teacher"), write_pairs(tmp_path / "data")]
    for steps, out in ((3, "whole"), (2, "moved")):
        assert run(*flags(*first), steps, out=out) == 0
    moved = [folder.rename(tmp_path / f"{folder.name} elsewhere") for folder in first]
    (tmp_path / "moved").rename(tmp_path / "run elsewhere")
    assert run(*flags(*moved), 3, out="run elsewhere") == 0
    assert equal(checkpoint(tmp_path / "whole")[1], checkpoint(tmp_path / "run elsewhere")[1])
    assert log_rows(tmp_path / "whole") == log_rows(tmp_path / "run elsewhere")

    unet = load_unet(shutil.copytree(moved[0], first[0]))
    with torch.no_grad():
        unet.conv_in.bias[0] += 1e-3
    save_unet(unet, first[0] / "unet")
    with pytest.raises(ValueError, match="teacher was"):
        run(*flags(first[0], moved[1]), 4, out="whole")
    shutil.copytree(moved[1], first[1])
    (first[1] / "0.png").write_bytes((first[1] / "2.png").read_bytes() + b"more")
    with pytest.raises(ValueError, match="data was"):
        run(*flags(moved[0], first[1]), 4, out="whole")


# ------------------------------------------------------------------------------------------------------------
# Several processes


def test_processes_that_see_other_folders_are_refused(monkeypatch):
    checkpoints.check_agreement("step 3, data 12ab")
    monkeypatch.setattr(checkpoints, "gather_dicts", lambda mine: mine | {1: "step 3, data 12ab"})
    checkpoints.check_agreement("step 3, data 12ab")
    with pytest.raises(ValueError, match="--out and --data") as error:
        checkpoints.check_agreement("step 0, data 12ab")
    assert "\n" not in str(error.value)


def as_ranks(*jobs: Callable[[], int]) -> list[Callable[[], int]]:
    """The jobs as the processes of one torchrun."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def start(rank: int) -> int:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(len(jobs)),
                       "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        return jobs[rank]()
    return [partial(start, rank) for rank in range(len(jobs))]


@needs_fork
@pytest.mark.parametrize("flags, shards", [
    ([], False), (["--task", "0", "--out-kd", "0", "--features", "SA@DW-2"], True)], ids=["all", "one feature"])
def test_two_processes_are_one(run, during, tmp_path, pairs, flags, shards):
    """With images or shards; a signal to one of them stops both."""
    if shards:
        write_tar(pairs)
    flags = ["--steps", "3", "--micro-batch", "1", "--device", "cpu", "--lr", "1e-3", "--data", pairs,
             "--seed", "3", *flags]  # with this seed only the second process skips a sample

    def two() -> int:
        return run(*flags, out="two")

    def stopped() -> int:
        during(lambda call: signal.raise_signal(signal.SIGTERM) if call == 2 else None)
        return two()

    assert in_processes(*as_ranks(two, stopped), lambda: run(*flags, out="one")) == [143, 143, 0]
    assert checkpoint(tmp_path / "two")[0]["step"] == 2
    assert in_processes(*as_ranks(two, two)) == [0, 0]
    (one, tensors), (two, others) = checkpoint(tmp_path / "one"), checkpoint(tmp_path / "two")
    assert one == two and len(one["skipped_samples"]) == 2 and equal(tensors, others)
    assert log_rows(tmp_path / "one") == log_rows(tmp_path / "two")


@needs_fork
def test_processes_that_do_not_share_their_folder_end_before_the_first_step(run, tmp_path, capfd):
    flags = ["--steps", "2", "--micro-batch", "1", "--device", "cpu"]
    assert run(*flags, out="one") == 0

    def process(out: str) -> int:
        try:
            return run(*flags[2:], "--steps", "4", out=out)
        except ValueError as error:
            return 7 if "step 2" in str(error) and "step 0" in str(error) else 8

    assert in_processes(*as_ranks(lambda: process("one"), lambda: process("other"))) == [7, 7]
    assert checkpoint(tmp_path / "one")[0]["step"] == 2 and not (tmp_path / "other" / "log.csv").exists()
