"""Names of models, which of their files are downloaded, errors in one line, whole files."""

import errno
import os
import re
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from huggingface_hub.utils import filter_repo_objects

from common import FILE, HALF_FILE, WEIGHTS, contents, refusal
from support import files, hub
from support.files import atomic_write, read_csv, sync, write_csv, write_json
from support.hub import Preset, local_folder, preset

# Which files of a model are downloaded

MODEL = f"""
    README.md model_index.json sd_xl_base_1.0.safetensors scheduler/scheduler_config.json
    text_encoder/config.json text_encoder/flax_model.msgpack text_encoder/model.fp16.safetensors
    text_encoder/model.safetensors tokenizer/merges.txt tokenizer/vocab.json
    unet/config.json unet/{HALF_FILE} unet/{FILE} unet/{WEIGHTS}.bin unet/{WEIGHTS}.non_ema.safetensors
    vae/config.json vae/{HALF_FILE} vae/{FILE} vae_1_0/config.json vae_1_0/{FILE}""".split()
CONFIGS = [name for name in MODEL if name.endswith(("json", "txt")) and not name.startswith("vae_1_0")]
PLAIN = ["text_encoder/model.safetensors", f"unet/{FILE}"]
HALF = ["text_encoder/model.fp16.safetensors", f"unet/{HALF_FILE}"]
SHARDS = [f"unet/{WEIGHTS}-0000{i}-of-00002{half}.safetensors" for i in (1, 2) for half in ("", ".fp16")]


@pytest.mark.parametrize("files, parts, options, expected", [
    (MODEL, hub.PARTS, {}, [*CONFIGS, *PLAIN, f"vae/{FILE}"]),
    (MODEL, hub.PARTS, {"half": True}, [*CONFIGS, *HALF, f"vae/{FILE}"]),  # of the VAE the plain one
    (MODEL, hub.PARTS, {"weights": False}, CONFIGS),
    (["README.md", "config.json", FILE, HALF_FILE], ("vae",), {"half": True}, ["config.json", FILE]),
    (["vae/config.json", f"vae/{HALF_FILE}"], ("vae",), {}, ["vae/config.json", f"vae/{HALF_FILE}"]),
    (["unet/config.json", f"unet/{FILE}"], ("unet",), {"half": True}, ["unet/config.json", f"unet/{FILE}"]),
    (["unet/config.json", *SHARDS], ("unet",), {}, ["unet/config.json", *SHARDS[::2]])])
def test_what_is_downloaded(monkeypatch, tmp_path, files, parts, options, expected):
    def snapshot_download(source, **patterns):
        for name in filter_repo_objects(files, **patterns):      # as the hub does
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).touch()
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert local_folder("a/model", parts, **options) == tmp_path
    assert sorted(map(str, contents(tmp_path))) == sorted(expected)


def test_a_model_that_cannot_be_had_is_one_line(monkeypatch, tmp_path):
    failing = mock.Mock(side_effect=RuntimeError("It went wrong.\n\nA second line"))
    monkeypatch.setattr("huggingface_hub.snapshot_download", failing)
    assert "hf download a/model" in refusal(local_folder, "a/model")
    monkeypatch.chdir(tmp_path)
    Path("a/model").mkdir(parents=True)
    Path("a/sdxl.safetensors").touch()
    assert local_folder("a/model") == Path("a/model")            # before the hub
    for name in ("a/sdxl.safetensors", "nowhere", f"{tmp_path}/nowhere", "a/b/c"):
        assert name in refusal(local_folder, name)


def test_presets(tmp_path):
    assert preset("sdxl") == preset("stabilityai/stable-diffusion-xl-base-1.0") == hub.PRESETS["sdxl"]
    assert preset(hub.TOY) == hub.PRESETS["toy"] and preset("toy-1b").unet == str(hub.STUDENTS / "1b")
    assert preset("etri-vilab/koala-lightning-700m")[1:5] == (10, 3.5, "trailing", "euler")
    assert preset("x/y") == Preset("x/y", 25, 7.5)
    write_json(tmp_path / "preset.json", {"steps": 3, "guidance": 2.0, "spacing": None, "sampler": "ddim"})
    assert preset(tmp_path) == Preset(str(tmp_path), 3, 2.0, None, "ddim")


# Errors


