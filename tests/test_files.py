"""Files are written completely or not at all; of a model on the hub only what is read is downloaded."""

import errno
import fnmatch
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from bundles import bundle
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from common import FILE, HALF_FILE, STEM, refusal, save_shards
from sample import load_pipeline
from support import files
from support.files import atomic_write, bundle_files, local_folder, read_csv, write_csv, write_json

# ------------------------------------------------------------------------------------------------------------
# Written beside and renamed into place


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    path = tmp_path / "deep" / "file"
    atomic_write(path, lambda temporary: temporary.write_text("old"))

    def fail(temporary: Path):
        temporary.write_text("ne")
        assert path.read_text() == "old"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        atomic_write(path, fail)
    assert path.read_text() == "old" and os.listdir(path.parent) == ["file"]


def test_a_folder_that_fails_leaves_nothing(tmp_path):
    def write(folder: Path):
        assert not (tmp_path / "new").exists()
        (folder / "inside").mkdir(parents=True)
        (folder / "inside" / "file").write_text("new")

    def fail(folder: Path):
        write(folder)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        atomic_write(tmp_path / "new", fail)
    assert os.listdir(tmp_path) == []
    atomic_write(tmp_path / "new", write)
    assert os.listdir(tmp_path) == ["new"] and (tmp_path / "new" / "inside" / "file").read_text() == "new"
    assert os.listdir(tmp_path / "new") == ["inside"]


def test_two_writers_do_not_disturb_each_other(tmp_path):
    def slow(temporary: Path):
        temporary.write_text("slow")
        atomic_write(tmp_path / "other", lambda temporary: temporary.write_text("quick"))

    atomic_write(tmp_path / "file", slow)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"file": "slow", "other": "quick"}


def test_a_write_reaches_the_disk_before_its_name_does(tmp_path, monkeypatch):
    calls = []
    for name in ("fsync", "replace"):
        def record(*args, name=name, call=getattr(os, name)):
            calls.append(name)
            call(*args)

        monkeypatch.setattr(os, name, record)
    atomic_write(tmp_path / "file", lambda temporary: temporary.write_text("new"))
    assert calls == ["fsync", "replace", "fsync"]
    calls.clear()
    atomic_write(tmp_path / "folder", lambda folder: (folder.mkdir(), (folder / "file").write_text("new")))
    assert calls == ["fsync", "fsync", "replace", "fsync"]


def test_json_and_csv(tmp_path):
    write_json(tmp_path / "a.json", {"b": [1], "a": None})
    assert (tmp_path / "a.json").read_text() == '{\n  "a": null,\n  "b": [\n    1\n  ]\n}\n'
    table = tmp_path / "a.csv"
    write_csv(table, ["name", "value"], [["x, y", 1], ["z", 2.5]])
    rows = [{"name": "x, y", "value": "1"}, {"name": "z", "value": "2.5"}]
    assert read_csv(table) == rows
    whole = table.read_text()
    table.write_text(whole + "w,3")  # cut while it was being written
    assert read_csv(table) == rows
    for damaged in (b"w\n", b"w,3,4\n", b"\xff,1\n"):
        table.write_bytes(whole.encode() + damaged)
        assert str(table) in refusal(read_csv, table)
    write_csv(table, ["name", "value"], [["x", 1.5], ["y", math.nan]])
    assert len(read_csv(table, ["value"])) == 2
    for text in ("", "name\nx\n", "name,value\nx,y\n"):
        table.write_text(text)
        assert str(table) in refusal(read_csv, table, ["value"])


