"""A run's folder survives being stopped, killed, damaged and shared; what must not be mixed is refused."""

import contextlib
import errno
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import socket
import time
from functools import partial
from typing import Callable
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file, save_file

from common import FILE, RUN, checkpoint, contents, equal, log_rows, refusal, same
from model import load_unet
from support import hub
from support.data import CaptionedImages
from support.run import (
    SIGNALS, Log, ignore_signals, load_checkpoint, lock_run_dir, save_checkpoint, say)

# Processes


def start(job: Callable[[], int | None]):
    """In a forked process, runs a job as a program."""
    os.setpgrp()
    torch.set_num_threads(1)                                     # threads do not survive a fork
    hub.run(job, "advice")


def in_processes(*jobs: Callable[[], int | None], seconds: float = 60) -> list[int | None]:
    """Exit codes of functions that run at the same time, each in a forked process; None of one that hangs."""
    children = [multiprocessing.get_context("fork").Process(target=start, args=(job,)) for job in jobs]
    for child in children:
        child.start()
    for child in children:
        child.join(seconds)
    codes = [child.exitcode for child in children]
    for child in children:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)                 # with its readers
    return codes


def as_ranks(*jobs: Callable[[], int]) -> list[Callable[[], int]]:
    """The jobs as the processes of one torchrun."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])

    def start(rank: int) -> int:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(len(jobs)),
                       "LOCAL_WORLD_SIZE": str(len(jobs)), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        return jobs[rank]()
    return [partial(start, rank) for rank in range(len(jobs))]


@pytest.fixture
def copy(short_run, tmp_path):
    return shutil.copytree(short_run, tmp_path / "run")


# Stopped and resumed


@pytest.mark.parametrize("last, flags", [
    (4, ["--micro-batch", 1, "--decay", 0.5]), (2, ["--precision", "fp16", "--batch", 1])], ids=str)
def test_a_run_that_is_stopped_is_the_run_that_is_not(run, during, tmp_path, last, flags):
    """The first step's gradients are not finite, which fp16's scale must remember."""
    flags = [*flags, "--lr", "1e-3", "--steps", 3]

    def broken(call):
        return float("nan") if call == 1 else 1e-3               # so small that nothing else overflows

    def stop(call):
        if call == last:                                         # of the second step
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGTERM)                  # changes nothing
        return broken(call)

    for out, factor, code in (("whole", broken, 0), ("pieces", stop, 128 + signal.SIGINT),
                              ("pieces", lambda call: 1e-3, 0)):
        during(factor)
        assert run(*flags, out=out) == code
        modes = {path.stat().st_mode for path in (tmp_path / out).rglob("*.safetensors")}
        assert modes == {(tmp_path / out / "log.csv").stat().st_mode}  # by the umask
    (whole, tensors), (pieces, others) = checkpoint(tmp_path / "whole"), checkpoint(tmp_path / "pieces")
    assert whole == pieces and (whole["step"], whole["skipped_steps"]) == (3, 1) and equal(tensors, others)
    assert whole["scaler"].get("scale", 2.0**15) == 2.0**15      # half of the first
    assert sum(name.startswith("exp_avg_sq.") for name in tensors) == len(tensors) // 4
    assert log_rows(tmp_path / "whole") == log_rows(tmp_path / "pieces")
    assert equal(load_unet(tmp_path / "whole").state_dict(), load_unet(tmp_path / "pieces").state_dict())


def test_two_processes_are_one(run, during, tmp_path, pairs):
    """A signal to one of them stops both; the index of the data is made by the first alone."""
    flags = ["--steps", 3, "--micro-batch", 1, "--device", "cpu", "--lr", "1e-3", "--data", pairs]

    def two() -> int:
        return run(*flags, out="two")

    def stopped() -> int:
        CaptionedImages.write_index = None
        during(lambda call: signal.raise_signal(signal.SIGTERM) if call == 2 else None)
        return two()

    assert in_processes(*as_ranks(two, stopped), partial(run, *flags, out="one")) == [143, 143, 0]
    assert checkpoint(tmp_path / "two")[0]["step"] == 2
    assert in_processes(*as_ranks(two, two)) == [0, 0]
    (one, tensors), (two, others) = checkpoint(tmp_path / "one"), checkpoint(tmp_path / "two")
    assert one == two and sum(one["skipped"].values()) == 2 and equal(tensors, others)
    assert log_rows(tmp_path / "one") == log_rows(tmp_path / "two")


def test_a_run_that_is_killed_at_any_moment_loses_nothing_that_was_saved(run, tmp_path, capfd):
    """SIGKILL to the main process, or SIGTERM to it and its reader."""
    flags = ["--workers", 1, "--steps", 4, "--save-every", 1, "--batch", 1, "--features", "none"]
    assert in_processes(partial(run, *flags, out="whole")) == [0]  # with one thread, as those that are killed
    capfd.readouterr()
    log, rng, saved = tmp_path / "run" / "log.csv", random.Random(0), 0
    for kill, number in ((os.kill, signal.SIGKILL), (os.killpg, signal.SIGTERM)):
        child = multiprocessing.get_context("fork").Process(target=start, args=(partial(run, *flags),))
        before = log.exists() and log.stat()
        child.start()
        while child.is_alive() and before == (log.exists() and log.stat()):
            time.sleep(0.01)                                     # until it begins
        child.join(rng.uniform(0, 0.3))
        with contextlib.suppress(ProcessLookupError):
            kill(child.pid, number)
        child.join(30)
        # -SIGTERM: before the first step nothing is to be saved. 1: a reader was not yet ready for signals.
        assert child.exitcode in (0, 1, -signal.SIGKILL, -signal.SIGTERM, 128 + signal.SIGTERM)
        said = re.findall(r"saved .* at step (\d+)", capfd.readouterr().out)
        found = load_checkpoint(tmp_path / "run")
        step = found[1]["state"]["step"] if found else 0
        assert step >= max(map(int, said), default=saved)
        saved = step
    assert in_processes(partial(run, *flags)) == [0]
    assert equal(checkpoint(tmp_path / "run")[1], checkpoint(tmp_path / "whole")[1])
    assert log_rows(tmp_path / "run") == log_rows(tmp_path / "whole")


def test_a_file_system_without_locks_only_warns(tmp_path, monkeypatch, capsys):
    failing = mock.Mock(side_effect=OSError(errno.ENOLCK, "No locks available"))
    monkeypatch.setattr("support.run.fcntl.lockf", failing)
    lock_run_dir(tmp_path / "run")
    assert capsys.readouterr().err.count("warning: ") == 1


# Checkpoints


@pytest.mark.parametrize("name", [f"unet/{FILE}", "optimizer.safetensors", "state.json"])
def test_of_a_damaged_checkpoint_the_one_before_is_used(copy, capsys, name):
    """Or none, if both are damaged; no changed bit goes unnoticed."""
    older, newest = sorted(copy.glob("step-*"))
    content, whole = (newest / name).read_bytes(), load_checkpoint(copy)
    flipped = [content[:i] + bytes([content[i] ^ 4]) + content[i + 1:] for i in (0, len(content) // 3)]
    for damaged in (None, b"", content[:-1], *flipped):
        (newest / name).unlink(missing_ok=True)
        if damaged is not None:
            (newest / name).write_bytes(damaged)
        capsys.readouterr()
        folder, found = load_checkpoint(copy)
        err = capsys.readouterr().err
        assert folder == older and found["state"]["step"] == 1 and err.count("\n") == 1 and str(newest) in err
    (older / name).write_bytes(b"")
    assert str(copy) in refusal(load_checkpoint, copy)
    (newest / name).write_bytes(content)
    assert load_checkpoint(copy) == whole


def test_a_run_goes_on_past_a_damaged_checkpoint(run, copy, short_run):
    """Its log has neither gaps nor doubles: a row that was cut, or is of no checkpoint, is dropped."""
    (copy / "step-00000002" / "state.json").write_text("")
    shutil.copytree(copy / "step-00000002", copy / "step-00000009")
    with open(copy / "log.csv", "a") as file:
        file.write("3" + ",0.5" * (len(Log.COLUMNS) - 1) + "\n4,0.5,0.2")
    assert run("--steps", 2, "--save-every", 1) == 0
    assert [path.name for path in sorted(copy.glob("step-*"))] == ["step-00000001", "step-00000002"]
    assert equal(checkpoint(copy)[1], checkpoint(short_run)[1]) and log_rows(copy) == log_rows(short_run)
    assert same(load_unet(copy), load_unet(short_run).state_dict())
    (copy / "log.csv").write_text("step,task\n1,2\n")
    assert "log.csv" in refusal(Log, copy / "log.csv", 2)


def test_numbers_that_are_not_finite_are_not_saved(tmp_path):
    network = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(network.parameters())
    network(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    for numbers in (optimizer.state[network.weight]["exp_avg_sq"], network.bias.data):
        before = numbers.clone()
        numbers[0] = float("inf")
        with pytest.raises(FloatingPointError):
            save_checkpoint(tmp_path, {}, {"step": 3}, network, optimizer, lambda folder: None)
        numbers.copy_(before)
        assert not any(tmp_path.iterdir())


def test_steps_that_are_not_finite_are_skipped_and_twenty_in_a_row_end_the_run(run, during, tmp_path):
    """Though the run was stopped in between."""
    flags = ["--steps", 30, "--batch", 1, "--features", "none", "--out-kd", 0]

    def broken(call):
        if call == 12:
            signal.raise_signal(signal.SIGTERM)
        return float("inf") if call > 1 else None

    during(broken)
    assert run(*flags) == 128 + signal.SIGTERM
    during(lambda call: float("nan"))
    with pytest.raises(FloatingPointError):
        run(*flags)
    rows, (state, tensors) = log_rows(tmp_path / "run"), checkpoint(tmp_path / "run")
    assert [row["skipped_steps"] for row in rows] == [str(i) for i in range(20)]
    assert state["skipped_steps"] == state["step"] - 1
    assert all(tensor.isfinite().all() for tensor in tensors.values())


def test_a_full_disk(program, teacher, copy):
    """It ends the writing of the moments, which are larger than the weights."""
    before, limit = contents(copy), 900_000
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        code, _, err = program("distill.py", "--teacher", teacher, "--out", copy, *RUN, "--steps", 3)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert code == 1 and err.startswith("error: ") and err.count("\n") == 1 and str(copy) in err
    after = contents(copy)
    assert after.keys() == before.keys() and max(map(len, before.values())) > limit
    assert all(after[path] == before[path] for path in before if path.name != "log.csv")
    assert checkpoint(copy)[0]["step"] == 2


# The folder of a run


def test_two_runs_in_one_folder_are_refused(run, copy, capfd):
    lock = lock_run_dir(copy)
    assert in_processes(partial(run, "--steps", 3)) == [1]
    err = capfd.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1 and str(copy) in err
    lock.close()
    (copy / ".writing-x").mkdir()                                # of a process that was killed
    (copy / "step-00000002" / ".writing-y").mkdir()
    assert in_processes(partial(run, "--steps", 3)) == [0] and not list(copy.rglob(".writing-*"))
    (copy / "log.csv").unlink()                                  # a model, such as the teacher, and no run
    with pytest.raises(FileExistsError):
        lock_run_dir(copy)


def test_other_settings_are_refused_and_means_may_change(run, teacher, tmp_path, copy, short_run):
    changed, moved = (shutil.copytree(teacher, tmp_path / name) for name in ("changed", "moved"))
    weights = load_file(changed / "unet" / FILE)
    weights["conv_in.bias"][-1] += 1e-3
    save_file(weights, changed / "unet" / FILE)
    changes = {"seed": 5, "init": "random", "lr": 1e-4, "batch": 4, "features": "SA", "student": "1b",
               "decay": 0.5, "task": 2, "normalize-features": None, "out-kd": 2.0, "feat-kd": 2.0,
               "sa-blocks": "up", "precision": "fp16", "teacher": changed, "cache": tmp_path / "cache"}
    flags, before = [], contents(copy)
    for name, value in changes.items():
        flags += [f"--{name}"] + ([value] if value else [])
    message = refusal(run, *flags)
    assert contents(copy) == before
    for name in [*changes, "steps"]:                             # as --decay depends on them
        assert f" {name.replace('-', '_').replace('cache', 'cached')} was " in message
    assert " teacher was " in refusal(run, "--teacher", changed)  # above, other precision changes it too
    means = ["--teacher", moved, "--micro-batch", 1, "--workers", 1, "--checkpointing"]
    assert run("--steps", 3, *means) == 0
    assert len(log_rows(copy)) == 3 and log_rows(copy)[:2] == log_rows(short_run)
    assert "step 3" in refusal(run, "--steps", 2)


def test_a_finished_run_is_a_model_that_diffusers_loads(run, teacher, tmp_path):
    """Though the teacher's snapshot has only files named fp16."""
    diffusers = pytest.importorskip("diffusers")
    folder = shutil.copytree(teacher, tmp_path / "teacher")
    for path in [*folder.rglob("*.safetensors")]:
        half = {name: tensor.half() for name, tensor in load_file(path).items()}
        save_file(half, path.with_suffix(".fp16.safetensors"), {"format": "pt"})
        path.unlink()
    assert run("--teacher", folder, "--steps", 1) == 0
    pipeline = diffusers.StableDiffusionXLPipeline.from_pretrained(tmp_path / "run")
    assert same(load_unet(tmp_path / "run"), pipeline.unet.state_dict())
    assert pipeline.vae.dtype == torch.float32


def test_a_reader_that_dies_ends_the_run_in_one_line(run, during, tmp_path, capfd):
    def kill_reader(call):
        if call == 2:
            os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
            time.sleep(0.3)

    during(kill_reader)
    assert in_processes(partial(run, "--workers", 1, "--steps", 40, "--save-every", 1), seconds=30) == [1]
    err = capfd.readouterr().err
    assert err.count("error: ") == 1 and "--workers 0" in err and "Traceback" not in err
    assert checkpoint(tmp_path / "run")[0]["step"] >= 1


def test_readers_ignore_signals_and_a_terminal_that_is_gone_ends_nothing():
    with mock.patch("signal.signal") as handle:
        ignore_signals(0)
    assert handle.mock_calls == [mock.call(number, signal.SIG_IGN) for number in SIGNALS]
    gone = mock.Mock()
    gone.write.side_effect = BrokenPipeError
    say(gone, "saved")