@pytest.mark.parametrize("error, expected", [
    (ValueError("no\x1b[31m such"), "no?[31m such"), (FloatingPointError("nan"), "nan"),
    (OSError(errno.ENOSPC, "No space left", "/a"), "/a: No space left"), (KeyboardInterrupt(), 130),
    (torch.OutOfMemoryError("CUDA out of memory. Tried\nmore"), "memory; advice"), (None, 0),
    (ValueError("Caught ValueError in DataLoader worker process 0.\nOriginal\nValueError: no"), "Error: no"),
    (RuntimeError("DataLoader worker (pid 1) is killed by signal: Killed."), "--workers 0"),
    (KeyError("x"), None), (RuntimeError("NCCL error"), None)], ids=repr)
def test_errors_are_one_line_and_mistakes_keep_their_traceback(error, expected):
    main = mock.Mock(side_effect=error, return_value=0)
    with pytest.raises(type(error) if expected is None else SystemExit) as caught:
        hub.run(main, "advice")
    code = getattr(caught.value, "code", None)
    assert code == expected or code.startswith("error: ") and expected in code and "\n" not in code


BAD_FLAGS = {
    "distill.py": [
        "--steps 0", "--lr nan", "--batch 5 --micro-batch 2", "--student sdxl", "--unknown", "--feat 1",
        "--teacher none", "--caption dog", "--features SB", "--teacher absent", "--data=",
        "--task 0 --out-kd 0 --feat-kd 0", "--task 0 --teacher none --init random",
        "--out data/run --data data", "--out x/../data/run --data data"],
    "sample.py --prompt box": [
        "--stesp 3", "--steps 0", "--guidance nan", "--height 100", "--model 700M", "--out picture.jpg",
        "--unet toy --model toy 1b", "--prompt="],
    "analysis.py": [
        "", "figures", "attention --model nothing", "attention --at 2", "budget --out x", "latency --size 6"]}


@pytest.mark.parametrize("command, flags", [
    (command, flags) for command, lines in BAD_FLAGS.items() for flags in lines])
def test_a_bad_command_line_is_one_line(program, command, flags, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("model.load_unet", None)                 # nothing is loaded before
    code, out, err = program(*f"{command} {flags}".split())
    assert code == 2 and out == "" and err.startswith("error: ") and err.count("\n") == 1
    flag, *_ = re.findall(r"--(\w+)", flags) or ["COMMAND"]
    assert flag in err and not [*tmp_path.iterdir()]


# Files


def test_a_write_that_is_killed_leaves_the_old_file(tmp_path, monkeypatch):
    """The contents reach the disk before the name does."""
    target, synced = tmp_path / "file", []
    target.write_text("old")

    def killed(source: Path, target: Path):
        assert synced == [b"new"]
        raise KeyboardInterrupt

    monkeypatch.setattr(files, "sync", sync)                     # which the session leaves out
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.pread(descriptor, 9, 0)))
    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        atomic_write(target, lambda path: path.write_text("new"))
    assert contents(tmp_path) == {Path("file"): b"old"}


def test_csv(tmp_path):
    table = tmp_path / "a.csv"
    write_csv(table, ["name", "value"], [["x, y", 1.5], ["z", float("nan")]])
    rows, whole = [{"name": "x, y", "value": "1.5"}, {"name": "z", "value": "nan"}], table.read_bytes()
    assert read_csv(table, ["value"]) == rows
    table.write_bytes(whole + b"w,3")                            # cut while it was being written
    assert read_csv(table) == rows
    for damaged in (whole + b"w\n", whole + b"\xff,1\n", b"", b"name\nx\n"):
        table.write_bytes(damaged)
        assert str(table) in refusal(read_csv, table, ["value"])
    with pytest.raises(OSError, match=f"{table} cannot be written"):
        atomic_write(table, mock.Mock(side_effect=OSError(errno.ENOSPC, "No space")))


def test_csv_is_utf8_in_any_locale(tmp_path):
    code = """import sys; from pathlib import Path; from support.files import read_csv, write_csv
write_csv(Path("a.csv"), ["name"], [["gr\\u00f6\\u00dfer"]])
assert read_csv(Path("a.csv")) == [{"name": "gr\\u00f6\\u00dfer"}]"""
    environment = os.environ | {"LC_ALL": "C", "PYTHONPATH": str(Path(__file__).parents[1])}
    subprocess.run([sys.executable, "-X", "utf8=0", "-c", code], check=True, cwd=tmp_path, env=environment)
    assert "gr\u00f6\u00dfer" in (tmp_path / "a.csv").read_text(encoding="utf-8")