def test_an_error_of_writing_names_the_file(tmp_path):
    for error in (OSError(errno.ENOSPC, "No space left on device"), SafetensorError("I/O error")):
        def write(path):
            raise error
        with pytest.raises(OSError, match=f"{tmp_path}/a.png cannot be written: (No space|I/O)"):
            atomic_write(tmp_path / "a.png", write)
    with pytest.raises(FileNotFoundError, match="absent"):
        atomic_write(tmp_path / "a.png", lambda path: (tmp_path / "absent").read_bytes())
    assert not any(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------------------------
# Which files of a model are downloaded

SDXL = """
    .gitattributes README.md model_index.json sd_xl_base_1.0.safetensors scheduler/scheduler_config.json
    text_encoder/config.json text_encoder/flax_model.msgpack text_encoder/model.fp16.safetensors
    text_encoder/model.onnx text_encoder/model.safetensors text_encoder/openvino_model.bin
    text_encoder_2/config.json text_encoder_2/model.fp16.safetensors text_encoder_2/model.onnx_data
    text_encoder_2/model.safetensors text_encoder_2/openvino_model.xml
    tokenizer/merges.txt tokenizer/special_tokens_map.json
    tokenizer/tokenizer_config.json tokenizer/vocab.json
    tokenizer_2/merges.txt tokenizer_2/special_tokens_map.json
    tokenizer_2/tokenizer_config.json tokenizer_2/vocab.json
    unet/config.json unet/diffusion_flax_model.msgpack unet/diffusion_pytorch_model.fp16.safetensors
    unet/diffusion_pytorch_model.safetensors unet/diffusion_pytorch_model.bin unet/model.onnx
    unet/diffusion_pytorch_model.non_ema.safetensors
    vae/config.json vae/diffusion_pytorch_model.fp16.safetensors vae/diffusion_pytorch_model.safetensors
    vae_1_0/config.json vae_1_0/diffusion_pytorch_model.safetensors vae_decoder/model.onnx
    unet/old/diffusion_pytorch_model.safetensors""".split()
SMALL_FILES = """
    model_index.json scheduler/scheduler_config.json text_encoder/config.json text_encoder_2/config.json
    tokenizer/merges.txt tokenizer/special_tokens_map.json
    tokenizer/tokenizer_config.json tokenizer/vocab.json
    tokenizer_2/merges.txt tokenizer_2/special_tokens_map.json
    tokenizer_2/tokenizer_config.json tokenizer_2/vocab.json
    unet/config.json vae/config.json""".split()


@pytest.mark.parametrize("half, variant", [(False, ""), (True, ".fp16")])
def test_one_variant_of_the_weights_is_downloaded(half, variant):
    weights = [f"text_encoder/model{variant}.safetensors", f"text_encoder_2/model{variant}.safetensors",
               f"unet/{STEM}{variant}.safetensors", f"vae/{FILE}"]
    assert sorted(bundle_files(SDXL, half=half)) == sorted(SMALL_FILES + weights)
    unet = ["model_index.json", "unet/config.json", weights[2]]
    assert sorted(bundle_files(SDXL, ("unet",), half)) == unet
    assert sorted(bundle_files(SDXL, half=half, weights=False)) == sorted(SMALL_FILES)


@pytest.mark.parametrize("half", [False, True])
def test_the_only_variant_is_downloaded(half):
    for variant in ("", ".fp16"):
        names = ["vae/config.json", f"vae/{STEM}{variant}.safetensors", "unet/config.json",
                 f"unet/{STEM}{variant}.safetensors"]
        assert sorted(bundle_files(names, half=half)) == sorted(names)


def test_shards_are_downloaded_with_their_index():
    plain = [f"unet/{STEM}-0000{i}-of-00002.safetensors" for i in (1, 2)]
    half = [f"unet/{STEM}.fp16-0000{i}-of-00002.safetensors" for i in (1, 2)]
    newer = [f"unet/{STEM}-0000{i}-of-00002.fp16.safetensors" for i in (1, 2)]
    index, half_index = (f"unet/{STEM}.safetensors.index{variant}.json" for variant in ("", ".fp16"))
    for shards in (half, newer):
        names = [*plain, *shards, index, half_index]
        assert {*plain, index} <= {*bundle_files(names)} <= {*plain, index, half_index}
        assert {*shards, half_index} <= {*bundle_files(names, half=True)} <= {*shards, index, half_index}


def test_a_repository_of_a_unet_alone():
    names = ["README.md", "config.json", FILE, HALF_FILE, f"{STEM}.bin", "lcm.png", "old/config.json"]
    assert sorted(bundle_files(names, ("unet",))) == ["config.json", FILE]
    assert sorted(bundle_files(names, ("unet",), half=True)) == ["config.json", HALF_FILE]


# ------------------------------------------------------------------------------------------------------------
# The hub


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """The hub's library with an empty cache and in offline mode, so that no test uses the network."""
    hub = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", True)
    return hub


@pytest.fixture
def served(hub, monkeypatch, tmp_path):
    """A hub that serves the folder hub/ as "a/model", and the list of the files that were downloaded."""
    downloaded = []

    def model_info(source: str, timeout: float):
        assert source == "a/model" and timeout <= 10
        paths = [path for path in (tmp_path / "hub").rglob("*") if path.is_file()]
        return SimpleNamespace(siblings=[
            SimpleNamespace(rfilename=str(path.relative_to(tmp_path / "hub"))) for path in paths])

    def snapshot_download(source: str, allow_patterns: list[str]) -> str:
        for file in model_info(source, 0).siblings:
            if any(fnmatch.fnmatch(file.rfilename, pattern) for pattern in allow_patterns):
                downloaded.append(file.rfilename)
                target = tmp_path / "snapshot" / file.rfilename
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(tmp_path / "hub" / file.rfilename, target)
        return str(tmp_path / "snapshot")

    monkeypatch.setattr("huggingface_hub.model_info", model_info)
    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    return downloaded


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shards", [False, True])
def test_a_download_is_complete(served, tmp_path, dtype, shards):
    hub, unet = bundle(tmp_path / "hub"), tmp_path / "hub" / "unet"
    plain = load_file(unet / FILE)
    half = {name: tensor.half() for name, tensor in plain.items()}
    half["conv_in.bias"] += 1  # tells the two variants apart
    if shards:
        (unet / FILE).unlink()
        save_shards(plain, unet)
        save_shards(half, unet, half=True)
    else:
        save_file(half, unet / HALF_FILE)
    (hub / "README.md").touch()
    pipeline = load_pipeline("a/model", dtype=dtype)
    expected = half if dtype == torch.float16 else plain
    assert torch.equal(pipeline.unet.conv_in.bias, expected["conv_in.bias"])
    weights = [name for name in served if name.startswith("unet/") and name.endswith(".safetensors")]
    assert len(weights) == (3 if shards else 1)
    assert "README.md" not in served and len(served) == len(set(served))
    served.clear()
    load_pipeline(hub, "a/model", dtype)
    assert served and all(name.startswith("unet/") or name == "model_index.json" for name in served)
    served.clear()
    load_pipeline("a/model", hub, dtype)
    assert served and not any(name.startswith("unet/") for name in served)


def test_a_download_that_fails(served, hub, monkeypatch, tmp_path):
    bundle(tmp_path / "hub")

    def fail(*args, **options):
        raise OSError(28, "No space left on device", "/cache/file")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    message = refusal(local_folder, "a/model")
    assert "a/model" in message and "/cache/file: No space left" in message


def test_a_repository_that_does_not_exist(hub, monkeypatch):
    for kind in (hub.errors.RepositoryNotFoundError, hub.errors.GatedRepoError, hub.errors.HFValidationError):
        def fail(*args, **options):
            raise kind.__new__(kind, "It went wrong.\n\nA second line")

        monkeypatch.setattr("huggingface_hub.model_info", fail)
        message = refusal(local_folder, "a/model")
        assert "a/model" in message and "HF_TOKEN" in message


def test_nothing_in_the_cache_and_no_network(hub, monkeypatch):
    assert "hf download etri-vilab/koala-700m" in refusal(local_folder, "etri-vilab/koala-700m")
    for kind in (ConnectionError, TimeoutError, hub.errors.HfHubHTTPError, RuntimeError):
        def fail(*args, **options):
            raise kind.__new__(kind, "It went wrong.\n\nA second line")

        monkeypatch.setattr("huggingface_hub.model_info", fail)
        message = refusal(local_folder, "a/model")
        assert "hf download a/model" in message and "HF_HOME" in message


def test_what_the_cache_has_is_used_without_network(hub, tmp_path):
    """Even if it is not the whole repository, as only parts are ever downloaded."""
    commit, place = "0" * 40, tmp_path / "cache" / "models--a--model"
    model = bundle(place / "snapshots" / commit)
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text(commit)
    (place / "trees").mkdir()  # where newer versions of the library keep the list of a repository's files
    listed = [str(path.relative_to(model)) for path in model.rglob("*") if path.is_file()]
    tree = {name: {"size": 1, "blob_id": "0"} for name in [*listed, "README.md", f"unet/{HALF_FILE}"]}
    (place / "trees" / f"{commit}.json").write_text(json.dumps({"format_version": 1, "files": tree}))
    assert local_folder("a/model") == model
    load_pipeline("a/model")
    (model / "unet" / FILE).unlink()
    assert FILE in refusal(load_pipeline, "a/model")


def test_a_hub_out_of_reach_is_reported_soon(tmp_path):
    """In another process, because the library reads its environment when it is imported."""
    pytest.importorskip("huggingface_hub")
    code = """if True:
        import time
        from support.files import local_folder
        start = time.monotonic()
        try:
            local_folder("etri-vilab/koala-700m")
        except FileNotFoundError as error:
            print(round(time.monotonic() - start), error)"""
    environment = os.environ | {"HF_ENDPOINT": "http://127.0.0.1:9", "NO_PROXY": "127.0.0.1",
                                "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=90,
                          cwd=Path(files.__file__).parents[1], env=environment)
    assert done.stdout.count("\n") == 1 and done.stderr == ""
    seconds, message = done.stdout.split(" ", 1)
    assert "hf download etri-vilab/koala-700m" in message and int(seconds) < 10


def test_a_local_folder_comes_before_the_hub(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.model_info", None)
    monkeypatch.chdir(tmp_path)
    Path("a/model").mkdir(parents=True)
    assert local_folder("a/model") == Path("a/model") and local_folder(Path("a")) == Path("a")
    Path("models").mkdir()
    Path("models/sdxl.safetensors").touch()
    message = refusal(local_folder, "models/sdxl.safetensors")
    assert "models/sdxl.safetensors" in message and "folder" in message  # not looked up on the hub
    for absent in ("nowhere", f"{tmp_path}/nowhere", "../nowhere", "a/b/c"):
        assert absent in refusal(local_folder, absent)
